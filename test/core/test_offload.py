"""The causal cache with frames in host memory equals the one on the device."""

import pytest
import torch
from golden_data import MODELS, SIZES, golden_network, images

from stream3r_core.errors import CacheError
from stream3r_core.session import StreamSession


def stream(session, frames):
    raw = [session.step_tensor(frame) for frame in frames]
    return {name: torch.stack([r[name] for r in raw]) for name in raw[0]}


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('device_frames', [1, 2, 5, 6, 9])
def test_offloaded_stream_equals_the_causal_one(model, device_frames):
    frames = torch.cat((images(SIZES[0])[0], images(SIZES[0])[0].flip(3)))[:9]
    expected = stream(StreamSession(golden_network(model), 'causal'), frames)
    session = StreamSession(golden_network(model), 'causal', device_frames=device_frames)
    got = stream(session, frames)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=2e-5)
    session.reset()
    again = stream(session, frames[:4])
    torch.testing.assert_close(again['depth'], expected['depth'][:4], rtol=1e-4, atol=1e-5)


def test_only_the_first_frames_and_one_layer_live_on_the_device():
    session = StreamSession(golden_network('stream3r'), 'causal', device_frames=2)
    frames = images(SIZES[0])[0]
    sizes = []
    for _ in range(4):
        stream(session, frames)
        sizes.append(session.cache.capacity_bytes)
    cache = session.cache
    frame = cache.num_bytes // 24
    assert cache.num_tokens == 24 * 20
    # Two frames of every layer, and all of one layer with room to grow.
    assert cache.capacity_bytes <= 2 * frame + 1.6 * 24 * frame / 5
    assert cache.host_bytes >= 22 * frame


def test_its_limit_is_that_of_the_causal_cache():
    session = StreamSession(golden_network('stream3r'), 'causal', device_frames=1, max_frames=3)
    frames = images(SIZES[0])[0]
    stream(session, frames[:3])
    with pytest.raises(CacheError, match='holds 3 frames'):
        session.step_tensor(frames[3])
    session.reset()
    stream(session, frames[:3])


def test_a_failed_step_changes_nothing(monkeypatch):
    frames = images(SIZES[0])[0]
    network = golden_network('stream3r')
    expected = stream(StreamSession(network, 'causal', device_frames=2), frames)
    session = StreamSession(network, 'causal', device_frames=2)
    for i, frame in enumerate(frames):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(network.depth_head, 'forward', _fail)
            session.step_tensor(frame.flip(1))
        got = session.step_tensor(frame)
        torch.testing.assert_close(got['depth'], expected['depth'][i], rtol=1e-4, atol=1e-5)


def _fail(*args):
    raise MemoryError
