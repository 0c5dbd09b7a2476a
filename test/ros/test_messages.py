"""Arrays to messages: both libraries say the same bytes, and the arrays come back out."""

import tracemalloc

import numpy as np
import pytest

from stream3r_core.config import MappingConfig
from stream3r_core.mapping import VoxelMap
from stream3r_ros.bag import JAZZY
from stream3r_ros.conversions import (
    camera_matrix,
    depth_from_message,
    image_from_message,
    stamp_ns,
)
from stream3r_ros.messages import POINT, rclpy_messages, rosbags_messages
from stream3r_ros.outputs import Outputs

STAMP = 1_700_000_000_123_456_789
RNG = np.random.default_rng(5)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEPTH = np.where(RNG.random((5, 7)) < 0.2, np.nan, RNG.uniform(1, 4, (5, 7))).astype(np.float32)
K = np.array([[500.5, 0, 3.5], [0, 510.25, 2.5], [0, 0, 1]])
POINTS = RNG.normal(size=(11, 3)).astype(np.float32)
COLORS = RNG.integers(0, 256, (11, 3), dtype=np.uint8)
CONFIDENCE = RNG.uniform(1, 9, 11).astype(np.float32)


def rigid(angle=0.7):
    T = np.eye(4)
    T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T[:3, 3] = [0.5, -1.25, 3]
    return T


BUILDERS = {
    'TFMessage': lambda f: f.tf([f.transform(rigid(), STAMP, 'map', 'camera')]),
    'PoseStamped': lambda f: f.pose(rigid(), STAMP, 'map'),
    'Path': lambda f: f.path([f.pose(rigid(a), STAMP, 'map') for a in (0, 1, 2)], STAMP, 'map'),
    'depth Image': lambda f: f.float_image(DEPTH, STAMP, 'camera'),
    'rgb Image': lambda f: f.rgb_image(RGB, STAMP, 'camera'),
    'CompressedImage': lambda f: f.compressed_image(b'\xff\xd8abc', 'jpeg', STAMP, 'camera'),
    'CameraInfo': lambda f: f.camera_info(K, 5, 7, STAMP, 'camera'),
    'PointCloud2': lambda f: f.cloud(POINTS, COLORS, CONFIDENCE, STAMP, 'map'),
    'empty PointCloud2': lambda f: f.cloud(POINTS[:0], COLORS[:0], CONFIDENCE[:0], STAMP, 'map'),
}


@pytest.mark.ros
@pytest.mark.parametrize('name', BUILDERS)
def test_rclpy_and_rosbags_say_the_same_in_cdr(name):
    """Both directions; the raw bytes differ only in alignment gaps, which FastCDR leaves unset."""
    from rclpy.serialization import deserialize_message

    live_messages, recorded_messages = rclpy_messages(), rosbags_messages()
    live, recorded = BUILDERS[name](live_messages), BUILDERS[name](recorded_messages)
    recorded_bytes = recorded_messages.serialize(recorded)
    assert deserialize_message(recorded_bytes, type(live)) == live
    through_rosbags = JAZZY.deserialize_cdr(live_messages.serialize(live), recorded.__msgtype__)
    assert recorded_messages.serialize(through_rosbags) == recorded_bytes


@pytest.fixture(params=['rosbags', pytest.param('rclpy', marks=pytest.mark.ros)])
def messages(request):
    return {'rosbags': rosbags_messages, 'rclpy': rclpy_messages}[request.param]()


def test_images_come_back_with_their_exact_stamp(messages):
    message = messages.rgb_image(RGB, STAMP, 'camera')
    np.testing.assert_array_equal(image_from_message(message), RGB)
    assert stamp_ns(message) == STAMP and message.header.frame_id == 'camera'


def test_depth_comes_back_with_its_holes(messages):
    np.testing.assert_array_equal(
        depth_from_message(messages.float_image(DEPTH, STAMP, 'camera')), DEPTH
    )


def test_camera_info_states_one_undistorted_camera(messages):
    info = messages.camera_info(K, 5, 7, STAMP, 'camera')
    np.testing.assert_array_equal(camera_matrix(info), K)
    np.testing.assert_array_equal(np.reshape(info.p, (3, 4)), np.hstack([K, np.zeros((3, 1))]))
    np.testing.assert_array_equal(np.reshape(info.r, (3, 3)), np.eye(3))
    assert not np.any(info.d) and (info.height, info.width) == (5, 7)


def test_cloud_fields_lie_where_the_message_says(messages):
    cloud = messages.cloud(POINTS, COLORS, CONFIDENCE, STAMP, 'map')
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.width, cloud.point_step)
    fields = {f.name: raw[:, f.offset : f.offset + 4].copy() for f in cloud.fields}
    xyz = np.hstack([fields[axis].view('<f4') for axis in 'xyz'])
    np.testing.assert_array_equal(xyz, POINTS)
    np.testing.assert_array_equal(fields['rgb'], np.pad(COLORS[:, ::-1], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(fields['confidence'].view('<f4')[:, 0], CONFIDENCE)
    assert cloud.row_step == raw.size and cloud.height == 1 and not cloud.is_bigendian


def test_a_transform_states_the_pose_of_the_child_in_the_parent(messages):
    transform = messages.transform(rigid(0.7), STAMP, 'map', 'camera')
    moved, turned = transform.transform.translation, transform.transform.rotation
    assert (moved.x, moved.y, moved.z) == (0.5, -1.25, 3)
    np.testing.assert_allclose(
        [turned.x, turned.y, turned.z, turned.w], [0, 0, np.sin(0.35), np.cos(0.35)], atol=1e-12
    )
    assert (transform.header.frame_id, transform.child_frame_id) == ('map', 'camera')
    assert stamp_ns(transform) == STAMP


def test_every_pose_of_a_path_keeps_its_own_stamp(messages):
    poses = [messages.pose(rigid(), STAMP + k, 'map') for k in range(3)]
    path = messages.path(poses, STAMP + 9, 'map')
    assert [stamp_ns(pose) for pose in path.poses] == [STAMP, STAMP + 1, STAMP + 2]
    assert stamp_ns(path) == STAMP + 9


@pytest.mark.parametrize('make', [rosbags_messages, rclpy_messages])
def test_a_map_message_is_the_only_copy_of_the_map(make):
    count = 300_000
    voxel_map = VoxelMap(MappingConfig(voxel_size=1.0, max_points=count))
    cells = np.arange(count, dtype=np.float32)
    points = np.stack([cells % 1000, cells // 1000, cells % 7], 1) + 0.5
    voxel_map.integrate_points(points, np.zeros((count, 3), np.uint8), 1 + cells % 5)
    outputs = Outputs(make())
    tracemalloc.start()
    try:
        message = outputs.map(voxel_map.view(), stamp_ns=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.width == count and len(message.data) == 20 * count
    assert 1 <= peak / len(message.data) < 1.5
    x = np.frombuffer(message.data, POINT)['x']
    assert len(np.unique(x)) == 7  # the third axis of the world lies along x of the map
