"""Large arrays whose memory goes back to the system when they are dropped."""

import math
import mmap

import numpy as np


def zero_pages(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return zeros in pages of their own: taken when written to, given back with the array.

    ``np.zeros`` does so at first. But the C library learns from each large block that is freed to
    take blocks of that size from its heap, where they are written at once, are shredded by what
    comes between, and stay: arrays made again and again then cost up to twice their size.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
