"""Submaps on a ring with exact truth, and pose graphs of their disturbed chain."""

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.pose_graph import PoseGraph

pytest.importorskip('gtsam', reason='extra "backend" is not installed')

SIGMAS = np.array([np.deg2rad(0.5)] * 3 + [0.05] * 3 + [0.02])
DRIFT = np.diag(SIGMAS**2)
EXACT = np.diag((0.2 * SIGMAS) ** 2)


def ring(count, radius=20.0, laps=1.0):
    """Submaps [count, 4, 4] on a circle, the first at the origin; scales differ."""
    angle = 2 * np.pi * laps * np.arange(count) / (count - 1)
    xi = np.zeros((count, 7))
    xi[:, 2] = (angle + np.pi) % (2 * np.pi) - np.pi
    S = sim3.exp(xi)
    S[:, 0, 3], S[:, 1, 3] = radius * np.sin(angle), radius * (1 - np.cos(angle))
    scale = np.exp(0.3 * np.sin(3 * angle))[:, None, None]
    S[:, :3, :3] *= scale
    return S


def between(S, i, j):
    return sim3.inverse(S[i]) @ S[j]


def disturbed(S, rng, sigmas=SIGMAS):
    return S @ sim3.exp(sigmas * rng.standard_normal(7))


def chain(truth, rng, sigmas=SIGMAS, config=None):
    graph = PoseGraph(config)
    graph.add_first(0, truth[0])
    for k in range(1, len(truth)):
        graph.add_submap(k, k - 1, disturbed(between(truth, k - 1, k), rng, sigmas), DRIFT)
    graph.step()
    return graph


def error(graph, truth):
    estimate = np.array([graph.pose(k) for k in graph.keys])
    return np.sqrt(np.mean(np.sum((estimate - truth[graph.keys])[:, :3, 3] ** 2, -1)))
