"""CO3Dv2 (Reizenstein et al. 2021): <category>/frame_annotations.jgz and its images."""

import gzip
import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import file_frame
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
    pinhole,
)


def find(root: Path) -> list[str]:
    """Names <category>/<sequence>."""
    names = []
    for path in sorted(root.glob('*/frame_annotations.jgz')):
        names += [f'{path.parent.name}/{s}' for s in sorted(_annotations(path))]
    return names


def read(root: Path, name: str) -> Clip:
    """Read one sequence; PyTorch3D cameras become OpenCV ones, lengths keep CO3D's own scale."""
    category, sequence = name.split('/')
    annotations = _annotations(root / category / 'frame_annotations.jgz')
    entries = sorted(annotations.get(sequence, ()), key=lambda e: e['frame_number'])
    frames = []
    for entry, stamp in zip(entries, made_up_stamps(len(entries))):
        T_camera_world, K = _camera(entry['viewpoint'], entry['image']['size'])
        depth = entry.get('depth')
        frames.append(
            file_frame(
                root / entry['image']['path'],
                stamp,
                K=K,
                T_world_camera=np.linalg.inv(T_camera_world),
                load_depth_m=depth
                and partial(_load_depth, root / depth['path'], depth['scale_adjustment']),
            )
        )
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS, 'lengths are not metric'))


@lru_cache(maxsize=1)  # one category is up to hundreds of megabytes
def _annotations(path: Path) -> dict[str, list[dict]]:
    """Frame annotations of one category by sequence."""
    try:
        with gzip.open(path, 'rt', encoding='utf-8') as file:
            entries = json.load(file)
        by_sequence: dict[str, list[dict]] = {}
        for entry in entries:
            by_sequence.setdefault(entry['sequence_name'], []).append(entry)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: cannot be read as CO3Dv2 annotations ({error})') from error
    return by_sequence


def _camera(viewpoint: dict, size_hw) -> tuple[np.ndarray, np.ndarray]:
    """T_camera_world and K of a PyTorch3D viewpoint (row vectors; x left, y up)."""
    R, t = np.array(viewpoint['R'], dtype=np.float64), np.array(viewpoint['T'], dtype=np.float64)
    R[:, :2] *= -1
    t[:2] *= -1
    T_camera_world = np.eye(4)
    T_camera_world[:3, :3], T_camera_world[:3, 3] = R.T, t
    height, width = size_hw
    half = np.array([width, height]) / 2
    isotropic = viewpoint.get('intrinsics_format', 'ndc_norm_image_bounds') == 'ndc_isotropic'
    scale = np.full(2, half.min()) if isotropic else half
    focal = np.array(viewpoint['focal_length']) * scale
    centre = half - np.array(viewpoint['principal_point']) * scale
    return T_camera_world, pinhole(*focal, *centre)


def _load_depth(path: Path, scale_adjustment: float) -> np.ndarray:
    """Depth [H, W] of a 16-bit PNG whose bits are half-precision numbers."""
    try:
        with Image.open(path) as image:
            raw = np.asarray(image).astype(np.uint16)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f'cannot read the depth map {path}: {error}') from error
    depth = raw.view(np.float16).astype(np.float32) * np.float32(scale_adjustment)
    return np.nan_to_num(depth, nan=0, posinf=0, neginf=0)


DATASET = Dataset('<category>/frame_annotations.jgz and <category>/<sequence>/images', find, read)

# Held out in the published training split; the other 41 categories are the "seen" ones.
UNSEEN_CATEGORIES = (
    'ball',
    'book',
    'couch',
    'frisbee',
    'hotdog',
    'kite',
    'remote',
    'sandwich',
    'skateboard',
    'suitcase',
)
