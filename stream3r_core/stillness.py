"""Recognise views that add nothing: a standing robot must not fill its memory with one place."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stream3r_core.config import CacheConfig


class View(NamedTuple):
    """How a frame compares with the last one that was kept."""

    thumbnail: Tensor  # [3, h w] one colour per patch
    is_same: bool  # all patches look the same
    is_mostly_same: bool  # half of the patches do: still, if the camera did not move


class StillnessGate:
    """Compares frames with the last kept one, by their patches and by the predicted motion.

    A view is still if nearly all of its patches are unchanged, or if half of them are (people walk
    in front of a standing camera) and the network predicts no motion. Neither is trusted alone:
    patches of a bare wall do not change, and a bad network predicts the same pose for ever.
    Comparing with the last *kept* frame lets slow motion add up until it counts.
    """

    def __init__(self, config: CacheConfig, patch_size: int):
        self.change = config.still_change
        self.motion = config.still_motion
        self.patch_size = patch_size
        self._thumbnail: Tensor | None = None
        self._T_world_camera: Tensor | None = None
        self._committed: tuple[Tensor | None, Tensor | None] = None, None

    def look(self, frame: Tensor) -> View:
        """Compare a frame [3, H, W] in [0, 1]; waits for the GPU if that is where it is."""
        small = F.avg_pool2d(frame[None].float(), self.patch_size)[0].flatten(1)
        if self._thumbnail is None:
            return View(small, False, False)
        difference = small - self._thumbnail
        exposure = difference.median(1, keepdim=True).values  # no motion, and common to all
        change = (difference - exposure).abs().mean(0)
        most, half = torch.quantile(change, torch.tensor([0.98, 0.5], device=change.device))
        return View(small, bool(most <= self.change), bool(half <= self.change))

    def is_still(self, view: View, T_world_camera: Tensor, depth: Tensor) -> bool:
        """Decide with the predicted pose [4, 4] and depth [H, W] of the frame."""
        if not view.is_mostly_same or view.is_same:
            return view.is_same
        relative = torch.linalg.solve(self._T_world_camera, T_world_camera)
        cosine = (relative[:3, :3].diagonal().sum() - 1) / 2
        angle = torch.arccos(cosine.clamp(-1, 1))
        parallax = relative[:3, 3].norm() / depth.median().clamp_min(1e-9)
        return bool(angle + parallax <= self.motion)

    def keep(self, view: View, T_world_camera: Tensor) -> None:
        """Take this frame as the one that the next ones are compared with."""
        self._thumbnail = view.thumbnail
        self._T_world_camera = T_world_camera

    def commit(self) -> None:
        """End the step: what was kept stays."""
        self._committed = self._thumbnail, self._T_world_camera

    def rollback(self) -> None:
        """Go back to the frame kept before the step, which failed."""
        self._thumbnail, self._T_world_camera = self._committed

    def reset(self) -> None:
        """Forget the last kept frame."""
        self._committed = None, None
        self.rollback()
