"""Point tracks through a batch of frames, refined over a few iterations (Karaev et al. 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.config import ModelConfig, TrackConfig
from stream3r_core.errors import InputError
from stream3r_core.model.blocks import Mlp
from stream3r_core.model.constants import cached_constant
from stream3r_core.model.dpt_head import TrackFeatures


def sample(maps: Tensor, xy: Tensor, padding: str) -> Tensor:
    """Sample maps [n, C, H, W] bilinearly at pixels ``xy`` [n, Q, 2]; returns [n, C, Q]."""
    height, width = maps.shape[2:]
    x = 2 * xy[..., 0] / max(width - 1, 1) - 1
    y = 2 * xy[..., 1] / max(height - 1, 1) - 1
    grid = torch.stack((x, y), -1)[:, :, None]
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=True).squeeze(-1)


@cached_constant()
def correlation_offsets(radius: int, device: torch.device) -> Tensor:
    """Return [(2 r + 1)^2, 2] offsets (x, y) in pixels; x varies slowest (model.md 12)."""
    steps = torch.arange(-radius, radius + 1, device=device, dtype=torch.float32)
    return torch.cartesian_prod(steps, steps)


@cached_constant()
def sincos_table(length: int, width: int, device: torch.device) -> Tensor:
    """Return the sine-cosine embedding [length, width] of the integers below ``length``."""
    half = width // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), 1).to(device, torch.float32)


def sample_table(table: Tensor, at: Tensor) -> Tensor:
    """Interpolate a table [length, width] linearly at ``at`` [...], held constant outside."""
    at = at.clamp(0, len(table) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[low], table[high], (at - low)[..., None])


def flow_embedding(flow: Tensor, width: int, max_scale: float) -> Tensor:
    """Embed displacements [..., 2] (x, y) as [..., 2 * width + 4]; ``width`` per coordinate."""
    divisors = 2 * torch.arange(width // 2, device=flow.device) * (1000 / width)
    angles = flow[..., None] * divisors  # [..., 2, width / 2]
    waves = torch.stack((angles.sin(), angles.cos()), -1).flatten(-3)
    return torch.cat((waves, flow / max_scale, flow / max_scale), -1)


class TrackAttention(nn.Module):
    """Attention and MLP whose residuals start from the normalised tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens [n, T, D]."""
        x = self.norm1(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TrackCrossAttention(nn.Module):
    """The same, looking at other tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let tokens [n, T, D] look at ``context`` [n, U, D]."""
        x, context = self.norm1(x), self.norm_context(context)
        x = x + self.cross_attn(x, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UpdateFormer(nn.Module):
    """Transformer over time and over tracks; a few virtual tracks carry what tracks share."""

    def __init__(self, config: TrackConfig):
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        width = 3 * config.features + 4

        def layers(kind: type[nn.Module]) -> nn.ModuleList:
            return nn.ModuleList(kind(dim, heads) for _ in range(config.depth))

        self.virual_tracks = nn.Parameter(torch.randn(1, config.num_virtual_tracks, 1, dim))
        self.input_norm = nn.LayerNorm(width)
        self.input_transform = nn.Linear(width, dim)
        self.time_blocks = layers(TrackAttention)
        self.space_virtual_blocks = layers(TrackAttention)
        self.space_point2virtual_blocks = layers(TrackCrossAttention)
        self.space_virtual2point_blocks = layers(TrackCrossAttention)
        self.output_norm = nn.LayerNorm(dim)
        self.flow_head = nn.Linear(dim, 2 + config.features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map track tokens [B, Q, S, width] to steps in pixels [.., 2] and features [.., L]."""
        tokens = self.input_transform(self.input_norm(x))
        B, Q, S, _ = tokens.shape
        virtual = self.virual_tracks.expand(B, -1, S, -1)
        x = torch.cat((tokens, virtual), 1)  # [B, Q + V, S, D]
        for time, virtual2point, within_virtual, point2virtual in zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
        ):
            x = time(x.flatten(0, 1)).view(x.shape)
            frames = x.transpose(1, 2).flatten(0, 1)  # [B * S, Q + V, D]
            points, virtual = frames[:, :Q], frames[:, Q:]
            virtual = within_virtual(virtual2point(virtual, points))
            points = point2virtual(points, virtual)
            x = torch.cat((points, virtual), 1).unflatten(0, (B, S)).transpose(1, 2)
        out = self.flow_head(self.output_norm(x[:, :Q] + tokens))
        return out[..., :2], out[..., 2:]


