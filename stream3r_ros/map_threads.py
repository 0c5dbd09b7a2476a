"""When the map is published: on timers, each topic on a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from rclpy.clock import Clock
from rclpy.node import Node

from stream3r_ros.config import NodeConfig
from stream3r_ros.map_topics import MapTopics
from stream3r_ros.services import describe
from stream3r_ros.worker import Worker

Task = Callable[[], None]


class MapThreads:
    """Builds and sends what is large, so that neither callbacks nor images wait for it.

    ``topics()`` returns what to publish, None: nothing yet. What a thread loses is logged.
    """

    def __init__(
        self,
        node: Node,
        config: Callable[[], NodeConfig],
        topics: Callable[[], MapTopics | None],
        is_grid_wanted: Callable[[], bool],
        clock: Clock,
    ):
        self._node, self._config, self._topics = node, config, topics
        self._is_grid_wanted = is_grid_wanted
        names = 'background', 'map changes', 'occupancy grid'
        self.workers = tuple(map(self._worker, names))
        self._background, self._changes, self._grids = self.workers
        outputs = config().outputs
        node.create_timer(outputs.map.period_s, self.request_map, clock=clock)
        node.create_timer(outputs.map_changes.period_s, self._request_changes, clock=clock)
        node.create_timer(outputs.occupancy_grid.period_s, self._request_grid, clock=clock)

    def request_map(self) -> None:
        """Publish the whole map as soon as its thread is free."""
        topics = self._topics()
        if topics is not None and self._config().outputs.map.enabled:
            self._background.offer(topics.publish)

    def submit(self, task: Callable[[], Any]) -> Future:
        """Run something else that takes long, such as writing files, beside images."""
        return self._background.submit(task)

    def _request_changes(self) -> None:
        topics, options = self._topics(), self._config().outputs.map_changes
        if topics is not None and options.enabled:
            self._changes.offer(partial(topics.publish_changes, options.max_points))

    def _request_grid(self) -> None:
        topics, config = self._topics(), self._config()
        is_on = topics is not None and config.outputs.occupancy_grid.enabled
        if is_on and self._is_grid_wanted():
            self._grids.offer(partial(topics.publish_grid, config))

    def _worker(self, name: str) -> Worker[Task]:
        def lost(error: Exception) -> None:
            worker.clear_failure()
            if self._node.context.ok():
                self._node.get_logger().error(f'a map message was lost: {describe(error)}')

        worker: Worker[Task] = Worker(lambda task: task(), lost, lost, name)
        worker.start()
        return worker
