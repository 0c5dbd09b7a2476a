"""True depth and true poses through map and messages give the true room back."""

import dataclasses

import numpy as np
import pytest
import torch

from stream3r_core.config import MappingConfig
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import MapCloud, VoxelMap
from stream3r_core.types import FramePrediction
from stream3r_ros.conversions import camera_matrix, depth_from_message, stamp_ns
from stream3r_ros.messages import rclpy_messages, rosbags_messages
from stream3r_ros.outputs import FRAME_TOPICS, TOPICS, Outputs, WorldInMap

HEIGHT, WIDTH, FOCAL = 48, 64, 40.0
K = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
ROOM_M = np.array([[-2.0, -1.5, -1.0], [2.5, 1.5, 1.2]])  # opposite corners, map frame (z up)
STEP_NS = 33_333_333
VOXEL_M = 0.05


def camera_poses(num=12):
    """True T_map_camera of a camera that looks around in the room; the first one is level."""
    for k in range(num):
        yaw, pitch = 2 * np.pi * k / num, 0.3 * np.sin(k)
        forward = np.array(
            [np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)]
        )
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        T = np.eye(4)
        T[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)  # optical axes
        T[:3, 3] = 0.1 * k * np.array([0.3, -0.2, 0.1])
        yield T


def true_depth(T_map_camera):
    """Depth [H, W] from inside the box: along each ray, the first wall."""
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([(u - K[0, 2]) / FOCAL, (v - K[1, 2]) / FOCAL, np.ones((HEIGHT, WIDTH))], -1)
    directions = rays @ T_map_camera[:3, :3].T  # of unit depth
    with np.errstate(divide='ignore'):
        to_walls = (ROOM_M[:, None, None] - T_map_camera[:3, 3]) / directions  # [2, H, W, 3]
    return np.where(to_walls > 0, to_walls, np.inf).min((0, 3))


def true_predictions():
    poses = list(camera_poses())
    for index, T_map_camera in enumerate(poses):
        size = HEIGHT, WIDTH
        yield FramePrediction(
            index=index,
            stamp_ns=1_700_000_000_000_000_001 + index * STEP_NS,
            T_world_camera=torch.from_numpy(np.linalg.inv(poses[0]) @ T_map_camera).float(),
            K=torch.from_numpy(K).float(),
            rgb=torch.full((HEIGHT, WIDTH, 3), 10 * index, dtype=torch.uint8),
            depth=torch.from_numpy(true_depth(T_map_camera)).float(),
            depth_conf=torch.full(size, 5.0),
            world_points=None,
            world_points_conf=None,
            geometry=ImageGeometry(size, size, (1.0, 1.0), (0, 0)),
        )


def points_of(cloud):
    raw = np.frombuffer(cloud.data, np.uint8).reshape(-1, cloud.point_step)
    return raw[:, :12].copy().view('<f4').astype(float)


def distance_to_walls(points):
    """Distance [N] of points inside or near the room to the nearest of its six walls."""
    return np.abs(points[:, None] - ROOM_M).min((1, 2))


@pytest.fixture(params=['rosbags', pytest.param('rclpy', marks=pytest.mark.ros)])
def messages(request):
    return {'rosbags': rosbags_messages, 'rclpy': rclpy_messages}[request.param]()


@pytest.fixture
def outputs(messages):
    return Outputs(messages, mapping=MappingConfig(min_confidence=1.0, confidence_quantile=0.0))


