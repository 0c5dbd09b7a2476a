import dataclasses
import itertools
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from stream3r_core.config import MappingConfig
from stream3r_core.errors import InputError
from stream3r_core.geometry import quat_xyzw_to_matrix, unproject_to_world
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import VoxelMap
from stream3r_core.mapping.cloud import BLOCK_POINTS
from stream3r_core.mapping.filters import value_of_rank
from stream3r_core.mapping.voxel_index import CELL_LIMIT
from stream3r_core.types import FramePrediction

HEIGHT, WIDTH = 48, 64
GEOMETRY = ImageGeometry((HEIGHT, WIDTH), (HEIGHT, WIDTH), (1.0, 1.0), (0, 0))
K = torch.tensor([[40.0, 0, WIDTH / 2], [0, 40, HEIGHT / 2], [0, 0, 1]])
LOW, HIGH = np.array([-2.03, -1.22, -3.11]), np.array([2.17, 1.31, 2.87])  # walls of a room
EVERYTHING = MappingConfig(
    voxel_size=0.1, min_confidence=1.0, confidence_quantile=0.0, edge_ratio=0.0
)


def prediction(depth, T_world_camera=None, confidence=None, rgb=None, **fields):
    depth = torch.as_tensor(depth, dtype=torch.float32)
    return FramePrediction(
        index=0,
        stamp_ns=0,
        T_world_camera=torch.eye(4) if T_world_camera is None else T_world_camera,
        K=K,
        rgb=torch.full((*depth.shape, 3), 128, dtype=torch.uint8) if rgb is None else rgb,
        depth=depth,
        depth_conf=torch.full(depth.shape, 4.0) if confidence is None else confidence,
        geometry=GEOMETRY,
        **{'world_points': None, 'world_points_conf': None, **fields},
    )


def room_view(rng, shift=0.0):
    """Exact depth of the inside of the room, from a random pose inside it."""
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = quat_xyzw_to_matrix(torch.from_numpy(rng.normal(size=4)))
    T[:3, 3] = torch.from_numpy(rng.uniform(LOW * 0.6, HIGH * 0.6))
    ones = torch.ones(HEIGHT, WIDTH, dtype=torch.float64)
    origin = T[:3, 3].numpy()
    rays = unproject_to_world(ones, K.double(), T).numpy() - origin  # depth 1 along the axis
    with np.errstate(divide='ignore'):
        to_walls = np.where(rays > 0, (HIGH - origin) / rays, (LOW - origin) / rays)
    T[0, 3] += shift
    return prediction(to_walls.min(-1), T.float())


def distance_to_walls(points):
    return np.minimum(np.abs(points - LOW), np.abs(points - HIGH)).min(1)


def contents(voxel_map):
    """Voxel id -> row of everything the map knows."""
    change = voxel_map.changed_since(-1)
    rows = np.column_stack(
        [change.points_xyz, change.colors_rgb, change.confidence, change.weight]
    )
    return dict(zip(change.voxel_ids.tolist(), rows))


def test_true_depth_and_poses_put_every_point_on_a_wall():
    rng = np.random.default_rng(0)
    voxel_map = VoxelMap(EVERYTHING)
    for _ in range(40):
        voxel_map.integrate(room_view(rng))
    cloud = voxel_map.points()
    assert len(cloud) == voxel_map.num_points > 5000
    assert (cloud.points_xyz > LOW - 1e-4).all() and (cloud.points_xyz < HIGH + 1e-4).all()
    distance = distance_to_walls(cloud.points_xyz)
    assert distance.max() <= 0.05 + 1e-4  # half a voxel, where walls meet
    assert np.mean(distance < 1e-4) > 0.9
    # Every part of every wall is there: no gap wider than two voxels.
    for axis, wall in itertools.product(range(3), (LOW, HIGH)):
        on_wall = np.abs(cloud.points_xyz[:, axis] - wall[axis]) < 0.05
        others = [i for i in range(3) if i != axis]
        cells = np.floor((cloud.points_xyz[on_wall][:, others] - LOW[others]) / 0.2).astype(int)
        expected = np.prod(np.floor((HIGH - LOW)[others] / 0.2))
        assert len(np.unique(cells, axis=0)) >= expected


