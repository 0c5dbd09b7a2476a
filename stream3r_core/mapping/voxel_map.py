"""The accumulated map: one weighted point per voxel, within a budget, changed frame by frame."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stream3r_core.config import MappingConfig
from stream3r_core.errors import InputError
from stream3r_core.geometry import unproject_to_world
from stream3r_core.mapping.carving import FreeSpace, Sight
from stream3r_core.mapping.cloud import BLOCK_POINTS, MapCloud
from stream3r_core.mapping.filters import reliable_pixels
from stream3r_core.mapping.pages import zero_pages
from stream3r_core.mapping.voxel_index import (
    CELL_LIMIT,
    NO_KEY,
    VoxelIndex,
    group_keys,
    pack_cells,
)
from stream3r_core.types import FramePrediction

# Weights are confidences. One frame counts at most 20 and a voxel at most 200: a very sure frame
# cannot freeze a voxel, and the last 10 or more observations always matter.
MAX_OBSERVATION_WEIGHT = 20.0
MAX_WEIGHT = 200.0
_MAX_CONFIDENCE = 1e4  # an exponential of the network: may overflow

_XYZ, _RGB, _CONFIDENCE, _WEIGHT = slice(0, 3), slice(3, 6), 6, 7  # columns of the state
_SWEEP = 4  # slots examined per slot freed
_MIN_SWEEP = 4096


@dataclass(frozen=True)
class MapChange:
    """What happened to the map after a version; arrays of equal length N.

    Apply the rows in any order: each voxel id occurs once, with its newest state.
    """

    version: int  # of the map that this leads to; pass it to the next call
    is_complete: bool  # these are all voxels there are: forget what came before
    voxel_ids: np.ndarray  # [N] int64, constant as long as the map is not cleared
    points_xyz: np.ndarray  # [N, 3] float32, world frame, scene units; NaN: removed
    colors_rgb: np.ndarray  # [N, 3] uint8
    confidence: np.ndarray  # [N] float32
    weight: np.ndarray  # [N] float32, accumulated confidence; 0: removed


class VoxelRows(NamedTuple):
    """Voxels by the rows that they have in one map; arrays of equal length N."""

    rows: np.ndarray  # [N] int64; one that was removed may hold another voxel later
    cloud: MapCloud
    weight: np.ndarray  # [N] float32, accumulated confidence; 0: removed


class MapView:
    """The points of a map, to be read block by block without a copy of the whole.

    ``len`` is fixed when the view is made. What is integrated meanwhile may show in later blocks.
    What is carved away meanwhile stays, and so does everything after a :meth:`VoxelMap.clear`.
    """

    def __init__(self, state: np.ndarray, lock: Lock):
        self._state, self._lock = state, lock

    def __len__(self) -> int:
        return len(self._state)

    def blocks(self) -> Iterator[MapCloud]:
        """Yield all points, at most :data:`BLOCK_POINTS` at a time."""
        for start in range(0, len(self), BLOCK_POINTS):
            with self._lock:
                rows = self._state[start : start + BLOCK_POINTS].copy()
            yield _cloud(rows)


class VoxelMap:
    """Coloured points averaged per voxel, within a budget of points.

    The cost of a frame depends on the frame, not on the size of the map; memory is reserved once
    for ``max_points`` and used as the map grows. All methods may be called from any thread.

    When the budget is spent, room is made by a hand that sweeps over the voxels in turn and
    removes the quarter with the least weight of those that it passes, never one that the current
    frame has seen. With ``carving`` another hand passes over a bounded number of voxels per frame:
    those that the frame looks through lose the confidence of its rays, and go when none is left.

    ``config`` may be replaced while running; ``voxel_size``, ``voxel_fraction`` and ``max_points``
    are read by the constructor and by :meth:`clear`.
    """

    def __init__(self, config: MappingConfig | None = None):
        self.config = config or MappingConfig()
        self._lock = Lock()
        self._version = 0
        self._reset()

    def _reset(self) -> None:
        self._pixels_seen = self._pixels_taken = 0
        self._max_points = self.config.max_points
        self._voxel_size = self.config.voxel_size
        self._index = VoxelIndex(self._max_points)
        self._state = zero_pages((self._max_points, 8), np.float32)  # a voxel: half a cache line
        self._changed = zero_pages((self._max_points,), np.int64)  # version of the last change
        self._num_points = self._num_rows = 0
        self._hand = self._carver = 0
        self._removed: deque[tuple[int, np.ndarray]] = deque()  # (version, voxel ids)
        self._num_removed = 0
        self._oldest_version = self._version  # before it, what was removed is no longer known

    @property
    def num_points(self) -> int:
        """Points in the map, at most ``max_points``."""
        return self._num_points

    @property
    def num_rows(self) -> int:
        """Rows in use so far, see :class:`VoxelRows`."""
        return self._num_rows

    @property
    def share_taken(self) -> float:
        """Share of the pixels of all frames that were good enough for the map; NaN: no frame."""
        with self._lock:
            return self._pixels_taken / self._pixels_seen if self._pixels_seen else float('nan')

    @property
    def version(self) -> int:
        """Counts the changes of the map."""
        return self._version

    @property
    def voxel_size(self) -> float | None:
        """Edge of a voxel in scene units; None until the first frame has set it."""
        return self._voxel_size or None

    def clear(self) -> None:
        """Remove everything; a voxel size that followed from the first frame is found anew."""
        with self._lock:
            self._version += 1
            self._reset()

    def integrate(self, prediction: FramePrediction) -> None:
        """Add the reliable pixels of one frame (``source``, thresholds: see the configuration).

        Raises:
            InputError: The point head is the source and the prediction has no points.

        """
        points, depth, confidence = self._measured(prediction)
        reliable = reliable_pixels(depth, confidence, self.config)
        in_image = np.zeros_like(reliable)
        in_image[prediction.geometry.camera_area()] = True
        pixels = np.flatnonzero(reliable & in_image)
        with self._lock:
            self._pixels_seen += np.count_nonzero(in_image)
            self._pixels_taken += len(pixels)
            if not self._voxel_size and pixels.size:
                median = float(np.median(depth.ravel()[pixels]))
                self._voxel_size = self.config.voxel_fraction * median
            version = self._version
            self._integrate(
                points.reshape(-1, 3).T.take(pixels, 1),
                _array(prediction.rgb).reshape(-1, 3).take(pixels, 0).T,
                confidence.ravel().take(pixels),
            )
            if self.config.carving.enabled and self._version != version:
                self._carve(
                    Sight(
                        _array(prediction.T_world_camera), _array(prediction.K),
                        np.where(in_image, depth, np.float32(0)), confidence, reliable,
                    )
                )  # fmt: skip

    def _measured(self, prediction: FramePrediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World points [H, W, 3], depth [H, W] and confidence [H, W] of the configured source."""
        T_world_camera = prediction.T_world_camera.cpu()
        if self.config.source == 'depth':
            depth = prediction.depth.cpu()
            points = unproject_to_world(depth, prediction.K.cpu(), T_world_camera)
            return _array(points), _array(depth), _array(prediction.depth_conf)
        if prediction.world_points is None:
            raise InputError(
                "mapping.source is 'points', but the prediction has no world points; "
                "switch the point head on or use mapping.source 'depth'"
            )
        points = _array(prediction.world_points)
        T = _array(T_world_camera)
        with np.errstate(over='ignore', invalid='ignore'):
            depth = (points - T[:3, 3]) @ T[:3, 2]
        return points, depth, _array(prediction.world_points_conf)

    def integrate_points(
        self, points_xyz: np.ndarray, colors_rgb: np.ndarray, confidence: np.ndarray
    ) -> None:
        """Add points [N, 3] of the world frame with colours [N, 3] uint8 and confidences [N] > 0.

        Points that are not finite are left out; no other filter is applied.

        Raises:
            InputError: Lengths differ, or the voxel size is not known yet.

        """
        points_xyz, colors_rgb, confidence = map(np.asarray, (points_xyz, colors_rgb, confidence))
        count = len(points_xyz)
        shapes = [a.shape for a in (points_xyz, colors_rgb, confidence)]
        if shapes != [(count, 3), (count, 3), (count,)]:
            raise InputError(
                f'expected points [N, 3], colors [N, 3], confidence [N], got {shapes}'
            )
        if not (confidence > 0).all():
            raise InputError('expected confidences above 0, got some at or below 0, or NaN')
        with self._lock:
            if not self._voxel_size:
                raise InputError('set mapping.voxel_size: without depth it cannot be derived')
            self._integrate(points_xyz.T, colors_rgb.T, confidence)

    def _integrate(self, xyz: np.ndarray, rgb: np.ndarray, confidence: np.ndarray) -> None:
        """Add points given as planes: xyz [3, N], rgb [3, N], confidence [N]."""
        with np.errstate(over='ignore', invalid='ignore'):
            cells = np.floor(xyz * np.float32(1 / (self._voxel_size or 1)))
        if not np.abs(cells).max(initial=0) < CELL_LIMIT:  # also true for NaN
            inside = np.flatnonzero((np.abs(cells) < CELL_LIMIT).all(0))
            cells, xyz, rgb = (planes.take(inside, 1) for planes in (cells, xyz, rgb))
            confidence = confidence.take(inside)
        if not confidence.size:
            return
        keys = pack_cells(cells)
        members, groups = group_keys(keys)
        self._version += 1
        self._merge(keys[members], _observe(xyz, rgb, confidence, groups, len(members)))

    def _merge(self, keys: np.ndarray, observed: np.ndarray) -> None:
        """Average the observations [G, 8] of distinct voxels into the state."""
        slots = self._index.find(keys)
        known = slots != -1
        self._changed[slots[known]] = self._version  # keeps the hand off them
        new = self._newcomers(np.flatnonzero(~known), observed)
        slots[new] = self._take_slots(len(new))
        self._index.insert(keys[new], slots[new])
        self._changed[slots[new]] = self._version
        self._average_known(np.flatnonzero(known), slots, observed)
        placed = np.flatnonzero(slots != -1)
        self._state[slots.take(placed)] = observed.take(placed, 0)

    def _average_known(self, known: np.ndarray, slots: np.ndarray, observed: np.ndarray) -> None:
        """Turn the observations of voxels that the map has into their new state, in place."""
        state, new = self._state.take(slots.take(known), 0), observed.take(known, 0)
        weight = state[:, _WEIGHT] + new[:, _WEIGHT]
        share = new[:, _WEIGHT] / weight
        state += share[:, np.newaxis] * (new - state)
        state[:, _WEIGHT] = np.minimum(weight, MAX_WEIGHT)
        observed[known] = state

    def _newcomers(self, new: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Of the new voxels, the surest ones where a single frame exceeds the whole budget."""
        seen = len(observed) - len(new)
        room = self._max_points - seen
        if len(new) <= room:
            return new
        surest = np.argsort(-observed[new, _WEIGHT], kind='stable')
        return new[surest[:room]]

    def _take_slots(self, count: int) -> np.ndarray:
        """Slots for new voxels: unused ones, then those of removed voxels."""
        fresh = min(count, self._max_points - self._num_points)
        slots = np.arange(self._num_points, self._num_points + fresh)
        self._changed[slots] = self._version
        self._num_points += fresh
        self._num_rows = max(self._num_rows, self._num_points)
        if fresh == count:
            return slots
        return np.concatenate([slots, self._evict(count - fresh)])

    def _evict(self, count: int) -> np.ndarray:
        """Remove ``count`` voxels that this version has not touched, return their slots."""
        sweep = max(_SWEEP * count, _MIN_SWEEP)
        while True:
            sweep = min(sweep, self._max_points)
            is_free = self._ahead(self._changed, sweep) != self._version
            if np.count_nonzero(is_free) >= count:
                break
            sweep *= 2
        weight = np.where(is_free, self._ahead(self._state[:, _WEIGHT], sweep), np.inf)
        lightest = np.argpartition(weight, count - 1)[:count]
        slots = (self._hand + lightest) % self._max_points
        self._hand = (self._hand + sweep) % self._max_points
        self._log_removed(self._index.keys[slots])
        self._index.remove(slots)
        return slots

    def _ahead(self, column: np.ndarray, count: int) -> np.ndarray:
        """Values of the next slots that the hand passes, beyond the last slot from the first."""
        end = self._hand + count
        if end <= self._max_points:
            return column[self._hand : end]
        return np.concatenate((column[self._hand :], column[: end - self._max_points]))

    def _carve(self, sight: Sight) -> None:
        """Weaken voxels that the frame looks through and has not seen; remove spent ones."""
        options = self.config.carving
        first = self._carver
        end = min(first + options.max_voxels, self._num_points)
        self._carver = end if end < self._num_points else 0
        rows, confidence = FreeSpace(sight).contradicted(
            self._state[first:end, _XYZ], options.margin, options.margin_voxels * self._voxel_size
        )
        slots = first + rows
        unseen = np.flatnonzero(self._changed.take(slots) != self._version)
        slots = slots.take(unseen)
        self._state[slots, _WEIGHT] -= np.minimum(confidence.take(unseen), MAX_OBSERVATION_WEIGHT)
        self._changed[slots] = self._version
        spent = slots.compress(self._state[slots, _WEIGHT] <= 0)
        if spent.size:
            self._remove(spent)

    def _remove(self, slots: np.ndarray) -> None:
        """Remove voxels [N]; the last ones of the state move into their slots."""
        self._log_removed(self._index.keys[slots])
        self._index.remove(slots)
        kept = self._num_points - len(slots)
        holes, tail = slots[slots < kept], np.arange(kept, self._num_points)
        movers = tail[self._index.keys[tail] != NO_KEY]
        keys = self._index.keys[movers]
        self._index.remove(movers)
        self._index.insert(keys, holes)
        self._state[holes] = self._state[movers]
        self._state[tail, _WEIGHT] = 0  # says to readers of rows that nothing is there any more
        self._changed[holes] = self._changed[tail] = self._version
        self._num_points = kept
        self._carver = min(self._carver, kept)

    def _log_removed(self, voxel_ids: np.ndarray) -> None:
        self._removed.append((self._version, voxel_ids))
        self._num_removed += len(voxel_ids)
        while self._num_removed > self._max_points:
            self._oldest_version, forgotten = self._removed.popleft()
            self._num_removed -= len(forgotten)

    def points(self) -> MapCloud:
        """Return a copy of all points."""
        with self._lock:
            state = self._state[: self._num_points]
            return MapCloud(state[:, _XYZ].copy(), _colors(state), state[:, _CONFIDENCE].copy())

    def rows_since(self, version: int) -> VoxelRows:
        """Return the rows changed after ``version``; -1: all that were ever in use."""
        with self._lock:
            rows = np.flatnonzero(self._changed[: self._num_rows] > version)
            state = self._state[rows]
        cloud = MapCloud(state[:, _XYZ], _colors(state), state[:, _CONFIDENCE])
        return VoxelRows(rows, cloud, state[:, _WEIGHT])

    def view(self) -> MapView:
        """Return all points for reading in blocks, see :class:`MapView`."""
        with self._lock:
            return MapView(self._state[: self._num_points], self._lock)

    def changed_since(self, version: int) -> MapChange:
        """Return what changed after ``version``: the newest state of each voxel, and removals.

        A version from before a :meth:`clear`, or so old that its removals are no longer known
        (the log holds ``max_points`` of them), is answered with the complete map. Pass -1 for
        that.
        """
        with self._lock:
            is_complete = version < self._oldest_version
            changed = self._changed[: self._num_points]
            slots = np.flatnonzero(changed > (-1 if is_complete else version))
            gone = np.zeros(0, np.int64)
            if not is_complete:
                recent = [ids for at, ids in self._removed if at > version]
                gone = np.unique(np.concatenate([gone, *recent]))
                gone = gone[self._index.find(gone) == -1]  # some came back
            state = np.zeros((len(slots) + len(gone), 8), np.float32)
            state[: len(slots)] = self._state[slots]
            state[len(slots) :, _XYZ] = np.nan
            return MapChange(
                version=self._version,
                is_complete=is_complete,
                voxel_ids=np.concatenate([self._index.keys[slots], gone]),
                points_xyz=state[:, _XYZ],
                colors_rgb=_colors(state),
                confidence=state[:, _CONFIDENCE],
                weight=state[:, _WEIGHT],
            )


def _observe(
    xyz: np.ndarray, rgb: np.ndarray, confidence: np.ndarray, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """Confidence-weighted means of one frame per voxel [G, 8], in the layout of the state.

    Pixels of one frame err together, so a voxel's weight is their mean confidence, not the sum.
    """
    confidence = np.minimum(confidence, _MAX_CONFIDENCE)
    observed = np.empty((num_groups, 8), np.float32)
    total = np.bincount(groups, confidence, num_groups)
    for column, plane in enumerate((*xyz, *rgb)):
        observed[:, column] = np.bincount(groups, plane * confidence, num_groups) / total
    observed[:, _CONFIDENCE] = total / np.bincount(groups, minlength=num_groups)
    observed[:, _WEIGHT] = np.minimum(observed[:, _CONFIDENCE], MAX_OBSERVATION_WEIGHT)
    return observed


def _cloud(state: np.ndarray) -> MapCloud:
    return MapCloud(state[:, _XYZ], _colors(state), state[:, _CONFIDENCE])


def _colors(state: np.ndarray) -> np.ndarray:
    return (state[:, _RGB] + 0.5).astype(np.uint8)


def _array(tensor: Tensor) -> np.ndarray:
    """Tensor as a numpy array on the CPU, floating point as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy()
