"""When a session restarts: by length, by a pause, by lost tracking; and not otherwise."""

from dataclasses import replace

import pytest

from stream3r_core.backend.config import SubmapConfig
from stream3r_core.backend.restart import RestartPolicy
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk

SECOND = 1_000_000_000


@pytest.fixture(scope='module')
def prediction():
    _, first = next(SimulatedFrontEnd(make_walk('corridor', 0), 0).session(range(2)))
    return first


def at(prediction, second, confidence=None):
    conf = prediction.depth_conf if confidence is None else prediction.depth_conf * 0 + confidence
    return replace(prediction, stamp_ns=int(second * SECOND), depth_conf=conf)


def test_a_session_ends_after_its_frames(prediction):
    policy = RestartPolicy(SubmapConfig(max_frames=4))
    for _ in range(3):
        assert [policy.reason(prediction) for _ in range(4)] == ['', '', '', 'length']
        policy.reset()


def test_a_pause_and_time_that_goes_back_end_it(prediction):
    policy = RestartPolicy(SubmapConfig(max_gap_s=1.5))
    assert not policy.is_pause(5 * SECOND)  # the first frame
    policy.reason(at(prediction, 10))
    assert not policy.is_pause(int(11.5 * SECOND))
    assert policy.is_pause(int(11.6 * SECOND))
    assert policy.is_pause(9 * SECOND)
    assert not policy.is_pause(None)
    policy.reset()
    assert not policy.is_pause(99 * SECOND)


def test_lost_confidence_ends_it_and_a_dim_scene_does_not(prediction):
    policy = RestartPolicy(SubmapConfig(min_quality=0.4))
    for k in range(10):
        assert policy.reason(at(prediction, k, 5.0)) == ''
    assert policy.reason(at(prediction, 10, 3.0)) == ''
    assert policy.reason(at(prediction, 11, 1.5)) == 'quality'
    assert policy.reason(at(prediction, 12, float('nan'))) == 'quality'
    policy.reset()
    assert [policy.reason(at(prediction, k, 1.3)) for k in range(10)] == [''] * 10


def test_the_first_frames_have_nothing_to_be_compared_with(prediction):
    policy = RestartPolicy()
    assert policy.reason(at(prediction, 0, 9.0)) == policy.reason(at(prediction, 1, 1.1)) == ''


def test_a_pose_that_is_not_finite_ends_it(prediction):
    lost = replace(prediction, T_world_camera=prediction.T_world_camera * float('nan'))
    assert RestartPolicy().reason(lost) == 'pose'
