"""Metres per scene unit: from a depth camera or from an odometry, robust and smooth."""

import logging
import math
from collections import deque
from typing import Any

import numpy as np

from stream3r_core.errors import InputError
from stream3r_core.types import FramePrediction
from stream3r_ros.components import recent_messages
from stream3r_ros.config import NodeConfig, ScaleConfig
from stream3r_ros.conversions import depth_from_message, stamp_ns
from stream3r_ros.depth_camera import DepthRays, depth_pairs
from stream3r_ros.logging_bridge import Throttled
from stream3r_ros.transforms import TransformBuffer, TransformError

MIN_PIXELS = 50  # that two depth images must share
KEPT_DEPTH_IMAGES = 30
_log = logging.getLogger(__name__)


class ScaleTracker:
    """Turns ratios, one per frame or baseline, into one scale that moves rarely and little.

    The scale is the median of the last ``window`` ratios; it is stated from ``min_ratios`` on,
    and follows when it is off by more than ``dead_band``, so that a map does not tremble.
    """

    def __init__(self):
        self._log_ratios: deque[float] = deque()
        self.value: float | None = None  # metres per scene unit; None: not known, arbitrary

    def add(self, ratio: float, config: ScaleConfig) -> None:
        """Take metres over scene units of one frame; what is no positive number is left out."""
        if not (math.isfinite(ratio) and ratio > 0):
            return
        self._log_ratios.append(math.log(ratio))
        while len(self._log_ratios) > config.window:
            self._log_ratios.popleft()
        if len(self._log_ratios) < config.min_ratios:
            return
        scale = math.exp(float(np.median(self._log_ratios)))
        if self.value is None or abs(math.log(scale / self.value)) > config.dead_band:
            self.value = scale

    def reset(self) -> None:
        """Forget everything: a new session has a new scale."""
        self._log_ratios.clear()
        self.value = None


class DepthScale:
    """Compares predicted depth with the images of a depth camera.

    With :attr:`camera_info`, the depth camera's own, its points are moved into the camera by the
    transform between the two, which need not be one camera. Without it the depth image must lie in
    the camera's frame and is taken to show what the camera shows.
    """

    def __init__(self, transforms: TransformBuffer):
        self._images = recent_messages(KEPT_DEPTH_IMAGES)
        self._transforms = transforms
        self._rays = DepthRays()
        self.camera_info: Any = None  # may be replaced at any time

    def add(self, message: Any) -> None:
        """Keep a depth image for the frame of its time; from any thread.

        Raises :class:`InputError` for a stamp that is none.
        """
        if stamp_ns(message) >= 0:  # before that there are no images
            self._images.add(message)

    def ratio(
        self,
        prediction: FramePrediction,
        camera_frame: str,
        config: ScaleConfig,
        tf_timeout_s: float = 0.0,
    ) -> float | None:
        """Return the median of metres over scene units; None: no depth image of that time.

        Raises:
            InputError: The depth image is damaged, or not of this camera and without calibration.
            TransformError: Where the depth camera is at that time is not known.

        """
        at_ns, reach_ns = prediction.stamp_ns, int(config.max_offset_s * 1e9)
        near = self._images.between(at_ns - reach_ns, at_ns + reach_ns)
        if not near:
            return None
        nearest = min(near, key=lambda image: abs(stamp_ns(image) - at_ns))
        depth_m, frame, info = (
            depth_from_message(nearest),
            nearest.header.frame_id,
            self.camera_info,
        )
        if info is not None:
            points = self._rays.points(depth_m, info)
            if frame != camera_frame:
                T = self._transforms.lookup(camera_frame, frame, prediction.stamp_ns, tf_timeout_s)
                points = points @ T[:3, :3].T + T[:3, 3]
            return _median_ratio(*depth_pairs(prediction, points))
        if frame != camera_frame:
            raise InputError(
                f'depth images are in {frame!r}, the camera is {camera_frame!r}: only with '
                'depth_camera_info can depth that is not registered to the camera give a scale'
            )
        return depth_ratio(prediction, depth_m)


