"""``stream3r node``: the process of the ROS 2 node, from its arguments to its clean end."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from stream3r_core.errors import ConfigError, InputError, Stream3rError
from stream3r_ros.environment import prepare_environment
from stream3r_ros.interfaces import ensure_tf2_msgs

CLOSE_TIMEOUT_S = 1.0  # for the image in work; all in all the process has 3 s to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command; everything it takes is a ROS argument."""
    parser.usage = '%(prog)s [--ros-args --params-file FILE -p NAME:=VALUE -r image:=TOPIC ...]'
    parser.epilog = 'Parameters and their meaning: config/reconstruct.yaml'


def run(args: argparse.Namespace) -> NoReturn:
    """Run the node until SIGINT, SIGTERM or an error, and end the process.

    Raises :class:`ConfigError` for unusable arguments or parameters,
    :class:`MissingDependencyError` where there is no ROS 2.
    """
    ensure_tf2_msgs()
    prepare_environment()
    files = _parameter_files(args.ros_args)
    import rclpy

    with _signals_noted() as is_interrupted:
        try:
            rclpy.init(args=args.ros_args)
        except RuntimeError as error:  # rcl on arguments it cannot read
            raise ConfigError(f'ROS arguments: {error}') from error
        try:
            code = _run_node(files, is_interrupted)
        finally:
            rclpy.try_shutdown()
        # Python's own end takes seconds on a busy machine, to free what the kernel frees anyway,
        # and crashes under a thread that is still inside the network.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def _signals_noted() -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM raise nothing; rclpy's own handlers, on top, end the context.

    So a second signal, which ``ros2 launch`` sends after Ctrl-C, cannot cut the ending short.
    Yields a function that tells whether a signal has come.
    """
    noted = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: noted.set()) for number in numbers]
    try:
        yield noted.is_set
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)


def _run_node(parameter_files: list[str], is_interrupted: Callable[[], bool]) -> int:
    """Make the node, spin it, and end it; return the exit code."""
    import rclpy

    from stream3r_ros.managed_node import Stream3rNode

    try:
        node = Stream3rNode()
    except Exception:
        if rclpy.ok() and not is_interrupted():
            raise
        return 0  # the context went down under it
    node.warn_of_unused(parameter_files)
    code = _spin(node)
    node.close(CLOSE_TIMEOUT_S)
    if node.num_waiting:
        print(f'stream3r: {node.num_waiting} images of an unfinished chunk were dropped')
    code = max(code, _save(node))
    node.destroy_node()
    return code


def _spin(node: Any) -> int:
    """Run the node until it ends or a signal comes; return the exit code."""
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    from stream3r_ros.managed_node import ContextEnded

    executor = None
    try:
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        if node.config.autostart and not node.start():
            return 1
        spin_until(executor, node.ended)
        return node.ended.result() or 0
    except (ExternalShutdownException, ContextEnded):
        return 0  # a signal: the ordinary end
    except Exception:
        if rclpy.ok():
            raise
        return 0  # a signal, too, under a callback: what it publishes has nowhere to go
    finally:
        if executor is not None:
            executor.shutdown(timeout_sec=0)


def spin_until(executor: Any, ended: Any) -> None:
    """Serve callbacks until a future is done, or the context goes down.

    ``executor.spin_until_future_complete`` of Jazzy leaves a function on the future with every
    callback that it serves: a megabyte in a few thousand images.
    """
    ended.add_done_callback(lambda _: executor.create_task(lambda: None))  # else it waits for one
    while executor.context.ok() and not ended.done():
        executor.spin_once()


def _save(node: Any) -> int:
    """Save the map if asked to; the context may be down already, hence no logger."""
    try:
        paths = node.save_at_exit()
    except InputError as reason:
        print(f'stream3r: nothing to save: {reason}')
    except Stream3rError as error:
        print(f'stream3r: error: nothing was saved: {error}', file=sys.stderr)
        return 1
    else:
        if paths:
            print(f'stream3r: saved {", ".join(map(str, paths))}')
    return 0


def _parameter_files(ros_args: list[str]) -> list[str]:
    """Return the parameter files; says plainly what rcl wraps into lines about its own sources."""
    files = [file for flag, file in pairwise(ros_args) if flag == '--params-file']
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f'parameter file {file}: there is no such file')
    return files
