"""A simulated streaming front end: exact geometry along a walk, disturbed as a network errs.

The world is a hall with a floor, a ceiling and cylindrical pillars beside the walk; depth is cast
in closed form. Each session (submap) has its own unit and drifts evenly along its frames; depths
carry noise and outliers. World axes: z up; cameras have OpenCV axes.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from stream3r_core.errors import ConfigError
from stream3r_core.image import ImageGeometry
from stream3r_core.types import FramePrediction

WALKS = ('laps', 'eight', 'petals', 'ring', 'corridor', 'spiral')
CAMERA_HEIGHT_M, CEILING_M, PILLAR_RADIUS_M, RANGE_M = 1.2, 3.0, 0.4, 15.0
_CLEARANCE_M = 1.2  # of pillars from the walk


@dataclass(frozen=True)
class Disturbance:
    """Errors of the front end; standard deviations over one session."""

    scale: float = 0.02
    rotation_deg: float = 0.5
    translation: float = 0.01  # of the session's path
    outliers: float = 0.2  # share of pixels with a wrong depth
    depth_noise: float = 0.01  # relative
    unit: float = 0.1  # of the log of the session's unit in metres
    pair: float = 0.01  # of a pair of images seen together: parts of its depth, and rad / 4


@dataclass(frozen=True)
class Walk:
    """A camera's true way."""

    T_world_camera: np.ndarray  # [N, 4, 4] metres
    stamps_ns: np.ndarray  # [N] int64


def make_walk(kind: str, seed: int, step_m: float = 0.4, size_m: float = 1.0) -> Walk:
    """Return one of ``WALKS``, with seeded proportions; ``size_m`` scales its extent.

    'laps': three times around a block; 'eight': a figure of eight, twice; 'petals': one
    corridor four times, back along four ways; 'ring': once around, with a short overlap;
    'corridor' and 'spiral' never come back.
    """
    if kind not in WALKS:
        raise ConfigError(f'unknown walk {kind!r}; expected one of {", ".join(WALKS)}')
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.85, 1.15, 2) * size_m
    corners = {
        'laps': _block(16 * a, 10 * b) * 3,
        'eight': (_block(11 * a, 10 * b) + _block(-11 * a, -10 * b)) * 2,
        'petals': [p for r in (9, -9, 15, -15) for p in _block(18 * a, r * b)] + [(0, 0), (9, 0)],
        'ring': [*_block(24 * a, 18 * b), (0, 0), (5 * a, 0)],
        'corridor': [(0, 0), (60 * a, 0), (60 * a, 25 * b), (110 * a, 25 * b)],
        'spiral': _spiral(7 * a, 7 * b),
    }[kind]
    positions = _resample(_rounded(np.array(corners, float)), step_m)
    heading = np.unwrap(np.arctan2(*np.gradient(positions, axis=0).T[::-1]))
    return Walk(_level_cameras(positions, heading, rng), 100_000_000 * np.arange(len(positions)))


def _block(x: float, y: float) -> list[tuple[float, float]]:
    return [(0, 0), (x, 0), (x, y), (0, y)]


def _spiral(x: float, y: float) -> list[tuple[float, float]]:
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
    corner, corners = np.zeros(2), [(0.0, 0.0)]
    for leg in range(1, 9):
        corner = corner + np.array(turns[leg % 4]) * np.array([x, y]) * ((leg + 1) // 2) * 1.2
        corners.append(tuple(corner))
    return corners


def _rounded(corners: np.ndarray, radius: float = 2.0) -> np.ndarray:
    """Replace each corner by a short curve."""
    points = [corners[:1]]
    u = np.linspace(0, 1, 12)[:, None]
    for before, at, after in zip(corners, corners[1:], corners[2:]):
        enter = at + radius * (before - at) / np.linalg.norm(before - at)
        leave = at + radius * (after - at) / np.linalg.norm(after - at)
        points.append((1 - u) ** 2 * enter + 2 * u * (1 - u) * at + u**2 * leave)
    return np.concatenate([*points, corners[-1:]])


def _resample(points: np.ndarray, step_m: float) -> np.ndarray:
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.arange(0, along[-1], step_m)
    return np.stack([np.interp(at, along, axis) for axis in points.T], 1)


def _level_cameras(positions: np.ndarray, heading: np.ndarray, rng) -> np.ndarray:
    """Cameras [N, 4, 4] that look ahead and a little down, with a slight sway."""
    time = np.arange(len(positions))
    sway = 0.03 * np.sin(0.21 * time + rng.uniform(0, 6))
    forward = Rotation.from_euler('ZY', np.stack([heading, 0.1 + sway], 1))
    optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float)
    T = np.tile(np.eye(4), (len(positions), 1, 1))
    T[:, :3, :3] = forward.as_matrix() @ optical
    T[:, :2, 3] = positions
    T[:, 2, 3] = CAMERA_HEIGHT_M + 0.05 * np.sin(0.13 * time)
    return T


