"""``stream3r play``: a camera in a process of its own, fed from a bag, a video or images.

What a bag says about where its camera was is the answer that a node is to find: its transforms are
played as ``/ground_truth/tf``, never as ``/tf``.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from stream3r_core.errors import DataError, InputError, Stream3rError
from stream3r_ros.bag import COMPRESSED_IMAGE, RAW_IMAGE, BagMessage, BagReader
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import MessageFactory, rclpy_class, rclpy_messages, rosbags_messages
from stream3r_ros.qos import Qos
from stream3r_ros.sources import DEFAULT_RATE_HZ, Source, file_source, is_one_bag

IMAGES = (RAW_IMAGE, COMPRESSED_IMAGE)
TRANSFORMS = 'tf2_msgs/msg/TFMessage'
GROUND_TRUTH = '/ground_truth'
WORLD_FRAMES = ('map', 'odom', 'earth', 'world')  # of REP-105, and the one of simulators
FILES_TOPIC = 'image'  # what a node subscribes to that is not remapped
LATCHED_SET = Qos(depth=100, latched=True)  # all static transforms of a bag, however many messages
ACKNOWLEDGE_S = 5.0
ANSWER_S = 30.0  # lockstep goes on without the answer to an image after this time
QUIET_S = 0.3  # a node's subscriptions are discovered one after the other


class Outgoing(NamedTuple):
    """A message to be published."""

    topic: str
    due_ns: int  # on the recording's clock
    message: Any  # of rclpy, or its CDR bytes


class Programme(Protocol):
    """What is played: the topics with their types, and the messages in their order."""

    topics: dict[str, str]
    num_messages: int

    def __iter__(self) -> Iterator[Outgoing]: ...


class BagProgramme:
    """The messages of an open ROS 2 bag, byte for byte, but for its transforms.

    Static transforms between frames of the rig, which a node needs, stay on ``/tf_static``; those
    that hang something from a world frame, and all of ``/tf``, go below ``/ground_truth``.
    """

    def __init__(self, bag: BagReader, names: Sequence[str] = ()):
        if bag.is_ros1:
            raise DataError(
                f'{bag.path} is a ROS 1 bag, whose messages cannot be sent to ROS 2 as they are: '
                'convert it with `rosbags-convert`, or use `stream3r replay`'
            )
        self._bag = bag
        self._messages = rosbags_messages()
        chosen = [bag.topic(name) for name in names] or list(bag.topics.values())
        playable = [topic for topic in chosen if _is_known(topic.type)]
        for topic in sorted({*chosen} - {*playable}):
            text = f'{topic.name}: the type {topic.type} is not installed'
            if names:
                raise DataError(f'{text}; install its package, or leave the topic out')
            print(f'{text}; not played', file=sys.stderr)
        self._names = [topic.name for topic in playable]
        self.num_messages = sum(topic.num_messages for topic in playable)
        self.topics = {topic.name: topic.type for topic in playable if topic.type != TRANSFORMS}
        for topic in playable:
            if topic.type == TRANSFORMS:
                self.topics[GROUND_TRUTH + topic.name] = TRANSFORMS
                if _is_static(topic.name):
                    self.topics[topic.name] = TRANSFORMS

    def __iter__(self) -> Iterator[Outgoing]:
        for message in self._bag.messages(self._names) if self._names else ():
            if message.type != TRANSFORMS:
                yield Outgoing(message.topic, message.stamp_ns, message.raw)
            elif _is_static(message.topic):
                yield from self._judged(message)
            else:
                yield Outgoing(GROUND_TRUTH + message.topic, message.stamp_ns, message.raw)

    def _judged(self, message: BagMessage) -> Iterator[Outgoing]:
        """Part the static transforms of one message into the rig's and the world's."""
        parts: dict[str, list] = {}
        for transform in self._bag.deserialize(message).transforms:
            in_world = transform.header.frame_id.lstrip('/') in WORLD_FRAMES
            parts.setdefault(GROUND_TRUTH * in_world + message.topic, []).append(transform)
        for topic, transforms in parts.items():
            raw = self._messages.serialize(self._messages.tf(transforms))
            yield Outgoing(topic, message.stamp_ns, raw)


class FilesProgramme:
    """The images of files as rgb8 messages on ``image``."""

    def __init__(self, source: Source):
        self._source = source
        self.topics = {FILES_TOPIC: RAW_IMAGE}
        self._messages: MessageFactory = rclpy_messages()
        self.num_messages = source.num_frames

    def __iter__(self) -> Iterator[Outgoing]:
        for load in self._source:
            try:
                frame = load()
            except InputError as error:
                print(f'not played: {error}', file=sys.stderr)
                continue
            rgb = _opaque(frame.rgb)
            image = self._messages.rgb_image(rgb, frame.stamp_ns, frame.frame_id)
            yield Outgoing(FILES_TOPIC, frame.stamp_ns, image)


class Thinned:
    """Another programme with every k-th image of each topic, the first ones included."""

    def __init__(self, programme: Programme, k: int):
        self._programme, self._k = programme, k
        self.topics, self.num_messages = programme.topics, programme.num_messages

    def __iter__(self) -> Iterator[Outgoing]:
        seen = dict.fromkeys(self.topics, 0)
        for item in self._programme:
            if self.topics[item.topic] in IMAGES:
                seen[item.topic] += 1
                if (seen[item.topic] - 1) % self._k:
                    continue
            yield item


def play(
    node: Any, programme: Programme, rate: float, patience_s: float, in_lockstep: bool = False
) -> int:
    """Publish a programme at ``rate`` times its own pace; return how many messages went out.

    Begins when somebody subscribes to one of its images, or raises :class:`Stream3rError` when
    nobody does within ``patience_s``. ``in_lockstep`` holds the next message back until the
    transform that answers an image has come. Ends when reliable subscribers have got everything.
    """
    publishers = {
        topic: node.create_publisher(
            rclpy_class(kind), topic, (LATCHED_SET if _is_static(topic) else Qos()).for_rclpy()
        )
        for topic, kind in programme.topics.items()
    }
    answers = _Answers(node) if in_lockstep else None
    _wait_for_subscriber(programme, publishers, patience_s)
    num_sent, start_s, first_ns = 0, time.monotonic(), None
    with tqdm(total=programme.num_messages, unit='msg', disable=None) as bar:
        for item in programme:
            first_ns = item.due_ns if first_ns is None else first_ns
            _sleep_until(start_s + (item.due_ns - first_ns) / 1e9 / rate)
            publisher = publishers[item.topic]
            publisher.publish(item.message)
            num_sent += 1
            bar.update()
            is_image = programme.topics[item.topic] in IMAGES
            if answers is not None and is_image and publisher.get_subscription_count():
                answers.wait_for(header_stamp_ns(item.message))
    _wait_for_receipt(publishers.values())
    return num_sent


def header_stamp_ns(message: Any) -> int:
    """Return the stamp of a message that begins with a header, or of its CDR bytes."""
    from rclpy.serialization import deserialize_message

    if isinstance(message, bytes):
        message = deserialize_message(message, rclpy_class('std_msgs/msg/Header'))
    return stamp_ns(message)


class _Answers:
    """Follows the transforms that a node publishes, to know which image it has dealt with."""

    def __init__(self, node: Any):
        self._node = node
        self._latest_ns = -1
        node.create_subscription(rclpy_class(TRANSFORMS), '/tf', self._take, 100)

    def wait_for(self, image_ns: int) -> None:
        """Wait for the transform of an image, in vain if the node has refused it."""
        import rclpy

        end = time.monotonic() + ANSWER_S
        while self._latest_ns < image_ns and time.monotonic() < end:
            rclpy.spin_once(self._node, timeout_sec=0.1)

    def _take(self, message: Any) -> None:
        stamps = [stamp_ns(transform) for transform in message.transforms]
        self._latest_ns = max([self._latest_ns, *stamps])


def _wait_for_subscriber(programme: Programme, publishers: dict, patience_s: float) -> None:
    """Wait until an image has a subscriber, and then until no more subscriptions come in."""
    images = [topic for topic, kind in programme.topics.items() if kind in IMAGES]
    awaited = images or list(publishers)
    end = time.monotonic() + patience_s
    counts, quiet_since = {}, time.monotonic()
    while not any(counts.get(t) for t in awaited) or time.monotonic() - quiet_since < QUIET_S:
        latest = {topic: p.get_subscription_count() for topic, p in publishers.items()}
        if latest != counts:
            counts, quiet_since = latest, time.monotonic()
        if time.monotonic() > end:
            raise Stream3rError(
                f'nobody has subscribed to {" or ".join(awaited)} for {patience_s:.0f} s: start '
                'the node, remap its image topic, or wait longer with --timeout'
            )
        time.sleep(0.02)


def _wait_for_receipt(publishers) -> None:
    from rclpy.duration import Duration

    for publisher in publishers:
        publisher.wait_for_all_acked(Duration(seconds=ACKNOWLEDGE_S))


def _sleep_until(due_s: float) -> None:
    time.sleep(max(0.0, due_s - time.monotonic()))


def _is_static(topic: str) -> bool:
    return topic.endswith('tf_static')


def _is_known(type_name: str) -> bool:
    try:
        return bool(rclpy_class(type_name))
    except (ImportError, AttributeError, ValueError):
        return False


def _opaque(rgb: np.ndarray) -> np.ndarray:
    """Lay an image with transparency [H, W, 4] on white, as the published loaders do."""
    if rgb.shape[2] == 3:
        return rgb
    alpha = rgb[..., 3:] / 255
    return (rgb[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``stream3r play``."""
    parser.add_argument(
        'input', nargs='+', help='a ROS 2 bag, a folder of images, image files or a video'
    )
    parser.add_argument('--rate', type=float, default=1.0, help='times the recorded pace')
    parser.add_argument(
        '--frame-rate',
        type=float,
        default=DEFAULT_RATE_HZ,
        metavar='HZ',
        help='of image files whose names are no stamps (default: %(default)g)',
    )
    parser.add_argument(
        '--every', type=int, default=1, metavar='K', help='play every K-th image only'
    )
    parser.add_argument(
        '--lockstep',
        action='store_true',
        help='send the next image when the transform of the last one has come, so that a node '
        'of any speed takes every image',
    )
    parser.add_argument(
        '--topics', nargs='+', default=[], metavar='TOPIC', help='play these of a bag only'
    )
    parser.add_argument(
        '--timeout', type=float, default=60.0, metavar='S', help='wait so long for a subscriber'
    )


