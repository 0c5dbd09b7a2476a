"""Which voxels the token pool gives up first: thin out dense places before emptying any place.

The value of a voxel is a decaying sum of what speaks for it: how confidently it was seen and how
much attention its tokens received when they were retrieved.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.cache.voxel_table import NOWHERE, pack, unpack

BLOCK_BITS = 2  # a block of 4 x 4 x 4 voxels is one place
FIXED_POINT = float(1 << 20)


class Order(NamedTuple):
    """Voxel slots in the order of eviction."""

    slots: Tensor  # [V], the first to go first
    rank: Tensor  # [V] 0, 1, 2 ... in that order
    num_evictable: Tensor  # scalar; slots from this rank on must stay


def eviction_order(keys: Tensor, value: Tensor, protected: Tensor) -> Order:
    """Order voxel slots by their rank within their block, then by value.

    The least valuable voxels of the most crowded blocks go first, so the last voxel of every place
    seen outlives the second best of any other. ``keys``, ``value``, ``protected`` [V].
    """
    block = pack(unpack(keys) >> BLOCK_BITS).masked_fill(protected, NOWHERE)
    order = value.argsort(descending=True, stable=True)
    order = order[block[order].argsort(stable=True)]  # by block, best first
    in_order = block[order]
    index = torch.arange(len(keys), device=keys.device)
    rank_in_block = index - torch.searchsorted(in_order, in_order)
    rank_in_block = torch.empty_like(index).scatter_(0, order, rank_in_block)
    slots = value.argsort(stable=True)
    slots = slots[rank_in_block[slots].argsort(descending=True, stable=True)]
    slots = slots[protected[slots].to(torch.int8).argsort(stable=True)]
    return Order(slots, index, (~protected).sum())


def marked(slots: Tensor, num_voxels: int) -> Tensor:
    """Return which voxel slots [V] occur in ``slots`` (any shape; -1 is none)."""
    mask = torch.zeros(num_voxels + 1, dtype=torch.bool, device=slots.device)
    mask[slots.flatten()] = True  # -1 marks the spare last element
    return mask[:-1]


def add_by_slot(value: Tensor, slots: Tensor, amounts: Tensor) -> None:
    """Add amounts to the voxels [V] of ``slots``; in fixed point, whose sums know no order."""
    total = torch.zeros(len(value) + 1, dtype=torch.int64, device=value.device)
    fixed = (amounts.flatten() * FIXED_POINT).long()
    index = slots.flatten().where(slots.flatten() >= 0, len(value))
    total.scatter_add_(0, index, fixed)
    value += total[:-1] / FIXED_POINT


def observe(value: Tensor, slots: Tensor, sureness: Tensor) -> None:
    """Credit the voxels that tokens of a frame saw with the best of their relative confidences."""
    best = torch.zeros(len(value) + 1, device=value.device)
    best.scatter_reduce_(0, slots.where(slots >= 0, len(value)), sureness, 'amax')
    value += best[:-1]
