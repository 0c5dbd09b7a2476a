"""Keyframes: coarse grids keep their rays, new views are chosen, dense and unsure ones are not."""

from dataclasses import replace

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.config import KeyframeConfig
from stream3r_core.backend.keyframes import (
    Keyframe,
    KeyframeSelector,
    covisible,
    sample_grid,
    to_keyframe,
)
from stream3r_core.errors import InputError
from stream3r_core.synthetic.front_end import Disturbance, SimulatedFrontEnd, make_walk

K = np.array([[30.0, 0, 24], [0, 30, 18], [0, 0, 1]])


def view(xi=(0,) * 7, confidence=4.0, number=0):
    shape = (36, 48)
    return Keyframe(
        number, None, sim3.exp(np.asarray(xi, float)), K, np.full(shape, 4.0, np.float32),
        np.full(shape, confidence, np.float32),
    )  # fmt: skip


def move(x=0.0, y=0.0, z=0.0, pan=0.0):
    return [0, np.deg2rad(pan), 0, x, y, z, 0]


@pytest.mark.parametrize('side', [8, 13, 48, 100])
def test_a_grid_keeps_the_points_of_its_pixels(side):
    rng = np.random.default_rng(side)
    depth = rng.uniform(1, 5, (36, 48)).astype(np.float32)
    full = Keyframe(0, None, np.eye(4), K, depth, np.ones_like(depth)).points()
    grid, confidence, K_grid = sample_grid(depth, 2 * np.ones_like(depth), K, side)
    assert max(grid.shape) <= side and confidence.shape == grid.shape
    points = Keyframe(0, None, np.eye(4), K_grid, grid, confidence).points()
    stride = -(-48 // side)
    expected = full[stride // 2 :: stride, stride // 2 :: stride]
    np.testing.assert_allclose(points, expected, atol=1e-9)


def test_pixels_without_depth_or_confidence_become_zero():
    depth = np.array([[1.0, np.nan, -1, np.inf], [0, 2, 3, 4]], np.float32)
    confidence = np.array([[2.0, 2, 2, 2], [2, np.nan, 2, 2]], np.float32)
    grid, sure, _ = sample_grid(depth, confidence, K, 4)
    np.testing.assert_array_equal(grid, [[1, 0, 0, 0], [0, 0, 3, 4]])
    assert np.isfinite(sure).all()


@pytest.mark.parametrize(
    'xi, chosen',
    [
        (move(), False),
        (move(x=0.2), False),
        (move(x=0.4), True),  # a tenth of the depth
        (move(z=0.5), True),
        (move(pan=5), False),
        (move(pan=15), True),
    ],
)
def test_parallax_and_rotation_make_a_keyframe(xi, chosen):
    selector = KeyframeSelector()
    assert selector.is_keyframe(view())
    assert selector.is_keyframe(view(xi, number=1)) is chosen


def test_lost_overlap_makes_a_keyframe():
    selector = KeyframeSelector(KeyframeConfig(min_parallax=1e9, min_rotation_deg=1e9))
    assert selector.is_keyframe(view())
    assert not selector.is_keyframe(view(move(pan=4)))
    assert selector.is_keyframe(view(move(pan=10)))


def test_slow_motion_adds_up_until_the_next_keyframe():
    selector = KeyframeSelector()
    chosen = [selector.is_keyframe(view(move(x=0.05 * k))) for k in range(21)]
    assert [k for k, c in enumerate(chosen) if c] == [0, 7, 14]


def test_unsure_and_empty_frames_are_passed_over():
    selector = KeyframeSelector()
    assert not selector.is_keyframe(view(confidence=1.05))
    assert not selector.is_keyframe(replace(view(), depth=np.zeros((36, 48), np.float32)))
    assert selector.is_keyframe(view())
    selector.reset()
    assert selector.is_keyframe(view())


def test_covisible_pixels_see_the_same_points():
    exact = Disturbance(0, 0, 0, 0, 0, 0, 0)
    front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0, exact)
    frames = [to_keyframe(p, i, KeyframeConfig()) for i, p in front_end.session(range(8))]
    T = sim3.inverse(frames[0].T_submap_camera) @ frames[3].T_submap_camera
    inside, z, pixel = covisible(frames[3], frames[0], T)
    depth = frames[0].depth.ravel()[pixel]
    agree = np.abs(z - depth)[inside & (depth > 0)] < 0.1 * z[inside & (depth > 0)]
    assert inside.mean() > 0.5 and agree.mean() > 0.75  # the rest: rounding to pixels, edges


def test_a_keyframe_moves_into_another_unit():
    S = sim3.exp(np.array([0.1, 0.2, 0.3, 1, 2, 3, 0.5]))
    before = view(move(x=1, pan=20))
    after = before.moved(S)
    points = [sim3.act(v.T_submap_camera, v.points().reshape(-1, 3)) for v in (before, after)]
    np.testing.assert_allclose(points[1], sim3.act(S, points[0]), atol=1e-5)


def test_poses_that_are_not_finite_are_refused_and_rounded_ones_made_orthogonal():
    front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0)
    _, prediction = next(front_end.session(range(3)))
    rounded = replace(prediction, T_world_camera=prediction.T_world_camera * 1.001)
    R = to_keyframe(rounded, 0, KeyframeConfig()).T_submap_camera[:3, :3]
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    with pytest.raises(InputError, match='frame 7 has no finite pose'):
        to_keyframe(
            replace(rounded, T_world_camera=rounded.T_world_camera * float('inf')),
            7,
            KeyframeConfig(),
        )
