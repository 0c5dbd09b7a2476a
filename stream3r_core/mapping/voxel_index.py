"""Voxel keys, their grouping within a frame, and the hash index of the map; vectorised numpy."""

import numpy as np

from stream3r_core.mapping.pages import zero_pages

_BITS = 21  # of a key per axis
CELL_LIMIT = 1 << (_BITS - 1)  # cells lie in (-limit, limit): 10 km at voxels of 1 cm
_MIX_1 = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no key is lost; the golden ratio
_MIX_2 = np.uint64(0xBF58476D1CE4E5B9)
_NONE = -1
NO_KEY = -1  # of a slot that was freed


def pack_cells(cells: np.ndarray) -> np.ndarray:
    """Keys [N] int64 >= 0 of voxel cells [3, N], whole numbers within +-CELL_LIMIT."""
    keys = np.zeros(cells.shape[1], np.int64)
    for plane in cells:
        keys <<= _BITS
        keys |= plane.astype(np.int64) + CELL_LIMIT
    return keys


def _bucket(keys: np.ndarray, bits: int) -> np.ndarray:
    mixed = keys.view(np.uint64) * _MIX_1
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_2
    return (mixed >> np.uint64(64 - bits)).view(np.int64)


def group_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find equal keys: one member of each group [G], and the group of each key [N].

    One write and one read of a scratch hash table per round: each bucket keeps the last key
    written to it, and the keys that meet another one there try again among themselves. Several
    times faster than sorting.
    """
    bits = max(len(keys) - 1, 1).bit_length()
    bucket = _bucket(keys, bits)
    everyone = np.arange(len(keys), dtype=np.int32)
    winner = np.empty(1 << bits, np.int32)
    winner[bucket] = everyone
    member = winner.take(bucket)
    active = np.flatnonzero(keys.take(member) != keys)
    while active.size:
        contested = bucket.take(active)
        winner[contested] = active
        member[active] = winner.take(contested)
        active = active.compress(keys.take(member.take(active)) != keys.take(active))
    is_member = member == everyone
    number = np.cumsum(is_member) - 1
    return np.flatnonzero(is_member), number.take(member)


class VoxelIndex:
    """Hash index from voxel keys to slots 0 .. capacity - 1, with chains of slots per bucket.

    The cost of a call depends on the number of keys asked for, not on the number stored: there is
    no rehash, and removal leaves nothing behind.
    """

    def __init__(self, capacity: int):
        self._bits = max(capacity - 1, 1).bit_length()
        self._head = zero_pages((1 << self._bits,), np.int32)  # first slot of each bucket
        self._head.fill(_NONE)
        self._next = zero_pages((capacity,), np.int32)  # next slot of the same bucket
        self.keys = zero_pages((capacity,), np.int64)  # of the slots in use

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Slots [N] of keys [N], -1 where absent."""
        slots = self._head.take(_bucket(keys, self._bits))
        active = np.flatnonzero(slots != _NONE)
        while active.size:
            at = slots.take(active)
            differs = self.keys.take(at) != keys.take(active)
            active = active.compress(differs)
            slots[active] = self._next.take(at.compress(differs))
            active = active.compress(slots.take(active) != _NONE)
        return slots

    def insert(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Bind distinct, absent keys [N] to free slots [N]."""
        self.keys[slots] = keys
        bucket = _bucket(keys, self._bits)
        while slots.size:  # one slot per bucket and round becomes the head of its chain
            old_head = self._head.take(bucket)
            self._head[bucket] = slots
            is_head = self._head.take(bucket) == slots
            self._next[slots.compress(is_head)] = old_head.compress(is_head)
            bucket, slots = bucket.compress(~is_head), slots.compress(~is_head)

    def remove(self, slots: np.ndarray) -> None:
        """Free used slots [N]."""
        bucket = _bucket(self.keys.take(slots), self._bits)  # with repetitions, which do no harm
        self.keys[slots] = NO_KEY
        self._drop_dead_heads(bucket)
        at = self._head.take(bucket)
        at = at.compress(at != _NONE)
        while at.size:
            after = self._next.take(at)
            goes_on = after != _NONE
            at, after = at.compress(goes_on), after.compress(goes_on)
            is_dead = self.keys.take(after) == NO_KEY
            self._next[at.compress(is_dead)] = self._next.take(after.compress(is_dead))
            at = np.where(is_dead, at, after)

    def _drop_dead_heads(self, bucket: np.ndarray) -> None:
        while bucket.size:
            head = self._head.take(bucket)
            is_dead = (head != _NONE) & (self.keys.take(head) == NO_KEY)
            bucket = bucket.compress(is_dead)
            self._head[bucket] = self._next.take(head.compress(is_dead))
