"""Host-side book of which frame lives in which slot; no tensor is involved."""

from collections.abc import Sequence

from stream3r_core.errors import CacheError


class FrameSlots:
    """Equal slots for whole frames; the frames of an unfinished step hold *open* slots."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.slot_of: dict[int, int] = {}  # frame index -> slot, in time order
        self.open: list[int] = []

    def begin(self, num_frames: int) -> None:
        """Open a slot for each new frame, the lowest free ones."""
        free = sorted(set(range(self.capacity)) - set(self.slot_of.values()))
        if num_frames > len(free):
            raise CacheError(
                f'{num_frames} frames at once, but the cache was made for {len(free)}; '
                'set cache.chunk_size to the number of frames of a step'
            )
        self.open = free[:num_frames]

    def close(self, frames: Sequence[int | None]) -> None:
        """Give the open slots to these frame indices; None frees a slot."""
        for slot, frame in zip(self.open, frames):
            if frame is not None:
                self.slot_of[frame] = slot
        self.open = []

    def release(self, frame: int) -> int:
        """Free the slot of a frame and return it."""
        return self.slot_of.pop(frame)

    def clear(self) -> None:
        """Free all slots."""
        self.slot_of = {}
        self.open = []

    @property
    def used(self) -> list[int]:
        """Slots with content, the open ones included, in order."""
        return sorted([*self.slot_of.values(), *self.open])


def number_frames(first: int, keep: Sequence[bool]) -> list[int | None]:
    """Number the frames that are kept from ``first`` on; None for the others."""
    numbers = iter(range(first, first + len(keep)))
    return [next(numbers) if kept else None for kept in keep]
