"""What the inference thread owns: session, map, poses, and the messages of every frame."""

import dataclasses
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from stream3r_core.backend.sensors import Sensed
from stream3r_core.errors import InputError, NotLocalizedError, first_line
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.gpu_memory import is_out_of_memory
from stream3r_core.image import prepare
from stream3r_core.pipeline import incomplete_memory, known_uncertainty
from stream3r_core.slam import SubmapReconstructor, make_reconstructor
from stream3r_core.types import FramePrediction
from stream3r_ros.calibration import Calibrator
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import PINHOLE, Lens, image_from_message, stamp_ns
from stream3r_ros.diagnostics import ReconstructionFigures
from stream3r_ros.logging_bridge import Throttled
from stream3r_ros.map_topics import MapTopics
from stream3r_ros.odometry import Sigmas
from stream3r_ros.placement import Placement
from stream3r_ros.provenance import Provenance
from stream3r_ros.publishers import Publishers
from stream3r_ros.recorder import PoseRecorder, Snapshot
from stream3r_ros.scale import ScaleSource, ScaleTracker
from stream3r_ros.services import describe
from stream3r_ros.stamps import StampOrder
from stream3r_ros.tf import camera_frame
from stream3r_ros.tracking import OK, TrackingState, with_fitted_limits
from stream3r_ros.transforms import TransformBuffer, TransformError

CAMERA_INFO_WAIT_S = 1.0
_log = logging.getLogger(__name__)


class SeenImage(NamedTuple):
    """What the messages of an image need beside its prediction."""

    stamp_ns: int
    frame: str
    lens: Lens


