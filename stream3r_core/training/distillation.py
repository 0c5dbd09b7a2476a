"""Distillation as in StreamVGGT: a causal student follows an all-seeing teacher (model.md 19)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.training.published_loss import mean_norm

WEIGHTS = {'camera': 20.0, 'depth': 20.0, 'points': 10.0, 'track': 0.5}
HUBER_DELTA = 0.1
_MIN_CONFIDENCE = 1e-6


def distillation_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], valid: Tensor
) -> dict[str, Tensor]:
    """Return the weighted terms by name; their sum is the loss.

    Both mappings as the network returns them (with track, vis and track_conf if both have a track
    head); ``valid`` [B, S, H, W] bool, the data set's known pixels. Nothing flows into the
    teacher.
    """
    teacher = {k: v.detach() for k, v in teacher.items() if isinstance(v, Tensor)}
    valid = torch.where(valid.any(), valid, True)
    terms = {
        'camera': _camera(student['pose_enc'], teacher['pose_enc']),
        'depth': _per_view(student['depth'], student['depth_conf'], teacher['depth'], valid, True),
        'points': _per_view(
            student['world_points'],
            student['world_points_conf'],
            teacher['world_points'],
            valid,
            False,
        ),
    }
    if 'track' in teacher and 'track' in student:
        terms['track'] = _track(student, teacher)
    return {name: WEIGHTS[name] * term for name, term in terms.items()}


def _camera(student: Tensor, teacher: Tensor) -> Tensor:
    def part(s: slice) -> Tensor:
        error = (student[..., s] - teacher[..., s]).abs()
        quadratic = error.square() / (2 * HUBER_DELTA)
        return torch.where(error <= HUBER_DELTA, quadratic, error - HUBER_DELTA / 2).mean()

    return part(slice(0, 3)) + part(slice(3, 7)) + 0.5 * part(slice(7, 9))


def _per_view(
    predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, is_depth: bool
) -> Tensor:
    """Mean over the views of one dense output [B, S, H, W, C]."""
    views = range(predicted.shape[1])
    losses = [
        _view(predicted[:, s], confidence[:, s], target[:, s], valid[:, s], is_depth)
        for s in views
    ]
    return sum(losses) / len(losses)


def _view(
    predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, is_depth: bool
) -> Tensor:
    per_sample = (slice(None), None, None, None)
    predicted = predicted / mean_norm(predicted[:, None], valid[:, None])[per_sample]
    target = target / mean_norm(target[:, None], valid[:, None])[per_sample]
    aligned = _aligned(predicted, target)
    confidence = confidence.clamp(min=_MIN_CONFIDENCE)
    mask = valid[..., None].to(aligned.dtype)
    weighted = confidence[..., None] * (aligned - target).abs() * mask
    main = weighted.sum() / (mask.sum() * aligned.shape[-1]).clamp(min=1)
    reward = -0.1 * (confidence.log() * valid).sum() / valid.sum().clamp(min=1)
    shape = _difference_term(aligned, target, mask) if is_depth else normal_term(aligned, target)
    return main + shape + reward


def _aligned(predicted: Tensor, target: Tensor) -> Tensor:
    """Best scale and per-channel shift of the whole batch, over all pixels (valid or not)."""
    axes = (0, 1, 2)
    mean, true_mean = predicted.mean(axes), target.mean(axes)
    centred, true_centred = predicted - mean, target - true_mean
    scale = (centred * true_centred).sum() / centred.square().sum().clamp(min=1e-6)
    return predicted * scale + (true_mean - scale * mean)


def _difference_term(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Differences between known neighbours, averaged over the common (H-1) x (W-1) area."""
    error = predicted - target
    along_x = error.diff(dim=2).abs() * mask[:, :, 1:] * mask[:, :, :-1]
    along_y = error.diff(dim=1).abs() * mask[:, 1:] * mask[:, :-1]
    return (along_x[:, :-1] + along_y[:, :, :-1]).mean() / 2


def normal_term(predicted: Tensor, target: Tensor) -> Tensor:
    """One minus the mean cosine of surface normals at strides 1, 2 and 4; [B, H, W, 3] each."""
    total = predicted.new_zeros(())
    for step in (1, 2, 4):
        a, b = (_normals(p[:, ::step, ::step]) for p in (predicted, target))
        total = total + 1 - (a * b).sum(-1).mean()
    return total / 3


def _normals(points: Tensor) -> Tensor:
    """Unit normals [4, B, H, W, 3] from the four pairs of neighbours around each pixel."""
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))
    middle = padded[:, 1:-1, 1:-1]
    up, down = padded[:, :-2, 1:-1] - middle, padded[:, 2:, 1:-1] - middle
    left, right = padded[:, 1:-1, :-2] - middle, padded[:, 1:-1, 2:] - middle
    pairs = ((up, left), (left, down), (down, right), (right, up))
    return F.normalize(torch.stack([torch.linalg.cross(a, b) for a, b in pairs]), dim=-1)


def _track(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    weight = student['track_conf']
    distance = (student['track'] - teacher['track']).norm(dim=-1)
    # vis is a probability already; as published it passes through the sigmoid once more.
    seen = F.binary_cross_entropy_with_logits(student['vis'], teacher['vis'], reduction='none')
    return (weight * distance).mean() + (weight * seen).mean()
