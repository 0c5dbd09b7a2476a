"""Working memory of the bounded cache: recent frames, heavy hitters and retrieved tokens.

Layout. One tensor [2, L, H, N, D] holds keys and values of all layers and heads, the token axis

    [ frame slots: (pinned + window + chunk) x T | heavy hitters | retrieved, or the pool itself ]

A frame keeps its slot until it leaves the window, so nothing is shifted and the attention of a
layer reads one contiguous slice. There is no temporal position, so order means nothing to it;
``bias`` masks what is not live (-inf) and weighs merged tokens (log-count). Which tokens are heavy
hitters differs between layers and heads, how many does not, so the host knows every length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.cache.base import Attended
from stream3r_core.cache.frame_slots import FrameSlots
from stream3r_core.cache.indexing import take_rows
from stream3r_core.cache.retrieval import Retrieved
from stream3r_core.cache.token_pool import Dropped
from stream3r_core.cache.voxel_table import NOWHERE


class Layout(NamedTuple):
    """Sizes of the working memory."""

    layers: int
    heads: int
    head_dim: int
    frame_tokens: int  # T
    frame_slots: int  # pinned + window + chunk
    heavy_hitters: int  # tokens per layer and head
    retrieved: int = 0  # tokens per layer and head, copied from the pool
    pooled: int = 0  # token slots of a pool that is attended to in place

    @property
    def hot(self) -> int:
        """Tokens before those of the pool."""
        return self.frame_slots * self.frame_tokens + self.heavy_hitters

    @property
    def total(self) -> int:
        """Tokens of one layer and head."""
        return self.hot + self.retrieved + self.pooled

    @property
    def has_pool(self) -> bool:
        """Whether dropped tokens are of any use."""
        return self.retrieved + self.pooled > 0

    @property
    def scored(self) -> bool:
        """Whether anything asks for the scores of tokens."""
        return self.heavy_hitters > 0 or self.has_pool


class WorkingCache:
    """Keys, values, scores and mask of the tokens that the next frames attend to."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device):
        def full(value, *shape, dtype=torch.float32):
            return torch.full(shape, value, dtype=dtype, device=device)

        L, H, N = layout.layers, layout.heads, layout.total
        self.layout = layout
        self.slots = FrameSlots(layout.frame_slots)
        self.num_heavy = 0
        # Zeros, not empty: a NaN behind a -inf mask would still poison the softmax.
        self.kv = full(0, 2, L, H, N, layout.head_dim, dtype=dtype)
        own_bias = layout.has_pool  # the log-counts differ between layers and heads
        self.bias = full(-torch.inf, L if own_bias else 1, H if own_bias else 1, 1, N)
        scored = layout.scored
        self.score = full(0, L, H, layout.hot if scored else 0)
        self.received = full(0, L, H, N if scored else 0)  # attention in the open step
        self.heavy_key = full(NOWHERE, L, H, layout.heavy_hitters, dtype=torch.int64)
        self.retrieved_slot = full(-1, L, H, layout.retrieved, dtype=torch.int32)
        self._sees_pool = False

    def tensors(self) -> list[Tensor]:
        """Return everything that is allocated."""
        return [
            *(self.kv, self.bias, self.score, self.received),
            *(self.heavy_key, self.retrieved_slot),
        ]

    # ---- a step: begin, write and attend per layer, close

    def begin(self, num_frames: int) -> None:
        """Open slots for the frames of a step."""
        self.slots.begin(num_frames)
        for slot in self.slots.open:
            self.bias[..., self._span(slot)] = 0.0

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the tokens [1, H, n T, D] of the open frames."""
        T = self.layout.frame_tokens
        for i, slot in enumerate(self.slots.open):
            part = slice(i * T, (i + 1) * T)
            self.kv[0, layer, :, self._span(slot)] = k[0, :, part]
            self.kv[1, layer, :, self._span(slot)] = v[0, :, part]

    def attended(self, layer: int) -> Attended:
        """Return what the new queries of a layer see; no bias while all of it is live."""
        k, v = self.kv[:, layer, None]
        used = self.slots.used
        is_prefix = used == list(range(len(used)))
        heavy_follow = not self.num_heavy or len(used) == self.layout.frame_slots
        if is_prefix and heavy_follow and not self._sees_pool:
            live = len(used) * self.layout.frame_tokens + self.num_heavy
            return Attended(k[:, :, :live], v[:, :, :live])
        bias = self.bias if len(self.bias) == 1 else self.bias[layer, None]
        return Attended(k, v, bias)

    def record(self, layer: int, column_sums: Tensor) -> None:
        """Take the attention [1, H, n] that the tokens of :meth:`attended` received."""
        n = column_sums.shape[2]
        self.received[layer, :, :n] = column_sums[0]
        self.received[layer, :, n:] = 0.0

    def record_scores(self, layer: int, scores: Tensor) -> None:
        """Set the scores [n T] of the open frames' tokens, for all heads of a layer."""
        T = self.layout.frame_tokens
        for i, slot in enumerate(self.slots.open):
            self.score[layer, :, self._span(slot)] = scores[i * T : (i + 1) * T]

    def close(self, frames: Sequence[int | None], decay: float | None) -> None:
        """Name the open frames by their index, or None to forget one; settle the scores.

        A score is the decayed attention received, in units of uniform attention over the hot
        tokens, so that neither the length of the cache nor of the chunk matters. ``decay`` None:
        scores are what :meth:`record_scores` set.
        """
        if self.layout.scored and decay is not None:
            self._settle_scores(decay)
        self._mask(s for s, frame in zip(self.slots.open, frames) if frame is None)
        self.slots.close(frames)

    def _settle_scores(self, decay: float) -> None:
        T = self.layout.frame_tokens
        for slot in self.slots.open:
            self.score[..., self._span(slot)] = 0.0
        num_queries = len(self.slots.open) * T
        scale = self.num_hot / num_queries
        self.score.mul_(decay).add_(self.received[..., : self.layout.hot], alpha=scale)

    def abandon(self) -> None:
        """Forget the open frames as if they had never come."""
        for slot in self.slots.open:
            self.kv[..., self._span(slot), :] = 0.0  # a mask does not hide a NaN
        self._mask(self.slots.open)
        self.slots.open = []

    # ---- eviction and retrieval

    def evict(self, frames: Sequence[int], key: Tensor) -> Dropped | None:
        """Let frames go; their best tokens, and the best of the old, are the heavy hitters.

        ``key`` [len(frames) * T] int64 are the voxels of their tokens. Ties go to the older token.
        Returns what is dropped, for the pool; None if nothing or if nothing is ever retrieved.
        """
        slots = [self.slots.release(frame) for frame in frames]
        if not frames or not self.layout.scored:
            self._mask(slots)
            return None
        index = self._candidates(slots)  # [c] positions, in time order
        key = key.expand(*self.heavy_key.shape[:2], -1)
        key = torch.cat((self.heavy_key[..., : self.num_heavy], key), -1)  # [L, H, c]
        kept, dropped = self._split(index)
        wanted = self.layout.has_pool and dropped.shape[2]
        gone = self._gather(index, key, dropped) if wanted else None
        if kept.shape[2]:
            self._set_heavy(self._gather(index, key, kept))
        self._mask(slots)
        return gone

    def _candidates(self, slots: list[int]) -> Tensor:
        def positions(first: int, count: int) -> Tensor:
            return torch.arange(first, first + count, device=self.kv.device)

        T, first = self.layout.frame_tokens, self._first_heavy
        return torch.cat([positions(first, self.num_heavy), *(positions(s * T, T) for s in slots)])

    def _split(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return which candidates stay and which go, [L, H, *] each, in time order."""
        layout = self.layout
        room = min(layout.heavy_hitters, len(index))
        if room == 0:
            every = torch.arange(len(index), device=index.device)
            every = every.expand(layout.layers, layout.heads, -1)
            return every[..., :0], every
        order = self.score[..., index].argsort(dim=-1, descending=True, stable=True)
        return order[..., :room].sort(-1).values, order[..., room:].sort(-1).values

    def _gather(self, index: Tensor, key: Tensor, chosen: Tensor) -> Dropped:
        """Return the chosen candidates [L, H, n] by layer and head, with voxel keys and scores."""
        position, chosen = index[chosen].flatten(0, 1), chosen.flatten(0, 1)  # [G, n]
        k, v = (take_rows(x.flatten(0, 1), position) for x in self.kv)
        score = take_rows(self.score.flatten(0, 1), position)
        return Dropped(k, v, score, take_rows(key.flatten(0, 1), chosen))

    def _set_heavy(self, tokens: Dropped) -> None:
        shape = self.layout.layers, self.layout.heads
        first, count = self._first_heavy, tokens.key.shape[1]
        span = slice(first, first + count)
        self.kv[0, :, :, span] = tokens.k.unflatten(0, shape)
        self.kv[1, :, :, span] = tokens.v.unflatten(0, shape)
        self.score[..., span] = tokens.score.unflatten(0, shape)
        self.heavy_key[..., :count] = tokens.key.unflatten(0, shape)
        self.bias[..., span] = 0.0
        self.num_heavy = count

    def set_retrieved(self, tokens: Retrieved) -> None:
        """Replace the retrieved tokens; what was retrieved before is forgotten."""
        shape = self.layout.layers, self.layout.heads
        span = slice(self.layout.hot, self.layout.hot + tokens.bias.shape[1])
        self.kv[0, :, :, span] = tokens.k.unflatten(0, shape)
        self.kv[1, :, :, span] = tokens.v.unflatten(0, shape)
        self.bias[:, :, 0, span] = tokens.bias.unflatten(0, shape)
        self.retrieved_slot[..., : tokens.slot.shape[1]] = tokens.slot.unflatten(0, shape)
        self._sees_pool = True

    def show_pool(self, bias: Tensor) -> None:
        """Let the tokens of the pool be seen where they are, with bias [G, pooled]."""
        shape = self.layout.layers, self.layout.heads
        self.bias[:, :, 0, self.layout.hot :] = bias.unflatten(0, shape)
        self._sees_pool = True

    def clear(self) -> None:
        """Forget everything; storage stays."""
        self.slots.clear()
        self.num_heavy = 0
        for store in (self.kv, self.score, self.received):
            store.zero_()
        self.bias.fill_(-torch.inf)
        self.retrieved_slot.fill_(-1)
        self._sees_pool = False

    # ---- sizes

    @property
    def num_hot(self) -> int:
        """Live tokens per layer and head without the retrieved ones, open frames included."""
        return len(self.slots.used) * self.layout.frame_tokens + self.num_heavy

    @property
    def _first_heavy(self) -> int:
        return self.layout.frame_slots * self.layout.frame_tokens

    def _span(self, slot: int) -> slice:
        T = self.layout.frame_tokens
        return slice(slot * T, (slot + 1) * T)

    def _mask(self, slots) -> None:
        for slot in slots:
            self.bias[..., self._span(slot)] = -torch.inf
