"""What carving takes out of a map: points of things that moved, and what it costs the rest.

Run:  python benchmarks/carving.py --output carving.json [--pictures DIR]

Seeded synthetic rooms, where all furniture moves ('movers') or none ('static'), seen in three
ways: 'exact' depth and poses, depth of the shipped 'tiny' network with exact poses ('tiny depth'),
and depth and poses of the network ('tiny'), after one Sim(3) that fits its points to the truth.
Ghosts: points farther than a tolerance from all that was seen at rest or stood there in the last
image; 'seen through': those that a true ray of at least 5 of the last 20 images passes. Accuracy:
median distance to what is no ghost. Completeness: share of what was at rest that has a point
within the tolerance.
"""

import argparse
import dataclasses
import itertools
import json
import time

import numpy as np
import torch
from scipy.spatial import cKDTree

from stream3r_core.checkpoints import load_model
from stream3r_core.config import CarvingConfig, MappingConfig
from stream3r_core.evaluation.conditions import code_version, device_name
from stream3r_core.geometry import umeyama, unproject_to_world
from stream3r_core.image import ImageGeometry
from stream3r_core.mapping import VoxelMap
from stream3r_core.session import StreamSession
from stream3r_core.synthetic.clips import ClipConfig, sample_clips
from stream3r_core.types import FramePrediction

SIZE_HW = 48, 64
TOLERANCE_M = {'exact': 0.06, 'tiny depth': 0.3, 'tiny': 0.3}
VIEWS = tuple(TOLERANCE_M)
SCENES = {'static': 0.0, 'movers': 1.0}  # share of the furniture that moves


def walk(seed, frames, moving, size_hw=SIZE_HW):
    config = ClipConfig(*size_hw, frames=frames, moving=moving, degrade=0.25, fov_deg=(70, 70))
    return sample_clips(1, config, seed)


def true_predictions(clips):
    """The walk as a network without errors would see it."""
    height, width = clips.depth_m.shape[-2:]
    for index in range(clips.depth_m.shape[1]):
        yield FramePrediction(
            index=index,
            stamp_ns=index,
            T_world_camera=clips.T_world_camera[0, index],
            K=clips.K[0, index],
            rgb=(255 * clips.images[0, index]).to(torch.uint8).permute(1, 2, 0),
            depth=clips.depth_m[0, index],
            depth_conf=torch.full((height, width), 4.0),
            world_points=None,
            world_points_conf=None,
            geometry=ImageGeometry((height, width), (height, width), (1.0, 1.0), (0, 0)),
        )


def network_predictions(clips, model):
    session = StreamSession(model, mode='window')
    for truth in true_predictions(clips):
        yield session.step(truth.rgb.numpy(), truth.stamp_ns, truth.K.numpy())


def seen_ways(clips, model):
    """Lists of predictions by name, all in the world and unit of the truth."""
    true, said = list(true_predictions(clips)), list(network_predictions(clips, model))
    ratio = torch.stack([(t.depth / s.depth).median() for t, s in zip(true, said)]).median()
    depth_only = [
        dataclasses.replace(t, depth=ratio * s.depth, depth_conf=s.depth_conf)
        for t, s in zip(true, said)
    ]
    points = [
        torch.cat([unproject_to_world(p.depth, p.K, p.T_world_camera)[::4, ::4].reshape(-1, 3)
                   for p in way]).double()
        for way in (said, true)
    ]  # fmt: skip
    scale, R, t = umeyama(*points, True)
    moved = []
    for p in said:
        T = p.T_world_camera.double().clone()
        T[:3, :3], T[:3, 3] = R @ T[:3, :3], scale * (R @ T[:3, 3]) + t
        moved.append(
            dataclasses.replace(p, T_world_camera=T.float(), depth=scale.float() * p.depth)
        )
    return dict(zip(VIEWS, (true, depth_only, moved)))


def reference(clips):
    """Points [N, 3] of what was seen at rest, and of what moves where it was last seen."""
    points = unproject_to_world(clips.depth_m[0], clips.K[0], clips.T_world_camera[0])
    at_rest = points[~clips.moving[0]].numpy()
    last = points[-1][clips.moving[0, -1]].numpy()
    return thinned(at_rest), np.concatenate([thinned(at_rest), last])


def thinned(points, size=0.02):
    _, first = np.unique(np.floor(points / size).astype(np.int64), axis=0, return_index=True)
    return points[first]


def build(predictions, carving):
    voxel_map = VoxelMap(MappingConfig(carving=carving))
    start = time.process_time()
    for prediction in predictions:
        voxel_map.integrate(prediction)
    return voxel_map.points(), 1000 * (time.process_time() - start) / len(predictions)


