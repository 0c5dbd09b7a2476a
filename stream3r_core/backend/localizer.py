"""Where a camera is in a saved map that stays as it is."""

from collections import deque
from typing import NamedTuple

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.arbiter import LIKELY
from stream3r_core.backend.atlas import Atlas
from stream3r_core.backend.backend import Joint, SubmapBackend
from stream3r_core.backend.config import BackendConfig
from stream3r_core.backend.keyframes import Keyframe
from stream3r_core.backend.submap import Submap
from stream3r_core.backend.verification import PairPredictor, moved_covariance
from stream3r_core.config import MappingConfig
from stream3r_core.errors import DataError, InputError

_AFAR = 1_000_000  # submaps between the map and this run: none is excluded from the search
_SUPPORT_TO_JUMP = 3  # sightings that must agree against a place that is known


class Sighting(NamedTuple):
    """Where the submap at hand lies, by one recognised place."""

    S_map_submap: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [7, 7] tangent at the submap


class Localizer(SubmapBackend):
    """A back end that only looks: :attr:`atlas` is a loaded map, nothing is added or moved in it.

    The submaps of this run hold poses and no points. Recognised places are verified as loops are;
    the first two that agree tell where the camera is (:attr:`is_localized`), later ones correct
    it in a filter on Sim(3) whose state is the place of the newest submap. Places that contradict
    it are left out, unless three agree with each other: then the robot was carried there.
    What it needs does not grow: submaps and poses of this run are held to the budgets of a map.
    """

    def __init__(
        self,
        config: BackendConfig | None = None,
        mapping: MappingConfig | None = None,
        predict_pairs: PairPredictor | None = None,
    ):
        super().__init__(config, mapping, predict_pairs)
        self._live = Atlas(self.config.submaps)
        self._at = -1  # the submap of this run that was followed last
        self._covariance: np.ndarray | None = None  # [7, 7] of its place; None: not known
        self._has_moved = False  # since the last update
        self._doubted: deque[Sighting] = deque(maxlen=self.config.loops.max_pending)

    @property
    def is_localized(self) -> bool:
        """Whether the camera's place in the map is known."""
        return self._covariance is not None

    def restore(self, submaps: list[Submap], *arguments) -> None:
        """Take over a saved map; this run begins at no place of it."""
        super().restore(submaps, *arguments)
        self._previous = None
        if not len(self.places):
            raise DataError(
                'the map to localise in has no keyframe with a descriptor and its image: save one '
                "that was made with backend.kind 'submaps' and its network"
            )

    def propose_loop(self, i: int, j: int, S_i_j: np.ndarray, covariance: np.ndarray) -> None:
        """Take a sighting from elsewhere: submap ``j`` of this run in submap ``i`` of the map."""
        S = self.atlas.S_map_submap(i) @ S_i_j
        R = sim3.nearest_rotation(sim3.rotation_of(S))  # networks answer in float32
        self._sight(j, Sighting(sim3.from_parts(sim3.scale_of(S), R, S[:3, 3]), covariance))

    def trajectory(self, corrected: bool = True, newest: int | None = None):
        """Return frame_ids, stamps_ns and poses of this run; none before the place is known."""
        is_known = self.is_localized or not corrected  # asked first: the places come before it
        frame_ids, stamps_ns, poses = super().trajectory(corrected, newest)
        known = slice(None if is_known else 0)
        return frame_ids[known], stamps_ns[known], poses[known]

    def settle(self, max_updates: int = 100) -> bool:
        """Return True: nothing is ever left to do."""
        return True

    def _new_submap(self) -> Submap:
        return Submap(self.next_key)

    def _enter_graph(self, key: int, joint: Joint) -> None:
        """Go on to a new submap; what is known of the last one is known less well of this one."""
        with self.atlas.lock:
            del self._unjoined[key]
        self._at = key
        if joint.previous is not None:
            S, carried = joint.S_previous_key, self._covariance
            if carried is not None:
                self._covariance = moved_covariance(carried, S) + joint.covariance
            moved = [
                Sighting(place @ S, moved_covariance(covariance, S) + joint.covariance)
                for place, covariance in self._doubted
            ]
            self._doubted.clear()
            self._doubted.extend(moved)
        self._hold_budgets(key)

    def _hold_budgets(self, key: int) -> None:
        with self._live.lock:
            for oldest in list(self._live.submaps)[: -self.config.submaps.max_submaps]:
                self._live.remove(oldest)
                del self._S_odom[oldest]
            self._live.thin()

    def _measure(self, measured) -> bool:
        return False  # the map has its unit

    def _optimise(self) -> bool:
        moved, self._has_moved = self._has_moved, False
        return moved

    def _remember(
        self, view: Keyframe, key: int, descriptor: np.ndarray | None
    ) -> tuple[tuple[int, int], ...]:
        """Look for the view in the map; keep nothing of it."""
        if descriptor is None:
            return ()
        order = {k: position for position, k in enumerate(self.atlas.submaps)} | {key: _AFAR}
        return self._recognise(np.array(descriptor, np.float32), view, key, order)

    def _sight(self, key: int, sighting: Sighting) -> None:
        if key != self._at:
            raise InputError(f'submap {key} is not the newest one of this run, {self._at}')
        place = self._live.S_map_submap(key)
        if self.is_localized and self._distance(Sighting(place, self._covariance), sighting) < (
            LIKELY * self.config.graph.inflation**2
        ):
            self._doubted.clear()
            self._correct(place, sighting)
            return
        friends = [old for old in self._doubted if self._distance(old, sighting) < LIKELY]
        needed = _SUPPORT_TO_JUMP - 1 if self.is_localized else self.config.loops.min_support
        if len(friends) < needed:
            self._doubted.append(sighting)
            return
        self._doubted.clear()
        is_first = not self.is_localized
        self._place_live(sighting.S_map_submap, with_past=is_first)
        self._covariance = sighting.covariance  # others read from it that the place is known
        for friend in friends:
            self._correct(self._live.S_map_submap(key), friend)

    def _distance(self, first: Sighting, second: Sighting) -> float:
        """Squared Mahalanobis distance."""
        error = sim3.log(sim3.inverse(first.S_map_submap) @ second.S_map_submap)
        return float(error @ np.linalg.solve(first.covariance + second.covariance, error))

    def _correct(self, place: np.ndarray, sighting: Sighting) -> None:
        """Draw the newest submap towards a sighting: the update of a Kalman filter."""
        P, error = self._covariance, sim3.log(sim3.inverse(place) @ sighting.S_map_submap)
        gain = np.linalg.solve(P + sighting.covariance, P).T
        self._covariance = (np.eye(7) - gain) @ P
        self._place_live(place @ sim3.exp(gain @ error))

    def _place_live(self, S_map_submap: np.ndarray, with_past: bool = False) -> None:
        """Move the newest submap that was followed, those after it, and maybe all before it."""
        with self._live.lock:
            S_submap_map = sim3.inverse(self._live.S_map_submap(self._at))
            others = [
                k for k in self._live.submaps if k > self._at or (with_past and k < self._at)
            ]
            poses = {
                key: S_map_submap @ (S_submap_map @ self._live.S_map_submap(key)) for key in others
            }
            self._has_moved |= self._live.place({**poses, self._at: S_map_submap})
