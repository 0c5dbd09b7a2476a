"""Walks that come home, seen by a scripted network."""

from stream3r_core.config import CoreConfig, from_dict
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk
from stream3r_core.synthetic.scripted import SIZE_HW, ScriptedNetwork

FRAMES = 16  # of a submap
MAPPING = {'voxel_size': 0.2, 'edge_ratio': 0.0}


def returning_walk():
    return make_walk('laps', 0, size_m=0.4)


def scripted(walk, seed=0):
    return ScriptedNetwork(SimulatedFrontEnd(walk, seed, session_frames=FRAMES, size_hw=SIZE_HW))


def config(kind='submaps', submaps=None, **backend):
    submaps = {'max_frames': FRAMES, **(submaps or {})}
    return from_dict(
        CoreConfig,
        {'backend': {'kind': kind, 'submaps': submaps, **backend}, 'mapping': MAPPING},
    )
