"""The ROS 2 node: images in; TF, pose, depth, path and map out, live.

The node is wiring. Executor callbacks only put things into mailboxes; one thread owns network,
session and map, and a second one builds and writes what is large.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import rclpy.task
import torch
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

from stream3r_core.errors import InputError, Stream3rError
from stream3r_core.pipeline import load_configured_model
from stream3r_ros.components import diagnostics_publisher
from stream3r_ros.config import NodeConfig
from stream3r_ros.diagnostics import (
    FrameStatistics,
    NodeStatus,
    ReconstructionFigures,
)
from stream3r_ros.live import LiveReconstruction
from stream3r_ros.logging_bridge import Throttled, forward_logging, stop_forwarding
from stream3r_ros.parameters import NodeParameters
from stream3r_ros.publishers import Publishers
from stream3r_ros.qos import SENSOR_DATA, Qos
from stream3r_ros.recorder import check_saving, save_snapshot
from stream3r_ros.services import Services, describe
from stream3r_ros.tf import check_frames
from stream3r_ros.transforms import TransformBuffer
from stream3r_ros.worker import Worker

WARNING_PERIOD_S = 5.0
CLEANUP_TIMEOUT_S = 10.0


class Incoming(NamedTuple):
    """An image on its way to the inference thread."""

    message: Image | CompressedImage
    arrival: float  # see FrameStatistics.received


class ContextEnded(BaseException):
    """The ROS context went down while a transition waited.

    No Exception, so that rclpy does not take it for a failed transition.
    """


class Stream3rNode(LifecycleNode):
    """Reconstructs what one camera sees.

    Managed: configure loads the weights, activate lets images in, deactivate shuts them out and
    keeps session and map, cleanup frees both. :attr:`ended` becomes done, with an exit code, when
    the node wants its process to end. Raises :class:`ConfigError` for unusable parameters.
    """

    def __init__(self, **node_options: Any):
        super().__init__(
            'stream3r', automatically_declare_parameters_from_overrides=True, **node_options
        )
        self._options = NodeParameters(self)
        check_frames(self.config)
        if self.config.save_map.on_exit:
            check_saving(self.config.save_map)
        self.ended = rclpy.task.Future()
        self._state, self._is_paused = 'unconfigured', False
        self._statistics = FrameStatistics(self.config.status.latency_window)
        self._refused: Counter[str] = Counter()
        self._num_lost = 0  # images that DDS has not delivered
        self._last_rejection: tuple[float, str] = (-WARNING_PERIOD_S, '')
        self._results = Publishers(self, self.config)
        self._transforms = TransformBuffer()
        self._warn = Throttled(lambda text: self.get_logger().warning(text))
        self._inference: Worker[Incoming] | None = None
        self._live: LiveReconstruction | None = None
        self._background, self._map_changes, self._grids = map(
            self._sender, ('background', 'map changes', 'occupancy grid')
        )
        self._log_handler = forward_logging(self)
        self._subscribe()
        self._listen_to_tf()
        self._listen_to_depth()
        self._serve()
        self._start_timers()
        self._options.check_qos_overrides()

    @property
    def config(self) -> NodeConfig:
        """The configuration as of now; live parameters change it."""
        return self._options.config

    def warn_of_unused(self, parameter_files: list[str]) -> None:
        """Warn of files that are for other nodes: rcl passes over them in silence."""
        if parameter_files and not self._options.is_given_any:
            name = self.get_fully_qualified_name()
            self.get_logger().warning(f'{parameter_files[-1]}: nothing in it is for {name}')

    # -- wiring -------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        self._image_topic = self.resolve_topic_name('image')
        kind = Image
        if self.config.image_transport == 'compressed':
            kind = CompressedImage
            if not self._image_topic.endswith('/compressed'):
                self._image_topic += '/compressed'  # where image_transport publishes it
        losses = SubscriptionEventCallbacks(message_lost=self._on_images_lost)
        self._subscribe_to(kind, self._image_topic, self._on_image, event_callbacks=losses)
        self._subscribe_to(CameraInfo, 'camera_info', self._on_camera_info)

    def _subscribe_to(
        self, kind: type, topic: str, callback: Callable[[Any], None], **options: Any
    ) -> None:
        overridable = QoSOverridingOptions.with_default_policies()
        qos = SENSOR_DATA.for_rclpy()
        self.create_subscription(
            kind, topic, callback, qos, qos_overriding_options=overridable, **options
        )

    def _listen_to_depth(self) -> None:
        if self.config.scale.source == 'depth':
            self._subscribe_to(Image, 'depth', self._on_depth)
            self._subscribe_to(CameraInfo, 'depth_camera_info', self._on_depth_camera_info)

    def _listen_to_tf(self) -> None:
        has_depth = self.config.scale.source == 'depth'
        if not (self.config.odom_frame or self.config.base_frame or has_depth):
            return
        for topic, qos in (('/tf', Qos(depth=100)), ('/tf_static', Qos(depth=100, latched=True))):
            listen = partial(self._on_tf, is_static=topic == '/tf_static')
            self.create_subscription(TFMessage, topic, listen, qos.for_rclpy())

    def _serve(self) -> None:
        self._triggers = Services(self)
        self._triggers.add('~/reset', self._reset)
        self._triggers.add('~/pause', self._pause)
        self._triggers.add('~/resume', self._resume)
        self._triggers.add('~/save_map', self._save_map)
        self._triggers.add('~/get_status', self._get_status)

    def _start_timers(self) -> None:
        wall = Clock(clock_type=ClockType.STEADY_TIME)  # also while simulated time stands still
        self._send_diagnostics = diagnostics_publisher(self, self._image_topic)
        status = self.config.status
        self.create_timer(status.period_s, self._publish_diagnostics, clock=wall)
        self.create_timer(status.log_period_s, self._log_status, clock=wall)
        outputs = self.config.outputs
        self.create_timer(outputs.map.period_s, self._request_map, clock=wall)
        self.create_timer(outputs.map_changes.period_s, self._request_map_changes, clock=wall)
        self.create_timer(outputs.occupancy_grid.period_s, self._request_grid, clock=wall)

    # -- lifecycle ----------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the weights on the inference thread; a known error leaves the node unconfigured."""
        self._inference = Worker(self._process, self._on_rejected, self._on_failure)
        self._inference.start()
        try:
            self._live = self._wait_for(self._inference.submit(self._load))
        except Exception as error:
            self._inference.stop(0)
            self._inference = None
            self.get_logger().fatal(describe(error))
            known = isinstance(error, Stream3rError)
            return TransitionCallbackReturn.FAILURE if known else TransitionCallbackReturn.ERROR
        self._state = 'inactive'
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let images in."""
        self._state, self._is_paused = 'active', False
        self.get_logger().info(f'waiting for images on {self._image_topic}')
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Shut images out; session and map stay."""
        self._state = 'inactive'
        self._finish_chunk()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free network, session and map; waits for the image in work."""
        wait([self._finish_chunk()], CLEANUP_TIMEOUT_S)
        if not self._inference.stop(CLEANUP_TIMEOUT_S):
            self.get_logger().warning('memory becomes free when the image in work is done')
        self._live.close()
        self._inference = self._live = None
        self._results.reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._state = 'unconfigured'
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Shut images out for good; the map stays for ``save_map.on_exit``."""
        self._state = 'finalized'
        if self._live is not None:
            self._finish_chunk()
        return super().on_shutdown(state)

    def start(self) -> bool:
        """Configure and activate; return whether the node is active."""
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def close(self, timeout_s: float) -> None:
        """Stop the threads; waits up to ``timeout_s`` for what they have in work."""
        self._state = 'finalized'
        end = time.monotonic() + timeout_s
        if self._live is not None:
            wait([self._finish_chunk()], timeout_s)
        workers = [
            worker
            for worker in (self._background, self._map_changes, self._grids, self._inference)
            if worker is not None
        ]
        have_ended = [worker.stop(max(0.0, end - time.monotonic())) for worker in workers]
        if self._live is not None and all(have_ended):
            self._live.close()
        stop_forwarding(self._log_handler)

    @property
    def num_waiting(self) -> int:
        """Images that wait for their chunk to fill (cache.chunk_size)."""
        return 0 if self._live is None else self._live.num_waiting

    def save_at_exit(self) -> list[Path]:
        """Write what ``~/save_map`` writes if ``save_map.on_exit`` is set; after :meth:`close`.

        Returns the paths. Raises :class:`InputError` where there is nothing to save,
        :class:`Stream3rError` where it cannot be saved.
        """
        config = self.config.save_map
        if not config.on_exit or self._live is None:
            return []
        return save_snapshot(self._live.snapshot(self.config), config)

    def destroy_node(self) -> None:
        """Free what the node has on the graph, so that others see at once that it is gone."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()  # which rclpy leaves to garbage collection

    def _load(self) -> LiveReconstruction:
        options, start = self.config.model, time.monotonic()
        self.get_logger().info(f'loading {options.preset!r}, weights {options.weights!r}')
        model = load_configured_model(options)
        took_s = time.monotonic() - start
        self.get_logger().info(f'loaded in {took_s:.1f} s: {model.weights_info}')
        return LiveReconstruction(
            model,
            self.config,
            self._results,
            self._transforms,
            self._hears_of_camera_info,
            self._on_moved,
        )

    def _hears_of_camera_info(self) -> bool:
        return self.count_publishers(self.resolve_topic_name('camera_info')) > 0

    def _on_moved(self) -> None:
        """Poses have moved, as a thread of the back end says: publish that before new images."""
        live, worker = self._live, self._inference
        if live is not None and worker is not None:
            worker.submit(live.follow_corrections)
            self._request_map()

    def _wait_for(self, future: Future) -> Any:
        """Return a worker's result; raises :class:`ContextEnded`."""
        while not wait([future], timeout=0.1).done:
            if not self.context.ok():
                raise ContextEnded
        return future.result()

    # -- images -------------------------------------------------------------------------------

    def _on_image(self, message: Image | CompressedImage) -> None:
        arrival = self._statistics.received()
        if self._state != 'active':
            self._refused['inactive'] += 1
        elif self._is_paused:
            self._refused['paused'] += 1
        else:
            self._inference.offer(Incoming(message, arrival))

    def _on_images_lost(self, event: Any) -> None:
        self._num_lost += event.total_count_change
        self._warn(f'{self._num_lost} images were lost on the way: see the troubleshooting of DDS')

    def _on_camera_info(self, message: CameraInfo) -> None:
        if self._live is not None:
            self._live.camera_info = message

    def _on_depth(self, message: Image) -> None:
        if self._live is None:
            return
        try:
            self._live.depth_images.add(message)
        except InputError as error:
            self._warn(f'depth image rejected: {error}')

    def _on_depth_camera_info(self, message: CameraInfo) -> None:
        if self._live is not None:
            self._live.depth_images.camera_info = message

    def _on_tf(self, message: TFMessage, is_static: bool) -> None:
        try:
            self._transforms.add(message, is_static)
        except InputError as error:
            self._warn(str(error))

    def _process(self, incoming: Incoming) -> None:
        self._live.process(incoming.message, self.config)
        self._statistics.processed(incoming.arrival)

    def _finish_chunk(self) -> Future:
        """Let the inference thread process the images that wait for their chunk to fill."""
        self._inference.discard_waiting()
        done = self._inference.submit(partial(self._live.finish_chunk, self.config))
        done.add_done_callback(self._report_unfinished_chunk)
        return done

    def _report_unfinished_chunk(self, done: Future) -> None:
        if done.exception() is not None and self.context.ok():
            self.get_logger().error(f'what waited was not sent: {describe(done.exception())}')

    def _on_rejected(self, error: InputError) -> None:
        self._last_rejection = time.monotonic(), str(error)
        if self.context.ok():
            self._warn(f'image rejected: {error}')

    def _on_failure(self, error: Exception) -> None:
        if not self.context.ok():
            return  # publishing fails when the context goes down under a frame: not an error
        self.get_logger().error(describe(error))
        if self.config.on_failure == 'exit':
            self.ended.set_result(1)
        else:
            self.get_logger().error(f'images are dropped until {self._name_of("reset")} is called')

    # -- map ----------------------------------------------------------------------------------

    def _request_map(self) -> None:
        if self._live is not None and self.config.outputs.map.enabled:
            self._background.offer(self._live.publish_map)

    def _request_map_changes(self) -> None:
        options = self.config.outputs.map_changes
        if self._live is not None and options.enabled:
            self._map_changes.offer(partial(self._live.publish_map_changes, options.max_points))

    def _request_grid(self) -> None:
        is_on = self._live is not None and self.config.outputs.occupancy_grid.enabled
        if is_on and self._results.is_grid_wanted:
            self._grids.offer(partial(self._live.publish_occupancy_grid, self.config))

    def _sender(self, name: str) -> Worker[Callable[[], None]]:
        """Start a thread that builds and sends what is large; what it loses is said."""

        def lost(error: Exception) -> None:
            sender.clear_failure()
            if self.context.ok():
                self.get_logger().error(f'a map message was lost: {describe(error)}')

        sender: Worker[Callable[[], None]] = Worker(lambda send: send(), lost, lost, name)
        sender.start()
        return sender

    # -- services -----------------------------------------------------------------------------

    async def _reset(self) -> str:
        worker, live = self._configured()
        worker.discard_waiting()
        await self._triggers.finished(worker.submit(partial(live.restart, self.config)))
        worker.clear_failure()
        return 'the next image starts a new session with an empty map'

    async def _pause(self) -> str:
        self._configured()
        self._is_paused = True
        self._finish_chunk()
        return f'images are dropped until {self._name_of("resume")} is called; the session stays'

    async def _resume(self) -> str:
        self._configured()
        self._is_paused = False
        return 'the session goes on with the next image'

    async def _get_status(self) -> str:
        status = self.status()
        return '\n'.join([status.sentence(), *(f'{k}: {v}' for k, v in status.values().items())])

    async def _save_map(self) -> str:
        worker, live = self._configured()
        config = self.config.save_map
        check_saving(config)  # before any work
        await self._triggers.finished(worker.submit(partial(live.finish_chunk, self.config)))
        snapshot = await self._triggers.finished(
            worker.submit(partial(live.snapshot, self.config))
        )
        write = partial(save_snapshot, snapshot, config)
        paths = await self._triggers.finished(self._background.submit(write))
        return '\n'.join(map(str, paths))

    def _configured(self) -> tuple[Worker, LiveReconstruction]:
        if self._live is None:
            raise Stream3rError('the node is not configured: no weights are loaded')
        return self._inference, self._live

    # -- status -------------------------------------------------------------------------------

    def status(self) -> NodeStatus:
        """Return all figures as of now."""
        worker, live = self._inference, self._live
        failed = worker is not None and worker.failure is not None
        frames = self._statistics.figures()
        return NodeStatus(
            state='failed' if failed else self._activity(),
            frames=frames,
            num_lost=self._num_lost,
            drops=self._refused
            + Counter(worker.drops if worker else {})
            + Counter(chunk=live.num_lost if live else 0),
            reconstruction=live.figures if live else ReconstructionFigures(),
            has_camera_info=live is not None and live.camera_info is not None,
            problem=self._problem(frames.rate_in_hz),
        )

    def _activity(self) -> str:
        return 'paused' if self._state == 'active' and self._is_paused else self._state

    def _problem(self, rate_in_hz: float) -> str:
        if self._inference is not None and self._inference.failure is not None:
            error = self._inference.failure
            return f'{type(error).__name__}: {error}; call {self._name_of("reset")}'
        rejected_at, reason = self._last_rejection
        if time.monotonic() - rejected_at < WARNING_PERIOD_S:
            return f'rejecting images: {reason}'
        if self._state == 'active' and not rate_in_hz:
            publishers = self.count_publishers(self._image_topic)
            return f'no images on {self._image_topic} ({publishers} publishers)'
        return ''

    def _publish_diagnostics(self) -> None:
        self._send_diagnostics(self.status())

    def _log_status(self) -> None:
        self.get_logger().info(self.status().sentence())

    def _name_of(self, service: str) -> str:
        return f'{self.get_fully_qualified_name()}/{service}'
