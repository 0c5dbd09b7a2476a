"""When a front end ends its session, so that the next frames begin a new submap."""

from collections import deque

import torch

from stream3r_core.backend.config import SubmapConfig
from stream3r_core.types import FramePrediction

_MIN_HISTORY = 5  # frames before quality is judged


class RestartPolicy:
    """Watches one session; the front end asks it around every frame.

    Before a frame, :meth:`is_pause`: after a pause the old session cannot track the frame, so it
    is reset first and nothing overlaps. After a frame, :meth:`reason`: where there is one, the
    front end resets its session, feeds the last ``overlap`` frames again and goes on. A frame of
    reason ``'pose'`` is good for nothing and is not given to the back end.
    """

    def __init__(self, config: SubmapConfig | None = None):
        self.config = config or SubmapConfig()
        self.reset()

    def reset(self) -> None:
        """Forget the session that has ended."""
        self._num_frames = 0
        self._last_stamp_ns: int | None = None
        self._quality: deque[float] = deque(maxlen=self.config.max_frames)

    def is_pause(self, stamp_ns: int | None) -> bool:
        """Whether too long has passed since the last frame, or time went back."""
        if stamp_ns is None or self._last_stamp_ns is None:
            return False
        elapsed_s = (stamp_ns - self._last_stamp_ns) / 1e9
        return not 0 <= elapsed_s <= self.config.max_gap_s

    def reason(self, prediction: FramePrediction) -> str:
        """Why the session should end with this frame: 'pose', 'quality', 'length' or ''.

        'pose': it is not finite. 'quality': the frame's confidence has fallen far below that of
        the session.
        """
        self._num_frames += 1
        if prediction.stamp_ns is not None:
            self._last_stamp_ns = prediction.stamp_ns
        if not torch.isfinite(prediction.T_world_camera).all():
            return 'pose'
        quality = float(prediction.depth_conf.float().nanmedian()) - 1
        usual = sorted(self._quality)[len(self._quality) // 2] if self._quality else quality
        self._quality.append(quality)
        has_history = len(self._quality) > _MIN_HISTORY
        if has_history and not quality >= self.config.min_quality * usual:  # also for NaN
            return 'quality'
        return 'length' if self._num_frames >= self.config.max_frames else ''
