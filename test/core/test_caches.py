"""Dense and window caches against a list of frames that does the same the obvious way."""

import pytest
import torch

from stream3r_core import StreamSession, load_model
from stream3r_core.cache.dense import DenseCache
from stream3r_core.cache.shared import SharedIterationsCache
from stream3r_core.cache.window import WindowCache
from stream3r_core.config import CacheConfig
from stream3r_core.errors import CacheError

LAYERS, HEADS, TOKENS, DIM = 2, 3, 5, 4


def frame(i, layer, tokens=TOKENS):
    k = torch.full((1, HEADS, tokens, DIM), 10.0 * i + layer)
    return k + torch.arange(tokens)[:, None] / 100, -k


def run(cache, num_frames, start=0):
    """Push frames; return per frame the token values that the last layer saw, sorted."""
    seen = []
    for i in range(start, start + num_frames):
        for layer in range(LAYERS):
            attended = cache.update(layer, *frame(i, layer))
            assert torch.equal(attended.k.floor(), -attended.v)
            assert attended.bias is None
        seen.append(sorted(set(attended.k[0, 0, :, 0].floor().div(10).int().tolist())))
        cache.commit(1)
    return seen


def test_dense_sees_everything_and_its_size_is_told_exactly():
    cache = DenseCache(LAYERS)
    assert run(cache, 20) == [list(range(i + 1)) for i in range(20)]
    assert cache.num_tokens == 20 * TOKENS
    assert cache.num_bytes == 20 * TOKENS * 2 * LAYERS * HEADS * DIM * 4
    assert cache.capacity_bytes >= cache.num_bytes
    k, v = cache.frames(1)
    assert torch.equal(k, torch.cat([frame(i, 1)[0] for i in range(20)], dim=2))
    assert torch.equal(v, torch.cat([frame(i, 1)[1] for i in range(20)], dim=2))


def test_dense_with_a_limit_never_reallocates_and_refuses_the_frame_beyond():
    cache = DenseCache(LAYERS, max_frames=3)
    run(cache, 1)
    pointer = cache.frames(0)[0].shape, cache._storage[0].data_ptr()
    run(cache, 2, start=1)
    assert cache._storage[0].data_ptr() == pointer[1]
    with pytest.raises(CacheError, match='holds 3 frames'):
        run(cache, 1, start=3)
    assert cache.num_tokens == 3 * TOKENS
    cache.reset()
    assert run(cache, 3)[-1] == [0, 1, 2]


@pytest.mark.parametrize('past', [0, 1, 2, 5])
def test_window_sees_anchor_and_recent_frames_in_constant_storage(past):
    cache = WindowCache(LAYERS, past)
    seen = run(cache, 1)
    storage = [s.data_ptr() for s in cache._storage]
    capacity = cache.capacity_bytes
    seen += run(cache, 14, start=1)
    assert seen == [sorted({0, *range(max(0, i - past), i + 1)}) for i in range(15)]
    assert [s.data_ptr() for s in cache._storage] == storage
    assert cache.capacity_bytes == capacity
    assert cache.num_tokens == (1 + past) * TOKENS
    kept = torch.cat([frame(i, 0)[0] for i in (0, *range(15 - past, 15))], dim=2)
    assert torch.equal(cache.frames(0)[0], kept)


@pytest.mark.parametrize('make', [lambda: DenseCache(LAYERS), lambda: WindowCache(LAYERS, 2)])
def test_a_failed_step_leaves_no_trace(make):
    cache, untouched = make(), make()
    for part in (cache, untouched):
        run(part, 6)
    cache.update(0, *frame(99, 0))
    cache.rollback()
    assert cache.num_tokens == untouched.num_tokens
    assert run(cache, 4, start=6) == run(untouched, 4, start=6)


def test_reset_keeps_storage_and_takes_another_frame_size():
    cache = WindowCache(LAYERS, 2)
    run(cache, 5)
    pointer = cache._storage[0].data_ptr()
    cache.reset()
    assert cache.num_tokens == 0 and cache.num_bytes == 0
    assert run(cache, 2) == [[0], [0, 1]]
    assert cache._storage[0].data_ptr() == pointer
    cache.reset()
    attended = cache.update(0, *frame(0, 0, tokens=7))
    assert attended.k.shape[2] == 7


@pytest.mark.parametrize(
    'make', [lambda n: DenseCache(1, updates_per_frame=n), lambda n: WindowCache(1, 2, n)]
)
def test_shared_camera_cache_shows_all_passes_of_seen_frames_and_earlier_ones_of_its_own(make):
    iterations = 4
    cache = SharedIterationsCache(make(iterations), trunk_depth=1)
    windowed = isinstance(cache.inner, WindowCache)
    for i in range(9):
        for t in range(iterations):
            k = torch.full((1, 1, 1, DIM), 10.0 * i + t)
            attended = cache.update(t, k, -k)
            past = [j for j in range(i) if not windowed or j == 0 or j >= i - 2]
            expected = [10 * j + u for j in past for u in range(iterations)]
            expected += [10 * i + u for u in range(t + 1)]
            assert sorted(attended.k[0, 0, :, 0].int().tolist()) == expected
            assert torch.equal(attended.k, -attended.v)
        cache.commit(1)
    assert cache.num_tokens == (3 if windowed else 9) * iterations


def storages(part, path='cache', seen=None):
    """Address and size of every tensor that a cache keeps, by where it is kept."""
    seen = set() if seen is None else seen
    if isinstance(part, torch.Tensor):
        return {path: (part.untyped_storage().data_ptr(), part.untyped_storage().nbytes())}
    if id(part) in seen:
        return {}
    seen.add(id(part))
    if type(part).__module__.startswith('stream3r_core.cache'):
        part = getattr(part, '__dict__', {})
    if not isinstance(part, dict | list | tuple):
        return {}
    found = {}
    for name, value in part.items() if isinstance(part, dict) else enumerate(part):
        found |= storages(value, f'{path}.{name}', seen)
    return found


@pytest.mark.parametrize(
    'options',
    [
        {'mode': 'causal', 'max_frames': 30},
        {'mode': 'window', 'window': 3},
        {'mode': 'stac', 'cache': CacheConfig(max_bytes=3_000_000)},
        {'mode': 'stac_paper'},
    ],
    ids=lambda options: options['mode'],
)
def test_no_storage_of_a_bounded_stream_ever_moves(options):
    session = StreamSession(load_model('tiny', 'random'), **options)
    frames = torch.rand(30, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    for frame in frames[:15]:
        session.step_tensor(frame)
    before = {**storages(session.cache), **storages(session.camera_cache, 'camera')}
    capacity = session.cache.capacity_bytes
    assert sum(size for _, size in before.values()) >= capacity > 0
    for frame in frames[15:]:
        session.step_tensor(frame)
    assert {**storages(session.cache), **storages(session.camera_cache, 'camera')} == before
    assert session.cache.capacity_bytes == capacity
