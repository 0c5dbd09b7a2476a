"""The worker: newest wins, every drop is counted, and no exception is lost or fatal."""

import gc
import threading
import weakref

import pytest

from stream3r_core.errors import InputError, Stream3rError
from stream3r_ros.worker import MAX_WAITING_CALLS, Worker

TIMEOUT_S = 20


class Harness:
    """A worker that notes what becomes of each item, and blocks on 'block' until it is let go."""

    def __init__(self):
        self.processed, self.rejected, self.failures = [], [], []
        self.busy, self.go_on, self.changed = (
            threading.Event(),
            threading.Event(),
            threading.Condition(),
        )
        self.worker = Worker(
            self.process,
            lambda error: self.note(self.rejected, error),
            lambda error: self.note(self.failures, error),
        )
        self.worker.start()

    def process(self, item):
        if item == 'block':
            self.busy.set()
            assert self.go_on.wait(TIMEOUT_S)
        if isinstance(item, Exception):
            raise item
        self.note(self.processed, item)

    def note(self, where, what):
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def block(self):
        self.worker.offer('block')
        assert self.busy.wait(TIMEOUT_S)

    def settle(self, num_items):
        """Let the worker go on and wait until it has dealt with this many items."""
        self.go_on.set()
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.processed + self.rejected + self.failures) == num_items, TIMEOUT_S
            )


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.go_on.set()
    assert made.worker.stop(TIMEOUT_S)


def test_an_item_is_processed_once(harness):
    harness.worker.offer('a')
    harness.settle(1)
    assert harness.processed == ['a'] and harness.worker.drops == {}


def test_newest_wins_and_each_superseded_item_is_counted(harness):
    harness.block()
    for item in 'abcd':
        harness.worker.offer(item)
    harness.settle(2)
    assert harness.processed == ['block', 'd']
    assert harness.worker.drops == {'superseded': 3}


def test_offering_never_waits_for_the_item_in_work(harness):
    harness.block()
    harness.worker.offer('a')  # returns although 'block' holds the thread
    assert harness.processed == []


def test_a_bad_item_is_counted_reported_and_survived(harness):
    error = InputError('bad')
    harness.worker.offer(error)
    harness.settle(1)
    harness.worker.offer('next')
    harness.settle(2)
    assert harness.rejected == [error] and harness.processed == ['next']
    assert harness.worker.drops == {'rejected': 1} and harness.worker.failure is None


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), Stream3rError('cache is full')])
def test_an_unexpected_exception_reaches_the_owner_and_holds_the_worker(harness, error):
    harness.worker.offer(error)
    harness.settle(1)
    harness.worker.offer('dropped')
    assert harness.failures == [error] and harness.worker.failure is error
    assert harness.processed == [] and harness.worker.drops == {'failed': 2}


def test_a_kept_failure_does_not_keep_the_memory_of_its_item():
    class Big:
        pass

    alive, failed = [], threading.Event()

    def process(item):
        big = Big()
        alive.append(weakref.ref(big))
        raise RuntimeError

    worker = Worker(process, print, lambda error: failed.set())
    worker.start()
    worker.offer('item')
    assert failed.wait(TIMEOUT_S)
    worker.submit(gc.collect).result(TIMEOUT_S)
    assert worker.failure is not None and alive[0]() is None
    assert worker.stop(TIMEOUT_S)


def test_a_worker_that_waits_keeps_nothing_of_what_it_did():
    class Big:
        pass

    item, seen = Big(), threading.Event()
    worker = Worker(lambda item: seen.set(), print, print)
    worker.start()
    alive = weakref.ref(item)
    worker.offer(item)
    assert seen.wait(TIMEOUT_S)
    del item
    for _ in range(1000):  # the thread lets go of it just after ``seen``
        if alive() is None:
            break
        threading.Event().wait(0.01)
    assert alive() is None
    assert worker.stop(TIMEOUT_S)


def test_what_waited_behind_a_failure_is_dropped_and_counted(harness):
    blocked = threading.Event()

    def process(item):
        blocked.set()
        assert harness.go_on.wait(TIMEOUT_S)
        raise RuntimeError(item)

    failed = threading.Event()
    worker = Worker(process, print, lambda error: failed.set())
    worker.start()
    worker.offer('first')
    assert blocked.wait(TIMEOUT_S)
    worker.offer('second')
    harness.go_on.set()
    assert failed.wait(TIMEOUT_S)
    assert worker.drops == {'failed': 2} and str(worker.failure) == 'first'
    assert worker.stop(TIMEOUT_S)


def test_a_cleared_failure_lets_items_pass_again(harness):
    harness.worker.offer(RuntimeError())
    harness.settle(1)
    harness.worker.clear_failure()
    harness.worker.offer('next')
    harness.settle(2)
    assert harness.processed == ['next']


def test_a_reporter_that_raises_does_not_end_the_thread(harness, caplog):
    reported, processed = threading.Event(), threading.Event()

    def process(item):
        if item == 'bad':
            raise InputError('bad')
        processed.set()

    def report(error):
        reported.set()
        raise ValueError('reporter')

    worker = Worker(process, report, report)
    worker.start()
    worker.offer('bad')
    assert reported.wait(TIMEOUT_S)
    worker.offer('good')
    assert processed.wait(TIMEOUT_S)
    assert worker.stop(TIMEOUT_S) and 'could not report: bad' in caplog.text


def test_calls_run_on_the_thread_before_the_next_item(harness):
    harness.block()
    harness.worker.offer('a')
    future = harness.worker.submit(
        lambda: (threading.current_thread().name, list(harness.processed))
    )
    harness.settle(2)
    assert future.result(TIMEOUT_S) == ('inference', ['block'])
    assert harness.processed == ['block', 'a']


def test_an_exception_of_a_call_goes_to_its_caller_only(harness):
    def fail():
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        harness.worker.submit(fail).result(TIMEOUT_S)
    assert harness.failures == [] and harness.worker.failure is None


def test_waiting_calls_are_bounded(harness):
    harness.block()
    futures = [harness.worker.submit(lambda: 'ran') for _ in range(MAX_WAITING_CALLS + 1)]
    with pytest.raises(Stream3rError, match='try again'):
        futures[-1].result(TIMEOUT_S)
    harness.go_on.set()
    assert futures[-2].result(TIMEOUT_S) == 'ran'


def test_discarding_empties_the_mailbox_and_counts(harness):
    harness.block()
    harness.worker.offer('old')
    harness.worker.discard_waiting()
    harness.worker.offer('new')
    harness.settle(2)
    assert harness.processed == ['block', 'new'] and harness.worker.drops == {'superseded': 1}


def test_stop_is_bounded_while_an_item_is_in_work(harness):
    harness.block()
    harness.worker.offer('waiting')
    call = harness.worker.submit(lambda: None)
    assert not harness.worker.stop(timeout_s=0.05)
    with pytest.raises(Stream3rError, match='stopping'):
        call.result(TIMEOUT_S)
    harness.go_on.set()
    assert harness.worker.stop(TIMEOUT_S)
    harness.worker.offer('late')
    assert harness.processed == ['block'] and harness.worker.drops == {'stopped': 2}
    with pytest.raises(Stream3rError, match='stopping'):
        harness.worker.submit(lambda: None).result(TIMEOUT_S)


def test_a_worker_that_never_started_stops():
    assert Worker(print, print, print).stop(0)