def times_seen_through(points, clips, tolerance, last=20):
    """How many of the last images [N] have a true ray that passes the points [N, 3]."""
    counts = np.zeros(len(points), int)
    height, width = clips.depth_m.shape[-2:]
    views = zip(clips.T_world_camera[0], clips.K[0], clips.depth_m[0])
    for T, K, depth in list(views)[-last:]:
        rays = (points - T[:3, 3].numpy()) @ T[:3, :3].numpy() @ K.numpy().T
        z = np.maximum(rays[:, 2], 1e-6)
        column, line = np.rint(rays[:, :2] / z[:, None]).astype(int).T
        inside = (
            (rays[:, 2] > 0) & (column >= 0) & (column < width) & (line >= 0) & (line < height)
        )
        measured = depth.numpy()[np.where(inside, line, 0), np.where(inside, column, 0)]
        counts += inside & (z < measured - tolerance)
    return counts


def judge(cloud, distance, at_rest, tolerance, clips):
    ghosts = cloud.points_xyz[distance > tolerance]
    gap, _ = cKDTree(cloud.points_xyz).query(at_rest[:: max(1, len(at_rest) // 5000)])
    return {
        'points': len(cloud),
        'ghosts': len(ghosts),
        'seen_through': int((times_seen_through(ghosts, clips, tolerance) >= 5).sum()),
        'accuracy_m': float(np.median(distance)),
        'mean_distance_m': float(distance.mean()),
        'completeness': float((gap < tolerance).mean()),
    }


def draw(path, clouds, ghosts):
    """Maps from above without the ceiling; ghosts in red."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(clouds), figsize=(7 * len(clouds), 7))
    for axis, (name, cloud) in zip(axes, clouds.items()):
        low = cloud.points_xyz[:, 2] < 1.8
        xyz, is_ghost = cloud.points_xyz[low], ghosts[name][low]
        axis.scatter(*xyz[~is_ghost, :2].T, c=cloud.colors_rgb[low][~is_ghost] / 255, s=1)
        axis.scatter(*xyz[is_ghost, :2].T, c='red', s=1)
        axis.set(title=f'{name}: {is_ghost.sum()} ghosts below 1.8 m', aspect='equal')
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def compare(clips, model, options, pictures, label):
    at_rest, there = reference(clips)
    tree, rows = cKDTree(there), []
    for view, predictions in seen_ways(clips, model).items():
        clouds, ghosts = {}, {}
        for name, carving in options.items():
            cloud, milliseconds = build(predictions, carving)
            distance, _ = tree.query(cloud.points_xyz)
            figures = judge(cloud, distance, at_rest, TOLERANCE_M[view], clips)
            rows.append({'view': view, 'carving': name, 'ms': milliseconds, **figures})
            print(label, rows[-1], flush=True)
            clouds[name], ghosts[name] = cloud, distance > TOLERANCE_M[view]
        if pictures:
            draw(f'{pictures}/{label} {view}.png'.replace(' ', '_'), clouds, ghosts)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--frames', type=int, default=60)
    parser.add_argument('--margins', type=float, nargs='+', default=[0.1])
    parser.add_argument('--scenes', nargs='+', choices=SCENES, default=list(SCENES))
    parser.add_argument('--pictures')
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model('tiny')
    options = {'off': CarvingConfig(enabled=False)}
    for margin in args.margins:
        options[f'margin {margin}'] = CarvingConfig(enabled=True, margin=margin)
    rows = []
    for scene in args.scenes:
        for seed in range(args.seeds):
            found = compare(walk(seed, args.frames, SCENES[scene]), model, options, args.pictures,
                            f'{scene} {seed}')  # fmt: skip
            rows += [{'scene': scene, 'seed': seed, **row} for row in found]
    summary(rows, options)
    facts = {'code': code_version(), 'device': device_name(torch.device('cpu')), 'threads': 1}
    with open(args.output, 'w', encoding='utf-8') as file:
        json.dump({'conditions': facts | vars(args), 'rows': rows}, file, indent=2)


FIGURES = (
    'points',
    'ghosts',
    'seen_through',
    'accuracy_m',
    'mean_distance_m',
    'completeness',
    'ms',
)


def summary(rows, options):
    """Means over the seeds."""
    scenes = dict.fromkeys(row['scene'] for row in rows)
    for scene, view, name in itertools.product(scenes, VIEWS, options):
        case = scene, view, name
        chosen = [row for row in rows if (row['scene'], row['view'], row['carving']) == case]
        means = {key: round(float(np.mean([row[key] for row in chosen])), 4) for key in FIGURES}
        print(f'{scene:8}{view:12}{name:14}', means)


if __name__ == '__main__':
    main()
