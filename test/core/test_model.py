"""What holds for the networks whatever their weights: visibility, batches, sizes, precision."""

import copy
import dataclasses

import pytest
import torch
from golden_data import golden_config, golden_network, images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stream3r_core.cache.dense import DenseCache
from stream3r_core.config import PRESETS, ModelConfig
from stream3r_core.errors import ConfigError, InputError
from stream3r_core.model import dpt_head
from stream3r_core.model.network import CausalVGGT
from stream3r_core.model.rope import rotary_tables, rotate
from stream3r_core.model.visibility import FrameAttention, frame_bias, visible_window
from stream3r_core.model.vit import PositionGrid

LANDSCAPE, PORTRAIT = 'landscape_42x70', 'portrait_56x42'
CPU = torch.device('cpu')
NOISE = {'atol': 2e-4, 'rtol': 1e-4}


@pytest.fixture(scope='module')
def network():
    return golden_network('stream3r')


def tensors_of(result):
    return {name: value for name, value in result.items() if name != 'pose_enc_list'}


def assert_same(actual, expected):
    torch.testing.assert_close(tensors_of(actual), tensors_of(expected), **NOISE)


class TestVisibility:
    @staticmethod
    def sees(mode, window, query, key):
        recent = key == 0 or max(1, query - window + 1) <= key <= query
        return {'full': True, 'causal': key <= query, 'window': recent and key <= query}[mode]

    @pytest.mark.parametrize('num_frames', [1, 2, 5, 8])
    @pytest.mark.parametrize(
        ('mode', 'window'), [('full', 3), ('causal', 3), *(('window', k) for k in (1, 2, 3, 9))]
    )
    def test_slices_of_keys_equal_a_dense_mask(self, mode, window, num_frames):
        torch.manual_seed(num_frames)
        tokens = 3
        q, k, v = torch.randn(3, 2, 4, num_frames * tokens, 8)
        rule = torch.tensor(
            [[self.sees(mode, window, i, j) for j in range(num_frames)] for i in range(num_frames)]
        )
        dense = rule.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        logits = (q @ k.mT / 8**0.5).masked_fill(~dense, -torch.inf)
        recent = visible_window(mode, window, num_frames)
        actual = FrameAttention(num_frames, recent)(q, k, v)
        torch.testing.assert_close(actual, logits.softmax(-1) @ v, atol=1e-6, rtol=1e-5)
        bias = frame_bias(num_frames, recent, CPU)
        assert torch.equal(rule, torch.ones_like(rule) if bias is None else bias == 0)

    def test_later_frames_do_not_change_earlier_ones(self, network):
        frames = images(LANDSCAPE)
        changed = torch.cat((frames[:, :4], 1 - frames[:, 4:]), 1)
        before, after = (tensors_of(network(x, 'causal')) for x in (frames, changed))
        for name in before:
            assert torch.equal(before[name][:, :4], after[name][:, :4])
            assert not torch.equal(before[name][:, 4:], after[name][:, 4:])

    def test_a_window_over_all_frames_is_causal(self, network):
        frames = images(PORTRAIT)
        assert_same(network(frames, 'window', 6), network(frames, 'causal'))

    def test_memory_of_attention_is_linear_in_the_frames(self):
        class LargestTensor(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
                self.numel = max([self.numel, *(t.numel() for t in tensors)])
                return out

        num_frames, tokens = 60, 5 + 15
        aggregator = golden_network('stream3r').aggregator
        causal = FrameAttention(num_frames, num_frames)
        with torch.inference_mode(), LargestTensor() as largest:
            aggregator(torch.rand(1, num_frames, 3, 42, 70), lambda layer: causal, True)
        assert largest.numel < (num_frames * tokens) ** 2 / 2


class TestBatches:
    @pytest.mark.parametrize('mode', ['full', 'causal', 'window'])
    def test_sequences_of_a_batch_do_not_mix(self, mode):
        network = golden_network('streamvggt')
        one = images(LANDSCAPE)
        both = torch.cat((one, one.flip(1)))
        queries = torch.tensor([[[14.0, 12.0], [40.0, 20.0]], [[30.0, 8.0], [5.0, 33.0]]])
        batched = tensors_of(network(both, mode, 2, queries))
        for i in range(2):
            alone = tensors_of(network(both[i], mode, 2, queries[i]))
            tracks = {'track', 'vis', 'track_conf'}
            for name in alone:
                tolerance = {'atol': 1e-2, 'rtol': 0} if name in tracks else NOISE
                torch.testing.assert_close(batched[name][i], alone[name][0], **tolerance)

    def test_maps_do_not_depend_on_the_chunks_they_are_made_in(self, network, monkeypatch):
        frames = images(LANDSCAPE)
        expected = network(frames, 'causal')
        monkeypatch.setattr(dpt_head, 'PIXELS_PER_CHUNK', 4 * 42 * 70)
        assert_same(network(frames, 'causal'), expected)

    def test_outputs_left_out_do_not_change_the_others(self, network):
        frames = images(PORTRAIT)
        everything = network(frames, 'causal')
        only_depth = network(frames, 'causal', outputs=('depth',))
        assert set(only_depth) == {'pose_enc', 'pose_enc_list', 'depth', 'depth_conf'}
        assert all(torch.equal(only_depth[k], everything[k]) for k in tensors_of(only_depth))
        assert set(network(frames, outputs=())) == {'pose_enc', 'pose_enc_list'}

    def test_the_last_iteration_is_the_pose(self, network):
        result = network(images(PORTRAIT), 'causal', outputs=())
        assert result['pose_enc_list'][-1] is result['pose_enc']


class RecordingCache(DenseCache):
    """A cache of everything that asks for column sums."""

    needs_column_sums = True

    def __init__(self, num_layers):
        super().__init__(num_layers)
        self.sums = {}

    def record(self, layer, column_sums, q=None):
        self.sums[layer] = column_sums


class TestStream:
    def caches(self, network, kind=DenseCache):
        c = network.config
        return kind(c.depth), kind(c.camera_iterations * c.camera_trunk_depth)

    @torch.inference_mode()
    def test_frames_of_one_call_see_each_other(self, network):
        frames = images(LANDSCAPE)
        streamed = network.stream(frames, *self.caches(network), first=True)
        assert_same(streamed, network(frames, 'full'))

    @torch.inference_mode()
    def test_every_layer_hands_over_its_column_sums(self, network):
        caches = self.caches(network, RecordingCache)
        plain = self.caches(network)
        tokens = (5 + 15, 1)
        for i in range(3):
            frame = images(LANDSCAPE)[:, i : i + 1]
            expected = network.stream(frame, *plain, first=i == 0)
            assert_same(network.stream(frame, *caches, first=i == 0), expected)
            for cache, per_frame in zip(caches, tokens):
                assert set(cache.sums) == set(range(cache.num_layers))
                for sums in cache.sums.values():
                    assert sums.shape[2] == (i + 1) * per_frame
                    total = torch.full(sums.shape[:2], float(per_frame))
                    torch.testing.assert_close(sums.sum(2), total)
            for cache in (*caches, *plain):
                cache.commit(1)

    def test_wrong_shapes_are_refused(self, network):
        for shape in ((3, 42, 70), (2, 1, 3, 42, 70)):
            with pytest.raises(InputError, match=r'\[1, n, 3, H, W\]'):
                network.stream(torch.rand(shape), *self.caches(network), first=True)


def test_one_frame_costs_what_the_architecture_says():
    """Full size at 518 x 392, in units of 1e9 operations; model.md section 22."""
    with torch.device('meta'):
        network = CausalVGGT(PRESETS['stream3r']).requires_grad_(False)
        frame = torch.rand(1, 1, 3, 392, 518)
    caches = TestStream().caches(network)
    for i, expected in enumerate((2660.27, 2766.80)):
        with FlopCounterMode(display=False) as counter:
            network.stream(frame, *caches, first=i == 0)
        assert counter.get_total_flops() / 1e9 == pytest.approx(expected, abs=0.01)
        for cache in caches:
            cache.commit(1)


class TestPositions:
    def test_special_tokens_are_not_turned_and_lengths_are_kept(self):
        torch.manual_seed(0)
        tables = rotary_tables(3, 4, 5, 16, 100.0, CPU)
        x = torch.randn(2, 3, 2 * 17, 16)
        turned = rotate(x, tables)
        frames = x.unflatten(2, (2, 17)), turned.unflatten(2, (2, 17))
        assert torch.equal(frames[0][:, :, :, :5], frames[1][:, :, :, :5])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))

    def test_products_depend_on_relative_positions_only(self):
        torch.manual_seed(0)
        tables = rotary_tables(6, 6, 0, 16, 100.0, CPU)
        q, k = (torch.randn(16).expand(1, 1, 36, 16) for _ in range(2))
        products = (rotate(q, tables) @ rotate(k, tables).mT)[0, 0].view(6, 6, 6, 6)
        torch.testing.assert_close(products[0, 1, 2, 4], products[3, 2, 5, 5], **NOISE)

    def test_the_resized_grid_follows_its_parameter(self):
        torch.manual_seed(0)
        grid = torch.nn.Parameter(torch.randn(1, 1 + 25, 8))
        positions = PositionGrid()
        with torch.no_grad():
            first = positions(grid, 1, 3, 4)
            assert positions(grid, 1, 3, 4) is first
            assert positions(grid, 1, 4, 3).shape == (1, 13, 8)
            grid.mul_(2)
            torch.testing.assert_close(positions(grid, 1, 3, 4), 2 * first)
        positions(grid, 1, 3, 4).sum().backward()
        assert grid.grad.any()

    def test_training_works_after_inference_at_the_same_size(self):
        network = CausalVGGT(golden_config('stream3r'))
        frames = images(LANDSCAPE)[:, :2]
        with torch.inference_mode():
            network(frames, 'causal')
        network(frames, 'causal')['depth'].sum().backward()
        assert network.aggregator.patch_embed.pos_embed.grad.any()

    def test_tables_of_many_sizes_stay_bounded(self):
        for rows in range(1, 30):
            rotary_tables(rows, 2, 1, 8, 100.0, CPU)
        info = rotary_tables.cache_info()
        assert info.currsize == info.maxsize <= 8

    def test_a_used_network_can_be_copied(self, network):
        with torch.inference_mode():
            expected = network(images(PORTRAIT), 'causal')
            assert_same(copy.deepcopy(network)(images(PORTRAIT), 'causal'), expected)


