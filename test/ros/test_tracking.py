"""The tracking state follows confidence and motion, patiently in both directions."""

import numpy as np
import pytest
import torch

from stream3r_core.checkpoints import load_model
from stream3r_core.image import ImageGeometry
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import render_sequence
from stream3r_core.types import FramePrediction
from stream3r_ros.config import TrackingConfig
from stream3r_ros.tracking import DEGRADED, LOST, OK, TrackingState, with_fitted_limits

CONFIG = TrackingConfig(
    min_confidence=2.0, lost_confidence=1.2, max_parallax=0.5, max_turn=0.5, patience=3
)
SURE, DOUBTFUL, HOPELESS = 5.0, 1.5, 1.05


def prediction(confidence=SURE, x=0.0, turn=0.0, depth=2.0):
    T = torch.eye(4)
    T[0, 3] = x
    c, s = np.cos(turn), np.sin(turn)
    T[:2, :2] = torch.tensor([[c, -s], [s, c]])
    size = 4, 6
    return FramePrediction(
        index=0,
        stamp_ns=1,
        T_world_camera=T,
        K=torch.eye(3),
        rgb=torch.zeros(*size, 3, dtype=torch.uint8),
        depth=torch.full(size, depth),
        depth_conf=torch.full(size, confidence),
        world_points=None,
        world_points_conf=None,
        geometry=ImageGeometry(size, size, (1.0, 1.0), (0, 0)),
    )


def states(confidences):
    tracking = TrackingState()
    return [tracking.update(prediction(value), CONFIG) for value in confidences]


def test_one_doubtful_frame_degrades_and_patience_brings_back():
    seen = states([SURE, DOUBTFUL, SURE, SURE, SURE])
    assert seen == [OK, DEGRADED, DEGRADED, DEGRADED, OK]


def test_lost_needs_hopeless_frames_in_a_row():
    assert states([HOPELESS, HOPELESS, DOUBTFUL, HOPELESS, HOPELESS])[-1] == DEGRADED
    assert states([HOPELESS] * 3) == [DEGRADED, DEGRADED, LOST]


def test_lost_ends_only_after_sure_frames_in_a_row():
    seen = states([HOPELESS] * 3 + [SURE, SURE, DOUBTFUL, SURE, SURE, SURE])
    assert seen[3:] == [LOST] * 5 + [OK]


def test_an_alternating_stream_does_not_flicker():
    assert set(states([DOUBTFUL, SURE] * 20)) == {DEGRADED}


def test_lost_frames_are_counted():
    tracking = TrackingState()
    for _ in range(10):
        tracking.update(prediction(HOPELESS), CONFIG)
    assert (tracking.state, tracking.num_lost) == (LOST, 8)
    tracking.reset()
    assert (tracking.state, tracking.num_lost) == (OK, 0)


@pytest.mark.parametrize(
    ('x', 'turn', 'depth', 'expected'),
    [
        (0.9, 0.0, 2.0, OK),  # half of the depth is allowed
        (1.1, 0.0, 2.0, DEGRADED),
        (1.1, 0.0, 4.0, OK),  # the same motion in a larger scene
        (0.0, 0.4, 2.0, OK),
        (0.0, 0.6, 2.0, DEGRADED),
    ],
)
def test_a_pose_that_jumps_is_doubted(x, turn, depth, expected):
    tracking = TrackingState()
    tracking.update(prediction(depth=depth), CONFIG)
    assert tracking.update(prediction(x=x, turn=turn, depth=depth), CONFIG) == expected
    assert tracking.quality.parallax == pytest.approx(x / depth)
    assert tracking.quality.turn == pytest.approx(turn, abs=1e-3)


@pytest.mark.parametrize('broken', [{'x': np.nan}, {'depth': 0.0}, {'confidence': np.nan}])
def test_what_is_not_finite_is_hopeless(broken):
    tracking = TrackingState()
    for _ in range(4):
        tracking.update(prediction(**broken), CONFIG)
    assert tracking.state == LOST


def test_a_few_pixels_of_endless_confidence_do_not_hide_the_rest():
    frame = prediction(HOPELESS)
    frame.depth_conf[0, 0] = torch.inf
    tracking = TrackingState()
    tracking.update(frame, CONFIG)
    assert tracking.quality.confidence < 6


def test_limits_that_are_left_open_come_from_the_weights():
    fitted = load_model('tiny').uncertainties['window']
    filled = with_fitted_limits(TrackingConfig(), fitted)
    assert filled.lost_confidence == fitted.covered_confidence
    assert filled.min_confidence >= filled.lost_confidence > 1
    chosen = with_fitted_limits(TrackingConfig(min_confidence=3.0), fitted)
    assert (chosen.min_confidence, chosen.lost_confidence) == (3.0, fitted.covered_confidence)
    assert with_fitted_limits(TrackingConfig(), None).min_confidence == 1.5
    assert with_fitted_limits(CONFIG, fitted) == CONFIG


def test_a_covered_lens_is_lost_and_a_room_is_not():
    """The shipped network in rooms that no fit has seen, and then behind a hand; three of four."""
    model, rng = load_model('tiny'), np.random.default_rng(0)
    limits = with_fitted_limits(TrackingConfig(), model.uncertainties['window'])
    session, ends = StreamSession(model, mode='window', outputs=('depth',)), []
    for seed in range(4):
        room = render_sequence((1 << 40) + 5_000_000 + seed, 12, 48, 64)
        dark = rng.normal(8, 3, (12, *room.images.shape[1:])).clip(0, 255).astype(np.uint8)
        session.reset()
        tracking = TrackingState()
        seen = [tracking.update(session.step(image), limits) for image in (*room.images, *dark)]
        assert seen[12] != OK
        ends.append((seen[11] != LOST, seen[-1] == LOST))
    assert np.sum(ends, 0).min() >= 3, ends
