"""From worlds and camera poses to images with exact depth, normals and instance ids."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.errors import ConfigError
from stream3r_core.synthetic import raycast
from stream3r_core.synthetic.textures import SIDE, TexturePool, sample_textures
from stream3r_core.synthetic.worlds import FLOOR, NUM_PRIMITIVES, World

_TILE = 1 << 21  # primitive-ray pairs worked on at once: small enough for the processor's cache
_NEWTON_STEPS = 12


@dataclass(frozen=True)
class Rendering:
    """F frames of H x W pixels."""

    rgb: Tensor  # [F, 3, H, W] float32 in [0, 1], before the sensor
    depth_m: Tensor  # [F, H, W] z-depth along the optical axis, metres; 0 = sky
    normal_world: Tensor  # [F, 3, H, W] unit
    instance: Tensor  # [F, H, W] int64, 0 = room
    moving: Tensor  # [F, H, W] bool


def camera_rays(
    K: Tensor, height: int, width: int, distortion: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Ray vectors [F, H*W, 3] with z = 1 of the integer pixel positions, for K [F, 3, 3].

    ``distortion``: radial coefficients k1, k2 of the usual polynomial model. Raises ConfigError
    where the model folds the image over, so that a pixel has no ray of its own.
    """
    v, u = torch.meshgrid(
        torch.arange(height, device=K.device, dtype=torch.float32),
        torch.arange(width, device=K.device, dtype=torch.float32),
        indexing='ij',
    )
    x = (u.flatten() - K[:, 0, 2, None]) / K[:, 0, 0, None]
    y = (v.flatten() - K[:, 1, 2, None]) / K[:, 1, 1, None]
    if any(distortion):
        x, y = _undistorted(x, y, *distortion)
    return torch.stack([x, y, torch.ones_like(x)], -1)


def _undistorted(x: Tensor, y: Tensor, k1: float, k2: float) -> tuple[Tensor, Tensor]:
    """Invert the radial polynomial r (1 + k1 r^2 + k2 r^4), by Newton steps within a bracket."""
    bent = torch.hypot(x, y)
    low = torch.zeros_like(bent)
    high = torch.full_like(bent, _largest_ideal_radius(float(bent.max()), k1, k2))
    ideal = torch.minimum(bent, high)
    for _ in range(_NEWTON_STEPS):
        square = ideal.square()
        error = ideal * (1 + k1 * square + k2 * square.square()) - bent
        low, high = torch.where(error < 0, ideal, low), torch.where(error > 0, ideal, high)
        ideal = ideal - error / (1 + 3 * k1 * square + 5 * k2 * square.square())
        inside = (ideal >= low) & (ideal <= high)
        ideal = torch.where(inside, ideal, (low + high) / 2)
    scale = ideal / bent.clamp(min=1e-12)
    return x * scale, y * scale


def _largest_ideal_radius(bent: float, k1: float, k2: float) -> float:
    """Return a radius that the model bends to ``bent`` or farther, and grows monotonically to."""

    def bend(radius: float) -> float:
        return radius * (1 + k1 * radius**2 + k2 * radius**4)

    turning = [root.real for root in np.roots([5 * k2, 3 * k1, 1]) if root.imag == 0 < root.real]
    if turning:
        high = math.sqrt(min(turning))
        if bend(high) <= bent:
            raise ConfigError(
                f'distortion k1 = {k1}, k2 = {k2} cannot be inverted: the image reaches to '
                f'{bent:.3f} focal lengths from the principal point, the model bends nothing '
                f'farther out than {bend(high):.3f}; take weaker coefficients or a narrower view'
            )
        return high
    high = bent
    while bend(high) < bent:
        high *= 2
    return high


