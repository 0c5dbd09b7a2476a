"""ROS messages to arrays: pure functions for the message classes of rclpy and of rosbags alike.

Every message that does not hold what its fields claim raises :class:`InputError` with what was
found and what was expected, before anything of the claimed size is allocated.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image as PilImage

from stream3r_core.errors import InputError
from stream3r_ros.components import point_layout, rgb_by_bridge, rotation_of_quaternion

FLOAT32 = 7  # of sensor_msgs/PointField
CLOUD_FIELDS = ('x', 'y', 'z', 'rgb')
MAX_PIXELS = 1 << 26  # 8192 x 8192: larger claims are taken for a corrupt message


def stamp_ns(message: Any) -> int:
    """Return the stamp of a message, a header or a time as integer nanoseconds.

    Raises:
        InputError: the nanoseconds do not lie in 0..999999999.
    """
    time = getattr(message, 'header', message)
    time = getattr(time, 'stamp', time)
    if not 0 <= time.nanosec < 10**9:
        raise InputError(f'stamp: nanosec must lie in 0..999999999, got {time.nanosec}')
    return time.sec * 10**9 + time.nanosec


def image_from_message(message: Any) -> np.ndarray:
    """Return the picture of a sensor_msgs/Image or sensor_msgs/CompressedImage.

    Returns:
        uint8 [H, W, 3], rgb, in its own memory.

    Raises:
        InputError: unknown encoding, zero or absurd size, step or data that do not fit the size,
            a jpeg or png that cannot be decoded whole.
    """
    if hasattr(message, 'format'):
        return _decode_compressed(message)
    if message.encoding in _PLANAR:
        return _planar_image(message)
    if message.encoding not in _PACKED:
        known = ', '.join([*_PACKED, *_PLANAR])
        raise InputError(f'image encoding {message.encoding!r} is not supported; known: {known}')
    layout = _PACKED[message.encoding]
    if layout.even_width and message.width % 2:
        raise InputError(f'{message.encoding} image: width must be even, got {message.width}')
    pixels = _pixels(message, layout.dtype, layout.channels)
    rgb = rgb_by_bridge(message)
    return layout.to_rgb(pixels) if rgb is None else rgb


def depth_from_message(message: Any) -> np.ndarray:
    """Return the depth image of a sensor_msgs/Image per REP-118.

    Takes 16UC1 (millimetres, 0 = invalid) and 32FC1 (metres).

    Returns:
        float32 [H, W], metres along the optical axis, NaN where invalid.

    Raises:
        InputError: another encoding, or size, step and data that do not fit together.
    """
    encoding = getattr(message, 'encoding', getattr(message, 'format', None))
    if encoding in ('16UC1', 'mono16'):
        depth_m = _pixels(message, 'u2', 1)[..., 0].astype(np.float32) / 1000
    elif encoding == '32FC1':
        depth_m = _pixels(message, 'f4', 1)[..., 0].astype(np.float32)
    else:
        raise InputError(f'depth encoding {encoding!r} is not supported; known: 16UC1, 32FC1')
    depth_m[~(np.isfinite(depth_m) & (depth_m > 0))] = np.nan
    return depth_m


def pose_from_message(pose: Any) -> np.ndarray:
    """Return T [4, 4] float64 of a geometry_msgs Pose or Transform.

    Raises:
        InputError: the quaternion is none.
    """
    moved = pose.translation if hasattr(pose, 'translation') else pose.position
    turned = pose.rotation if hasattr(pose, 'rotation') else pose.orientation
    quat_xyzw = np.array([turned.x, turned.y, turned.z, turned.w])
    if not np.linalg.norm(quat_xyzw) > 0.1:
        raise InputError(f'{quat_xyzw} where a quaternion should be')
    T = np.eye(4)
    T[:3, :3] = rotation_of_quaternion(quat_xyzw)
    T[:3, 3] = moved.x, moved.y, moved.z
    return T


def cloud_from_message(message: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return points and colours of a sensor_msgs/PointCloud2 with float32 x, y, z and rgb.

    Returns:
        points_xyz [N, 3] float32, colors_rgb [N, 3] uint8.

    Raises:
        InputError: a field is missing or of another type, or the data do not fit the size.
    """
    usable = {f.name: f for f in message.fields if (f.datatype, f.count) == (FLOAT32, 1)}
    missing = {*CLOUD_FIELDS} - usable.keys()
    if missing or message.is_bigendian:
        raise InputError(f'point cloud: expected little-endian float32 x y z rgb, no {missing}')
    fields = [usable[name] for name in CLOUD_FIELDS]
    step, count = message.point_step, message.width * message.height
    if len(message.data) != step * count or step < 4 + max(field.offset for field in fields):
        raise InputError(
            f'point cloud of {count} points of {step} bytes: got {len(message.data)} bytes'
        )
    points = np.frombuffer(_buffer(message), point_layout(fields, step))
    points_xyz = np.stack([points['x'], points['y'], points['z']], -1)
    rgb = np.ascontiguousarray(points['rgb']).view(np.uint8).reshape(-1, 4)
    return points_xyz, rgb[:, 2::-1].copy()  # 0x00RRGGBB, little-endian


