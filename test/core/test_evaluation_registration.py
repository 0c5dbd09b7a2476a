"""Registered depth: the same plane seen from the camera beside."""

import numpy as np
from dataset_miniatures import Scene, camera, distance_to_plane_m
from scipy.spatial.transform import Rotation

from stream3r_core.evaluation.registration import register_depth


def test_a_plane_stays_a_plane_in_the_other_camera():
    scene = Scene(camera(), size_hw=(48, 64))
    T_camera_depth = np.eye(4)
    T_camera_depth[:3, :3] = Rotation.from_rotvec([0.01, -0.03, 0.02]).as_matrix()
    T_camera_depth[:3, 3] = [-0.05, 0.01, 0.02]
    K_camera = camera(fx=24, fy=25, cx=26, cy=20)
    registered = register_depth(scene.depth_m[0], scene.K, T_camera_depth, K_camera, (40, 52))
    seen = registered > 0
    assert seen.mean() > 0.5
    T_world_camera = scene.T_world_camera[0] @ np.linalg.inv(T_camera_depth)
    distance = distance_to_plane_m(registered, K_camera, T_world_camera)[seen]
    assert distance.max() < 0.5 * 2.7 / 24 * 0.3 + 0.01  # half a pixel on a slant of 0.3


def test_the_same_camera_sees_the_same_depth():
    depth = np.random.default_rng(0).random((12, 16)).astype(np.float32) + 1
    assert np.array_equal(register_depth(depth, camera(), np.eye(4), camera(), (12, 16)), depth)


def test_the_nearest_surface_wins_and_invalid_depth_is_left_out():
    depth = np.array([[2.0, 1.0, np.nan, 0.0, -3.0, np.inf]], np.float32)
    K = np.array([[1e-6, 0, 0], [0, 1, 0], [0, 0, 1.0]])  # all pixels look the same way
    K_depth = np.array([[1e6, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    registered = register_depth(depth, K_depth, np.eye(4), K, (1, 2))
    assert registered.tolist() == [[1.0, 0.0]]


def test_points_behind_the_other_camera_are_not_seen():
    behind = np.eye(4)
    behind[2, 3] = -5
    assert not register_depth(np.ones((4, 4)), camera(), behind, camera(), (4, 4)).any()
