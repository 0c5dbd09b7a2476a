"""The odometry message: pose, velocity and covariance of the camera or of what carries it."""

import dataclasses

import numpy as np
import pytest
import torch
from node_harness import CAMERA_FRAME, matrix, stamp
from scipy.spatial.transform import Rotation
from test_outputs import camera_poses, messages, true_predictions  # noqa: F401
from tf2_msgs.msg import TFMessage

from stream3r_core.uncertainty import ErrorModel, Uncertainty
from stream3r_ros.conversions import depth_from_message, stamp_ns
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.odometry import UNKNOWN, Sigmas, body_covariance, body_twist
from stream3r_ros.outputs import Outputs
from stream3r_ros.qos import LATCHED
from stream3r_ros.tf import Carrier

FITTED = Uncertainty(
    translation=ErrorModel(0.02, 0.5, 0.5, 4.0),
    rotation=ErrorModel(0.01, 0.5, 0.5, 4.0),
    step_translation=ErrorModel(0.005, 0.5),
    step_rotation=ErrorModel(0.002, 0.5),
    depth=ErrorModel(0.1, 1.0),
    covered_confidence=1.05,
    noise_confidence=1.2,
)
TRUST = 4.1**-0.5  # confidence 5.0
BODY = np.eye(4)  # T_body_camera
BODY[:3, :3] = Rotation.from_euler('xyz', [0.2, -0.4, 1.0]).as_matrix()
BODY[:3, 3] = 0.3, -0.1, 0.5


def turned(vectors):
    return Rotation.from_rotvec(vectors).as_matrix()


def test_the_covariance_of_a_body_is_that_of_disturbed_cameras():
    """Against 200 000 cameras that are really off by such errors, with the body hanging on."""
    rng, camera = np.random.default_rng(0), Sigmas(0.05, 0.02)
    T_map_camera = next(camera_poses())
    T_map_body = T_map_camera @ np.linalg.inv(BODY)
    lever = T_map_body[:3, 3] - T_map_camera[:3, 3]
    moved = camera.position * rng.standard_normal((200_000, 3))
    turn = camera.rotation * rng.standard_normal((200_000, 3))
    position = moved + (turned(turn) @ lever) - lever
    sampled = np.cov(np.concatenate([position, turn], 1).T)
    np.testing.assert_allclose(body_covariance(camera, lever), sampled, atol=3e-5)
    assert np.linalg.eigvalsh(body_covariance(camera, lever)).min() > 0


