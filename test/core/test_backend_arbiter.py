"""Which loops move the map: true ones do, false ones do not, whatever order they come in."""

import numpy as np
import pytest
from backend_rings import DRIFT, EXACT, SIGMAS, between, chain, disturbed, error, ring

from stream3r_core.backend import sim3
from stream3r_core.backend.arbiter import LoopArbiter
from stream3r_core.backend.config import GraphConfig, LoopConfig
from stream3r_core.errors import InputError

ALONE = LoopConfig(min_support=0)  # loops need no neighbour


def arbiter(truth, seed, loops=ALONE, config=None):
    return LoopArbiter(chain(truth, np.random.default_rng(seed), config=config), loops)


def settle(judge):
    for _ in range(60):
        if not judge.optimise():
            return
    pytest.fail('does not settle')


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('at_once', [True, False])
def test_false_loops_do_not_move_the_map(seed, at_once):
    truth, rng = ring(60, laps=2.0), np.random.default_rng(seed)
    true = [(k, k + 30, between(truth, k, k + 30)) for k in range(0, 30, 2)]
    proposals = [(i, j, disturbed(S, rng, 0.2 * SIGMAS)) for i, j, S in true]
    false = []
    for _ in range(6):
        i, j = sorted(rng.choice(60, 2, replace=False))
        false.append((int(i), int(j), sim3.exp(rng.standard_normal(7))))
    results = []
    for added in ([], false):
        judge = arbiter(truth, seed)
        everything = [*proposals, *added]
        order = np.random.default_rng(seed).permutation(len(everything))
        for index in order if added else range(len(everything)):
            i, j, S = everything[index]
            judge.propose(i, j, S, EXACT)
            if not at_once:
                judge.optimise()
        settle(judge)
        results.append(error(judge.graph, truth))
    assert results[1] == pytest.approx(results[0], rel=0.1)


def test_a_loop_that_the_graph_agrees_with_needs_no_marginal_covariance(monkeypatch):
    truth = ring(60, laps=2.0)
    judge = arbiter(truth, 0)
    judge.propose(0, 30, between(truth, 0, 30), EXACT)
    settle(judge)
    asked = []
    marginal = judge.graph.relative
    monkeypatch.setattr(
        judge.graph, 'relative', lambda *keys: asked.append(keys) or marginal(*keys)
    )
    sure = between(dict(judge.graph.poses()), 1, 31)
    off = 7 * np.sqrt(np.diag(EXACT)) * np.eye(7)[3]  # 49 of the 97 that are believed
    judge.propose(1, 31, sure @ sim3.exp(off), EXACT)
    judge.optimise()
    assert len(judge.graph.loops) == 2 and not asked
    judge.propose(2, 32, sim3.exp(np.full(7, 0.3)), EXACT)
    judge.optimise()
    assert asked == [(2, 32)]


def test_a_false_loop_that_came_first_gives_way_to_several_that_agree():
    truth = ring(60, laps=2.0)
    judge = arbiter(truth, 3)
    false = between(truth, 2, 32) @ sim3.exp(np.array([0, 0, 0.1, 2.0, 0, 0, 0]))
    judge.propose(2, 32, false, EXACT)  # within what drift allows: it gets in
    settle(judge)
    assert len(judge.graph.loops) == 1
    for k in range(0, 30, 3):
        judge.propose(k, k + 30, between(truth, k, k + 30), EXACT)
        judge.optimise()
    settle(judge)
    inside = judge.graph.loops
    assert [e.keys for e in inside if np.array_equal(e.measurement, false)] == []
    assert len(inside) >= 9


def test_an_agreeing_minority_loses_the_contest_and_the_map_stays():
    truth = ring(60, laps=2.0)
    judge = arbiter(truth, 4)
    for k in range(0, 30, 3):
        judge.propose(k, k + 30, between(truth, k, k + 30), EXACT)
        judge.optimise()
    settle(judge)
    before = dict(judge.graph.poses())
    wrong = sim3.exp(np.array([0, 0, 0.3, 8.0, 0, 0, 0]))
    for k in (10, 11, 12):  # as aliasing makes them: all with the same wrong place
        moved = (
            sim3.inverse(truth[k]) @ truth[20] @ wrong @ sim3.inverse(truth[50]) @ truth[k + 30]
        )
        judge.propose(k, k + 30, moved, EXACT)
        judge.optimise()
    settle(judge)
    assert len(judge.graph.loops) == 10
    for key, S in before.items():
        np.testing.assert_allclose(judge.graph.pose(key), S, atol=0.05)