def test_the_map_holds_each_voxel_once():
    rng = np.random.default_rng(1)
    voxel_map = VoxelMap(EVERYTHING)
    for _ in range(10):
        voxel_map.integrate(room_view(rng))
    change = voxel_map.changed_since(-1)
    assert len(np.unique(change.voxel_ids)) == voxel_map.num_points
    cells = np.stack([change.voxel_ids >> 42, change.voxel_ids >> 21, change.voxel_ids], 1)
    centres = ((cells & (2 * CELL_LIMIT - 1)) - CELL_LIMIT + 0.5) * 0.1
    assert np.abs(change.points_xyz - centres).max() <= 0.05 + 1e-5
    same = room_view(np.random.default_rng(2))
    voxel_map.integrate(same)
    grown = voxel_map.num_points
    for _ in range(5):
        voxel_map.integrate(same)
    assert voxel_map.num_points == grown >= len(centres)


def test_the_order_of_the_frames_does_not_matter():
    views = [room_view(np.random.default_rng(seed)) for seed in range(6)]
    maps = []
    for order in (range(6), reversed(range(6)), [3, 0, 5, 1, 4, 2]):
        voxel_map = VoxelMap(EVERYTHING)
        for index in order:
            voxel_map.integrate(views[index])
        maps.append(contents(voxel_map))
    for other in maps[1:]:
        assert other.keys() == maps[0].keys()
        for voxel_id, row in maps[0].items():
            np.testing.assert_allclose(other[voxel_id], row, atol=1e-4)


def test_a_voxel_holds_the_weighted_mean_of_its_observations():
    voxel_map = VoxelMap(EVERYTHING)
    rng = np.random.default_rng(3)
    sums, total = np.zeros(6), 0.0
    for _ in range(5):
        points = rng.uniform(0.01, 0.09, (30, 3)).astype(np.float32)
        colors = rng.integers(0, 256, (30, 3), np.uint8)
        confidence = rng.uniform(1, 8, 30).astype(np.float32)
        voxel_map.integrate_points(points, colors, confidence)
        of_frame = np.average(np.hstack([points, colors]), axis=0, weights=confidence)
        sums += confidence.mean() * of_frame
        total += confidence.mean()
    (row,) = contents(voxel_map).values()
    np.testing.assert_allclose(row[:3], sums[:3] / total, rtol=1e-5)
    np.testing.assert_allclose(row[3:6], sums[3:] / total, atol=0.51)
    np.testing.assert_allclose(row[7], total, rtol=1e-5)


def test_an_old_voxel_still_follows_new_observations():
    voxel_map = VoxelMap(EVERYTHING)
    color, sure = np.full((1, 3), 200, np.uint8), np.full(1, 1e6, np.float32)
    for _ in range(10_000):
        voxel_map.integrate_points(np.full((1, 3), 0.02, np.float32), color, sure)
    for _ in range(40):
        voxel_map.integrate_points(np.full((1, 3), 0.08, np.float32), color, sure)
    np.testing.assert_allclose(voxel_map.points().points_xyz, 0.08, atol=0.002)


def test_a_long_walk_stays_within_the_budget_and_in_the_same_memory():
    """A long walk: rooms one after the other, each new, through a map that holds a few."""
    config = dataclasses.replace(EVERYTHING, max_points=3000)
    voxel_map = VoxelMap(config)
    storage = voxel_map._state.ctypes.data, voxel_map._changed.ctypes.data
    rng = np.random.default_rng(4)
    traced = {}
    tracemalloc.start()
    for step in range(300):
        shift = 0.5 * step
        voxel_map.integrate(room_view(rng, shift))
        assert voxel_map.num_points <= 3000
        if step in (100, 299):
            traced[step] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert traced[299] < traced[100] + 50_000  # bytes; less than the points of two frames
    assert voxel_map.num_points == 3000
    assert storage == (voxel_map._state.ctypes.data, voxel_map._changed.ctypes.data)
    cloud = voxel_map.points()
    ids = voxel_map.changed_since(-1).voxel_ids
    assert len(np.unique(ids)) == 3000
    # What is left lies on the walls of the visited rooms, mostly of the last ones.
    assert (cloud.points_xyz[:, 1] > LOW[1] - 1e-3).all()
    assert np.median(cloud.points_xyz[:, 0]) > shift - 25


def anonymous_bytes():
    """Resident memory of this process that is no part of a file."""
    resident, shared = map(int, Path('/proc/self/statm').read_text().split()[1:3])
    return (resident - shared) * os.sysconf('SC_PAGE_SIZE')


