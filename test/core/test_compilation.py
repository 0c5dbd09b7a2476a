"""Compiled parts of the network: the same answers, and a clean way back."""

import copy
import functools
import logging

import pytest
import torch
from golden_data import golden_network

from stream3r_core import StreamSession
from stream3r_core.compilation import compile_network
from stream3r_core.config import WeightsConfig
from stream3r_core.pipeline import load_configured_model


def answers(model):
    torch.manual_seed(0)
    session = StreamSession(model, mode='window', window=2)
    return [session.step_tensor(torch.rand(3, 42, 56)) for _ in range(3)]


@pytest.mark.parametrize(
    'backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.heavy)]
)
def test_compiled_parts_answer_as_the_plain_ones(monkeypatch, backend):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    plain, compiled = (
        golden_network('stream3r'),
        compile_network(copy.deepcopy(golden_network('stream3r'))),
    )
    for expected, actual in zip(answers(plain), answers(compiled), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    blocks = compiled.aggregator.frame_blocks
    assert all(block.forward.compiled is not None for block in blocks)


def test_what_cannot_be_compiled_says_so_once_and_runs_as_it_was(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError('no compiler'), [])

    def compile_to_broken(forward, **options):
        return broken

    monkeypatch.setattr(torch, 'compile', compile_to_broken)
    model = compile_network(copy.deepcopy(golden_network('stream3r')))
    with caplog.at_level(logging.WARNING):
        for expected, actual in zip(answers(golden_network('stream3r')), answers(model)):
            torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    warnings = [r.getMessage() for r in caplog.records if 'uncompiled' in r.getMessage()]
    aggregator = model.aggregator
    blocks = (aggregator.frame_blocks, aggregator.global_blocks, aggregator.patch_embed.blocks)
    parts = 2 + sum(map(len, blocks))
    assert len(warnings) == parts and all('no compiler' in w for w in warnings)


def test_where_nothing_can_be_compiled_all_runs_as_it_was(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError('not for this Python')

    monkeypatch.setattr(torch, 'compile', refuse)
    model = compile_network(copy.deepcopy(golden_network('stream3r')))
    torch.testing.assert_close(answers(model), answers(golden_network('stream3r')), atol=0, rtol=0)
    assert 'not for this Python' in caplog.text


def test_the_choice_of_attention_is_not_compiled(monkeypatch):
    traced = []

    def record(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = functools.partial(torch.compile, backend=record)
    monkeypatch.setattr(torch, 'compile', compiled)
    answers(compile_network(copy.deepcopy(golden_network('stream3r'))))
    text = '\n'.join(graph.code for graph in traced)
    assert traced and 'linear' in text and 'scaled_dot_product' not in text


@pytest.mark.parametrize('wanted', [True, False])
def test_the_option_compiles_what_is_loaded(wanted):
    model = load_configured_model(WeightsConfig(weights='random', compile=wanted))
    assert hasattr(model.depth_head.forward, 'compiled') == wanted
