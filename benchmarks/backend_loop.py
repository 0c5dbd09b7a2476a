r"""The back end with a network: errors and maps with it and without.

    python benchmarks/backend_loop.py --seeds 0 1 2 --set backend.submaps.max_frames=40 \
        --output loops
    python benchmarks/backend_loop.py --bag BAG --output kitchen

On synthetic loops of four rooms walked twice, or on a bag that has the truth. Prints ATE after
SE(3) and after Sim(3) alignment without a back end, of the submaps alone, and with loops; with
``--output`` also writes ``results.json``, all maps as PLY and a picture of each pair of maps.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from stream3r_core.backend import sim3
from stream3r_core.config import CoreConfig, from_dict
from stream3r_core.evaluation.pictures import views
from stream3r_core.evaluation.trajectory import Trajectory, ate
from stream3r_core.mapping import MapCloud, save_ply
from stream3r_core.pipeline import load_configured_model
from stream3r_core.slam import SubmapReconstructor, make_reconstructor
from stream3r_core.synthetic.clips import render_sequence
from stream3r_core.synthetic.trajectories import WHEELED
from stream3r_ros.bag import BagReader
from stream3r_ros.ground_truth import bag_truth
from stream3r_ros.sources import BagSource

MARGIN_M, SLICE_M = 2.0, 0.8  # of the pictures around the way; above and below the camera


def options(texts: list[str], kind: str) -> CoreConfig:
    """Return the configuration of NAME=VALUE texts."""
    values: dict = {}
    for name, value in [t.split('=', 1) for t in texts] + [('backend.kind', kind)]:
        *groups, last = name.split('.')
        group = values
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = yaml.safe_load(value) if value else ''
    return from_dict(CoreConfig, values)


class Footage(NamedTuple):
    """Images and where they were taken."""

    name: str
    images: Sequence[np.ndarray]  # [H, W, 3] uint8
    truth: Trajectory  # may lack some of them
    stamps_ns: Sequence[int]


class Outcome(NamedTuple):
    """A trajectory and the map that it made."""

    errors: dict[str, dict[str, float]]  # per trajectory: ATE, m
    estimate: Trajectory
    cloud: MapCloud


def rooms(seed: int, frames: int) -> Footage:
    """Return a synthetic walk through four rooms, twice."""
    clip = render_sequence(seed, frames, kind='rooms', motion=WHEELED, height=72, width=96)
    stamps = np.array(clip.stamps_ns)
    truth = Trajectory(stamps, clip.T_world_camera.numpy(), 'truth')
    return Footage(f'seed_{seed}', clip.images.numpy(), truth, clip.stamps_ns)


def recording(path: Path) -> Footage:
    """Return all images of a bag and its truth."""
    with BagReader(path) as bag:
        frames = [load() for load in BagSource(bag, '', '')]
        stamps = [frame.stamp_ns for frame in frames]
        found = bag_truth(bag, '', frames[0].frame_id, np.array(stamps))
    return Footage(path.name, [frame.rgb for frame in frames], found.trajectory, stamps)


def run(footage: Footage, config: CoreConfig) -> Outcome:
    """Reconstruct and print the errors."""
    mapper = make_reconstructor(load_configured_model(config.model), config)
    online = [
        mapper.feed(image, stamp)[0].T_world_camera.numpy()
        for image, stamp in zip(footage.images, footage.stamps_ns)
    ]
    mapper.flush()
    rows = {config.backend.kind: np.array(online, float)}
    if isinstance(mapper, SubmapReconstructor):
        rows = {
            'submaps, as they came': rows['submaps'],
            'submaps, no loops': mapper.trajectory(corrected=False)[1],
            'submaps, at the end': mapper.trajectory()[1],
        }
        factor = round(mapper.backend.arbiter.drift_factor, 1)
        print('  ', mapper.figures(), 'drift factor', factor)
    errors = {}
    for name, poses in rows.items():
        estimate = Trajectory(np.array(footage.stamps_ns), poses, name)
        errors[name] = {a: ate(footage.truth, estimate, a).rmse for a in ('se3', 'sim3')}
        se3, sim3 = errors[name].values()
        print(f'   {name}: ATE SE(3) {se3:.3f} m, Sim(3) {sim3:.3f} m', flush=True)
    return Outcome(errors, estimate, mapper.map.points())


def draw(footage: Footage, outcomes: dict[str, Outcome], path: Path) -> None:
    """Slices of both maps at the height of the camera, in metres, with both ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(outcomes), 4.2), layout='constrained')
    above, side = views(footage.truth.T_world_camera)
    across, ahead, upward = above.horizontal, above.vertical, side.vertical
    margin = np.full(3, MARGIN_M)
    margin[upward] = SLICE_M
    panels = figure.subplots(1, len(outcomes), sharex=True, sharey=True)
    for axes, (kind, outcome) in zip(panels, outcomes.items()):
        result = ate(footage.truth, outcome.estimate, 'sim3')
        points = sim3.act(result.T_truth_estimate, outcome.cloud.points_xyz.astype(float))
        walked, way = result.truth.positions_m, result.estimate.positions_m
        low, high = walked.min(0) - margin, walked.max(0) + margin
        inside = ((points > low) & (points < high)).all(1)
        at, colour = points[inside], outcome.cloud.colors_rgb[inside] / 255
        axes.scatter(at[:, across], at[:, ahead], s=0.3, c=colour, linewidths=0)
        axes.plot(walked[:, across], walked[:, ahead], color='black', linewidth=1, label='truth')
        axes.plot(way[:, across], way[:, ahead], color='tab:red', linewidth=1, label='estimate')
        axes.set_title(f'{kind}: ATE {result.rmse:.2f} m after Sim(3)', fontsize=9)
        axes.set_aspect('equal')
        axes.tick_params(labelsize=7)
    above.orient(panels[0])  # the panels share their axes
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Read the arguments, run all footage with and without."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--frames', type=int, default=480)
    parser.add_argument('--bag', type=Path, help='a recording with truth, instead of the rooms')
    parser.add_argument('--set', dest='texts', action='append', default=[], metavar='NAME=VALUE')
    parser.add_argument('--output', type=Path, help='folder for figures, maps and pictures')
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in [None] if arguments.bag else arguments.seeds:
        footage = recording(arguments.bag) if arguments.bag else rooms(seed, arguments.frames)
        steps = np.diff(footage.truth.T_world_camera[:, :3, 3], axis=0)
        way = float(np.linalg.norm(steps, axis=1).sum())
        print(f'{footage.name}: {len(footage.images)} images, way {way:.1f} m')
        outcomes = {k: run(footage, options(arguments.texts, k)) for k in ('none', 'submaps')}
        errors = {name: e for outcome in outcomes.values() for name, e in outcome.errors.items()}
        results[footage.name] = {'images': len(footage.images), 'way_m': way, 'ate_m': errors}
        if arguments.output is None:
            continue
        for kind, outcome in outcomes.items():
            save_ply(outcome.cloud, arguments.output / f'{footage.name}_{kind}.ply')
        draw(footage, outcomes, arguments.output / f'{footage.name}.png')
        text = json.dumps({'set': arguments.texts, 'runs': results}, indent=1)
        (arguments.output / 'results.json').write_text(text + '\n')


if __name__ == '__main__':
    main()
