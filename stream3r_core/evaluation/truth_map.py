"""The true map: true depth with true poses, voxel-hashed like the predicted map."""

import numpy as np
import torch

from stream3r_core.config import MappingConfig
from stream3r_core.evaluation.datasets.frames import Frame, resized_K
from stream3r_core.geometry import unproject_to_world
from stream3r_core.mapping import MapCloud, VoxelMap


class TruthMap:
    """Accumulates true points within a budget; frames without pose or intrinsics are left out."""

    def __init__(self, voxel_m: float, max_points: int):
        self._map = VoxelMap(MappingConfig(voxel_size=voxel_m, max_points=max_points))

    def add(self, frame: Frame, image_rgb: np.ndarray, depth_m: np.ndarray) -> None:
        """Add one frame; ``image_rgb`` [H, W, 3] uint8, ``depth_m`` [h, w], 0 = invalid."""
        if frame.T_world_camera is None or frame.K is None:
            return
        size_hw = depth_m.shape
        K = torch.from_numpy(resized_K(frame.K, image_rgb.shape[:2], size_hw))
        pose = torch.from_numpy(np.ascontiguousarray(frame.T_world_camera))
        points = unproject_to_world(torch.from_numpy(depth_m).double(), K, pose).numpy()
        rows, columns = (
            (np.arange(new) * old // new) for new, old in zip(size_hw, image_rgb.shape)
        )
        colors = image_rgb[rows][:, columns]
        valid = (depth_m > 0) & np.isfinite(depth_m)
        count = int(valid.sum())
        self._map.integrate_points(
            points[valid].astype(np.float32), colors[valid], np.ones(count, np.float32)
        )

    def cloud(self) -> MapCloud:
        """Return the true points in the true world frame, metres."""
        return self._map.points()
