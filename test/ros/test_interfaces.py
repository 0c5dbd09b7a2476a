"""tf2_msgs made from its definition is the real tf2_msgs."""

import json
import sys
from pathlib import Path

import pytest

from stream3r_core.errors import MissingDependencyError, Stream3rError
from stream3r_ros import interfaces

pytestmark = pytest.mark.ros

needs_wheels = pytest.mark.skipif(
    not Path(sys.prefix, 'share', 'geometry_msgs').is_dir(),
    reason='ROS 2 comes from an installation here, which brings its own tf2_msgs',
)

PUBLISHER = """
import rclpy
from geometry_msgs.msg import TransformStamped
from rclpy.qos import QoSProfile, DurabilityPolicy
from tf2_msgs.msg import TFMessage
rclpy.init()
node = rclpy.create_node('broadcaster')
latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
edge = TransformStamped(child_frame_id='camera')
edge.header.frame_id = 'map'
edge.header.stamp.sec, edge.header.stamp.nanosec = 1700000000, 133333333
edge.transform.translation.x, edge.transform.rotation.w = 0.25, -1.0
publisher = node.create_publisher(TFMessage, '/tf', latched)
publisher.publish(TFMessage(transforms=[edge, edge]))
rclpy.spin(node)
"""


def published_hash():
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY).hash_rihs01('tf2_msgs/msg/TFMessage')


def test_the_type_on_the_wire_between_two_processes_is_the_published_one(spawn, node, spin_until):
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from tf2_msgs.msg import TFMessage

    spawn('-c', PUBLISHER)
    received = []
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    node.create_subscription(TFMessage, '/tf', received.append, latched)
    spin_until(lambda: received)

    (publisher,) = node.get_publishers_info_by_topic('/tf')
    assert publisher.node_name == 'broadcaster'
    assert publisher.topic_type == 'tf2_msgs/msg/TFMessage'
    if hasattr(publisher, 'topic_type_hash'):  # not in Humble, whose wire has no hashes
        assert str(publisher.topic_type_hash) == published_hash()
    for edge in received[0].transforms:
        assert (edge.header.frame_id, edge.child_frame_id) == ('map', 'camera')
        assert (edge.header.stamp.sec, edge.header.stamp.nanosec) == (1700000000, 133333333)
        assert (edge.transform.translation.x, edge.transform.rotation.w) == (0.25, -1.0)
    assert len(received[0].transforms) == 2


@needs_wheels
def test_the_sources_generated_from_the_definition_carry_the_published_hash(tmp_path):
    interfaces._generate(tmp_path)
    (description,) = tmp_path.rglob('TFMessage.json')
    hashes = {
        t['type_name']: t['hash_string']
        for t in json.loads(description.read_text())['type_hashes']
    }
    assert hashes['tf2_msgs/msg/TFMessage'] == published_hash()


@needs_wheels
def test_a_build_from_nothing_makes_an_importable_module(tmp_path):
    interfaces._generate(tmp_path)
    interfaces._compile(tmp_path)
    module = tmp_path / 'rosidl_generator_py/tf2_msgs/tf2_msgs_s__rosidl_typesupport_c.so'
    assert module.read_bytes()[:4] == b'\x7fELF'
    assert (tmp_path / interfaces.LIBRARY_NAMES[0]).is_file()


def test_nothing_is_built_where_tf2_msgs_is_there(monkeypatch):
    monkeypatch.setattr(interfaces, 'build_tf2_msgs', lambda: pytest.fail('built again'))
    assert not interfaces.ensure_tf2_msgs()


@needs_wheels
def test_a_missing_compiler_is_named_with_the_package_to_install(monkeypatch):
    monkeypatch.setenv('CC', 'no-such-compiler')
    with pytest.raises(MissingDependencyError, match=r"'no-such-compiler'.*apt install g\+\+"):
        interfaces.build_tf2_msgs()


@needs_wheels
def test_missing_python_headers_are_named_with_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(interfaces.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(MissingDependencyError, match='apt install python3-dev'):
        interfaces.build_tf2_msgs()


@needs_wheels
def test_a_compiler_that_fails_leaves_the_environment_alone(monkeypatch, tmp_path):
    monkeypatch.setenv('CC', 'false')
    monkeypatch.setattr(interfaces, '_install', lambda work: pytest.fail('installed'))
    with pytest.raises(Stream3rError, match='compiling tf2_msgs'):
        interfaces.build_tf2_msgs()


def test_without_ros_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(interfaces, 'find_spec', lambda name: None)
    with pytest.raises(MissingDependencyError, match='Source a ROS 2 installation'):
        interfaces.ensure_tf2_msgs()
