"""The benchmark counts what happens: stages that add up, the rows that were asked for, FLOPs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from stream3r_core import StreamSession, load_model
from stream3r_core.benchmark.arithmetic import count_operations
from stream3r_core.benchmark.chunks import measure_chunks
from stream3r_core.benchmark.measure import Plan, camera_images, measure_mode
from stream3r_core.benchmark.stages import FRAME, STAGES, StageClock, watched
from stream3r_core.config import PRESETS, CoreConfig, SessionConfig
from stream3r_core.errors import ConfigError
from stream3r_core.kernels import native
from stream3r_core.pipeline import Reconstructor

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(height=32, width=40, frames=(1, 3), repeats=2, warmup=1)


def naive_module():
    spec = importlib.util.spec_from_file_location('naive', ROOT / 'benchmarks' / 'naive.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def model():
    return load_model('tiny')


def images(count, height=48, width=64):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('window', [None, 2])
def test_the_naive_path_gives_the_answers_of_the_fast_one(model, window):
    naive = naive_module().NaiveSession(model, window)
    mode = {'mode': 'causal'} if window is None else {'mode': 'window', 'window': window}
    fast = StreamSession(model, **mode)
    for image in images(6):
        assert_same(naive.step_tensor(image), fast.step_tensor(image), 1e-5)


@pytest.mark.parametrize(('kv_dtype', 'tolerance'), [('model', 1e-4), ('int8', 2e-2)])
def test_the_naive_path_gives_the_answers_of_the_fast_one_over_a_long_cache(
    model, monkeypatch, kv_dtype, tolerance
):
    """With so many keys the compiled kernel attends, on all processors that it serves."""
    num_keys, attention = [], native.attention

    def counting(q, k, *others):
        num_keys.append(getattr(k, 'codes', k).shape[2])
        return attention(q, k, *others)

    monkeypatch.setattr(native, 'attention', counting)
    naive = naive_module().NaiveSession(model)
    fast = StreamSession(model, mode='causal', kv_dtype=kv_dtype)
    for image in images(16, 88, 112):
        expected, found = naive.step_tensor(image), fast.step_tensor(image)
    assert_same(found, expected, tolerance)
    if native.unavailable() is None:
        assert max(num_keys) == 16 * model.config.tokens_per_frame(88, 112) > 2048


def test_nested_stages_share_out_every_moment_once():
    ticks = iter(range(100))
    clock = StageClock(lambda: next(ticks))
    with clock.stage('outer'):  # 0
        with clock.stage('inner'):  # 1 to 2
            pass
        with pytest.raises(ValueError, match='kept'), clock.stage('failing'):  # 3 to 4
            raise ValueError('kept')
    assert clock.take() == {'outer': 3, 'inner': 1, 'failing': 1}  # until 5
    assert clock.take() == {}


def test_a_watched_frame_goes_through_every_stage_and_is_itself_again_afterwards(model):
    ticks = iter(range(1_000_000))
    clock = StageClock(lambda: next(ticks))
    config = CoreConfig(session=SessionConfig(mode='stac'))
    watching, plain = Reconstructor(model, config), Reconstructor(model, config)
    picture = (images(1)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    with watched(watching, clock):
        start = next(ticks)
        with clock.stage(FRAME):
            seen = watching.process(picture)
        took = next(ticks) - start
    seconds = clock.take()
    assert set(seconds) == set(STAGES) - {'publish'}
    assert sum(seconds.values()) == took - 2  # the clock itself was asked in between
    assert torch.equal(seen.depth, plain.process(picture).depth)
    next_ones = watching.process(picture[:, ::-1].copy()), plain.process(picture[:, ::-1].copy())
    assert torch.equal(*(prediction.depth for prediction in next_ones))
    assert clock.take() == {}


@pytest.mark.parametrize('mode', ['causal', 'window', 'stac'])
def test_a_measurement_has_the_rows_that_were_asked_for(model, mode):
    published = []
    result = measure_mode(
        model, CoreConfig(session=SessionConfig(mode=mode)), PLAN, published.append
    )
    rows, tokens = result['frames']['rows'], model.config.tokens_per_frame(32, 40)
    assert [row['frame'] for row in rows] == [1, 3]
    assert rows[0]['cached_tokens'] == 0
    if mode != 'stac':
        assert rows[1]['cached_tokens'] == 2 * tokens
    for row in rows:
        assert row['num_samples'] == 2 and 0 < row['p50_s'] <= row['p95_s']
        assert row['processor_p50_s'] > 0 and row['peak_bytes'] > row['cache_bytes']
    assert result['frames']['all_frames']['num_samples'] == 6
    assert len(published) == PLAN.warmup + 2 * 3
    assert published[0].world_points is not None
    for row in result['stages']:
        assert set(STAGES) == set(row['stages'])
        assert sum(row['stages'].values()) == pytest.approx(row['seconds'], rel=0.2, abs=0.01)


def test_chunks_are_measured_whole_in_the_second_half_of_the_stream(model):
    config = CoreConfig(session=SessionConfig(mode='stac'))
    plan = Plan(height=32, width=40, frames=(6,), repeats=2, warmup=0)
    rows = measure_chunks(model, config, plan, (1, 3))
    assert [row['chunk_size'] for row in rows] == [1, 3]
    assert [row['num_samples'] for row in rows] == [2 * 3, 2 * 1]  # of 6 and of 2 chunks
    for row in rows:
        assert row['per_frame_s'] == pytest.approx(row['p50_s'] / row['chunk_size'])
        assert 0 < row['p50_s'] <= row['p95_s']


def test_the_views_differ_so_that_none_counts_as_still():
    views = camera_images(PLAN)
    assert all(view.shape == (32, 40, 3) for view in views)
    changes = [np.abs(a.astype(int) - b).mean() for a, b in zip(views, views[1:] + views[:1])]
    assert min(changes) > 0


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'width': 41}, 'multiples of the patch size 8, got 41 x 32'),
        ({'height': 0}, 'at least 8 x 8'),
        ({'frames': ()}, 'counted from 1'),
        ({'frames': (0, 3)}, 'counted from 1'),
        ({'repeats': 0}, 'at least one repeat'),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**{'height': 32, 'width': 40, **fields}).check(8)


def test_operations_grow_with_the_cache_by_its_attention():
    config = PRESETS['tiny']
    counted = count_operations(config, 48, 64)
    attention = 4 * 50 * 192 * config.depth  # 50 queries; scores and values, 2 operations each
    camera = 4 * 384 * config.camera_trunk_depth  # one token per frame of 50
    assert counted.flop_per_cached_token == attention + camera / 50
    blocks = 2 * config.depth * (24 * 50 * 192**2 + 4 * 50**2 * 192)
    assert blocks < counted.flop(0) < 3 * blocks


@pytest.mark.heavy
def test_operations_of_the_full_size_are_those_of_the_cost_model():
    counted = count_operations(PRESETS['stream3r'], 392, 518)
    assert counted.flop(0) == pytest.approx(2660.27e9, rel=1e-5)
    assert counted.flop(1041) == pytest.approx(2766.80e9, rel=1e-5)


def room_images():
    return [
        torch.from_numpy(view).permute(2, 0, 1).float() / 255
        for view in camera_images(Plan(height=48, width=64))[:8]
    ]


def test_bfloat16_products_stay_close_to_float32_and_the_heads_are_float32(model):
    narrow = load_model('tiny', dtype=torch.bfloat16)
    for head in (narrow.camera_head, narrow.depth_head, narrow.point_head):
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    wide, session = (StreamSession(m, mode='window') for m in (model, narrow))
    for image in room_images():
        expected, found = wide.step_tensor(image), session.step_tensor(image)
        relative = (found['depth'] - expected['depth']).abs() / expected['depth']
        assert 0 < relative.mean() < 5e-3 and relative.quantile(0.99) < 3e-2
        assert (found['pose_enc'] - expected['pose_enc']).abs().max() < 1e-2
        assert all(value.dtype == torch.float32 for value in found.values())


def test_a_loaded_network_convolves_channels_last_and_says_the_same(model):
    plain = load_model('tiny').to(memory_format=torch.contiguous_format)
    for head in (model.depth_head, model.point_head):
        weight = head.scratch.output_conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    sessions = [StreamSession(m, mode='causal') for m in (model, plain)]
    for image in room_images()[:3]:
        assert_same(*(session.step_tensor(image) for session in sessions), 1e-5)
