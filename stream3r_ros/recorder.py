"""What ``~/save_map`` writes: a bounded store of poses, and the files."""

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from stream3r_core.errors import ConfigError, InputError, OutputError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import write_tum
from stream3r_core.files import write_bytes
from stream3r_core.mapping import MapCloud, save_pcd, save_ply
from stream3r_ros.config import SaveMapConfig
from stream3r_ros.provenance import Provenance

_PLAIN_NAME = re.compile(r'[\w-][\w.-]{0,199}')
POINT_BYTES, POSE_BYTES = 40, 150  # in all formats together, rounded up
SPARE_BYTES = 16_000_000


class PoseRecorder:
    """Keeps the most recent ``max_poses`` poses of a session in 56 bytes each; thread-safe."""

    def __init__(self, max_poses: int):
        # np.empty: the memory is taken page by page, as poses come
        self._stamps_ns = np.empty(max_poses, np.int64)
        self._poses = np.empty((max_poses, 3, 4), np.float32)
        self._num_seen = 0
        self._lock = Lock()

    def add(self, stamp_ns: int, T_world_camera: np.ndarray) -> None:
        """Keep a pose [4, 4]; the oldest makes room when the store is full."""
        with self._lock:
            slot = self._num_seen % len(self._stamps_ns)
            self._stamps_ns[slot] = stamp_ns
            self._poses[slot] = T_world_camera[:3]
            self._num_seen += 1

    def clear(self) -> None:
        """Forget all poses."""
        with self._lock:
            self._num_seen = 0

    @property
    def num_forgotten(self) -> int:
        """Poses that made room for later ones."""
        return max(0, self._num_seen - len(self._stamps_ns))

    def __len__(self) -> int:
        return min(self._num_seen, len(self._stamps_ns))

    def trajectory(self) -> Trajectory:
        """Return a copy of the kept poses, oldest first; raises InputError when there is none."""
        with self._lock:
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
    made_with: Provenance
    map_file: bytes | None = None  # to go on with, of a back end; see backend/map_file.py


def save_snapshot(snapshot: Snapshot, config: SaveMapConfig) -> list[Path]:
    """Write map, trajectory and what they were made with into ``config.directory``.

    Returns the paths. Each file appears whole or not at all, and replaces one of the same name.
    Raises :class:`ConfigError` for a name that is none or leads elsewhere, :class:`OutputError`
    where the files cannot be written or would fill the disk.
    """
    map_name, trajectory_name = config.map_name, config.trajectory_name
    check_saving(config)
    writers: dict[str, Callable[[Path], None]] = {}
    if config.ply:
        writers[f'{map_name}.ply'] = partial(save_ply, snapshot.cloud)
    if config.pcd:
        writers[f'{map_name}.pcd'] = partial(save_pcd, snapshot.cloud)
    if config.tum:
        writers[f'{trajectory_name}.tum'] = partial(write_tum, trajectory=snapshot.trajectory)
    writers[f'{map_name}.json'] = snapshot.made_with.write
    if snapshot.map_file is not None:
        writers[f'{map_name}.safetensors'] = partial(write_bytes, content=snapshot.map_file)
    folder = _folder(config.directory)
    _check_space(folder, snapshot)
    for name, write in writers.items():
        write(path=folder / name)
    return [folder / name for name in writers]


def check_saving(config: SaveMapConfig) -> None:
    """Raise ConfigError unless there is a folder, something to write, and names are mere names."""
    if not config.directory:
        raise ConfigError('save_map: nothing is saved without save_map.directory, a folder')
    for option in ('map_name', 'trajectory_name'):
        name = getattr(config, option)
        if not _PLAIN_NAME.fullmatch(name):
            raise ConfigError(
                f'save_map.{option}: expected a file name of letters, digits, "-", "_" and ".", '
                f'without folders and not beginning with ".", got {name!r}'
            )
    if not (config.ply or config.pcd or config.tum):
        raise ConfigError('save_map: ply, pcd and tum are all switched off: nothing to write')


def _folder(directory: str) -> Path:
    folder = Path(directory).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'cannot make the folder {folder}: {error.strerror}') from error
    return folder


def _check_space(folder: Path, snapshot: Snapshot) -> None:
    needed = len(snapshot.map_file or b'')
    needed += POINT_BYTES * len(snapshot.cloud) + POSE_BYTES * len(snapshot.trajectory)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OutputError(
            f'the disk of {folder} is full: {free / 1e6:.0f} MB are free, the files may take '
            f'{needed / 1e6:.0f} MB and {SPARE_BYTES / 1e6:.0f} MB are to stay free; make room'
        )
