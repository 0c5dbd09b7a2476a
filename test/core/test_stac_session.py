"""The bounded cache in a session, on both golden networks: against other modes and an oracle."""

import copy
import dataclasses

import pytest
import torch
from golden_data import MODELS, SIZES, golden, golden_network, group, images
from stac_oracle import PublishedOracle, RepairedOracle
from waiting import forbid_waiting

from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.cache.camera import CameraCache
from stream3r_core.cache.token_pool import TokenPool
from stream3r_core.cache.voxel_table import NOWHERE
from stream3r_core.cache.working import WorkingCache
from stream3r_core.config import CacheConfig, PublishedCacheConfig
from stream3r_core.errors import CacheError, ConfigError, InputError
from stream3r_core.kernels import merge
from stream3r_core.kernels.reference import attention, subsample_queries
from stream3r_core.session import StreamSession

NAMES = ('pose_enc', 'depth', 'depth_conf', 'world_points', 'world_points_conf')
PLAIN = CacheConfig(
    heavy_hitters=0, retrieved=0, camera_memory='window', camera_window=3, window=3,
    skip_still=False,
)  # fmt: skip
SMALL = CacheConfig(
    window=2, heavy_hitters=1, retrieved=1, camera_window=2, camera_anchors=4,
    max_bytes=1_500_000, skip_still=False,
)  # fmt: skip
PAPER = PublishedCacheConfig(
    window=2, heavy_hitters=1, retrieved=1, camera_window=2, min_confidence=1.2, chunk_size=1,
    voxel_size=0.8,
)  # fmt: skip
STORES = TokenPool, WorkingCache, CameraCache
replace = dataclasses.replace


def tolerance(name):
    return {'atol': 2e-5, 'rtol': 0} if name == 'pose_enc' else {'atol': 2e-4, 'rtol': 2e-4}


def many(size, count):
    """Frames [count, 3, H, W] that all differ."""
    generator = torch.Generator().manual_seed(count)
    frames = images(size)[0]
    noise = torch.rand(count, *frames.shape[1:], generator=generator)
    return 0.6 * frames[torch.arange(count) % len(frames)] + 0.4 * noise


def stream(session, frames):
    raw = [session.step_tensor(frame) for frame in frames]
    return {name: torch.stack([r[name] for r in raw]) for name in NAMES}


def in_chunks(session, frames, size):
    """Feed chunks of raw frames; stack the raw outputs."""
    raw = [session._process(chunk)[0] for chunk in frames.split(size)]
    return {name: torch.cat([r[name] for r in raw]) for name in NAMES}


def assert_same(got, expected):
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], **tolerance(name))


def spatial(model, config, mode='stac'):
    return StreamSession(golden_network(model), mode, cache=config)


# ---- equal to the other modes where they mean the same


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('model', MODELS)
def test_without_heavy_hitters_and_retrieval_it_is_the_window_session(model, size):
    frames = many(size, 9)
    expected = stream(StreamSession(golden_network(model), 'window', 3), frames)
    assert_same(stream(spatial(model, PLAIN), frames), expected)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('model', MODELS)
def test_a_window_as_long_as_the_stream_is_the_causal_session(model, size):
    frames = many(size, 8)
    config = replace(SMALL, window=8, camera_window=8, max_bytes=10**7)
    expected = stream(StreamSession(golden_network(model), 'causal'), frames)
    assert_same(stream(spatial(model, config), frames), expected)


@pytest.mark.parametrize('model', MODELS)
def test_the_shared_camera_cache_works_with_it(model):
    frames = many(SIZES[0], 7)
    options = {'camera_cache': 'shared'}
    expected = stream(StreamSession(golden_network(model), 'window', 3, **options), frames)
    session = StreamSession(golden_network(model), 'stac', cache=PLAIN, **options)
    assert_same(stream(session, frames), expected)


