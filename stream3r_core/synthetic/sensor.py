"""What a real camera does to light: exposure, white balance, vignette, curve, blur, noise."""

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 0.18  # mean linear light of an image that is exposed well
CURVE = 2.2


def degrade(rgb: Tensor, frames: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Return the images [B*frames, 3, H, W] in [0, 1] that a camera makes of linear light ``rgb``.

    The camera exposes each clip for a medium grey and stores values to the power of 1 / 2.2, as
    cameras do. ``strength`` scales what varies: between clips, and a little within a clip.
    """
    n, _, height, width = rgb.shape
    b = n // frames
    out = _blur(rgb, frames, generator, strength)

    def per_clip(shape: tuple[int, ...], spread: float, drift: float) -> Tensor:
        value = spread * torch.randn(b, 1, *shape, generator=generator)
        value = value + drift * torch.randn(b, frames, *shape, generator=generator)
        return (strength * value).flatten(0, 1).to(rgb.device)

    gain = torch.exp(per_clip((1, 1, 1), 0.25, 0.04) + per_clip((3, 1, 1), 0.08, 0.01))
    gamma = torch.exp(per_clip((1, 1, 1), 0.15, 0.01))
    y = torch.linspace(-1, 1, height, device=rgb.device)[:, None]
    x = torch.linspace(-1, 1, width, device=rgb.device)[None]
    vignette = 1 - per_clip((1, 1, 1), 0.1, 0).abs() * (x * x + y * y)
    light = out.unflatten(0, (b, frames)).mean((1, 2, 3, 4)).repeat_interleave(frames)
    exposed = out * (GREY / light.clamp(min=1e-3)).view(-1, 1, 1, 1)
    out = (exposed * gain * vignette).clamp(1e-4, 1) ** (gamma / CURVE)
    noise = (
        torch.rand(b, 1, 1, 1, 1, generator=generator)
        .mul(0.03 * strength)
        .expand(-1, frames, -1, -1, -1)
    )
    noise = noise.flatten(0, 1).to(rgb.device) * torch.randn(out.shape, generator=generator).to(
        rgb.device
    )
    return (out + noise).clamp(0, 1)


def _blur(rgb: Tensor, frames: int, generator: torch.Generator, strength: float) -> Tensor:
    """Mix with a 3 x 3 box blur, by a random amount per clip."""
    amount = torch.rand(len(rgb) // frames, generator=generator).mul(0.8 * strength).square()
    amount = amount.repeat_interleave(frames).view(-1, 1, 1, 1).to(rgb.device)
    soft = F.avg_pool2d(F.pad(rgb, (1, 1, 1, 1), mode='replicate'), 3, stride=1)
    return rgb + amount * (soft - rgb)
