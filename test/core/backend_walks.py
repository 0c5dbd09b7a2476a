"""Back ends fed by the simulated front end."""

import numpy as np
import pytest

from stream3r_core.backend import sim3
from stream3r_core.backend.alignment import similarity_fit
from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.config import BackendConfig, SubmapConfig
from stream3r_core.backend.verification import PairView
from stream3r_core.config import MappingConfig

pytest.importorskip('gtsam', reason='extra "backend" is not installed')

FRAMES = 24  # of a session
CONFIG = BackendConfig(submaps=SubmapConfig(max_frames=FRAMES))


def pairs_of(front_end):
    def predict(pairs):
        count = len(front_end.walk.stamps_ns)  # frame numbers go on in a walk that is repeated
        seen = [front_end.pair(a.frame_id % count, b.frame_id % count) for a, b in pairs]
        return [tuple(PairView(*view) for view in pair) for pair in seen]

    return predict


def make_backend(front_end, config=CONFIG):
    return SubmapBackend(config, MappingConfig(voxel_size=0.1), pairs_of(front_end))


def feed(backend, front_end, frames=None, shift=0):
    """Feed all frames, or those of sessions given as ranges; return the updates."""
    source = (
        iter(front_end) if frames is None else (p for r in frames for p in front_end.session(r))
    )
    return [
        backend.add(prediction, shift + frame, lambda f=frame: front_end.descriptor(f))
        for frame, prediction in source
    ]


def ate(T_estimate, T_truth):
    """RMSE of positions after the best similarity."""
    estimate, truth = T_estimate[:, :3, 3], T_truth[:, :3, 3]
    S = similarity_fit(estimate, truth, np.ones(len(truth)))
    return float(np.sqrt(np.square(sim3.act(S, estimate) - truth).sum(1).mean()))
