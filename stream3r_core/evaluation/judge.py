"""From collected results to metrics in a report: trajectory, depth, map, speed."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.depth import UNITS, DepthAccumulator, DepthErrors
from stream3r_core.evaluation.frame_log import FrameLog
from stream3r_core.evaluation.reconstruction import ICP_VARIANTS, MapErrors, map_errors
from stream3r_core.evaluation.report import Report
from stream3r_core.evaluation.trajectory import (
    AUC_FRAMES,
    Trajectory,
    TrajectoryError,
    ate,
    drift,
    drift_segment_m,
    relative_pose_auc,
    rpe,
)
from stream3r_core.mapping import MapCloud

SCALE_ALIGNMENTS = ('median', 'scale')  # of depth: those by nothing but a scale
SCALES_APART = 1.5  # ratio that asks for a remark
ALIGNMENT_NAMES = {'se3': 'SE(3)', 'sim3': 'Sim(3)'}


def judge_trajectories(
    report: Report,
    truths: Sequence[Trajectory],
    estimate: Trajectory,
    config: EvaluationConfig,
) -> list[dict[str, TrajectoryError]]:
    """Add ATE, RPE, drift and AUC against each truth; return the ATEs by alignment, or empty.

    Drift is taken over segments of one length, that which suits the first truth.
    """
    segment_m = config.drift_segment_m
    judged = []
    for truth in truths or [None]:
        errors = _judge_trajectory(report, truth, estimate, config)
        judged.append(errors)
        if errors:
            segment_m = segment_m or drift_segment_m(next(iter(errors.values())).truth)
            _judge_drift(report, truth, estimate, segment_m, config)
    return judged


def _judge_trajectory(
    report: Report, truth: Trajectory | None, estimate: Trajectory, config: EvaluationConfig
) -> dict[str, TrajectoryError]:
    tolerance_ns = round(config.association_ms * 1e6)
    if truth is not None:
        report.remarks.append(f'true poses: {truth.name}')
    add = partial(report.add, 'trajectory', truth=truth.name if truth else '')
    errors: dict[str, TrajectoryError] = {}
    with report.skipping('trajectory'):
        if truth is None:
            raise DataError(
                'no true trajectory was found; give one (TUM, KITTI or EuRoC file, or a topic)'
            )
        for alignment, name in ALIGNMENT_NAMES.items():
            errors[alignment] = ate(truth, estimate, alignment, tolerance_ns)
            _add_ate(add, errors[alignment], name)
            for relation in ('translation', 'rotation'):
                error = rpe(truth, estimate, relation, alignment, tolerance_ns=tolerance_ns)
                add(f'RPE {relation} RMSE, 1 frame', error.rmse, error.unit, name)
        auc = relative_pose_auc(truth, estimate, max_frames=AUC_FRAMES, tolerance_ns=tolerance_ns)
        for threshold, value in auc.items():
            add(f'relative pose AUC@{threshold}', value, '')
        if len(errors['sim3'].truth) > AUC_FRAMES:
            report.remarks.append(f'relative pose AUC: {AUC_FRAMES} poses, evenly spread')
    return errors


def _judge_drift(
    report: Report,
    truth: Trajectory,
    estimate: Trajectory,
    segment_m: float,
    config: EvaluationConfig,
) -> None:
    tolerance_ns = round(config.association_ms * 1e6)
    add = partial(report.add, 'trajectory', truth=truth.name)
    with report.skipping('trajectory', 'drift'):
        for alignment, name in ALIGNMENT_NAMES.items():
            result = drift(truth, estimate, alignment, segment_m, tolerance_ns)
            over = f'over {result.segment_m:.3g} m'
            add(f'drift {over}', 100 * result.translation_m_per_m, '%', name)
            add(f'turn {over}', result.rotation_deg_per_m, 'deg/m', name)


def _add_ate(add: Callable[..., None], error: TrajectoryError, alignment: str) -> None:
    for name in ('rmse', 'mean', 'median', 'max'):
        label = f'ATE {name.upper() if name == "rmse" else name}'
        add(label, error.statistics[name], 'm', alignment)
    if error.alignment == 'sim3':
        add('recovered scale', error.scale, '', alignment)
        add('associated poses', len(error.truth), 'poses')
        add('true path length', error.truth.path_length_m, 'm')


def judge_depth(
    report: Report, pixels: DepthAccumulator | None, config: EvaluationConfig
) -> DepthErrors | None:
    """Add the depth errors of all alignments; return those of the first, None where skipped."""
    judged = []
    with report.skipping('depth'):
        if pixels is None:
            raise DataError('no true depth was found; give a folder of depth maps or a topic')
        for alignment in config.depth_alignments:
            errors = pixels.errors(alignment, config.clip_depth_m or None)
            judged.append(errors)
            _add_depth(report, errors)
        if pixels.stride > 1:
            report.remarks.append(f'depth: every {pixels.stride}th valid pixel was judged')
    return judged[0] if judged else None


def _add_depth(report: Report, errors: DepthErrors) -> None:
    names = {
        'abs_rel': 'AbsRel',
        'sq_rel_m': 'SqRel',
        'rmse_m': 'RMSE',
        'log_rmse': 'log RMSE',
        'delta_1': 'δ < 1.25',
        'delta_2': 'δ < 1.25²',
        'delta_3': 'δ < 1.25³',
        'scale': 'scale',
        'shift_m': 'shift',
        'valid_pixels': 'judged pixels',
        'coverage': 'coverage',
    }
    for field, name in names.items():
        unit = UNITS.get(field, '')
        report.add('depth', name, getattr(errors, field), unit, errors.alignment)


def compare_scales(
    report: Report, trajectory: TrajectoryError | None, depth: DepthErrors | None
) -> None:
    """Remark where trajectory and depth are not of one size: the map is placed by the first."""
    if trajectory is None or depth is None or depth.alignment not in SCALE_ALIGNMENTS:
        return
    ratio = trajectory.scale / depth.scale
    if max(ratio, 1 / ratio) > SCALES_APART:
        report.remarks.append(
            f'the trajectory fits the truth at {trajectory.scale:.3g} times its size, depth at '
            f'{depth.scale:.3g} times: placed by the trajectory, the map is {ratio:.2g} times as '
            'large as by its depth, and map metrics say so'
        )


def judge_map(
    report: Report,
    predicted: MapCloud,
    truth_xyz: np.ndarray | None,
    alignment: TrajectoryError | None,
    config: EvaluationConfig,
) -> MapErrors | None:
    """Add map metrics of the predicted map, brought to the truth by the trajectory's Sim(3)."""
    with report.skipping('map'):
        if alignment is None:
            raise DataError('the map cannot be placed in the true frame without a trajectory')
        if truth_xyz is None or not len(truth_xyz):
            raise DataError('no true map: it needs frames with true depth, pose and intrinsics')
        T = alignment.T_truth_estimate
        placed = predicted.points_xyz.astype(np.float64) @ T[:3, :3].T + T[:3, 3]
        result = map_errors(
            placed,
            truth_xyz.astype(np.float64),
            config.icp,
            config.icp_max_distance_m,
            config.f_score_threshold_m,
        )
        _add_map(partial(report.add, 'map', truth=alignment.truth.name), result)
        if result.icp.voxel_m:
            report.remarks.append(f'ICP ran on a voxel grid of {result.icp.voxel_m:.4g} m')
        return result
    return None


