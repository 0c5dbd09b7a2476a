"""Awkward sizes for attention backends, and how far a backend is from the reference on them.

Run as a program under TRITON_INTERPRET=1 it prints the measurements of the Triton backend as JSON:
Triton decides at import whether it interprets, so the tests start a fresh process for it.
"""

import json
import sys
from typing import NamedTuple

import torch

from stream3r_core.kernels import reference

GATES = {'float16': 2e-3, 'bfloat16': 1.6e-2, 'float32': 1e-5}  # of the output, absolute
BIASES = ('none', 'random', 'first tile masked', 'all but one masked', 'all masked')


class Case(NamedTuple):
    B: int
    H: int
    M: int
    N: int
    D: int
    dtype: str
    bias: str = 'none'
    query_fraction: float = 1.0

    @property
    def name(self):
        return '-'.join(str(x).replace(' ', '_') for x in self)


CASES = [
    Case(1, 2, 130, 257, 16, 'float32', 'random'),
    Case(2, 1, 1, 1, 64, 'float32', 'all masked'),
    Case(1, 1, 65, 33, 24, 'float32', 'none'),
    Case(1, 2, 40, 100, 128, 'float32', 'first tile masked'),
    Case(2, 2, 129, 65, 64, 'float16', 'random'),
    Case(1, 3, 37, 300, 80, 'float16', 'first tile masked'),
    Case(1, 1, 128, 64, 32, 'float16', 'none'),
    Case(2, 2, 31, 191, 64, 'bfloat16', 'all but one masked'),
    Case(1, 1, 257, 129, 128, 'bfloat16', 'random'),
    Case(1, 2, 700, 90, 16, 'float32', 'random', 0.5),
    Case(1, 1, 300, 70, 64, 'float16', 'none', 0.5),
]


def inputs(case, device='cpu'):
    generator = torch.Generator().manual_seed(case.M * 1000 + case.N)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(case.B, case.H, n, case.D, generator=generator).to(device, dtype)
        for n in (case.M, case.N, case.N)
    )
    bias = torch.randn(case.B, case.H, 1, case.N, generator=generator)
    if case.bias == 'none':
        return q, k, v, None
    if case.bias == 'first tile masked':
        bias[..., : 3 * case.N // 4] = -torch.inf
    if case.bias == 'all but one masked':
        bias[..., 1:] = -torch.inf
    if case.bias == 'all masked':
        bias[:] = -torch.inf
    return q, k, v, bias.to(device)


def measure(attention, case, device='cpu'):
    """Return how far ``attention`` is from the reference, as plain numbers."""
    q, k, v, bias = inputs(case, device)
    got = attention(q, k, v, bias, case.query_fraction)
    again = attention(q, k, v, bias, case.query_fraction)
    expected = reference.attention(q, k, v, bias)
    sampled, factor = reference.subsample_queries(q, case.query_fraction)
    sums = reference.attention(sampled, k, v, bias).column_sums * factor
    masked = torch.zeros_like(sums) if bias is None else bias[:, :, 0].isneginf() * got.column_sums
    seeing = ~expected.lse.isneginf()
    return {
        'out': (got.out.float() - expected.out.float()).abs().max().item(),
        'lse': (got.lse - expected.lse)[seeing].abs().sum().item(),
        'blind rows agree': got.lse.isneginf().eq(~seeing).all().item(),
        'column sums': ((got.column_sums - sums).abs() / sums.clamp_min(1e-6)).max().item(),
        'total': got.column_sums.sum(-1).sub(seeing.sum(-1)).abs().max().item() / case.M,
        'masked': masked.abs().max().item(),
        'repeatable': all(torch.equal(a, b) for a, b in zip(got, again)),
    }


def check(case, found):
    assert found['out'] <= GATES[case.dtype]
    assert found['lse'] <= 1e-3
    assert found['blind rows agree']
    assert found['column sums'] <= 1e-3
    assert found['total'] <= 1e-3
    assert found['masked'] == 0
    assert found['repeatable']


if __name__ == '__main__':
    from stream3r_core.kernels import triton_attention

    json.dump({c.name: measure(triton_attention.attention, c) for c in CASES}, sys.stdout)
