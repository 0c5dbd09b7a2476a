"""What ``~/save_map`` writes: a bounded store of poses, and the files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from stream3r_core.errors import InputError, OutputError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import write_tum
from stream3r_core.mapping import MapCloud, save_ply

MAP_FILE = 'map.ply'
TRAJECTORY_FILE = 'trajectory.tum'


class PoseRecorder:
    """Keeps the most recent ``max_poses`` poses of a session in 56 bytes each."""

    def __init__(self, max_poses: int):
        # np.empty: the memory is taken page by page, as poses come
        self._stamps_ns = np.empty(max_poses, np.int64)
        self._poses = np.empty((max_poses, 3, 4), np.float32)
        self._num_seen = 0

    def add(self, stamp_ns: int, T_map_camera: np.ndarray) -> None:
        """Keep a pose [4, 4]; the oldest makes room when the store is full."""
        slot = self._num_seen % len(self._stamps_ns)
        self._stamps_ns[slot] = stamp_ns
        self._poses[slot] = T_map_camera[:3]
        self._num_seen += 1

    def clear(self) -> None:
        """Forget all poses."""
        self._num_seen = 0

    @property
    def num_forgotten(self) -> int:
        """Poses that made room for later ones."""
        return max(0, self._num_seen - len(self._stamps_ns))

    def __len__(self) -> int:
        return min(self._num_seen, len(self._stamps_ns))

    def trajectory(self) -> Trajectory:
        """Return a copy of the kept poses, oldest first; raises InputError when there is none."""
        if not len(self):
            raise InputError('no image has been processed since the session began')
        order = np.arange(self._num_seen - len(self), self._num_seen) % len(self._stamps_ns)
        poses = np.tile(np.eye(4), (len(self), 1, 1))
        poses[:, :3] = self._poses[order]
        return Trajectory(self._stamps_ns[order], poses, 'node')


class Snapshot(NamedTuple):
    """A session at one moment: safe to write while the session goes on."""

    trajectory: Trajectory
    cloud: MapCloud  # map frame
    num_forgotten: int


def save_snapshot(snapshot: Snapshot, directory: str) -> list[Path]:
    """Write ``map.ply`` and ``trajectory.tum`` into ``directory`` and return their paths.

    Each file appears whole or not at all. Raises :class:`OutputError`.
    """
    folder = Path(directory).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'cannot make the folder {folder}: {error.strerror}') from error
    paths = [folder / MAP_FILE, folder / TRAJECTORY_FILE]
    save_ply(snapshot.cloud, paths[0])
    write_tum(paths[1], snapshot.trajectory)
    return paths
