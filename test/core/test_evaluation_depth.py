"""Depth metrics: golden values of all alignments, known answers, refusals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stream3r_core.config import ImageConfig, ModelConfig
from stream3r_core.errors import DataError
from stream3r_core.evaluation.depth import (
    ALIGNMENTS,
    DepthAccumulator,
    depth_at,
    depth_errors,
    resize_depth,
    weighted_mean,
)
from stream3r_core.image import prepare
from stream3r_core.types import FramePrediction

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'
NAMES = {
    'abs_rel': 'Abs Rel',
    'sq_rel_m': 'Sq Rel',
    'rmse_m': 'RMSE',
    'log_rmse': 'Log RMSE',
    'delta_1': 'δ < 1.25',
    'delta_2': 'δ < 1.25^2',
    'delta_3': 'δ < 1.25^3',
    'valid_pixels': 'valid_pixels',
}


def true_depth(shape=(3, 24, 32), seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 8 + 0.5


@pytest.mark.parametrize(
    'case, alignment, max_depth_m, clip_m',
    [
        ('median', 'median', None, None),
        ('median_max7_clip7', 'median', 7, 7),
        ('scale', 'scale', 8, None),
        ('lad2', 'lad2', 8, None),
        ('lstsq', 'lstsq', 8, None),
        ('metric', 'metric', 8, None),
    ],
)
def test_golden_values_of_every_alignment_are_reproduced(case, alignment, max_depth_m, clip_m):
    tensors = load_file(GOLDEN / 'depth_metrics.safetensors')
    expected = json.loads((GOLDEN / 'evaluation.json').read_text())['depth_metrics'][case]
    errors = depth_errors(tensors['pred'], tensors['gt'], alignment, max_depth_m, clip_m)
    for ours, theirs in NAMES.items():
        assert getattr(errors, ours) == pytest.approx(expected[theirs], rel=2e-6), ours


@pytest.mark.parametrize('alignment', ['median', 'scale', 'lstsq'])
def test_a_scaled_truth_has_no_error_after_alignment(alignment):
    truth = true_depth()
    errors = depth_errors(truth / 3.7, truth, alignment)
    assert errors.scale == pytest.approx(3.7, rel=1e-5)
    assert errors.abs_rel < 1e-5 and errors.rmse_m < 1e-4 and errors.delta_1 == 1


def test_least_squares_recovers_scale_and_shift():
    truth = true_depth()
    errors = depth_errors((truth - 0.4) / 2.5, truth, 'lstsq')
    assert errors.scale == pytest.approx(2.5, rel=1e-4)
    assert errors.shift_m == pytest.approx(0.4, abs=1e-4)


def test_without_alignment_a_ten_percent_error_is_ten_percent():
    truth = torch.full((4, 4), 2.0)
    errors = depth_errors(truth * 1.1, truth, 'metric')
    assert errors.abs_rel == pytest.approx(0.1, rel=1e-5)
    assert errors.sq_rel_m == pytest.approx(0.02, rel=1e-5)
    assert errors.rmse_m == pytest.approx(0.2, rel=1e-5)
    assert errors.log_rmse == pytest.approx(np.log(1.1), rel=1e-5)
    assert (errors.delta_1, errors.scale, errors.shift_m) == (1, 1, 0)


def test_absolute_deviations_forgive_outliers_that_least_squares_does_not():
    truth = true_depth()
    prediction = truth / 2
    prediction[0, :3] = 20.0
    assert depth_errors(prediction, truth, 'scale').scale == pytest.approx(2, rel=0.01)
    assert abs(depth_errors(prediction, truth, 'lstsq').scale - 2) > 1


def test_one_alignment_serves_the_whole_sequence():
    truth = true_depth()
    prediction = truth.clone()
    prediction[1] *= 2
    whole = depth_errors(prediction, truth, 'median')
    single = [depth_errors(p, g, 'median') for p, g in zip(prediction, truth)]
    assert whole.abs_rel > 0.1
    assert max(e.abs_rel for e in single) < 1e-6


def test_true_depth_that_is_zero_nan_or_too_far_is_not_judged():
    truth = true_depth((10, 10)).clamp(max=6.9)
    prediction = truth.clone()
    for value, row in ((0.0, 0), (-1.0, 1), (float('nan'), 2), (float('inf'), 3), (7.5, 4)):
        truth[row] = value
    errors = depth_errors(prediction, truth, 'metric', max_depth_m=7)
    assert errors.valid_pixels == 50 and errors.abs_rel == 0 and errors.coverage == 1


def test_pixels_without_prediction_lower_the_coverage_and_nothing_else():
    truth = true_depth((10, 10))
    prediction = truth.clone()
    prediction[:3] = float('nan')
    errors = depth_errors(prediction, truth, 'median')
    assert errors.coverage == pytest.approx(0.7)
    assert errors.valid_pixels == 70 and errors.abs_rel < 1e-6


def test_a_negative_depth_is_no_inlier():
    truth = torch.full((4, 4), 2.0)
    prediction = truth.clone()
    prediction[0] = -1.0
    assert depth_errors(prediction, truth, 'metric').delta_3 == 0.75


def test_the_aligned_prediction_is_clamped_when_asked():
    truth = torch.full((4, 4), 2.0)
    truth[0] = 6.0
    prediction = truth.clone()
    prediction[0] = 60.0
    assert depth_errors(prediction, truth, 'metric', post_clip_max_m=6.0).abs_rel == 0


def test_the_average_is_weighted_by_valid_pixels():
    errors = depth_errors(true_depth() * 1.1, true_depth(), 'metric')
    heavy = dataclasses.replace(errors, abs_rel=0.2, valid_pixels=300, coverage=1.0)
    light = dataclasses.replace(errors, abs_rel=0.6, valid_pixels=100, coverage=0.6)
    mean = weighted_mean([heavy, light])
    assert mean.abs_rel == pytest.approx(0.3)
    assert mean.coverage == pytest.approx(0.9)
    assert mean.valid_pixels == 400 and mean.alignment == 'metric'


def test_averages_of_nothing_or_of_mixed_alignments_are_refused():
    truth = true_depth()
    with pytest.raises(DataError, match='every item failed'):
        weighted_mean([])
    with pytest.raises(DataError, match='different alignments'):
        weighted_mean([depth_errors(truth, truth, a) for a in ('median', 'metric')])


def test_predictions_are_resized_bicubically_to_the_truth():
    rows = np.linspace(1, 5, 40, dtype=np.float32)
    small = np.repeat(rows[:, None], 60, axis=1)
    large = resize_depth(small, (80, 120))
    assert large.shape == (80, 120)
    np.testing.assert_allclose(
        large[8:-8, 60], np.interp(np.arange(8, 72) / 2 - 0.25, np.arange(40), rows), atol=6e-3
    )
    assert resize_depth(small, small.shape) is small


@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_a_truth_without_valid_pixels_is_refused_with_advice(alignment):
    with pytest.raises(DataError, match='unit'):
        depth_errors(true_depth(), torch.zeros(3, 24, 32), alignment)
    with pytest.raises(DataError, match=r'below 0\.1 m'):
        depth_errors(true_depth(), true_depth(), alignment, max_depth_m=0.1)
    with pytest.raises(DataError, match='finite prediction'):
        depth_errors(true_depth() * float('nan'), true_depth(), alignment)


@pytest.mark.parametrize('alignment', [a for a in ALIGNMENTS if a != 'metric'])
def test_a_prediction_without_positive_depth_is_refused(alignment):
    with pytest.raises(DataError, match='positive'):
        depth_errors(torch.zeros(4, 4), true_depth((4, 4)), alignment)


def test_a_constant_prediction_is_fitted_by_its_shift():
    errors = depth_errors(torch.ones(3, 24, 32), true_depth(), 'lstsq')
    assert errors.shift_m == pytest.approx(true_depth().mean().item(), rel=1e-5)


def test_maps_of_different_size_and_unknown_alignments_are_refused():
    with pytest.raises(DataError, match='resize_depth'):
        depth_errors(torch.ones(4, 4), torch.ones(4, 5))
    with pytest.raises(DataError, match='median, scale, lad2, lstsq, metric'):
        depth_errors(torch.ones(4, 4), torch.ones(4, 4), 'affine')


def test_frames_added_one_by_one_are_judged_as_one_sequence():
    truth = true_depth()
    truth[0, :5] = 0
    prediction = true_depth(seed=1)
    prediction[2, :3] = float('nan')
    accumulator = DepthAccumulator(max_depth_m=8)
    for p, g in zip(prediction, truth):
        accumulator.add(p, g)
    assert accumulator.errors('scale') == depth_errors(prediction, truth, 'scale', 8)


def test_the_pixels_kept_stay_within_their_budget_and_judge_alike():
    accumulator = DepthAccumulator(max_pixels=5000)
    for seed in range(100):
        truth = true_depth((24, 32), seed)
        accumulator.add(truth * 1.1, truth)
        assert accumulator._num_kept <= 5000
    errors = accumulator.errors('metric')
    assert accumulator.stride == 16
    assert errors.valid_pixels == 100 * 24 * 32 and errors.coverage == 1
    assert errors.abs_rel == pytest.approx(0.1, rel=1e-5)


def test_errors_per_frame_follow_the_common_alignment():
    truth = true_depth()
    accumulator = DepthAccumulator()
    for factor, g in zip((1.0, 1.2, 0.5), truth):
        accumulator.add(g * factor, g)
    accumulator.add(truth[0], truth[0] * 0)
    per_frame = accumulator.abs_rel_per_frame(1.0, 0.0)
    np.testing.assert_allclose(per_frame, [0, 0.2, 0.5, np.nan], atol=1e-6)


def test_an_accumulator_that_saw_nothing_valid_refuses():
    accumulator = DepthAccumulator()
    with pytest.raises(DataError, match='unit'):
        accumulator.errors('median')


def prediction_of(image_hw, long_side, fit):
    """A prediction of a depth that grows with the camera's row, for an image of this size."""
    model = ModelConfig(patch_size=14)
    config = ImageConfig(long_side=long_side, fit=fit)
    _, geometry = prepare(np.zeros((*image_hw, 3), np.uint8), config, model)
    rows = (torch.arange(geometry.network_size_hw[0]) + 0.5 - geometry.offset_xy[1]) / (
        geometry.scale_xy[1]
    )
    depth = rows[:, None].expand(geometry.network_size_hw)
    return FramePrediction(
        *(0, None, torch.eye(4), torch.eye(3), torch.zeros(*depth.shape, 3).byte()),
        *(depth, torch.ones_like(depth), None, None, geometry),
    )


def test_depth_of_a_whole_image_is_brought_to_the_truth_without_a_shift():
    at_truth = depth_at(prediction_of((96, 128), 126, 'crop'), (48, 64))
    assert at_truth.shape == (48, 64)
    np.testing.assert_allclose(at_truth[4:-4, 30], 2 * np.arange(4, 44) + 1, atol=0.2)


def test_depth_of_a_cropped_image_is_unknown_outside_the_crop():
    at_truth = depth_at(prediction_of((200, 100), 70, 'crop'), (100, 50))
    known = np.isfinite(at_truth[:, 25])
    assert known[30:70].all() and not known[:20].any() and not known[-20:].any()
    rows = np.flatnonzero(known)
    np.testing.assert_allclose(at_truth[rows, 25], 2 * rows + 1, atol=1.5)
