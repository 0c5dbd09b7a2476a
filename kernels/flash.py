"""Adapter to the flash-attn package: fast exact attention without bias and without column sums."""

import functools
import importlib.util

import torch
from torch import Tensor

from stream3r_core.kernels.reference import Attention

MAX_HEAD_DIM = 256


@functools.cache
def unavailable() -> str | None:
    """Return why flash-attn cannot run here, or None when it can."""
    if not torch.cuda.is_available():
        return 'needs a CUDA device'
    if torch.cuda.get_device_capability()[0] < 8:
        return 'needs compute capability 8.0 (Ampere) or newer'
    if importlib.util.find_spec('flash_attn') is None:
        return "the package flash-attn is not installed (pip install 'stream3r_ros[gpu]')"
    try:
        import flash_attn  # noqa: F401 - proves that the compiled part fits this torch
    except (ImportError, OSError) as error:
        return f'the package flash-attn does not load: {error}'
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Attention:
    """Return the output [B, H, M, D] of q, k, v [B, H, *, D] in float16 or bfloat16.

    flash-attn keeps heads behind tokens ([B, M, H, D]), hence the transposed views.
    """
    if bias is not None:
        raise ValueError('flash-attn takes no key bias; the registry must not choose it then')
    from flash_attn import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return Attention(out.transpose(1, 2), None, None)
