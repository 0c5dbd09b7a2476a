"""A straight walk through ever new space: bytes, process memory and time per frame.

Run:  python benchmarks/long_walk.py --frames 5000 --output long_walk.json

The network is the tiny preset with random weights, whose points mean nothing; the benchmark puts
the tokens of every frame where a camera would see them that walks straight ahead without ever
coming back. What is measured (attention, eviction, merging, retrieval) depends on these positions
and not on whether the depth is right. ``--standing`` shows the same view again and again instead.
"""

import argparse
import gc
import json
import time

import numpy as np
import torch

from stream3r_core import load_model
from stream3r_core.cache.policies import SPATIAL_MODES
from stream3r_core.config import from_dict
from stream3r_core.evaluation.conditions import conditions, resident_bytes
from stream3r_core.session import StreamSession

STEP = 0.3  # scene units walked per frame; the view is 1 to 3 units deep


class WalkingModel:
    """A network whose world points are those of a walk through an endless corridor."""

    def __init__(self, model):
        self._model = model
        self.frame = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def stream(self, images, *args, **kwargs):  # noqa: D102
        raw = self._model.stream(images, *args, **kwargs)
        if 'world_points' in raw:
            n, height, width = raw['world_points'].shape[1:4]
            x = torch.linspace(-1, 1, width).expand(height, -1)
            y = torch.linspace(-1, 1, height)[:, None].expand(-1, width)
            view = torch.stack((x, y, 1 + x.abs() + y.abs()), -1)
            ahead = torch.arange(self.frame, self.frame + n) * STEP
            raw['world_points'] = (
                view + torch.stack((0 * ahead, 0 * ahead, ahead), -1)[None, :, None, None]
            )
            raw['world_points_conf'] = 2 + raw['depth_conf'] / raw['depth_conf'].mean()
        self.frame += images.shape[1]
        return raw


def views(height, width, seed=0):
    """Yield endless images [3, H, W] of smooth random texture, each unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator)
        yield torch.nn.functional.interpolate(coarse, (height, width), mode='bilinear')[0]


def run(arguments):
    model = load_model('tiny', weights='random')
    options = dict(pair.split('=', 1) for pair in arguments.set)
    config = from_dict(
        SPATIAL_MODES[arguments.mode], {k: json.loads(v) for k, v in options.items()}
    )
    session = StreamSession(WalkingModel(model), arguments.mode, cache=config)
    frames = views(*arguments.size)
    view = next(frames)
    rows = []
    for index in range(arguments.frames):
        view = view if arguments.standing and index else next(frames)
        started, cpu = time.perf_counter(), time.process_time()
        session.step_tensor(view)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        gc.collect(0)
        cache, camera = session.cache, session.camera_cache
        rows.append((
            1000 * wall, 1000 * cpu, cache.num_bytes + camera.num_bytes,
            cache.capacity_bytes + camera.capacity_bytes, resident_bytes(),
        ))  # fmt: skip
        if (index + 1) % 500 == 0:
            print(index + 1, *(f'{x:,.1f}' for x in rows[-1]), flush=True)
    return model, session, np.array(rows)


def summary(session, rows):
    """The figures that matter; percentiles of frames 500 to 1000 against the last 500."""
    warm, early, late = 500, rows[500:1000], rows[-500:]
    budget = session.cache_config.max_bytes or None
    books = session.cache.pool.books if session.cache.pool is not None else None
    return {
        'frames': len(rows),
        'frames_in_cache': session.cache.num_frames,
        'max_bytes': budget,
        'capacity_bytes': [int(rows[:, 3].min()), int(rows[:, 3].max())],
        'live_bytes_after_warm_up': [int(rows[warm:, 2].min()), int(rows[warm:, 2].max())],
        'resident_growth_percent': 100 * (rows[-100:, 4].mean() / rows[warm, 4] - 1),
        'resident_bytes': int(rows[-1, 4]),
        'frame_ms_p50_p95': {
            'frames 500-1000': np.percentile(early[:, 0], [50, 95]).tolist(),
            'last 500': np.percentile(late[:, 0], [50, 95]).tolist(),
        },
        'frame_cpu_ms_p50_p95': {
            'frames 500-1000': np.percentile(early[:, 1], [50, 95]).tolist(),
            'last 500': np.percentile(late[:, 1], [50, 95]).tolist(),
        },
        # The issue asks for at most 1.1, which only a quiet machine can show on the wall clock.
        'p95_of_last_500_to_frames_500_1000': {
            'wall': float(np.percentile(late[:, 0], 95) / np.percentile(early[:, 0], 95)),
            'processor': float(np.percentile(late[:, 1], 95) / np.percentile(early[:, 1], 95)),
        },
        'tokens': books and {name: int(x) for name, x in books._asdict().items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--frames', type=int, default=5000)
    parser.add_argument('--size', type=int, nargs=2, default=(48, 64), metavar=('H', 'W'))
    parser.add_argument('--mode', default='stac', choices=tuple(SPATIAL_MODES))
    parser.add_argument('--set', nargs='*', default=[], metavar='OPTION=JSON')
    parser.add_argument('--standing', action='store_true')
    parser.add_argument('--output', default='')
    arguments = parser.parse_args()
    model, session, rows = run(arguments)
    result = {
        'arguments': vars(arguments),
        'conditions': conditions(model),
        **summary(session, rows),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        with open(arguments.output, 'w') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()
