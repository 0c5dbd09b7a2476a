"""Walls, free floor and the unknown of exact rooms, whatever their unit."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream3r_core.config import OccupancyConfig
from stream3r_core.errors import DataError
from stream3r_core.mapping.occupancy import (
    FREE,
    OCCUPIED,
    UNKNOWN,
    Views,
    find_floor,
    occupancy_grid,
)

LOW, HIGH = np.array([-3.0, -2.0, 0.0]), np.array([3.0, 2.0, 2.4])  # of a room, metres
BOX_LOW, BOX_HIGH = np.array([0.8, -0.5]), np.array([1.6, 0.3])  # stands on the floor
BOX_TOP, CAMERA_Z = 0.8, 1.2
CELL, SPACING = 0.1, 0.04


def surface(u, v, axis, at):
    """Points [N, 3] of the plane where coordinate ``axis`` is ``at``, over ranges u and v."""
    grid = np.stack(np.meshgrid(np.arange(*u, SPACING), np.arange(*v, SPACING)), -1).reshape(-1, 2)
    return np.insert(grid, axis, at, 1)


def room(with_box=True):
    """Points on floor, ceiling, walls and, from all sides, a box; as a perfect map has them."""
    (x0, y0, z0), (x1, y1, z1) = LOW, HIGH
    parts = [surface((x0, x1), (y0, y1), 2, z) for z in (z0, z1)]
    parts += [surface((y0, y1), (z0, z1), 0, x) for x in (x0 + 0.02, x1 - 0.02)]
    parts += [surface((x0, x1), (z0, z1), 1, y) for y in (y0 + 0.02, y1 - 0.02)]
    if with_box:
        (bx0, by0), (bx1, by1) = BOX_LOW, BOX_HIGH
        parts += [surface((by0, by1), (0, BOX_TOP), 0, x) for x in (bx0 + 0.02, bx1 - 0.02)]
        parts += [surface((bx0, bx1), (0, BOX_TOP), 1, y) for y in (by0 + 0.02, by1 - 0.02)]
        parts.append(surface((bx0, bx1), (by0, by1), 2, BOX_TOP))
        on_floor = np.abs(parts[0][:, :2] - (BOX_LOW + BOX_HIGH) / 2) < (BOX_HIGH - BOX_LOW) / 2
        parts[0] = parts[0][~on_floor.all(1)]
    return np.concatenate(parts).astype(np.float32)


def looking(*yaws, x=-2.0, y=0.0, z=CAMERA_Z, tan_half_width=0.7):
    """Views of level cameras at one place that look along these angles."""
    poses = np.tile(np.eye(4), (len(yaws), 1, 1))
    for T, yaw in zip(poses, yaws):
        forward, right = [np.cos(yaw), np.sin(yaw), 0], [np.sin(yaw), -np.cos(yaw), 0]
        T[:3, :3] = np.stack([right, [0, 0, -1], forward], 1)
        T[:3, 3] = x, y, z
    return Views(poses, tan_half_width)


AROUND = looking(*np.arange(0, 2 * np.pi, np.pi / 4))


def value_at(grid, x, y):
    column, row = np.floor((np.array([x, y]) - grid.origin_xy) / grid.resolution).astype(int)
    return grid.values[row, column]


def truth(x, y):
    """What a cell around a place in the room should hold."""
    near_wall = min(x - LOW[0], HIGH[0] - x, y - LOW[1], HIGH[1] - y) < CELL
    in_box = (BOX_LOW < [x, y]).all() and (BOX_HIGH > [x, y]).all()
    return OCCUPIED if near_wall or in_box else FREE


def test_a_room_has_its_walls_its_box_and_its_free_floor():
    grid = occupancy_grid(room(), AROUND, CELL, OccupancyConfig())
    assert grid.values.dtype == np.int8 and not grid.is_cropped
    assert grid.floor_z == pytest.approx(0, abs=0.01)
    centres = [np.arange(low + CELL / 2, high, CELL) for low, high in zip(LOW[:2], HIGH[:2])]
    found = np.array([[value_at(grid, x, y) for x in centres[0]] for y in centres[1]])
    expected = np.array([[truth(x, y) for x in centres[0]] for y in centres[1]])
    assert (found == expected).mean() > 0.99  # a cell may straddle the box's edge
    assert np.array_equal(grid.values.shape, expected.shape)  # nothing outside


def test_rays_free_the_way_to_what_was_seen_and_no_further():
    """Without floor: free is what the one camera looked across, up to wall or box."""
    points = room()
    points = points[(points[:, 2] > 0.3) & (points[:, 2] < 2)]
    options = OccupancyConfig(camera_height=CAMERA_Z)
    grid = occupancy_grid(points, looking(0.0, tan_half_width=0.3), CELL, options)
    assert value_at(grid, -1.0, 0.05) == FREE
    assert value_at(grid, 0.85, -0.1) == OCCUPIED
    assert value_at(grid, 2.5, -0.1) == UNKNOWN  # behind the box
    assert value_at(grid, -2.0, 1.5) == UNKNOWN  # beside the field of view
    assert value_at(grid, -2.7, 0.05) == UNKNOWN  # behind the camera


def test_nothing_is_free_behind_a_wall_that_rays_could_slip_through():
    """A diagonal wall of single cells; far behind it more was seen, by others."""
    steps = np.arange(-30, 31)
    wall = np.column_stack([steps, -steps, np.full(61, 12.0)]).astype(np.float32) * CELL
    wall = np.concatenate([wall, wall]) + np.float32(CELL / 2)
    behind = np.random.default_rng(0).uniform([15, 15, 0], [30, 30, 10], (3000, 3)) * CELL
    points = np.concatenate([wall, behind.astype(np.float32)])
    for x, y in ((-1.0, -1.02), (-1.55, -0.3), (0.05, -1.51)):
        views = looking(np.pi / 4, x=x, y=y, tan_half_width=1.0)
        grid = occupancy_grid(points, views, CELL, OccupancyConfig(camera_height=CAMERA_Z))
        rows, columns = np.nonzero(grid.values == FREE)
        beyond = (columns + rows + 1) * CELL + sum(grid.origin_xy) > 2 * CELL
        floor = points[(np.abs(points[:, 2]) < 0.15 * CAMERA_Z)][:, :2]
        on_floor = {tuple(c) for c in np.floor(floor / CELL).astype(int).tolist()}
        first = np.round(np.array(grid.origin_xy) / CELL).astype(int)
        free = {tuple(c) for c in (np.column_stack([columns, rows])[beyond] + first).tolist()}
        assert free <= on_floor and (~beyond).sum() > 50


def test_what_is_low_is_driven_over_and_what_is_high_is_passed_under():
    slab = surface((-1, 0), (-1, 0), 2, 0.1)  # a carpet's edge, 8 % of the camera's height
    lamp = surface((-1, 0), (0.5, 1.5), 2, 1.6)
    points = np.concatenate([room(with_box=False), slab, lamp]).astype(np.float32)
    grid = occupancy_grid(points, AROUND, CELL, OccupancyConfig())
    assert value_at(grid, -0.5, -0.5) == FREE and value_at(grid, -0.5, 1.0) == FREE
    options = OccupancyConfig(min_height=0.05, max_height=1.5)
    grid = occupancy_grid(points, AROUND, CELL, options)
    assert value_at(grid, -0.5, -0.5) == OCCUPIED and value_at(grid, -0.5, 1.0) == OCCUPIED


@settings(max_examples=20, deadline=None)
@given(unit=st.floats(1e-2, 1e2), shift=st.integers(-50, 50), floor=st.floats(-3, 3))
def test_the_grid_is_the_same_in_any_unit_and_moves_with_the_map(unit, shift, floor):
    """Sizes are relative: scaled by any unit and set down anywhere, the cells are equal."""
    points = room()[::7] + np.float32(0.013)  # no point on the border of a cell
    plain = occupancy_grid(points, AROUND, CELL, OccupancyConfig())
    moved_by = np.array([shift * CELL, -shift * CELL, floor])
    poses = AROUND.T_map_camera.copy()
    poses[:, :3, 3] = unit * (poses[:, :3, 3] + moved_by)
    views = Views(poses, AROUND.tan_half_width)
    grid = occupancy_grid(unit * (points + moved_by), views, unit * CELL, OccupancyConfig())
    assert grid.values.shape == plain.values.shape
    assert (grid.values == plain.values).mean() > 0.995  # rounding at borders of rays
    np.testing.assert_allclose(
        grid.origin_xy, unit * (np.array(plain.origin_xy) + moved_by[:2]), atol=unit * 1e-6
    )
    assert grid.floor_z == pytest.approx(unit * (plain.floor_z + floor), abs=0.02 * unit)


def test_single_stray_points_are_no_obstacles():
    stray = np.array([[0.05, 1.05, 1.0], [-1.05, -1.05, 0.6]], np.float32)
    points = np.concatenate([room(), stray])
    grid = occupancy_grid(points, AROUND, CELL, OccupancyConfig())
    assert value_at(grid, 0.05, 1.05) == value_at(grid, -1.05, -1.05) == FREE
    grid = occupancy_grid(points, AROUND, CELL, OccupancyConfig(min_points=1))
    assert value_at(grid, 0.05, 1.05) == value_at(grid, -1.05, -1.05) == OCCUPIED


@pytest.mark.parametrize('max_cells', [100, 777, 2000])
def test_a_large_map_is_cropped_to_the_surroundings_of_the_camera(max_cells):
    whole = occupancy_grid(room(), AROUND, CELL, OccupancyConfig())
    grid = occupancy_grid(room(), AROUND, CELL, OccupancyConfig(max_cells=max_cells))
    assert grid.is_cropped and 0.6 * max_cells < grid.values.size <= max_cells
    rows, columns = grid.values.shape
    column, row = np.round((np.array(grid.origin_xy) - whole.origin_xy) / CELL).astype(int)
    part = whole.values[row : row + rows, column : column + columns]
    assert part.shape == grid.values.shape
    assert np.array_equal(part == OCCUPIED, grid.values == OCCUPIED)
    assert value_at(grid, -1.95, 0.05) == FREE  # where the camera stands


def test_a_corrected_map_gives_the_grid_of_the_corrected_room():
    """The back end has turned points and poses alike: walls stand where they are now."""
    turn = np.eye(4)
    turn[:2, :2], turn[:2, 3] = [[0, -1], [1, 0]], [0.5, 1.0]
    room_points = room() + np.float32(0.013)  # no point on the border of a cell
    points = room_points @ turn[:3, :3].T.astype(np.float32) + turn[:3, 3].astype(np.float32)
    views = Views(turn @ AROUND.T_map_camera, AROUND.tan_half_width)
    grid = occupancy_grid(points, views, CELL, OccupancyConfig())
    plain = occupancy_grid(room_points, AROUND, CELL, OccupancyConfig())
    same = np.rot90(plain.values, -1)  # rows go up along y: a turn to the left
    assert same.shape == grid.values.shape
    assert (same == grid.values).mean() > 0.98
    assert value_at(grid, 0.5, 1.0 - 1.2) == FREE


def test_what_gives_no_grid_is_said():
    with pytest.raises(DataError, match='there are none yet'):
        occupancy_grid(np.zeros((0, 3)), AROUND, CELL, OccupancyConfig())
    with pytest.raises(DataError, match='there are none yet'):
        nowhere = dataclasses.replace(AROUND, T_map_camera=np.zeros((0, 4, 4)))
        occupancy_grid(room(), nowhere, CELL, OccupancyConfig())
    walls = room(with_box=False)
    walls = walls[(walls[:, 2] > 0.1) & (walls[:, 2] < 2.3)]
    with pytest.raises(DataError, match=r'set outputs\.occupancy_grid\.camera_height'):
        find_floor(walls[:, 2], CAMERA_Z)
    with pytest.raises(DataError, match='floor cannot be found'):
        find_floor(walls[:, 2], -5.0)
    grid = occupancy_grid(walls, AROUND, CELL, OccupancyConfig(camera_height=CAMERA_Z))
    assert value_at(grid, 0.0, 0.0) == FREE


def test_only_so_many_views_are_looked_at():
    many = looking(*np.linspace(0, 6, 1000))
    thinned = many.thinned().T_map_camera
    assert len(thinned) == 200
    assert np.array_equal(thinned[-1], many.T_map_camera[-1])
    assert np.array_equal(AROUND.thinned().T_map_camera, AROUND.T_map_camera)
