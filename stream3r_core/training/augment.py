"""Random colours of training images: brightness, contrast, saturation and hue (model.md 20)."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from stream3r_core.errors import ConfigError

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class ColorJitter:
    """One draw: three factors, a turn of the hue in [-0.5, 0.5], and the order they act in."""

    factors: tuple[float, float, float]
    hue: float
    order: tuple[int, ...]

    @classmethod
    def draw(cls, strength: tuple[float, ...], rng: random.Random) -> 'ColorJitter':
        """Draw factors from 1 - s .. 1 + s and the hue from -s .. s; ``strength`` has four s."""
        if len(strength) != 4 or min(strength) < 0 or strength[3] > 0.5:
            raise ConfigError(
                'jitter: expected brightness, contrast, saturation >= 0 and hue in 0..0.5, '
                f'got {strength}'
            )
        *spreads, hue = strength
        factors = tuple(rng.uniform(max(0.0, 1 - s), 1 + s) for s in spreads)
        return cls(factors, rng.uniform(-hue, hue), tuple(rng.sample(range(4), 4)))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the RGB image in other colours."""
        for step in self.order:
            if step == 3:
                image = _turn_hue(image, self.hue)
            else:
                image = _ENHANCERS[step](image).enhance(self.factors[step])
        return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hsv = np.array(image.convert('HSV'))
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # a byte is the circle
    return Image.fromarray(hsv, 'HSV').convert('RGB')
