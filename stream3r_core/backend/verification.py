"""Does a pair of keyframes really show one place, and how do their submaps lie to each other?

The network looks at both images together. What it says must be sure of itself, let each camera
see much of what the other sees, at the same depths; and the depths of either image must have one
scale towards those in its submap. Only then the pair relates the submaps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import ScaleEstimate, robust_scale
from stream3r_core.backend.config import AlignmentConfig, DriftConfig, LoopConfig
from stream3r_core.backend.keyframes import Keyframe, covisible, sample_grid
from stream3r_core.errors import InputError


@dataclass(frozen=True)
class PairView:
    """One image of a pair as the network sees it; lengths in the pair's own unit."""

    T_pair_camera: np.ndarray  # [4, 4] camera to the pair's frame
    K: np.ndarray  # [3, 3] pixels of the maps
    depth: np.ndarray  # [H, W]
    confidence: np.ndarray  # [H, W], >= 1


# Runs a small batch of pairs through the network.
PairPredictor = Callable[
    [Sequence[tuple[Keyframe, Keyframe]]], Sequence[tuple[PairView, PairView]]
]


@dataclass(frozen=True)
class Verdict:
    """What was found for one pair; ``S_i_j`` and covariance are None where it is refused."""

    reason: str  # '' for a true revisit
    S_i_j: np.ndarray | None = None  # [4, 4] submap of the second keyframe in that of the first
    covariance: np.ndarray | None = None  # [7, 7] tangent at the origin of submap j
    confidence: float = 0.0  # median of the pair, >= 1
    covisible: float = 0.0  # smaller share of either image that the other sees
    consistent: float = 0.0  # share of the covisible pixels whose depths agree


def verify_pair(
    first: Keyframe,
    second: Keyframe,
    views: tuple[PairView, PairView],
    loops: LoopConfig,
    alignment: AlignmentConfig,
) -> Verdict:
    """Judge one pair; the first keyframe is of submap i, the second of submap j."""
    seen = [_on_grid(view, keyframe) for view, keyframe in zip(views, (first, second))]
    confidence = min(float(np.median(view.confidence)) for view in seen)
    if confidence < loops.min_confidence:
        return Verdict('low confidence', confidence=confidence)
    shares, agreements = zip(
        _overlap(seen[0], seen[1], loops.depth_tolerance),
        _overlap(seen[1], seen[0], loops.depth_tolerance),
    )
    measured = {
        'confidence': confidence,
        'covisible': min(shares),
        'consistent': min(agreements),
    }
    if min(shares) < loops.min_covisible:
        return Verdict('little covisible area', **measured)
    if min(agreements) < loops.min_consistent:
        return Verdict('depths disagree', **measured)
    scales = [_scale(keyframe, view, alignment) for keyframe, view in zip((first, second), seen)]
    if any(s is None or s.inlier_fraction < alignment.min_inliers for s in scales):
        return Verdict('no common scale with the submap', **measured)
    S_first_second = sim3.inverse(seen[0].T_submap_camera) @ seen[1].T_submap_camera
    units = [sim3.from_parts(s.scale, np.eye(3), np.zeros(3)) for s in scales]
    S_camera_camera = units[0] @ S_first_second @ sim3.inverse(units[1])
    T_i_first, T_j_second = first.T_submap_camera, second.T_submap_camera
    S_i_j = T_i_first @ S_camera_camera @ sim3.inverse(T_j_second)
    sigmas = [np.deg2rad(loops.rotation_deg)] * 3
    sigmas += [loops.translation * second.median_depth] * 3 + [loops.scale]
    to_j = sim3.adjoint(T_j_second)
    covariance = to_j @ np.diag(np.square(sigmas)) @ to_j.T
    return Verdict('', S_i_j, covariance, **measured)


def _on_grid(view: PairView, keyframe: Keyframe) -> Keyframe:
    """The view on the pixels that the keyframe keeps, in the pair's frame."""
    depth, confidence, K = sample_grid(
        np.asarray(view.depth), np.asarray(view.confidence), view.K, max(keyframe.depth.shape)
    )
    if depth.shape != keyframe.depth.shape:
        raise InputError(
            f'the pair was predicted at a size whose grid is {list(depth.shape)}, but keyframe '
            f'{keyframe.frame_id} has {list(keyframe.depth.shape)}; predict from its own image'
        )
    T = np.asarray(view.T_pair_camera, np.float64)
    return Keyframe(keyframe.frame_id, keyframe.stamp_ns, T, K, depth, confidence)


def _overlap(source: Keyframe, target: Keyframe, tolerance: float) -> tuple[float, float]:
    """Share of the source's pixels seen by the target, and share of these at the same depth."""
    T_target_source = sim3.inverse(target.T_submap_camera) @ source.T_submap_camera
    inside, z, pixel = covisible(source, target, T_target_source)
    if not inside.any():
        return 0.0, 0.0
    depth = target.depth.ravel()[pixel[inside]]
    agrees = np.abs(z[inside] - depth) <= tolerance * depth
    return float(inside.mean()), float(agrees.mean())


def _scale(keyframe: Keyframe, view: Keyframe, alignment: AlignmentConfig) -> ScaleEstimate | None:
    """Submap units per unit of the pair."""
    mask = (keyframe.depth > 0) & (view.depth > 0)
    if mask.sum() < alignment.min_pixels:
        return None
    weight = np.sqrt(keyframe.confidence[mask] * view.confidence[mask].astype(np.float64))
    return robust_scale(
        keyframe.depth[mask].astype(float), view.depth[mask].astype(float), weight, alignment
    )


def drift_covariance(
    T_submap_camera: np.ndarray, fraction: float, path: float, drift: DriftConfig
) -> np.ndarray:
    """Covariance [7, 7] of what gathers over ``fraction`` of a submap, at the last of its poses.

    The error grows evenly along the poses [n, 4, 4], from the origin of the submap on, so that
    one of rotation or scale also moves the end: translation is correlated with both.

    Args:
        T_submap_camera: Poses of the way, submap units; none: the end is the origin.
        fraction: Of the way that the options speak of.
        path: Length of the way, submap units.
        drift: Errors over a whole submap.

    """
    sigmas = [np.deg2rad(drift.rotation_deg) * fraction] * 3
    sigmas += [drift.translation * path] * 3 + [drift.scale * fraction]
    way = np.concatenate([np.eye(4)[None], T_submap_camera])
    J = sim3.adjoint(sim3.inverse(way[-1]) @ way).mean(0)
    return J @ np.diag(np.square(sigmas)) @ J.T


def moved_covariance(covariance: np.ndarray, S_f_j: np.ndarray) -> np.ndarray:
    """Covariance [7, 7] of a tangent at f as one at j, with ``S_f_j`` [4, 4]."""
    A = sim3.adjoint(sim3.inverse(S_f_j))
    return A @ covariance @ A.T