@pytest.mark.parametrize('model', MODELS)
def test_one_chunk_of_all_frames_is_the_full_batch_pass(model):
    """Inside a chunk attention is bidirectional."""
    frames = images(SIZES[0])[0]
    session = spatial(model, replace(PLAIN, chunk_size=6))
    expected = group(golden(model, SIZES[0], 'batch'), 'full')
    assert_same(in_chunks(session, frames, 6), {n: expected[n][0] for n in NAMES})


@pytest.mark.parametrize('chunk_size', [2, 4])
def test_camera_memory_all_remembers_every_frame(chunk_size):
    frames = many(SIZES[0], 12)
    bounded = replace(PLAIN, window=12, camera_window=12, chunk_size=chunk_size)
    everything = replace(bounded, camera_memory='all', bounded=False)
    expected = in_chunks(spatial('stream3r', bounded), frames, chunk_size)
    session = spatial('stream3r', everything)
    assert_same(in_chunks(session, frames, chunk_size), expected)
    assert session.camera_cache.num_tokens == 12


# ---- equal to the published method written with lists and loops


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('chunk_size, voxel_size', [(1, 0.8), (2, 0.8), (4, 3.0)])
def test_the_published_profile_equals_an_oracle_of_lists_and_loops(model, chunk_size, voxel_size):
    """With large voxels rows overflow: what finds no room waits and is never lost."""
    frames = many(SIZES[1], 30)
    window = max(2, chunk_size)
    config = replace(PAPER, chunk_size=chunk_size, window=window, voxel_size=voxel_size)
    session = spatial(model, config, 'stac_paper')
    oracle = spatial(model, config, 'stac_paper')
    sizes = golden_network(model).config
    oracle.cache = PublishedOracle(
        sizes.depth, sizes.num_heads, sizes.tokens_per_frame(56, 42), sizes.num_special_tokens,
        config,
    )  # fmt: skip
    assert_same(in_chunks(session, frames, chunk_size), in_chunks(oracle, frames, chunk_size))
    for layer, heads in enumerate(oracle.cache.heads):
        for h, head in enumerate(heads):
            pivots = sum(len(row.pivots) for row in head.rows.values())
            assert pivots and head.retrieved, 'the stream must exercise the pool'
            group_index = layer * len(heads) + h
            pool = session.cache.pool
            live = pool.owner[group_index, :-1] >= 0
            assert int((live & (pool.count[group_index, :-1] > 1)).sum()) == pivots
            carried = sum(len(tokens) for tokens in head.carried.values())
            assert int((pool.carried.key[group_index] < NOWHERE).sum()) == carried
    assert int(pool.books.lost) == 0


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('chunk_size', [1, 2])
def test_the_repaired_profile_equals_an_oracle_of_lists_and_loops(model, chunk_size):
    frames = many(SIZES[1], 16)
    config = replace(
        SMALL, bounded=False, voxel_size=0.4, chunk_size=chunk_size, buffer_size=2, retrieved=5,
        max_log_count=0.6, confidence_quantile=0.2,
    )  # fmt: skip
    session, oracle = spatial(model, config), spatial(model, config)
    sizes = golden_network(model).config
    oracle.cache = RepairedOracle(
        sizes.depth, sizes.num_heads, sizes.tokens_per_frame(56, 42), sizes.num_special_tokens,
        config,
    )  # fmt: skip
    for chunk in frames.split(chunk_size):
        got, expected = session._process(chunk)[0], oracle._process(chunk)[0]
        assert_same(got, expected)
        for got, expected in zip(retrieved_keys(session.cache), oracle.cache.retrieved_keys()):
            # As sets: two tokens that rank all but equal may change places.
            got, expected = (x[x[:, 0].argsort()] for x in (got, expected))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert oracle.cache.tiers == {0, 1, 2} and oracle.cache.num_capped, 'all rules must matter'


def retrieved_keys(cache):
    """Return per layer and head the keys of what is retrieved [n, D]."""
    working, first = cache.working, cache.plan.layout.hot
    live = (working.retrieved_slot >= 0).flatten(0, 1)
    return [k[first:][mask] for k, mask in zip(working.kv[0].flatten(0, 1), live)]


