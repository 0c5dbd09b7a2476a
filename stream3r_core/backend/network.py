"""The network as witness of revisits: descriptors of views, and pairs of them seen together."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from stream3r_core.backend.keyframes import Keyframe
from stream3r_core.backend.verification import PairView
from stream3r_core.errors import first_line
from stream3r_core.geometry import decode_pose, invert_se3
from stream3r_core.gpu_memory import free_gpu_memory, is_out_of_memory

_log = logging.getLogger(__name__)


class NetworkWitness:
    """Asks a :class:`~stream3r_core.model.network.CausalVGGT`, batch by batch, on its device.

    Any thread may ask, also while another one streams: nothing of the network changes.
    """

    def __init__(self, model):
        self._model = model
        self.num_out_of_memory = 0  # questions that were given up, for a GPU had no room

    def description_if_room(self, rgb: np.ndarray) -> np.ndarray | None:
        """As :meth:`describe`; None where the GPU has no room: nobody recognises it later."""
        return self._if_room(lambda: self.describe(rgb), None)

    def pairs_if_room(
        self, pairs: Sequence[tuple[Keyframe, Keyframe]]
    ) -> list[tuple[PairView, PairView]]:
        """As :meth:`predict_pairs`; none where the GPU has no room: no revisit is found now."""
        return self._if_room(lambda: self.predict_pairs(pairs), [])

    def _if_room(self, ask: Callable, nothing):
        """Give up a question for want of GPU memory, and never the thread that asked it."""
        try:
            return ask()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Outside the handler: the exception holds the tensors of the question.
        self.num_out_of_memory += 1
        free_gpu_memory(self._model.device)
        if self.num_out_of_memory.bit_count() == 1:  # 1, 2, 4, 8 and so on: a log has an end
            _log.warning(
                'the back end has skipped %d revisits for want of GPU memory (%s): leave the node '
                'more (model.max_gpu_memory), or use smaller images',
                self.num_out_of_memory,
                reason,
            )
        return nothing

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
