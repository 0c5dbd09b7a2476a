"""Images that were sent and never came to the node: what DDS says, and what it does not."""

from collections.abc import Callable, Collection
from typing import Any


class LossCounter:
    """Counts by reason the images of a topic that are lost before the node sees them.

    ``'transport'``: DDS has noticed that they did not arrive. ``'unread'``: they made room for
    newer ones in the queue of the subscription, which DDS takes for no loss; the numbers that
    their publisher gives them show the gap. ``publishers()`` returns the identifiers of who
    publishes: numbers of several cannot be told apart, so with more than one only DDS is asked.
    """

    def __init__(self, publishers: Callable[[], Collection[Any]]):
        self._publishers = publishers
        self._known: Collection[Any] = ()  # who published the numbers so far
        self._number: int | None = None  # of the last image
        self._num_missing = self._num_noticed = 0

    def arrived(self, number: int | None) -> None:
        """Note an image; ``number`` counts what its publisher has sent, None: not known."""
        last, self._number = self._number, number
        if number is None or number - 1 == last:
            return
        known, self._known = self._known, self._publishers()
        if last is not None and number > last and len(known) == 1 and known == self._known:
            self._num_missing += number - 1 - last

    def noticed(self, count: int) -> None:
        """Note that DDS has lost images."""
        self._num_noticed += count

    @property
    def by_reason(self) -> dict[str, int]:
        """Lost images; reasons without any are left out."""
        unread = max(0, self._num_missing - self._num_noticed)
        counts = {'transport': self._num_noticed, 'unread': unread}
        return {reason: count for reason, count in counts.items() if count}
