"""What became of the images of a replay, for the console and for ``summary.json``."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stream3r_core.errors import InputError, Stream3rError
from stream3r_core.evaluation.trajectory import TrajectoryError
from stream3r_core.files import atomic_write

GAP = 5.0  # median intervals between two images
MAX_NAMED = 5  # refused images that are named on the console
MAX_KEPT = 100  # and in the file


@dataclass
class Report:
    """Counts, losses and accuracy of one replay."""

    source: str
    weights: Any  # WeightsInfo of the network
    say: Callable[[str], None] = print  # how to speak while the replay runs
    images_in: int = 0
    images_out: int = 0
    num_refused: int = 0
    refused: list[str] = field(default_factory=list)  # why, for the first ones
    map_points: int = 0
    backend: Callable[[], dict[str, int]] = dict  # figures of the back end
    seconds: float = 0.0
    camera_frame: str = ''
    interrupted: bool = False
    failure: Stream3rError | None = None
    gaps: str = ''
    accuracy: TrajectoryError | None = None
    no_accuracy: str = ''

    def refuse(self, error: InputError) -> None:
        """Count an image that cannot be used; name the first ones."""
        self.num_refused += 1
        if self.num_refused <= MAX_KEPT:
            self.refused.append(str(error))
        if self.num_refused <= MAX_NAMED:
            self.say(f'image {self.images_in - 1} is refused: {error}')

    def find_gaps(self, stamps_ns: np.ndarray) -> None:
        """Note where images are missing in time; stamps [N] of the images that came out."""
        if len(stamps_ns) < 2:
            return
        intervals_s = np.diff(stamps_ns) * 1e-9
        gaps = np.flatnonzero(intervals_s > GAP * np.median(intervals_s))
        if len(gaps):
            longest = gaps[np.argmax(intervals_s[gaps])]
            self.gaps = (
                f'{len(gaps)} gaps between the stamps, the longest {intervals_s[longest]:.3f} s '
                f'after pose {longest}'
            )

    def write(self, path: Path) -> None:
        """Write all figures as JSON."""
        figures = {
            'source': self.source,
            'weights': asdict(self.weights),
            'images_in': self.images_in,
            'images_out': self.images_out,
            'images_refused': self.num_refused,
            'refused': self.refused,
            'map_points': self.map_points,
            'backend': self.backend(),
            'seconds': self.seconds,
            'interrupted': self.interrupted,
            'failure': str(self.failure) if self.failure else None,
            'gaps': self.gaps,
            'ate': self._ate_figures(),
        }
        with atomic_write(path) as file:
            file.write(json.dumps(figures, indent=2).encode())

    def _ate_figures(self) -> dict[str, Any] | str:
        if self.accuracy is None:
            return self.no_accuracy
        return {
            'rmse_m': self.accuracy.rmse,
            'alignment': self.accuracy.alignment,
            'scale': self.accuracy.scale,
            'poses': len(self.accuracy.errors),
            'truth': self.accuracy.truth.name,
        }

    def __str__(self) -> str:
        ended = 'interrupted: ' if self.interrupted else ''
        frames = (
            f'{ended}{self.images_in} images in, {self.images_out} out, {self.num_refused} '
            f'refused, {self.map_points} map points, {self.seconds:.1f} s'
        )
        accuracy = self.no_accuracy
        if self.accuracy is not None:
            accuracy = (
                f'ATE {self.accuracy.rmse:.4f} m (rmse of {len(self.accuracy.errors)} positions '
                f'after {self.accuracy.alignment} alignment, scale {self.accuracy.scale:.4g}; '
                f'truth: {self.accuracy.truth.name})'
            )
        backend = ', '.join(f'{name}: {number}' for name, number in self.backend().items())
        return '\n'.join(line for line in (frames, backend, self.gaps, accuracy) if line)
