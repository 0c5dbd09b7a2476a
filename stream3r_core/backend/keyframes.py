"""Keyframes: what is remembered of a frame, and which frames are worth it."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from stream3r_core.backend import sim3
from stream3r_core.backend.config import KeyframeConfig
from stream3r_core.errors import InputError
from stream3r_core.geometry import unproject
from stream3r_core.types import FramePrediction


@dataclass(frozen=True)
class Keyframe:
    """One view of a submap: pose, a coarse depth grid, and what recognises the place."""

    frame_id: int  # the caller's number of the image; the same in two submaps: a shared frame
    stamp_ns: int | None
    T_submap_camera: np.ndarray  # [4, 4] float64, rigid, submap units
    K: np.ndarray  # [3, 3] float64, pixels of the grid
    depth: np.ndarray  # [h, w] float32, submap units; 0: none
    confidence: np.ndarray  # [h, w] float32, >= 1
    descriptor: np.ndarray | None = None  # [C] float32, unit length
    image_rgb: np.ndarray | None = None  # [H, W, 3] uint8, as the network saw it

    @property
    def median_depth(self) -> float:
        """Median of the valid depths, submap units; NaN if there is none."""
        valid = self.depth[self.depth > 0]
        return float(np.median(valid)) if valid.size else float('nan')

    def points(self) -> np.ndarray:
        """Points of the grid [h, w, 3] in the camera frame, submap units."""
        return grid_points(self.depth, self.K)

    def moved(self, S_into_submap: np.ndarray) -> 'Keyframe':
        """Return the keyframe in the frame and unit of another submap."""
        return replace(
            self,
            T_submap_camera=sim3.rigid_of(S_into_submap @ self.T_submap_camera),
            depth=self.depth * np.float32(sim3.scale_of(S_into_submap)),
        )


def grid_points(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Points [h, w, 3] in the camera frame of a depth grid [h, w]."""
    depth = np.asarray(depth, np.float64)
    return unproject(torch.from_numpy(depth), torch.from_numpy(np.asarray(K, np.float64))).numpy()


def sample_grid(
    depth: np.ndarray, confidence: np.ndarray, K: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every n-th pixel of depth and confidence [H, W], at most ``side`` on the longer side; its K.

    Depth that is not positive and finite, or has no finite confidence, becomes 0.
    """
    stride = -(-max(depth.shape) // side)
    first = stride // 2
    picked = (slice(first, None, stride),) * 2
    depth = np.array(depth[picked], np.float32)
    confidence = np.array(confidence[picked], np.float32)
    with np.errstate(invalid='ignore'):
        valid = np.isfinite(depth) & (depth > 0) & np.isfinite(confidence)
    depth[~valid], confidence[~valid] = 0, 1
    K = np.array(K, np.float64)
    K[:2, 2] -= first
    K[:2] /= stride
    return depth, confidence, K


def to_keyframe(
    prediction: FramePrediction,
    frame_id: int,
    config: KeyframeConfig,
    descriptor: np.ndarray | None = None,
) -> Keyframe:
    """Return what is remembered of a prediction, whose world is the submap.

    Raises:
        InputError: The pose is not finite.

    """
    T = np.asarray(prediction.T_world_camera.cpu(), np.float64)
    if not np.isfinite(T).all():
        raise InputError(
            f'frame {frame_id} has no finite pose; reset the session and start a new submap'
        )
    T = sim3.nearest_rigid(T)
    depth, confidence, K = sample_grid(
        prediction.depth.cpu().numpy(),
        prediction.depth_conf.cpu().numpy(),
        prediction.K.cpu().numpy(),
        config.grid_side,
    )
    image = prediction.rgb.cpu().numpy().copy() if config.keep_images else None
    if descriptor is not None:
        descriptor = np.array(descriptor, np.float32)
    return Keyframe(frame_id, prediction.stamp_ns, T, K, depth, confidence, descriptor, image)


class KeyframeSelector:
    """Decides frame by frame, against the last keyframe of the same submap."""

    def __init__(self, config: KeyframeConfig | None = None):
        self.config = config or KeyframeConfig()
        self._last: Keyframe | None = None

    def reset(self) -> None:
        """Start a new submap: its first good frame is a keyframe."""
        self._last = None

    def is_keyframe(self, frame: Keyframe) -> bool:
        """Whether ``frame`` shows something new and is sure enough; then it is the last one."""
        valid = frame.depth > 0
        if not valid.any() or np.median(frame.confidence[valid]) < self.config.min_confidence:
            return False
        if self._last is not None and not self._shows_something_new(frame):
            return False
        self._last = frame
        return True

    def _shows_something_new(self, frame: Keyframe) -> bool:
        T_last_frame = sim3.inverse(self._last.T_submap_camera) @ frame.T_submap_camera
        angle = np.linalg.norm(sim3.rotation_log(T_last_frame[:3, :3]))
        parallax = np.linalg.norm(T_last_frame[:3, 3]) / self._last.median_depth
        return (
            parallax >= self.config.min_parallax
            or np.rad2deg(angle) >= self.config.min_rotation_deg
            or covisible(frame, self._last, T_last_frame)[0].mean() < self.config.max_overlap
        )


def covisible(
    source: Keyframe, target: Keyframe, S_target_source: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which valid pixels of ``source`` lie within the image of ``target``.

    Returns, for the N valid pixels of ``source``: mask [N], depth in the target's camera [N], and
    the index [N] of the target's nearest pixel (0 outside).
    """
    valid = source.depth > 0
    points = sim3.act(S_target_source, source.points()[valid])
    z = points[:, 2]
    with np.errstate(divide='ignore', invalid='ignore'):
        uv = points[:, :2] * np.diag(target.K)[:2] / z[:, None] + target.K[:2, 2]
    height, width = target.depth.shape
    inside = (z > 0) & ((uv > -0.5) & (uv < (width - 0.5, height - 0.5))).all(1)
    column, row = np.rint(np.where(inside[:, None], uv, 0)).astype(int).T
    return inside, z, row * width + column
