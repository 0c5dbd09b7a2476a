"""Libraries of a full ROS 2 installation: used where they can be imported, each in one place.

Beside each stands a small path of our own that gives the same; test_ros_components.py holds the
two together.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from stream3r_ros.diagnostics import NodeStatus

REPORT = 'reconstruction'
# Bytes per pixel of what becomes rgb by moving bytes only. Of the others cv_bridge scales mono16,
# and colours yuv and bayer as the OpenCV does that it was built with.
BRIDGED = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1}


@cache
def component(name: str) -> Any:
    """Return a module, None where it is not installed or was built for another numpy."""
    try:
        return import_module(name)
    except (ImportError, AttributeError, ValueError):
        return None


def rgb_by_bridge(message: Any) -> np.ndarray | None:
    """Return the picture [H, W, 3] uint8 of a whole sensor_msgs/Image by cv_bridge.

    None where that is not installed, and for messages of which it would say something else or
    nothing: it counts a step in whole pixels, wants the last row's padding too, and turns bytes
    of big-endian messages round in a way that numpy 2 does not know.
    """
    pixel, size = BRIDGED.get(message.encoding), message.height * message.step
    if pixel is None or message.step % pixel or len(message.data) != size or message.is_bigendian:
        return None
    if component('cv_bridge.boost.cv_bridge_boost') is None:  # what the conversions are in
        return None
    return np.array(component('cv_bridge').CvBridge().imgmsg_to_cv2(message, 'rgb8'))


def point_layout(fields: Sequence[Any], point_step: int) -> np.dtype:
    """Return the record of a point of little-endian float32 fields, sensor_msgs/PointField.

    By sensor_msgs_py. The names differ, each field has one value and lies in the point.
    """
    library = component('sensor_msgs_py.point_cloud2')
    if library is not None:
        return library.dtype_from_fields(fields, point_step)
    names, offsets = [field.name for field in fields], [field.offset for field in fields]
    formats = ['<f4'] * len(names)
    return np.dtype(
        {'names': names, 'formats': formats, 'offsets': offsets, 'itemsize': point_step}
    )


def rotation_of_quaternion(quat_xyzw: np.ndarray) -> np.ndarray:
    """Return R [3, 3] float64 of a quaternion [4] of any length but 0, by tf_transformations."""
    library = component('tf_transformations')
    if library is None:
        return Rotation.from_quat(quat_xyzw).as_matrix()
    return library.quaternion_matrix(quat_xyzw)[:3, :3]


class RecentMessages(Protocol):
    """The last messages with a header, to pair them with others; safe between threads."""

    def add(self, message: Any) -> None:
        """Take a message; the one that came first may leave for it."""

    def between(self, start_ns: int, end_ns: int) -> list[Any]:
        """Return the messages with stamps in start..end, both included, as they came."""


def recent_messages(size: int) -> RecentMessages:
    """Return an empty store of the last ``size`` messages: message_filters.Cache, or else ours."""
    return _Recent(size) if component('message_filters') is None else _FilterCache(size)


class _Recent:
    def __init__(self, size: int):
        self._messages: deque[tuple[int, Any]] = deque(maxlen=size)

    def add(self, message: Any) -> None:
        self._messages.append((_stamp_ns(message), message))

    def between(self, start_ns: int, end_ns: int) -> list[Any]:
        return [m for at_ns, m in list(self._messages) if start_ns <= at_ns <= end_ns]


class _FilterCache:
    def __init__(self, size: int):
        filters = component('message_filters')
        self._cache = filters.Cache(filters.SimpleFilter(), size)
        self._lock = threading.Lock()  # the library's own lists are changed one after the other

    def add(self, message: Any) -> None:
        stamp = _ros_time(_stamp_ns(message))  # which the library asks of rclpy's messages only
        held = SimpleNamespace(header=SimpleNamespace(stamp=stamp), message=message)
        with self._lock:
            self._cache.add(held)

    def between(self, start_ns: int, end_ns: int) -> list[Any]:
        with self._lock:
            found = self._cache.getInterval(_ros_time(max(0, start_ns)), _ros_time(end_ns))
        return [held.message for held in found]


def _stamp_ns(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * 10**9 + stamp.nanosec


def _ros_time(stamp_ns: int) -> Any:
    time = component('rclpy.time')
    return time.Time(nanoseconds=stamp_ns, clock_type=component('rclpy.clock').ClockType.ROS_TIME)


def diagnostics_publisher(node: Any, hardware_id: str) -> Callable[['NodeStatus'], None]:
    """Return what sends a status on /diagnostics: diagnostic_updater, or else a publisher."""
    library = component('diagnostic_updater')
    if library is None:
        return _plain_publisher(node, hardware_id)
    updater = library.Updater(node)
    updater.timer.cancel()  # its clock stands still with simulated time
    updater.node_name = node.get_fully_qualified_name()  # tells two cameras apart
    updater.setHardwareID(hardware_id)
    current: list[NodeStatus] = []

    def fill(entry: Any) -> Any:
        for status in current:
            entry.summary(status.level, status.sentence())
            for key, value in status.values().items():
                entry.add(key, value)
        return entry

    updater.add(REPORT, fill)

    def send(status: 'NodeStatus') -> None:
        current[:] = [status]
        updater.force_update()

    return send


def _plain_publisher(node: Any, hardware_id: str) -> Callable[['NodeStatus'], None]:
    from diagnostic_msgs.msg import DiagnosticArray

    from stream3r_ros.diagnostics import diagnostic_array

    publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
    name = node.get_fully_qualified_name()

    def send(status: 'NodeStatus') -> None:
        stamp = node.get_clock().now().to_msg()
        publisher.publish(diagnostic_array(status, name, hardware_id, stamp))

    return send
