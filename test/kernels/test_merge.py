"""The row update of the token pool: golden vectors, batch against reference, bounds, books."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream3r_core.kernels import merge as batch
from stream3r_core.kernels.merge_reference import MergeRule, Pivot, Row, Token, update_row

DIM = 4


def token(key, value, score):
    key, value = torch.tensor(key, dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
    return Token(key, value, score)


# ---- the two representations of a row


def empty_rows(num_rows, rule, dim=DIM):
    def zeros(slots, *tail):
        return torch.zeros(num_rows, slots, *tail, dtype=torch.float64)

    B, P = rule.buffer_size - 1, rule.num_pivots
    buffers = batch.Buffers(zeros(B, dim), zeros(B, dim), zeros(B).fill_(-torch.inf))
    return buffers, batch.Pivots(zeros(P, dim), zeros(P, dim), zeros(P), zeros(P), zeros(P))


def pack(tokens_of_row, order=None, dim=DIM):
    """Make batch tokens of lists of tokens, one list per row, in any order of the rows."""
    flat = [(row, t) for row, tokens in enumerate(tokens_of_row) for t in tokens]
    flat = flat if order is None else [flat[i] for i in order]
    none = torch.zeros(0, dim, dtype=torch.float64)
    return batch.Tokens(
        torch.stack([t.key for _, t in flat]) if flat else none,
        torch.stack([t.value for _, t in flat]) if flat else none,
        torch.tensor([t.score for _, t in flat], dtype=torch.float64),
        torch.tensor([row for row, _ in flat], dtype=torch.int64),
    )


def unpack(buffers, pivots, row):
    live = buffers.score[row].isfinite().nonzero().flatten().tolist()
    tokens = [
        Token(buffers.k[row, i], buffers.v[row, i], buffers.score[row, i].item()) for i in live
    ]
    used = (pivots.count[row] > 0).nonzero().flatten().tolist()
    return Row(tokens, [Pivot(*(x[row, i] for x in pivots)) for i in used])


def overflow_of(overflow, row):
    found = (overflow.row == row).nonzero().flatten().tolist()
    return [Token(overflow.k[i], overflow.v[i], overflow.score[i].item()) for i in found]


def assert_same_tokens(got, expected):
    assert [g.score for g in got] == pytest.approx([e.score for e in expected])
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.key, e.key)
        torch.testing.assert_close(g.value, e.value)


def assert_same_row(got, expected):
    assert_same_tokens(got.buffer, expected.buffer)
    assert len(got.pivots) == len(expected.pivots)
    for g, e in zip(got.pivots, expected.pivots):
        for a, b in zip(g, e):
            torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double())


# ---- golden vectors of the design text, section 4.3

GOLDEN_RULE = MergeRule(buffer_size=2, num_pivots=2, absorb_threshold=0.8, drop_gate=0.2)
GOLDEN_STEPS = [
    [((1, 0), 1, 1)],
    [((0, 1), 3, 2)],
    [((1, 1), 2, 3), ((-1, 0), 9, 0.1)],
    [((-1, 0), 9, 1), ((-1, 0.1), 5, 4)],
    [((0, -1), 7, 1.5), ((0.1, -1), 7, 1.5), ((0, -2), 7, 0.9)],
]
FIRST = ((-1, 0.0501), 6.995, 5.4231, 5, 2)
GOLDEN_PIVOTS = [
    [],
    [((0.2689, 0.7311), 2.4621, 3.7183, 3, 2)],
    [((0.5614, 0.8386), 2.2773, 6.197, 6, 3)],
    [((0.5614, 0.8386), 2.2773, 6.197, 6, 3), FIRST],
    [((0.3093, 0.7113), 3.039, 7.3903, 11, 5), ((0.0332, -1.3336), 7, 8.138, 3.9, 3)],
]


def golden_tokens(step):
    return [token(tuple(map(float, k)), (float(v), 0.0), float(s)) for k, v, s in step]


def assert_golden(row, step):
    assert len(row.buffer) == (1 if step == 0 else 0)
    assert len(row.pivots) == len(GOLDEN_PIVOTS[step])
    for pivot, (key, value, weight, score_sum, count) in zip(row.pivots, GOLDEN_PIVOTS[step]):
        got = [*pivot.key, pivot.value[0], pivot.weight, pivot.score_sum, pivot.count]
        assert list(map(float, got)) == pytest.approx(
            [*key, value, weight, score_sum, count], abs=6e-5
        )


def test_reference_reproduces_the_golden_vectors():
    row = Row()
    for step, tokens in enumerate(GOLDEN_STEPS):
        row, overflow, discarded = update_row(row, golden_tokens(tokens), GOLDEN_RULE)
        assert not overflow and discarded == (1 if step == 2 else 0)
        assert_golden(row, step)


def test_batch_reproduces_the_golden_vectors_in_every_row():
    buffers, pivots = empty_rows(3, GOLDEN_RULE, dim=2)
    for step, tokens in enumerate(GOLDEN_STEPS):
        packed = pack([golden_tokens(tokens)] * 3, dim=2)
        buffers, pivots, overflow, discarded = batch.merge(buffers, pivots, packed, GOLDEN_RULE)
        assert (overflow.row == 3).all() and discarded.sum() == (3 if step == 2 else 0)
        for row in range(3):
            assert_golden(unpack(buffers, pivots, row), step)


# ---- batch = reference


def random_steps(seed, num_rows, num_steps, per_row):
    """Return steps of token lists per row; keys crowd around a few directions."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = rand(4, DIM)
    for _ in range(num_steps):
        yield [
            [
                Token(
                    centres[int(torch.randint(4, (1,), generator=generator))] + 0.3 * rand(DIM),
                    rand(DIM),
                    float(torch.rand(1, generator=generator)),
                )
                for _ in range(int(torch.randint(per_row + 1, (1,), generator=generator)))
            ]
            for _ in range(num_rows)
        ]


