"""Sigmas: the fit finds what made the noise, and what is not known stays unknown."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from stream3r_core.checkpoints import SHIPPED, load_model
from stream3r_core.errors import CheckpointError
from stream3r_core.evaluation.calibration import (
    LENGTHS,
    Errors,
    calibrate,
    coverage,
    fit_error_model,
    fit_uncertainty,
    room_errors,
)
from stream3r_core.geometry import invert_se3
from stream3r_core.image import ImageGeometry
from stream3r_core.synthetic import SyntheticSequence
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import (
    ErrorModel,
    Uncertainty,
    read_uncertainty,
    uncertainty_name,
    uncertainty_path,
    write_uncertainty,
)

TRUE = ErrorModel(scale=0.05, exponent=0.7, growth=0.5, max_frames=30.0)


def noise(model, axes=3, count=40_000, seed=0):
    """Errors that are as a model says, at random confidences and frames."""
    rng = np.random.default_rng(seed)
    confidence = 1 + rng.exponential(1.5, count)
    frames = rng.integers(0, 120, count)
    sigma = model.sigma(confidence, frames)[:, None]
    return Errors(sigma * rng.standard_normal((count, axes)), confidence, frames)


def test_the_fit_finds_the_model_that_made_the_noise():
    found = fit_error_model(noise(TRUE))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(TRUE), rel=0.03)


@pytest.mark.parametrize('axes', [1, 3])
def test_errors_of_the_model_lie_within_its_sigmas_as_often_as_normal_ones(axes):
    shares = coverage(noise(TRUE, axes), TRUE)
    assert shares[:4] == pytest.approx((0.6827, 0.9545, 0.6827, 0.9545), abs=0.01)
    bold = dataclasses.replace(TRUE, scale=TRUE.scale / 2)
    assert coverage(noise(TRUE, axes), bold).axis_1_sigma == pytest.approx(0.383, abs=0.01)


def test_more_confidence_and_less_time_never_mean_more_error():
    """Also where the data say so: noise that grows with the confidence is fitted by a constant."""
    odd = noise(ErrorModel(0.05, -0.7, -0.5, 30.0))
    found = fit_error_model(odd)
    assert found.exponent == found.growth == 0.0


def predictions_of(sequence, scale, errors):
    """Exact predictions in units of ``scale`` metres, each pose off by a twist [6], local axes."""
    T = invert_se3(sequence.T_world_camera[:1]) @ sequence.T_world_camera
    for index, (pose, depth_m, error) in enumerate(zip(T, sequence.depth_m, errors)):
        off = torch.eye(4)
        off[:3, :3] = torch.tensor(Rotation.from_rotvec(error[3:]).as_matrix())
        off[:3, 3] = torch.tensor(error[:3])
        pose = pose.clone()
        pose[:3, 3] /= scale
        yield FramePrediction(
            index=index,
            stamp_ns=sequence.stamps_ns[index],
            T_world_camera=pose @ off,
            K=sequence.K,
            rgb=sequence.images[index],
            depth=depth_m / scale,
            depth_conf=torch.full_like(depth_m, 2.0 + index % 3),
            world_points=None,
            world_points_conf=None,
            geometry=ImageGeometry((6, 8), (6, 8), (1.0, 1.0), (0, 0)),
        )


def walk(frames=60):
    rng = np.random.default_rng(0)
    T = torch.eye(4).repeat(frames, 1, 1)
    T[:, :3, 3] = torch.tensor(rng.standard_normal((frames, 3)).cumsum(0)).float()
    depth_m = torch.tensor(rng.uniform(1, 3, (frames, 6, 8))).float()
    images = torch.zeros(frames, 6, 8, 3, dtype=torch.uint8)
    stamps_ns = tuple(range(1, frames + 1))
    return SyntheticSequence(images, depth_m, T, torch.eye(3), stamps_ns)


def test_errors_are_measured_in_parts_of_the_depth_whatever_the_unit():
    """Poses that are off by a known noise give exactly that noise, for any scale."""
    sequence, scale = walk(), 2.5
    errors = 0.01 * np.random.default_rng(1).standard_normal((60, 6))
    made = room_errors(sequence, list(predictions_of(sequence, scale, errors)))
    unit = np.array([d.median() for d in sequence.depth_m / scale])[1:, None]
    np.testing.assert_allclose(made['translation'].errors, errors[1:, :3] / unit, atol=2e-5)
    np.testing.assert_allclose(made['rotation'].errors, errors[1:, 3:], atol=1e-3)
    difference = np.diff(errors[:, 3:], axis=0)
    np.testing.assert_allclose(made['step_rotation'].errors, difference, atol=1e-3)
    np.testing.assert_allclose(made['depth'].errors, 0.0, atol=1e-5)
    np.testing.assert_array_equal(made['rotation'].confidence, [2 + i % 3 for i in range(1, 60)])
    nothing = {'covered': np.linspace(1, 1.1, 101), 'noise': np.full(5, 1.2)}
    fitted = fit_uncertainty(made, nothing)
    assert fitted.translation.scale > 0
    assert (fitted.covered_confidence, fitted.noise_confidence) == pytest.approx((1.099, 1.2))


def test_a_written_fit_is_read_back_for_its_weights_and_no_others(tmp_path, caplog):
    path = uncertainty_path(tmp_path / 'net.safetensors')
    fitted = {'window': Uncertainty(TRUE, TRUE, TRUE, TRUE, TRUE, 1.05, 1.2)}
    assert read_uncertainty(path, 'abc') == {}
    write_uncertainty(path, 'abc', fitted, {'rooms': 3})
    assert read_uncertainty(path, 'abc') == fitted
    assert not caplog.records
    assert read_uncertainty(path, 'other') == {}
    assert 'is for other weights' in caplog.text


@pytest.mark.parametrize(
    'text', ['', '[]', '{}', '{"weights_sha256": "a", "modes": {"full": {}}}']
)
def test_a_damaged_fit_is_said(tmp_path, text):
    path = tmp_path / 'net.uncertainty.json'
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r'net\.uncertainty\.json: cannot be read'):
        read_uncertainty(path, 'a')


def test_the_shipped_weights_come_with_a_fit_that_was_checked():
    modes = ('window', 'causal', 'stac')
    wanted = {uncertainty_name(mode, refined) for mode in modes for refined in (False, True)}
    assert load_model('tiny').uncertainties.keys() >= wanted
    checked = json.loads(uncertainty_path(SHIPPED / 'tiny.safetensors').read_text())['held_out']
    for mode, quantities in checked.items():
        for name, shares in quantities.items():
            assert 0.5 < shares['axis_1_sigma'] < 0.97, (mode, name)
            assert 0.85 < shares['axis_2_sigma'] < 1, (mode, name)


def test_untrained_weights_have_no_known_uncertainty():
    assert load_model('tiny', weights='random').uncertainties == {}


def test_the_command_writes_a_fit_beside_the_weights(tmp_path, capsys):
    weights = tmp_path / 'tiny.safetensors'
    weights.symlink_to(SHIPPED / 'tiny.safetensors')
    path = calibrate(weights, ['window'], rooms=1)
    found = load_model('tiny', weights).uncertainties
    assert found.keys() == {'window', 'window+direct'} and found['window'].depth.scale > 0
    assert found['window'].rotation != found['window+direct'].rotation
    assert found['window'].depth == found['window+direct'].depth
    assert (
        json.loads(path.read_text())['held_out']['window']['rotation']['samples'] == LENGTHS[0] - 1
    )
    assert '| rotation |' in capsys.readouterr().out
