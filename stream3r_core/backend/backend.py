"""From the predictions of restarting sessions to one map that closes its loops."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import Alignment, align_submaps
from stream3r_core.backend.arbiter import LoopArbiter
from stream3r_core.backend.atlas import Atlas
from stream3r_core.backend.config import BackendConfig
from stream3r_core.backend.keyframes import Keyframe, KeyframeSelector, to_keyframe
from stream3r_core.backend.places import Place, PlaceIndex
from stream3r_core.backend.pose_graph import Edge, PoseGraph
from stream3r_core.backend.sensors import Measured, Sensed, SensorFactors, SubmapSenses
from stream3r_core.backend.submap import Submap
from stream3r_core.backend.verification import (
    PairPredictor,
    Verdict,
    drift_covariance,
    moved_covariance,
    verify_pair,
)
from stream3r_core.config import MappingConfig
from stream3r_core.errors import InputError
from stream3r_core.types import FramePrediction


@dataclass(frozen=True)
class Joint:
    """How a new submap hangs on the one before it."""

    previous: int | None  # None: it is the first of all
    S_previous_key: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [7, 7] tangent at the new submap
    alignment: Alignment | None


@dataclass(frozen=True)
class BackendUpdate:
    """What became of one frame."""

    submap: int
    keyframe: Keyframe | None = None  # the frame, if it is one
    joint: Joint | None = None  # of this submap, when it has just been placed
    loops: tuple[tuple[int, int], ...] = ()  # submaps of the revisits that this frame has shown
    moved: bool = False  # poses of the map have changed
    measured: tuple[Measured, ...] = ()  # by other sensors, to go into the graph

    @property
    def is_keyframe(self) -> bool:
        """Whether the frame is one."""
        return self.keyframe is not None

    @property
    def alignment(self) -> Alignment | None:
        """Of this submap with the one before, when it has just been found."""
        return None if self.joint is None else self.joint.alignment


class SubmapBackend:
    """Feed it the predictions of a front end that restarts its session now and then.

    A prediction of index 0 starts a submap, whose frame is the session's world. Frames that the
    caller feeds to both sessions (same ``frame_id``) join the submaps. :meth:`add` does all work
    in the calling thread. It is :meth:`track`, which is quick, and :meth:`follow`, which searches
    revisits and optimises; these may run in a thread each, in the same order of frames (see
    :class:`~stream3r_core.backend.worker.BackendWorker`). :attr:`atlas` may be read from any.

    Frames: ``map`` is that of the first submap; ``odom`` is the same chain of submaps without any
    loop. It jumps only with the unit of the whole map, when sensors first tell its metres.
    """

    def __init__(
        self,
        config: BackendConfig | None = None,
        mapping: MappingConfig | None = None,
        predict_pairs: PairPredictor | None = None,
    ):
        self.config = config or BackendConfig()
        self._limit = self.config.submaps.max_submap_points
        self.mapping = mapping or MappingConfig()
        self._predict_pairs = predict_pairs
        self.atlas = self._live = Atlas(self.config.submaps)  # _live: where new submaps go
        self.next_key = 0
        self.last_frame_id = -1
        self.network = ''  # what tells the front end's network from others, for saved maps
        self._S_odom: dict[int, np.ndarray] = {}
        self._unjoined: dict[int, Joint] = {}  # placed by track, not in the graph yet
        # of the thread that tracks
        self._selector = KeyframeSelector(self.config.keyframes)
        self._submap: Submap | None = None
        self._previous: Submap | None = None
        self._tail: deque[Keyframe] = deque(maxlen=self.config.submaps.overlap)  # newest views
        self._old_tail: list[Keyframe] = []
        self._old_path = 0.0
        self._head: list[Keyframe] | None = None  # of a submap that is not joined yet
        self._senses: SubmapSenses | None = None
        self._old_senses: SubmapSenses | None = None
        # of the thread that follows
        self.graph = PoseGraph(self.config.graph)
        self.arbiter = LoopArbiter(self.graph, self.config.loops)
        self._sensors = SensorFactors(self.arbiter, self.config)
        self.places = PlaceIndex(self.config.places)
        self._num_loops: Counter[int] = Counter()  # found between this submap and older ones
        self._searching = -1  # the submap that these were found for
        self.num_loops = 0  # verified so far

    def add(
        self,
        prediction: FramePrediction,
        frame_id: int,
        descriptor: np.ndarray | Callable[[], np.ndarray] | None = None,
        sensed: Sensed | None = None,
    ) -> BackendUpdate:
        """Take in one frame.

        Args:
            prediction: Of the current session; index 0 starts a new submap.
            frame_id: Number of the image, >= 0; a new one is larger than all before.
            descriptor: Unit vector [C] for place recognition, or a function that computes it when
                the frame becomes a keyframe; None: the frame is not searched for.
            sensed: What other sensors know of the frame.

        Raises:
            InputError: The first prediction is not of index 0, the frame is older than the frames
                that submaps share, or its pose is not finite.

        """
        return self.follow(self.track(prediction, frame_id, sensed), descriptor)

    def track(
        self, prediction: FramePrediction, frame_id: int, sensed: Sensed | None = None
    ) -> BackendUpdate:
        """Give a frame its place in its submap, and a new submap its place on the one before.

        Arguments and errors as for :meth:`add`. Hand the answer to :meth:`follow`.
        """
        view = to_keyframe(prediction, frame_id, self.config.keyframes)
        if prediction.index == 0:
            self._start_submap()
        elif self._submap is None:
            raise InputError(
                f'the first prediction of a map has index {prediction.index}, expected 0; reset '
                'the session together with the back end'
            )
        self._submap.visit(view)
        self._senses.add(sensed, view.T_submap_camera)
        if frame_id <= self.last_frame_id:
            self._check_shared(frame_id)
            self._head.append(view)
            return BackendUpdate(self._submap.key)
        joint = self._join(view) if self._head is not None else None
        measured = self._measured(joint)
        self.last_frame_id = frame_id
        with self._live.lock:
            self._submap.add(prediction, view)
            self._live.touch(self._submap.key)
        self._tail.append(view)
        is_keyframe = self._selector.is_keyframe(view)
        keyframe = view if is_keyframe else None
        return BackendUpdate(self._submap.key, keyframe, joint, measured=measured)

    def _measured(self, joint: Joint | None) -> tuple[Measured, ...]:
        """What other sensors say: of the submap before when it has ended, soon of this one."""
        found, needed = [], self.config.sensors.min_ratios
        if joint is not None and self._old_senses is not None:
            found = self._old_senses.conclude(self._senses, needed)
            self._old_senses = None
        num_ratios = len(self._senses.log_ratios)
        if num_ratios == needed or (joint is not None and num_ratios > needed):
            found.append(self._senses.scale())
        return tuple(found)

    def follow(
        self,
        update: BackendUpdate,
        descriptor: np.ndarray | Callable[[], np.ndarray] | None = None,
    ) -> BackendUpdate:
        """Bring a tracked frame into the graph; search and verify revisits; optimise.

        Work on the graph that was left over goes on with every frame, so that it settles also
        where nothing new is seen.
        """
        moved, loops = False, ()
        if update.joint is not None:
            self._enter_graph(update.submap, update.joint)
            moved = self._optimise()
        if update.measured:
            moved |= self._measure(update.measured)
        if update.keyframe is not None:
            view = update.keyframe
            loops = self._remember(
                view, update.submap, descriptor() if callable(descriptor) else descriptor
            )
        moved |= self._optimise()
        return replace(update, loops=loops, moved=moved)

    def _measure(self, measured: tuple[Measured, ...]) -> bool:
        """Bring what other sensors say into the graph; whether the map has another unit now."""
        factor = self._sensors.take(measured)
        if factor == 1.0:
            return False
        S = sim3.from_parts(factor, np.eye(3), np.zeros(3))
        with self.atlas.lock:
            self._S_odom = {key: S @ S_odom for key, S_odom in self._S_odom.items()}
            return self._place()

    def _check_shared(self, frame_id: int) -> None:
        if self._head is None:
            raise InputError(
                f'frame {frame_id} has been added already; number frames upwards, and repeat '
                'only the last ones at the start of a new submap'
            )

    def _start_submap(self) -> None:
        is_begun = self._submap is not None and self._head is None
        if is_begun:  # a submap that has no frame of its own yet is dropped without loss
            with self._live.lock:
                self._submap.close()
                self._live.renumber(self._submap.key)
            self._previous, self._old_path = self._submap, self._submap.path_length
            self._old_tail, self._old_senses = list(self._tail), self._senses
        self._submap = self._new_submap()
        self.next_key += 1
        self._head, self._senses = [], SubmapSenses(self._submap.key)
        self._selector.reset()

    def _new_submap(self) -> Submap:
        return Submap(self.next_key, replace(self.mapping, max_points=self._limit))

    def _join(self, view: Keyframe) -> Joint:
        """Place the new submap: its first frame of its own has come."""
        head, self._head = self._head or [view], None
        key = self._submap.key
        if self._previous is None:
            joint, S_map, S_odom = Joint(None, np.eye(4), np.eye(7), None), np.eye(4), np.eye(4)
        else:
            alignment = align_submaps(self._old_tail, head, self.config.alignment)
            covariance = self._joint_covariance(alignment)
            joint = Joint(self._previous.key, alignment.S_old_new, covariance, alignment)
        with self._live.lock:  # meanwhile nothing moves, nor takes another unit
            if joint.previous is not None:
                S = joint.S_previous_key
                S_map = self._live.S_map_submap(joint.previous) @ S
                S_odom = self._S_odom[joint.previous] @ S
            self._S_odom[key], self._unjoined[key] = S_odom, joint
            self._live.add(self._submap, S_map)
        return joint

    def _enter_graph(self, key: int, joint: Joint) -> None:
        if joint.previous is None:
            self.graph.add_first(key, joint.S_previous_key)
        else:
            covariance = self.arbiter.drift_factor**2 * joint.covariance
            self.graph.add_submap(key, joint.previous, joint.S_previous_key, covariance)
        with self.atlas.lock:
            del self._unjoined[key]
        self._hold_budgets(key)

    def _joint_covariance(self, alignment: Alignment) -> np.ndarray:
        """Uncertainty [7, 7] of the new submap: drift of the old one, more where it is guessed."""
        if not self._old_tail:
            return self._anywhere()
        junction, config = self._old_tail[-1], self.config.alignment
        way = self._previous.T_submap_camera
        covariance = drift_covariance(way, 1.0, self._old_path, self.config.drift)
        if alignment.is_lost:
            length = config.lost_translation * junction.median_depth
            angle = np.deg2rad(config.lost_rotation_deg)
            covariance += np.diag(np.square([angle] * 3 + [length] * 3 + [config.lost_scale]))
        elif alignment.degeneracies:
            covariance *= 4
        S_junction_new = sim3.inverse(junction.T_submap_camera) @ alignment.S_old_new
        return moved_covariance(covariance, S_junction_new)

    def _anywhere(self) -> np.ndarray:
        """Uncertainty [7, 7] of a submap in a loaded map: it may be anywhere in it."""
        positions = self.atlas.trajectory()[2][:, :3, 3]
        extent = float(np.ptp(positions, axis=0).max(initial=0.0)) + 1.0
        return np.diag(np.square([np.pi] * 3 + [extent] * 3 + [1.0]))

    def _remember(self, view: Keyframe, key: int, descriptor) -> tuple[tuple[int, int], ...]:
        """Keep a keyframe; search and verify revisits."""
        if descriptor is not None:
            view = replace(view, descriptor=np.array(descriptor, np.float32))
        with self.atlas.lock:
            self.atlas.submaps[key].keyframes.append(view)
            order = {k: position for position, k in enumerate(self.atlas.submaps)}
        if descriptor is None:
            return ()
        loops = self._recognise(view.descriptor, view, key, order)
        self.places.add(key, view.frame_id, view.descriptor)
        return loops

    def _recognise(self, descriptor, view: Keyframe, key: int, order: dict[int, int]):
        """Search the places that look like a view, and verify them."""
        if key != self._searching:
            self._searching = key
            self._num_loops.clear()
        found = self.places.search(descriptor, key, order)
        wanted = [p for p in found if self._num_loops[p.submap] < self.config.loops.max_per_pair]
        return self._verify([(place.submap, self._keyframe(place)) for place in wanted], view, key)

    def _keyframe(self, place: Place) -> Keyframe:
        keyframes = self.atlas.submaps[place.submap].keyframes
        return next(k for k in keyframes if k.frame_id == place.frame_id)

    def _is_searched(self, keyframe: Keyframe) -> bool:
        """Whether it can be recognised, and shown to the network after that."""
        is_shown = keyframe.image_rgb is not None or not self.config.keyframes.keep_images
        return keyframe.descriptor is not None and is_shown

    def _verify(self, candidates, view: Keyframe, key: int) -> tuple[tuple[int, int], ...]:
        if not candidates or self._predict_pairs is None:
            return ()
        found = []
        views = self._predict_pairs([(keyframe, view) for _, keyframe in candidates])
        for (submap, keyframe), pair in zip(candidates, views):
            verdict = verify_pair(keyframe, view, pair, self.config.loops, self.config.alignment)
            if verdict.S_i_j is not None:
                covariance = verdict.covariance + self._inner_drift(
                    submap, keyframe, key, view, verdict
                )
                self.propose_loop(submap, key, verdict.S_i_j, covariance)
                self._num_loops[submap] += 1
                found.append((submap, key))
        self.num_loops += len(found)
        return tuple(found)

    def _inner_drift(
        self, i: int, first: Keyframe, j: int, second: Keyframe, verdict: Verdict
    ) -> np.ndarray:
        """What the poses of two keyframes may err by within their submaps, [7, 7] at origin j."""
        ahead, behind = self._drift_until(i, first), self._drift_until(j, second)
        S_first_j = sim3.inverse(first.T_submap_camera) @ verdict.S_i_j
        return moved_covariance(ahead, S_first_j) + moved_covariance(
            behind, sim3.inverse(second.T_submap_camera)
        )

    def _drift_until(self, key: int, view: Keyframe) -> np.ndarray:
        """What gathers from the origin of a submap to one of its views, [7, 7] at the view."""
        with self.atlas.lock, self._live.lock:
            submap = self.atlas.submaps.get(key) or self._live.submaps[key]
            inside = int(np.searchsorted(submap.frame_ids, view.frame_id, 'right'))
            way = submap.T_submap_camera[:inside]
        steps = np.diff(way[:, :3, 3], axis=0, prepend=np.zeros((1, 3)))
        fraction = min(inside / self.config.submaps.max_frames, 1.0)
        path = np.linalg.norm(steps, axis=1).sum()
        covariance = drift_covariance(way, fraction, path, self.config.drift)
        return self.arbiter.drift_factor**2 * covariance

    def propose_loop(self, i: int, j: int, S_i_j: np.ndarray, covariance: np.ndarray) -> None:
        """Propose a loop from elsewhere (a beacon, a person); judged like the back end's own."""
        self.arbiter.propose(i, j, S_i_j, covariance)

    def _optimise(self) -> bool:
        return self.arbiter.optimise() and self._place()

    def _place(self) -> bool:
        """Move all submaps to where the graph has them; the newest ones follow theirs."""
        with self.atlas.lock:
            poses = dict(self.graph.poses())
            for key, joint in self._unjoined.items():
                if joint.previous in poses:
                    poses[key] = poses[joint.previous] @ joint.S_previous_key
            return self.atlas.place(poses)

    def join_rest(self) -> None:
        """Let the graph know submaps whose frames were tracked and never followed."""
        for key, joint in list(self._unjoined.items()):
            self._enter_graph(key, joint)

    def settle(self, max_updates: int = 100) -> bool:
        """Optimise until nothing is left to do, as at the end of a recording; whether it ended."""
        for _ in range(max_updates):
            if not self.arbiter.optimise():
                return True
            self._place()
        return False

    def _hold_budgets(self, key: int) -> None:
        """Fold and thin what came before a submap."""
        if pairs := self.atlas.surplus(key):
            similarity = self.arbiter.fold(pairs)
            with self.atlas.lock:
                for folded, into in pairs:
                    self.atlas.fold(folded, into, similarity[folded])
                    self.places.rename(folded, into)
                    del self._S_odom[folded]
                self._place()
        if self.atlas.thin():
            keyframes = (k for submap in self.atlas.submaps.values() for k in submap.keyframes)
            self.places.keep_frames(k.frame_id for k in keyframes if self._is_searched(k))

    def S_odom_submap(self, key: int) -> np.ndarray:
        """Where a submap lies without any loop, [4, 4]."""
        return self._S_odom[key]

    def restore(
        self,
        submaps: list[Submap],
        S_map: dict[int, np.ndarray],
        S_odom: dict[int, np.ndarray],
        edges: list[Edge],
        doubted: list[Edge],
        waiting: list[Edge],
        next_key: int,
        last_frame_id: int,
        drift_factor: float,
    ) -> None:
        """Take over a saved map; see :mod:`stream3r_core.backend.map_file`."""
        self.graph.rebuild(edges, S_map)
        self._sensors.restore(edges)
        self.arbiter.drift_factor = drift_factor
        self.arbiter.doubted.extend(doubted)
        self.arbiter.waiting.extend(waiting)
        self._S_odom = dict(S_odom)
        self.next_key, self.last_frame_id = next_key, last_frame_id
        for submap in submaps:
            self.atlas.add(submap, S_map[submap.key])
            for keyframe in submap.keyframes:
                if self._is_searched(keyframe):
                    self.places.add(submap.key, keyframe.frame_id, keyframe.descriptor)
        self._previous = submaps[-1] if submaps else None

    def S_map_open(self) -> np.ndarray:
        """Where the submap of the newest frame lies, [4, 4]."""
        return self._live.S_map_submap(self._submap.key)

    def configure(self, mapping: MappingConfig) -> None:
        """Take other thresholds for the points to come; from the thread that tracks."""
        if mapping != self.mapping:
            self.mapping = mapping
            if self._submap is not None:
                self._submap.configure(replace(mapping, max_points=self._limit))

    def T_map_odom(self) -> np.ndarray:
        """Rigid correction [4, 4] that takes the newest camera pose of the chain to the map."""
        with self._live.lock:
            if self._submap is None or self._submap.key not in self._S_odom:
                return np.eye(4)
            key, T = self._submap.key, self._tail[-1].T_submap_camera
            T_map_camera = sim3.rigid_of(self._live.S_map_submap(key) @ T)
            T_odom_camera = sim3.rigid_of(self._S_odom[key] @ T)
        return T_map_camera @ sim3.inverse(T_odom_camera)

    def trajectory(self, corrected: bool = True, newest: int | None = None):
        """Return frame_ids [n], stamps_ns [n], poses [n, 4, 4] in the map, or in ``odom``.

        ``newest``: of so many frames only, the last ones.
        """
        return self._live.trajectory(None if corrected else dict(self._S_odom), newest)

    @property
    def num_moves(self) -> int:
        """Counts the corrections of poses."""
        return self._live.num_moves

    @property
    def is_localized(self) -> bool:
        """Whether the place of the newest frame in the map is known."""
        return True
