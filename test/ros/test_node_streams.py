"""A stream through the live node: what goes out carries the image's stamp and the same result."""

import cv2
import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray
from node_harness import CAMERA_FRAME, HEIGHT, SMALL, WIDTH, picture, stamp
from rclpy.qos import ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo
from test_outputs import apply, points_of

from stream3r_core.checkpoints import load_model
from stream3r_core.config import from_dict
from stream3r_core.pipeline import Reconstructor
from stream3r_ros.calibration import Calibrator
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import PINHOLE, Lens, depth_from_message, stamp_ns
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import FRAME_TOPICS, TOPICS, Outputs
from stream3r_ros.parameters import nest

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('one_thread')]
NUM_IMAGES = 5


def stamps(messages):
    return [stamp_ns(message) for message in messages]


def transforms(messages):
    return [transform for message in messages for transform in message.transforms]


def offline(num_images, K=None, see=picture, lens=PINHOLE, **parameters):
    """The messages that the same images give without any ROS graph between."""
    config = from_dict(NodeConfig, nest({**SMALL, **parameters}))
    model = load_model(config.model.preset, weights=config.model.weights)
    reconstructor = Reconstructor(model, config)
    outputs = Outputs(rclpy_messages(), config.map_frame, mapping=config.mapping)
    frames = []
    for index in range(num_images):
        prediction = reconstructor.process(see(index), stamp(index), K)
        outputs.mapping = config.mapping
        frames.append(outputs.add(prediction, CAMERA_FRAME, lens))
    return frames, outputs, reconstructor.map.points()


@pytest.mark.parametrize(
    'reliability', [ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT]
)
def test_every_processed_image_gives_one_transform_with_its_stamp(live, reliability):
    live.start()
    live.connect_camera(reliability=reliability)
    live.feed(*range(NUM_IMAGES))
    sent = [stamp(index) for index in range(NUM_IMAGES)]
    live.wait_until(lambda: live.figure('images_processed') == NUM_IMAGES)
    edges = transforms(live.received['/tf'])
    assert stamps(edges) == sent  # one each, in order, equal to the nanosecond
    assert {(t.header.frame_id, t.child_frame_id) for t in edges} == {('map', CAMERA_FRAME)}


def test_depth_and_camera_info_go_together_in_the_frame_of_the_image(live):
    live.start()
    live.connect_camera()
    live.feed(*range(NUM_IMAGES))
    depth = live.wait_for('~/depth/image', NUM_IMAGES)
    info = live.wait_for('~/depth/camera_info', NUM_IMAGES)
    confidence = live.wait_for('~/depth/confidence', NUM_IMAGES)
    sent = [stamp(index) for index in range(NUM_IMAGES)]
    assert stamps(depth) == stamps(info) == stamps(confidence) == sent
    for image, camera in zip(depth, info):
        assert image.encoding == '32FC1' and image.header.frame_id == CAMERA_FRAME
        assert camera.header == image.header
        assert (camera.height, camera.width) == (image.height, image.width)
        assert not any(camera.d)
        depth_m = depth_from_message(image)
        assert np.isfinite(depth_m).any() and not (depth_m <= 0).any()


def test_live_equals_offline_message_by_message(live):
    live.start(**{'outputs.path.max_rate_hz': 0, 'outputs.map.period_s': 0.1})
    live.connect_camera()
    live.feed(*range(NUM_IMAGES))
    frames, outputs, cloud = offline(NUM_IMAGES)
    for topic in FRAME_TOPICS:
        assert live.wait_for(topic, NUM_IMAGES) == [f.message(topic) for f in frames], topic
    path = live.wait_for_path(*range(NUM_IMAGES))
    assert path == outputs.path(stamp(NUM_IMAGES - 1))
    expected_map = outputs.map(cloud, stamp(NUM_IMAGES - 1))
    live.wait_until(lambda: live.received['~/map'] and live.received['~/map'][-1] == expected_map)
    assert expected_map.width > 0


def test_known_intrinsics_replace_the_predicted_ones(live):
    K = np.array([[90.0, 0, 41], [0, 95, 29], [0, 0, 1]])
    live.start()
    live.connect_camera()
    live.send_camera_info(K)
    live.feed(0)
    (info,) = live.wait_for('~/depth/camera_info', 1)
    frames, *_ = offline(1, K=torch.from_numpy(K))
    assert info == frames[0].camera_info()
    assert info.k[0] == pytest.approx(90 * info.width / WIDTH)
    assert info.k[4] == pytest.approx(95 * info.height / HEIGHT)
    unknown = offline(1)[0][0].camera_info()
    assert abs(unknown.k[0] - info.k[0]) > 1  # it did matter


