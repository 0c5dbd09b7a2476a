"""Laws and bounds of the bounded cache: scores, weights, bytes, switches, silence of the host."""

import dataclasses
import gc
import itertools

import pytest
import torch
from waiting import forbid_waiting

from stream3r_core.attention import attend, attend_with_column_sums
from stream3r_core.cache.camera import CameraCache
from stream3r_core.cache.stac import StacCache
from stream3r_core.cache.voxel_table import NOWHERE
from stream3r_core.cache.window import WindowCache
from stream3r_core.config import CacheConfig, PublishedCacheConfig
from stream3r_core.errors import CacheError
from stream3r_core.kernels import merge

GIB = 2**30
L, H, D = 2, 2, 16
GRID = 5, 6  # patches
SPECIAL = 3
T = SPECIAL + GRID[0] * GRID[1]
SMALL = CacheConfig(
    window=2, heavy_hitters=1, retrieved=1, max_bytes=800_000, voxel_fraction=0.05,
    confidence_quantile=0.0,
)  # fmt: skip
PAPER = PublishedCacheConfig(
    window=2, heavy_hitters=1, retrieved=1, chunk_size=1, voxel_size=0.1, min_confidence=1.0
)
replace = dataclasses.replace


def make_cache(config=SMALL, reserved=0):
    return StacCache(L, H, D, SPECIAL, config, reserved)


class Walk:
    """A camera that walks along z: random tokens, points of a corridor, always new space."""

    def __init__(self, cache, seed=0, speed=0.5, scale=1.0):
        self.cache, self.speed, self.scale, self.frame = cache, speed, scale, 0
        self.generator = torch.Generator().manual_seed(seed)

    def points(self, num_frames):
        rows, columns = GRID
        height, width = 14 * rows, 14 * columns
        x = torch.linspace(-1, 1, width).expand(height, -1)
        y = torch.linspace(-1, 1, height)[:, None].expand(-1, width)
        z = 1 + (x.abs() + y.abs())
        frames = [
            torch.stack((x, y, z + self.speed * (self.frame + i)), -1) for i in range(num_frames)
        ]
        return self.scale * torch.stack(frames), 2 + torch.rand(
            num_frames, height, width, generator=self.generator
        )

    def step(self, num_frames=1, keep=None, points=None, change_sums=None, value_scale=1.0):
        cache, layers = self.cache, L
        cache.begin(num_frames)
        for layer in range(layers):
            q, k, v = torch.randn(3, 1, H, num_frames * T, D, generator=self.generator)
            seen = cache.update(layer, k, value_scale * v)
            if cache.needs_column_sums:
                self.out, sums = attend_with_column_sums(q, *seen)
                if change_sums is not None:
                    change_sums(layer, sums)
                cache.record(layer, sums, q if cache.needs_queries else None)
        world, conf = self.points(num_frames) if points is None else points
        cache.commit(num_frames, world, conf, keep=keep)
        self.frame += num_frames

    def run(self, num_frames):
        for _ in range(num_frames):
            self.step()
        return self


# ---- scores (sections 3.2 and 11)


@pytest.mark.parametrize('chunk', [1, 3])
def test_uniform_attention_scores_one(chunk):
    config = replace(SMALL, window=9, chunk_size=chunk, score_decay=0.0)
    cache = make_cache(config)
    for _ in range(3):
        cache.begin(chunk)
        for layer in range(L):
            q = torch.zeros(1, H, chunk * T, D)
            k = v = torch.randn(1, H, chunk * T, D)
            cache.record(layer, attend_with_column_sums(q, *cache.update(layer, k, v))[1], q)
        cache.commit(chunk, *Walk(cache).points(chunk))
    live = cache.num_tokens
    torch.testing.assert_close(cache.working.score[..., :live], torch.ones(L, H, live))


def test_scores_decay_by_gamma_and_add_what_was_received():
    cache = make_cache(replace(SMALL, window=9, score_decay=0.7))
    walk = Walk(cache)
    walk.step()
    before = cache.working.score[..., :T].clone()
    walk.step()
    received = cache.working.received[..., :T] * 2  # two frames of keys per frame of queries
    torch.testing.assert_close(cache.working.score[..., :T], 0.7 * before + received)


