"""Known intrinsics: what a CameraInfo says of images of its size, and images without distortion.

One path for node and replay. A rectified image shows only what the camera saw: no black margin.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from stream3r_core.errors import InputError
from stream3r_ros.conversions import PINHOLE, CameraView, Lens, camera_view

# Names of sensor_msgs/distortion_models, and the number of coefficients that OpenCV takes.
PINHOLE_MODELS = {'plumb_bob': (4, 5), 'rational_polynomial': (4, 5, 8, 12, 14)}
FISHEYE_MODELS = {'equidistant': (4,), 'fisheye': (4,)}
_NUM_COEFFICIENTS = PINHOLE_MODELS | FISHEYE_MODELS
# Fields of view that are tried, from narrow to wide, as tangents relative to a camera without D.
_ZOOMS = 1.01 ** np.arange(-230, 140)
_MARGIN_PX = 0.01
_NO_TURN = np.zeros(3)


class Calibrated(NamedTuple):
    """An image, and the intrinsics and the distortion that hold for it."""

    image: np.ndarray
    K: np.ndarray  # [3, 3] float64, pixels of ``image``
    lens: Lens  # PINHOLE where the image has no distortion


class Calibrator:
    """Brings images together with the CameraInfo of their camera.

    ``rectify`` 'auto' removes distortion, with maps that are computed once per calibration;
    'never' leaves images and their distortion as they are.
    """

    def __init__(self, rectify: str = 'auto'):
        self._rectify = rectify
        self._key: tuple | None = None
        self._view: CameraView | None = None
        self._apply: Callable[[np.ndarray, int], Calibrated] | None = None

    def __call__(
        self, image: np.ndarray, info: Any, interpolation: int = cv2.INTER_LINEAR
    ) -> Calibrated:
        """Return the image, rectified if need be, with its intrinsics.

        ``interpolation`` of OpenCV; depth takes ``cv2.INTER_NEAREST``, for depths do not mix.

        Raises:
            InputError: The calibration is for images of another size, or says nothing usable.

        """
        key = contents(info)
        if key != self._key:
            self._view = camera_view(info)
            self._apply = None
            self._key = key
        height, width = self._view.size_hw
        if (height, width) != image.shape[:2]:
            raise InputError(
                f'camera_info is for {width} x {height} pixels, the image has '
                f'{image.shape[1]} x {image.shape[0]}'
            )
        if self._apply is None:
            self._apply = self._prepare(info, self._view)
        return self._apply(image, interpolation)

    def _prepare(self, info: Any, view: CameraView) -> Callable[[np.ndarray, int], Calibrated]:
        K, size_wh = view.K, view.size_hw[::-1]
        if not any(distortion(info)):
            return lambda image, _: Calibrated(image, K, PINHOLE)
        if self._rectify == 'never':
            lens = Lens(info.distortion_model, tuple(distortion(info)))
            return lambda image, _: Calibrated(image, K, lens)
        coefficients = checked_coefficients(info)
        K_rectified = rectified_K(K, coefficients, info.distortion_model, size_wh)
        lens = cv2.fisheye if info.distortion_model in FISHEYE_MODELS else cv2
        maps = lens.initUndistortRectifyMap(
            K, coefficients, np.eye(3), K_rectified, size_wh, cv2.CV_16SC2
        )
        return lambda image, how: Calibrated(cv2.remap(image, *maps, how), K_rectified, PINHOLE)


def rectified_K(
    K: np.ndarray, coefficients: np.ndarray, model: str, size_wh: tuple[int, int]
) -> np.ndarray:
    """Return the intrinsics [3, 3] of the widest image without distortion and without margin.

    Principal point and aspect stay; the focal lengths change by one factor.

    Raises:
        InputError: Not even the middle of the image can be rectified: the coefficients are wrong.

    """
    width, height = size_wh
    border = _border_pixels(width, height)
    tangents = (border - K[:2, 2]) / K[[0, 1], [0, 1]]
    seen = _project(_ZOOMS[:, None, None] * tangents, K, coefficients, model)  # [zooms, N, 2]
    is_inside = ((seen >= -_MARGIN_PX) & (seen <= border.max(0) + _MARGIN_PX)).all((1, 2))
    radius = np.linalg.norm(seen - K[:2, 2], axis=-1)
    grows = np.diff(radius, axis=0, prepend=0.0).min(1) > 0  # beyond a fold the polynomial lies
    usable = np.logical_and.accumulate(is_inside & grows)
    if not usable.any():
        raise InputError(
            f'camera_info: {model} distortion {coefficients.tolist()} leaves nothing of the image'
        )
    rectified = K.copy()
    rectified[[0, 1], [0, 1]] /= _ZOOMS[usable.sum() - 1]
    rectified[0, 1] = 0.0  # OpenCV's models have no skew
    return rectified


def _project(
    tangents: np.ndarray, K: np.ndarray, coefficients: np.ndarray, model: str
) -> np.ndarray:
    """Return the pixels [..., 2] at which the camera sees directions x/z, y/z [..., 2]."""
    points = np.concatenate([tangents, np.ones_like(tangents[..., :1])], -1).reshape(1, -1, 3)
    project = cv2.fisheye.projectPoints if model in FISHEYE_MODELS else cv2.projectPoints
    with np.errstate(all='ignore'):
        pixels = project(points, _NO_TURN, _NO_TURN, K, coefficients)[0]
    return pixels.reshape(tangents.shape)


def _border_pixels(width: int, height: int) -> np.ndarray:  # [N, 2]
    along = np.linspace(0.0, 1.0, 33)
    low, high = np.zeros_like(along), np.ones_like(along)
    sides = [(along, low), (along, high), (low, along), (high, along)]
    return np.concatenate([np.stack(side, -1) for side in sides]) * [width - 1, height - 1]


def checked_coefficients(info: Any) -> np.ndarray:
    """Return the distortion [n] of a CameraInfo; raises InputError unless OpenCV can take it."""
    model, coefficients = info.distortion_model, np.array(distortion(info), np.float64)
    if model not in _NUM_COEFFICIENTS:
        raise InputError(
            f'camera_info: distortion_model {model!r} is not supported; known: '
            f"{', '.join(_NUM_COEFFICIENTS)}. rectify 'never' takes the images as they are"
        )
    if len(coefficients) not in _NUM_COEFFICIENTS[model]:
        raise InputError(
            f'camera_info: {model} takes {_NUM_COEFFICIENTS[model]} coefficients, '
            f'got {len(coefficients)}'
        )
    return coefficients


def contents(info: Any) -> tuple:
    """Return all that a CameraInfo says but for its header: equal for equal calibrations."""
    k = info.k if hasattr(info, 'k') else info.K
    roi = info.roi
    window = roi.x_offset, roi.y_offset, roi.width, roi.height, info.binning_x, info.binning_y
    lens = info.distortion_model, *distortion(info), *map(float, k)
    return info.height, info.width, *window, *lens


def distortion(info: Any) -> list[float]:
    """Return the distortion of a CameraInfo of ROS 1 or 2; raises InputError unless finite."""
    d = info.d if hasattr(info, 'd') else info.D  # ROS 1 writes it in capitals
    coefficients = list(map(float, d))
    if not all(map(math.isfinite, coefficients)):
        raise InputError(f'camera_info: the distortion is not finite: {coefficients}')
    return coefficients
