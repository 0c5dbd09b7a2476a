"""How a submap joins the one before it: scale from depth ratios, then a robust similarity.

The frames that both submaps have seen give pairs of depths of the same pixel: their ratios are
the scale, and the unprojected pixels are paired points. The closed form is that of Umeyama (1991)
with weights; the weights are those of Cauchy's kernel, reweighted to convergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.backend import sim3
from stream3r_core.backend.config import AlignmentConfig
from stream3r_core.backend.keyframes import Keyframe

_CAUCHY = 2.385  # of standard deviations: 95 % efficient on Gaussian errors
_MAD = 1.4826  # median absolute deviation to standard deviation
_MAX_WEIGHT = 20.0  # confidence of one pixel: a very sure frame cannot outvote all others
_MIN_SPREAD = 1e-6  # relative; exact data would have none


@dataclass(frozen=True)
class ScaleEstimate:
    """Robust scale between two depth maps of the same image."""

    scale: float  # units of the first per unit of the second
    sigma: float  # of the log scale of one pixel
    inlier_fraction: float  # of the pixels valid in both
    inliers: np.ndarray  # bool, of the pixels given


@dataclass(frozen=True)
class Alignment:
    """Where the new submap lies in the old one, and how far that can be trusted."""

    S_old_new: np.ndarray  # [4, 4]
    method: str  # 'points', 'poses' (degenerate points), 'constant velocity' (no overlap), 'none'
    degeneracies: tuple[str, ...]  # of 'no overlap', 'pure rotation', 'plane'
    inlier_fraction: float  # 0 without overlap
    rms_relative: float  # distance of paired inliers over depth; NaN without overlap

    @property
    def is_lost(self) -> bool:
        """Whether the place is only guessed."""
        return self.method in ('constant velocity', 'none')


def robust_scale(
    first: np.ndarray, second: np.ndarray, weight: np.ndarray, config: AlignmentConfig
) -> ScaleEstimate:
    """Scale of depths [N] > 0 by iteratively reweighted log ratios from their weighted median."""
    ratio = np.log(first) - np.log(second)
    mean = _weighted_median(ratio, weight)
    spread = config.depth_tolerance
    for _ in range(config.iterations):
        deviation = np.abs(ratio - mean)
        spread = np.clip(_MAD * np.median(deviation), _MIN_SPREAD, config.depth_tolerance)
        robust = weight / (1 + np.square(deviation / (_CAUCHY * spread)))
        mean = float((robust * ratio).sum() / robust.sum())
    inliers = np.abs(ratio - mean) < config.depth_tolerance
    return ScaleEstimate(float(np.exp(mean)), float(spread), float(inliers.mean()), inliers)


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(total, total[-1] / 2)]])


def similarity_fit(source: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted least-squares similarity [4, 4] from source [N, 3] to target [N, 3].

    Umeyama (1991), eq. 40 to 43, with means and covariance weighted by ``weight`` [N].
    """
    weight = weight / weight.sum()
    mean_source, mean_target = weight @ source, weight @ target
    x, y = source - mean_source, target - mean_target
    U, singular, Vh = np.linalg.svd((weight[:, None] * y).T @ x)
    sign = np.array([1, 1, np.sign(np.linalg.det(U @ Vh))])
    R = U * sign @ Vh
    scale = (singular * sign).sum() / (weight @ np.square(x).sum(1))
    return sim3.from_parts(scale, R, mean_target - scale * R @ mean_source)


def align_submaps(
    old: Sequence[Keyframe], new: Sequence[Keyframe], config: AlignmentConfig | None = None
) -> Alignment:
    """Find ``S_old_new`` from the last frames of the old and the first frames of the new submap.

    Frames with the same ``frame_id`` are shared. Without enough shared, agreeing pixels the old
    submap's motion is carried on at constant velocity, and so is its median depth.
    """
    config = config or AlignmentConfig()
    if not old:
        return Alignment(np.eye(4), 'none', ('no overlap',), 0.0, float('nan'))
    pairs = [
        (a, b)
        for a in old
        for b in new
        if a.frame_id == b.frame_id and a.depth.shape == b.depth.shape
    ]
    paired = [_paired_pixels(a, b, config) for a, b in pairs]
    if sum(len(depth_old) for depth_old, *_ in paired) < config.min_pixels:
        return _carry_on(old, new)
    depth_old, depth_new, weight, points_old, points_new = map(np.concatenate, zip(*paired))
    scale = robust_scale(depth_old, depth_new, weight, config)
    if scale.inlier_fraction < config.min_inliers or scale.inliers.sum() < config.min_pixels:
        return _carry_on(old, new)
    degeneracies = _degeneracies(old, points_old[scale.inliers], config)
    S = _from_poses(pairs, scale.scale)
    if 'plane' not in degeneracies:
        chosen = scale.inliers
        S = _refine(
            S, points_new[chosen], points_old[chosen], weight[chosen], depth_old[chosen], config
        )
    relative = _distance(S, points_new, points_old)[scale.inliers] / depth_old[scale.inliers]
    return Alignment(
        S,
        'poses' if 'plane' in degeneracies else 'points',
        degeneracies,
        scale.inlier_fraction,
        float(np.sqrt(np.mean(np.square(relative)))),
    )


