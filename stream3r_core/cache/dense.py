"""Dense cache: every frame is kept (mode causal)."""

from torch import Tensor

from stream3r_core.cache.slots import SlotCache
from stream3r_core.errors import CacheError

GROWTH = 1.5  # amortised: copying costs less than two writes per token over the whole stream


def full_cache_message(max_frames: int) -> str:
    """Say that a causal stream has reached its limit, and what to do."""
    return (
        f'the causal cache is full: it holds {max_frames} frames (session.max_frames); raise the '
        'limit, reset the session, or use a bounded mode such as window'
    )


class DenseCache(SlotCache):
    """Keep all frames in storage that grows in steps, or is given at once by ``max_frames``.

    A causal stream has no bound of its own: with ``max_frames`` > 0 the cache refuses the frame
    beyond it with a :class:`CacheError`, before anything is written.
    """

    def __init__(
        self, num_layers: int, max_frames: int = 0, updates_per_frame: int = 1, bits: int = 0
    ):
        super().__init__(num_layers, updates_per_frame, bits)
        self.max_frames = max_frames

    def _initial_slots(self) -> int:
        return self.max_frames or 8

    def _open_slot(self) -> int:
        return self.num_frames

    def _live_slots(self) -> int:
        return self.num_frames + 1

    def _slots_in_time_order(self) -> list[int]:
        return list(range(self.num_frames))

    def _ensure_capacity(self, layer: int, slots: int) -> None:
        old = self._storage[layer]
        if slots * self._slot_tokens <= old.shape[3]:
            return
        if self.max_frames:
            raise CacheError(full_cache_message(self.max_frames))
        self._storage[layer] = self._grown(old, int(slots * GROWTH) + 1)

    def _grown(self, old: Tensor, slots: int) -> Tensor:
        # One layer at a time: the peak is one layer above the old and new sizes, not the double.
        shape = list(old.shape)
        shape[3] = slots * self._slot_tokens
        new = old.new_empty(shape)
        new[:, :, :, : old.shape[3]] = old
        return new