class LiveReconstruction:
    """Takes image messages one by one and publishes what they add.

    ``on_moved`` is called, in a thread of the back end, when poses and map have moved; then
    :meth:`follow_corrections` publishes that also without a new image. All methods belong to one
    thread, but those of :attr:`map_topics`. ``camera_info`` may be replaced at any time: its
    intrinsics hold for images of the same size. A stamp that jumps back, or images of another
    size, start a new session.
    """

    def __init__(
        self,
        model,
        config: NodeConfig,
        publishers: Publishers,
        transforms: TransformBuffer,
        is_camera_info_announced: Callable[[], bool] = lambda: False,
        on_moved: Callable[[], None] | None = None,
    ):
        self._config = config  # of the image at hand
        self._reconstructor = make_reconstructor(model, config, True, on_moved, self._sense)
        self._num_moves = 0  # corrections that path and poses contain
        self._publishers = publishers
        publishers.outputs.uncertainty = known_uncertainty(model, config)
        self._transforms, self._placement = transforms, Placement(transforms)
        self._recorder = PoseRecorder(config.save_map.max_poses)
        self._calibrate = Calibrator(config.rectify)
        self._device = next(model.parameters()).device
        self._stamps = StampOrder()
        self.map_topics = MapTopics(publishers, lambda: self._reconstructor.map, self._poses)
        self._is_new = True
        self._scale, self.scale_source = ScaleTracker(), ScaleSource(transforms)
        self._size_hw: tuple[int, int] | None = None
        self._tracking = TrackingState()
        self._trusted_pose: torch.Tensor | None = None
        self._restarts: Counter[str] = Counter()
        self._num_gaps = 0
        self._warn = Throttled(_log.warning)
        self._warn_once = Throttled(_log.warning, quiet_s=float('inf'))
        self._sigmas: Sigmas | None = None
        self._report_memory = Throttled(_log.error)
        self.trouble = ''  # what should be mended although images go on
        self._report_trouble = Throttled(_log.error)
        num_kept = max(self._reconstructor.session.chunk_size, config.backend.submaps.overlap)
        self._seen: deque[SeenImage] = deque(maxlen=num_kept + 1)
        self.num_lost = 0  # images that were dropped with their chunk, all in all
        self._camera_info: Any = None
        self._camera_info_came = threading.Event()
        self._is_camera_info_announced = is_camera_info_announced
        self._status_period_s = config.status.period_s
        self._counted_at = -math.inf
        self.figures = self._figures()

    @property
    def camera_info(self) -> Any:
        """The sensor_msgs/CameraInfo that came last; None: none yet."""
        return self._camera_info

    @camera_info.setter
    def camera_info(self, message: Any) -> None:
        self._camera_info = message
        self._camera_info_came.set()

    def explain_attention(self) -> dict[str, str]:
        """Say of each attention backend whether it serves, or why not."""
        return self._reconstructor.session.explain_attention()

    def process(self, message: Any, config: NodeConfig) -> None:
        """Track one sensor_msgs/Image or CompressedImage, extend the map, publish.

        Raises :class:`InputError` for an image that cannot be used; the session goes on.
        """
        if self._is_new and self.camera_info is None and self._is_camera_info_announced():
            self._camera_info_came.wait(CAMERA_INFO_WAIT_S)  # both begin at the same time
        image, K, lens = self._calibrated(image_from_message(message))
        frame = camera_frame(message.header.frame_id, config)
        stamp = self._check_stamp(message, config)
        self._check_size(image, config)  # these two may start a new session: after all refusals
        if self._is_new:
            T_map_world = self._placement.map_of_first_camera(frame, stamp, config)
            self._publishers.outputs.lay(T_map_world)
        self._reconstructor.configure(config.mapping)
        self._seen.append(SeenImage(stamp, frame, lens))
        self._config = config
        self._stamps.note(stamp)
        try:
            predictions = self._predictions(lambda: self._reconstructor.feed(image, stamp, K))
        except NotLocalizedError:
            self._size_hw, self._is_new = image.shape[:2], False
            raise
        except Exception:
            self._seen.pop()
            raise
        self._size_hw, self._is_new = image.shape[:2], False
        self.follow_corrections()
        self._publish(predictions, config)  # none, or a whole chunk (cache.chunk_size)

    def finish_chunk(self, config: NodeConfig) -> None:
        """Process and publish the images that wait for their chunk to fill (cache.chunk_size).

        Returns when all messages are sent. Whatever error prevents it is raised; the images then
        count as dropped.
        """
        try:
            if self.num_waiting:
                self._publish(self._predictions(self._reconstructor.flush), config)
        finally:
            self._publishers.finish()

    @property
    def num_waiting(self) -> int:
        """Images that wait for their chunk to fill."""
        return self._reconstructor.session.num_waiting

    def _publish(self, predictions: list[FramePrediction], config: NodeConfig) -> None:
        for prediction in predictions:  # first, for publishing ends with the ROS context
            self._recorder.add(prediction.stamp_ns, prediction.T_world_camera.numpy())
        for prediction in predictions:
            _, frame, lens = self._image_of(prediction)
            self._find_scale(prediction, frame, config)
            carriers = self._placement.carriers(frame, prediction.stamp_ns, config)
            sent = self._publishers.publish(prediction, frame, config, *carriers, lens)
            self._sigmas = sent.sigmas
            self.map_topics.note(prediction)
            self._track(prediction, config)
        # what has just joined the path need not know of all corrections that the rest contains
        self._num_moves = min(self._num_moves, self._reconstructor.placed_at)
        self.follow_corrections()
        self.figures = self._figures()

    def _image_of(self, prediction: FramePrediction) -> 'SeenImage':
        """Return the image that a prediction is about: of a chunk, or of a submap's overlap."""
        return next(seen for seen in reversed(self._seen) if seen.stamp_ns == prediction.stamp_ns)

    def _predictions(self, produce: Callable[[], list[FramePrediction]]) -> list[FramePrediction]:
        """Run the session; where memory fails it, the session goes and the map stays."""
        num_waiting = self.num_waiting
        try:
            return produce()
        except Exception as error:
            self._count_lost_of_chunk(num_waiting)
            if not is_out_of_memory(error):
                self._give_up_incomplete_memory(error)
                raise
            reason = first_line(error)
        # Outside the handler: the exception holds the tensors of the failed image.
        self._reconstructor.release_session()
        self._begin_from_trusted_pose('out_of_memory')
        text = (
            f'out of GPU memory ({reason}): a new session goes on from the last trusted pose, the '
            'map stays; use session.mode stac or window, smaller images, or leave the node more '
            'memory (model.max_gpu_memory)'
        )
        self._report_memory(text)
        raise InputError(text)

    def _give_up_incomplete_memory(self, error: Exception) -> None:
        """Where an error has left the memory of the stream incomplete, a new session begins."""
        if self._reconstructor.session.is_broken:
            self._begin_from_trusted_pose('incomplete_memory')
            raise incomplete_memory(error) from error

    def _count_lost_of_chunk(self, num_waiting: int) -> None:
        self.num_lost += max(0, num_waiting - self.num_waiting)

    def _begin_from_trusted_pose(self, reason: str) -> None:
        """Start a new session in the same map, where tracking was last trusted."""
        if self._trusted_pose is None:
            self._reconstructor.reset(keep_map=True)
        else:
            self._reconstructor.restart_at(self._trusted_pose)
        self._tracking.reset()
        self._restarts[reason] += 1
        self.figures = self._figures()

    def follow_corrections(self) -> None:
        """Move path and odometry to where the back end has moved their frames.

        What prevents it costs no image: it is logged, is :attr:`trouble` until it works again,
        and is tried again with the next image.
        """
        num_moves = self._reconstructor.num_moves
        if num_moves == self._num_moves:
            return
        outputs = self._publishers.outputs
        try:
            outputs.correct(*self._reconstructor.trajectory(newest=outputs.max_path_poses))
            self._publishers.publish_path()
        except Exception as error:
            self.trouble = f'the path lacks a correction of the back end: {first_line(error)}'
            self._report_trouble(f'{self.trouble}\n{describe(error)}')
        else:
            self._num_moves, self.trouble = num_moves, ''

    def close(self) -> None:
        """End the back end's thread."""
        self._reconstructor.close()

    def _sense(self, prediction: FramePrediction) -> Sensed:
        """What the back end is told of a frame of a session, beside its image."""
        config, frame = self._config, self._image_of(prediction).frame
        if config.backend.localize_only:
            return Sensed()  # the map has the unit that it has
        options, T_odom_camera, up = config.backend.sensors, None, None
        if options.scale and prediction.index == 0:
            self.scale_source.reset()  # the session has a unit of its own
        if config.odom_frame and (options.odometry or options.gravity):
            try:
                T_odom_camera = self._transforms.lookup(
                    config.odom_frame, frame, prediction.stamp_ns, config.tf_timeout_s
                )
            except TransformError as error:
                self._warn(f'the back end goes without odometry for this image: {error}')
            else:
                up = T_odom_camera[2, :3] if options.gravity else None
        ratio = self.scale_source.ratio(prediction, frame, config) if options.scale else None
        return Sensed(T_odom_camera if options.odometry else None, ratio, up)

    def _find_scale(self, prediction: FramePrediction, frame: str, config: NodeConfig) -> None:
        """Update metres per scene unit, unless the map itself has them, or will."""
        if takes_metres(config, self._is_map_metric):
            return
        before, ratio = self._scale.value, self.scale_source.ratio(prediction, frame, config)
        if ratio is not None:
            self._scale.add(ratio, config.scale)
        if self._scale.value != before:
            self._publishers.outputs.set_scale(self._scale.value)

    def _track(self, prediction: FramePrediction, config: NodeConfig) -> None:
        before = self._tracking.state
        options = with_fitted_limits(config.tracking, self._publishers.outputs.uncertainty)
        state = self._tracking.update(prediction, options)
        if state != before:
            say = _log.info if state == OK else _log.warning
            say('tracking is %s: %s', state, self._tracking.quality)
        if state == OK:
            self._trusted_pose = prediction.T_world_camera
        is_hopeless = options.restart_after and self._tracking.num_lost >= options.restart_after
        if is_hopeless and self._trusted_pose is not None:
            _log.warning('a new session goes on from the last trusted pose; the map stays')
            self._begin_from_trusted_pose('lost')

    def restart(self, config: NodeConfig) -> None:
        """Start a new session: the next image is its first frame, the map is empty.

        Images that wait for their chunk to fill still are part of the old one.
        """
        try:
            self.finish_chunk(config)
        except Exception as error:  # must not keep a failed session from its reset
            self._warn(f'the images of an unfinished chunk are dropped: {error}')
        self.map_topics.forget()
        self._reconstructor.reset()
        self._num_moves, self.trouble = 0, ''
        self._publishers.reset()
        self._recorder.clear()
        self._tracking.reset()
        self._scale.reset()
        self.scale_source.reset()
        self._trusted_pose = self._size_hw = None
        self._seen.clear()
        self._stamps.reset()
        self._is_new = True
        self.figures = self._figures()

    def snapshot(self, config: NodeConfig) -> Snapshot:
        """Return poses and map as they are now; raises InputError before the first frame."""
        world, recorded = self._publishers.outputs.world, self._recorder.trajectory()
        map_file = None
        if isinstance(self._reconstructor, SubmapReconstructor):
            map_file = self._reconstructor.pack()
            recorded = Trajectory(*self._reconstructor.trajectory(), recorded.name)
        return Snapshot(
            dataclasses.replace(recorded, T_world_camera=world.poses(recorded.T_world_camera)),
            world.cloud(self._reconstructor.map.points()),
            self._recorder.num_forgotten,
            Provenance(self._reconstructor.session.model.weights_info, config),
            map_file,
        )

    def _poses(self) -> np.ndarray:
        """T_world_camera [n, 4, 4] of the frames of this run, as they lie now."""
        if isinstance(self._reconstructor, SubmapReconstructor):
            return self._reconstructor.trajectory()[1]
        return self._recorder.trajectory().T_world_camera

    def _check_stamp(self, message: Any, config: NodeConfig) -> int:
        stamp = stamp_ns(message)
        ahead_s = self._stamps.check(stamp, config.backward_jump_s)
        if ahead_s >= 0:
            self._note_gap(ahead_s, config)
            return stamp
        _log.warning(
            'time jumped back by %.3f s: a new session starts, with an empty map', -ahead_s
        )
        self._restarts['time'] += 1
        self.restart(config)
        return stamp

    def _note_gap(self, gap_s: float, config: NodeConfig) -> None:
        if config.max_gap_s and gap_s > config.max_gap_s:
            self._num_gaps += 1
            self._warn(f'no image for {gap_s:.3f} s: the poses after it may not fit')

    def _check_size(self, image: np.ndarray, config: NodeConfig) -> None:
        """Start a new session for images of another size, which the network cannot go on with."""
        size_hw = image.shape[:2]
        if self._size_hw is not None and size_hw != self._size_hw:
            prepare(image, config.image, self._reconstructor.session.model.config)  # may refuse
            self._warn(
                f'images have {size_hw[1]} x {size_hw[0]} pixels now: a new session starts, with '
                'an empty map'
            )
            self._restarts['image_size'] += 1
            self.restart(config)

    def _calibrated(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, Lens]:
        """Return the image, rectified if need be, and its intrinsics [3, 3] and lens if known."""
        if self.camera_info is None:
            return image, None, PINHOLE
        try:
            calibrated = self._calibrate(image, self.camera_info)
        except InputError as error:
            self._warn_once(f'{error}: the predicted field of view is used')
            return image, None, PINHOLE
        if calibrated.lens != PINHOLE:
            self._warn_once(
                "camera_info has distortion, and rectify is 'never': cloud and map are bent by it"
            )
        return calibrated

    @property
    def _is_map_metric(self) -> bool:
        mapper = self._reconstructor
        return isinstance(mapper, SubmapReconstructor) and mapper.is_metric

    def _metres_per_unit(self) -> float | None:
        return 1.0 if self._is_map_metric else self._scale.value

    def _figures(self) -> ReconstructionFigures:
        cache, cuda = self._reconstructor.session.cache, self._device.type == 'cuda'
        now = time.monotonic()
        if not cuda or now - self._counted_at >= self._status_period_s:  # a GPU must be waited for
            self._cache_tokens, self._cache_bytes = cache.num_tokens, cache.num_bytes
            self._counted_at = now
        return ReconstructionFigures(
            cache_tokens=self._cache_tokens,
            cache_bytes=self._cache_bytes,
            cache_capacity_bytes=cache.capacity_bytes,
            map_points=self._reconstructor.map.num_points,
            map_version=self._reconstructor.map.version,
            backend=self._reconstructor.figures(),
            frames_without_tf=self._placement.num_without_tf,
            frames_without_scale=self.scale_source.num_without,
            metres_per_unit=self._metres_per_unit(),
            tracking=self._tracking.state,
            quality=self._tracking.quality,
            sigmas=self._sigmas,
            gaps=self._num_gaps,
            restarts=dict(self._restarts),
            gpu_bytes=torch.cuda.memory_allocated(self._device) if cuda else None,
        )


def takes_metres(config: NodeConfig, is_map_metric: bool) -> bool:
    """Whether the back end brings the metres of other sensors into the map itself.

    A map that is only looked in stays as it is: with metres, or scaled on its way out.
    """
    options = config.backend.sensors
    if config.backend.localize_only:
        return is_map_metric
    has_odometry = bool(config.odom_frame) and options.odometry
    has_scale = config.scale.source != 'none' and options.scale
    return config.backend.kind != 'none' and (has_odometry or has_scale)
