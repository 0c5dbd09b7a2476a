"""The DINOv2 image encoder with register tokens (Oquab et al. 2023, Darcet et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.config import ModelConfig
from stream3r_core.model.blocks import Block


def resize_grid(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Resize learned positions [1, M * M, C] to [1, rows * columns, C], in float32."""
    side = round(grid.shape[1] ** 0.5)
    image = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    image = F.interpolate(image, (rows, columns), mode='bicubic', antialias=True)
    return image.flatten(2).transpose(1, 2)


class PositionGrid:
    """Resizes a learned grid, and remembers the last result while no gradient is wanted.

    The memory holds for one size and one version of the parameter, so that training, loading and
    moving to another device or dtype are always seen.
    """

    def __init__(self):
        self._key = self._resized = None

    def __call__(self, parameter: Tensor, num_prefix: int, rows: int, columns: int) -> Tensor:
        """Return [1, num_prefix + rows * columns, C] float32; the prefix entries are kept."""
        if torch.is_grad_enabled():
            return self._resize(parameter, num_prefix, rows, columns)
        version = None if parameter.is_inference() else parameter._version
        key = (rows, columns, parameter.data_ptr(), parameter.device, parameter.dtype, version)
        if key != self._key:
            self._key, self._resized = key, self._resize(parameter, num_prefix, rows, columns)
        return self._resized

    @staticmethod
    def _resize(parameter: Tensor, num_prefix: int, rows: int, columns: int) -> Tensor:
        grid = parameter[:, num_prefix:]
        if rows == columns and rows * columns == grid.shape[1]:
            return parameter.float()
        return torch.cat((parameter[:, :num_prefix].float(), resize_grid(grid, rows, columns)), 1)


class PatchEmbed(nn.Module):
    """One convolution whose kernel and stride are the patch."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, 3, H, W] to row-major patch tokens [n, N, C]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2 ViT; takes normalised images of any whole number of patches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        grid = config.img_size // patch
        self.patch_size = patch
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid * grid, dim))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in the checkpoints, never used
        self.blocks = nn.ModuleList(
            Block(dim, config.dino_heads, config.mlp_ratio, eps=1e-6, layer_scale=1.0)
            for _ in range(config.dino_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._positions = PositionGrid()

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, 3, H, W] to patch tokens [n, N, C]."""
        return self.tokens(images)[:, 1 + self.register_tokens.shape[1] :]

    def tokens(self, images: Tensor) -> Tensor:
        """Map [n, 3, H, W] to all tokens [n, 1 + R + N, C]: cls, registers, patches."""
        n, _, height, width = images.shape
        x = torch.cat((self.cls_token.expand(n, -1, -1), self.patch_embed(images)), 1)
        rows, columns = height // self.patch_size, width // self.patch_size
        x = x + self._positions(self.pos_embed, 1, rows, columns)
        # Registers come after the positions are added: they have none.
        x = torch.cat((x[:, :1], self.register_tokens.expand(n, -1, -1), x[:, 1:]), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
