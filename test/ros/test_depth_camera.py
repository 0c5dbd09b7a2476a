"""Depth of a camera beside the camera: exact truth gives the exact scale, and only with its TF."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_outputs import ROOM_M, true_depth, true_predictions
from test_transforms import edge

from stream3r_core.errors import InputError
from stream3r_core.synthetic.render import camera_rays
from stream3r_ros.config import ScaleConfig
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.scale import DepthScale
from stream3r_ros.transforms import TransformBuffer, TransformError

CONFIG = ScaleConfig(source='depth')
SCALE = 2.5
T_CAMERA_DEPTH = np.eye(4)
T_CAMERA_DEPTH[:3, :3] = Rotation.from_euler('xyz', [0.1, -0.2, 0.05]).as_matrix()
T_CAMERA_DEPTH[:3, 3] = -0.4, 0.1, 0.2
K_DEPTH = np.array([[90.0, 0, 75], [0, 95, 52], [0, 0, 1]])
SIZE = 100, 150
OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
BEND = (-0.2, 0.05)


def predicted():
    """What the image shows of the room, exact but in units of SCALE metres."""
    prediction = next(true_predictions())
    depth = torch.from_numpy(true_depth(OPTICAL)).float() / SCALE
    return dataclasses.replace(prediction, depth=depth)


def measured(T_map_depth, bend=(0.0, 0.0)):
    """Depth [H, W] of the room, metres, by a camera of that lens."""
    rays = camera_rays(torch.from_numpy(K_DEPTH[None]).float(), *SIZE, bend)[0].double().numpy()
    directions = rays / rays[:, 2:] @ T_map_depth[:3, :3].T
    with np.errstate(divide='ignore'):
        to_walls = (ROOM_M[:, None] - T_map_depth[:3, 3]) / directions
    return np.where(to_walls > 0, to_walls, np.inf).min((0, 2)).reshape(SIZE)


def info(bend=(), height=SIZE[0]):
    made = rosbags_messages().camera_info(K_DEPTH, height, SIZE[1], 0, 'depth')
    made.d = np.array([*bend, 0, 0, 0] if bend else [], float)
    return made


def scale_of(depth_m, frame='depth', calibration=None, transforms=None):
    prediction = predicted()
    scale = DepthScale(transforms or TransformBuffer())
    scale.camera_info = calibration
    scale.add(rosbags_messages().float_image(depth_m, prediction.stamp_ns, frame))
    return scale.ratio(prediction, 'camera', CONFIG)


def known(T=T_CAMERA_DEPTH):
    transforms = TransformBuffer()
    transforms.add(edge('camera', 'depth', T), is_static=True)
    return transforms


@pytest.mark.parametrize('bend', [(0.0, 0.0), BEND])
def test_depth_from_the_side_gives_the_exact_scale(bend):
    depth_m = measured(OPTICAL @ T_CAMERA_DEPTH, bend)
    found = scale_of(depth_m, calibration=info(bend if any(bend) else ()), transforms=known())
    assert found == pytest.approx(SCALE, rel=2e-3)
    wrong = scale_of(depth_m, calibration=info(), transforms=known(np.eye(4)))
    assert abs(wrong / SCALE - 1) > 0.03  # the place of the depth camera matters


def test_in_the_frame_of_the_camera_a_calibration_needs_no_transform():
    depth_m = measured(OPTICAL)  # another lens and resolution at the same place
    assert scale_of(depth_m, 'camera', info()) == pytest.approx(SCALE, rel=2e-3)


def test_without_its_place_a_depth_camera_says_nothing():
    depth_m = measured(OPTICAL @ T_CAMERA_DEPTH)
    with pytest.raises(TransformError, match="no transform from 'camera' to 'depth'"):
        scale_of(depth_m, calibration=info())


def test_a_calibration_for_another_size_is_refused():
    with pytest.raises(InputError, match='depth_camera_info is for 150 x 99 pixels'):
        scale_of(measured(OPTICAL), 'camera', info(height=99))


def test_a_distortion_that_is_no_number_is_refused():
    with pytest.raises(InputError, match='not finite'):
        scale_of(measured(OPTICAL), 'camera', info((np.nan, 0.0)))


def test_points_beside_or_behind_the_image_do_not_count():
    turned = T_CAMERA_DEPTH.copy()
    turned[:3, :3] = Rotation.from_euler('y', np.pi).as_matrix()
    assert (
        scale_of(measured(OPTICAL @ turned), calibration=info(), transforms=known(turned)) is None
    )
