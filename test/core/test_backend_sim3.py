"""Sim(3): group laws, exponential and logarithm, against scipy's matrix exponential and GTSAM."""

import numpy as np
import pytest
from scipy.linalg import expm

from stream3r_core.backend import sim3

MAGNITUDES = [0.0, 1e-12, 1e-7, 1e-3, 0.3, 1.0]


def tangents(rng, count=50, rotation=1.0, translation=5.0, log_scale=1.0):
    xi = rng.standard_normal((count, 7))
    xi[:, :3] *= rotation * rng.random((count, 1)) / np.linalg.norm(xi[:, :3], axis=1)[:, None]
    xi[:, 3:6] *= translation
    xi[:, 6] *= log_scale
    return xi


def generator(xi):
    G = np.zeros((4, 4))
    G[:3, :3] = xi[6] * np.eye(3) + sim3.hat(xi[:3])
    G[:3, 3] = xi[3:6]
    return G


@pytest.mark.parametrize('rotation', [*MAGNITUDES, 3.1])
@pytest.mark.parametrize('log_scale', MAGNITUDES)
def test_exp_is_the_matrix_exponential_and_log_takes_it_back(rotation, log_scale):
    for xi in tangents(np.random.default_rng(1), 10, rotation, 2.0, log_scale):
        S = sim3.exp(xi)
        np.testing.assert_allclose(S, expm(generator(xi)), atol=1e-11)
        np.testing.assert_allclose(sim3.log(S), xi, atol=1e-8)


def test_tangents_mean_the_same_as_those_of_the_solver():
    gtsam = pytest.importorskip('gtsam', reason='extra "backend" is not installed')
    for xi in tangents(np.random.default_rng(2), rotation=2.0):
        S = gtsam.Similarity3.Expmap(xi)
        ours = sim3.from_parts(S.scale(), S.rotation().matrix(), S.scale() * S.translation())
        np.testing.assert_allclose(sim3.exp(xi), ours, rtol=1e-9, atol=1e-9)


def test_group_laws_hold_for_batches():
    rng = np.random.default_rng(3)
    a, b, c = (sim3.exp(tangents(rng)) for _ in range(3))
    points = rng.standard_normal((50, 7, 3))
    np.testing.assert_allclose(sim3.inverse(a) @ a, np.broadcast_to(np.eye(4), a.shape), atol=1e-9)
    np.testing.assert_allclose(sim3.inverse(a @ b), sim3.inverse(b) @ sim3.inverse(a), atol=1e-6)
    np.testing.assert_allclose((a @ b) @ c, a @ (b @ c), atol=1e-9)
    np.testing.assert_allclose(sim3.act(a @ b, points), sim3.act(a, sim3.act(b, points)))
    np.testing.assert_allclose(sim3.scale_of(a @ b), sim3.scale_of(a) * sim3.scale_of(b))


def test_parts_come_back():
    rng = np.random.default_rng(4)
    S = sim3.exp(tangents(rng))
    again = sim3.from_parts(sim3.scale_of(S), sim3.rotation_of(S), S[:, :3, 3])
    np.testing.assert_allclose(again, S, atol=1e-12)
    rigid = sim3.rigid_of(S)
    np.testing.assert_allclose(sim3.scale_of(rigid), 1)
    np.testing.assert_array_equal(rigid[:, :3, 3], S[:, :3, 3])


def test_distances_are_multiplied_by_the_scale():
    rng = np.random.default_rng(5)
    S, points = sim3.exp(tangents(rng)), rng.standard_normal((50, 2, 3))
    moved = sim3.act(S, points)
    lengths = [np.linalg.norm(p[:, 0] - p[:, 1], axis=-1) for p in (moved, points)]
    np.testing.assert_allclose(lengths[0], sim3.scale_of(S) * lengths[1])


def test_points_keep_their_type():
    points = np.ones((4, 3), np.float32)
    assert sim3.act(np.eye(4), points).dtype == np.float32


def test_adjoint_moves_a_tangent_to_the_other_side():
    rng = np.random.default_rng(6)
    S, xi = sim3.exp(tangents(rng)), tangents(rng, rotation=0.5, translation=0.1, log_scale=0.1)
    moved = (sim3.adjoint(S) @ xi[..., None])[..., 0]
    np.testing.assert_allclose(S @ sim3.exp(xi), sim3.exp(moved) @ S, atol=1e-8)