class PillarHall:
    """Floor, ceiling and pillars; none stands on the walk."""

    def __init__(self, walk: Walk, seed: int, pillars_per_m2: float = 0.12):
        rng = np.random.default_rng(seed)
        way = walk.T_world_camera[:, :2, 3]
        low, high = way.min(0) - RANGE_M / 2, way.max(0) + RANGE_M / 2
        count = int(pillars_per_m2 * np.prod(high - low))
        centres = rng.uniform(low, high, (count, 2))
        nearest = np.full(count, np.inf)
        for part in np.array_split(way, 1 + len(way) // 200):
            distance = np.linalg.norm(centres[:, None] - part, axis=-1).min(1)
            nearest = np.minimum(nearest, distance)
        self.centres = centres[(nearest > _CLEARANCE_M) & (nearest < RANGE_M / 2)]

    def depth(self, T_world_camera: np.ndarray, K: np.ndarray, size_hw) -> np.ndarray:
        """Depth [H, W] along the optical axis, metres; 0 beyond ``RANGE_M``."""
        v, u = np.mgrid[: size_hw[0], : size_hw[1]]
        rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1)
        rays = rays.reshape(-1, 3) @ T_world_camera[:3, :3].T
        origin = T_world_camera[:3, 3]
        surface = np.where(rays[:, 2] > 0, CEILING_M - origin[2], -origin[2])
        with np.errstate(divide='ignore'):
            depth = surface / rays[:, 2]
        depth = np.minimum(depth, self._pillar_depth(rays, origin)).reshape(size_hw)
        return np.where(depth < RANGE_M, depth, 0)

    def _pillar_depth(self, rays: np.ndarray, origin: np.ndarray) -> np.ndarray:
        offset = origin[:2] - self.centres
        offset = offset[np.linalg.norm(offset, axis=1) < RANGE_M + PILLAR_RADIUS_M]
        flat = rays[:, None, :2]  # [R, 1, 2] against [P, 2]
        a = np.square(flat).sum(-1)
        b = (flat * offset).sum(-1)
        root = b**2 - a * (np.square(offset).sum(-1) - PILLAR_RADIUS_M**2)
        with np.errstate(invalid='ignore'):
            depth = (-b - np.sqrt(root)) / a
        return np.where((root > 0) & (depth > 0), depth, np.inf).min(1, initial=np.inf)


