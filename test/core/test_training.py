"""A miniature training run: the loss falls, a killed run goes on exactly, sources mix."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from stream3r_core.checkpoints import load_model
from stream3r_core.config import ModelConfig, from_dict, to_dict
from stream3r_core.errors import CheckpointError, ConfigError, DataError
from stream3r_core.evaluation.datasets import tum
from stream3r_core.evaluation.trajectory import Trajectory, ate
from stream3r_core.geometry import unproject_to_world
from stream3r_core.synthetic import HAND_HELD, render_sequence
from stream3r_core.synthetic.folders import write_scene_folder, write_tum
from stream3r_core.synthetic.trajectories import sample_paths
from stream3r_core.synthetic.worlds import make_world
from stream3r_core.training.augment import ColorJitter
from stream3r_core.training.batch import make_targets
from stream3r_core.training.checkpointing import latest_checkpoint
from stream3r_core.training.data import DataMixture, Visibility, step_seed
from stream3r_core.training.export import export
from stream3r_core.training.folders import SceneFolder, choose_views, load_view, views_of
from stream3r_core.training.initialise import fit_pose_layer
from stream3r_core.training.objectives import query_pixels
from stream3r_core.training.optimizers import learning_rate
from stream3r_core.training.run import main
from stream3r_core.training.settings import (
    FolderConfig,
    OptimizerConfig,
    StageConfig,
    TaughtHead,
    TrainingConfig,
    load_recipe,
)
from stream3r_core.training.trainer import make_network
from stream3r_core.training.validation import path_error, validate

SMALL = ModelConfig(
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=4,
    num_heads=2,
    num_register_tokens=1,
    encoder='conv',
    camera_trunk_depth=1,
    camera_heads=2,
    camera_iterations=2,
    dpt_features=8,
    dpt_out_channels=(8, 8, 8, 8),
    dpt_layers=(0, 1, 2, 3),
    dpt_head_features_2=8,
)


def recipe(steps=6, **changes):
    dense = changes.get('loss', 'dense') == 'dense'
    stage = StageConfig(
        steps=steps,
        batch=2,
        frames=(2, 3),
        size_hw=(24, 32),
        windows=(0, 2),
        keep=(1.0, 0.5) if dense else (1.0,),
        dense_share=0.5 if dense else 1.0,
    )
    config = TrainingConfig(
        model=SMALL,
        precision='no',
        save_every=3,
        validate_every=1000,
        validation_scenes=2,
        validation_frames=3,
        stages=(stage,),
        taught=(TaughtHead(layer=1), TaughtHead(2, 1, 'anchor')) if dense else (),
        match_position_weight=0.1,
        loss=changes.get('loss', 'dense'),
        optimizer=OptimizerConfig(name='muon', lr=4e-3, warmup_steps=2, ema_decay=0.9),
    )
    return dataclasses.replace(config, **changes)


def log_of(folder, kind):
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [line for line in lines if line['kind'] == kind]


def tensors_of(folder):
    from safetensors.torch import load_file

    newest = latest_checkpoint(folder)
    return {
        f'{name}.{key}': tensor
        for name in ('live', 'weights', 'optimizer')
        for key, tensor in load_file(newest / f'{name}.safetensors').items()
    }


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    single = dataclasses.replace(SMALL, camera_iterations=1)
    config = recipe(steps=6, model=single, fit_pose_step=4, fit_pose_batches=3)
    main(config, whole, device='cpu')
    # The schedule belongs to the recipe: the same recipe, killed at a checkpoint.
    main(config, parts, device='cpu', stop_at=3)
    assert latest_checkpoint(parts).name == 'step_00000003'
    main(config, parts, device='cpu')
    a, b = tensors_of(whole), tensors_of(parts)
    assert a.keys() == b.keys() and len(a) > 100
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((latest_checkpoint(parts) / 'run.json').read_text())['recipe'] == json.loads(
        json.dumps(to_dict(config))
    )


def test_the_loss_falls_and_the_weights_can_be_loaded(tmp_path):
    main(recipe(steps=150, save_every=150), tmp_path, device='cpu')
    first, *_, last = log_of(tmp_path, 'train')
    assert last['loss'] < 0.85 * first['loss']
    validation = log_of(tmp_path, 'validation')[-1]
    assert 0 < validation['abs_rel'] < 1 and validation['static_ate_percent'] > 50
    model = load_model(None, latest_checkpoint(tmp_path) / 'weights.safetensors')
    assert model.config == SMALL


@pytest.mark.parametrize('loss', ['stream3r', 'distill', 'points'])
def test_the_published_objectives_train_with_a_frozen_encoder(tmp_path, loss):
    main(recipe(steps=1, save_every=1), tmp_path / 'start', device='cpu')
    start = latest_checkpoint(tmp_path / 'start') / 'live.safetensors'
    before = load_model(None, start).state_dict()
    config = recipe(
        steps=2,
        loss=loss,
        stages=(StageConfig(steps=2, batch=2, frames=(2,), size_hw=(24, 32), windows=(0, -1)),),
        init=str(start),
        teacher=str(start) if loss == 'distill' else '',
        freeze=('aggregator.patch_embed',),
        checkpoint_blocks=True,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, accumulate=2),
    )
    main(config, tmp_path / loss, device='cpu')
    after = load_model(None, latest_checkpoint(tmp_path / loss) / 'live.safetensors').state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith('aggregator.patch_embed') for name in changed)
    assert any(name.startswith('aggregator.global_blocks') for name in changed)
    assert any(name.startswith('camera_head') for name in changed) == (loss != 'points')


def test_exported_weights_are_small_and_answer_the_same(tmp_path):
    main(recipe(steps=1, save_every=1), tmp_path / 'run', device='cpu')
    folder = export(tmp_path / 'run', tmp_path / 'small.safetensors')
    whole = folder / 'weights.safetensors'
    assert (tmp_path / 'small.safetensors').stat().st_size < 0.55 * whole.stat().st_size
    images = torch.rand(1, 2, 3, 24, 32)
    with torch.no_grad():
        a, b = (
            load_model(None, f)(images, mode='causal')
            for f in (whole, tmp_path / 'small.safetensors')
        )
    for name in ('pose_enc', 'depth'):
        torch.testing.assert_close(a[name], b[name], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize('alignment', ['sim3', 'se3'])
def test_the_closed_form_path_error_equals_the_one_of_the_evaluation(alignment):
    g = torch.Generator().manual_seed(3)
    time_s = torch.arange(20)[None] / 5
    world = make_world(2, g, 8)
    a, b = sample_paths(world, time_s.expand(2, -1), HAND_HELD, g).double()
    stamps = np.arange(20) * 10**8
    wanted = ate(
        Trajectory(stamps, b.numpy(), 'truth'), Trajectory(stamps, a.numpy(), 'guess'), alignment
    ).statistics['rmse']
    assert path_error(a, b, alignment == 'sim3') == pytest.approx(wanted, rel=1e-5)


def test_validation_knows_a_perfect_network_and_its_baselines():
    batch = DataMixture(recipe()).held_out(0)[0]
    targets = make_targets(batch)

    class Oracle:
        training = False
        eval = train = lambda self, *_: self

        def __call__(self, images, mode, window):
            return {'depth': targets.depth[..., None], 'pose_enc': targets.pose_enc}

    row = validate(Oracle(), [batch])
    assert row['abs_rel'] < 1e-5 and row['delta'] == 1 and row['fov_error_deg'] < 1e-3
    assert max(row['ate_percent'], row['ate_se3_percent']) < 0.5
    assert row['rotation_deg'] < 0.1 and row['rpe_deg'] < 0.1 and row['rpe_m'] < 1e-4
    assert row['static_rotation_deg'] > 1


def test_refined_poses_are_judged_beside_those_of_the_network():
    stage = StageConfig(size_hw=(48, 64), motions=('calm',))
    config = TrainingConfig(validation_scenes=1, validation_frames=10, stages=(stage,))
    batch = DataMixture(config).held_out(0)[0]
    targets = make_targets(batch)
    stated = targets.pose_enc.clone()
    torch.manual_seed(0)
    stated[:, 1:, :3] += 0.1 * torch.randn_like(stated[:, 1:, :3])

    class Shaky:
        training = False
        eval = train = lambda self, *_: self

        def __call__(self, images, mode, window):
            return {'depth': targets.depth[..., None], 'pose_enc': stated}

    row = validate(Shaky(), [batch], refine=True)
    assert row['refined_ate_percent'] < row['ate_percent'] / 2
    assert 'refined_ate_percent' not in validate(Shaky(), [batch])


def test_the_fitted_pose_layer_beats_a_camera_that_never_moves():
    config = recipe(model=dataclasses.replace(SMALL, camera_iterations=1))
    data, model = DataMixture(config), make_network(config)
    images = [data.batch(0, i) for i in range(30)]
    fit_pose_layer(model, images)
    answers, truth = [], []
    for batch in images:
        with torch.no_grad():
            answers.append(model(batch.images, mode='causal')['pose_enc'].flatten(0, 1))
        truth.append(make_targets(batch).pose_enc.flatten(0, 1))
    answers, truth = torch.cat(answers), torch.cat(truth)
    static = torch.cat([truth.new_tensor([0, 0, 0, 0, 0, 0, 1]), truth[:, 7:].mean(0)])
    assert (answers - truth).square().mean() < 0.9 * (static - truth).square().mean()
    with pytest.raises(ConfigError, match='camera_iterations'):
        fit_pose_layer(make_network(recipe()), images)


def test_batches_depend_on_seed_draw_and_process_only():
    config = recipe()
    a, b = DataMixture(config, 0), DataMixture(config, 1)
    assert torch.equal(a.batch(4, 4).images, DataMixture(config, 0).batch(4, 4).images)
    assert a.batch(4, 4).images.shape == b.batch(4, 4).images.shape
    assert not torch.equal(a.batch(4, 4).images, b.batch(4, 4).images)
    assert (
        len({step_seed(1, draw, process) for draw in range(300) for process in range(4)}) == 1200
    )
    draws = {Visibility.draw(config.stages[0], 0, i).mode for i in range(40)}
    assert draws == {'causal', 'window'}


def test_held_out_rooms_and_textures_are_never_trained_on():
    config = recipe()
    data = DataMixture(config)
    held_out = torch.cat([b.images for b in data.held_out(0)])
    assert held_out.shape[:2] == (2, 3)
    assert all(data.held_out(0)[i] is data.held_out(0)[i] for i in range(len(data.held_out(0))))


def test_written_scenes_are_read_back_with_their_geometry(tmp_path):
    recording = render_sequence(seed=2, num_frames=5, height=48, width=64)
    write_scene_folder(recording, tmp_path / 'room')
    config = FolderConfig(path=str(tmp_path), max_interval=1, video_prob=1.0)
    batch = SceneFolder(config).batch(2, 3, (24, 32), seed=0)
    assert batch.images.shape == (2, 3, 3, 24, 32)
    points = unproject_to_world(batch.depth, batch.K, batch.T_world_camera)
    everything = unproject_to_world(recording.depth_m, recording.K, recording.T_world_camera)
    nearest = torch.cdist(points[0, 0].reshape(-1, 3), everything.reshape(-1, 3)).amin(1)
    assert nearest.quantile(0.95) < 0.08
    assert torch.equal(SceneFolder(config).batch(2, 3, (24, 32), seed=0).depth, batch.depth)


def test_a_scene_scaled_larger_and_cut_keeps_its_geometry(tmp_path):
    recording = render_sequence(seed=2, num_frames=5, height=48, width=64)
    write_scene_folder(recording, tmp_path / 'room')
    files = views_of(tmp_path / 'room')[0]
    _, _, T_world_camera, K = load_view(files, (24, 32))
    _, cut_depth, _, cut_K = load_view(files, (24, 32), margin=12)
    assert cut_depth.shape == (24, 32) and cut_K[0, 0] > 1.3 * K[0, 0]
    small, whole = (
        unproject_to_world(d, k, T_world_camera).reshape(-1, 3)
        for d, k in ((cut_depth, cut_K), (recording.depth_m[0], recording.K))
    )
    assert torch.cdist(small, whole).amin(1).quantile(0.95) < 0.05


def test_the_colours_of_a_folder_vary_by_view_or_by_clip(tmp_path):
    recording = render_sequence(seed=2, num_frames=4, height=48, width=64)
    same = dataclasses.replace(recording, images=recording.images[:1].expand(4, -1, -1, -1))
    write_scene_folder(same, tmp_path / 'room')

    def images(**changes):
        config = FolderConfig(path=str(tmp_path), video_prob=1.0, **changes)
        return SceneFolder(config).batch(1, 3, (24, 32), seed=4).images[0]

    plain = images()
    by_view, by_clip = (
        images(jitter=(0.5, 0.5, 0.5, 0.1), jitter_per_view=each) for each in (True, False)
    )
    assert torch.equal(plain[0], plain[1]) and torch.equal(by_clip[0], by_clip[1])
    assert not torch.equal(by_view[0], by_view[1])
    assert (by_clip[0] - plain[0]).abs().max() > 0.05
    with pytest.raises(ConfigError, match='jitter'):
        images(jitter=(0.5, 0.5, 0.5, 0.9))


def test_a_turn_of_the_hue_is_a_turn_of_the_colour_circle():
    red = Image.new('RGB', (2, 2), (255, 0, 0))
    still = (1.0, 1.0, 1.0)
    turned = ColorJitter(still, 1 / 3, (3, 0, 1, 2))(red)
    assert np.abs(np.array(turned)[0, 0].astype(int) - (0, 255, 0)).max() <= 8
    assert np.array(ColorJitter((0.5, 1.0, 1.0), 0.0, (0, 1, 2, 3))(red))[0, 0, 0] == 127


def test_a_written_tum_sequence_is_read_by_the_evaluation(tmp_path):
    recording = render_sequence(seed=3, num_frames=4, height=42, width=56)
    write_tum(recording, tmp_path / 'room')
    clip = tum.read(tmp_path, 'room')
    assert len(clip) == 4
    truth = recording.T_world_camera.numpy()
    for i, frame in enumerate(clip.frames):
        assert (frame.load_image() == recording.images[i].numpy()).all()
        np.testing.assert_allclose(frame.load_depth_m(), recording.depth_m[i], atol=1.1e-4)
        np.testing.assert_allclose(frame.T_world_camera, truth[i], atol=1e-5)
    assert clip.frames[1].stamp_ns == recording.stamps_ns[1]


def test_mixed_data_comes_from_both_sources(tmp_path):
    write_scene_folder(
        render_sequence(seed=2, num_frames=4, height=48, width=64), tmp_path / 'room'
    )
    config = recipe(folders=(FolderConfig(path=str(tmp_path), weight=1.0),), synthetic_weight=1.0)
    data = DataMixture(config)
    heights = {float(data.batch(0, i).T_world_camera[0, 0, 2, 3]) for i in range(12)}
    recorded = {round(float(z), 5) for z in render_sequence(2, 4, 48, 64).T_world_camera[:, 2, 3]}
    from_folder = [h for h in heights if round(h, 5) in recorded]
    assert from_folder and len(from_folder) < len(heights)


@pytest.mark.parametrize('total', [3, 10, 200])
def test_views_are_videos_or_collections_within_the_scene(total):
    rng = random.Random(0)
    for _ in range(50):
        video = choose_views(total, 5, rng, 20, 1.0, 0.0)
        loose = choose_views(total, 5, rng, 20, 0.0, 0.0)
        assert all(0 <= i < total for i in video + loose) and len(video) == len(loose) == 5
        if total >= 5:
            assert video == sorted(video) and len(set(loose)) == 5
            assert max(np.diff(video)) <= 20
    steady = choose_views(200, 5, rng, 20, 1.0, 1.0)
    assert len(set(np.diff(steady))) == 1


def test_query_pixels_are_known_pixels():
    valid = torch.zeros(2, 8, 10, dtype=torch.bool)
    valid[0, 2:8, 3:] = True
    valid[1, 0, 0] = True
    queries = query_pixels(valid, 0, 20)
    assert torch.equal(queries, query_pixels(valid, 0, 20))
    assert not torch.equal(queries, query_pixels(valid, 1, 20))
    x, y = queries[0].long().unbind(-1)
    assert valid[0, y, x].all() and len(queries[0].unique(dim=0)) == 20
    assert (queries[1] == 0).all()


def test_the_schedule_warms_up_and_decays():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[9] == pytest.approx(1.0) and rates[0] == pytest.approx(0.1)
    assert sorted(rates[10:], reverse=True) == rates[10:] and rates[100] == pytest.approx(0.1)


def test_every_shipped_recipe_can_be_read():
    from pathlib import Path

    folder = Path(__file__).parents[2] / 'config' / 'training'
    names = {path.stem: load_recipe(path) for path in sorted(folder.glob('*.yaml'))}
    assert {'tiny_synthetic', 'finetune_stream3r', 'finetune_vggt', 'distill_streamvggt'} <= set(
        names
    )
    assert names['distill_streamvggt'].loss == 'distill'
    assert names['finetune_stream3r'].freeze == ('aggregator.patch_embed',)


def test_wrong_recipes_say_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match='does not exist'):
        load_recipe(tmp_path / 'none.yaml')
    with pytest.raises(ConfigError, match='teacher'):
        main(recipe(loss='distill'), tmp_path / 'a', device='cpu')
    with pytest.raises(ConfigError, match='no parameter starts with'):
        main(recipe(freeze=('nonsense',)), tmp_path / 'b', device='cpu')
    with pytest.raises(ConfigError, match='unknown option'):
        from_dict(TrainingConfig, {'learning_rate': 3})
    for name, value in (
        ('motions', ('teleport',)),
        ('worlds', ('moon',)),
        ('frames', ()),
        ('frames', (0,)),
        ('size_hw', (48,)),
        ('fps', (5.0,)),
        ('fps', (5.0, 2.0)),
        ('fov_deg', (50.0, 200.0)),
        ('room_half_m', (1.0,)),
        ('windows', (-7,)),
        ('keep', (-1.0,)),
    ):
        with pytest.raises(ConfigError, match=f'{name}: expected'):
            StageConfig(**{name: value})
    for changes in (
        {'loss': 'points', 'taught': (TaughtHead(),)},
        {'stages': ()},
        {'init': 'shipped'},
    ):
        with pytest.raises(ConfigError, match=r'expected|init'):
            recipe(**changes)
    for wrong in (TaughtHead(layer=4), TaughtHead(head=2)):
        with pytest.raises(ConfigError, match='global blocks 0 to 3 with heads 0 to 1'):
            main(recipe(taught=(wrong,)), tmp_path / 'm', device='cpu')
    (tmp_path / 'torn.yaml').write_text('a: [')
    with pytest.raises(ConfigError, match='no YAML'):
        load_recipe(tmp_path / 'torn.yaml')
    with pytest.raises(DataError, match='no scene found'):
        SceneFolder(FolderConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match='no training data'):
        DataMixture(recipe(synthetic_weight=0.0))
    broken = tmp_path / 'c' / 'step_00000003'
    broken.mkdir(parents=True)
    with pytest.raises(CheckpointError, match='not a complete'):
        main(recipe(), tmp_path / 'c', device='cpu')
