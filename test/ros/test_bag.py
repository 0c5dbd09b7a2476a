"""Bags: what is written is read back, by rosbags and by ROS; what cannot be read says so."""

import numpy as np
import pytest
from recordings import write_ros1
from rosbags.rosbag2 import StoragePlugin, Writer

from stream3r_core.errors import DataError, InputError, OutputError
from stream3r_ros.bag import JAZZY, BagReader, BagWriter, is_bag
from stream3r_ros.conversions import image_from_message, stamp_ns
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.qos import LATCHED, SENSOR_DATA, Qos

MESSAGES = rosbags_messages()
START = 1_700_000_000_000_000_001
STEP = 33_333_333


def picture(index):
    return np.full((4, 6, 3), index, np.uint8)


def rgb(index, stamp):
    return MESSAGES.rgb_image(picture(index), stamp, 'camera')


def depth(index, stamp):
    return MESSAGES.float_image(np.full((4, 6), index + 1.0, np.float32), stamp, 'camera')


def jpeg(index, stamp):
    return MESSAGES.compressed_image(b'\xff\xd8', 'rgb8; jpeg compressed bgr8', stamp, 'camera')


def compressed_depth(index, stamp):
    return MESSAGES.compressed_image(b'?', '16UC1; compressedDepth png', stamp, 'camera')


def grey(index, stamp):
    message = rgb(index, stamp)
    message.encoding, message.step, message.data = 'mono8', 6, message.data[::3]
    return message


def pose(index, stamp):
    return MESSAGES.pose(np.eye(4), stamp, 'map')


def write_bag(path, topics, num=3, qos=SENSOR_DATA):
    """Write ``num`` messages on each topic; ``topics`` maps names to makers of messages."""
    with BagWriter(path) as bag:
        for index in range(num):
            stamp = START + index * STEP
            for topic, make in topics.items():
                bag.write(topic, make(index, stamp), stamp, qos)
    return path


def write_sqlite3(path):
    with Writer(path, version=8, storage_plugin=StoragePlugin.SQLITE3) as bag:
        connection = bag.add_connection('/image', 'sensor_msgs/msg/Image', typestore=JAZZY)
        for index in range(3):
            stamp = START + index * STEP
            bag.write(connection, stamp, MESSAGES.serialize(rgb(index, stamp)))
    return path


@pytest.mark.parametrize(
    'name, write',
    [
        ('mcap', lambda path: write_bag(path, {'/image': rgb})),
        ('sqlite3', write_sqlite3),
        ('ros1.bag', lambda path: write_ros1(path, [rgb(i, START + i * STEP) for i in range(3)])),
    ],
)
def test_images_of_every_kind_of_bag_come_back_in_order_with_exact_stamps(tmp_path, name, write):
    path = write(tmp_path / name)
    assert is_bag(path)
    with BagReader(path) as bag:
        topic = bag.image_topic()
        assert (topic.name, topic.num_messages) == ('/image', 3)
        messages = [bag.deserialize(m) for m in bag.messages([topic.name])]
    assert [stamp_ns(m) for m in messages] == [START + i * STEP for i in range(3)]
    for index, message in enumerate(messages):
        np.testing.assert_array_equal(image_from_message(message), picture(index))


def test_a_bag_without_its_metadata_and_a_storage_file_alone_can_be_read(tmp_path):
    folder = write_bag(tmp_path / 'bag', {'/image': rgb})
    (folder / 'metadata.yaml').unlink()
    for path in (folder, folder / 'bag.mcap'):
        with BagReader(path) as bag:
            assert len(list(bag.messages())) == 3


def test_messages_of_several_topics_come_in_the_order_of_their_stamps(tmp_path):
    with BagWriter(tmp_path / 'bag') as writer:
        for topic, stamps in {'/a': (5, 1), '/b': (4, 2)}.items():
            for stamp in stamps:
                writer.write(topic, pose(0, stamp), stamp)
    with BagReader(tmp_path / 'bag') as bag:
        order = [(m.stamp_ns, m.topic) for m in bag.messages()]
        assert order == [(1, '/a'), (2, '/b'), (4, '/b'), (5, '/a')]
        assert [m.stamp_ns for m in bag.messages(['/b'])] == [2, 4]


@pytest.mark.ros
def test_recorded_bytes_are_what_rclpy_reads(tmp_path):
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import Image

    with BagReader(write_bag(tmp_path / 'bag', {'/image': rgb})) as bag:
        images = [deserialize_message(m.raw, Image) for m in bag.messages()]
    assert [stamp_ns(image) for image in images] == [START + i * STEP for i in range(3)]
    np.testing.assert_array_equal(image_from_message(images[2]), picture(2))


def test_the_offered_qos_is_recorded(tmp_path):
    with BagWriter(tmp_path / 'bag') as writer:
        writer.write('/map', pose(0, START), START, LATCHED)
        writer.write('/image', rgb(0, START), START, SENSOR_DATA)
        writer.write('/tf', pose(0, START), START, Qos(depth=100))
    with BagReader(tmp_path / 'bag') as bag:
        profiles = {c.topic: c.ext.offered_qos_profiles[0] for c in bag._reader.connections}
    said = {
        topic: (profile.depth, profile.reliability.name, profile.durability.name)
        for topic, profile in profiles.items()
    }
    assert said == {
        '/map': (1, 'RELIABLE', 'TRANSIENT_LOCAL'),
        '/image': (5, 'BEST_EFFORT', 'VOLATILE'),
        '/tf': (100, 'RELIABLE', 'VOLATILE'),
    }


