"""MPI Sintel (Butler et al. 2012): training/{final,depth,camdata_left}/<sequence>."""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import file_frame, numbered
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
)

TAG = 202021.25  # float32 at the head of .dpt and .cam files
POSE_SEQUENCES = (
    'alley_2',
    'ambush_4',
    'ambush_5',
    'ambush_6',
    'cave_2',
    'cave_4',
    'market_2',
    'market_5',
    'market_6',
    'shaman_3',
    'sleeping_1',
    'sleeping_2',
    'temple_2',
    'temple_3',
)


def find(root: Path) -> list[str]:
    """Names of the sequences."""
    return sorted(p.name for p in root.glob('training/final/*') if p.is_dir())


def read(root: Path, name: str) -> Clip:
    """Read one sequence of the final pass."""
    training = root / 'training'
    images = numbered(training / 'final' / name, '*.png')
    frames = []
    for image, stamp in zip(images, made_up_stamps(len(images))):
        K, T_world_camera = read_cam(training / 'camdata_left' / name / f'{image.stem}.cam')
        load_depth = partial(load_dpt, training / 'depth' / name / f'{image.stem}.dpt')
        frames.append(
            file_frame(image, stamp, K=K, T_world_camera=T_world_camera, load_depth_m=load_depth)
        )
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """K [3, 3] and T_world_camera [4, 4] of a .cam file, which holds world to camera."""
    numbers = np.frombuffer(_tagged(path, 4 + 21 * 8)[4:], '<f8')
    T_camera_world = np.eye(4)
    T_camera_world[:3] = numbers[9:].reshape(3, 4)
    return numbers[:9].reshape(3, 3).copy(), np.linalg.inv(T_camera_world)


def load_dpt(path: Path) -> np.ndarray:
    """Depth [H, W], metres, of a .dpt file."""
    data = _tagged(path)
    width, height = np.frombuffer(data[4:12], '<i4')
    if len(data) != 12 + 4 * int(width) * int(height):
        raise DataError(f'{path}: {width}x{height} pixels announced, {len(data) - 12} bytes found')
    return np.frombuffer(data[12:], '<f4').reshape(height, width).copy()


def _tagged(path: Path, size: int | None = None) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f'cannot read {path}: {error}') from error
    tag = np.frombuffer(data[:4], '<f4') if len(data) >= 12 else np.zeros(1)
    if tag[0] != np.float32(TAG) or (size is not None and len(data) != size):
        raise DataError(f'{path} is no Sintel file (tag {tag[0]:g}, {len(data)} bytes)')
    return data


DATASET = Dataset(
    'training/final/<sequence>/*.png, training/depth (.dpt), training/camdata_left (.cam)',
    find,
    read,
)
