"""The networks reproduce the golden tensors: both models, both image sizes, all batch modes."""

from functools import partial

import pytest
import torch
from golden_data import (
    MODELS,
    SIZES,
    checkpoint_shapes,
    golden,
    golden_config,
    golden_network,
    group,
    images,
)

from stream3r_core.cache.dense import DenseCache
from stream3r_core.config import PRESETS
from stream3r_core.geometry import decode_pose
from stream3r_core.model.dpt_head import positional_rows_and_columns
from stream3r_core.model.network import CachedAttention, CausalVGGT
from stream3r_core.model.rope import rotary_tables, rotate
from stream3r_core.model.visibility import FrameAttention

BATCH_MODES = {'full': ('full', 1), 'causal': ('causal', 1)}
BATCH_MODES |= {f'window{k}': ('window', k) for k in (2, 3)}

# Absolute and relative tolerance: the rounding noise of the reference itself, and some room.
TOLERANCE = {name: (1e-4, 1e-4) for name in ('depth', 'depth_conf')}
TOLERANCE |= {name: (1e-4, 1e-4) for name in ('world_points', 'world_points_conf')}
TOLERANCE |= {'pose_enc': (1e-5, 0), 'track': (1e-2, 0), 'vis': (1e-3, 0), 'track_conf': (1e-3, 0)}
TOLERANCE |= {'extrinsic': (1e-5, 0), 'intrinsic': (0, 1e-3)}

CPU = torch.device('cpu')


def assert_golden(name, actual, expected):
    atol, rtol = TOLERANCE[name]
    torch.testing.assert_close(
        actual, expected, atol=atol, rtol=rtol, msg=lambda m: f'{name}: {m}'
    )


@pytest.mark.parametrize('name', BATCH_MODES)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('model', MODELS)
def test_batch_outputs_equal_the_golden_tensors(model, size, name):
    tensors = golden(model, size, 'batch')
    expected = group(tensors, name)
    tracked = 'track' in expected
    mode, window = BATCH_MODES[name]
    with torch.inference_mode():
        actual = golden_network(model)(
            images(size), mode, window, tensors['query_points'] if tracked else None
        )
    T_camera_world, actual['intrinsic'] = decode_pose(actual['pose_enc'], *images(size).shape[-2:])
    actual['extrinsic'] = T_camera_world[..., :3, :]
    compared = set(TOLERANCE) & set(expected)
    assert len(compared) == (10 if tracked else 7)
    for key in compared:
        assert_golden(key, actual[key], expected[key])


@torch.inference_mode()
def causal_taps(model, size):
    network, frames = golden_network(model), images(size)
    causal = FrameAttention(frames.shape[1], frames.shape[1])
    return network.aggregator(frames, lambda layer: causal, starts_sequence=True)


@pytest.mark.parametrize('size', SIZES)
def test_every_iteration_of_the_tracker_equals_the_golden_tracks(size):
    network, expected = golden_network('streamvggt'), golden('streamvggt', size, 'batch')
    taps, _ = causal_taps('streamvggt', size)
    with torch.inference_mode():
        features = network.track_head.feature_extractor(taps, *images(size).shape[-2:])
        tracks, _, _ = network.track_head.tracker(features, expected['query_points'])
    torch.testing.assert_close(
        features[:, 0], expected['causal.track_features_frame0'], atol=1e-4, rtol=1e-4
    )
    # The flow embedding turns by hundreds of radians per pixel: rounding grows with iterations.
    golden_tracks = [expected[f'causal.track_iter{i}'] for i in range(3)]
    for actual, wanted, atol in zip(
        tracks, [*golden_tracks, expected['causal.track']], (1e-3, 1e-2, 1e-2, 1e-2)
    ):
        torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize('size', SIZES)
@torch.inference_mode()
def test_tracks_of_a_stream_stay_at_their_queries_as_published(size):
    network, expected = golden_network('streamvggt'), golden('streamvggt', size, 'stream')
    queries = golden('streamvggt', size, 'batch')['query_points']
    cache = DenseCache(network.config.depth)
    for i, frame in enumerate(images(size).split(1, 1)):
        attention = partial(CachedAttention, cache)
        taps, _ = network.aggregator(frame, attention, starts_sequence=i == 0)
        cache.commit(1)
        tracks, vis, conf = network.track_head(taps, *frame.shape[-2:], queries)
        assert torch.equal(tracks[-1][:, 0], queries)
        assert_golden('track', tracks[-1], expected['stream.track'][:, i : i + 1])
        assert_golden('vis', vis, expected['stream.vis'][:, i : i + 1])
        assert_golden('track_conf', conf, expected['stream.track_conf'][:, i : i + 1])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('model', MODELS)
