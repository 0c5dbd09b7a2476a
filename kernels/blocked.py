"""Attention of few queries to many keys on a CPU: plain matrix products over blocks of keys.

A matrix product of a block runs at the speed of the processor, where PyTorch's fused kernel for
CPUs reaches about half of it; 2^x costs a third of e^x. Gradients are left to the fused kernel.
"""

import math

import torch
from torch import Tensor

from stream3r_core.kernels.reference import LOG2_E, Attention

BLOCK_BYTES = 1 << 22  # logits of a block of keys stay in the caches of a processor
SAFE = 64.0  # 2^64 times 2^62 tokens is no overflow, and 2^-64 is far from underflow
BLIND = -1e30  # instead of -inf where a query has not seen any key yet


def attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    bias: Tensor | None = None,  # broadcastable to [B, H, M, N]
) -> Attention:
    """Return softmax(q k^T / sqrt(D) + bias) v; logits and sums in float32.

    Weights and values are multiplied in the type of the values.
    """
    B, H, M, D = q.shape
    rows, queries = bias_rows(bias, q, k.shape[2]), scaled(q)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    block = block_size(B * H * M, k.shape[1])
    buffer = torch.empty(B * H * M * block)
    state = BlockSoftmax((B * H, M, D), block, v.dtype)
    for start in range(0, k.shape[1], block):
        keys = slice(start, start + block)
        part = k[:, keys].float()
        logits = front(buffer, (B * H, M, part.shape[1]))
        torch.bmm(queries, part.mT, out=logits)
        if rows is not None:
            logits += rows[:, :, keys]
        state.add(logits, v[:, keys])
    return Attention(state.result().to(q.dtype).unflatten(0, (B, H)), None, None)


def block_size(num_rows: int, num_keys: int) -> int:
    """Return how many keys to take at once for so many queries of all heads together."""
    return min(num_keys, max(64, BLOCK_BYTES // (4 * num_rows) // 64 * 64))


def scaled(q: Tensor) -> Tensor:
    """Return queries [B H, M, D] float32 whose products with keys are logits to the base 2."""
    return q.flatten(0, 1).float() * (q.shape[-1] ** -0.5 * LOG2_E)


def bias_rows(bias: Tensor | None, q: Tensor, num_keys: int) -> Tensor | None:
    """Return the bias [B H, 1 or M, N] to the base 2."""
    if bias is None:
        return None
    shape = torch.broadcast_shapes(bias.shape, (*q.shape[:2], 1, num_keys))
    return (bias.float() * LOG2_E).expand(shape).flatten(0, 1)


def front(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first elements of a flat buffer in a shape."""
    return buffer[: math.prod(shape)].view(shape)


class BlockSoftmax:
    """Sums 2^logits and 2^logits v over blocks of keys; a shift only where numbers need one.

    The buffers are made once: new memory for every block costs a CPU more than the arithmetic.
    """

    def __init__(self, shape: tuple[int, int, int], block: int, dtype: torch.dtype):
        """``shape``: heads, queries, width; ``dtype`` of the values."""
        heads, queries, _ = shape
        self._sum = torch.zeros(shape)
        self._total = torch.zeros(heads, queries, 1)
        self._is_narrow = dtype != torch.float32
        if self._is_narrow:
            self._weights = torch.empty(heads * queries * block, dtype=dtype)
            self._part = torch.empty(shape, dtype=dtype)
        self._shift: Tensor | None = None  # [heads, queries, 1]; None before the first block
        self._shifts = False

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Take logits [G, M, n], which are overwritten, and values [G, n, D]."""
        self._fit(logits.amax(-1, keepdim=True))
        if self._shifts:
            logits -= self._shift
        self._total += logits.exp2_().sum(-1, keepdim=True)
        if self._is_narrow:
            weights = front(self._weights, logits.shape).copy_(logits)
            self._sum += torch.bmm(weights, values, out=self._part)
        else:
            torch.baddbmm(self._sum, logits, values, out=self._sum)

    def _fit(self, top: Tensor) -> None:
        if self._shift is None:
            self._shift = top.clamp_min(BLIND).where(top.abs() > SAFE, 0.0)
            self._shifts = bool(self._shift.any())
        elif bool((top - self._shift > SAFE).any()):
            shift = torch.maximum(top, self._shift)
            decay = (self._shift - shift).exp2()
            self._sum *= decay
            self._total *= decay
            self._shift, self._shifts = shift, True

    def result(self) -> Tensor:
        """Return the means [G, M, D]; 0 for a query that saw no key."""
        return self._sum / self._total.clamp_min(torch.finfo(torch.float32).tiny)
