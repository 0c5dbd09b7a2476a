"""Attention over keys and values of 8 or 4 bits as one Triton pass: codes are widened in the tile.

The two halves of the channels are kept apart, which is how codes of 4 bits lie in their bytes, so
one kernel serves both. Scales are applied to logits and weights, never to the codes. Works on the
CPU under ``TRITON_INTERPRET=1`` (tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream3r_core.kernels.quantized import Quantized
from stream3r_core.kernels.reference import LOG2_E, Attention
from stream3r_core.kernels.triton_attention import (
    INTERPRETED,
    _bias_row,
    _dot,
    _load_bias,
    _softmax_step,
)


@triton.jit
def _halves(base, offsets, mask, half, PACKED: tl.constexpr, type: tl.constexpr):
    """Load the codes of the lower and the upper channels of a tile."""
    if PACKED:
        pair = tl.load(base + offsets, mask=mask, other=0).to(tl.int32)
        low = ((pair & 15) ^ 8) - 8  # the sign of 4 bits
        high = ((pair >> 4) ^ 8) - 8
    else:
        low = tl.load(base + offsets, mask=mask, other=0).to(tl.int32)
        high = tl.load(base + offsets + half, mask=mask, other=0).to(tl.int32)
    # By way of float32: the interpreter takes the bits of an integer for those of a bfloat16.
    return low.to(tl.float32).to(type), high.to(tl.float32).to(type)


@triton.jit
def _kernel(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, bias_ptr, out_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, ks_b, ks_h, ks_n, v_b, v_h, v_n, vs_b, vs_h, vs_n,
    bias_b, bias_h, bias_n, out_b, out_h, out_m,
    H, M, N, half, scale,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    row_mask = (rows < M)[:, None] & (channels < half)[None, :]
    q_tile = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_m + channels[None, :]
    q_low = tl.load(q_tile, mask=row_mask, other=0.0)
    q_high = tl.load(q_tile + half, mask=row_mask, other=0.0)
    peak = tl.full([BLOCK_M], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        mask = (keys < N)[:, None] & (channels < half)[None, :]
        k_base = k_ptr + batch * k_b + head * k_h
        k_low, k_high = _halves(
            k_base, keys[:, None] * k_n + channels[None, :], mask, half, PACKED, q_low.dtype
        )
        k_scale = tl.load(
            k_scale_ptr + batch * ks_b + head * ks_h + keys * ks_n, mask=keys < N, other=0.0
        )
        logits = _dot(q_low, tl.trans(k_low), INTERPRET)
        logits += _dot(q_high, tl.trans(k_high), INTERPRET)
        logits = logits * (k_scale * scale)[None, :]
        if HAS_BIAS:
            bias = _load_bias(bias_ptr, batch, head, keys, N, bias_b, bias_h, bias_n)
            logits += bias[None, :] * 1.4426950408889634
        weights, decay, peak, total = _softmax_step(logits, keys, N, peak, total)
        v_base = v_ptr + batch * v_b + head * v_h
        v_low, v_high = _halves(
            v_base, keys[:, None] * v_n + channels[None, :], mask, half, PACKED, q_low.dtype
        )
        v_scale = tl.load(
            v_scale_ptr + batch * vs_b + head * vs_h + keys * vs_n, mask=keys < N, other=0.0
        )
        weights = (weights * v_scale[None, :]).to(q_low.dtype)
        low = low * decay[:, None] + _dot(weights, v_low, INTERPRET)
        high = high * decay[:, None] + _dot(weights, v_high, INTERPRET)
    safe_total = tl.where(total == 0.0, 1.0, total)  # rows that see no key
    out_tile = out_ptr + batch * out_b + head * out_h + rows[:, None] * out_m + channels[None, :]
    out_type = out_ptr.dtype.element_ty
    tl.store(out_tile, (low / safe_total[:, None]).to(out_type), mask=row_mask)
    tl.store(out_tile + half, (high / safe_total[:, None]).to(out_type), mask=row_mask)


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Quantized,  # [B, H, N, D]
    v: Quantized,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, 1, N]
) -> Attention:
    """Return softmax(q k^T / sqrt(D) + bias) v; q in float16, bfloat16 or float32, D even."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    B, H, M, D = q.shape
    N = k.codes.shape[2]
    out = q.new_empty(B, H, M, D)
    bias_row, bias_strides = _bias_row(bias, B, H, N)
    tile = {'BLOCK_M': 64, 'BLOCK_N': 64, 'BLOCK_D': max(16, triton.next_power_of_2(D // 2))}
    tensors = (k.codes, k.scale, v.codes, v.scale)
    with torch.cuda.device_of(q):
        _kernel[(triton.cdiv(M, tile['BLOCK_M']), B * H)](
            q, *tensors, q if bias_row is None else bias_row, out,
            *q.stride()[:3], *(s for x in tensors for s in x.stride()[:3]),
            *bias_strides, *out.stride()[:3],
            H, M, N, D // 2, D**-0.5 * LOG2_E,
            PACKED=k.codes.dtype == torch.uint8, HAS_BIAS=bias is not None,
            INTERPRET=INTERPRETED, **tile,
        )  # fmt: skip
    return Attention(out, None, None)
