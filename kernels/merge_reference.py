"""The update of one row of the spatial token pool, written to be read (STAC, arXiv 2603.20284).

A row holds what one attention head of one layer remembers of one voxel: a few raw tokens waiting
in a buffer and a few pivots, each the weighted mean of many tokens. :mod:`kernels.merge` computes
the same for all rows at once and is tested against this module.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

EPS = 1e-6  # inside the norm of the cosine


class MergeRule(NamedTuple):
    """When tokens are kept, absorbed, merged or dropped; letters are those of the paper."""

    buffer_size: int = 8  # B, raw tokens that make a new pivot
    num_pivots: int = 4  # P
    absorb_threshold: float = 0.8  # lambda, cosine of a token to the pivot that absorbs it
    drop_gate: float = 0.2  # beta, times the mean score of the row: what scores less is dropped
    keep_key_norm: bool = False  # a mean of keys gets the mean of their norms, not a shorter one


class Token(NamedTuple):
    """A key and its value with the score that it had when it left the working cache."""

    key: Tensor  # [D]
    value: Tensor  # [D]
    score: float


class Pivot(NamedTuple):
    """The weighted mean of ``count`` tokens."""

    key: Tensor  # [D]
    value: Tensor  # [D]
    weight: float  # W, sum of the weights
    score_sum: float  # S, sum of the scores
    count: int  # C


@dataclass
class Row:
    """What one head of one layer remembers of one voxel."""

    buffer: list[Token] = field(default_factory=list)
    pivots: list[Pivot] = field(default_factory=list)


class Update(NamedTuple):
    """The outcome of one step for one row."""

    row: Row
    overflow: list[Token]  # offered again in the next step
    num_discarded: int


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two keys, finite for a zero key."""
    return float(a @ b / ((a @ a + EPS).sqrt() * (b @ b + EPS).sqrt()))


def mean(keys: list[Tensor], weights: list[float]) -> Tensor:
    """Return the weighted mean of vectors."""
    return sum(w * k for w, k in zip(weights, keys)) / sum(weights)


def mean_key(keys: list[Tensor], weights: list[float], rule: MergeRule) -> Tensor:
    """Return the weighted mean of keys, scaled to their mean norm where the rule says so."""
    merged = mean(keys, weights)
    if not rule.keep_key_norm:
        return merged
    norm = sum(w * k.norm() for w, k in zip(weights, keys)) / sum(weights)
    return merged * norm / merged.norm().clamp_min(EPS)


def update_row(row: Row, tokens: list[Token], rule: MergeRule) -> Update:
    """Offer ``tokens`` (new ones first, then the last step's overflow) to ``row``."""
    pivots, rest = absorb(row.pivots, tokens, rule)
    candidates = rest
    if pivots:
        gate = rule.drop_gate * sum(p.score_sum for p in pivots) / sum(p.count for p in pivots)
        candidates = [t for t in rest if t.score > gate]
    ranked = sorted(row.buffer + candidates, key=lambda t: -t.score)  # stable
    buffer, overflow = ranked[: rule.buffer_size], ranked[rule.buffer_size :]
    if len(buffer) == rule.buffer_size:
        pivots = insert_pivot(pivots, merge_buffer(buffer, rule), rule)
        buffer = []
    pivots, overflow = absorb(pivots, overflow, rule)
    return Update(Row(buffer, pivots), overflow, len(rest) - len(candidates))


def absorb(
    pivots: list[Pivot], tokens: list[Token], rule: MergeRule
) -> tuple[list[Pivot], list[Token]]:
    """Let each pivot take in the tokens that resemble it most; return pivots and what is left.

    All tokens are compared with the pivots as they were before the batch.
    """
    taken: list[list[Token]] = [[] for _ in pivots]
    rest = []
    for token in tokens:
        similarity = [cosine(token.key, p.key) for p in pivots]
        if pivots and max(similarity) >= rule.absorb_threshold:
            taken[similarity.index(max(similarity))].append(token)
        else:
            rest.append(token)
    return [_grown(p, batch, rule) for p, batch in zip(pivots, taken)], rest


def _grown(pivot: Pivot, tokens: list[Token], rule: MergeRule) -> Pivot:
    if not tokens:
        return pivot
    weights = [pivot.weight, *(_attraction(t.key, pivot.key) for t in tokens)]
    return Pivot(
        mean_key([pivot.key, *(t.key for t in tokens)], weights, rule),
        mean([pivot.value, *(t.value for t in tokens)], weights),
        sum(weights),
        pivot.score_sum + sum(t.score for t in tokens),
        pivot.count + len(tokens),
    )


def merge_buffer(buffer: list[Token], rule: MergeRule) -> Pivot:
    """Merge a full buffer, best score first, around its best token."""
    weights = [_attraction(t.key, buffer[0].key) for t in buffer]
    return Pivot(
        mean_key([t.key for t in buffer], weights, rule),
        mean([t.value for t in buffer], weights),
        sum(weights),
        sum(t.score for t in buffer),
        len(buffer),
    )


def insert_pivot(pivots: list[Pivot], new: Pivot, rule: MergeRule) -> list[Pivot]:
    """Add a pivot; when all slots are taken, the lightest one is merged into its neighbour."""
    if len(pivots) < rule.num_pivots:
        return [*pivots, new]
    lightest = min(range(len(pivots)), key=lambda i: pivots[i].weight)
    victim = pivots[lightest]
    others = [i for i in range(len(pivots)) if i != lightest]
    nearest = max(others, key=lambda i: cosine(victim.key, pivots[i].key))
    neighbour = pivots[nearest]
    fade = math.exp(cosine(victim.key, neighbour.key) - 1)
    weights = [victim.weight * fade, neighbour.weight]
    merged = Pivot(
        mean_key([victim.key, neighbour.key], weights, rule),
        mean([victim.value, neighbour.value], weights),
        sum(weights),
        victim.score_sum + neighbour.score_sum,
        victim.count + neighbour.count,
    )
    return [
        new if i == lightest else merged if i == nearest else pivot
        for i, pivot in enumerate(pivots)
    ]


def _attraction(a: Tensor, b: Tensor) -> float:
    """Return omega = exp(cos), between 1/e and e."""
    return math.exp(cosine(a, b))
