"""From camera images to the patch grid of the network, and back.

The three ``fit`` rules are the published loaders: 'crop' and 'pad' of the demos, 'eval' of the
evaluations. They are made for any patch size and any long side.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stream3r_core.config import ImageConfig, ModelConfig
from stream3r_core.errors import ConfigError, DataError, InputError

MAX_SIDE = 16384  # pixels
PHOTO_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
_WHITE = 255


@dataclass(frozen=True)
class ImageGeometry:
    """The affine map from camera pixels to network pixels.

    Pixels are addressed by integer indices, and pixel i covers [i - 0.5, i + 0.5], as in ROS and
    OpenCV calibrations. Resampling aligns the *edges* of two images, hence

        x_network = scale * (x_camera + 0.5) - 0.5 + offset.

    Intrinsics move by the same rule, so that a point keeps its ray whichever image it is seen in.
    In particular the networks' own principal point (width / 2, that is half a pixel right of the
    middle) is carried over as it is stated and not re-centred.
    """

    camera_size_hw: tuple[int, int]  # pixels
    network_size_hw: tuple[int, int]  # pixels
    scale_xy: tuple[float, float]  # network pixels per camera pixel
    offset_xy: tuple[int, int]  # network pixels; > 0: padding left and top, < 0: cropped away

    def network_K(self, K_camera: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] of the network image from those of the camera image."""
        return _move_K(K_camera, self.scale_xy, self._shift_xy())

    def camera_K(self, K_network: Tensor) -> Tensor:
        """Intrinsics [..., 3, 3] of the camera image from those of the network image."""
        scale = tuple(1 / s for s in self.scale_xy)
        return _move_K(K_network, scale, tuple(-t * s for t, s in zip(self._shift_xy(), scale)))

    def _shift_xy(self) -> tuple[float, float]:
        return tuple(0.5 * s - 0.5 + o for s, o in zip(self.scale_xy, self.offset_xy))

    def to_camera(self, network_map: Tensor, fill: float = torch.nan) -> Tensor:
        """Resample a map [H, W, ...] at network size to the camera's pixels.

        Each camera pixel takes the network pixel that it lies in: no value between two surfaces
        is invented. What a crop had cut away becomes ``fill``.
        """
        if tuple(network_map.shape[:2]) != self.network_size_hw:
            raise InputError(
                f'expected a map of {self.network_size_hw} (height, width) network pixels, '
                f'got {list(network_map.shape)}'
            )
        rows, columns = (self._network_index(axis) for axis in (0, 1))
        inside_rows, inside_columns = (
            np.flatnonzero((i >= 0) & (i < n))
            for i, n in zip((rows, columns), self.network_size_hw)
        )
        y, x = (slice(i[0], i[-1] + 1) for i in (inside_rows, inside_columns))
        camera_map = network_map.new_full((*self.camera_size_hw, *network_map.shape[2:]), fill)
        rows, columns = (torch.from_numpy(i).to(network_map.device) for i in (rows[y], columns[x]))
        camera_map[y, x] = network_map[rows][:, columns]
        return camera_map

    def _network_index(self, axis: int) -> np.ndarray:
        """Network row (axis 0) or column (axis 1) in which each camera row or column lies."""
        centres = np.arange(self.camera_size_hw[axis]) + 0.5
        scale, offset = self.scale_xy[1 - axis], self.offset_xy[1 - axis]
        return np.floor(scale * centres + offset).astype(np.int64)

    def camera_area(self) -> tuple[slice, slice]:
        """Rows and columns of the network image that show the camera; the rest is padding."""
        sizes = (round(n * s) for n, s in zip(self.camera_size_hw, self.scale_xy[::-1]))
        return tuple(
            slice(max(offset, 0), min(offset + size, side))
            for offset, size, side in zip(self.offset_xy[::-1], sizes, self.network_size_hw)
        )

    def identity(self) -> 'ImageGeometry':
        """Geometry of data that already is at the camera's resolution."""
        return ImageGeometry(self.camera_size_hw, self.camera_size_hw, (1.0, 1.0), (0, 0))


def _move_K(K: Tensor, scale_xy: tuple[float, float], shift_xy: tuple[float, float]) -> Tensor:
    K = torch.as_tensor(K)
    rows = [
        s * K[..., i, :] + t * K[..., 2, :] for i, (s, t) in enumerate(zip(scale_xy, shift_xy))
    ]
    return torch.stack([*rows, K[..., 2, :]], -2)