def test_many_loops_that_agree_are_believed_against_the_drift_model_and_correct_it():
    truth, rng = ring(40, laps=2.0), np.random.default_rng(4)
    biased = truth.copy()  # by the same in every submap, far beyond the model
    bias = sim3.exp(np.array([0, 0, np.deg2rad(-5), 0, 0, 0, 0.02]))
    for k in range(1, 40):
        biased[k] = biased[k - 1] @ between(truth, k - 1, k) @ bias
    graph = chain(biased, rng)
    judge, before = LoopArbiter(graph, ALONE), error(graph, truth)
    for k in range(20):
        judge.propose(k, k + 20, disturbed(between(truth, k, k + 20), rng, 0.2 * SIGMAS), EXACT)
        judge.optimise()
    settle(judge)
    assert len(judge.graph.loops) > 10 and 3 < judge.drift_factor < 20
    assert error(judge.graph, truth) < 0.5 * before


def test_loops_of_one_submap_that_agree_are_not_many():
    truth, rng = ring(40, laps=2.0), np.random.default_rng(5)
    judge = arbiter(truth, 5)
    wrong = between(truth, 4, 24) @ sim3.exp(np.array([1.0, 0, 1.0, 9, 0, 9, 0.5]))
    for _ in range(8):
        judge.propose(4, 24, disturbed(wrong, rng, 0.2 * SIGMAS), EXACT)
        judge.optimise()
    settle(judge)
    assert not judge.graph.loops and judge.drift_factor == 1


def test_a_loop_waits_for_a_neighbour_that_agrees():
    truth = ring(40)
    judge = arbiter(truth, 5, LoopConfig(min_support=1))
    before = dict(judge.graph.poses())
    judge.propose(0, 39, between(truth, 0, 39), EXACT)
    judge.propose(1, 38, sim3.exp(np.ones(7)), EXACT)
    judge.propose(0, 20, between(truth, 0, 20), EXACT)  # true, but far from the others
    settle(judge)
    assert not judge.graph.loops and len(judge.waiting) == 3
    assert all(np.array_equal(judge.graph.pose(k), before[k]) for k in before)
    judge.propose(1, 39, between(truth, 1, 39), EXACT)
    settle(judge)
    assert sorted(e.keys for e in judge.graph.loops) == [(0, 39), (1, 39)]
    assert sorted(e.keys for e in judge.waiting) == [(0, 20), (1, 38)]


def test_folding_takes_waiting_and_doubted_loops_along():
    truth = ring(40)
    judge = arbiter(truth, 6, LoopConfig(min_support=1))
    judge.propose(1, 39, between(truth, 1, 39), EXACT)
    judge.optimise()
    judge.fold([(1, 0), (39, 38)])
    assert [e.keys for e in judge.waiting] == [(0, 38)]
    judge.propose(2, 37, between(truth, 2, 37), EXACT)
    settle(judge)
    assert sorted(e.keys for e in judge.graph.loops) == [(0, 38), (2, 37)]


def test_what_waits_is_bounded():
    truth = ring(10)
    judge = arbiter(truth, 0, LoopConfig(min_support=1, max_pending=7))
    other = arbiter(truth, 0, ALONE, GraphConfig(max_dormant=5))
    rng = np.random.default_rng(1)
    for _ in range(40):
        for one in (judge, other):
            one.propose(0, 5, sim3.exp(2 + rng.random(7)), EXACT)
            one.optimise()
    assert len(judge.waiting) == 7
    assert len(other.doubted) <= 5


def test_loops_in_the_graph_are_bounded_and_the_newest_stay():
    truth = ring(60, laps=2.0)
    judge = arbiter(truth, 1, config=GraphConfig(max_loops=10))
    for k in range(30):
        judge.propose(k, k + 30, between(truth, k, k + 30), EXACT)
        judge.optimise()
        assert len(judge.graph.loops) <= 10
    settle(judge)
    assert (29, 59) in [e.keys for e in judge.graph.loops]
    assert error(judge.graph, truth) < 0.7 * error(arbiter(truth, 1).graph, truth)


def test_a_loop_stated_backwards_is_the_same_loop():
    truth = ring(40)
    results = []
    for backwards in (False, True):
        judge = arbiter(truth, 7)
        S = disturbed(between(truth, 0, 39), np.random.default_rng(0), SIGMAS)
        covariance = np.diag(SIGMAS**2) * np.arange(1, 8)
        if backwards:
            A = sim3.adjoint(S)
            judge.propose(39, 0, sim3.inverse(S), A @ covariance @ A.T)
        else:
            judge.propose(0, 39, S, covariance)
        settle(judge)
        results.append(np.array(list(judge.graph.poses().values())))
    np.testing.assert_allclose(*results, atol=1e-6)


def test_misuse_is_refused_in_words():
    judge = arbiter(ring(5), 0)
    with pytest.raises(InputError, match='submap 7 is not in the pose graph'):
        judge.propose(0, 7, np.eye(4), DRIFT)
    with pytest.raises(InputError, match='two submaps'):
        judge.propose(0, 0, np.eye(4), DRIFT)
    with pytest.raises(InputError, match='not finite'):
        judge.propose(0, 1, np.full((4, 4), np.nan), DRIFT)
