"""The node in the process of the test: what is too rare to be met from outside."""

import copy
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import rclpy
from node_harness import CAMERA_FRAME, HEIGHT, SMALL, WIDTH, picture, stamp
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image

from stream3r_core.checkpoints import load_model
from stream3r_core.config import from_dict
from stream3r_core.errors import InputError, NotLocalizedError
from stream3r_core.slam import SubmapReconstructor
from stream3r_ros import managed_node
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.live import LiveReconstruction
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import TOPICS
from stream3r_ros.parameters import nest
from stream3r_ros.publishers import SENDER, Publishers
from stream3r_ros.transforms import TransformBuffer

pytestmark = pytest.mark.ros
TIMEOUT_S = 60
SUBMAPS = {'backend.kind': 'submaps'}
FAILURE, SUCCESS = TransitionCallbackReturn.FAILURE, TransitionCallbackReturn.SUCCESS


def image(index, frame_id=CAMERA_FRAME, size=(HEIGHT, WIDTH)):
    pixels = np.ascontiguousarray(np.resize(picture(index), (*size, 3)))
    return rclpy_messages().rgb_image(pixels, stamp(index), frame_id)


@pytest.fixture(scope='module')
def model():
    return load_model('tiny', weights='random')


@pytest.fixture
def reconstruct(node, model):
    """Return a function that makes a reconstruction which publishes on the graph."""
    made = []

    def make(**parameters):
        config = from_dict(NodeConfig, nest({**SMALL, **parameters}))
        publishers = Publishers(node, config)
        made.append((publishers, LiveReconstruction(model, config, publishers, TransformBuffer())))
        return made[-1][1], config

    yield make
    for publishers, live in made:
        live.close()
        publishers.close(TIMEOUT_S)


@pytest.fixture
def listen(node, spin_until):
    """Return a function that subscribes to a topic and returns the list of what comes."""

    def subscribe(topic):
        came, (kind, qos) = [], TOPICS[topic]
        node.create_subscription(
            rclpy_class(kind), topic, came.append, qos._replace(depth=100).for_rclpy()
        )
        full = topic.replace('~', f'/{node.get_name()}')
        spin_until(lambda: node.count_subscribers(full))
        return came

    return subscribe


@pytest.fixture
def inside(ros):
    """Return a function that makes the node, configured and active, in this process."""
    made = []

    def make(**parameters):
        given = [Parameter(name, value=value) for name, value in {**SMALL, **parameters}.items()]
        made.append(managed_node.Stream3rNode(context=ros, parameter_overrides=given))
        assert made[-1].start()
        return made[-1]

    yield make
    for stream in made:
        stream.close(TIMEOUT_S)
        stream.destroy_node()


def process(stream, message):
    """Let the inference thread of the node process an image."""
    work = stream._inference.submit(lambda: stream._live.process(message, stream.config))
    return work.result(TIMEOUT_S)


def wait_until(condition):
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def move_the_map(live):
    """Do what a closed loop does: the open submap lies elsewhere now."""
    atlas = live._reconstructor.backend.atlas
    key = next(iter(atlas.submaps))
    S = np.array(atlas.S_map_submap(key))
    S[0, 3] += 1.0
    atlas.place({key: S})


def test_a_correction_that_cannot_be_published_is_said_and_tried_again(inside, monkeypatch, capfd):
    stream = inside(**SUBMAPS)
    process(stream, image(0))
    outputs, moved = stream._results.outputs, threading.Event()
    before = copy.deepcopy(outputs.path(0).poses[0].pose.position)

    def fail(*_):
        moved.set()
        raise ValueError('no such row')

    with monkeypatch.context() as broken:
        broken.setattr(outputs, 'correct', fail)
        move_the_map(stream._live)
        stream._on_moved()
        assert moved.wait(TIMEOUT_S)
        process(stream, image(1))  # the same trouble once more, and the image is processed
        status = stream.status()
    assert len(outputs.path(0).poses) == 2 and status.state == 'active'
    assert status.level == b'\x01' and 'lacks a correction' in status.sentence()
    said = capfd.readouterr().err
    assert said.count('ValueError: no such row') == 1, said
    stream._on_moved()
    process(stream, image(2))
    assert 'lacks' not in stream.status().sentence()
    assert outputs.path(0).poses[0].pose.position != before


def test_corrections_wait_once_however_many_there_are(inside):
    stream, held = inside(**SUBMAPS), threading.Event()
    stream._inference.submit(lambda: held.wait(TIMEOUT_S))
    for _ in range(50):
        stream._on_moved()
    answer = stream._inference.submit(lambda: 'there is room for services')
    held.set()
    assert answer.result(TIMEOUT_S) == 'there is room for services'


