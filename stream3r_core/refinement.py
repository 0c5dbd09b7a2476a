"""Poses made exact: images are aligned to a keyframe, by the depth that the network gives it.

A small network knows the shape of a room better than by how little a camera has moved; direct
image alignment (:mod:`stream3r_core.direct_alignment`) needs that shape and is exact where two
images overlap. Where they do not agree, for want of overlap, texture or light, the motion is the
network's.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from stream3r_core.backend import sim3
from stream3r_core.config import PRESETS, ModelConfig, RefinementConfig
from stream3r_core.direct_alignment import (
    Fit,
    Keyframe,
    Picture,
    align,
    make_keyframe,
    pictures,
)
from stream3r_core.geometry import invert_se3, transform_points
from stream3r_core.types import FramePrediction


class AsStated:
    """Leaves poses as the network states them; used like :class:`PoseRefiner`."""

    def refine(self, prediction: FramePrediction) -> FramePrediction:
        """Return the prediction."""
        return prediction

    def figures(self) -> dict[str, int]:
        """Nothing was done."""
        return {}


def refines(model_config: ModelConfig, config: RefinementConfig) -> bool:
    """Whether the poses of a network are to be refined."""
    if config.kind == 'auto':
        return model_config == PRESETS['tiny']
    return config.kind == 'direct'


class PoseRefiner:
    """Refines the predictions of one session after the other, on the CPU, in their order.

    A prediction of index 0 starts anew. Poses keep the world frame and the unit of the session;
    all else stays what the network says. One keyframe is kept, so that memory does not grow.
    """

    def __init__(self, config: RefinementConfig | None = None):
        self.config = config or RefinementConfig()
        self.num_unaligned = 0  # images whose motion is the network's own
        self._index = -1  # of the newest image in its session
        # T_world_camera of the newest image, by the network (None: there is none) and refined
        self._stated: np.ndarray | None = None
        self._refined = np.eye(4)
        self._T_camera_key = self._T_camera_earlier = np.eye(
            4
        )  # of it to keyframe and image before
        self._key: Keyframe | None = None
        self._shape: tuple[int, ...] = ()
        self._T_world_key = self._stated_key = np.eye(4)

    def refine(self, prediction: FramePrediction) -> FramePrediction:
        """Return the prediction with the pose that its image agrees with."""
        if prediction.index <= self._index:
            self._stated = self._key = None
        self._index = prediction.index
        stated = prediction.T_world_camera.double().numpy()
        if not np.isfinite(stated).all():
            return prediction  # for others to refuse
        stated, levels = sim3.nearest_rigid(stated), _pictures(prediction)
        if self._stated is None:
            self._T_camera_earlier = np.eye(4)
            self._begin(prediction, levels, stated, stated)
            return prediction
        fit = self._fit(prediction, levels, stated)
        if fit is not None:
            T = sim3.nearest_rigid(self._T_world_key @ np.linalg.inv(fit.T_camera_key))
            self._T_camera_earlier = fit.T_camera_key @ np.linalg.inv(self._T_camera_key)
            self._T_camera_key = fit.T_camera_key
        else:
            self.num_unaligned += 1
            T = sim3.nearest_rigid(self._refined @ np.linalg.inv(self._stated) @ stated)
            self._T_camera_earlier = np.eye(4)
        if fit is None or fit.overlap < self.config.min_overlap:
            self._begin(prediction, levels, stated, T)
        self._stated, self._refined = stated, T
        return _placed(prediction, torch.from_numpy(T).float())

    def figures(self) -> dict[str, int]:
        """Return what was done so far, by the names of /diagnostics."""
        return {'images_unaligned': self.num_unaligned}

    def _fit(
        self, prediction: FramePrediction, levels: list[Picture], stated: np.ndarray
    ) -> Fit | None:
        """Align an image to the keyframe; None where there is none, or both do not agree."""
        if self._key is None or tuple(prediction.depth.shape) != self._shape:
            return None
        fit = align(self._key, levels, self._guesses(stated))
        is_trusted = (
            bool(np.isfinite(fit.T_camera_key).all())
            and fit.overlap >= self.config.least_overlap
            and fit.explained >= self.config.least_explained
        )
        return fit if is_trusted else None

    def _begin(
        self,
        prediction: FramePrediction,
        levels: list[Picture],
        stated: np.ndarray,
        T_world_camera: np.ndarray,
    ) -> None:
        """Make an image the keyframe; the motion up to it goes on in the next guess."""
        self._T_camera_key = np.eye(4)
        area = prediction.geometry.camera_area()
        self._key = make_keyframe(levels, prediction.depth.numpy()[area])
        self._shape = tuple(prediction.depth.shape)
        self._T_world_key = self._refined = T_world_camera
        self._stated_key = self._stated = stated

    def _guesses(self, stated: np.ndarray) -> list[np.ndarray]:
        """T_camera_key of a camera that moves on, of one that stands, as the network has it."""
        moves_on = sim3.nearest_rigid(self._T_camera_earlier @ self._T_camera_key)
        as_stated = np.linalg.inv(stated) @ self._stated_key
        return [moves_on, self._T_camera_key, as_stated]


def _pictures(prediction: FramePrediction) -> list[Picture]:
    """Levels of what the camera saw: the edge of a padding stands still, and would hold it."""
    rows, columns = area = prediction.geometry.camera_area()
    K = prediction.K.numpy().copy()
    K[:2, 2] -= columns.start, rows.start
    return pictures(prediction.rgb.numpy()[area], K)


def _placed(prediction: FramePrediction, T_world_camera: Tensor) -> FramePrediction:
    """Return the prediction with another pose; its points move along."""
    points = prediction.world_points
    if points is not None:
        points = transform_points(T_world_camera @ invert_se3(prediction.T_world_camera), points)
    return dataclasses.replace(prediction, T_world_camera=T_world_camera, world_points=points)
