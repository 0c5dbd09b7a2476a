"""How good is it: depth and trajectory on fixed held-out sequences, beside two baselines."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.geometry import decode_pose, invert_se3
from stream3r_core.model.network import CausalVGGT
from stream3r_core.training.batch import Batch


@dataclass(frozen=True)
class ValidationConfig:
    """Which sequences are looked at; their seeds are never trained on."""

    scenes: int = 20
    frames: int = 30
    batch: int = 4
    mode: str = 'causal'
    window: int = 5


@torch.no_grad()
def validate(
    model: CausalVGGT, batches: Iterator[Batch], mode: str, window: int = 5
) -> dict[str, float]:
    """Return means over the sequences of ``batches``.

    abs_rel and delta: after one median scale per sequence. ate: after Sim(3), in percent of the
    path's root mean square extent. rotation_deg: of the last frame against the first. ``static_*``
    and ``velocity_*``: a camera that never moves, and one that goes on as between the first two
    frames (told the truth about those).
    """
    training = model.training
    model.eval()
    rows = []
    for batch in batches:
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            result = model(batch.images, mode=mode, window=window)
        for b in range(len(batch.images)):
            rows.append(_sequence(result, batch, b))
    model.train(training)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _sequence(result: dict[str, Tensor], batch: Batch, b: int) -> dict[str, float]:
    truth, mask = batch.depth[b], batch.valid[b]
    depth = result['depth'][b].squeeze(-1).float()
    scaled = depth * (truth[mask].median() / depth[mask].median())
    ratio = torch.maximum(scaled / truth, truth / scaled)[mask]
    height, width = truth.shape[-2:]
    T_camera_first, K = decode_pose(result['pose_enc'][b].float(), height, width)
    estimate = invert_se3(T_camera_first)
    first = invert_se3(batch.T_world_camera[b, :1])
    path = first @ batch.T_world_camera[b]
    velocity = [torch.eye(4)]
    for _ in range(len(path) - 1):
        velocity.append(velocity[-1] @ path[1])
    velocity = torch.stack(velocity)
    static = torch.eye(4).expand_as(path)
    extent = (path[:, :3, 3] - path[:, :3, 3].mean(0)).square().sum(-1).mean().sqrt().item()
    row = {
        'abs_rel': ((scaled - truth).abs() / truth)[mask].mean().item(),
        'delta': (ratio < 1.25).float().mean().item(),
        'extent_m': extent,
        'fov_error_deg': math.degrees(
            (
                2 * torch.atan(width / 2 / K[:, 0, 0])
                - 2 * torch.atan(width / 2 / batch.K[b, :, 0, 0])
            )
            .abs()
            .mean()
        ),
    }
    for name, T in (('', estimate), ('static_', static), ('velocity_', velocity)):
        row[f'{name}ate_percent'] = 100 * _ate(T, path) / max(extent, 1e-6)
        row[f'{name}rotation_deg'] = _angle_deg(T[-1], path[-1])
    return row


def _ate(estimate: Tensor, truth: Tensor) -> float:
    """Root mean square position error in metres after the best similarity (Umeyama 1991, eq. 33).

    The closed form also holds for a camera that stands still or moves along a line.
    """
    p, q = (T[:, :3, 3].double() - T[:, :3, 3].double().mean(0) for T in (estimate, truth))
    U, singular, Vh = torch.linalg.svd(q.T @ p / len(p))
    singular[2] *= torch.linalg.det(U @ Vh).sign()
    explained = singular.sum().square() / p.square().sum(-1).mean().clamp(min=1e-12)
    return (q.square().sum(-1).mean() - explained).clamp(min=0).sqrt().item()


def _angle_deg(a: Tensor, b: Tensor) -> float:
    cosine = ((a[:3, :3].T @ b[:3, :3]).trace() - 1) / 2
    return math.degrees(math.acos(cosine.clamp(-1, 1).item()))
