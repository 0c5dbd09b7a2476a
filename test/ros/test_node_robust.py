"""What goes wrong is said, counted and survived: bad messages, time jumps, failures."""

import array
import json
import os

import numpy as np
import pytest
from node_harness import CAMERA_FRAME, matrix, picture, stamp

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_ros.environment import PROFILE_VARIABLES
from stream3r_ros.tf import T_BODY_OPTICAL

pytestmark = pytest.mark.ros


def edited(message, **fields):
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def nan_floats():
    pixels = np.full((4, 4), np.nan, np.float32)
    return {
        'encoding': '32FC1',
        'height': 4,
        'width': 4,
        'step': 16,
        'data': array.array('B', pixels.tobytes()),
    }


BAD_IMAGES = {
    'short data': {'data': array.array('B', [0] * 10)},
    'step below the row': {'step': 5},
    'zero size': {'width': 0, 'height': 0, 'step': 0, 'data': array.array('B')},
    'claims 16k x 16k': {'width': 16384, 'height': 16384, 'step': 3 * 16384},
    'unknown encoding': {'encoding': 'klingon8'},
    'a depth image': nan_floats(),
}


def rejected(live):
    return live.figure('images_dropped.rejected') or 0


def send_bad(live, message):
    """Send an image and wait until the node has counted it as rejected."""
    live.send(message, lambda: rejected(live))


def test_bad_images_are_counted_and_the_session_goes_on(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0)
    for index, fields in enumerate([*BAD_IMAGES.values()] * 2, start=1):
        send_bad(live, edited(live.image(index), **fields))
    log_of_bad_images, num_bad = live.log, rejected(live)
    send_bad(live, live.image(20, frame_id=''))
    send_bad(live, live.image(21, frame_id='map'))
    send_bad(live, live.messages.rgb_image(np.zeros((1, 900, 3), np.uint8), stamp(23), 'camera'))
    unstamped = live.image(22)
    unstamped.header.stamp.sec = unstamped.header.stamp.nanosec = 0
    send_bad(live, unstamped)
    live.wait_until(
        lambda: 'rejecting images: the image has no stamp' in live.diagnostics['message']
    )
    live.feed(30)
    assert live.figure('state') == 'active'
    kinds = len(BAD_IMAGES) - 1  # a depth image is an unknown encoding, too
    assert kinds <= log_of_bad_images.count('image rejected') < num_bad  # throttled
    live.wait_for_path(0, 30)


def test_a_repeated_or_late_stamp_is_rejected(live):
    live.start()
    live.connect_camera()
    live.feed(0, 5)
    send_bad(live, live.image(5))
    send_bad(live, live.image(3))
    live.feed(6)
    assert len(live.received['/tf']) == 3


def test_time_that_jumps_back_starts_a_new_session(live):
    live.start(**{'outputs.path.max_rate_hz': 0, 'outputs.map.period_s': 0.1})
    live.connect_camera()
    live.feed(100, 101, 102)
    live.wait_for_path(100, 101, 102)
    live.feed(0)
    assert 'time jumped back by 3.400 s' in live.log
    path = live.wait_for_path(0)
    live.wait_until(
        lambda: live.received['~/map'] and live.received['~/map'][-1].header == path.header
    )


def test_a_lone_stamp_from_another_age_is_refused_and_two_of_them_are_believed(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0, 1)
    for sec in (1, 2**31 - 1):
        stray = live.image(2)
        stray.header.stamp.sec = sec
        send_bad(live, stray)
    live.feed(3)
    send_bad(live, live.image(10**6))
    live.feed(10**6 + 1)
    live.wait_for_path(0, 1, 3, 10**6 + 1)
    assert live.figure('restarts') == 0


def test_a_looped_sequence_gives_the_same_poses_again(live):
    live.start()
    live.connect_camera()
    for _ in range(2):
        for index in range(0, 60, 20):
            live.feed(index)
    first, second = live.received['/tf'][:3], live.received['/tf'][3:]
    assert first == second


def test_images_of_another_size_start_a_new_session_and_are_counted(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0, 1)
    upright = np.ascontiguousarray(picture(0).transpose(1, 0, 2))
    live.finish(live.messages.rgb_image(upright, stamp(2), CAMERA_FRAME))
    live.wait_for_path(2)
    live.feed(3)
    live.wait_for_path(3)
    live.wait_until(lambda: live.figure('restarts.image_size') == 2)
    assert live.figure('restarts') == 2 and 'images have 60 x 80 pixels now' in live.log


def test_an_image_that_is_refused_at_the_start_is_no_other_size(live):
    live.start()
    live.connect_camera()
    send_bad(live, live.messages.rgb_image(np.zeros((1, 900, 3), np.uint8), stamp(0), 'camera'))
    live.feed(1)
    live.wait_until(lambda: live.figure('images_processed') == 1)
    assert live.figure('restarts') == 0


