"""A stand-in for the network whose every answer is known: a simulated front end behind its calls.

For tests and measurements of what lies around the network. The images carry the number of their
frame; sessions, pairs and descriptors are those of
:class:`~stream3r_core.synthetic.front_end.SimulatedFrontEnd`, with its drift and its outliers.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from stream3r_core.checkpoints import WeightsInfo
from stream3r_core.config import PRESETS
from stream3r_core.geometry import encode_pose, invert_se3
from stream3r_core.synthetic.front_end import SimulatedFrontEnd
from stream3r_core.types import FramePrediction

SIZE_HW = 48, 64  # of the network images of the tiny preset


def scripted_image(frame: int) -> np.ndarray:
    """Image [48, 64, 3] uint8 of a frame; its colour is its number."""
    return np.full((*SIZE_HW, 3), (frame // 256, frame % 256, 128), np.uint8)


class ScriptedNetwork(nn.Module):
    """Answers as :class:`~stream3r_core.model.network.CausalVGGT` does.

    ``fails``: from now on poses are not finite.
    """

    def __init__(self, front_end: SimulatedFrontEnd):
        super().__init__()
        self.config = PRESETS['tiny']
        self.weights_info = WeightsInfo('scripted', '', '', 0, 0)
        self.uncertainties: dict = {}  # none was fitted
        self.device = torch.device('cpu')
        self.dtype = torch.float32
        self.fails = False
        # each with random numbers of its own: which thread asks first changes no answer
        self._front_end, self._pairs, self._places = (copy.deepcopy(front_end) for _ in range(3))
        self._session: Iterator[tuple[int, FramePrediction]] = iter(())
        self._anchor = nn.Parameter(torch.zeros(1))  # tells the device

    def stream(self, images: Tensor, aggregator_cache, camera_cache, first: bool, outputs) -> dict:
        """Answer the next frame of a session; frames may be left out, not repeated."""
        frame = _numbers(images)[0]
        if first:
            count = len(self._front_end.walk.stamps_ns)
            end = min(frame + self._front_end.session_frames, count)
            self._session = self._front_end.session(range(frame, max(end, frame + 2)))
        prediction = next(p for number, p in self._session if number == frame)
        answer = _answer(
            prediction.T_world_camera, prediction.K, prediction.depth, prediction.depth_conf
        )
        if self.fails:
            answer['pose_enc'] = answer['pose_enc'] * float('nan')
        return {name: value[None, None] for name, value in answer.items()}

    def forward(self, images: Tensor, mode: str, outputs) -> dict:
        """Answer pairs of frames [P, 2, 3, H, W] that see each other."""
        pairs = []
        for first, second in _numbers(images.flatten(0, 1)).reshape(-1, 2):
            views = self._pairs.pair(int(first), int(second))
            pairs.append([_answer(*(torch.as_tensor(x) for x in view)) for view in views])
        return {
            name: torch.stack([torch.stack([view[name] for view in pair]) for pair in pairs])
            for name in pairs[0][0]
        }

    def descriptor(self, images: Tensor) -> Tensor:
        """Answer [B, S, C] for images [B, S, 3, H, W]."""
        numbers = _numbers(images.flatten(0, 1))
        vectors = np.stack([self._places.descriptor(int(n)) for n in numbers])
        return torch.from_numpy(vectors).unflatten(0, images.shape[:2])


def _numbers(images: Tensor) -> np.ndarray:
    colour = (images.flatten(0, -4)[:, :2, 0, 0] * 255).round().long().numpy()
    return 256 * colour[:, 0] + colour[:, 1]


def _answer(T_world_camera: Tensor, K: Tensor, depth: Tensor, confidence: Tensor) -> dict:
    T_camera_world = invert_se3(T_world_camera.double())
    pose = encode_pose(T_camera_world, K.double(), *depth.shape)
    return {
        'pose_enc': pose.float(),
        'depth': depth.float()[..., None],
        'depth_conf': confidence.float(),
    }
