"""Neural-RGBD (Azinovic et al. 2022): <scene>/images/img0.png, depth/depth0.png, poses.txt."""

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
    pinhole,
)

K = pinhole(554.2562584220408, 554.2562584220408, 320, 240)
OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def find(root: Path) -> list[str]:
    """Names of the scenes."""
    return sorted(p.parent.name for p in root.glob('*/poses.txt'))


def read(root: Path, name: str) -> Clip:
    """Read one scene; poses are camera to world with OpenGL axes, NaN where lost."""
    folder = root / name
    images = numbered(folder / 'images', 'img*.png')
    depths = paired(images, numbered(folder / 'depth', 'depth*.png'), 'depth maps')
    poses = paired(images, list(read_matrices(folder / 'poses.txt')), 'poses')
    load_depth = partial(load_depth_png, units_per_m=1000, min_m=1e-3, max_m=10)
    frames = [
        file_frame(
            image,
            stamp,
            K=K,
            T_world_camera=finite_pose(pose @ OPENGL_FROM_OPENCV),
            load_depth_m=partial(load_depth, depth),
        )
        for image, depth, pose, stamp in zip(images, depths, poses, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


DATASET = Dataset('<scene>/images/img0.png, depth/depth0.png, poses.txt', find, read)
