"""The transforms that others broadcast: a bounded buffer with interpolation, between threads.

Own code, as tf2_ros is not among the published wheels; the rules are those of tf2: a chain of
edges to a common ancestor, interpolated between two stamps, never extrapolated.
"""

import threading
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from stream3r_core.errors import InputError, Stream3rError
from stream3r_ros.conversions import stamp_ns

HISTORY_NS = 10 * 10**9  # kept of each edge, as in tf2
JUMP_NS = 10**9 // 2  # an edge whose stamps go back by more begins anew: the recording loops
MAX_SAMPLES = 5000  # of one edge: 500 Hz for the whole history
MAX_EDGES = 2000


class TransformError(Stream3rError):
    """A transform is not known; there is no value to go on with."""


class _Sample(NamedTuple):
    stamp_ns: int
    translation: tuple[float, float, float]  # metres
    quat_xyzw: tuple[float, float, float, float]


class _Edge:
    """What is known of one child frame in its parent."""

    def __init__(self, parent: str, is_static: bool):
        self.parent = parent
        self.is_static = is_static
        self._samples: list[_Sample] = []

    def add(self, sample: _Sample) -> None:
        samples = self._samples
        if self.is_static or (samples and sample.stamp_ns < samples[-1].stamp_ns - JUMP_NS):
            samples.clear()
        if not samples or sample.stamp_ns > samples[-1].stamp_ns:
            samples.append(sample)
        else:
            insort(samples, sample)
        oldest_ns = samples[-1].stamp_ns - HISTORY_NS
        if samples[0].stamp_ns < oldest_ns or len(samples) > MAX_SAMPLES:
            first = bisect_left(samples, oldest_ns, key=lambda s: s.stamp_ns)
            del samples[: max(first, len(samples) - MAX_SAMPLES)]

    def at(self, stamp: int) -> np.ndarray:
        """Return T_parent_child [4, 4] at a stamp; raises TransformError outside the history."""
        samples = self._samples
        if self.is_static:
            return _matrix(samples[-1])
        after = bisect_left(samples, stamp, key=lambda s: s.stamp_ns)
        if after < len(samples) and samples[after].stamp_ns == stamp:
            return _matrix(samples[after])
        if after == len(samples):
            late_s = (stamp - samples[-1].stamp_ns) / 1e9
            raise TransformError(f'the newest is {late_s:.3f} s older than the image')
        if after == 0:
            early_s = (samples[0].stamp_ns - stamp) / 1e9
            raise TransformError(f'the oldest is {early_s:.3f} s newer than the image')
        return _between(samples[after - 1], samples[after], stamp)


class TransformBuffer:
    """Takes tf2_msgs/TFMessage, gives poses of frames in frames. Safe between threads."""

    def __init__(self):
        self._edges: dict[str, _Edge] = {}  # by child frame
        self._changed = threading.Condition()

    def add(self, message: Any, is_static: bool = False) -> None:
        """Take the transforms of a message from /tf, or ``is_static`` from /tf_static.

        Raises:
            InputError: One is not rigid, or there are more than 2000 edges; the rest is taken.

        """
        problem = None
        with self._changed:
            for transform in message.transforms:
                try:
                    self._add(transform, is_static)
                except InputError as error:
                    problem = error
            self._changed.notify_all()
        if problem is not None:
            raise problem

    def lookup(self, frame: str, child: str, stamp: int, timeout_s: float = 0.0) -> np.ndarray:
        """Return T_frame_child [4, 4] float64, metres, at a stamp in nanoseconds.

        Waits up to ``timeout_s`` for transforms that are on their way. Raises
        :class:`TransformError` where the frames are not connected or the stamp is outside of what
        is known: nothing is extrapolated.
        """
        found: list[np.ndarray | TransformError] = []

        def is_found() -> bool:
            try:
                found[:] = [self._lookup(frame, child, stamp)]
            except TransformError as error:
                found[:] = [error]
            return not isinstance(found[0], TransformError)

        with self._changed:
            self._changed.wait_for(is_found, timeout_s)
        if isinstance(found[0], TransformError):
            raise TransformError(f'no transform from {frame!r} to {child!r}: {found[0]}')
        return found[0]

    def _add(self, transform: Any, is_static: bool) -> None:
        sample, parent = _sample(transform), transform.header.frame_id
        edge = self._edges.get(transform.child_frame_id)
        if edge is None or edge.parent != parent or edge.is_static != is_static:
            if edge is None and len(self._edges) >= MAX_EDGES:
                raise InputError(f'more than {MAX_EDGES} frames on /tf: further ones are left out')
            edge = self._edges[transform.child_frame_id] = _Edge(parent, is_static)
        edge.add(sample)

    def _lookup(self, frame: str, child: str, stamp: int) -> np.ndarray:
        above = [frame, *(edge.parent for edge in self._chain(frame))]
        T_ancestor_child, reached = np.eye(4), child
        for edge in self._chain(child):
            if reached in above:
                break
            T_ancestor_child = edge.at(stamp) @ T_ancestor_child
            reached = edge.parent
        if reached not in above:
            raise TransformError(f'{reached!r} has no parent, and {frame!r} is not above it')
        T_ancestor_frame = np.eye(4)
        for edge, below in zip(self._chain(frame), above):
            if below == reached:
                break
            T_ancestor_frame = edge.at(stamp) @ T_ancestor_frame
        return np.linalg.inv(T_ancestor_frame) @ T_ancestor_child

    def _chain(self, frame: str) -> Iterator[_Edge]:
        """Yield the edges from a frame up to the root; a loop ends when all have been passed."""
        for _ in range(len(self._edges)):
            edge = self._edges.get(frame)
            if edge is None:
                return
            yield edge
            frame = edge.parent


def _sample(transform: Any) -> _Sample:
    moved, turned = transform.transform.translation, transform.transform.rotation
    translation, quat = (moved.x, moved.y, moved.z), (turned.x, turned.y, turned.z, turned.w)
    length = float(np.linalg.norm(quat))
    if not (np.isfinite([*translation, *quat]).all() and abs(length - 1) < 0.1):
        raise InputError(
            f'the transform {transform.header.frame_id!r} -> {transform.child_frame_id!r} is not '
            f'rigid: translation {translation}, quaternion {quat}'
        )
    return _Sample(stamp_ns(transform), translation, quat)


def _matrix(sample: _Sample) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat(sample.quat_xyzw).as_matrix()
    T[:3, 3] = sample.translation
    return T


def _between(before: _Sample, after: _Sample, stamp: int) -> np.ndarray:
    share = (stamp - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
    turns = Rotation.from_quat([before.quat_xyzw, after.quat_xyzw])
    T = np.eye(4)
    T[:3, :3] = Slerp([0.0, 1.0], turns)(share).as_matrix()
    T[:3, 3] = (1 - share) * np.array(before.translation) + share * np.array(after.translation)
    return T
