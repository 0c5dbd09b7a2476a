"""What every dataset reader returns: clips of frames with their truth, loaded on demand."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.trajectory import ASSOCIATION_TOLERANCE_NS, Trajectory

MADE_UP_RATE_HZ = 30  # of datasets without stamps
MADE_UP_START_NS = 10**9  # in ROS a stamp of 0 means that there is none
MADE_UP_STAMPS = 'the dataset has no stamps; 30 Hz is assumed'


@dataclass(frozen=True)
class Frame:
    """One image and what is known about it; None where the dataset does not say.

    ``load_image`` returns uint8 RGB [H, W, 3]; ``load_depth_m`` float32 [h, w], metres along the
    optical axis of the same camera, 0 = invalid, possibly of another size than the image.
    ``K`` [3, 3] is in pixels of the image, without distortion. ``T_world_camera`` [4, 4], OpenCV
    axes, metres.
    """

    name: str
    stamp_ns: int
    load_image: Callable[[], np.ndarray]
    image_path: Path | None = None
    K: np.ndarray | None = None
    T_world_camera: np.ndarray | None = None
    load_depth_m: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Clip:
    """Frames in the order of time, their true trajectory and remarks for the report.

    ``frames`` is a tuple, or another collection that can be walked through again and again and
    loads its frames as they are asked for. ``trajectory`` is the full true trajectory where the
    dataset has one of its own rate; without it the poses of the frames count. ``camera_frame`` is
    the name of the camera's frame, where the input has one.
    """

    name: str
    frames: Collection[Frame]
    trajectory: Trajectory | None = None
    remarks: tuple[str, ...] = ()
    camera_frame: str = ''

    def __post_init__(self):
        if not self.frames:
            raise DataError(f'{self.name} holds no image')

    def __len__(self):
        return len(self.frames)

    @cached_property
    def truth(self) -> Trajectory | None:
        """The true trajectory, or None."""
        if self.trajectory is not None:
            return self.trajectory
        posed = [f for f in self.frames if f.T_world_camera is not None]
        if not posed:
            return None
        return Trajectory(
            np.array([f.stamp_ns for f in posed]),
            np.stack([f.T_world_camera for f in posed]),
            f'truth of {self.name}',
        )

    def with_truth(self, truth: Trajectory | None) -> 'Clip':
        """Return the clip with another true trajectory, and its poses in a tuple of frames.

        A trajectory without stamps must have one pose per frame.
        """
        if truth is not None and truth.stamps_ns is None:
            if len(truth) != len(self):
                raise DataError(
                    f'{truth.name}: {len(truth)} poses without stamps for {len(self)} images; '
                    'give a TUM file'
                )
            stamps = np.array([frame.stamp_ns for frame in self.frames])
            truth = Trajectory(stamps, truth.T_world_camera, truth.name)
        frames = self.frames
        if isinstance(frames, tuple):
            frames = tuple(
                dataclasses.replace(frame, T_world_camera=pose_at(truth, frame.stamp_ns))
                for frame in frames
            )
        return dataclasses.replace(self, frames=frames, trajectory=truth)

    def take(self, indices) -> 'Clip':
        """Return the clip of these frames."""
        frames = tuple(self.frames[i] for i in indices)
        return dataclasses.replace(self, frames=frames)

    def every(self, step: int, limit: int | None = None) -> 'Clip':
        """Return every ``step``-th frame, ``limit`` at most."""
        return self.take(range(0, len(self), step)[:limit])


@dataclass(frozen=True)
class Dataset:
    """A published layout: ``find`` names the clips under a root, ``read`` reads one of them."""

    layout: str
    find: Callable[[Path], list[str]]
    read: Callable[[Path, str], Clip]

    def names(self, root: str | Path) -> list[str]:
        """Clips under ``root``; raises DataError with the expected layout when there are none."""
        root = Path(root)
        if not root.is_dir():
            raise DataError(f'{root} is not a folder; expected {self.layout}')
        names = self.find(root)
        if not names:
            inside = sorted(p.name for p in root.iterdir())[:5]
            raise DataError(
                f'{root}: nothing of the expected layout {self.layout}; the folder holds '
                f'{", ".join(inside) or "nothing"}'
            )
        return names


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Return K [3, 3]."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def resized_K(K: np.ndarray, size_hw: tuple[int, int], new_size_hw: tuple[int, int]) -> np.ndarray:
    """K of the same view at another size; the edges of both images coincide."""
    scale = np.array([new_size_hw[1] / size_hw[1], new_size_hw[0] / size_hw[0], 1.0])
    resized = K * scale[:, None]
    resized[:2, 2] += 0.5 * scale[:2] - 0.5
    return resized


def made_up_stamps(number: int, rate_hz: float = MADE_UP_RATE_HZ) -> list[int]:
    """Stamps for datasets that have none."""
    return [made_up_stamp(index, rate_hz) for index in range(number)]


def made_up_stamp(index: int, rate_hz: float = MADE_UP_RATE_HZ) -> int:
    """Stamp of a frame of a dataset that has none."""
    return MADE_UP_START_NS + round(index * 1e9 / rate_hz)


def pose_at(truth: Trajectory | None, stamp_ns: int) -> np.ndarray | None:
    """Pose [4, 4] nearest in time within the association tolerance; None: there is none."""
    if truth is None or truth.stamps_ns is None:
        return None
    stamp = np.array([stamp_ns])
    (nearest,) = nearest_within(stamp, truth.stamps_ns, ASSOCIATION_TOLERANCE_NS)
    return None if nearest < 0 else truth.T_world_camera[nearest]


def nearest_within(stamps: np.ndarray, among: np.ndarray, tolerance_ns: int) -> np.ndarray:
    """Index of the nearest stamp of the sorted ``among`` for each of ``stamps``, -1: too far."""
    right = np.clip(np.searchsorted(among, stamps), 1, max(len(among) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(among) - 1)
    nearest = np.where(stamps - among[left] <= np.abs(among[right] - stamps), left, right)
    return np.where(np.abs(among[nearest] - stamps) <= tolerance_ns, nearest, -1)
