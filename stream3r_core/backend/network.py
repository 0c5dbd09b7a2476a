"""The network as witness of revisits: descriptors of views, and pairs of them seen together."""

from collections.abc import Sequence

import numpy as np
import torch

from stream3r_core.backend.keyframes import Keyframe
from stream3r_core.backend.verification import PairView
from stream3r_core.geometry import decode_pose, invert_se3


class NetworkWitness:
    """Asks a :class:`~stream3r_core.model.network.CausalVGGT`, batch by batch, on its device.

    Any thread may ask, also while another one streams: nothing of the network changes.
    """

    def __init__(self, model):
        self._model = model

    @property
    def weights_sha256(self) -> str:
        """Of the file of weights; empty: not from a file."""
        info = self._model.weights_info
        return '' if info is None else info.sha256

    @torch.inference_mode()
    def describe(self, rgb: np.ndarray) -> np.ndarray:
        """Unit vector [C] float32 of a network image [H, W, 3] uint8."""
        return self._model.descriptor(self._batch([rgb])[None])[0, 0].float().cpu().numpy()

    @torch.inference_mode()
    def predict_pairs(
        self, pairs: Sequence[tuple[Keyframe, Keyframe]]
    ) -> list[tuple[PairView, PairView]]:
        """See each pair of keyframes, which keep their images, together (mode full)."""
        images = torch.stack([self._batch([k.image_rgb for k in pair]) for pair in pairs])
        raw = self._model(images, mode='full', outputs=('depth',))  # [P, 2, ...]
        T_camera_pair, K = decode_pose(raw['pose_enc'].float(), *images.shape[-2:])
        T_pair_camera = invert_se3(T_camera_pair)
        columns = (T_pair_camera, K, raw['depth'][..., 0], raw['depth_conf'])
        arrays = [column.float().cpu().numpy() for column in columns]
        return [
            tuple(PairView(*(array[p, view] for array in arrays)) for view in (0, 1))
            for p in range(len(pairs))
        ]

    def _batch(self, images: list[np.ndarray]) -> torch.Tensor:
        """Images [n, 3, H, W] in [0, 1]."""
        stacked = torch.from_numpy(np.stack(images)).to(self._model.device)
        return stacked.permute(0, 3, 1, 2).float() / 255
