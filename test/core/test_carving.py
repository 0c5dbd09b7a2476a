"""What later rays contradict leaves the map; what they only pass by stays."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream3r_core.backend.config import BackendConfig, SubmapConfig
from stream3r_core.config import CarvingConfig, MappingConfig
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import VoxelMap
from stream3r_core.mapping.carving import FreeSpace, Sight
from stream3r_core.types import FramePrediction

HEIGHT, WIDTH, FOCAL = 96, 128, 100.0
GEOMETRY = ImageGeometry((HEIGHT, WIDTH), (HEIGHT, WIDTH), (1.0, 1.0), (0, 0))
K = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
WALL_M, FLOOR_M, BOX_M = 4.0, 1.0, 2.5  # z of the wall, y of the floor below, z of a box's front
CONFIDENCE = 4.0
CARVING = MappingConfig(
    voxel_size=0.05,
    min_confidence=1.0,
    confidence_quantile=0.0,
    carving=CarvingConfig(enabled=True),
)
COARSE = dataclasses.replace(CARVING, voxel_size=0.12)
PLAIN = dataclasses.replace(CARVING, carving=CarvingConfig(enabled=False))


def scene_depth(T_world_camera, box_x=None):
    """Exact depth of a floor, a wall, and, if given, a square board that stands before it."""
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([(u - K[0, 2]) / FOCAL, (v - K[1, 2]) / FOCAL, np.ones((HEIGHT, WIDTH))], -1)
    rays, origin = rays @ T_world_camera[:3, :3].T, T_world_camera[:3, 3]
    with np.errstate(divide='ignore', invalid='ignore'):
        floor = (FLOOR_M - origin[1]) / rays[..., 1]
        wall = (WALL_M - origin[2]) / rays[..., 2]
        depth = np.minimum(np.where(floor > 0, floor, np.inf), np.where(wall > 0, wall, np.inf))
        if box_x is not None:
            board = (BOX_M - origin[2]) / rays[..., 2]
            hit = origin + board[..., None] * rays
            inside = (np.abs(hit[..., 0] - box_x) < 0.4) & (np.abs(hit[..., 1]) < 0.4)
            depth = np.where(inside & (board > 0), np.minimum(depth, board), depth)
    return depth


def view(depth, T_world_camera=None, confidence=CONFIDENCE):
    T = np.eye(4) if T_world_camera is None else T_world_camera
    return FramePrediction(
        index=0,
        stamp_ns=0,
        T_world_camera=torch.from_numpy(T).float(),
        K=torch.from_numpy(K).float(),
        rgb=torch.full((HEIGHT, WIDTH, 3), 128, dtype=torch.uint8),
        depth=torch.as_tensor(depth).float(),
        depth_conf=torch.full((HEIGHT, WIDTH), float(confidence)),
        world_points=None,
        world_points_conf=None,
        geometry=GEOMETRY,
    )


def pose(x=0.0, y=0.0, z=0.0, yaw=0.0, pitch=0.0):
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    T = np.eye(4)
    T[:3, :3] = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array(
        [[1, 0, 0], [0, cp, -sp], [0, sp, cp]]
    )
    T[:3, 3] = x, y, z
    return T


def ghosts(points):
    """Which points [N, 3] lie neither on the floor nor on the wall."""
    return (np.abs(points[:, 1] - FLOOR_M) > 0.08) & (np.abs(points[:, 2] - WALL_M) > 0.08)


def held(voxel_map):
    change = voxel_map.changed_since(-1)
    rows = np.column_stack([change.points_xyz, change.confidence, change.weight])
    return dict(zip(change.voxel_ids.tolist(), rows))


def build(views, config):
    voxel_map = VoxelMap(config)
    for each in views:
        voxel_map.integrate(each)
    return voxel_map


def walk_with_a_mover(num_frames=24):
    """A board slides along a wall and out of sight, before a camera that sways a little."""
    for index in range(num_frames):
        T = pose(x=0.2 * np.sin(index / 3), yaw=0.05 * np.sin(index / 5))
        box_x = -1.0 + 0.1 * index if index < 12 else None
        yield view(scene_depth(T, box_x), T)


@pytest.mark.parametrize('is_still', [True, False])
def test_what_moved_away_leaves_the_map_and_walls_stay(is_still):
    views = list(walk_with_a_mover())
    if is_still:
        views = [view(scene_depth(np.eye(4), -0.5)) for _ in range(3)]
        views += [view(scene_depth(np.eye(4))) for _ in range(6)]
    plain, carved = (build(views, config).points().points_xyz for config in (PLAIN, CARVING))
    assert ghosts(plain).sum() > 200
    assert ghosts(carved).sum() < 0.02 * ghosts(plain).sum()
    walls, kept = (points[~ghosts(points)] for points in (plain, carved))
    np.testing.assert_array_equal(np.sort(walls, 0), np.sort(kept, 0))


def test_a_voxel_goes_when_the_rays_through_it_are_as_sure_as_what_was_seen():
    """Three looks of confidence 4 are outweighed by six of confidence 2, and not by five."""
    views = [view(scene_depth(np.eye(4), 0.0))] * 3
    for looks, is_left in ((5, True), (6, False)):
        later = [view(scene_depth(np.eye(4)), confidence=2.0)] * looks
        assert ghosts(build(views + later, CARVING).points().points_xyz).any() == is_left


def test_rays_below_the_confidence_limit_or_without_depth_remove_nothing():
    config = dataclasses.replace(CARVING, min_confidence=3.0)
    seen, empty = view(scene_depth(np.eye(4), 0.0)), scene_depth(np.eye(4))
    holes = np.where(np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5, np.nan, empty)
    before = held(build([seen], config))
    for later in (view(empty, confidence=2.9), view(holes), view(np.zeros_like(empty))):
        after = held(build([seen, *[later] * 5], config))
        assert before.keys() <= after.keys()


@pytest.mark.parametrize('sigma', [0.0, 0.01, 0.03])
def test_a_static_scene_keeps_every_surface_from_all_sides(sigma):
    """Grazing views of the floor, silhouettes of a board, noise of depth and of pose."""
    rng = np.random.default_rng(1)
    views = []
    for _ in range(20):
        T = pose(
            x=rng.uniform(-1, 1), y=rng.uniform(-0.3, 0.85), z=rng.uniform(-1.5, 0.5),
            yaw=rng.uniform(-0.3, 0.3), pitch=rng.uniform(-0.2, 0.2),
        )  # fmt: skip
        depth = scene_depth(T, 0.0) * (1 + sigma * rng.normal(size=(HEIGHT, WIDTH)))
        off = pose(yaw=sigma / 5 * rng.normal(), pitch=sigma / 5 * rng.normal())
        views.append(view(depth, T @ off))
    config = dataclasses.replace(CARVING, edge_ratio=0.15)
    plain, carved = (
        build(views, c) for c in (dataclasses.replace(config, carving=PLAIN.carving), config)
    )
    lost = held(plain).keys() - held(carved).keys()
    assert len(lost) <= (0 if sigma == 0 else 0.01 * plain.num_points)
    assert plain.num_points > 5000


def test_what_is_hidden_or_out_of_view_is_not_touched():
    seen = view(scene_depth(np.eye(4)))
    before = held(build([seen], CARVING))
    boards = [view(np.full((HEIGHT, WIDTH), 2.0))] * 8  # hides everything
    elsewhere = pose(x=50.0)
    aside = [view(scene_depth(elsewhere), elsewhere)] * 8
    for later in (boards, aside):
        after = held(build([seen, *later], CARVING))
        assert all(np.array_equal(after[key], row) for key, row in before.items())


@pytest.mark.parametrize('max_voxels', [37, 1000, 10**6])
def test_a_frame_examines_no_more_voxels_than_asked_for_and_all_in_turn(max_voxels, monkeypatch):
    config = dataclasses.replace(
        CARVING, carving=dataclasses.replace(CARVING.carving, max_voxels=max_voxels)
    )
    examined = []
    ask = FreeSpace.contradicted

    def count(self, points_xyz, *limits):
        examined.append(points_xyz.copy())
        return ask(self, points_xyz, *limits)

    monkeypatch.setattr(FreeSpace, 'contradicted', count)
    voxel_map = build([view(scene_depth(np.eye(4)))], config)
    examined.clear()
    frames = -(-voxel_map.num_points // max_voxels)
    for _ in range(min(frames, 30)):
        voxel_map.integrate(view(scene_depth(np.eye(4))))
    assert all(len(points) <= max_voxels for points in examined)
    seen = np.unique(np.concatenate(examined), axis=0)
    assert len(seen) >= min(voxel_map.num_points, max_voxels * len(examined)) - max_voxels


@pytest.mark.parametrize('max_points', [1500, 100_000])
def test_followers_of_changes_and_of_rows_hold_the_carved_map(max_points):
    """Over carving, eviction and reuse of the rows that carving has freed."""
    config = dataclasses.replace(COARSE, max_points=max_points)
    voxel_map, rng = VoxelMap(config), np.random.default_rng(2)
    by_id, by_row, version, removed = {}, {}, -1, 0
    for _ in range(30):
        T = pose(x=rng.uniform(-1, 1), yaw=rng.uniform(-0.3, 0.3))
        voxel_map.integrate(view(scene_depth(T, rng.uniform(-1, 1)), T))
        if rng.random() < 0.5:
            continue
        change, rows = voxel_map.changed_since(version), voxel_map.rows_since(version)
        removed += int((change.weight == 0).sum())
        by_id = {} if change.is_complete else by_id
        state = np.column_stack([change.points_xyz, change.confidence, change.weight])
        for key, row in zip(change.voxel_ids.tolist(), state):
            by_id[key] = row
            if row[-1] == 0:
                del by_id[key]
        for number, point, weight in zip(rows.rows.tolist(), rows.cloud.points_xyz, rows.weight):
            by_row[number] = point
            if weight == 0:
                del by_row[number]
        version = change.version
        truth = held(voxel_map)
        assert by_id.keys() == truth.keys()
        assert all(np.array_equal(by_id[key], truth[key]) for key in truth)
        points = voxel_map.points().points_xyz
        assert len(by_row) == len(points) == voxel_map.num_points <= max_points
        np.testing.assert_array_equal(
            np.sort(np.array(list(by_row.values())), 0), np.sort(points, 0)
        )
    assert removed > 150


def test_a_view_gives_whole_points_while_the_map_is_carved():
    empty, with_board = (view(scene_depth(np.eye(4), box_x)) for box_x in (None, 0.0))
    voxel_map = build([empty, with_board], CARVING)
    view_of_it, before = voxel_map.view(), voxel_map.points()
    for _ in range(3):
        voxel_map.integrate(empty)
    assert voxel_map.num_points < len(before)
    blocks = list(view_of_it.blocks())
    assert sum(map(len, blocks)) == len(before)
    assert all(np.isfinite(block.points_xyz).all() for block in blocks)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(8, 200),
    height=st.integers(8, 150),
    margin=st.floats(0.0, 0.9),
)
def test_nothing_at_or_behind_what_any_near_ray_hits_is_contradicted(seed, width, height, margin):
    """Random depths: a point is contradicted only before everything around its own pixel."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 5, (height, width)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.02] = rng.choice([np.nan, 0, -1, np.inf])
    matrix = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    T = pose(*rng.normal(size=3), *rng.uniform(-3, 3, 2))
    reliable = rng.random(depth.shape) < 0.9
    confidence = rng.uniform(1, 9, depth.shape).astype(np.float32)
    pixels = rng.integers([-5, -5], [width + 5, height + 5], (500, 2)) + rng.uniform(
        -0.4, 0.4, (500, 2)
    )
    z = rng.uniform(-1, 5, 500)
    rays = np.column_stack([pixels, np.ones(500)]) @ np.linalg.inv(matrix).T
    points = (z[:, None] * rays) @ T[:3, :3].T + T[:3, 3]
    free = FreeSpace(Sight(T, matrix, depth, confidence, reliable))
    rows, sure = free.contradicted(points.astype(np.float32), margin, 0.01)
    assert len(rows) == len(sure) == len(set(rows.tolist()))
    for row, certainty in zip(rows, sure):
        column, line = np.rint(pixels[row]).astype(int)
        around = depth[max(line - 1, 0) : line + 2, max(column - 1, 0) : column + 2]
        assert (around > 0).all() and z[row] > 0
        assert z[row] < (1 - margin) * around.min() + 1e-3
        near = confidence[max(line - 1, 0) : line + 2, max(column - 1, 0) : column + 2]
        assert certainty in near  # of its pixel, but for rounding


