"""The simulated front end: its geometry is exact and its errors are as large as it says."""

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.keyframes import grid_points
from stream3r_core.errors import ConfigError
from stream3r_core.synthetic.front_end import (
    CEILING_M,
    PILLAR_RADIUS_M,
    WALKS,
    Disturbance,
    SimulatedFrontEnd,
    make_walk,
)

EXACT = Disturbance(0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize('kind', WALKS)
def test_walks_are_even_level_and_return_where_they_say(kind):
    T = make_walk(kind, 3).T_world_camera
    steps = np.linalg.norm(np.diff(T[:, :2, 3], axis=0), axis=1)
    assert 0.3 < steps.min() and steps.max() < 0.41
    np.testing.assert_allclose(np.linalg.det(T[:, :3, :3]), 1, atol=1e-9)
    assert (T[:, 2, 2] < 0).all() and (T[:, 2, 2] > -0.2).all()  # ahead, a little down
    turns = [sim3.rotation_log(a.T @ b) for a, b in zip(T[:-1, :3, :3], T[1:, :3, :3])]
    assert np.linalg.norm(turns, axis=1).max() < np.deg2rad(35)
    front_end = SimulatedFrontEnd(make_walk(kind, 3), 3)
    returns = any(
        front_end.is_revisit(i, j) for i in range(0, 60, 4) for j in range(100, len(T), 4)
    )
    assert returns == (kind not in ('corridor', 'spiral'))


def test_depths_lie_on_the_surfaces_and_nothing_stands_in_the_way():
    front_end = SimulatedFrontEnd(make_walk('eight', 1), 1, EXACT)
    for frame in (0, 40, 111):
        T = front_end.walk.T_world_camera[frame]
        depth = front_end.hall.depth(T, front_end.K, front_end.size_hw)
        points = sim3.act(T, grid_points(depth, front_end.K)[depth > 0])
        to_pillar = np.linalg.norm(points[:, None, :2] - front_end.hall.centres, axis=-1)
        misses = np.stack(
            [points[:, 2], points[:, 2] - CEILING_M, (to_pillar - PILLAR_RADIUS_M).min(1)]
        )
        assert np.abs(misses).min(0).max() < 1e-9
        assert (depth > 0).mean() > 0.5
        centre = (front_end.hall.centres - T[:2, 3]) / PILLAR_RADIUS_M
        assert np.linalg.norm(centre, axis=1).min() > 1.5


def test_drift_over_a_session_is_as_large_as_stated():
    walk = make_walk('corridor', 2)
    size = Disturbance(outliers=0.0, depth_noise=0.0, unit=0.0, pair=0.0)
    front_end = SimulatedFrontEnd(walk, 2, size, size_hw=(4, 4))
    frames = range(5, 29)
    true = np.linalg.inv(walk.T_world_camera[5]) @ walk.T_world_camera[28]
    path = 0.4 * 23
    errors, scales = [], []
    for _ in range(400):
        *_, (_, last) = front_end.session(frames)
        T = last.T_world_camera.numpy().astype(float)
        turned = sim3.rotation_log(true[:3, :3].T @ T[:3, :3])
        errors.append(np.concatenate([turned, T[:3, 3] - true[:3, 3]]))
        seen = front_end.hall.depth(walk.T_world_camera[28], front_end.K, (4, 4))
        scales.append(np.log(last.depth.numpy()[seen > 0] / seen[seen > 0]).mean())
    rotation, translation = np.std(errors, 0)[:3], np.std(errors, 0)[3:]
    np.testing.assert_allclose(np.rad2deg(rotation), 0.5, rtol=0.15)
    lever = path * np.array([np.deg2rad(0.5) / 2, np.deg2rad(0.5) / 2, 0.02 / 2])
    np.testing.assert_allclose(translation, np.hypot(0.01 * path, lever), rtol=0.2)
    assert np.std(scales) == pytest.approx(0.02, rel=0.15)


def test_the_stated_share_of_depths_is_wrong():
    front_end = SimulatedFrontEnd(make_walk('ring', 0), 0, Disturbance(0, 0, 0, 0.2, 0.01, 0, 0))
    wrong = []
    for frame, prediction in front_end.session(range(0, 60)):
        T = front_end.walk.T_world_camera[frame]
        exact = front_end.hall.depth(T, front_end.K, front_end.size_hw)
        ratio = prediction.depth.numpy()[exact > 0] / exact[exact > 0]
        wrong.append((np.abs(np.log(ratio)) > 0.05).mean())
    assert np.mean(wrong) == pytest.approx(0.2 * 0.95, abs=0.01)


def test_sessions_overlap_and_cover_the_walk():
    front_end = SimulatedFrontEnd(
        make_walk('laps', 0, size_m=0.3), 0, session_frames=10, overlap=3
    )
    frames = [(i, p.index) for i, p in front_end]
    starts = [i for i, index in frames if index == 0]
    assert starts == list(range(0, frames[-1][0] - 2, 7))
    assert {i for i, _ in frames} == set(range(len(front_end.walk.stamps_ns)))


def test_descriptors_tell_places_apart():
    front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0)
    a = front_end.descriptor(50)
    assert a @ front_end.descriptor(51) > 0.9 and abs(a @ front_end.descriptor(150)) < 0.4
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-6)


def test_an_unknown_walk_is_refused():
    with pytest.raises(ConfigError, match='expected one of laps'):
        make_walk('stroll', 0)
