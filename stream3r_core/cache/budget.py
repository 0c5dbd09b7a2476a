"""How a byte budget is spent: working memory first, the rest on the pool."""

import dataclasses
from dataclasses import dataclass

import torch

from stream3r_core.cache.token_pool import TokenPool
from stream3r_core.cache.working import Layout, WorkingCache
from stream3r_core.config import CacheConfig
from stream3r_core.errors import CacheError
from stream3r_core.kernels.merge import MergeRule

DEFAULT_FRAMES = 23  # the default budget: keys and values of this many frames
TOKENS_PER_VOXEL = 4  # per layer and head; about 5 were published for an unbounded pool
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

    def make_pool(self, device: torch.device) -> TokenPool:
        """Allocate the pool."""
        return TokenPool(
            self.layout.layers * self.layout.heads, self.pool_tokens, self.pool_voxels,
            self.layout.head_dim, self.rule, self.carry, self.dtype, device,
        )  # fmt: skip

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
        config.heavy_hitters * frame_tokens, config.retrieved * frame_tokens,
    )  # fmt: skip
    rule = MergeRule(
        config.buffer_size, config.num_pivots, config.absorb_threshold, config.drop_gate,
        config.sound_merging,
    )  # fmt: skip
    plan = Plan(layout, dtype, rule)
    budget = config.max_bytes or DEFAULT_FRAMES * frame_tokens * plan.token_bytes
    fixed = reserved_bytes + _working_bytes(plan, config)
    if not config.retrieved:
        _check_budget(config, budget, fixed)
        return plan
    plan = dataclasses.replace(plan, carry=max(8, frame_tokens // 8))
    base = _pool_bytes(plan, 1, 1)
    per_token = _pool_bytes(plan, 2, 1) - base
    per_voxel = _pool_bytes(plan, 1, 2) - base
    per_voxel += TOKENS_PER_VOXEL * per_token
    voxels = (budget - fixed - base) // per_voxel
    if not config.bounded:
        voxels = max(voxels, frame_tokens)
    smallest = -(-frame_tokens // TOKENS_PER_VOXEL)
    _check_budget(config, budget, fixed + base + (smallest * per_voxel if config.bounded else 0))
    return dataclasses.replace(plan, pool_tokens=TOKENS_PER_VOXEL * voxels, pool_voxels=voxels)


def _check_budget(config: CacheConfig, budget: int, needed: int) -> None:
    if config.bounded and budget < needed:
        raise CacheError(
            f'cache.max_bytes allows {budget:,} bytes, but {len(config.pinned_frames)} pinned '
            f'and {config.window} recent frames, chunks of {config.chunk_size}, '
            f'{config.heavy_hitters} frames of heavy hitters, {config.retrieved} retrieved, and '
            f'the least pool need {needed:,}; raise the budget or lower one of them'
        )


def _working_bytes(plan: Plan, config: CacheConfig) -> int:
    layout = plan.layout
    total = sum(x.nbytes for x in WorkingCache(layout, plan.dtype, META).tensors())
    if config.retrieved:  # point and confidence per token, mean query per head
        total += 16 * layout.frame_slots * layout.frame_tokens
        total += 4 * layout.layers * layout.heads * layout.head_dim
    return total


def _pool_bytes(plan: Plan, tokens: int, voxels: int) -> int:
    pool = dataclasses.replace(plan, pool_tokens=tokens, pool_voxels=voxels).make_pool(META)
    return sum(x.nbytes for x in pool.tensors())
