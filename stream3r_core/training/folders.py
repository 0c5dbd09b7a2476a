"""Scenes on disk in the layout of CUT3R-processed data sets, with its way of choosing views.

One folder per scene: ``rgb/NAME.png`` (or .jpg), ``depth/NAME.npy`` (z-depth, metres, 0 unknown)
and ``cam/NAME.npz`` with ``intrinsics`` [3, 3] in pixels and ``pose`` [4, 4], camera to world.
A pose that is not finite marks a view whose camera was lost: it is never chosen.
"""

import itertools
import random
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stream3r_core.errors import DataError
from stream3r_core.training.augment import ColorJitter
from stream3r_core.training.batch import Batch
from stream3r_core.training.settings import FolderConfig

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg')
ROTATION_TOLERANCE = 0.01  # of R R^T against the identity
_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError,  # not of the right kind
    zipfile.BadZipFile, zlib.error,  # torn
)  # fmt: skip

View = tuple[Path, Path, Path]  # image, depth, camera


class SceneFolder:
    """Random clips from the scenes of one folder."""

    def __init__(self, config: FolderConfig):
        self.config = config
        root = Path(config.path)
        if not root.is_dir():
            raise DataError(f'training data {root}: no such folder')
        parents = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
        self.scenes = [found for p in parents if (found := views_of(p))]
        if not self.scenes:
            raise DataError(
                f'training data {root}: no scene found; expected SCENE/rgb, SCENE/depth (.npy) '
                'and SCENE/cam (.npz) with files of equal names'
            )

    def batch(self, count: int, frames: int, size_hw: tuple[int, int], seed: int) -> Batch:
        """Draw ``count`` clips of ``frames`` views, a pure function of ``seed``."""
        rng = random.Random(seed)
        clips = []
        for _ in range(count):
            views = self._choose(rng.choice(self.scenes), frames, rng)
            clips.append(self._load(views, size_hw, rng))
        columns = zip(*(map(torch.stack, zip(*clip)) for clip in clips))
        return Batch(*(torch.stack(column) for column in columns))

    def _choose(self, views: list[View], frames: int, rng: random.Random) -> list[View]:
        """Draw views until the pose of each is known; what is lost shows on reading only."""
        config, scene = self.config, views[0][0].parents[1]
        while views:
            chosen = choose_views(
                len(views),
                frames,
                rng,
                config.max_interval,
                config.video_prob,
                config.fix_interval_prob,
            )
            lost = {i for i in chosen if not np.isfinite(read_camera(views[i][2])[1]).all()}
            if not lost:
                return [views[i] for i in chosen]
            views = [view for i, view in enumerate(views) if i not in lost]
        raise DataError(f'{scene}: no view has a finite camera pose; take the scene away')

    def _load(self, views: list[View], size_hw: tuple[int, int], rng: random.Random) -> list:
        """Load the views of a clip; its margin is common, its colours may be."""
        config = self.config
        margin = rng.randrange(config.aug_crop) if config.aug_crop else 0
        common = ColorJitter.draw(config.jitter, rng)
        loaded = []
        for view in views:
            own = ColorJitter.draw(config.jitter, rng) if config.jitter_per_view else common
            loaded.append(load_view(view, size_hw, margin, own if any(config.jitter) else None))
        return loaded


def views_of(scene: Path) -> list[View]:
    """Return (image, depth, camera) files of a scene in order of names; empty: not a scene."""
    if not (scene / 'rgb').is_dir():
        return []
    views = []
    for image in sorted(
        p for p in (scene / 'rgb').iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
    ):
        depth, camera = scene / 'depth' / f'{image.stem}.npy', scene / 'cam' / f'{image.stem}.npz'
        for path in (depth, camera):
            if not path.is_file():
                raise DataError(f'{image} has no {path}; every view needs image, depth and camera')
        views.append((image, depth, camera))
    return views