def test_the_back_end_carves_the_open_submap_and_its_readers_follow():
    pytest.importorskip('gtsam', reason='extra "backend" is not installed')
    from stream3r_core.backend.atlas_map import AtlasMap
    from stream3r_core.backend.backend import SubmapBackend

    config = BackendConfig(submaps=SubmapConfig(max_frames=100))
    maps = {}
    for name, mapping in (
        ('plain', dataclasses.replace(COARSE, carving=PLAIN.carving)),
        ('carved', COARSE),
    ):
        backend = SubmapBackend(config, mapping)
        atlas_map = AtlasMap(backend.atlas)
        copy, version = {}, -1
        for index, each in enumerate(walk_with_a_mover()):
            backend.track(dataclasses.replace(each, index=index), index)
            change = atlas_map.changed_since(version)
            version = change.version
            for key, point, weight in zip(
                change.voxel_ids.tolist(), change.points_xyz, change.weight
            ):
                if weight == 0:
                    copy.pop(key, None)
                else:
                    copy[key] = point
        assert atlas_map.voxel_size == pytest.approx(COARSE.voxel_size)
        maps[name] = atlas_map.points().points_xyz
        followed = np.array(list(copy.values()))
        np.testing.assert_array_equal(np.sort(followed, 0), np.sort(maps[name], 0))
    left, all_of_them = (ghosts(maps[name]).sum() for name in ('carved', 'plain'))
    assert left < 0.02 * all_of_them and all_of_them > 50
