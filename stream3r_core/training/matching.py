"""Supervised matching: one attention head is shown which patches of two frames see the same place.

Left alone, a network of this kind spends most of a short training before its global attention
finds out that frames overlap. The true correspondences are known here, so that one head of chosen
global blocks is taught them directly; all others stay free.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.geometry import invert_se3, transform_points
from stream3r_core.model.blocks import AttentionFn
from stream3r_core.training.batch import Batch

_TOLERANCE = 0.05  # of the depth: farther apart, a point is hidden in the other view


class RecordingAttention:
    """The attention rule of each global block, remembering the queries and keys of one head."""

    def __init__(self, rules: Callable[[int], AttentionFn], layers: tuple[int, ...]):
        self.rules, self.layers = rules, layers
        self.seen: list[tuple[Tensor, Tensor]] = []  # [B, S * P, D] each

    def __call__(self, layer: int) -> AttentionFn:
        """Return the attention function of global block ``layer``."""
        rule = self.rules(layer)
        return partial(self._attend, rule) if layer in self.layers else rule

    def _attend(self, rule: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append((q[:, 0], k[:, 0]))
        return rule(q, k, v)


def matching_loss(
    seen: list[tuple[Tensor, Tensor]], batch: Batch, patch_size: int, num_special: int
) -> Tensor:
    """Cross-entropy between the recorded attention and the true matches in earlier frames."""
    target, known = patch_matches(batch, patch_size)  # [B, S, S, N, N], [B, S, S, N]
    frames = batch.images.shape[1]
    earlier = torch.ones(frames, frames, device=known.device).tril(-1)
    weight = known * earlier[:, :, None]
    total = weight.new_zeros(())
    for q, k in seen:
        q, k = (x.float().unflatten(1, (frames, -1))[:, :, num_special:] for x in (q, k))
        logits = torch.einsum('bind,bjmd->bijnm', q, k) / q.shape[-1] ** 0.5
        error = -(target * F.log_softmax(logits, -1)).sum(-1)
        total = total + (error * weight).sum() / weight.sum().clamp(min=1)
    return total / max(1, len(seen))


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
    v, u = torch.meshgrid(
        torch.arange(rows, device=depth.device) * patch_size + middle,
        torch.arange(columns, device=depth.device) * patch_size + middle,
        indexing='ij',
    )
    pixels = torch.stack([u.flatten(), v.flatten(), torch.ones_like(u.flatten())], -1).float()
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
