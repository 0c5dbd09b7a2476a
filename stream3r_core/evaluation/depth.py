"""Depth metrics after a named alignment (model.md section 21.1)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stream3r_core.errors import DataError
from stream3r_core.types import FramePrediction

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
    p, g, num_true = _valid_pixels(prediction, truth, max_depth_m)
    if not len(g):
        raise DataError(_nothing_valid(num_true, max_depth_m))
    return _errors(p, g, len(g) / num_true, alignment, post_clip_max_m)


class DepthAccumulator:
    """Collects the valid pixels of a sequence, so that one alignment can serve all of it.

    Beyond ``max_pixels`` every second pixel of all frames is dropped, again and again; ``stride``
    says how many true pixels stand behind each one kept.
    """

    def __init__(self, max_depth_m: float | None = None, max_pixels: int = 50_000_000):
        self.stride = 1
        self._max_depth_m, self._max_pixels = max_depth_m, max_pixels
        self._kept: list[tuple[Tensor, Tensor]] = []  # one pair of 1-D tensors per frame
        self._num_kept = self._num_true = self._num_judged = 0

    def add(self, prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> None:
        """Take the valid pixels of one frame, maps of equal size [H, W]."""
        p, g, num_true = _valid_pixels(prediction, truth, self._max_depth_m)
        self._num_true += num_true
        self._num_judged += len(g)
        self._kept.append((p[:: self.stride], g[:: self.stride]))
        self._num_kept += len(self._kept[-1][0])
        while self._num_kept > self._max_pixels:
            self.stride *= 2
            self._kept = [(p[::2].clone(), g[::2].clone()) for p, g in self._kept]
            self._num_kept = sum(len(p) for p, _ in self._kept)

    def errors(self, alignment: str, post_clip_max_m: float | None = None) -> DepthErrors:
        """Errors over all frames with one alignment; raises DataError when nothing was valid."""
        if not self._num_kept:
            raise DataError(_nothing_valid(self._num_true, self._max_depth_m))
        p, g = (torch.cat(parts) for parts in zip(*self._kept))
        coverage = self._num_judged / self._num_true
        errors = _errors(p, g, coverage, alignment, post_clip_max_m)
        return dataclasses.replace(errors, valid_pixels=self._num_judged)

    def abs_rel_per_frame(self, scale: float, shift_m: float) -> np.ndarray:
        """Mean relative error of each added frame under a given alignment, NaN: nothing valid."""
        return np.array([_mean((p * scale + shift_m - g).abs() / g) for p, g in self._kept])


def _errors(
    p: Tensor, g: Tensor, coverage: float, alignment: str, post_clip_max_m: float | None
) -> DepthErrors:
    """Align the valid predictions [N] to the truth [N] and judge them."""
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


def depth_at(prediction: FramePrediction, size_hw: tuple[int, int]) -> np.ndarray:
    """Predicted depth [h, w] at the size of a true depth map of the same view.

    Bicubic as published where the network saw the whole image; where it saw a crop, from the
    nearest pixel, NaN outside.
    """
    geometry = prediction.geometry
    seen = [scale * side for scale, side in zip(geometry.scale_xy, geometry.camera_size_hw[::-1])]
    whole = [round(side) for side in seen] == list(geometry.network_size_hw[::-1])
    if whole and geometry.offset_xy == (0, 0):
        return resize_depth(prediction.depth.cpu().numpy(), size_hw)
    depth = prediction.at_camera_resolution().depth.cpu().numpy()
    rows, columns = ((np.arange(new) + 0.5) * old // new for new, old in zip(size_hw, depth.shape))
    return depth[rows.astype(int)][:, columns.astype(int)]


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


def _valid_pixels(prediction, truth, max_depth_m) -> tuple[Tensor, Tensor, int]:
    """Predicted and true depth [N] where both are valid, and the number of valid true pixels."""
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
    return prediction[judged], truth[judged], int(valid.sum())


def _nothing_valid(num_true: int, max_depth_m: float | None) -> str:
    limit = '' if max_depth_m is None else f' below {max_depth_m:g} m'
    return (
        f'no pixel has both a true depth{limit} and a finite prediction ({num_true} pixels have a '
        'true one); check the unit of the depth files (0 = invalid) and that they belong to these '
        'images'
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
