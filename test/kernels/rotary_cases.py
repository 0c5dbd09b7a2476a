"""How far the fused normalisation and rotation is from the plain one, as JSON.

Run as a program under TRITON_INTERPRET=1.
"""

import json
import sys

import torch
from torch import nn

from stream3r_core.kernels import triton_rotary
from stream3r_core.model.blocks import Attention
from stream3r_core.model.rope import rotary_tables

CPU = torch.device('cpu')


def distance(rows, columns, frames, heads, width, dtype):
    torch.manual_seed(rows)
    block = Attention(heads * width, heads, qk_norm=True).to(dtype)
    nn.init.normal_(block.k_norm.weight)
    nn.init.normal_(block.k_norm.bias)
    block.k_norm.float()
    tables = rotary_tables(rows, columns, 2, width, 100.0, CPU)
    x = torch.randn(2, frames * (rows * columns + 2), 3 * heads * width).to(dtype)
    k = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)[1]  # a view, as in the block
    norm = block.k_norm
    fused = triton_rotary.normalise_and_rotate(k, norm.weight, norm.bias, norm.eps, *tables)
    plain = block.turned(k, norm, tables)
    assert fused.dtype == plain.dtype == dtype and fused.shape == plain.shape
    off = (fused.float() - plain.float()).abs() / plain.float().abs().clamp_min(1.0)
    return off.max().item()


if __name__ == '__main__':
    with torch.inference_mode():
        found = [
            distance(3, 4, 1, 2, 16, torch.float32),
            distance(5, 7, 2, 1, 64, torch.float32),
            distance(2, 3, 3, 2, 24, torch.float32),  # a width that is no power of two
            distance(3, 3, 1, 2, 64, torch.bfloat16),
        ]
    json.dump(found, sys.stdout)
