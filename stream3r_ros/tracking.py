"""Can the poses be believed? A state from confidence and motion, with hysteresis."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import Uncertainty, mean_confidence, median_depth
from stream3r_ros.config import TrackingConfig

OK, DEGRADED, LOST = 'OK', 'DEGRADED', 'LOST'
_UNFITTED = {'min_confidence': 1.5, 'lost_confidence': 1.1}  # chosen


class Quality(NamedTuple):
    """What one frame says about itself and the step from the one before."""

    confidence: float  # mean over the pixels, >= 1
    parallax: float  # camera motion over median depth; 0 for the first frame
    turn: float  # rad


class TrackingState:
    """Follows the quality of a session frame by frame.

    One doubtful frame makes the state DEGRADED; ``tracking.patience`` hopeless ones in a row make
    it LOST, and as many better ones in a row bring it back. :attr:`num_lost` counts the frames
    since it was LOST.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin a new session."""
        self.state, self.num_lost = OK, 0
        self.quality = Quality(np.nan, 0.0, 0.0)
        self._streaks = {OK: 0, LOST: 0}
        self._last_pose: np.ndarray | None = None

    def update(self, prediction: FramePrediction, config: TrackingConfig) -> str:
        """Take the next frame of the session, on the CPU; return the state after it."""
        T_world_camera = prediction.T_world_camera.double().numpy()
        self.quality = _quality(prediction, T_world_camera, self._last_pose)
        self._last_pose = T_world_camera
        verdict = judge(self.quality, config)
        for state in self._streaks:
            self._streaks[state] = self._streaks[state] + 1 if verdict == state else 0
        if self._streaks[LOST] >= config.patience:
            self.state = LOST
        elif self._streaks[OK] >= config.patience:
            self.state = OK
        elif verdict != OK and self.state == OK:
            self.state = DEGRADED
        self.num_lost = self.num_lost + 1 if self.state == LOST else 0
        return self.state


def with_fitted_limits(config: TrackingConfig, fitted: Uncertainty | None) -> TrackingConfig:
    """Return the options with the confidences that are left open (0) filled in.

    An image that is no better than pure noise is doubtful, one no better than a covered lens lost.
    """
    limits = _UNFITTED
    if fitted is not None:
        lost = fitted.covered_confidence
        limits = {'min_confidence': max(fitted.noise_confidence, lost), 'lost_confidence': lost}
    filled = {name: limit for name, limit in limits.items() if not getattr(config, name)}
    return replace(config, **filled)


def judge(quality: Quality, config: TrackingConfig) -> str:
    """Return what a single frame deserves: OK, DEGRADED or LOST."""
    if not quality.confidence >= config.lost_confidence or not np.isfinite(quality).all():
        return LOST
    is_sure = quality.confidence >= config.min_confidence
    is_smooth = quality.parallax <= config.max_parallax and quality.turn <= config.max_turn
    return OK if is_sure and is_smooth else DEGRADED


def _quality(
    prediction: FramePrediction, T_world_camera: np.ndarray, T_world_last: np.ndarray | None
) -> Quality:
    confidence = mean_confidence(prediction.depth_conf)
    if T_world_last is None:
        return Quality(confidence, 0.0, 0.0)
    motion = np.linalg.norm(T_world_camera[:3, 3] - T_world_last[:3, 3])
    cosine = (np.trace(T_world_last[:3, :3].T @ T_world_camera[:3, :3]) - 1) / 2
    turn = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return Quality(confidence, float(motion / median_depth(prediction.depth)), turn)
