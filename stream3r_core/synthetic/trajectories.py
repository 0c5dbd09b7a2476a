"""Smooth, collision-free camera paths through a furnished room."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.synthetic.worlds import NUM_BOXES, NUM_CYLINDERS, World, without_objects

CLEARANCE_M = 0.25
MOUNTING_DEG = 20.0  # largest angle between where a wheeled camera looks and where it drives
_CANDIDATES = 8
_WAVES = 3


@dataclass(frozen=True)
class Motion:
    """How a camera is carried. Speeds are root mean square values of the smooth part."""

    speed_m_s: tuple[float, float] = (0.15, 0.8)  # drawn per path, uniformly
    turn_deg_s: tuple[float, float] = (4.0, 25.0)
    vertical: float = 0.4  # vertical share of the speed
    tilt: float = 0.35  # pitch and roll share of the turn rate
    tremor_deg: float = 0.25
    height_m: tuple[float, float] = (0.9, 1.8)
    still_share: float = 0.05  # paths that stand still (tremor only); those round loops never do
    drives: bool = False  # looks where it drives, but for the angle it is mounted at


HAND_HELD = Motion()
CALM = Motion(  # carried by somebody who looks at what he records
    speed_m_s=(0.3, 0.8), turn_deg_s=(3.0, 10.0), vertical=0.3, tilt=0.3, height_m=(1.2, 1.6)
)
WHEELED = Motion(
    turn_deg_s=(4.0, 45.0),
    vertical=0.0,
    tilt=0.0,
    tremor_deg=0.05,
    height_m=(0.3, 1.0),
    drives=True,
)
DRONE = Motion(
    (0.3, 1.5), (10.0, 60.0), vertical=0.8, tilt=0.5, tremor_deg=0.4, height_m=(0.8, 2.2)
)


def sample_paths(
    world: World, time_s: Tensor, motion: Motion, generator: torch.Generator
) -> Tensor:
    """Return T_world_camera [B, S, 4, 4] at the times [B, S] (seconds, from any start).

    Of several random paths per world the first that keeps ``CLEARANCE_M`` from everything is
    taken, else the one that keeps farthest away.
    """
    draw = _drive if motion.drives else _wander
    candidates = [draw(world, time_s, motion, generator) for _ in range(_CANDIDATES)]
    if motion.drives:
        position, direction = _first_clear(world, candidates)
        mounting = math.radians(MOUNTING_DEG) * _uniform(generator, (len(world), 1), -1, 1)
        rotation = _mounted(direction + mounting, time_s, motion, generator)
    else:
        position, moves = _first_clear(world, candidates)
        rotation = _rotations(world, position[:, 0], moves, time_s, motion, generator)
    return _poses(rotation, position)


def _first_clear(world: World, candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Choose per world among (positions [B, S, 3], what belongs to them)."""
    b = len(world)
    positions, others = (torch.stack(part, 1) for part in zip(*candidates))
    distance = clearance(world, positions.flatten(1, 2)).view(b, _CANDIDATES, -1).amin(-1)
    order = torch.arange(_CANDIDATES, 0, -1, device=distance.device)
    score = torch.where(distance >= CLEARANCE_M, 10.0 * order, distance)
    chosen = torch.arange(b), score.argmax(1)
    return positions[chosen], others[chosen]


def loop_paths(world: World, time_s: Tensor, motion: Motion, generator: torch.Generator) -> Tensor:
    """Return T_world_camera [B, S, 4, 4] of walks round the doorways of worlds of kind 'rooms'.

    The ellipse crosses every doorway at a right angle; after one round the camera is back where it
    was, looking the same way but for the tremor. Loops always move: ``still_share`` is for others.
    """
    b = len(world)
    radii = world.room_half[:, None, :2] / 2
    speed = _uniform(generator, (b, 1), *motion.speed_m_s)
    turn = speed / radii.mean(-1) * _sign(generator, b)
    angle = _uniform(generator, (b, 1), 0, 2 * math.pi) + turn * (time_s - time_s[:, :1])
    xy, yaw = _on_ellipse(radii, angle, turn.sign())
    z = _uniform(generator, (b, 1), *motion.height_m).expand_as(angle)
    rotation = _mounted(yaw, time_s, motion, generator)
    return _poses(rotation, torch.cat([xy, z[..., None]], -1))


