"""How large errors are: standard deviations as fitted functions of the network's confidence.

The fit belongs to one file of weights and lies beside it (``python -m
stream3r_core.evaluation.calibration`` makes it). Weights without one have no known uncertainty.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stream3r_core.config import from_dict, to_dict
from stream3r_core.errors import CheckpointError, ConfigError
from stream3r_core.files import atomic_write

_log = logging.getLogger(__name__)

SUFFIX = '.uncertainty.json'  # in place of the ending of the weights
CONFIDENCE_OFFSET = 0.9  # of a confidence >= 1, so that none has a finite sigma
_CONFIDENCE_CAP = 100.0  # an exponential of the network: a few pixels must not make the mean


@dataclass(frozen=True)
class ErrorModel:
    """sigma = scale (confidence - 0.9)^-exponent min(frames, max_frames)^growth."""

    scale: float
    exponent: float  # >= 0: more confidence is never more error
    growth: float = 0.0  # >= 0: errors add up
    max_frames: float = 1.0  # beyond which they do not grow

    def sigma(self, confidence: Any, frames: Any = 1) -> Any:
        """Return the standard deviation per axis; floats, arrays or tensors of equal shape.

        Args:
            confidence: of the network, >= 1.
            frames: since the session began; the anchor itself counts as 1.

        """
        trust = (confidence - CONFIDENCE_OFFSET) ** -self.exponent
        return self.scale * trust * np.clip(frames, 1, self.max_frames) ** self.growth


@dataclass(frozen=True)
class Uncertainty:
    """Error models of one network in one session mode.

    ``translation`` and ``rotation``: of a pose against the first camera; ``step_*``: against the
    frame before. Translations are parts of the frame's median depth, rotations rad, and confidence
    is :func:`mean_confidence`; ``depth`` is relative, from a pixel's own confidence. The scale of
    a session is not part of any: lengths are in map units. ``*_confidence`` are mean confidences
    of images that show nothing, in sessions that were well before.
    """

    translation: ErrorModel
    rotation: ErrorModel
    step_translation: ErrorModel
    step_rotation: ErrorModel
    depth: ErrorModel
    covered_confidence: float  # 99 % of the images of a covered lens have less
    noise_confidence: float  # 99 % of the images of pure noise have less


def mean_confidence(depth_conf: Tensor) -> float:
    """Return the mean over the pixels of a frame [H, W], on the CPU, extremes capped."""
    return float(depth_conf.clamp(max=_CONFIDENCE_CAP).mean())


def median_depth(depth: Tensor) -> float:
    """Return the median of the valid depths of a frame [H, W], on the CPU; NaN: none is valid."""
    valid = depth[depth > 0]
    return float(valid.median()) if len(valid) else float('nan')


def uncertainty_path(weights: Path) -> Path:
    """Return where the fit of a file of weights lies."""
    return weights.with_suffix(SUFFIX)


def uncertainty_name(mode: str, is_refined: bool) -> str:
    """Return the name of a fit: of a session mode, with or without refined poses."""
    return f'{mode}+direct' if is_refined else mode


def read_uncertainty(path: Path, weights_sha256: str) -> dict[str, Uncertainty]:
    """Return the fits by :func:`uncertainty_name`; empty: there is none for these very weights.

    Raises :class:`CheckpointError` for a file that cannot be understood.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if content['weights_sha256'] != weights_sha256:
            _log.warning('%s is for other weights: the uncertainty is unknown', path)
            return {}
        modes = content['modes'].items()
        return {mode: from_dict(Uncertainty, fitted, mode) for mode, fitted in modes}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f'{path}: cannot be read as fitted uncertainties ({type(error).__name__}: {error}); '
            'make it again, or remove it'
        ) from error


def write_uncertainty(
    path: Path,
    weights_sha256: str,
    modes: Mapping[str, Uncertainty],
    notes: Mapping[str, Any],
) -> None:
    """Write fits by :func:`uncertainty_name` with notes on how they came about; all or nothing."""
    content = {
        'weights_sha256': weights_sha256,
        'modes': {mode: to_dict(fitted) for mode, fitted in modes.items()},
        **notes,
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b'\n')