class TestIntermediateTensors:
    def test_encoder(self, model, size):
        expected, frames = golden(model, size, 'debug'), images(size)
        encoder = golden_network(model).aggregator.patch_embed
        mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
        std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
        tokens = encoder.tokens(((frames - mean) / std)[0])
        parts = ('x_norm_clstoken', 'x_norm_regtokens', 'x_norm_patchtokens')
        for part, actual in zip(parts, tokens.tensor_split((1, 5), 1)):
            wanted = expected[f'dino.{part}']
            torch.testing.assert_close(actual.reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            golden_network(model).aggregator.encode(frames)[0],
            expected['dino.x_norm_patchtokens'],
            atol=1e-5,
            rtol=1e-5,
        )

    def test_resized_positions(self, model, size):
        encoder = golden_network(model).aggregator.patch_embed
        rows, columns = (side // 14 for side in images(size).shape[-2:])
        actual = encoder._positions(encoder.pos_embed, 1, rows, columns)
        expected = golden(model, size, 'debug')['dino.pos_embed_interpolated']
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)

    def test_aggregated_tokens(self, model, size):
        expected = golden(model, size, 'debug')
        taps, camera_tokens = causal_taps(model, size)
        torch.testing.assert_close(taps[0], expected['causal.agg_out.0'], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(taps[-1], expected['causal.agg_out.4'], atol=2e-5, rtol=1e-5)
        assert torch.equal(camera_tokens, taps[-1][:, :, 0])

    def test_pose_of_every_iteration(self, model, size):
        expected = golden(model, size, 'debug')
        answers = golden_network(model)(images(size), 'causal', outputs=())['pose_enc_list']
        assert len(answers) == 4
        for i, actual in enumerate(answers):
            assert_golden('pose_enc', actual, expected[f'causal.pose_enc.iter{i}'])

    def test_positional_map_of_the_dense_heads(self, model, size):
        height, width = images(size).shape[-2:]
        x, y = positional_rows_and_columns(8, height // 14, width // 14, width / height, CPU)
        rows, columns = y.shape[1], x.shape[2]
        actual = torch.cat((x.expand(-1, rows, -1), y.expand(-1, -1, columns)))
        expected = golden(model, size, 'debug')['dpt.pos_embed.level0']
        torch.testing.assert_close(actual.movedim(0, -1), expected, atol=1e-7, rtol=0)

    def test_rotary_positions(self, model, size):
        expected = golden(model, size, 'debug')
        rows, columns = (side // 14 for side in images(size).shape[-2:])
        tables = rotary_tables(rows, columns, 5, 16, 100, CPU)
        actual = rotate(expected['rope.in'], tables)
        torch.testing.assert_close(actual, expected['rope.out'], atol=1e-6, rtol=0)


@pytest.mark.parametrize(('model', 'num_tensors'), [('stream3r', 1403), ('streamvggt', 1797)])
def test_full_size_networks_have_the_names_and_shapes_of_the_checkpoints(model, num_tensors):
    with torch.device('meta'):
        network = CausalVGGT(PRESETS[model])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == num_tensors
    assert shapes == checkpoint_shapes(model)


@pytest.mark.parametrize('model', MODELS)
def test_every_parameter_but_the_mask_token_learns(model):
    torch.manual_seed(0)
    network = CausalVGGT(golden_config(model))
    network.load_state_dict(golden_network(model).state_dict())
    queries = torch.tensor([[[14.0, 12.0], [40.0, 20.0]]]) if model == 'streamvggt' else None
    result = network(images('landscape_42x70')[:, :3], 'causal', query_points=queries)
    poses = result.pop('pose_enc_list')
    loss = sum((value * torch.randn_like(value)).sum() for value in [*poses, *result.values()])
    loss.backward()
    silent = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {'aggregator.patch_embed.mask_token'}
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
