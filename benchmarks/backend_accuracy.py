"""What the back end does to the trajectory error of a simulated front end, also with false loops.

    python benchmarks/backend_accuracy.py --walks laps petals corridor --seeds 20 --false 0 0.3

Per walk and seed: ATE (RMSE after Sim(3) alignment, since the unit of a monocular map is free) of
the chain of submaps alone and with the back end; then median and worst of their ratio. False loops
are injected after verification, on a random earlier submap, as sure of themselves as true ones.
With ``--aliased`` all false loops of one submap agree with each other, as look-alikes make them.
"""

import argparse

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import similarity_fit
from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.config import BackendConfig, SubmapConfig
from stream3r_core.backend.verification import PairView
from stream3r_core.config import MappingConfig
from stream3r_core.synthetic.front_end import WALKS, SimulatedFrontEnd, make_walk

FALSE_SIGMAS = np.array([np.deg2rad(0.5)] * 3 + [0.06] * 3 + [0.02])


def ate(T_estimate: np.ndarray, T_truth: np.ndarray) -> float:
    """RMSE of positions [m] after the best similarity."""
    estimate, truth = T_estimate[:, :3, 3], T_truth[:, :3, 3]
    S = similarity_fit(estimate, truth, np.ones(len(truth)))
    return float(np.sqrt(np.square(sim3.act(S, estimate) - truth).sum(1).mean()))


def run(kind: str, seed: int, size: float, frames: int, false_share: float, aliased=False) -> dict:
    """Run one walk; return what is printed."""
    walk = make_walk(kind, seed, size_m=size)
    front_end = SimulatedFrontEnd(walk, seed, session_frames=frames)
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
                i, S = wrong.setdefault(j, fresh) if aliased else fresh
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


def main() -> None:
    """Read the arguments, run all walks, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--walks', nargs='+', choices=WALKS, default=WALKS)
    parser.add_argument('--seeds', type=int, default=20)
    parser.add_argument('--false', type=float, nargs='+', default=[0.0], help='shares to try')
    parser.add_argument('--size', type=float, default=2.0, help='of the walk, 1 = tens of metres')
    parser.add_argument('--frames', type=int, default=24, help='frames of a submap')
    parser.add_argument('--aliased', action='store_true', help='false loops agree')
    arguments = parser.parse_args()
    for kind in arguments.walks:
        results: dict[float, list[dict]] = {share: [] for share in arguments.false}
        for seed in range(arguments.seeds):
            for share in arguments.false:
                settings = (arguments.size, arguments.frames, share, arguments.aliased)
                result = run(kind, seed, *settings)
                results[share].append(result)
                print(kind, seed, share, result, flush=True)
        for share in arguments.false:
            report(kind, share, results[share], results.get(0.0))


def report(kind: str, share: float, results: list[dict], clean: list[dict] | None) -> None:
    """Print median and worst of the ratios, and of the change that false loops make."""
    ratio = [r['with'] / r['without'] for r in results]
    errors = np.array([[r['without'], r['with']] for r in results])
    print(
        f'== {kind}, {share:.0%} false: ATE without {np.median(errors[:, 0]):.3f} m, with '
        f'{np.median(errors[:, 1]):.3f} m (medians); ratio median {np.median(ratio):.3f}, worst '
        f'{max(ratio):.3f}; false loops kept {sum(r["false kept"] for r in results)} of '
        f'{sum(r["false"] for r in results)}',
        flush=True,
    )
    if clean and share:
        change = [abs(r['with'] / c['with'] - 1) for r, c in zip(results, clean)]
        print(
            f'   change of ATE by false loops: median {np.median(change):.1%}, '
            f'worst {max(change):.1%}'
        )


if __name__ == '__main__':
    main()
