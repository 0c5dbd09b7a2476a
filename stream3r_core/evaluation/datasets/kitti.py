"""KITTI odometry (Geiger et al. 2012) and the KITTI depth validation selection (Uhrig 2017)."""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    load_depth_png,
    numbered,
    paired,
    read_numbers,
    read_text,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
)
from stream3r_core.evaluation.trajectory_files import parse_stamp_ns, read_trajectory

SELECTION = 'depth_selection/val_selection_cropped'
load_depth = partial(load_depth_png, units_per_m=256)


def find_odometry(root: Path) -> list[str]:
    """Names (numbers) of the sequences."""
    return sorted(p.parent.name for p in root.glob('sequences/*/calib.txt'))


def read_odometry(root: Path, name: str) -> Clip:
    """Read a sequence: the left colour camera if it is there, else the left grey one.

    The published poses are those of the left grey camera; they are moved to the camera read.
    """
    folder = root / 'sequences' / name
    camera = 2 if (folder / 'image_2').is_dir() else 0
    images = numbered(folder / f'image_{camera}', '*.png')
    stamps = [parse_stamp_ns(text) for text in read_text(folder / 'times.txt').split()]
    paired(images, stamps, 'times')
    K, T_grey_camera = _read_calibration(folder / 'calib.txt', camera)
    poses = [None] * len(images)
    if (root / 'poses' / f'{name}.txt').exists():
        truth = read_trajectory(root / 'poses' / f'{name}.txt', 'kitti')
        poses = paired(images, list(truth.T_world_camera @ T_grey_camera), 'poses')
    frames = [
        file_frame(image, stamp, K=K, T_world_camera=pose)
        for image, stamp, pose in zip(images, stamps, poses)
    ]
    return Clip(name, tuple(frames), remarks=(f'camera image_{camera}',))


def _read_calibration(path: Path, camera: int) -> tuple[np.ndarray, np.ndarray]:
    """K and the pose of a rectified camera in the left grey one, from P = K [I | t]."""
    for line in read_text(path).splitlines():
        key, _, numbers = line.partition(':')
        if key == f'P{camera}' and len(numbers.split()) == 12:
            P = np.array(numbers.split(), dtype=np.float64).reshape(3, 4)
            T = np.eye(4)
            T[:3, 3] = -np.linalg.solve(P[:, :3], P[:, 3])
            return P[:, :3], T
    raise DataError(f'{path}: expected a line P{camera} with 12 numbers')


def find_depth(root: Path) -> list[str]:
    """The one set of single images."""
    return ['val_selection_cropped'] if (root / SELECTION / 'image').is_dir() else []


def read_depth(root: Path, name: str) -> Clip:
    """Read the 1000 unordered images of the selection with their depth and intrinsics."""
    images = numbered(root / SELECTION / 'image', '*.png')
    depths = numbered(root / SELECTION / 'groundtruth_depth', '*.png')
    frames = []
    for image, depth, stamp in zip(
        images, paired(images, depths, 'depth maps'), made_up_stamps(len(images))
    ):
        intrinsics = root / SELECTION / 'intrinsics' / f'{image.stem}.txt'
        K = read_numbers(intrinsics, 9)[0].reshape(3, 3) if intrinsics.exists() else None
        frames.append(file_frame(image, stamp, K=K, load_depth_m=partial(load_depth, depth)))
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS, 'single images, no sequence'))


def find_depth_video(root: Path) -> list[str]:
    """Names of the gathered sequences."""
    return sorted(p.name for p in (root / SELECTION / 'image_gathered').glob('*') if p.is_dir())


def read_depth_video(root: Path, name: str) -> Clip:
    """Read one gathered sequence of up to 110 frames."""
    images = numbered(root / SELECTION / 'image_gathered' / name, '*.png')
    depths = numbered(root / SELECTION / 'groundtruth_depth_gathered' / name, '*.png')
    frames = [
        file_frame(image, stamp, load_depth_m=partial(load_depth, depth))
        for image, depth, stamp in zip(
            images, paired(images, depths, 'depth maps'), made_up_stamps(len(images))
        )
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


ODOMETRY = Dataset(
    'sequences/00/{image_2,calib.txt,times.txt} and poses/00.txt', find_odometry, read_odometry
)
DEPTH = Dataset(f'{SELECTION}/{{image,groundtruth_depth,intrinsics}}', find_depth, read_depth)
DEPTH_VIDEO = Dataset(
    f'{SELECTION}/{{image_gathered,groundtruth_depth_gathered}}/<sequence>',
    find_depth_video,
    read_depth_video,
)
