"""Tileable procedural textures: a seeded pool of scalar fields with mip levels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64  # texels of the finest level
LEVELS = 7  # 64, 32, ..., 1


@dataclass(frozen=True)
class TexturePool:
    """Scalar textures in [0, 1]; all mip levels of one texture lie one after the other."""

    texels: Tensor  # [count * stride] float32
    count: int
    stride: int  # texels of one texture, all levels

    def to(self, device) -> 'TexturePool':
        """Return the pool on ``device``."""
        return TexturePool(self.texels.to(device), self.count, self.stride)


def make_textures(seed: int, count: int = 256) -> TexturePool:
    """Draw ``count`` textures: noise, blobs, tiles, bricks, planks, stripes, dots, panels."""
    g = torch.Generator().manual_seed(seed)
    makers = (_noise, _noise, _blobs, _bricks, _planks, _stripes, _dots, _panels)
    fields = torch.stack([makers[i % len(makers)](g) for i in range(count)])
    return _with_mip_levels(fields)


def sample_textures(
    pool: TexturePool, index: Tensor, uv: Tensor, texel_footprint: Tensor
) -> Tensor:
    """Bilinear value at ``uv`` (one unit = one period) of texture ``index``.

    index [...] int64, uv [..., 2], texel_footprint [...]: finest texels that one ray covers; the
    mip level follows from it, so that far surfaces do not flicker. Returns [...] in [0, 1].
    """
    level = torch.log2(texel_footprint.clamp(1.0, 2.0 ** (LEVELS - 1))).round()
    side = torch.exp2(math.log2(SIDE) - level).round()
    # Levels before `level` hold SIDE^2 (1 + 1/4 + ...) texels.
    offset = ((SIDE**2 - side * side) * (4 / 3)).round().long() + index * pool.stride
    x, y = uv[..., 0] * side, uv[..., 1] * side
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    side_long = side.long()
    mask = side_long - 1  # sides are powers of two
    xa, ya = x0.long() & mask, y0.long() & mask
    xb, yb = (xa + 1) & mask, (ya + 1) & mask
    row_a, row_b = offset + ya * side_long, offset + yb * side_long
    t = pool.texels
    top = t[row_a + xa] * (1 - fx) + t[row_a + xb] * fx
    bottom = t[row_b + xa] * (1 - fx) + t[row_b + xb] * fx
    return top * (1 - fy) + bottom * fy


def _with_mip_levels(fields: Tensor) -> TexturePool:
    levels, level = [], fields[:, None]
    for _ in range(LEVELS):
        levels.append(level.flatten(1))
        level = torch.nn.functional.avg_pool2d(level, 2) if level.shape[-1] > 1 else level
    texels = torch.cat(levels, 1)
    return TexturePool(texels.flatten().contiguous(), len(fields), texels.shape[1])


def _uniform(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=g).item()


def _grid() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIDE) / SIDE
    return torch.meshgrid(axis, axis, indexing='ij')


def _stretch(field: Tensor) -> Tensor:
    low, high = field.quantile(0.02), field.quantile(0.98)
    return ((field - low) / (high - low)).clamp(0, 1)


def _spectral(g: torch.Generator, slope: float, stretch: float = 1.0) -> Tensor:
    fy = torch.fft.fftfreq(SIDE)[:, None] * SIDE * stretch
    fx = torch.fft.fftfreq(SIDE)[None] * SIDE
    radius = (fx * fx + fy * fy).sqrt().clamp(min=1.0)
    spectrum = torch.fft.fft2(torch.randn(SIDE, SIDE, generator=g)) / radius**slope
    spectrum[0, 0] = 0
    return torch.fft.ifft2(spectrum).real


def _noise(g: torch.Generator) -> Tensor:
    return _stretch(_spectral(g, _uniform(g, 0.6, 1.6), _uniform(g, 0.3, 3.0)))


def _blobs(g: torch.Generator) -> Tensor:
    field = _spectral(g, _uniform(g, 1.4, 2.2))
    return torch.sigmoid(_uniform(g, 4, 25) * (field / field.std() - _uniform(g, -0.7, 0.7)))


def _bricks(g: torch.Generator, shift: float = 0.5) -> Tensor:
    y, x = _grid()
    rows, columns = int(_uniform(g, 2, 8)), int(_uniform(g, 2, 6))
    row = (y * rows).floor()
    column = (x * columns + shift * (row % 2)) % columns
    tone = torch.rand(rows, columns, generator=g)[row.long(), column.floor().long()]
    joint = ((y * rows) % 1 < 0.12) | (column % 1 < 0.08)
    noise = _stretch(_spectral(g, 1.0))
    return torch.where(
        joint, torch.full_like(tone, _uniform(g, 0, 0.3)), 0.35 + 0.5 * tone + 0.15 * noise
    )


def _panels(g: torch.Generator) -> Tensor:
    return _bricks(g, shift=0.0)


def _planks(g: torch.Generator) -> Tensor:
    y, _ = _grid()
    boards = int(_uniform(g, 3, 9))
    tone = torch.rand(boards, generator=g)[(y * boards).long()]
    grain = _stretch(_spectral(g, 1.2, stretch=0.15))
    return (0.45 * tone + 0.5 * grain) * ((y * boards) % 1 > 0.08)


def _stripes(g: torch.Generator) -> Tensor:
    y, x = _grid()
    kx, ky = int(_uniform(g, 0, 7)), int(_uniform(g, 1, 7))
    wobble = _spectral(g, 2.0)
    wave = torch.sin(2 * math.pi * (kx * x + ky * y) + _uniform(g, 0, 1.5) * wobble / wobble.std())
    return torch.sigmoid(_uniform(g, 1, 8) * wave) * 0.8 + 0.2 * _stretch(_spectral(g, 0.9))


def _dots(g: torch.Generator) -> Tensor:
    y, x = _grid()
    field = torch.zeros(SIDE, SIDE)
    for _ in range(int(_uniform(g, 6, 40))):
        cx, cy, radius = _uniform(g, 0, 1), _uniform(g, 0, 1), _uniform(g, 0.02, 0.16)
        dx, dy = (x - cx + 0.5) % 1 - 0.5, (y - cy + 0.5) % 1 - 0.5
        inside = (dx.square() + dy.square()).sqrt() < radius
        if torch.rand((), generator=g) < 0.5:
            inside = (dx.abs() < radius) & (dy.abs() < radius * _uniform(g, 0.2, 1.0))
        field = torch.where(inside, torch.full_like(field, _uniform(g, 0.2, 1.0)), field)
    return field
