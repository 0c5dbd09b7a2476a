"""The results of a run over recorded images: trajectory, map and output bag in one folder."""

from contextlib import ExitStack
from pathlib import Path

from stream3r_core.evaluation.trajectory_files import TumWriter
from stream3r_core.mapping import VoxelMap, save_ply
from stream3r_core.types import FramePrediction
from stream3r_ros.bag import BagWriter
from stream3r_ros.config import NodeConfig
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.outputs import TOPICS, Outputs
from stream3r_ros.tf import T_map_of_first_camera

TRAJECTORY, MAP, BAG = 'trajectory.tum', 'map.ply', 'bag'
NAMESPACE = '/stream3r'  # of the topics that a node of that name publishes
RECORDED = ('/tf', '~/pose', '~/depth/image', '~/depth/camera_info', '~/cloud')


class Results:
    """Writes each frame as it comes and the map at the end, whatever ends the run.

    Use as a context manager. All results lie in the map frame, the bag's depth and clouds in the
    camera's. Raises :class:`OutputError` where it cannot write.
    """

    def __init__(self, folder: Path, config: NodeConfig, voxel_map: VoxelMap):
        self._folder = folder
        self._map = voxel_map
        self._outputs = Outputs(
            rosbags_messages(),
            config.map_frame,
            T_map_world=T_map_of_first_camera(config),
            max_path_poses=config.outputs.path.max_poses,
            mapping=config.mapping,
        )
        self._open_files = ExitStack()
        self._last_stamp_ns: int | None = None

    def __enter__(self) -> 'Results':
        with ExitStack() as opening:
            self._trajectory = opening.enter_context(TumWriter(self._folder / TRAJECTORY))
            self._bag = opening.enter_context(BagWriter(self._folder / BAG))
            self._open_files = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open_files:
            if self._last_stamp_ns is not None:
                self._write_map(self._last_stamp_ns)

    def add(self, prediction: FramePrediction, camera_frame: str) -> None:
        """Write what belongs to one frame."""
        frame = self._outputs.add(prediction, camera_frame)
        self._trajectory.write(frame.stamp_ns, frame.T_map_camera)
        for topic in RECORDED:
            self._record(topic, frame.message(topic), frame.stamp_ns)
        self._last_stamp_ns = frame.stamp_ns

    def _write_map(self, stamp_ns: int) -> None:
        cloud = self._map.points()
        self._record('~/path', self._outputs.path(stamp_ns), stamp_ns)
        self._record('~/map', self._outputs.map(cloud, stamp_ns), stamp_ns)
        save_ply(self._outputs.in_map_frame(cloud), self._folder / MAP)

    def _record(self, topic: str, message, stamp_ns: int) -> None:
        self._bag.write(topic.replace('~', NAMESPACE), message, stamp_ns, TOPICS[topic].qos)
