"""The token pool against plain dictionaries of rows, its books and its bounds."""

import pytest
import torch
from allocations import peak_bytes

from stream3r_core.cache import retrieval
from stream3r_core.cache.token_pool import Dropped, TokenPool
from stream3r_core.cache.voxel_table import NOWHERE, pack
from stream3r_core.kernels import merge
from stream3r_core.kernels.merge import MergeRule
from stream3r_core.kernels.merge_reference import Row, Token, update_row

CPU = torch.device('cpu')
G, D = 3, 4
RULE = MergeRule(buffer_size=4, num_pivots=2, absorb_threshold=0.8, drop_gate=0.5)


def make_pool(num_tokens=400, num_voxels=40, carry=30, rule=RULE, device=CPU):
    return TokenPool(G, num_tokens, num_voxels, D, rule, carry, torch.float32, device)


def random_drop(generator, n, span=2, spread=0.3, offset=0):
    centres = torch.randn(4, D, generator=torch.Generator().manual_seed(7))
    pick = torch.randint(4, (G, n), generator=generator)
    k = centres[pick] + spread * torch.randn(G, n, D, generator=generator)
    cells = torch.randint(-span, span, (G, n, 3), generator=generator) + offset
    key = pack(cells)
    key[torch.rand(G, n, generator=generator) < 0.1] = NOWHERE
    return Dropped(
        k,
        torch.randn(G, n, D, generator=generator),
        torch.rand(G, n, generator=generator),
        key,
    )


def row_of(pool, group, slot):
    """Return (pivot keys, buffer scores) of one row, read from the storage."""
    index = pool.table[group, slot].long()
    P = pool.rule.num_pivots
    pivots = [i for i in index[:P].tolist() if i >= 0]
    buffer = [i for i in index[P:].tolist() if i >= 0]
    return pool.k[group, pivots], pool.count[group, pivots], pool.score_sum[group, buffer]


def assert_consistent(pool):
    """Check table and store against each other: every live token slot belongs to one row."""
    for g in range(G):
        for slot in range(pool.voxels.capacity):
            held = pool.table[g, slot]
            held = held[held >= 0].long()
            assert (pool.owner[g, held] == slot).all()
        in_rows = pool.table[g, :-1]
        in_rows = in_rows[in_rows >= 0].tolist()
        assert len(set(in_rows)) == len(in_rows)
        assert len(in_rows) == int((pool.owner[g, :-1] >= 0).sum())
    assert (pool.table[:, -1] == -1).all() and (pool.owner[:, -1] == -1).all()


def assert_books_balance(pool):
    live = pool.owner[:, :-1] >= 0
    held = pool.count[:, :-1][live].sum() + (pool.carried.key < NOWHERE).sum()
    gone = sum(int(x) for x in pool.books[1:])
    assert int(pool.books.came) == int(held) + gone


def test_pool_equals_dictionaries_of_rows():
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(num_voxels=70)
    rows = [{} for _ in range(G)]
    carried = [{} for _ in range(G)]
    overflowed = 0
    for _ in range(8):
        drop = random_drop(generator, 60)
        pool.insert(drop)
        for g in range(G):
            arrived = {}
            for i, key in enumerate(drop.key[g].tolist()):
                if key != NOWHERE:
                    token = Token(drop.k[g, i], drop.v[g, i], drop.score[g, i].item())
                    arrived.setdefault(key, []).append(token)
            for key in arrived.keys() | carried[g].keys():
                offered = arrived.get(key, []) + carried[g].get(key, [])
                rows[g][key], rest, _ = update_row(rows[g].get(key, Row()), offered, RULE)
                carried[g][key] = rest
                overflowed += len(rest)
        assert_consistent(pool)
        assert_books_balance(pool)
        for g in range(G):
            live = {key: row for key, row in rows[g].items() if row.pivots or row.buffer}
            for key, row in live.items():
                keys, counts, scores = row_of(pool, g, int(pool.voxels.lookup(torch.tensor(key))))
                expected = torch.stack([p.key for p in row.pivots]) if row.pivots else keys[:0]
                torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-4)
                assert counts.tolist() == [p.count for p in row.pivots]
                assert scores.tolist() == pytest.approx([t.score for t in row.buffer])
            waiting = sorted(pool.carried.score[g][pool.carried.key[g] < NOWHERE].tolist())
            assert waiting == pytest.approx(
                sorted(t.score for tokens in carried[g].values() for t in tokens)
            )
    assert overflowed > 0 and int(pool.books.below_gate) > 0
    assert int(pool.books.lost) == int(pool.books.evicted) == 0


@pytest.mark.parametrize(
    ('num_tokens', 'num_voxels', 'carry'), [(25, 40, 30), (400, 6, 5), (8, 4, 0)]
)
def test_a_full_pool_stays_consistent_and_its_books_balance(num_tokens, num_voxels, carry):
    generator = torch.Generator().manual_seed(1)
    pool = make_pool(num_tokens, num_voxels, carry)
    shapes = [x.shape for x in pool.tensors()]
    for step in range(10):
        pool.insert(random_drop(generator, 40, offset=step))
        assert_consistent(pool)
        assert_books_balance(pool)
        assert int(pool.voxels.count) <= num_voxels
    assert int(pool.books.evicted) > 0
    assert [x.shape for x in pool.tensors()] == shapes