def test_fewer_queries_give_the_scores_that_evenly_spaced_ones_predict():
    config = replace(SMALL, query_fraction=0.5, max_bytes=0)
    session, queries = spatial('stream3r', config), {}
    record = session.cache.record

    def watch(layer, column_sums, q):
        queries[layer] = q
        record(layer, column_sums, q)

    session.cache.record = watch
    session.step_tensor(torch.rand(3, 168, 168, generator=torch.Generator().manual_seed(0)))
    working = session.cache.working
    for layer, q in queries.items():
        k = working.kv[0, layer, None, :, : q.shape[2]]
        spaced, factor = subsample_queries(q, config.query_fraction)
        assert spaced.shape[2] < q.shape[2]
        got = working.score[None, layer, :, : q.shape[2]]
        torch.testing.assert_close(got, factor * attention(spaced, k, k).column_sums)
        assert not torch.allclose(got, attention(q, k, k).column_sums)


def test_heavy_hitters_alone_equal_the_oracle():
    frames = many(SIZES[0], 12)
    config = replace(PAPER, retrieved=0)
    oracle = spatial('stream3r', config, 'stac_paper')
    sizes = golden_network('stream3r').config
    oracle.cache = PublishedOracle(
        sizes.depth, sizes.num_heads, sizes.tokens_per_frame(42, 70), sizes.num_special_tokens,
        config,
    )  # fmt: skip
    oracle.outputs = ('depth', 'points')
    assert_same(stream(spatial('stream3r', config, 'stac_paper'), frames), stream(oracle, frames))


# ---- chunks


def test_a_chunk_waits_until_it_is_full_and_flush_returns_the_rest():
    frames = (many(SIZES[0], 7).permute(0, 2, 3, 1) * 255).byte().numpy()
    session = spatial('stream3r', replace(SMALL, chunk_size=3, max_bytes=4_000_000))
    session.image_config = dataclasses.replace(session.image_config, long_side=70)
    answers = [session.step(frame, stamp_ns=10 * i) for i, frame in enumerate(frames)]
    assert [None if a is None else len(a) for a in answers] == [None, None, 3, None, None, 3, None]
    rest = session.flush()
    assert session.flush() == []
    predictions = [*answers[2], *answers[5], *rest]
    assert [p.index for p in predictions] == list(range(7))
    assert [p.stamp_ns for p in predictions] == [10 * i for i in range(7)]
    again = spatial('stream3r', session.cache_config)
    again.image_config = session.image_config
    whole = [*again.step_chunk(frames[:3]), *again.step_chunk(frames[3:6])]
    whole += again.step_chunk(frames[6:], stamps_ns=[60])
    assert whole[-1].stamp_ns == 60
    for a, b in zip(predictions, whole):
        assert torch.equal(a.depth, b.depth) and torch.equal(a.T_world_camera, b.T_world_camera)


def test_a_chunk_of_the_wrong_size_is_refused():
    session = spatial('stream3r', replace(SMALL, chunk_size=2, max_bytes=4_000_000))
    frames = list((many(SIZES[0], 3).permute(0, 2, 3, 1) * 255).byte().numpy())
    for images_given in ([], frames):
        with pytest.raises(InputError, match='a chunk takes 1 to 2 images'):
            session.step_chunk(images_given)
    assert session.step(frames[0]) is None
    with pytest.raises(InputError, match='1 waiting'):
        session.step_chunk(frames[:1])
    with pytest.raises(InputError, match='would overtake 1 waiting'):
        session.step_tensor(many(SIZES[0], 1)[0])


# ---- pinned frames, failed steps, reset


