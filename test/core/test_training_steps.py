"""What one training step does, piece by piece, each beside a known answer."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_training import SMALL, recipe, tensors_of
from torch import nn

from stream3r_core.config import TrackConfig
from stream3r_core.errors import CheckpointError, ConfigError
from stream3r_core.geometry import encode_pose, invert_se3
from stream3r_core.training.attention_rules import ForgettingAttention
from stream3r_core.training.batch import Batch, make_targets
from stream3r_core.training.data import DataMixture, Visibility, step_seed
from stream3r_core.training.dense_loss import DenseLossConfig, dense_loss
from stream3r_core.training.optimizers import make_optimizers, set_learning_rate
from stream3r_core.training.precision import mixed_precision, precision_of
from stream3r_core.training.run import main
from stream3r_core.training.settings import (
    FolderConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
)
from stream3r_core.training.trainer import Trainer
from stream3r_core.training.validation import validate


@pytest.fixture(autouse=True)
def _own_accelerator_state():
    """Accelerate keeps the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(tmp_path, **changes):
    config = recipe(**changes)
    return Trainer(config, tmp_path, Accelerator(mixed_precision=config.precision, cpu=True))


def still_rooms(seed=0, frames=3):
    """A batch of one clip."""
    return DataMixture(recipe(seed=seed, stages=(StageConfig(batch=1, frames=(frames,)),))).batch(
        0, 0
    )


def moved(batch, offset_m):
    """The same clip in a world whose origin lies somewhere else."""
    T = batch.T_world_camera.clone()
    T[..., :3, 3] += offset_m
    return dataclasses.replace(batch, T_world_camera=T)


def test_targets_and_losses_are_computed_in_float32_whatever_the_network_does(tmp_path):
    t = trainer(tmp_path, precision='bf16')
    batch = t.data.batch(0, 0)
    seen = {}
    hook = t.network.aggregator.frame_blocks[0].mlp.register_forward_hook(
        lambda *args: seen.update(network=args[2].dtype)
    )
    near, far = (
        t.objective(t.model, moved(batch, offset), Visibility()) for offset in (0.0, 100.0)
    )
    hook.remove()
    assert seen['network'] == torch.bfloat16
    for name, term in near.items():
        assert term.dtype == torch.float32
        # float32 keeps 1e-5 of 100 m; bfloat16 would lose a third of a metre.
        torch.testing.assert_close(term, far[name], rtol=5e-3, atol=1e-4)


def test_the_average_of_the_weights_lags_behind_them(tmp_path):
    t = trainer(tmp_path)
    before = {k: v.clone() for k, v in t.averaged.state_dict().items()}
    t.train_step()
    decay = min(0.9, 2 / 11)
    for name, value in t.network.state_dict().items():
        wanted = decay * before[name] + (1 - decay) * value
        torch.testing.assert_close(t.averaged.state_dict()[name], wanted, atol=1e-6, rtol=1e-5)


def gradients(t, monkeypatch):
    """Gradients as the optimisers see them."""
    found = {}
    for optimizer in t.optimizers:
        monkeypatch.setattr(
            optimizer,
            'step',
            lambda: found.update(
                {n: p.grad.clone() for n, p in t.network.named_parameters() if p.grad is not None}
            ),
        )
    t.train_step()
    return found


def test_gradients_are_clipped(tmp_path, monkeypatch):
    found = gradients(
        trainer(tmp_path, optimizer=OptimizerConfig(lr=1e-3, clip_norm=0.01)), monkeypatch
    )
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_accumulated_batches_are_different_batches_and_give_the_mean_gradient(
    tmp_path, monkeypatch
):
    def found(accumulate, draw=None):
        t = trainer(tmp_path, optimizer=OptimizerConfig(clip_norm=1e9, accumulate=accumulate))
        if draw is not None:
            whole = t._accumulate_gradient
            monkeypatch.setattr(t, '_accumulate_gradient', lambda part: whole(draw))
        return gradients(t, monkeypatch)

    together, first, second = found(2), found(1, 0), found(1, 1)
    assert any(not torch.allclose(first[n], second[n]) for n in first)
    for name, gradient in together.items():
        wanted = (first[name] + second[name]) / 2
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


