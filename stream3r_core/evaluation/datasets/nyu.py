"""NYU-v2 (Silberman et al. 2012), the 654 validation images: val/nyu_images, val/nyu_depths."""

from functools import partial
from pathlib import Path

from stream3r_core.evaluation.datasets.files import file_frame, load_depth_npy, numbered, paired
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
)


def find(root: Path) -> list[str]:
    """The one set of single images."""
    return ['val'] if (root / 'val' / 'nyu_images').is_dir() else []


def read(root: Path, name: str) -> Clip:
    """Read the unordered images with their depth (.npy, metres)."""
    images = numbered(root / name / 'nyu_images', '*.*')
    depths = paired(images, numbered(root / name / 'nyu_depths', '*.npy'), 'depth maps')
    frames = [
        file_frame(image, stamp, load_depth_m=partial(load_depth_npy, depth))
        for image, depth, stamp in zip(images, depths, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=(MADE_UP_STAMPS, 'single images, no sequence'))


DATASET = Dataset('val/nyu_images/*.png and val/nyu_depths/*.npy', find, read)
