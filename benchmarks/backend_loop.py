"""The back end with a network on synthetic loops of four rooms walked twice: errors and maps.

    python benchmarks/backend_loop.py --seeds 0 1 2 --set model.weights= --output loops

Prints ATE after SE(3) and after Sim(3) alignment without a back end, of the submaps alone, and
with loops; with ``--output`` both maps are written as PLY. For a recording: ``stream3r replay BAG
--ground-truth ... --set backend.kind=submaps`` beside the same with ``none``.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml

from stream3r_core.config import CoreConfig, from_dict
from stream3r_core.evaluation.trajectory import Trajectory, ate
from stream3r_core.mapping import save_ply
from stream3r_core.pipeline import load_configured_model
from stream3r_core.slam import SubmapReconstructor, make_reconstructor
from stream3r_core.synthetic.clips import SyntheticSequence, render_sequence
from stream3r_core.synthetic.trajectories import WHEELED


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


def run(sequence: SyntheticSequence, config: CoreConfig, ply: Path | None) -> None:
    """Reconstruct one sequence and print its errors."""
    mapper = make_reconstructor(load_configured_model(config.model), config)
    online = [
        mapper.feed(image, stamp)[0].T_world_camera.numpy()
        for image, stamp in zip(sequence.images.numpy(), sequence.stamps_ns)
    ]
    mapper.flush()
    rows = {config.backend.kind: np.array(online, float)}
    if isinstance(mapper, SubmapReconstructor):
        rows = {
            'submaps, as they came': rows['submaps'],
            'submaps, no loops': mapper.trajectory(corrected=False)[1],
            'submaps, at the end': mapper.trajectory()[1],
        }
        print(
            '  ', mapper.figures(), 'drift factor', round(mapper.backend.arbiter.drift_factor, 1)
        )
    stamps = np.array(sequence.stamps_ns)
    truth = Trajectory(stamps, sequence.T_world_camera.numpy(), 'truth')
    for name, poses in rows.items():
        estimate = Trajectory(stamps, poses, name)
        errors = [ate(truth, estimate, alignment).rmse for alignment in ('se3', 'sim3')]
        print(f'   {name}: ATE SE(3) {errors[0]:.3f} m, Sim(3) {errors[1]:.3f} m', flush=True)
    if ply is not None:
        save_ply(mapper.map.points(), ply)


def main() -> None:
    """Read the arguments, run all seeds with and without."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--frames', type=int, default=480)
    parser.add_argument('--set', dest='texts', action='append', default=[], metavar='NAME=VALUE')
    parser.add_argument('--output', type=Path, help='folder for the maps')
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        sequence = render_sequence(
            seed, arguments.frames, kind='rooms', motion=WHEELED, height=72, width=96
        )
        positions = sequence.T_world_camera[:, :3, 3]
        print(f'seed {seed}: way {positions.diff(dim=0).norm(dim=1).sum():.1f} m')
        for kind in ('none', 'submaps'):
            ply = arguments.output and arguments.output / f'{seed}_{kind}.ply'
            run(sequence, options(arguments.texts, kind), ply)


if __name__ == '__main__':
    main()