def test_recomputed_blocks_give_the_same_gradients_also_when_tokens_are_forgotten(
    tmp_path, monkeypatch
):
    stage = StageConfig(batch=2, frames=(4,), size_hw=(24, 32), keep=(0.5,))
    plain, again = (
        gradients(trainer(tmp_path, stages=(stage,), checkpoint_blocks=c), monkeypatch)
        for c in (False, True)
    )
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], atol=1e-6, rtol=1e-5)


def test_recomputed_blocks_are_really_run_twice(tmp_path):
    runs = []
    t = trainer(tmp_path, checkpoint_blocks=True)
    t.network.aggregator.global_blocks[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    t.train_step()
    assert len(runs) == 2


def test_matrices_decay_vectors_do_not_and_every_group_has_its_share():
    model = nn.ModuleDict({'camera_head': nn.ModuleDict({'pose_branch': nn.Linear(2, 3)})})
    model['rest'] = nn.Linear(2, 2)
    config = OptimizerConfig(lr=1.0, pose_factor=0.2, rest_factor=0.5, weight_decay=0.1)
    optimizers = make_optimizers(model, config)
    set_learning_rate(optimizers, 2.0)
    rates = {
        id(p): (g['lr'], g['weight_decay'])
        for o in optimizers
        for g in o.param_groups
        for p in g['params']
    }
    pose = model['camera_head']['pose_branch']
    assert rates[id(pose.weight)] == (0.4, 0.1) and rates[id(pose.bias)] == (0.4, 0.0)
    assert rates[id(model['rest'].weight)] == (1.0, 0.1)
    assert rates[id(model['rest'].bias)] == (1.0, 0.0)


def test_forgetting_keeps_the_first_frame_the_own_one_and_special_tokens():
    P, frames, special = 20, 4, 2
    seen = ForgettingAttention(frames, 0.3, 5, special)._visible(
        3, P, torch.Generator().manual_seed(0)
    )
    seen = set(seen.tolist())
    assert set(range(P)) | set(range(3 * P, 4 * P)) <= seen
    assert {P, P + 1, 2 * P, 2 * P + 1} <= seen
    others = {i for i in range(P, 3 * P) if i % P >= special}
    assert 0.1 < len(others & seen) / len(others) < 0.6
    q, k, v = torch.randn(3, 1, 1, frames * P, 8).unbind(0)
    rule = ForgettingAttention(frames, 0.3, 5, special)
    assert torch.equal(rule(1)(q, k, v), rule(1)(q, k, v))
    assert not torch.equal(rule(1)(q, k, v), rule(2)(q, k, v))


def test_a_stage_can_shift_the_principal_point():
    K = {
        shift: DataMixture(recipe(stages=(StageConfig(principal_shift=shift),))).batch(0, 0).K
        for shift in (0.0, 0.1)
    }
    assert (K[0.0][..., :2, 2] == torch.tensor([32.0, 24.0])).all()
    off = (K[0.1][..., :2, 2] / torch.tensor([64.0, 48.0]) - 0.5).abs()
    assert 0.02 < off.max() <= 0.1 and torch.equal(K[0.0][..., 0, 0], K[0.1][..., 0, 0])


class Answers:
    """A network that says what it is told, whatever it sees."""

    training = False
    eval = train = lambda self, *_: self

    def __init__(self, depth, T_world_camera, K):
        height, width = depth.shape[-2:]
        pose_enc = encode_pose(invert_se3(T_world_camera), K, height, width)
        self.answer = {'depth': depth[..., None], 'pose_enc': pose_enc}

    def __call__(self, images, mode, window):
        return self.answer


def test_validation_gives_the_figures_one_works_out_by_hand():
    """Depth 1.4 times too far in a tenth of the image; the path bends by what is given."""
    depth = torch.full((1, 3, 10, 10), 2.0)
    T = torch.eye(4).repeat(1, 3, 1, 1)
    T[0, 1, 0, 3], T[0, 2, 0, 3] = 1.0, 2.0
    K = torch.tensor([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]]).expand(1, 3, 3, 3)
    batch = Batch(torch.rand(1, 3, 3, 10, 10), depth, T, K)
    answer, path = depth.clone(), T.clone()
    answer[..., 0] *= 1.4
    c, s = torch.cos(torch.tensor(0.1)), torch.sin(torch.tensor(0.1))
    path[0, 2, :2, :2] = torch.tensor([[c, -s], [s, c]])
    path[0, 2, 1, 3] = 0.3
    row = validate(Answers(answer, path, K), [batch], bf16=False)
    assert row['abs_rel'] == pytest.approx(0.04, rel=1e-4)
    assert row['delta'] == pytest.approx(0.9)
    assert row['rotation_deg'] == pytest.approx(5.7296, rel=1e-3)
    assert row['static_rotation_deg'] == pytest.approx(0, abs=0.05)
    assert row['extent_m'] == pytest.approx((2 / 3) ** 0.5, rel=1e-5)
    assert row['rpe_m'] == pytest.approx(0.3 / 2**0.5, rel=1e-3)
    assert row['rpe_deg'] == pytest.approx(5.7296 / 2**0.5, rel=1e-3)
    # A bend of a straight path by 0.3 of 2: rotated on it, 0.3 * sqrt(1/18) = 0.0707 are left.
    assert row['ate_percent'] == pytest.approx(100 * 0.0707 / 0.8165, rel=0.03)


