"""The causal cache with frames in host memory equals the one on the device."""

import pytest
import torch
from golden_data import MODELS, SIZES, golden_network, images

from stream3r_core.cache.offload import OffloadedCache
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


def test_reset_keeps_storage_while_it_fits_and_frees_it_otherwise():
    cache = OffloadedCache(num_layers=2, device_frames=1)

    def frames(tokens, dtype=torch.float32):
        cache.reset()
        for _ in range(3):
            for layer in range(2):
                k = torch.rand(1, 2, tokens, 8, dtype=dtype)
                seen = cache.update(layer, k, k)
            cache.commit(1)
        assert seen.k.dtype == dtype and cache.num_tokens == seen.k.shape[2] == 3 * tokens
        return [x.data_ptr() for x in (*cache._near, *cache._far, cache._whole)]

    first = frames(5)
    sizes = cache.capacity_bytes, cache.host_bytes
    assert frames(5) == first and (cache.capacity_bytes, cache.host_bytes) == sizes
    frames(5, torch.float64)
    assert cache.capacity_bytes == 2 * sizes[0]
    frames(4)
    assert cache.capacity_bytes < sizes[0]


@pytest.mark.gpu
def test_host_storage_grows_only_when_all_copies_into_it_are_done():
    """Frames far larger than the host can wait for by chance: what comes back is what went in."""
    cache = OffloadedCache(num_layers=1, device_frames=1)
    frames = [torch.full((1, 16, 4096, 64), float(i), device='cuda') for i in range(12)]
    for k in frames:
        seen = cache.update(0, k, k)
        cache.commit(1)
    assert torch.equal(seen.k, torch.cat(frames, 2))


def _fail(*args):
    raise MemoryError
