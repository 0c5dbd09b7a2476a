"""Images and clouds leave beside the next frame: in order, one at most waiting, errors told."""

import threading

import pytest
import torch

from stream3r_core.image import ImageGeometry
from stream3r_core.types import FramePrediction
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rclpy_class
from stream3r_ros.outputs import TOPICS
from stream3r_ros.publishers import Publishers

FRAME = 'camera_optical_frame'
DEPTH, POSE = '~/depth/image', '~/pose'


def prediction(index):
    size = 6, 8
    return FramePrediction(
        index=index,
        stamp_ns=1_000_000_000 + 50_000_000 * index,
        T_world_camera=torch.eye(4),
        K=torch.eye(3),
        rgb=torch.zeros(*size, 3, dtype=torch.uint8),
        depth=torch.full(size, 1.0 + index),
        depth_conf=torch.full(size, 2.0),
        world_points=None,
        world_points_conf=None,
        geometry=ImageGeometry(size, size, (1.0, 1.0), (0, 0)),
    )


@pytest.fixture
def received(node, spin_until):
    """Publishers whose depth images and poses are listened to, and what came of them."""
    publishers, stamps = Publishers(node, NodeConfig()), {DEPTH: [], POSE: []}
    for name, came in stamps.items():
        topic = TOPICS[name]
        node.create_subscription(
            rclpy_class(topic.type),
            name,
            lambda message, came=came: came.append(stamp_ns(message)),
            topic.qos.for_rclpy(),
        )
    spin_until(lambda: all(node.count_subscribers(node.resolve_topic_name(n)) for n in stamps))
    return publishers, stamps


def test_poses_do_not_wait_for_images_and_images_keep_their_order(
    received, spin_until, monkeypatch
):
    publishers, stamps = received
    may_send, send = threading.Event(), publishers._send_wanted

    def held_back(*arguments):
        assert may_send.wait(60)
        send(*arguments)

    monkeypatch.setattr(publishers, '_send_wanted', held_back)
    frames = [prediction(i) for i in range(3)]
    publishers.publish(frames[0], FRAME, NodeConfig(), None, None)  # returns: nothing waited for
    spin_until(lambda: stamps[POSE] == [frames[0].stamp_ns])
    second = threading.Thread(
        target=publishers.publish, args=(frames[1], FRAME, NodeConfig(), None, None)
    )
    second.start()
    spin_until(lambda: len(stamps[POSE]) == 2)
    assert second.is_alive() and not stamps[DEPTH]  # the images of one frame wait, not of two
    may_send.set()
    second.join(60)
    publishers.publish(frames[2], FRAME, NodeConfig(), None, None)
    publishers.finish()
    spin_until(lambda: len(stamps[DEPTH]) == 3)
    assert stamps[DEPTH] == stamps[POSE] == [frame.stamp_ns for frame in frames]


def test_what_prevents_sending_is_raised_with_the_next_frame(received, monkeypatch):
    publishers, _ = received

    def fail(*_):
        raise OSError('no more')

    monkeypatch.setattr(publishers, '_send_wanted', fail)
    publishers.publish(prediction(0), FRAME, NodeConfig(), None, None)
    with pytest.raises(OSError, match='no more'):
        publishers.publish(prediction(1), FRAME, NodeConfig(), None, None)
    publishers.finish()  # told once
