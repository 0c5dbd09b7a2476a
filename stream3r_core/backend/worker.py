"""The back end in a thread of its own, behind a bounded queue."""

import queue
import threading
from collections.abc import Callable

import numpy as np

from stream3r_core.backend.backend import BackendUpdate, SubmapBackend

_STOP = object()


class BackendWorker:
    """Searches revisits and optimises in a thread of its own, in the order of :meth:`follow`.

    The owner tracks: ``worker.follow(backend.track(prediction, frame_id), descriptor)``.
    Nothing is dropped: a full queue makes :meth:`follow` wait. An exception of the back end ends
    the thread and is raised by the next call of the owner, with its own traceback. ``on_update``
    is called in the worker's thread after every frame. A context manager: leaving it
    waits for what is queued, or, on an exception, drops it.
    """

    def __init__(
        self,
        backend: SubmapBackend,
        max_pending: int = 100,
        on_update: Callable[[BackendUpdate], None] | None = None,
    ):
        self.backend = backend
        self._on_update = on_update
        self._queue: queue.Queue = queue.Queue(max_pending)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name='backend', daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Frames that wait."""
        return self._queue.qsize()

    def follow(
        self,
        update: BackendUpdate,
        descriptor: np.ndarray | Callable[[], np.ndarray] | None = None,
    ) -> None:
        """Queue a tracked frame."""
        self._put((update, descriptor))

    def flush(self) -> None:
        """Wait until everything queued is done and the graph has settled."""
        done = threading.Event()
        self._put(done)
        while not done.wait(0.1):
            self._raise_error()
        self._raise_error()

    def close(self, drop: bool = False) -> None:
        """End the thread, after what is queued or, with ``drop``, before it. May be repeated."""
        if drop:
            self._empty_queue()
        if not self._ended.is_set():
            self._put(_STOP)
        self._thread.join()
        self._raise_error()

    def __enter__(self) -> 'BackendWorker':
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        self._empty_queue()
        self._error = None  # the owner's own exception goes first
        if not self._ended.is_set():
            self._queue.put(_STOP)
        self._thread.join()

    def _put(self, item) -> None:
        """Queue an item, unless the thread has ended."""
        while True:
            self._raise_error()
            if self._ended.is_set():
                raise RuntimeError('the back end worker is closed')
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _empty_queue(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not _STOP:
                if isinstance(item, threading.Event):
                    self.backend.settle()
                    item.set()
                    continue
                update = self.backend.follow(*item)
                if self._on_update is not None:
                    self._on_update(update)
        except BaseException as error:  # handed to the owner, whatever it is
            self._error = error
        finally:
            self._ended.set()
