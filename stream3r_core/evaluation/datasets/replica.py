"""Replica as rendered for NICE-SLAM: cam_params.json, <scene>/results/*.jpg, <scene>/traj.txt."""

from functools import partial
from pathlib import Path

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    finite_pose,
    load_depth_png,
    numbered,
    paired,
    read_json,
    read_matrices,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
    pinhole,
)


def find(root: Path) -> list[str]:
    """Names of the scenes."""
    return sorted(p.parent.name for p in root.glob('*/traj.txt'))


def read(root: Path, name: str) -> Clip:
    """Read one scene."""
    folder = root / name
    try:
        camera = read_json(root / 'cam_params.json')['camera']
        K = pinhole(*(float(camera[key]) for key in ('fx', 'fy', 'cx', 'cy')))
        units_per_m = float(camera['scale'])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{root}/cam_params.json: expected "camera" with {error}') from error
    images = numbered(folder / 'results', 'frame*.jpg')
    depths = paired(images, numbered(folder / 'results', 'depth*.png'), 'depth maps')
    poses = paired(images, list(read_matrices(folder / 'traj.txt')), 'poses')
    frames = [
        file_frame(
            image,
            stamp,
            K=K,
            T_world_camera=finite_pose(pose),
            load_depth_m=partial(load_depth_png, depth, units_per_m=units_per_m),
        )
        for image, depth, pose, stamp in zip(images, depths, poses, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


DATASET = Dataset('cam_params.json, <scene>/results/frame000000.jpg, <scene>/traj.txt', find, read)
