"""Scenes on disk in the layout of CUT3R-processed data sets, with its way of choosing views.

One folder per scene: ``rgb/NAME.png`` (or .jpg), ``depth/NAME.npy`` (z-depth, metres, 0 unknown)
and ``cam/NAME.npz`` with ``intrinsics`` [3, 3] in pixels and ``pose`` [4, 4], camera to world.
"""

import random
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
            views = rng.choice(self.scenes)
            chosen = choose_views(
                len(views),
                frames,
                rng,
                self.config.max_interval,
                self.config.video_prob,
                self.config.fix_interval_prob,
            )
            clips.append(self._load([views[i] for i in chosen], size_hw, rng))
        columns = zip(*(map(torch.stack, zip(*clip)) for clip in clips))
        return Batch(*(torch.stack(column) for column in columns))

    def _load(self, views: list, size_hw: tuple[int, int], rng: random.Random) -> list:
        """Load the views of a clip; its margin is common, its colours may be."""
        config = self.config
        margin = rng.randrange(config.aug_crop) if config.aug_crop else 0
        common = ColorJitter.draw(config.jitter, rng)
        loaded = []
        for view in views:
            own = ColorJitter.draw(config.jitter, rng) if config.jitter_per_view else common
            loaded.append(load_view(view, size_hw, margin, own if any(config.jitter) else None))
        return loaded


def views_of(scene: Path) -> list[tuple[Path, Path, Path]]:
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

    A scene with fewer views than asked for is walked to and fro.
    """
    if total < frames:
        to_and_fro = list(range(total)) + list(range(total - 2, 0, -1))
        start = rng.randrange(total)
        return [to_and_fro[(start + i) % len(to_and_fro)] for i in range(frames)]
    limit = max(1, min(max_interval, (total - 1) // max(1, frames - 1)))
    video = rng.random() < video_prob
    if video and rng.random() < fix_interval_prob:
        intervals = [rng.randint(1, limit)] * (frames - 1)
    else:
        intervals = [rng.randint(1, limit) for _ in range(frames - 1)]
    start = rng.randrange(total - sum(intervals))
    chosen = [start]
    for step in intervals:
        chosen.append(chosen[-1] + step)
    return chosen if video else _shuffled_in_blocks(chosen, rng)


def _shuffled_in_blocks(chosen: list[int], rng: random.Random) -> list[int]:
    size = rng.randint(2, max(2, len(chosen)))
    blocks = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    for block in blocks:
        rng.shuffle(block)
    rng.shuffle(blocks)
    return [view for block in blocks for view in block]


def load_view(
    files: tuple[Path, Path, Path],
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
    except OSError as error:
        raise DataError(f'{image_path} cannot be read as an image: {error}') from error
    try:
        depth = np.load(depth_path).astype(np.float32)
        camera = np.load(camera_path)
        K, pose = camera['intrinsics'].astype(np.float64), camera['pose'].astype(np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f'{depth_path.stem}: depth or camera cannot be read: {error}') from error
    if depth.shape != (image.height, image.width):
        raise DataError(
            f'{depth_path}: depth {depth.shape} does not match image {image.height, image.width}'
        )
    return image, np.nan_to_num(depth, posinf=0.0, neginf=0.0), K, pose


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