def run(args: argparse.Namespace) -> int:
    """Play until the end, SIGINT or SIGTERM; return the exit code."""
    for name in ('rate', 'frame_rate'):
        if not (value := getattr(args, name)) > 0:
            raise Stream3rError(f'--{name.replace("_", "-")} must be positive, got {value}')
    if args.every < 1:
        raise Stream3rError(f'--every must be at least 1 (every image), got {args.every}')
    with ExitStack() as stack:
        if is_one_bag(args.input):
            bag = stack.enter_context(BagReader(args.input[0]))
            programme = BagProgramme(bag, args.topics)
        else:
            programme = FilesProgramme(file_source(args.input, args.frame_rate))
        with interruptible_ros(args.ros_args) as create_node:
            thinned = Thinned(programme, args.every)
            num_sent = play(create_node('player'), thinned, args.rate, args.timeout, args.lockstep)
            print(f'played {num_sent} messages')
    return 0


@contextmanager
def interruptible_ros(ros_args: Sequence[str] = ()) -> Iterator[Callable[[str], Any]]:
    """Run rclpy for the block; SIGINT and SIGTERM both end the block and are no error.

    Yields a function that makes a node of a name.
    """
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    rclpy.init(args=list(ros_args), signal_handler_options=SignalHandlerOptions.NO)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield rclpy.create_node
    except KeyboardInterrupt:
        print('stopped')
    finally:
        signal.signal(signal.SIGTERM, previous)
        rclpy.try_shutdown()


def main() -> int:
    """Run ``stream3r play`` with the arguments of this process."""
    from stream3r_ros.cli import main as stream3r

    return stream3r(['play', *sys.argv[1:]])


if __name__ == '__main__':
    sys.exit(main())
