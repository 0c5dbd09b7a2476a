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

from stream3r_core.errors import ConfigError
from stream3r_ros.environment import prepare_environment
from stream3r_ros.interfaces import ensure_tf2_msgs

CLOSE_TIMEOUT_S = 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command; everything it takes is a ROS argument."""
    parser.usage = '%(prog)s [--ros-args --params-file FILE -p NAME:=VALUE -r image:=TOPIC ...]'
    parser.epilog = 'Parameters and their meaning: config/reconstruct.yaml'


def run(args: argparse.Namespace) -> int:
    """Run the node until SIGINT, SIGTERM or an error; return the exit code.

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
            code, is_clean = _run_node(files, is_interrupted)
        finally:
            rclpy.try_shutdown()
        if not is_clean:
            # A thread inside the network cannot be interrupted, and crashes Python's own shutdown.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


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


def _run_node(parameter_files: list[str], is_interrupted: Callable[[], bool]) -> tuple[int, bool]:
    """Return the exit code, and whether all threads have ended."""
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    from stream3r_ros.managed_node import ContextEnded, Stream3rNode

    try:
        node, code = Stream3rNode(), 0
    except Exception:
        if rclpy.ok() and not is_interrupted():
            raise
        return 0, True  # the context went down under it
    node.warn_of_unused(parameter_files)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if not node.config.autostart or node.start():
            executor.spin_until_future_complete(node.ended)
            code = node.ended.result() or 0
        else:
            code = 1
    except (ExternalShutdownException, ContextEnded):
        pass  # a signal: the ordinary end
    is_clean = node.close(CLOSE_TIMEOUT_S)
    executor.shutdown(timeout_sec=0)
    node.destroy_node()
    return code, is_clean


def _parameter_files(ros_args: list[str]) -> list[str]:
    """Return the parameter files; says plainly what rcl wraps into lines about its own sources."""
    files = [file for flag, file in pairwise(ros_args) if flag == '--params-file']
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f'parameter file {file}: there is no such file')
    return files
