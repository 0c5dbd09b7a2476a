"""Which voxels a frame looks through: points that later rays contradict."""

from typing import NamedTuple

import numpy as np

_COLUMNS = 80  # of the grid of clearances: a cell is a little less than a degree wide
_NEAR = 1e-6  # points nearer to the image plane have no pixel


class Sight(NamedTuple):
    """What a frame says about the space in front of its camera."""

    T_world_camera: np.ndarray  # [4, 4]
    K: np.ndarray  # [3, 3] pixels of the maps below
    depth: np.ndarray  # [H, W] along the optical axis; NaN, infinity and <= 0: none
    confidence: np.ndarray  # [H, W]
    reliable: np.ndarray  # [H, W] bool, pixels that are good enough for the map


class FreeSpace:
    """Up to which depth the rays of a frame are free.

    A ray counts as free up to the nearest depth among the pixels around it (about 1 to 2 degrees,
    whatever the resolution). So neither a silhouette, nor a surface at a grazing angle, nor a pose
    that is off by a pixel makes holes; a pixel without depth frees nothing around it.
    """

    def __init__(self, sight: Sight):
        self._sight = sight
        self._side = max(1, round(sight.depth.shape[1] / _COLUMNS))  # of a cell, pixels
        cells = _least_of_lines(_least_of_lines(sight.depth, self._side).T, self._side).T
        has_depth = (cells > 0) & (cells < np.inf)  # NaN and 0 go through the minimum
        cells = np.where(has_depth, cells, np.float32(0))
        self._clear = np.ascontiguousarray(_least_of_neighbours(cells))
        R = sight.T_world_camera[:3, :3].astype(np.float64)
        to_pixels = sight.K @ R.T
        self._to_pixels = to_pixels.astype(np.float32)
        self._shift = (-to_pixels @ sight.T_world_camera[:3, 3]).astype(np.float32)

    def contradicted(
        self, points_xyz: np.ndarray, margin: float, slack: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which points [N, 3] of the world lie in free space, and how sure that is.

        Returns their rows [M] and the confidences [M] of the rays through them. A point must lie
        in front of what the ray hits by ``margin``, a fraction of the depth, and ``slack`` more.
        """
        height, width = self._sight.depth.shape
        x, y, z = (points_xyz @ row + shift for row, shift in zip(self._to_pixels, self._shift))
        with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
            column, line = np.rint(x / z), np.rint(y / z)
        in_view = (z > _NEAR) & (column >= 0) & (column < width) & (line >= 0) & (line < height)
        rows = np.flatnonzero(in_view)
        column, line = (axis.take(rows).astype(np.int32) for axis in (column, line))
        cell = (line // self._side) * self._clear.shape[1] + column // self._side
        farthest = (1 - np.float32(margin)) * self._clear.ravel().take(cell) - np.float32(slack)
        pixel = line * width + column
        is_through = (z.take(rows) < farthest) & self._sight.reliable.ravel().take(pixel)
        through = np.flatnonzero(is_through)
        return rows.take(through), self._sight.confidence.ravel().take(pixel.take(through))


def _least_of_lines(depth: np.ndarray, side: int) -> np.ndarray:
    """Minimum [ceil(H / side), W] over groups of lines of ``depth`` [H, W]."""
    least = depth[::side].copy()
    for first in range(1, side):
        lines = depth[first::side]
        np.minimum(least[: len(lines)], lines, out=least[: len(lines)])
    return least


def _least_of_neighbours(cells: np.ndarray) -> np.ndarray:
    """Minimum over each cell and the eight around it."""
    for axis in (0, 1):
        padded = np.pad(cells, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode='edge')
        size = cells.shape[axis]
        shifted = (padded.take(range(start, start + size), axis) for start in range(3))
        cells = np.minimum.reduce(list(shifted))
    return cells
