"""Which tokens of the pool the next frames get to see again."""

from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.cache.token_pool import TokenPool

TIER = 1024.0  # height of a tier of ranks; normalised queries and keys stay far below it


class Retrieved(NamedTuple):
    """Tokens brought back, best first."""

    k: Tensor  # [G, n, D]
    v: Tensor  # [G, n, D]
    bias: Tensor  # [G, n] float32, log-count; -inf where there was nothing to retrieve
    slot: Tensor  # [G, n] voxel slot of each, -1 for none


def retrieve(pool: TokenPool, rank: Tensor, num_tokens: int, max_log_count: float) -> Retrieved:
    """Return the ``num_tokens`` tokens of each group that rank highest, or all if there are less.

    ``rank`` [G, N] is made by :func:`rank_by_query` or :func:`rank_by_weight`; -inf: never.
    """
    best, index = rank.topk(min(num_tokens, pool.capacity), dim=1)
    nothing = best.isneginf()
    bias = pool.count.gather(1, index).log().clamp_max(max_log_count)
    return Retrieved(
        *pool.take(index),
        bias.masked_fill(nothing, -torch.inf),
        pool.owner.gather(1, index).long().masked_fill(nothing, -1),
    )


def bias_in_place(pool: TokenPool, max_log_count: float) -> Tensor:
    """Return the bias [G, N + 1] that shows all tokens of the pool where they are."""
    bias = pool.count.log().clamp_max(max_log_count)
    return bias.masked_fill(pool.owner < 0, -torch.inf)


def rank_by_query(pool: TokenPool, query: Tensor, near: Tensor, max_log_count: float) -> Tensor:
    """Rank by the mean query [G, D] and the log-count: near pivots, near tokens, then all others.

    The last tier only serves when the neighbourhood ``near`` [V] does not fill the budget.
    """
    num_tokens, dim = pool.capacity, pool.k.shape[2]
    tile = max(1, pool.tile_bytes // (num_tokens * (4 * dim + 48)))
    starts = range(0, pool.num_groups, tile)
    return torch.cat(
        [_rank_groups(pool, slice(s, s + tile), query, near, max_log_count) for s in starts]
    )


def _rank_groups(
    pool: TokenPool, groups: slice, query: Tensor, near: Tensor, max_log_count: float
) -> Tensor:
    keys, count, owner = (x[groups, :-1] for x in (pool.k, pool.count, pool.owner))
    logits = (keys.float() @ query[groups, :, None].float())[..., 0] * keys.shape[2] ** -0.5
    logits = logits + count.clamp_min(1).log().clamp_max(max_log_count)
    tier = near[owner.clamp_min(0).long()] * (1.0 + (count > 1))
    rank = logits.clamp(1 - TIER / 2, TIER / 2 - 1) + TIER * tier
    return rank.masked_fill(owner < 0, -torch.inf)


def rank_by_weight(pool: TokenPool, near: Tensor) -> Tensor:
    """Rank near pivots by their weight, then near buffered tokens by their score (published)."""
    owner = pool.owner[:, :-1]
    buffered = -1 / (1 + pool.score_sum[:, :-1])  # below any weight, rising with the score
    rank = pool.weight[:, :-1].where(pool.count[:, :-1] > 1, buffered)
    is_near = near[owner.clamp_min(0).long()] & (owner >= 0)
    return rank.masked_fill(~is_near, -torch.inf)
