"""The map of a reconstruction on its topics: whole, what changed in it, and as a grid."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from stream3r_core.config import OccupancyConfig
from stream3r_core.errors import Stream3rError
from stream3r_core.types import FramePrediction
from stream3r_ros.config import NodeConfig
from stream3r_ros.logging_bridge import Throttled
from stream3r_ros.occupancy import LEVEL_BY_THE_FIRST_IMAGE, map_grid, tan_half_width
from stream3r_ros.outputs import WorldInMap
from stream3r_ros.publishers import Publishers

_log = logging.getLogger(__name__)


class Latest(NamedTuple):
    """The frame that has been published last, and where its session lies in the map."""

    world: WorldInMap
    stamp_ns: int
    map_version: int  # with this frame
    tan_half_width: float  # of its field of view


class MapTopics:
    """Publishes the map unless it is as last time.

    The inference thread tells of frames (:meth:`note`) and of the end of a session
    (:meth:`forget`); each of the three that publish may be called from one more thread. What
    they send is of one session and lies in one place: where that changes under them, and before
    the first frame of a session, they send nothing and leave it to the next call.
    """

    def __init__(
        self,
        publishers: Publishers,
        current_map: Callable[[], Any],  # VoxelMap or AtlasMap
        poses: Callable[[], np.ndarray],  # T_world_camera [n, 4, 4], where the frames lie now
    ):
        self._publishers, self._current_map, self._poses = publishers, current_map, poses
        self._latest: Latest | None = None
        self._published: tuple | None = None  # what the last message was about
        self._gridded: tuple | None = None
        self._followed: tuple | None = None  # map and world that followers have
        self._followed_version = -1  # of that map
        self._num_followers = 0
        self._warn_of_grid = Throttled(_log.warning, quiet_s=float('inf'))

    def note(self, prediction: FramePrediction) -> None:
        """Remember the frame that has just been published."""
        world = self._publishers.outputs.world
        version, half_width = self._current_map().version, tan_half_width(prediction)
        self._latest = Latest(world, prediction.stamp_ns, version, half_width)

    def forget(self) -> None:
        """End the session; to be called before its map is cleared."""
        self._latest = None

    def publish(self) -> None:
        """Publish the whole map."""
        current, latest = self._current_map(), self._latest
        if latest is None:
            return
        content = _content(current, latest)
        if content == self._published:
            return
        view = current.view()
        if self._is_still(latest):
            self._publishers.publish_map(view, latest.stamp_ns, latest.world)
            self._published = content

    def publish_changes(self, max_points: int) -> None:
        """Publish what changed in the map, all of it for a new subscriber."""
        current, latest = self._current_map(), self._latest
        num_followers = self._publishers.num_followers
        if num_followers > self._num_followers:
            self._followed = None
        self._num_followers = num_followers
        if latest is None or not num_followers:
            return
        followed = current, latest.world
        version = self._followed_version if followed == self._followed else -1
        if current.version == version:
            return
        change = current.changed_since(version)
        if self._is_still(latest):
            self._publishers.publish_map_changes(change, latest.stamp_ns, max_points, latest.world)
            self._followed, self._followed_version = followed, change.version

    def publish_grid(self, config: NodeConfig) -> None:
        """Publish the occupancy grid of the map."""
        current, latest = self._current_map(), self._latest
        if latest is None:
            return
        content = _content(current, latest)
        if content == self._gridded:
            return
        if config.map_orientation == 'camera':
            self._warn_of_grid(LEVEL_BY_THE_FIRST_IMAGE)
        options = config.outputs.occupancy_grid
        grid = self._grid(current, latest, options)
        if grid is not None and self._is_still(latest):
            self._publishers.publish_occupancy_grid(grid, latest.stamp_ns)
            self._gridded = content

    def _grid(self, current: Any, latest: Latest, options: OccupancyConfig) -> Any:
        try:
            grid = map_grid(latest.world, current, self._poses(), latest.tan_half_width, options)
        except Stream3rError as error:
            self._warn_of_grid(f'no occupancy grid: {error}')
            return None
        if grid.is_cropped:
            self._warn_of_grid(
                f'the map is larger than outputs.occupancy_grid.max_cells {options.max_cells}: '
                'the grid shows the surroundings of the camera'
            )
        return grid

    def _is_still(self, before: Latest) -> bool:
        """Tell whether what has been read since ``before`` was is all of its session."""
        latest = self._latest
        return latest is not None and latest.world is before.world


def _content(current: Any, latest: Latest) -> tuple:
    """Return what a message would be about now; equal: the same message once more.

    A map that is ahead of the latest frame goes out with an old stamp, and again with its own.
    """
    version = current.version
    old_stamp_ns = latest.stamp_ns if version > latest.map_version else None
    return current, version, latest.world, old_stamp_ns
