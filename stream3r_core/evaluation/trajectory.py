"""Camera trajectories: association by time, ATE and RPE through evo, drift, relative-pose AUC."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.errors import DataError

ALIGNMENTS = ('none', 'origin', 'se3', 'sim3')
ASSOCIATION_TOLERANCE_NS = 10_000_000  # evo's default, 0.01 s
AUC_FRAMES = 500  # more are thinned: pairs are quadratic
NO_BASELINE = 1e-9  # translations shorter than rounding have no direction


@dataclass(frozen=True)
class Trajectory:
    """Poses over time.

    ``stamps_ns`` [N] int64 never decreases; None for files without stamps (KITTI), which are then
    associated by their order. ``T_world_camera`` [N, 4, 4] float64 is rigid, metres.
    """

    stamps_ns: np.ndarray | None
    T_world_camera: np.ndarray
    name: str = 'trajectory'

    def __post_init__(self):
        poses = np.asarray(self.T_world_camera, dtype=np.float64)
        object.__setattr__(self, 'T_world_camera', poses)
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
            raise DataError(f'{self.name}: expected poses [N>=1, 4, 4], got {poses.shape}')
        _check_rigid(poses, self.name)
        if self.stamps_ns is None:
            return
        stamps = np.asarray(self.stamps_ns)
        if stamps.shape != (len(poses),) or not np.issubdtype(stamps.dtype, np.integer):
            raise DataError(
                f'{self.name}: expected {len(poses)} integer nanosecond stamps, one per pose, got '
                f'{stamps.dtype} {stamps.shape}'
            )
        if (np.diff(stamps) < 0).any():
            index = int(np.argmax(np.diff(stamps) < 0)) + 1
            raise DataError(
                f'{self.name}: stamps go backwards at pose {index} ({stamps[index - 1]} -> '
                f'{stamps[index]} ns); sort the poses, or split the file where time restarts'
            )
        object.__setattr__(self, 'stamps_ns', stamps.astype(np.int64))

    def __len__(self):
        return len(self.T_world_camera)

    @property
    def positions_m(self) -> np.ndarray:
        """Camera centres [N, 3], metres, world frame."""
        return self.T_world_camera[:, :3, 3]

    @property
    def quat_xyzw(self) -> np.ndarray:
        """Unit quaternions [N, 4] of the camera-to-world rotations, w >= 0."""
        quat = Rotation.from_matrix(self.T_world_camera[:, :3, :3]).as_quat()
        return np.where(quat[:, 3:] < 0, -quat, quat)

    @cached_property
    def distance_m(self) -> np.ndarray:
        """Length of the path up to each pose [N], metres."""
        steps = np.linalg.norm(np.diff(self.positions_m, axis=0), axis=1)
        return np.concatenate([[0.0], np.cumsum(steps)])

    @property
    def path_length_m(self) -> float:
        """Length of the whole path, metres."""
        return float(self.distance_m[-1])

    def take(self, indices: np.ndarray) -> 'Trajectory':
        """Return the poses at ``indices``."""
        stamps = None if self.stamps_ns is None else self.stamps_ns[indices]
        return Trajectory(stamps, self.T_world_camera[indices], self.name)


def _check_rigid(poses: np.ndarray, name: str) -> None:
    if not np.isfinite(poses).all():
        bad = int(np.argmin(np.isfinite(poses).all(axis=(1, 2))))
        raise DataError(f'{name}: pose {bad} is not finite; remove it from the trajectory')
    R = poses[:, :3, :3]
    error = np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    wrong = (error > 1e-3) | (np.linalg.det(R) < 0)
    if wrong.any():
        raise DataError(
            f'{name}: the 3x3 part of pose {int(np.argmax(wrong))} is no rotation (deviation '
            f'{error[np.argmax(wrong)]:.3g}); write the poses with at least 5 digits, row-major'
        )


@dataclass(frozen=True)
class TrajectoryError:
    """Errors of an estimate against the truth after a stated alignment.

    ``alignment``: 'none', 'origin' (first poses made equal), 'se3', 'sim3' (Umeyama over all
    positions). ``scale`` multiplies the estimate's positions; 1 unless sim3. ``T_truth_estimate``
    [4, 4] = [scale * R | t]. ``errors`` [M] in ``unit``; ``statistics`` rmse, mean, median, std,
    min, max of them.
    """

    metric: str
    unit: str
    alignment: str
    scale: float
    T_truth_estimate: np.ndarray
    errors: np.ndarray
    error_indices: np.ndarray  # [M] pose that each error belongs to (RPE: the pair's later pose)
    truth: Trajectory  # associated
    estimate: Trajectory  # associated and aligned

    @cached_property
    def statistics(self) -> dict[str, float]:
        """Summaries of the errors, in ``unit``."""
        e = self.errors
        return {
            'rmse': float(np.sqrt(np.mean(e**2))),
            'mean': float(e.mean()),
            'median': float(np.median(e)),
            'std': float(e.std()),
            'min': float(e.min()),
            'max': float(e.max()),
        }

    @property
    def truth_xyz_in_estimate(self) -> np.ndarray:
        """True positions [M, 3] in the frame and unit that the estimate had before alignment."""
        T_estimate_truth = np.linalg.inv(self.T_truth_estimate)
        return self.truth.positions_m @ T_estimate_truth[:3, :3].T + T_estimate_truth[:3, 3]

    @property
    def rmse(self) -> float:
        """Root mean square of the errors, in ``unit``."""
        return self.statistics['rmse']


def associate(
    truth: Trajectory, estimate: Trajectory, tolerance_ns: int = ASSOCIATION_TOLERANCE_NS
) -> tuple[Trajectory, Trajectory]:
    """Pair poses by time; both results have equal length.

    Each pose of the shorter trajectory takes the nearest pose of the longer one if it lies within
    ``tolerance_ns`` (evo's rule, on exact integers). Without stamps the lengths must agree.
    """
    if truth.stamps_ns is None or estimate.stamps_ns is None:
        if len(truth) != len(estimate):
            raise DataError(
                f'{truth.name} has {len(truth)} poses, {estimate.name} {len(estimate)}, and not '
                'both have stamps: give stamps (TUM format), or trajectories of equal length'
            )
        return truth, estimate
    from evo.core.sync import matching_time_indices

    first, second = (truth, estimate) if len(truth) < len(estimate) else (estimate, truth)
    ids_first, ids_second = matching_time_indices(
        first.stamps_ns, second.stamps_ns, tolerance_ns, 0
    )
    if not ids_first:
        raise DataError(_no_overlap(truth, estimate, tolerance_ns))
    first, second = first.take(np.array(ids_first)), second.take(np.array(ids_second))
    return (first, second) if len(truth) < len(estimate) else (second, first)


def _no_overlap(truth: Trajectory, estimate: Trajectory, tolerance_ns: int) -> str:
    spans = ' and '.join(
        f'{t.name} {t.stamps_ns[0] * 1e-9:.3f}..{t.stamps_ns[-1] * 1e-9:.3f} s'
        for t in (truth, estimate)
    )
    return (
        f'no two poses lie within {tolerance_ns * 1e-6:g} ms of each other: {spans}. Check that '
        'both use the same clock and unit, or raise the association tolerance'
    )


def ate(
    truth: Trajectory,
    estimate: Trajectory,
    alignment: str = 'sim3',
    tolerance_ns: int = ASSOCIATION_TOLERANCE_NS,
) -> TrajectoryError:
    """Absolute trajectory error: distances of associated, aligned positions, through evo.

    Equal to ``evo_ape -r trans_part`` with ``-a`` (se3), ``-as`` (sim3), ``--align_origin``.
    Raises DataError for fewer than two associated poses or positions without a unique alignment.
    """
    from evo.core import metrics

    truth, estimate, scale, T = _aligned_pair(truth, estimate, alignment, tolerance_ns)
    metric = metrics.APE(metrics.PoseRelation.translation_part)
    metric.process_data((_to_evo(truth), _to_evo(estimate)))
    ids = np.arange(len(truth))
    return TrajectoryError('ATE', 'm', alignment, scale, T, metric.error, ids, truth, estimate)


def rpe(
    truth: Trajectory,
    estimate: Trajectory,
    relation: str = 'translation',
    alignment: str = 'sim3',
    delta: float = 1,
    delta_unit: str = 'frames',
    tolerance_ns: int = ASSOCIATION_TOLERANCE_NS,
) -> TrajectoryError:
    """Relative pose error over all pairs ``delta`` frames (or metres of true path) apart.

    ``relation``: 'translation' (m) or 'rotation' (deg). Equal to ``evo_rpe --all_pairs`` with
    ``--pairs_from_reference``; metre pairs may miss ``delta`` by a tenth.
    """
    from evo import EvoException
    from evo.core import metrics

    units = {'frames': metrics.Unit.frames, 'm': metrics.Unit.meters}
    relations = {
        'translation': (metrics.PoseRelation.translation_part, 'm'),
        'rotation': (metrics.PoseRelation.rotation_angle_deg, 'deg'),
    }
    truth, estimate, scale, T = _aligned_pair(truth, estimate, alignment, tolerance_ns)
    evo_relation, unit = relations[relation]
    metric = metrics.RPE(
        evo_relation, delta, units[delta_unit], all_pairs=True, pairs_from_reference=True
    )
    try:
        metric.process_data((_to_evo(truth), _to_evo(estimate)))
    except EvoException as error:
        raise DataError(
            f'{truth.name}: no two poses are {delta:g} {delta_unit} apart ({len(truth)} poses, '
            f'{truth.path_length_m:.3g} m); use a smaller or, for fast motion, larger delta'
        ) from error
    ids = np.array(metric.delta_ids)
    name = f'RPE {relation}, delta {delta:g} {delta_unit}'
    return TrajectoryError(name, unit, alignment, scale, T, metric.error, ids, truth, estimate)


@dataclass(frozen=True)
class Drift:
    """Mean error over true path segments, divided by their length."""

    alignment: str
    segment_m: float
    num_segments: int
    translation_m_per_m: float
    rotation_deg_per_m: float


def drift(
    truth: Trajectory,
    estimate: Trajectory,
    alignment: str = 'sim3',
    segment_m: float | None = None,
    tolerance_ns: int = ASSOCIATION_TOLERANCE_NS,
) -> Drift:
    """Drift per metre of travelled true path, over all segments of ``segment_m`` metres.

    The default segment is that of :func:`drift_segment_m`.
    """
    truth, estimate = associate(truth, estimate, tolerance_ns)
    if segment_m is None:
        segment_m = drift_segment_m(truth)
    translation, rotation = (
        rpe(truth, estimate, relation, alignment, segment_m, 'm', tolerance_ns)
        for relation in ('translation', 'rotation')
    )
    return Drift(
        alignment,
        segment_m,
        len(translation.errors),
        translation.statistics['mean'] / segment_m,
        rotation.statistics['mean'] / segment_m,
    )


def drift_segment_m(truth: Trajectory) -> float:
    """1 m, or ten median steps where the poses lie farther apart, but at most half of the path."""
    step_m = float(np.median(np.diff(truth.distance_m, prepend=0.0)))
    return min(max(1.0, 10 * step_m), truth.path_length_m / 2)


def relative_pose_auc(
    truth: Trajectory,
    estimate: Trajectory,
    thresholds_deg: Sequence[int] = (30, 15, 5, 3),
    max_frames: int = AUC_FRAMES,
    tolerance_ns: int = ASSOCIATION_TOLERANCE_NS,
) -> dict[int, float]:
    """Area under the accuracy curve of relative poses over all frame pairs (model.md 21.5).

    A pair's error is the larger of its rotation error and the angle between the translation
    directions (sign ignored), degrees. A pair without true baseline has a rotation error only,
    one without estimated baseline is 90 degrees off. Needs no alignment. More than
    ``max_frames`` frames are thinned evenly, pairs being quadratic.
    """
    truth, estimate = associate(truth, estimate, tolerance_ns)
    _need_two(truth, estimate)
    keep = np.unique(np.linspace(0, len(truth) - 1, min(len(truth), max_frames)).astype(int))
    errors = _pair_errors_deg(truth.T_world_camera[keep], estimate.T_world_camera[keep])
    return {
        threshold: float(
            np.cumsum(np.histogram(errors, bins=np.arange(threshold + 1))[0]).mean() / len(errors)
        )
        for threshold in thresholds_deg
    }


def _pair_errors_deg(T_truth: np.ndarray, T_estimate: np.ndarray) -> np.ndarray:
    """Max of rotation and direction error of every unordered pair [N * (N - 1) / 2]."""
    i, j = np.triu_indices(len(T_truth), 1)
    R_truth, t_truth = _relative_camera_poses(T_truth, i, j)
    R_est, t_est = _relative_camera_poses(T_estimate, i, j)
    rotation = (Rotation.from_matrix(R_truth).inv() * Rotation.from_matrix(R_est)).magnitude()
    length_truth, length_est = (np.linalg.norm(t, axis=1) for t in (t_truth, t_est))
    cosine = np.abs((t_truth * t_est).sum(axis=1)) / np.maximum(length_truth * length_est, 1e-18)
    direction = np.arccos(np.clip(cosine, 0, 1))
    direction[length_est < NO_BASELINE] = np.pi / 2
    direction[length_truth < NO_BASELINE] = 0.0
    return np.degrees(np.maximum(rotation, direction))


def _relative_camera_poses(T_world_camera, i, j) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation of E_i E_j^-1, E = world to camera."""
    T_camera_world = np.linalg.inv(T_world_camera)
    relative = T_camera_world[i] @ T_world_camera[j]  # [M, 4, 4]
    return relative[:, :3, :3], relative[:, :3, 3]


def _aligned_pair(truth, estimate, alignment, tolerance_ns):
    """Associate, then bring the estimate into the truth's frame as asked."""
    if alignment not in ALIGNMENTS:
        raise DataError(f'unknown alignment {alignment!r}; known: {", ".join(ALIGNMENTS)}')
    truth, estimate = associate(truth, estimate, tolerance_ns)
    _need_two(truth, estimate)
    scale, T = _alignment(truth, estimate, alignment)
    aligned = np.array(estimate.T_world_camera)
    aligned[:, :3, 3] *= scale
    rigid = T.copy()
    rigid[:3, :3] /= scale
    aligned = rigid @ aligned
    return truth, Trajectory(estimate.stamps_ns, aligned, estimate.name), scale, T


def _alignment(truth: Trajectory, estimate: Trajectory, alignment: str):
    if alignment == 'none':
        return 1.0, np.eye(4)
    if alignment == 'origin':
        return 1.0, truth.T_world_camera[0] @ np.linalg.inv(estimate.T_world_camera[0])
    from evo import EvoException
    from evo.core.geometry import umeyama_alignment

    try:
        R, t, scale = umeyama_alignment(
            estimate.positions_m.T, truth.positions_m.T, with_scale=alignment == 'sim3'
        )
    except EvoException as error:
        raise DataError(
            f'{alignment} alignment of {estimate.name} to {truth.name} is not unique: the '
            f'positions of one lie on a point or a straight line ({len(truth)} poses, true path '
            f'{truth.path_length_m:.3g} m, estimated {estimate.path_length_m:.3g}). Evaluate '
            "a longer or curved stretch, or use alignment 'origin' or 'none'"
        ) from error
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = scale * R, t
    return float(scale), T


def _need_two(truth: Trajectory, estimate: Trajectory) -> None:
    if len(truth) < 2:
        raise DataError(
            f'{len(truth)} pose of {estimate.name} meets {truth.name} in time; an error needs at '
            'least 2: evaluate a longer stretch, or raise the association tolerance'
        )


def _to_evo(trajectory: Trajectory):
    from evo.core.trajectory import PosePath3D

    return PosePath3D(poses_se3=list(trajectory.T_world_camera))
