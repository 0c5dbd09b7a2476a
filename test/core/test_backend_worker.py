"""The back end's thread: same result as without, bounded, and its errors reach the owner."""

import threading

import numpy as np
import pytest
from backend_walks import FRAMES, make_backend

from stream3r_core.backend.worker import BackendWorker
from stream3r_core.errors import InputError
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk

SESSIONS = [range(0, 24), range(21, 45)]
TIMEOUT_S = 60


def front_end():
    return SimulatedFrontEnd(make_walk('corridor', 1), 1, session_frames=FRAMES)


def frames():
    source = front_end()
    return [(p, i, source.descriptor(i)) for r in SESSIONS for i, p in source.session(r)]


def put(worker, prediction, frame, descriptor):
    worker.follow(worker.backend.track(prediction, frame), descriptor)


def keyframe_updates(backend, count):
    """Updates that make work, tracked by another back end of the same walk."""
    updates = [(backend.track(p, f), d) for p, f, d in frames()]
    return [(u, d) for u, d in updates if u.is_keyframe][:count]


class Gate:
    """Holds the worker in its callback until it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, update):
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)


def test_the_thread_gives_what_the_same_calls_give():
    direct = make_backend(front_end())
    for item in frames():
        direct.add(*item)
    updates = []
    with BackendWorker(make_backend(front_end()), on_update=updates.append) as worker:
        for prediction, frame, descriptor in frames():
            put(worker, prediction, frame, descriptor)
        worker.flush()
        np.testing.assert_array_equal(worker.backend.trajectory()[2], direct.trajectory()[2])
    assert len(updates) == 48 and updates[0].joint is not None


def test_a_full_queue_makes_the_caller_wait_and_drops_nothing():
    gate = Gate()
    backend = make_backend(front_end())
    worker = BackendWorker(backend, max_pending=2, on_update=gate)
    items = keyframe_updates(backend, 8)
    sent = []

    def send():
        for item in items:
            worker.follow(*item)
            sent.append(item)

    sender = threading.Thread(target=send)
    sender.start()
    assert gate.entered.wait(TIMEOUT_S)
    while worker.num_pending < 2:  # the sender fills the queue
        assert sender.is_alive()
    assert len(sent) <= 4 and worker.num_pending == 2
    gate.opened.set()
    sender.join(TIMEOUT_S)
    worker.close()
    assert len(items) == 8 and len(backend.places) == 8


@pytest.mark.parametrize('call', ['follow', 'flush', 'close'])
def test_an_error_of_the_back_end_reaches_the_next_call_of_the_owner_once(call):
    worker = BackendWorker(make_backend(front_end()))
    first, second = keyframe_updates(worker.backend, 2)
    worker.follow(first[0], np.full(8, np.nan))
    worker._thread.join(TIMEOUT_S)
    with pytest.raises(InputError, match='finite descriptor'):
        getattr(worker, call)(*(second if call == 'follow' else ()))
    worker.close()
    with pytest.raises(RuntimeError, match='closed'):
        worker.follow(*second)


def test_leaving_by_an_exception_drops_what_waits_and_keeps_the_exception():
    gate = Gate()
    with pytest.raises(KeyError, match='mine'):
        with BackendWorker(make_backend(front_end()), on_update=gate) as worker:
            for item in keyframe_updates(worker.backend, 5):
                worker.follow(*item)
            assert gate.entered.wait(TIMEOUT_S)
            threading.Timer(0.05, gate.opened.set).start()
            raise KeyError('mine')
    assert len(worker.backend.places) < 5
    assert not worker._thread.is_alive()


def test_readers_on_other_threads_see_whole_states():
    backend = make_backend(front_end())
    stop, problems = threading.Event(), []

    def read():
        while not stop.is_set():
            frame_ids, _, poses = backend.trajectory()
            change, cloud = backend.atlas.changed_since(-1), backend.atlas.cloud()
            rows = change.rows.values()
            if len(frame_ids) != len(poses) or any(len(r.cloud) != len(r.weight) for r in rows):
                problems.append('torn')
            if len(cloud.points_xyz) != len(cloud.confidence):
                problems.append('uneven')

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        with BackendWorker(backend) as worker:
            for item in frames():
                put(worker, *item)
    finally:
        stop.set()
        for reader in readers:
            reader.join(TIMEOUT_S)
    assert not problems
