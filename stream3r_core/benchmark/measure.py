"""Time and memory of one session mode over a stream, frame by frame."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stream3r_core.benchmark.arithmetic import synchronize
from stream3r_core.benchmark.stages import FRAME, StageClock, watched
from stream3r_core.config import CoreConfig
from stream3r_core.errors import ConfigError
from stream3r_core.pipeline import Reconstructor
from stream3r_core.session import ALL_OUTPUTS
from stream3r_core.synthetic import render_sequence
from stream3r_core.types import FramePrediction

#: Frames of the published tables, counted from 1.
FRAMES = (1, 20, 40, 80, 100, 120, 140, 180, 200)
MODES = ('causal', 'window', 'stac')
_NUM_RENDERED = 16  # different images; a longer stream goes back and forth over them
_RENDERED_HW = 42, 56
_STATUS, _CLEAR_PEAK = Path('/proc/self/status'), Path('/proc/self/clear_refs')

Publish = Callable[[FramePrediction], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: network image size, which frames to report, how often to repeat."""

    height: int
    width: int
    frames: tuple[int, ...] = FRAMES
    repeats: int = 3
    warmup: int = 3

    def check(self, patch_size: int) -> None:
        """Raise :class:`ConfigError` for what cannot be measured."""
        if self.height < patch_size or self.width < patch_size:
            raise ConfigError(f'images must be at least {patch_size} x {patch_size} pixels')
        if self.height % patch_size or self.width % patch_size:
            raise ConfigError(
                f'image sides must be multiples of the patch size {patch_size}, got '
                f'{self.width} x {self.height}'
            )
        if not self.frames or min(self.frames) < 1:
            raise ConfigError(f'frames are counted from 1, got {list(self.frames)}')
        if self.repeats < 1 or self.warmup < 0:
            raise ConfigError('at least one repeat is needed, and no negative warm-up')


def measure_mode(model, config: CoreConfig, plan: Plan, publish: Publish | None = None) -> dict:
    """Measure the session mode of ``config`` over streams of ``max(plan.frames)`` frames.

    Every stream starts from a reset session. ``frames`` of the result: what a network step costs,
    from an image on the device to pose, depth and points there, as in the published tables.
    ``attention``: which backend served, and why others did not.
    ``stages``: streams of their own, with clocks inside, from a camera image in host memory to
    the map and, with ``publish``, to what that does with the prediction.
    """
    plan.check(model.config.patch_size)
    config = _fixed_capacity(config, plan)
    reconstructor = Reconstructor(model, config)
    reconstructor.session.outputs = ALL_OUTPUTS
    images = camera_images(plan)
    return {
        'attention': reconstructor.session.explain_attention(),
        'frames': _table(reconstructor, images, plan),
        'stages': _breakdown(reconstructor, images, plan, publish),
    }


def _fixed_capacity(config: CoreConfig, plan: Plan) -> CoreConfig:
    """Give a causal cache its room at once, and let the images pass as they are."""
    frames = max(max(plan.frames), plan.warmup)
    session = dataclasses.replace(config.session, max_frames=config.session.max_frames or frames)
    image = dataclasses.replace(config.image, long_side=plan.width, fit='crop')
    return dataclasses.replace(config, session=session, image=image)


def camera_images(plan: Plan) -> list[np.ndarray]:
    """Return different views [H, W, 3] uint8 of a rendered room, so that no view counts as still.

    They are enlarged from a small picture: what they show costs the network nothing.
    """
    small = render_sequence(0, _NUM_RENDERED, *_RENDERED_HW).images.permute(0, 3, 1, 2).float()
    planes = F.interpolate(small, (plan.height, plan.width), mode='bilinear', antialias=True)
    views = list(planes.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())
    return views + views[-2:0:-1]


def _table(reconstructor: Reconstructor, views: list[np.ndarray], plan: Plan) -> dict:
    session = reconstructor.session
    images = [_to_device(view, session.model.device) for view in views]
    _warm_up(reconstructor, lambda i: session.step_tensor(images[i % len(images)]), plan)
    has_own_peak = reset_peak_bytes(session.model.device)
    seconds, processor = np.empty((2, plan.repeats, max(plan.frames)))
    rows: dict[int, dict[str, Any]] = {}
    for repeat in range(plan.repeats):
        reconstructor.reset()
        for index in range(max(plan.frames)):
            tokens = session.cache.num_tokens
            image = images[index % len(images)]
            seconds[repeat, index], processor[repeat, index] = timed(
                lambda x=image: session.step_tensor(x), session.model.device
            )
            if index + 1 in plan.frames:
                rows[index + 1] = rows.get(index + 1) or {
                    'frame': index + 1,
                    'cached_tokens': tokens,
                    'peak_bytes': peak_bytes(session.model.device),
                    'cache_bytes': session.cache.num_bytes,
                    'cache_capacity_bytes': session.cache.capacity_bytes,
                }
    for number, row in rows.items():
        row |= percentiles(seconds[:, number - 1])
        row['processor_p50_s'] = float(np.median(processor[:, number - 1]))
    return {
        'rows': [rows[number] for number in sorted(rows)],
        'all_frames': percentiles(seconds.ravel()),
        'peak_includes_loading': not has_own_peak,
    }


def _breakdown(
    reconstructor: Reconstructor, images: list[np.ndarray], plan: Plan, publish: Publish | None
) -> list[dict]:
    """Seconds of every stage at the frames of the plan."""
    device = reconstructor.session.model.device

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    clock = StageClock(now)

    def step(index: int) -> None:
        with clock.stage(FRAME):
            predictions = reconstructor.feed(images[index % len(images)], 1 + index)
            if publish is not None:
                with clock.stage('publish'):
                    for prediction in predictions:
                        publish(prediction)

    samples: dict[int, list[tuple[float, dict[str, float]]]] = {n: [] for n in plan.frames}
    with watched(reconstructor, clock):
        _warm_up(reconstructor, step, plan)
        for _ in range(plan.repeats):
            reconstructor.reset()
            for index in range(max(plan.frames)):
                clock.take()
                start = now()
                step(index)
                took = now() - start
                if index + 1 in samples:
                    samples[index + 1].append((took, clock.take()))
    return [_median_stages(number, samples[number]) for number in sorted(samples)]


def _median_stages(number: int, samples: list[tuple[float, dict[str, float]]]) -> dict:
    """Take the repeat of median length whole, so that its stages add up to its time."""
    took, stages = sorted(samples, key=lambda sample: sample[0])[len(samples) // 2]
    return {'frame': number, 'seconds': took, 'stages': stages}


def _warm_up(reconstructor: Reconstructor, step: Callable[[int], Any], plan: Plan) -> None:
    reconstructor.reset()
    for index in range(plan.warmup):
        step(index)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the seconds that a call takes, and the processor seconds of all threads."""
    synchronize(device)
    start, processor_start = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - processor_start


def _to_device(image: np.ndarray, device: torch.device) -> Tensor:
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return planes.to(device).float() / 255


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """Return the median, the 95th percentile and how many values they are of."""
    p50, p95 = np.percentile(seconds, (50, 95)).tolist()
    return {'p50_s': p50, 'p95_s': p95, 'num_samples': int(seconds.size)}


def reset_peak_bytes(device: torch.device) -> bool:
    """Start a new peak; return whether this system can, on a CPU by /proc only."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_PEAK.write_text('5')
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes since :func:`reset_peak_bytes`: allocated on a GPU, resident on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM')), None)
