"""Whether Triton kernels can run here, and how a refusal reads; importing this loads no Triton."""

import functools
import importlib.util

import torch


@functools.cache
def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Return why Triton kernels of a type cannot run on this machine's GPU, None when they can."""
    if not torch.cuda.is_available():
        return 'needs a CUDA device'
    capability = torch.cuda.get_device_capability()
    if capability < (7, 0):
        return 'needs compute capability 7.0 (Volta) or newer'
    if dtype == torch.bfloat16 and capability < (8, 0):
        return 'needs compute capability 8.0 (Ampere) or newer for bfloat16'
    if importlib.util.find_spec('triton') is None:
        return "the package triton is not installed (pip install 'stream3r_ros[gpu]')"
    try:
        import triton  # noqa: F401 - proves that it loads
    except (ImportError, OSError) as error:
        return f'the package triton does not load: {error}'
    return None
