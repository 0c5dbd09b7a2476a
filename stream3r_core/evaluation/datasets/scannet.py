"""ScanNet (Dai et al. 2017): the exported sequences, and the thinned clips of the evaluations."""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.evaluation.datasets.files import (
    file_frame,
    finite_pose,
    load_depth_png,
    numbered,
    paired,
    read_matrices,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
)

load_depth = partial(load_depth_png, units_per_m=1000)


def find(root: Path) -> list[str]:
    """Names of the exported scenes."""
    return sorted(p.parent.name for p in root.glob('scene*/color') if p.is_dir())


def read(root: Path, name: str) -> Clip:
    """Read an exported scene: color/0.jpg, depth/0.png (mm), pose/0.txt, intrinsic/."""
    folder = root / name
    images = numbered(folder / 'color', '*.jpg')
    K = read_matrices(folder / 'intrinsic' / 'intrinsic_color.txt')[0][:3, :3]
    frames = [
        file_frame(
            image,
            stamp,
            K=K,
            T_world_camera=finite_pose(read_matrices(folder / 'pose' / f'{image.stem}.txt')[0]),
            load_depth_m=partial(load_depth, folder / 'depth' / f'{image.stem}.png'),
        )
        for image, stamp in zip(images, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


def find_clips(root: Path, number: int) -> list[str]:
    """Names of the scenes with a color_<number> folder."""
    return sorted(p.parent.name for p in root.glob(f'*/color_{number}') if p.is_dir())


def read_clip(root: Path, name: str, number: int) -> Clip:
    """Read a thinned clip: color_90/frame_0000.jpg, pose_90.txt, optionally depth_90/."""
    folder = root / name
    images = numbered(folder / f'color_{number}', '*.*')
    poses: list[np.ndarray] = paired(
        images, list(read_matrices(folder / f'pose_{number}.txt')), 'poses'
    )
    depths = [None] * len(images)
    if (folder / f'depth_{number}').is_dir():
        depth_files = numbered(folder / f'depth_{number}', '*.png')
        depths = [partial(load_depth, p) for p in paired(images, depth_files, 'depth maps')]
    frames = [
        file_frame(image, stamp, T_world_camera=finite_pose(pose), load_depth_m=depth)
        for image, pose, depth, stamp in zip(images, poses, depths, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


FULL = Dataset('<scene>/color/0.jpg, depth/0.png, pose/0.txt, intrinsic/', find, read)


def clips_of(number: int) -> Dataset:
    """Return the dataset of clips of ``number`` frames."""
    return Dataset(
        f'<scene>/color_{number}/*.jpg, pose_{number}.txt',
        partial(find_clips, number=number),
        partial(read_clip, number=number),
    )