def test_a_pool_of_plenty_loses_nothing_when_the_scene_moves_on():
    generator = torch.Generator().manual_seed(2)
    pool = make_pool(num_tokens=2000, num_voxels=1200, carry=100)
    for step in range(10):
        pool.insert(random_drop(generator, 40, offset=3 * step))
    assert int(pool.books.evicted) == int(pool.books.lost) == 0


def test_eviction_thins_crowded_places_before_it_empties_any():
    pool = make_pool(num_voxels=20)

    def drop(cells):
        key = pack(torch.tensor(cells)).expand(G, -1)
        n = key.shape[1]
        generator = torch.Generator().manual_seed(len(cells))
        k = torch.randn(G, n, D, generator=generator)
        pool.insert(Dropped(k, k, torch.ones(G, n), key))

    crowded = [(0, 0, z % 4) if z < 4 else (0, 1 + z // 8, z % 4) for z in range(12)]
    lonely = [(100 * i, 0, 0) for i in range(1, 7)]
    drop(sorted(set(crowded)) + lonely)
    pool.value[pool.voxels.lookup(pack(torch.tensor(crowded)))] = 5.0  # crowded, but valued
    drop([(1000 * i, 0, 0) for i in range(1, 9)])
    assert (pool.voxels.lookup(pack(torch.tensor(lonely))) >= 0).all()
    assert (pool.voxels.lookup(pack(torch.tensor(crowded))) >= 0).any()


def test_a_row_without_room_goes_in_the_full_group_only():
    pool = make_pool(num_tokens=6, num_voxels=40)
    far = pack(torch.arange(6)[:, None] * 100 * torch.ones(3, dtype=torch.int64))
    key = far.expand(G, -1).clone()
    key[1:, 2:] = NOWHERE  # groups 1 and 2 have room left
    k = torch.randn(G, 6, D, generator=torch.Generator().manual_seed(0))
    pool.insert(Dropped(k, k, torch.ones(G, 6), key))
    more = pack(torch.tensor([[7000, 0, 0]])).expand(G, 1)
    pool.insert(Dropped(k[:, :1], k[:, :1], torch.ones(G, 1), more))
    assert (pool.owner[:, :-1] >= 0).sum(1).tolist() == [6, 3, 3]
    assert int(pool.books.evicted) == 1


def filled_pool(device=CPU):
    pool = make_pool(num_tokens=300, num_voxels=60, device=device)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        pool.insert(Dropped(*(x.to(device) for x in random_drop(generator, 60))))
    return pool


def assert_same_pool(a, b):
    stores = ('k', 'v', 'weight', 'score_sum', 'count', 'owner')
    for name in stores:  # without the slot for what is dropped
        torch.testing.assert_close(getattr(a, name)[:, :-1], getattr(b, name)[:, :-1].to(CPU))
    assert torch.equal(a.table, b.table.to(CPU))
    assert torch.equal(a.voxels.keys, b.voxels.keys.to(CPU))
    assert [int(x) for x in a.books] == [int(x) for x in b.books]


def test_retrieval_by_query_returns_what_an_exhaustive_search_ranks_highest():
    pool = filled_pool()
    near = torch.zeros(60, dtype=torch.bool)
    near[:20] = True
    query = torch.randn(G, D, generator=torch.Generator().manual_seed(5))
    rank = retrieval.rank_by_query(pool, query, near, max_log_count=1.0)
    got = retrieval.retrieve(pool, rank, 25, max_log_count=1.0)
    for g in range(G):
        wanted = []
        for i in range(pool.capacity):
            owner, count = int(pool.owner[g, i]), float(pool.count[g, i])
            if owner >= 0:
                log_count = min(torch.tensor(count).log().item(), 1.0)
                tier = (1 + (count > 1)) if owner < 20 else 0
                wanted.append((tier, float(pool.k[g, i] @ query[g]) / 2 + log_count, i, log_count))
        wanted = sorted(wanted, reverse=True)[:25]
        assert len({tier for tier, *_ in wanted}) > 1, 'the data must top up'
        torch.testing.assert_close(got.k[g], pool.k[g, [i for *_, i, _ in wanted]])
        torch.testing.assert_close(got.v[g], pool.v[g, [i for *_, i, _ in wanted]])
        assert got.bias[g].tolist() == pytest.approx([bias for *_, bias in wanted])


def test_published_retrieval_takes_the_heaviest_pivots_then_the_best_buffered_tokens():
    pool = filled_pool()
    near = torch.zeros(60, dtype=torch.bool)
    near[:6] = True
    got = retrieval.retrieve(pool, retrieval.rank_by_weight(pool, near), 60, torch.inf)
    for g in range(G):
        owner = pool.owner[g, :-1]
        local = (owner >= 0) & (owner < 6)
        pivots = [i for i in local.nonzero().flatten().tolist() if pool.count[g, i] > 1]
        buffered = [i for i in local.nonzero().flatten().tolist() if pool.count[g, i] == 1]
        pivots.sort(key=lambda i: -float(pool.weight[g, i]))
        buffered.sort(key=lambda i: -float(pool.score_sum[g, i]))
        expected = pivots + buffered
        assert pivots and buffered and len(expected) < 60
        torch.testing.assert_close(got.k[g, : len(expected)], pool.k[g, expected])
        assert got.bias[g, len(expected) :].isneginf().all()
        assert (got.slot[g, len(expected) :] == -1).all()


def test_insertion_does_not_depend_on_the_tiling_of_the_groups(monkeypatch):
    whole = filled_pool()
    monkeypatch.setattr(TokenPool, '_groups_per_tile', lambda self, n: 1)
    tiled = filled_pool()
    assert_same_pool(whole, tiled)


@pytest.mark.parametrize('counted_on_host', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_workspace_of_a_step_stays_within_its_tile(dtype, counted_on_host, monkeypatch):
    monkeypatch.setattr(merge, 'counted_on_host', lambda device: counted_on_host)
    groups, width, n, carry, generator = 8, 64, 200, 24, torch.Generator().manual_seed(0)
    pool = TokenPool(
        groups, 1500, 700, width, MergeRule(), carry, dtype, CPU, tile_bytes=1 << 24
    )  # fmt: skip

    def drop():
        k, v = torch.randn(2, groups, n, width, generator=generator).to(dtype)
        key = pack(torch.randint(-6, 6, (groups, n, 3), generator=generator))
        return Dropped(k, v, torch.rand(groups, n, generator=generator), key)

    pool.insert(drop())
    pool.insert(drop())
    tokens = drop()
    assert 1 < pool._groups_per_tile(n + carry) < groups
    arriving = 2 * groups * (n + carry) * width * dtype.itemsize
    assert peak_bytes(lambda: pool.insert(tokens)) <= pool.tile_bytes + 1.2 * arriving
    pool.tile_bytes = 3 * 1500 * (4 * width + 48)  # three groups
    near, query = torch.ones(700, dtype=torch.bool), torch.randn(groups, width)
    ranks = 2 * 4 * groups * 1500
    peak = peak_bytes(lambda: retrieval.rank_by_query(pool, query, near, 3.0))
    assert peak <= pool.tile_bytes + ranks


def test_upper_bounds_on_shapes_as_a_gpu_uses_them_give_the_same_pool(monkeypatch):
    """Shapes that know nothing of the data, as on a GPU, must not change the result."""
    expected = filled_pool()
    monkeypatch.setattr(merge, 'counted_on_host', lambda device: False)
    got = filled_pool()
    assert_same_pool(expected, got)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_pool_without_ever_making_the_host_wait():
    filled_pool('cuda')  # compiles and allocates
    torch.cuda.set_sync_debug_mode('error')
    try:
        pool = make_pool(num_tokens=300, num_voxels=60, device='cuda')
        generator = torch.Generator().manual_seed(4)
        drops = [random_drop(generator, 60) for _ in range(5)]
        torch.cuda.set_sync_debug_mode('default')
        drops = [Dropped(*(x.cuda() for x in drop)) for drop in drops]
        torch.cuda.set_sync_debug_mode('error')
        for drop in drops:
            pool.insert(drop)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert_same_pool(filled_pool(), pool)


def test_a_pool_can_live_in_a_part_of_the_working_memory():
    plain, generator = filled_pool(), torch.Generator().manual_seed(4)
    home = torch.zeros(2, G, 7 + 300 + 1, D)
    home[:, :, :7] = 5.0
    guest = TokenPool(G, 300, 60, D, RULE, 30, torch.float32, CPU, home)
    for _ in range(5):
        guest.insert(random_drop(generator, 60))
    assert_same_pool(plain, guest)
    assert (home[:, :, :7] == 5.0).all()
    assert sum(x.nbytes for x in plain.tensors()) - plain.k.nbytes - plain.v.nbytes == sum(
        x.nbytes for x in guest.tensors()
    )


def test_clear_forgets_everything_and_keeps_the_storage():
    pool = filled_pool()
    where = [x.data_ptr() for x in pool.tensors()]
    pool.clear()
    assert int(pool.num_tokens) == 0 and int(pool.voxels.count) == 0
    assert [x.data_ptr() for x in pool.tensors()] == where
    fresh, generator = make_pool(num_tokens=300, num_voxels=60), torch.Generator().manual_seed(9)
    drop = random_drop(generator, 50)
    pool.insert(drop)
    fresh.insert(drop)
    assert torch.equal(pool.count * (pool.owner >= 0), fresh.count * (fresh.owner >= 0))
