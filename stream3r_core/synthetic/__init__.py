"""Synthetic rooms: seeded, batched ray casting with exact depth, pose and intrinsics."""

from stream3r_core.synthetic.clips import (
    ClipConfig,
    Clips,
    SyntheticSequence,
    render_sequence,
    sample_clips,
)
from stream3r_core.synthetic.trajectories import CALM, DRONE, HAND_HELD, WHEELED, Motion

__all__ = [
    'CALM',
    'DRONE',
    'HAND_HELD',
    'WHEELED',
    'ClipConfig',
    'Clips',
    'Motion',
    'SyntheticSequence',
    'render_sequence',
    'sample_clips',
]
