"""Fit sigma to confidence: how large the errors of a network are, by what it says of itself.

Streams a network over held-out synthetic rooms, fits :class:`Uncertainty` by maximum likelihood
of normal errors, and counts on other rooms how many errors lie within 1 and 2 sigma::

    python -m stream3r_core.evaluation.calibration stream3r_core/weights/tiny.safetensors
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from scipy.stats import chi2
from tqdm import tqdm

from stream3r_core.checkpoints import load_model
from stream3r_core.geometry import invert_se3
from stream3r_core.refinement import PoseRefiner
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import SyntheticSequence, render_sequence
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import (
    CONFIDENCE_OFFSET,
    ErrorModel,
    Uncertainty,
    mean_confidence,
    median_depth,
    uncertainty_name,
    uncertainty_path,
    write_uncertainty,
)

FIT_SEED, CHECK_SEED = (1 << 40) + 2_000_000, (1 << 40) + 3_000_000  # no training room
LENGTHS = (30, 30, 60, 120)  # frames of the streams, in turn
USUAL_FRAMES, NONSENSE_FRAMES = 15, 20  # before an eye is shut, and after
PIXEL_STRIDE = 37  # every so many pixels of a depth image are enough
QUANTITIES = ('translation', 'rotation', 'step_translation', 'step_rotation', 'depth')
_MAX_FRAMES = (1, 5, 10, 20, 30, 50, 80, 120)  # tried for the end of growth
MODES = ('window', 'causal', 'stac')  # those of a node that runs for long, and its reference
_NORMAL = (0.6827, 0.9545)  # share of normal errors within 1 and 2 sigma


@dataclass(frozen=True)
class Errors:
    """Errors of one quantity, with what the network said; N samples of D axes."""

    errors: np.ndarray  # [N, D]
    confidence: np.ndarray  # [N] >= 1
    frames: np.ndarray  # [N] frames since the session began


class Coverage(NamedTuple):
    """How many errors lie within 1 and 2 sigma: of each axis, and of all axes of a frame."""

    axis_1_sigma: float  # 0.683 if errors were normal and the fit right
    axis_2_sigma: float  # 0.954
    chi2_68: float  # share inside of the ellipsoid that should hold 68.3 %
    chi2_95: float  # 95.4 %
    samples: int


def fit_error_model(sample: Errors, grows: bool = True) -> ErrorModel:
    """Return the most likely model of normal errors that are alike in all axes.

    The logarithm of sigma is linear in the parameters but ``max_frames``, so that the likelihood
    has one maximum for each of the values that are tried for it.
    """
    fits = [_fit(sample, limit) for limit in (_MAX_FRAMES if grows else _MAX_FRAMES[:1])]
    return min(fits, key=lambda fit: fit[0])[1]


def _fit(sample: Errors, max_frames: int) -> tuple[float, ErrorModel]:
    trust = -np.log(sample.confidence - CONFIDENCE_OFFSET)
    age = np.log(np.clip(sample.frames, 1, max_frames))
    features = np.stack([np.ones_like(trust), trust, age], 1)  # [N, 3]
    square = np.square(sample.errors).mean(1)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_sigma = features @ parameters
        ratio = square * np.exp(-2 * log_sigma)
        return (log_sigma + ratio / 2).mean(), ((1 - ratio) @ features) / len(ratio)

    start = [0.5 * np.log(square.mean() + 1e-12), 0.0, 0.0]
    bounds = [(None, None), (0.0, 5.0), (0.0, 5.0)]
    best = minimize(loss, start, jac=True, bounds=bounds, method='L-BFGS-B')
    log_scale, exponent, growth = best.x.tolist()
    return best.fun, ErrorModel(float(np.exp(log_scale)), exponent, growth, float(max_frames))


def coverage(sample: Errors, model: ErrorModel) -> Coverage:
    """Return how many errors lie within what a model says."""
    sigma = model.sigma(sample.confidence, sample.frames)[:, None]
    axes = np.abs(sample.errors) / sigma
    squared = np.square(axes).sum(1)
    limits = chi2.ppf(_NORMAL, sample.errors.shape[1])
    shares = (axes <= 1).mean(), (axes <= 2).mean(), *((squared <= x).mean() for x in limits)
    return Coverage(*(round(float(share), 4) for share in shares), len(squared))


def room_errors(
    sequence: SyntheticSequence, predictions: Sequence[FramePrediction]
) -> dict[str, Errors]:
    """Return the errors of one stream, in units of the frames' median depths and in rad.

    The session's one unknown, its scale, is the median ratio of true and predicted depth.
    """
    truth = (invert_se3(sequence.T_world_camera[:1]) @ sequence.T_world_camera).double().numpy()
    poses = torch.stack([p.T_world_camera for p in predictions]).double().numpy()
    depths = [_at_size(d, p.depth.shape) for d, p in zip(sequence.depth_m, predictions)]
    median = np.array([median_depth(p.depth) for p in predictions])
    scale = np.median([median_depth(d) for d in depths] / median)
    truth[:, :3, 3] /= scale
    confidence = np.array([mean_confidence(p.depth_conf) for p in predictions])
    frames = np.arange(len(poses))
    steps, true_steps = (np.linalg.inv(T[:-1]) @ T[1:] for T in (poses, truth))
    made = {}
    for name, estimate, true in (('', poses[1:], truth[1:]), ('step_', steps, true_steps)):
        moved = (estimate - true)[:, :3, 3] / median[1:, None]
        turned = estimate[:, :3, :3] @ true[:, :3, :3].transpose(0, 2, 1)
        for what, error in (('translation', moved), ('rotation', _rotvec(turned))):
            made[name + what] = Errors(error, confidence[1:], frames[1:])
    made['depth'] = _depth_errors(depths, predictions, scale)
    return made


def _rotvec(matrices: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(matrices).as_rotvec()


def _depth_errors(
    depths: Sequence[torch.Tensor], predictions: Sequence[FramePrediction], scale: float
) -> Errors:
    truth = torch.cat([d.flatten() for d in depths])
    depth, confidence = (
        torch.cat([getattr(p, name).flatten() for p in predictions])
        for name in ('depth', 'depth_conf')
    )
    known = (truth > 0) & (depth > 0)
    truth, depth, confidence = (
        values[known][::PIXEL_STRIDE].double().numpy() for values in (truth, depth, confidence)
    )
    error = (truth / scale - depth) / depth
    return Errors(error[:, None], confidence, np.ones(len(error)))


def _at_size(depth: torch.Tensor, size_hw: torch.Size) -> torch.Tensor:
    return torch.nn.functional.interpolate(depth[None, None], tuple(size_hw), mode='nearest')[0, 0]


def collect(rooms: Iterable[dict[str, Errors]]) -> dict[str, Errors]:
    """Return the errors of all rooms together."""
    rooms = list(rooms)
    return {
        name: Errors(
            *(
                np.concatenate([getattr(room[name], part) for room in rooms])
                for part in ('errors', 'confidence', 'frames')
            )
        )
        for name in QUANTITIES
    }


def fit_uncertainty(samples: dict[str, Errors], nonsense: dict[str, np.ndarray]) -> Uncertainty:
    """Fit all quantities; only errors against the first camera grow with time."""
    models = {
        name: fit_error_model(samples[name], grows=name in ('translation', 'rotation'))
        for name in QUANTITIES
    }
    limits = {
        f'{what}_confidence': float(np.quantile(confidence, 0.99))
        for what, confidence in nonsense.items()
    }
    return Uncertainty(**models, **limits)


def nonsense_confidence(model, mode: str, seed: int, rooms: int) -> dict[str, np.ndarray]:
    """Return mean confidences of images that show nothing, after some that do."""
    rng = np.random.default_rng(seed)
    session, seen = _session(model, mode), {'covered': [], 'noise': []}
    for room in range(rooms):
        sequence = render_sequence(seed + room, USUAL_FRAMES, *_size_hw(model))
        shape = sequence.images.shape[1:]
        for what, confidence in seen.items():
            _stream(session, sequence)
            for _ in range(NONSENSE_FRAMES):
                dark = 8 + 3 * rng.standard_normal(shape)  # a sensor's own noise
                image = dark if what == 'covered' else rng.uniform(0, 256, shape)
                answer = session.step(image.clip(0, 255).astype(np.uint8))
                confidence.append(mean_confidence(answer.depth_conf.cpu()))
    return {what: np.array(confidence) for what, confidence in seen.items()}


def stream_rooms(model, modes: Sequence[str], seed: int, rooms: int) -> dict[str, dict]:
    """Stream a network over seeded rooms in each mode; return the errors by uncertainty_name."""
    streamed = list(tqdm(_rooms(model, modes, seed, rooms), total=rooms, unit='room'))
    return {name: collect(room[name] for room in streamed) for name in streamed[0]}


def _rooms(model, modes: Sequence[str], seed: int, rooms: int) -> Iterator[dict[str, dict]]:
    size_hw = _size_hw(model)
    sessions = {mode: _session(model, mode) for mode in modes}
    for room in range(rooms):
        sequence = render_sequence(seed + room, LENGTHS[room % len(LENGTHS)], *size_hw)
        errors = {}
        for mode, session in sessions.items():
            stated, refiner = _stream(session, sequence), PoseRefiner()
            refined = [refiner.refine(prediction) for prediction in stated]
            errors[uncertainty_name(mode, False)] = room_errors(sequence, stated)
            errors[uncertainty_name(mode, True)] = room_errors(sequence, refined)
        yield errors


def _size_hw(model) -> tuple[int, int]:
    width, patch = model.config.img_size, model.config.patch_size
    return width * 3 // 4 // patch * patch, width


def _session(model, mode: str) -> StreamSession:
    return StreamSession(model, mode=mode, outputs=('depth',))


def _stream(session: StreamSession, sequence: SyntheticSequence) -> list[FramePrediction]:
    session.reset()
    return [session.step(image).to('cpu') for image in sequence.images]


def calibrate(weights: Path, modes: Sequence[str], rooms: int) -> Path:
    """Fit on ``rooms`` rooms, check on as many others, write the file beside the weights."""
    model = load_model(None, weights)
    fit_samples = stream_rooms(model, modes, FIT_SEED, rooms)
    check_samples = stream_rooms(model, modes, CHECK_SEED, rooms)
    nonsense = {mode: nonsense_confidence(model, mode, FIT_SEED, 1 + rooms // 4) for mode in modes}
    fitted = {
        (name := uncertainty_name(mode, refined)): fit_uncertainty(fit_samples[name], said)
        for mode, said in nonsense.items()
        for refined in (False, True)
    }
    checked = {
        name: {
            quantity: coverage(samples[quantity], getattr(fitted[name], quantity))._asdict()
            for quantity in QUANTITIES
        }
        for name, samples in check_samples.items()
    }
    path = uncertainty_path(weights)
    notes = {'rooms': rooms, 'frames': LENGTHS, 'image_width': model.config.img_size}
    write_uncertainty(path, model.weights_info.sha256, fitted, {**notes, 'held_out': checked})
    for name, shares in checked.items():
        print(table(name, shares))
    return path


def table(fit: str, checked: dict[str, dict]) -> str:
    """Return the shares of one fit as Markdown."""
    lines = [f'| {fit} | 1 sigma | 2 sigma | 68 % chi2 | 95 % chi2 |', '|---|---|---|---|---|']
    for name, shares in checked.items():
        *values, _ = shares.values()
        lines.append(f'| {name} | ' + ' | '.join(f'{100 * v:.0f} %' for v in values) + ' |')
    return '\n'.join(lines)


def main() -> None:
    """Fit, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights', type=Path, help='.safetensors file of a training run')
    parser.add_argument('--rooms', type=int, default=32, help='to fit on, and again to check on')
    parser.add_argument('--modes', nargs='+', default=MODES, help='session modes')
    options = parser.parse_args()
    print('written:', calibrate(options.weights, options.modes, options.rooms))


if __name__ == '__main__':
    main()
