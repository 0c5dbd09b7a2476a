"""Joining submaps on shared frames: truth comes back through noise; degenerate cases are named."""

from dataclasses import replace

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import align_submaps, robust_scale, similarity_fit
from stream3r_core.backend.config import AlignmentConfig
from stream3r_core.backend.keyframes import Keyframe

K = np.array([[20.0, 0, 16], [0, 20, 12], [0, 0, 1]])
SHAPE = (24, 32)


def views(rng, count=3, baseline=0.4, flat=False):
    """Keyframes of one submap that see a bumpy scene; the poses advance along z."""
    result = []
    for k in range(count):
        T = sim3.exp(np.array([0.02 * k, 0.03 * k, 0, 0, 0, baseline * k, 0]))
        if flat:  # a wall square to the axis of the first camera
            T[:3, :3] = np.eye(3)
            depth = np.full(SHAPE, 6 - baseline * k)
        else:
            depth = rng.uniform(2, 6, SHAPE)
        stamp = 100_000_000 * k
        result.append(Keyframe(k, stamp, T, K, depth.astype(np.float32), rng.uniform(2, 8, SHAPE)))
    return result


def seen_by_another(frames, S_old_new, rng, noise=0.0, outliers=0.0):
    """The same frames in a submap that lies at ``S_old_new``."""
    result = []
    for frame in (f.moved(sim3.inverse(S_old_new)) for f in frames):
        factor = noise * rng.standard_normal(SHAPE)
        wrong = rng.random(SHAPE) < outliers
        factor[wrong] = rng.uniform(-2, 2, wrong.sum())
        result.append(replace(frame, depth=(frame.depth * np.exp(factor)).astype(np.float32)))
    return result


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('count', [1, 3])
def test_exact_frames_give_the_exact_similarity(seed, count):
    rng = np.random.default_rng(seed)
    old, S = views(rng, count), sim3.exp(rng.standard_normal(7))
    found = align_submaps(old, seen_by_another(old, S, rng))
    np.testing.assert_allclose(found.S_old_new, S, rtol=1e-4, atol=1e-4)
    assert found.method == 'points' and found.inlier_fraction == 1


@pytest.mark.parametrize('seed', range(20))
def test_a_third_of_wrong_depths_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    old, S = views(rng), sim3.exp(0.5 * rng.standard_normal(7))
    found = align_submaps(old, seen_by_another(old, S, rng, noise=0.02, outliers=0.33))
    error = sim3.log(sim3.inverse(S) @ found.S_old_new)
    assert np.linalg.norm(error[:3]) < np.deg2rad(0.4)
    assert abs(error[6]) < 0.004
    assert 0.6 < found.inlier_fraction < 0.8


def test_sure_pixels_count_more():
    rng = np.random.default_rng(0)
    first = rng.uniform(1, 5, 1000)
    second = first / np.where(np.arange(1000) < 400, 2.0, 2.1)
    sure, unsure = np.where(np.arange(1000) < 400, 20.0, 1.0), np.ones(1000)
    config = AlignmentConfig(depth_tolerance=0.01)
    assert robust_scale(first, second, sure, config).scale == pytest.approx(2.0, rel=2e-3)
    assert robust_scale(first, second, unsure, config).scale == pytest.approx(2.1, rel=2e-3)


@pytest.mark.parametrize('seed', range(10))
def test_weighted_fit_ignores_points_of_no_weight_and_mirrors_nothing(seed):
    rng = np.random.default_rng(seed)
    S, source = sim3.exp(rng.standard_normal(7)), rng.standard_normal((30, 3))
    target = sim3.act(S, source)
    target[20:] += 5
    weight = np.where(np.arange(30) < 20, rng.uniform(1, 2, 30), 0)
    np.testing.assert_allclose(similarity_fit(source, target, weight), S, atol=1e-9)
    mirrored = similarity_fit(source, source * [1, 1, -1], np.ones(30))
    assert np.linalg.det(mirrored[:3, :3]) > 0


def test_a_plane_is_named_and_joined_by_its_cameras():
    rng = np.random.default_rng(1)
    old, S = views(rng, flat=True), sim3.exp(0.3 * rng.standard_normal(7))
    found = align_submaps(old, seen_by_another(old, S, rng, noise=0.002))
    assert found.degeneracies == ('plane',) and found.method == 'poses'
    error = sim3.log(sim3.inverse(S) @ found.S_old_new)
    assert np.abs(error[:3]).max() < 1e-6 and abs(error[6]) < 1e-3


def test_pure_rotation_is_named():
    rng = np.random.default_rng(2)
    old, S = views(rng, baseline=0.0), sim3.exp(0.3 * rng.standard_normal(7))
    found = align_submaps(old, seen_by_another(old, S, rng))
    assert found.degeneracies == ('pure rotation',)
    np.testing.assert_allclose(found.S_old_new, S, atol=1e-4)


@pytest.mark.parametrize('case', ['other frames', 'no valid pixel', 'other depths', 'other size'])
def test_without_overlap_the_motion_is_carried_on_and_the_median_depth_kept(case):
    rng = np.random.default_rng(3)
    old = views(rng, 4, baseline=0.4)
    first = replace(old[3], T_submap_camera=np.eye(4), depth=old[3].depth / 2)
    new = {
        'other frames': [replace(first, frame_id=5, stamp_ns=500_000_000)],
        'no valid pixel': [replace(first, depth=np.zeros(SHAPE, np.float32))],
        'other depths': [
            replace(first, depth=rng.permuted(first.depth) * np.exp(rng.normal(0, 1, SHAPE)))
        ],
        'other size': [replace(first, depth=first.depth[:, :20], confidence=np.ones((24, 20)))],
    }[case]
    found = align_submaps(old, new)
    assert found.is_lost and found.method == 'constant velocity'
    assert found.degeneracies == ('no overlap',) and found.inlier_fraction == 0
    T = sim3.rigid_of(found.S_old_new)
    if case == 'other frames':  # two steps further
        step = sim3.inverse(old[2].T_submap_camera) @ old[3].T_submap_camera
        np.testing.assert_allclose(T, old[3].T_submap_camera @ step @ step, atol=1e-9)
        assert sim3.scale_of(found.S_old_new) == pytest.approx(2, rel=1e-5)
    else:
        np.testing.assert_allclose(T, old[3].T_submap_camera, atol=1e-9)


def test_a_long_pause_is_not_extrapolated_without_end():
    old = views(np.random.default_rng(4), 3)
    new = [replace(old[0], frame_id=99, stamp_ns=3_600_000_000_000, T_submap_camera=np.eye(4))]
    moved = np.linalg.norm((align_submaps(old, new).S_old_new - old[-1].T_submap_camera)[:3, 3])
    assert moved < 10 * 0.5
