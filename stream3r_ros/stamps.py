"""The order of images in time, one judgement for node and replay."""

from stream3r_core.errors import InputError

LEAP_S = 3600.0


class StampOrder:
    """Tells images that go on from those that are late, corrupt, or of another recording."""

    def __init__(self):
        self._noted_ns: int | None = None  # what was said at this stamp is not said otherwise
        self.reset()

    def reset(self) -> None:
        """Begin a new session: any stamp may be the first, but the one that was noted last."""
        self.last_ns: int | None = None  # of the last image that was taken
        self._leapt_to_ns: int | None = None  # too far off to be believed on its own

    def note(self, stamp_ns: int) -> None:
        """Remember the stamp of an image that has been taken."""
        self.last_ns = self._noted_ns = stamp_ns

    def check(self, stamp_ns: int, backward_jump_s: float) -> float:
        """Return the seconds since the last image, 0 at the first; negative: time jumped back.

        Raises :class:`InputError` for an image without a stamp, which 0 means in ROS, for one that
        repeats the last stamp or is less late than ``backward_jump_s``, and for one that is more
        than an hour away from the last one unless the one before it, likewise refused, leads up
        to it.
        """
        if stamp_ns <= 0:
            raise InputError(
                f'the image has no stamp ({stamp_ns} ns); does the camera driver set it?'
            )
        before, self._leapt_to_ns = self._leapt_to_ns, None
        if stamp_ns == self._noted_ns:
            raise InputError(f'the image has the stamp of the one before it ({stamp_ns} ns)')
        if self.last_ns is None:
            return 0.0
        ahead_s = (stamp_ns - self.last_ns) / 1e9
        if -backward_jump_s < ahead_s < 0:
            raise InputError(f'the image is {-ahead_s:.3f} s older than the one before')
        is_confirmed = before is not None and 0 < (stamp_ns - before) / 1e9 < LEAP_S
        if abs(ahead_s) > LEAP_S and not is_confirmed:
            self._leapt_to_ns = stamp_ns
            raise InputError(
                f'the stamp is {abs(ahead_s):.0f} s {"after" if ahead_s > 0 else "before"} the '
                'last one, which a second image would have to confirm'
            )
        return ahead_s