def conv_config(patch_size):
    return ModelConfig(
        img_size=4 * patch_size,
        patch_size=patch_size,
        embed_dim=32,
        depth=2,
        num_heads=2,
        encoder='conv',
        camera_trunk_depth=1,
        camera_heads=4,
        dpt_features=16,
        dpt_out_channels=(8, 8, 16, 16),
        dpt_layers=(0, 0, 1, 1),
    )


class TestConvolutionalEncoder:
    @pytest.mark.parametrize('patch_size', [7, 8, 12, 14, 16])
    def test_any_patch_size_and_image_size_works(self, patch_size):
        torch.manual_seed(0)
        network = CausalVGGT(conv_config(patch_size))
        height, width = 3 * patch_size, 5 * patch_size
        result = network(torch.rand(1, 2, 3, height, width), 'causal')
        assert network.aggregator.encode(torch.rand(1, 2, 3, height, width)).shape[2] == 15
        assert result['depth'].shape == (1, 2, height, width, 1)
        assert result['world_points'].shape == (1, 2, height, width, 3)
        loss = sum(p.square().sum() for p in result['pose_enc_list'])
        (loss + sum(v.sum() for v in tensors_of(result).values())).backward()
        assert all(p.grad is not None and p.grad.any() for p in network.parameters())