class SimulatedFrontEnd:
    """Predictions of sessions along a walk, of pairs of its frames, and descriptors of places.

    What a session errs by does not depend on what else was asked for: the same walk is disturbed
    in the same way with any back end.
    """

    def __init__(
        self,
        walk: Walk,
        seed: int,
        disturbance: Disturbance | None = None,
        session_frames: int = 24,
        overlap: int = 3,
        size_hw: tuple[int, int] = (24, 32),
    ):
        self.walk, self.disturbance = walk, disturbance or Disturbance()
        self.session_frames, self.overlap, self.size_hw = session_frames, overlap, size_hw
        self.hall = PillarHall(walk, seed)
        self._exact: dict[int, np.ndarray] = {}  # depth of the frames seen so far, metres
        self._seed, self._num_sessions = seed, 0
        self._rng = np.random.default_rng(seed + 1)  # of pairs and descriptors
        height, width = size_hw
        self.K = np.array([[0.6 * width, 0, width / 2], [0, 0.6 * width, height / 2], [0, 0, 1]])
        features = np.random.default_rng(7)  # the same for all walks, as one network would
        self._waves = features.standard_normal((4, 256)) / np.array([2.5, 2.5, 0.6, 0.6])[:, None]
        self._phase = features.uniform(0, 2 * np.pi, 256)

    def restarted(self) -> 'SimulatedFrontEnd':
        """Return the same front end from its start; exact depths are not cast again."""
        again = copy.copy(self)
        again._num_sessions, again._rng = 0, np.random.default_rng(self._seed + 1)
        return again

    def __iter__(self) -> Iterator[tuple[int, FramePrediction]]:
        """Frame numbers and predictions; sessions begin with the last frames of those before."""
        start, count = 0, len(self.walk.stamps_ns)
        while True:
            end = min(start + self.session_frames, count)
            yield from self.session(range(start, end))
            if end == count:
                return
            start = end - self.overlap

    def session(self, frames: Sequence[int]) -> Iterator[tuple[int, FramePrediction]]:
        """Predictions of one session; its world is its first camera, in its own unit."""
        T_first = self.walk.T_world_camera[frames[0]]
        rng = np.random.default_rng((self._seed, self._num_sessions, 1))
        drift = self.drift(self._num_sessions, frames)
        self._num_sessions += 1
        pose, scale = np.eye(4), np.exp(self.disturbance.unit * rng.standard_normal())
        previous = T_first
        for index, frame in enumerate(frames):
            T = self.walk.T_world_camera[frame]
            if index:
                step = np.linalg.inv(previous) @ T
                step[:3, :3] = step[:3, :3] @ Rotation.from_rotvec(drift[:3]).as_matrix()
                step[:3, 3] = scale * (step[:3, 3] + drift[3:6])
                pose, scale = pose @ step, scale * np.exp(drift[6])
            previous = T
            yield frame, self._prediction(index, frame, pose, scale, rng)

    def drift(self, number: int, frames: Sequence[int]) -> np.ndarray:
        """Error [7] of every step of a session, the ``number``-th to be asked for.

        Rotation, rad; translation, metres; log scale.
        """
        rng = np.random.default_rng((self._seed, number, 0))
        way = self.walk.T_world_camera[list(frames), :3, 3]
        path = np.linalg.norm(np.diff(way, axis=0), axis=1).sum()
        d = self.disturbance
        sigmas = [np.deg2rad(d.rotation_deg)] * 3 + [d.translation * path] * 3 + [d.scale]
        return np.array(sigmas) * rng.standard_normal(7) / max(len(frames) - 1, 1)

    def _prediction(self, index: int, frame: int, pose, scale, rng) -> FramePrediction:
        depth, confidence = self._depth(frame, scale, rng)
        return FramePrediction(
            index=index,
            stamp_ns=int(self.walk.stamps_ns[frame]),
            T_world_camera=torch.from_numpy(pose).float(),
            K=torch.from_numpy(self.K).float(),
            rgb=torch.full((*self.size_hw, 3), 128, dtype=torch.uint8),
            depth=torch.from_numpy(depth).float(),
            depth_conf=torch.from_numpy(confidence).float(),
            world_points=None,
            world_points_conf=None,
            geometry=ImageGeometry(self.size_hw, self.size_hw, (1.0, 1.0), (0, 0)),
        )

    def _depth(self, frame: int, scale: float, rng) -> tuple[np.ndarray, np.ndarray]:
        """Disturbed depth in units of ``scale`` per metre, and confidence, which knows nothing."""
        d = self.disturbance
        if frame not in self._exact:
            T = self.walk.T_world_camera[frame]
            self._exact[frame] = self.hall.depth(T, self.K, self.size_hw)
        depth = scale * self._exact[frame]
        factor = d.depth_noise * rng.standard_normal(depth.shape)
        wrong = rng.random(depth.shape) < d.outliers
        factor[wrong] = rng.uniform(-1, 1, wrong.sum())
        return depth * np.exp(factor), np.where(depth > 0, rng.uniform(2, 8, depth.shape), 1.0)

    def pair(self, first: int, second: int):
        """Two frames seen together: (T_pair_camera, K, depth, confidence) of each.

        Frames that do not see one place are given a random relation, as a network would guess.
        """
        d, rng = self.disturbance, self._rng
        T_first, T_second = self.walk.T_world_camera[[first, second]]
        T = np.linalg.inv(T_first) @ T_second
        if not self.is_revisit(first, second):
            T[:3, :3] = Rotation.from_rotvec(0.3 * rng.standard_normal(3)).as_matrix()
            T[:3, 3] = rng.standard_normal(3)
        unit = np.exp(d.unit * rng.standard_normal())
        depths = [
            self._depth(f, unit * np.exp(d.pair * rng.standard_normal()), rng)
            for f in (first, second)
        ]
        median = np.median(depths[0][0][depths[0][0] > 0])
        T[:3, :3] = (
            T[:3, :3] @ Rotation.from_rotvec(d.pair / 4 * rng.standard_normal(3)).as_matrix()
        )
        T[:3, 3] = unit * T[:3, 3] + d.pair * median * rng.standard_normal(3)
        return tuple((pose, self.K, *seen) for pose, seen in zip((np.eye(4), T), depths))

    def is_revisit(self, first: int, second: int) -> bool:
        """Whether two frames truly see one place: within 2.5 m and 45 degrees."""
        T = np.linalg.inv(self.walk.T_world_camera[first]) @ self.walk.T_world_camera[second]
        angle = Rotation.from_matrix(T[:3, :3]).magnitude()
        return bool(np.linalg.norm(T[:3, 3]) < 2.5 and angle < np.pi / 4)

    def descriptor(self, frame: int) -> np.ndarray:
        """Unit vector [256] whose cosine falls with distance and turn of the true cameras."""
        T = self.walk.T_world_camera[frame]
        wave = np.cos(np.concatenate([T[:2, 3], T[:2, 2]]) @ self._waves + self._phase)
        wave = wave + 0.05 * self._rng.standard_normal(256)
        return (wave / np.linalg.norm(wave)).astype(np.float32)
