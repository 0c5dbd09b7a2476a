"""The player is an honest camera: every image, its own stamps, and no answer on /tf."""

import signal
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from stream3r_core.errors import DataError
from stream3r_ros.bag import BagReader, BagWriter
from stream3r_ros.cli import main
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rclpy_class, rosbags_messages
from stream3r_ros.player import LATCHED_SET, BagProgramme, Thinned
from stream3r_ros.qos import LATCHED, SENSOR_DATA, Qos

pytestmark = pytest.mark.ros

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = rosbags_messages()
START_NS = 1_700_000_000_123_456_789
STEP_NS = 33_333_333
NUM_IMAGES = 20
IMAGE, INFO = '/camera/image_raw', '/camera/camera_info'
FRAME = 'camera_color_optical_frame'


def image(index):
    rgb = np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)
    return MESSAGES.rgb_image(rgb, START_NS + index * STEP_NS, FRAME)


def edge(parent, child, index=0):
    return MESSAGES.transform(np.eye(4), START_NS + index * STEP_NS, parent, child)


@pytest.fixture
def bag(tmp_path):
    """A bag with images and, on the topics of TF, both the rig and the truth."""
    with BagWriter(tmp_path / 'bag') as writer:
        static = [edge(FRAME, 'camera_depth_optical_frame'), edge('map', 'tripod')]
        writer.write('/tf_static', MESSAGES.tf(static), START_NS, LATCHED)
        writer.write('/tf_static', MESSAGES.tf([edge('base_link', 'imu')]), START_NS, LATCHED)
        for index in range(NUM_IMAGES):
            stamp = START_NS + index * STEP_NS
            writer.write('/tf', MESSAGES.tf([edge('map', FRAME, index)]), stamp, Qos(depth=100))
            writer.write(INFO, MESSAGES.camera_info(np.eye(3), 48, 64, stamp, FRAME), stamp)
            writer.write(IMAGE, image(index), stamp, SENSOR_DATA)
    return tmp_path / 'bag'


@pytest.fixture
def listen(node):
    """Subscribe to topics; return the lists that their messages go into."""

    def subscribe(types):
        received = {topic: [] for topic in types}
        for topic, kind in types.items():
            profile = (LATCHED_SET if 'tf_static' in topic else Qos(depth=100)).for_rclpy()
            node.create_subscription(rclpy_class(kind), topic, received[topic].append, profile)
        return received

    return subscribe


def start(spawn, *arguments):
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    return spawn('-m', 'stream3r_ros.player', *arguments, cwd=ROOT, **streams)


def test_every_third_image_with_all_other_messages(bag):
    with BagReader(bag) as reader:
        programme = BagProgramme(reader, [IMAGE, INFO])
        everything, thinned = list(programme), list(Thinned(programme, 3))
    images = [item.due_ns for item in everything if item.topic == IMAGE]
    assert [item.due_ns for item in thinned if item.topic == IMAGE] == images[::3]
    assert [i.due_ns for i in thinned if i.topic == INFO] == images


def test_images_arrive_as_recorded_and_the_truth_never_on_tf(bag, spawn, listen, node, spin_until):
    tf_names = ['/tf', '/tf_static', '/ground_truth/tf', '/ground_truth/tf_static']
    transforms = listen(dict.fromkeys(tf_names, 'tf2_msgs/msg/TFMessage'))
    camera = listen({IMAGE: 'sensor_msgs/msg/Image', INFO: 'sensor_msgs/msg/CameraInfo'})
    player = start(spawn, bag)
    spin_until(lambda: camera[IMAGE])
    assert node.count_publishers('/tf') == 0
    spin_until(lambda: player.poll() is not None)
    output, _ = player.communicate()
    assert player.returncode == 0, output
    spin_until(lambda: len(camera[IMAGE]) == len(camera[INFO]) == NUM_IMAGES)
    spin_until(lambda: len(transforms['/ground_truth/tf']) == NUM_IMAGES)
    spin_until(lambda: len(transforms['/tf_static']) == 2)
    spin_until(lambda: transforms['/ground_truth/tf_static'])

    sent = [image(index) for index in range(NUM_IMAGES)]
    assert [stamp_ns(m) for m in camera[IMAGE]] == [stamp_ns(m) for m in sent]
    assert [m.data.tobytes() for m in camera[IMAGE]] == [m.data.tobytes() for m in sent]
    assert [stamp_ns(m) for m in camera[INFO]] == [stamp_ns(m) for m in sent]
    edges = {
        name: {(t.header.frame_id, t.child_frame_id) for m in messages for t in m.transforms}
        for name, messages in transforms.items()
    }
    assert edges == {
        '/tf': set(),
        '/tf_static': {(FRAME, 'camera_depth_optical_frame'), ('base_link', 'imu')},
        '/ground_truth/tf': {('map', FRAME)},
        '/ground_truth/tf_static': {('map', 'tripod')},
    }
    assert len(transforms['/ground_truth/tf']) == NUM_IMAGES