def _paired_pixels(old: Keyframe, new: Keyframe, config: AlignmentConfig):
    """Depths [N], weights [N] and points [N, 3] in the submaps of the pixels valid in both."""
    mask = (old.depth > 0) & (new.depth > 0)
    mask &= np.minimum(old.confidence, new.confidence) >= config.min_confidence
    weight = np.sqrt(old.confidence[mask] * new.confidence[mask].astype(np.float64))
    points = [
        sim3.act(frame.T_submap_camera, frame.points()[mask].reshape(-1, 3))
        for frame in (old, new)
    ]
    depths = [frame.depth[mask].astype(np.float64) for frame in (old, new)]
    return (*depths, np.minimum(weight, _MAX_WEIGHT), *points)


def _from_poses(pairs: Sequence[tuple[Keyframe, Keyframe]], scale: float) -> np.ndarray:
    """Similarity that gives the shared frames one pose, in the mean over them."""
    S = np.array(
        [
            a.T_submap_camera
            @ sim3.from_parts(scale, np.eye(3), np.zeros(3))
            @ sim3.inverse(b.T_submap_camera)
            for a, b in pairs
        ]
    )
    R = Rotation.from_matrix(sim3.rotation_of(S)).mean().as_matrix()
    return sim3.from_parts(scale, R, S[:, :3, 3].mean(0))


def _distance(S: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.linalg.norm(sim3.act(S, source) - target, axis=1)


def _refine(
    S: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    depth: np.ndarray,
    config: AlignmentConfig,
) -> np.ndarray:
    """Reweighted closed form; errors count relative to depth, as depth errors grow with it."""
    weight = weight / np.square(depth)
    for _ in range(config.iterations):
        error = _distance(S, source, target) / depth
        spread = max(_MAD * np.median(error), _MIN_SPREAD)
        S = similarity_fit(source, target, weight / (1 + np.square(error / (_CAUCHY * spread))))
    return S


def _degeneracies(
    old: Sequence[Keyframe], points: np.ndarray, config: AlignmentConfig
) -> tuple[str, ...]:
    found = []
    positions = np.array([frame.T_submap_camera[:3, 3] for frame in old])
    path = np.linalg.norm(positions - positions[0], axis=1).max()
    if path < config.min_parallax * np.median([frame.median_depth for frame in old]):
        found.append('pure rotation')
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if spread[2] < config.min_relief * spread[0]:
        found.append('plane')
    return tuple(found)


def _carry_on(old: Sequence[Keyframe], new: Sequence[Keyframe]) -> Alignment:
    """Place the first new frame where constant velocity takes the last old ones."""
    last, first = old[-1], new[0]
    T_old_first = last.T_submap_camera
    if len(old) > 1 and first.frame_id != last.frame_id:
        before = old[-2]
        step = sim3.inverse(before.T_submap_camera) @ last.T_submap_camera
        T_old_first = T_old_first @ sim3.exp(_elapsed(before, last, first) * sim3.log(step))
    scale = last.median_depth / first.median_depth
    unit = sim3.from_parts(scale if np.isfinite(scale) else 1.0, np.eye(3), np.zeros(3))
    S = T_old_first @ unit @ sim3.inverse(first.T_submap_camera)
    return Alignment(S, 'constant velocity', ('no overlap',), 0.0, float('nan'))


def _elapsed(before: Keyframe, last: Keyframe, first: Keyframe) -> float:
    """Time from ``last`` to ``first`` in units of that from ``before`` to ``last``, at most 10."""
    stamps = [before.stamp_ns, last.stamp_ns, first.stamp_ns]
    if None in stamps:
        stamps = [before.frame_id, last.frame_id, first.frame_id]
    return min((stamps[2] - stamps[1]) / max(stamps[1] - stamps[0], 1), 10.0)
