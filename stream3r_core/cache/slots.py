"""Fixed slots of whole frames: storage shared by the dense and the window policy."""

from abc import abstractmethod

import torch
from torch import Tensor

from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.kernels import quantized


class SlotCache(KVCache):
    """Frames in equal slots of one tensor per layer; a policy says which slot is next.

    Storage is allocated at the first update, when shape, type and device are known, and reused
    after :meth:`reset` while they stay the same. ``updates_per_frame`` > 1 lets a layer be updated
    several times per frame (the shared camera cache of the published StreamVGGT, model.md 9.3).
    With ``bits`` 8 or 4 keys and values are stored in so many, with a scale per token and head.
    """

    def __init__(self, num_layers: int, updates_per_frame: int = 1, bits: int = 0):
        self.num_layers = num_layers
        self.updates_per_frame = updates_per_frame
        self.bits = bits
        self.num_frames = 0  # frames committed since the last reset
        self._slot_tokens = 0
        self._written = [0] * num_layers  # tokens of the open frame, per layer
        self._storage: list[Tensor] = []  # per layer [2, 1, heads, capacity, head_dim or bytes]

    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Write the tokens into the open slot; return a view of all live slots up to them."""
        if self.bits:
            k, v = (quantized.to_rows(x, self.bits) for x in (k, v))
        if self.num_frames == 0 and not any(self._written):
            self._fit_storage(k)
        slot, live = self._open_slot(), self._live_slots()
        self._ensure_capacity(layer, live)
        start = slot * self._slot_tokens + self._written[layer]
        stop = start + k.shape[2]
        storage = self._storage[layer]
        storage[0, :, :, start:stop] = k
        storage[1, :, :, start:stop] = v
        self._written[layer] += k.shape[2]
        seen = self._visible(storage, slot, stop, live * self._slot_tokens)
        return Attended(*(quantized.of_rows(x, self.bits) if self.bits else x for x in seen))

    def _visible(self, storage: Tensor, slot: int, stop: int, end: int) -> Tensor:
        """Return all live tokens but those of an old frame that the open one is overwriting."""
        if stop == end or stop == (slot + 1) * self._slot_tokens:
            return storage[:, :, :, :end]
        stale_end = (slot + 1) * self._slot_tokens
        if stale_end == end:
            return storage[:, :, :, :stop]
        return torch.cat([storage[:, :, :, :stop], storage[:, :, :, stale_end:end]], dim=3)

    def commit(
        self, num_frames: int, points: Tensor | None = None, conf: Tensor | None = None
    ) -> None:
        """Close the open frame. These policies need neither ``points`` nor ``conf``."""
        self.num_frames += num_frames
        self._written = [0] * self.num_layers

    def rollback(self) -> None:
        """Forget the open frame; it overwrote only a frame that it may not see itself."""
        self._written = [0] * self.num_layers

    def reset(self) -> None:
        """Forget all frames; storage is kept for the next stream."""
        self.num_frames = 0
        self._written = [0] * self.num_layers

    def frames(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of k and v [1, heads, num_tokens, head_dim] in time order (inspection)."""
        slots = [
            slice(s * self._slot_tokens, (s + 1) * self._slot_tokens)
            for s in self._slots_in_time_order()
        ]
        kept = torch.cat([self._storage[layer][:, :, :, s] for s in slots], dim=3)
        if self.bits:
            kept = quantized.dequantize(quantized.of_rows(kept, self.bits))
        k, v = kept
        return k, v

    @property
    def num_tokens(self) -> int:
        """Tokens per layer and head that the next frame will find."""
        return len(self._slots_in_time_order()) * self._slot_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the live keys and values, all layers together."""
        return sum(
            self.num_tokens * (s[..., :1, :].numel() * s.element_size()) for s in self._storage
        )

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated, live or not."""
        return sum(s.numel() * s.element_size() for s in self._storage)

    def _fit_storage(self, k: Tensor) -> None:
        """Allocate storage for tensors like ``k``, or keep what fits."""
        slot_tokens = k.shape[2] * self.updates_per_frame
        shape = (2, *k.shape[:2], slot_tokens * self._initial_slots(), k.shape[3])
        fits = (
            self._storage
            and self._slot_tokens == slot_tokens
            and self._storage[0].shape[:3] == shape[:3]
            and self._storage[0].shape[4] == shape[4]
            and (self._storage[0].dtype, self._storage[0].device) == (k.dtype, k.device)
        )
        if not fits:
            self._slot_tokens = slot_tokens
            self._storage = [k.new_empty(shape) for _ in range(self.num_layers)]

    def _ensure_capacity(self, layer: int, slots: int) -> None:
        """Make room for ``slots`` slots; a policy of fixed size has it from the start."""

    @abstractmethod
    def _initial_slots(self) -> int:
        """Return how many slots to allocate at first."""

    @abstractmethod
    def _open_slot(self) -> int:
        """Return the slot of the frame that is being written."""

    @abstractmethod
    def _live_slots(self) -> int:
        """Return how many slots, from the first, hold frames the open frame may see or is."""

    @abstractmethod
    def _slots_in_time_order(self) -> list[int]:
        """Return the slots that the next frame will find, oldest first."""
