"""Small recordings with known content, written with the package's own writer."""

import json

import cv2
import numpy as np
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from stream3r_ros.bag import COMPRESSED_IMAGE, BagReader, BagWriter
from stream3r_ros.cli import main
from stream3r_ros.conversions import image_from_message, stamp_ns
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.qos import LATCHED, SENSOR_DATA

MESSAGES = rosbags_messages()
START_NS = 1_700_000_000_123_456_789
STEP_NS = 33_333_333
CAMERA_FRAME, DEPTH_FRAME = 'camera_optical', 'depth_optical'
JPEG_FORMAT = 'rgb8; jpeg compressed bgr8'  # as image_transport writes it
IMAGE_FIELDS = ('height', 'width', 'encoding', 'is_bigendian', 'step', 'data')
SMALL = ('--set', 'model.weights=random', '--set', 'image.long_side=56')


def stamp(index):
    return START_NS + index * STEP_NS


def picture(index):
    """A view [60, 80, 3] uint8 of a textured plane that moves past."""
    texture = np.random.default_rng(0).integers(0, 256, (10, 80, 3), np.uint8)
    return texture.repeat(6, 0).repeat(6, 1)[:, 5 * index : 5 * index + 80]


def rgb(index, frame_id=CAMERA_FRAME):
    return MESSAGES.rgb_image(picture(index), stamp(index), frame_id)


def true_pose(index):
    """T_map_camera [4, 4] of a camera that turns and moves along a curve."""
    angle = 0.1 * index
    T = np.eye(4)
    T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T[:3, 3] = [0.1 * index, 0.02 * index**2, 0.3 * np.sin(index)]
    return T


def true_tf(index):
    T = true_pose(index)
    return MESSAGES.tf([MESSAGES.transform(T, stamp(index), 'map', CAMERA_FRAME)])


def write_images(path, indices=range(6), topic='/camera/image_raw', extra=None):
    """Write a bag of images; ``extra`` maps further topics to their message of an index."""
    with BagWriter(path) as bag:
        for index in indices:
            bag.write(topic, rgb(index), stamp(index), SENSOR_DATA)
            for name, make in (extra or {}).items():
                bag.write(name, make(index), stamp(index))
    return path


def write_rig(path, indices=range(6)):
    """Write a bag of an RGB-D camera: JPEG colour, and depth that is not registered to it."""
    K_color = np.array([[70.0, 0, 39.5], [0, 70, 29.5], [0, 0, 1]])
    T_color_depth = true_pose(1)
    at = stamp(indices[0])
    rig = MESSAGES.tf([MESSAGES.transform(T_color_depth, at, CAMERA_FRAME, DEPTH_FRAME)])
    color = MESSAGES.camera_info(K_color, 60, 80, at, CAMERA_FRAME)
    color.d = np.array([-0.029, 0, 0, 0, 0])
    half = MESSAGES.camera_info(np.diag([0.5, 0.5, 1]) @ K_color, 30, 40, at, DEPTH_FRAME)
    with BagWriter(path) as bag:
        before = at - 10**9
        bag.write('/tf_static', rig, before, LATCHED)
        bag.write('/camera/color/camera_info', color, before)
        bag.write('/camera/depth/camera_info', half, before)
        for index in indices:
            bag.write('/tf', true_tf(index), stamp(index))
            jpeg = cv2.imencode('.jpg', picture(index)[..., ::-1])[1].tobytes()
            made = MESSAGES.compressed_image(jpeg, JPEG_FORMAT, stamp(index), CAMERA_FRAME)
            bag.write('/camera/color/image_raw/compressed', made, stamp(index), SENSOR_DATA)
            depth_mm = np.full((30, 40), 2000 + 10 * index, np.uint16)
            depth = MESSAGES.make(
                'sensor_msgs/msg/Image',
                header=MESSAGES.header(stamp(index), DEPTH_FRAME),
                height=30,
                width=40,
                encoding='16UC1',
                is_bigendian=0,
                step=80,
                data=depth_mm.view(np.uint8).ravel(),
            )
            bag.write('/camera/depth/image_rect_raw', depth, stamp(index), SENSOR_DATA)
    return path


def write_raw_twin(path, original):
    """Write a bag again with its compressed images decoded; all else byte for byte."""
    with BagReader(original) as source, BagWriter(path) as twin:
        for message in source.messages():
            if message.type != COMPRESSED_IMAGE:
                twin.write_raw(message.topic, message.type, message.raw, message.stamp_ns)
                continue
            made = source.deserialize(message)
            pixels = image_from_message(made)
            raw = MESSAGES.rgb_image(pixels, stamp_ns(made), made.header.frame_id)
            twin.write(message.topic.removesuffix('/compressed'), raw, message.stamp_ns)
    return path


def write_ros1(path, images, topic='/image'):
    """Write image messages as a ROS 1 bag, whose frame names begin with a slash."""
    noetic = get_typestore(Stores.ROS1_NOETIC)
    header_class, image_class, time_class = (
        noetic.types[name]
        for name in ('std_msgs/msg/Header', 'sensor_msgs/msg/Image', 'builtin_interfaces/msg/Time')
    )
    with Ros1Writer(path) as bag:
        connection = bag.add_connection(topic, image_class.__msgtype__, typestore=noetic)
        for number, new in enumerate(images):
            time = time_class(new.header.stamp.sec, new.header.stamp.nanosec)
            old = image_class(
                header=header_class(number, time, '/' + new.header.frame_id),
                **{name: getattr(new, name) for name in IMAGE_FIELDS},
            )
            raw = noetic.serialize_ros1(old, image_class.__msgtype__)
            bag.write(connection, stamp_ns(new), raw)
    return path


def write_photos(folder, names):
    folder.mkdir()
    paths = [folder / name for name in names]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), picture(8 * index)[..., ::-1])
    return paths


def replay(output, *inputs, code=0):
    """Run the command; return the summary that it wrote."""
    assert main(['replay', *map(str, inputs), '--output', str(output), *SMALL]) == code
    return json.loads((output / 'summary.json').read_text())


def recorded(folder):
    """Return all messages of the output bag by topic."""
    messages = {}
    with BagReader(folder / 'bag') as bag:
        for message in bag.messages():
            messages.setdefault(message.topic, []).append(bag.deserialize(message))
    return messages