class Lens(NamedTuple):
    """The distortion that images have, in the terms of sensor_msgs/CameraInfo."""

    model: str  # of sensor_msgs/distortion_models
    coefficients: tuple[float, ...]


PINHOLE = Lens('plumb_bob', (0.0,) * 5)


class CameraView(NamedTuple):
    """What a calibration says of the images that come with it."""

    K: np.ndarray  # [3, 3] float64, pixels of these images
    size_hw: tuple[int, int]


def camera_view(info: Any) -> CameraView:
    """Return what a sensor_msgs/CameraInfo says of its images, region and binning applied.

    Height, width and K of the message are those of the whole sensor; its images show the region
    of interest of it, of which ``binning_x`` by ``binning_y`` pixels make one. As in
    image_geometry, binning divides the principal point like all other lengths.

    Raises:
        InputError: the region does not lie in the sensor, or as :func:`camera_matrix`.
    """
    K, roi = camera_matrix(info), info.roi
    height, width = (roi.height, roi.width) if roi.height and roi.width else (
        info.height - roi.y_offset, info.width - roi.x_offset
    )  # fmt: skip
    if not (0 < height <= info.height - roi.y_offset and 0 < width <= info.width - roi.x_offset):
        raise InputError(
            f'camera_info: the region of interest, {roi.width} x {roi.height} pixels at '
            f'({roi.x_offset}, {roi.y_offset}), does not lie in {info.width} x {info.height}'
        )
    bins = np.maximum([info.binning_x, info.binning_y], 1)
    K[:2, 2] -= roi.x_offset, roi.y_offset
    K[:2] /= bins[:, None]
    return CameraView(K, (int(height // bins[1]), int(width // bins[0])))


def camera_matrix(info: Any) -> np.ndarray:
    """Return K [3, 3] float64 of a sensor_msgs/CameraInfo, in pixels of the whole sensor.

    Raises:
        InputError: the camera is uncalibrated (K[0] = 0) or K is no camera matrix.
    """
    k = info.k if hasattr(info, 'k') else info.K  # ROS 1 writes it in capitals
    K = np.array(k, dtype=np.float64).reshape(3, 3)
    if K[0, 0] == 0:
        raise InputError('camera_info: the camera is not calibrated (K[0] = 0)')
    below = K[1, 0], *K[2]
    if not (np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0 and below == (0, 0, 0, 1)):
        raise InputError(
            'camera_info: K must be [fx s cx; 0 fy cy; 0 0 1], finite and with fx, fy > 0, '
            f'got {K.ravel().tolist()}'
        )
    return K


def _decode_compressed(message: Any) -> np.ndarray:
    data = io.BytesIO(_buffer(message))
    try:
        with PilImage.open(data, formats=('JPEG', 'PNG')) as picture:
            _check_size(*picture.size)
            if picture.mode.startswith('I'):  # 16-bit grey
                return _grey16_to_rgb(np.asarray(picture, dtype=np.uint16)[..., None])
            return np.array(picture.convert('RGB'))
    except (OSError, SyntaxError, ValueError, PilImage.DecompressionBombError) as error:
        raise InputError(
            f'compressed image with format {message.format!r} and {len(message.data)} bytes '
            f'is not a whole jpeg or png: {error}'
        ) from None


def _planar_image(message: Any) -> np.ndarray:
    """Luma rows, then half as many rows of interleaved chroma, all with the same step."""
    _check_size(message.width, message.height)
    if message.width % 2 or message.height % 2:
        raise InputError(
            f'{message.encoding} image: width and height must be even, '
            f'got {message.width} x {message.height}'
        )
    rows = _strided(message, np.dtype('u1'), 1, rows=message.height * 3 // 2)
    return cv2.cvtColor(np.ascontiguousarray(rows), _PLANAR[message.encoding])


def _pixels(message: Any, dtype: str, channels: int) -> np.ndarray:  # [H, W, channels]
    _check_size(message.width, message.height)
    order = '>' if message.is_bigendian else '<'
    return _strided(message, np.dtype(order + dtype), channels, rows=message.height)


def _strided(message: Any, dtype: np.dtype, channels: int, rows: int) -> np.ndarray:
    """Return a view [rows, W, channels] of the data; the last row may lack its padding."""
    pixel = dtype.itemsize * channels
    row = pixel * message.width
    size, step = len(message.data), message.step
    claim = f'{message.encoding} image of {message.width} x {message.height}'
    if step < row:
        raise InputError(f'{claim}: step must be at least {row} bytes, got {step}')
    if not step * (rows - 1) + row <= size <= step * rows:
        raise InputError(f'{claim} with step {step}: expected {step * rows} bytes, got {size}')
    shape, strides = (rows, message.width, channels), (step, pixel, dtype.itemsize)
    return np.ndarray(shape, dtype, _buffer(message), strides=strides)


def _check_size(width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise InputError(f'image size must be positive, got {width} x {height}')
    if width * height > MAX_PIXELS:
        raise InputError(
            f'image of {width} x {height}: more than {MAX_PIXELS} pixels, surely corrupt'
        )


def _buffer(message: Any) -> memoryview:
    """Return the bytes of an array.array, a bytes object or a numpy array without copying."""
    return memoryview(message.data).cast('B') if len(message.data) else memoryview(b'')


def _grey16_to_rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat((pixels >> 8).astype(np.uint8), 3, axis=2)


class _Packed(NamedTuple):
    dtype: str
    channels: int
    to_rgb: Callable[[np.ndarray], np.ndarray]
    even_width: bool = False


def _by_opencv(channels: int, code: int, even_width: bool = False) -> _Packed:
    return _Packed('u1', channels, partial(cv2.cvtColor, code=code), even_width)


# OpenCV names a Bayer pattern by the second and third pixel of its second row.
_PACKED = {
    'rgb8': _Packed('u1', 3, partial(np.array, order='C')),
    'bgr8': _by_opencv(3, cv2.COLOR_BGR2RGB),
    'rgba8': _by_opencv(4, cv2.COLOR_RGBA2RGB),
    'bgra8': _by_opencv(4, cv2.COLOR_BGRA2RGB),
    'mono8': _by_opencv(1, cv2.COLOR_GRAY2RGB),
    'mono16': _Packed('u2', 1, _grey16_to_rgb),
    '8UC1': _by_opencv(1, cv2.COLOR_GRAY2RGB),
    '8UC3': _by_opencv(3, cv2.COLOR_BGR2RGB),  # OpenCV's own channel order
    'bayer_rggb8': _by_opencv(1, cv2.COLOR_BayerBG2RGB),
    'bayer_bggr8': _by_opencv(1, cv2.COLOR_BayerRG2RGB),
    'bayer_gbrg8': _by_opencv(1, cv2.COLOR_BayerGR2RGB),
    'bayer_grbg8': _by_opencv(1, cv2.COLOR_BayerGB2RGB),
    'yuv422': _by_opencv(2, cv2.COLOR_YUV2RGB_UYVY, even_width=True),
    'uyvy': _by_opencv(2, cv2.COLOR_YUV2RGB_UYVY, even_width=True),
    'yuv422_yuy2': _by_opencv(2, cv2.COLOR_YUV2RGB_YUY2, even_width=True),
    'yuyv': _by_opencv(2, cv2.COLOR_YUV2RGB_YUY2, even_width=True),
}
_PLANAR = {'nv12': cv2.COLOR_YUV2RGB_NV12, 'nv21': cv2.COLOR_YUV2RGB_NV21}
