"""Trajectories that bags carry: transforms are chained and interpolated, poses carried over."""

from itertools import pairwise

import numpy as np
import pytest
from recordings import (
    CAMERA_FRAME,
    MESSAGES,
    STEP_NS,
    rgb,
    stamp,
    true_pose,
    true_tf,
    write_images,
)

from stream3r_core.errors import DataError
from stream3r_ros.bag import BagReader, BagWriter
from stream3r_ros.clips import bag_clip
from stream3r_ros.ground_truth import bag_truth
from stream3r_ros.qos import LATCHED

STAMPS = np.array([stamp(index) for index in range(6)])
TRUTH = np.array([true_pose(index) for index in range(6)])


def turned(angle, x=0.0, y=0.0, z=0.0):
    """A pose turned about z."""
    T = np.eye(4)
    T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T[:3, 3] = x, y, z
    return T


def write_transforms(path, edges):
    """Write transforms given as (topic, parent, child, stamp_ns, T)."""
    with BagWriter(path) as bag:
        for topic, parent, child, stamp_ns, T in edges:
            message = MESSAGES.tf([MESSAGES.transform(T, stamp_ns, parent, child)])
            bag.write(topic, message, max(stamp_ns, 0), LATCHED)
    return path


def truth_of(path, topic='', frame=CAMERA_FRAME, stamps=STAMPS):
    with BagReader(path) as bag:
        return bag_truth(bag, topic, frame, stamps).trajectory


def test_a_direct_transform_is_the_trajectory(tmp_path):
    found = truth_of(write_images(tmp_path / 'bag', extra={'/tf': true_tf}))
    np.testing.assert_array_equal(found.stamps_ns, STAMPS)
    np.testing.assert_allclose(found.T_world_camera, TRUTH, atol=1e-12)
    assert found.name == f'/tf map -> {CAMERA_FRAME}'


def test_transforms_are_chained_through_moving_and_static_edges(tmp_path):
    mount = turned(0.3, 0.1, 0.2, 0.3)
    edges = [('/tf_static', 'base', CAMERA_FRAME, 0, mount)]
    for index in range(6):
        edges.append(('/tf', 'map', 'odom', stamp(index), turned(0.2 * index, z=1)))
        edges.append(('/tf', 'odom', 'base', stamp(index), turned(-0.1, x=index)))
    found = truth_of(write_transforms(tmp_path / 'bag', edges), '/tf')
    expected = [turned(0.2 * k, z=1) @ turned(-0.1, x=k) @ mount for k in range(6)]
    np.testing.assert_allclose(found.T_world_camera, expected, atol=1e-9)


def test_transforms_are_interpolated_and_never_extrapolated(tmp_path):
    edges = [('/tf', 'map', CAMERA_FRAME, stamp(k), turned(0.4 * k, x=k)) for k in (1, 3)]
    found = truth_of(write_transforms(tmp_path / 'bag', edges))
    np.testing.assert_array_equal(found.stamps_ns, STAMPS[1:4])
    expected = [turned(0.4 * k, x=k) for k in (1, 2, 3)]
    np.testing.assert_allclose(found.T_world_camera, expected, atol=1e-9)


def test_no_pose_is_made_up_in_a_long_gap(tmp_path):
    late = [stamp(0), stamp(1), stamp(1) + 10**9]
    edges = [('/tf', 'map', CAMERA_FRAME, at, true_pose(k)) for k, at in enumerate(late)]
    path = write_transforms(tmp_path / 'bag', edges)
    asked = np.array(
        [stamp(0), stamp(0) + 10**7, stamp(1), stamp(2), stamp(3), late[2], late[2] + 1]
    )
    with BagReader(path) as bag:
        found, (remark,) = bag_truth(bag, '', CAMERA_FRAME, asked)
        wide, no_remark = bag_truth(bag, '', CAMERA_FRAME, asked, max_gap_s=1.0)
        with pytest.raises(DataError, match=r'evaluation\.truth_gap_s'):
            bag_truth(bag, '/tf', CAMERA_FRAME, asked[3:5])
    assert found.stamps_ns.tolist() == [*asked[:3], late[2]]
    assert '2 images' in remark and '0.2 s' in remark
    assert len(wide) == 6 and no_remark == ()


def test_a_camera_without_moving_parents_has_no_trajectory(tmp_path):
    static = write_transforms(
        tmp_path / 'static', [('/tf_static', 'base', CAMERA_FRAME, 0, np.eye(4))]
    )
    elsewhere = write_transforms(tmp_path / 'else', [('/tf', 'map', 'drone', stamp(0), np.eye(4))])
    images = write_images(tmp_path / 'images')
    for path in (static, elsewhere, images):
        assert truth_of(path) is None
    with pytest.raises(DataError, match=f"/tf holds no pose of the frame '{CAMERA_FRAME}'"):
        truth_of(elsewhere, '/tf')


def test_transforms_in_a_circle_end(tmp_path):
    edges = [
        ('/tf', 'a', CAMERA_FRAME, stamp(0), np.eye(4)),
        ('/tf', CAMERA_FRAME, 'a', stamp(0), np.eye(4)),
    ]
    assert len(truth_of(write_transforms(tmp_path / 'bag', edges), '/tf')) == 1