def test_a_map_that_is_cleared_gives_its_memory_back_every_time():
    voxel_map = VoxelMap(dataclasses.replace(EVERYTHING, max_points=400_000))
    cells = np.stack(np.unravel_index(np.arange(400_000), (100, 100, 40)), 1)
    parts = np.split((0.1 * cells + 0.05).astype(np.float32), 40)
    colors, sure = np.zeros((10_000, 3), np.uint8), np.ones(10_000, np.float32)
    voxel_map.integrate_points(parts[0], colors, sure)
    voxel_map.clear()
    empty = anonymous_bytes()
    for _ in range(3):  # as with new sessions of a node: the C library learns from what is freed
        for points in parts:
            voxel_map.integrate_points(points, colors, sure)
        full = anonymous_bytes()
        voxel_map.clear()
    assert full > empty + 15e6
    assert anonymous_bytes() < empty + 5e6


def test_a_full_map_removes_the_weak_and_keeps_what_the_frame_sees():
    config = dataclasses.replace(EVERYTHING, max_points=100)
    voxel_map = VoxelMap(config)

    def add(first, count, confidence):
        points = np.zeros((count, 3), np.float32)
        points[:, 0] = 0.1 * (first + np.arange(count)) + 0.05
        voxel_map.integrate_points(
            points, np.zeros((count, 3), np.uint8), np.full(count, confidence, np.float32)
        )

    def held():
        return set(np.floor(voxel_map.points().points_xyz[:, 0] / 0.1).astype(int).tolist())

    add(0, 50, 9.0)
    add(50, 50, 2.0)
    add(1000, 30, 3.0)
    assert set(range(50)) | set(range(1000, 1030)) <= held() and len(held()) == 100
    add(990, 60, 1.0)  # 30 seen before, 30 new ones
    assert set(range(990, 1050)) <= held() and len(held()) == 100


def test_a_frame_larger_than_the_budget_leaves_its_surest_points():
    voxel_map = VoxelMap(dataclasses.replace(EVERYTHING, max_points=10))
    points = np.arange(50, dtype=np.float32)[:, np.newaxis].repeat(3, 1)
    confidence = np.linspace(1, 9, 50, dtype=np.float32)
    voxel_map.integrate_points(points, np.zeros((50, 3), np.uint8), confidence)
    assert sorted(voxel_map.points().points_xyz[:, 0]) == list(range(40, 50))


@pytest.mark.parametrize('max_points', [50, 400, 100_000])
def test_a_follower_of_the_changes_holds_the_map(max_points):
    """Deltas at random moments, over evictions and a clear, rebuild the map exactly."""
    voxel_map = VoxelMap(dataclasses.replace(EVERYTHING, max_points=max_points))
    rng = np.random.default_rng(max_points)
    copy, version, incremental = {}, -1, 0
    for step in range(150):
        count = rng.integers(0, 40)
        voxel_map.integrate_points(
            rng.normal(step % 20 * 0.1, 0.4, (count, 3)).astype(np.float32),
            rng.integers(0, 256, (count, 3), np.uint8),
            rng.uniform(1, 9, count).astype(np.float32),
        )
        if step == 80:
            voxel_map.clear()
        if rng.random() < 0.4:
            change = voxel_map.changed_since(version)
            assert len(np.unique(change.voxel_ids)) == len(change.voxel_ids)
            incremental += not change.is_complete
            version, copy = change.version, {} if change.is_complete else copy
            rows = np.column_stack(
                [change.points_xyz, change.colors_rgb, change.confidence, change.weight]
            )
            for voxel_id, row in zip(change.voxel_ids.tolist(), rows):
                if row[7] == 0:
                    copy.pop(voxel_id, None)
                else:
                    copy[voxel_id] = row
            truth = contents(voxel_map)
            assert copy.keys() == truth.keys()
            assert all(np.array_equal(copy[i], truth[i]) for i in truth)
    assert incremental > 20


def test_nothing_changes_without_new_points():
    voxel_map = VoxelMap(EVERYTHING)
    voxel_map.integrate(room_view(np.random.default_rng(5)))
    version = voxel_map.version
    voxel_map.integrate(prediction(np.full((HEIGHT, WIDTH), np.nan)))
    assert voxel_map.version == version
    assert len(voxel_map.changed_since(version).voxel_ids) == 0


