"""Libraries of a full ROS 2 installation and our own small paths say the same."""

import array

import numpy as np
import pytest
from sensor_msgs.msg import Image, PointField

from stream3r_ros import components
from stream3r_ros.components import BRIDGED, component, diagnostics_publisher
from stream3r_ros.conversions import (
    FLOAT32,
    cloud_from_message,
    image_from_message,
    pose_from_message,
    stamp_ns,
)
from stream3r_ros.diagnostics import FrameFigures, NodeStatus
from stream3r_ros.messages import rclpy_messages

FIGURES = FrameFigures(7, 5, 10.0, 5.0, 40.0, 50.0)
MESSAGES = rclpy_messages()


@pytest.fixture
def both(monkeypatch):
    """Return a function that gives what another one returns without a library and with it."""

    def call(name, function):
        library = component(name)
        if library is None:
            pytest.skip(f'{name} is not installed: it comes with ROS 2, not with its wheels')
        with monkeypatch.context() as patch:
            patch.setattr(components, 'component', lambda name: None)
            plain = function()
        used = []
        with monkeypatch.context() as patch:
            patch.setattr(
                components, 'component', lambda name: used.append(name) or component(name)
            )
            by_library = function()
        assert name in used
        return plain, by_library

    return call


@pytest.fixture
def node():
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    made = rclpy.create_node('stream3r', namespace='left', context=context)
    yield made
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def test_diagnostics_are_the_same_with_and_without_their_library(node, monkeypatch, both):
    real = node.create_publisher

    def said():
        sent = []

        def create_publisher(*arguments, **options):
            publisher = real(*arguments, **options)
            publisher.publish = sent.append
            return publisher

        monkeypatch.setattr(node, 'create_publisher', create_publisher)
        publish = diagnostics_publisher(node, '/left/image')
        publish(NodeStatus('active', FIGURES, {'superseded': 2}, problem='a problem'))
        sent[-1].header.stamp.sec = sent[-1].header.stamp.nanosec = 0
        return sent[-1]

    plain, by_library = both('diagnostic_updater', said)
    assert by_library == plain
    assert plain.status[0].name == '/left/stream3r: reconstruction'
    assert plain.status[0].level == b'\x01'


@pytest.mark.parametrize('padding', [0, 1, 12])
@pytest.mark.parametrize('encoding', BRIDGED)
def test_cv_bridge_gives_the_same_pixels(both, encoding, padding):
    image = Image(height=4, width=5, step=5 * BRIDGED[encoding] + padding, encoding=encoding)
    random = np.random.default_rng(0).integers(0, 256, 4 * image.step, np.uint8)
    image.data = array.array('B', random.tobytes())
    if padding == 1 and BRIDGED[encoding] > 1:
        assert components.rgb_by_bridge(image) is None
        return
    plain, by_library = both('cv_bridge.boost.cv_bridge_boost', lambda: image_from_message(image))
    np.testing.assert_array_equal(by_library, plain)


@pytest.mark.parametrize(
    'fields',
    [
        {'encoding': 'mono16'},
        {'encoding': 'yuv422'},
        {'step': 16},
        {'is_bigendian': 1},
        {'data': array.array('B', bytes(59))},
    ],
)
def test_cv_bridge_is_not_asked_where_it_might_answer_otherwise(fields, monkeypatch):
    whole = {'height': 4, 'width': 5, 'step': 15, 'encoding': 'rgb8', 'is_bigendian': 0}
    image = Image(**whole | {k: v for k, v in fields.items() if k != 'data'})
    image.data = fields.get('data', array.array('B', bytes(4 * image.step)))
    monkeypatch.setattr(components, 'component', lambda name: pytest.fail(f'{name} is asked'))
    assert components.rgb_by_bridge(image) is None


def point_fields(offsets, datatype=FLOAT32):
    return [
        PointField(name=name, offset=offset, datatype=datatype, count=1)
        for name, offset in offsets.items()
    ]


def test_a_point_has_the_same_layout_by_sensor_msgs_py(both):
    fields = point_fields({'x': 4, 'y': 12, 'z': 8, 'rgb': 20})
    plain, by_library = both(
        'sensor_msgs_py.point_cloud2', lambda: components.point_layout(fields, 32)
    )
    assert by_library == plain


def test_sensor_msgs_py_reads_the_same_cloud(both):
    generator = np.random.default_rng(1)
    points_xyz = generator.normal(size=(20, 3)).astype(np.float32)
    colors_rgb = generator.integers(0, 256, (20, 3), np.uint8)
    cloud = MESSAGES.cloud(points_xyz, colors_rgb, np.ones(20), 7, 'map')
    plain, by_library = both('sensor_msgs_py.point_cloud2', lambda: cloud_from_message(cloud))
    for ours, theirs, true in zip(plain, by_library, (points_xyz, colors_rgb)):
        np.testing.assert_array_equal(theirs, ours)
        np.testing.assert_array_equal(ours, true)


def test_tf_transformations_turns_quaternions_into_the_same_rotations(both):
    generator = np.random.default_rng(2)
    poses = [MESSAGES.pose(np.eye(4), 7, 'map').pose for _ in range(50)]
    for pose in poses:
        quat_xyzw = generator.normal(size=4) * generator.uniform(0.2, 5)
        for axis, value in zip('xyzw', quat_xyzw.tolist()):
            setattr(pose.orientation, axis, value)
    plain, by_library = both('tf_transformations', lambda: list(map(pose_from_message, poses)))
    np.testing.assert_allclose(by_library, plain, atol=1e-15)


def test_message_filters_keeps_and_finds_the_same_messages(both):
    generator = np.random.default_rng(3)
    stamps_ns = 10**18 + generator.integers(0, 10**9, 100)  # in no order
    messages = [MESSAGES.float_image(np.ones((1, 1)), int(ns), 'camera') for ns in stamps_ns]
    spans = 10**18 + np.sort(generator.integers(-(10**8), 10**9 + 10**8, (50, 2)))
    spans = [*spans.tolist(), [0, 2**63 - 1], [stamps_ns[-1]] * 2, [-5, 10**18]]

    def found():
        store = components.recent_messages(30)
        for message in messages:
            store.add(message)
        return [[stamp_ns(m) for m in store.between(int(a), int(b))] for a, b in spans]

    plain, by_library = both('message_filters', found)
    assert by_library == plain


def test_the_store_of_recent_messages_is_bounded_and_finds_what_lies_between():
    store = components.recent_messages(3)
    for second in (5, 1, 4, 2, 3):
        store.add(MESSAGES.float_image(np.ones((1, 1)), second * 10**9, 'camera'))
    assert [stamp_ns(m) for m in store.between(0, 10**10)] == [4 * 10**9, 2 * 10**9, 3 * 10**9]
    assert [stamp_ns(m) for m in store.between(2 * 10**9, 3 * 10**9)] == [2 * 10**9, 3 * 10**9]


def test_what_is_not_installed_is_none():
    assert component('no_such_package_anywhere') is None
    assert component('json').__name__ == 'json'
