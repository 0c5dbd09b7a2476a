"""Weights: every format round trips, every damaged or foreign file is one clear error."""

import argparse
import dataclasses
import hashlib
import json
import pickle

import huggingface_hub.constants
import pytest
import torch
from golden_data import golden_config, golden_network, images, weights_file
from safetensors.torch import load_file, save_file

from stream3r_core import load_model
from stream3r_core.checkpoints import default_dtype, save_model
from stream3r_core.errors import CheckpointError, ConfigError

CONFIG = golden_config('stream3r')


@pytest.fixture(scope='module')
def tensors():
    return load_file(weights_file('stream3r'))


def assert_golden_weights(model, tensors):
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in state)


def with_prefix(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


TORCH_LAYOUTS = {
    'bare': lambda t: t,
    'model': lambda t: {'model': t, 'args': argparse.Namespace(lr=1e-5), 'epoch': 3},
    'state_dict': lambda t: {'state_dict': t},
    'lightning': lambda t: {'state_dict': with_prefix('net.', t) | {'steps': torch.ones(1)}},
    'data parallel': lambda t: with_prefix('module.', t),
    'both prefixes': lambda t: {'state_dict': with_prefix('module.net.', t)},
}


@pytest.mark.parametrize('suffix', ['.pt', '.pth'])
@pytest.mark.parametrize('layout', TORCH_LAYOUTS)
def test_torch_files_load_with_every_wrapper_and_prefix(tmp_path, tensors, layout, suffix):
    path = tmp_path / f'checkpoint{suffix}'
    torch.save(TORCH_LAYOUTS[layout](tensors), path)
    model = load_model(CONFIG, path)
    assert_golden_weights(model, tensors)
    assert model.weights_info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_old_torch_files_load_too(tmp_path, tensors):
    torch.save(tensors, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert_golden_weights(load_model(CONFIG, tmp_path / 'old.pth'), tensors)


def test_half_precision_files_become_float32(tmp_path, tensors):
    save_file({k: v.bfloat16() for k, v in tensors.items()}, tmp_path / 'half.safetensors')
    model = load_model(CONFIG, tmp_path / 'half.safetensors')
    assert_golden_weights(model, {k: v.bfloat16().float() for k, v in tensors.items()})


def test_a_saved_model_defines_its_own_configuration(tmp_path, tensors):
    path = tmp_path / 'own.safetensors'
    save_model(golden_network('streamvggt'), path)
    assert [f.name for f in tmp_path.iterdir()] == ['own.safetensors']
    model = load_model(None, str(path))
    assert model.config == golden_config('streamvggt')
    with torch.inference_mode():
        expected = golden_network('streamvggt')(images('portrait_56x42'), 'causal')
        actual = model(images('portrait_56x42'), 'causal')
    # Its convolutions lie channels last, and round as processors like.
    torch.testing.assert_close(actual['pose_enc'], expected['pose_enc'], atol=1e-5, rtol=0)
    assert not model.training


def test_a_file_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / 'own.safetensors'
    save_model(golden_network('stream3r'), path)
    other = dataclasses.replace(CONFIG, rope_freq=50.0)
    with pytest.raises(CheckpointError, match=r'rope_freq is 100.* there and 50'):
        load_model(other, path)


def test_damaged_configuration_in_a_file_is_refused(tmp_path, tensors):
    for text in ('{', json.dumps({'depht': 3})):
        save_file(tensors, tmp_path / 'x.safetensors', {'config': text})
        with pytest.raises(CheckpointError, match='not a model configuration'):
            load_model(CONFIG, tmp_path / 'x.safetensors')


def test_weights_with_a_track_head_serve_a_network_without_one(tmp_path):
    save_model(golden_network('streamvggt'), tmp_path / 'with_config.safetensors')
    for path in (weights_file('streamvggt'), tmp_path / 'with_config.safetensors'):
        model = load_model(CONFIG, path)
        assert model.weights_info.num_tensors == len(model.state_dict()) == 397
        assert not any(name.startswith('track_head') for name in model.state_dict())


def test_loading_says_what_it_is_about_before_it_takes_time(caplog):
    path = weights_file('stream3r')
    with caplog.at_level('INFO', 'stream3r_core'):
        load_model(CONFIG, path)
    reading, moving = caplog.messages
    assert reading == f'reading {path}, {path.stat().st_size / 1e6:.1f} MB'
    assert moving.endswith('moving them to cpu')


def test_the_origin_of_weights_is_recorded(tensors):
    path = weights_file('stream3r')
    info = load_model(CONFIG, path).weights_info
    assert info == dataclasses.replace(
        info, source=str(path), file_name=path.name, num_tensors=397, num_parameters=448680
    )
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.sha256 = ''


class TestFolders:
    def test_the_only_file_is_taken(self, tmp_path, tensors):
        (tmp_path / 'README.md').write_text('weights')
        save_file(tensors, tmp_path / 'mine.safetensors')
        model = load_model(CONFIG, tmp_path)
        assert_golden_weights(model, tensors)
        assert model.weights_info.file_name == 'mine.safetensors'

    def test_the_published_name_wins(self, tmp_path, tensors):
        (tmp_path / 'optimizer.pt').write_bytes(b'not weights')
        torch.save(tensors, tmp_path / 'checkpoints.pth')
        assert load_model(CONFIG, tmp_path).weights_info.file_name == 'checkpoints.pth'

    def test_nothing_or_too_much_is_refused(self, tmp_path, tensors):
        with pytest.raises(CheckpointError, match='found none'):
            load_model(CONFIG, tmp_path)
        for name in ('a.pt', 'b.pt'):
            torch.save(tensors, tmp_path / name)
        with pytest.raises(CheckpointError, match=r'found a\.pt, b\.pt'):
            load_model(CONFIG, tmp_path)


class TestHub:
    """The real client, on a local hub cache, with the network switched off."""

    COMMIT = '0123456789abcdef0123456789abcdef01234567'

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
        return tmp_path

    def add(self, cache, hub_id, name, tensors):
        folder = cache / f'models--{hub_id.replace("/", "--")}'
        snapshot = folder / 'snapshots' / self.COMMIT
        snapshot.mkdir(parents=True)
        (folder / 'refs').mkdir()
        (folder / 'refs' / 'main').write_text(self.COMMIT)
        save = save_file if name.endswith('.safetensors') else torch.save
        save(tensors, snapshot / name)

    @pytest.mark.parametrize(
        ('hub_id', 'name'),
        [
            ('yslan/STream3R', 'model.safetensors'),
            ('lch01/StreamVGGT', 'checkpoints.pth'),
            ('facebook/VGGT-1B', 'model.pt'),
        ],
    )
    @pytest.mark.parametrize('revision', [None, COMMIT])
    def test_published_files_are_found(self, cache, tensors, hub_id, name, revision):
        self.add(cache, hub_id, name, tensors)
        model = load_model(CONFIG, hub_id, revision=revision)
        assert_golden_weights(model, tensors)
        assert model.weights_info.file_name == name
        assert model.weights_info.source == f'{hub_id}@{revision or "main"}'

    def test_unreachable_weights_are_a_clear_error(self):
        with pytest.raises(CheckpointError, match='Hugging Face hub cannot be reached'):
            load_model('stream3r', 'yslan/STream3R')

    def test_an_absent_revision_is_a_clear_error(self, cache, tensors):
        self.add(cache, 'yslan/STream3R', 'model.safetensors', tensors)
        with pytest.raises(CheckpointError, match='is not in its local cache'):
            load_model(CONFIG, 'yslan/STream3R', revision='v9')

    def test_a_revision_of_a_file_is_refused(self):
        with pytest.raises(CheckpointError, match='leave the revision out'):
            load_model(CONFIG, weights_file('stream3r'), revision='main')


class Bomb:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (open, (str(self.flag), 'w'))


def damaged_files(folder, tensors):
    """Yield paths of files that are no usable weights."""
    intact = weights_file('stream3r').read_bytes()
    torch.save(tensors, folder / 'intact.pt')
    zipped = (folder / 'intact.pt').read_bytes()
    contents = {
        'cut.safetensors': intact[: len(intact) // 2],
        'cut_header.safetensors': intact[:100],
        'cut.pt': zipped[: len(zipped) // 2],
        'empty.safetensors': b'',
        'empty.pt': b'',
        'page.pth': b'<!DOCTYPE html><html>not found</html>',
        'page.safetensors': b'<!DOCTYPE html><html>not found</html>',
        'pointer.safetensors': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n',
        'pickle.pt': pickle.dumps({'weights': [1, 2, 3]}, protocol=2),
        'list.pt': None,
    }
    torch.save([torch.ones(3)], folder / 'list.pt')
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
        yield folder / name


def test_damaged_and_foreign_files_are_one_clear_error(tmp_path, tensors):
    for path in damaged_files(tmp_path, tensors):
        with pytest.raises(CheckpointError, match=path.name):
            load_model(CONFIG, path)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, tensors):
    flag = tmp_path / 'executed'
    torch.save(tensors | {'bomb': Bomb(flag)}, tmp_path / 'bomb.pt')
    (tmp_path / 'bare.pt').write_bytes(pickle.dumps(Bomb(flag), protocol=2))
    for name in ('bomb.pt', 'bare.pt'):
        with pytest.raises(CheckpointError, match='objects other than tensors'):
            load_model(CONFIG, tmp_path / name)
    assert not flag.exists()


def without_one(tensors):
    return {k: v for k, v in tensors.items() if k != 'camera_head.embed_pose.bias'}


def with_integers(tensors):
    return tensors | {'camera_head.embed_pose.bias': torch.zeros(64, dtype=torch.int64)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (without_one, r'1 missing \(camera_head.embed_pose.bias\)'),
        (lambda t: t | {'decoder.weight': torch.ones(2)}, r'1 unexpected \(decoder.weight\)'),
        (
            lambda t: t | {'camera_head.embed_pose.bias': torch.ones(3)},
            r'embed_pose.bias \[3\] torch.float32 instead of \[64\]',
        ),
        (with_integers, r'torch.int64 instead of'),
        (lambda t: {'epoch': 3}, 'holds no tensors'),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, tensors, change, message):
    torch.save(change(tensors), tmp_path / 'changed.pt')
    with pytest.raises(CheckpointError, match=message):
        load_model(CONFIG, tmp_path / 'changed.pt')


def test_a_network_with_a_track_head_wants_its_weights():
    with pytest.raises(CheckpointError, match=r'186 missing \(track_head'):
        load_model(golden_config('streamvggt'), weights_file('stream3r'))


def test_missing_files_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r'ckpt/model.pt: no such file or folder'):
        load_model(CONFIG, 'ckpt/model.pt')
    (tmp_path / 'weights.onnx').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r"unknown kind of file '.onnx'"):
        load_model(CONFIG, tmp_path / 'weights.onnx')


@pytest.mark.parametrize('preset', ['stream3r', 'streamvggt', CONFIG])
def test_without_weights_the_error_says_where_to_get_them(preset):
    with pytest.raises(CheckpointError) as caught:
        load_model(preset)
    for hint in ('yslan/STream3R', 'lch01/StreamVGGT', 'facebook/VGGT-1B', 'non-commercial'):
        assert hint in str(caught.value)
    assert "weights='random'" in str(caught.value)


def test_an_unknown_preset_is_a_configuration_error():
    with pytest.raises(ConfigError, match='unknown preset'):
        load_model('stream4r', 'random')
    with pytest.raises(ConfigError, match='need a preset'):
        load_model(None, 'random')


class TestRandomWeights:
    def test_are_repeatable_and_leave_the_generator_alone(self):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        first, second = load_model(CONFIG, 'random'), load_model(CONFIG, 'random')
        assert torch.equal(torch.rand(3), expected)
        assert_golden_weights(first, second.state_dict())
        assert first.weights_info.source == 'random' and first.weights_info.sha256 == ''

    @pytest.mark.parametrize('config', ['tiny', golden_config('streamvggt')])
    def test_give_a_camera_that_exists_and_depths_near_one(self, config):
        model = load_model(config, 'random')
        side = 4 * model.config.patch_size
        with torch.inference_mode():
            result = model(torch.rand(1, 3, 3, side, 2 * side), 'causal')
        translation, quaternion, fov = result['pose_enc'].split((3, 4, 2), -1)
        assert translation.abs().max() < 1
        assert ((quaternion - torch.tensor((0.0, 0, 0, 1))).abs() < 0.5).all()
        assert ((fov > 0.3) & (fov < 2)).all()
        assert ((result['depth'] > 0.5) & (result['depth'] < 2)).all()
        assert result['world_points'].abs().max() < 2


class TestPrecision:
    def test_heads_norms_and_tokens_stay_in_float32(self):
        model = load_model(CONFIG, weights_file('stream3r'), dtype=torch.bfloat16)
        narrow = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
        assert 'aggregator.global_blocks.0.attn.qkv.weight' in narrow
        assert all(n.startswith('aggregator.') for n in narrow)
        assert not any('norm' in n or 'token' in n or 'gamma' in n for n in narrow)
        assert model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ('dtype', 'of_pose', 'of_depth'),  # measured 0.0079, 0.0019 and 0.0012, 0.0003
        [(torch.bfloat16, 0.02, 0.01), (torch.float16, 0.004, 0.002)],
    )
    def test_16_bits_stay_near_float32(self, dtype, of_pose, of_depth):
        frames = images('landscape_42x70')
        narrow = load_model(CONFIG, weights_file('stream3r'), dtype=dtype)
        with torch.inference_mode():
            expected = golden_network('stream3r')(frames, 'causal')
            actual = narrow(frames, 'causal')
        assert all(v.dtype == torch.float32 for k, v in actual.items() if k != 'pose_enc_list')
        pose_error = (actual['pose_enc'] - expected['pose_enc']).abs()
        depth_error = (actual['depth'] / expected['depth'] - 1).abs()
        assert 0 < pose_error.max() < of_pose
        assert 0 < depth_error.median() < of_depth

    def test_the_convolutional_encoder_stays_in_float32(self):
        model = load_model('tiny', 'random', dtype=torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.aggregator.patch_embed.parameters())
        with torch.inference_mode():
            assert model(torch.rand(1, 2, 3, 16, 24))['depth'].isfinite().all()

    @pytest.mark.parametrize(
        ('capability', 'dtype'),
        [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
    )
    def test_the_default_on_a_gpu_is_what_it_multiplies_fast(self, monkeypatch, capability, dtype):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert default_dtype(torch.device('cuda')) == dtype

    def test_the_default_on_a_cpu_is_float32(self):
        assert default_dtype(torch.device('cpu')) == torch.float32
        assert load_model(CONFIG, 'random').dtype == torch.float32
