"""The node's output topics: what is switched on, due and wanted is built and sent."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos_overriding_options import QoSOverridingOptions

from stream3r_core.mapping import MapChange, MapCloud, MapView, OccupancyGrid
from stream3r_core.types import FramePrediction
from stream3r_ros.config import NodeConfig, OutputConfig
from stream3r_ros.conversions import PINHOLE, Lens
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import FRAME_TOPICS, TOPICS, FrameOutputs, Outputs, Topic, WorldInMap
from stream3r_ros.tf import Carrier

SENDER = 'publishing'  # the name of the thread
# Which switch of NodeConfig.outputs each topic obeys; /tf has publish_tf.
SWITCHES = {
    '~/pose': 'pose',
    '~/depth/image': 'depth',
    '~/depth/camera_info': 'depth',
    '~/depth/confidence': 'confidence',
    '~/depth/sigma': 'depth_sigma',
    '~/cloud': 'cloud',
}


class Publishers:
    """Publishes predictions, path and map of one session after the other.

    Per-frame topics are built only for subscribers; TF goes out with every frame, and path and
    map, which late subscribers get too, at their own pace. Only what publishes the map or the grid
    may be called from other threads than the rest.

    Poses go out at once; the images and the cloud of a frame on a thread of their own, beside the
    network's work on the next frame. One frame at most waits for that, and none is overtaken.
    """

    def __init__(self, node: Node, config: NodeConfig):
        self.outputs = Outputs(
            rclpy_messages(), config.map_frame, max_path_poses=config.outputs.path.max_poses
        )
        self._publishers = {name: _publisher(node, name, TOPICS[name]) for name in TOPICS}
        self._limits: dict[str, RateLimit] = {}
        self._last_stamp_ns: int | None = None  # of the session
        self._sends_path = True
        self._sender = ThreadPoolExecutor(1, SENDER)
        self._sending: Future | None = None

    def reset(self) -> None:
        """Begin a new session: an empty path, and no memory of earlier stamps."""
        self.outputs.reset()
        self._limits.clear()
        self._last_stamp_ns = None
        self._sending = None  # what prevented it has nothing to do with the new session

    def publish(
        self,
        prediction: FramePrediction,
        camera_frame: str,
        config: NodeConfig,
        carrier: Carrier | None,
        body: Carrier | None,
        lens: Lens = PINHOLE,
    ) -> FrameOutputs:
        """Send what ``config`` asks for about one frame; its transform first.

        ``carrier`` is what the transform puts into the map, ``body`` what the odometry is about;
        None: it is not known, and nothing is said. ``lens`` is the distortion of the image.
        """
        self.outputs.mapping = config.mapping
        frame = self.outputs.add(prediction, camera_frame, lens)
        self._last_stamp_ns, self._sends_path = frame.stamp_ns, config.outputs.path.enabled
        if carrier is not None:
            self._send('/tf', frame.tf(carrier))
        due = {
            name: self._is_due(name, getattr(config.outputs, name), frame.stamp_ns)
            for name in {*SWITCHES.values(), 'odometry', 'path'}
        }
        if due['pose'] and self._is_wanted('~/pose'):
            self._send('~/pose', frame.pose)
        if body is not None and due['odometry'] and self._is_wanted('~/odometry'):
            self._send('~/odometry', frame.odometry(body))
        if due['path']:
            self._send('~/path', self.outputs.path(frame.stamp_ns))
        images = [t for t in FRAME_TOPICS if t in SWITCHES and t != '~/pose' and due[SWITCHES[t]]]
        self.finish()
        self._sending = self._sender.submit(self._send_wanted, images, frame)
        return frame

    def finish(self) -> None:
        """Wait until all of the last frame is sent; raises what prevented it."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def close(self, timeout_s: float) -> None:
        """End the thread; waits up to ``timeout_s`` for what it sends. Nothing may follow."""
        sending = self._sending
        if sending is not None:
            wait([sending], timeout_s)
        self._sender.shutdown(wait=False)

    def publish_path(self) -> None:
        """Send the path as it is now, whenever it was last sent; its poses have moved."""
        if self._last_stamp_ns is not None and self._sends_path:
            self._send('~/path', self.outputs.path(self._last_stamp_ns))

    def publish_map(self, cloud: MapCloud | MapView, stamp_ns: int, world: WorldInMap) -> None:
        """Send the accumulated map, given in the world frame."""
        self._send('~/map', self.outputs.map(cloud, stamp_ns, world))

    @property
    def num_followers(self) -> int:
        """Subscribers of the changes of the map."""
        return self._publishers['~/map_changes'].get_subscription_count()

    def publish_map_changes(
        self, change: MapChange, stamp_ns: int, max_points: int, world: WorldInMap
    ) -> None:
        """Send what changed in the map, given in the world frame."""
        for message in self.outputs.map_changes(change, stamp_ns, max_points, world):
            self._send('~/map_changes', message)

    @property
    def is_grid_wanted(self) -> bool:
        """Whether anybody listens to the occupancy grid."""
        return self._is_wanted('~/occupancy_grid')

    def publish_occupancy_grid(self, grid: OccupancyGrid, stamp_ns: int) -> None:
        """Send a grid of the map."""
        self._send('~/occupancy_grid', self.outputs.occupancy_grid(grid, stamp_ns))

    def _is_due(self, name: str, option: OutputConfig, stamp_ns: int) -> bool:
        limit = self._limits.setdefault(name, RateLimit())
        return option.enabled and limit.is_due(stamp_ns, option.max_rate_hz)

    def _send_wanted(self, topics: list[str], frame: FrameOutputs) -> None:
        for topic in topics:
            if self._is_wanted(topic):
                self._send(topic, frame.message(topic))

    def _is_wanted(self, topic: str) -> bool:
        return self._publishers[topic].get_subscription_count() > 0

    def _send(self, topic: str, message: Any) -> None:
        self._publishers[topic].publish(message)


class RateLimit:
    """Thins a stream of stamps to a rate, without drift against the stream's own rate."""

    def __init__(self):
        self._next_ns: float = float('-inf')

    def is_due(self, stamp_ns: int, max_rate_hz: float) -> bool:
        """Return whether a message with this stamp may go out; 0 Hz = always."""
        if stamp_ns < self._next_ns:
            return False
        if max_rate_hz:
            period_ns = 1e9 / max_rate_hz
            is_on_schedule = stamp_ns - self._next_ns < period_ns
            self._next_ns = (self._next_ns if is_on_schedule else stamp_ns) + period_ns
        return True


def _publisher(node: Node, name: str, topic: Topic) -> Publisher:
    overridable = None if name == '/tf' else QoSOverridingOptions.with_default_policies()
    return node.create_publisher(
        rclpy_class(topic.type), name, topic.qos.for_rclpy(), qos_overriding_options=overridable
    )