@pytest.mark.parametrize('keep_key_norm', [False, True])
@pytest.mark.parametrize(('buffer_size', 'num_pivots'), [(8, 4), (2, 2), (3, 5)])
def test_batch_equals_the_reference_row_by_row(buffer_size, num_pivots, keep_key_norm):
    rule = MergeRule(buffer_size, num_pivots, 0.8, 0.7, keep_key_norm)
    num_rows = 6
    rows = [Row() for _ in range(num_rows)]
    carried = [[] for _ in range(num_rows)]
    buffers, pivots = empty_rows(num_rows, rule)
    batch_carried = [[] for _ in range(num_rows)]
    seen = {'merged': 0, 'overflow': 0, 'discarded': 0}
    for step in random_steps(buffer_size, num_rows, 12, 14):
        packed = pack([new + old for new, old in zip(step, batch_carried)])
        buffers, pivots, overflow, discarded = batch.merge(buffers, pivots, packed, rule)
        batch_carried = [overflow_of(overflow, r) for r in range(num_rows)]
        for r in range(num_rows):
            rows[r], carried[r], dropped = update_row(rows[r], step[r] + carried[r], rule)
            assert_same_row(unpack(buffers, pivots, r), rows[r])
            assert_same_tokens(batch_carried[r], carried[r])
            assert int((discarded & (packed.row == r)).sum()) == dropped
            seen['merged'] += len(rows[r].pivots)
            seen['overflow'] += len(carried[r])
            seen['discarded'] += dropped
    assert all(seen.values()), f'the data exercised too little: {seen}'


def test_the_order_of_the_rows_changes_nothing():
    rule = MergeRule()
    step = next(random_steps(5, 4, 1, 30))
    first = pack(step)
    results = []
    for seed in (None, 1, 2):
        order = None
        if seed is not None:  # shuffle the rows among each other, keep the arrival within a row
            shuffled = torch.randperm(
                len(first.row), generator=torch.Generator().manual_seed(seed)
            )
            slots = first.row[shuffled]
            order = [0] * len(slots)
            for r in range(4):
                for place, i in zip(
                    (slots == r).nonzero().flatten().tolist(),
                    (first.row == r).nonzero().flatten().tolist(),
                ):
                    order[place] = i
        results.append(batch.merge(*empty_rows(4, rule), pack(step, order), rule))
    for result in results[1:]:
        for r in range(4):
            assert_same_row(unpack(*result[:2], r), unpack(*results[0][:2], r))
            assert_same_tokens(
                overflow_of(result.overflow, r), overflow_of(results[0].overflow, r)
            )


