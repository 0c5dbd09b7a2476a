"""Every ROS test gets a graph of its own: a private domain that stays on this machine."""

import os
import subprocess
import sys

import pytest

from stream3r_ros.environment import prepare_environment, private_graph

END_S = 30  # from SIGTERM to SIGKILL
CHILD_DEADLINE_S = 300  # for what takes seconds on an idle machine


@pytest.fixture
def graph(monkeypatch):
    """Put this process, and children with its environment, on a private ROS graph."""
    prepare_environment(os.environ)
    with private_graph() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield variables


@pytest.fixture
def spawn(graph):
    """Start Python processes on the graph; whatever still runs at the end is ended and reaped.

    Not by SIGKILL where that can be: Fast DDS 2 may give shared memory of a killed process to
    participants of other tests and sessions, which then hear nothing (its issues 5469 and 6117).
    """
    children = []

    def start(*arguments, **options):
        child = subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **options)
        children.append(child)
        return child

    yield start
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate(timeout=CHILD_DEADLINE_S)


@pytest.fixture
def ros(graph):
    """Yield an initialised rclpy context in this process and shut it down again."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    yield context
    rclpy.try_shutdown(context=context)


@pytest.fixture
def node(ros):
    """Yield a node of this test process."""
    import rclpy

    observer = rclpy.create_node('observer', context=ros)
    yield observer
    observer.destroy_node()


@pytest.fixture
def spin_until(node, ros):
    """Return a function that spins ``node`` until a condition holds; it fails after a deadline."""
    from time import monotonic

    from rclpy.executors import SingleThreadedExecutor

    executor = SingleThreadedExecutor(context=ros)
    executor.add_node(node)

    def spin(condition, deadline_s=CHILD_DEADLINE_S):
        end = monotonic() + deadline_s
        while not condition():
            assert monotonic() < end, f'not within {deadline_s} s: {condition}'
            executor.spin_once(timeout_sec=0.1)

    yield spin
    executor.shutdown()


@pytest.fixture
def one_thread():
    """Add up in one order, as the node under test does: results are equal bit by bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def live(spawn, node, spin_until, tmp_path):
    """Return the harness of a node process; ``live.start(...)`` starts it."""
    from node_harness import NodeUnderTest

    return NodeUnderTest(spawn, node, spin_until, tmp_path / 'node.log')
