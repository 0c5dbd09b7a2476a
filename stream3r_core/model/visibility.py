"""Who sees whom in a batch pass: full, causal and window attention without a dense token mask."""

import torch
from torch import Tensor

from stream3r_core.attention import attend
from stream3r_core.errors import ConfigError
from stream3r_core.model.constants import cached_constant

MODES = ('full', 'causal', 'window')


def visible_window(mode: str, window: int, num_frames: int) -> int | None:
    """Return how many recent frames a frame sees, itself included; None: all, later ones too.

    The first frame is always visible besides. Causal attention is a window over all frames.
    """
    if mode not in MODES:
        raise ConfigError(f'unknown attention mode {mode!r}; expected one of {", ".join(MODES)}')
    if window < 1:
        raise ConfigError(f'window must be at least 1 frame (the present one), got {window}')
    return {'full': None, 'causal': num_frames, 'window': window}[mode]


class FrameAttention:
    """Attention over the tokens of S frames, each frame seeing the first and the recent ones.

    The loop over query frames reads slices of the keys, so that memory stays linear in the number
    of tokens.
    """

    def __init__(self, num_frames: int, window: int | None):
        self.num_frames = num_frames
        self.window = window

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q, k, v [B, heads, S * P, head_dim] to the attended values of the same shape."""
        if self.window is None or self.num_frames == 1:
            return attend(q, k, v)
        P = q.shape[2] // self.num_frames
        attended = []
        for i, q_frame in enumerate(q.split(P, dim=2)):
            start, stop = max(1, i - self.window + 1), i + 1
            keys, values = (_anchor_and_recent(x, start, stop, P) for x in (k, v))
            attended.append(attend(q_frame, keys, values))
        return torch.cat(attended, 2)


def _anchor_and_recent(x: Tensor, start: int, stop: int, P: int) -> Tensor:
    if start == 1:
        return x[:, :, : stop * P]
    return torch.cat((x[:, :, :P], x[:, :, start * P : stop * P]), 2)


@cached_constant()
def frame_bias(num_frames: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the same rule as additive logits [S, S], one token per frame; None: all visible."""
    if window is None:
        return None
    query = torch.arange(num_frames, device=device)[:, None]
    key = torch.arange(num_frames, device=device)
    visible = (key <= query) & ((key > query - window) | (key == 0))
    return torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
