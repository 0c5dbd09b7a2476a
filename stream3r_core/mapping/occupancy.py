"""A 2-D occupancy grid from a map whose z is up: walls, free floor, and what is not known."""

from dataclasses import dataclass

import numpy as np

from stream3r_core.config import OccupancyConfig
from stream3r_core.errors import DataError

UNKNOWN, FREE, OCCUPIED = -1, 0, 100  # as in nav_msgs/OccupancyGrid
VOXELS_PER_CELL = 3  # where no resolution is asked for
_MAX_VIEWS, _RAYS, _MAX_STEPS = 200, 96, 200  # bound the search for free cells
_VIEWS_AT_ONCE = 16
_LEVEL_BINS = 20  # of the heights below the camera, in the search for the floor
_FLOOR_SHARE = 0.25  # of the points below the camera; evenly spread walls have 3 / 20


@dataclass(frozen=True)
class OccupancyGrid:
    """Cells of a horizontal grid; cell [0, 0] begins at the origin, rows go along y."""

    values: np.ndarray  # [rows, columns] int8: -1 unknown, 0 free, 100 occupied
    resolution: float  # edge of a cell, map units
    origin_xy: tuple[float, float]  # map units, a multiple of the resolution
    floor_z: float  # map units
    is_cropped: bool  # max_cells did not suffice for the whole map


@dataclass(frozen=True)
class Views:
    """From where a map was seen."""

    T_map_camera: np.ndarray  # [V, 4, 4], in the order of time
    tan_half_width: float  # of the horizontal field of view

    def thinned(self) -> 'Views':
        """At most 200 of them, evenly spread, with the newest."""
        count = len(self.T_map_camera)
        kept = np.linspace(0, count - 1, min(count, _MAX_VIEWS)).round().astype(int)
        return Views(self.T_map_camera[kept], self.tan_half_width)


def occupancy_grid(
    points_xyz: np.ndarray, views: Views, resolution: float, options: OccupancyConfig
) -> OccupancyGrid:
    """Return the grid of points [N, 3] of a map with z up, map units.

    Occupied are cells with ``min_points`` points in the band of heights. Free are cells with
    floor, and those that a camera looked across: on the way from it to floor or obstacles within
    its field of view, up to the first obstacle. The floor is taken for flat. Cells are multiples
    of the resolution, so that they keep their place from grid to grid. Time and memory are bounded
    by the number of points, ``max_cells`` and constants.

    Raises:
        DataError: There is no point or no view, or the floor cannot be found.

    """
    if not len(points_xyz) or not len(views.T_map_camera):
        raise DataError('an occupancy grid needs points and poses; there are none yet')
    views = views.thinned()
    camera_z = float(np.median(views.T_map_camera[:, 2, 3]))
    height = options.camera_height or camera_z - find_floor(points_xyz[:, 2], camera_z)
    heights = (points_xyz[:, 2] - (camera_z - height)) / height
    is_floor = np.abs(heights) <= options.min_height
    is_obstacle = (heights > options.min_height) & (heights < options.max_height)
    cells = np.floor(points_xyz[:, :2] / resolution)
    cameras = views.T_map_camera[:, :2, 3] / resolution
    seen = np.concatenate([cells[is_floor | is_obstacle], np.floor(cameras)])
    low, shape_xy = _extent(seen)
    is_cropped = int(np.prod(shape_xy)) > options.max_cells
    if is_cropped:
        low, shape_xy = _around(np.floor(cameras[-1]), low, shape_xy, options.max_cells)
    floor, obstacles = (_counts(cells[which] - low, shape_xy) for which in (is_floor, is_obstacle))
    occupied = obstacles >= options.min_points
    known = occupied | (floor > 0)
    free = known | _crossed(occupied, known, views, cameras - low)
    values = np.where(occupied, OCCUPIED, np.where(free, FREE, UNKNOWN)).astype(np.int8)
    origin_xy = tuple((low * resolution).tolist())
    return OccupancyGrid(
        np.ascontiguousarray(values.T), resolution, origin_xy, camera_z - height, is_cropped
    )