class Tracker(nn.Module):
    """Follows query points of the first frame through feature maps of all frames."""

    def __init__(self, config: TrackConfig):
        super().__init__()
        self.config = config
        L = config.features
        taps = config.corr_levels * (2 * config.corr_radius + 1) ** 2
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, 3 * L + 4))
        self.corr_mlp = Mlp(taps, config.hidden_size, L)
        self.updateformer = UpdateFormer(config)
        self.fmap_norm = nn.LayerNorm(L)
        self.ffeat_norm = nn.GroupNorm(1, L)
        self.ffeat_updater = nn.Sequential(nn.Linear(L, L), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(L, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(L, 1))

    def forward(
        self, features: Tensor, query_points: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Track pixels (x, y) of frame 0, [B, Q, 2], through feature maps [B, S, L, h, w]."""
        c = self.config
        S = features.shape[1]
        maps = self.fmap_norm(features.movedim(2, -1)).movedim(-1, 2)
        pyramid = self._pyramid(maps)
        start = query_points[:, None] / c.stride  # [B, 1, Q, 2]
        track = sample(maps[:, 0], start[:, 0], 'border').transpose(1, 2)  # [B, Q, L]
        track = track[:, None].expand(-1, S, -1, -1)
        frame_embedding = self._frame_embedding(start[:, 0], S, maps.shape[-2:])  # [B, Q, S, .]
        xy = start.expand(-1, S, -1, -1)
        answers = []
        for _ in range(c.iters):
            xy = xy.detach()
            correlation = self.corr_mlp(self._correlate(pyramid, track, xy))
            flow = flow_embedding(xy - xy[:, :1], c.features // 2, c.max_scale)
            x = torch.cat((flow, correlation, track), -1).transpose(1, 2)  # [B, Q, S, 3L + 4]
            step, feature_step = self.updateformer(x + frame_embedding)
            normed = self.ffeat_norm(feature_step.flatten(0, 2)).view(feature_step.shape)
            track = track + self.ffeat_updater(normed).transpose(1, 2)
            moved = xy + step.transpose(1, 2)
            xy = torch.cat((start, moved[:, 1:]), 1)
            answers.append(xy * c.stride)
        vis, conf = self.vis_predictor(track), self.conf_predictor(track)
        return answers, vis.squeeze(-1).sigmoid(), conf.squeeze(-1).sigmoid()

    def _pyramid(self, maps: Tensor) -> list[Tensor]:
        coarsest = 2 ** (self.config.corr_levels - 1)
        if min(maps.shape[-2:]) < coarsest:
            smallest = coarsest * self.config.stride
            raise InputError(
                'images are too small for point tracks: each side must be at least '
                f'{smallest} pixels'
            )
        levels = [maps]
        for _ in range(self.config.corr_levels - 1):
            pooled = F.avg_pool2d(levels[-1].flatten(0, 1), 2)
            levels.append(pooled.unflatten(0, maps.shape[:2]))
        return levels

    def _correlate(self, pyramid: list[Tensor], track: Tensor, xy: Tensor) -> Tensor:
        """Sample the similarity of tracks [B, S, Q, L] around ``xy``: [B, S, Q, levels * taps]."""
        offsets = correlation_offsets(self.config.corr_radius, xy.device)
        sampled = []
        for level, maps in enumerate(pyramid):
            similarity = torch.einsum('bsql,bslhw->bsqhw', track, maps) / maps.shape[2] ** 0.5
            at = xy[..., None, :] / 2**level + offsets  # [B, S, Q, taps, 2]
            values = sample(similarity.flatten(0, 2)[:, None], at.flatten(0, 2), 'zeros')
            sampled.append(values.view(*xy.shape[:3], -1))
        return torch.cat(sampled, -1)

    def _frame_embedding(self, start: Tensor, S: int, size: tuple[int, int]) -> Tensor:
        """Return what marks query position and first frame, [B, Q, S, 3L + 4]."""
        half = self.query_ref_token.shape[-1] // 2
        along_x = sample_table(sincos_table(size[1], half, start.device), start[..., 0])
        along_y = sample_table(sincos_table(size[0], half, start.device), start[..., 1])
        position = torch.cat((along_x, along_y), -1)  # [B, Q, 3L + 4]
        first, other = self.query_ref_token.split(1, 1)
        frames = torch.cat((first, other.expand(-1, S - 1, -1)), 1)  # [1, S, 3L + 4]
        return position[:, :, None] + frames[:, None]


class TrackHead(nn.Module):
    """Feature maps and tracker, as in the StreamVGGT and VGGT checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.feature_extractor = TrackFeatures(config)
        self.tracker = Tracker(config.track)

    def forward(
        self, taps: list[Tensor], height: int, width: int, query_points: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return pixels of all iterations [B, S, Q, 2], visibility and confidence [B, S, Q]."""
        return self.tracker(self.feature_extractor(taps, height, width), query_points)
