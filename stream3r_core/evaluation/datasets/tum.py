"""TUM RGB-D (Sturm et al. 2012), Bonn (Palazzolo et al. 2019), ICL-NUIM (Handa et al. 2014).

All share the TUM formats: stamped lists, 16-bit depth of 5000 units per metre, TUM trajectories.
The clips of the published evaluations (``rgb_90``, ``rgb_110``) have the same files, thinned.
"""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    load_depth_png,
    numbered,
    paired,
    read_stamped_list,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamp,
    nearest_within,
    pinhole,
)
from stream3r_core.evaluation.trajectory import ASSOCIATION_TOLERANCE_NS
from stream3r_core.evaluation.trajectory_files import parse_stamp_ns, read_trajectory

DEPTH_TOLERANCE_NS = 20_000_000  # colour to depth, as in the dataset's own association script
load_depth = partial(load_depth_png, units_per_m=5000)

# Calibrations that the datasets publish; freiburg1, freiburg2 and Bonn images are distorted.
CALIBRATIONS = {
    'freiburg1': pinhole(517.3, 516.5, 318.6, 255.3),
    'freiburg2': pinhole(520.9, 521.0, 325.1, 249.7),
    'freiburg3': pinhole(535.4, 539.2, 320.1, 247.6),
    'bonn': pinhole(542.822841, 542.576870, 315.593520, 237.756098),
}
ICL_K = pinhole(481.2, 480.0, 319.5, 239.5)
ICL_MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])


def calibration(name: str) -> np.ndarray | None:
    """Published K [3, 3] of a sequence, by its name."""
    return next((K for key, K in CALIBRATIONS.items() if key in name), None)


def find(root: Path) -> list[str]:
    """Names of the full sequences."""
    return sorted(p.parent.name for p in root.glob('*/rgb.txt'))


def read(root: Path, name: str) -> Clip:
    """Read a full sequence; true poses and depth are those nearest in time."""
    folder = root / name
    stamps, columns = read_stamped_list(folder / 'rgb.txt')
    truth = read_trajectory(folder / 'groundtruth.txt', 'tum')
    pose_of = nearest_within(stamps, truth.stamps_ns, ASSOCIATION_TOLERANCE_NS)
    depths = _depths_near(folder, stamps)
    frames = [
        file_frame(
            folder / column[0],
            int(stamp),
            K=calibration(name),
            T_world_camera=truth.T_world_camera[pose] if pose >= 0 else None,
            load_depth_m=depth,
        )
        for stamp, column, pose, depth in zip(stamps, columns, pose_of, depths)
    ]
    return Clip(name, tuple(frames), truth)


def _depths_near(folder: Path, stamps: np.ndarray) -> list:
    """Depth loaders of the frames; None where no depth image is near in time."""
    if not (folder / 'depth.txt').exists():
        return [None] * len(stamps)
    depth_stamps, columns = read_stamped_list(folder / 'depth.txt')
    nearest = nearest_within(stamps, depth_stamps, DEPTH_TOLERANCE_NS)
    return [partial(load_depth, folder / columns[i][0]) if i >= 0 else None for i in nearest]


def find_clips(root: Path, number: int) -> list[str]:
    """Names of the sequences with an rgb_<number> folder."""
    return sorted(p.parent.name for p in root.glob(f'*/rgb_{number}') if p.is_dir())


def read_clip(root: Path, name: str, number: int) -> Clip:
    """Read a thinned clip; as many poses as images belong together by their order."""
    folder = root / name
    images = numbered(folder / f'rgb_{number}', '*.png')
    stamps = np.array([_stamp_of(image) for image in images])
    poses = _clip_poses(folder / f'groundtruth_{number}.txt', stamps)
    depths = [None] * len(images)
    if (folder / f'depth_{number}').is_dir():
        depth_files = numbered(folder / f'depth_{number}', '*.png')
        depths = [partial(load_depth, p) for p in paired(images, depth_files, 'depth maps')]
    frames = [
        file_frame(image, int(stamp), K=calibration(name), T_world_camera=pose, load_depth_m=depth)
        for image, stamp, pose, depth in zip(images, stamps, poses, depths)
    ]
    return Clip(name, tuple(frames))


def _clip_poses(path: Path, stamps: np.ndarray) -> list:
    if not path.exists():
        return [None] * len(stamps)
    truth = read_trajectory(path, 'tum')
    if len(truth) == len(stamps):
        return list(truth.T_world_camera)
    near = nearest_within(stamps, truth.stamps_ns, DEPTH_TOLERANCE_NS)
    return [truth.T_world_camera[i] if i >= 0 else None for i in near]


def _stamp_of(image: Path) -> int:
    try:
        return parse_stamp_ns(image.stem)
    except ValueError as error:
        raise DataError(f'{image}: expected a file named by its stamp in seconds') from error


def find_icl(root: Path) -> list[str]:
    """Names of the folders with associations.txt and one *.gt.freiburg file."""
    return sorted(p.parent.name for p in root.glob('*/associations.txt') if _icl_truth(p.parent))


def _icl_truth(folder: Path) -> list[Path]:
    return sorted(folder.glob('*.gt.freiburg'))


def read_icl(root: Path, name: str) -> Clip:
    """Read an ICL-NUIM sequence in its TUM layout; "stamps" are frame numbers there.

    ICL's y axis of camera and world points up (its focal length on y is negative, -480). Both are
    mirrored here, so that K is positive and poses are proper rotations.
    """
    folder = root / name
    numbers, columns = read_stamped_list(folder / 'associations.txt')
    truth = read_trajectory(_icl_truth(folder)[0], 'tum')
    poses = ICL_MIRROR @ truth.T_world_camera @ ICL_MIRROR
    pose_of = dict(zip(truth.stamps_ns.tolist(), poses))
    frames = []
    for number, column in zip(numbers.tolist(), columns):
        if len(column) != 3:
            raise DataError(f'{folder}/associations.txt: expected "n depth/n.png n rgb/n.png"')
        frames.append(
            file_frame(
                folder / column[2],
                made_up_stamp(number // 10**9),
                K=ICL_K,
                T_world_camera=pose_of.get(number),
                load_depth_m=partial(load_depth, folder / column[0]),
            )
        )
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS,))


FULL = Dataset('<sequence>/rgb.txt, groundtruth.txt and depth.txt', find, read)
ICL = Dataset('<sequence>/associations.txt and one *.gt.freiburg', find_icl, read_icl)


def clips_of(number: int) -> Dataset:
    """Return the dataset of clips of ``number`` frames."""
    return Dataset(
        f'<sequence>/rgb_{number}/<stamp>.png, groundtruth_{number}.txt, depth_{number}/',
        partial(find_clips, number=number),
        partial(read_clip, number=number),
    )