def matrix_of(transform):
    x, y, z, w = (getattr(transform.rotation, axis) for axis in 'xyzw')
    T = np.eye(4)
    T[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    T[:3, 3] = [getattr(transform.translation, axis) for axis in 'xyz']
    return T


def test_tf_is_the_true_pose_with_the_stamp_of_the_image(outputs):
    start = next(camera_poses())[:3, 3]
    for prediction, truth in zip(true_predictions(), camera_poses()):
        (transform,) = outputs.add(prediction, 'camera').tf().transforms
        truth[:3, 3] -= start  # the map begins at the first camera
        np.testing.assert_allclose(matrix_of(transform.transform), truth, atol=1e-6)
        assert (transform.header.frame_id, transform.child_frame_id) == ('map', 'camera')
        assert stamp_ns(transform) == prediction.stamp_ns


def test_the_map_message_is_the_room_with_z_up(outputs):
    config = MappingConfig(voxel_size=VOXEL_M, min_confidence=1.0, confidence_quantile=0.0)
    voxel_map = VoxelMap(config)
    for prediction in true_predictions():
        voxel_map.integrate(prediction)
    message = outputs.map(voxel_map.points(), stamp_ns=7)
    points = points_of(message)
    assert message.header.frame_id == 'map' and stamp_ns(message) == 7
    assert len(points) == voxel_map.num_points > 5000
    assert np.quantile(distance_to_walls(points), 0.99) < 1e-3
    assert distance_to_walls(points).max() < VOXEL_M  # voxels that span a corner
    seen = [points.min(0), points.max(0)]
    np.testing.assert_allclose(seen, ROOM_M, atol=1e-3)  # floor, ceiling and four walls


def test_the_cloud_of_a_frame_lies_on_the_walls_through_the_frames_own_transform(outputs):
    for prediction in true_predictions():
        frame = outputs.add(prediction, 'camera')
        cloud, (edge,) = frame.cloud(), frame.tf().transforms
        assert cloud.header.frame_id == edge.child_frame_id and stamp_ns(cloud) == stamp_ns(edge)
        T_map_camera = matrix_of(edge.transform)
        points = points_of(cloud) @ T_map_camera[:3, :3].T + T_map_camera[:3, 3]
        assert len(points) > HEIGHT * WIDTH / 2
        assert distance_to_walls(points).max() < 1e-4


def test_depth_and_camera_info_unproject_to_the_walls(outputs):
    for prediction, T_map_camera in zip(true_predictions(), camera_poses()):
        frame = outputs.add(prediction, 'camera')
        depth_m, K_said = depth_from_message(frame.depth()), camera_matrix(frame.camera_info())
        v, u = np.mgrid[:HEIGHT, :WIDTH]
        pixels = np.stack([u, v, np.ones_like(u)], -1) * depth_m[..., None]
        points_camera = pixels.reshape(-1, 3) @ np.linalg.inv(K_said).T
        points = points_camera @ T_map_camera[:3, :3].T + T_map_camera[:3, 3]
        assert distance_to_walls(points).max() < 1e-4


def test_all_messages_of_a_frame_carry_its_stamp_and_the_announced_type(outputs, messages):
    prediction = next(true_predictions())
    frame = outputs.add(prediction, 'camera')
    for topic in FRAME_TOPICS:
        message = frame.message(topic)
        stamped = message.transforms[0] if topic == '/tf' else message
        assert stamp_ns(stamped) == prediction.stamp_ns
        assert type(message).__name__.endswith(TOPICS[topic].type.rpartition('/')[2])


def test_depth_without_a_value_is_nan_and_no_point(outputs):
    prediction = next(true_predictions())
    prediction.depth[:4] = 0
    prediction.depth[4:8] = torch.nan
    frame = outputs.add(prediction, 'camera')
    assert np.isnan(depth_from_message(frame.depth())[:8]).all()
    assert np.isfinite(depth_from_message(frame.depth())[8:]).all()
    points = points_of(frame.cloud())
    assert np.isfinite(points).all() and len(points) <= (HEIGHT - 8) * WIDTH


def test_the_path_keeps_the_latest_poses_with_their_own_stamps(messages):
    outputs = Outputs(messages, max_path_poses=5)
    predictions = list(true_predictions())
    for prediction in predictions:
        frame = outputs.add(prediction, 'camera')
    path = outputs.path(frame.stamp_ns)
    assert [stamp_ns(pose) for pose in path.poses] == [p.stamp_ns for p in predictions[-5:]]
    assert path.poses[-1] == frame.pose
    outputs.reset()
    assert not outputs.path(0).poses


def test_a_correction_costs_what_the_path_costs_and_keeps_stamps(messages, monkeypatch):
    outputs, moved = Outputs(messages, max_path_poses=5), []
    predictions = list(true_predictions())
    for prediction in predictions:
        outputs.add(prediction, 'camera')
    place = outputs.world.poses
    monkeypatch.setattr(WorldInMap, 'poses', lambda _, T: moved.append(len(T)) or place(T))
    older = 7 - np.arange(3000)[::-1]  # frames of a long run before
    stamps = np.concatenate([older, [p.stamp_ns for p in predictions]])
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, 0, 3] = np.arange(len(stamps))
    outputs.correct(stamps, poses)
    assert moved == [5]
    path = outputs.path(0).poses
    assert [stamp_ns(pose) for pose in path] == [p.stamp_ns for p in predictions[-5:]]
    for pose, T in zip(path, place(poses[-5:])):
        assert position(pose) == pytest.approx(T[:3, 3].tolist())


VOXEL = np.dtype(
    [(name, '<f4') for name in ('x', 'y', 'z', 'rgb', 'confidence', 'weight')]
    + [('low', '<u4'), ('high', '<u4')]
)


def apply(voxels, changes):
    """Keep a map as a subscriber of ~/map_changes does: voxel id -> point."""
    for message in changes:
        assert [field.offset for field in message.fields] == list(range(0, 32, 4))
        rows = np.frombuffer(message.data, VOXEL)
        assert len(rows) == message.width
        if not len(rows):
            voxels.clear()
        for row in rows:
            number = int(row['high']) << 32 | int(row['low'])
            if row['weight'] > 0:
                voxels[number] = (row['x'], row['y'], row['z'])
            else:
                voxels.pop(number, None)
    return voxels


