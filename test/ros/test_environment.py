"""What a ROS process starts in: a DDS profile for large messages, a place for logs, a domain."""

import os
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

import pytest

from stream3r_ros.environment import (
    LOG_VARIABLES,
    PROFILE_VARIABLES,
    prepare_environment,
    private_graph,
)
from stream3r_ros.resources import resource

IMAGES, CLOUDS = 60, 10
CLOUD_POINTS = 312_500  # of 16 bytes: 5 MB

# Sends the next message when the last one is confirmed: the load of the machine decides how long
# it takes, the transport alone whether a message arrives.
SENDER = f"""
import array, sys, time
import rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import UInt32
rclpy.init()
node = rclpy.create_node('camera')
confirmed = set()
node.create_subscription(UInt32, 'confirmed', lambda message: confirmed.add(message.data), 100)
images = node.create_publisher(Image, 'image', qos_profile_sensor_data)
clouds = node.create_publisher(PointCloud2, 'cloud', qos_profile_sensor_data)
image = Image(height=480, width=640, step=1920, encoding='rgb8')
image.data = array.array('B', bytes(range(256)) * 3600)
cloud = PointCloud2(height=1, width={CLOUD_POINTS}, point_step=16, row_step={CLOUD_POINTS} * 16)
cloud.data = array.array('B', bytes(range(250)) * 20000)
end = time.monotonic() + float(sys.argv[1])
def wait(condition, patience):
    stop = min(end, time.monotonic() + patience)
    while not condition() and time.monotonic() < stop:
        rclpy.spin_once(node, timeout_sec=0.1)
wait(lambda: all(p.get_subscription_count() for p in (images, clouds)), 300)
wait(lambda: node.count_publishers('confirmed'), 300)
for number in range({IMAGES} + {CLOUDS}):
    publisher, message = (images, image) if number < {IMAGES} else (clouds, cloud)
    message.header.stamp.nanosec = number
    publisher.publish(message)
    wait(lambda: number in confirmed, 5)
"""


def received_numbers(spawn, node, spin_until, deadline_s):
    """Return the numbers of the messages that arrived whole, in order."""
    from rclpy.qos import QoSProfile, qos_profile_sensor_data
    from sensor_msgs.msg import Image, PointCloud2
    from std_msgs.msg import UInt32

    whole = {Image: bytes(range(256)) * 3600, PointCloud2: bytes(range(250)) * 20000}
    confirmation = node.create_publisher(UInt32, 'confirmed', QoSProfile(depth=100))
    numbers = []

    def take(message):
        assert message.data.tobytes() == whole[type(message)]
        numbers.append(message.header.stamp.nanosec)
        confirmation.publish(UInt32(data=numbers[-1]))

    node.create_subscription(Image, 'image', take, qos_profile_sensor_data)
    node.create_subscription(PointCloud2, 'cloud', take, qos_profile_sensor_data)
    sender = spawn('-c', SENDER, deadline_s)
    spin_until(lambda: sender.poll() is not None, deadline_s + 30)
    assert sender.returncode == 0
    return numbers


@pytest.mark.ros
def test_every_image_and_cloud_arrives_best_effort_between_two_processes(spawn, node, spin_until):
    numbers = received_numbers(spawn, node, spin_until, deadline_s=300)
    assert numbers == list(range(IMAGES + CLOUDS))


def test_the_profile_is_set_for_fast_dds_2_and_3():
    environ = {}
    prepare_environment(environ)
    assert {environ[name] for name in PROFILE_VARIABLES} == {str(resource('config/fastdds.xml'))}


@pytest.mark.parametrize('name', [*PROFILE_VARIABLES, 'FASTDDS_BUILTIN_TRANSPORTS'])
def test_a_choice_of_the_user_is_kept(name):
    environ = {name: 'mine'}
    prepare_environment(environ)
    chosen = {key: value for key, value in environ.items() if key.startswith('FAST')}
    assert chosen == {name: 'mine'}


def test_an_empty_value_is_replaced_instead_of_read_as_broken_xml():
    environ = dict.fromkeys([*PROFILE_VARIABLES, 'FASTDDS_BUILTIN_TRANSPORTS'], '')
    prepare_environment(environ)
    assert all(environ[name] for name in PROFILE_VARIABLES)
    assert 'FASTDDS_BUILTIN_TRANSPORTS' not in environ


@pytest.mark.ros
def test_rclpy_starts_and_logs_where_there_is_no_home(graph, monkeypatch, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name not in LOG_VARIABLES}
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    prepare_environment(environ)
    code = 'import rclpy; rclpy.init(); rclpy.create_node("node").get_logger().info("written")'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300, env=environ)
    logs = [path.read_text() for path in (tmp_path / 'ros_log').glob('*.log')]
    assert any('written' in log for log in logs), logs


def test_the_profile_allows_what_the_documentation_says():
    text = {
        e.tag.split('}')[1]: e.text
        for e in ElementTree.parse(resource('config/fastdds.xml')).iter()
    }
    assert int(text['segment_size']) == 32 << 20
    assert int(text['maxMessageSize']) == 1 << 20
    assert int(text['sendBufferSize']) == int(text['receiveBufferSize']) == 4 << 20


def test_two_private_graphs_at_a_time_have_different_domains():
    with private_graph() as first, private_graph() as second:
        assert first['ROS_DOMAIN_ID'] != second['ROS_DOMAIN_ID']
        assert all(1 <= int(graph['ROS_DOMAIN_ID']) <= 101 for graph in (first, second))
