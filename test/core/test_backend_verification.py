"""Verification: true pairs relate their submaps, every kind of wrong pair is refused by name."""

from dataclasses import replace

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.config import AlignmentConfig, DriftConfig, KeyframeConfig, LoopConfig
from stream3r_core.backend.keyframes import to_keyframe
from stream3r_core.backend.verification import (
    PairView,
    drift_covariance,
    moved_covariance,
    verify_pair,
)
from stream3r_core.errors import InputError
from stream3r_core.synthetic.front_end import Disturbance, SimulatedFrontEnd, make_walk


@pytest.fixture(scope='module')
def world():
    """A front end of exact poses and noisy depths, and two sessions that see one place."""
    quiet = Disturbance(0, 0, 0, outliers=0.2, depth_noise=0.01, unit=0.3, pair=0.003)
    front_end = SimulatedFrontEnd(make_walk('laps', 1), 1, quiet, size_hw=(36, 48))
    old, new = (
        [to_keyframe(p, i, KeyframeConfig()) for i, p in front_end.session(frames)]
        for frames in (range(10, 20), range(12, 22))
    )
    return front_end, old, new


def judge(world, first, second, loops=None, **changes):
    front_end = world[0]
    views = [PairView(*view) for view in front_end.pair(first.frame_id, second.frame_id)]
    views[1] = replace(views[1], **changes)
    return verify_pair(first, second, tuple(views), loops or LoopConfig(), AlignmentConfig())


def truth(world):
    """Similarity between the two submaps, from truth and the units that their depths show."""
    front_end, old, new = world
    units = []
    for frames in (old, new):
        depth = front_end.hall.depth(
            front_end.walk.T_world_camera[frames[0].frame_id], front_end.K, front_end.size_hw
        )
        valid = (depth > 0) & (frames[0].depth > 0)
        units.append(np.median(frames[0].depth[valid] / depth[valid]))
    T = [front_end.walk.T_world_camera[frames[0].frame_id] for frames in (old, new)]
    metres = [sim3.from_parts(unit, np.eye(3), np.zeros(3)) for unit in units]
    return metres[0] @ sim3.inverse(T[0]) @ T[1] @ sim3.inverse(metres[1])


@pytest.mark.parametrize('first, second', [(2, 0), (5, 5), (4, 1), (9, 8)])
def test_a_true_pair_relates_its_submaps(world, first, second):
    verdict = judge(world, world[1][first], world[2][second])
    assert verdict.reason == '' and verdict.covisible > 0.25 and verdict.consistent > 0.6
    error = sim3.log(sim3.inverse(truth(world)) @ verdict.S_i_j)
    assert np.linalg.norm(error[:3]) < 0.01 and abs(error[6]) < 0.03
    assert error @ np.linalg.solve(verdict.covariance, error) < 24.3


def test_an_unsure_pair_is_refused(world):
    verdict = judge(world, world[1][5], world[2][5], LoopConfig(min_confidence=9.0))
    assert verdict.reason == 'low confidence' and verdict.S_i_j is None


def test_cameras_that_look_apart_are_refused(world):
    away = sim3.from_parts(1, sim3.rotation_exp(np.array([0, np.pi, 0])), np.zeros(3))
    verdict = judge(world, world[1][5], world[2][5], T_pair_camera=away)
    assert verdict.reason == 'little covisible area'


def test_depths_that_contradict_the_relation_are_refused(world):
    beside = sim3.from_parts(1, np.eye(3), np.array([1.5, 0, -1.0]))
    verdict = judge(world, world[1][5], world[2][5], T_pair_camera=beside)
    assert verdict.reason == 'depths disagree'


def test_another_place_than_that_of_the_submap_is_refused(world):
    _, old, new = world
    rng = np.random.default_rng(0)
    depth = rng.permuted(old[5].depth) * rng.uniform(0.3, 3, old[5].depth.shape)
    verdict = judge(world, replace(old[5], depth=depth.astype(np.float32)), new[3])
    assert verdict.reason == 'no common scale with the submap'


@pytest.mark.parametrize('seed', range(3))
def test_pairs_of_different_places_are_refused(world, seed):
    front_end, old, _ = world
    far = [to_keyframe(p, i, KeyframeConfig()) for i, p in front_end.session(range(60, 70))]
    passed = [not judge(world, a, b).reason for a, b in zip(old, far)]
    assert not any(passed)


def test_images_of_another_size_are_an_error(world):
    with pytest.raises(InputError, match='predict from its own image'):
        judge(
            world, world[1][5], world[2][5], depth=np.ones((20, 48)), confidence=np.ones((20, 48))
        )


def test_moved_covariances_are_those_of_moved_samples():
    rng = np.random.default_rng(1)
    S_f_j = sim3.exp(np.array([0.3, -0.2, 0.5, 2, 1, -1, 0.4]))
    way = sim3.exp(np.linspace(0, 1, 9)[:, None] * np.array([0, 0.2, 0.1, 3, 0, 9, 0]))
    covariance = drift_covariance(way, 0.5, 10.0, DriftConfig())
    xi = rng.multivariate_normal(np.zeros(7), covariance, 20000)
    moved = sim3.log(sim3.inverse(S_f_j) @ sim3.exp(xi) @ S_f_j)
    expected = moved_covariance(covariance, S_f_j)
    sigma = np.sqrt(np.diag(expected))
    unit = np.outer(sigma, sigma)
    np.testing.assert_allclose(np.cov(moved.T) / unit, expected / unit, atol=0.04)


def test_drift_is_that_of_the_simulated_front_end_with_its_correlations():
    walk = make_walk('laps', 2)
    size = Disturbance(outliers=0.0, depth_noise=0.0, unit=0.0, pair=0.0)
    front_end, frames = SimulatedFrontEnd(walk, 2, size, size_hw=(2, 2)), range(5, 29)
    true = np.linalg.inv(walk.T_world_camera[5]) @ walk.T_world_camera[frames]
    path = np.linalg.norm(np.diff(true[:, :3, 3], axis=0), axis=1).sum()
    depth = front_end.hall.depth(walk.T_world_camera[28], front_end.K, (2, 2))
    errors = []
    for _ in range(600):
        *_, (_, last) = front_end.session(frames)
        scale = float(last.depth[0, 0]) / depth[0, 0]
        T = last.T_world_camera.numpy().astype(float)
        errors.append(sim3.log(sim3.inverse(true[-1]) @ T @ np.diag([scale] * 3 + [1.0])))
    expected = drift_covariance(true, 1.0, path, DriftConfig())
    sigma = np.sqrt(np.diag(expected))
    unit = np.outer(sigma, sigma)
    np.testing.assert_allclose(np.cov(np.array(errors).T) / unit, expected / unit, atol=0.2)
    assert np.abs(expected / unit - np.eye(7)).max() > 0.5  # what moves the end has turned it
