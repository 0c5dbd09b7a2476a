"""Where the camera, its carriers and the map stand to each other, as /tf says for one image."""

import logging

import numpy as np

from stream3r_core.errors import InputError
from stream3r_ros.config import NodeConfig
from stream3r_ros.logging_bridge import Throttled
from stream3r_ros.tf import (
    Carrier,
    T_map_of_first_camera,
    carrier_frame,
    odometry_frame,
    upright_map,
)
from stream3r_ros.transforms import TransformBuffer, TransformError

_log = logging.getLogger(__name__)


class Placement:
    """Looks up what a frame needs; a transform that is missing is no value, said and counted."""

    def __init__(self, transforms: TransformBuffer):
        self._transforms = transforms
        self._warn = Throttled(_log.warning)
        self.num_without_tf = 0  # images for which nothing could be broadcast

    def map_of_first_camera(self, frame: str, stamp: int, config: NodeConfig) -> np.ndarray:
        """Return T_map_world [4, 4]: how the map of a session lies whose first camera this is.

        Raises :class:`InputError` where /tf must say how, and does not.
        """
        if config.map_orientation != 'level' or not config.odom_frame:
            return T_map_of_first_camera(config)
        try:
            T = self._transforms.lookup(config.odom_frame, frame, stamp, config.tf_timeout_s)
        except TransformError as error:
            raise InputError(f'map_orientation is level, but there is {error}') from None
        return upright_map(T)

    def carriers(
        self, frame: str, stamp: int, config: NodeConfig
    ) -> tuple[Carrier | None, Carrier | None]:
        """Return what the broadcast puts into the map, and what the odometry is about.

        None where that is switched off or its place is not known.
        """
        broadcast = carrier_frame(frame, config) if config.publish_tf else ''
        reported = odometry_frame(frame, config) if config.outputs.odometry.enabled else ''
        found, missing = {'': None}, {}
        for name in {broadcast, reported} - {''}:
            try:
                found[name] = self._carrier(name, frame, stamp, config)
            except TransformError as error:
                found[name], missing[name] = None, error
        if broadcast in missing:
            self.num_without_tf += 1
            self._warn(f'no transform is broadcast for this image: {missing[broadcast]}')
        elif reported in missing:
            self._warn(f'no odometry for this image: {missing[reported]}')
        return found[broadcast], found[reported]

    def _carrier(self, name: str, frame: str, stamp: int, config: NodeConfig) -> Carrier:
        if name == frame:
            return Carrier(frame, np.eye(4))
        return Carrier(name, self._transforms.lookup(name, frame, stamp, config.tf_timeout_s))
