"""Readers of published dataset layouts, all behind :class:`Dataset`."""

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets import (
    co3d,
    dtu,
    euroc,
    folder,
    kitti,
    neural_rgbd,
    nyu,
    replica,
    scannet,
    seven_scenes,
    sintel,
    tum,
)
from stream3r_core.evaluation.datasets.frames import Clip, Dataset, Frame

DATASETS: dict[str, Dataset] = {
    '7scenes': seven_scenes.DATASET,
    '7scenes_test': seven_scenes.TEST_SPLIT,
    'neural_rgbd': neural_rgbd.DATASET,
    'dtu': dtu.DATASET,
    'tum': tum.FULL,
    'tum_90': tum.clips_of(90),
    'bonn': tum.FULL,
    'bonn_110': tum.clips_of(110),
    'icl_nuim': tum.ICL,
    'replica': replica.DATASET,
    'scannet': scannet.FULL,
    **{f'scannet_{number}': scannet.clips_of(number) for number in (33, 65, 90, 129, 257)},
    'sintel': sintel.DATASET,
    'kitti_odometry': kitti.ODOMETRY,
    'kitti_depth': kitti.DEPTH,
    'kitti_depth_video': kitti.DEPTH_VIDEO,
    'nyu': nyu.DATASET,
    'euroc': euroc.DATASET,
    'co3d': co3d.DATASET,
    'folder': folder.DATASET,
}


def dataset(name: str) -> Dataset:
    """Return the reader of that name, or raise DataError with the known names."""
    if name not in DATASETS:
        raise DataError(f'unknown dataset {name!r}; known: {", ".join(DATASETS)}')
    return DATASETS[name]


__all__ = ['DATASETS', 'Clip', 'Dataset', 'Frame', 'dataset']
