"""Incremental pose graph on Sim(3): one similarity per submap, GTSAM's iSAM2 underneath.

Why GTSAM: its wheels (4.3, CPython 3.11 to 3.13, x86_64 and aarch64) hold both what is needed,
Sim(3) factors and iSAM2, so that an update costs what it changes: with 1,000 submaps
it takes a small part of solving the same graph anew (``benchmarks/backend_updates.py``, figures in
``benchmarks/RESULTS.md``). pyceres and symforce solve in batches only, g2o and CHOLMOD
(scikit-sparse) publish no wheel for this Python, and a solver of our own would have to be proved.
CPython 3.10 has no wheel of 4.3.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.config import GraphConfig
from stream3r_core.backend.factors import load_gtsam, make_factor, to_gtsam
from stream3r_core.errors import InputError

ANCHOR_SIGMA = 1e-4
FREE_SCALE = 10.0  # standard deviation of the log scale that other measurements determine


@dataclass(eq=False)  # an edge is itself, not its numbers
class Edge:
    """One measurement; covariances are of the tangent at its last end."""

    kind: str  # 'anchor', 'odometry', 'loop', 'motion', 'scale' or 'gravity'
    keys: tuple[int, ...]
    measurement: np.ndarray
    covariance: np.ndarray
    on_trial: bool = True  # a loop that is new in the graph: without kernel, so that it can pull
    times_off: int = 0  # that a loop was in the graph and taken out again
    slot: int | None = None  # of the factor in iSAM2


class PoseGraph:
    """Similarities ``S_map_submap`` of all submaps, held together by measurements.

    The map frame is that of the first submap. Measurements take effect in :meth:`step`. Loops are
    taken as they come: :class:`~stream3r_core.backend.arbiter.LoopArbiter` decides on them.
    Not safe for threads: one owner calls it.
    """

    def __init__(self, config: GraphConfig | None = None):
        self.config = config or GraphConfig()
        self._gtsam = load_gtsam()
        self.edges: list[Edge] = []
        self._new: list[Edge] = []
        self._changed: list[Edge] = []  # in the graph, with other numbers than there
        self._poses: dict[int, np.ndarray] = {}
        self._unknown: set[int] = set()  # submaps that iSAM2 has not heard of
        self._is_stale = False  # iSAM2 knows better
        self._anchors: list[Edge] = []
        self._odometry: dict[int, Edge] = {}  # by the submap that it appended
        self._loops: dict[int, list[Edge]] = {}  # in the graph, by their last end
        self.is_settled = True  # another step would change nothing of note
        self._isam = self._empty()

    def _empty(self):
        parameters = self._gtsam.ISAM2Params()
        parameters.setRelinearizeThreshold(self.config.relinearise)
        parameters.relinearizeSkip = 1
        return self._gtsam.ISAM2(parameters)

    def __len__(self) -> int:
        return len(self._poses)

    def __contains__(self, key: int) -> bool:
        return key in self._poses

    @property
    def keys(self) -> list[int]:
        """Submaps, in the order of their arrival."""
        return list(self._poses)

    def pose(self, key: int) -> np.ndarray:
        """``S_map_submap`` [4, 4] of the last optimisation."""
        return self.poses()[key]

    @property
    def loops(self) -> list[Edge]:
        """Loops in the graph."""
        return [edge for loops in self._loops.values() for edge in loops]

    def loops_at(self, keys: Iterable[int]) -> list[Edge]:
        """Loops in the graph whose last end is one of these submaps."""
        return [edge for key in keys for edge in self._loops.get(key, ())]

    @property
    def has_news(self) -> bool:
        """Whether measurements wait for the next step."""
        return bool(self._new or self._changed)

    @property
    def moves_on_step(self) -> bool:
        """Whether the next step may move what is there, rather than append to it."""
        appends = all(edge.kind in ('anchor', 'odometry') for edge in self._new)
        return not (appends and self.is_settled and not self._changed)

    def add_first(self, key: int, S_map_submap: np.ndarray) -> None:
        """Begin with a submap whose place is given."""
        if self._poses:
            raise InputError('the pose graph has a first submap already; add others by odometry')
        self._add_pose(key, S_map_submap)
        self._add('anchor', (key,), S_map_submap, ANCHOR_SIGMA**2 * np.eye(7))

    def add_submap(
        self, key: int, previous: int, S_previous_key: np.ndarray, covariance: np.ndarray
    ) -> None:
        """Append a submap by its similarity [4, 4] to another one and the covariance [7, 7]."""
        if key in self._poses:
            raise InputError(f'submap {key} is in the pose graph already')
        self.check(previous)
        self._add_pose(key, self.pose(previous) @ S_previous_key)
        self._add('odometry', (previous, key), S_previous_key, covariance)

    def add_motion(self, i: int, j: int, T_i_j: np.ndarray, covariance: np.ndarray) -> None:
        """Add a metric rigid motion [4, 4] between the origins of two submaps, m and rad.

        ``covariance`` [6, 6]: rotation, translation. The map then becomes metric.
        """
        self.check(i, j)
        self._add('motion', (i, j), T_i_j, covariance)

    def add_scale(self, key: int, metres_per_unit: float) -> None:
        """Add the metric scale of a submap, or replace it; the map then becomes metric."""
        self.check(key)
        if not metres_per_unit > 0:
            raise InputError(f'expected a scale above 0 metres per unit, got {metres_per_unit}')
        known = next(
            (e for e in self._all_edges() if e.kind == 'scale' and e.keys == (key,)), None
        )
        if known is not None:
            known.measurement = np.array([metres_per_unit], np.float64)
            self._changed += [known] if known in self.edges else []
            return
        variance = np.full((1, 1), self.config.scale_sigma**2)
        self._add('scale', (key,), np.array([metres_per_unit]), variance)

    def add_gravity(self, key: int, up_submap: np.ndarray, up_map: np.ndarray) -> None:
        """Add that unit vector ``up_submap`` [3] of a submap is ``up_map`` [3] of the map."""
        self.check(key)
        up = np.stack([up_submap, up_map]).astype(np.float64)
        up /= np.linalg.norm(up, axis=1, keepdims=True)
        variance = np.deg2rad(self.config.gravity_deg) ** 2 * np.eye(3)
        self._add('gravity', (key,), up, variance)

    def check(self, *keys: int) -> None:
        """Raise InputError for a submap that is not in the graph."""
        for key in keys:
            if key not in self._poses:
                raise InputError(f'submap {key} is not in the pose graph; add it first')

    def _add_pose(self, key: int, S_map_submap: np.ndarray) -> None:
        self._poses[key] = np.array(S_map_submap, np.float64)
        self._unknown.add(key)

    def _add(self, kind: str, keys: tuple[int, ...], measurement, covariance) -> None:
        measurement = np.array(measurement, np.float64)
        covariance = np.array(covariance, np.float64)
        if not (np.isfinite(measurement).all() and np.isfinite(covariance).all()):
            raise InputError(f'{kind} between submaps {keys} is not finite; leave it out')
        self._new.append(Edge(kind, keys, measurement, covariance))
        if kind == 'anchor':
            self._anchors.append(self._new[-1])
        if kind == 'odometry':
            self._odometry[keys[1]] = self._new[-1]
        if kind in ('motion', 'scale'):
            self._free_scale()

    def _all_edges(self) -> Iterator[Edge]:
        return chain(self.edges, self._new)

    @property
    def is_metric(self) -> bool:
        """Whether the unit of the map is the metre, as far as the measurements know it."""
        return any(anchor.covariance[6, 6] >= FREE_SCALE**2 for anchor in self._anchors)

    def _free_scale(self) -> None:
        """Let the map become metric: until now its unit was that of the first submap."""
        for anchor in self._anchors:
            if anchor.covariance[6, 6] < FREE_SCALE**2:
                anchor.covariance[6, 6] = FREE_SCALE**2
                self._changed += [anchor] if anchor in self.edges else []

    def rescale(self, factor: float) -> None:
        """Make the whole map ``factor`` times as large and let measurements tell its unit."""
        S = sim3.from_parts(factor, np.eye(3), np.zeros(3))
        self._free_scale()
        for anchor in self._anchors:
            anchor.measurement = S @ anchor.measurement
        self.rebuild(self.edges, {key: S @ pose for key, pose in self.poses().items()})

    def change(self, edges: Iterable[Edge]) -> None:
        """Note that edges of the graph have other numbers now; the next step takes them in."""
        self._changed.extend(edges)

    def step(self, loops: Iterable[Edge] = (), without: Iterable[Edge] = ()) -> None:
        """Make one step of iSAM2 with what was added and ``loops``, ``without`` some edges."""
        gone = set(without)
        changed = [edge for edge in self._changed if edge not in gone]
        without = {*gone, *changed}
        slots = [edge.slot for edge in without]
        if without:
            self.edges = [edge for edge in self.edges if edge not in without]
        edges = [*self._new, *changed, *loops]
        self._new, self._changed = [], []
        graph, values = self._gtsam.NonlinearFactorGraph(), self._gtsam.Values()
        for edge in edges:
            graph.add(make_factor(edge, self.config))
        for key in self._unknown:
            values.insert(key, to_gtsam(self._poses[key]))
        self._unknown.clear()
        result = self._isam.update(graph, values, slots)
        for edge, slot in zip(edges, result.getNewFactorsIndices()):
            edge.slot = slot
        self.edges.extend(edges)
        self._list_loops(edges, gone)
        delta = self._isam.getDelta().vector()  # since the point of linearisation
        self.is_settled = bool(np.abs(delta).max(initial=0) <= self.config.relinearise)
        self._is_stale = True

    def _list_loops(self, added: list[Edge], gone: set[Edge]) -> None:
        for edge in gone:
            if edge.kind == 'loop':
                self._loops[edge.keys[1]].remove(edge)
        for edge in added:
            if edge.kind == 'loop' and edge not in self._loops.setdefault(edge.keys[1], []):
                self._loops[edge.keys[1]].append(edge)

    def poses(self) -> dict[int, np.ndarray]:
        """``S_map_submap`` of all submaps after the last step; not to be written to."""
        if self._is_stale:
            estimate = self._isam.calculateEstimate()
            known = [key for key in self._poses if key not in self._unknown]
            matrices = np.array([estimate.atSimilarity3(key).matrix() for key in known])
            self._poses.update(zip(known, matrices / matrices[:, 3:, 3:]))  # of [R, t; 0, 1 / s]
            self._is_stale = False
        return self._poses

    def motion_misfit(
        self, i: int, j: int, T_i_j: np.ndarray, covariance: np.ndarray, scale_sigma: float
    ) -> float | None:
        """Squared Mahalanobis distance of a metric motion from the joint of two submaps.

        In 6 dimensions. ``covariance`` [6, 6] of the motion; ``scale_sigma`` of the log scale of
        submap i. None where the two are not joined.
        """
        joint = self._odometry.get(j)
        if joint is None or joint.keys != (i, j):
            return None
        s_i, s_j = (float(sim3.scale_of(self.pose(key))) for key in (i, j))
        R = sim3.rotation_of(joint.measurement)
        way = R.T @ (s_i * joint.measurement[:3, 3])  # metres, axes of j
        error = np.concatenate([sim3.rotation_log(T_i_j[:3, :3].T @ R), way - R.T @ T_i_j[:3, 3]])
        units = np.diag([1.0] * 3 + [s_j] * 3)
        total = units @ joint.covariance[:6, :6] @ units + covariance
        total[3:, 3:] += scale_sigma**2 * np.outer(way, way)
        return float(error @ np.linalg.solve(total, error))

    def nearby(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``S_i_j`` [4, 4] and a bound of the covariance [7, 7] of its tangent at j.

        Along the chain of odometry only, which is cheap, and tight for submaps that are near.
        """
        first, last = min(i, j), max(i, j)
        poses = self.poses()
        covariance = np.zeros((7, 7))
        at = last
        while at > first:
            edge = self._odometry[at]
            A = sim3.adjoint(sim3.inverse(poses[j]) @ poses[at])
            covariance = covariance + A @ edge.covariance @ A.T
            at = edge.keys[0]
        return sim3.inverse(poses[i]) @ poses[j], covariance

    def relative(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``S_i_j`` [4, 4] and the covariance [7, 7] of its tangent at j."""
        S_i_j = sim3.inverse(self.pose(i)) @ self.pose(j)
        joint = self._isam.jointMarginalCovariance([i, j]).fullMatrix()
        J = np.concatenate([-sim3.adjoint(sim3.inverse(S_i_j)), np.eye(7)], 1)
        return S_i_j, J @ joint @ J.T

    def distance(self, edge: Edge) -> float:
        """Squared Mahalanobis distance of a loop that is not in the graph.

        Dear, for the covariance of the graph; never more than its tension, which is without.
        """
        S_i_j, covariance = self.relative(*edge.keys)
        error = sim3.log(sim3.inverse(edge.measurement) @ S_i_j)
        return float(error @ np.linalg.solve(covariance + edge.covariance, error))

    def disagreement(self, first: Edge, second: Edge) -> float:
        """Squared Mahalanobis distance of two loops from each other.

        The cycle through both depends on the graph only between their first and between their
        last ends, not on what lies between the two ends of a loop.
        """
        S_i_k, cov_i_k = self.nearby(first.keys[0], second.keys[0])
        S_l_j, cov_l_j = self.nearby(second.keys[1], first.keys[1])
        S_k_j = second.measurement @ S_l_j
        error = sim3.log(sim3.inverse(first.measurement) @ S_i_k @ S_k_j)
        to_l, to_k = (sim3.adjoint(sim3.inverse(S)) for S in (S_l_j, S_k_j))
        covariance = first.covariance + cov_l_j
        covariance += to_l @ second.covariance @ to_l.T + to_k @ cov_i_k @ to_k.T
        return float(error @ np.linalg.solve(covariance, error))

    def tensions(self, loops: list[Edge]) -> np.ndarray:
        """Squared Mahalanobis distances [L] of loops from the solution that contains them."""
        poses = self.poses()
        first, last = (
            np.array([poses[edge.keys[end]] for edge in loops]).reshape(-1, 4, 4) for end in (0, 1)
        )
        measured = np.array([edge.measurement for edge in loops]).reshape(-1, 4, 4)
        error = sim3.log(sim3.inverse(measured) @ sim3.inverse(first) @ last)
        covariance = np.array([edge.covariance for edge in loops]).reshape(-1, 7, 7)
        return (error * np.linalg.solve(covariance, error[..., None])[..., 0]).sum(-1)

    def fold(self, pairs: Iterable[tuple[int, int]]) -> dict[int, np.ndarray]:
        """Make each submap ``key`` of pairs (key, into) a rigid part of the submap ``into``.

        Measurements at ``key`` become ones at ``into``; the graph is set up anew, once.
        Returns ``S_into_key`` [4, 4] of each.
        """
        similarities = {}
        for key, into in pairs:
            S_into_key, covariance = self.folding(key, into)
            for edges in (self.edges, self._new):
                edges[:] = moved_edges(edges, key, into, S_into_key, covariance)
            similarities[key] = S_into_key
            del self._poses[key]
        self.rebuild(self.edges)
        return similarities

    def folding(self, key: int, into: int) -> tuple[np.ndarray, np.ndarray]:
        """``S_into_key`` [4, 4] of the last step, and the covariance [7, 7] at key."""
        self.check(key, into)
        return self.nearby(into, key)

    def rebuild(self, edges: Iterable[Edge], poses: dict[int, np.ndarray] | None = None) -> None:
        """Set up iSAM2 anew with these measurements, from the present or the given poses."""
        self._poses = {k: np.array(S, np.float64) for k, S in (poses or self.poses()).items()}
        self._is_stale = False
        self._new, self.edges = [*edges, *self._new], []
        self._anchors = [e for e in self._new if e.kind == 'anchor']
        self._odometry = {e.keys[1]: e for e in self._new if e.kind == 'odometry'}
        self._changed, self._loops = [], {}
        self._isam = self._empty()
        self._unknown = set(self._poses)
        if self._poses:
            self.step()


def moved_edges(
    edges: Iterable[Edge], key: int, into: int, S_into_key: np.ndarray, covariance: np.ndarray
) -> list[Edge]:
    """Return the measurements after ``key`` became part of ``into``, whose ends are ``into`` now.

    They err by what ``S_into_key`` errs by in addition. Those that say nothing more are left out.
    """
    kept, edges = [], list(edges)
    told = {edge.kind for edge in edges if edge.keys == (into,)}
    before = next((e for e in edges if e.kind == 'motion' and e.keys == (into, key)), None)
    for edge in edges:
        keys = tuple(into if k == key else k for k in edge.keys)
        if key not in edge.keys:
            kept.append(edge)
        elif edge.kind == 'scale' and 'scale' not in told:
            kept.append(
                replace(edge, keys=keys, measurement=edge.measurement / sim3.scale_of(S_into_key))
            )
        elif edge.kind == 'gravity' and 'gravity' not in told:
            up_submap, up_map = edge.measurement
            up = np.stack([sim3.rotation_of(S_into_key) @ up_submap, up_map])
            kept.append(replace(edge, keys=keys, measurement=up))
        elif edge.kind == 'motion' and edge.keys[0] == key and before is not None:
            kept.append(_joined_motion(before, edge))
        elif edge.kind in ('odometry', 'loop') and keys[0] != keys[1]:
            if edge.keys[0] == key:
                measurement = S_into_key @ edge.measurement
                A = sim3.adjoint(sim3.inverse(edge.measurement))
                total = edge.covariance + A @ covariance @ A.T
            else:
                measurement = edge.measurement @ sim3.inverse(S_into_key)
                A = sim3.adjoint(S_into_key)
                total = A @ (edge.covariance + covariance) @ A.T
            kept.append(replace(edge, keys=keys, measurement=measurement, covariance=total))
    return kept


def _joined_motion(first: Edge, second: Edge) -> Edge:
    """The motion from the first to the last of three submaps."""
    covariance = first.covariance + second.covariance
    lever = sim3.hat(first.measurement[:3, :3] @ second.measurement[:3, 3])
    covariance[3:, 3:] += lever @ first.covariance[:3, :3] @ lever.T
    keys, T = (first.keys[0], second.keys[1]), first.measurement @ second.measurement
    return replace(second, keys=keys, measurement=T, covariance=covariance)