def test_changes_add_up_to_the_map_whatever_is_removed(outputs):
    config = MappingConfig(
        voxel_size=0.1, max_points=800, min_confidence=1.0, confidence_quantile=0.0
    )
    voxel_map, version, voxels, num_gone = VoxelMap(config), -1, {}, 0
    for prediction in true_predictions():
        voxel_map.integrate(prediction)
        change = voxel_map.changed_since(version)
        messages = list(outputs.map_changes(change, 7, max_points=500))
        assert max(message.width for message in messages) <= 500
        num_gone += sum((np.frombuffer(m.data, VOXEL)['weight'] == 0).sum() for m in messages)
        assert all(m.is_dense or (change.weight == 0).any() for m in messages)
        apply(voxels, messages)
        version = change.version
        expected = points_of(outputs.map(voxel_map.points(), 7))
        np.testing.assert_array_equal(
            np.sort(np.array(list(voxels.values())), 0), np.sort(expected, 0)
        )
    assert num_gone > 100
    voxel_map.clear()
    assert apply(voxels, outputs.map_changes(voxel_map.changed_since(version), 8, 500)) == {}


def halved(prediction):
    """The same frame in scene units of two metres."""
    T = prediction.T_world_camera.clone()
    T[:3, 3] /= 2
    return dataclasses.replace(prediction, depth=prediction.depth / 2, T_world_camera=T)


def position(pose):
    return [getattr(pose.pose.position, axis) for axis in 'xyz']


def test_a_scale_reaches_depth_poses_path_and_map_alike(messages):
    config = MappingConfig(voxel_size=VOXEL_M, min_confidence=1.0, confidence_quantile=0.0)
    T_map_world = Outputs(messages).world.T_map_world.copy()
    T_map_world[:3, 3] = 1, 2, 3
    right, small = (Outputs(messages, 'map', T_map_world, mapping=config) for _ in range(2))
    maps = [VoxelMap(config), VoxelMap(dataclasses.replace(config, voxel_size=VOXEL_M / 2))]
    for index, prediction in enumerate(true_predictions()):
        frames = right.add(prediction, 'camera'), small.add(halved(prediction), 'camera')
        for voxel_map, seen in zip(maps, (prediction, halved(prediction))):
            voxel_map.integrate(seen)
        if index == 2:
            small.set_scale(2.0)
        if index <= 2:
            continue
        depth, other_depth = (depth_from_message(frame.depth()) for frame in frames)
        np.testing.assert_allclose(depth, other_depth)
        cloud, other_cloud = (points_of(frame.cloud()) for frame in frames)
        np.testing.assert_allclose(cloud, other_cloud, atol=1e-5)
        np.testing.assert_allclose(frames[0].T_map_camera, frames[1].T_map_camera, atol=1e-6)
    path, other_path = ([position(p) for p in o.path(0).poses] for o in (right, small))
    np.testing.assert_allclose(path, other_path, atol=1e-6)  # also what was there before
    cloud, other_cloud = (points_of(o.map(m.points(), 0)) for o, m in zip((right, small), maps))
    np.testing.assert_allclose(cloud.min(0), other_cloud.min(0), atol=1e-4)
    np.testing.assert_allclose(cloud.max(0), other_cloud.max(0), atol=1e-4)


def test_a_map_message_has_one_scale_though_another_is_found_while_it_is_written(outputs):
    voxel_map = VoxelMap(MappingConfig(voxel_size=VOXEL_M, confidence_quantile=0.0))
    for prediction in true_predictions():
        voxel_map.integrate(prediction)
    cloud = voxel_map.points()
    before = points_of(outputs.map(cloud, 0))

    class Read:
        """The map, read in two blocks, and what another thread does meanwhile."""

        def __len__(self):
            return len(cloud)

        def blocks(self):
            for rows in np.array_split(np.arange(len(cloud)), 2):
                yield MapCloud(*(column[rows] for column in vars(cloud).values()))
                outputs.set_scale(3.0)

    np.testing.assert_array_equal(points_of(outputs.map(Read(), 0)), before)
    np.testing.assert_allclose(points_of(outputs.map(cloud, 0)), 3 * before, rtol=1e-6)


def test_another_map_frame_moves_everything_alike(messages):
    T_map_world = np.eye(4)
    T_map_world[:3, 3] = [10, 20, 30]
    outputs = Outputs(messages, map_frame='site', T_map_world=T_map_world)
    prediction = next(true_predictions())
    frame = outputs.add(prediction, 'camera')
    moved = frame.tf().transforms[0].transform.translation
    assert (moved.x, moved.y, moved.z) == (10, 20, 30)
    voxel_map = VoxelMap(MappingConfig(confidence_quantile=0.0))
    voxel_map.integrate(prediction)
    cloud = voxel_map.points()
    message = outputs.map(cloud, 0)
    np.testing.assert_allclose(
        points_of(message), np.add(cloud.points_xyz, [10, 20, 30]), atol=1e-5
    )
    assert message.header.frame_id == frame.pose.header.frame_id == 'site'
