"""Libraries of a full ROS 2 installation and our own small paths say the same."""

import pytest

from stream3r_ros.components import component, diagnostics_publisher
from stream3r_ros.diagnostics import FrameFigures, NodeStatus

FIGURES = FrameFigures(7, 5, 10.0, 5.0, 40.0, 50.0)


@pytest.fixture
def node():
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    made = rclpy.create_node('stream3r', namespace='left', context=context)
    yield made
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def said(node, monkeypatch, library):
    """What a status becomes, with or without diagnostic_updater, up to its stamp."""
    import stream3r_ros.components as components

    sent = []
    monkeypatch.setattr(components, 'component', lambda name: library)
    real = node.create_publisher

    def create_publisher(*arguments, **options):
        publisher = real(*arguments, **options)
        publisher.publish = sent.append
        return publisher

    monkeypatch.setattr(node, 'create_publisher', create_publisher)
    publish = diagnostics_publisher(node, '/left/image')
    publish(NodeStatus('active', FIGURES, {'superseded': 2}, problem='a problem'))
    sent[-1].header.stamp.sec = sent[-1].header.stamp.nanosec = 0
    return sent[-1]


def test_diagnostics_are_the_same_with_and_without_their_library(node, monkeypatch):
    library = component('diagnostic_updater')
    if library is None:
        pytest.skip('diagnostic_updater is not installed: it comes with ROS 2, not with wheels')
    with monkeypatch.context() as patch:
        plain = said(node, patch, None)
    with monkeypatch.context() as patch:
        assert said(node, patch, library) == plain
    assert plain.status[0].name == '/left/stream3r: reconstruction'
    assert plain.status[0].level == b'\x01'


def test_what_is_not_installed_is_none():
    assert component('no_such_package_anywhere') is None
    assert component('json').__name__ == 'json'
