"""Weights of 8 bits: how far answers move, how much memory is saved, and streams still agree."""

import copy

import pytest
import torch
from golden_data import golden_network, images

from stream3r_core import StreamSession
from stream3r_core.config import WeightsConfig
from stream3r_core.int8_weights import Int8Linear, parameter_bytes, with_int8_weights
from stream3r_core.pipeline import load_configured_model


def small_network(preset):
    return with_int8_weights(copy.deepcopy(golden_network(preset)))


def test_a_layer_is_off_by_half_a_step_of_each_weight_at_most():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    small = Int8Linear(linear)
    x = torch.randn(5, 64)
    step = linear.weight.detach().abs().amax(1) / 127
    bound = 0.501 * step * x.abs().sum(-1, keepdim=True)
    assert ((small(x) - linear(x)).abs() <= bound + 1e-5).all()
    narrow = Int8Linear(torch.nn.Linear(64, 32).bfloat16())
    assert narrow.weight.dtype == torch.bfloat16 and narrow(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('preset', ['stream3r', 'streamvggt'])
def test_answers_stay_close_to_those_of_full_weights(preset):
    frames = images('landscape_42x70')
    with torch.inference_mode():
        expected = golden_network(preset)(frames, 'causal')
        actual = small_network(preset)(frames, 'causal')
    depth = (actual['depth'] / expected['depth'] - 1).abs()
    pose = (actual['pose_enc'] - expected['pose_enc']).abs()
    assert 0 < depth.mean() < 0.01 and depth.quantile(0.99) < 0.05
    assert 0 < pose.max() < 0.04  # measured 0.026


def test_a_stream_equals_the_batch_pass():
    model = small_network('stream3r')
    frames = images('landscape_42x70')[0]
    with torch.inference_mode():
        batch = model(frames[None], 'causal')
    session = StreamSession(model, mode='causal')
    for i, frame in enumerate(frames):
        step = session.step_tensor(frame)
        torch.testing.assert_close(step['depth'], batch['depth'][0, i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step['pose_enc'], batch['pose_enc'][0, i], atol=1e-4, rtol=0)


def test_the_option_keeps_the_weights_of_transformers_in_8_bits():
    wide, small = (
        load_configured_model(WeightsConfig(weights='random', dtype='bfloat16', weight_dtype=d))
        for d in ('model', 'int8')
    )
    assert parameter_bytes(small) < 0.62 * parameter_bytes(wide)
    wide_layer, small_layer = (m.aggregator.global_blocks[0].mlp.fc1 for m in (wide, small))
    assert small_layer.codes.dtype == torch.int8 and small.dtype == torch.bfloat16
    assert 2 * small_layer.codes.nbytes == wide_layer.weight.nbytes
    assert isinstance(small.camera_head.pose_branch.fc2, torch.nn.Linear)
