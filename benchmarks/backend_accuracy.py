"""What the back end does to the trajectory error of a simulated front end, also with false loops.

    python benchmarks/backend_accuracy.py --jobs 2 --output benchmarks/results/backend.json

Per walk and seed: ATE (RMSE after Sim(3) alignment, since the unit of a monocular map is free) of
the chain of submaps alone and with the back end; then median and worst of their ratio. False loops
are injected after verification, on a random earlier submap, as sure of themselves as true ones:
``false`` at random, ``aliased`` so that those of one submap agree with each other, as look-alikes
make them. What disturbs a walk depends on its seed alone, so that columns can be compared.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import similarity_fit
from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.config import BackendConfig, SubmapConfig
from stream3r_core.backend.verification import PairView
from stream3r_core.config import MappingConfig
from stream3r_core.synthetic.front_end import WALKS, SimulatedFrontEnd, make_walk

CONDITIONS = ('clean', 'false', 'aliased')
FALSE_SIGMAS = np.array([np.deg2rad(0.5)] * 3 + [0.06] * 3 + [0.02])


def ate(T_estimate: np.ndarray, T_truth: np.ndarray) -> float:
    """RMSE of positions [m] after the best similarity."""
    estimate, truth = T_estimate[:, :3, 3], T_truth[:, :3, 3]
    S = similarity_fit(estimate, truth, np.ones(len(truth)))
    return float(np.sqrt(np.square(sim3.act(S, estimate) - truth).sum(1).mean()))


def run_all(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Run one walk under all conditions; without true loops there are no false ones."""
    walk = make_walk(kind, seed, size_m=arguments.size)
    front_end = SimulatedFrontEnd(walk, seed, session_frames=arguments.frames)
    clean = run(front_end, seed, 'clean', arguments)
    found = {'clean': clean}
    for condition in set(arguments.conditions) - {'clean'}:
        again = front_end.restarted()
        found[condition] = run(again, seed, condition, arguments) if clean['loops'] else clean
    return found


def run(front_end, seed: int, condition: str, arguments: argparse.Namespace) -> dict:
    """Run one walk; return what is noted of it."""
    walk, frames = front_end.walk, arguments.frames
    false_share = 0.0 if condition == 'clean' else arguments.share
    rng = np.random.default_rng(1000 + seed)

    def predict(pairs):
        seen = [front_end.pair(a.frame_id, b.frame_id) for a, b in pairs]
        return [tuple(PairView(*view) for view in pair) for pair in seen]

    config = BackendConfig(submaps=SubmapConfig(max_frames=frames))
    backend = SubmapBackend(config, MappingConfig(voxel_size=0.1), predict)
    false, wrong = [], {}
    num_loops = 0
    for frame, prediction in front_end:
        update = backend.add(prediction, frame, lambda f=frame: front_end.descriptor(f))
        num_loops += len(update.loops)
        for _, j in update.loops:
            if rng.random() < false_share / (1 - false_share):
                fresh = (int(rng.integers(j)), sim3.exp(0.3 * rng.standard_normal(7)))
                i, S = wrong.setdefault(j, fresh) if condition == 'aliased' else fresh
                false.append(S @ sim3.exp(FALSE_SIGMAS * rng.standard_normal(7)))
                backend.propose_loop(i, j, false[-1], np.diag(FALSE_SIGMAS**2))
    backend.settle()
    frame_ids, _, T_map = backend.trajectory()
    truth = walk.T_world_camera[frame_ids]
    kept = [edge.measurement for edge in backend.graph.loops]
    return {
        'without': ate(backend.trajectory(corrected=False)[2], truth),
        'with': ate(T_map, truth),
        'submaps': len(backend.graph),
        'loops': num_loops,
        'kept': len(kept),
        'false': len(false),
        'false kept': sum(any(np.array_equal(S, m) for m in kept) for S in false),
    }


def summary(results: list[dict], clean: list[dict]) -> dict:
    """Medians and worst cases over the seeds."""
    errors = np.array([[r['without'], r['with']] for r in results])
    ratio = errors[:, 1] / errors[:, 0]
    change = np.abs(errors[:, 1] / [r['with'] for r in clean] - 1)
    return {
        'ate_m_medians': np.median(errors, 0).round(3).tolist(),
        'ratio_median': round(float(np.median(ratio)), 3),
        'ratio_worst': round(float(ratio.max()), 3),
        'seeds_above_one_fifth': np.flatnonzero(ratio > 0.2).tolist(),
        'change_by_false_median': round(float(np.median(change)), 4),
        'change_by_false_worst': round(float(change.max()), 4),
        **{name: sum(r[name] for r in results) for name in ('loops', 'false', 'false kept')},
    }


def main() -> None:
    """Read the arguments, run all walks, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--walks', nargs='+', choices=WALKS, default=WALKS)
    parser.add_argument('--conditions', nargs='+', choices=CONDITIONS, default=CONDITIONS)
    parser.add_argument('--seeds', type=int, default=20)
    parser.add_argument('--share', type=float, default=0.3, help='of false loops')
    parser.add_argument('--size', type=float, default=2.0, help='of the walk, 1 = tens of metres')
    parser.add_argument('--frames', type=int, default=24, help='frames of a submap')
    parser.add_argument('--jobs', type=int, default=1, help='walks at the same time')
    parser.add_argument('--output', type=Path, help='file for the figures')
    arguments = parser.parse_args()
    tables: dict[str, dict] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for kind in arguments.walks:
            settings = (range(arguments.seeds), repeat(arguments))
            seeds = list(pool.map(run_all, repeat(kind), *settings))
            for condition in CONDITIONS:
                if condition not in seeds[0]:
                    continue
                results, clean = ([seed[c] for seed in seeds] for c in (condition, 'clean'))
                told = summary(results, clean)
                print(f'{kind}, {condition}: {told}', flush=True)
                tables[f'{kind}, {condition}'] = {**told, 'seeds': results}
                if arguments.output is not None:
                    arguments.output.write_text(json.dumps(tables, indent=1) + '\n')


if __name__ == '__main__':
    main()
