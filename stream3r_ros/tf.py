"""The transform that the node broadcasts: its frames, and how the map lies in space."""

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.errors import ConfigError, InputError
from stream3r_ros.config import NodeConfig

# REP-103: an optical frame (x right, y down, z forward) as seen from its body (x forward, z up).
T_BODY_OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
_MIN_HEADING = 0.05  # horizontal part of a direction that still says where it points


class Carrier(NamedTuple):
    """The frame that the broadcast puts into the map, and the camera in it."""

    frame: str
    T_carrier_camera: np.ndarray  # [4, 4]


def check_frames(config: NodeConfig) -> None:
    """Raise :class:`ConfigError` unless the configured frames can be frames of tf2."""
    if not config.map_frame:
        raise ConfigError("map_frame must not be empty; REP-105 calls it 'map'")
    if config.scale.source == 'odometry' and not config.odom_frame:
        raise ConfigError("scale.source is 'odometry': set odom_frame to its frame on /tf")
    if config.backend.load and config.odom_frame and config.map_orientation == 'level':
        raise ConfigError(
            "backend.load: map_orientation 'level' with odom_frame would lay the saved map by the "
            "attitude of today's first image; set map_orientation to 'camera'"
        )
    taken: dict[str, str] = {}
    for name in ('map_frame', 'odom_frame', 'base_frame', 'camera_frame'):
        frame = getattr(config, name)
        if frame.startswith('/'):
            raise ConfigError(f'{name}: tf2 takes no leading slash, got {frame!r}')
        if frame in taken:
            raise ConfigError(f'{taken[frame]} and {name} are both {frame!r}')
        if frame:
            taken[frame] = name


def camera_frame(image_frame_id: str, config: NodeConfig) -> str:
    """Return the optical frame of an image: the configured one, or the image's own frame_id.

    Raises :class:`InputError` where that is no frame that can hang below ``map_frame``.
    """
    frame = config.camera_frame or image_frame_id
    if not frame:
        raise InputError('the image has no frame_id; set the parameter camera_frame')
    if frame.startswith('/'):
        raise InputError(
            f'the image has frame_id {frame!r}: tf2 takes no leading slash; set camera_frame'
        )
    if frame == config.map_frame:
        raise InputError(
            f'the image has frame_id {frame!r}, which is also map_frame; set one of the '
            'parameters map_frame and camera_frame'
        )
    return frame


def carrier_frame(camera_frame: str, config: NodeConfig) -> str:
    """Return the frame that is put into the map: odometry, base or the camera itself."""
    return config.odom_frame or config.base_frame or camera_frame


def odometry_frame(camera_frame: str, config: NodeConfig) -> str:
    """Return the frame whose pose and velocity the odometry message states."""
    return config.base_frame or camera_frame


def T_level_camera(roll: float, pitch: float) -> np.ndarray:
    """Return the pose [4, 4] of an optical frame at the origin, in a frame with z up.

    Angles in rad, of the body of the camera (x forward, y left): positive ``roll`` lowers its
    right side, positive ``pitch`` its front (REP-103).
    """
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler('YX', [pitch, roll]).as_matrix()
    return T @ T_BODY_OPTICAL


def T_map_of_first_camera(config: NodeConfig) -> np.ndarray:
    """Return T_map_world [4, 4] as configured, where no odometry has a say."""
    if config.map_orientation == 'camera':
        return T_BODY_OPTICAL
    return T_level_camera(config.camera_roll, config.camera_pitch)


def upright_map(T_up_camera: np.ndarray) -> np.ndarray:
    """Return T_map_world [4, 4] from the first camera's attitude in any frame with z up.

    The map begins in the first camera; its x axis is where that camera looks, horizontally, or
    the upper edge of its image where it looks straight down.
    """
    R_up_camera = T_up_camera[:3, :3]
    heading = R_up_camera[:, 2]
    if np.linalg.norm(heading[:2]) < _MIN_HEADING:
        heading = np.sign(heading[2]) * R_up_camera[:, 1]
    yaw = np.arctan2(heading[1], heading[0])
    T_map_world = np.eye(4)
    T_map_world[:3, :3] = Rotation.from_euler('z', -yaw).as_matrix() @ R_up_camera
    return T_map_world
