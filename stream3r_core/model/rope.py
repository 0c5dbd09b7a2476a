"""Two-dimensional rotary positions: half of each head turns with y, half with x (model.md 6.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stream3r_core.model.constants import cached_constant

RotaryTables = tuple[Tensor, Tensor]


@cached_constant()
def rotary_tables(
    rows: int, columns: int, num_special: int, head_dim: int, base: float, device: torch.device
) -> RotaryTables:
    """Return cos and signed sin, [num_special + rows * columns, head_dim] float32.

    Special tokens sit at position (0, 0), which turns nothing; the patch in row r and column c at
    (r + 1, c + 1). The sine carries the sign of the half swap in :func:`rotate`.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, device=device) / quarter)
    y = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)[:, None] * frequencies
    x = torch.arange(1, columns + 1, device=device).repeat(rows)[:, None] * frequencies
    y, x = (F.pad(angles, (0, 0, num_special, 0)) for angles in (y, x))  # [P, head_dim / 4]
    cos = torch.cat((y.cos(), y.cos(), x.cos(), x.cos()), -1)
    sin = torch.cat((-y.sin(), y.sin(), -x.sin(), x.sin()), -1)
    return cos, sin


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn queries or keys [B, heads, S * P, head_dim] by the positions of their P tokens."""
    cos, sin = tables  # [P, head_dim]
    frames = x.unflatten(2, (-1, len(cos)))  # [B, heads, S, P, head_dim]
    swapped = frames.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    return (frames * cos + swapped * sin).flatten(2, 3)
