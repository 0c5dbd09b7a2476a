"""The transformer block that encoder, aggregator and camera head share.

Attribute names are those of the published checkpoints. Linear layers may be narrower than the rest
(bfloat16 weights): they then multiply in their own dtype, while the residual stream, norms, scales
and rotations stay in float32, as under autocast.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn, ones

from stream3r_core.attention import attend, fused_rotation, has_fused_rotation
from stream3r_core.model.rope import RotaryTables, rotate

#: Maps q, k, v [B, heads, N, head_dim] of the present tokens to attended values of the same shape.
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention; which keys a query sees is the caller's choice."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attention: AttentionFn, rotary: RotaryTables | None) -> Tensor:
        """Map tokens [B, N, C] to the same shape.

        Blocks with ``qk_norm`` take ``rotary`` tables: they normalise and turn queries and keys.
        """
        qkv = self.qkv(x.to(self.qkv.weight.dtype)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, head_dim] each
        if rotary is not None:
            q, k = self.turned(q, self.q_norm, rotary), self.turned(k, self.k_norm, rotary)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))

    @staticmethod
    def turned(x: Tensor, norm: nn.LayerNorm, rotary: RotaryTables) -> Tensor:
        """Normalise and turn queries or keys [B, heads, N, head_dim], in float32 inside."""
        if has_fused_rotation(x):
            return fused_rotation(x, norm.weight, norm.bias, norm.eps, *rotary)
        return rotate(norm(x.float()), rotary).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., out]."""
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))


class LayerScale(nn.Module):
    """Per-channel gain of a residual branch."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(init * ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale [..., dim]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with scaled residual branches."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool = False,
        eps: float = 1e-5,
        layer_scale: float = 0.01,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        attention: AttentionFn = attend,
        rotary: RotaryTables | None = None,
        on_update: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Return the tokens [B, N, C] after attention and MLP.

        ``on_update`` is shown what the MLP adds to the tokens.
        """
        x = x + self.ls1(self.attn(self.norm1(x), attention, rotary))
        update = self.ls2(self.mlp(self.norm2(x)))
        if on_update is not None:
            on_update(update)
        return x + update
