"""Which voxel of the scene lives in which slot of the token pool, without waiting for the GPU.

The table is a sorted list of int64 keys beside a permutation of the slots: the first entries are
the live voxels in key order, the rest are the free slots. Look-ups are binary searches; a step
merges its few new keys into the list instead of sorting it again, and removal is a stable
partition. Every operation has fixed shapes. A key packs the three cell indices, x highest, so that
the cells of a run along z are neighbours in the list.
"""

import torch
from torch import Tensor

BITS = 21
OFFSET = 1 << (BITS - 1)  # cells reach from -2^20 to 2^20 - 1 along each axis
NOWHERE = torch.iinfo(torch.int64).max  # key of a token without a place, and of a free slot
RIM = 8  # cells at the edge of the grid stay unused, so that neighbours never wrap around


def cell_of(points: Tensor, voxel_size: Tensor | float) -> Tensor:
    """Return the integer cell [..., 3] of points [..., 3], clamped to the reach of the keys."""
    cells = (points / voxel_size).floor().nan_to_num(0.0)
    return cells.clamp(RIM - OFFSET, OFFSET - 1 - RIM).long()


def pack(cells: Tensor) -> Tensor:
    """Return the key [...] of integer cells [..., 3]."""
    x, y, z = (cells + OFFSET).unbind(-1)
    return (x << 2 * BITS) | (y << BITS) | z


def unpack(keys: Tensor) -> Tensor:
    """Return the integer cells [..., 3] of keys [...]."""
    mask = (1 << BITS) - 1
    return torch.stack((keys >> 2 * BITS, keys >> BITS & mask, keys & mask), -1) - OFFSET


class VoxelTable:
    """Slots 0..capacity-1 for voxels that come and go."""

    def __init__(self, capacity: int, device: torch.device):
        self.keys = torch.full((capacity,), NOWHERE, dtype=torch.int64, device=device)
        self.slots = torch.arange(capacity, device=device)

    @property
    def capacity(self) -> int:
        """Voxels that the table can hold."""
        return len(self.keys)

    @property
    def count(self) -> Tensor:
        """Live voxels, a scalar on the device."""
        return (self.keys < NOWHERE).sum()

    def lookup(self, keys: Tensor) -> Tensor:
        """Return the slot of each key, -1 where there is none; any shape."""
        place = torch.searchsorted(self.keys, keys.contiguous()).clamp_max_(self.capacity - 1)
        found = (self.keys[place] == keys) & (keys < NOWHERE)
        return self.slots[place].where(found, -1)

    def key_of_slot(self) -> Tensor:
        """Return the key [capacity] of every slot, NOWHERE for a free one."""
        keys = torch.empty_like(self.keys)
        keys[self.slots] = self.keys
        return keys

    def unseen(self, keys: Tensor) -> Tensor:
        """Return the keys that the table lacks: sorted, each once, padded to [capacity]."""
        keys = keys.flatten().sort().values
        repeated = torch.zeros_like(keys, dtype=torch.bool)
        repeated[1:] = keys[1:] == keys[:-1]
        new = (keys < NOWHERE) & ~repeated & (self.lookup(keys) < 0)
        out = self.keys.new_full((self.capacity + 1,), NOWHERE)
        out[(new.cumsum(0) - 1).where(new, self.capacity).clamp_max(self.capacity)] = keys
        out[-1] = NOWHERE
        return out[:-1]

    def add(self, new: Tensor) -> None:
        """Give slots to new keys as returned by :meth:`unseen`; those without room are ignored."""
        index = torch.arange(self.capacity, device=new.device)
        live = self.count
        added = torch.minimum((new < NOWHERE).sum(), self.capacity - live)
        new = new.where(index < added, NOWHERE)
        # An old key moves up by the smaller new keys; free slots behind the new ones stay put.
        moved = index + torch.searchsorted(new, self.keys)
        old_place = torch.where(index < live, moved, index)
        old_place = old_place.where((index < live) | (index >= live + added), self.capacity)
        new_place = index + torch.searchsorted(self.keys, new)
        new_place = new_place.where(index < added, self.capacity)
        place = torch.cat((old_place, new_place))
        free = self.slots[(live + index).clamp_max(self.capacity - 1)]
        _scatter(torch.cat((self.keys, new)), place, self.keys)
        _scatter(torch.cat((self.slots, free)), place, self.slots)

    def remove(self, gone: Tensor) -> None:
        """Free the slots marked in ``gone`` [capacity] bool."""
        gone = gone[self.slots] | (self.keys == NOWHERE)
        kept = ~gone
        place = torch.where(gone, kept.sum() + gone.cumsum(0) - 1, kept.cumsum(0) - 1)
        _scatter(self.keys.masked_fill(gone, NOWHERE), place, self.keys)
        _scatter(self.slots, place, self.slots)

    def near(self, keys: Tensor, radius: int) -> Tensor:
        """Return which slots [capacity] lie within ``radius`` cells (Chebyshev) of any key.

        The cells of one run along z are one range of the sorted list, so a neighbourhood takes
        (2 r + 1)^2 pairs of searches.
        """
        keys = keys.flatten().sort().values
        keys[1:] = keys[1:].masked_fill(keys[1:] == keys[:-1], NOWHERE)
        span = torch.arange(-radius, radius + 1, device=keys.device)
        shift = (span[:, None] * (1 << 2 * BITS) + span * (1 << BITS)).flatten()
        valid = (keys < NOWHERE)[:, None].expand(-1, len(shift))
        centre = keys.where(keys < NOWHERE, 0)[:, None] + shift
        first = torch.searchsorted(self.keys, centre - radius)
        last = torch.searchsorted(self.keys, centre + radius, right=True)
        steps = torch.zeros(self.capacity + 1, dtype=torch.int64, device=keys.device)
        steps.scatter_add_(0, first.flatten(), valid.flatten().long())
        steps.scatter_add_(0, last.flatten(), -valid.flatten().long())
        inside = (steps.cumsum(0)[:-1] > 0) & (self.keys < NOWHERE)
        mask = torch.empty_like(inside)
        mask[self.slots] = inside
        return mask

    def clear(self) -> None:
        """Free all slots."""
        self.keys.fill_(NOWHERE)
        torch.arange(self.capacity, out=self.slots)


def _scatter(values: Tensor, place: Tensor, out: Tensor) -> None:
    """Write values to their places in ``out``; the place past its end swallows what is dropped."""
    spare = values.new_empty(len(out) + 1)
    spare[place] = values
    out.copy_(spare[:-1])
