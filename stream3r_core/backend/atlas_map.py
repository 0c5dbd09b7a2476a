"""The atlas as one map in the map frame, read like a :class:`~stream3r_core.mapping.VoxelMap`."""

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.atlas import Atlas
from stream3r_core.mapping import MapChange, MapCloud

_SUBMAP_BITS = 32  # the number of a point: its submap above, its row below


class AtlasMap:
    """Points of all submaps where the last optimisation has put them.

    A point keeps its number while its submap is open, and moves with its submap. When a submap
    closes, is coarsened or folded, all of its points are sent anew.
    """

    def __init__(self, atlas: Atlas):
        self._atlas = atlas

    @property
    def num_points(self) -> int:
        """Points of all submaps."""
        return self._atlas.num_points

    @property
    def version(self) -> int:
        """Counts the changes of points and places."""
        return self._atlas.version

    @property
    def voxel_size(self) -> float | None:
        """Edge of a voxel of the oldest submap in units of the map; None until it is known."""
        return self._atlas.voxel_size or None

    def points(self) -> MapCloud:
        """Return a copy of all points."""
        return self._atlas.cloud()

    def view(self) -> MapCloud:
        """Return all points for reading in blocks; a copy, as they had to be moved."""
        return self.points()

    def changed_since(self, version: int) -> MapChange:
        """Return what changed after ``version``; see :meth:`VoxelMap.changed_since`.

        Numbers of points whose submap was moved come again, with their new places. The weight of a
        point in a closed submap is its confidence.
        """
        change = self._atlas.changed_since(version)
        ids, xyz, rgb, confidence, weight = [], [], [], [], []
        for key, rows in change.rows.items():
            ids.append((key << _SUBMAP_BITS) + rows.numbers)
            xyz.append(sim3.act(rows.S_map_submap, rows.cloud.points_xyz))
            rgb.append(rows.cloud.colors_rgb)
            confidence.append(rows.cloud.confidence)
            weight.append(rows.weight)
        gone = [(key << _SUBMAP_BITS) + numbers for key, numbers in change.gone.items()]
        removed = np.concatenate([np.zeros(0, np.int64), *gone])
        count = len(removed)
        return MapChange(
            change.version,
            change.is_complete,
            np.concatenate([*ids, removed]),
            np.concatenate([*xyz, np.full((count, 3), np.nan)]).astype(np.float32),
            np.concatenate([*rgb, np.zeros((count, 3), np.uint8)]),
            np.concatenate([*confidence, np.zeros(count)]).astype(np.float32),
            np.concatenate([*weight, np.zeros(count)]).astype(np.float32),
        )
