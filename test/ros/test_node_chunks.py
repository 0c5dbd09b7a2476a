"""Chunks in the live node: images that wait for a full chunk are never lost in silence."""

import signal

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import stamp

from stream3r_core.evaluation.trajectory_files import read_trajectory

pytestmark = pytest.mark.ros

CHUNKS = {
    'session.mode': 'stac', 'cache.chunk_size': 4, 'cache.max_bytes': 40_000_000,
    'outputs.path.max_rate_hz': 0,
}  # fmt: skip

# A node that takes what time a busy machine needs to process its last images.
PATIENT = """
import sys
import stream3r_ros.node
from stream3r_ros.cli import main
stream3r_ros.node.CLOSE_TIMEOUT_S = 100.0
sys.exit(main(sys.argv[1:]))
"""
# A node that finds no memory to store the second and the third chunk in.
WITHOUT_MEMORY = """
import sys
from stream3r_core.cache.camera import CameraCache
from stream3r_ros.cli import main

stored = 0
commit = CameraCache.commit

def commit_or_fail(self, *args, **kwargs):
    global stored
    stored += 1
    if stored in (2, 3):
        raise MemoryError('no room')
    return commit(self, *args, **kwargs)

CameraCache.commit = commit_or_fail
sys.exit(main(sys.argv[1:]))
"""


def send(live, *indices):
    """Send images one by one; an image that waits for its chunk gives no transform yet."""
    for index in indices:
        before = live.figure('images_processed')
        live.camera.publish(live.image(index))
        live.wait_until(lambda n=before: live.figure('images_processed') == n + 1)


def test_images_of_an_unfinished_chunk_come_out_at_deactivation_saving_and_exit(live, tmp_path):
    live.entry = ('-c', PATIENT)
    live.start(**CHUNKS, **{'save_map.directory': str(tmp_path), 'save_map.on_exit': 'true'})
    live.connect_camera()
    send(live, *range(6))
    assert len(live.wait_for('/tf', 4)) == 4
    transition = Transition(id=Transition.TRANSITION_DEACTIVATE)
    assert live.request(ChangeState, 'change_state', transition=transition).success
    live.wait_for_path(*range(6))
    transition = Transition(id=Transition.TRANSITION_ACTIVATE)
    assert live.request(ChangeState, 'change_state', transition=transition).success
    live.wait_until(lambda: live.figure('state') == 'active')
    send(live, 6)
    assert live.call('save_map').success
    live.wait_for_path(*range(7))
    send(live, 7, 8)
    live.process.send_signal(signal.SIGINT)
    assert live.wait_for_end() == 0
    (trajectory,) = tmp_path.rglob('*.tum')
    assert read_trajectory(trajectory).stamps_ns.tolist() == list(map(stamp, range(9)))


def test_a_step_that_cannot_be_stored_costs_the_session_and_not_the_map(live):
    live.entry = ('-c', WITHOUT_MEMORY)
    live.start(**{**CHUNKS, 'cache.chunk_size': 2, 'on_failure': 'exit'})
    live.connect_camera()
    rejected = live.figure('images_dropped.rejected')
    send(live, 0, 1, 2)
    points = live.figure('map_points')
    assert points > 0
    live.camera.publish(live.image(3))
    live.wait_until(lambda: live.figure('restarts.incomplete_memory') == 1)
    live.wait_until(lambda: live.figure('images_dropped.rejected') == rejected + 1)
    assert live.figure('images_dropped.chunk') == 1 and live.figure('map_points') == points
    send(live, 4)
    assert live.call('reset').success  # its unfinished chunk fails, and the reset does not
    live.wait_until(lambda: live.figure('images_dropped.chunk') == 2)
    assert 'no room' in live.log
    send(live, 5, 6)
    live.wait_for_path(5, 6)
