"""Attention rules of training only: caches that have forgotten some of their tokens."""

from functools import partial

import torch
from torch import Tensor

from stream3r_core.attention import attend
from stream3r_core.model.blocks import AttentionFn


class ForgettingAttention:
    """Each frame sees the first frame, itself, and a random part of the tokens in between.

    This is what a cache with a token budget looks like to the network: whole frames in a window
    and single tokens of older ones. In one layer the same tokens are missing for all heads and
    clips, and also where a block is computed a second time for its gradient.
    """

    def __init__(self, num_frames: int, keep: float, seed: int, num_special: int):
        self.num_frames, self.keep, self.seed = num_frames, keep, seed
        self.num_special = num_special

    def __call__(self, layer: int) -> AttentionFn:
        """Return the attention function of global block ``layer``."""
        return partial(self._attend, layer)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q, k, v [B, heads, S * P, head_dim] to the attended values of the same shape."""
        P = q.shape[2] // self.num_frames
        generator = torch.Generator().manual_seed(self.seed + layer)
        attended = []
        for i, q_frame in enumerate(q.split(P, dim=2)):
            index = self._visible(i, P, generator).to(q.device)
            attended.append(attend(q_frame, k[:, :, index], v[:, :, index]))
        return torch.cat(attended, 2)

    def _visible(self, frame: int, P: int, generator: torch.Generator) -> Tensor:
        tokens = torch.arange((frame + 1) * P)
        kept = torch.rand(len(tokens), generator=generator) < self.keep
        always = (tokens < P) | (tokens >= frame * P) | (tokens % P < self.num_special)
        return tokens[kept | always]
