"""How a byte budget is spent: working memory first, the rest on the pool."""

import dataclasses
from dataclasses import dataclass

import torch

from stream3r_core.cache.token_places import VoxelSize
from stream3r_core.cache.token_pool import MIN_TILE_BYTES, NARROW, TokenPool
from stream3r_core.cache.working import Layout, WorkingCache
from stream3r_core.config import CacheConfig
from stream3r_core.errors import CacheError
from stream3r_core.kernels.merge import MergeRule

DEFAULT_FRAMES = 23  # the default budget: keys and values of this many frames
# Token slots per voxel, layer and head. A room seen for long has about 5 (published), new space 1
# or 2. Too few slots cost rows, and too many cost nothing but the slots that stay empty.
TOKENS_PER_VOXEL = 2
# Of the budget, beside it: what merging and retrieval may take for a moment. Less costs time: a
# GPU spends it on starting more and smaller operations.
WORKSPACE = 1 / 4
META = torch.device('meta')


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that a :class:`StacCache` allocates."""

    layout: Layout
    dtype: torch.dtype
    rule: MergeRule
    pool_tokens: int = 0  # token slots per layer and head
    pool_voxels: int = 0
    carry: int = 0  # tokens per layer and head that may wait for a step
    tile_bytes: int = MIN_TILE_BYTES  # workspace of a step

    def allocate(self, device: torch.device) -> tuple[WorkingCache, TokenPool | None]:
        """Allocate working memory and pool."""
        layout = self.layout
        working = WorkingCache(layout, self.dtype, device)
        if not layout.has_pool:
            return working, None
        return working, TokenPool(
            layout.layers * layout.heads, self.pool_tokens, self.pool_voxels, layout.head_dim,
            self.rule, self.carry, self.dtype, device,
            working.kv.flatten(1, 2) if layout.pooled else None, self.tile_bytes,
        )  # fmt: skip

    def with_pool(self, tokens: int, voxels: int) -> 'Plan':
        """Return the plan with a pool of these sizes."""
        pooled = tokens + 1 if self.layout.pooled else 0
        layout = self.layout._replace(pooled=pooled)
        return dataclasses.replace(self, layout=layout, pool_tokens=tokens, pool_voxels=voxels)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that :class:`StacCache` allocates."""
        working, pool = self.allocate(META)
        total = sum(x.nbytes for x in working.tensors())
        if pool is not None:  # point and confidence per token, mean query per head, voxel size
            layout = self.layout
            edge = VoxelSize(CacheConfig(), META)
            total += sum(x.nbytes for x in (*pool.tensors(), *edge.tensors()))
            total += 16 * layout.frame_slots * layout.frame_tokens
            total += 4 * layout.layers * layout.heads * layout.head_dim
        return total

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and value of one token in all layers and heads."""
        layout = self.layout
        return 2 * layout.layers * layout.heads * layout.head_dim * self.dtype.itemsize


def make_plan(
    shape: tuple[int, int, int],  # layers, heads, head width
    frame_tokens: int,
    dtype: torch.dtype,
    config: CacheConfig,
    reserved_bytes: int = 0,
) -> Plan:
    """Size working memory and pool; raises :class:`CacheError` for a budget they do not fit."""
    layers, heads, head_dim = shape
    frames = len(config.pinned_frames) + config.window + config.chunk_size
    layout = Layout(
        layers, heads, head_dim, frame_tokens, frames,
        config.heavy_hitters * frame_tokens,
        retrieved=max(0, config.retrieved) * frame_tokens,
        pooled=int(config.retrieved < 0),  # sized below
    )  # fmt: skip
    rule = MergeRule(
        config.buffer_size, config.num_pivots, config.absorb_threshold, config.drop_gate,
        config.sound_merging,
    )  # fmt: skip
    plan = Plan(layout, dtype, rule)
    budget = config.max_bytes or DEFAULT_FRAMES * frame_tokens * plan.token_bytes
    if not layout.has_pool:
        _check_budget(config, budget, reserved_bytes + plan.num_bytes)
        return plan
    tile_bytes = max(MIN_TILE_BYTES, int(WORKSPACE * budget))
    carry = max(8, config.chunk_size * frame_tokens // 4)
    plan = dataclasses.replace(plan, carry=carry, tile_bytes=tile_bytes)
    smallest = -(-frame_tokens // TOKENS_PER_VOXEL)
    voxels = _affordable_voxels(plan, budget - reserved_bytes)
    least = plan.with_pool(TOKENS_PER_VOXEL * smallest, smallest)
    if voxels < smallest:
        _check_budget(config, budget, reserved_bytes + least.num_bytes)
        return least
    return plan.with_pool(TOKENS_PER_VOXEL * voxels, voxels)


def _affordable_voxels(plan: Plan, room: int) -> int:
    """Return how many voxels, with their token slots, fit into ``room`` bytes."""
    for start in (1, NARROW):  # with narrow indices, if the pool is small enough, or wide ones
        base = plan.with_pool(start, start).num_bytes
        per_token = plan.with_pool(start + 1, start).num_bytes - base
        per_voxel = plan.with_pool(start, start + 1).num_bytes - base
        fixed = base - start * (per_token + per_voxel)
        voxels = (room - fixed) // (per_voxel + TOKENS_PER_VOXEL * per_token)
        if TOKENS_PER_VOXEL * voxels < NARROW:
            break
    return voxels


def _check_budget(config: CacheConfig, budget: int, needed: int) -> None:
    if not config.bounded or budget >= needed:
        return
    option = f'{config.tree}.max_bytes'
    if config.max_bytes:
        allowed, remedy = f'{option} allows {budget:,} bytes', f'raise {option}'
    else:
        allowed = f'the default budget of {DEFAULT_FRAMES} frames is {budget:,} bytes'
        remedy = f'set {option}'
    raise CacheError(
        f'{allowed}, but {len(config.pinned_frames)} pinned and {config.window} recent frames, '
        f'chunks of {config.chunk_size}, {config.heavy_hitters} frames of heavy hitters, '
        f'{config.retrieved} retrieved, the camera cache and the least pool need {needed:,}; '
        f'{remedy}, or lower one of these numbers'
    )