def test_a_long_pause_warns_and_the_session_goes_on(live):
    live.start(**{'max_gap_s': 1.0, 'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0, 1, 91)
    live.wait_until(lambda: live.figure('gaps') == 1)
    assert 'no image for 3.000 s' in live.log
    live.wait_for_path(0, 1, 91)


def test_lost_tracking_goes_on_from_the_last_trusted_pose_in_the_same_map(live):
    live.start(
        **{
            'tracking.max_parallax': 100.0,
            'tracking.max_turn': 4.0,
            'tracking.min_confidence': 1.0,
            'tracking.lost_confidence': 1.0,
            'tracking.patience': 1,
            'tracking.restart_after': 1,
            'outputs.path.max_rate_hz': 0,
        }
    )
    live.connect_camera()
    live.feed(0, 1)
    live.set_parameter('tracking.lost_confidence', 1e6)
    live.feed(2)
    live.wait_until(lambda: live.figure('restarts.lost') == 1)
    live.set_parameter('tracking.lost_confidence', 1.0)
    points = live.figure('map_points')
    live.finish(live.image(3, seed=0))
    poses = [matrix(message.transforms[0].transform) for message in live.received['/tf']]
    first, trusted, again = (np.linalg.inv(T_BODY_OPTICAL) @ poses[i] for i in (0, 1, 3))
    np.testing.assert_allclose(again, trusted @ first, atol=1e-5)  # the first picture once more
    live.wait_for_path(0, 1, 2, 3)
    live.wait_until(lambda: live.figure('map_points') > points > 0)


def test_reset_starts_a_new_session(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0, 1)
    live.wait_for_path(0, 1)
    answer = live.call('reset')
    assert answer.success and 'new session' in answer.message
    live.finish(live.image(2, seed=0))  # the first picture again, later
    poses = [message.transforms[0].transform for message in live.received['/tf']]
    assert poses[2] == poses[0] != poses[1]
    live.wait_for_path(2)


def test_a_failure_is_held_until_reset(live):
    live.start(**{'session.mode': 'causal', 'session.max_frames': 2})
    live.connect_camera()
    live.feed(0, 1)
    live.camera.publish(live.image(2))
    live.wait_until(lambda: live.figure('state') == 'failed')
    assert live.diagnostics['level'] == b'\x02'
    assert '/stream3r/reset' in live.diagnostics['message']
    live.camera.publish(live.image(3))
    live.wait_until(lambda: live.figure('images_dropped.failed') == 2)
    assert live.call('reset').success
    live.feed(4)
    live.wait_until(lambda: live.figure('state') == 'active')


def test_a_failure_ends_the_node_when_asked_to(live):
    live.start(**{'session.mode': 'causal', 'session.max_frames': 1, 'on_failure': 'exit'})
    live.connect_camera()
    live.feed(0)
    live.camera.publish(live.image(1))
    assert live.wait_for_end() == 1


def test_save_map_writes_map_and_trajectory_and_says_where(live, tmp_path):
    folder = tmp_path / 'made' / 'on demand'
    live.start(**{'save_map.directory': str(folder), 'outputs.map.period_s': 0.1})
    live.connect_camera()
    refused = live.call('save_map')
    assert not refused.success and 'no image' in refused.message and not folder.exists()
    live.feed(0, 1, 2)
    answer = live.call('save_map')
    assert answer.success, answer.message
    paths = answer.message.split('\n')
    assert paths == [str(folder / name) for name in ('map.ply', 'trajectory.tum', 'map.json')]
    assert json.loads((folder / 'map.json').read_text())['weights']['source'] == 'random'
    trajectory = read_trajectory(paths[1])
    assert trajectory.stamps_ns.tolist() == [stamp(0), stamp(1), stamp(2)]
    live.wait_until(lambda: live.received['~/map'])
    live.wait_until(lambda: live.received['~/map'][-1].width == len(load_ply(paths[0])))
    assert len(load_ply(paths[0])) > 0
    assert sorted(str(p) for p in folder.iterdir()) == sorted(paths)


def test_pause_drops_images_and_resume_goes_on_with_the_session(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0)
    assert live.call('pause').success
    live.wait_until(lambda: live.figure('state') == 'paused')
    live.camera.publish(live.image(1))
    live.wait_until(lambda: live.figure('images_dropped.paused') == 1)
    said = live.call('get_status')
    assert said.success and said.message.startswith('paused: ')
    assert 'images_dropped.paused: 1' in said.message.split('\n')
    assert live.call('resume').success
    live.feed(2)
    live.wait_for_path(0, 2)


def test_save_map_refuses_without_a_folder(live):
    live.start()
    live.connect_camera()
    live.feed(0)
    answer = live.call('save_map')
    assert not answer.success and 'save_map.directory' in answer.message


def test_save_map_that_cannot_write_says_so_and_the_node_goes_on(live, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    live.start(**{'save_map.directory': str(tmp_path / 'file')})
    live.connect_camera()
    live.feed(0)
    answer = live.call('save_map')
    assert not answer.success and str(tmp_path / 'file') in answer.message
    live.feed(1)


LOSSY_CAMERA = """
import os, rclpy, time
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
rclpy.init()
camera = rclpy.create_node('camera').create_publisher(Image, '/image', qos_profile_sensor_data)
while True:
    camera.publish(Image(data=bytes(3_000_000)))
    time.sleep(0.05)
"""


def test_images_that_are_lost_on_the_way_are_counted_and_said(live, spawn):
    live.start()
    environ = {k: v for k, v in os.environ.items() if k not in PROFILE_VARIABLES}
    spawn('-c', LOSSY_CAMERA, env=environ)  # with the defaults of DDS
    live.wait_until(lambda: live.figure('images_lost'))
    assert 'images were lost on the way' in live.log
