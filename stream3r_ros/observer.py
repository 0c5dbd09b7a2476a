"""Watches a running node over DDS: records what it publishes, and knows how far it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from std_srvs.srv import Trigger

from stream3r_ros.bag import BagWriter
from stream3r_ros.messages import rclpy_class
from stream3r_ros.outputs import TOPICS, Topic
from stream3r_ros.player import header_stamp_ns
from stream3r_ros.results import NAMESPACE, RECORDED

SERVICE_S = 10.0
LATEST_ONLY = ('~/path', '~/map')  # each message replaces the one before


class Observer:
    """Records the topics of the node ``/stream3r`` as a replay does.

    Messages of frames go into ``bag`` as they come; of path and map the bag gets the last ones, by
    :meth:`write_latest`. ``num_transforms`` counts the images that the node has answered on /tf;
    ``figures`` are the values of its last diagnostics.
    """

    def __init__(self, node: Node, bag: BagWriter):
        self._node = node
        self._bag = bag
        self._latest: dict[str, bytes] = {}
        self.num_transforms = 0
        self.num_diagnostics = 0
        self.last_stamp_ns: int | None = None  # of an image that has been answered
        self.figures: dict[str, str] = {}
        self._save_map = node.create_client(Trigger, f'{NAMESPACE}/save_map')
        for name in RECORDED:
            self._subscribe(name, self._take_transforms if name == '/tf' else self._record)
        for name in LATEST_ONLY:
            self._subscribe(name, self._latest.__setitem__)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._take_diagnostics, 10)

    def figure(self, name: str) -> int:
        """Return a counter of the last diagnostics; 0 before the first."""
        return int(self.figures.get(name, 0))

    @property
    def state(self) -> str:
        """State of the node by its last diagnostics; empty before the first."""
        return self.figures.get('state', '')

    @property
    def is_idle(self) -> bool:
        """Whether the node has dealt with every image that it has received."""
        done = self.figure('images_processed') + self.figure('images_dropped')
        return self.figure('images_received') == done

    @property
    def has_all_transforms(self) -> bool:
        """Whether the transform of every processed image has come."""
        return self.num_transforms >= self.figure('images_processed')

    @property
    def map_stamp_ns(self) -> int | None:
        """Stamp of the last image in the last map that came."""
        raw = self._latest.get('~/map')
        return None if raw is None else header_stamp_ns(raw)

    def save_map(self) -> Any:
        """Ask the node to save its map; return the future of a std_srvs/Trigger response."""
        self._save_map.wait_for_service(SERVICE_S)
        return self._save_map.call_async(Trigger.Request())

    def write_latest(self) -> None:
        """Write the last path and the last map into the bag."""
        for name, raw in self._latest.items():
            self._write(name, raw, header_stamp_ns(raw))
        self._latest.clear()

    def _subscribe(self, name: str, take: Callable[[str, bytes], None]) -> None:
        topic: Topic = TOPICS[name]
        self._node.create_subscription(
            rclpy_class(topic.type),
            _resolved(name),
            partial(take, name),
            topic.qos._replace(depth=100).for_rclpy(),
            raw=True,
        )

    def _record(self, name: str, raw: bytes) -> None:
        self._write(name, raw, header_stamp_ns(raw))

    def _take_transforms(self, name: str, raw: bytes) -> None:
        transforms = deserialize_message(raw, rclpy_class(TOPICS[name].type)).transforms
        if transforms:
            self.num_transforms += 1
            self.last_stamp_ns = header_stamp_ns(transforms[0])
            self._write(name, raw, self.last_stamp_ns)

    def _write(self, name: str, raw: bytes, stamp: int) -> None:
        topic = TOPICS[name]
        self._bag.write_raw(_resolved(name), topic.type, raw, stamp, topic.qos)

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        self.num_diagnostics += 1
        for status in message.status:
            self.figures = {pair.key: pair.value for pair in status.values}


def _resolved(name: str) -> str:
    return name.replace('~', NAMESPACE)