class SelectedFrames(KVCache):
    """Keeps every frame and shows the ones it is told to show."""

    def __init__(self, visible):
        self.visible, self.frames, self.open = visible, [], {}

    def update(self, layer, k, v):
        self.open[layer] = k, v
        shown = [self.frames[i][layer] for i in self.visible[len(self.frames)]]
        return Attended(*(torch.cat(x, 2) for x in zip(*shown, (k, v))))

    def commit(self, num_frames, points=None, conf=None, keep=None):
        self.frames.append(self.open)
        self.open = {}

    def rollback(self):
        raise NotImplementedError

    reset = rollback
    num_tokens = num_bytes = capacity_bytes = property(rollback)


def test_any_frames_can_be_pinned():
    frames = many(SIZES[0], 7)
    session = spatial('stream3r', replace(PLAIN, pinned_frames=(0, 2), window=1, camera_window=1))
    visible = [[], [0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 5]]
    oracle = spatial('stream3r', PLAIN)
    oracle.cache, oracle.camera_cache = SelectedFrames(visible), SelectedFrames(visible)
    assert_same(stream(session, frames), stream(oracle, frames))


@pytest.mark.parametrize('config', [SMALL, PAPER, replace(SMALL, retrieved=-1)])
def test_a_failed_step_changes_nothing(config, monkeypatch):
    frames = many(SIZES[0], 12)
    mode = 'stac_paper' if config is PAPER else 'stac'
    expected = stream(spatial('stream3r', config, mode), frames)
    session = spatial('stream3r', config, mode)
    network = golden_network('stream3r')
    got = []
    for i, frame in enumerate(frames):
        if i in (0, 3, 11):
            with monkeypatch.context() as patch:
                patch.setattr(network.point_head, 'forward', _fail)
                with pytest.raises(MemoryError):
                    session.step_tensor(many(SIZES[0], 1)[0])
        got.append(session.step_tensor(frame))
    for name in NAMES:
        assert torch.equal(torch.stack([g[name] for g in got]), expected[name])


