"""Which attention backend runs, and why the others cannot.

Every backend takes q [B, H, M, D] and k, v [B, H, N, D] and an optional key bias; its module is
imported when it is first considered, never with the package. With ``column_sums`` it also takes
the fraction of queries that they are measured with, and returns them beside the output.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
# Where blocks of keys gain over the fused kernel of CPUs: long caches, and few queries, so that a
# block that the caches hold has many keys.
MANY_LOGITS = 1 << 20  # of a head, at least
FEW_QUERIES = 1 << 11  # of all heads together, at most
NATIVE_QUERIES, NATIVE_KEYS = 8, 256  # at least: below, the compiled kernel gains nothing
MANY = 1 << 20


class Request(NamedTuple):
    """What a call asks of a backend."""

    device: str  # torch device type
    dtype: torch.dtype
    head_dim: int
    bias: bool
    column_sums: bool
    long_cache: bool = False  # many keys for few queries
    gradients: bool = False
    batch: int = 1
    bias_by_query: bool = False
    queries: int = 0  # of a head; this and the keys rounded down to a power of two
    keys: int = 0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, bias: Tensor | None, column_sums: bool) -> 'Request':
        """Describe a call by its arguments."""
        return cls(
            q.device.type, q.dtype, q.shape[-1], bias is not None, column_sums,
            _is_long(q, k), torch.is_grad_enabled(), len(q),
            bias is not None and bias.shape[-2] > 1,
            _power_of_two(q.shape[2]), _power_of_two(k.shape[2]),
        )  # fmt: skip


def _power_of_two(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count else 0


def _is_long(q: Tensor, k: Tensor) -> bool:
    return q.shape[2] * k.shape[2] >= MANY_LOGITS and q.shape[:3].numel() <= FEW_QUERIES


class Backend(NamedTuple):
    """A way to compute attention."""

    name: str
    refusal: Callable[[Request], str | None]  # None: it can serve the request
    run: Callable[..., Tensor | tuple[Tensor, Tensor]]


def _refuse_flash(request: Request) -> str | None:
    from stream3r_core.kernels import flash

    if request.column_sums:
        return 'does not return column sums'
    if request.bias:
        return 'takes no key bias'
    if request.device != 'cuda' or request.dtype not in HALF:
        return f'serves float16 and bfloat16 on cuda, not {request.dtype} on {request.device}'
    if request.head_dim > flash.MAX_HEAD_DIM or request.head_dim % 8:
        return f'serves head widths that are multiples of 8 up to {flash.MAX_HEAD_DIM}'
    return flash.unavailable()


def native_refusal(request: Request, bytes_stored: bool = False) -> str | None:
    """Return why the compiled kernel does not serve a request, or None.

    ``bytes_stored``: keys and values are codes of 8 bits.
    """
    from stream3r_core.kernels import native

    if request.device != 'cpu' or request.dtype not in (torch.float32, torch.bfloat16):
        return f'serves float32 and bfloat16 on cpu, not {request.dtype} on {request.device}'
    if request.gradients:
        return 'has no gradients (torch.inference_mode switches them off)'
    if request.head_dim != native.WIDTH:
        return f'serves heads of width {native.WIDTH}, not {request.head_dim}'
    if request.batch != 1 or request.bias_by_query:
        return 'serves one stream whose queries see the same keys'
    if request.queries < NATIVE_QUERIES or request.keys < NATIVE_KEYS:
        return f'pays from {NATIVE_QUERIES} queries and {NATIVE_KEYS} keys on'
    if (why_not := native.unavailable()) is not None:
        return why_not
    variant = native.variant_here()
    if request.column_sums and not variant.has_fast_column_sums:
        return f'leaves column sums to PyTorch, which is as fast with {variant.name}'
    if request.keys < variant.min_keys and not bytes_stored:
        return f'pays from {variant.min_keys} keys on with {variant.name}'
    return None


def _refuse_blocks(request: Request) -> str | None:
    if request.column_sums:
        return 'does not return column sums'
    if request.device != 'cpu' or request.dtype not in (torch.float32, torch.bfloat16):
        return f'serves float32 and bfloat16 on cpu, not {request.dtype} on {request.device}'
    if request.gradients:
        return 'has no gradients (torch.inference_mode switches them off)'
    return None if request.long_cache else 'pays for few queries to a long cache only'


def _refuse_sdpa(request: Request) -> str | None:
    return 'does not return column sums' if request.column_sums else None


def _refuse_triton(request: Request) -> str | None:
    from stream3r_core.kernels import triton_support

    if not request.column_sums:
        return 'is chosen for column sums only'
    if request.device != 'cuda':
        return f'runs on cuda, not on {request.device} (interpreter: tests only)'
    if not 16 <= request.head_dim <= 128:
        return f'serves head widths 16 to 128, not {request.head_dim}'
    if request.dtype not in (*HALF, torch.float32):
        return f'serves float16, bfloat16 and float32, not {request.dtype}'
    return triton_support.unavailable(request.dtype)


def _refuse_tiled(request: Request) -> str | None:
    return None if request.column_sums else 'is chosen for column sums only'


def _run_flash(q, k, v, bias=None):
    from stream3r_core.kernels import flash

    return flash.attention(q, k, v, bias).out


def _run_native(q, k, v, bias=None, query_fraction=None):
    from stream3r_core.kernels import native

    column_sums = query_fraction is not None
    result = native.attention(q, k, v, bias, column_sums)
    if result is None:  # logits out of range: the first of the others
        request = Request.of(q, k, bias, column_sums)
        others = (b for b in BACKENDS if b.name != 'native' and b.refusal(request) is None)
        return next(others).run(q, k, v, bias, *([query_fraction] if column_sums else []))
    return (result.out, result.column_sums) if column_sums else result.out


def _run_blocks(q, k, v, bias=None):
    from stream3r_core.kernels import blocked

    return blocked.attention(q, k, v, bias).out


def _run_sdpa(q, k, v, bias=None):
    mask = None if bias is None else bias.to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _run_triton(q, k, v, bias=None, query_fraction=1.0):
    from stream3r_core.kernels import triton_attention

    result = triton_attention.attention(q, k, v, bias, query_fraction)
    return result.out, result.column_sums


def _run_tiled(q, k, v, bias=None, query_fraction=1.0):
    from stream3r_core.kernels import tiled

    return tiled.attention_with_column_sums(q, k, v, bias, query_fraction)


#: In order of preference.
BACKENDS = (
    Backend('flash-attn', _refuse_flash, _run_flash),
    Backend('native', native_refusal, _run_native),
    Backend('blocks', _refuse_blocks, _run_blocks),
    Backend('sdpa', _refuse_sdpa, _run_sdpa),
    Backend('triton', _refuse_triton, _run_triton),
    Backend('pytorch', _refuse_tiled, _run_tiled),
)


@functools.cache
def choose(request: Request) -> Backend:
    """Return the first backend that serves the request; PyTorch serves every one."""
    return next(backend for backend in BACKENDS if backend.refusal(request) is None)


def explain(request: Request) -> dict[str, str]:
    """Say for every backend whether it runs, could run, or why it cannot."""
    chosen = choose(request).name
    return {
        backend.name: 'runs' if backend.name == chosen else backend.refusal(request) or 'could run'
        for backend in BACKENDS
    }
