"""Keys and values in 8 or 4 bits: how they are stored, and attention over them on a CPU.

A token of a head is a row of codes and one scale: x = scale * code, code = round(x / scale). Codes
of 4 bits lie in pairs: channel i in the low half of byte i, channel i + D / 2 in the high half.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.kernels.blocked import BlockSoftmax, bias_rows, block_size, front, scaled
from stream3r_core.kernels.processor import has_bfloat16
from stream3r_core.kernels.reference import Attention

LARGEST = {8: 127, 4: 7}  # symmetric: zero is exact, and -x is as exact as x
TINY = torch.finfo(torch.float32).tiny


class Quantized(NamedTuple):
    """Rows [..., N, D] in few bits."""

    codes: Tensor  # [..., N, D] int8, or [..., N, D / 2] uint8: two codes of 4 bits in a byte
    scale: Tensor  # [..., N, 1] float32


def quantize(x: Tensor, bits: int) -> Quantized:
    """Round rows [..., D] to ``bits`` 8 or 4 (D even); a row of zeros stays one."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LARGEST[bits]
    codes = (x / scale.clamp_min(TINY)).round_().to(torch.int8)
    if bits == 4:
        low, high = codes.view(torch.uint8).chunk(2, -1)
        codes = (low & 15) | (high << 4)
    return Quantized(codes, scale)


def row_bytes(width: int, bits: int) -> int:
    """Return the bytes of a stored row of ``width`` channels: codes, then the scale."""
    return width * bits // 8 + 4


def to_rows(x: Tensor, bits: int) -> Tensor:
    """Return rows [..., D] as they are stored: uint8 [..., row_bytes]; D a multiple of 8."""
    codes, scale = quantize(x, bits)
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), -1)


def of_rows(rows: Tensor, bits: int) -> Quantized:
    """Return stored rows [..., row_bytes] as codes and scales; views, nothing is copied."""
    codes, scale = rows[..., :-4], rows[..., -4:].view(torch.float32)
    return Quantized(codes.view(torch.int8) if bits == 8 else codes, scale)


def unpack(codes: Tensor) -> Tensor:
    """Return codes as int8 [..., D], one in a byte."""
    if codes.dtype == torch.int8:
        return codes
    signed = codes.view(torch.int8)
    return torch.cat((signed << 4 >> 4, signed >> 4), -1)


def dequantize(x: Quantized) -> Tensor:
    """Return the rows [..., D] in float32."""
    return unpack(x.codes) * x.scale


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Quantized,  # [B, H, N, D]
    v: Quantized,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, 1, N]
) -> Attention:
    """Return softmax(q k^T / sqrt(D) + bias) v, block by block of keys.

    On processors with dot products of bytes the logits come from codes of queries (8 bits, one
    scale per head) and keys. Weights and values are multiplied in bfloat16 where the processor
    does so, sums are float32.
    """
    B, H, M, D = q.shape
    (k_codes, k_scale), (v_codes, v_scale) = ([x.flatten(0, 1) for x in part] for part in (k, v))
    rows, num_keys = bias_rows(bias, q, k_codes.shape[1]), k_codes.shape[1]
    block = block_size(B * H * M, num_keys)
    kind = _ByteLogits if torch.cpu._is_vnni_supported() else _FloatLogits
    logits_of = kind(scaled(q), block)
    narrow = torch.bfloat16 if has_bfloat16() else torch.float32
    state = BlockSoftmax((B * H, M, D), block, narrow)
    for start in range(0, num_keys, block):
        keys = slice(start, start + block)
        logits = logits_of(unpack(k_codes[:, keys]), k_scale[:, keys])
        if rows is not None:
            logits += rows[:, :, keys]
        values = unpack(v_codes[:, keys]).to(narrow).mul_(v_scale[:, keys].to(narrow))
        state.add(logits, values)
    return Attention(state.result().to(q.dtype).unflatten(0, (B, H)), None, None)


class _ByteLogits:
    """Products of queries [G, M, D] with codes [G, n, D] int8 and scales [G, n, 1]."""

    def __init__(self, q: Tensor, block: int):
        self._scale = q.abs().amax((1, 2), keepdim=True) / LARGEST[8]
        self._codes = (q / self._scale.clamp_min(TINY)).round_().to(torch.int8)
        size = len(q) * q.shape[1] * block
        self._whole = torch.empty(size, dtype=torch.int32)
        self._logits = torch.empty(size)

    def __call__(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return logits [G, M, n], valid until the next call."""
        shape = (*self._codes.shape[:2], codes.shape[1])
        whole = front(self._whole, shape)
        for mine, theirs, out in zip(self._codes, codes, whole):
            torch._int_mm(mine, theirs.T, out=out)
        return torch.mul(whole, (scale * self._scale).mT, out=front(self._logits, shape))


class _FloatLogits:
    """The same in float32."""

    def __init__(self, q: Tensor, block: int):
        self._q = q

    def __call__(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return logits [G, M, n]."""
        return self._q @ (codes * scale).mT
