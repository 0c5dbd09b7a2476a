"""One training batch and the targets that every loss is built from."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.geometry import encode_pose, invert_se3, unproject_to_world


@dataclass(frozen=True)
class Batch:
    """B sequences of S views: images, z-depth, cameras (model.md 20, minimal format)."""

    images: Tensor  # [B, S, 3, H, W] float32 in [0, 1]
    depth: Tensor  # [B, S, H, W] along the optical axis, any unit; <= 0: unknown
    T_world_camera: Tensor  # [B, S, 4, 4] camera to world
    K: Tensor  # [B, S, 3, 3] pixels

    def to(self, device) -> 'Batch':
        """Return the batch on ``device``."""
        return Batch(
            **{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        )

    @property
    def valid(self) -> Tensor:
        """Pixels with known depth, [B, S, H, W] bool."""
        return (self.depth > 0) & self.depth.isfinite()


@dataclass(frozen=True)
class Targets:
    """Truth in the frame of the first camera, in units of the first view's mean depth."""

    valid: Tensor  # [B, S, H, W] bool
    depth: Tensor  # [B, S, H, W]
    world_points: Tensor  # [B, S, H, W, 3]
    camera_position: Tensor  # [B, S, 3]
    pose_enc: Tensor  # [B, S, 9]

    def dense_at(self, frames: Tensor | None) -> 'Targets':
        """Return the targets with what belongs to pixels of these frames only; None: of all."""
        if frames is None:
            return self
        pixels = ('valid', 'depth', 'world_points', 'camera_position')
        return dataclasses.replace(self, **{n: getattr(self, n)[:, frames] for n in pixels})


def make_targets(batch: Batch) -> Targets:
    """Express ``batch`` the way the network answers.

    The unit is the geometric mean depth of the first view: the only scale that a causal network
    can know when it answers for the first view.
    """
    valid = batch.valid
    depth = torch.where(valid, batch.depth, 1.0)
    first = valid[:, 0].flatten(1).float()
    log_mean = (depth[:, 0].log().flatten(1) * first).sum(1) / first.sum(1).clamp(min=1)
    scale = log_mean.exp()
    T = invert_se3(batch.T_world_camera[:, :1]) @ batch.T_world_camera
    T[..., :3, 3] /= scale[:, None, None]
    depth = depth / scale[:, None, None, None]
    height, width = depth.shape[-2:]
    return Targets(
        valid=valid,
        depth=depth,
        world_points=unproject_to_world(depth, batch.K, T),
        camera_position=T[..., :3, 3],
        pose_enc=encode_pose(invert_se3(T), batch.K, height, width),
    )
