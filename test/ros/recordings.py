"""Small recordings with known content, written with the package's own writer."""

import json

import cv2
import numpy as np

from stream3r_ros.bag import BagReader, BagWriter
from stream3r_ros.cli import main
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.qos import SENSOR_DATA

MESSAGES = rosbags_messages()
START_NS = 1_700_000_000_123_456_789
STEP_NS = 33_333_333
CAMERA_FRAME = 'camera_optical'
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