def depth_ratio(prediction: FramePrediction, depth_m: np.ndarray) -> float | None:
    """Return the median over the pixels of true over predicted depth.

    ``depth_m`` [h, w] shows what the camera image shows, at any resolution; NaN = unknown.
    None where fewer than 50 pixels have both.
    """
    rows, columns = (_source_index(prediction, axis, depth_m.shape[axis]) for axis in (0, 1))
    inside = (rows >= 0)[:, None] & (columns >= 0)
    true_m = depth_m[np.maximum(rows, 0)][:, np.maximum(columns, 0)]
    return _median_ratio(true_m[inside], prediction.depth.numpy()[inside])


def _median_ratio(true_m: np.ndarray, predicted: np.ndarray) -> float | None:
    usable = np.isfinite(true_m) & (true_m > 0) & (predicted > 0)
    if np.count_nonzero(usable) < MIN_PIXELS:
        return None
    return float(np.median(true_m[usable] / predicted[usable]))


def _source_index(prediction: FramePrediction, axis: int, size: int) -> np.ndarray:
    """Row or column of an image of the camera's view that each network pixel lies in; -1: none."""
    geometry = prediction.geometry
    centres = np.arange(geometry.network_size_hw[axis]) + 0.5
    share = (centres - geometry.offset_xy[1 - axis]) / geometry.scale_xy[1 - axis]
    index = np.floor(share / geometry.camera_size_hw[axis] * size).astype(int)
    return np.where((index >= 0) & (index < size), index, -1)


class BaselineScale:
    """Compares the way the camera went with the way that an odometry says it went."""

    def __init__(self):
        self._anchor: tuple[np.ndarray, np.ndarray] | None = None

    def reset(self) -> None:
        """Begin a new session."""
        self._anchor = None

    def ratio(
        self, T_world_camera: np.ndarray, T_odom_camera: np.ndarray, config: ScaleConfig
    ) -> float | None:
        """Return metres over scene units since the last ratio; None: not far enough yet."""
        here = T_world_camera[:3, 3].copy(), T_odom_camera[:3, 3].copy()
        if self._anchor is None:
            self._anchor = here
        way, way_m = (float(np.linalg.norm(a - b)) for a, b in zip(here, self._anchor))
        if way_m < config.min_baseline_m:
            return None
        self._anchor = here
        return way_m / way if way > 0 else None


class ScaleSource:
    """Asks what ``scale.source`` names; what is missing is no value, said and counted."""

    def __init__(self, transforms: TransformBuffer):
        self.depth_images = DepthScale(transforms)
        self._baseline, self._transforms = BaselineScale(), transforms
        self._warn = Throttled(_log.warning)
        self.num_without = 0  # images whose scale could not be asked for

    def reset(self) -> None:
        """Begin a new session."""
        self._baseline.reset()

    def ratio(self, prediction: FramePrediction, frame: str, config: NodeConfig) -> float | None:
        """Return metres per unit of a prediction in a camera frame; None: not from this one."""
        try:
            if config.scale.source == 'depth':
                return self.depth_images.ratio(
                    prediction, frame, config.scale, config.tf_timeout_s
                )
            if config.scale.source == 'odometry':
                return self._odometry_ratio(prediction, frame, config)
        except (InputError, TransformError) as error:
            self.num_without += 1
            self._warn(f'no metric scale from this image: {error}')
        return None

    def _odometry_ratio(
        self, prediction: FramePrediction, frame: str, config: NodeConfig
    ) -> float | None:
        T_odom_camera = self._transforms.lookup(
            config.odom_frame, frame, prediction.stamp_ns, config.tf_timeout_s
        )
        T_world_camera = prediction.T_world_camera.double().numpy()
        return self._baseline.ratio(T_world_camera, T_odom_camera, config.scale)
