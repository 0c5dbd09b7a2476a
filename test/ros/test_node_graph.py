"""Three processes: a player as the camera, the node, and this one as the observer."""

import pytest
from node_harness import ROOT
from rclpy.serialization import deserialize_message
from recordings import (
    CAMERA_FRAME,
    recorded,
    replay,
    stamp,
    true_tf,
    write_images,
    write_raw_twin,
    write_rig,
)

from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.results import NAMESPACE, RECORDED

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('one_thread')]
NUM_IMAGES = 6
STAMPS = [stamp(index) for index in range(NUM_IMAGES)]
IMAGES = '/camera/image_raw'


@pytest.fixture
def bag(tmp_path):
    """Images, with the true poses on the very edge of /tf that the node publishes."""
    return write_images(tmp_path / 'bag', range(NUM_IMAGES), IMAGES, extra={'/tf': true_tf})


def test_a_bag_played_live_gives_the_files_and_messages_of_its_replay(live, spawn, bag, tmp_path):
    live.start('-r', f'image:={IMAGES}', **{'save_map.directory': str(tmp_path / 'live')})
    spawn('-m', 'stream3r_ros', 'play', bag, '--lockstep', cwd=ROOT)
    live.wait_until(lambda: live.figure('images_processed') == NUM_IMAGES)
    assert live.figure('images_dropped') == 0
    assert live.call('save_map').success
    replay(tmp_path / 'offline', bag)
    for name in ('trajectory.tum', 'map.ply'):
        offline, saved = ((tmp_path / run / name).read_bytes() for run in ('offline', 'live'))
        assert without_comments(saved) == without_comments(offline), name
    assert_same_messages(live, recorded(tmp_path / 'offline'))


def without_comments(content):
    return [line for line in content.split(b'\n') if not line.startswith(b'#')]


def as_rclpy(recorded_message, message_class):
    """Read a message of a bag as rclpy reads one from the wire."""
    return deserialize_message(rosbags_messages().serialize(recorded_message), message_class)


def assert_same_messages(live, offline):
    for topic in RECORDED:
        name = topic.replace('~', NAMESPACE)
        seen = live.wait_for(topic, NUM_IMAGES)
        assert seen == [as_rclpy(message, type(seen[0])) for message in offline[name]], topic


def test_only_the_nodes_own_transform_is_on_tf(live, spawn, bag):
    live.start('-r', f'image:={IMAGES}')
    spawn('-m', 'stream3r_ros', 'play', bag, '--lockstep', cwd=ROOT)
    live.wait_until(lambda: live.figure('images_processed') == NUM_IMAGES)
    edges = [edge for message in live.received['/tf'] for edge in message.transforms]
    assert [stamp_ns(edge) for edge in edges] == STAMPS
    assert {(e.header.frame_id, e.child_frame_id) for e in edges} == {('map', CAMERA_FRAME)}
    truth = [true_tf(index).transforms[0].transform.translation for index in range(NUM_IMAGES)]
    own = [edge.transform.translation for edge in edges]
    assert all((a.x, a.y, a.z) != (b.x, b.y, b.z) for a, b in zip(own, truth))


@pytest.mark.parametrize('transport', ['compressed', 'raw'])
def test_an_rgbd_camera_as_jpeg_and_its_raw_twin_give_the_poses_of_the_replay(
    live, spawn, tmp_path, transport
):
    bag = write_rig(tmp_path / 'jpeg')
    if transport == 'raw':
        bag = write_raw_twin(tmp_path / 'raw', bag)
    live.start(
        *('-r', 'image:=/camera/color/image_raw', '-r', 'camera_info:=/camera/color/camera_info'),
        **{'image_transport': transport, 'save_map.directory': str(tmp_path / 'live')},
    )
    spawn('-m', 'stream3r_ros', 'play', bag, '--lockstep', cwd=ROOT)
    live.wait_until(lambda: live.figure('images_processed') == NUM_IMAGES)
    assert live.call('save_map').success
    replay(tmp_path / 'offline', tmp_path / 'jpeg', '--camera-info')
    for name in ('trajectory.tum', 'map.ply'):
        offline, saved = ((tmp_path / run / name).read_bytes() for run in ('offline', 'live'))
        assert without_comments(saved) == without_comments(offline), name
    edges = [edge for message in live.received['/tf'] for edge in message.transforms]
    assert [stamp_ns(edge) for edge in edges] == STAMPS
