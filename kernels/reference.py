"""Attention written to be read: the specification that every other backend is tested against."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)  # the fast backends count in powers of 2


class Attention(NamedTuple):
    """What an attention backend returns."""

    out: Tensor  # [B, H, M, D], type of the queries
    lse: Tensor | None  # [B, H, M] float32, log of the sum of exp(logits); -inf: sees nothing
    column_sums: Tensor | None  # [B, H, N] float32, attention that each key received


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, 1, N], added to the logits
) -> Attention:
    """Return softmax(q k^T / sqrt(D) + bias) v with its log-sum-exp and column sums, in float32.

    A key with bias -inf does not exist. A query that sees no key at all gets out = 0 and
    lse = -inf, and adds nothing to the column sums.
    """
    logits = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [B, H, M, N]
    if bias is not None:
        logits = logits + bias.float()
    lse = logits.logsumexp(-1)
    probabilities = (logits - lse.unsqueeze(-1)).exp()
    probabilities = torch.where(lse.isneginf().unsqueeze(-1), 0.0, probabilities)
    out = probabilities @ v.float()
    return Attention(out.to(q.dtype), lse, probabilities.sum(-2))


def subsample_size(num_queries: int, fraction: float, multiple: int = 128) -> int:
    """Return how many queries estimate the column sums when ``fraction`` of them is asked for."""
    if fraction >= 1 or num_queries <= multiple:
        return num_queries
    return max(multiple, int(fraction * num_queries) // multiple * multiple)


def subsample_queries(q: Tensor, fraction: float) -> tuple[Tensor, float]:
    """Return evenly spaced rows of q [B, H, M, D] and the factor that restores sums over all."""
    num_queries = q.shape[2]
    size = subsample_size(num_queries, fraction)
    if size == num_queries:
        return q, 1.0
    rows = torch.arange(size, device=q.device) * num_queries // size
    return q.index_select(2, rows), num_queries / size
