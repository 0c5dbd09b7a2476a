"""Attention with log-sum-exp, key bias and column sums as two Triton passes.

Pass 1 is a forward pass with a running maximum, one program per tile of queries. Pass 2 sums the
columns of the softmax: one program owns a tile of keys, loads it once and sweeps over the queries,
whose log-sum-exp pass 1 has left, so every key is written once, without atomics: results are the
same from run to run. Works on the CPU under ``TRITON_INTERPRET=1`` (tests).
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream3r_core.kernels.reference import LOG2_E, Attention, subsample_size

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # read by Triton at import, too


@triton.jit
def _dot(a, b, INTERPRET: tl.constexpr):
    """Multiply two tiles; the interpreter keeps bfloat16 as bits, which NumPy cannot multiply."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision='ieee')


@triton.jit
def _logits_base2(q, k, bias, scale, HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr):
    """Return (q k^T / sqrt(D) + bias) * log2(e) of a tile; ``scale`` contains log2(e)."""
    logits = _dot(q, tl.trans(k), INTERPRET) * scale
    if HAS_BIAS:
        logits += bias[None, :] * 1.4426950408889634
    return logits


@triton.jit
def _load_bias(bias_ptr, batch, head, keys, N, bias_b, bias_h, bias_n):
    """Load the bias of a tile of keys [BLOCK_N] as float32; 0 beyond the last one."""
    bias_tile = bias_ptr + batch * bias_b + head * bias_h + keys * bias_n
    return tl.load(bias_tile, mask=keys < N, other=0.0).to(tl.float32)


@triton.jit
def _softmax_step(logits, keys, N, peak, total):
    """Take in a tile of logits to the base 2; returns weights, decay of what was, peak, total."""
    logits = tl.where((keys < N)[None, :], logits, float('-inf'))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # A tile of masked keys must not turn -inf - -inf into NaN.
    finite_peak = tl.where(new_peak == float('-inf'), 0.0, new_peak)
    weights = tl.exp2(logits - finite_peak[:, None])
    decay = tl.exp2(peak - finite_peak)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, out_b, out_h, out_m,
    H, M, N, D, scale,
    HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    row_mask = (rows < M)[:, None] & (channels < D)[None, :]
    q_tile = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_m + channels[None, :]
    q = tl.load(q_tile, mask=row_mask, other=0.0)
    peak = tl.full([BLOCK_M], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = (keys < N)[:, None] & (channels < D)[None, :]
        k_tile = k_ptr + batch * k_b + head * k_h + keys[:, None] * k_n + channels[None, :]
        k = tl.load(k_tile, mask=key_mask, other=0.0)
        bias = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            bias = _load_bias(bias_ptr, batch, head, keys, N, bias_b, bias_h, bias_n)
        logits = _logits_base2(q, k, bias, scale, HAS_BIAS, INTERPRET)
        weights, decay, peak, total = _softmax_step(logits, keys, N, peak, total)
        v_tile = v_ptr + batch * v_b + head * v_h + keys[:, None] * v_n + channels[None, :]
        v = tl.load(v_tile, mask=key_mask, other=0.0)
        acc = acc * decay[:, None] + _dot(weights.to(v.dtype), v, INTERPRET)
    blind = total == 0.0  # rows that see no key
    safe_total = tl.where(blind, 1.0, total)
    out = acc / safe_total[:, None]
    lse = tl.where(blind, float('-inf'), (peak + tl.log2(safe_total)) * 0.6931471805599453)
    out_tile = out_ptr + batch * out_b + head * out_h + rows[:, None] * out_m + channels[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_mask)
    tl.store(lse_ptr + (batch * H + head) * M + rows, lse, mask=rows < M)


@triton.jit
def _column_sum_kernel(
    q_ptr, k_ptr, bias_ptr, lse_ptr, sums_ptr,
    q_b, q_h, q_m, k_b, k_h, k_n, bias_b, bias_h, bias_n,
    H, M, N, D, num_rows, scale,
    HAS_BIAS: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    key_mask = (keys < N)[:, None] & (channels < D)[None, :]
    k_tile = k_ptr + batch * k_b + head * k_h + keys[:, None] * k_n + channels[None, :]
    k = tl.load(k_tile, mask=key_mask, other=0.0)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = _load_bias(bias_ptr, batch, head, keys, N, bias_b, bias_h, bias_n)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        sample = start + tl.arange(0, BLOCK_M)
        rows = sample.to(tl.int64) * M // num_rows  # evenly spaced when num_rows < M
        row_mask = (sample < num_rows)[:, None] & (channels < D)[None, :]
        q_tile = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_m + channels[None, :]
        q = tl.load(q_tile, mask=row_mask, other=0.0)
        lse_tile = lse_ptr + (batch * H + head) * M + rows
        lse = tl.load(lse_tile, mask=sample < num_rows, other=float('-inf')) * 1.4426950408889634
        blind = lse == float('-inf')
        logits = _logits_base2(q, k, bias, scale, HAS_BIAS, INTERPRET)
        weights = tl.exp2(logits - tl.where(blind, 0.0, lse)[:, None])
        sums += tl.sum(tl.where(blind[:, None], 0.0, weights), 0)
    scale_up = M / num_rows
    tl.store(sums_ptr + (batch * H + head) * N + keys, sums * scale_up, mask=keys < N)


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, 1, N]
    query_fraction: float = 1.0,
) -> Attention:
    """Return output, log-sum-exp and column sums; see :func:`kernels.reference.attention`.

    float16, bfloat16 or float32, head widths 16 to 128, any M and N. The channel axis must be
    contiguous. ``query_fraction`` < 1 estimates the column sums from evenly spaced queries.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, M, D = q.shape
    N = k.shape[2]
    out = q.new_empty(B, H, M, D)
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    sums = q.new_empty(B, H, N, dtype=torch.float32)
    bias_row, bias_strides = _bias_row(bias, B, H, N)
    scale = D**-0.5 * LOG2_E
    blocks = _blocks(D, q.dtype)
    rows = subsample_size(M, query_fraction)
    shared = {'HAS_BIAS': bias is not None, 'INTERPRET': INTERPRETED, **blocks}
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(M, blocks['BLOCK_M']), B * H)](
            q, k, v, q if bias_row is None else bias_row, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides, *out.stride()[:3],
            H, M, N, D, scale, **shared,
        )  # fmt: skip
        _column_sum_kernel[(triton.cdiv(N, blocks['BLOCK_N']), B * H)](
            q, k, q if bias_row is None else bias_row, lse, sums,
            *q.stride()[:3], *k.stride()[:3], *bias_strides,
            H, M, N, D, rows, scale, **shared,
        )  # fmt: skip
    return Attention(out, lse, sums)


def _bias_row(bias: Tensor | None, B: int, H: int, N: int) -> tuple[Tensor | None, tuple]:
    if bias is None:
        return None, (0, 0, 0)
    row = bias.expand(B, H, 1, N)[:, :, 0]  # a view: broadcast axes keep stride 0
    return row, row.stride()


def _blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    # Tiles must fit the shared memory of consumer cards (about 100 KiB) with three stages.
    width = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        rows, keys = (32, 32) if width > 64 else (64, 32)
    else:
        rows, keys = (64, 64) if width > 64 else (128, 64)
    return {'BLOCK_M': rows, 'BLOCK_N': keys, 'BLOCK_D': width}