def test_after_a_reset_no_map_carries_a_stamp_of_the_old_session(
    reconstruct, listen, spin_until, monkeypatch
):
    live, config = reconstruct()
    full, changes = listen('~/map'), listen('~/map_changes')
    topics = live.map_topics
    live.process(image(0), config)
    topics.publish()
    topics.publish_changes(10**6)
    spin_until(lambda: full and len(changes) == 2)
    live.restart(config)
    topics.publish()
    topics.publish_changes(10**6)
    live.process(image(1), config)

    def restarted_under(reader, index):
        read = getattr(live._reconstructor.map, reader)

        def read_late(*arguments):
            live.restart(config)
            live.process(image(index), config)
            return read(*arguments)

        return read_late

    for reader, publish, index in (
        ('view', topics.publish, 2),
        ('changed_since', lambda: topics.publish_changes(10**6), 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(live._reconstructor.map, reader, restarted_under(reader, index))
            publish()
    topics.publish()
    topics.publish_changes(10**6)
    newest = [(stamp(3), True)] * 2
    spin_until(lambda: [(stamp_ns(c[-1]), c[-1].width > 0) for c in (full, changes)] == newest)
    assert [stamp_ns(m) for m in full] == [stamp(0), stamp(3)]
    assert [stamp_ns(m) for m in changes] == [stamp(0), stamp(0), stamp(3), stamp(3)]
    assert [m.width > 0 for m in changes] == [False, True, False, True]


def test_a_map_that_was_ahead_of_its_frame_comes_again_with_the_stamp_of_that_frame(
    reconstruct, listen, spin_until, monkeypatch
):
    live, config = reconstruct(**SUBMAPS)
    full, topics, find = listen('~/map'), live.map_topics, live._placement.carriers
    live.process(image(0), config)

    def publish_before(*arguments):
        topics.publish()
        return find(*arguments)

    monkeypatch.setattr(live._placement, 'carriers', publish_before)
    live.process(image(1), config)
    for _ in range(3):
        topics.publish()
    move_the_map(live)  # without a frame: one message, with the stamp that there is
    for _ in range(3):
        topics.publish()
    live.process(image(2), config)
    topics.publish()
    spin_until(lambda: full and stamp_ns(full[-1]) == stamp(2))
    assert [stamp_ns(m) for m in full] == [stamp(index) for index in (0, 1, 1, 1, 2)]


def test_a_stamp_is_taken_once_also_before_the_camera_is_found(reconstruct, model, tmp_path):
    mapper = SubmapReconstructor(model, from_dict(NodeConfig, nest({**SMALL, **SUBMAPS})))
    for index in range(6):
        mapper.feed(picture(index), stamp(index))
    (tmp_path / 'map.safetensors').write_bytes(mapper.pack())
    live, config = reconstruct(**{
        **SUBMAPS, 'backend.load': str(tmp_path / 'map.safetensors'), 'backend.localize_only': True
    })  # fmt: skip
    with pytest.raises(NotLocalizedError, match='not found'):
        live.process(image(0), config)
    with pytest.raises(InputError, match='the stamp of the one before'):
        live.process(image(0), config)
    with pytest.raises(NotLocalizedError):
        live.process(image(1, size=(2 * HEIGHT, 2 * WIDTH)), config)  # the network sees the same
    assert live.figures.restarts == {'image_size': 1}
    with pytest.raises(InputError, match='cannot be seen together'):
        live.process(image(2, size=(WIDTH, HEIGHT)), config)


def test_each_frame_of_a_chunk_keeps_the_frame_and_the_lens_of_its_image(
    reconstruct, listen, spin_until
):
    live, config = reconstruct(**{
        'session.mode': 'stac', 'cache.chunk_size': 3, 'cache.max_bytes': 40_000_000,
        'rectify': 'never',
    })  # fmt: skip
    edges, infos = listen('/tf'), listen('~/depth/camera_info')
    K = np.array([[90.0, 0, 41], [0, 95, 29], [0, 0, 1]])
    for index, name in enumerate(('left', 'middle', 'right')):
        info = rclpy_messages().camera_info(K, HEIGHT, WIDTH, stamp(index), name)
        info.d = [-0.1 * index, 0.0, 0.0, 0.0, 0.0]
        live.camera_info = info
        live.process(image(index, name), config)
    spin_until(lambda: len(edges) == len(infos) == 3)
    assert [m.transforms[0].child_frame_id for m in edges] == ['left', 'middle', 'right']
    assert [m.header.frame_id for m in infos] == ['left', 'middle', 'right']
    assert [sum(m.d) for m in infos] == pytest.approx([0.0, -0.1, -0.2])


def test_refused_images_do_not_part_a_submap_from_its_overlap(reconstruct, monkeypatch):
    live, config = reconstruct(**{
        **SUBMAPS, 'backend.submaps.max_frames': 4, 'scale.source': 'depth',
    })  # fmt: skip

    def refuse(*_):
        raise InputError('not this one')

    for index in range(6):
        live.process(image(10 * index), config)
        if index == 2:  # the next one completes the submap
            with monkeypatch.context() as broken:
                broken.setattr(live._reconstructor.session, 'step', refuse)
                for offset in range(1, 9):
                    with pytest.raises(InputError, match='not this one'):
                        live.process(image(10 * index + offset), config)
    assert live.figures.backend['submaps'] > 1


def test_cleanup_under_an_image_in_work_touches_nothing_and_may_be_asked_again(
    inside, monkeypatch
):
    stream = inside()
    process(stream, image(0))
    stream._on_image(image(0))  # once more, which is refused
    wait_until(lambda: stream.status().drops == {'rejected': 1})
    monkeypatch.setattr(managed_node, 'CLEANUP_TIMEOUT_S', 0.05)
    is_at_work, go_on = threading.Event(), threading.Event()

    def slow():
        is_at_work.set()
        assert go_on.wait(TIMEOUT_S)
        stream._live.process(image(1), stream.config)

    work = stream._inference.submit(slow)
    assert is_at_work.wait(TIMEOUT_S)
    assert stream.trigger_deactivate() == SUCCESS
    assert stream.trigger_cleanup() == FAILURE
    assert stream.status().state == 'inactive' and len(stream._results.outputs.path(0).poses) == 1
    go_on.set()
    work.result(TIMEOUT_S)  # it has found all that it needs
    monkeypatch.undo()
    assert stream.trigger_cleanup() == SUCCESS
    status = stream.status()
    assert status.state == 'unconfigured' and not stream._results.outputs.path(0).poses
    assert status.drops == {'rejected': 1}, 'what was lost stays counted'


@pytest.mark.parametrize('kind', ['none', 'submaps'])
def test_cleanup_lets_go_of_the_network_at_once(inside, kind):
    stream = inside(**{'backend.kind': kind})
    for index in range(2):
        process(stream, image(index))
    network = weakref.ref(stream._live._reconstructor.session.model)
    assert stream.trigger_deactivate() == SUCCESS
    gc.disable()  # or it might come to it on its own
    try:
        assert stream.trigger_cleanup() == SUCCESS
        assert network() is None
    finally:
        gc.enable()


def test_an_unexpected_error_of_a_transition_is_said_and_the_node_can_begin_again(
    inside, monkeypatch, capfd
):
    stream = inside()
    assert stream.trigger_deactivate() == SUCCESS

    def fail():
        raise RuntimeError('device-side assert')

    with monkeypatch.context() as broken:
        broken.setattr(managed_node.torch.cuda, 'is_initialized', fail)
        assert stream.trigger_cleanup() == TransitionCallbackReturn.ERROR
    assert 'RuntimeError: device-side assert' in capfd.readouterr().err
    assert stream.status().state == 'unconfigured'
    assert stream.start() and stream.status().state == 'active'


def test_a_signal_ends_a_cleanup_that_waits(inside, ros):
    stream, go_on = inside(), threading.Event()
    stream._inference.submit(lambda: go_on.wait(TIMEOUT_S))
    assert stream.trigger_deactivate() == SUCCESS
    threading.Timer(0.1, rclpy.try_shutdown, kwargs={'context': ros}).start()
    with pytest.raises(managed_node.ContextEnded):
        stream.trigger_cleanup()
    go_on.set()


def test_a_closed_node_leaves_no_thread(inside):
    before = set(threading.enumerate())
    stream = inside(**SUBMAPS)
    process(stream, image(0))
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert {'inference', 'backend', f'{SENDER}_0'} <= names
    stream.close(TIMEOUT_S)
    for thread in set(threading.enumerate()) - before:
        thread.join(TIMEOUT_S)  # at its end: a thread that stays fails the assertion
    assert set(threading.enumerate()) <= before


def test_a_node_whose_back_end_has_failed_still_closes(inside, monkeypatch):
    stream = inside(**SUBMAPS)
    worker = stream._live._reconstructor._worker

    def fail(*_):
        raise ValueError('singular')

    monkeypatch.setattr(worker.backend, 'follow', fail)
    process(stream, image(0))
    assert worker._ended.wait(TIMEOUT_S)
    stream.close(TIMEOUT_S)
    assert stream.save_at_exit() == []


def test_images_that_the_node_was_too_slow_to_take_are_counted(inside, node):
    stream = inside()
    camera = node.create_publisher(Image, '/image', 10)
    executor = SingleThreadedExecutor(context=stream.context)
    executor.add_node(stream)

    def take():
        while stream.status().frames.num_received + sum(losses().values()) < sent:
            executor.spin_once(TIMEOUT_S)

    def losses():
        return stream.status().losses

    while not (camera.get_subscription_count() and stream.count_publishers('/image')):
        executor.spin_once(0.1)
    sent = 1
    camera.publish(image(0))
    take()
    for index in range(1, 21):  # nobody takes them meanwhile: the queue keeps 5
        camera.publish(image(index))
    sent = 21
    take()
    assert losses() == {'unread': 15}
    executor.shutdown()
