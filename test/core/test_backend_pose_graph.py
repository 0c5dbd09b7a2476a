"""The pose graph: truth comes back, drift is spread, other factors count, folding keeps it."""

from dataclasses import replace

import numpy as np
import pytest
from backend_rings import DRIFT, EXACT, SIGMAS, between, chain, disturbed, error, ring

from stream3r_core.backend import sim3
from stream3r_core.backend.config import GraphConfig
from stream3r_core.backend.factors import make_factor, to_gtsam
from stream3r_core.backend.pose_graph import Edge, PoseGraph
from stream3r_core.errors import InputError


def settle(graph):
    graph.step()
    for _ in range(20):
        if graph.is_settled:
            return
        graph.step()
    pytest.fail('the graph does not settle')


def loop(truth, i, j):
    return Edge('loop', (i, j), between(truth, i, j), EXACT)


def test_exact_measurements_give_the_truth_with_all_scales():
    truth = ring(12)
    graph = chain(truth, np.random.default_rng(0), sigmas=0)
    np.testing.assert_allclose([graph.pose(k) for k in range(12)], truth, atol=1e-9)


def test_a_chain_without_loops_is_left_as_it_came():
    rng = np.random.default_rng(1)
    truth = ring(20)
    graph = PoseGraph()
    graph.add_first(0, truth[0])
    expected = truth[0]
    for k in range(1, 20):
        step = disturbed(between(truth, k - 1, k), rng)
        graph.add_submap(k, k - 1, step, DRIFT)
        graph.step()
        assert graph.is_settled
        expected = expected @ step
        np.testing.assert_allclose(graph.pose(k), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_a_loop_takes_out_drift(seed):
    truth = ring(40)
    graph = chain(truth, np.random.default_rng(seed))
    before = np.linalg.norm((graph.pose(39) - truth[39])[:3, 3])
    graph.step([loop(truth, 0, 39)])
    settle(graph)
    after = np.linalg.norm((graph.pose(39) - truth[39])[:3, 3])
    assert after < 0.1 * before


def test_whether_the_map_is_metric_is_known_without_a_look_at_its_edges():
    truth = ring(5)
    graph = chain(truth, np.random.default_rng(0))
    assert not graph.is_metric
    graph.add_scale(2, 1.5)
    graph.step()
    graph.rebuild(graph.edges)
    graph.edges = None  # it is asked with every frame
    assert graph.is_metric


def test_a_removed_loop_leaves_no_trace():
    truth = ring(30)
    graph = chain(truth, np.random.default_rng(2))
    before = dict(graph.poses())
    false = Edge('loop', (3, 20), sim3.exp(np.full(7, 0.3)), EXACT)
    graph.step([false])
    settle(graph)
    assert not np.allclose(graph.pose(20), before[20], atol=0.5)
    graph.step(without=[false])
    settle(graph)
    for key in graph.keys:
        np.testing.assert_allclose(graph.pose(key), before[key], atol=0.01)


def test_covariance_between_submaps_is_that_of_many_disturbed_chains():
    truth = ring(8)
    samples = []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        steps = [disturbed(between(truth, k, k + 1), rng, 0.3 * SIGMAS) for k in range(2, 6)]
        samples.append(sim3.log(between(truth, 6, 2) @ np.linalg.multi_dot(steps)))
    graph = PoseGraph()
    graph.add_first(0, truth[0])
    for k in range(1, 8):
        graph.add_submap(k, k - 1, between(truth, k - 1, k), 0.09 * DRIFT)
    graph.step()
    _, covariance = graph.relative(2, 6)
    measured = np.cov(np.array(samples).T)
    sigmas = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(np.sqrt(np.diag(measured)), sigmas, rtol=0.15)
    np.testing.assert_allclose(
        measured / np.outer(sigmas, sigmas), covariance / np.outer(sigmas, sigmas), atol=0.2
    )


def test_folding_submaps_keeps_the_map_and_its_loops():
    truth = ring(30)
    graph = chain(truth, np.random.default_rng(4))
    graph.step([loop(truth, 0, 29)])
    settle(graph)
    before = dict(graph.poses())
    graph.fold([(11, 10), (13, 12), (29, 28), (1, 0)])
    settle(graph)
    assert sorted(graph.keys) == [k for k in range(30) if k not in (1, 11, 13, 29)]
    assert [e.keys for e in graph.loops] == [(0, 28)]
    for key in graph.keys:
        np.testing.assert_allclose(graph.pose(key), before[key], atol=0.1)


def test_a_graph_set_up_from_its_measurements_goes_on_alike():
    truth = ring(30)
    graph = chain(truth, np.random.default_rng(5))
    again = PoseGraph()
    again.rebuild([replace(edge) for edge in graph.edges], graph.poses())
    for g in (graph, again):
        g.step([loop(truth, 0, 29)])
        settle(g)
    for key in graph.keys:
        np.testing.assert_allclose(again.pose(key), graph.pose(key), atol=5e-3)


def test_measured_scales_make_the_map_metric():
    truth = ring(20)
    truth[:, :3] *= 2.5  # two and a half metres per unit of the first submap

    def worst(graph):
        ratio = [sim3.scale_of(graph.pose(k)) / sim3.scale_of(truth[k]) for k in range(20)]
        return np.abs(np.log(ratio)).max()

    in_own_units = truth.copy()
    in_own_units[:, :3] /= 2.5
    graph = chain(in_own_units, np.random.default_rng(6))
    assert worst(graph) > 0.8
    for k in range(20):
        graph.add_scale(k, float(sim3.scale_of(truth[k])))
    settle(graph)
    assert worst(graph) < 0.03


def test_gravity_levels_the_map():
    truth = ring(30)
    graph = chain(truth, np.random.default_rng(7), 2 * SIGMAS)

    def tilt():
        up = np.array([sim3.rotation_of(graph.pose(k))[2] for k in range(30)])
        return np.arccos(np.clip((up * sim3.rotation_of(truth)[:, 2]).sum(-1), -1, 1)).max()

    before = tilt()
    for k in range(30):
        graph.add_gravity(k, sim3.rotation_of(truth[k])[2], np.array([0, 0, 1.0]))
    settle(graph)
    assert tilt() < 0.4 * before


def test_metric_motion_corrects_path_and_leaves_rotation_consistent():
    truth = ring(30)
    graph = chain(truth, np.random.default_rng(8))
    before = error(graph, truth)
    for k in range(1, 30):
        motion = sim3.inverse(sim3.rigid_of(truth[k - 1])) @ sim3.rigid_of(truth[k])
        graph.add_motion(k - 1, k, motion, np.diag([1e-3] * 3 + [5e-3] * 3) ** 2)
    settle(graph)
    assert error(graph, truth) < 0.1 * before


@pytest.mark.parametrize('kind', ['gravity', 'motion'])
def test_jacobians_are_those_of_finite_differences(kind):
    import gtsam

    rng = np.random.default_rng(9)
    poses = [sim3.exp(0.5 * rng.standard_normal(7)) for _ in range(2)]
    if kind == 'gravity':
        keys, measurement, covariance = (0,), np.array([[0, 0.6, 0.8], [0, 0, 1]]), np.eye(3)
    else:  # exact motion: derivatives are to first order in what is missed
        T = sim3.inverse(sim3.rigid_of(poses[0])) @ sim3.rigid_of(poses[1])
        keys, measurement, covariance = (0, 1), T, np.eye(6)
    factor = make_factor(Edge(kind, keys, measurement, covariance), GraphConfig())

    def values(moved=None, step=None):
        v = gtsam.Values()
        for k, S in enumerate(poses):
            v.insert(k, to_gtsam(S @ sim3.exp(step) if k == moved else S))
        return v

    A, _ = factor.linearize(values()).jacobian()
    residual = lambda v: -factor.linearize(v).jacobian()[1]  # noqa: E731
    numeric = []
    for k in keys:
        for axis in range(7):
            step = 1e-6 * np.eye(7)[axis]
            numeric.append((residual(values(k, step)) - residual(values(k, -step))) / 2e-6)
    np.testing.assert_allclose(A, np.array(numeric).T, atol=1e-6)


def test_misuse_is_refused_in_words():
    graph = PoseGraph()
    graph.add_first(0, np.eye(4))
    with pytest.raises(InputError, match='submap 7 is not in the pose graph'):
        graph.add_motion(0, 7, np.eye(4), np.eye(6))
    with pytest.raises(InputError, match='is in the pose graph already'):
        graph.add_submap(0, 0, np.eye(4), DRIFT)
    with pytest.raises(InputError, match='not finite'):
        graph.add_submap(1, 0, np.full((4, 4), np.nan), DRIFT)
    with pytest.raises(InputError, match='above 0'):
        graph.add_scale(0, 0.0)
