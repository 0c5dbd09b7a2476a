"""A pipeline that answers with the truth, moved by a known similarity: judges must recover it."""

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from stream3r_core.config import CoreConfig, MappingConfig, from_dict
from stream3r_core.evaluation.datasets.frames import Clip, Frame
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import VoxelMap
from stream3r_core.pipeline import load_configured_model
from stream3r_core.synthetic import render_sequence
from stream3r_core.types import FramePrediction

CONFIG = from_dict(CoreConfig, {'model': {'weights': 'random', 'preset': 'tiny'}})


def room_clip(num_frames=12, height=48, width=64, seed=3):
    """A clip of a rendered room with exact depth, pose and intrinsics."""
    room = render_sequence(seed, num_frames, height, width)
    frames = tuple(
        Frame(
            f'frame {i}',
            room.stamps_ns[i],
            load_image=lambda i=i: room.images[i].numpy(),
            K=room.K.double().numpy(),
            T_world_camera=room.T_world_camera[i].double().numpy(),
            load_depth_m=lambda i=i: room.depth_m[i].numpy(),
        )
        for i in range(num_frames)
    )
    return Clip('room', frames)


class Oracle:
    """Stands where the pipeline stands; ``scale`` and a rotation hide the truth's frame."""

    def __init__(self, clip, scale=0.4, noise_m=0.0):
        self.config = CONFIG
        self.model = load_configured_model(CONFIG.model)
        self.cache_bytes = 1024
        self.map = VoxelMap(MappingConfig(voxel_size=0.01 * scale, edge_ratio=0.0))
        self._frames = {frame.stamp_ns: frame for frame in clip.frames}
        self._scale, self._noise_m = scale, noise_m
        self._rng = np.random.default_rng(0)
        self._T = np.eye(4)
        self._T[:3, :3] = Rotation.from_rotvec([0.5, -0.3, 0.8]).as_matrix()
        self._T[:3, 3] = [1.0, -2.0, 0.5]

    def reset(self):
        self.map.clear()

    def flush(self):
        return []

    def feed(self, image, stamp_ns, K=None):
        frame = self._frames[stamp_ns]
        depth = torch.from_numpy(frame.load_depth_m()).float() * self._scale
        pose = self._T @ frame.T_world_camera
        pose[:3, 3] = (pose[:3, 3] + self._rng.normal(0, self._noise_m, 3)) * self._scale
        size = tuple(depth.shape)
        prediction = FramePrediction(
            index=0,
            stamp_ns=stamp_ns,
            T_world_camera=torch.from_numpy(pose).float(),
            K=torch.from_numpy(frame.K).float(),
            rgb=torch.from_numpy(image),
            depth=depth,
            depth_conf=torch.full(size, 5.0),
            world_points=None,
            world_points_conf=None,
            geometry=ImageGeometry(size, size, (1.0, 1.0), (0, 0)),
        )
        self.map.integrate(prediction)
        return [prediction]
