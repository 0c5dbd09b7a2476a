"""One entry to attention: the backend is chosen here, nowhere else."""

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v.

    q [B, heads, M, D]; k, v [B, heads, N, D]; bias broadcastable to [B, heads, M, N], additive.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
