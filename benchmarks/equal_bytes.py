"""Cache policies at equal bytes on walks that come back: depth, trajectory, bytes, time.

Run:  python benchmarks/equal_bytes.py --weights FILE --seeds 5 --output equal_bytes.json

Every sequence is a loop through four rooms, walked twice: the second round sees places that were
left more than 100 frames ago. All policies but the dense one and the node's default window get the
same bytes for everything that they hold, camera cache included.

The published constants of stac_paper fit the confidences and the scale of the published network.
"stac_paper, fitted" has those that mean the same for the network at hand: tau from a quantile of
its own confidences, the voxel edge from the distance between its tokens, both on a walk of its
own that is not judged. The script fails if a spatial memory that should be used stays empty.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import numpy as np
import torch

from stream3r_core import load_model
from stream3r_core.cache.policies import make_caches
from stream3r_core.config import (
    CacheConfig,
    ImageConfig,
    PublishedCacheConfig,
    SessionConfig,
    from_dict,
)
from stream3r_core.errors import CacheError
from stream3r_core.evaluation.conditions import conditions
from stream3r_core.evaluation.depth import DepthAccumulator
from stream3r_core.evaluation.trajectory import Trajectory, ate, rpe
from stream3r_core.session import StreamSession
from stream3r_core.synthetic import Motion, render_sequence

FITTED = 'stac_paper, fitted'
MUST_REMEMBER = FITTED, 'stac'  # whose pool may not stay empty
WALK = Motion(vertical=0.0, tilt=0.0, tremor_deg=0.1, height_m=(1.0, 1.5), still_share=0.0)


# ---- policies, each as large as the budget allows


def capacity(model, session, cache=None, tokens=0):
    """Bytes that a session of this configuration allocates, measured without allocating."""
    aggregator, camera = make_caches(model, session, cache)
    sizes, dtype = model.config, model.dtype
    for layer in range(sizes.depth):
        k = torch.empty(1, sizes.num_heads, tokens, sizes.head_dim, dtype=dtype, device='meta')
        aggregator.update(layer, k, k)
    width = 2 * sizes.embed_dim // sizes.camera_heads
    if cache is None:
        for layer in range(sizes.camera_iterations * sizes.camera_trunk_depth):
            k = torch.empty(1, sizes.camera_heads, 1, width, device='meta')
            camera.update(layer, k, k)
    return aggregator.capacity_bytes + camera.capacity_bytes


def largest(fits, start):
    """Return the largest size from ``start`` on that fits."""
    size = start
    while fits(size + 1):
        size += 1
    return size


def policies(model, tokens, budget, overrides, fitted):
    """Return (name, session options) of every policy."""

    def window_fits(size):
        return capacity(model, SessionConfig(mode='window', window=size), None, tokens) <= budget

    def heavy_fits(frames):
        try:
            return capacity(model, SessionConfig(mode='stac'), heavy(frames), tokens) <= budget
        except CacheError:
            return False

    def heavy(frames):
        return dataclasses.replace(
            stac, retrieved=0, heavy_hitters=frames, max_bytes=budget, skip_still=False
        )

    stac = from_dict(CacheConfig, {**overrides, 'max_bytes': budget})
    paper = PublishedCacheConfig(max_bytes=budget)
    bounded = dataclasses.replace(paper, bounded=True, **fitted)
    default = SessionConfig().window
    return {
        'dense': {'mode': 'causal'},
        'window': {'mode': 'window', 'window': largest(window_fits, 1)},
        f'window {default}': {'mode': 'window', 'window': default},
        'heavy hitters': {'mode': 'stac', 'cache': heavy(largest(heavy_fits, 1))},
        'stac_paper': {'mode': 'stac_paper', 'cache': paper},
        FITTED: {'mode': 'stac_paper', 'cache': bounded},
        'stac': {'mode': 'stac', 'cache': stac},
    }


def fit_published_constants(model, sequence, quantile):
    """Return tau and the voxel edge that mean for this network what the published ones should.

    From predictions alone: ``quantile`` of the confidences of its points lies below tau.
    """
    image = ImageConfig(long_side=max(sequence.images.shape[1:3]))
    session = StreamSession(model, 'stac', image=image, cache=CacheConfig(skip_still=False))
    confidence = [session.step(image).world_points_conf for image in sequence.images]
    return {
        'min_confidence': max(1.0, float(torch.stack(confidence).quantile(quantile))),
        'voxel_size': float(session.cache.voxel_size.edge),
    }


# ---- one run


def walk(seed, frames, size):
    """Two rounds through four rooms; the speed follows from the number of frames."""
    motion = dataclasses.replace(WALK, speed_m_s=(0.5, 0.5))

    def draw(num_frames, size, fps):
        return render_sequence(seed, num_frames, *size, fps=fps, motion=motion, kind='rooms')

    # The rate at which the frames are two rounds, from a look at the same path.
    position = draw(300, (8, 8), 10.0).T_world_camera[:, :2, 3]
    angle = torch.atan2(position[:, 1], position[:, 0])
    turned = (angle.diff() + math.pi).remainder(2 * math.pi).sub(math.pi).sum().abs()
    seconds_per_round = 2 * math.pi * 29.9 / float(turned)
    return draw(frames, size, frames / 2 / seconds_per_round)


def run(model, sequence, options):
    """Feed a sequence; return predictions, bytes and times."""
    height, width = sequence.images.shape[1:3]
    session = StreamSession(model, image=ImageConfig(long_side=max(height, width)), **options)
    predictions, milliseconds, live, allocated = [], [], 0, 0
    for image, stamp_ns in zip(sequence.images, sequence.stamps_ns):
        started = time.process_time()
        answer = session.step(image, stamp_ns)
        milliseconds.append(1000 * (time.process_time() - started))
        predictions += [] if answer is None else answer if isinstance(answer, list) else [answer]
        caches = session.cache, session.camera_cache
        live = max(live, sum(c.num_bytes for c in caches))
        allocated = max(allocated, sum(c.capacity_bytes for c in caches))
    predictions += session.flush()
    row = {'ms': float(np.mean(milliseconds[20:])), 'live bytes': live}
    return predictions, row | {'allocated bytes': allocated}, books_of(session.cache)


def books_of(cache):
    """Return what became of the tokens that a spatial memory was given; nothing without one."""
    pool = getattr(cache, 'pool', None)
    if pool is None:
        return {}
    retrieved = int((cache.working.retrieved_slot >= 0).sum())
    held = {'held': int(pool.num_tokens), 'voxels': int(pool.voxels.count)}
    went = {name: int(number) for name, number in pool.books._asdict().items()}
    return {**went, **held, 'retrieved': retrieved}


def judge(sequence, predictions, dense):
    """Errors over all frames, and over the second round alone under the same alignment.

    The distance from the dense session says what a policy forgets, whatever the network is worth.
    """
    half = len(predictions) // 2
    depth = DepthAccumulator()
    for prediction, truth in zip(predictions, sequence.depth_m):
        depth.add(prediction.depth, truth)
    errors = depth.errors('scale')
    per_frame = depth.abs_rel_per_frame(errors.scale, errors.shift_m)
    stamps = np.array(sequence.stamps_ns)
    truth = Trajectory(stamps, sequence.T_world_camera.double().numpy())
    estimate = Trajectory(stamps, torch.stack([p.T_world_camera for p in predictions]).double())
    error = ate(truth, estimate)
    apart = [(p.depth / d.depth).log().abs().mean() for p, d in zip(predictions, dense)]
    moved = [
        (p.T_world_camera - d.T_world_camera)[:3, 3].norm() for p, d in zip(predictions, dense)
    ]
    return {
        'abs_rel': errors.abs_rel,
        'delta_1': errors.delta_1,
        'abs_rel, 2nd round': float(np.nanmean(per_frame[half:])),
        'ate_m': error.rmse,
        'ate_m, 2nd round': float(np.sqrt(np.mean(np.square(error.errors[half:])))),
        'rpe_m': rpe(truth, estimate).rmse,
        'depth from dense, log': float(torch.stack(apart[half:]).mean()),
        'position from dense': float(torch.stack(moved[half:]).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--weights', default=None)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--first-seed', type=int, default=9000)
    parser.add_argument('--frames', type=int, default=240)
    parser.add_argument('--size', type=int, nargs=2, default=(48, 64), metavar=('H', 'W'))
    parser.add_argument('--budget-frames', type=int, default=23, help='in keys and values')
    parser.add_argument(
        '--quantile', type=float, default=0.1, help='of the confidences, below the fitted tau'
    )
    parser.add_argument('--only', nargs='*', default=[], help='policies')
    parser.add_argument('--set', nargs='*', default=[], metavar='OPTION=JSON', help='of stac')
    parser.add_argument('--output', default='')
    arguments = parser.parse_args()
    model = load_model(arguments.preset, weights=arguments.weights)
    sizes = model.config
    tokens = sizes.tokens_per_frame(*arguments.size)
    kv_frame = 2 * sizes.depth * sizes.embed_dim * tokens * model.dtype.itemsize
    budget = arguments.budget_frames * kv_frame
    overrides = {k: json.loads(v) for k, v in (pair.split('=', 1) for pair in arguments.set)}
    other_walk = walk(arguments.first_seed - 1, 32, arguments.size)
    fitted = fit_published_constants(model, other_walk, arguments.quantile)
    chosen = policies(model, tokens, budget, overrides, fitted)
    only = {'dense', *arguments.only} if arguments.only else set(chosen)
    chosen = {name: options for name, options in chosen.items() if name in only}
    results, books = ({name: [] for name in chosen} for _ in range(2))
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        sequence, dense = walk(seed, arguments.frames, arguments.size), None
        for name, options in chosen.items():
            predictions, costs, booked = run(model, sequence, options)
            dense = predictions if name == 'dense' else dense
            row = judge(sequence, predictions, dense) | costs
            results[name].append(row)
            books[name].append(booked)
            print(seed, name, {k: float(f'{v:.4g}') for k, v in row.items()}, booked, flush=True)
            if name in MUST_REMEMBER and not booked['held']:
                raise CacheError(f'{name} ran without its spatial memory: {booked}')
    table = summarise(results)
    print(f'\nbudget {budget:,} bytes = {arguments.budget_frames} frames of {tokens} tokens\n')
    print(table)
    if arguments.output:
        described = {n: dataclasses.asdict(o['cache']) if 'cache' in o else o for n, o in
                     chosen.items()}  # fmt: skip
        with open(arguments.output, 'w') as file:
            json.dump(
                {
                    'arguments': vars(arguments), 'conditions': conditions(model),
                    'budget_bytes': budget, 'policies': described, 'results': results,
                    'books': books, 'table': table.splitlines(),
                },
                file, indent=1,
            )  # fmt: skip


def summarise(results):
    """Mean and standard deviation over the seeds, as a Markdown table."""
    names = list(next(iter(results.values()))[0])
    lines = ['| policy | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 1) + '|']
    for policy, rows in results.items():
        cells = []
        for name in names:
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            if 'bytes' in name:
                cells.append(f'{statistics.mean(values) / 1e6:.2f} MB')
            else:
                cells.append(f'{statistics.mean(values):.3f} ± {spread:.3f}')
        lines.append(f'| {policy} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
