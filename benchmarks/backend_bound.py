"""What the best estimator could make of the simulated loops: a bound for backend_accuracy.py.

    python benchmarks/backend_bound.py --walks eight ring --jobs 2 \
        --output benchmarks/results/backend_bound.json

The drift of every session is a Gaussian vector [7] of known covariance. Given the true relative
poses of all frames that see one place again, its posterior mean is the best there is, to first
order. Per seed: ATE after that over ATE without loops, for the drift that backend_accuracy.py has
with this seed, and for 20 other draws. ``--noise 0``: revisits are measured exactly; 1: to 0.25
degrees, 5 cm and 1 %.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import similarity_fit
from stream3r_core.synthetic.front_end import (
    WALKS,
    Disturbance,
    SimulatedFrontEnd,
    Walk,
    make_walk,
)

FRAMES, OVERLAP, DRAWS, EPSILON = 24, 3, 20, 1e-5
PAIR_SIGMAS = np.array([np.deg2rad(0.25)] * 3 + [0.05] * 3 + [0.01])


def sessions_of(count: int) -> list[range]:
    """Return the frames of each session."""
    starts = range(0, max(count - OVERLAP, 1), FRAMES - OVERLAP)
    return [range(start, min(start + FRAMES, count)) for start in starts]


def chain(walk: Walk, sessions: list[range], drift: np.ndarray) -> np.ndarray:
    """Similarities [N, 4, 4] of all frames for drifts [K, 7], joined on a shared frame."""
    S: dict[int, np.ndarray] = {}
    for frames, d in zip(sessions, drift):
        d, pose, scale = d / (len(frames) - 1), np.eye(4), 1.0
        poses = [np.eye(4)]
        for a, b in pairwise(frames):
            step = sim3.inverse(walk.T_world_camera[a]) @ walk.T_world_camera[b]
            step[:3, :3] = step[:3, :3] @ sim3.rotation_exp(d[:3])
            step[:3, 3] = scale * (step[:3, 3] + d[3:6])
            pose, scale = pose @ step, scale * np.exp(d[6])
            poses.append(pose @ sim3.from_parts(scale, np.eye(3), np.zeros(3)))
        shared = frames[1] in S
        S_map = S[frames[1]] @ sim3.inverse(poses[1]) if shared else walk.T_world_camera[0]
        for frame, pose in zip(frames, poses):
            S.setdefault(frame, S_map @ pose)
    return np.array([S[frame] for frame in range(len(S))])


def revisits(front_end: SimulatedFrontEnd) -> list[tuple[int, int]]:
    """Pairs of frames that see one place, the nearest old one to every other frame."""
    position, pairs = front_end.walk.T_world_camera[:, :3, 3], []
    for j in range(80, len(position), 2):
        i = int(np.linalg.norm(position[: j - 80] - position[j], axis=1).argmin()) if j > 80 else 0
        if front_end.is_revisit(i, j):
            pairs.append((i, j))
    return pairs


def ate(estimate: np.ndarray, truth: np.ndarray) -> float:
    """RMSE of positions [N, 3] after the best similarity."""
    S = similarity_fit(estimate, truth, np.ones(len(truth)))
    return float(np.sqrt(np.square(sim3.act(S, estimate) - truth).sum(1).mean()))


def bound(kind: str, seed: int, size_m: float, noise: float) -> np.ndarray:
    """Ratios [1 + DRAWS] of the ATE with the best estimate and without loops."""
    walk = make_walk(kind, seed, size_m=size_m)
    front_end = SimulatedFrontEnd(walk, seed, session_frames=FRAMES, overlap=OVERLAP)
    sessions, truth = sessions_of(len(walk.stamps_ns)), walk.T_world_camera[:, :3, 3]
    size, sigmas = Disturbance(), []
    for frames in sessions:
        path = np.linalg.norm(np.diff(truth[list(frames)], axis=0), axis=1).sum()
        turn, way = np.deg2rad(size.rotation_deg), size.translation * path
        sigmas.append([turn] * 3 + [way] * 3 + [size.scale])
    sigma, exact = np.ravel(sigmas), chain(walk, sessions, np.zeros((len(sessions), 7)))
    first, last = np.array(revisits(front_end)).T
    relative = sim3.inverse(exact[first]) @ exact[last]
    J_position, J_loop = [], []
    for unit in EPSILON * np.eye(sigma.size):
        S = chain(walk, sessions, unit.reshape(-1, 7))
        J_position.append((S[:, :3, 3] - truth).ravel() / EPSILON)
        moved = sim3.inverse(relative) @ sim3.inverse(S[first]) @ S[last]
        J_loop.append(sim3.log(moved).ravel() / EPSILON)
    Jp, Jl = np.array(J_position).T, np.array(J_loop).T
    pair = np.tile(noise * PAIR_SIGMAS, len(first))
    scaled = Jl * sigma**2
    gain = np.linalg.solve(scaled @ Jl.T + np.diag(pair**2 + 1e-12), scaled).T
    rng, ratios = np.random.default_rng(seed), []
    steps = [front_end.drift(k, frames) * (len(frames) - 1) for k, frames in enumerate(sessions)]
    draws = [sigma * rng.standard_normal(sigma.size) for _ in range(DRAWS)]
    for drift in (np.ravel(steps), *draws):
        left = drift - gain @ (Jl @ drift + pair * rng.standard_normal(pair.size))
        errors = [ate(truth + (Jp @ d).reshape(-1, 3), truth) for d in (left, drift)]
        ratios.append(errors[0] / errors[1])
    return np.array(ratios)


def main() -> None:
    """Read the arguments and run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--walks', nargs='+', default=['eight', 'ring'], choices=WALKS)
    parser.add_argument('--seeds', type=int, default=20)
    parser.add_argument('--size', type=float, default=2.0, help='of the walk')
    parser.add_argument('--noise', type=float, default=1.0, help='of the revisits')
    parser.add_argument('--jobs', type=int, default=1, help='seeds at the same time')
    parser.add_argument('--output', type=Path, help='file for the figures')
    arguments = parser.parse_args()
    tables = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for kind in arguments.walks:
            settings = (repeat(arguments.size), repeat(arguments.noise))
            found = pool.map(bound, repeat(kind), range(arguments.seeds), *settings)
            ratios = np.array(list(found))
            own, draws = ratios[:, 0], ratios[:, 1:]
            told = {
                'own_median': round(float(np.median(own)), 3),
                'own_worst': round(float(own.max()), 3),
                'own': own.round(3).tolist(),
                'draws_median': round(float(np.median(draws)), 3),
                'draws_worst': round(float(draws.max()), 3),
                'draws_above_one_fifth': round(float((draws > 0.2).mean()), 3),
            }
            print(f'{kind}: {told}', flush=True)
            tables[kind] = told
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(tables, indent=1) + '\n')


if __name__ == '__main__':
    main()
