"""The accumulated map: voxel-hashed, confidence-weighted, within a point budget; and its files."""

from stream3r_core.mapping.cloud import MapCloud, load_ply, save_pcd, save_ply
from stream3r_core.mapping.occupancy import OccupancyGrid, Views, occupancy_grid
from stream3r_core.mapping.voxel_map import MapChange, MapView, VoxelMap, VoxelRows

__all__ = [
    'MapChange',
    'MapCloud',
    'MapView',
    'OccupancyGrid',
    'Views',
    'VoxelMap',
    'VoxelRows',
    'load_ply',
    'occupancy_grid',
    'save_pcd',
    'save_ply',
]
