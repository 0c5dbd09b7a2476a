"""Reading the files that datasets are made of; every failure names the file and what to do."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.frames import Frame
from stream3r_core.evaluation.trajectory_files import parse_stamp_ns
from stream3r_core.image import load_photo


def file_frame(path: Path, stamp_ns: int, **known) -> Frame:
    """Return a frame whose image is a file; ``known`` are the other fields of Frame."""
    return Frame(path.name, stamp_ns, partial(load_image, path), image_path=path, **known)


def load_image(path: Path) -> np.ndarray:
    """Read an image as uint8 RGB [H, W, 3]."""
    return load_photo(path)[..., :3]


def load_depth_png(
    path: Path,
    units_per_m: float,
    invalid: int = 0,
    min_m: float = 0.0,
    max_m: float = np.inf,
) -> np.ndarray:
    """Depth in metres [H, W] of a 16-bit PNG; ``invalid`` and out-of-range values become 0."""
    try:
        with Image.open(path) as image:
            raw = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f'cannot read the depth map {path}: {error}') from error
    if raw.ndim != 2 or raw.dtype == np.uint8:
        raise DataError(f'{path}: expected a 16-bit grey PNG, got {raw.dtype} {raw.shape}')
    depth = raw.astype(np.float32) / np.float32(units_per_m)
    depth[(raw == invalid) | (depth < min_m) | (depth > max_m)] = 0
    return depth


def load_depth_npy(path: Path) -> np.ndarray:
    """Depth in metres [H, W] of an .npy file; what is not finite becomes 0."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f'cannot read the depth map {path}: {error}') from error
    if depth.squeeze().ndim != 2:
        raise DataError(f'{path}: expected a depth map [H, W], got {depth.shape}')
    return np.nan_to_num(depth.squeeze().astype(np.float32), nan=0, posinf=0, neginf=0)


def read_text(path: Path) -> str:
    """Text of a file, or DataError."""
    try:
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'cannot read {path}: {error}') from error


def read_numbers(path: Path, columns: int | None = None) -> np.ndarray:
    """All numbers of a text file, [N], or [N / columns, columns]."""
    text = read_text(path)
    try:
        numbers = np.array(text.replace(',', ' ').split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f'{path}: expected numbers only ({error})') from error
    if columns is None:
        return numbers
    if not len(numbers) or len(numbers) % columns:
        raise DataError(f'{path}: expected a multiple of {columns} numbers, got {len(numbers)}')
    return numbers.reshape(-1, columns)


def read_matrices(path: Path) -> np.ndarray:
    """4x4 matrices [N, 4, 4] of a text file, row-major, with any line breaks."""
    return read_numbers(path, 16).reshape(-1, 4, 4)


def finite_pose(T: np.ndarray) -> np.ndarray | None:
    """Return the pose, or None where the dataset marks it as lost (NaN, infinity)."""
    return T if np.isfinite(T).all() else None


def read_json(path: Path):
    """Parse a JSON file, or raise DataError."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f'{path} is no valid JSON: {error}') from error


def read_stamped_list(path: Path) -> tuple[np.ndarray, list[list[str]]]:
    """Exact stamps [N] and the other columns of a list 'stamp_s column ...' (TUM RGB-D)."""
    stamps, columns = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith('#'):
            continue
        stamp, *rest = line.split()
        try:
            stamps.append(parse_stamp_ns(stamp))
        except ValueError as error:
            raise DataError(f'{path}, line {number}: expected a stamp first: {error}') from error
        columns.append(rest)
    if not stamps:
        raise DataError(f'{path}: the list is empty')
    return np.array(stamps, dtype=np.int64), columns


def stamp_in_name(path: Path) -> int | None:
    """Stamp that a file is named by, seconds with decimals or nanoseconds; None: it is not."""
    if re.fullmatch(r'\d{9,10}\.\d+', path.stem):
        return parse_stamp_ns(path.stem)
    return int(path.stem) if re.fullmatch(r'\d{18,19}', path.stem) else None


def paired(images: list[Path], others: list, what: str) -> list:
    """Return ``others`` if there is one for each image."""
    if len(images) != len(others):
        raise DataError(
            f'{images[0].parent}: {len(images)} images, but {len(others)} {what}; is the dataset '
            'complete?'
        )
    return others


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by the pattern, in numerical order; DataError when there are none."""
    files = sorted(folder.glob(pattern), key=lambda path: _numerical(path.name))
    if not files:
        raise DataError(f'{folder}: no {pattern} in it; is the dataset complete?')
    return files


def _numerical(name: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name)]
