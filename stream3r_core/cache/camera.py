"""Bounded memory of the camera head: pinned, recent and, optionally, spaced frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.cache.frame_slots import FrameSlots, number_frames


class CameraCache(KVCache):
    """Keep pinned frames, the last ``window`` and up to ``num_anchors`` evenly spaced older ones.

    A frame that leaves the window becomes an anchor if its number is a multiple of the spacing;
    when there are too many, the spacing doubles and every other anchor goes, so that the anchors
    span the whole stream. ``window=None`` keeps all frames, in storage that grows.

    A frame is ``updates_per_frame`` tokens per layer: 1, or the number of refinement passes where
    these share a cache. One tensor [2, L, H, slots, D] holds everything; all of it is attended to,
    behind a mask: it is a few dozen tokens.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        window: int | None,
        *,
        pinned_frames: Sequence[int] = (0,),
        num_anchors: int = 0,
        chunk_size: int = 1,
        updates_per_frame: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = 'cpu',
    ):
        self.window = window
        self.pinned_frames = frozenset(pinned_frames)
        self.num_anchors = num_anchors
        self.updates_per_frame = updates_per_frame
        # One anchor above the bound exists until the spacing doubles.
        recent = 8 if window is None else window
        slots = len(self.pinned_frames) + recent + num_anchors + bool(num_anchors) + chunk_size
        self.slots = FrameSlots(slots)
        shape = (2, layers, heads, slots * updates_per_frame, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.bias = torch.full((1, 1, 1, shape[3]), -torch.inf, device=device)
        self.num_frames = 0
        self.spacing = 1
        self._written = [0] * layers

    def begin(self, num_frames: int) -> None:
        """Open slots for the frames of a step."""
        if self.window is None and len(self.slots.slot_of) + num_frames > self.slots.capacity:
            self._grow(3 * self.slots.capacity // 2 + num_frames)
        self.slots.begin(num_frames)
        self._written = [0] * len(self._written)

    def _grow(self, num_slots: int) -> None:
        added = (num_slots - self.slots.capacity) * self.updates_per_frame
        shape = (*self.kv.shape[:3], added, self.kv.shape[4])
        self.kv = torch.cat((self.kv, self.kv.new_zeros(shape)), 3)
        self.bias = torch.cat((self.bias, self.bias.new_full((1, 1, 1, added), -torch.inf)), 3)
        self.slots.capacity = num_slots

    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Write one token per open frame, k, v [1, H, n, D], and return all live tokens."""
        pass_index = self._written[layer]
        for i, slot in enumerate(self.slots.open):
            place = slot * self.updates_per_frame + pass_index
            self.kv[0, layer, :, place] = k[0, :, i]
            self.kv[1, layer, :, place] = v[0, :, i]
            self.bias[..., place] = 0.0
        self._written[layer] += 1
        bias = self.bias
        if self.updates_per_frame > 1:
            bias = self._bias_of_passes(self._written[layer])
        return Attended(self.kv[0, layer, None], self.kv[1, layer, None], bias)

    def _bias_of_passes(self, num_passes: int) -> Tensor:
        """Hide the passes of the open frames that this layer has not seen yet."""
        bias = self.bias.clone()
        for slot in self.slots.open:
            first = slot * self.updates_per_frame
            bias[..., first + num_passes : first + self.updates_per_frame] = -torch.inf
        return bias

    def commit(
        self,
        num_frames: int,
        points: Tensor | None = None,
        conf: Tensor | None = None,
        keep: Sequence[bool] | None = None,
    ) -> None:
        """End the step; frames that are not to be ``keep``-ed leave no trace."""
        frames = number_frames(self.num_frames, [True] * num_frames if keep is None else keep)
        self._hide(s for s, frame in zip(self.slots.open, frames) if frame is None)
        self.slots.close(frames)
        self.num_frames += sum(frame is not None for frame in frames)
        self._written = [0] * len(self._written)
        self._let_go()

    def _let_go(self) -> None:
        if self.window is None:
            return
        first_recent = self.num_frames - self.window
        old = [f for f in self.slots.slot_of if f < first_recent and f not in self.pinned_frames]
        while len(anchors := [f for f in old if f % self.spacing == 0]) > self.num_anchors:
            if not self.num_anchors:
                anchors = []
                break
            self.spacing *= 2
        self._hide(self.slots.release(f) for f in old if f not in anchors)

    def _hide(self, slots) -> None:
        for slot in slots:
            first = slot * self.updates_per_frame
            span = slice(first, first + self.updates_per_frame)
            self.bias[..., span] = -torch.inf
            self.kv[:, :, :, span] = 0.0  # a mask does not hide a NaN: 0 * NaN is NaN

    def rollback(self) -> None:
        """Forget the open frames."""
        self._hide(self.slots.open)
        self.slots.open = []
        self._written = [0] * len(self._written)

    def reset(self) -> None:
        """Forget all frames."""
        self.slots.clear()
        self.kv.zero_()
        self.bias.fill_(-torch.inf)
        self.num_frames = 0
        self.spacing = 1
        self._written = [0] * len(self._written)

    @property
    def num_tokens(self) -> int:
        """Tokens per layer and head that the next frame will find."""
        return len(self.slots.slot_of) * self.updates_per_frame

    @property
    def num_bytes(self) -> int:
        """Bytes of the live keys and values."""
        return self.num_tokens * self.kv[..., 0, :].numel() * self.kv.element_size()

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated."""
        return self.kv.nbytes + self.bias.nbytes