@pytest.mark.parametrize('frames', [('odom',), ('map', 'odom'), ('robot1/odom',), ('start',)])
def test_a_chain_that_may_be_odometry_is_a_truth_only_when_it_is_named(tmp_path, frames):
    chain = [*frames, CAMERA_FRAME]
    edges = [
        ('/tf', parent, child, stamp(index), true_pose(index))
        for index in range(6)
        for parent, child in pairwise(chain)
    ]
    path = write_transforms(tmp_path / 'bag', edges)
    with BagReader(path) as bag:
        found, (remark,) = bag_truth(bag, '', CAMERA_FRAME, STAMPS)
        named = bag_truth(bag, '/tf', CAMERA_FRAME, STAMPS)
    assert found is None and ' -> '.join(chain) in remark and '--ground-truth /tf' in remark
    assert len(named.trajectory) == 6


@pytest.mark.parametrize('name', ['/ground_truth/pose', '/vicon/cam', '/gt', '/groundtruth_pose'])
def test_a_pose_topic_that_says_so_is_the_truth(tmp_path, name):
    def pose(index):
        return MESSAGES.pose(true_pose(index), stamp(index) + STEP_NS // 2, 'map')

    wrong = MESSAGES.tf([MESSAGES.transform(np.eye(4), stamp(0), 'odom', CAMERA_FRAME)])
    extra = {name: pose, '/tf': lambda index: wrong, '/goal': pose}
    found = truth_of(write_images(tmp_path / 'bag', extra=extra))
    assert found.name == name
    np.testing.assert_array_equal(found.stamps_ns, STAMPS + STEP_NS // 2)
    np.testing.assert_allclose(found.T_world_camera, TRUTH, atol=1e-12)


def odometry(index, child='body'):
    pose = MESSAGES.pose(true_pose(index), stamp(index), 'world')
    zero = dict.fromkeys('xyz', 0.0)
    vector = MESSAGES.make('geometry_msgs/msg/Vector3', **zero)
    covariance = np.zeros(36)
    return MESSAGES.make(
        'nav_msgs/msg/Odometry',
        header=pose.header,
        child_frame_id=child,
        pose=MESSAGES.make(
            'geometry_msgs/msg/PoseWithCovariance', pose=pose.pose, covariance=covariance
        ),
        twist=MESSAGES.make(
            'geometry_msgs/msg/TwistWithCovariance',
            twist=MESSAGES.make('geometry_msgs/msg/Twist', linear=vector, angular=vector),
            covariance=covariance,
        ),
    )


def test_odometry_of_a_body_is_carried_over_to_the_camera(tmp_path):
    mount = turned(0.5, 0.1, 0, -0.2)
    with BagWriter(tmp_path / 'bag') as bag:
        static = MESSAGES.transform(mount, 0, 'body', CAMERA_FRAME)
        bag.write('/tf_static', MESSAGES.tf([static]), 0, LATCHED)
        for index in range(6):
            bag.write('/odom', odometry(index), stamp(index))
    found = truth_of(tmp_path / 'bag', '/odom')
    np.testing.assert_allclose(found.T_world_camera, TRUTH @ mount, atol=1e-12)
    assert truth_of(tmp_path / 'bag') is None  # odometry is no truth unless it is named


MOUNT = turned(0.5, 0.1, 0, -0.2)


@pytest.mark.parametrize('by_file', [False, True])
def test_poses_of_a_tracked_body_are_moved_to_the_camera_when_told(tmp_path, by_file):
    with BagWriter(tmp_path / 'bag') as bag:
        static = MESSAGES.transform(MOUNT, 0, 'body', CAMERA_FRAME)
        bag.write('/tf_static', MESSAGES.tf([static]), 0, LATCHED)
        for index in range(6):
            bag.write('/camera/image_raw', rgb(index), stamp(index))
            body = TRUTH[index] @ np.linalg.inv(MOUNT)
            bag.write('/vicon/body', MESSAGES.pose(body, stamp(index), 'room'), stamp(index))
    np.savetxt(tmp_path / 'mount.txt', MOUNT)
    body = str(tmp_path / 'mount.txt') if by_file else 'body'
    clip = bag_clip(tmp_path / 'bag', body=body)
    np.testing.assert_allclose(clip.truth.T_world_camera, TRUTH, atol=1e-12)
    assert any('moved to the camera' in remark for remark in clip.remarks)
    untold = bag_clip(tmp_path / 'bag')
    assert not np.allclose(untold.truth.T_world_camera, TRUTH, atol=0.05)
    assert any("taken for the camera's own" in remark for remark in untold.remarks)
    with pytest.raises(DataError, match="'nobody' is no file, and /tf_static"):
        bag_clip(tmp_path / 'bag', body='nobody')


def test_odometry_of_an_unconnected_body_is_refused(tmp_path):
    path = write_images(tmp_path / 'bag', extra={'/odom': odometry})
    with pytest.raises(DataError, match='/odom holds no pose of the frame'):
        truth_of(path, '/odom')


def test_a_topic_of_another_type_is_refused(tmp_path):
    path = write_images(tmp_path / 'bag')
    with pytest.raises(DataError, match='is a sensor_msgs/msg/Image; expected tf2_msgs'):
        truth_of(path, '/camera/image_raw')


def test_a_transform_without_rotation_is_refused(tmp_path):
    message = true_tf(0)
    message.transforms[0].transform.rotation.w = 0.0
    path = write_images(tmp_path / 'bag', extra={'/tf': lambda index: message})
    with pytest.raises(DataError, match='where a quaternion should be'):
        truth_of(path)