class TestPrecision:
    def test_autocast_outside_leaves_the_heads_in_float32(self, network):
        frames = images(LANDSCAPE)
        expected = network(frames, 'causal')
        with torch.autocast('cpu', torch.bfloat16):
            actual = network(frames, 'causal')
        assert all(value.dtype == torch.float32 for value in tensors_of(actual).values())
        assert 0 < (actual['pose_enc'] - expected['pose_enc']).abs().max() < 0.02

    def test_keys_and_values_are_as_narrow_as_the_network(self):
        narrow = copy.deepcopy(golden_network('stream3r')).set_dtype(torch.bfloat16)
        caches = TestStream().caches(narrow)
        with torch.inference_mode():
            narrow.stream(images(LANDSCAPE)[:, :1], *caches, first=True)
        for cache in caches:
            cache.commit(1)
        assert caches[0].frames(0)[0].dtype == torch.bfloat16
        assert caches[1].frames(0)[0].dtype == torch.float32


def test_descriptors_are_unit_vectors_of_single_frames(network):
    frames = images(LANDSCAPE)
    descriptors = network.descriptor(frames)
    assert descriptors.shape == (1, 6, 32)
    torch.testing.assert_close(descriptors.norm(dim=-1), torch.ones(1, 6))
    torch.testing.assert_close(network.descriptor(frames[0, 2:3]), descriptors[:, 2:3])
    similarity = descriptors[0] @ descriptors[0].T
    assert (similarity.fill_diagonal_(0) < 0.9999).all()


