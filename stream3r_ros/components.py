"""What a ROS 2 installation has and its wheels lack: used where it can be imported.

Beside each stands a small path of our own that gives the same; a test holds the two together.
Left aside on purpose: cv_bridge, and sensor_msgs_py for building messages (they raise no clear
error on damaged or empty ones, which here must not fail), tf_transformations (scipy does it) and
message_filters (the newest image never waits).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray

from stream3r_ros.diagnostics import NodeStatus, diagnostic_array

REPORT = 'reconstruction'


def component(name: str) -> Any:
    """Return a module, None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def diagnostics_publisher(node: Any, hardware_id: str) -> Callable[[NodeStatus], None]:
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

    def send(status: NodeStatus) -> None:
        current[:] = [status]
        updater.force_update()

    return send


def _plain_publisher(node: Any, hardware_id: str) -> Callable[[NodeStatus], None]:
    publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
    name = node.get_fully_qualified_name()

    def send(status: NodeStatus) -> None:
        stamp = node.get_clock().now().to_msg()
        publisher.publish(diagnostic_array(status, name, hardware_id, stamp))

    return send
