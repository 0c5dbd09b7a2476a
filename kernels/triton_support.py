"""Whether Triton kernels can run here, and how a refusal reads; importing this loads no Triton."""

import functools
import importlib.util

import torch


@functools.cache
def unavailable() -> str | None:
    """Return why Triton kernels cannot run on this machine's GPU, or None when they can."""
    if not torch.cuda.is_available():
        return 'needs a CUDA device'
    if torch.cuda.get_device_capability()[0] < 7:
        return 'needs compute capability 7.0 (Volta) or newer'
    if importlib.util.find_spec('triton') is None:
        return "the package triton is not installed (pip install 'stream3r_ros[gpu]')"
    try:
        import triton  # noqa: F401 - proves that it loads
    except (ImportError, OSError) as error:
        return f'the package triton does not load: {error}'
    return None