class TestRefusals:
    @pytest.mark.parametrize(
        'change',
        [
            {'num_heads': 3},
            {'camera_heads': 3},
            {'dino_heads': 3},
            {'dpt_features': 20},
            {'dpt_out_channels': (8, 10, 16, 20)},
            {'dpt_layers': (0, 1, 2, 5)},
            {'encoder': 'resnet'},
            {'track': {'features': 18}},
            {'track': {'num_heads': 5}},
        ],
    )
    def test_sizes_that_do_not_go_together(self, change):
        with pytest.raises(ConfigError, match=next(iter(change)).split('_')[0]):
            ModelConfig.from_dict(
                {'embed_dim': 32, 'num_heads': 2, 'camera_heads': 4, 'dino_heads': 2, 'depth': 5}
                | {'dpt_layers': (0, 1, 2, 3)}
                | change
            )

    @pytest.mark.parametrize(
        'frames',
        [
            torch.rand(3, 42, 70),
            torch.rand(1, 2, 4, 42, 70),
            torch.zeros(1, 2, 3, 42, 70, dtype=torch.uint8),
        ],
    )
    def test_other_than_float_images(self, network, frames):
        with pytest.raises(InputError, match='expected float images'):
            network(frames)

    @pytest.mark.parametrize('size', [(41, 70), (42, 0), (42, 71)])
    def test_sides_off_the_patch_grid(self, network, size):
        with pytest.raises(InputError, match='multiples of the patch size 14'):
            network(torch.rand(1, 2, 3, *size))

    def test_unknown_modes_windows_and_outputs(self, network):
        frames = images(LANDSCAPE)
        with pytest.raises(ConfigError, match='unknown attention mode'):
            network(frames, 'sliding')
        with pytest.raises(ConfigError, match='at least 1'):
            network(frames, 'window', 0)
        with pytest.raises(InputError, match='unknown outputs'):
            network(frames, outputs=('normals',))

    def test_queries_without_a_track_head_or_of_wrong_shape(self, network):
        frames = images(LANDSCAPE)
        with pytest.raises(InputError, match='no track head'):
            network(frames, query_points=torch.rand(1, 2, 2))
        for shape in ((1, 2, 3), (3, 2, 2), (2,)):
            with pytest.raises(InputError, match='expected query_points'):
                golden_network('streamvggt')(frames, query_points=torch.rand(shape))

    def test_images_too_small_to_track_in(self):
        config = golden_config('streamvggt')
        deep = dataclasses.replace(config.track, corr_levels=5)
        network = CausalVGGT(dataclasses.replace(config, track=deep))
        with pytest.raises(InputError, match='at least 32 pixels'):
            network(torch.rand(1, 2, 3, 28, 42), query_points=torch.rand(1, 2, 2))
