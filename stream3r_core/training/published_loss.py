"""The objective of the published STream3R training (model.md 18)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.geometry import (
    encode_pose,
    invert_se3,
    transform_points,
    unproject_to_world,
)
from stream3r_core.training.batch import Batch

GAMMA, ALPHA = 1.0, 0.2
SCALES = 4
LIMIT = 100.0  # the published guard against broken pixels clamps whatever it touches
_FILTER_ABOVE = 1000  # elements
_QUANTILE = 0.98
_SUBSAMPLE = 1_000_000


def published_loss(
    prediction: Mapping[str, Tensor], batch: Batch, world_points: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the terms by name; their sum is the loss.

    ``prediction`` as the network returns it, with ``pose_enc_list``. ``world_points``
    [B, S, H, W, 3] are those of the data set in any world frame; None: from depth and cameras.
    """
    valid = batch.valid
    points = _points_of_first_camera(batch, world_points)
    depth = batch.depth[..., None]
    points_term, _, _ = _regression(
        prediction['world_points'], prediction['world_points_conf'], points, valid
    )
    depth_term, scale, true_scale = _regression(
        prediction['depth'], prediction['depth_conf'], depth, valid
    )
    camera = camera_loss(prediction['pose_enc_list'], batch, scale, true_scale)
    return {'points': points_term, 'depth': depth_term, 'camera': camera}


def points_loss(prediction: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return the confidence-weighted error of the point head alone (model.md 19, last paragraph).

    Prediction and truth are each divided by their mean distance, as in DUSt3R (Wang et al. 2024).
    """
    valid, truth = batch.valid, _points_of_first_camera(batch, None)
    points, confidence = prediction['world_points'], prediction['world_points_conf']
    per_sample = (slice(None),) + (None,) * 4
    error = (
        points / mean_norm(points, valid)[per_sample] - truth / mean_norm(truth, valid)[per_sample]
    ).norm(dim=-1)
    weighted = error * confidence - ALPHA * confidence.log()
    return {'points': weighted[valid].mean() if valid.any() else weighted.sum() * 0}


def _points_of_first_camera(batch: Batch, world_points: Tensor | None) -> Tensor:
    first = invert_se3(batch.T_world_camera[:, :1])
    if world_points is None:
        return unproject_to_world(batch.depth, batch.K, first @ batch.T_world_camera)
    return transform_points(first.expand_as(batch.T_world_camera), world_points)


def mean_norm(points: Tensor, valid: Tensor) -> Tensor:
    """Mean length [B] of the valid points [B, S, H, W, C], within 1e-3 .. 1e3 (18.1)."""
    mask = valid.float().flatten(1)
    lengths = points.norm(dim=-1).flatten(1)
    return ((lengths * mask).sum(1) / (mask.sum(1) + 1e-3)).clamp(1e-3, 1e3)


def _regression(
    predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence and gradient terms of one dense output, and both scales [B]."""
    scale, true_scale = mean_norm(predicted, valid), mean_norm(target, valid)
    per_sample = (slice(None),) + (None,) * 4
    predicted, target = predicted / scale[per_sample], target / true_scale[per_sample]
    loss = _confidence_term(predicted, confidence, target, valid)
    frames = predicted.shape[1]
    loss = loss + gradient_term(predicted[:, :1], target[:, :1], valid[:, :1])
    if frames > 1:
        rest = gradient_term(predicted[:, 1:], target[:, 1:], valid[:, 1:])
        loss = loss + (frames - 1) * rest
    return loss, scale, true_scale


def _guard(x: Tensor, limit: float = LIMIT) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).clamp(-limit, limit)


def _confidence_term(
    predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor
) -> Tensor:
    """Error weighted by confidence, first frame and others trimmed separately (18.2)."""
    error = _guard((predicted - target).norm(dim=-1))
    weighted = GAMMA * error * confidence - ALPHA * confidence.log()
    parts = [
        trimmed(weighted[frames][valid[frames]])
        for frames in ((slice(None), slice(0, 1)), (slice(None), slice(1, None)))
    ]
    if all(len(p) for p in parts):
        return torch.cat(parts).mean()
    return sum((p.mean() for p in parts if len(p)), weighted.sum() * 0)


def trimmed(values: Tensor) -> Tensor:
    """Long lists lose their largest 2 %, unless too few values remain."""
    if len(values) > _FILTER_ABOVE:
        values = values.clamp(max=LIMIT)
        sample = values.detach()
        if len(sample) > 100 * _SUBSAMPLE:
            sample = sample[torch.randperm(len(sample), device=sample.device)[:_SUBSAMPLE]]
        rank = round(_QUANTILE * (len(sample) - 1)) + 1
        threshold = sample.kthvalue(rank).values.clamp(max=LIMIT)
        kept = values[values < threshold]
        values = kept if len(kept) > _FILTER_ABOVE else values
    return _guard(values)


def gradient_term(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Differences between neighbours at four scales (18.3), [B, S, H, W, C] each.

    As published, the sum over one frame is clamped: beyond it this term has no gradient.
    """
    total = predicted.new_zeros(())
    for scale in range(SCALES):
        step = 2**scale
        total = total + _gradient_at_one_scale(
            *(x.flatten(0, 1)[:, ::step, ::step] for x in (predicted, target, valid))
        )
    return total / SCALES


def _gradient_at_one_scale(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    mask = valid[..., None].to(predicted.dtype)
    difference = mask * (predicted - target)
    along_x = difference.diff(dim=2).abs() * mask[:, :, 1:] * mask[:, :, :-1]
    along_y = difference.diff(dim=1).abs() * mask[:, 1:] * mask[:, :-1]
    per_frame = along_x.clamp(max=LIMIT).sum((1, 2, 3)) + along_y.clamp(max=LIMIT).sum((1, 2, 3))
    count = mask.sum() * predicted.shape[-1]
    return torch.where(count > 0, _guard(per_frame).sum() / count.clamp(min=1), 0.0)


def camera_loss(
    answers: list[Tensor], batch: Batch, scale: Tensor, true_scale: Tensor, decay: float = 0.6
) -> Tensor:
    """Absolute errors of all iterations of the camera head (18.4)."""
    height, width = batch.depth.shape[-2:]
    relative = invert_se3(invert_se3(batch.T_world_camera[:, :1]) @ batch.T_world_camera)
    target = encode_pose(relative, batch.K, height, width)
    truth = target[..., :3] / true_scale[:, None, None]
    total = target.new_zeros(())
    for i, answer in enumerate(answers):
        translation = F.l1_loss(answer[..., :3] / scale[:, None, None], truth).clamp(max=LIMIT)
        rotation = F.l1_loss(answer[..., 3:7], target[..., 3:7]).clamp(max=LIMIT)
        fov = F.l1_loss(answer[..., 7:], target[..., 7:]).clamp(max=LIMIT)
        weight = decay ** (len(answers) - 1 - i) / len(answers)
        total = total + weight * (translation + rotation + 0.5 * fov)
    return total
