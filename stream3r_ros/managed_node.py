"""The ROS 2 node: images in; TF, pose, depth, path and map out, live.

The node is wiring. Executor callbacks only put things into mailboxes; one thread owns network,
session and map, others build and write what is large.
"""

import gc
import time
from collections import Counter
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import rclpy.task
import torch
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CompressedImage, Image

from stream3r_core.errors import InputError, Stream3rError
from stream3r_core.pipeline import load_configured_model
from stream3r_ros.components import diagnostics_publisher
from stream3r_ros.config import NodeConfig
from stream3r_ros.diagnostics import (
    FrameStatistics,
    NodeStatus,
    ReconstructionFigures,
)
from stream3r_ros.inputs import Inputs
from stream3r_ros.lifecycle import told
from stream3r_ros.live import LiveReconstruction
from stream3r_ros.logging_bridge import Throttled, forward_logging, stop_forwarding
from stream3r_ros.map_threads import MapThreads
from stream3r_ros.parameters import NodeParameters
from stream3r_ros.publishers import Publishers
from stream3r_ros.recorder import check_saving, save_snapshot
from stream3r_ros.services import Services, describe
from stream3r_ros.tf import check_frames
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
        self._earlier_drops: Counter[str] = Counter()  # and those of no worker
        self._last_rejection: tuple[float, str] = (-WARNING_PERIOD_S, '')
        self._warn = Throttled(lambda text: self.get_logger().warning(text))
        self._results = Publishers(self, self.config)
        self._inference: Worker[Incoming] | None = None
        self._following: Future | None = None  # the last call to publish corrections
        self._live: LiveReconstruction | None = None
        self._log_handler = forward_logging(self)
        self._inputs = Inputs(self, self.config, self._on_image, lambda: self._live, self._warn)
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

    def _serve(self) -> None:
        self._triggers = Services(self)
        self._triggers.add('~/reset', self._reset)
        self._triggers.add('~/pause', self._pause)
        self._triggers.add('~/resume', self._resume)
        self._triggers.add('~/save_map', self._save_map)
        self._triggers.add('~/get_status', self._get_status)

    def _start_timers(self) -> None:
        wall = Clock(clock_type=ClockType.STEADY_TIME)  # also while simulated time stands still
        self._send_diagnostics = diagnostics_publisher(self, self._inputs.image_topic)
        status = self.config.status
        self.create_timer(status.period_s, self._publish_diagnostics, clock=wall)
        self.create_timer(status.log_period_s, self._log_status, clock=wall)
        self._map = MapThreads(
            self,
            lambda: self.config,
            lambda: None if self._live is None else self._live.map_topics,
            lambda: self._results.is_grid_wanted,
            wall,
        )

    # -- lifecycle ----------------------------------------------------------------------------

    @told
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the weights on the inference thread; a known error leaves the node unconfigured."""
        self._inference = Worker(self._process, self._on_rejected, self._on_failure)
        self._inference.start()
        loading = self._inference.submit(self._load)
        self._has_ended(loading)
        try:
            self._live = loading.result()
        except Exception:
            self._inference.stop(0)
            self._inference = None
            raise
        self._state = 'inactive'
        return super().on_configure(state)

    @told
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let images in."""
        self._state, self._is_paused = 'active', False
        self.get_logger().info(f'waiting for images on {self._inputs.image_topic}')
        return super().on_activate(state)

    @told
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Shut images out; session and map stay."""
        self._state = 'inactive'
        self._finish_chunk()
        return super().on_deactivate(state)

    @told
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free network, session and map.

        While an image is in work that cannot be done: the node stays inactive and can be asked
        again.
        """
        is_idle = self._has_ended(self._finish_chunk(), CLEANUP_TIMEOUT_S)
        if not (is_idle and self._inference.stop(CLEANUP_TIMEOUT_S)):
            raise Stream3rError(
                f'nothing is freed, as an image is in work for more than {CLEANUP_TIMEOUT_S:g} s: '
                'clean up again later'
            )
        self._close_live()
        self._let_go()
        self._results.reset()
        gc.collect()  # network and back end know each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return super().on_cleanup(state)

    @told
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Shut images out for good; the map stays for ``save_map.on_exit``."""
        self._state = 'finalized'
        if self._live is not None:
            self._finish_chunk()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything after an unexpected error: the node is unconfigured."""
        if self._inference is not None and self._inference.stop(0) and self._live is not None:
            self._close_live()
        self._let_go()
        return super().on_error(state)

    def _let_go(self) -> None:
        """Forget the reconstruction and its thread, not what they have dropped."""
        self._earlier_drops = self._drops()
        self._inference = self._live = None
        self._state = 'unconfigured'

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
            worker for worker in (*self._map.workers, self._inference) if worker is not None
        ]
        have_ended = [worker.stop(max(0.0, end - time.monotonic())) for worker in workers]
        if all(have_ended):
            self._results.close(max(0.0, end - time.monotonic()))
            if self._live is not None:
                self._close_live()
        stop_forwarding(self._log_handler)

    def _close_live(self) -> None:
        try:
            self._live.close()
        except Exception as error:  # of a back end that has failed: what there is stays usable
            if self.context.ok():
                self.get_logger().error(describe(error))

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
        live = LiveReconstruction(
            model,
            self.config,
            self._results,
            self._inputs.transforms,
            lambda: self._inputs.is_camera_info_announced,
            self._on_moved,
        )
        backends = live.explain_attention().items()
        self.get_logger().info('attention: ' + '; '.join(f'{k}: {v}' for k, v in backends))
        return live

    def _on_moved(self) -> None:
        """Poses have moved, as a thread of the back end says: publish that before new images."""
        live, worker, earlier = self._live, self._inference, self._following
        if live is None or worker is None:
            return
        if earlier is None or earlier.running() or earlier.done():  # else that one will see it
            self._following = worker.submit(live.follow_corrections)
        self._map.request_map()

    def _has_ended(self, work: Future, timeout_s: float = float('inf')) -> bool:
        """Wait for a worker's call; raises :class:`ContextEnded`."""
        end = time.monotonic() + timeout_s
        while not work.done() and time.monotonic() < end:
            if not self.context.ok():
                raise ContextEnded
            wait([work], timeout=min(0.1, timeout_s))
        return work.done()

    # -- images -------------------------------------------------------------------------------

    def _on_image(self, message: Image | CompressedImage) -> None:
        arrival = self._statistics.received()
        if self._state != 'active':
            self._earlier_drops['inactive'] += 1
        elif self._is_paused:
            self._earlier_drops['paused'] += 1
        else:
            self._inference.offer(Incoming(message, arrival))

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
        paths = await self._triggers.finished(self._map.submit(write))
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
            losses=self._inputs.losses,
            drops=self._drops(),
            reconstruction=live.figures if live else ReconstructionFigures(),
            has_camera_info=live is not None and live.camera_info is not None,
            problem=self._problem(frames.rate_in_hz),
        )

    def _drops(self) -> Counter[str]:
        """Images that have come and were not processed, by reason."""
        worker, live = self._inference, self._live
        in_worker = Counter(worker.drops if worker else {})
        return self._earlier_drops + in_worker + Counter(chunk=live.num_lost if live else 0)

    def _activity(self) -> str:
        return 'paused' if self._state == 'active' and self._is_paused else self._state

    def _problem(self, rate_in_hz: float) -> str:
        if self._inference is not None and self._inference.failure is not None:
            error = self._inference.failure
            return f'{type(error).__name__}: {error}; call {self._name_of("reset")}'
        if self._live is not None and self._live.trouble:
            return self._live.trouble
        rejected_at, reason = self._last_rejection
        if time.monotonic() - rejected_at < WARNING_PERIOD_S:
            return f'rejecting images: {reason}'
        if self._state == 'active' and not rate_in_hz:
            publishers = self.count_publishers(self._inputs.image_topic)
            return f'no images on {self._inputs.image_topic} ({publishers} publishers)'
        return ''

    def _publish_diagnostics(self) -> None:
        self._send_diagnostics(self.status())

    def _log_status(self) -> None:
        self.get_logger().info(self.status().sentence())

    def _name_of(self, service: str) -> str:
        return f'{self.get_fully_qualified_name()}/{service}'
