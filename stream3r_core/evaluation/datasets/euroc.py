"""EuRoC MAV (Burri et al. 2016), ASL layout: <sequence>/mav0/cam0, state_groundtruth_estimate0."""

from pathlib import Path

import numpy as np
import yaml

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import file_frame, read_text
from stream3r_core.evaluation.datasets.frames import Clip, Dataset, nearest_within, pinhole
from stream3r_core.evaluation.trajectory import ASSOCIATION_TOLERANCE_NS, Trajectory
from stream3r_core.evaluation.trajectory_files import read_trajectory


def find(root: Path) -> list[str]:
    """Names of the sequences."""
    return sorted(p.parents[2].name for p in root.glob('*/mav0/cam0/data.csv'))


def read(root: Path, name: str) -> Clip:
    """Read the left camera; the true poses of the IMU are moved to it."""
    mav = root / name / 'mav0'
    stamps, files = _read_images(mav / 'cam0' / 'data.csv')
    T_body_camera, K = _read_sensor(mav / 'cam0' / 'sensor.yaml')
    body = read_trajectory(mav / 'state_groundtruth_estimate0' / 'data.csv', 'euroc')
    truth = Trajectory(body.stamps_ns, body.T_world_camera @ T_body_camera, f'truth of {name}')
    pose_of = nearest_within(stamps, truth.stamps_ns, ASSOCIATION_TOLERANCE_NS)
    frames = [
        file_frame(
            mav / 'cam0' / 'data' / file,
            int(stamp),
            K=K,
            T_world_camera=truth.T_world_camera[pose] if pose >= 0 else None,
        )
        for stamp, file, pose in zip(stamps, files, pose_of)
    ]
    return Clip(name, tuple(frames), truth, remarks=('grey images with lens distortion',))


def _read_images(path: Path) -> tuple[np.ndarray, list[str]]:
    rows = [
        [column.strip() for column in line.split(',')]
        for line in read_text(path).splitlines()
        if line.strip() and not line.startswith('#')
    ]
    try:
        return np.array([int(row[0]) for row in rows]), [row[1] for row in rows]
    except (ValueError, IndexError) as error:
        raise DataError(f'{path}: expected lines "stamp_ns,file" ({error})') from error


def _read_sensor(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        sensor = yaml.safe_load(read_text(path))
        T_body_camera = np.array(sensor['T_BS']['data'], dtype=np.float64).reshape(4, 4)
        return T_body_camera, pinhole(*sensor['intrinsics'])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f'{path}: expected T_BS and intrinsics of a camera ({error})') from error


DATASET = Dataset('<sequence>/mav0/{cam0,state_groundtruth_estimate0}', find, read)
