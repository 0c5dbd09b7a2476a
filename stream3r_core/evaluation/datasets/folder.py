"""A plain folder of images with whatever truth lies beside them.

Images lie in the folder, or in ``color``, ``rgb`` or ``images`` below it. Optional beside them:
``associations.txt`` (stamp_s image [stamp_s depth]) or ``rgb.txt``, without which file names that
are stamps count; ``groundtruth.txt`` (TUM, KITTI or EuRoC); ``depth/`` (16-bit PNG in millimetres,
or .npy in metres, named like the images); ``intrinsics.json`` (fx, fy, cx, cy of the images, at
the top or under "color").
"""

from functools import partial
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    load_depth_npy,
    load_depth_png,
    read_json,
    read_stamped_list,
    stamp_in_name,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_RATE_HZ,
    Clip,
    Dataset,
    made_up_stamps,
    pinhole,
)
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.image import list_photos

IMAGE_FOLDERS = ('.', 'color', 'rgb', 'images')
LISTS = ('associations.txt', 'rgb.txt')
LAYOUT = f'images in the folder or in {", ".join(IMAGE_FOLDERS[1:])} below it'


def find(root: Path) -> list[str]:
    """The folder is one clip, called '.'."""
    return ['.'] if any((root / listing).exists() for listing in LISTS) or _photos(root) else []


def read(
    root: Path,
    name: str = '.',
    groundtruth: str | Path | None = None,
    depth_folder: str | Path | None = None,
    rate_hz: float = MADE_UP_RATE_HZ,
) -> Clip:
    """Read a folder; ``groundtruth`` and ``depth_folder`` replace what lies beside the images.

    ``depth_folder`` 'none': no depth. ``rate_hz`` is that of images that have no stamps.
    """
    folder = Path(root) / name
    images, stamps, depths, remarks = _listed(folder, rate_hz)
    if depth_folder == 'none':
        depths = [None] * len(images)
    elif depth_folder is not None or not any(depths):
        depths = _depths_by_name(images, Path(depth_folder or folder / 'depth'))
        if depth_folder is not None and not any(depths):
            raise DataError(
                f'{depth_folder}: no .png or .npy named like the images ({images[0].stem}.*)'
            )
    K = _read_K(folder / 'intrinsics.json')
    frames = [
        file_frame(image, int(stamp), K=K, load_depth_m=_loader(depth))
        for image, stamp, depth in zip(images, stamps, depths)
    ]
    clip = Clip(folder.resolve().name, tuple(frames), None, remarks)
    path = Path(groundtruth) if groundtruth else folder / 'groundtruth.txt'
    return clip.with_truth(read_trajectory(path) if groundtruth or path.exists() else None)


def _photos(folder: Path) -> list[Path]:
    """Images of the first of the known places that has any."""
    for below in IMAGE_FOLDERS:
        if (folder / below).is_dir():
            try:
                return list_photos(folder / below)
            except DataError:
                continue  # this place holds none; the next one may
    return []


def _listed(folder: Path, rate_hz: float):
    """Images, stamps [N], depth files (or None) and remarks."""
    listing = next((folder / name for name in LISTS if (folder / name).exists()), None)
    if listing is None:
        images = _photos(folder)
        if not images:
            raise DataError(f'{folder} holds no image; expected {LAYOUT}')
        named = [stamp_in_name(image) for image in images]
        if None not in named:
            return images, np.array(named), [None] * len(images), ()
        stamps = np.array(made_up_stamps(len(images), rate_hz))
        remark = f'the images have no stamps; {rate_hz:g} Hz is assumed'
        return images, stamps, [None] * len(images), (remark,)
    stamps, columns = read_stamped_list(listing)
    if any(len(c) not in (1, 3) for c in columns):
        raise DataError(f'{listing}: expected lines "stamp_s image" or "... stamp_s depth"')
    images = [folder / c[0] for c in columns]
    depths = [folder / c[2] if len(c) == 3 else None for c in columns]
    return images, stamps, depths, ()


def _depths_by_name(images: list[Path], folder: Path) -> list[Path | None]:
    """Depth files with the stems of the images; None where there is none."""
    if not folder.is_dir():
        return [None] * len(images)
    known = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in ('.png', '.npy')}
    return [known.get(image.stem) for image in images]


def _loader(path: Path | None):
    if path is None:
        return None
    if path.suffix == '.npy':
        return partial(load_depth_npy, path)
    return partial(load_depth_png, path, units_per_m=1000)


def _read_K(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    content = read_json(path)
    try:
        camera = content.get('color', content)
        return pinhole(*(float(camera[key]) for key in ('fx', 'fy', 'cx', 'cy')))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f'{path}: expected fx, fy, cx, cy of the images ({error})') from error


DATASET = Dataset(LAYOUT, find, read)
