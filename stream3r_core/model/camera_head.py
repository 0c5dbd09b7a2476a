"""Camera pose and field of view, refined over a few iterations from the camera tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.config import ModelConfig
from stream3r_core.model.blocks import AttentionFn, Block, Mlp

POSE_DIM = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view 2
UNTRAINED_POSE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)  # at the origin, 1 rad wide


class CameraHead(nn.Module):
    """A transformer over the camera tokens of the frames, modulated by its previous answer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = 2 * config.embed_dim
        self.num_iterations = config.camera_iterations
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.token_norm = nn.LayerNorm(dim)
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList(
            Block(dim, config.camera_heads, config.mlp_ratio)
            for _ in range(config.camera_trunk_depth)
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)
        with torch.no_grad():  # start near a camera that exists: small steps from a fixed pose
            step = torch.tensor(UNTRAINED_POSE) / self.num_iterations
            self.pose_branch.fc2.bias.copy_(step)
            self.pose_branch.fc2.weight.mul_(0.1)

    def forward(self, tokens: Tensor, attention: Callable[[int], AttentionFn]) -> list[Tensor]:
        """Return the pose encodings [B, S, 9] of every iteration, the last one being the answer.

        ``tokens`` [B, S, 2C]; ``attention(layer)`` with layer = iteration * trunk depth + block
        gives the attention over S tokens. Encoding: translation of world to camera (scene units),
        quaternion xyzw (not normalised), vertical and horizontal field of view (radians, >= 0).
        """
        tokens = self.token_norm(tokens)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        encoding = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        answers = []
        for iteration in range(self.num_iterations):
            modulation = self.poseLN_modulation(self.embed_pose(encoding))
            shift, scale, gate = modulation.chunk(3, -1)
            x = tokens + gate * (normed * (1 + scale) + shift)
            for i, block in enumerate(self.trunk):
                x = block(x, attention(iteration * len(self.trunk) + i))
            delta = self.pose_branch(self.trunk_norm(x))
            raw = delta if iteration == 0 else encoding + delta
            answers.append(torch.cat((raw[..., :7], raw[..., 7:].relu()), -1))
            encoding = raw.detach()  # each iteration learns its own step only
        return answers