def choose_views(
    total: int,
    frames: int,
    rng: random.Random,
    max_interval: int,
    video_prob: float,
    fix_interval_prob: float,
) -> list[int]:
    """Choose ``frames`` of ``total`` views: a video, or a collection (model.md 20).

    The start is drawn first, then the intervals, each up to twice what would just reach the last
    view; views that fall behind the last one are drawn from those passed over. A scene with fewer
    views than asked for is walked to and fro.
    """
    short, gaps = total < frames, max(1, frames - 1)
    start = rng.randrange(total if short else total - frames + 1)
    remaining = total - 1 - (0 if short else start)
    video = rng.random() < video_prob
    if video and rng.random() < fix_interval_prob:
        step = rng.randint(1, max(1, min(max_interval, remaining // gaps)))
        intervals = [step] * (frames - 1)
    else:
        limit = max(1, min(max_interval, 2 * remaining // gaps))
        intervals = [rng.randint(1, limit) for _ in range(frames - 1)]
    chosen = list(itertools.accumulate(intervals, initial=start))
    if short:
        chosen = [_to_and_fro(i, total) for i in chosen]
    else:
        chosen = _drawn_back(chosen, total, rng)
    return chosen if video else _shuffled_in_blocks(chosen, rng)


def _to_and_fro(position: int, total: int) -> int:
    """Fold a walk past the ends back into 0 .. total - 1."""
    period = max(1, 2 * (total - 1))
    return min(position % period, -position % period)


def _drawn_back(chosen: list[int], total: int, rng: random.Random) -> list[int]:
    inside = [i for i in chosen if i < total]
    passed_over = sorted(set(range(chosen[0], total)) - set(inside))
    return sorted(inside + rng.sample(passed_over, len(chosen) - len(inside)))


def _shuffled_in_blocks(chosen: list[int], rng: random.Random) -> list[int]:
    size = rng.randint(2, max(2, len(chosen)))
    blocks = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    for block in blocks:
        rng.shuffle(block)
    rng.shuffle(blocks)
    return [view for block in blocks for view in block]


def load_view(
    files: View,
    size_hw: tuple[int, int],
    margin: int = 0,
    jitter: ColorJitter | None = None,
) -> tuple[Tensor, ...]:
    """Read one view at the given size: image [3, H, W], depth [H, W], pose [4, 4], K [3, 3].

    The image is cut to a rectangle about the principal point with the aspect wanted, scaled to
    ``margin`` pixels more than wanted and cut again about its middle; depth is taken from the
    nearest pixel, and the intrinsics follow with half-pixel care (model.md 20).
    """
    image, depth, K, pose = _read_view(*files)
    left, top, width, height = crop_about_center(image.width, image.height, K, size_hw)
    box = (left, top, left + width, top + height)
    scaled_hw = [side + margin for side in size_hw]
    scale = max(scaled_hw[0] / height, scaled_hw[1] / width)
    scaled_hw = [max(round(side * scale), size) for side, size in zip((height, width), size_hw)]
    image = image.resize(scaled_hw[::-1], Image.Resampling.LANCZOS, box)
    if jitter is not None:
        image = jitter(image)
    depth = Image.fromarray(depth[top : top + height, left : left + width])
    depth = depth.resize(scaled_hw[::-1], Image.Resampling.NEAREST)
    y, x = ((scaled - size) // 2 for scaled, size in zip(scaled_hw, size_hw))
    cut = np.s_[y : y + size_hw[0], x : x + size_hw[1]]
    scales = np.array([scaled_hw[1] / width, scaled_hw[0] / height])
    K[:2, 2] = (K[:2, 2] - (left, top) + 0.5) * scales - 0.5 - (x, y)
    K[[0, 1], [0, 1]] *= scales
    K[0, 1] *= scales[0]
    return (
        torch.from_numpy(np.array(image)[cut]).permute(2, 0, 1).float() / 255,
        torch.from_numpy(np.array(depth)[cut]),
        torch.from_numpy(pose).float(),
        torch.from_numpy(K).float(),
    )


def _read_view(image_path: Path, depth_path: Path, camera_path: Path):
    """Return the image, depth [H, W] (0 where unknown), K [3, 3] and pose [4, 4] of the files."""
    try:
        with Image.open(image_path) as file:
            image = file.convert('RGB')
    except (OSError, SyntaxError) as error:  # the latter is how Pillow calls a broken PNG
        raise DataError(f'{image_path} cannot be read as an image: {error}') from error
    K, pose = read_camera(camera_path)
    if not np.isfinite(pose).all():
        raise DataError(f'{camera_path}: pose is not finite: the camera was lost; leave it out')
    return image, _read_depth(depth_path, (image.height, image.width)), K, pose


def _read_depth(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    try:
        depth = np.load(path)
        kind = f'{depth.dtype} {list(depth.shape)}'
    except _UNREADABLE as error:
        raise DataError(
            f'{path}: expected an array of z-depths, cannot read it: {error}'
        ) from error
    if depth.shape != size_hw or not np.issubdtype(depth.dtype, np.floating):
        raise DataError(
            f'{path}: expected floating-point metres {list(size_hw)} as the image has, got {kind}'
        )
    return np.nan_to_num(depth.astype(np.float32), posinf=0.0, neginf=0.0)


def read_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return K [3, 3] in pixels and the pose [4, 4], camera to world; a lost one is not finite."""
    try:
        with np.load(path) as camera:
            K, pose = (camera[name].astype(np.float64) for name in ('intrinsics', 'pose'))
    except _UNREADABLE as error:
        raise DataError(
            f'{path}: expected an npz file with intrinsics and pose, cannot read it: {error}'
        ) from error
    if K.shape != (3, 3) or not (np.isfinite(K).all() and min(K[0, 0], K[1, 1]) > 0):
        raise DataError(
            f'{path}: expected intrinsics [3, 3] in pixels with positive focal lengths, '
            f'got {K.tolist()}'
        )
    if pose.shape != (4, 4):
        raise DataError(f'{path}: expected a pose [4, 4] camera to world, got {list(pose.shape)}')
    if np.isfinite(pose).all() and not _is_rigid(pose):
        raise DataError(
            f'{path}: expected a pose of rotation and translation (metres), without scale, '
            f'got {pose.tolist()}'
        )
    return K, pose


def _is_rigid(pose: np.ndarray) -> bool:
    R, last = pose[:3, :3], pose[3] - (0, 0, 0, 1)
    off = max(np.abs(R @ R.T - np.eye(3)).max(), np.abs(last).max())
    return bool(off < ROTATION_TOLERANCE and np.linalg.det(R) > 0)


def crop_about_center(
    width: int, height: int, K: np.ndarray, size_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Largest (left, top, width, height) of the wanted aspect about the principal point."""
    cx, cy = round(float(K[0, 2])), round(float(K[1, 2]))
    half_w, half_h = min(cx, width - cx), min(cy, height - cy)
    if half_w < 1 or half_h < 1:
        raise DataError(
            f'the principal point ({cx}, {cy}) lies outside the {width} x {height} image'
        )
    aspect = size_hw[1] / size_hw[0]
    crop_w = min(2 * half_w, int(2 * half_h * aspect))
    crop_h = min(2 * half_h, round(crop_w / aspect))
    return cx - crop_w // 2, cy - crop_h // 2, crop_w, crop_h
