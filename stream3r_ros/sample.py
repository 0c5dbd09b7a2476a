"""The sample recording of the demo: a seeded synthetic room, seen by a camera carried calmly."""

from pathlib import Path

from stream3r_core.synthetic import CALM, SyntheticSequence, render_sequence
from stream3r_ros.bag import BagWriter
from stream3r_ros.conversions import Lens
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.qos import SENSOR_DATA

SEED = 9  # of the first twelve, the one that shows most furniture
NUM_FRAMES = 100
FOV_DEG = 62.0
CAMERA_FRAME = 'camera_optical_frame'
ROOM_FRAME = 'room'
IMAGE, CAMERA_INFO = '/camera/image_raw', '/camera/camera_info'
TRUE_POSE, TRUE_DEPTH = '/ground_truth/pose', '/ground_truth/depth'


def write_sample(path: Path, num_frames: int = NUM_FRAMES, seed: int = SEED) -> None:
    """Render the sample and write it as a rosbag2 in mcap.

    It holds images with their intrinsics and, for evaluation only, the true poses and depths, on
    topics that nobody takes for input.
    """
    write_sequence(path, render_sequence(seed, num_frames, fov_deg=FOV_DEG, motion=CALM))


def write_sequence(path: Path, sequence: SyntheticSequence) -> None:
    """Write a rendered sequence with its truth as a rosbag2 in mcap.

    The lens is in its CameraInfo; depth is that of the distorted image, pixel by pixel.
    """
    messages = rosbags_messages()
    lens = Lens('plumb_bob', (*sequence.distortion, 0.0, 0.0, 0.0))
    height, width = sequence.images.shape[1:3]
    K = sequence.K.numpy()
    with BagWriter(path) as bag:
        for index, stamp in enumerate(sequence.stamps_ns):
            camera = (stamp, CAMERA_FRAME)
            T_room_camera = sequence.T_world_camera[index].numpy()
            depth_m = sequence.depth_m[index].numpy()
            bag.write(CAMERA_INFO, messages.camera_info(K, height, width, *camera, lens), stamp)
            image = messages.rgb_image(sequence.images[index].numpy(), *camera)
            bag.write(IMAGE, image, stamp, SENSOR_DATA)
            bag.write(TRUE_POSE, messages.pose(T_room_camera, stamp, ROOM_FRAME), stamp)
            bag.write(TRUE_DEPTH, messages.float_image(depth_m, *camera), stamp)
