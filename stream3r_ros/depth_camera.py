"""Depth images that are not registered: their points, seen from the camera of the images."""

from typing import Any

import cv2
import numpy as np

from stream3r_core.errors import InputError
from stream3r_core.types import FramePrediction
from stream3r_ros.calibration import FISHEYE_MODELS, checked_coefficients, contents, distortion
from stream3r_ros.conversions import camera_view


class DepthRays:
    """The directions of a depth camera's pixels, computed once per calibration."""

    def __init__(self):
        self._key: tuple | None = None
        self._tangents = np.empty((0, 0, 2))  # [H, W, 2] x/z and y/z

    def points(self, depth_m: np.ndarray, info: Any) -> np.ndarray:
        """Return the points [N, 3] of the known depths [H, W] in the depth camera's frame, metres.

        Raises:
            InputError: The CameraInfo is for another size, or says nothing usable.

        """
        key = contents(info)
        if key != self._key:
            self._tangents, self._key = _tangents(info), key
        if self._tangents.shape[:2] != depth_m.shape:
            (height, width), here = self._tangents.shape[:2], depth_m.shape
            raise InputError(
                f'depth_camera_info is for {width} x {height} pixels, the depth image has '
                f'{here[1]} x {here[0]}'
            )
        known = np.isfinite(depth_m) & (depth_m > 0)
        depths = depth_m[known][:, None]
        return np.concatenate([self._tangents[known] * depths, depths], 1)


def depth_pairs(
    prediction: FramePrediction, points_camera: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return measured and predicted depths [M] of the points [N, 3] that the image shows."""
    ahead = points_camera[points_camera[:, 2] > 0]
    K = prediction.K.double().numpy()
    column, row = np.rint(ahead @ K[:2].T / ahead[:, 2:]).astype(int).T
    height, width = prediction.depth.shape
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return ahead[inside, 2], prediction.depth.numpy()[row[inside], column[inside]]


def _tangents(info: Any) -> np.ndarray:
    K, (height, width) = camera_view(info)
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)  # [H, W, 2] u, v
    pixels = pixels.astype(np.float64).reshape(-1, 1, 2)
    if any(distortion(info)):
        coefficients = checked_coefficients(info)
        lens = cv2.fisheye if info.distortion_model in FISHEYE_MODELS else cv2
        tangents = lens.undistortPoints(pixels, K, coefficients)
    else:
        tangents = (pixels - K[:2, 2]) / K[[0, 1], [0, 1]]
    return tangents.reshape(height, width, 2)
