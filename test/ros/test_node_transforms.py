"""On a real graph: the camera is right in the map, whatever else is on /tf."""

import numpy as np
import pytest
from node_harness import CAMERA_FRAME, matrix, picture, stamp
from rclpy.qos import QoSProfile
from test_node_streams import offline
from test_transforms import moving, pose
from tf2_msgs.msg import TFMessage

from stream3r_ros.conversions import stamp_ns
from stream3r_ros.qos import LATCHED
from stream3r_ros.tf import T_BODY_OPTICAL, T_level_camera, upright_map

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('one_thread')]
NUM_IMAGES = 3
T_BASE_CAMERA = pose(0.1, 0, 0.5) @ T_level_camera(0.1, 0.3)


@pytest.fixture
def broadcast(live, node):
    """Return a function that sends a transform on /tf, or a static one."""
    publishers = {
        False: node.create_publisher(TFMessage, '/tf', QoSProfile(depth=100)),
        True: node.create_publisher(TFMessage, '/tf_static', LATCHED.for_rclpy()),
    }

    def send(parent, child, T, at_ns, is_static=False):
        publisher = publishers[is_static]
        live.wait_until(lambda: node.count_subscribers('/tf_static'))
        live.wait_until(lambda: publisher.get_subscription_count() > (not is_static))
        publisher.publish(live.messages.tf([live.messages.transform(T, at_ns, parent, child)]))

    return send


def from_map(live):
    return [
        edge
        for message in live.received['/tf']
        for edge in message.transforms
        if edge.header.frame_id == 'map'
    ]


def feed(live, *indices):
    """Send images whose transform may be missing."""
    for index in indices:
        count = live.figure('images_processed') + 1
        live.camera.publish(live.image(index))
        live.wait_until(lambda count=count: live.figure('images_processed') == count)


def seconds(index):
    return (stamp(index) - stamp(0)) / 1e9


def test_with_odometry_the_chain_through_it_is_right_at_each_stamp(live, broadcast):
    live.start(odom_frame='odom', tf_timeout_s=5.0)
    live.connect_camera()
    broadcast('base', CAMERA_FRAME, T_BASE_CAMERA, stamp(0), is_static=True)
    for tick in range(-1, 12):  # every 10 ms: never at the stamp of an image
        broadcast('odom', 'base', moving(0.01 * tick), stamp(0) + tick * 10_000_000 + 1)
    feed(live, *range(NUM_IMAGES))
    live.wait_until(lambda: len(from_map(live)) == NUM_IMAGES)
    for index, (edge, frame) in enumerate(zip(from_map(live), offline(NUM_IMAGES)[0])):
        assert edge.child_frame_id == 'odom' and stamp_ns(edge) == stamp(index)
        T_odom_camera = moving(seconds(index)) @ T_BASE_CAMERA
        T_map_camera = matrix(edge.transform) @ T_odom_camera
        np.testing.assert_allclose(T_map_camera, frame.T_map_camera, atol=1e-5)


def test_a_missing_transform_is_no_value_and_is_said(live, broadcast):
    live.start(odom_frame='odom', tf_timeout_s=0.5)
    live.connect_camera()
    feed(live, 0)
    assert 'no transform is broadcast for this image' in live.log
    broadcast('odom', CAMERA_FRAME, moving(0), stamp(1))
    broadcast('odom', CAMERA_FRAME, moving(1), stamp(3))
    feed(live, 2, 4)  # known, and beyond what is known
    live.wait_until(lambda: live.figure('frames_without_tf') == 2)
    live.wait_until(lambda: from_map(live))
    assert [stamp_ns(edge) for edge in from_map(live)] == [stamp(2)]
    assert len(live.wait_for('~/pose', 3)) == 3  # the rest goes out all the same
    reasons = ('has no parent', 'older than the image')
    assert [live.log.count(reason) for reason in reasons] == [1, 1]  # each once


def test_a_base_without_odometry_hangs_below_the_map(live, broadcast):
    live.start(base_frame='base', tf_timeout_s=5.0)
    live.connect_camera()
    broadcast('base', CAMERA_FRAME, T_BASE_CAMERA, stamp(0), is_static=True)
    feed(live, 0)
    live.wait_until(lambda: from_map(live))
    (edge,) = from_map(live)
    assert edge.child_frame_id == 'base'
    expected = offline(1)[0][0].T_map_camera
    np.testing.assert_allclose(matrix(edge.transform) @ T_BASE_CAMERA, expected, atol=1e-5)


def test_a_level_map_takes_its_z_axis_from_the_odometry_and_waits_for_it(live, broadcast):
    live.start(odom_frame='odom', map_orientation='level', tf_timeout_s=0.5)
    live.connect_camera()
    live.camera.publish(live.image(0))
    reason = 'map_orientation is level, but there is no transform'
    live.wait_until(lambda: reason in live.diagnostics['message'])
    T_odom_camera = pose(3, 4, 5, (0, 0, 1)) @ T_level_camera(0.2, -0.4)
    broadcast('odom', CAMERA_FRAME, T_odom_camera, stamp(1))
    feed(live, 1)
    live.wait_until(lambda: from_map(live))
    frame = offline(1, see=lambda index: picture(1))[0][0]
    T_world_camera = np.linalg.inv(T_BODY_OPTICAL) @ frame.T_map_camera
    T_map_camera = matrix(from_map(live)[0].transform) @ T_odom_camera
    np.testing.assert_allclose(
        T_map_camera, upright_map(T_odom_camera) @ T_world_camera, atol=1e-5
    )
