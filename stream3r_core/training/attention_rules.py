"""Attention rules of training only: caches that have forgotten some of their tokens."""

import torch
from torch import Tensor

from stream3r_core.attention import attend


class ForgettingAttention:
    """Each frame sees the first frame, itself, and a random part of the tokens in between.

    This is what a cache with a token budget looks like to the network: whole frames in a window
    and single tokens of older ones. The same tokens are missing for all heads and clips.
    """

    def __init__(self, num_frames: int, keep: float, generator: torch.Generator, num_special: int):
        self.num_frames, self.keep = num_frames, keep
        self.num_special = num_special
        self.generator = generator

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q, k, v [B, heads, S * P, head_dim] to the attended values of the same shape."""
        P = q.shape[2] // self.num_frames
        attended = []
        for i, q_frame in enumerate(q.split(P, dim=2)):
            index = self._visible(i, P).to(q.device)
            attended.append(attend(q_frame, k[:, :, index], v[:, :, index]))
        return torch.cat(attended, 2)

    def _visible(self, frame: int, P: int) -> Tensor:
        tokens = torch.arange((frame + 1) * P)
        kept = torch.rand(len(tokens), generator=self.generator) < self.keep
        always = (tokens < P) | (tokens >= frame * P) | (tokens % P < self.num_special)
        return tokens[kept | always]
