"""Window cache: the anchor frame and a ring of recent frames."""

from stream3r_core.cache.slots import SlotCache


class WindowCache(SlotCache):
    """Keep frame 0 and the last ``past_frames`` frames; constant memory, nothing is ever moved.

    Slot 0 is the anchor, the others are a ring with one slot more than ``past_frames``: the open
    frame takes the place of the frame that leaves the window. Attention has no temporal position
    (model.md 5), so the order of slots does not matter.
    """

    def __init__(
        self, num_layers: int, past_frames: int, updates_per_frame: int = 1, bits: int = 0
    ):
        super().__init__(num_layers, updates_per_frame, bits)
        self.past_frames = past_frames

    def _initial_slots(self) -> int:
        return self.past_frames + 2

    def _slot_of(self, frame: int) -> int:
        return 0 if frame == 0 else 1 + (frame - 1) % (self.past_frames + 1)

    def _open_slot(self) -> int:
        return self._slot_of(self.num_frames)

    def _live_slots(self) -> int:
        return 1 + min(self.num_frames, self.past_frames + 1)

    def _slots_in_time_order(self) -> list[int]:
        first_recent = max(1, self.num_frames - self.past_frames)
        recent = range(first_recent, self.num_frames)
        return [self._slot_of(i) for i in (0, *recent)] if self.num_frames else []
