"""Synthetic sequences as folders: TUM RGB-D layout, and CUT3R-style scenes for training."""

from pathlib import Path

import numpy as np
from torch import Tensor

from stream3r_core.errors import OutputError
from stream3r_core.geometry import matrix_to_quat_xyzw
from stream3r_core.synthetic.clips import SyntheticSequence

TUM_DEPTH_SCALE = 5000  # depth PNG values of one metre


def write_tum(sequence: SyntheticSequence, folder: str | Path) -> Path:
    """Write rgb/, depth/ (16-bit PNG), rgb.txt, depth.txt, groundtruth.txt and camera.txt.

    camera.txt holds ``fx fy cx cy k1 k2 p1 p2 k3``, which the layout itself has no place for, as
    it has none for masks, normals and ids. Depth beyond the 13.1 m that 16 bits hold is written
    as unknown, 0. Returns the folder.
    """
    folder = _folders(Path(folder), 'rgb', 'depth')
    stamps = [stamp * 1e-9 for stamp in sequence.stamps_ns]
    listing = {'rgb': [], 'depth': []}
    for stamp, image, depth in zip(stamps, sequence.images, sequence.depth_m):
        name = f'{stamp:.6f}.png'
        _write_image(folder / 'rgb' / name, image.numpy()[..., ::-1])
        _write_image(folder / 'depth' / name, _tum_depth(depth.numpy()))
        for kind, lines in listing.items():
            lines.append(f'{stamp:.6f} {kind}/{name}')
    for kind, lines in listing.items():
        (folder / f'{kind}.txt').write_text(
            '\n'.join([f'# timestamp filename ({kind})', *lines]) + '\n'
        )
    poses = [_tum_line(s, T) for s, T in zip(stamps, sequence.T_world_camera)]
    (folder / 'groundtruth.txt').write_text(
        '\n'.join(['# timestamp tx ty tz qx qy qz qw', *poses]) + '\n'
    )
    K = sequence.K.tolist()
    numbers = [K[0][0], K[1][1], K[0][2], K[1][2], *sequence.distortion, 0.0, 0.0, 0.0]
    (folder / 'camera.txt').write_text(' '.join(map(str, numbers)) + '\n')
    return folder


def write_scene_folder(sequence: SyntheticSequence, folder: str | Path) -> Path:
    """Write one scene as ``training/folders.py`` reads it: rgb/, depth/ (.npy), cam/ (.npz).

    The layout has no place for masks, normals and ids, which are left out, nor for a lens: raises
    OutputError for images with distortion.
    """
    if any(sequence.distortion):
        raise OutputError(
            f'cannot write {folder}: the layout takes pinhole images, got distortion '
            f'{sequence.distortion}; render without'
        )
    folder = _folders(Path(folder), 'rgb', 'depth', 'cam')
    for i, (image, depth) in enumerate(zip(sequence.images, sequence.depth_m)):
        _write_image(folder / 'rgb' / f'{i:06d}.png', image.numpy()[..., ::-1])
        np.save(folder / 'depth' / f'{i:06d}.npy', depth.numpy())
        np.savez(
            folder / 'cam' / f'{i:06d}.npz',
            intrinsics=sequence.K.numpy(),
            pose=sequence.T_world_camera[i].numpy(),
        )
    return folder


def _tum_depth(depth_m: np.ndarray) -> np.ndarray:
    units = np.round(depth_m * TUM_DEPTH_SCALE)
    return np.where(units <= np.iinfo(np.uint16).max, units, 0).astype(np.uint16)


def _tum_line(stamp: float, T_world_camera: Tensor) -> str:
    numbers = [
        *T_world_camera[:3, 3].tolist(),
        *matrix_to_quat_xyzw(T_world_camera[:3, :3]).tolist(),
    ]
    return f'{stamp:.6f} ' + ' '.join(f'{x:.7f}' for x in numbers)


def _folders(root: Path, *names: str) -> Path:
    try:
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'cannot write into {root}: {error}; choose another folder') from error
    return root


def _write_image(path: Path, pixels: np.ndarray) -> None:
    import cv2

    if not cv2.imwrite(str(path), np.ascontiguousarray(pixels)):
        raise OutputError(f'cannot write {path}')
