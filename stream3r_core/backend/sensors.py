"""What other sensors know of the camera's way: odometry, metric scale, the direction of up.

Each submap is asked for its metric scale (median over its frames), for the metric motion to the
next one and for up. A wheel that slips, or a robot that is carried away, costs its own
measurement only.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.arbiter import LIKELY, LoopArbiter
from stream3r_core.backend.config import BackendConfig
from stream3r_core.backend.pose_graph import Edge

_MIN_MISFITS, _QUANTILE = 6, 0.3  # of the motions: where they tell how large drift is
_USUAL = 3.83  # that quantile of a squared distance in 6 dimensions
_MIN_MOTIONS = 3  # before their median is believed
_WINDOW = 50  # newest motions that the median is of
_WRONG_SCALE = 0.2  # of the logarithm: the robust kernels would not find back from farther away
_MIN_WAY_M = 0.05  # that tells a scale


@dataclass(frozen=True)
class Sensed:
    """What is known of one frame beside its image; None: nothing."""

    T_odom_camera: np.ndarray | None = None  # [4, 4] metres, rigid; `odom` drifts, without jumps
    metres_per_unit: float | None = None  # of the session that made the prediction
    up_camera: np.ndarray | None = None  # [3] against gravity, camera axes


class Measured(NamedTuple):
    """What the frames of a submap say together, on its way into the graph."""

    kind: str  # 'scale', 'motion' or 'gravity'
    keys: tuple[int, ...]
    value: np.ndarray | float  # metres per unit; T_i_j [4, 4] metres; up_submap [3]


@dataclass
class SubmapSenses:
    """Gathers what was sensed while a submap was open."""

    key: int
    T_odom_origin: np.ndarray | None = None  # of its first frame
    num_frames: int = 0
    log_ratios: list[float] = field(default_factory=list)
    ups: list[np.ndarray] = field(default_factory=list)

    def add(self, sensed: Sensed | None, T_submap_camera: np.ndarray) -> None:
        """Take what was sensed of the next frame."""
        self.num_frames += 1
        if sensed is None:
            return
        T, ratio, up = sensed.T_odom_camera, sensed.metres_per_unit, sensed.up_camera
        if self.num_frames == 1 and T is not None and np.isfinite(T).all():
            self.T_odom_origin = np.array(T, np.float64) @ sim3.inverse(T_submap_camera)
        if ratio is not None and np.isfinite(ratio) and ratio > 0:
            self.log_ratios.append(float(np.log(ratio)))
        if up is not None and np.isfinite(up).all():
            self.ups.append(T_submap_camera[:3, :3] @ (up / np.linalg.norm(up)))

    def scale(self) -> Measured:
        """Return the median of the ratios so far."""
        return Measured('scale', (self.key,), float(np.exp(np.median(self.log_ratios))))

    def conclude(self, following: 'SubmapSenses | None', min_ratios: int) -> list[Measured]:
        """Return all that is known when the submap has ended."""
        found = []
        if len(self.log_ratios) > min_ratios:  # at as many it was told already
            found.append(self.scale())
        if self.ups:
            found.append(Measured('gravity', (self.key,), np.mean(self.ups, 0)))
        origins = [self.T_odom_origin, following and following.T_odom_origin]
        if all(T is not None for T in origins):
            T_i_j = sim3.inverse(origins[0]) @ origins[1]
            found.append(Measured('motion', (self.key, following.key), T_i_j))
        return found


class SensorFactors:
    """Brings measurements into the graph and keeps its unit that of a metre.

    Motions are judged as loops are, by the drift that may have gathered; those that it does not
    explain wait, and come in when drift is found to be larger than its model.
    """

    def __init__(self, arbiter: LoopArbiter, config: BackendConfig):
        self.arbiter, self.graph, self.config = arbiter, arbiter.graph, config
        self._scales: deque[Measured] = deque(maxlen=_WINDOW)  # newest ones
        self._motions: deque[Measured] = deque(maxlen=_WINDOW)
        self._doubted: list[Measured] = []  # of the motions

    def restore(self, edges: Iterable[Edge]) -> None:
        """Remember what the edges of a saved map have measured."""
        for edge in sorted(edges, key=lambda edge: edge.keys):
            if edge.kind == 'scale':
                self._scales.append(Measured('scale', edge.keys, float(edge.measurement[0])))
            elif edge.kind == 'motion':
                self._motions.append(Measured('motion', edge.keys, edge.measurement))

    def take(self, measured: Iterable[Measured]) -> float:
        """Add factors; return by what the whole map was scaled for them, 1 as a rule."""
        graph = self.graph
        for m in measured:
            if m.kind == 'gravity':
                self._level(*m.keys, m.value)
            elif m.kind == 'scale':
                self._scales.append(m)
            else:
                self._motions.append(m)
                self._doubted.append(m)
        self._forget_folded()
        off = self._metres_off()
        if off is None:
            return 1.0
        factor = 1.0
        if not graph.is_metric or abs(off) > _WRONG_SCALE:
            factor = float(np.exp(off))
            graph.rescale(factor)
        for m in measured if graph.is_metric else ():
            if m.kind == 'scale':
                graph.add_scale(*m.keys, m.value)
        self._hear_motions()
        return factor

    def _forget_folded(self) -> None:
        for known in (self._scales, self._motions, self._doubted):
            there = [m for m in known if all(key in self.graph for key in m.keys)]
            known.clear()
            known.extend(there[-_WINDOW:])

    def _metres_off(self) -> float | None:
        """Logarithm of what the map is too small by; None: not known yet."""
        poses, ratios = self.graph.poses(), []
        for m in self._scales:
            ratios.append(np.log(m.value / sim3.scale_of(poses[m.keys[0]])))
        if ratios:
            return float(np.median(ratios))
        for m in self._motions:
            i, j = (poses[key][:3, 3] for key in m.keys)
            way, way_m = np.linalg.norm(i - j), np.linalg.norm(m.value[:3, 3])
            if min(way, way_m) > _MIN_WAY_M:
                ratios.append(np.log(way_m / way))
        return float(np.median(ratios)) if len(ratios) >= _MIN_MOTIONS else None

    def _hear_motions(self) -> None:
        """Add the motions that drift explains; expect more drift where most say that there is.

        A network may be far worse than its model of drift. The low quantile is that of right
        odometry also where much of it is wrong.
        """
        growth = 1.0
        misfits = [d for d in map(self._misfit, self._motions) if d is not None]
        if len(misfits) >= _MIN_MISFITS:
            growth = float(np.sqrt(np.quantile(misfits, _QUANTILE) / _USUAL))
        graph, factor = self.config.graph, self.arbiter.drift_factor * growth
        if growth > graph.inflation and factor <= graph.max_drift_factor:
            self.arbiter.expect_drift(growth)
        limit, waiting = LIKELY * graph.inflation**2, []
        for m in self._doubted:
            misfit = self._misfit(m)
            if misfit is not None and misfit <= limit:
                self.graph.add_motion(*m.keys, m.value, self._covariance(m.value))
            else:
                waiting.append(m)
        self._doubted = waiting

    def _misfit(self, motion: Measured) -> float | None:
        """Squared distance of a motion from what the submaps say themselves."""
        covariance, sigma = self._covariance(motion.value), self.config.drift.scale
        return self.graph.motion_misfit(*motion.keys, motion.value, covariance, sigma)

    def _covariance(self, T_i_j: np.ndarray) -> np.ndarray:
        options = self.config.sensors
        way = max(float(np.linalg.norm(T_i_j[:3, 3])), _MIN_WAY_M)
        turn = np.deg2rad(options.odometry_rotation_deg)
        return np.diag(np.square([turn] * 3 + [options.odometry_translation * way] * 3))

    def _level(self, key: int, up_submap: np.ndarray) -> None:
        """Give a submap the up of the first one that had any."""
        up_map = next((e.measurement[1] for e in self.graph.edges if e.kind == 'gravity'), None)
        if up_map is None:
            up_map = sim3.rotation_of(self.graph.pose(key)) @ up_submap
        self.graph.add_gravity(key, up_submap, up_map)