def _fail(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize('where', ['TokenPool.insert', 'WorkingCache.evict', 'CameraCache.commit'])
def test_an_error_while_a_step_is_stored_is_said_until_reset_which_mends_it(where, monkeypatch):
    frames = many(SIZES[0], 10)
    config = replace(SMALL, skip_still=True)  # the test for still views starts anew, too
    expected = stream(spatial('stream3r', config), frames)
    session = spatial('stream3r', config)
    stream(session, frames[:8])
    owner, method = where.split('.')
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr({c.__name__: c for c in STORES}[owner], method, _fail)
        session.step_tensor(frames[8])
    for frame in frames[8:]:
        with pytest.raises(CacheError, match=r'incomplete.*call reset'):
            session.step_tensor(frame)
    session.reset()
    got = stream(session, frames)
    for name in NAMES:
        assert torch.equal(got[name], expected[name])


def test_reset_starts_anew_in_the_same_storage():
    frames = many(SIZES[0], 12)
    session = spatial('stream3r', SMALL)
    first = stream(session, frames)
    where = [x.data_ptr() for x in session.cache.tensors()]
    session.reset()
    assert session.cache.num_tokens == 0 and session.cache.num_bytes == 0
    second = stream(session, frames)
    assert [x.data_ptr() for x in session.cache.tensors()] == where
    for name in NAMES:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(
    ('mode', 'config'),
    [
        *[('window', None), ('causal', None), ('stac_paper', PAPER)],
        *[('stac', SMALL), ('stac', replace(SMALL, retrieved=-1))],
    ],
)
def test_reset_mends_a_stream_that_a_frame_of_nan_has_spoilt(mode, config):
    frames = many(SIZES[0], 8)
    session = StreamSession(golden_network('stream3r'), mode, cache=config)
    expected = stream(session, frames)
    session.reset()
    spoilt = frames.clone()
    spoilt[5] = torch.nan
    assert stream(session, spoilt)['pose_enc'][-1].isnan().any()
    session.reset()
    got = stream(session, frames)
    for name in NAMES:
        assert torch.equal(got[name], expected[name])


def test_a_failed_chunk_of_nan_leaves_nothing_behind_a_mask(monkeypatch):
    """Single frames that follow use one of its slots; the others are hidden, not gone."""
    frames = many(SIZES[0], 10)
    config = replace(SMALL, chunk_size=4, window=4, max_bytes=0)
    session = spatial('stream3r', config)
    session._process(frames[:4])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(golden_network('stream3r').point_head, 'forward', _fail)
        session._process(torch.full_like(frames[:4], torch.nan))
    got = stream(session, frames[4:])
    assert all(x.isfinite().all() for x in got.values())


def test_after_a_reset_the_stream_may_have_another_size():
    session = spatial('stream3r', SMALL)
    stream(session, many(SIZES[0], 8))
    session.reset()
    frames = many(SIZES[1], 8)
    assert_same(stream(session, frames), stream(spatial('stream3r', SMALL), frames))


# ---- bytes


def allocated_bytes(run):
    """Measure what the allocator gave to ``run()`` and did not get back."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    del kept
    return sum(event.nbytes() for event in events)


@pytest.mark.parametrize('model', MODELS)
def test_what_a_session_holds_is_what_it_claims_and_never_above_the_budget(model):
    frames = many(SIZES[0], 12)
    stream(spatial(model, SMALL), frames[:1])  # what the network keeps is no memory of it
    claimed = []

    def run():
        session = spatial(model, SMALL)
        for frame in frames:
            session.step_tensor(frame)
            claimed.append(session.cache.capacity_bytes + session.camera_cache.capacity_bytes)
        return session

    measured = allocated_bytes(run)
    assert len(set(claimed)) == 1 and claimed[0] <= SMALL.max_bytes
    assert measured == pytest.approx(claimed[0], rel=0.05)
    assert measured <= 1.05 * SMALL.max_bytes


# ---- bad input


def test_another_resolution_midstream_is_refused_and_the_stream_goes_on():
    frames = many(SIZES[0], 8)
    expected = stream(spatial('stream3r', SMALL), frames)
    session = spatial('stream3r', SMALL)
    got = [session.step_tensor(frame) for frame in frames[:5]]
    with pytest.raises(InputError, match='reset the session'):
        session.step_tensor(many(SIZES[1], 1)[0])
    got += [session.step_tensor(frame) for frame in frames[5:]]
    torch.testing.assert_close(torch.stack([g['depth'] for g in got]), expected['depth'])


def test_a_budget_that_cannot_hold_the_working_memory_says_what_it_needs():
    session = spatial('stream3r', replace(SMALL, max_bytes=100_000))
    with pytest.raises(
        CacheError, match=r'100,000 bytes, but 1 pinned and 2 recent .* need \d'
    ) as e:
        session.step_tensor(many(SIZES[0], 1)[0])
    session.reset()
    with pytest.raises(CacheError):
        session.step_tensor(many(SIZES[0], 1)[0])
    needed = int(str(e.value).split('need ')[1].split(';')[0].replace(',', ''))
    stream(spatial('stream3r', replace(SMALL, max_bytes=needed)), many(SIZES[0], 10))


@pytest.mark.parametrize('name, value', [('chunk_size', 0), ('chunk_size', 9), ('window', 0)])
def test_sizes_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f'cache.{name}: expected a value'):
        spatial('stream3r', replace(SMALL, **{name: value}))


@pytest.mark.parametrize('switch', ['bounded', 'query_retrieval'])
def test_what_contradicts_attending_to_the_whole_pool_is_refused(switch):
    with pytest.raises(ConfigError, match='needs a bound'):
        spatial('stream3r', replace(SMALL, retrieved=-1, **{switch: False}))


def test_a_camera_memory_without_bound_contradicts_a_budget():
    with pytest.raises(ConfigError, match=r'camera_memory.*breaks any budget'):
        spatial('stream3r', replace(SMALL, camera_memory='all'))


@pytest.mark.parametrize('pinned', [(-1,), (0, 0, 0)])
def test_pinned_frames_that_cannot_be_are_refused(pinned):
    with pytest.raises(ConfigError, match=r'cache_paper.pinned_frames: expected different'):
        spatial('stream3r', replace(PAPER, pinned_frames=pinned), 'stac_paper')


@pytest.mark.parametrize(
    ('mode', 'config', 'words'),
    [
        ('stac', CacheConfig(window=30), ['the default budget of 23 frames', 'set cache.max']),
        (
            'stac_paper',
            replace(PAPER, bounded=True, max_bytes=1000),
            ['cache_paper.max_bytes allows 1,000', 'raise cache_paper.max_bytes'],
        ),
    ],
)
def test_a_budget_that_is_too_small_is_called_by_the_name_that_the_user_knows(mode, config, words):
    with pytest.raises(CacheError) as error:
        spatial('stream3r', config, mode).step_tensor(many(SIZES[0], 1)[0])
    assert all(word in str(error.value) for word in words)


def test_unknown_policies_and_mixed_up_profiles_are_refused():
    with pytest.raises(ConfigError, match='stack'):
        StreamSession(golden_network('stream3r'), 'stack')
    with pytest.raises(ConfigError, match='PublishedCacheConfig'):
        spatial('stream3r', SMALL, 'stac_paper')


# ---- the host never waits for the device


@pytest.mark.parametrize(
    ('mode', 'config'),
    [('stac', SMALL), ('stac', replace(SMALL, retrieved=-1)), ('window', None), ('causal', None)],
)
def test_a_steady_step_of_a_session_never_makes_the_host_wait(mode, config, monkeypatch):
    monkeypatch.setattr(merge, 'counted_on_host', lambda device: False)
    frames = many(SIZES[0], 11)
    session = StreamSession(golden_network('stream3r'), mode, cache=config)
    stream(session, frames[:8])
    with forbid_waiting():
        raw = [session.step_tensor(frame) for frame in frames[8:]]
    assert len(raw) == 3 and session.num_frames == 11


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize('config', [PLAIN, SMALL, PAPER])
def test_a_gpu_streams_what_the_cpu_streams(config):
    frames = many(SIZES[0], 24)
    mode = 'stac_paper' if config is PAPER else 'stac'
    expected = stream(spatial('stream3r', config, mode), frames)
    network = copy.deepcopy(golden_network('stream3r')).cuda()
    session = StreamSession(network, mode, cache=config)
    got = {name: value.cpu() for name, value in stream(session, frames.cuda()).items()}
    assert_same(got, expected)


# ---- the cheaper score


def test_the_residual_score_needs_no_second_pass_and_keeps_the_tokens_it_ranks_highest(
    monkeypatch,
):
    monkeypatch.setattr('stream3r_core.kernels.tiled.column_sums', _fail)
    monkeypatch.setattr('stream3r_core.kernels.tiled.attention', _fail)
    network = golden_network('stream3r')
    session = spatial('stream3r', replace(SMALL, score='residual', retrieved=0, window=1))
    sizes = []
    record = session.cache.record_update

    def watch(layer, update):
        if layer == 1:
            sizes.append(update[0].norm(dim=-1) / update[0].norm(dim=-1).mean())
        record(layer, update)

    session.cache.record_update = watch
    frames = many(SIZES[0], 6)
    stream(session, frames)
    # Frame 0 is pinned, frame 5 recent; the best of frames 1 to 4 are the heavy hitters.
    T = network.config.tokens_per_frame(42, 70)
    expected = torch.cat(sizes[1:5]).topk(T).values.sort().values
    heavy = session.cache.working.score[1, :, -T:].sort().values
    torch.testing.assert_close(heavy, expected.expand(2, -1))


def test_the_residual_score_works_with_the_pool():
    session = spatial('stream3r', replace(SMALL, score='residual'))
    outputs = stream(session, many(SIZES[0], 20))
    assert int(session.cache.pool.num_tokens) > 0
    assert all(x.isfinite().all() for x in outputs.values())
