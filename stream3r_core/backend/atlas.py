"""All submaps and where they lie: what consumers read, within budgets."""

from dataclasses import dataclass
from itertools import pairwise
from threading import RLock
from typing import NamedTuple

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.config import SubmapConfig
from stream3r_core.backend.submap import EMPTY, Submap
from stream3r_core.mapping import MapCloud

_SLACK = 0.9  # of a budget that is left after it was overdrawn, so that thinning is rare
_MOVED = 1e-4  # relative change of a similarity's entries that consumers are told of
_COARSEST = 100  # points that a submap keeps whatever the budget


class SubmapRows(NamedTuple):
    """Points of one submap that are new, or have moved."""

    S_map_submap: np.ndarray  # [4, 4]
    numbers: np.ndarray  # [N] int64, of the points in the submap
    cloud: MapCloud  # [N] points in the submap's frame
    weight: np.ndarray  # [N] float32 > 0


@dataclass(frozen=True)
class AtlasChange:
    """What happened to the points of the map after a version; keys are those of submaps."""

    version: int  # pass it to the next call
    is_complete: bool  # these are all points there are: forget what came before
    rows: dict[int, SubmapRows]
    gone: dict[int, np.ndarray]  # numbers [N] of points that are no longer there


class Atlas:
    """Submaps by key, in the order of their arrival, and the similarities that place them.

    One thread writes, any may read. Consumers compare :attr:`version`, which counts every change,
    or ask :meth:`changed_since`; all that they get is of one moment.
    """

    def __init__(self, config: SubmapConfig | None = None):
        self.config = config or SubmapConfig()
        self.lock = RLock()
        self.submaps: dict[int, Submap] = {}
        self._S_map: dict[int, np.ndarray] = {}
        self._version = 0
        self._num_moves = 0
        self._moved_at: dict[int, int] = {}
        self._filled_at: dict[int, int] = {}
        self._renumbered_at: dict[int, int] = {}
        self._most_rows: dict[int, int] = {}  # that a submap ever had
        self._opened: tuple[int, list[tuple[int, int]]] = -1, []  # key; its point versions by ours
        self._removed: dict[int, tuple[int, int]] = {}  # key: version, rows it ever had
        self._forgotten_until = -1  # of the removals

    @property
    def version(self) -> int:
        """Counts the changes of points and places."""
        return self._version

    def S_map_submap(self, key: int) -> np.ndarray:
        """Where a submap lies, [4, 4]."""
        with self.lock:
            return self._S_map[key]

    def place(self, poses: dict[int, np.ndarray]) -> bool:
        """Move submaps to ``S_map_submap`` [4, 4]; all at once. Return whether any moved."""
        with self.lock:
            known = [key for key in poses if key in self._S_map]
            old, new = (np.array([S[key] for key in known]) for S in (self._S_map, poses))
            is_close = (
                np.isclose(old, new, rtol=_MOVED, atol=_MOVED).all((-2, -1)) if known else ()
            )
            moved = [key for key, same in zip(known, is_close) if not same]
            moved += [key for key in poses if key not in self._S_map]
            self._num_moves += any(key in self._S_map for key in moved)
            if moved:
                self._version += 1
                self._S_map.update((key, poses[key]) for key in moved)
                self._moved_at.update(dict.fromkeys(moved, self._version))
            return bool(moved)

    @property
    def num_moves(self) -> int:
        """Counts the corrections: submaps that were there have moved."""
        return self._num_moves

    def add(self, submap: Submap, S_map_submap: np.ndarray) -> None:
        """Append a submap."""
        with self.lock:
            self.submaps[submap.key] = submap
            self._opened, self._most_rows[submap.key] = (submap.key, []), 0
            self.place({submap.key: S_map_submap})
            self.renumber(submap.key)

    def touch(self, key: int) -> None:
        """Note that the points of a submap have changed, or that there are more."""
        with self.lock:
            submap = self.submaps[key]
            self._version += 1
            self._filled_at[key] = self._version
            self._most_rows[key] = max(self._most_rows[key], submap.num_rows)
            if submap.is_open:
                self._opened[1].append((self._version, submap.point_version))

    def renumber(self, key: int) -> None:
        """Note that the points of a submap are others now."""
        with self.lock:
            self.touch(key)
            self._renumbered_at[key] = self._version

    def changed_since(self, version: int) -> AtlasChange:
        """Return what is new after ``version``; -1: everything.

        The numbers of an open submap's points last; a submap that is closed, coarsened or folded
        numbers its points anew.
        """
        with self.lock:
            is_complete = version < max(self._forgotten_until, 0)
            version = -1 if is_complete else version
            rows, gone = {}, {}
            for key, submap in self.submaps.items():
                is_moved = max(self._moved_at[key], self._renumbered_at[key]) > version
                if not is_moved and self._filled_at[key] <= version:
                    continue
                numbers, cloud, weight = submap.rows_since(
                    -1 if is_moved else self._point_version(key, version)
                )
                lost = numbers[weight == 0]
                if self._renumbered_at[key] > version:
                    beyond = np.arange(submap.num_rows, self._most_rows[key])
                    lost = np.concatenate([lost, beyond])
                rows[key] = _present(self._S_map[key], numbers, cloud, weight)
                gone[key] = lost
            for key, (at, most) in self._removed.items():
                if at > version:
                    gone[key] = np.arange(most)
            return AtlasChange(self._version, is_complete, rows, {} if is_complete else gone)

    def _point_version(self, key: int, version: int) -> int:
        """Return the version that the points of an open submap had at a version of the atlas."""
        opened, versions = self._opened
        known = [points for at, points in versions if at <= version] if key == opened else []
        return known[-1] if known else -1

    def cloud(self) -> MapCloud:
        """All points in the map frame, of one moment."""
        with self.lock:
            parts = [(self._S_map[key], submap.cloud) for key, submap in self.submaps.items()]
        if not parts:
            return EMPTY
        return MapCloud(
            np.concatenate([sim3.act(S, part.points_xyz) for S, part in parts]),
            np.concatenate([part.colors_rgb for _, part in parts]),
            np.concatenate([part.confidence for _, part in parts]),
        )

    def trajectory(self, S_submap: dict[int, np.ndarray] | None = None, newest: int | None = None):
        """Return frame_ids [n], stamps_ns [n] and T_map_camera [n, 4, 4] of all frames kept.

        ``S_submap`` gives other places to the submaps, such as those without loops. ``newest``:
        only the submaps that hold so many frames, the last ones, are looked at.
        """
        parts, count = [], 0
        with self.lock:
            S_submap = S_submap or self._S_map
            for key, s in reversed(self.submaps.items()):
                if newest is not None and count >= newest:
                    break
                if s.num_frames:
                    poses = sim3.rigid_of(S_submap[key] @ s.T_submap_camera)
                    parts.append((s.frame_ids, s.stamps_ns, poses))
                    count += s.num_frames
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4, 4))
        frame_ids, stamps_ns, poses = (np.concatenate(arrays) for arrays in zip(*parts[::-1]))
        order = np.argsort(frame_ids, kind='stable')[-newest if newest else 0 :]
        return frame_ids[order], stamps_ns[order], poses[order]

    def fold(self, key: int, into: int, S_into_key: np.ndarray) -> None:
        """Make a closed submap part of another one."""
        with self.lock:
            self.submaps[into].absorb(self.submaps[key], S_into_key)
            self.submaps[into].coarsen(self.config.max_submap_points)
            self.renumber(into)
            self.remove(key)

    def remove(self, key: int) -> None:
        """Forget a submap."""
        with self.lock:
            self._version += 1
            self._removed[key] = self._version, self._most_rows[key]
            for by_key in (
                self.submaps, self._S_map, self._moved_at, self._filled_at, self._renumbered_at,
                self._most_rows,
            ):  # fmt: skip
                del by_key[key]
            while len(self._removed) > self.config.max_submaps:
                self._forgotten_until, _ = self._removed.pop(next(iter(self._removed)))

    def surplus(self, before: int) -> list[tuple[int, int]]:
        """Which submaps (key, into) to fold so that there are few enough: the shortest pairs.

        Of those that came before a submap, but the last.
        """
        closed = [key for key in self.submaps if key < before][:-1]
        if len(self.submaps) <= self.config.max_submaps:
            return []
        wanted = len(self.submaps) - int(_SLACK * self.config.max_submaps)
        size = {key: self.submaps[key].num_frames for key in closed}
        neighbours = sorted(pairwise(closed), key=lambda pair: size[pair[0]] + size[pair[1]])
        taken: set[int] = set()
        pairs = []
        for into, key in neighbours:
            if len(pairs) < wanted and not taken & {into, key}:
                taken |= {into, key}
                pairs.append((key, into))
        return pairs

    def thin(self) -> bool:
        """Hold the budgets of points, poses, images and keyframes.

        The newest half of the poses stays whole, so that a correction reaches every pose of the
        path that consumers are shown. Returns whether keyframes, or images of them, had to go.
        """
        with self.lock:
            self._thin_points()
            poses = self._poses_to_keep()
            images = evenly_spaced(
                [k.frame_id for k in self._keyframes() if k.image_rgb is not None],
                self.config.max_images,
            )
            keyframes = evenly_spaced(
                [k.frame_id for k in self._keyframes()], self.config.max_keyframes
            )
            for submap in self.submaps.values():
                if poses is not None:
                    submap.keep_frames(poses)
                if images is not None:
                    submap.keep_images(images)
                if keyframes is not None:
                    submap.keyframes = [k for k in submap.keyframes if k.frame_id in keyframes]
            return images is not None or keyframes is not None

    def _poses_to_keep(self) -> set[int] | None:
        """Frames whose poses stay: the newest half of the budget, the others spread evenly."""
        budget = self.config.max_poses
        if sum(submap.num_frames for submap in self.submaps.values()) <= budget:
            return None
        frame_ids = np.sort(np.concatenate([s.frame_ids for s in self.submaps.values()]))
        old, new = np.split(frame_ids, [-(budget // 2)])
        return evenly_spaced(old.tolist(), budget - len(new)) | set(new.tolist())

    def _keyframes(self):
        return [k for submap in self.submaps.values() for k in submap.keyframes]

    @property
    def num_points(self) -> int:
        """Points of all submaps."""
        with self.lock:
            return sum(submap.num_points for submap in self.submaps.values())

    @property
    def voxel_size(self) -> float:
        """Edge of a voxel of the oldest submap in units of the map; 0: not known."""
        with self.lock:
            key = next(iter(self.submaps), None)
            if key is None:
                return 0.0
            return float(sim3.scale_of(self._S_map[key])) * self.submaps[key].voxel_size

    def _thin_points(self) -> None:
        surplus = self.num_points - self.config.max_points
        if surplus <= 0:
            return
        closed = [submap for submap in self.submaps.values() if not submap.is_open]
        for submap in sorted(
            closed, key=lambda s: -s.num_points
        ):  # the oldest of equal ones first
            before = submap.num_points
            if surplus <= 0 or before <= _COARSEST:
                break
            submap.coarsen(max(before // 2, _COARSEST))
            surplus -= before - submap.num_points
            self.renumber(submap.key)


def _present(S_map_submap, numbers, cloud: MapCloud, weight) -> SubmapRows:
    """Rows without the removed ones."""
    there = weight > 0
    if there.all():
        return SubmapRows(S_map_submap, numbers, cloud, weight)
    columns = (cloud.points_xyz, cloud.colors_rgb, cloud.confidence)
    cloud = MapCloud(*(column[there] for column in columns))
    return SubmapRows(S_map_submap, numbers[there], cloud, weight[there])


def evenly_spaced(numbers: list[int], budget: int) -> set[int] | None:
    """Those to keep where there are too many, spread evenly over the way; None: all may stay.

    Every nth would leave fewer of the old ones each time.
    """
    if len(numbers) <= budget:
        return None
    there = np.sort(numbers)
    wanted = np.linspace(there[0], there[-1], max(1, int(_SLACK * budget)))
    at = np.clip(np.searchsorted(there, wanted), min(1, len(there) - 1), len(there) - 1)
    at -= wanted - there[at - 1] <= there[at] - wanted
    return set(there[np.unique(at)].tolist())
