"""The row update of the spatial token pool for all rows at once: sorts and segmented reductions.

Equal to :func:`kernels.merge_reference.update_row` row by row, whatever the order of the rows. On
a GPU all shapes are fixed by those of the arguments, so that nothing waits for the device. Rows
are dense: B - 1 buffer slots and P pivot slots each; how they are stored is the caller's affair.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.kernels.merge_reference import EPS, MergeRule


class Pivots(NamedTuple):
    """Merged tokens of R rows; a slot with count 0 is free."""

    k: Tensor  # [R, P, D]
    v: Tensor  # [R, P, D]
    weight: Tensor  # [R, P]
    score_sum: Tensor  # [R, P]
    count: Tensor  # [R, P]


class Buffers(NamedTuple):
    """Raw tokens of R rows, best first; a slot with score -inf is empty."""

    k: Tensor  # [R, B - 1, D]
    v: Tensor  # [R, B - 1, D]
    score: Tensor  # [R, B - 1]


class Tokens(NamedTuple):
    """Tokens on their way into a row."""

    k: Tensor  # [M, D]
    v: Tensor  # [M, D]
    score: Tensor  # [M]
    row: Tensor  # [M] int64; R = belongs to no row, is ignored


class Merged(NamedTuple):
    """The outcome of one step."""

    buffers: Buffers
    pivots: Pivots
    overflow: Tokens  # [<= M], row = R where there is none; offered again in the next step
    discarded: Tensor  # [M] bool, tokens that the gate dropped


def merge(buffers: Buffers, pivots: Pivots, tokens: Tokens, rule: MergeRule) -> Merged:
    """Offer ``tokens`` (new ones first, then the last step's overflow) to their rows."""
    num_rows = pivots.count.shape[0]
    had_pivots = (pivots.count > 0).any(1)
    pivots, absorbed = _absorb(pivots, tokens, rule)
    present = tokens.row < num_rows
    row = tokens.row.clamp_max(num_rows - 1)
    gate = rule.drop_gate * pivots.score_sum.sum(1) / pivots.count.sum(1).clamp_min(1)
    above = ~had_pivots[row] | (tokens.score > gate[row])
    discarded = present & ~absorbed & ~above
    candidates = tokens._replace(row=tokens.row.where(~absorbed & above, num_rows))
    members, overflow = _fill_buffers(buffers, candidates, rule.buffer_size)
    full = members.score[:, -1] > -torch.inf
    pivots = _merge_full(members, pivots, full, rule)
    buffers = Buffers(
        members.k[:, :-1],
        members.v[:, :-1],
        members.score[:, :-1].masked_fill(full[:, None], -torch.inf),
    )
    pivots, absorbed = _absorb(pivots, overflow, rule)
    overflow = overflow._replace(row=overflow.row.masked_fill(absorbed, num_rows))
    return Merged(buffers, pivots, overflow, discarded)


def _absorb(pivots: Pivots, tokens: Tokens, rule: MergeRule) -> tuple[Pivots, Tensor]:
    """Add tokens to the pivots that resemble them; return the pivots and the mask of the taken."""
    R, P, D = pivots.k.shape
    row = tokens.row.clamp_max(R - 1)
    comparable = (tokens.row < R) & (pivots.count > 0).any(1)[row]
    pick = _worth_a_look(comparable)
    k, v, row = tokens.k[pick], tokens.v[pick], row[pick]
    similarity = (_unit(pivots.k[row]) @ _unit(k)[..., None])[..., 0]  # [m, P]
    similarity = similarity.masked_fill(pivots.count[row] == 0, -torch.inf)
    best, which = similarity.max(1)
    taken = comparable[pick] & (best >= rule.absorb_threshold)
    attraction = best.exp().where(taken, 0.0)
    columns = [
        attraction[:, None] * k,
        attraction[:, None] * v,
        torch.stack((attraction, tokens.score[pick], taken.to(best), attraction * _norm(k)), 1),
    ]
    slot = row * P + which
    grows = _worth_a_look(torch.zeros(R * P, dtype=torch.bool, device=row.device).index_fill_(
        0, slot, True
    ))  # fmt: skip
    segment = torch.searchsorted(grows, slot).where(taken, len(grows))
    sums = segment_sum(torch.cat(columns, 1), segment, len(grows))
    old = Pivots(*(x.flatten(0, 1)[grows] for x in pivots))
    new = _grown(old, sums[:, :D], sums[:, D:-4], sums[:, -4:], rule)
    pivots = Pivots(
        *(x.flatten(0, 1).index_copy(0, grows, y).view_as(x) for x, y in zip(pivots, new))
    )
    return pivots, torch.zeros_like(comparable).index_copy_(0, pick, taken)


def _grown(old: Pivots, sum_k: Tensor, sum_v: Tensor, scalars: Tensor, rule: MergeRule) -> Pivots:
    """Add the weighted sums of tokens to pivots [n]; nothing added: the same to the last bit."""
    added, score, count, sum_norm = scalars.unbind(-1)
    k, v = _weighted_mean(
        (old.weight, old.k, old.v, _norm(old.k)), (added, sum_k, sum_v, sum_norm), rule
    )
    touched = (count > 0)[:, None]
    return Pivots(
        k.where(touched, old.k),
        v.where(touched, old.v),
        old.weight + added,
        old.score_sum + score,
        old.count + count,
    )


def _worth_a_look(mask: Tensor) -> Tensor:
    """Return the marked positions, or all where the host cannot know them without waiting."""
    if counted_on_host(mask.device):
        return mask.nonzero().flatten()
    return torch.arange(len(mask), device=mask.device)


def _weighted_mean(base: tuple, added: tuple, rule: MergeRule) -> tuple[Tensor, Tensor]:
    """Return key and value of W * base + sums, over their weights; 0 / 0 is left to the caller."""
    weight, k, v, norm = base
    sum_weight, sum_k, sum_v, sum_norm = added
    total = (weight + sum_weight).clamp_min(EPS)
    k = (weight[..., None] * k + sum_k) / total[..., None]
    v = (weight[..., None] * v + sum_v) / total[..., None]
    if rule.keep_key_norm:
        k = k * ((weight * norm + sum_norm) / total / _norm(k).clamp_min(EPS))[..., None]
    return k, v


def _fill_buffers(buffers: Buffers, tokens: Tokens, size: int) -> tuple[Buffers, Tokens]:
    """Return the best ``size`` of old buffer and new tokens per row, and the others.

    Every row has at least one place more than its old buffer needs, so there are never more
    others than new tokens.
    """
    R, slots = buffers.score.shape
    device = tokens.row.device
    k = torch.cat((buffers.k.flatten(0, 1), tokens.k))
    v = torch.cat((buffers.v.flatten(0, 1), tokens.v))
    score = torch.cat((buffers.score.flatten(), tokens.score))
    owner = torch.arange(R, device=device).repeat_interleave(slots)
    row = torch.cat((owner.masked_fill(buffers.score.flatten().isneginf(), R), tokens.row))
    order = score.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by score, then by arrival
    row = row[order]
    first = torch.searchsorted(row, torch.arange(R + 1, device=device))
    rank = torch.arange(len(row), device=device) - first[row]
    kept = (rank < size) & (row < R)
    # One spare row and one spare column take what does not go into a buffer.
    picked = torch.full((R + 1, size + 1), -1, device=device)
    picked[row.where(kept, R), rank.clamp_max(size)] = order.where(kept, -1)
    picked = picked[:R, :size]
    chosen = picked.clamp_min(0)
    members = Buffers(k[chosen], v[chosen], score[chosen].masked_fill(picked < 0, -torch.inf))
    left = (rank >= size) & (row < R)
    room = max(1, int(left.sum())) if counted_on_host(device) else len(tokens.row)
    place = (left.cumsum(0) - 1).where(left, room)
    source = torch.full((room + 1,), -1, device=device)
    source[place] = order.where(left, -1)
    source = source[:-1]
    taken = source.clamp_min(0)
    rows_of = torch.cat((owner, tokens.row))
    overflow_row = rows_of[taken].masked_fill(source < 0, R)
    return members, Tokens(k[taken], v[taken], score[taken], overflow_row)


def _merge_full(members: Buffers, pivots: Pivots, full: Tensor, rule: MergeRule) -> Pivots:
    """Turn the buffer of each full row into a pivot."""
    rows = _worth_a_look(full)
    made = _merge_members(Buffers(*(x[rows] for x in members)), rule)
    made = _insert(Pivots(*(x[rows] for x in pivots)), made, full[rows], rule)
    return Pivots(*(old.index_copy(0, rows, new) for old, new in zip(pivots, made)))


def _merge_members(members: Buffers, rule: MergeRule) -> Pivots:
    """Merge the B members of each row around the best one: one pivot per row, [R, 1, ...].

    Rows that are not full give numbers of no meaning, never NaN.
    """
    unit = _unit(members.k)
    weight = (unit @ unit[:, 0, :, None])[..., 0].exp()  # [R, B]
    score = members.score.masked_fill(members.score.isneginf(), 0.0)
    nothing = torch.zeros_like(weight[:, 0])
    sums = (
        weight.sum(1),
        (weight[..., None] * members.k).sum(1),
        (weight[..., None] * members.v).sum(1),
        (weight * _norm(members.k)).sum(1),
    )
    base = (nothing, torch.zeros_like(sums[1]), torch.zeros_like(sums[2]), nothing)
    k, v = _weighted_mean(base, sums, rule)
    made = Pivots(k, v, sums[0], score.sum(1), torch.full_like(nothing, weight.shape[1]))
    return Pivots(*(x[:, None] for x in made))


def _insert(pivots: Pivots, new: Pivots, full: Tensor, rule: MergeRule) -> Pivots:
    """Put the new pivot of each full row into a free slot, or into that of the lightest one.

    The lightest is first merged into its nearest neighbour.
    """
    P = pivots.count.shape[1]
    slots = torch.arange(P, device=full.device)
    free = pivots.count == 0
    has_free = free.any(1)
    lightest = pivots.weight.argmin(1, keepdim=True)  # [R, 1]
    unit = _unit(pivots.k)
    similarity = (unit @ _take(unit, lightest).mT)[..., 0]  # [R, P]
    similarity = similarity.masked_fill(slots == lightest, -torch.inf)
    closeness, nearest = similarity.max(1, keepdim=True)
    victim = Pivots(*(_take(x, lightest) for x in pivots))
    neighbour = Pivots(*(_take(x, nearest) for x in pivots))
    fading = victim.weight * (closeness - 1).exp()
    k, v = _weighted_mean(
        (neighbour.weight, neighbour.k, neighbour.v, _norm(neighbour.k)),
        (fading, fading[..., None] * victim.k, fading[..., None] * victim.v,
         fading * _norm(victim.k)),
        rule,
    )  # fmt: skip
    merged = Pivots(
        k, v, neighbour.weight + fading,
        neighbour.score_sum + victim.score_sum, neighbour.count + victim.count,
    )  # fmt: skip
    into_neighbour = (slots == nearest) & (full & ~has_free)[:, None]
    slot = torch.where(has_free[:, None], free.to(torch.int8).argmax(1, keepdim=True), lightest)
    into_slot = (slots == slot) & full[:, None]
    return Pivots(
        *(
            _where(into_slot, n, _where(into_neighbour, m, old))
            for old, m, n in zip(pivots, merged, new)
        )
    )


def counted_on_host(device: torch.device) -> bool:
    """Return whether Python may look at a tensor without waiting for a GPU.

    Then shapes may follow the data; on a GPU they are upper bounds.
    """
    return device.type == 'cpu'


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum values [M, C] by segment [M] int64, the same way every time; segment n is left out."""
    if values.device.type == 'cpu':
        out = values.new_zeros(num_segments + 1, values.shape[1])
        return out.index_add_(0, segment, values)[:-1]
    return sorted_segment_sum(values, segment, num_segments)


def sorted_segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Do the same without atomic additions, whose order would differ from run to run."""
    segment, order = segment.sort(stable=True)
    bounds = torch.arange(num_segments + 1, device=segment.device)
    offsets = torch.searchsorted(segment, bounds)
    end = torch.full_like(offsets[:1], len(segment))
    lengths = torch.cat((offsets, end)).diff()  # the last segment takes what is left out
    sums = torch.segment_reduce(
        values[order], 'sum', lengths=lengths, axis=0, unsafe=True, initial=0
    )
    return sums[:-1]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return the slot ``index`` [R, 1] of each row of x [R, P, ...]: [R, 1, ...]."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index]


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask[..., None] if old.ndim == 3 else mask, new, old)
