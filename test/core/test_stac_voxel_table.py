"""The voxel table against a plain dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream3r_core.cache.voxel_table import NOWHERE, OFFSET, RIM, VoxelTable, cell_of, pack, unpack

CPU = torch.device('cpu')


def random_keys(generator, n, span=4):
    cells = torch.randint(-span, span, (n, 3), generator=generator)
    keys = pack(cells)
    keys[torch.rand(n, generator=generator) < 0.1] = NOWHERE
    return keys


def as_dict(table):
    count = int(table.count)
    assert (table.keys[1:] >= table.keys[:-1]).all()
    assert sorted(table.slots.tolist()) == list(range(table.capacity))
    return dict(zip(table.keys[:count].tolist(), table.slots[:count].tolist()))


def test_packing_is_reversible_and_orders_cells_by_x_then_y_then_z():
    edge = OFFSET - 1 - RIM
    cells = torch.tensor([[-edge, 0, 5], [-1, edge, -edge], [-1, edge, -edge + 1], [0, -edge, 0]])
    keys = pack(cells)
    assert torch.equal(unpack(keys), cells)
    assert (keys.diff() > 0).all() and (keys > 0).all()


def test_points_that_are_not_finite_get_a_cell_within_reach():
    points = torch.tensor([[torch.nan, torch.inf, -torch.inf], [0.06, -0.01, 1e30]])
    cells = cell_of(points, 0.05)
    assert cells[1, :2].tolist() == [1, -1]
    assert cells.abs().max() <= OFFSET - RIM
    assert torch.equal(unpack(pack(cells)), cells)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), capacity=st.integers(1, 60))
def test_adding_and_removing_equals_a_dictionary(seed, capacity):
    generator = torch.Generator().manual_seed(seed)
    table, expected = VoxelTable(capacity, CPU), {}
    for _ in range(6):
        keys = random_keys(generator, 40)
        new = table.unseen(keys)
        missing = sorted(set(keys.tolist()) - set(expected) - {NOWHERE})
        assert new[new < NOWHERE].tolist() == missing[:capacity]
        table.add(new)
        added = missing[: capacity - len(expected)]
        got = as_dict(table)
        assert set(got) == set(expected) | set(added)
        assert {k: got[k] for k in expected} == expected, 'a live voxel changed its slot'
        expected = got
        assert table.lookup(keys).tolist() == [expected.get(k, -1) for k in keys.tolist()]
        gone = torch.rand(capacity, generator=generator) < 0.3
        table.remove(gone)
        expected = {k: s for k, s in expected.items() if not gone[s]}
        assert as_dict(table) == expected
        by_slot = table.key_of_slot()
        assert {int(by_slot[s]): s for s in expected.values()} == expected
        assert int((by_slot == NOWHERE).sum()) == capacity - len(expected)


@pytest.mark.parametrize('radius', [0, 1, 2])
def test_the_neighbourhood_is_the_chebyshev_ball(radius):
    generator = torch.Generator().manual_seed(radius)
    table = VoxelTable(500, CPU)
    table.add(table.unseen(random_keys(generator, 400, span=6)))
    queries = random_keys(generator, 7, span=6)
    near = table.near(queries, radius)
    centres = unpack(queries[queries < NOWHERE])
    for key, slot in as_dict(table).items():
        distance = (unpack(torch.tensor(key)) - centres).abs().amax(1).min()
        assert near[slot] == (distance <= radius)
    assert int(near.sum()) <= int(table.count)


def test_nothing_is_near_when_no_query_has_a_place():
    table = VoxelTable(4, CPU)
    table.add(table.unseen(torch.tensor([5, 6])))
    assert not table.near(torch.full((3,), NOWHERE), 2).any()


def test_clear_frees_every_slot():
    table = VoxelTable(4, CPU)
    table.add(table.unseen(torch.tensor([9, 7, 8])))
    table.clear()
    assert as_dict(table) == {}
