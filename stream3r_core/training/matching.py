"""Supervised matching: attention heads are shown which patches of two frames see the same place.

Left alone, a network of this kind spends most of a short training before its global attention
finds out that frames overlap. The true correspondences are known here, so that chosen heads are
taught them directly; all others stay free. A head that looks at the first frame alone is worth
most: its tokens know where they are, and attention to all frames would drown what they say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.geometry import invert_se3, transform_points
from stream3r_core.model.blocks import AttentionFn
from stream3r_core.training.batch import Batch
from stream3r_core.training.settings import TaughtHead

_TOLERANCE = 0.05  # of the depth: farther apart, a point is hidden in the other view


@dataclass(frozen=True)
class Recorded:
    """Queries and keys of a taught head, [B, S * P, D] each."""

    taught: TaughtHead
    q: Tensor
    k: Tensor


class RecordingAttention:
    """The attention rule of each global block, remembering what the taught heads ask and offer."""

    def __init__(self, rules: Callable[[int], AttentionFn], taught: tuple[TaughtHead, ...]):
        self.rules, self.taught = rules, taught
        self.seen: list[Recorded] = []

    def __call__(self, layer: int) -> AttentionFn:
        """Return the attention function of global block ``layer``."""
        rule = self.rules(layer)
        here = [t for t in self.taught if t.layer == layer]
        return partial(self._attend, rule, here) if here else rule

    def _attend(
        self, rule: AttentionFn, here: list[TaughtHead], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        self.seen += [Recorded(t, q[:, t.head], k[:, t.head]) for t in here]
        return rule(q, k, v)


def matching_loss(
    seen: list[Recorded], batch: Batch, patch_size: int, num_special: int
) -> tuple[Tensor, Tensor]:
    """Return how far the recorded attention is from the true matches in earlier frames.

    First the cross-entropy, then how far the mean position that a head looks at lies from the
    match, in patches: a distribution over patches can be nearly right and its mean half a patch
    off. Both are means over the heads. All earlier frames count, in every step: what a window or a
    forgotten token hides in one, others show.
    """
    target, known = patch_matches(batch, patch_size)  # [B, S, S, N, N], [B, S, S, N]
    frames, (height, width) = batch.images.shape[1], batch.images.shape[-2:]
    earlier = torch.ones(frames, frames, device=known.device).tril(-1)
    grid = _patch_grid(height // patch_size, width // patch_size, known.device)
    entropy = distance = known.new_zeros(())
    for recorded in seen:
        wanted = recorded.taught.frames
        weight = known * earlier[:, :, None]
        if wanted == 'anchor':
            weight = weight * (torch.arange(frames, device=known.device) == 0)[:, None]
        q, k = (x.float().unflatten(1, (frames, -1)) for x in (recorded.q, recorded.k))
        q = q[:, :, num_special:] / q.shape[-1] ** 0.5
        logits = torch.einsum('bind,bjmd->bijnm', q, k)
        patches = logits[..., num_special:]
        attention = F.log_softmax(patches, -1)
        total = weight.sum().clamp(min=1)
        off = (attention.exp() - target) @ grid
        distance = distance + (off.square().sum(-1).add(1e-4).sqrt() * weight).sum() / total
        if wanted == 'each':
            error = -(target * attention).sum(-1)
            entropy = entropy + (error * weight).sum() / total
        else:
            entropy = entropy + _entropy_among_frames(patches, logits, target, weight)
    return entropy / max(1, len(seen)), distance / max(1, len(seen))


def _entropy_among_frames(
    patches: Tensor, logits: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Cross-entropy where all tokens up to the present frame compete; ``weight`` [B, S, S, N]."""
    frames = logits.shape[1]
    later = torch.ones(frames, frames, dtype=torch.bool, device=logits.device).triu(1)
    logits = logits.masked_fill(later[:, :, None, None], -torch.inf)
    normaliser = logits.logsumexp((2, 4))  # [B, i, n]
    error = (target * (normaliser[:, :, None, :, None] - patches)).sum(-1)  # [B, i, j, n]
    count = weight.sum(2)
    share = weight / count[:, :, None].clamp(min=1)
    return (error * share).sum() / (count > 0).sum().clamp(min=1)


def _patch_grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (x, y) of the patches, [N, 2]."""
    y, x = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing='ij'
    )
    return torch.stack([x.flatten(), y.flatten()], -1).float()


@torch.no_grad()
def patch_matches(batch: Batch, patch_size: int) -> tuple[Tensor, Tensor]:
    """Where the patch centres of frame i lie on the patch grid of frame j.

    Returns the bilinear weights [B, S, S, N, N] (i, j, patch of i, patch of j) and whether the
    point is seen in frame j [B, S, S, N], float32.
    """
    height, width = batch.depth.shape[-2:]
    rows, columns = height // patch_size, width // patch_size
    middle = patch_size // 2
    depth = batch.depth[..., middle::patch_size, middle::patch_size].flatten(2)  # [B, S, N]
    pixels = patch_size * _patch_grid(rows, columns, depth.device) + middle
    pixels = F.pad(pixels, (0, 1), value=1.0)
    points = (pixels @ torch.linalg.inv(batch.K).mT) * depth[..., None]  # camera i
    T = invert_se3(batch.T_world_camera)[:, None] @ batch.T_world_camera[:, :, None]  # j <- i
    shape = T.shape[:3]
    points = transform_points(T, points[:, :, None].expand(*shape, -1, -1))
    projected = points @ batch.K[:, None].mT
    z = projected[..., 2]
    position = projected[..., :2] / z[..., None].clamp(min=1e-3)  # [B, S, S, N, 2] pixels
    size = torch.tensor([width, height], device=z.device)
    inside = ((position >= 0) & (position <= size - 1)).all(-1) & (z > 1e-3)
    there = _depth_at(batch.depth, position)
    seen = inside & (there > 0) & ((there - z).abs() < _TOLERANCE * z) & (depth[:, :, None] > 0)
    grid = (position - middle) / patch_size
    along_x = _tent(grid[..., 0].clamp(0, columns - 1), columns)
    along_y = _tent(grid[..., 1].clamp(0, rows - 1), rows)
    weights = (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)
    return weights, seen.float()


def _tent(position: Tensor, count: int) -> Tensor:
    cells = torch.arange(count, device=position.device)
    return (1 - (position[..., None] - cells).abs()).clamp(min=0)


def _depth_at(depth: Tensor, position: Tensor) -> Tensor:
    """Nearest depth of frame j at positions [B, i, j, N, 2]."""
    height, width = depth.shape[-2:]
    x = position[..., 0].round().clamp(0, width - 1).long()
    y = position[..., 1].round().clamp(0, height - 1).long()
    maps = depth.flatten(2)[:, None].expand(-1, x.shape[1], -1, -1)
    return maps.gather(-1, y * width + x)
