"""On a real graph: a depth topic makes depth, poses and map metric."""

import numpy as np
import pytest
from node_harness import CAMERA_FRAME, matrix, stamp
from sensor_msgs.msg import CameraInfo, Image
from test_node_streams import offline
from test_outputs import points_of
from tf2_msgs.msg import TFMessage

from stream3r_ros.conversions import depth_from_message
from stream3r_ros.qos import LATCHED

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('one_thread')]
SCALE, NUM_IMAGES = 2.5, 5


@pytest.mark.parametrize('backend', ['none', 'submaps'])
def test_a_depth_topic_gives_the_scale_of_everything(live, node, backend):
    frames, outputs, cloud = offline(NUM_IMAGES)
    live.start(**{
        'scale.source': 'depth', 'outputs.map.period_s': 0.1, 'backend.kind': backend,
        'backend.sensors.min_ratios': 3,
    })  # fmt: skip
    live.connect_camera()
    depth = node.create_publisher(Image, '/depth', 10)
    live.wait_until(depth.get_subscription_count)
    assert live.figure('scale') == 'arbitrary'
    for index, frame in enumerate(frames):
        depth_m = SCALE * depth_from_message(frame.depth())
        depth.publish(live.messages.float_image(depth_m, stamp(index), CAMERA_FRAME))
        live.feed(index)
    live.wait_until(lambda: live.figure('scale') == 'metric')
    in_map = backend == 'submaps'  # the back end makes the map itself metric
    assert float(live.figure('metres_per_unit')) == pytest.approx(1 if in_map else SCALE, rel=1e-3)
    last = matrix(live.received['/tf'][-1].transforms[0].transform)
    np.testing.assert_allclose(last[:3, :3], frames[-1].T_map_camera[:3, :3], atol=1e-5)
    np.testing.assert_allclose(last[:3, 3], SCALE * frames[-1].T_map_camera[:3, 3], rtol=1e-3)
    said, unscaled = (
        depth_from_message(m)
        for m in (live.wait_for('~/depth/image', NUM_IMAGES)[-1], frames[-1].depth())
    )
    np.testing.assert_allclose(said, SCALE * unscaled, rtol=1e-3)
    expected = SCALE * points_of(outputs.map(cloud, 0))

    def map_is_metric():
        seen = live.received['~/map']
        return (
            seen
            and seen[-1].width == len(expected)
            and np.allclose(points_of(seen[-1]), expected, rtol=1e-3, atol=1e-3)
        )

    live.wait_until(map_is_metric)


def test_depth_from_beside_the_camera_counts_once_its_place_is_known(live, node):
    """The depth that the network predicts, as a depth camera behind the camera measures it."""
    frames, _, _ = offline(NUM_IMAGES)
    live.start(**{'scale.source': 'depth', 'tf_timeout_s': 0.0})
    live.connect_camera()
    depth = node.create_publisher(Image, '/depth', 10)
    info = node.create_publisher(CameraInfo, '/depth_camera_info', 10)
    static = node.create_publisher(TFMessage, '/tf_static', LATCHED.for_rclpy())
    live.wait_until(lambda: depth.get_subscription_count() and info.get_subscription_count())

    def send(index, behind_m):
        said = frames[index].camera_info()
        calibration = live.messages.camera_info(
            np.reshape(said.k, (3, 3)), said.height, said.width, stamp(index), 'depth_camera'
        )
        info.publish(calibration)
        depth_m = SCALE * depth_from_message(frames[index].depth())
        fill = np.where(np.isfinite(depth_m), depth_m + behind_m, np.nan)
        depth.publish(live.messages.float_image(fill, stamp(index), 'depth_camera'))
        live.feed(index)

    send(0, 0.0)
    live.wait_until(lambda: 'no metric scale from this image' in live.log)
    live.wait_until(lambda: live.figure('frames_without_scale') == 1)
    beside = np.eye(4)
    beside[2, 3] = -1e-4  # near enough that the views are one
    edge = live.messages.transform(beside, stamp(0), CAMERA_FRAME, 'depth_camera')
    static.publish(live.messages.tf([edge]))
    live.wait_until(static.get_subscription_count)
    for index in range(1, NUM_IMAGES):
        send(index, 1e-4)
    live.wait_until(lambda: live.figure('scale') == 'metric')
    assert float(live.figure('metres_per_unit')) == pytest.approx(SCALE, rel=0.02)


def test_depth_images_that_cannot_be_used_are_said_and_cost_no_image(live, node):
    live.start(**{'scale.source': 'depth'})
    live.connect_camera()
    depth = node.create_publisher(Image, '/depth', 10)
    live.wait_until(depth.get_subscription_count)
    damaged = live.messages.float_image(np.ones((9, 9)), stamp(0), CAMERA_FRAME)
    damaged.step = 5
    unstamped = live.messages.float_image(np.ones((9, 9)), stamp(0), CAMERA_FRAME)
    unstamped.header.stamp.nanosec = 2**32 - 1
    for message in (unstamped, damaged):
        depth.publish(message)
    live.wait_until(lambda: 'depth image rejected: stamp: nanosec' in live.log)
    live.feed(0)
    live.wait_until(lambda: 'no metric scale from this image: 32FC1 image of 9 x 9' in live.log)
    live.feed(1)
    assert live.figure('scale') == 'arbitrary'
