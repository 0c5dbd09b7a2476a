"""Dense prediction from four token maps (Ranftl et al. 2021, DPT)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.config import ModelConfig
from stream3r_core.model.constants import cached_constant

PIXELS_PER_CHUNK = 8 * 392 * 518  # bounds the memory of the full-resolution feature maps


@cached_constant(maxsize=32)
def positional_rows_and_columns(
    channels: int, rows: int, columns: int, aspect: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the sine-cosine map of a grid in its two parts, which together have ``channels``.

    The x part [c / 2, 1, columns] and the y part [c / 2, rows, 1] are to be broadcast, which keeps
    the full map out of memory. ``aspect`` is width / height of the image.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    omega = 100.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def part(span: float, count: int) -> Tensor:
        edge = span * (count - 1) / count
        angles = omega[:, None] * torch.linspace(-edge, edge, count, dtype=torch.float64)
        return 0.1 * torch.cat((angles.sin(), angles.cos())).to(device, torch.float32)

    return part(aspect / diagonal, columns)[:, None, :], part(1 / diagonal, rows)[:, :, None]


def add_positions_(x: Tensor, aspect: float) -> Tensor:
    """Add the positional map to ``x`` [n, C, rows, columns] in place."""
    along_x, along_y = positional_rows_and_columns(*x.shape[1:], aspect, x.device)
    half = x.shape[1] // 2
    x[:, :half] += along_x
    x[:, half:] += along_y
    return x


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [n, C, ., .] bilinearly, corners on corners."""
    return F.interpolate(x, size, mode='bilinear', align_corners=True)


class ResidualConvUnit(nn.Module):
    """Two convolutions; the skip path is rectified too, as the checkpoints were trained."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, features, rows, columns] to the same shape."""
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


class FeatureFusion(nn.Module):
    """Merge a coarse map with the lateral map of the next finer level, and enlarge."""

    def __init__(self, features: int, has_lateral: bool = True):
        super().__init__()
        if has_lateral:
            self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, size: tuple[int, int], lateral: Tensor | None = None) -> Tensor:
        """Add the refined ``lateral`` to ``x`` where there is one; resize to ``size``."""
        if lateral is not None:
            x = x + self.resConfUnit1(lateral)
        return self.out_conv(resize(self.resConfUnit2(x), size))


class DPTFeatures(nn.Module):
    """Token maps to one feature map of eight times the patch grid."""

    def __init__(self, config: ModelConfig, features: int, out_features: int, positions: bool):
        super().__init__()
        dim, widths = 2 * config.embed_dim, config.dpt_out_channels
        self.patch_size = config.patch_size
        self.num_special = config.num_special_tokens
        self.positions = positions
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in widths)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(widths[0], widths[0], 4, 4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, 2, padding=1),
            )
        )
        self.scratch = nn.Module()
        for level, width in enumerate(widths, 1):
            lateral = nn.Conv2d(width, features, 3, padding=1, bias=False)
            self.scratch.add_module(f'layer{level}_rn', lateral)
            self.scratch.add_module(f'refinenet{level}', FeatureFusion(features, level < 4))
        self.scratch.output_conv1 = nn.Conv2d(features, out_features, 3, padding=1)

    def _fused(self, taps: list[Tensor], height: int, width: int) -> Tensor:
        """Map taps 4 x [n, P, 2C] of images of the given size to [n, out_features, 8h, 8w]."""
        s = self.scratch
        r1, r2, r3, r4 = (self._level(i, tap, height, width) for i, tap in enumerate(taps))
        x = s.refinenet4(r4, r3.shape[2:])
        x = s.refinenet3(x, r2.shape[2:], r3)
        x = s.refinenet2(x, r1.shape[2:], r2)
        x = s.refinenet1(x, (2 * r1.shape[2], 2 * r1.shape[3]), r1)
        return s.output_conv1(x)

    def _level(self, i: int, tap: Tensor, height: int, width: int) -> Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        x = self.norm(tap[:, self.num_special :].float())
        x = self.projects[i](x.transpose(1, 2).unflatten(2, grid))
        if self.positions:
            add_positions_(x, width / height)
        return getattr(self.scratch, f'layer{i + 1}_rn')(self.resize_layers[i](x))

    def _in_chunks(self, taps: list[Tensor], height: int, width: int) -> Tensor:
        """Apply :meth:`_decode` to taps 4 x [B, S, P, 2C], a few frames at a time."""
        count = max(1, PIXELS_PER_CHUNK // (height * width))
        frames = [tap.flatten(0, 1).split(count) for tap in taps]
        maps = torch.cat([self._decode(list(chunk), height, width) for chunk in zip(*frames)])
        return maps.unflatten(0, taps[0].shape[:2])


class DPTHead(DPTFeatures):
    """Values and their confidence at image resolution."""

    def __init__(self, config: ModelConfig, out_dim: int):
        features, inner = config.dpt_features, config.dpt_head_features_2
        super().__init__(config, features, features // 2, positions=True)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, out_dim, 1)
        )

    def forward(self, taps: list[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return raw values [B, S, H, W, out_dim - 1] and confidence [B, S, H, W] >= 1."""
        maps = self._in_chunks(taps, height, width).float()
        return maps[:, :, :-1].movedim(2, -1), 1 + maps[:, :, -1].exp()

    def _decode(self, taps: list[Tensor], height: int, width: int) -> Tensor:
        x = resize(self._fused(taps, height, width), (height, width))
        return self.scratch.output_conv2(add_positions_(x, width / height))


class TrackFeatures(DPTFeatures):
    """Feature maps for point tracking, at a fraction of the image resolution."""

    def __init__(self, config: ModelConfig):
        features = config.track.features
        super().__init__(config, features, features, positions=False)
        self.stride = config.track.stride

    def forward(self, taps: list[Tensor], height: int, width: int) -> Tensor:
        """Return features [B, S, L, H // stride, W // stride]."""
        return self._in_chunks(taps, height, width)

    def _decode(self, taps: list[Tensor], height: int, width: int) -> Tensor:
        x = self._fused(taps, height, width)
        return resize(x, (height // self.stride, width // self.stride))


def inverse_log(x: Tensor) -> Tensor:
    """Return sign(x) (exp|x| - 1): linear near zero, wide range far from it."""
    return x.sign() * x.abs().expm1()
