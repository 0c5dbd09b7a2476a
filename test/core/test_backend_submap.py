"""Submaps and the atlas: merging keeps what was seen, budgets hold, changes are told once."""

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.atlas import Atlas, evenly_spaced
from stream3r_core.backend.config import SubmapConfig
from stream3r_core.backend.submap import NO_STAMP, Submap, thin_cloud
from stream3r_core.mapping import MapCloud


def cloud(rng, count, low=0.0, high=1.0):
    points = rng.uniform(low, high, (count, 3)).astype(np.float32)
    colors = rng.integers(0, 255, (count, 3)).astype(np.uint8)
    return MapCloud(points, colors, np.full(count, 2.0, np.float32))


def closed(key, rng, count=200, frames=range(5), voxel_size=0.01):
    submap = Submap(key)
    poses = sim3.rigid_of(sim3.exp(rng.standard_normal((len(frames), 7))))
    submap.restore(
        [(100 * key + f, NO_STAMP, T) for f, T in zip(frames, poses)],
        cloud(rng, count),
        voxel_size,
    )
    return submap


def test_thinning_averages_by_confidence_within_voxels():
    points = np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [1.5, 0, 0]], np.float32)
    colors = np.array([[0, 0, 0], [200, 100, 0], [9, 9, 9]], np.uint8)
    thin = thin_cloud(MapCloud(points, colors, np.array([1, 3, 2], np.float32)), 1.0)
    order = np.argsort(thin.points_xyz[:, 0])
    np.testing.assert_allclose(thin.points_xyz[order], [[0.25, 0.1, 0.1], [1.5, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(thin.colors_rgb[order], [[150, 75, 0], [9, 9, 9]])
    np.testing.assert_allclose(thin.confidence[order], [2, 2])


@pytest.mark.parametrize('voxel_size', [0.0, 1e-4, 0.05])
@pytest.mark.parametrize('budget', [1, 50, 150])
def test_coarsening_reaches_its_budget_and_keeps_the_extent(voxel_size, budget):
    submap = closed(0, np.random.default_rng(0), voxel_size=voxel_size)
    submap.coarsen(budget)
    assert 0 < submap.num_points <= budget
    assert (submap.cloud.points_xyz >= 0).all() and (submap.cloud.points_xyz <= 1).all()
    assert submap.num_points >= min(budget, 50) / 4


def test_absorbing_leaves_every_pose_and_point_where_it_was():
    rng = np.random.default_rng(1)
    first, second = closed(0, rng), closed(1, rng)
    S = sim3.exp(0.5 * rng.standard_normal(7))
    poses = np.concatenate([first.T_submap_camera, sim3.rigid_of(S @ second.T_submap_camera)])
    points = np.concatenate([first.cloud.points_xyz, sim3.act(S, second.cloud.points_xyz)])
    first.voxel_size = second.voxel_size = 1e-5
    first.absorb(second, S)
    np.testing.assert_allclose(first.T_submap_camera, poses)
    np.testing.assert_array_equal(first.frame_ids, [*range(5), *range(100, 105)])
    got, expected = (p[np.lexsort(p.T)] for p in (first.cloud.points_xyz, points))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_point_budget_takes_from_the_largest_and_tells_it():
    rng = np.random.default_rng(2)
    atlas = Atlas(SubmapConfig(max_points=1000))
    for key, count in enumerate((300, 900, 400)):
        atlas.add(closed(key, rng, count), np.eye(4))
    version = atlas.version
    atlas.thin()
    assert atlas.num_points <= 1000
    assert atlas.submaps[0].num_points == 300
    change = atlas.changed_since(version)
    assert 1 in change.rows and 0 not in change.rows
    np.testing.assert_array_equal(change.gone[1], np.arange(atlas.submaps[1].num_points, 900))


def test_thinning_again_and_again_leaves_all_of_the_way_known():
    numbers = []
    for number in range(3000):
        numbers.append(number)
        numbers = sorted(evenly_spaced(numbers, budget=100) or numbers)
    assert len(numbers) <= 100
    tenths, _ = np.histogram(numbers, 10, (0, 3000))
    assert tenths.min() >= 5, tenths


def test_thinning_leaves_the_newest_half_of_the_poses_whole_and_the_older_ones_spread():
    atlas, rng = Atlas(SubmapConfig(max_poses=100)), np.random.default_rng(6)
    added = np.zeros(0, int)
    for key in range(40):
        atlas.add(closed(key, rng, 5, range(10)), np.eye(4))
        added = np.append(added, atlas.submaps[key].frame_ids)
        atlas.thin()
        frame_ids, _, poses = atlas.trajectory()
        np.testing.assert_array_equal(frame_ids[-50:], added[-50:])
        newest = atlas.trajectory(newest=13)
        assert len(newest[0]) <= 13
        np.testing.assert_array_equal(newest[0], frame_ids[-13:])
        np.testing.assert_array_equal(newest[2], poses[-13:])
    assert len(frame_ids) <= 100
    thirds, _ = np.histogram(frame_ids[:-50], 3, (0, added[-50]))
    assert thirds.min() >= 9, thirds


def test_surplus_folds_the_shortest_neighbours_and_never_the_newest():
    rng = np.random.default_rng(3)
    atlas = Atlas(SubmapConfig(max_submaps=9))
    for key in range(10):
        atlas.add(closed(key, rng, 10, range(3 if key in (4, 5) else 9)), np.eye(4))
    pairs = atlas.surplus(10)
    assert (5, 4) in pairs and len(pairs) == 2
    assert all(9 not in pair for pair in pairs)
    assert len({key for pair in pairs for key in pair}) == 4


def test_changes_name_what_moved_what_grew_and_what_went():
    rng = np.random.default_rng(4)
    atlas = Atlas()
    for key in range(3):
        atlas.add(closed(key, rng), np.eye(4))
    everything = atlas.changed_since(-1)
    assert list(everything.rows) == [0, 1, 2] and everything.is_complete
    nothing = atlas.changed_since(everything.version)
    assert not (nothing.rows or nothing.gone or nothing.is_complete)
    shifted = sim3.exp(np.array([0, 0, 0, 1.0, 0, 0, 0]))
    assert atlas.place({0: np.eye(4), 1: shifted, 2: np.eye(4) + 1e-7})
    moved = atlas.changed_since(everything.version)
    assert list(moved.rows) == [1] and not len(moved.gone[1]) and atlas.num_moves == 1
    assert not atlas.place({0: np.eye(4), 1: shifted})
    atlas.fold(2, 1, np.eye(4))
    folded = atlas.changed_since(moved.version)
    assert list(folded.rows) == [1]
    np.testing.assert_array_equal(folded.gone[2], everything.rows[2].numbers)


def test_a_consumer_that_slept_too_long_gets_everything():
    rng = np.random.default_rng(5)
    atlas = Atlas(SubmapConfig(max_submaps=2))
    for key in range(8):
        atlas.add(closed(key, rng, 5), np.eye(4))
    version = atlas.version
    for key in range(1, 6):
        atlas.fold(key, 0, np.eye(4))
    change = atlas.changed_since(version)
    assert list(change.rows) == [0, 6, 7] and change.is_complete