def test_invalid_pixels_stay_out_without_a_warning(recwarn):
    depth = torch.full((HEIGHT, WIDTH), 2.0)
    depth[:8], depth[8:16], depth[16:24] = torch.nan, torch.inf, 0.0
    depth[24:28], depth[28:32] = -1.0, 3e38
    confidence = torch.full((HEIGHT, WIDTH), torch.inf)  # an overflowed exponential
    confidence[40:] = torch.nan
    for edge_ratio in (0.0, 0.05):
        config = dataclasses.replace(EVERYTHING, edge_ratio=edge_ratio)
        voxel_map = VoxelMap(config)
        voxel_map.integrate(prediction(depth, confidence=confidence))
        cloud = voxel_map.points()
        assert len(cloud) and np.isfinite(cloud.points_xyz).all()
        np.testing.assert_allclose(cloud.points_xyz[:, 2], 2.0)
        assert np.isfinite(cloud.confidence).all()
    pose = torch.full((4, 4), torch.nan)
    voxel_map.clear()
    voxel_map.integrate(prediction(depth, T_world_camera=pose))
    assert voxel_map.num_points == 0 and not recwarn.list


def kept_pixels(config, depth, confidence=None):
    """Which pixels reach the map: each has its own colour and lies in its own voxel."""
    number = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    rgb = torch.stack([number // 65536, number // 256 % 256, number % 256], -1).to(torch.uint8)
    config = dataclasses.replace(config, voxel_size=1e-3)
    voxel_map = VoxelMap(config)
    voxel_map.integrate(prediction(depth, confidence=confidence, rgb=rgb))
    colors = voxel_map.points().colors_rgb.astype(int)
    mask = np.zeros(HEIGHT * WIDTH, bool)
    mask[colors @ [65536, 256, 1]] = True
    return mask.reshape(HEIGHT, WIDTH)


def test_confidence_threshold_and_quantile_choose_the_pixels():
    confidence = 1 + torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    depth = torch.full((HEIGHT, WIDTH), 2.0)
    config = dataclasses.replace(EVERYTHING, min_confidence=1.7)
    assert np.array_equal(kept_pixels(config, depth, confidence), confidence.numpy() >= 1.7)
    config = dataclasses.replace(EVERYTHING, confidence_quantile=0.25)
    kept = kept_pixels(config, depth, confidence)
    assert kept.sum() == HEIGHT * WIDTH * 3 // 4
    assert confidence[torch.from_numpy(kept)].min() > confidence[torch.from_numpy(~kept)].max()
    config = dataclasses.replace(EVERYTHING, confidence_quantile=0.9)
    assert kept_pixels(config, depth).all()  # all equally confident: none is the least


def test_depth_edges_and_far_pixels_stay_out():
    depth = torch.full((HEIGHT, WIDTH), 4.0)
    depth[10:30, 20:40] = 2.0
    kept = kept_pixels(dataclasses.replace(EVERYTHING, edge_ratio=0.05), depth)
    expected = np.ones((HEIGHT, WIDTH), bool)
    expected[9:31, 20:40] = expected[10:30, 19:41] = False
    expected[11:29, 21:39] = True
    assert np.array_equal(kept, expected)
    kept = kept_pixels(dataclasses.replace(EVERYTHING, max_depth=3.0), depth)
    assert np.array_equal(kept, depth.numpy() < 3)


def test_the_voxel_size_follows_from_the_first_usable_frame():
    config = dataclasses.replace(EVERYTHING, voxel_size=0.0, voxel_fraction=0.02)
    voxel_map = VoxelMap(config)
    voxel_map.integrate(prediction(np.full((HEIGHT, WIDTH), np.nan)))
    assert voxel_map.voxel_size is None
    with pytest.raises(InputError, match=r'mapping\.voxel_size'):
        voxel_map.integrate_points(np.zeros((1, 3)), np.zeros((1, 3)), np.ones(1))
    voxel_map.integrate(prediction(np.full((HEIGHT, WIDTH), 5.0)))
    voxel_map.integrate(prediction(np.full((HEIGHT, WIDTH), 50.0)))
    assert voxel_map.voxel_size == pytest.approx(0.1)
    voxel_map.clear()
    assert voxel_map.num_points == 0 and voxel_map.voxel_size is None
    voxel_map.integrate(prediction(np.full((HEIGHT, WIDTH), 50.0)))
    assert voxel_map.voxel_size == pytest.approx(1.0)


def test_points_of_the_point_head_give_the_map_of_the_depth():
    views = [room_view(np.random.default_rng(seed)) for seed in range(3)]
    maps = [VoxelMap(dataclasses.replace(EVERYTHING, edge_ratio=0.05, max_depth=3.0))]
    maps.append(VoxelMap(dataclasses.replace(maps[0].config, source='points')))
    for view in views:
        maps[0].integrate(view)
        points = unproject_to_world(view.depth, view.K, view.T_world_camera)
        maps[1].integrate(
            dataclasses.replace(view, world_points=points, world_points_conf=view.depth_conf)
        )
    a, b = (voxel_map.points() for voxel_map in maps)
    assert abs(len(a) - len(b)) <= 2  # a pixel at a threshold
    assert len(a) > 1000
    with pytest.raises(InputError, match='point head'):
        maps[1].integrate(views[0])


@pytest.mark.parametrize(
    'points, colors, confidence, reason',
    [
        (np.zeros((2, 3)), np.zeros((3, 3)), np.ones(2), 'expected points'),
        (np.zeros((2, 2)), np.zeros((2, 3)), np.ones(2), 'expected points'),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2), 'above 0'),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.full(2, np.nan), 'above 0'),
    ],
)
def test_unusable_points_are_refused(points, colors, confidence, reason):
    with pytest.raises(InputError, match=reason):
        VoxelMap(EVERYTHING).integrate_points(points, colors, confidence)