def test_velocity_is_in_the_axes_of_the_body():
    before, now = np.eye(4), np.eye(4)
    before[:3, :3] = turned([0, 0, 0.7])
    now[:3, :3] = turned([0, 0, 0.7 + 0.02])  # to the left
    now[:3, 3] = now[:3, :3] @ [0.1, 0, 0]  # forward
    twist = body_twist(before, now, seconds=0.1)
    np.testing.assert_allclose(twist.linear, [1.0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(twist.angular, [0, 0, 0.2], atol=1e-9)


def matrix36(values):
    return np.array(values, float).reshape(6, 6)


@pytest.mark.parametrize('scale', [1.0, 2.5])
def test_pose_and_covariance_are_those_of_the_frame(messages, scale):  # noqa: F811
    outputs = Outputs(messages, uncertainty=FITTED)
    outputs.set_scale(scale)
    for index, prediction in enumerate(true_predictions()):
        frame = outputs.add(prediction, 'camera')
        said = frame.message('~/odometry')
        assert (said.header.frame_id, said.child_frame_id) == ('map', 'camera')
        assert stamp_ns(said) == prediction.stamp_ns
        assert said.pose.pose == frame.pose.pose
        growth = TRUST * min(max(index, 1), 4) ** 0.5
        depth = scale * float(prediction.depth.median())
        covariance = matrix36(said.pose.covariance)
        np.testing.assert_allclose(
            np.diag(covariance)[:3], (0.02 * growth * depth) ** 2, rtol=1e-4
        )
        np.testing.assert_allclose(np.diag(covariance)[3:], (0.01 * growth) ** 2, rtol=1e-4)
        step = matrix36(said.twist.covariance)
        if index:
            hz = 1e9 / 33_333_333
            np.testing.assert_allclose(step[5, 5], (0.002 * TRUST * hz) ** 2, rtol=1e-4)
        else:
            np.testing.assert_array_equal(step, UNKNOWN)


def test_a_body_moves_as_it_does_in_the_map():
    """Integrating the velocities of the body leads along its poses."""
    outputs, carrier = Outputs(rosbags_messages(), uncertainty=FITTED), Carrier('base', BODY)
    T = None
    for prediction in true_predictions():
        frame = outputs.add(prediction, 'camera')
        said = frame.odometry(carrier)
        assert said.child_frame_id == 'base'
        true = frame.T_map_camera @ np.linalg.inv(BODY)
        if T is not None:
            linear, angular = (
                np.array([getattr(v, axis) for axis in 'xyz']) / 30.0000003
                for v in (said.twist.twist.linear, said.twist.twist.angular)
            )
            T[:3, :3] = T[:3, :3] @ turned(angular)
            T[:3, 3] += T[:3, :3] @ linear
            np.testing.assert_allclose(T, true, atol=1e-5)
        T = true
        assert (
            matrix36(said.pose.covariance)[0, 0] > matrix36(frame.odometry().pose.covariance)[0, 0]
        )


def test_the_covariance_of_weights_without_a_fit_is_unknown(messages):  # noqa: F811
    outputs = Outputs(messages)
    for prediction in list(true_predictions())[:2]:
        frame = outputs.add(prediction, 'camera')
        said = frame.message('~/odometry')
        for part in (said.pose, said.twist):
            np.testing.assert_array_equal(matrix36(part.covariance), UNKNOWN)
        assert np.isnan(depth_from_message(frame.message('~/depth/sigma'))).all()


def test_sigma_of_depth_follows_its_confidence(messages):  # noqa: F811
    prediction = next(true_predictions())
    confidence = torch.rand(prediction.depth.shape, generator=torch.manual_seed(0)) + 1
    depth = prediction.depth.clone()
    depth[:3] = 0
    prediction = dataclasses.replace(prediction, depth_conf=confidence, depth=depth)
    outputs = Outputs(messages, uncertainty=FITTED)
    outputs.set_scale(3.0)
    said = depth_from_message(outputs.add(prediction, 'camera').message('~/depth/sigma'))
    expected = 3.0 * depth * 0.1 / (confidence - 0.9)
    np.testing.assert_allclose(said[3:], expected[3:], rtol=1e-4)
    assert np.isnan(said[:3]).all()


@pytest.mark.ros
def test_the_node_reports_the_base_with_the_covariance_of_its_weights(live, node):
    live.start(**{'base_frame': 'base_link', 'model.weights': "''", 'tf_timeout_s': 5.0})
    live.connect_camera()
    static = node.create_publisher(TFMessage, '/tf_static', LATCHED.for_rclpy())
    edge = live.messages.transform(BODY, stamp(0), 'base_link', CAMERA_FRAME)
    live.wait_until(static.get_subscription_count)
    static.publish(live.messages.tf([edge]))
    live.feed(0, 1)
    said = live.wait_for('~/odometry', 2)[-1]
    (transform,) = live.received['/tf'][-1].transforms
    assert (said.child_frame_id, stamp_ns(said)) == ('base_link', stamp(1))
    np.testing.assert_allclose(
        matrix(transform.transform)[:3, 3],
        [getattr(said.pose.pose.position, axis) for axis in 'xyz'],
    )
    covariance = matrix36(said.pose.covariance)
    assert np.linalg.eigvalsh(covariance).min() > 0
    live.wait_until(lambda: live.figure('position_sigma'))


@pytest.mark.ros
def test_without_the_place_of_the_base_nothing_is_said_of_it(live):
    live.start(**{'base_frame': 'base_link', 'publish_tf': False, 'tf_timeout_s': 0.0})
    live.connect_camera()
    live.camera.publish(live.image(0))
    live.wait_for('~/pose', 1)
    live.wait_until(
        lambda: "no odometry for this image: no transform from 'base_link'" in live.log
    )
    assert not live.received['~/odometry']
