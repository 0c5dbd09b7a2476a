"""Attention with column sums in plain PyTorch, with memory bounded by tiling over the queries.

Runs wherever PyTorch does. The output comes from PyTorch's own fused attention where no
log-sum-exp is asked for; column sums need a second product of queries and keys, whose logits are
never held for more than one tile of queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stream3r_core.kernels.reference import Attention, subsample_queries

TILE_BYTES = {'cpu': 1 << 25, 'cuda': 1 << 28}  # float32 logits of one tile of queries


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, 1, N]
    query_fraction: float = 1.0,
    tile_bytes: int | None = None,
) -> Attention:
    """Return output, log-sum-exp and column sums; see :func:`kernels.reference.attention`.

    ``query_fraction`` < 1 estimates the column sums from evenly spaced queries; output and
    log-sum-exp are exact always.
    """
    keys, values = k.float(), v.float()
    outs, lses = [], []
    sums = q.new_zeros(*k.shape[:3], dtype=torch.float32)
    for q_tile in _query_tiles(q, k, tile_bytes):
        weights, lse = _softmax(q_tile, keys, bias)
        outs.append((weights @ values).to(q.dtype))
        lses.append(lse)
        sums += weights.sum(-2)
    if query_fraction < 1:
        sums = column_sums(q, k, bias, query_fraction, tile_bytes)
    return Attention(torch.cat(outs, 2), torch.cat(lses, 2), sums)


def attention_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, query_fraction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return output and column sums, the output from the fused kernel where that is cheaper."""
    if query_fraction >= 1 and q.device.type == 'cpu':
        result = attention(q, k, v, bias)
        return result.out, result.column_sums
    mask = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out, column_sums(q, k, bias, query_fraction)


def column_sums(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    query_fraction: float = 1.0,
    tile_bytes: int | None = None,
) -> Tensor:
    """Return the attention [B, H, N] that each key receives, summed over (all) queries."""
    q, factor = subsample_queries(q, query_fraction)
    keys = k.float()
    sums = q.new_zeros(*k.shape[:3], dtype=torch.float32)
    for q_tile in _query_tiles(q, k, tile_bytes):
        sums += _softmax(q_tile, keys, bias)[0].sum(-2)
    return sums * factor


def _query_tiles(q: Tensor, k: Tensor, tile_bytes: int | None) -> tuple[Tensor, ...]:
    tile_bytes = tile_bytes or TILE_BYTES.get(q.device.type, TILE_BYTES['cpu'])
    row_bytes = 4 * k.shape[0] * k.shape[1] * k.shape[2]
    return q.split(max(1, tile_bytes // row_bytes), dim=2)


def _softmax(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention weights [B, H, m, N] and log-sum-exp [B, H, m] in float32."""
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.mT
    if bias is not None:
        logits += bias
    peak = logits.amax(-1, keepdim=True)
    peak = peak.where(peak > -torch.inf, 0.0)  # a query that sees nothing: exp(-inf - 0) = 0
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + peak).squeeze(-1)
    return weights.div_(total.clamp_min(torch.finfo(torch.float32).tiny)), lse