def test_the_first_image_waits_for_intrinsics_that_come_after_it(live, node):
    K = np.array([[90.0, 0, 41], [0, 95, 29], [0, 0, 1]])
    live.start()
    infos = node.create_publisher(CameraInfo, '/camera_info', 10)
    live.connect_camera()
    live.wait_until(infos.get_subscription_count)
    live.camera.publish(live.image(0))
    infos.publish(live.messages.camera_info(K, HEIGHT, WIDTH, stamp(0), CAMERA_FRAME))
    (info,) = live.wait_for('~/depth/camera_info', 1)
    assert info == offline(1, K=torch.from_numpy(K))[0][0].camera_info()


def test_images_of_a_distorting_lens_are_rectified(live):
    K, d = np.array([[70.0, 0, 41], [0, 75, 29], [0, 0, 1]]), [-0.25, 0.05, 0.001, 0.0, 0.0]
    live.start()
    live.connect_camera()
    live.send_camera_info(K, d=d)
    live.feed(0, 1)
    info = live.messages.camera_info(K, HEIGHT, WIDTH, 0, CAMERA_FRAME)
    info.d = d
    calibrate = Calibrator()
    K_rectified = calibrate(picture(0), info).K
    frames, *_ = offline(2, K_rectified, lambda index: calibrate(picture(index), info).image)
    for topic in FRAME_TOPICS:
        assert live.wait_for(topic, 2) == [f.message(topic) for f in frames], topic
    said = live.received['~/depth/camera_info'][0]
    assert said.k[0] == pytest.approx(K_rectified[0, 0] * said.width / WIDTH) and not any(said.d)


def test_never_rectified_images_leave_with_their_distortion_and_the_cloud_of_a_pinhole(live):
    K, d = np.array([[70.0, 0, 41], [0, 75, 29], [0, 0, 1]]), (-0.25, 0.05, 0.001, 0.0, 0.0)
    live.start(rectify='never')
    live.connect_camera()
    live.send_camera_info(K, d=d)
    live.feed(0, 1)
    frames, *_ = offline(2, K, lens=Lens('plumb_bob', d))
    for topic in FRAME_TOPICS:
        assert live.wait_for(topic, 2) == [f.message(topic) for f in frames], topic
    said = live.received['~/depth/camera_info'][0]
    assert (said.distortion_model, tuple(said.d)) == ('plumb_bob', d)
    assert said.k[0] == pytest.approx(70 * said.width / WIDTH)
    assert live.received['~/cloud'] == [f.message('~/cloud') for f in offline(2, K)[0]]
    assert live.log.count('cloud and map are bent by it') == 1


def test_intrinsics_that_cannot_be_right_are_not_used_and_named_once(live):
    bad = {
        'camera_info is for 160 x 120 pixels': (np.diag([90.0, 90, 1]), 2 * HEIGHT, 2 * WIDTH),
        'the camera is not calibrated': (np.zeros((3, 3)), HEIGHT, WIDTH),
        'K must be': (np.full((3, 3), np.nan), HEIGHT, WIDTH),
    }
    live.start()
    live.connect_camera()
    sent = 0
    for reason, (K, height, width) in bad.items():
        while reason not in live.log:  # the intrinsics may come after the image
            live.send_camera_info(K, height, width)
            live.feed(sent)
            sent += 1
        live.feed(sent)
        sent += 1
    info = live.wait_for('~/depth/camera_info', sent)
    assert info == [frame.camera_info() for frame in offline(sent)[0]]
    assert [live.log.count(reason) for reason in bad] == [1, 1, 1]


@pytest.mark.parametrize('topic', ['/camera/image_raw', '/camera/image_raw/compressed'])
def test_compressed_images_are_taken_from_either_name(live, topic):
    live.start('-r', f'image:={topic}', image_transport='compressed')
    live.connect_camera('/camera/image_raw/compressed', compressed=True)
    bgr = cv2.cvtColor(picture(0), cv2.COLOR_RGB2BGR)
    data = cv2.imencode('.png', bgr)[1].tobytes()
    live.finish(live.messages.compressed_image(data, 'png', stamp(0), CAMERA_FRAME))
    frames, *_ = offline(1)  # png loses nothing
    assert live.received['/tf'] == [frames[0].tf()]


