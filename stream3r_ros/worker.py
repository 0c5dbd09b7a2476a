"""The inference thread: a newest-wins mailbox in front, one owner of network and map behind.

No ROS in here. Whoever offers an item never waits; whatever goes wrong on the thread reaches the
owner through a callback, and the thread lives on until it is stopped.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from stream3r_core.errors import InputError, Stream3rError

Item = TypeVar('Item')

MAX_WAITING_CALLS = 16
_EMPTY: Any = object()
_log = logging.getLogger(__name__)


class Worker(Generic[Item]):
    """Runs ``process(item)`` on the newest item offered, one at a time, on a thread of its own.

    An item that ``process`` refuses with :class:`InputError` is counted as ``'rejected'``, given
    to ``on_rejected(error)``, and the next one is taken. Any other exception is a failure: it is
    kept in :attr:`failure`, given to ``on_failure(error)``, and items offered from then on are
    dropped until :meth:`clear_failure`. Both callbacks run on the worker's thread. :attr:`drops`
    counts every item that was offered and not processed, by reason: ``'superseded'`` by a newer
    one, ``'rejected'``, ``'failed'``, ``'stopped'``.
    """

    def __init__(
        self,
        process: Callable[[Item], None],
        on_rejected: Callable[[InputError], None],
        on_failure: Callable[[Exception], None],
        name: str = 'inference',
    ):
        self._process = process
        self._on_rejected = on_rejected
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._item: Item = _EMPTY
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._drops: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def offer(self, item: Item) -> None:
        """Put an item into the mailbox; one that still waits there is dropped for it."""
        with self._changed:
            if self._failure is not None or self._stopping:
                self._drops['stopped' if self._stopping else 'failed'] += 1
                return
            if self._item is not _EMPTY:
                self._drops['superseded'] += 1
            self._item = item
            self._changed.notify_all()

    def submit(self, function: Callable[[], Any]) -> Future:
        """Run ``function()`` on the thread before the next item; the future holds its outcome.

        The way to touch what ``process`` owns. Works in the failed state too.
        """
        future: Future = Future()
        with self._changed:
            if self._stopping:
                future.set_exception(Stream3rError('the inference thread is stopping'))
            elif len(self._calls) >= MAX_WAITING_CALLS:
                future.set_exception(
                    Stream3rError(
                        f'{MAX_WAITING_CALLS} requests are waiting already; try again later'
                    )
                )
            else:
                self._calls.append((function, future))
                self._changed.notify_all()
        return future

    def discard_waiting(self) -> None:
        """Empty the mailbox; the item in it counts as superseded."""
        with self._changed:
            self._discard('superseded')

    def clear_failure(self) -> None:
        """Take items again after a failure, when its cause has been dealt with."""
        with self._changed:
            self._failure = None

    @property
    def failure(self) -> Exception | None:
        """The exception that put the worker into the failed state."""
        with self._changed:
            return self._failure

    @property
    def drops(self) -> dict[str, int]:
        """Items dropped since the start, by reason."""
        with self._changed:
            return dict(self._drops)

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end after what it is doing; return whether it did in ``timeout_s``.

        What still waits is not done: an item counts as stopped, calls get an error.
        """
        with self._changed:
            self._stopping = True
            self._discard('stopped')
            waiting = list(self._calls)
            self._calls.clear()
            self._changed.notify_all()
        for _, future in waiting:
            future.set_exception(Stream3rError('the inference thread is stopping'))
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _discard(self, reason: str) -> None:
        if self._item is not _EMPTY:
            self._drops[reason] += 1
            self._item = _EMPTY

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work()
            del work  # or a thread that waits keeps alive what it worked on

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next thing to do; calls go before items. None: stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._calls or self._item is not _EMPTY
            )
            if self._stopping:
                return None
            if self._calls:
                function, future = self._calls.popleft()
                return lambda: _resolve(function, future)
            item, self._item = self._item, _EMPTY
            return lambda: self._take(item)

    def _take(self, item: Item) -> None:
        try:
            self._process(item)
        except InputError as error:
            self._count('rejected')
            self._report(self._on_rejected, error)
        except Exception as error:
            with self._changed:
                self._failure = error
                self._drops['failed'] += 1
                self._discard('failed')
            self._report(self._on_failure, error)
            error.__traceback__ = None  # its frames hold the tensors of the failed item

    def _count(self, reason: str) -> None:
        with self._changed:
            self._drops[reason] += 1

    def _report(self, callback: Callable[[Any], None], error: Exception) -> None:
        try:
            callback(error)
        except Exception:  # a reporter that fails must not end the thread
            _log.exception('could not report: %s', error)


def _resolve(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
