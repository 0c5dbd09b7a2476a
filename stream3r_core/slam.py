"""Sessions that restart into submaps, and the back end that holds these together: SLAM."""

import dataclasses
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from stream3r_core.backend import sim3
from stream3r_core.backend.atlas_map import AtlasMap
from stream3r_core.backend.backend import BackendUpdate, SubmapBackend
from stream3r_core.backend.localizer import Localizer
from stream3r_core.backend.map_file import load_map, pack_map
from stream3r_core.backend.network import NetworkWitness
from stream3r_core.backend.restart import RestartPolicy
from stream3r_core.backend.sensors import Sensed
from stream3r_core.backend.worker import BackendWorker
from stream3r_core.config import CoreConfig, MappingConfig
from stream3r_core.errors import ConfigError, DataError, InputError, NotLocalizedError
from stream3r_core.gpu_memory import free_gpu_memory
from stream3r_core.pipeline import Reconstructor, make_refiner, make_session
from stream3r_core.types import FramePrediction


class _Seen(NamedTuple):
    """An image that the next session may begin with."""

    frame_id: int
    image: object
    stamp_ns: int | None
    K: object


class SubmapReconstructor:
    """A reconstructor whose map closes its loops; used like :class:`Reconstructor`.

    The world frame is the frame of the map: the first camera of the first submap, in its unit.
    Predictions lie where the map is when they are made; :meth:`trajectory` tells where all poses
    are now, and :attr:`num_moves` counts how often they have moved. :meth:`flush` at the end of a
    recording waits for the back end.

    Args:
        model: A :class:`~stream3r_core.model.network.CausalVGGT`.
        config: All options; ``backend`` has those of the back end.
        in_background: Revisits are searched and the graph is optimised in a thread of its own.
            Without it a run can be repeated exactly.
        on_moved: Called after each correction, in that thread or by :meth:`flush`.
        sense: What other sensors know of a frame; asked with each prediction of a session, which
            lies in the frame and unit of that session.

    Raises:
        ConfigError: Options that do not go together.
        DataError: ``backend.load`` is no saved map, or one of another network.

    """

    def __init__(
        self,
        model,
        config: CoreConfig,
        in_background: bool = False,
        on_moved: Callable[[], None] | None = None,
        sense: Callable[[FramePrediction], Sensed | None] = lambda prediction: None,
    ):
        self.config = config
        self._on_moved, self._sense = on_moved, sense
        self.session = make_session(model, config)
        self._refiner = make_refiner(model, config)
        if self.session.chunk_size > 1:
            raise ConfigError(
                "backend.kind 'submaps' takes frame by frame: set cache.chunk_size (or "
                'cache_paper.chunk_size) to 1'
            )
        if not config.backend.keyframes.keep_images:
            raise ConfigError(
                "backend.kind 'submaps' looks at keyframes again: leave "
                'backend.keyframes.keep_images true'
            )
        if config.backend.localize_only and not config.backend.load:
            raise ConfigError('backend.localize_only needs a map: set backend.load to its file')
        self._witness = NetworkWitness(model)
        self._policy = RestartPolicy(config.backend.submaps)
        self._in_background = in_background
        self._worker: BackendWorker | None = None
        self._recent: deque[_Seen] = deque(maxlen=config.backend.submaps.overlap)
        self._is_full = False  # the next image begins a submap
        self.placed_at = 0  # num_moves that the newest prediction knew of
        self._begin_map(config.backend.load)

    def _begin_map(self, saved: str) -> None:
        options = self.config.backend
        kind = Localizer if options.localize_only else SubmapBackend
        self.backend = kind(options, self.config.mapping, self._witness.pairs_if_room)
        self.backend.network = self._witness.weights_sha256
        self._loaded_size_hw: tuple[int, int] | None = None  # of the images in a loaded map
        if saved:
            load_map(self.backend, saved)
            self._check_network(saved)
        self._last_loaded = self.backend.last_frame_id  # of a map that this run goes on in
        self.map = AtlasMap(self.backend.atlas)
        if self._in_background:
            self._worker = BackendWorker(self.backend, on_update=self._tell)

    def _check_network(self, saved: str) -> None:
        """Make sure that this network describes the images of a loaded map as its own did."""
        submaps = self.backend.atlas.submaps.values()
        with_image = [k for s in submaps for k in s.keyframes if k.image_rgb is not None]
        if with_image:
            self._loaded_size_hw = with_image[0].image_rgb.shape[:2]
        shown = next((k for k in with_image if k.descriptor is not None), None)
        if shown is None:
            return
        width = self._witness.describe(shown.image_rgb).size
        if width != shown.descriptor.size:
            raise DataError(
                f'{saved}: its places are described by {shown.descriptor.size} numbers, this '
                f'network gives {width}; run with the network that made the map'
            )

    def _check_size(self, prediction: FramePrediction) -> None:
        """Refuse images that the network sees at another size than those of a loaded map."""
        size_hw, expected = tuple(prediction.rgb.shape[:2]), self._loaded_size_hw
        if expected is not None and size_hw != expected:
            self._restart()
            raise InputError(
                f'the network sees this image with {size_hw[1]} x {size_hw[0]} pixels, those of '
                f'{self.config.backend.load} with {expected[1]} x {expected[0]}: they cannot be '
                'seen together; use the same camera resolution and image options, or another map'
            )

    def _tell(self, update: BackendUpdate) -> None:
        if update.moved and self._on_moved is not None:
            self._on_moved()

    @property
    def num_moves(self) -> int:
        """Counts the corrections of poses and map."""
        return self.backend.num_moves

    @property
    def is_metric(self) -> bool:
        """Whether other sensors have made the unit of the map the metre."""
        return self.backend.graph.is_metric

    def feed(self, image, stamp_ns: int | None = None, K=None) -> list[FramePrediction]:
        """Take one camera image; return its prediction in the map, on the CPU, in a list.

        Arguments and errors as :meth:`StreamSession.step`; also InputError for an image whose pose
        is not finite, after which a new session starts, for one of another size than those of
        the loaded map, and, with ``localize_only``, NotLocalizedError for images whose place in
        the map is not known yet.
        """
        if self._policy.is_pause(stamp_ns):
            self._restart()
        elif self._is_full:
            self._begin_submap()
        prediction = self._step(image, stamp_ns, K)
        self._check_size(prediction)
        reason = self._policy.reason(prediction)
        if reason == 'pose':
            self._restart()
            raise InputError(
                'the network gives no finite pose for this image; a new submap starts with the '
                'next one'
            )
        seen = _Seen(self.backend.last_frame_id + 1, image, stamp_ns, K)
        self._take(prediction, seen.frame_id)
        self._recent.append(seen)
        self._is_full = bool(reason)
        if not self.backend.is_localized:
            raise NotLocalizedError(
                f'the camera is not found in {self.config.backend.load} yet; its pose is told '
                'once two recognised places agree'
            )
        return [self._in_map(prediction)]

    def _step(self, image, stamp_ns: int | None, K) -> FramePrediction:
        return self._refiner.refine(self.session.step(image, stamp_ns, K).to('cpu'))

    def _take(self, prediction: FramePrediction, frame_id: int) -> None:
        update = self.backend.track(prediction, frame_id, self._sense(prediction))
        describe = partial(self._witness.description_if_room, prediction.rgb.numpy())
        worker = self._worker or self.backend
        worker.follow(update, describe)

    def _in_map(self, prediction: FramePrediction) -> FramePrediction:
        self.placed_at = self.num_moves  # before the place is read: at worst told too early
        S = self.backend.S_map_open()
        scale = float(sim3.scale_of(S))
        T = sim3.rigid_of(S @ prediction.T_world_camera.double().numpy())
        points = prediction.world_points
        if points is not None:
            points = torch.from_numpy(sim3.act(S, points.reshape(-1, 3).numpy())).view_as(points)
        return dataclasses.replace(
            prediction,
            T_world_camera=torch.from_numpy(T).float(),
            depth=prediction.depth * scale,
            world_points=points,
        )

    def _begin_submap(self) -> None:
        """Start a session that begins with the last images of the one before."""
        self._is_full = False
        self.session.reset()
        self._policy.reset()
        for seen in self._recent:
            prediction = self._step(seen.image, seen.stamp_ns, seen.K)
            if self._policy.reason(prediction) == 'pose':
                self._restart()
                return
            self._take(prediction, seen.frame_id)

    def _restart(self) -> None:
        """Start a session that shares no image with the one before."""
        self._is_full = False
        self.session.reset()
        self._policy.reset()
        self._recent.clear()

    def restart_at(self, T_world_camera: torch.Tensor) -> None:
        """Start a new submap; where it lies follows from the motion so far, and from revisits."""
        self._restart()

    def release_session(self) -> None:
        """Give the memory of the session back; the next image begins a new submap."""
        self.session = make_session(self.session.model, self.config)  # allocates when it is fed
        self._restart()
        free_gpu_memory(self.session.model.device)

    def flush(self) -> list[FramePrediction]:
        """Wait until the back end has done all there is to do; no prediction waits."""
        num_moves = self.num_moves
        if self._worker is None:
            self.backend.join_rest()  # a worker that was closed has dropped what waited
            self.backend.settle()
        else:
            self._worker.flush()
        if self._on_moved is not None and self.num_moves != num_moves:
            self._on_moved()
        return []

    def reset(self, keep_map: bool = False) -> None:
        """Start a new session, and unless ``keep_map`` or ``localize_only`` a new map."""
        self._restart()
        if keep_map:
            return
        try:
            self.close()
        finally:
            self._begin_map(self.config.backend.load if self.config.backend.localize_only else '')

    def close(self) -> None:
        """End the back end's thread; what waits there is dropped."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close(drop=True)

    def configure(self, mapping: MappingConfig) -> None:
        """Replace the thresholds of the points to come."""
        self.backend.configure(mapping)

    def figures(self) -> dict[str, int]:
        """Return what the back end has done so far."""
        localized = {'localized': int(self.backend.is_localized)}
        return (localized if self.config.backend.localize_only else {}) | {
            'submaps': len(self.backend.atlas.submaps),
            'keyframes': len(self.backend.places),
            'loops_verified': self.backend.num_loops,
            'corrections': self.num_moves,
            'backend_pending': 0 if self._worker is None else self._worker.num_pending,
            'backend_out_of_memory': self._witness.num_out_of_memory,
            **self._refiner.figures(),
        }

    def trajectory(
        self, corrected: bool = True, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return stamps_ns [n] and T_world_camera [n, 4, 4] of this run, as its frames lie now.

        ``corrected`` False: without loops. ``newest``: of so many frames only, the last ones.
        Frames without a stamp have ``NO_STAMP``.
        """
        frame_ids, stamps_ns, poses = self.backend.trajectory(corrected, newest)
        own = frame_ids > self._last_loaded
        return stamps_ns[own], poses[own]

    def pack(self) -> bytes | None:
        """Return the content of a file that ``backend.load`` takes: the map as it is.

        None with ``localize_only``: there is nothing that the file does not hold.
        """
        self.flush()
        if self.config.backend.localize_only:
            return None
        return pack_map(self.backend)


def make_reconstructor(
    model,
    config: CoreConfig,
    in_background: bool = False,
    on_moved: Callable[[], None] | None = None,
    sense: Callable[[FramePrediction], Sensed | None] = lambda prediction: None,
) -> Reconstructor | SubmapReconstructor:
    """Return what ``config.backend.kind`` asks for; arguments of :class:`SubmapReconstructor`."""
    if config.backend.kind == 'none':
        if config.backend.load or config.backend.localize_only:
            raise ConfigError(
                "backend.load and backend.localize_only need backend.kind 'submaps', got 'none'"
            )
        return Reconstructor(model, config)
    return SubmapReconstructor(model, config, in_background, on_moved, sense)