def test_the_dense_loss_weighs_errors_across_the_ray_and_rewards_confidence():
    batch = still_rooms()
    targets = make_targets(batch)
    ones = torch.ones_like(targets.depth)
    perfect = {
        'depth': targets.depth[..., None],
        'world_points': targets.world_points,
        'depth_conf': ones,
        'world_points_conf': ones,
        'pose_enc_list': [targets.pose_enc],
    }
    config = DenseLossConfig()
    best = dense_loss(perfect, targets, config)
    assert all(abs(float(best[name])) < 1e-5 for name in best)
    ray = targets.world_points - targets.camera_position[..., None, None, :]
    distance = ray.norm(dim=-1, keepdim=True)
    across = torch.linalg.cross(ray, ray.new_tensor([0.0, 0, 1]).expand_as(ray))
    across = 0.1 * distance * across / across.norm(dim=-1, keepdim=True)
    for shift, name, weight in ((across, 'points_across', 4.0), (0.1 * ray, 'points_along', 1.0)):
        shifted = {**perfect, 'world_points': targets.world_points + shift}
        terms = dense_loss(shifted, targets, config)
        assert float(terms[name]) == pytest.approx(0.1 * weight, rel=1e-3)
        other = 'points_along' if name == 'points_across' else 'points_across'
        assert float(terms[other]) < 1e-3
    sure = dense_loss({**perfect, 'depth_conf': 2 * ones}, targets, config)
    assert sure['confidence'] < best['confidence']


def test_what_is_drawn_for_one_purpose_says_nothing_of_another():
    draws = range(2000)
    a, b = (
        torch.tensor([step_seed(3, d, purpose=p) for d in draws]).double()
        for p in ('batch', 'content')
    )
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.08


def test_a_mixture_shows_all_scenes_of_a_folder(tmp_path, monkeypatch):
    for i in range(12):
        for part, suffix in (('rgb', 'png'), ('depth', 'npy'), ('cam', 'npz')):
            (tmp_path / f's{i:02}' / part).mkdir(parents=True)
            (tmp_path / f's{i:02}' / part / f'0.{suffix}').touch()
        np.savez(tmp_path / f's{i:02}' / 'cam' / '0.npz', intrinsics=np.eye(3), pose=np.eye(4))
    config = recipe(folders=(FolderConfig(path=str(tmp_path)),), seed=4)
    data, seen = DataMixture(config), []
    loaded = still_rooms(frames=2)
    one = [loaded.images[0, 0], loaded.depth[0, 0], loaded.T_world_camera[0, 0], loaded.K[0, 0]]
    monkeypatch.setattr(
        data.folders[0],
        '_load',
        lambda views, *_: seen.append(views[0][0].parts[-3]) or [one] * len(views),
    )
    monkeypatch.setattr('stream3r_core.training.data.rendered', lambda *_: loaded)
    for draw in range(120):
        data.batch(0, draw)
    counts = [seen.count(f's{i:02}') for i in range(12)]
    assert min(counts) > 0 and 60 < sum(counts) < 220


def test_validation_sees_what_training_sees(tmp_path):
    stage = StageConfig(batch=1, frames=(2,), size_hw=(24, 32), windows=(-1,))
    t, modes = trainer(tmp_path, stages=(stage,)), []
    forward = t.averaged.forward
    t.averaged.forward = lambda *args, **kw: modes.append(kw['mode']) or forward(*args, **kw)
    t.validate()
    assert set(modes) == {'full'}


