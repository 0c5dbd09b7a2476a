"""Attention over quantised keys and values: sizes, and how far a backend is from the reference.

Run as a program under TRITON_INTERPRET=1 it prints the measurements of the Triton backend as JSON.
"""

import json
import sys

from attention_cases import Case, inputs

from stream3r_core.kernels import reference
from stream3r_core.kernels.quantized import dequantize, quantize

CASES = [
    (Case(1, 2, 70, 130, 16, 'float32', 'random'), 8),
    (Case(1, 2, 70, 130, 16, 'float32', 'random'), 4),
    (Case(2, 1, 5, 200, 64, 'float32', 'first tile masked'), 4),
    (Case(1, 1, 33, 65, 48, 'bfloat16', 'none'), 8),
    (Case(1, 2, 3, 40, 64, 'float32', 'all masked'), 8),
]


def name(case):
    return f'{case[0].name}-{case[1]}'


def error(attention, case):
    """Return the distance from attention over the very numbers that the codes stand for."""
    shape, bits = case
    q, k, v, bias = inputs(shape)
    k, v = quantize(k, bits), quantize(v, bits)
    expected = reference.attention(q, dequantize(k), dequantize(v), bias).out
    return (attention(q, k, v, bias).out.float() - expected.float()).abs().max().item()


if __name__ == '__main__':
    from stream3r_core.kernels import triton_quantized

    json.dump({name(c): error(triton_quantized.attention, c) for c in CASES}, sys.stdout)