# ---- laws


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    buffer_size=st.integers(2, 8),
    num_pivots=st.integers(2, 5),
    threshold=st.floats(-0.5, 1.0),
    gate=st.floats(0.0, 2.0),
)
def test_tokens_are_conserved_and_rows_are_bounded(seed, buffer_size, num_pivots, threshold, gate):
    rule = MergeRule(buffer_size, num_pivots, threshold, gate)
    num_rows = 5
    buffers, pivots = empty_rows(num_rows, rule)
    carried = [[] for _ in range(num_rows)]
    total_in = torch.zeros(num_rows)
    total_out = torch.zeros(num_rows)
    for step in random_steps(seed, num_rows, 5, 20):
        total_in += torch.tensor([float(len(tokens)) for tokens in step])
        packed = pack([new + old for new, old in zip(step, carried)])
        buffers, pivots, overflow, discarded = batch.merge(buffers, pivots, packed, rule)
        carried = [overflow_of(overflow, r) for r in range(num_rows)]
        for row in packed.row[discarded].tolist():
            total_out[row] += 1
        buffered = buffers.score.isfinite().sum(1)
        stored = buffered + (pivots.count > 0).sum(1)
        assert (stored <= num_pivots + buffer_size - 1).all()
        waiting = torch.tensor([float(len(tokens)) for tokens in carried])
        held = pivots.count.sum(1) + buffered + waiting + total_out
        assert held.tolist() == pytest.approx(total_in.tolist())
        assert all(x.isfinite().all() for x in (pivots.k, pivots.v, pivots.weight))


def test_keep_key_norm_preserves_the_mean_norm_that_plain_averaging_shrinks():
    step = [[token((1.0, 0, 0, 0), (0.0,) * 4, 1.0), token((0.0, 1, 0, 0), (0.0,) * 4, 1.0)]]
    norms = {}
    for keep in (False, True):
        rule = MergeRule(2, 2, keep_key_norm=keep)
        _, pivots, *_ = batch.merge(*empty_rows(1, rule), pack(step), rule)
        norms[keep] = pivots.k[0, 0].norm().item()
    assert norms[True] == pytest.approx(1.0)
    assert norms[False] < 0.8


def test_drifting_keys_keep_their_norm_over_many_merges():
    rule = MergeRule(8, 4, keep_key_norm=True)
    buffers, pivots = empty_rows(1, rule)
    generator = torch.Generator().manual_seed(0)
    direction = torch.tensor([3.8, 0, 0, 0], dtype=torch.float64)
    for step in range(60):
        angle = 0.1 * step
        turn = torch.tensor([math.cos(angle), math.sin(angle), 0, 0], dtype=torch.float64) * 3.8
        noise = torch.randn(20, DIM, generator=generator, dtype=torch.float64)
        keys = turn + noise
        keys = keys / keys.norm(dim=1, keepdim=True) * direction.norm()
        tokens = batch.Tokens(keys, noise, torch.ones(20).double(), torch.zeros(20).long())
        buffers, pivots, *_ = batch.merge(buffers, pivots, tokens, rule)
    live = pivots.count[0] > 0
    assert live.sum() > 1
    torch.testing.assert_close(
        pivots.k[0, live].norm(dim=1), torch.full((int(live.sum()),), 3.8, dtype=torch.float64)
    )


def test_empty_rows_and_tokens_of_no_row_are_left_alone():
    rule = MergeRule()
    nobody = pack([[token((1.0, 2, 3, 4), (1.0,) * 4, 5.0)]])._replace(row=torch.tensor([2]))
    for tokens in (nobody, pack([])):
        buffers, pivots, overflow, discarded = batch.merge(*empty_rows(2, rule), tokens, rule)
        assert buffers.score.isneginf().all() and (pivots.count == 0).all()
        assert (overflow.row == 2).all() and not discarded.any()


def test_both_segmented_sums_agree():
    values = torch.randn(500, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for num_segments in (1, 40, 600):
        segment = torch.randint(
            num_segments + 3, (500,), generator=torch.Generator().manual_seed(1)
        )
        segment = segment.clamp_max(num_segments)
        torch.testing.assert_close(
            batch.sorted_segment_sum(values, segment, num_segments),
            batch.segment_sum(values, segment, num_segments),
        )
