"""DTU in the MVSNet layout: <scan>/images, cams, depths (.npy, mm) and binary_masks."""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    load_depth_npy,
    load_image,
    numbered,
    read_text,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
)

M_PER_UNIT = 1e-3
ERODE = 10  # pixels, side of the square that masks are eroded with (published protocol)


def find(root: Path) -> list[str]:
    """Names of the scans."""
    return sorted(p.parent.name for p in root.glob('*/cams') if p.is_dir())


def read(root: Path, name: str) -> Clip:
    """Read one scan; lengths become metres, depth outside the eroded mask becomes 0."""
    folder = root / name
    images = numbered(folder / 'images', '*.jpg')
    frames = []
    for image, stamp in zip(images, made_up_stamps(len(images))):
        T_camera_world, K = _read_camera(folder / 'cams' / f'{image.stem}_cam.txt')
        T_world_camera = np.linalg.inv(T_camera_world)
        T_world_camera[:3, 3] *= M_PER_UNIT
        load_depth = partial(
            _load_masked_depth,
            folder / 'depths' / f'{image.stem}.npy',
            folder / 'binary_masks' / f'{image.stem}.png',
        )
        frames.append(
            file_frame(image, stamp, K=K, T_world_camera=T_world_camera, load_depth_m=load_depth)
        )
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


def _read_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """World-to-camera matrix (file units) and K of an MVSNet camera file."""
    words = read_text(path).split()
    try:
        extrinsic = words.index('extrinsic') + 1
        intrinsic = words.index('intrinsic') + 1
        T = np.array(words[extrinsic : extrinsic + 16], dtype=np.float64).reshape(4, 4)
        K = np.array(words[intrinsic : intrinsic + 9], dtype=np.float64).reshape(3, 3)
    except ValueError as error:
        raise DataError(
            f'{path}: expected "extrinsic" with 16 and "intrinsic" with 9 numbers ({error})'
        ) from error
    return T, K


def _load_masked_depth(depth_path: Path, mask_path: Path) -> np.ndarray:
    import cv2

    depth = load_depth_npy(depth_path) * np.float32(M_PER_UNIT)
    mask = (load_image(mask_path)[..., 0] > 127).astype(np.uint8)
    mask = cv2.resize(mask, depth.shape[::-1], interpolation=cv2.INTER_NEAREST)
    return depth * cv2.erode(mask, np.ones((ERODE, ERODE), np.uint8))


DATASET = Dataset(
    '<scan>/images/00000000.jpg, cams/00000000_cam.txt, depths/*.npy, binary_masks/*.png',
    find,
    read,
)