def _on_ellipse(radii: Tensor, angle: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, S, 2] and direction of travel [B, S] at the angles [B, S]; sign [B, 1]."""
    xy = radii * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    ahead = torch.stack([-torch.sin(angle), torch.cos(angle)], -1) * radii * sign[..., None]
    return xy, torch.atan2(ahead[..., 1], ahead[..., 0])


def _mounted(yaw: Tensor, time_s: Tensor, motion: Motion, g: torch.Generator) -> Tensor:
    """Rotation matrices [B, S, 3, 3] of a camera fixed to what turns by ``yaw``."""
    shake = _tremor(g, time_s, motion)
    pitch = _uniform(g, (len(yaw), 1), 0.0, 0.25) + shake[..., 1]
    return camera_rotation(yaw + shake[..., 0], pitch, shake[..., 2])


def clear_path(world: World, position: Tensor, distance_m: float = 0.15) -> World:
    """Take away the objects that come closer than ``distance_m`` to positions [B, S, 3]."""
    near = torch.stack([to_objects(world, chunk).amin(1) for chunk in position.split(64, 1)])
    return without_objects(world, near.amin(0) < distance_m)


def _poses(rotation: Tensor, position: Tensor) -> Tensor:
    T = torch.zeros(*position.shape[:-1], 4, 4)
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = rotation, position, 1
    return T


def clearance(world: World, points: Tensor) -> Tensor:
    """Distance [B, N] of ``points`` [B, N, 3] to the nearest surface, metres; inside it is < 0."""
    room = world.room_half[:, None]
    centred = points - torch.stack([0 * room[..., 0], 0 * room[..., 1], room[..., 2]], -1)
    nearest = to_objects(world, points).amin(-1)
    return torch.minimum(nearest, (room - centred.abs()).amin(-1))


def to_objects(world: World, points: Tensor) -> Tensor:
    """Distance [B, N, P] to every primitive; to ellipsoids a lower bound."""
    offset = points[:, :, None] - world.center[:, None]
    c, s = torch.cos(world.yaw)[:, None], torch.sin(world.yaw)[:, None]
    x = c * offset[..., 0] + s * offset[..., 1]
    y = c * offset[..., 1] - s * offset[..., 0]
    half = world.half_size[:, None]
    q = torch.stack([x, y, offset[..., 2]], -1).abs() - half
    box = q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)
    side = torch.stack([torch.hypot(x, y) - half[..., 0], q[..., 2]], -1)
    cylinder = side.clamp(min=0).norm(dim=-1) + side.amax(-1).clamp(max=0)
    scaled = (torch.stack([x, y, offset[..., 2]], -1) / half).norm(dim=-1)
    sphere = (scaled - 1) * half.amin(-1)
    round_end = NUM_BOXES + NUM_CYLINDERS
    return torch.cat(
        [box[..., :NUM_BOXES], cylinder[..., NUM_BOXES:round_end], sphere[..., round_end:]], -1
    )


def _uniform(g: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _waves(g: torch.Generator, time_s: Tensor, rate: Tensor) -> Tensor:
    """Three smooth functions of time [B, S, 3] from zero; ``rate`` [B, 1, 3] rms derivative."""
    b = len(time_s)
    omega = torch.exp(_uniform(g, (b, 1, 3, _WAVES), math.log(0.25), math.log(3.0)))
    phase = _uniform(g, (b, 1, 3, _WAVES), 0, 2 * math.pi)
    share = torch.rand(b, 1, 3, _WAVES, generator=g) + 0.1
    share = share / share.square().sum(-1, keepdim=True).sqrt()
    amplitude = rate[..., None] * math.sqrt(2) * share / omega
    wave = (amplitude * torch.sin(omega * time_s[:, :, None, None] + phase)).sum(-1)
    return wave - wave[:, :1]


def _drive(
    world: World, time_s: Tensor, motion: Motion, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Positions [B, S, 3] and direction of travel [B, S]: along ellipses, as wheels can.

    Mostly forwards, now and then to a stop and backwards; slower where the ellipse is narrow, so
    that no turn is faster (root mean square) than the motion allows.
    """
    b = len(world)
    limit = world.room_half[:, :2] - CLEARANCE_M
    radii = limit * _uniform(g, (b, 2), 0.25, 0.75)
    center = _uniform(g, (b, 2), -1, 1) * (limit - radii)
    speed = _uniform(g, (b, 1), *motion.speed_m_s) * (
        torch.rand(b, 1, generator=g) >= motion.still_share
    )
    fastest = math.radians(motion.turn_deg_s[1]) * radii.amin(1) / radii.amax(1)
    rate = torch.minimum(speed / radii.square().mean(1, True).sqrt(), fastest[:, None])
    pace = _waves(g, time_s, torch.ones(b, 1, 3))[..., 0]  # rms 1 m/s
    progress = rate * (0.8 * (time_s - time_s[:, :1]) + 0.6 * pace)
    sign = _sign(g, b)
    angle = _uniform(g, (b, 1), 0, 2 * math.pi) + sign * progress
    xy, direction = _on_ellipse(radii[:, None], angle, sign)
    z = _uniform(g, (b, 1), *motion.height_m).expand_as(angle)
    return torch.cat([center[:, None] + xy, z[..., None]], -1), direction