@pytest.mark.parametrize(
    'topics, chosen',
    [
        ({'/image': rgb, '/depth': depth, '/pose': pose}, '/image'),
        ({'/image/compressed': jpeg, '/depth': depth}, '/image/compressed'),
        ({'/image/compressed': jpeg, '/image': rgb}, '/image'),
        ({'/color': rgb, '/infra1': grey, '/infra2': grey}, '/color'),
        ({'/color/compressed': jpeg, '/infra': grey, '/d': compressed_depth}, '/color/compressed'),
        ({'/infra': grey, '/d': compressed_depth}, '/infra'),
    ],
)
def test_the_image_topic_is_found(tmp_path, topics, chosen):
    with BagReader(write_bag(tmp_path / 'bag', topics)) as bag:
        assert bag.image_topic().name == chosen


def test_between_two_cameras_the_user_chooses(tmp_path):
    path = write_bag(tmp_path / 'bag', {'/left': grey, '/right': grey, '/pose': pose})
    with BagReader(path) as bag:
        with pytest.raises(DataError, match='/left, /right; choose one with --image-topic'):
            bag.image_topic()
        assert bag.image_topic('/right').name == bag.image_topic('right').name == '/right'
        with pytest.raises(
            DataError, match=r"no topic '/middle'; it holds(?s:.*)/left  sensor_msgs"
        ):
            bag.image_topic('/middle')
        with pytest.raises(DataError, match='is a geometry_msgs/msg/PoseStamped; expected sensor'):
            bag.image_topic('/pose')


def test_a_bag_without_camera_images_says_what_it_holds(tmp_path):
    path = write_bag(tmp_path / 'bag', {'/depth': depth, '/pose': pose})
    with BagReader(path) as bag, pytest.raises(DataError, match='/pose  geometry_msgs'):
        bag.image_topic()


def test_a_bag_that_was_cut_off_says_how_to_repair_it(tmp_path):
    path = write_bag(tmp_path / 'bag', {'/image': rgb}) / 'bag.mcap'
    whole = path.read_bytes()
    for kept in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        for damaged in (path, path.parent):
            with pytest.raises(DataError, match='mcap recover'):
                BagReader(damaged).__enter__()


@pytest.mark.parametrize('name', ['x.bag', 'x.db3', 'x.mcap'])
def test_a_file_of_something_else_is_no_bag(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'this is not a bag, whatever its name may say' * 99)
    with pytest.raises(DataError, match='cannot be read as a bag'):
        BagReader(path).__enter__()


def test_damage_inside_a_bag_ends_the_reading_after_what_came_before(tmp_path):
    large = np.zeros((700, 600, 3), np.uint8)  # each fills a chunk of its own
    with BagWriter(tmp_path / 'bag') as writer:
        for stamp in (1, 2, 3):
            writer.write('/image', MESSAGES.rgb_image(large, stamp, 'camera'), stamp)
    storage = tmp_path / 'bag' / 'bag.mcap'
    data = storage.read_bytes()
    channel_and_sequence, times = b'\x01\x00' + bytes(4), (3).to_bytes(8, 'little') * 2
    start = data.index(channel_and_sequence + times)
    storage.write_bytes(data[: start - 8] + b'\xff' * 8 + data[start:])  # the record's length
    read = []
    with BagReader(tmp_path / 'bag') as bag, pytest.raises(DataError, match='cannot be read'):
        for message in bag.messages():
            read.append(message.stamp_ns)
    assert read == [1, 2]


def test_missing_and_empty_bags_say_so(tmp_path):
    with pytest.raises(DataError, match='no such bag'):
        BagReader(tmp_path / 'nowhere')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(DataError, match=r'found 0 of them'):
        BagReader(tmp_path / 'folder')
    with BagWriter(tmp_path / 'empty'):
        pass
    with pytest.raises(DataError, match='holds no message'):
        BagReader(tmp_path / 'empty').__enter__()
    assert not is_bag(tmp_path / 'nowhere') and not is_bag(tmp_path / 'folder')


def test_damaged_bytes_of_one_message_are_an_input_error(tmp_path):
    with BagWriter(tmp_path / 'bag') as writer:
        writer.write_raw('/image', 'sensor_msgs/msg/Image', b'\x00\x01\x00\x00\xff\xff', 1)
    with BagReader(tmp_path / 'bag') as bag:
        (message,) = bag.messages()
        assert bag.image_topic().name == '/image'  # its other images may be whole
        with pytest.raises(InputError, match='6 bytes on /image cannot be deserialised'):
            bag.deserialize(message)


def test_an_exception_while_writing_leaves_a_whole_bag(tmp_path):
    with pytest.raises(KeyboardInterrupt), BagWriter(tmp_path / 'bag') as writer:
        writer.write('/pose', pose(0, START), START)
        raise KeyboardInterrupt
    with BagReader(tmp_path / 'bag') as bag:
        assert len(list(bag.messages())) == 1


def test_a_bag_is_never_overwritten_and_an_unwritable_place_says_so(tmp_path):
    write_bag(tmp_path / 'bag', {'/pose': pose})
    with pytest.raises(OutputError, match='exists already'):
        BagWriter(tmp_path / 'bag')
    (tmp_path / 'file').touch()
    with pytest.raises(OutputError, match='cannot write the bag'):
        with BagWriter(tmp_path / 'file' / 'bag'):
            pass
