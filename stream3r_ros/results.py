"""The results of a run over recorded images: trajectory, map and output bag in one folder."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import TumWriter, write_tum
from stream3r_core.files import write_bytes
from stream3r_core.mapping import VoxelMap, save_ply
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import Uncertainty
from stream3r_ros.bag import BagWriter
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import PINHOLE, Lens
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.occupancy import map_grid, tan_half_width
from stream3r_ros.outputs import TOPICS, FrameOutputs, Outputs
from stream3r_ros.tf import T_map_of_first_camera

TRAJECTORY, MAP, MADE_WITH, BAG = 'trajectory.tum', 'map.ply', 'map.json', 'bag'
ONLINE, MAP_FILE = 'trajectory_online.tum', 'map.safetensors'  # with a back end
NAMESPACE = '/stream3r'  # of the topics that a node of that name publishes
MAX_GRID_POSES = 1000  # that a grid is made from
RECORDED = ('/tf', '~/pose', '~/odometry', '~/depth/image', '~/depth/camera_info', '~/cloud')


_log = logging.getLogger(__name__)
Corrected = Callable[[], tuple[np.ndarray, np.ndarray]]  # stamps_ns [n], T_world_camera [n, 4, 4]


class RunBag:
    """The output bag: each frame as it comes, path and map at the end, whatever ends the run.

    ``corrected`` says at the end where the frames lie then. Use as a context manager. Poses, path
    and map lie in the map frame, depth and clouds in the camera's. Raises :class:`OutputError`
    where it cannot write.
    """

    def __init__(
        self,
        folder: Path,
        config: NodeConfig,
        voxel_map: VoxelMap,
        uncertainty: Uncertainty | None = None,
        corrected: Corrected | None = None,
    ):
        self.folder, self.map, self.corrected = folder, voxel_map, corrected
        self.outputs = Outputs(
            rosbags_messages(),
            config.map_frame,
            T_map_world=T_map_of_first_camera(config),
            max_path_poses=config.outputs.path.max_poses,
            mapping=config.mapping,
            uncertainty=uncertainty,
        )
        self.last_stamp_ns: int | None = None
        self._grid_options = config.outputs.occupancy_grid
        self._poses, self._every = [], 1  # of every nth frame, for the grid
        self._tan_half_width = 0.0
        self._open_files = ExitStack()

    def __enter__(self) -> 'RunBag':
        self._bag = self._open_files.enter_context(BagWriter(self.folder / BAG))
        return self

    def __exit__(self, *_: object) -> None:
        with self._open_files:
            if self.last_stamp_ns is not None:
                stamp_ns = self.last_stamp_ns
                if self.corrected is not None:
                    self.outputs.correct(*self.corrected())
                self._record('~/path', self.outputs.path(stamp_ns), stamp_ns)
                self._record('~/map', self.outputs.map(self.map.view(), stamp_ns), stamp_ns)
                if self._grid_options.enabled:
                    self._record_grid(stamp_ns)

    def add(
        self, prediction: FramePrediction, camera_frame: str, lens: Lens = PINHOLE
    ) -> FrameOutputs:
        """Write the messages of one frame and return what they were made of."""
        frame = self.outputs.add(prediction, camera_frame, lens)
        for topic in RECORDED:
            self._record(topic, frame.message(topic), frame.stamp_ns)
        self.last_stamp_ns = frame.stamp_ns
        if self._grid_options.enabled:
            self._note_view(prediction)
            self._tan_half_width = tan_half_width(prediction)
        return frame

    def _note_view(self, prediction: FramePrediction) -> None:
        """Keep the pose of every nth frame; n doubles where they become too many."""
        if (self.outputs.num_frames - 1) % self._every == 0:
            self._poses.append(prediction.T_world_camera.numpy())
        if len(self._poses) > MAX_GRID_POSES:
            self._poses, self._every = self._poses[::2], 2 * self._every

    def _record_grid(self, stamp_ns: int) -> None:
        poses = np.stack(self._poses) if self.corrected is None else self.corrected()[1]
        options = self._grid_options
        try:
            grid = map_grid(self.outputs.world, self.map, poses, self._tan_half_width, options)
        except DataError as error:
            _log.warning('no occupancy grid: %s', error)
            return
        self._record('~/occupancy_grid', self.outputs.occupancy_grid(grid, stamp_ns), stamp_ns)

    def _record(self, topic: str, message, stamp_ns: int) -> None:
        self._bag.write(topic.replace('~', NAMESPACE), message, stamp_ns, TOPICS[topic].qos)


class Results:
    """Trajectory, map and bag of a replay, in the map frame; a context manager like RunBag.

    Where the bag knows corrected poses, the trajectory is the one of the end, and beside it lies
    the one of the poses as they came. ``pack`` gives the content of the map file to go on with.
    """

    def __init__(self, bag: RunBag, pack: Callable[[], bytes] | None = None):
        self._bag, self._pack = bag, pack
        self._open_files = ExitStack()

    def __enter__(self) -> 'Results':
        with ExitStack() as opening:
            opening.callback(self._write_map)
            online = TRAJECTORY if self._bag.corrected is None else ONLINE
            self._trajectory = opening.enter_context(TumWriter(self._bag.folder / online))
            opening.enter_context(self._bag)
            self._open_files = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def add(self, prediction: FramePrediction, camera_frame: str, lens: Lens = PINHOLE) -> None:
        """Write what belongs to one frame."""
        frame = self._bag.add(prediction, camera_frame, lens)
        self._trajectory.write(frame.stamp_ns, frame.T_map_camera)

    def _write_map(self) -> None:
        bag, folder = self._bag, self._bag.folder
        if bag.last_stamp_ns is None:
            return
        save_ply(bag.outputs.world.cloud(bag.map.points()), folder / MAP)
        if bag.corrected is not None:
            stamps_ns, poses = bag.corrected()
            trajectory = Trajectory(stamps_ns, bag.outputs.world.poses(poses), TRAJECTORY)
            write_tum(folder / TRAJECTORY, trajectory)
        if self._pack is not None:
            write_bytes(folder / MAP_FILE, self._pack())
