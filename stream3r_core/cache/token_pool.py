"""Long-term memory: tokens by layer, head and voxel, in storage of fixed size.

Layout. A *group* is one head of one layer, G in all. Each group owns a store of N token slots
(key, value, weight, score sum, count, voxel). A *row* is what one group remembers of one voxel:
up to P pivots and B - 1 buffered tokens; ``table`` [G, V, P + B - 1] holds their token slots, or
-1. Rows rarely are full and differ much in length, so the table of indices buys several times the
voxels that dense rows would hold in the same bytes; and as every token slot is the same size,
nothing fragments and nothing needs a block allocator.

A step (:meth:`TokenPool.insert`) gathers the rows that its tokens touch, updates them with
:func:`kernels.merge.merge` and writes them back; where slots run out, rows of the least useful
voxels go first. All shapes follow from the number of tokens: the host never waits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.cache import voxel_value
from stream3r_core.cache.indexing import put_rows, take_rows
from stream3r_core.cache.voxel_table import NOWHERE, VoxelTable
from stream3r_core.kernels import merge as kernel
from stream3r_core.kernels.merge import Buffers, Merged, MergeRule, Pivots, Tokens, merge

NARROW = 1 << 15  # indices below fit into 16 bits
MIN_TILE_BYTES = 1 << 25  # with less, a frame of 112x88 on a CPU spends 35 ms on small operations


class Dropped(NamedTuple):
    """Tokens that left the working cache, as many in every group."""

    k: Tensor  # [G, n, D]
    v: Tensor  # [G, n, D]
    score: Tensor  # [G, n] float32
    key: Tensor  # [G, n] int64 voxel key, NOWHERE without a place


class Books(NamedTuple):
    """Where tokens went since the last :meth:`TokenPool.clear`; scalars on the device.

    What came in and is in none of these is in the pool: merged, buffered or carried.
    """

    came: Tensor
    placeless: Tensor  # no voxel: an unsure point, or one of the special tokens
    below_gate: Tensor  # too little score for its row
    evicted: Tensor  # with the row of a voxel that made room
    lost: Tensor  # no room at all


class TokenPool:
    """Tokens of G groups in at most V voxels and N token slots per group.

    ``carry`` is how many tokens per group may wait for the next step when their row is full.
    ``home`` [2, G, first + N + 1, D]: keys and values live there, from ``first`` on, and not in
    storage of the pool's own. ``tile_bytes`` bound the workspace of a step, but for one group at a
    time at least.
    """

    def __init__(
        self,
        num_groups: int,
        num_tokens: int,
        num_voxels: int,
        head_dim: int,
        rule: MergeRule,
        carry: int,
        dtype: torch.dtype,
        device: torch.device,
        home: Tensor | None = None,
        tile_bytes: int = MIN_TILE_BYTES,
    ):
        def full(value, *shape, dtype=torch.float32):
            return torch.full(shape, value, dtype=dtype, device=device)

        G, N = num_groups, num_tokens
        self.rule, self.tile_bytes = rule, tile_bytes
        # The last slot of each group, and the last voxel of the table, swallow what is dropped.
        self._owns_kv = home is None
        kv = full(0, 2, G, N + 1, head_dim, dtype=dtype) if home is None else home
        self._k, self._v = kv
        self.capacity = N  # token slots per group
        self._first = kv.shape[2] - N - 1
        self.weight, self.score_sum, self.count = (full(0, G, N + 1) for _ in range(3))
        self.owner = full(-1, G, N + 1, dtype=index_type(num_voxels))  # voxel slot, -1: free
        entries = rule.num_pivots + rule.buffer_size - 1
        self.table = full(-1, G, num_voxels + 1, entries, dtype=index_type(N))
        self.voxels = VoxelTable(num_voxels, device)
        self.value = full(0, num_voxels)  # what eviction goes by, see cache/voxel_value.py
        self.carried = Dropped(
            full(0, G, carry, head_dim, dtype=dtype),
            full(0, G, carry, head_dim, dtype=dtype),
            full(-torch.inf, G, carry),
            full(NOWHERE, G, carry, dtype=torch.int64),
        )
        self.books = Books(*full(0, len(Books._fields), dtype=torch.int64))

    def tensors(self) -> list[Tensor]:
        """Return everything that the pool has allocated."""
        return [
            *((self._k, self._v) if self._owns_kv else ()),
            *(self.weight, self.score_sum, self.count, self.owner, self.table),
            *(self.voxels.keys, self.voxels.slots, self.value, *self.carried, *self.books),
        ]

    @property
    def k(self) -> Tensor:
        """Keys [G, N + 1, D] of all token slots and the spare one, a view."""
        return self._k[:, self._first :]

    @property
    def v(self) -> Tensor:
        """Values [G, N + 1, D] of all token slots and the spare one, a view."""
        return self._v[:, self._first :]

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [G, n, D] of token slots ``index`` [G, n]."""
        return self._take(slice(None), index)

    def _take(self, groups: slice, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index + self._first
        return take_rows(self._k[groups], index), take_rows(self._v[groups], index)

    @property
    def num_groups(self) -> int:
        """Heads of all layers together."""
        return len(self._k)

    @property
    def num_tokens(self) -> Tensor:
        """Live tokens of all groups together, a scalar on the device."""
        return (self.owner >= 0).sum() + (self.carried.key < NOWHERE).sum()

    def clear(self) -> None:
        """Forget everything."""
        self.owner.fill_(-1)
        self.table.fill_(-1)
        # What is not live is masked; a mask does not hide a NaN.
        stores = self.k, self.v, self.carried.k, self.carried.v
        for store in (*stores, self.weight, self.score_sum, self.count, self.value):
            store.zero_()
        self.voxels.clear()
        self.carried.score.fill_(-torch.inf)
        self.carried.key.fill_(NOWHERE)
        for number in self.books:
            number.zero_()

    # ---- insertion

    def insert(self, dropped: Dropped) -> None:
        """Take in tokens; rows and voxels of least value make room where there is none."""
        new = self.voxels.unseen(dropped.key)
        wanted = (new < NOWHERE).sum()
        slot = self.voxels.lookup(dropped.key)
        self._evict_voxels(self._eviction_order(slot), wanted)
        self.voxels.add(new)
        tokens = Dropped(*(torch.cat(pair, 1) for pair in zip(dropped, self.carried)))
        slot = self.voxels.lookup(tokens.key)
        self.books.came.add_(dropped.key.numel())
        self.books.placeless.add_((dropped.key == NOWHERE).sum())
        self.books.lost.add_(((slot < 0) & (tokens.key < NOWHERE)).sum())
        order = self._eviction_order(slot)
        tile = self._groups_per_tile(tokens.key.shape[1])
        for start in range(0, self.num_groups, tile):
            groups = slice(start, start + tile)
            self._insert_tile(groups, Dropped(*(x[groups] for x in tokens)), slot[groups], order)
        live = (self.table[:, :-1] >= 0).flatten(2).any(2).any(0)
        carried = voxel_value.marked(self.voxels.lookup(self.carried.key), self.voxels.capacity)
        self.voxels.remove(~live & ~carried)

    def _groups_per_tile(self, num_tokens: int) -> int:
        entries, dim = self.table.shape[2], self._k.shape[2]
        entry_bytes = 8 * dim + 16  # float32 key and value, numbers beside them
        # Measured at the peak, with as many rows as tokens: up to four copies of every entry.
        return max(1, self.tile_bytes // (num_tokens * (4 * entries + 4) * entry_bytes))

    def _insert_tile(self, groups: slice, tokens: Dropped, slot: Tensor, order: Tensor) -> None:
        rows = _Rows.of(slot, self.voxels.capacity)
        held = take_rows(self.table[groups], rows.slot)  # [g, R, E] token slots
        flat = Tokens(
            tokens.k.float().flatten(0, 1),
            tokens.v.float().flatten(0, 1),
            tokens.score.flatten(),
            rows.row_of_token.flatten(),
        )
        merged = merge(*self._gather(groups, held), flat, self.rule)
        self._write(groups, rows, held, merged, order)
        self._carry(groups, rows, merged.overflow)
        self.books.below_gate.add_(merged.discarded.sum())

    def _gather(self, groups: slice, held: Tensor) -> tuple[Buffers, Pivots]:
        """Return the dense rows whose token slots are ``held`` [g, R, E]."""
        index = held.clamp_min(0).flatten(1).long()  # [g, R * E]
        live = held >= 0

        def take(store):
            rows = take_rows(store[groups], index)  # [g, R * E]
            return rows.view(-1, held.shape[2])

        P = self.rule.num_pivots
        k, v = (x.float().view(-1, held.shape[2], x.shape[2]) for x in self._take(groups, index))
        scores = take(self.score_sum).masked_fill(~live.flatten(0, 1), -torch.inf)
        weight, count = (
            take(x).masked_fill(~live.flatten(0, 1), 0.0)[:, :P] for x in (self.weight, self.count)
        )
        pivots = Pivots(k[:, :P], v[:, :P], weight, scores[:, :P].nan_to_num(neginf=0.0), count)
        return Buffers(k[:, P:], v[:, P:], scores[:, P:]), pivots

    def _write(
        self, groups: slice, rows: '_Rows', held: Tensor, merged: Merged, order: Tensor
    ) -> None:
        """Write dense rows back: entries keep their token slots, new ones are given free slots."""
        buffers, pivots = merged.buffers, merged.pivots
        live = torch.cat((pivots.count > 0, buffers.score > -torch.inf), 1).view(held.shape)
        live &= rows.valid[..., None]
        self._free(groups, held.masked_fill(live, -1))
        wanted = live & (held < 0)
        self._make_room(groups, rows, wanted.flatten(1).sum(1), order)
        place = self._allocate(groups, wanted)
        one = torch.ones_like(buffers.score)
        count = torch.cat((pivots.count, one), 1)
        self.books.lost.add_(_total(count.view(held.shape), wanted & (place < 0)))
        place = torch.where(wanted, place, held.masked_fill(~live, -1))  # [g, R, E]
        owner = rows.slot[..., None].expand_as(place)
        index = place.masked_fill(place < 0, self.capacity).flatten(1).long()  # [g, R * E]
        kv = torch.cat((pivots.k, buffers.k), 1), torch.cat((pivots.v, buffers.v), 1)
        put_rows((self._k[groups], self._v[groups]), index + self._first, kv)
        stores = self.weight, self.score_sum, self.count, self.owner
        scalars = (
            torch.cat((pivots.weight, 0 * one), 1),
            torch.cat((pivots.score_sum, buffers.score), 1),
            count,
            owner.masked_fill(place < 0, -1),
        )
        put_rows(tuple(x[groups] for x in stores), index, scalars)
        put_rows((self.table[groups],), rows.slot, (place,))
        self.table[groups, -1] = -1
        self.owner[groups, -1] = -1

    def _free(self, groups: slice, token_slots: Tensor) -> None:
        index = token_slots.masked_fill(token_slots < 0, self.capacity).flatten(1).long()
        self.owner[groups].scatter_(1, index, -1)

    def _allocate(self, groups: slice, wanted: Tensor) -> Tensor:
        """Return a free token slot for each wanted entry [g, R, E], -1 where there is none.

        Pivots are served before buffered tokens.
        """
        free = self.owner[groups, :-1] < 0
        rank_of_free = free.cumsum(1) - 1
        listed = free.new_zeros(len(free), self.capacity + 1, dtype=torch.int64)
        listed.scatter_(
            1,
            rank_of_free.where(free, self.capacity),
            torch.arange(self.capacity, device=free.device).expand_as(free),
        )
        by_entry = wanted.transpose(1, 2).flatten(1)  # [g, E * R]
        rank = by_entry.cumsum(1) - 1
        served = by_entry & (rank < free.sum(1, keepdim=True))
        place = listed.gather(1, rank.clamp(0, self.capacity - 1)).where(served, -1)
        return place.view(len(free), wanted.shape[2], -1).transpose(1, 2).to(self.table.dtype)

    # ---- eviction

    def _eviction_order(self, touched: Tensor) -> Tensor:
        """Return voxel slots [V], the first to go first; free and ``touched`` ones at the end."""
        keys = self.voxels.key_of_slot()
        protected = voxel_value.marked(touched, self.voxels.capacity) | (keys == NOWHERE)
        return voxel_value.eviction_order(keys, self.value, protected)

    def _evict_voxels(self, order: 'voxel_value.Order', wanted: Tensor) -> None:
        """Free voxel slots until ``wanted`` (a scalar on the device) are free."""
        missing = wanted - (self.voxels.capacity - self.voxels.count)
        chosen = torch.arange(len(order.slots), device=order.slots.device) < missing
        gone = torch.zeros_like(chosen)
        gone[order.slots] = chosen & (order.rank < order.num_evictable)
        if may_hold(gone):
            self._drop_rows(slice(None), gone.expand(self.num_groups, -1))
            self.voxels.remove(gone)
            self.value.masked_fill_(gone, 0.0)

    def _make_room(self, groups: slice, rows: '_Rows', wanted: Tensor, order) -> None:
        """Drop rows of the least useful voxels in each group [g] until its new tokens fit."""
        missing = wanted - (self.owner[groups, :-1] < 0).sum(1)
        if not may_hold(missing > 0):
            return
        held = (self.table[groups, :-1] >= 0).sum(2)[:, order.slots]  # [g, V] in order
        before = held.cumsum(1) - held
        chosen = (before < missing[:, None]) & (order.rank < order.num_evictable)
        gone = torch.zeros_like(chosen)
        gone[:, order.slots] = chosen
        self._drop_rows(groups, gone)

    def _drop_rows(self, groups: slice, gone: Tensor) -> None:
        """Free the token slots of the rows marked in ``gone`` [g, V]."""
        owner = self.owner[groups]
        index = owner.clamp_min(0).long()
        freed = gone.gather(1, index) & (owner >= 0)
        self.books.evicted.add_(_total(self.count[groups], freed))
        owner.masked_fill_(freed, -1)
        self.table[groups, :-1].masked_fill_(gone[..., None], -1)

    def _carry(self, groups: slice, rows: '_Rows', overflow: Tokens) -> None:
        """Keep the best overflowing tokens of each group for the next step; others are lost."""
        g, R = rows.slot.shape
        room = self.carried.score.shape[1]
        waiting = overflow.row < g * R
        group = (overflow.row // R).where(waiting, g)
        order = overflow.score.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        group = group[order]
        bounds = torch.arange(g + 1, device=group.device)
        rank = torch.arange(len(group), device=group.device)
        rank = rank - torch.searchsorted(group, bounds)[group]
        kept = (rank < room) & (group < g)
        self.books.lost.add_(waiting.sum() - kept.sum())
        source = torch.full((g + 1, room + 1), -1, device=group.device)
        source[group.where(kept, g), rank.where(kept, room)] = order.where(kept, -1)
        source = source[:g, :room]
        taken = source.clamp_min(0)
        row = overflow.row[taken].clamp_max(g * R - 1)
        voxel = rows.slot.flatten()[row].clamp_max(self.voxels.capacity - 1)
        key = self.voxels.key_of_slot()[voxel]
        carried = self.carried
        carried.k[groups] = overflow.k[taken].to(carried.k.dtype)
        carried.v[groups] = overflow.v[taken].to(carried.v.dtype)
        carried.score[groups] = overflow.score[taken].masked_fill(source < 0, -torch.inf)
        carried.key[groups] = key.masked_fill(source < 0, NOWHERE)


class _Rows(NamedTuple):
    """The rows that the tokens of a tile of groups touch."""

    slot: Tensor  # [g, R] voxel slot, V (the spare row of the table) where not valid
    valid: Tensor  # [g, R] bool
    row_of_token: Tensor  # [g, n] flat row g * R + r, g * R (past the end) for none

    @classmethod
    def of(cls, slot: Tensor, num_voxels: int) -> '_Rows':
        """Number the different voxel slots [g, n] of each group; -1 is no voxel."""
        g, n = slot.shape
        key = slot.where(slot >= 0, num_voxels)
        in_order, order = key.sort(dim=1, stable=True)
        first = torch.ones_like(in_order, dtype=torch.bool)
        first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
        first &= in_order < num_voxels
        local_in_order = first.cumsum(1) - 1
        # On the CPU the number of rows costs nothing to know; a GPU takes the upper bound.
        R = max(1, int(first.sum(1).max())) if kernel.counted_on_host(slot.device) else n
        local = torch.empty_like(local_in_order).scatter_(1, order, local_in_order)
        offset = torch.arange(g, device=slot.device)[:, None] * R
        slots = torch.full((g, R + 1), -1, device=slot.device)
        slots.scatter_(1, local_in_order.where(first, R), in_order)
        slots = slots[:, :R]
        flat = (local + offset).where(slot >= 0, g * R)
        return cls(slots.where(slots >= 0, num_voxels), slots >= 0, flat)


def index_type(largest: int) -> torch.dtype:
    """Return the narrowest type that holds -1 to ``largest``."""
    return torch.int16 if largest < NARROW else torch.int32


def may_hold(mask: Tensor) -> bool:
    """Return whether any element is true: asked of the CPU, taken as possible of a GPU."""
    return not kernel.counted_on_host(mask.device) or bool(mask.any())


def _total(count: Tensor, mask: Tensor) -> Tensor:
    """Return how many tokens the marked entries stand for."""
    return count.masked_fill(~mask, 0.0).sum(dtype=torch.float64).long()
