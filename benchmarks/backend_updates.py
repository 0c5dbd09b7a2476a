"""Time of incremental updates of a graph of 1,000 submaps, with loops and false loops.

    OMP_NUM_THREADS=2 python benchmarks/backend_updates.py --submaps 1000 --seeds 3

A camera goes round and round; every submap closes some loops to earlier rounds, a share of
them false. Per seed: milliseconds per update (median, p95, worst) on the wall clock and of
processor time (what an otherwise idle core would take), loops kept, error.
"""

import argparse
import time

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.arbiter import LoopArbiter
from stream3r_core.backend.pose_graph import PoseGraph

SUBMAPS_PER_ROUND = 50
RADIUS = 40.0
SIGMAS = np.array([np.deg2rad(0.5)] * 3 + [0.05] * 3 + [0.02])
LOOP_SIGMAS = 0.5 * SIGMAS


def places(count: int) -> np.ndarray:
    """True similarities [count, 4, 4] of submaps on a circle; the first is the map."""
    angle = 2 * np.pi * np.arange(count) / SUBMAPS_PER_ROUND
    xi = np.zeros((count, 7))
    xi[:, 2] = (angle + np.pi) % (2 * np.pi) - np.pi
    S = sim3.exp(xi)
    S[:, 0, 3], S[:, 1, 3] = RADIUS * np.sin(angle), RADIUS * (1 - np.cos(angle))
    return S


def run(num_submaps: int, false_share: float, seed: int, num_loops: int = 3) -> None:
    """Grow one graph and print what its updates cost."""
    rng, truth = np.random.default_rng(seed), places(num_submaps)
    covariance, loop_covariance = (np.diag(s**2) for s in (SIGMAS, LOOP_SIGMAS))
    graph = PoseGraph()
    arbiter = LoopArbiter(graph)
    graph.add_first(0, truth[0])
    seconds, false = [], []
    for k in range(1, num_submaps):
        step = sim3.inverse(truth[k - 1]) @ truth[k] @ sim3.exp(SIGMAS * rng.standard_normal(7))
        start = time.perf_counter(), time.process_time()
        graph.add_submap(k, k - 1, step, covariance)
        for i in range(k % SUBMAPS_PER_ROUND, k - 5, SUBMAPS_PER_ROUND)[-num_loops:]:
            error = LOOP_SIGMAS * rng.standard_normal(7)
            arbiter.propose(
                i, k, sim3.inverse(truth[i]) @ truth[k] @ sim3.exp(error), loop_covariance
            )
            if rng.random() < false_share / (1 - false_share):
                other = int(rng.integers(k))
                pose = sim3.exp(0.3 * rng.standard_normal(7))
                false.append(arbiter.propose(other, k, pose, loop_covariance))
        arbiter.optimise()
        graph.poses()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    position = np.array([graph.pose(k)[:3, 3] for k in graph.keys])
    rmse = np.sqrt(np.square(position - truth[:, :3, 3]).sum(1).mean())
    is_true = [edge not in false for edge in graph.loops]
    print(f'seed {seed}: {num_submaps} submaps, RMSE {rmse:.3f} m', end='; ')
    print(f'loops kept: {sum(is_true)} true, {len(is_true) - sum(is_true)} of {len(false)} false')
    for name, column in zip(('wall', 'processor'), np.array(seconds).T):
        p50, p95, worst = 1e3 * np.percentile(column, [50, 95, 100])
        print(f'  {name}: p50 {p50:.1f}, p95 {p95:.1f}, worst {worst:.1f} ms', flush=True)


def main() -> None:
    """Read the arguments and run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--submaps', type=int, default=1000)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--false', type=float, default=0.3, help='share of false loops')
    parser.add_argument('--loops', type=int, default=3, help='true loops of a submap, at most')
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        run(arguments.submaps, arguments.false, seed, arguments.loops)


if __name__ == '__main__':
    main()
