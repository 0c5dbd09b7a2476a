"""Resident memory of an endless stream: the slope in MB per 1000 frames.

Run:  python benchmarks/resident.py --modes window stac --frames 4000 --output resident.json

Image to map, in one process without ROS (benchmarks/soak.py does it with a live node). The line is
fitted to the second half, when caches, map and allocator have taken what they take.
"""

import argparse
import json

import numpy as np
import torch

from stream3r_core import load_model
from stream3r_core.benchmark.measure import Plan, camera_images
from stream3r_core.config import CoreConfig, ImageConfig, MappingConfig, SessionConfig
from stream3r_core.evaluation.conditions import conditions, resident_bytes
from stream3r_core.pipeline import Reconstructor


def slope(model, mode, plan, frames):
    """Fit resident megabytes over thousands of frames."""
    config = CoreConfig(
        image=ImageConfig(long_side=plan.width),
        session=SessionConfig(mode=mode),
        mapping=MappingConfig(max_points=20_000),  # soon full, as after hours
    )
    reconstructor, images = Reconstructor(model, config), camera_images(plan)
    megabytes = np.empty(frames)
    for index in range(frames):
        reconstructor.feed(images[index % len(images)], 1 + index)
        megabytes[index] = resident_bytes() / 1e6
    half = frames // 2
    line = np.polyfit(np.arange(half, frames) / 1000, megabytes[half:], 1)
    return {
        'mb_per_1000_frames': float(line[0]),
        'mb': {
            'first frame': megabytes[0],
            'half way': megabytes[half],
            'end': megabytes[-1],
            'max': megabytes.max(),
        },
        'cache_bytes': reconstructor.session.cache.num_bytes,
        'map_points': reconstructor.map.num_points,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--modes', nargs='+', default=['window', 'stac'])
    parser.add_argument('--size', default='64x48', help='network image, WIDTHxHEIGHT')
    parser.add_argument('--frames', type=int, default=4000)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, height = map(int, args.size.split('x'))
    model = load_model('tiny')
    rows = {}
    for mode in args.modes:
        rows[mode] = slope(model, mode, Plan(height, width), args.frames)
        print(mode, json.dumps(rows[mode]), flush=True)
    facts = {'conditions': conditions(model), 'options': vars(args)}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump(facts | {'modes': rows}, file, indent=2)


if __name__ == '__main__':
    main()