def test_the_attention_of_a_merged_token_is_that_of_its_duplicates():
    """C duplicates under one key with bias log C (section 11)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, H, n, D, generator=generator) for n in (7, 5, 5))
    counts = torch.tensor([1, 4, 2, 8, 1])
    explicit = attend(q, k.repeat_interleave(counts, 2), v.repeat_interleave(counts, 2))
    bias = counts.float().log().expand(1, H, 1, -1)
    torch.testing.assert_close(attend(q, k, v, bias), explicit)


def test_duplicates_that_the_pool_has_merged_are_attended_to_as_if_they_were_all_there():
    """From the hot cache through pool and retrieval: nothing of the attention is lost."""
    config = replace(
        SMALL, window=1, heavy_hitters=0, retrieved=2, absorb_threshold=0.99, max_log_count=99.0,
        max_bytes=3_000_000,
    )  # fmt: skip
    cache = make_cache(config)
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 1, H, T, D, generator=generator)
    points, conf = Walk(cache).points(1)
    for _ in range(21):
        cache.begin(1)
        for layer in range(L):
            q = torch.randn(1, H, T, D, generator=generator)
            seen = cache.update(layer, key, value)
            out, sums = attend_with_column_sums(q, *seen)
            cache.record(layer, sums, q)
        counted = seen.bias[0, :, 0].exp().sum(1) if seen.bias is not None else None
        cache.commit(1, points, conf)
    # Special tokens have no place and are gone; patches are pinned, recent, new, or in the pool.
    pooled = 18 * (T - SPECIAL)
    assert counted.tolist() == pytest.approx([3 * T + pooled] * H, rel=1e-4)
    copies = torch.full((T,), 21)
    copies[:SPECIAL] = 3
    explicit = attend(q, key.repeat_interleave(copies, 2), value.repeat_interleave(copies, 2))
    torch.testing.assert_close(out, explicit, rtol=1e-3, atol=1e-3)


# ---- bytes (sections 6 and 11)


@pytest.mark.parametrize('frames, gib', [(9, 0.858), (23, 2.19), (27, 2.57)])
def test_live_bytes_of_a_window_reproduce_the_published_figures(frames, gib):
    """Published live KV bytes at 518 x 392 in bfloat16, on tensors without memory."""
    cache = WindowCache(24, past_frames=frames - 1)
    for _ in range(frames + 3):
        for layer in range(24):
            k = torch.empty(1, 16, 1041, 64, dtype=torch.bfloat16, device='meta')
            cache.update(layer, k, k)
        cache.commit(1)
    assert round(cache.num_bytes / GIB, 3 if frames == 9 else 2) == gib


def test_working_memory_of_the_published_profile_has_the_published_size():
    from stream3r_core.cache.budget import make_plan
    from stream3r_core.cache.working import WorkingCache

    plan = make_plan((24, 16, 64), 1041, torch.bfloat16, PublishedCacheConfig())
    layout = plan.layout
    assert layout.total == (1 + 4 + 4 + 2 + 2) * 1041  # what a chunk of 4 attends to: 13533 keys
    working = WorkingCache(layout, torch.bfloat16, torch.device('meta'))
    kept = layout.total - 4 * 1041  # between two chunks
    assert round(kept * plan.token_bytes / GIB, 3) == 0.858
    assert working.kv.nbytes == layout.total * plan.token_bytes


def reachable_bytes(*roots):
    """Measure the storage of every tensor that can be reached from objects, each once."""
    seen, stack, storages = set(), list(roots), {}
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, str)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (list, tuple, dict, set)) or hasattr(item, '__dict__'):
            stack += gc.get_referents(item)
    return sum(storages.values())


@pytest.mark.parametrize(
    ('max_bytes', 'retrieved'), [(0, 1), (500_000, 1), (2_000_000, 1), (500_000, -1)]
)
def test_300_frames_of_new_space_stay_within_the_budget(max_bytes, retrieved):
    camera = CameraCache(2, H, D, window=4, num_anchors=4)
    config = replace(SMALL, max_bytes=max_bytes, retrieved=retrieved)
    cache = make_cache(config, reserved=camera.capacity_bytes)
    budget = max_bytes or 23 * T * 2 * L * H * D * 4
    walk = Walk(cache)
    sizes, live = set(), []
    for _ in range(300):
        walk.step()
        sizes.add(cache.capacity_bytes)
        live.append(cache.num_bytes)
    assert len(sizes) == 1, 'storage changed its size'
    claimed = sizes.pop() + camera.capacity_bytes
    measured = reachable_bytes(cache, camera)
    assert 0.95 * measured <= claimed <= 1.05 * measured
    assert measured <= budget and claimed <= budget
    assert claimed > 0.9 * budget, 'most of the budget must be used'
    assert max(live[100:]) <= budget and min(live[100:]) > 0.4 * budget
    assert int(cache.pool.books.evicted) > 0
    assert int(cache.pool.voxels.count) <= cache.pool.voxels.capacity


@pytest.mark.parametrize('retrieved', [0, 1, -1])
def test_every_byte_of_the_cache_is_planned_and_claimed(retrieved):
    cache = make_cache(replace(SMALL, retrieved=retrieved))
    Walk(cache).run(5)
    assert reachable_bytes(cache) == cache.capacity_bytes == cache.plan.num_bytes


@pytest.mark.gpu
def test_the_allocator_of_a_gpu_agrees_with_the_books():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache = StacCache(24, 16, 64, 5, CacheConfig())
    for layer in range(24):
        k = torch.zeros(1, 16, 1041, 64, dtype=torch.bfloat16, device='cuda')
        cache.update(layer, k, k)
    del k
    measured = torch.cuda.memory_allocated() - before
    assert cache.capacity_bytes == pytest.approx(measured, rel=0.05)
    assert measured <= 23 * 1041 * 2 * 24 * 16 * 64 * 2


def test_coverage_outlives_a_long_walk():
    """Old places are thinned out, not forgotten: voxels remain along the whole way."""
    cache = make_cache(replace(SMALL, max_bytes=1_500_000, voxel_fraction=0.2))
    Walk(cache, speed=0.3).run(200)
    keys = cache.pool.voxels.keys
    from stream3r_core.cache.voxel_table import unpack

    depth = unpack(keys[keys < NOWHERE])[:, 2] * cache.voxel_size.edge
    quarters = torch.histc(depth.float(), 4, 0.0, float(depth.max()))
    assert (quarters > 0.1 * quarters.sum()).all(), quarters


def sides_of_voxels(cache):
    """Return for each voxel slot 1 right of the way, -1 left of it, 0 if free."""
    from stream3r_core.cache.voxel_table import unpack

    keys = cache.pool.voxels.key_of_slot()
    return torch.where(unpack(keys)[:, 0] >= 0, 1, -1).masked_fill(keys == NOWHERE, 0)


@pytest.mark.parametrize('retrieved', [1, -1])
def test_voxels_that_are_attended_to_outlive_others(retrieved):
    cache = make_cache(replace(SMALL, max_bytes=500_000, retrieved=retrieved))
    walk = Walk(cache)

    def look_right(layer, sums):
        if retrieved > 0:
            slots = cache.working.retrieved_slot[layer].long()
        else:
            slots = cache.pool.owner.unflatten(0, (L, H))[layer].long()
        is_right = (slots >= 0) & (sides_of_voxels(cache)[slots] > 0)
        hot = cache.plan.layout.hot
        if sums.shape[2] > hot:  # all that is retrieved
            sums[0, :, hot:] = 10.0 * is_right

    for _ in range(60):
        points, conf = walk.points(1)
        walk.step(points=(points, torch.full_like(conf, 2.0)), change_sums=look_right)
    sides = sides_of_voxels(cache)
    assert int(cache.pool.books.evicted) > 0
    assert (sides > 0).sum() > 2 * (sides < 0).sum()


def test_voxels_of_sure_points_outlive_others():
    cache = make_cache(replace(SMALL, max_bytes=500_000))
    walk = Walk(cache)
    for _ in range(60):
        points, _ = walk.points(1)
        walk.step(points=(points, torch.where(points[..., 0] > 0, 20.0, 2.0)))
    sides = sides_of_voxels(cache)
    assert int(cache.pool.books.evicted) > 0
    assert (sides > 0).sum() > 2 * (sides < 0).sum()


def test_what_speaks_for_a_voxel_fades_while_nobody_sees_or_asks_for_it():
    cache = make_cache(replace(SMALL, score='residual', max_bytes=3_000_000))  # nobody asks
    walk = Walk(cache, speed=50.0).run(8)
    keys, value = cache.pool.voxels.key_of_slot(), cache.pool.value.clone()
    walk.run(10)
    still_there = (cache.pool.voxels.key_of_slot() == keys) & (value > 0)
    assert still_there.any()
    assert (cache.pool.value[still_there] < 0.9 * value[still_there]).all()


def test_tokens_whose_row_is_full_wait_for_the_next_step():
    config = replace(SMALL, chunk_size=4, window=4, voxel_size=100.0, max_bytes=3_000_000)
    cache = make_cache(config)
    walk = Walk(cache)
    for _ in range(4):
        walk.step(4)
    waiting = (cache.pool.carried.key < NOWHERE).sum(1)
    assert (waiting >= T // 2).all()


def test_the_whole_pool_can_be_attended_to_where_it_is():
    """retrieved = -1 sees what a retrieval of everything sees, without the copy."""
    copied = make_cache(replace(SMALL, retrieved=9, max_bytes=4_000_000, voxel_fraction=0.3))
    in_place = make_cache(replace(SMALL, retrieved=-1, max_bytes=4_000_000, voxel_fraction=0.3))
    walks = [Walk(copied, speed=0.02), Walk(in_place, speed=0.02)]
    for _ in range(25):
        for walk in walks:
            walk.step()
    pools = [cache.pool for cache in (copied, in_place)]
    assert int(pools[0].num_tokens) == int(pools[1].num_tokens) > 0
    assert [int(x.books.evicted) for x in pools] == [0, 0]
    assert (pools[0].owner >= 0).sum(1).max() <= 9 * T, 'the copy must hold all'
    assert copied.num_tokens == in_place.num_tokens
    q = torch.randn(1, H, 4, D)
    answers = []
    for cache in (copied, in_place):
        cache.begin(1)
        k = torch.ones(1, H, T, D)
        answers.append(attend(q, *cache.update(0, k, k)))
    torch.testing.assert_close(*answers)


# ---- the host never waits for the device


@pytest.mark.parametrize('retrieved', [1, -1])
def test_a_steady_step_never_makes_the_host_wait(monkeypatch, retrieved):
    monkeypatch.setattr(merge, 'counted_on_host', lambda device: False)
    cache = make_cache(replace(SMALL, max_bytes=500_000, retrieved=retrieved))
    walk = Walk(cache).run(20)
    with forbid_waiting():
        walk.run(3)
    assert int(cache.pool.books.evicted) > 0


@pytest.mark.parametrize(
    'wait',
    [
        lambda x: x[[0, 1]],
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.ones(3)),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x.any()),
        lambda x: torch.allclose(x, x),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.linalg.inv(torch.eye(3)),
    ],
)
def test_forbid_waiting_notices_waiting(wait):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match='waits for the device'), forbid_waiting():
        wait(x)


# ---- the switches, each alone


def test_a_off_the_pool_grows_with_the_scene():
    bounded, growing = make_cache(), make_cache(replace(SMALL, bounded=False))
    for cache in (bounded, growing):
        Walk(cache).run(60)
    assert bounded.capacity_bytes <= SMALL.max_bytes < growing.capacity_bytes
    assert int(bounded.pool.books.evicted) > 0 == int(growing.pool.books.evicted)
    assert int(growing.pool.books.lost) == 0


def test_a_growing_pool_holds_what_a_large_one_would():
    small = replace(SMALL, bounded=False, max_bytes=1)
    large = replace(SMALL, bounded=False, max_bytes=30_000_000)
    caches = [make_cache(config) for config in (small, large)]
    for cache in caches:
        Walk(cache).run(40)
    a, b = (cache.pool for cache in caches)
    assert a.capacity < b.capacity and int(a.voxels.count) == int(b.voxels.count)
    for x, y in zip((a, b), (b, a)):
        assert int(x.num_tokens) == int(y.num_tokens)
    assert [int(x) for x in a.books] == [int(x) for x in b.books]


def test_b_retrieval_comes_right_after_eviction_by_query_and_late_by_weight():
    by_query, by_weight = make_cache(), make_cache(replace(SMALL, query_retrieval=False))
    first = {}
    for name, cache in (('query', by_query), ('weight', by_weight)):
        walk = Walk(cache)
        for frame in range(24):
            walk.step()
            if (cache.working.retrieved_slot >= 0).any():
                first.setdefault(name, frame)
    # Frame 3 pushes frame 1 out of the window, which fills the heavy hitters; frame 4 the next,
    # whose tokens are the first in the pool. Published: after frame 16, every second step.
    assert first == {'query': 4, 'weight': 17}


def test_d_voxels_follow_the_scale_of_the_scene():
    counts = {}
    for size, fraction in ((0.0, 0.05), (0.0, 0.0), (0.5, 0.0)):
        for scale in (1.0, 100.0):
            config = replace(SMALL, voxel_fraction=fraction, voxel_size=size, max_bytes=3_000_000)
            cache = make_cache(config)
            Walk(cache, scale=scale).run(9)
            counts[size, fraction, scale] = int(cache.pool.voxels.count)
    assert counts[0.0, 0.05, 1.0] == counts[0.0, 0.05, 100.0]
    assert counts[0.0, 0.0, 1.0] == counts[0.0, 0.0, 100.0] < counts[0.0, 0.05, 1.0]
    assert counts[0.5, 0.0, 1.0] < counts[0.5, 0.0, 100.0]


def test_d_by_default_a_voxel_is_a_little_wider_than_a_token():
    cache = make_cache(replace(SMALL, voxel_fraction=0.0))
    Walk(cache).step()
    place = cache.place[0]
    spacing = (place[1:] - place[:-1]).norm(dim=-1)
    assert 0.8 < float(cache.voxel_size.edge / spacing.nanmedian()) < 1.6


@pytest.mark.parametrize('options', [{}, {'voxel_fraction': 0.0}, {'guard_points': False}])
def test_d_frames_without_places_or_that_are_not_kept_say_nothing_of_the_voxel_size(options):
    config = replace(SMALL, chunk_size=2, max_bytes=3_000_000, **options)
    healthy, disturbed = make_cache(config), make_cache(config)
    walks = [Walk(cache, speed=0.0, scale=0.01) for cache in (healthy, disturbed)]
    points, conf = walks[0].points(2)
    walks[1].generator.set_state(walks[0].generator.get_state())
    for _ in range(4):  # longer than the window: these are dropped before any size is known
        disturbed_frames = torch.full_like(points[:1], torch.nan), torch.ones_like(conf[:1])
        walks[1].step(points=disturbed_frames)
    assert disturbed.voxel_size.edge.isnan() and int(disturbed.pool.voxels.count) == 0
    points[1] *= 100
    walks[1].step(2, keep=[True, False], points=(points, conf))
    walks[0].step(1, points=(points[:1], conf[:1]))
    for walk in walks:
        walk.run(9)
    torch.testing.assert_close(disturbed.voxel_size.edge, healthy.voxel_size.edge)
    assert int(disturbed.pool.voxels.count) == int(healthy.pool.voxels.count) > 4


def test_d_the_voxel_size_stays_what_it_was_when_the_first_tokens_were_stored():
    cache = make_cache()
    walk = Walk(cache).run(5)
    edge = cache.voxel_size.edge.clone()
    assert int(cache.pool.voxels.count) > 0
    walk.scale = 10.0
    walk.run(3)
    assert torch.equal(cache.voxel_size.edge, edge)


def test_e_the_weight_of_a_merged_token_is_capped_where_the_pool_is_seen_in_place():
    config = replace(SMALL, retrieved=-1, max_log_count=1.5, drop_gate=0.0)
    cache = make_cache(config)
    Walk(cache, speed=0.0).run(40)
    assert float(cache.pool.count[cache.pool.owner >= 0].log().max()) > 2.0
    assert float(cache.working.bias.max()) == pytest.approx(1.5)


def test_e_merged_keys_keep_their_norm_and_their_weight_is_capped():
    norms, weights = {}, {}
    for sound in (True, False):
        cache = make_cache(replace(SMALL, sound_merging=sound, max_log_count=2.1, drop_gate=0.0))
        Walk(cache, speed=0.0).run(60)
        merged = (cache.pool.count > 1) & (cache.pool.owner >= 0)
        norms[sound] = float(cache.pool.k[merged].norm(dim=-1).mean())
        weights[sound] = float(cache.working.bias.max())
    raw = float(torch.randn(1000, D).norm(dim=-1).mean())
    assert norms[True] == pytest.approx(raw, rel=0.05) and norms[False] < 0.8 * raw
    assert weights[True] == pytest.approx(2.1) and weights[False] > 2.5


def test_f_unsure_points_stay_out_of_the_pool():
    config = replace(SMALL, confidence_quantile=0.5)
    placeless = {}
    for guard in (True, False):
        cache = make_cache(replace(config, guard_points=guard))
        Walk(cache).run(20)
        books = cache.pool.books
        placeless[guard] = int(books.placeless) / int(books.came)
    assert placeless[False] == pytest.approx(SPECIAL / T, abs=0.02)
    assert placeless[True] == pytest.approx((SPECIAL + (T - SPECIAL) / 2) / T, abs=0.02)


@pytest.mark.parametrize('retrieved', [1, -1])
def test_values_of_nan_that_reached_the_pool_are_gone_after_a_reset(retrieved):
    config = replace(SMALL, heavy_hitters=0, retrieved=retrieved)
    cache, fresh = make_cache(config), make_cache(config)
    spoilt = Walk(cache)
    for _ in range(20):
        spoilt.step(value_scale=torch.nan)
    assert cache.pool.v.isnan().any() and spoilt.out.isnan().any()
    cache.reset()
    stores = cache.working.kv, cache.pool.k, cache.pool.v
    assert all(x.isfinite().all() for x in stores)
    got, expected = (Walk(c, seed=3).run(5).out for c in (cache, fresh))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('guard', [True, False])
def test_f_points_that_are_not_finite_have_no_place_and_poison_nothing(guard):
    cache = make_cache(replace(SMALL, guard_points=guard))
    walk = Walk(cache)
    for i in range(12):
        points, conf = walk.points(1)
        points[..., : 14 * (i % 4), :] = (torch.nan, torch.inf, 1.0)[i % 3]
        conf[..., -14 * (i % 3) - 1 :] = (torch.nan, torch.inf)[i % 2]
        walk.step(points=(points, conf))
    points, conf = walk.points(1)
    walk.step(points=(torch.full_like(points, torch.nan), torch.full_like(conf, torch.nan)))
    walk.run(4)
    pool, working = cache.pool, cache.working
    assert all(x.isfinite().all() for x in (pool.k, pool.v, working.kv, working.score))
    assert int(pool.num_tokens) > 0 and cache.voxel_size.edge > 0


def test_i_frames_that_are_not_kept_leave_no_trace():
    """Interleaved with such frames, a stream gives what it gives without them."""
    plain, interrupted = make_cache(), make_cache()
    clean = Walk(plain)
    other = Walk(interrupted, seed=5)
    mixed = Walk(interrupted)
    for i in range(12):
        clean.step()
        mixed.step()
        for _ in range(i % 3):
            other.step(keep=[False])
    assert plain.num_frames == interrupted.num_frames
    assert plain.num_bytes == interrupted.num_bytes
    for a, b in zip(plain.pool.tensors(), interrupted.pool.tensors()):
        assert torch.equal(a, b)
    assert torch.equal(plain.working.bias, interrupted.working.bias)


def test_i_a_chunk_may_be_kept_in_part():
    cache = make_cache(replace(SMALL, chunk_size=3, window=4, max_bytes=1_500_000))
    walk = Walk(cache)
    walk.step(3, keep=[True, False, True])
    assert cache.num_frames == 2 and cache.num_tokens == 2 * T
    walk.step(3, keep=[False] * 3)
    assert cache.num_frames == 2 and cache.num_tokens == 2 * T
    for _ in range(6):
        walk.step(3, keep=[False, True, True])
    assert cache.num_frames == 14 and len(cache.working.slots.slot_of) == 1 + 4


# ---- other options


def test_fewer_queries_estimate_the_scores():
    config = replace(SMALL, query_fraction=0.25)
    assert make_cache(config).query_fraction == 0.25


def test_points_are_asked_for_when_they_are_missing():
    cache = make_cache()
    for layer in range(L):
        k = torch.randn(1, H, T, D)
        cache.record(layer, torch.ones(1, H, T), k) if cache.update(layer, k, k) else None
    with pytest.raises(CacheError, match='point head'):
        cache.commit(1)
    cache.rollback()
    Walk(cache).run(3)


@pytest.mark.parametrize(
    'config',
    [SMALL, PAPER, replace(SMALL, chunk_size=4, max_bytes=0), replace(SMALL, retrieved=-1)],
)
def test_the_same_stream_twice_gives_the_same_bits(config):
    first, again, other = (all_bits(config, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def all_bits(config, seed):
    """Return all tensors of a cache after a walk; NaN, which equals nothing, as a number."""
    cache = make_cache(config)
    Walk(cache, seed).run(25)
    return [x.nan_to_num(7.0) for x in cache.tensors()]


# ---- the camera head's cache


def camera_run(cache, num_frames, chunk=1):
    for i in range(0, num_frames, chunk):
        cache.begin(chunk)
        for layer in range(2):
            k = (torch.arange(i, i + chunk) + 1.0)[None, None, :, None].expand(1, H, -1, D)
            seen = cache.update(layer, k, k)
        cache.commit(chunk)
    live = seen.bias[0, 0, 0] == 0
    return sorted((seen.k[0, 0, live, 0] - 1).long().tolist())


def test_camera_cache_keeps_pinned_recent_and_spaced_frames():
    seen = camera_run(CameraCache(2, H, D, window=3, num_anchors=4), 200)
    anchors = [f for f in seen if 0 < f < 197]
    assert seen == [0, *anchors, 197, 198, 199]
    assert 2 <= len(anchors) <= 4 and len({b - a for a, b in itertools.pairwise(anchors)}) == 1
    assert anchors[-1] - anchors[0] > 90


@pytest.mark.parametrize('chunk', [1, 4])
def test_camera_cache_is_bounded_and_spans_the_stream(chunk):
    cache = CameraCache(2, H, D, window=4, num_anchors=5, chunk_size=chunk)
    size = cache.capacity_bytes
    for _ in range(10):
        camera_run(cache, 100, chunk)
        assert cache.capacity_bytes == size
        assert cache.num_tokens <= 1 + 4 + 5
    assert cache.num_bytes == cache.num_tokens * 2 * 2 * H * D * 4


def test_camera_cache_can_be_rolled_back_and_reset():
    cache = CameraCache(2, H, D, window=3, num_anchors=2)
    camera_run(cache, 7)
    before = cache.bias.clone()
    cache.begin(1)
    cache.update(0, torch.ones(1, H, 1, D), torch.ones(1, H, 1, D))
    cache.rollback()
    assert torch.equal(cache.bias, before)
    cache.reset()
    assert cache.num_tokens == cache.num_bytes == 0
    assert camera_run(cache, 2) == [0, 1]
