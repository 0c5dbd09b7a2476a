"""Time of the map: integrating a frame of 518 x 392, and making a message of all of it.

Run:  python benchmarks/mapping.py --output mapping.json

'typical': a camera that walks along a wall and knows most of it. 'worst': the map is full and each
frame shows a place that it has never seen, so that as many voxels go as come. Processor time on
one core.
"""

import argparse
import dataclasses
import json
import time
import tracemalloc

import numpy as np
import torch

from stream3r_core.config import CarvingConfig, MappingConfig
from stream3r_core.evaluation.conditions import code_version, device_name
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import VoxelMap
from stream3r_core.types import FramePrediction
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.outputs import Outputs

HEIGHT, WIDTH = 392, 518
VOXEL_SIZE = 0.03  # a hundredth of the depth of the wall, as by default


def frame(index, shift, rng):
    """A wavy wall 3 units away, seen by a camera that has moved sideways by ``shift``."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    depth = 3 + 0.3 * np.sin(columns / 40 + index) + 0.2 * np.cos(rows / 30)
    T = torch.eye(4)
    T[0, 3] = shift
    return FramePrediction(
        index=index,
        stamp_ns=index,
        T_world_camera=T,
        K=torch.tensor([[400.0, 0, WIDTH / 2], [0, 400.0, HEIGHT / 2], [0, 0, 1]]),
        rgb=torch.from_numpy(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)),
        depth=torch.from_numpy(depth.astype(np.float32)),
        depth_conf=torch.from_numpy(rng.uniform(1.5, 8, (HEIGHT, WIDTH)).astype(np.float32)),
        world_points=None,
        world_points_conf=None,
        geometry=ImageGeometry((HEIGHT, WIDTH), (HEIGHT, WIDTH), (1.0, 1.0), (0, 0)),
    )


def milliseconds(function, argument):
    start = time.process_time()
    function(argument)
    return 1000 * (time.process_time() - start)


def filled(max_points):
    """Return a map that is full of voxels at places which no camera here looks at."""
    voxel_map = VoxelMap(MappingConfig(max_points=max_points, voxel_size=VOXEL_SIZE))
    rng = np.random.default_rng(1)
    while voxel_map.num_points < max_points:
        cells = rng.integers(-400, 400, (1 << 18, 3)) - np.array([0, 0, 100_000])
        points = (VOXEL_SIZE * (cells + 0.5)).astype(np.float32)
        confidence = rng.uniform(1.5, 8, len(points)).astype(np.float32)
        voxel_map.integrate_points(points, np.zeros_like(cells, np.uint8), confidence)
    return voxel_map


def integrate(voxel_map, step, frames):
    """Percentiles of the processor time of a frame; the camera moves by ``step`` each time."""
    rng = np.random.default_rng(0)
    times = []
    for index in range(frames + 3):
        picture = frame(index, step * index, rng)
        times.append(milliseconds(voxel_map.integrate, picture))
    change = voxel_map.changed_since(voxel_map.version - 1)
    row = dict(zip(('p50_ms', 'p95_ms'), np.percentile(times[3:], (50, 95)).tolist()))
    return row | {
        'points': voxel_map.num_points,
        'voxels_of_last_frame': int((change.weight > 0).sum()),
        'removed_by_last_frame': int((change.weight == 0).sum()),
    }


def publishing(voxel_map):
    """Time and peak memory of the PointCloud2 of a full map, over its own size."""
    outputs = Outputs(rosbags_messages())
    times = [milliseconds(lambda _: outputs.map(cloud_of(voxel_map), 1), None) for _ in range(5)]
    tracemalloc.start()
    message = outputs.map(cloud_of(voxel_map), 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        'p50_ms': float(np.median(times)),
        'message_bytes': len(message.data),
        'peak_bytes': peak,
        'copies': peak / len(message.data),
    }


def cloud_of(voxel_map):
    return voxel_map.view()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--frames', type=int, default=30)
    parser.add_argument('--max-points', type=int, default=2_000_000)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    empty = VoxelMap(MappingConfig(max_points=args.max_points, voxel_size=VOXEL_SIZE))
    rows['typical, small map'] = integrate(empty, 0.35, args.frames)
    options = dataclasses.replace(empty.config, carving=CarvingConfig(enabled=True))
    rows['typical, small map, carving'] = integrate(VoxelMap(options), 0.35, args.frames)
    full = filled(args.max_points)
    rows['typical, full map'] = integrate(full, 0.35, args.frames)
    full.config = dataclasses.replace(full.config, carving=options.carving)
    rows['typical, full map, carving'] = integrate(full, 0.35, args.frames)
    full.config = dataclasses.replace(full.config, carving=CarvingConfig(enabled=False))
    rows['worst: full map, new places only'] = integrate(full, 10.0, args.frames)
    rows['publish a full map'] = publishing(full)
    for name, row in rows.items():
        print(name, {k: round(v, 2) for k, v in row.items()})
    facts = {'code': code_version(), 'device': device_name(torch.device('cpu')), 'threads': 1}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump({'conditions': facts, 'rows': rows}, file, indent=2)


if __name__ == '__main__':
    main()
