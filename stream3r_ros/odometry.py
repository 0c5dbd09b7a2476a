"""Uncertainty and velocity of a body that carries the camera, from those of the camera.

Covariances are 6 x 6 in the order of geometry_msgs: x, y, z, then rotations about the same fixed
axes.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

UNKNOWN = np.zeros((6, 6))  # as in sensor_msgs/Imu: -1 in element 0 means that there is none
UNKNOWN[0, 0] = -1.0
UNKNOWN.flags.writeable = False


class Sigmas(NamedTuple):
    """Standard deviations of a camera, alike in all axes."""

    position: float  # map units
    rotation: float  # rad


class Twist(NamedTuple):
    """Velocity of a body in its own axes."""

    linear: np.ndarray  # [3] map units / s
    angular: np.ndarray  # [3] rad / s


def body_covariance(camera: Sigmas | None, lever: np.ndarray) -> np.ndarray:
    """Return the covariance [6, 6] of a body; None, not known, gives :data:`UNKNOWN`.

    ``lever`` [3] leads from the camera to the body's origin, in the axes of the covariance: an
    error of rotation moves what is far from the camera.
    """
    if camera is None:
        return UNKNOWN
    x, y, z = lever
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turned = camera.rotation**2
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = camera.position**2 * np.eye(3) + turned * cross @ cross.T
    covariance[:3, 3:] = -turned * cross
    covariance[3:, :3] = covariance[:3, 3:].T
    covariance[3:, 3:] = turned * np.eye(3)
    return covariance


def body_twist(T_map_before: np.ndarray, T_map_now: np.ndarray, seconds: float) -> Twist:
    """Return the mean velocity between two poses [4, 4] of a body, in the axes of the later."""
    turn = T_map_now[:3, :3].T @ T_map_before[:3, :3]
    way = T_map_now[:3, :3].T @ (T_map_now[:3, 3] - T_map_before[:3, 3])
    return Twist(way / seconds, -Rotation.from_matrix(turn).as_rotvec() / seconds)