@dataclass(frozen=True)
class _Fit:
    """One published loader applied to one image size."""

    resizes: tuple[tuple[int, int, Image.Resampling], ...]  # (height, width, filter), in turn
    network_size_hw: tuple[int, int]

    @property
    def offset_yx(self) -> tuple[int, int]:
        """Centre the resized image in the network image; a surplus pixel goes bottom, right."""
        pairs = zip(self.network_size_hw, self.resizes[-1][:2])
        return tuple((n - r) // 2 if n >= r else -((r - n) // 2) for n, r in pairs)


def _round_to_patch(side: float, patch: int) -> int:
    return round(side / patch) * patch  # halves go to the even multiple, as the loaders do


def _fit_crop(height: int, width: int, long_side: int, patch: int) -> _Fit:
    new_height = _round_to_patch(height * long_side / width, patch)
    resize = (new_height, long_side, Image.Resampling.BICUBIC)
    return _Fit((resize,), (min(new_height, long_side), long_side))


def _fit_pad(height: int, width: int, long_side: int, patch: int) -> _Fit:
    if width >= height:
        new_height, new_width = _round_to_patch(height * long_side / width, patch), long_side
    else:
        new_height, new_width = long_side, _round_to_patch(width * long_side / height, patch)
    resize = (new_height, new_width, Image.Resampling.BICUBIC)
    return _Fit((resize,), (long_side, long_side))


def _fit_eval(height: int, width: int, long_side: int, patch: int) -> _Fit:
    if height == width:
        raise InputError(
            f"fit 'eval' is not defined for square images, got {width}x{height}; "
            "use fit 'crop' or 'pad'"
        )
    longest = max(height, width)
    shrinks = longest > long_side
    first = tuple(round(side * long_side / longest) for side in (height, width))
    second = tuple(2 * (side // 2) // patch * patch for side in first)
    lanczos, bicubic = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
    resizes = ((*first, lanczos if shrinks else bicubic), (*second, lanczos))
    return _Fit(resizes, second)


_FITS = {'crop': _fit_crop, 'pad': _fit_pad, 'eval': _fit_eval}


def _fit(height: int, width: int, config: ImageConfig, model_config: ModelConfig) -> _Fit:
    """Sizes for an image of ``height`` x ``width``, or the reason why there are none."""
    patch = model_config.patch_size
    long_side = config.long_side or model_config.img_size
    if long_side % patch:
        below = max(long_side // patch, 1) * patch
        raise ConfigError(
            f'image.long_side {long_side} must be a multiple of the patch size {patch}; '
            f'use {below} or {below + patch}'
        )
    fit = _FITS[config.fit](height, width, long_side, patch)
    sides = [side for resize in fit.resizes for side in resize[:2]]
    if min(sides) < 1 or max(sides) > MAX_SIDE:
        raise InputError(
            f'an image of {width}x{height} pixels is too narrow for a network image of '
            f"{long_side} pixels with fit '{config.fit}'; crop it first"
        )
    return fit


def prepare(
    image: np.ndarray | Tensor, config: ImageConfig, model_config: ModelConfig
) -> tuple[Tensor, ImageGeometry]:
    """Bring one camera image onto the patch grid (published loaders, see the module).

    Args:
        image: RGB [H, W, 3], RGBA [H, W, 4] (laid on white) or mono [H, W]; uint8, or float in
            [0, 1], which is rounded to 8 bits like the images the networks were trained on.
        config: Loader and long side.
        model_config: Gives patch size and, for ``long_side`` 0, the size of the network image.

    Returns:
        float32 [3, H, W] in [0, 1] on the CPU, H and W multiples of the patch size; its geometry.

    Raises:
        InputError: The image is empty, huge, not finite, out of range or has the wrong layout.

    """
    pixels = _check_image(image)
    height, width = pixels.shape[:2]
    fit = _fit(height, width, config, model_config)
    fitted = Image.fromarray(pixels)
    if fitted.mode == 'RGBA':
        white = Image.new('RGBA', fitted.size, (_WHITE,) * 4)
        fitted = Image.alpha_composite(white, fitted).convert('RGB')
    for new_height, new_width, resampling in fit.resizes:
        fitted = fitted.resize((new_width, new_height), resampling)
    new_height, new_width = fitted.height, fitted.width
    offset_y, offset_x = fit.offset_yx
    rgb = _place(np.asarray(fitted.convert('RGB')), fit.network_size_hw, (offset_y, offset_x))
    geometry = ImageGeometry(
        camera_size_hw=(height, width),
        network_size_hw=fit.network_size_hw,
        scale_xy=(new_width / width, new_height / height),
        offset_xy=(offset_x, offset_y),
    )
    planes = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))  # [3, H, W]
    return planes.float().div_(255), geometry


def _check_image(image: np.ndarray | Tensor) -> np.ndarray:
    """Return the image as uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    if isinstance(image, Tensor):
        image = image.detach().float() if image.is_floating_point() else image.detach()
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise InputError(f'expected an image as array or tensor, got {type(image).__name__}')
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise InputError(
            f'expected an image [H, W], [H, W, 3] or [H, W, 4] (channels last), '
            f'got {list(image.shape)}'
        )
    height, width = image.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(
            f'expected an image with sides of 1..{MAX_SIDE} pixels, got {width}x{height}'
        )
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind != 'f':
        raise InputError(f'expected an image of uint8, or float in [0, 1], got {image.dtype}')
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise InputError(
            f'expected a float image in [0, 1] without NaN, got values {low:.4g} .. {high:.4g}; '
            'divide 8-bit values by 255, clip overshoots'
        )
    return np.rint(image.astype(np.float32) * 255).astype(np.uint8)


def _place(image: np.ndarray, size_hw: tuple[int, int], offset_yx: tuple[int, int]) -> np.ndarray:
    """Put ``image`` [H, W, 3] into a white image of ``size_hw``; negative offsets cut."""
    if image.shape[:2] == size_hw:
        return image
    placed = np.full((*size_hw, 3), _WHITE, image.dtype)
    take = tuple(slice(max(-o, 0), max(-o, 0) + n) for o, n in zip(offset_yx, size_hw))
    cut = image[take]
    y, x = (max(o, 0) for o in offset_yx)
    placed[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return placed


def prepare_photos(
    images: Iterable[np.ndarray | Tensor], config: ImageConfig, model_config: ModelConfig
) -> tuple[Tensor, tuple[ImageGeometry, ...]]:
    """Prepare a set of photos as one batch [S, 3, H, W].

    Where sizes differ, all are padded with white, centred, to the largest height and width.
    """
    prepared = [prepare(image, config, model_config) for image in images]
    if not prepared:
        raise InputError('expected at least one photo, got none')
    height, width = (max(g.network_size_hw[axis] for _, g in prepared) for axis in (0, 1))
    batch = torch.ones(len(prepared), 3, height, width)
    geometries = []
    for slot, (image, geometry) in zip(batch, prepared):
        h, w = geometry.network_size_hw
        top, left = (height - h) // 2, (width - w) // 2
        slot[:, top : top + h, left : left + w] = image
        x, y = geometry.offset_xy
        geometries.append(
            dataclasses.replace(
                geometry, network_size_hw=(height, width), offset_xy=(x + left, y + top)
            )
        )
    return batch, tuple(geometries)


def list_photos(folder: str | Path) -> list[Path]:
    """Image files of a folder by name, numbers in numerical order (2.jpg before 10.jpg)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder; give a folder of images or a list of files')
    photos = [path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES]
    if not photos:
        raise DataError(f'{folder} holds no image; looked for *{", *".join(PHOTO_SUFFIXES)}')
    return sorted(photos, key=_natural_order)


def _natural_order(path: Path) -> tuple[list, str]:
    parts = re.split(r'(\d+)', path.name)
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def load_photo(path: str | Path) -> np.ndarray:
    """Read one 8-bit image file, upright as its EXIF orientation asks, as uint8 [H, W, 3 or 4]."""
    try:
        with Image.open(path) as photo:
            if photo.mode.startswith(('I', 'F')):
                raise DataError(f'{path}: expected an 8-bit image, got mode {photo.mode}')
            upright = ImageOps.exif_transpose(photo)
            return np.asarray(upright if upright.mode == 'RGBA' else upright.convert('RGB'))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f'cannot read the image {path}: {error}') from error


def load_photos(paths: str | Path | Iterable[str | Path]) -> list[np.ndarray]:
    """Read the images of a folder, or the listed files in their order (see :func:`load_photo`)."""
    if isinstance(paths, (str, Path)):
        paths = list_photos(paths) if Path(paths).is_dir() else [paths]
    return [load_photo(path) for path in paths]