def _wander(
    world: World, time_s: Tensor, motion: Motion, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Positions [B, S, 3], and whether they move [B, 1, 1]."""
    b, room = len(world), world.room_half
    start = torch.cat(
        [_uniform(g, (b, 2), -0.7, 0.7) * room[:, :2], _uniform(g, (b, 1), *motion.height_m)], -1
    )
    speed = _uniform(g, (b, 1, 1), *motion.speed_m_s)
    moves = torch.rand(b, 1, 1, generator=g) >= motion.still_share
    axes = torch.tensor([1.0, 1.0, motion.vertical]) / math.sqrt(2 + motion.vertical**2)
    path = start[:, None] + _waves(g, time_s, speed * moves * axes)
    middle = torch.stack([0 * room[:, 0], 0 * room[:, 0], room[:, 2]], -1)[:, None]
    limit = (room - CLEARANCE_M)[:, None]
    relative = (path - middle) / limit
    soft = torch.where(  # linear in the middle, bending smoothly before the walls
        relative.abs() < 0.6,
        relative,
        relative.sign() * (0.6 + 0.4 * torch.tanh((relative.abs() - 0.6) / 0.4)),
    )
    return middle + soft * limit, moves


def _rotations(
    world: World,
    start: Tensor,
    moves: Tensor,
    time_s: Tensor,
    motion: Motion,
    g: torch.Generator,
) -> Tensor:
    """Rotation matrices [B, S, 3, 3]: first towards some point in the room, then wandering."""
    b = len(world)
    target = _uniform(g, (b, 2), -0.7, 0.7) * world.room_half[:, :2]
    look = target - start[:, :2]
    near = look.norm(dim=-1) < 0.5
    look = torch.where(near[:, None], -start[:, :2] + 1e-3, look)
    yaw0 = torch.atan2(look[:, 1], look[:, 0])
    turn = torch.deg2rad(_uniform(g, (b, 1, 1), *motion.turn_deg_s))
    torch.rand(b, 1, 1, generator=g)  # read no more; without it every seeded path would change
    wander = _waves(g, time_s, turn * moves * torch.tensor([1.0, motion.tilt, 0.5 * motion.tilt]))
    angles = wander + _tremor(g, time_s, motion)
    yaw = yaw0[:, None] + angles[..., 0]
    pitch0 = _uniform(g, (b, 1), -0.05, 0.45) if motion.tilt else _uniform(g, (b, 1), 0.0, 0.2)
    pitch = (pitch0 + angles[..., 1]).clamp(-0.9, 1.1)  # positive looks down
    return camera_rotation(yaw, pitch, angles[..., 2])


def _tremor(g: torch.Generator, time_s: Tensor, motion: Motion) -> Tensor:
    """Fast, small turns about the three axes [B, S, 3], radians."""
    b = len(time_s)
    speed = _uniform(g, (b, 1, 3), 8, 18)
    phase = _uniform(g, (b, 1, 3), 0, 2 * math.pi)
    return math.radians(motion.tremor_deg) * torch.sin(speed * time_s[..., None] + phase)


def _sign(g: torch.Generator, b: int) -> Tensor:
    return 2.0 * torch.randint(2, (b, 1), generator=g) - 1


def camera_rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Camera-to-world rotation [..., 3, 3] of a camera turned by yaw about z, pitched down."""
    cy, sy, cp, sp = torch.cos(yaw), torch.sin(yaw), torch.cos(pitch), torch.sin(pitch)
    forward = torch.stack([cy * cp, sy * cp, -sp], -1)
    right = torch.stack([sy, -cy, torch.zeros_like(cy)], -1)
    down = torch.linalg.cross(forward, right)
    cr, sr = torch.cos(roll)[..., None], torch.sin(roll)[..., None]
    return torch.stack([cr * right + sr * down, cr * down - sr * right, forward], -1)