def _add_map(add: Callable[..., None], result: MapErrors) -> None:
    how = f'Sim(3) of the trajectory, {ICP_VARIANTS[result.icp.variant]}'
    for name, value in result.errors.summary.items():
        unit = 'm' if name.endswith('_m') else ''
        label = name.removesuffix('_m').replace('_', ' ')
        if name == 'f_score':
            label = f'F-score at {result.errors.threshold_m:g} m'
        add(label, value, unit, how)
    if result.icp.variant != 'none':
        add('ICP fitness', result.icp.fitness, '', how)
        add('ICP inlier RMSE', result.icp.inlier_rmse_m, 'm', how)
        add('ICP time', result.icp.duration_s, 's', how)


def judge_speed(report: Report, log: FrameLog, config: EvaluationConfig) -> None:
    """Add latency, rate and memory."""
    if not len(log):
        return
    skip = config.warm_up_frames if len(log) > 10 else 0
    latency = np.array(log.latency_ms[skip:])
    for percentile in (50, 95):
        report.add('speed', f'latency p{percentile}', np.percentile(latency, percentile), 'ms')
    report.add('speed', 'rate', 1000 / latency.mean(), 'frames/s')
    report.add('speed', 'cache, largest', max(log.cache_bytes) / 2**20, 'MiB')
    report.add('speed', 'map points', log.map_points[-1], 'points')
    for name, values in (('process', log.process_bytes), ('GPU', log.gpu_bytes)):
        known = [value for value in values if value is not None]
        if known:
            report.add('speed', f'{name} memory, largest', max(known) / 2**20, 'MiB')
