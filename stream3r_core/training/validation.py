"""How good is it: depth and trajectory on fixed held-out sequences, beside two baselines."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stream3r_core.geometry import decode_pose, invert_se3
from stream3r_core.image import ImageGeometry
from stream3r_core.model.network import CausalVGGT
from stream3r_core.refinement import PoseRefiner
from stream3r_core.training.batch import Batch
from stream3r_core.types import FramePrediction

_STILL_M = 0.01  # paths of smaller extent count as standing still


@torch.no_grad()
def validate(
    model: CausalVGGT,
    batches: Iterable[Batch],
    mode: str = 'causal',
    window: int = 5,
    bf16: bool = True,
    refine: bool = False,
) -> dict[str, float]:
    """Return means over the sequences of ``batches``.

    - abs_rel, delta: depth after one median scale per sequence (delta: share within 25 %).
    - ate_percent: position error after a similarity, of the path's root mean square extent
      (cameras that stand still have none and are left out);
      ate_se3_percent: after a rigid alignment of the path in the scale of the depth.
    - rotation_deg: error of the last frame's rotation against the first.
    - rpe_m, rpe_deg: of one frame to the next, root mean square, in the scale of the depth.
    - fov_error_deg: horizontal.

    With ``refine`` also ``refined_*``: poses aligned to the images, as a node's are
    (:mod:`stream3r_core.refinement`).

    The network computes with autocast to bfloat16, unless told otherwise.

    ``static_*`` and ``velocity_*`` are the same for a camera that never moves, and for one that
    goes on as between the first two frames, which it is told.
    """
    training = model.training
    model.eval()
    rows = []
    for batch in batches:
        device = batch.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            result = model(batch.images, mode=mode, window=window)
        rows += [_sequence(result, batch, b, refine) for b in range(len(batch.images))]
    model.train(training)
    return {key: _mean([row[key] for row in rows if key in row]) for key in _keys(rows)}


def _keys(rows: list[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sequence(
    result: dict[str, Tensor], batch: Batch, b: int, refine: bool = False
) -> dict[str, float]:
    truth, mask = batch.depth[b], batch.valid[b]
    depth = result['depth'][b].squeeze(-1).float()
    scale = truth[mask].median() / depth[mask].median()
    scaled, known = (scale * depth)[mask], truth[mask]
    height, width = truth.shape[-2:]
    T_camera_world, K = decode_pose(result['pose_enc'][b].float(), height, width)
    estimate = invert_se3(T_camera_world)
    paths = {'': estimate}
    if refine:
        paths['refined_'] = _refined(batch.images[b], depth, estimate, K)
    for T in paths.values():
        T[:, :3, 3] *= scale
    path = invert_se3(batch.T_world_camera[b, :1]) @ batch.T_world_camera[b]
    static = torch.eye(4, device=path.device).expand_as(path)
    velocity = torch.stack([torch.linalg.matrix_power(path[1], i) for i in range(len(path))])
    extent = _spread(path).item()
    fov, true_fov = (2 * torch.atan(width / 2 / k[:, 0, 0]) for k in (K, batch.K[b]))
    row = {
        'abs_rel': ((scaled - known).abs() / known).mean().item(),
        'delta': (torch.maximum(scaled / known, known / scaled) < 1.25).float().mean().item(),
        'fov_error_deg': math.degrees((fov - true_fov).abs().mean()),
        'extent_m': extent,
        **_relative_error(estimate, path),
    }
    moves = extent > _STILL_M
    if moves:
        row['ate_se3_percent'] = 100 * path_error(estimate, path, with_scale=False) / extent
    for name, T in (paths | {'static_': static, 'velocity_': velocity}).items():
        if moves:
            row[f'{name}ate_percent'] = 100 * path_error(T, path, with_scale=True) / extent
        row[f'{name}rotation_deg'] = angle_deg(T[-1], path[-1]).item()
    return row


def _refined(images: Tensor, depth: Tensor, T_world_camera: Tensor, K: Tensor) -> Tensor:
    """Return the poses [S, 4, 4] that images [S, 3, H, W] and depth [S, H, W] agree with."""
    refiner, size_hw = PoseRefiner(), tuple(depth.shape[-2:])
    geometry = ImageGeometry(size_hw, size_hw, (1.0, 1.0), (0, 0))
    rgb = (255 * images.movedim(1, -1)).round().to(torch.uint8).cpu()
    poses = []
    for index, (T, k, z) in enumerate(zip(T_world_camera.cpu(), K.cpu(), depth.cpu())):
        stated = FramePrediction(
            index, None, T, k, rgb[index], z, torch.ones_like(z), None, None, geometry
        )
        poses.append(refiner.refine(stated).T_world_camera)
    return torch.stack(poses).to(T_world_camera.device)


def path_error(estimate: Tensor, truth: Tensor, with_scale: bool) -> float:
    """Root mean square position error of paths [S, 4, 4] after the best alignment.

    The closed form (Umeyama 1991, eq. 33) also holds for a camera that stands still or moves along
    a line, where the alignment itself is not determined.
    """
    p, q = (T[:, :3, 3].double() - T[:, :3, 3].double().mean(0) for T in (estimate, truth))
    U, singular, Vh = torch.linalg.svd(q.T @ p / len(p))
    overlap = (singular * singular.new_tensor([1, 1, torch.linalg.det(U @ Vh).sign()])).sum()
    power, true_power = p.square().sum(-1).mean(), q.square().sum(-1).mean()
    if with_scale:
        error = true_power - overlap.square() / power.clamp(min=1e-12)
    else:
        error = true_power + power - 2 * overlap
    return error.clamp(min=0).sqrt().item()


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Angle between the rotations of poses [..., 4, 4], degrees."""
    relative = a[..., :3, :3].mT @ b[..., :3, :3]
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _relative_error(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    steps, true_steps = (invert_se3(T[:-1]) @ T[1:] for T in (estimate, truth))
    error = invert_se3(true_steps) @ steps
    angle = angle_deg(error, torch.eye(4, device=error.device))
    return {
        'rpe_m': error[:, :3, 3].square().sum(-1).mean().sqrt().item(),
        'rpe_deg': angle.square().mean().sqrt().item(),
    }


def _spread(path: Tensor) -> Tensor:
    """Root mean square distance of the positions from their middle."""
    position = path[:, :3, 3]
    return (position - position.mean(0)).square().sum(-1).mean().sqrt()