def find_floor(points_z: np.ndarray, camera_z: float) -> float:
    """Return the height where points [N] below a camera gather.

    Raises:
        DataError: They do not gather anywhere.

    """
    below = points_z[points_z < camera_z]
    if below.size:
        lowest = float(np.percentile(below, 1))
        counts, edges = np.histogram(below, _LEVEL_BINS, (lowest, camera_z))
        level = np.convolve(counts, np.ones(3, int), 'same')
        peak = int(level.argmax())
        if camera_z > lowest and level[peak] >= _FLOOR_SHARE * below.size:
            near = (below >= edges[max(peak - 1, 0)]) & (
                below <= edges[min(peak + 2, _LEVEL_BINS)]
            )
            return float(np.median(below[near]))
    raise DataError(
        'the floor cannot be found: too few points lie on one level below the camera; set '
        'outputs.occupancy_grid.camera_height'
    )


def _extent(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest cell and number of cells, [2] each."""
    low = cells.min(0)
    return low, (cells.max(0) - low).astype(np.int64) + 1


def _around(
    middle: np.ndarray, low: np.ndarray, shape_xy: np.ndarray, max_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Part of an extent with at most ``max_cells``, about a cell in the middle."""
    short = int(shape_xy.argmin())
    size = np.empty(2, np.int64)
    size[short] = min(shape_xy[short], int(max_cells**0.5))
    size[1 - short] = min(shape_xy[1 - short], max_cells // size[short])
    first = np.clip(middle - size // 2, low, low + shape_xy - size)
    return first, size


def _counts(cells: np.ndarray, shape_xy: np.ndarray) -> np.ndarray:
    """How many of the cells [N, 2] fall on each place of a grid of this shape."""
    cells = cells[((cells >= 0) & (cells < shape_xy)).all(1)].astype(np.int64)
    flat = cells[:, 0] * shape_xy[1] + cells[:, 1]
    return np.bincount(flat, minlength=int(np.prod(shape_xy))).reshape(shape_xy)


def _crossed(
    occupied: np.ndarray, known: np.ndarray, views: Views, cameras: np.ndarray
) -> np.ndarray:
    """Cells that the cameras [V, 2], in cells, look across on the way to known ones."""
    crossed = np.zeros_like(occupied)
    barrier = _without_gaps(occupied)
    across = np.linspace(-views.tan_half_width, views.tan_half_width, _RAYS)
    rays_camera = np.stack([across, np.zeros(_RAYS), np.ones(_RAYS)])  # of the middle row
    rays = (views.T_map_camera[:, :2, :3] @ rays_camera).transpose(0, 2, 1)  # [V, rays, xy]
    rays /= np.maximum(np.linalg.norm(rays, axis=-1, keepdims=True), 1e-6)
    steps = np.arange(1, min(_MAX_STEPS, sum(occupied.shape)) + 1)[:, np.newaxis]
    for start in range(0, len(rays), _VIEWS_AT_ONCE):
        part = slice(start, start + _VIEWS_AT_ONCE)
        way = cameras[part, np.newaxis, np.newaxis] + rays[part, :, np.newaxis] * steps
        x, y = np.floor(way).astype(np.int64).transpose(3, 0, 1, 2)  # each [v, rays, steps]
        inside = (x >= 0) & (x < occupied.shape[0]) & (y >= 0) & (y < occupied.shape[1])
        x, y = np.where(inside, x, 0), np.where(inside, y, 0)
        reached = ~np.logical_or.accumulate(~inside | barrier[x, y], -1)
        is_stop = inside & known[x, y] & np.concatenate([reached[..., :1], reached[..., :-1]], -1)
        ahead = np.logical_or.accumulate(is_stop[..., ::-1], -1)[..., ::-1]  # something known is
        seen = reached & ahead
        crossed[x[seen], y[seen]] = True
    return crossed


def _without_gaps(occupied: np.ndarray) -> np.ndarray:
    """Close the corners between cells that touch diagonally: no ray slips through."""
    closed = occupied.copy()
    falling = occupied[:-1, :-1] & occupied[1:, 1:]
    rising = occupied[:-1, 1:] & occupied[1:, :-1]
    closed[1:, :-1] |= falling
    closed[:-1, :-1] |= rising
    return closed
