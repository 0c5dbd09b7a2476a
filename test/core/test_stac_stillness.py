"""A standing robot costs nothing, a moving one is never taken for a standing one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from golden_data import MODELS, SIZES, golden_network, images

from stream3r_core.config import CacheConfig, CoreConfig, SessionConfig
from stream3r_core.pipeline import Reconstructor
from stream3r_core.session import StreamSession
from stream3r_core.stillness import StillnessGate

CONFIG = CacheConfig(
    window=2, heavy_hitters=1, retrieved=1, camera_window=2, camera_anchors=4,
    max_bytes=1_500_000,
)  # fmt: skip
EYE = torch.eye(4)
DEPTH = torch.full((84, 112), 2.0)


def session(model='stream3r', **changes):
    return StreamSession(
        golden_network(model), 'stac', cache=dataclasses.replace(CONFIG, **changes)
    )


def noisy(frame, seed, sigma=0.01):
    generator = torch.Generator().manual_seed(seed)
    return (frame + sigma * torch.randn(frame.shape, generator=generator)).clamp(0, 1)


# ---- in a session


def state(session):
    """Return copies of all that the session remembers."""
    camera, gate = session.camera_cache, session._gate
    tensors = [*session.cache.tensors(), camera.kv, camera.bias]
    tensors += [gate._thumbnail, gate._T_world_camera]
    sizes = session.cache.num_bytes, session.cache.num_tokens, camera.num_bytes
    return [x.nan_to_num(7.0) if x.is_floating_point() else x.clone() for x in tensors], sizes


@pytest.mark.parametrize('model', MODELS)
def test_identical_frames_change_neither_bytes_nor_answer(model):
    """One repetition leaves every tensor and number of the session as it was.

    The next one then does the same computation on the same state, and so on: 10,000 repetitions
    are shown by induction. What counts frames is all that goes on.
    """
    frames = images(SIZES[0])[0]
    standing = session(model)
    for frame in (*frames, frames[-1]):
        answers = [standing.step_tensor(frame)]
    states = [state(standing)]
    for _ in range(2):
        answers.append(standing.step_tensor(frames[-1]))
        states.append(state(standing))
    for answer in answers[1:]:
        assert all(torch.equal(answer[name], answers[0][name]) for name in answer)
    for tensors, sizes in states[1:]:
        assert sizes == states[0][1]
        assert all(torch.equal(a, b) for a, b in zip(tensors, states[0][0]))
    assert standing.num_frames == 6 + 1 + 2 and standing.cache.num_frames == 6


def test_after_standing_the_stream_goes_on_as_if_nothing_had_been():
    frames = images(SIZES[0])[0]
    moving, stopping = session(), session()
    for i, frame in enumerate(frames):
        expected = moving.step_tensor(frame)
        got = stopping.step_tensor(frame)
        for _ in range(2 * i):
            stopping.step_tensor(frame)
    for name in ('pose_enc', 'depth', 'world_points'):
        assert torch.equal(expected[name], got[name])


def test_still_frames_of_a_chunk_are_dropped_one_by_one():
    frames = images(SIZES[0])[0]
    chunked = session(chunk_size=4, max_bytes=3_000_000)
    for chunk in (frames[[0, 0, 1, 1]], frames[[1, 2, 2, 2]], frames[[2, 2, 2, 2]]):
        chunked._process(chunk)
    assert chunked.cache.num_frames == 3


def test_a_view_of_a_failed_step_is_not_what_the_next_ones_are_compared_with(monkeypatch):
    frames = images(SIZES[0])[0]
    chunked = session(chunk_size=2, max_bytes=3_000_000)
    chunked._process(frames[:1])
    keep = StillnessGate.keep

    def keep_and_fail(self, *view):
        keep(self, *view)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(StillnessGate, 'keep', keep_and_fail)
        chunked._process(frames[1:3])
    assert chunked._process(frames[1:2])[1] == [False]


def test_still_frames_are_tracked_but_not_mapped():
    config = CoreConfig(
        session=SessionConfig(mode='stac'),
        cache=CONFIG,
        image=dataclasses.replace(CoreConfig().image, long_side=70),
    )
    pipeline = Reconstructor(golden_network('stream3r'), config)
    frames = (images(SIZES[0])[0].permute(0, 2, 3, 1) * 255).byte().numpy()
    predictions = [pipeline.process(frames[i], stamp_ns=n) for n, i in enumerate((0, 0, 1, 1, 1))]
    assert [p.still for p in predictions] == [False, True, False, True, True]
    assert [p.index for p in predictions] == list(range(5))
    points = pipeline.map.points()
    for n in range(5, 30):
        assert pipeline.process(frames[1], stamp_ns=n).T_world_camera.isfinite().all()
    assert len(pipeline.map.points().points_xyz) == len(points.points_xyz)
    assert torch.as_tensor(pipeline.map.points().confidence == points.confidence).all()


def test_switched_off_every_frame_counts():
    frames = images(SIZES[0])[0]
    counting = session(skip_still=False)
    for _ in range(5):
        counting.step_tensor(frames[0])
    assert counting.cache.num_frames == 5


# ---- the decision


def textured(seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    return F.interpolate(coarse, (84, 112), mode='bicubic').clamp(0, 1)[0]


def decide(gate, frame, T=EYE):
    return gate.is_still(gate.look(frame), T, DEPTH)


@pytest.fixture
def gate():
    gate = StillnessGate(CacheConfig(), 14)
    gate.keep(gate.look(textured()), EYE)
    return gate


def test_the_first_frame_is_never_still():
    assert not decide(StillnessGate(CacheConfig(), 14), textured())


def test_sensor_noise_and_exposure_are_no_motion(gate):
    for seed in range(20):
        assert decide(gate, noisy(textured(), seed, sigma=0.02))
    assert decide(gate, textured() + 0.05)


@pytest.mark.parametrize('shift', [1, 2, 5])
def test_a_view_that_shifts_by_pixels_is_not_still(gate, shift):
    assert not decide(gate, textured().roll(shift, 2))


def test_slow_motion_adds_up_to_a_new_view(gate):
    frame = F.pad(textured()[None], (8, 8, 8, 8), mode='replicate')
    decisions = []
    for step in range(60):
        theta = torch.tensor([[[1, 0, 0.0005 * step], [0, 1, 0]]])
        grid = F.affine_grid(theta, (1, 3, 84, 112), align_corners=False)
        moved = F.grid_sample(frame, grid, align_corners=False)[0]
        if step == 0:
            gate.keep(gate.look(moved), EYE)
        decisions.append(decide(gate, moved))
    assert decisions[1] and not decisions[-1]


def moving_things(frame):
    frame = frame.clone()
    frame[:, 20:70, 10:45] = textured(5)[:, 20:70, 10:45]
    return frame


def with_position(x):
    T = torch.eye(4)
    T[0, 3] = x
    return T


def test_people_in_front_of_a_standing_camera_need_both_witnesses(gate):
    assert decide(gate, moving_things(textured()))
    assert not decide(gate, moving_things(textured()), with_position(0.05))


def test_a_network_that_always_predicts_the_same_pose_is_not_believed(gate):
    assert not decide(gate, textured(3), EYE)


def test_turning_counts_as_motion(gate):
    T = torch.eye(4)
    angle = torch.tensor(0.02)
    T[0, 0] = T[2, 2] = angle.cos()
    T[0, 2], T[2, 0] = angle.sin(), -angle.sin()
    assert not decide(gate, moving_things(textured()), T)