TRACKED = dataclasses.replace(
    SMALL,
    track=TrackConfig(
        features=16, corr_levels=2, corr_radius=1, hidden_size=32, depth=1, num_heads=2, iters=1
    ),
)


def many(tmp_path, loss, **changes):
    """A recipe with two stages and accumulated batches, of any loss."""
    start = tmp_path / 'start'
    model = TRACKED if loss == 'distill' else dataclasses.replace(SMALL, camera_iterations=1)
    if loss == 'distill' and not start.exists():
        main(recipe(steps=1, model=model, loss='points'), start, device='cpu')
    teacher = str(start / 'step_00000001' / 'weights.safetensors') if loss == 'distill' else ''
    stages = tuple(
        StageConfig(steps=2, batch=1, frames=(n,), size_hw=(24, 32), windows=(0, 2))
        for n in (2, 3)
    )
    return recipe(
        model=model,
        loss=loss,
        teacher=teacher,
        stages=stages,
        save_every=1,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, accumulate=2),
        **changes,
    )


@pytest.mark.parametrize('loss', ['stream3r', 'distill'])
def test_a_killed_run_goes_on_exactly_with_every_loss(tmp_path, loss):
    config = many(tmp_path, loss)
    main(config, tmp_path / 'whole', device='cpu')
    torch.manual_seed(77)  # what else the process drew must not matter
    main(config, tmp_path / 'parts', device='cpu', stop_at=1)
    torch.manual_seed(78)
    main(config, tmp_path / 'parts', device='cpu')
    a, b = tensors_of(tmp_path / 'whole'), tensors_of(tmp_path / 'parts')
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_only_with_its_own_recipe_and_forgets_later_lines(tmp_path):
    config = recipe(steps=3, save_every=1, validate_every=1)
    main(config, tmp_path, device='cpu', stop_at=0)
    assert not (tmp_path / 'log.jsonl').exists()
    main(config, tmp_path, device='cpu', stop_at=2)
    for changes in ({'seed': 9}, {'freeze': ('aggregator',)}, {'model': TRACKED}):
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            main(dataclasses.replace(config, **changes), tmp_path, device='cpu')
    saved = tmp_path / 'step_00000002' / 'run.json'
    older = json.loads(saved.read_text())
    del older['recipe']['stages'][0]['principal_shift']  # made before there was this option
    saved.write_text(json.dumps(older))
    with (tmp_path / 'log.jsonl').open('a') as file:
        file.write(json.dumps({'kind': 'validation', 'step': 3, 'abs_rel': 0.0}) + '\n')
    main(dataclasses.replace(config, save_every=2), tmp_path, device='cpu')
    lines = [json.loads(x) for x in (tmp_path / 'log.jsonl').read_text().splitlines()]
    steps = [line['step'] for line in lines if line['kind'] == 'validation']
    assert steps == [1, 2, 3]


def test_a_pose_layer_that_cannot_be_fitted_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match='camera_iterations'):
        trainer(tmp_path, fit_pose_step=1, fit_pose_batches=1)


def test_two_processes_train_one_network(tmp_path):
    """Over gloo, as the Accelerate launcher starts them; every loss, and the fitted pose layer."""
    many(tmp_path, 'distill')
    script = Path(__file__).with_name('train_two_processes.py')
    here = Path(__file__).parents[2]
    path = os.pathsep.join([str(here), str(script.parent), os.environ.get('PYTHONPATH', '')])
    command = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone']
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path)],
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob('rank*.json'))]
    assert len(ranks) == 2 and ranks[0] == ranks[1]
    assert set(ranks[0]) == {'dense', 'distill', 'stream3r', 'points'}


@pytest.mark.parametrize('has, wanted', [(True, 'bf16'), (False, 'no')])
def test_auto_precision_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, has, wanted):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has)
    config, cpu = TrainingConfig(), torch.device('cpu')
    assert mixed_precision(config, cpu) == wanted
    with precision_of(config, cpu):
        assert torch.is_autocast_enabled('cpu') == has
    assert mixed_precision(config, torch.device('cuda')) == 'bf16'
    fixed = dataclasses.replace(config, precision='no')
    assert mixed_precision(fixed, torch.device('cuda')) == 'no'
