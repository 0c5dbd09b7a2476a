"""``stream3r demo``: camera, node and observer as three processes on a live ROS 2 graph.

The camera plays a sample room or any input, the node reconstructs, and this process records what
the node publishes, lets it save its map and draws a picture. What a recording says about the true
poses is looked at when all is done, to state the error, and by this process only.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from stream3r_core.checkpoints import SHIPPED
from stream3r_core.errors import Stream3rError
from stream3r_core.evaluation.trajectory import ate
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_ros.bag import COMPRESSED_IMAGE, BagReader, BagWriter
from stream3r_ros.config import NodeConfig
from stream3r_ros.environment import private_graph
from stream3r_ros.ground_truth import bag_truth
from stream3r_ros.observer import Observer
from stream3r_ros.options import (
    add_config_arguments,
    add_output_arguments,
    config_from_args,
    output_folder,
    write_options,
)
from stream3r_ros.picture import draw_results
from stream3r_ros.player import FILES_TOPIC
from stream3r_ros.replay import (
    CONFIG,
    INTERRUPTED,
    add_input_arguments,
    first_interrupt_ends_the_loop,
    open_source,
)
from stream3r_ros.replay import run as run_replay
from stream3r_ros.results import BAG, MADE_WITH, MAP, TRAJECTORY
from stream3r_ros.sample import write_sample
from stream3r_ros.sources import Source, are_photos, camera_info_name
from stream3r_ros.tf import camera_frame, check_frames

SAMPLE, PICTURE, NODE_LOG, CAMERA_LOG = 'sample_bag', 'picture.png', 'node.log', 'camera.log'
RESULTS = (MAP, MADE_WITH, TRAJECTORY, BAG, PICTURE)
UNTRAINED = 'untrained random weights: this shows the plumbing, not a reconstruction'
DIAGNOSTICS_PERIOD_S = 0.2
LAST_MESSAGE_S = 10.0  # how long to wait for messages that the node has sent already
SAVE_S = 300.0
END_S = 15.0  # a child that has not ended by then is killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r demo``."""
    parser.add_argument(
        '--input',
        nargs='+',
        default=[],
        help='a bag, a video, a folder of images, or image files (photos that all see each other, '
        'without a live graph); default: a synthetic room',
    )
    add_output_arguments(parser)
    parser.add_argument(
        '--weights', default='', help="as --set model.weights=...; 'random' is untrained"
    )
    add_config_arguments(parser)
    add_input_arguments(parser)
    parser.add_argument(
        '--realtime',
        action='store_true',
        help='play at the recorded pace whatever the node can do; default: wait for each answer',
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and return its exit code."""
    warning = _choose_weights(args)
    if warning:
        print(f'NOTE: {warning}', file=sys.stderr)
    if args.input and are_photos(args.input):
        return _run_on_photos(args, warning)
    config = config_from_args(args)
    check_frames(config)
    names = (*RESULTS, CONFIG, NODE_LOG, CAMERA_LOG, *([] if args.input else [SAMPLE]))
    with ExitStack() as stack:
        if args.input:  # is it readable? before earlier results are removed
            source, bag = stack.enter_context(open_source(args))
        is_ours = not args.input and Path(args.output, SAMPLE).is_dir()  # results of this command
        folder = output_folder(args.output, names, args.overwrite or is_ours, args.input).resolve()
        if not args.input:
            _render_sample(args, folder / SAMPLE)
            source, bag = stack.enter_context(open_source(args))
        is_interrupted = stack.enter_context(first_interrupt_ends_the_loop())
        plan = _plan(args, config, source, bag, folder)
        failure = None
        try:
            _run_live(plan, is_interrupted)
        except Stream3rError as error:  # after what there is has been shown
            failure = error
        _present(plan, config, warning)
        if failure is not None:
            raise failure
    return INTERRUPTED if is_interrupted() else 0


class Plan(NamedTuple):
    """What is played to which node."""

    source: Source
    bag: BagReader | None
    folder: Path
    camera: list[str]  # arguments of ``stream3r play``
    node: list[str]  # arguments of ``stream3r node``


def _choose_weights(args: argparse.Namespace) -> str:
    """Fall back to an untrained network where none is named and none shipped; return a warning."""
    if args.weights:
        args.overrides.append(f'model.weights={json.dumps(args.weights)}')
    model = config_from_args(args).model
    if model.preset == 'tiny' and not model.weights:
        if not (SHIPPED / 'tiny.safetensors').is_file():
            args.overrides.append('model.weights=random')
            return UNTRAINED
    return UNTRAINED if model.weights == 'random' else ''


def _render_sample(args: argparse.Namespace, path: Path) -> None:
    print('rendering a synthetic room as sample ...', flush=True)
    started = time.monotonic()
    write_sample(path)
    print(f'rendered in {time.monotonic() - started:.1f} s: {path}')
    args.input, args.camera_info = [str(path)], 'auto'


def _run_on_photos(args: argparse.Namespace, warning: str) -> int:
    """Reconstruct photos, which are no stream, all at once and without a graph."""
    args.ground_truth = 'none'
    code = run_replay(args)
    with open_source(args) as (source, _):
        _draw(Path(args.output), source, config_from_args(args), warning)
    return code


def _plan(
    args: argparse.Namespace,
    config: NodeConfig,
    source: Source,
    bag: BagReader | None,
    folder: Path,
) -> Plan:
    """Bring camera and node together on one image topic; write the node's parameter file."""
    topic, kind = FILES_TOPIC, ''
    camera = [*map(str, args.input), '--every', str(args.every)]
    if bag is None:
        camera += ['--frame-rate', str(args.rate)]
    else:
        topic, kind, _ = bag.image_topic(args.image_topic)
        camera += ['--topics', topic]
    remappings = ['-r', f'image:={topic}']
    if args.camera_info:
        info = camera_info_name(args.camera_info, topic)
        camera += [info]
        remappings += ['-r', f'camera_info:={info}']
    camera += [] if args.realtime else ['--lockstep']
    if kind == COMPRESSED_IMAGE and not topic.endswith('/compressed'):
        camera += ['--ros-args', '-r', f'{topic}:={topic}/compressed']  # where the node listens
    effective = dataclasses.replace(
        config,
        autostart=True,
        publish_tf=True,  # by which progress is followed
        image_transport='compressed' if kind == COMPRESSED_IMAGE else 'raw',
        save_map=dataclasses.replace(config.save_map, directory=str(folder)),
        status=dataclasses.replace(config.status, period_s=DIAGNOSTICS_PERIOD_S),
    )
    write_options(folder / CONFIG, effective)
    node = ['--ros-args', '--params-file', str(folder / CONFIG), *remappings]
    return Plan(source, bag, folder, camera, node)


def _run_live(plan: Plan, is_interrupted: Callable[[], bool]) -> None:
    """Run camera and node, record what comes, and let the node save its map.

    Raises :class:`Stream3rError` with the end of its log when a process fails; what was recorded
    until then stays.
    """
    with ExitStack() as stack:
        os.environ.update(stack.enter_context(private_graph()))
        recording = stack.enter_context(BagWriter(plan.folder / BAG))
        demo = stack.enter_context(_ros_node('demo'))
        observer = Observer(demo, recording)
        stack.callback(observer.write_latest)
        log = plan.folder / NODE_LOG
        print(f'starting the node, see {log}', flush=True)
        node = stack.enter_context(_process('node', plan.node, log))
        watch = stack.enter_context(_Watch(demo, node, log))
        problem = ''
        if watch.until(lambda: observer.state == 'active', stop=is_interrupted):
            problem = _play(plan, observer, watch, is_interrupted)
        if observer.num_transforms:
            _save(observer, watch)
        if problem:
            raise Stream3rError(problem)


def _play(
    plan: Plan, observer: Observer, watch: '_Watch', is_interrupted: Callable[[], bool]
) -> str:
    """Run the camera until the node has dealt with all that it sent; return what went wrong."""
    log = plan.folder / CAMERA_LOG
    with (
        _process('play', plan.camera, log) as camera,
        tqdm(total=plan.source.num_frames, unit='image', desc='mapping', mininterval=0.5) as bar,
    ):

        def is_over() -> bool:
            bar.set_postfix(points=observer.figure('map_points'), refresh=False)
            bar.update(observer.num_transforms - bar.n)
            return camera.poll() is not None or observer.state == 'failed'

        def is_idle() -> bool:
            is_over()
            return observer.num_diagnostics > seen + 1 and observer.is_idle

        is_complete = watch.until(is_over, stop=is_interrupted)
        seen = observer.num_diagnostics
        is_failed = observer.state == 'failed'
        if is_complete and not is_failed and watch.until(is_idle, stop=is_interrupted):
            watch.until(lambda: observer.has_all_transforms, LAST_MESSAGE_S)
        is_over()
    if is_failed:
        return f'the node has failed:\n{_tail(plan.folder / NODE_LOG)}'
    if is_complete and camera.returncode:
        return f'the camera has failed:\n{_tail(log)}'
    return '' if observer.num_transforms or is_interrupted() else 'no image was reconstructed'


def _save(observer: Observer, watch: '_Watch') -> None:
    """Let the node write map and trajectory, and take its last map message."""
    answer = observer.save_map()
    if not watch.until(answer.done, SAVE_S):
        raise Stream3rError(f'the node has not saved its map within {SAVE_S:.0f} s')
    if not answer.result().success:
        raise Stream3rError(f'the node could not save its map: {answer.result().message}')
    watch.until(lambda: observer.map_stamp_ns == observer.last_stamp_ns, LAST_MESSAGE_S)


class _Watch:
    """Spins this process's node while the process of the other one lives."""

    def __init__(self, own_node, process: subprocess.Popen, log: Path):
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(own_node)
        self._process = process
        self._log = log

    def __enter__(self) -> '_Watch':
        return self

    def __exit__(self, *_: object) -> None:
        # An executor that outlives its context fails when it is collected.
        self._executor.shutdown(timeout_sec=0)

    def until(
        self,
        condition: Callable[[], bool],
        patience_s: float = float('inf'),
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Spin until ``condition()``; False when it is too late or ``stop()`` says so."""
        end = time.monotonic() + patience_s
        while not condition():
            if self._process.poll() is not None:
                raise Stream3rError(f'the node has ended:\n{_tail(self._log)}')
            if time.monotonic() > end or stop():
                return False
            self._executor.spin_once(timeout_sec=0.1)
        return True


@contextmanager
def _ros_node(name: str) -> Iterator[Node]:
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        yield rclpy.create_node(name)
    finally:
        rclpy.try_shutdown()


@contextmanager
def _process(command: str, arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a ``stream3r`` command in a session of its own, where no Ctrl-C reaches it; end it."""
    with log.open('w') as file:
        child = subprocess.Popen(
            [sys.executable, '-m', 'stream3r_ros', command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _tail(log: Path, lines: int = 8) -> str:
    return '\n'.join(log.read_text(errors='replace').splitlines()[-lines:])


def _present(plan: Plan, config: NodeConfig, warning: str) -> None:
    """Say how good the result is, and draw it."""
    folder = plan.folder
    if not (folder / TRAJECTORY).is_file():
        return
    true_xyz = None
    if plan.bag is not None:
        sentence, true_xyz = _accuracy(plan, config)
        print(sentence)
    _draw(folder, plan.source, config, warning, true_xyz)
    found = [name for name in RESULTS if (folder / name).exists()]
    print(f'results in {folder}: {", ".join(found)}')


def _accuracy(plan: Plan, config: NodeConfig) -> tuple[str, np.ndarray | None]:
    """Say how far the bag's true poses are; return that, and the true path in the map."""
    estimate = read_trajectory(plan.folder / TRAJECTORY)
    try:
        frame = camera_frame(next(iter(plan.source))().frame_id, config)
        truth, remarks = bag_truth(plan.bag, '', frame, estimate.stamps_ns)
        if truth is None:
            why = remarks or ['the input has no true ones to compare with']
            return f'{len(estimate)} poses; {"; ".join(why)}', None
        error = ate(truth, estimate, 'sim3')
    except Stream3rError as reason:
        return f'{len(estimate)} poses; no ATE: {reason}', None
    sentence = (
        f'evaluation only: ATE {error.rmse:.4f} m over {len(error.errors)} poses after Sim(3) '
        f'alignment, scale {error.scale:.4g}, against {truth.name}'
    )
    return sentence, error.truth_xyz_in_estimate


def _draw(
    folder: Path,
    source: Source,
    config: NodeConfig,
    warning: str,
    true_xyz: np.ndarray | None = None,
) -> None:
    title = f'stream3r demo, {config.model.preset} network'
    try:
        draw_results(folder, source, title, warning, true_xyz)
    except Stream3rError as error:
        print(f'no picture: {error}', file=sys.stderr)
