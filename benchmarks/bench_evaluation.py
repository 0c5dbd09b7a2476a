"""Time and memory of the metrics on a long run: 10,000 poses and maps of 5 million points.

python benchmarks/bench_evaluation.py [--poses 10000] [--points 5000000]
"""

import argparse
import resource
import time
from contextlib import contextmanager

import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.errors import MissingDependencyError
from stream3r_core.evaluation.reconstruction import cloud_errors, estimate_normals, icp
from stream3r_core.evaluation.trajectory import Trajectory, ate, drift, relative_pose_auc, rpe


def walk(num, rng):
    poses = np.tile(np.eye(4), (num, 1, 1))
    poses[:, :3, 3] = np.cumsum(rng.normal(0.01, 0.02, (num, 3)), axis=0)
    turns = np.cumsum(rng.normal(0, 0.01, (num, 3)), axis=0)
    poses[:, :3, :3] = Rotation.from_rotvec(turns).as_matrix()
    return Trajectory(33_333_333 * np.arange(num), poses)


def room(num, rng):
    """Points on the walls of a room of 6 m x 6 m x 3 m."""
    points = rng.random((num, 3)) * [6, 6, 3]
    axis = rng.integers(0, 2, num)
    points[np.arange(num), axis] = 6 * rng.integers(0, 2, num)
    return points


@contextmanager
def timed(what, totals):
    started = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    totals.append((wall, cpu))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f'{what:<40} {wall:7.2f} s, {cpu:7.2f} s of CPU, peak {peak:.2f} GiB', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--poses', type=int, default=10_000)
    parser.add_argument('--points', type=int, default=5_000_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    truth = walk(args.poses, rng)
    noisy = truth.T_world_camera.copy()
    noisy[:, :3, 3] = noisy[:, :3, 3] * 0.4 + rng.normal(0, 0.01, (args.poses, 3))
    estimate = Trajectory(truth.stamps_ns, noisy)
    true_map = room(args.points, rng)
    predicted = room(args.points, rng) + rng.normal(0, 0.01, (args.points, 3))
    totals: list[tuple[float, float]] = []
    for alignment in ('se3', 'sim3'):
        with timed(f'ATE, {alignment}', totals):
            ate(truth, estimate, alignment)
        for relation in ('translation', 'rotation'):
            with timed(f'RPE {relation}, {alignment}', totals):
                rpe(truth, estimate, relation, alignment)
        with timed(f'drift, {alignment}', totals):
            drift(truth, estimate, alignment)
    with timed('relative pose AUC', totals):
        relative_pose_auc(truth, estimate)
    with timed('nearest neighbours, both directions', totals):
        cloud_errors(predicted, true_map)
    wall, cpu = map(sum, zip(*totals))
    print(f'{"together":<40} {wall:7.2f} s, {cpu:7.2f} s of CPU')
    try:
        with timed('normals of both maps (Open3D), apart', []):
            estimate_normals(predicted), estimate_normals(true_map)
        with timed('ICP on a voxel subset (Open3D), apart', []):
            result = icp(predicted, true_map)
        print(f'ICP grid {result.voxel_m:.4f} m, {result.num_points} points')
    except MissingDependencyError as error:
        print(f'skipped: {error}')


if __name__ == '__main__':
    main()