def test_frames_of_a_burst_are_processed_or_counted_and_the_newest_wins(live):
    live.start()
    live.connect_camera()
    sent = [stamp(index) for index in range(40)]
    for index in range(40):
        live.camera.publish(live.image(index))
    seen = live.received['/tf']
    live.wait_until(lambda: seen and stamps(transforms(seen))[-1] == sent[-1])
    live.wait_until(lambda: live.figure('images_processed') == len(seen))
    assert live.figure('images_dropped.superseded') > 0
    assert live.figure('images_received') == len(seen) + live.figure('images_dropped')
    assert stamps(transforms(seen)) == sorted(set(stamps(transforms(seen))) & set(sent))


def test_outputs_that_are_switched_off_stay_silent_until_they_are_switched_on(live):
    live.start(**{'publish_tf': 'false', 'outputs.cloud.enabled': 'false'})
    live.connect_camera()
    live.camera.publish(live.image(0))
    live.wait_until(lambda: live.figure('images_processed') == 1)
    live.set_parameter('publish_tf', True)
    live.set_parameter('outputs.cloud.enabled', True)
    live.feed(1)
    live.wait_for('~/cloud', 1)  # what had been sent of the first image would have come before
    assert (
        stamps(transforms(live.received['/tf'])) == stamps(live.received['~/cloud']) == [stamp(1)]
    )


def test_with_simulated_time_the_node_works_and_its_diagnostics_tell_that_time(live, node):
    live.start('-p', 'use_sim_time:=true')  # active although no clock ticks yet
    live.connect_camera()
    live.feed(0)
    clock = node.create_publisher(Clock, '/clock', 10)
    stamps_of_diagnostics = []
    node.create_subscription(
        DiagnosticArray,
        '/diagnostics',
        lambda message: stamps_of_diagnostics.append(stamp_ns(message)),
        10,
    )
    now = Clock(clock=live.messages.header(stamp(7), '').stamp)

    def tick():
        clock.publish(now)
        return stamps_of_diagnostics and stamps_of_diagnostics[-1] == stamp(7)

    live.wait_until(tick)
    live.feed(1)
    assert stamps(transforms(live.received['/tf'])) == [stamp(0), stamp(1)]


def test_a_rate_limit_counts_in_the_time_of_the_images(live):
    live.start(**{'outputs.cloud.max_rate_hz': 11})  # images come at 30 Hz
    live.connect_camera()
    live.feed(*range(7))
    live.wait_until(lambda: live.figure('images_processed') == 7)
    clouds = live.wait_for('~/cloud', 3)
    assert stamps(clouds) == [stamp(0), stamp(3), stamp(6)]


def test_changes_of_the_map_add_up_to_it_for_early_and_late_subscribers(live, node):
    live.start(**{'outputs.map.period_s': 0.1, 'outputs.map_changes.period_s': 0.1})
    live.connect_camera()
    live.feed(0, 1, 2)
    late = []
    topic = TOPICS['~/map_changes']
    node.create_subscription(
        rclpy_class(topic.type), '/stream3r/map_changes', late.append, topic.qos.for_rclpy()
    )

    def is_whole(changes):
        full = live.received['~/map']
        points = np.array(list(apply({}, changes).values()))
        return full and full[-1].width == len(points) > 0 and same(points, points_of(full[-1]))

    def same(a, b):
        return np.array_equal(np.sort(a, 0), np.sort(b, 0))

    live.wait_until(lambda: is_whole(live.received['~/map_changes']) and is_whole(late))


def test_late_subscribers_get_the_map_and_the_path(live, node):
    live.start(**{'outputs.map.period_s': 0.1})
    live.connect_camera()
    live.feed(0, 1)
    live.wait_for('~/map', 1)
    late = {'~/map': [], '~/path': []}
    for topic, messages in late.items():
        node.create_subscription(
            rclpy_class(TOPICS[topic].type),
            topic.replace('~', '/stream3r'),
            messages.append,
            TOPICS[topic].qos.for_rclpy(),
        )
    live.wait_until(lambda: all(late.values()))
