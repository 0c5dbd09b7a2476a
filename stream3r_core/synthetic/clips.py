"""Clips and sequences of a camera that moves through random rooms."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stream3r_core.errors import ConfigError
from stream3r_core.synthetic import trajectories
from stream3r_core.synthetic.render import render
from stream3r_core.synthetic.sensor import degrade
from stream3r_core.synthetic.textures import TexturePool, make_textures
from stream3r_core.synthetic.trajectories import Motion
from stream3r_core.synthetic.worlds import make_world

_pools: dict[int, TexturePool] = {}


@dataclass(frozen=True)
class ClipConfig:
    """The family of worlds and motions that clips are drawn from."""

    height: int = 72
    width: int = 96
    frames: int = 3
    fps: float = 10.0
    fov_deg: tuple[float, float] = (50.0, 85.0)  # horizontal
    principal_shift: float = 0.0  # of the principal point, as a share of the image sides
    k1: tuple[float, float] = (0.0, 0.0)  # radial distortion, drawn once per batch
    k2: tuple[float, float] = (0.0, 0.0)
    room_half_m: tuple[float, float] = (1.5, 3.5)
    kind: str = 'room'  # see worlds.KINDS
    motion: Motion = field(default_factory=Motion)
    moving: float = 0.0  # share of furniture that moves
    degrade: float = 1.0  # variation of exposure, colour, blur and noise; 0 = light as it is
    shadows: bool = False
    compiled: bool = False  # compile the renderer, see render()
    texture_seed: int = 0
    surfaces: bool = False  # keep normals and instance ids


@dataclass(frozen=True)
class Clips:
    """B clips of S frames."""

    images: Tensor  # [B, S, 3, H, W] float32 in [0, 1]
    depth_m: Tensor  # [B, S, H, W] z-depth, metres
    T_world_camera: Tensor  # [B, S, 4, 4] camera to world
    K: Tensor  # [B, S, 3, 3] pixels, integer pixel positions
    moving: Tensor  # [B, S, H, W] bool, pixels of moving objects
    distortion: tuple[float, float] = (0.0, 0.0)  # radial k1, k2
    normal_world: Tensor | None = None  # [B, S, 3, H, W] unit, where asked for
    instance: Tensor | None = None  # [B, S, H, W] int64, 0 = room, where asked for


@dataclass(frozen=True)
class SyntheticSequence:
    """One recorded walk through a room, with exact truth."""

    images: Tensor  # [S, H, W, 3] uint8 RGB
    depth_m: Tensor  # [S, H, W] z-depth, metres
    T_world_camera: Tensor  # [S, 4, 4] camera to world, z up
    K: Tensor  # [3, 3] pixels
    stamps_ns: tuple[int, ...]
    distortion: tuple[float, float] = (0.0, 0.0)  # radial k1, k2 of the images
    moving: Tensor | None = None  # [S, H, W] bool, pixels of moving objects
    normal_world: Tensor | None = None  # [S, 3, H, W] unit, where asked for
    instance: Tensor | None = None  # [S, H, W] int64, 0 = room, where asked for


def texture_pool(seed: int) -> TexturePool:
    """Return the textures of ``seed``; made once per process."""
    if seed not in _pools:
        _pools[seed] = make_textures(seed)
    return _pools[seed]


def sample_clips(batch: int, config: ClipConfig, seed: int, device: str = 'cpu') -> Clips:
    """Draw ``batch`` clips, each in its own room; the same seed gives the same clips."""
    g = torch.Generator().manual_seed(seed)
    frames = config.frames
    pool = texture_pool(config.texture_seed).to(device)
    world = make_world(batch, g, pool.count, config.moving, config.room_half_m, config.kind)
    time_s = 10.0 * torch.rand(batch, 1, generator=g) + torch.arange(frames) / config.fps
    draw_paths = trajectories.loop_paths if config.kind == 'rooms' else trajectories.sample_paths
    T = draw_paths(world, time_s, config.motion, g)
    world = trajectories.clear_path(world, T[..., :3, 3])
    fov = torch.deg2rad(_uniform(g, batch, *config.fov_deg))
    K = pinhole(fov, config.height, config.width)
    if config.principal_shift:
        shift = config.principal_shift * (2 * torch.rand(batch, 2, generator=g) - 1)
        K[:, :2, 2] += shift * torch.tensor([config.width, config.height])
    distortion = tuple(_drawn(g, *limits) for limits in (config.k1, config.k2))
    K = K.repeat_interleave(frames, 0)
    rendering = render(
        world.repeat_frames(frames, time_s).to(device),
        T.flatten(0, 1).to(device),
        K.to(device),
        (config.height, config.width),
        pool,
        config.shadows,
        config.compiled,
        distortion,
    )
    rgb = rendering.rgb
    if config.degrade:
        rgb = degrade(rgb, frames, g, config.degrade)
    shape = (batch, frames)
    return Clips(
        rgb.unflatten(0, shape),
        rendering.depth_m.unflatten(0, shape),
        T.to(device),
        K.unflatten(0, shape).to(device),
        rendering.moving.unflatten(0, shape),
        distortion,
        rendering.normal_world.unflatten(0, shape) if config.surfaces else None,
        rendering.instance.unflatten(0, shape) if config.surfaces else None,
    )


def render_sequence(
    seed: int,
    num_frames: int = 60,
    height: int = 84,
    width: int = 112,
    fps: float = 10.0,
    fov_deg: float = 70.0,
    motion: Motion = trajectories.HAND_HELD,
    kind: str = 'room',
    moving: float = 0.0,
    principal_shift: float = 0.0,
    distortion: tuple[float, float] = (0.0, 0.0),
    surfaces: bool = False,
) -> SyntheticSequence:
    """Render one seeded walk through one world, with shadows and a mildly noisy camera.

    ``kind`` is one of :data:`stream3r_core.synthetic.worlds.KINDS`; 'rooms' walks a loop through
    four rooms and comes back. Depth is 0 where only sky is seen. ``moving`` is the share of
    furniture that moves, ``principal_shift`` the largest offset of the principal point as a share
    of the image sides, ``distortion`` the radial k1, k2 of the lens; ``surfaces`` keeps normals
    and instance ids. Raises ConfigError for what cannot be rendered.
    """
    if num_frames < 1 or height < 8 or width < 8 or fps <= 0:
        raise ConfigError(
            f'cannot render {num_frames} frames of {height} x {width} pixels at {fps} fps: '
            'at least 1 frame, 8 x 8 pixels and a positive rate are needed'
        )
    config = ClipConfig(
        height=height,
        width=width,
        frames=num_frames,
        fps=fps,
        fov_deg=(fov_deg, fov_deg),
        principal_shift=principal_shift,
        k1=(distortion[0],) * 2,
        k2=(distortion[1],) * 2,
        kind=kind,
        motion=motion,
        moving=moving,
        surfaces=surfaces,
        degrade=0.25,
        shadows=True,
        texture_seed=1,
    )
    clips = sample_clips(1, config, seed)
    images = (clips.images[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    stamps_ns = tuple(1_000_000_000 + round(i * 1e9 / fps) for i in range(num_frames))
    return SyntheticSequence(
        images,
        clips.depth_m[0],
        clips.T_world_camera[0],
        clips.K[0, 0],
        stamps_ns,
        clips.distortion,
        clips.moving[0],
        clips.normal_world[0] if surfaces else None,
        clips.instance[0] if surfaces else None,
    )


def pinhole(fov_width: Tensor, height: int, width: int) -> Tensor:
    """K [B, 3, 3] of square pixels, principal point W/2, H/2, from the horizontal angle."""
    focal = width / 2 / torch.tan(fov_width / 2)
    K = torch.zeros(len(fov_width), 3, 3)
    K[:, 0, 0] = K[:, 1, 1] = focal
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = width / 2, height / 2, 1
    return K


def _uniform(g: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g)


def _drawn(g: torch.Generator, low: float, high: float) -> float:
    """Draw only where there is a choice: what has none keeps the numbers that others get."""
    return low if low == high else float(_uniform(g, 1, low, high))
