"""A small convolutional image encoder for networks that run on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.config import ModelConfig
from stream3r_core.model.vit import PositionGrid


class ConvBlock(nn.Module):
    """Depthwise convolution and pointwise MLP, scaled residual (Liu et al. 2022, ConvNeXt)."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.GroupNorm(1, dim)
        self.expand = nn.Conv2d(dim, 4 * dim, 1)
        self.reduce = nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, h, w] to the same shape."""
        return x + self.gamma * self.reduce(F.gelu(self.expand(self.norm(self.depthwise(x)))))


class ConvStem(nn.Module):
    """Strided convolutions down to the patch grid, then a few blocks and learned positions."""

    def __init__(self, config: ModelConfig, num_blocks: int = 2):
        super().__init__()
        dim, grid = config.embed_dim, config.img_size // config.patch_size
        self.patch_size = config.patch_size
        self.stem = nn.Sequential(*_downsampling(config.patch_size, dim))
        self.blocks = nn.Sequential(*(ConvBlock(dim) for _ in range(num_blocks)))
        self.pos_embed = nn.Parameter(0.5 * smooth_positions(grid, dim))
        self.norm = nn.LayerNorm(dim)
        self._positions = PositionGrid()

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, 3, H, W] to patch tokens [n, N, C]."""
        height, width = images.shape[-2:]
        x = self.blocks(self.stem(images)).flatten(2).transpose(1, 2)
        rows, columns = height // self.patch_size, width // self.patch_size
        return self.norm(x + self._positions(self.pos_embed, 0, rows, columns))


def smooth_positions(side: int, dim: int) -> Tensor:
    """Sine-cosine positions [1, side * side, dim] of a grid, half of the channels for x.

    At most three periods over the image: what attention brings from another frame can then be told
    by where it came from, and grids of other sizes can be interpolated.
    """
    cycles = torch.logspace(-2, 1.6, dim // 4, base=2.0)
    angles = 2 * torch.pi * torch.outer(torch.arange(side) / side, cycles)
    axis = torch.cat((angles.sin(), angles.cos()), 1)  # [side, dim / 2]
    along_x, along_y = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat((along_x, along_y), 1)[None]


def _downsampling(patch_size: int, dim: int) -> list[nn.Module]:
    """Halve once per factor 2 of the patch size, doubling the width, then cut the odd rest."""
    halvings = (patch_size & -patch_size).bit_length() - 1
    rest = patch_size >> halvings
    last = halvings - (rest == 1)
    layers, width = [], 3
    for i in range(halvings):
        wider = max(dim >> (last - i), 8)
        layers += [nn.Conv2d(width, wider, 3, 2, padding=1), nn.GroupNorm(1, wider), nn.GELU()]
        if i == 0:  # one more look at fine detail: sub-patch motion is read from it
            layers += [nn.Conv2d(wider, wider, 3, padding=1), nn.GroupNorm(1, wider), nn.GELU()]
        width = wider
    if rest > 1:
        layers.append(nn.Conv2d(width, dim, rest, rest))
    return layers
