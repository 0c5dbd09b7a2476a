"""Time and memory of every frame of a run."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from stream3r_core.evaluation.conditions import resident_bytes
from stream3r_core.files import atomic_write

COLUMNS = ('stamp_ns', 'latency_ms', 'cache_bytes', 'map_points', 'process_bytes', 'gpu_bytes')


@dataclass
class FrameLog:
    """Columns of equal length; None where the system does not say."""

    stamp_ns: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    map_points: list[int] = field(default_factory=list)
    process_bytes: list[int | None] = field(default_factory=list)
    gpu_bytes: list[int | None] = field(default_factory=list)

    def __len__(self):
        return len(self.stamp_ns)

    def add(self, stamp_ns: int, latency_ms: float, cache_bytes: int, map_points: int) -> None:
        """Note one processed frame, the memory now, and that of the GPUs at its peak."""
        self.stamp_ns.append(stamp_ns)
        self.latency_ms.append(latency_ms)
        self.cache_bytes.append(cache_bytes)
        self.map_points.append(map_points)
        self.process_bytes.append(resident_bytes())
        self.gpu_bytes.append(_gpu_peak_bytes())

    def write(self, path: Path) -> None:
        """Write all columns as CSV; empty: unknown."""
        rows = zip(*(getattr(self, column) for column in COLUMNS))
        with atomic_write(path) as file:
            file.write(f'{",".join(COLUMNS)}\n'.encode())
            for row in rows:
                file.write((','.join('' if v is None else str(v) for v in row) + '\n').encode())


def _gpu_peak_bytes() -> int | None:
    """Most bytes allocated on all GPUs since the last call; None without any."""
    if not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    used = sum(map(torch.cuda.max_memory_allocated, devices))
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    return used
