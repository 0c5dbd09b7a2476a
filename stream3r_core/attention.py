"""One entry to attention: the backend is chosen here, nowhere else."""

import torch
from torch import Tensor

from stream3r_core.kernels import quantized, registry, triton_support
from stream3r_core.kernels.quantized import Quantized


def attend(
    q: Tensor, k: Tensor | Quantized, v: Tensor | Quantized, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v.

    q [B, heads, M, D]; k, v [B, heads, N, D]; bias broadcastable to [B, heads, M, N], additive.
    Keys and values may be quantised both; the bias is then the same for all queries.
    """
    if isinstance(k, Quantized):
        return _attend_quantized(q, k, v, bias)
    return registry.choose(registry.Request.of(q, k, bias, column_sums=False)).run(q, k, v, bias)


def _attend_quantized(q: Tensor, k: Quantized, v: Quantized, bias: Tensor | None) -> Tensor:
    if q.device.type == 'cpu':
        return quantized.attention(q, k, v, bias).out
    if q.device.type == 'cuda' and triton_support.unavailable(q.dtype) is None:
        from stream3r_core.kernels import triton_quantized

        return triton_quantized.attention(q, k, v, bias).out
    return attend(q, *(quantized.dequantize(x).to(q.dtype) for x in (k, v)), bias)


def attend_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, query_fraction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return :func:`attend` and how much attention every key received.

    bias broadcastable to [B, heads, 1, N]. Column sums [B, heads, N] float32, summed over the M
    queries: they add up to M. ``query_fraction`` < 1 estimates them from evenly spaced queries.
    """
    backend = registry.choose(registry.Request.of(q, k, bias, column_sums=True))
    return backend.run(q, k, v, bias, query_fraction)


def has_fused_rotation(x: Tensor) -> bool:
    """Return whether :func:`fused_rotation` serves: on a GPU with Triton, without gradients."""
    return (
        x.device.type == 'cuda'
        and not torch.is_grad_enabled()
        and triton_support.unavailable(x.dtype) is None
    )


def fused_rotation(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """Normalise and turn queries or keys [B, heads, N, D] in one pass (unproven: no GPU)."""
    from stream3r_core.kernels import triton_rotary

    return triton_rotary.normalise_and_rotate(x, weight, bias, eps, cos, sin)
