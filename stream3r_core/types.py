"""Frozen records that cross module borders, with shape, unit and frame of every field."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.image import ImageGeometry


@dataclass(frozen=True)
class FramePrediction:
    """What the network says about one frame.

    The world frame is the camera frame of the first frame of the session (OpenCV axes: x right,
    y down, z forward), up to the network's error. All lengths share one arbitrary scale unless the
    network is metric. Tensors stay on the network's device; :meth:`to` moves them.
    """

    index: int  # frames since the last reset, from 0
    stamp_ns: int | None  # the caller's stamp, untouched
    T_world_camera: Tensor  # [4, 4] float32, camera to world
    K: Tensor  # [3, 3] float32, pixels of the maps below
    rgb: Tensor  # [H, W, 3] uint8, the image that the network saw
    depth: Tensor  # [H, W] float32, along the optical axis, scene units
    depth_conf: Tensor  # [H, W] float32, >= 1
    world_points: Tensor | None  # [H, W, 3] float32, world frame, scene units; None: not computed
    world_points_conf: Tensor | None  # [H, W] float32, >= 1
    geometry: ImageGeometry  # camera pixels <-> network pixels
    still: bool = False  # no parallax since an earlier frame: left out of cache and map

    def to(self, device) -> 'FramePrediction':
        """Return the prediction with every tensor on ``device``, ready to be read."""
        tensors = {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moves = _to_host if torch.device(device).type == 'cpu' else _to_device
        return dataclasses.replace(self, **moves(tensors, device))

    def at_camera_resolution(self) -> 'FramePrediction':
        """Return the prediction resampled to the camera's own pixels, NaN outside a crop.

        Depth is taken from the nearest network pixel, so that no depth between two surfaces is
        invented; ``K`` becomes that of the camera image, ``rgb`` is resampled likewise.
        """
        sample = self.geometry.to_camera
        return dataclasses.replace(
            self,
            K=self.geometry.camera_K(self.K),
            rgb=sample(self.rgb, fill=0),
            depth=sample(self.depth),
            depth_conf=sample(self.depth_conf),
            world_points=None if self.world_points is None else sample(self.world_points),
            world_points_conf=None
            if self.world_points_conf is None
            else sample(self.world_points_conf),
            geometry=self.geometry.identity(),
        )


def _to_device(tensors: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in tensors.items()}


def _to_host(tensors: dict[str, Tensor], device) -> dict[str, Tensor]:
    """Copy what lies on a GPU into pinned memory, all of it behind one wait (unproven: no GPU)."""
    on_gpu = {name: x for name, x in tensors.items() if x.device.type == 'cuda'}
    if not on_gpu:
        return _to_device(tensors, device)
    copies = {
        name: torch.empty_like(x, device='cpu', pin_memory=True).copy_(x, non_blocking=True)
        for name, x in on_gpu.items()
    }
    for gpu in {x.device for x in on_gpu.values()}:
        torch.cuda.current_stream(gpu).synchronize()
    return tensors | copies
