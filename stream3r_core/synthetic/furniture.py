"""Furniture-like groups of boxes, cylinders and ellipsoids, as tables of parts in a unit frame.

Unit frame of a group: x, y in -0.5..0.5 with the back towards -y, z from 0 (floor) to 1 (top).
Every group has the same number of slots per shape, so that a batch of worlds is drawn by indexing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BOXES, CYLINDERS, SPHERES = 6, 1, 1  # slots of one group


@dataclass(frozen=True)
class Furniture:
    """All groups: parts [count, slots, 6] = centre and half size (zero: unused), size ranges."""

    boxes: Tensor
    cylinders: Tensor
    spheres: Tensor
    size_low: Tensor  # [count, 3] metres
    size_high: Tensor


def _legs(x: float, y: float, top: float, half: float) -> list[tuple[float, ...]]:
    z = top / 2
    return [(sx * x, sy * y, z, half, half, z) for sx in (-1, 1) for sy in (-1, 1)]


# name: boxes, cylinders, spheres, smallest size, largest size
_GROUPS = {
    'table': (
        [(0, 0, 0.95, 0.5, 0.5, 0.05), *_legs(0.44, 0.42, 0.9, 0.035)],
        [(0.2, 0.1, 1.1, 0.06, 0.06, 0.1)],
        [(-0.2, -0.1, 1.1, 0.08, 0.12, 0.1)],
        (1.0, 0.7, 0.65),
        (2.0, 1.1, 0.85),
    ),
    'chair': (
        [
            (0, 0, 0.5, 0.5, 0.5, 0.05),
            (0, -0.46, 0.78, 0.5, 0.04, 0.24),
            *_legs(0.42, 0.42, 0.45, 0.05),
        ],
        [],
        [],
        (0.4, 0.4, 0.8),
        (0.6, 0.6, 1.1),
    ),
    'shelf': (
        [(-0.48, 0, 0.5, 0.02, 0.5, 0.5), (0.48, 0, 0.5, 0.02, 0.5, 0.5)]
        + [(0, 0, z, 0.48, 0.5, 0.02) for z in (0.06, 0.37, 0.68, 0.98)],
        [(-0.2, 0.1, 0.47, 0.1, 0.2, 0.09)],
        [(0.2, 0, 0.78, 0.12, 0.3, 0.09)],
        (0.7, 0.3, 1.1),
        (1.6, 0.45, 2.2),
    ),
    'cabinet': (
        [
            (0, 0, 0.48, 0.5, 0.48, 0.48),
            (-0.25, 0.49, 0.48, 0.22, 0.03, 0.42),
            (0.25, 0.49, 0.48, 0.22, 0.03, 0.42),
            (0, 0, 0.98, 0.53, 0.54, 0.02),
            (-0.3, 0, 1.06, 0.15, 0.3, 0.06),
        ],
        [(0.25, 0, 1.12, 0.04, 0.08, 0.12)],
        [(0.25, 0, 1.3, 0.12, 0.24, 0.1)],
        (0.6, 0.4, 0.7),
        (1.6, 0.6, 1.6),
    ),
    'sofa': (
        [
            (0, 0, 0.25, 0.5, 0.5, 0.25),
            (0, -0.4, 0.65, 0.5, 0.12, 0.35),
            (-0.46, 0, 0.4, 0.06, 0.5, 0.4),
            (0.46, 0, 0.4, 0.06, 0.5, 0.4),
            (-0.21, 0.08, 0.56, 0.19, 0.34, 0.07),
            (0.21, 0.08, 0.56, 0.19, 0.34, 0.07),
        ],
        [],
        [(0.3, -0.2, 0.75, 0.12, 0.1, 0.15)],
        (1.3, 0.8, 0.7),
        (2.3, 1.0, 0.95),
    ),
    'bed': (
        [
            (0, 0, 0.25, 0.5, 0.5, 0.2),
            (0, 0.02, 0.55, 0.48, 0.47, 0.12),
            (-0.22, -0.38, 0.72, 0.18, 0.09, 0.06),
            (0.22, -0.38, 0.72, 0.18, 0.09, 0.06),
            (0, -0.5, 0.7, 0.5, 0.02, 0.7),
            (0, 0.2, 0.68, 0.49, 0.28, 0.02),
        ],
        [],
        [],
        (1.0, 1.8, 0.5),
        (1.8, 2.1, 0.7),
    ),
    'lamp': (
        [(0, 0, 0.02, 0.3, 0.3, 0.02)],
        [(0, 0, 0.4, 0.05, 0.05, 0.4)],
        [(0, 0, 0.88, 0.45, 0.45, 0.14)],
        (0.35, 0.35, 1.2),
        (0.6, 0.6, 1.8),
    ),
    'plant': (
        [],
        [(0, 0, 0.17, 0.3, 0.3, 0.17)],
        [(0, 0, 0.66, 0.5, 0.5, 0.36)],
        (0.35, 0.35, 0.6),
        (0.9, 0.9, 1.7),
    ),
    'desk': (
        [
            (0, 0, 0.6, 0.5, 0.5, 0.02),
            (-0.47, 0, 0.3, 0.02, 0.45, 0.3),
            (0.3, 0, 0.3, 0.18, 0.45, 0.3),
            (0, -0.2, 0.85, 0.2, 0.03, 0.15),
            (0, -0.22, 0.66, 0.06, 0.1, 0.05),
            (0, 0.2, 0.635, 0.17, 0.12, 0.015),
        ],
        [(0.38, 0.2, 0.7, 0.04, 0.06, 0.07)],
        [],
        (1.1, 0.6, 1.1),
        (1.7, 0.8, 1.3),
    ),
    'crates': (
        [
            (-0.22, 0, 0.25, 0.26, 0.4, 0.25),
            (0.28, 0.1, 0.2, 0.2, 0.3, 0.2),
            (-0.15, -0.05, 0.65, 0.2, 0.3, 0.15),
            (0.25, 0, 0.5, 0.14, 0.2, 0.1),
            (-0.1, 0, 0.9, 0.12, 0.2, 0.1),
        ],
        [(0.2, -0.35, 0.35, 0.12, 0.12, 0.35)],
        [],
        (0.7, 0.6, 0.6),
        (1.5, 1.2, 1.8),
    ),
    'stairs': (
        [(0, 0.42 - i / 6, (i + 1) / 12, 0.5, 1 / 12, (i + 1) / 12) for i in range(6)],
        [],
        [],
        (0.8, 1.2, 0.8),
        (1.3, 2.2, 1.6),
    ),
    'column': (
        [(0, 0, 0.03, 0.5, 0.5, 0.03)],
        [(0, 0, 0.5, 0.4, 0.4, 0.5)],
        [],
        (0.3, 0.3, 2.0),
        (0.6, 0.6, 2.6),
    ),
}


def load_furniture() -> Furniture:
    """Return the groups as tensors on the CPU."""

    def table(parts: list[list[tuple[float, ...]]], slots: int) -> Tensor:
        rows = [list(p) + [(0.0,) * 6] * (slots - len(p)) for p in parts]
        return torch.tensor(rows, dtype=torch.float32)

    columns = list(zip(*_GROUPS.values()))
    return Furniture(
        table(columns[0], BOXES),
        table(columns[1], CYLINDERS),
        table(columns[2], SPHERES),
        torch.tensor(columns[3], dtype=torch.float32),
        torch.tensor(columns[4], dtype=torch.float32),
    )
