"""Constant tensors that depend on sizes only: made once, kept in small bounded caches."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec('P')
T = TypeVar('T')


def cached_constant(maxsize: int = 8) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Remember the last ``maxsize`` results of a function of hashable sizes, device and dtype.

    The tensors are made outside inference mode and without gradient, so that a table first needed
    by a running session can serve training later.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize)
        @wraps(make)
        def cached(*sizes):
            with torch.inference_mode(False), torch.no_grad():
                return make(*sizes)

        return cached

    return decorate