def test_topics_can_be_chosen(bag):
    with BagReader(bag) as reader:
        assert set(BagProgramme(reader, [IMAGE]).topics) == {IMAGE}
        assert [item.topic for item in BagProgramme(reader, [INFO])] == [INFO] * NUM_IMAGES


def test_a_folder_of_images_is_played_on_the_topic_that_a_node_listens_to(
    tmp_path, spawn, listen, spin_until
):
    for index in range(3):
        transparent = np.zeros((8, 8, 4), np.uint8)
        transparent[:4] = [0, 0, index, 255]  # OpenCV writes BGRA
        cv2.imwrite(str(tmp_path / f'{index}.png'), transparent)
    (tmp_path / '9.png').write_bytes(b'broken')
    images = listen({'/image': 'sensor_msgs/msg/Image'})['/image']
    player = start(spawn, tmp_path, '--rate', '0.5')
    spin_until(lambda: player.poll() is not None)
    output, _ = player.communicate()
    assert player.returncode == 0, output
    assert '9.png' in output
    spin_until(lambda: len(images) == 3)
    pictures = [np.array(m.data).reshape(8, 8, 3) for m in images]
    assert [p[0, 0].tolist() for p in pictures] == [[index, 0, 0] for index in range(3)]
    assert all((p[4:] == 255).all() for p in pictures)


@pytest.mark.parametrize('ending', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_in_the_middle(bag, spawn, listen, spin_until, ending):
    images = listen({IMAGE: 'sensor_msgs/msg/Image'})[IMAGE]
    player = start(spawn, bag, '--rate', '0.0001')
    spin_until(lambda: images)
    player.send_signal(ending)
    output, _ = player.communicate(timeout=300)
    assert player.returncode == 0, output
    assert output.strip().endswith('stopped')
    assert len(images) < NUM_IMAGES


def test_a_signal_ends_the_wait_for_a_subscriber(bag, spawn, node, spin_until):
    player = start(spawn, bag)
    spin_until(lambda: node.count_publishers(IMAGE))
    player.send_signal(signal.SIGTERM)
    player.communicate(timeout=300)
    assert player.returncode == 0


def test_it_says_when_nobody_listens(bag, graph, capsys):
    assert main(['play', str(bag), '--timeout', '0.2']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'nobody has subscribed to {IMAGE}' in line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{}/none'], 'no such'),
        (['{}/bag', '--topics', '/depth'], f"no topic '/depth'; it holds these topics:\n  {INFO}"),
        (['{}/bag', '--rate', '0'], '--rate must be positive'),
    ],
)
def test_bad_input_is_one_message_and_no_success(bag, tmp_path, capsys, arguments, message):
    assert main(['play', *(text.format(tmp_path) for text in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_a_ros_1_bag_is_refused_with_the_way_out(tmp_path):
    store = get_typestore(Stores.ROS1_NOETIC)
    with Ros1Writer(tmp_path / 'old.bag') as writer:
        connection = writer.add_connection('/n', 'std_msgs/msg/String', typestore=store)
        text = store.types['std_msgs/msg/String']('hello')
        writer.write(connection, 1, store.serialize_ros1(text, 'std_msgs/msg/String'))
    with BagReader(tmp_path / 'old.bag') as reader:
        with pytest.raises(DataError, match='rosbags-convert'):
            BagProgramme(reader)
