"""The two published objectives equal their golden values and gradients; the dense one behaves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stream3r_core.synthetic import ClipConfig, sample_clips
from stream3r_core.training.batch import Batch, make_targets
from stream3r_core.training.dense_loss import DenseLossConfig, dense_loss
from stream3r_core.training.distillation import distillation_loss
from stream3r_core.training.matching import patch_matches
from stream3r_core.training.published_loss import published_loss, trimmed

GOLDEN = Path(__file__).parents[1] / 'golden'


@pytest.fixture(scope='module')
def published():
    return load_file(GOLDEN / 'loss_stream3r.safetensors')


@pytest.mark.parametrize('case', ['case0', 'case1'])
def test_published_loss_and_its_gradients_equal_the_golden_ones(published, case):
    leaves = {
        name.removeprefix(f'{case}.pred.'): tensor.clone().requires_grad_()
        for name, tensor in published.items()
        if name.startswith(f'{case}.pred.')
    }
    iterations = [leaves[f'pose_enc.iter{i}'] for i in range(4)]
    depth = torch.where(published['gt.valid_mask'], published['gt.depthmap'], 0)
    batch = Batch(
        torch.zeros(2, 4, 3, 28, 42),
        depth,
        published['gt.camera_pose'],
        published['gt.camera_intrinsics'],
    )
    terms = published_loss({**leaves, 'pose_enc_list': iterations}, batch, published['gt.pts3d'])
    loss = sum(terms.values())
    loss.backward()
    torch.testing.assert_close(loss, published[f'{case}.loss'][0], rtol=1e-6, atol=1e-6)
    for name, leaf in leaves.items():
        wanted = published[f'{case}.grad.{name}']
        # An error of one rounding step can have either sign, and so can the slope.
        agrees = torch.isclose(leaf.grad, wanted, rtol=1e-4, atol=1e-7)
        assert agrees.float().mean() > 0.999, name


def test_distillation_loss_and_its_gradients_equal_the_golden_ones():
    golden = load_file(GOLDEN / 'loss_distill.safetensors')
    names = {
        'camera_pose': 'pose_enc',
        'conf': 'world_points_conf',
        'pts3d_in_other_view': 'world_points',
    }
    leaves = {
        k.removeprefix('student.'): v.clone().requires_grad_()
        for k, v in golden.items()
        if k.startswith('student.')
    }
    student = {names.get(k, k): v for k, v in leaves.items()}
    teacher = {
        names.get(k, k): v
        for k, v in ((k.removeprefix('teacher.'), v) for k, v in golden.items())
        if f'teacher.{k}' in golden
    }
    loss = sum(distillation_loss(student, teacher, golden['teacher.valid_mask']).values())
    loss.backward()
    torch.testing.assert_close(loss, golden['loss'][0], rtol=1e-6, atol=0)
    points = leaves.pop('pts3d_in_other_view')
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, golden[f'grad.{name}'], rtol=1e-4, atol=1e-7)
    for view in range(3):
        assert_equal_but_for_corners(
            points.grad[0, view],
            golden['grad.pts3d_in_other_view'][0, view],
            points[0, view].detach(),
            golden['teacher.pts3d_in_other_view'][0, view],
            golden['teacher.valid_mask'][0, view],
        )


def assert_equal_but_for_corners(gradient, wanted, student, teacher, valid):
    """Compare gradients of the normal term, which are rounding noise in the corner pixels.

    There both neighbours of a pair are padding, the normal is the cross product of a vector with
    itself, and normalising it amplifies rounding. The noise reaches the other pixels only through
    the alignment and the mean norm, that is along six directions per view; nothing else
    may differ.
    """
    difference = (gradient - wanted).double()
    inside = torch.ones(28, 42, dtype=torch.bool)
    for rows, columns in (((0, 27), (0, 41)), ((0, 26), (0, 40)), ((0, 24), (0, 40))):
        for row in rows:
            inside[row, list(columns)] = False
    constant = torch.eye(3).expand(28, 42, 3, 3)
    direction = torch.nn.functional.normalize(student, dim=-1) * valid[..., None]
    basis = torch.cat(
        [constant, torch.stack([student, teacher, direction], -1)], -1
    ).double()  # [H, W, 3, 6]
    A, b = basis[inside].reshape(-1, 6), difference[inside].reshape(-1)
    residual = b - A @ torch.linalg.lstsq(A, b).solution
    assert residual.abs().max() < 2e-7
    assert wanted.abs()[inside].max() > 1e-3


def test_trimming_drops_the_largest_two_percent_of_long_lists_only():
    values = torch.arange(5000.0) / 100
    assert len(trimmed(values)) == pytest.approx(4900, abs=1)
    assert len(trimmed(values[:500])) == 500
    assert trimmed(torch.tensor([float('nan'), 1e9])).tolist() == [0, 100]


@pytest.fixture(scope='module')
def batch():
    clips = sample_clips(2, ClipConfig(height=24, width=32, frames=3, fps=5), seed=11)
    return Batch(clips.images, clips.depth_m, clips.T_world_camera, clips.K)


def perfect(targets):
    shape = targets.depth.shape
    return {
        'depth': targets.depth[..., None],
        'depth_conf': torch.ones(shape),
        'world_points': targets.world_points,
        'world_points_conf': torch.ones(shape),
        'pose_enc_list': [targets.pose_enc, targets.pose_enc],
    }


def test_a_perfect_answer_costs_nothing_in_any_unit(batch):
    in_feet = Batch(batch.images, batch.depth * 3.28, batch.T_world_camera.clone(), batch.K)
    in_feet.T_world_camera[..., :3, 3] *= 3.28
    targets = make_targets(batch)
    torch.testing.assert_close(
        make_targets(in_feet).pose_enc, targets.pose_enc, atol=1e-5, rtol=1e-5
    )
    terms = dense_loss(perfect(make_targets(in_feet)), targets, DenseLossConfig())
    assert all(abs(value) < 1e-4 for value in terms.values()), terms


def test_the_first_camera_is_the_origin_and_sees_unit_mean_depth(batch):
    targets = make_targets(batch)
    identity = torch.tensor([0, 0, 0, 0, 0, 0, 1.0])
    torch.testing.assert_close(
        targets.pose_enc[:, 0, :7], identity.expand(2, -1), atol=1e-6, rtol=0
    )
    assert targets.depth[:, 0].log().mean((1, 2)).abs().max() < 1e-5


def test_unknown_depth_is_not_learned_from(batch):
    holes = batch.depth.clone()
    holes[:, :, :10] = 0
    holes[0, 1, 12:, 5] = float('nan')
    targets = make_targets(Batch(batch.images, holes, batch.T_world_camera, batch.K))
    answer = perfect(targets)
    answer['depth'] = torch.where(targets.valid[..., None], answer['depth'], 77.0)
    terms = dense_loss(answer, targets, DenseLossConfig())
    assert terms['log_depth'] == 0 and terms['gradient'] == 0


def test_true_matches_point_at_the_same_place(batch):
    weights, seen = patch_matches(batch, patch_size=8)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(seen))
    own = weights.diagonal(dim1=1, dim2=2)  # a frame matches itself patch by patch
    assert (own.diagonal(dim1=1, dim2=2) > 0.999).all()
    assert 0.3 < seen.mean() <= 1
