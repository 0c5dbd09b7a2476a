"""Depth metrics after a named alignment (model.md section 21.1)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stream3r_core.errors import DataError

ALIGNMENTS = {
    'median': 'scale = median(truth) / median(prediction)',
    'scale': 'scale by least absolute deviations, 10 Weiszfeld steps',
    'lad2': 'scale and shift, 1000 Adam steps of 1e-4 on the absolute deviations from the median '
    'scale (as published: not converged)',
    'lstsq': 'scale and shift by least squares',
    'metric': 'none',
}
SMALLEST_DEPTH = 1e-5  # of a prediction, where a ratio or a logarithm is taken


@dataclass(frozen=True)
class DepthErrors:
    """Errors over the valid pixels of one image, or of one sequence under one alignment.

    aligned prediction = ``scale`` * prediction + ``shift_m``. ``abs_rel``, ``delta_*`` (share of
    pixels whose ratio to the truth is below 1.25^k) and ``log_rmse`` have no unit. ``coverage`` is
    the share of valid true pixels with a finite prediction; only these are judged.
    """

    alignment: str
    scale: float
    shift_m: float
    abs_rel: float
    sq_rel_m: float
    rmse_m: float
    log_rmse: float
    delta_1: float
    delta_2: float
    delta_3: float
    valid_pixels: int
    coverage: float


UNITS = {'sq_rel_m': 'm', 'rmse_m': 'm', 'shift_m': 'm', 'valid_pixels': 'pixels'}


def depth_errors(
    prediction: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    alignment: str = 'median',
    max_depth_m: float | None = None,
    post_clip_max_m: float | None = None,
) -> DepthErrors:
    """Errors of ``prediction`` against ``truth``, both [..., H, W], truth in metres, 0 = none.

    The truth is used where 0 < truth < ``max_depth_m``; the aligned prediction may be clamped to
    ``post_clip_max_m``. All images are aligned together. Raises DataError when nothing is valid.
    """
    p, g, coverage = _valid_pixels(prediction, truth, max_depth_m)
    scale, shift = fit(p, g, alignment)
    p = p * scale + shift
    if post_clip_max_m is not None:
        p = p.clamp(max=post_clip_max_m)
    difference = p - g
    positive = p.clamp(min=SMALLEST_DEPTH)
    ratio = torch.maximum(positive / g, g / positive)
    return DepthErrors(
        alignment=alignment,
        scale=scale,
        shift_m=shift,
        abs_rel=_mean(difference.abs() / g),
        sq_rel_m=_mean(difference**2 / g),
        rmse_m=_mean(difference**2) ** 0.5,
        log_rmse=_mean((positive.log() - g.log()) ** 2) ** 0.5,
        delta_1=_mean(ratio < 1.25),
        delta_2=_mean(ratio < 1.25**2),
        delta_3=_mean(ratio < 1.25**3),
        valid_pixels=len(g),
        coverage=coverage,
    )


def weighted_mean(errors: Sequence[DepthErrors]) -> DepthErrors:
    """Average over items, weighted by their valid pixels (the published summary)."""
    if not errors:
        raise DataError('no depth errors to average: every item failed, see the messages above')
    if len({e.alignment for e in errors}) > 1:
        raise DataError('depth errors of different alignments must not be averaged')
    weights = np.array([e.valid_pixels for e in errors], dtype=np.float64)
    numbers = {
        f.name: float(np.average([getattr(e, f.name) for e in errors], weights=weights))
        for f in dataclasses.fields(DepthErrors)
        if f.type is float
    }
    return DepthErrors(errors[0].alignment, valid_pixels=int(weights.sum()), **numbers)


def resize_depth(depth: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Bring a predicted depth map [H, W] to the size of the truth, bicubic as published."""
    import cv2

    depth = np.asarray(depth, dtype=np.float32)
    if depth.shape == tuple(size_hw):
        return depth
    return cv2.resize(depth, size_hw[::-1], interpolation=cv2.INTER_CUBIC)


def fit(prediction: Tensor, truth: Tensor, alignment: str) -> tuple[float, float]:
    """Scale and shift that bring the valid predictions [N] to the truth [N]."""
    if alignment not in ALIGNMENTS:
        raise DataError(f'unknown depth alignment {alignment!r}; known: {", ".join(ALIGNMENTS)}')
    if alignment == 'metric':
        return 1.0, 0.0
    if not (prediction > 0).any():
        raise DataError(
            'no predicted depth is positive, so no scale can be found; is the prediction a depth '
            'along the optical axis (not an inverse depth or a depth behind the camera)?'
        )
    return _FITS[alignment](prediction, truth)


def _fit_median(p: Tensor, g: Tensor) -> tuple[float, float]:
    """Torch medians: the lower one of an even number of values."""
    return (g.median() / p.median()).item(), 0.0


def _fit_scale(p: Tensor, g: Tensor) -> tuple[float, float]:
    scale = g.mean() / p.mean()
    for _ in range(10):
        weight = 1 / ((scale * p - g).abs() + 1e-8)
        scale = (weight * p * g).sum() / (weight * p * p).sum()
    return max(scale.item(), 1e-3), 0.0


def _fit_lad2(p: Tensor, g: Tensor) -> tuple[float, float]:
    parameters = torch.tensor([_fit_median(p, g)[0], 0.0], dtype=p.dtype, device=p.device)
    parameters.requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=1e-4)
    for _ in range(1000):
        with torch.no_grad():
            sign = torch.sign(parameters[0] * p + parameters[1] - g)
            parameters.grad = torch.stack([sign @ p, sign.sum()])
        optimizer.step()
    scale, shift = parameters.tolist()
    return scale, shift


def _fit_lstsq(p: Tensor, g: Tensor) -> tuple[float, float]:
    mean_p, mean_g = p.double().mean(), g.double().mean()
    variance = ((p - mean_p) ** 2).sum()
    scale = ((p - mean_p) * (g - mean_g)).sum() / variance if variance > 0 else variance * 0
    return scale.item(), (mean_g - scale * mean_p).item()


_FITS = {
    'median': _fit_median,
    'scale': _fit_scale,
    'lad2': _fit_lad2,
    'lstsq': _fit_lstsq,
}


def _valid_pixels(prediction, truth, max_depth_m) -> tuple[Tensor, Tensor, float]:
    prediction, truth = (torch.as_tensor(x).to(torch.float32) for x in (prediction, truth))
    truth = truth.to(prediction.device)
    if prediction.shape != truth.shape:
        raise DataError(
            f'predicted depth {tuple(prediction.shape)} and true depth {tuple(truth.shape)} '
            'differ in size; bring the prediction to the size of the truth with resize_depth'
        )
    valid = (truth > 0) & torch.isfinite(truth)
    if max_depth_m is not None:
        valid &= truth < max_depth_m
    judged = valid & torch.isfinite(prediction)
    if not judged.any():
        limit = '' if max_depth_m is None else f' below {max_depth_m:g} m'
        raise DataError(
            f'no pixel has both a true depth{limit} and a finite prediction ({int(valid.sum())} '
            f'true, {int(torch.isfinite(prediction).sum())} predicted); check the unit of the '
            'depth files (0 = invalid) and that they belong to these images'
        )
    return prediction[judged], truth[judged], float(judged.sum() / valid.sum())


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
