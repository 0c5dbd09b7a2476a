"""The occupancy grid of a map in the map frame: the same from node and replay."""

import numpy as np

from stream3r_core.config import OccupancyConfig
from stream3r_core.errors import DataError
from stream3r_core.mapping import OccupancyGrid, Views, occupancy_grid
from stream3r_core.mapping.occupancy import VOXELS_PER_CELL
from stream3r_core.types import FramePrediction
from stream3r_ros.outputs import WorldInMap

LEVEL_BY_THE_FIRST_IMAGE = (
    "outputs.occupancy_grid takes the first image for level, as map_orientation is 'camera'; with "
    "a camera that is tilted set map_orientation to 'level'"
)


def map_grid(
    world: WorldInMap,
    voxel_map,  # VoxelMap or AtlasMap
    T_world_camera: np.ndarray,  # [n, 4, 4], where the frames lie now
    tan_half_width: float,  # of the field of view
    options: OccupancyConfig,
) -> OccupancyGrid:
    """Return the grid of a whole map, in the map frame and its unit.

    Raises:
        DataError: There is nothing in the map yet, or the floor cannot be found in it.

    """
    blocks = [world.cloud(block).points_xyz for block in voxel_map.view().blocks()]
    voxel_size = voxel_map.voxel_size
    if not blocks or voxel_size is None:
        raise DataError('the map is empty')
    resolution = options.resolution or VOXELS_PER_CELL * voxel_size * world.scale
    views = Views(world.poses(T_world_camera), tan_half_width)
    return occupancy_grid(np.concatenate(blocks), views, resolution, options)


def tan_half_width(prediction: FramePrediction) -> float:
    """Return the tangent of half the horizontal field of view."""
    return prediction.depth.shape[1] / 2 / float(prediction.K[0, 0])
