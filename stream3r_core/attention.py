"""One entry to attention: the backend is chosen here, nowhere else."""

import torch
from torch import Tensor

from stream3r_core.kernels import quantized, registry, triton_support
from stream3r_core.kernels.quantized import Quantized
from stream3r_core.kernels.reference import Attention


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
        return _attend_bytes(q, k, v, bias).out
    if q.device.type == 'cuda' and triton_support.unavailable(q.dtype) is None:
        from stream3r_core.kernels import triton_quantized

        return triton_quantized.attention(q, k, v, bias).out
    return attend(q, *(quantized.dequantize(x).to(q.dtype) for x in (k, v)), bias)


def _attend_bytes(q: Tensor, k: Quantized, v: Quantized, bias: Tensor | None) -> Attention:
    if k.codes.dtype == torch.int8 and not registry.native_refusal(
        registry.Request.of(q, k.codes, bias, column_sums=False), bytes_stored=True
    ):
        from stream3r_core.kernels import native

        if (result := native.attention(q, k, v, bias)) is not None:
            return result
    return quantized.attention(q, k, v, bias)


def attend_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, query_fraction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return :func:`attend` and how much attention every key received.

    bias broadcastable to [B, heads, 1, N]. Column sums [B, heads, N] float32, summed over the M
    queries: they add up to M. ``query_fraction`` < 1 estimates them from evenly spaced queries.
    """
    backend = registry.choose(registry.Request.of(q, k, bias, column_sums=True))
    return backend.run(q, k, v, bias, query_fraction)


def explain_stream(
    device: torch.device, dtype: torch.dtype, head_dim: int, column_sums: bool, bits: int = 0
) -> dict[str, str]:
    """Say of each backend whether it attends to the memory of a stream, or why it does not.

    ``bits`` > 0: keys and values are stored in so many, for which the kernels are others.
    """
    request = registry.Request(
        device.type, dtype, head_dim, bias=column_sums, column_sums=column_sums,
        long_cache=True, queries=registry.MANY, keys=registry.MANY,
    )  # fmt: skip
    if not bits:
        short = registry.explain(request._replace(long_cache=False, keys=registry.NATIVE_KEYS))
        return {
            name: said
            if said == short[name]
            else f'{said} with many keys; with few: {short[name]}'
            for name, said in registry.explain(request).items()
        }
    if device.type == 'cuda':
        first, second, why_not = 'triton', 'widened', triton_support.unavailable(dtype)
    else:
        first, second = 'native', 'blocks'
        why_not = registry.native_refusal(request, True) if bits == 8 else 'serves codes of 8 bits'
    return {first: why_not or 'runs', second: 'runs' if why_not else 'could run'}


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
