"""The streaming session: golden streams, and equality with the batch passes."""

import numpy as np
import pytest
import torch
from golden_data import MAPS, MODELS, SIZES, golden, golden_network, group, images

from stream3r_core.config import CacheConfig, ImageConfig
from stream3r_core.errors import CacheError, ConfigError, InputError
from stream3r_core.session import StreamSession

OUTPUTS = ('pose_enc', *MAPS)


def tolerance(name):
    return {'atol': 1e-5, 'rtol': 0} if name == 'pose_enc' else {'atol': 1e-4, 'rtol': 1e-4}


def stream(session, frames):
    """Stack the raw outputs of frames [S, 3, H, W] fed one by one."""
    raw = [session.step_tensor(frame) for frame in frames]
    return {name: torch.stack([r[name] for r in raw]) for name in raw[0]}


def assert_equal_outputs(actual, expected, names=OUTPUTS):
    for name in names:
        torch.testing.assert_close(actual[name], expected[name][0], **tolerance(name))


def batch(model, size, mode, window=1):
    with torch.inference_mode():
        return golden_network(model)(images(size), mode, window)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('mode, window', [('causal', 5), ('window', 2), ('window', 3)])
def test_published_stream3r_session(size, mode, window):
    name = 'stream_causal' if mode == 'causal' else f'stream_window{window}'
    tensors = golden('stream3r', size, 'stream')
    session = StreamSession(golden_network('stream3r'), mode, window)
    assert_equal_outputs(stream(session, images(size)[0]), group(tensors, name))
    for layer in (0, 4):
        for part, kept in zip('kv', session.cache.frames(layer)):
            key = f'{name}.kv.global.{layer}.{part}'
            if key in tensors:
                torch.testing.assert_close(kept, tensors[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('size', SIZES)
def test_published_camera_cache_of_stream3r(size):
    tensors = golden('stream3r', size, 'stream')
    session = StreamSession(golden_network('stream3r'), 'causal')
    stream(session, images(size)[0])
    for iteration, layer in ((0, 0), (3, 2)):
        for part, kept in zip('kv', session.camera_cache.frames(iteration * 3 + layer)):
            expected = tensors[f'stream_causal.kv.camera.iter{iteration}.layer{layer}.{part}']
            torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('size', SIZES)
def test_published_streamvggt_inference_shares_its_camera_cache(size):
    tensors = golden('streamvggt', size, 'stream')
    session = StreamSession(golden_network('streamvggt'), 'causal', camera_cache='shared')
    actual = stream(session, images(size)[0])
    assert_equal_outputs(actual, group(tensors, 'stream'))
    assert session.camera_cache.num_tokens == 6 * 4


@pytest.mark.parametrize('size', SIZES)
def test_streamvggt_with_a_cache_per_iteration_equals_its_batch_pass(size):
    expected = group(golden('streamvggt', size, 'stream'), 'stream_fixedcam')
    session = StreamSession(golden_network('streamvggt'), 'causal')
    assert_equal_outputs(stream(session, images(size)[0]), expected, ['pose_enc'])


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('window', [1, 2, 3])
@pytest.mark.parametrize('rule, extra', [('exact', 0), ('published', 1)])
def test_windowed_stream_equals_the_windowed_batch(model, window, rule, extra):
    session = StreamSession(golden_network(model), 'window', window, window_rule=rule)
    actual = stream(session, images(SIZES[0])[0])
    assert_equal_outputs(actual, batch(model, SIZES[0], 'window', window + extra))


@pytest.mark.parametrize('model', MODELS)
def test_window_as_long_as_the_stream_equals_causal(model):
    frames = images(SIZES[1])[0]
    windowed = stream(StreamSession(golden_network(model), 'window', 6), frames)
    causal = stream(StreamSession(golden_network(model), 'causal'), frames)
    for name in OUTPUTS:
        torch.testing.assert_close(windowed[name], causal[name], **tolerance(name))


def test_shared_camera_cache_also_works_in_a_window():
    frames = images(SIZES[0])[0]
    long = StreamSession(golden_network('streamvggt'), 'window', 9, camera_cache='shared')
    causal = StreamSession(golden_network('streamvggt'), 'causal', camera_cache='shared')
    expected = stream(causal, frames)['pose_enc']
    torch.testing.assert_close(stream(long, frames)['pose_enc'], expected, atol=1e-5, rtol=0)
    short = StreamSession(golden_network('streamvggt'), 'window', 2, camera_cache='shared')
    stream(short, frames)
    assert short.camera_cache.num_tokens == (1 + 2) * 4


def test_the_cache_tells_its_size():
    session = StreamSession(golden_network('stream3r'), 'window', 2)
    config = golden_network('stream3r').config
    tokens = config.tokens_per_frame(42, 70)
    seen = []
    for frame in images(SIZES[0])[0]:
        session.step_tensor(frame)
        seen.append(session.cache.num_tokens)
        per_token = 2 * config.depth * config.embed_dim * 4
        assert session.cache.num_bytes == session.cache.num_tokens * per_token
        assert session.cache.capacity_bytes == 4 * tokens * per_token
    assert seen == [n * tokens for n in (1, 2, 3, 3, 3, 3)]


def test_reset_starts_over_exactly():
    session = StreamSession(golden_network('stream3r'), 'window', 2)
    first = stream(session, images(SIZES[0])[0])
    session.reset()
    assert session.cache.num_tokens == 0
    again = stream(session, images(SIZES[0])[0])
    assert all(torch.equal(first[name], again[name]) for name in OUTPUTS)


def test_another_size_mid_stream_is_refused_and_the_stream_goes_on():
    frames = images(SIZES[0])[0]
    session = StreamSession(golden_network('stream3r'), 'causal')
    reference = stream(StreamSession(golden_network('stream3r'), 'causal'), frames)
    session.step_tensor(frames[0])
    with pytest.raises(InputError, match=r'70x42 network images, got 42x56; reset'):
        session.step_tensor(images(SIZES[1])[0, 0])
    assert torch.equal(session.step_tensor(frames[1])['depth'], reference['depth'][1])
    session.reset()
    session.step_tensor(images(SIZES[1])[0, 0])


def test_an_interrupted_step_costs_one_frame_only():
    frames = images(SIZES[0])[0]
    network = golden_network('stream3r')
    session = StreamSession(network, 'window', 2)
    expected = stream(StreamSession(network, 'window', 2), frames)
    stream(session, frames[:4])

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = network.aggregator.global_blocks[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.step_tensor(frames[0])
    hook.remove()
    actual = stream(session, frames[4:])
    assert all(torch.equal(actual[name], expected[name][4:]) for name in OUTPUTS)


def test_a_full_causal_cache_says_so_and_the_session_is_usable_after_reset():
    frames = images(SIZES[0])[0]
    session = StreamSession(golden_network('stream3r'), 'causal', max_frames=2)
    stream(session, frames[:2])
    with pytest.raises(CacheError, match='max_frames'):
        session.step_tensor(frames[2])
    session.reset()
    stream(session, frames[:2])


@pytest.mark.parametrize(
    'options',
    [
        {'outputs': ()},
        {'outputs': ('normals',)},
        {'mode': 'full'},
        {'mode': 'dense'},
        {'mode': 'window', 'window': 0},
        {'window_rule': 'x'},
    ],
)
def test_unusable_options_are_refused(options):
    with pytest.raises(ConfigError):
        StreamSession(golden_network('stream3r'), **options)


@pytest.mark.parametrize('shape', [(3, 43, 70), (1, 42, 70), (42, 70), (1, 3, 42, 70), (3, 0, 70)])
def test_tensors_off_the_grid_are_refused(shape):
    with pytest.raises(InputError, match='multiples of 14'):
        StreamSession(golden_network('stream3r')).step_tensor(torch.zeros(shape))


def test_an_odd_image_in_a_waiting_chunk_is_refused_and_the_chunk_goes_on():
    pictures = [np.full((42, 70, 3), level, np.uint8) for level in (40, 90, 140)]
    cache = CacheConfig(chunk_size=3, max_bytes=2_000_000)
    session = StreamSession(golden_network('stream3r'), 'stac', cache=cache)
    assert [session.step(p) for p in pictures[:2]] == [None, None]
    with pytest.raises(InputError, match='70x42 network images, got'):
        session.step(np.zeros((70, 70, 3), np.uint8))
    assert [p.index for p in session.step(pictures[2])] == [0, 1, 2]
    with pytest.raises(InputError):
        session.step_chunk([pictures[0], np.zeros((0, 3, 3), np.uint8)])
    assert session.flush() == []


@pytest.mark.parametrize('given', ['stamps_ns', 'Ks'])
def test_a_chunk_with_too_few_stamps_or_intrinsics_is_refused_and_nothing_waits(given):
    session = StreamSession(golden_network('stream3r'), 'stac', cache=CacheConfig(chunk_size=2))
    pictures = [np.full((42, 70, 3), level, np.uint8) for level in (10, 200)]
    with pytest.raises(InputError, match='a chunk of 2 images takes as many'):
        session.step_chunk(pictures, **{given: [1]})
    assert session.num_waiting == 0


@pytest.mark.parametrize(
    'K', [np.full((3, 3), np.nan), np.diag([0.0, 50.0, 1.0]), [[1, 0], [0]], 'K']
)
def test_intrinsics_that_cannot_be_are_refused(K):
    session = StreamSession(golden_network('stream3r'))
    with pytest.raises(InputError, match='expected intrinsics K'):
        session.step(np.zeros((42, 70, 3), np.uint8), K=K)
    assert session.num_waiting == session.num_frames == 0


def test_intrinsics_may_be_a_list():
    session = StreamSession(golden_network('stream3r'), image=ImageConfig(long_side=70))
    K = [[50, 0, 34.5], [0, 40, 20.5], [0, 0, 1]]
    answer = session.step(np.zeros((42, 70, 3), np.uint8), K=K)
    torch.testing.assert_close(answer.K, torch.tensor(K))


def test_intrinsics_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r'K \[3, 3\], got \[2, 2\]'):
        session = StreamSession(golden_network('stream3r'))
        session.step(np.zeros((42, 70, 3), np.uint8), K=np.eye(2))


def test_without_the_depth_head_depth_is_that_of_the_points_and_poses_are_the_same():
    model, photo = golden_network('stream3r'), np.random.default_rng(0)
    photos = [photo.integers(0, 256, (42, 70, 3), dtype=np.uint8) for _ in range(4)]
    both = StreamSession(model, mode='causal')
    mixed = StreamSession(model, mode='causal', outputs=('points',))
    for i, image in enumerate(photos):
        mixed.outputs = ('points',) if i % 2 else ('depth', 'points')
        expected, actual = both.step(image), mixed.step(image)
        torch.testing.assert_close(actual.T_world_camera, expected.T_world_camera)
        torch.testing.assert_close(actual.world_points, expected.world_points)
        if i % 2:
            R, t = expected.T_world_camera[:3, :3], expected.T_world_camera[:3, 3]
            z = (expected.world_points - t) @ R[:, 2]
            torch.testing.assert_close(actual.depth, z, atol=1e-5, rtol=1e-5)
            assert torch.equal(actual.depth_conf, expected.world_points_conf)
        else:
            torch.testing.assert_close(actual.depth, expected.depth)
    bounded = StreamSession(model, mode='stac', outputs=('depth',))
    assert bounded.outputs == ('depth', 'points')  # its memory reads them


def test_stillness_is_judged_by_the_depth_of_the_frame_also_without_a_depth_head():
    cache = CacheConfig(skip_still=True, max_bytes=2_000_000)
    session = StreamSession(golden_network('stream3r'), 'stac', outputs=('points',), cache=cache)
    judged = []
    session._gate.is_still = lambda view, T_world_camera, depth: judged.append(depth) or False
    for image in np.random.default_rng(1).integers(0, 256, (2, 42, 70, 3), dtype=np.uint8):
        prediction = session.step(image)
        assert torch.equal(judged[-1], prediction.depth)
        assert not torch.allclose(judged[-1], prediction.world_points[..., 2], rtol=0.1)