def test_thresholds_can_be_changed_while_running():
    voxel_map = VoxelMap(EVERYTHING)
    voxel_map.config = dataclasses.replace(EVERYTHING, min_confidence=5.0)
    voxel_map.integrate(room_view(np.random.default_rng(6)))
    assert voxel_map.num_points == 0
    voxel_map.config = EVERYTHING
    voxel_map.integrate(room_view(np.random.default_rng(6)))
    assert voxel_map.num_points > 0


def test_readers_see_whole_frames_while_another_thread_integrates():
    """Each frame paints the same voxels in one colour: a snapshot never shows two."""
    voxel_map = VoxelMap(dataclasses.replace(EVERYTHING, voxel_size=1e-3))
    points = np.random.default_rng(7).uniform(0, 1, (2000, 3)).astype(np.float32)
    done = threading.Event()

    def write():
        for value in range(100):
            voxel_map.integrate_points(
                points, np.full((2000, 3), value, np.uint8), np.full(2000, 4.0, np.float32)
            )
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    snapshots = 0
    while not done.is_set() or not snapshots:
        cloud = voxel_map.points()
        if len(cloud):
            snapshots += 1
            assert len(cloud) == voxel_map.num_points
            assert np.ptp(cloud.colors_rgb.astype(int)) == 0
    writer.join()


def test_a_view_reads_in_blocks_what_a_copy_holds():
    voxel_map = VoxelMap(MappingConfig(voxel_size=1.0, max_points=3 * BLOCK_POINTS))
    cells = np.arange(2 * BLOCK_POINTS + 5, dtype=np.float32)
    points = np.stack([cells, cells % 7, cells % 11], 1) + 0.5
    colors = np.random.default_rng(0).integers(0, 256, points.shape, np.uint8)
    voxel_map.integrate_points(points, colors, 1 + cells % 5)
    view, cloud = voxel_map.view(), voxel_map.points()
    blocks, copied = list(view.blocks()), list(cloud.blocks())
    assert len(view) == len(cloud) == len(cells)
    assert [len(b) for b in blocks] == [len(b) for b in copied] == [BLOCK_POINTS] * 2 + [5]
    for name in ('points_xyz', 'colors_rgb', 'confidence'):
        for parts in (blocks, copied):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(cloud, name))


def test_a_view_outlives_what_happens_to_the_map():
    voxel_map = VoxelMap(MappingConfig(voxel_size=1.0))
    one, other = np.full((1, 3), 0.5, np.float32), np.full((1, 3), 9.5, np.float32)
    color, confidence = np.zeros((1, 3), np.uint8), np.ones(1, np.float32)
    voxel_map.integrate_points(one, color, confidence)
    view = voxel_map.view()
    voxel_map.integrate_points(other, color, confidence)
    voxel_map.clear()
    (block,) = view.blocks()
    np.testing.assert_array_equal(block.points_xyz, one)


@pytest.mark.parametrize('kind', ['spread', 'few values', 'one', 'negative', 'not a number'])
def test_the_value_of_a_rank_is_that_of_the_sorted_values(kind):
    rng = np.random.default_rng(5)
    values = {
        'spread': np.exp(rng.normal(0, 6, 999)),
        'few values': rng.integers(0, 3, 999),
        'one': np.ones(1),
        'negative': rng.normal(0, 1, 999),
        'not a number': np.where(rng.random(999) < 0.1, -np.nan, rng.random(999)),
    }[kind].astype(np.float32)
    for rank in {0, len(values) // 3, len(values) - 1}:
        expected = np.sort(values)[rank]
        np.testing.assert_equal(value_of_rank(values, rank), expected)