def render(
    world: World,
    T_world_camera: Tensor,
    K: Tensor,
    size_hw: tuple[int, int],
    pool: TexturePool,
    shadows: bool = True,
    compiled: bool = False,
    distortion: tuple[float, float] = (0.0, 0.0),
) -> Rendering:
    """Render frame f of ``world`` (one world per frame, see ``repeat_frames``).

    T_world_camera [F, 4, 4], K [F, 3, 3] in integer pixel positions (the centre of a pixel is its
    index). Large batches are worked off in tiles; ``compiled`` makes one kernel of it instead
    (the first call of each size takes a minute, later ones a third of the time).
    """
    height, width = size_hw
    rays = camera_rays(K, height, width, distortion) @ T_world_camera[:, :3, :3].transpose(1, 2)
    origin = T_world_camera[:, :3, 3]
    spread = 1 / K[:, 0, 0]
    frames = max(1, _TILE // (rays.shape[1] * world.center.shape[1]))
    if compiled:
        frames = len(rays)
    render_tile = _compiled_tile() if compiled else _render_tile
    parts = [
        render_tile(_slice(world, i, i + frames), origin[i : i + frames], rays[i : i + frames],
                     spread[i : i + frames], pool, shadows)
        for i in range(0, len(rays), frames)
    ]  # fmt: skip
    rgb, depth, normal, material = (torch.cat(p) for p in zip(*parts))
    instance = world.instance.gather(1, material)
    moves = (world.sway[..., :3].abs().amax(-1) > 0).float()
    moves = F.pad(moves, (0, world.instance.shape[1] - moves.shape[1])).gather(1, material) > 0
    return Rendering(
        rgb.transpose(1, 2).reshape(-1, 3, height, width),
        depth.view(-1, height, width),
        normal.transpose(1, 2).reshape(-1, 3, height, width),
        instance.view(-1, height, width),
        moves.view(-1, height, width),
    )


@functools.cache
def _compiled_tile():
    # Without these limits the compiler writes every intermediate of all primitives to memory.
    fuse = {'realize_opcount_threshold': 2000, 'realize_reads_threshold': 200}
    return torch.compile(_render_tile, dynamic=False, options=fuse)


def _slice(world: World, start: int, stop: int) -> World:
    return World(**{name: value[start:stop] for name, value in vars(world).items()})


def _render_tile(
    world: World, origin: Tensor, rays: Tensor, spread: Tensor, pool: TexturePool, shadows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hits = raycast.cast(world, origin, rays)
    albedo = _albedo(world, hits, spread, rays, pool)
    point = origin[:, None] + rays * hits.distance[..., None]
    rgb = albedo * _shade(world, point, hits, shadows)[..., None]
    room_faces = world.open_sky[:, None] & (hits.material >= NUM_PRIMITIVES)
    sky = room_faces & (hits.material != NUM_PRIMITIVES + FLOOR)
    rgb = torch.where(sky[..., None], _sky(rays), rgb)
    return rgb.clamp(0, 1), torch.where(sky, 0.0, hits.distance), hits.normal, hits.material


def _sky(rays: Tensor) -> Tensor:
    """Blue overhead, white at the horizon."""
    height = F.normalize(rays, dim=-1)[..., 2:].clamp(min=0)
    horizon, zenith = rays.new_tensor([0.85, 0.88, 0.9]), rays.new_tensor([0.3, 0.5, 0.85])
    return (horizon + height * (zenith - horizon)) ** 2.2  # colours as seen, to light


def _albedo(
    world: World, hits: raycast.Hits, spread: Tensor, rays: Tensor, pool: TexturePool
) -> Tensor:
    """Colour of the surface: a base colour and two texture layers of different scale."""
    frame = torch.arange(len(rays), device=rays.device)[:, None]
    m = hits.material
    p, face = hits.point_local, hits.face
    u = torch.where(face == 0, p[..., 1], p[..., 0])
    v = torch.where(face == 2, p[..., 1], p[..., 2])
    uv = torch.stack([u, v], -1) + 0.37 * face[..., None]
    slope = (hits.normal * F.normalize(rays, dim=-1)).sum(-1).abs().clamp(min=0.15)
    footprint = hits.distance * spread[:, None] / slope.sqrt() * SIDE  # texels per metre of period
    colors = world.colors[frame, m]
    texture, period = world.texture[frame, m], world.texture_period[frame, m]
    phase = world.texture_phase[frame, m]
    rgb = colors[..., 0, :]
    for layer, strength in ((0, 0.8), (1, 0.5)):
        scale = period[..., layer]
        value = sample_textures(
            pool,
            texture[..., layer],
            uv / scale[..., None] + phase[..., layer, :],
            footprint / scale,
        )
        rgb = rgb + strength * value[..., None] * (colors[..., layer + 1, :] - rgb)
    return rgb


def _shade(world: World, point: Tensor, hits: raycast.Hits, shadows: bool) -> Tensor:
    """Ambient, one lamp with fall-off and shadow, light from above, darkness near room edges."""
    to_light = world.light[:, None] - point
    distance = to_light.norm(dim=-1)
    direct = (hits.normal * to_light).sum(-1).div(distance).clamp(min=0) / (
        0.6 + 0.12 * distance.square()
    )
    if shadows:
        start = point + 0.02 * hits.normal
        blocked, _ = raycast.nearest_primitive(
            world, start.transpose(1, 2), world.light[:, None] - start
        )
        direct = direct * torch.where(blocked < 1, 0.25, 1.0)
    half = world.room_half[:, None]
    to_wall = (half[..., :2] - point[..., :2].abs()).clamp(min=0)
    to_floor = torch.minimum(point[..., 2], 2 * half[..., 2] - point[..., 2]).clamp(min=0)
    edges = torch.stack([to_wall[..., 0], to_wall[..., 1], to_floor], -1)
    second = edges.sum(-1) - edges.amin(-1) - edges.amax(-1)
    occlusion = 1 - 0.35 * torch.exp(-second / 0.25)
    ambient, lamp, sky = world.light_mix[:, None].unbind(-1)
    return (ambient + sky * hits.normal[..., 2]) * occlusion + lamp * direct
