"""Depth of one camera as another camera beside it would see it."""

import numpy as np


def register_depth(
    depth_m: np.ndarray,
    K_depth: np.ndarray,
    T_camera_depth: np.ndarray,
    K_camera: np.ndarray,
    size_hw: tuple[int, int],
) -> np.ndarray:
    """Project a depth map [h, w] into another camera, float32 ``size_hw``, 0 = nothing seen.

    Every depth pixel falls into one pixel of the target; of several, the nearest surface stays.
    ``T_camera_depth`` [4, 4] takes points of the depth camera to the target camera. Pixels of the
    input that are 0, negative or not finite are left out.
    """
    v, u = np.nonzero(np.isfinite(depth_m) & (depth_m > 0))
    z = depth_m[v, u].astype(np.float64)
    rays = np.linalg.inv(K_depth) @ np.stack([u, v, np.ones_like(u)])
    points = T_camera_depth[:3, :3] @ (rays * z) + T_camera_depth[:3, 3:]
    points = points[:, points[2] > 0]
    pixels = K_camera @ points
    x, y = np.rint(pixels[:2] / pixels[2]).astype(np.int64)
    inside = (x >= 0) & (x < size_hw[1]) & (y >= 0) & (y < size_hw[0])
    registered = np.full(size_hw, np.inf, np.float32)
    depth = points[2, inside].astype(np.float32)
    np.minimum.at(registered, (y[inside], x[inside]), depth)
    registered[np.isinf(registered)] = 0
    return registered
