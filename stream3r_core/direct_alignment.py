"""Direct image alignment: how a camera has moved since a keyframe whose depth is known.

The pixels of the keyframe, lifted by its depth, are projected into a new image. The motion, and a
gain and an offset of brightness, are those with which both agree best (Kerl, Sturm and Cremers
2013, "Robust odometry estimation for RGB-D cameras"), in the inverse compositional steps of Baker
and Matthews 2004, whose derivatives belong to the keyframe and are made once; from a coarse image
to a fine one. NumPy, for its calls cost less than PyTorch's on arrays of a few thousand numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stream3r_core.backend import sim3

LARGEST, SMALLEST = 160, 14  # longer side of the finest and of the coarsest level, pixels
NARROWEST = 4  # shorter side of the coarsest level, pixels
STEPS = 12  # at most, on each level
_ENOUGH = 1e-4  # a step that moves less, radians or median depths, is the last of its level
_DAMPING = 1e-4  # of the diagonal of the normal equations
_NEAREST = 1e-2  # points closer to the camera, in median depths, are not seen
_TUNING = 2.0  # standard deviations at which an error counts half
_LEAST_GAIN = 0.1
_FLOOR = 1 / 200  # smallest standard deviation of the brightness, whose range is 1
_FLAT = 1e-4  # variance of an image that shows nothing: two or three grey levels
_UNSEEN = 0.1  # cost of a pixel that is not seen, so that little overlap is no good fit
_GREY = np.array([0.299, 0.587, 0.114], np.float32) / 255  # ITU-R BT.601


class Picture(NamedTuple):
    """One level of an image."""

    brightness: np.ndarray  # [H, W] float32, 0 to 1
    K: np.ndarray  # [3, 3] pixels
    step: int = 1  # pixels of the image that one of these is wide


@dataclass(frozen=True)
class KeyLevel:
    """One level of a keyframe; N pixels with a depth."""

    points: np.ndarray  # [3, N] in the keyframe's camera, in units of its median depth
    brightness: np.ndarray  # [N]
    jacobian: np.ndarray  # [8, N] of the brightness by translation, rotation, gain and offset
    K: np.ndarray  # [3, 3] pixels


@dataclass(frozen=True)
class Keyframe:
    """A picture that others are aligned to."""

    levels: tuple[KeyLevel, ...]  # from fine to coarse
    median_depth: float  # unit of the points, in scene units


class Fit(NamedTuple):
    """A motion, and how well it explains an image."""

    T_camera_key: np.ndarray  # [4, 4] float64, keyframe to image, scene units
    overlap: float  # share of the keyframe's pixels that the image shows
    explained: float  # share of their variation that the image repeats, at most 1


def pictures(rgb: np.ndarray, K: np.ndarray) -> list[Picture]:
    """Return the levels of an image [H, W, 3] uint8 with K [3, 3], from fine to coarse."""
    levels = [Picture(rgb.astype(np.float32) @ _GREY, K.astype(np.float64))]
    while _can_halve(levels[-1].brightness):
        levels.append(_halved(levels[-1]))
    return [p for p in levels if max(p.brightness.shape) <= LARGEST] or levels[-1:]


def _can_halve(brightness: np.ndarray) -> bool:
    return max(brightness.shape) >= 2 * SMALLEST and min(brightness.shape) >= 2 * NARROWEST


def _halved(picture: Picture) -> Picture:
    height, width = (side // 2 * 2 for side in picture.brightness.shape)
    blocks = picture.brightness[:height, :width].reshape(height // 2, 2, width // 2, 2)
    K = picture.K / 2
    K[:2, 2] -= 0.25  # pixel centres are integers
    K[2, 2] = 1
    return Picture(np.ascontiguousarray(blocks.mean((1, 3))), K, 2 * picture.step)


def make_keyframe(levels: Sequence[Picture], depth: np.ndarray) -> Keyframe | None:
    """Return what images are aligned to; ``depth`` [H, W] of the image, scene units.

    None where no depth is known (what is not positive and finite is not), or for single rows.
    """
    depth = np.where(np.isfinite(depth), depth, 0.0)
    known = depth[depth > 0]
    if not len(known) or min(depth.shape) < 2:
        return None
    unit = float(np.median(known))
    return Keyframe(tuple(_key_level(level, depth / unit) for level in levels), unit)


def _key_level(picture: Picture, depth: np.ndarray) -> KeyLevel:
    brightness, K, step = picture
    height, width = brightness.shape
    z = depth[step // 2 :: step, step // 2 :: step][:height, :width]
    g_y, g_x = np.zeros_like(brightness), np.zeros_like(brightness)
    g_x[:, 1:-1] = (brightness[:, 2:] - brightness[:, :-2]) / 2
    g_y[1:-1] = (brightness[2:] - brightness[:-2]) / 2
    seen = z > _NEAREST
    v, u = np.nonzero(seen)
    z = z[seen].astype(np.float32)
    x, y = (
        ((u - K[0, 2]) / K[0, 0]).astype(np.float32),
        ((v - K[1, 2]) / K[1, 1]).astype(np.float32),
    )
    g_x, g_y = g_x[seen] * np.float32(K[0, 0]) / z, g_y[seen] * np.float32(K[1, 1]) / z
    gradient = np.stack([g_x, g_y, -(g_x * x + g_y * y)])  # by the position of the point
    points = np.stack([x * z, y * z, z])
    value = brightness[seen]
    turn = np.cross(points, gradient, axis=0)
    jacobian = np.concatenate([gradient, turn, value[None], np.ones_like(value)[None]])
    return KeyLevel(points, value, jacobian.astype(np.float32), K)


def align(keyframe: Keyframe, levels: Sequence[Picture], guesses: Sequence[np.ndarray]) -> Fit:
    """Return the motion that makes an image agree with a keyframe.

    ``levels`` as of the keyframe; the best of ``guesses`` [4, 4] for T_camera_key is the start.
    """
    unit, light = keyframe.median_depth, np.zeros(2)
    coarsest = keyframe.levels[-1], levels[-1]
    starts = [_with_translation(T, 1 / unit) for T in guesses]
    T = min(starts, key=lambda start: _Errors.at(*coarsest, start, light).cost)
    for level, picture in zip(reversed(keyframe.levels), reversed(levels)):
        for _ in range(STEPS):
            step = _Errors.at(level, picture, T, light).step(level)
            light = light + step[6:]
            moved = step[:6] / max(1 + light[0], _LEAST_GAIN)  # the keyframe's, whose light is 1
            T = T @ _inverse_motion(moved)
            if np.abs(moved).max() < _ENOUGH:
                break
    found = _Errors.at(keyframe.levels[0], levels[0], T, light)
    explained = found.explained(keyframe.levels[0])
    return Fit(_with_translation(T, unit), found.overlap, explained)


class _Errors(NamedTuple):
    """How a keyframe differs from an image at one motion."""

    value: np.ndarray  # [N] brightness of the image
    error: np.ndarray  # [N]
    weight: np.ndarray  # [N], 0 where the image does not show the pixel
    shown: np.ndarray  # [N] bool

    @classmethod
    def at(cls, level: KeyLevel, picture: Picture, T: np.ndarray, light: np.ndarray) -> '_Errors':
        """Project the keyframe into the image and compare."""
        value, shown = _seen_at(picture.brightness, level, T.astype(np.float32))
        gain, offset = light.astype(np.float32)
        error = value - (1 + gain) * level.brightness - offset
        spread = _FLOOR
        if shown.any():
            size = np.abs(error[shown])
            spread = max(1.4826 * np.partition(size, len(size) // 2)[len(size) // 2], _FLOOR)
        weight = shown / (1 + np.square(error / (_TUNING * spread)))
        return cls(value, error, weight, shown)

    @property
    def overlap(self) -> float:
        """Share of the pixels that are shown."""
        return _mean(self.shown)

    @property
    def cost(self) -> float:
        """Mean size of an error, and something for pixels that are not shown."""
        return _mean(np.abs(np.where(self.shown, self.error, _UNSEEN)))

    def step(self, level: KeyLevel) -> np.ndarray:
        """Return the motion of the keyframe and the light [8] that explain the errors."""
        weighted = level.jacobian * self.weight
        normal = (weighted @ level.jacobian.T).astype(np.float64)
        normal[np.diag_indices(8)] += _DAMPING * normal.diagonal() + 1e-9
        return np.linalg.solve(normal, weighted @ self.error)

    def explained(self, level: KeyLevel) -> float:
        """Return which share of the variation of both, where they overlap, is common to them.

        That of the keyframe alone would not do: of a light that fades to nothing all is known.
        """
        if np.count_nonzero(self.shown) < 2:
            return 0.0
        variance = min(float(x[self.shown].var()) for x in (level.brightness, self.value))
        if variance < _FLAT:
            return 0.0
        squares = np.minimum(np.square(self.error[self.shown]), 4 * variance)
        return 1 - float(squares.mean()) / variance


def _mean(values: np.ndarray) -> float:
    """Mean; 0 where a level has no pixel with a depth."""
    return float(values.mean()) if len(values) else 0.0


def _seen_at(
    brightness: np.ndarray, level: KeyLevel, T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness [N] where the keyframe's pixels project to, and whether that is in the image.

    The lens is the keyframe's: one camera has one, while predicted ones differ by the frame.
    """
    height, width = brightness.shape
    x, y, z = T[:3, :3] @ level.points + T[:3, 3:]
    K = level.K
    in_front = z > _NEAREST
    z = np.maximum(z, _NEAREST)
    x = x / z * np.float32(K[0, 0]) + np.float32(K[0, 2])
    y = y / z * np.float32(K[1, 1]) + np.float32(K[1, 2])
    shown = in_front & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    x = np.where(shown, x, 0).clip(0, width - 1.001)
    y = np.where(shown, y, 0).clip(0, height - 1.001)
    column, row = x.astype(np.int32), y.astype(np.int32)
    x, y = x - column, y - row
    flat, first = brightness.ravel(), row * width + column
    top = flat[first] * (1 - x) + flat[first + 1] * x
    bottom = flat[first + width] * (1 - x) + flat[first + width + 1] * x
    return top * (1 - y) + bottom * y, shown


def _inverse_motion(step: np.ndarray) -> np.ndarray:
    """Inverse [4, 4] of a small motion: translation and rotation vector [6]."""
    R = sim3.rotation_exp(-step[3:])
    return sim3.from_parts(1.0, R, -R @ step[:3])


def _with_translation(T: np.ndarray, scale: float) -> np.ndarray:
    T = np.array(T, np.float64)
    T[:3, 3] *= scale
    return T
