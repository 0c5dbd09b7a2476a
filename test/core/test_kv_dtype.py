"""Sessions whose keys and values have 8 or 4 bits."""

import pytest
import torch

from stream3r_core import load_model
from stream3r_core.config import CacheConfig
from stream3r_core.errors import ConfigError
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import render_sequence

FRAMES = 8  # beyond the window of 3


@pytest.fixture(scope='module')
def model():
    return load_model('tiny')


@pytest.fixture(scope='module')
def images():
    rendered = render_sequence(0, FRAMES, 48, 64).images
    return rendered.permute(0, 3, 1, 2).float() / 255


def stream(model, images, **options):
    session = StreamSession(model, window=3, outputs=('depth',), **options)
    return session, [session.step_tensor(image) for image in images]


@pytest.mark.parametrize('mode', ['causal', 'window'])
@pytest.mark.parametrize(
    'kv_dtype, fewer, depth_error, pose_error',
    [('int8', 256 / 68, 1e-3, 2e-3), ('int4', 256 / 36, 2e-2, 3e-2)],
)
def test_few_bits_cost_few_bytes_and_little_accuracy(
    model, images, mode, kv_dtype, fewer, depth_error, pose_error
):
    whole, expected = stream(model, images, mode=mode)
    session, got = stream(model, images, mode=mode, kv_dtype=kv_dtype)
    assert whole.cache.num_bytes / session.cache.num_bytes == pytest.approx(fewer)
    assert whole.cache.capacity_bytes / session.cache.capacity_bytes == pytest.approx(fewer)
    for a, b in zip(got, expected):
        off = ((a['depth'] - b['depth']).abs() / b['depth']).mean()
        assert 0 < off < depth_error
        assert (a['pose_enc'] - b['pose_enc']).abs().max() < pose_error


def test_storage_of_few_bits_never_moves_and_a_reset_repeats_the_stream(model, images):
    session, first = stream(model, images, mode='window', kv_dtype='int8')
    places = [x.data_ptr() for x in session.cache._storage]
    session.reset()
    again = [session.step_tensor(image) for image in images]
    assert [x.data_ptr() for x in session.cache._storage] == places
    for a, b in zip(first, again):
        assert torch.equal(a['depth'], b['depth'])


def test_where_few_bits_do_not_apply_it_is_said(model):
    with pytest.raises(ConfigError, match='serves the modes causal and window'):
        StreamSession(model, mode='stac', kv_dtype='int8', cache=CacheConfig())
    with pytest.raises(ConfigError, match='on one device'):
        StreamSession(model, mode='causal', device_frames=4, kv_dtype='int4')
