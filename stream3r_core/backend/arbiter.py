"""Which loops may move the map: false ones are worse than none.

A proposed loop passes through four hands.

1. Neighbours: it waits until another loop between nearby submaps agrees with it.
2. Drift: the graph takes it in when the drift that may have gathered between its ends explains it
   (Mahalanobis distance with marginal covariances); otherwise it is doubted.
3. Trial: in the graph it pulls with full force until all is settled. A robust kernel from the
   start would hold a true loop off after much drift. Then the solution judges: it is switched off
   where the other loops contradict it, else it is kept, with a Cauchy kernel.
4. Contest: doubted loops that agree with each other replace a smaller number of nearby loops that
   contradict them, unless that strains the odometry beyond what drift explains. A doubted loop
   also gets in once the graph has come to agree with it.

What drift explains is a model, and a network may be worse than it. So doubted loops between
several submaps that agree with each other, while no loop of the graph contradicts them, are
believed against the model: they tell by how much drift exceeds it (``drift_factor``), and all
odometry is given that uncertainty.

A max-mixture of two components in the sense of Olson and Agarwal, Inference on networks of
mixtures for robust robot mapping (2013), with agreement between loops in place of a prior.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.config import GraphConfig, LoopConfig
from stream3r_core.backend.pose_graph import Edge, PoseGraph, moved_edges
from stream3r_core.errors import InputError

LIKELY = 24.3  # squared distance that 99.9 % of 7-dimensional Gaussian errors stay below
_DIMENSIONS = 7
_MAX_TIMES_OFF = 3  # that a loop is switched off before it is forgotten
_CONTEST_STEPS = 8


class LoopArbiter:
    """Decides on loops and optimises the graph step by step."""

    def __init__(self, graph: PoseGraph, loops: LoopConfig | None = None):
        self.graph = graph
        self.config: GraphConfig = graph.config
        self.loop_config = loops or LoopConfig()
        self.waiting: deque[Edge] = deque(maxlen=self.loop_config.max_pending)
        self.doubted: deque[Edge] = deque(maxlen=self.config.max_dormant)
        self._proposed: list[Edge] = []
        self._last_speaker: Edge | None = None  # the newest doubted loop that had its contest
        self._limit = LIKELY * self.config.inflation**2
        self.drift_factor = 1.0  # by which drift was found to exceed its model

    def propose(self, i: int, j: int, S_i_j: np.ndarray, covariance: np.ndarray) -> Edge:
        """Propose a loop: submap ``j`` lies at ``S_i_j`` [4, 4] in ``i``; covariance [7, 7]."""
        self.graph.check(i, j)
        if i == j:
            raise InputError(f'a loop needs two submaps, got {i} twice')
        if not (np.isfinite(S_i_j).all() and np.isfinite(covariance).all()):
            raise InputError(f'the loop between submaps {i} and {j} is not finite; leave it out')
        S_i_j, covariance = np.array(S_i_j, float), np.array(covariance, float)
        if i > j:
            A = sim3.adjoint(S_i_j)
            i, j, S_i_j, covariance = j, i, sim3.inverse(S_i_j), A @ covariance @ A.T
        edge = Edge('loop', (i, j), S_i_j, covariance)
        self._proposed.append(edge)
        return edge

    def optimise(self) -> bool:
        """Take in what was added and improve all poses; return whether any may have moved.

        Bounded work: where it does not settle in ``max_iterations`` steps the next call goes on.
        """
        graph = self.graph
        if not (graph.has_news or self._proposed or not graph.is_settled):
            return False
        moves = graph.moves_on_step
        entering: list[Edge] = []
        for edge, friends in self._supported():
            if self._is_likely(edge, friends, entering):
                entering.append(edge)
        if not (moves or entering):
            graph.step()
            return self._hear_doubted()
        self._enter(entering)
        for _ in range(self.config.max_iterations - 1):
            if not graph.is_settled:
                graph.step()
        if graph.is_settled and not self._judge():
            self._retry()
            self._hear_doubted()
        return True

    def _supported(self) -> list[tuple[Edge, list[Edge]]]:
        """Proposed loops, and waiting ones, that neighbours agree with; and these neighbours."""
        proposed, self._proposed = self._proposed, []
        reach, needed = self.loop_config.neighbours, self.loop_config.min_support
        supported: list[tuple[Edge, list[Edge]]] = []
        for edge in proposed:
            inside = self.graph.loops_at(range(edge.keys[1] - reach, edge.keys[1] + reach + 1))
            new = [other for other, _ in supported]
            others = (*reversed(inside), *new, *reversed(self.waiting), *self.doubted)
            friends = list(islice(self._friends(edge, others), needed))
            if len(friends) < needed:
                self.waiting.append(edge)
                continue
            supported.append((edge, friends))
            for friend in friends:
                if friend in self.waiting:
                    self.waiting.remove(friend)
                    supported.append((friend, [edge]))
        return supported

    def _friends(self, edge: Edge, others: Iterable[Edge]) -> Iterator[Edge]:
        """Loops between nearby submaps that agree with this one."""
        for other in others:
            is_near = other is not edge and self._is_near(edge, other)
            if is_near and self.graph.disagreement(edge, other) <= LIKELY:
                yield other

    def _is_near(self, edge: Edge, other: Edge) -> bool:
        (i, j), (k, m), reach = edge.keys, other.keys, self.loop_config.neighbours
        return abs(i - k) <= reach and abs(j - m) <= reach

    def _is_likely(self, edge: Edge, friends: list[Edge], entering: list[Edge]) -> bool:
        """Whether gathered drift explains a loop, or one that it agrees with; or doubt it."""
        inside = self.graph.loops_at(friend.keys[1] for friend in friends)
        if any(f in entering or (f in inside and not f.on_trial) for f in friends):
            return True
        if self.graph.tensions([edge])[0] <= self._limit:  # which the distance never exceeds
            return True
        if self.graph.has_news:
            self.graph.step()  # marginal covariances are of what iSAM2 knows
        if self.graph.distance(edge) <= self._limit:
            return True
        self.doubted.append(edge)
        return False

    def _enter(self, loops: list[Edge]) -> None:
        for edge in loops:
            edge.on_trial = True
        self.graph.step(loops, without=self._oldest(len(loops)))

    def _oldest(self, num_new: int) -> list[Edge]:
        """Loops that must go so that ``num_new`` more stay in budget, and some in reserve."""
        inside, limit = self.graph.loops, self.config.max_loops
        if len(inside) + num_new <= limit:
            return []
        return sorted(inside, key=lambda edge: edge.keys[1])[: num_new + limit // 10]

    def _judge(self) -> bool:
        """Switch off the loop that the solution contradicts most; give new ones their kernel."""
        graph, loops = self.graph, self.graph.loops
        if not loops:
            return False
        tension = graph.tensions(loops)
        worst = int(tension.argmax())
        off = [loops[worst]] if tension[worst] > LIKELY else []
        proved = [edge for edge in loops if edge.on_trial and edge not in off]
        for edge in proved:
            edge.on_trial = False
        graph.change(proved)
        if off:
            graph.step(without=off)
        for edge in off:
            edge.times_off += 1
            if edge.times_off < _MAX_TIMES_OFF:
                self.doubted.append(edge)
        graph.is_settled &= not off  # others may follow
        return bool(off)

    def _retry(self) -> None:
        """Let those doubted loops in that the graph has come to agree with."""
        doubted = list(self.doubted)
        agreed = [e for e, d in zip(doubted, self.graph.tensions(doubted)) if d <= LIKELY]
        if agreed:
            self.doubted = deque((e for e in doubted if e not in agreed), self.doubted.maxlen)
            self._enter(agreed)
            self.graph.is_settled = False

    def _hear_doubted(self) -> bool:
        """Let the newest doubted loop and those that agree with it speak; whether that moved."""
        graph = self.graph
        if not self.doubted or self.doubted[-1] is self._last_speaker:
            return False
        speaker = self._last_speaker = self.doubted[-1]
        side = [speaker, *self._friends(speaker, list(self.doubted))]
        friends = set(self._friends(speaker, graph.loops))
        opponents = [e for e in graph.loops if self._is_near(speaker, e) and e not in friends]
        return self._contest(side, opponents) if opponents else self._believe(side)

    def _believe(self, side: list[Edge]) -> bool:
        """Take in loops that agree, if they are enough, and learn from them what drift is."""
        needed = self.config.consensus
        ends = [{edge.keys[end] for edge in side} for end in (0, 1)]
        if not needed or min(map(len, ends)) < min(needed, 2) or len(ends[1]) < needed:
            return False
        if self.graph.has_news:
            self.graph.step()
        distances = [self.graph.distance(edge) for edge in side]
        growth = float(np.sqrt(np.median(distances) / _DIMENSIONS))
        if self.drift_factor * growth > self.config.max_drift_factor:
            return False
        self.expect_drift(max(growth, 1.0))
        for edge in side:
            self.doubted.remove(edge)
        self._enter(side)
        self.graph.is_settled = False
        return True

    def expect_drift(self, growth: float) -> None:
        """Multiply the standard deviations of all joints, those to come included."""
        self.drift_factor *= growth
        odometry = [edge for edge in self.graph.edges if edge.kind == 'odometry']
        for edge in odometry:
            edge.covariance = growth**2 * edge.covariance
        self.graph.change(odometry)

    def _contest(self, side: list[Edge], opponents: list[Edge]) -> bool:
        """Let doubted loops that agree replace fewer nearby ones; return whether they did."""
        graph = self.graph
        if len(side) <= len(opponents):
            return False
        before, poses, doubted = list(graph.edges), dict(graph.poses()), list(self.doubted)
        state = [(edge, edge.on_trial, edge.times_off) for edge in (*graph.loops, *doubted)]
        strain = self._strain()
        for edge in side:
            self.doubted.remove(edge)
            edge.on_trial = True
        graph.step(side, without=opponents)
        for _ in range(_CONTEST_STEPS):
            if not graph.is_settled:
                graph.step()
            elif not self._judge():
                break
        if self._strain() - strain <= self._limit:
            return True
        for edge, on_trial, times_off in state:
            edge.on_trial, edge.times_off = on_trial, times_off
        self.doubted = deque(doubted, self.doubted.maxlen)
        graph.rebuild(before, poses)
        return False

    def _strain(self) -> float:
        """Sum of the squared Mahalanobis distances of the odometry."""
        return float(
            self.graph.tensions([e for e in self.graph.edges if e.kind == 'odometry']).sum()
        )

    def fold(self, pairs: list[tuple[int, int]]) -> dict[int, np.ndarray]:
        """Fold submaps (key, into), see :meth:`PoseGraph.fold`, and the loops in hand."""
        for key, into in pairs:
            folding = self.graph.folding(key, into)
            for loops in (self.waiting, self.doubted, self._proposed):
                kept = moved_edges(loops, key, into, *folding)
                loops.clear()
                loops.extend(kept)
        return self.graph.fold(pairs)
