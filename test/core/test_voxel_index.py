import numpy as np
import pytest

from stream3r_core.mapping.voxel_index import CELL_LIMIT, VoxelIndex, group_keys, pack_cells


def test_keys_are_distinct_for_distinct_cells_up_to_the_limit():
    edge = CELL_LIMIT - 1
    cells = np.array(np.meshgrid(*[[-edge, -1, 0, 1, edge]] * 3)).reshape(3, -1).astype(np.float32)
    keys = pack_cells(cells)
    assert len(np.unique(keys)) == 125 and (keys >= 0).all()


@pytest.mark.parametrize('count', [1, 2, 3, 1000, 4096, 4097])
@pytest.mark.parametrize('distinct', [1, 7, 10_000])
def test_groups_are_those_of_sorting(count, distinct):
    keys = np.random.default_rng(count).integers(0, distinct, count) << 30
    members, groups = group_keys(keys)
    assert np.array_equal(keys[members][groups], keys)
    assert np.array_equal(np.sort(keys[members]), np.unique(keys))


@pytest.mark.parametrize('capacity', [1, 2, 5, 300])
def test_the_index_answers_like_a_dictionary(capacity):
    """Random insertions and removals; few buckets, so that chains are long."""
    rng = np.random.default_rng(capacity)
    index, truth = VoxelIndex(capacity), {}
    alphabet = rng.integers(0, 1 << 62, 3 * capacity)
    for _ in range(200):
        absent = np.setdiff1d(alphabet, list(truth))
        free = np.setdiff1d(np.arange(capacity), list(truth.values()))
        count = rng.integers(0, len(free) + 1)
        keys = rng.permutation(absent)[:count]
        slots = rng.permutation(free)[:count]
        index.insert(keys, slots)
        truth.update(zip(keys.tolist(), slots.tolist()))
        expected = [truth.get(key, -1) for key in alphabet.tolist()]
        assert index.find(alphabet).tolist() == expected
        gone = rng.permutation(list(truth))[: rng.integers(0, len(truth) + 1)].astype(np.int64)
        index.remove(np.array([truth.pop(key) for key in gone.tolist()], np.int64))
        expected = [truth.get(key, -1) for key in alphabet.tolist()]
        assert index.find(alphabet).tolist() == expected
