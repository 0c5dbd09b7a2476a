"""A node process under test, with this test process as its camera and its observer."""

import os
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger

from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import TOPICS

ROOT = Path(__file__).resolve().parents[2]
CAMERA_FRAME = 'camera_color_optical_frame'
SMALL = {'model.weights': 'random', 'image.long_side': 56, 'status.period_s': 0.1}
FIRST_STAMP_NS = 1_700_000_000_123_456_789
PERIOD_NS = 33_333_333
DEADLINE_S = 300  # for what takes seconds on an idle machine
HEIGHT, WIDTH = 60, 80
LAST_EMPTY = 'the last of the empty images'


def picture(seed):
    """A textured picture [60, 80, 3] uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return coarse.repeat(10, 0).repeat(10, 1)


def stamp(index):
    return FIRST_STAMP_NS + index * PERIOD_NS


def matrix(transform):
    """T_parent_child [4, 4] of a geometry_msgs/Transform."""
    q, t = transform.rotation, transform.translation
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix()
    T[:3, 3] = t.x, t.y, t.z
    return T


def one_thread():
    """An environment in which sums have one order, so that results are equal bit by bit."""
    return {**os.environ, 'OMP_NUM_THREADS': '1'}


class NodeUnderTest:
    """Starts ``stream3r node``, sends it images, and keeps every message that it publishes."""

    entry = ('-m', 'stream3r_ros')  # what Python runs

    def __init__(self, spawn, observer, spin_until, log: Path):
        self._spawn, self._observer, self._spin_until = spawn, observer, spin_until
        self.log_file = log
        self.messages = rclpy_messages()
        self.received = {topic: [] for topic in TOPICS}
        self.diagnostics = {}
        self.info = None
        for topic, (type_name, qos) in TOPICS.items():
            name = topic.replace('~', '/stream3r')
            observer.create_subscription(
                rclpy_class(type_name),
                name,
                self.received[topic].append,
                qos._replace(depth=100).for_rclpy(),  # while this process waits for a core
            )
        observer.create_subscription(DiagnosticArray, '/diagnostics', self._note, 10)

    def _note(self, message):
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            self.diagnostics = values | {'level': status.level, 'message': status.message}

    def start(self, *ros_args, wait_until_active=True, **parameters):
        """Start the node; ``parameters`` by dotted name, on top of a small untrained network."""
        given = [f'{name}:={value}' for name, value in {**SMALL, **parameters}.items()]
        self.start_bare(*(word for text in given for word in ('-p', text)), *ros_args)
        if wait_until_active:
            self.wait_until(lambda: self.figure('state') == 'active')

    def start_bare(self, *ros_args):
        """Start the node with these arguments only."""
        command = [*self.entry, 'node', '--ros-args', *ros_args]
        with self.log_file.open('w') as log:
            self.process = self._spawn(
                *command, cwd=ROOT, stdout=log, stderr=log, env=one_thread()
            )

    @property
    def log(self):
        return self.log_file.read_text()

    def figure(self, name):
        value = self.diagnostics.get(name)
        return int(value) if value is not None and value.isdecimal() else value

    def wait_until(self, condition, deadline_s=DEADLINE_S):
        def alive_or_done():
            done = condition()
            assert done or self.process.poll() is None, f'the node has ended:\n{self.log}'
            return done

        self._spin_until(alive_or_done, deadline_s)

    def wait_for(self, topic, count):
        """Wait until so many messages have come on a topic; return them.

        Not for ``~/path`` and ``~/map``, whose new messages replace those that have not left yet.
        """
        self.wait_until(lambda: len(self.received[topic]) >= count)
        return self.received[topic]

    def wait_for_path(self, *indices):
        """Wait until the newest path has one pose for each of these images; return it."""
        paths, expected = self.received['~/path'], [stamp(index) for index in indices]

        def has_come():
            return paths and [stamp_ns(pose) for pose in paths[-1].poses] == expected

        self.wait_until(has_come)
        return paths[-1]

    def wait_for_end(self):
        """Wait until the process has ended; return its exit code."""
        return self.process.wait(timeout=DEADLINE_S)

    def connect_camera(
        self, topic='/image', compressed=False, reliability=ReliabilityPolicy.RELIABLE
    ):
        """Create the publisher of images and wait until the node receives from it.

        The node listens with best effort, and a publisher may know of a listener before it is
        known itself: empty images, which the node rejects, are sent until one has arrived. Then
        the last of them is waited for, so that none comes between those that follow.
        """
        qos = QoSProfile(depth=5, reliability=reliability)
        kind = CompressedImage if compressed else Image
        self.camera = self._observer.create_publisher(kind, topic, qos)
        self._publish_until(self.camera, kind(), lambda: self.figure('images_received'))
        if self.figure('state') == 'active':
            last = kind(**{'format' if compressed else 'encoding': LAST_EMPTY})
            self.camera.publish(last)
            self.wait_until(lambda: LAST_EMPTY in self.diagnostics['message'])
        self.wait_until(lambda: self.figure('images_received') == self.figure('images_dropped'))

    def _publish_until(self, publisher, message, condition):
        def publish_or_done():
            if condition():
                return True
            publisher.publish(message)
            return False

        self.wait_until(publish_or_done)

    def image(self, index, frame_id=CAMERA_FRAME, seed=None):
        pixels = picture(index if seed is None else seed)
        return self.messages.rgb_image(pixels, stamp(index), frame_id)

    def feed(self, *indices):
        """Send images one by one, each after the node has finished the one before."""
        for index in indices:
            self.finish(self.image(index))

    def send(self, message, count):
        """Send one image and wait until ``count()`` has risen by one."""
        before = count()
        self.camera.publish(message)
        self.wait_until(lambda: count() == before + 1)

    def finish(self, message):
        """Send one image and wait for its transform."""
        count = len(self.received['/tf']) + 1
        self.camera.publish(message)
        self.wait_for('/tf', count)

    def send_camera_info(self, K, height=HEIGHT, width=WIDTH, d=()):
        """Publish intrinsics; wait until the node has taken some in."""
        info = self.messages.camera_info(K, height, width, stamp(0), CAMERA_FRAME)
        info.d = list(map(float, d))
        if self.info is None:
            self.info = self._observer.create_publisher(CameraInfo, '/camera_info', 10)
        self._publish_until(self.info, info, lambda: self.figure('camera_info') == 'received')
        self.info.publish(info)

    def set_parameter(self, name, value):
        """Set a parameter of the node, which must take it."""
        given = [Parameter(name, value=value).to_parameter_msg()]
        answer = self.request(SetParameters, 'set_parameters', parameters=given)
        assert answer.results[0].successful, answer

    def call(self, service):
        """Call ``~/service`` and return its answer."""
        return self.request(Trigger, service)

    def request(self, kind, service, **fields):
        """Send a request of a service type to ``~/service`` and return the answer."""
        client = self._observer.create_client(kind, f'/stream3r/{service}')
        self.wait_until(client.service_is_ready)
        future = client.call_async(kind.Request(**fields))
        self.wait_until(future.done)
        return future.result()

    def wait_until_gone(self):
        """Wait until the graph knows that the node is no more, sooner than a lease expires."""
        self._spin_until(lambda: 'stream3r' not in self._observer.get_node_names(), 15)
