"""The floor under every measurement: operations of a frame, and how fast a device does them."""

import time
from dataclasses import dataclass

import torch

from stream3r_core.cache.dense import DenseCache
from stream3r_core.config import ModelConfig
from stream3r_core.model.network import CausalVGGT

_MATRIX = {'cpu': 1024, 'cuda': 8192}  # side of the matrices that show a device's rate


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one frame (multiply and add count as two), both dense heads included."""

    first_frame_flop: float
    flop_per_cached_token: float

    def flop(self, cached_tokens: float) -> float:
        """Operations of a frame that finds so many tokens per layer and head."""
        return self.first_frame_flop + self.flop_per_cached_token * cached_tokens


def count_operations(config: ModelConfig, height: int, width: int) -> Arithmetic:
    """Count the operations of a causal stream by running it on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device('meta'), torch.inference_mode():
        model = CausalVGGT(config).eval()
        images = torch.zeros(1, 1, 3, height, width)
        caches = (
            DenseCache(config.depth),
            DenseCache(config.camera_iterations * config.camera_trunk_depth),
        )
        counts = []
        for index in range(2):
            with FlopCounterMode(display=False) as counter:
                model.stream(images, *caches, first=index == 0)
            counts.append(counter.get_total_flops())
            for cache in caches:
                cache.commit(1)
    tokens = config.tokens_per_frame(height, width)
    return Arithmetic(counts[0], (counts[1] - counts[0]) / tokens)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Measure operations per second of a large matrix product, the best of ``repeats``."""
    side = _MATRIX.get(device.type, _MATRIX['cpu'])
    a = torch.randn(side, side, device=device).to(dtype)
    best = float('inf')
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; the CPU always has."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
