"""One entry to attention: the backend is chosen here, nowhere else."""

from torch import Tensor

from stream3r_core.kernels import registry


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v.

    q [B, heads, M, D]; k, v [B, heads, N, D]; bias broadcastable to [B, heads, M, N], additive.
    """
    return registry.choose(registry.Request.of(q, bias, column_sums=False)).run(q, k, v, bias)


def attend_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, query_fraction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return :func:`attend` and how much attention every key received.

    bias broadcastable to [B, heads, 1, N]. Column sums [B, heads, N] float32, summed over the M
    queries: they add up to M. ``query_fraction`` < 1 estimates them from evenly spaced queries.
    """
    backend = registry.choose(registry.Request.of(q, bias, column_sums=True))
    return backend.run(q, k, v, bias, query_fraction)
