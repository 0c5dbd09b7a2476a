"""Random furnished rooms as batches of analytic primitives.

World frame: z up, floor at z = 0, metres, origin in the middle of the floor. Every world of a
batch has the same number of boxes, vertical cylinders and ellipsoids (in this order); an unused
slot has size 0.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.errors import ConfigError
from stream3r_core.synthetic import furniture

GROUPS = 6
WALL_BOXES = 8  # pictures, windows, doors
PARTITION_BOXES = 10  # two inner walls with two doorways each: three pieces and two lintels
CLUTTER_BOXES, CLUTTER_CYLINDERS, CLUTTER_SPHERES = 4, 1, 1
NUM_BOXES = GROUPS * furniture.BOXES + WALL_BOXES + PARTITION_BOXES + CLUTTER_BOXES + 1  # a rug
NUM_CYLINDERS = GROUPS * furniture.CYLINDERS + CLUTTER_CYLINDERS
NUM_SPHERES = GROUPS * furniture.SPHERES + CLUTTER_SPHERES
NUM_PRIMITIVES = NUM_BOXES + NUM_CYLINDERS + NUM_SPHERES
ROOM_FACES = 6
FLOOR = 4  # of -x, +x, -y, +y, -z, +z
#: room: one furnished room; corridor: long and narrow; rooms: four rooms joined by doorways,
#: with a loop through them; open: ground, scattered things and sky.
KINDS = ('room', 'corridor', 'rooms', 'open')
DOORWAY_M = 1.1
UNUSED_Z = -100.0  # where empty slots are put, out of everything's way


@dataclass(frozen=True)
class World:
    """B worlds of P primitives, M = P + 6 materials (last the faces -x, +x, -y, +y, -z, +z)."""

    room_half: Tensor  # [B, 3] metres; the room spans -half..half in x, y and 0..2 half in z
    center: Tensor  # [B, P, 3] metres
    half_size: Tensor  # [B, P, 3] metres; cylinders: radius, radius, half height; 0 = unused
    yaw: Tensor  # [B, P] radians about z
    sway: Tensor  # [B, P, 4] moving objects: amplitude xyz [m], angular speed [rad/s]
    instance: Tensor  # [B, M] int64, one id per object; 0 = the room itself
    texture: Tensor  # [B, M, 2] int64, coarse and fine texture
    texture_period: Tensor  # [B, M, 2] metres
    texture_phase: Tensor  # [B, M, 2, 2]
    colors: Tensor  # [B, M, 3, 3] base, coarse and fine colour, linear RGB in [0, 1]
    light: Tensor  # [B, 3] position, metres
    light_mix: Tensor  # [B, 3] ambient, direct and sky share
    open_sky: Tensor  # [B] bool: walls and ceiling are sky, infinitely far

    def __len__(self) -> int:
        return len(self.room_half)

    def to(self, device) -> 'World':
        """Return the worlds on ``device``."""
        return World(
            **{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        )

    def repeat_frames(self, frames: int, time_s: Tensor | None = None) -> 'World':
        """Return B * frames worlds, one per frame; ``time_s`` [B, frames] moves what moves."""
        tensors = {
            f.name: getattr(self, f.name).repeat_interleave(frames, 0)
            for f in dataclasses.fields(self)
        }
        if time_s is not None:
            sway = tensors['sway']
            phase = sway[..., 3:] * time_s.reshape(-1, 1, 1)
            tensors['center'] = tensors['center'] + sway[..., :3] * torch.sin(phase)
        return World(**tensors)


def make_world(
    batch: int,
    generator: torch.Generator,
    num_textures: int,
    moving: float = 0.0,
    room_half_range: tuple[float, float] = (1.5, 3.5),
    kind: str = 'room',
) -> World:
    """Draw ``batch`` worlds of a kind of :data:`KINDS`; ``moving``: share of things that sway."""
    if kind not in KINDS:
        raise ConfigError(f'unknown kind of world {kind!r}; known: {", ".join(KINDS)}')
    room = _room_sizes(generator, batch, room_half_range, kind)
    parts = [
        _place_groups(generator, room, free_share=1.0 if kind == 'open' else 0.25),
        _wall_boxes(generator, room, used=kind != 'open'),
        _partitions(room, used=kind == 'rooms'),
        _clutter(generator, room),
    ]
    boxes, cylinders, spheres = (torch.cat([p[i] for p in parts], 1) for i in range(3))
    rows = torch.cat([boxes, cylinders, spheres], 1)  # [B, P, 8] centre, half, yaw, object
    unused = rows[..., 3:6].amin(-1) <= 0
    center = rows[..., :3].clone()
    center[..., 2] = torch.where(unused, UNUSED_Z, center[..., 2])
    instance = rows[..., 7].round().long()
    return World(
        room_half=room,
        center=center,
        half_size=torch.where(unused[..., None], 1e-4, rows[..., 3:6].clamp(min=0)),
        yaw=rows[..., 6],
        sway=_sway(generator, instance, moving),
        instance=torch.cat([instance, torch.zeros(batch, ROOM_FACES, dtype=torch.long)], 1),
        open_sky=torch.full((batch,), kind == 'open'),
        **_light(generator, room),
        **_materials(generator, batch, num_textures),
    )


def without_objects(world: World, unwanted: Tensor) -> World:
    """Take away primitives [B, P] bool, with all other parts of the same objects."""
    instance = world.instance[:, : unwanted.shape[1]]
    objects = torch.zeros(len(world), int(world.instance.max()) + 1, device=instance.device)
    objects = objects.scatter_reduce(1, instance, unwanted.float(), 'amax')
    gone = (objects.gather(1, instance) > 0) & (instance != 0)
    center = world.center.clone()
    center[..., 2] = torch.where(gone, UNUSED_Z, center[..., 2])
    return dataclasses.replace(world, center=center)


def _room_sizes(
    g: torch.Generator, batch: int, half_range: tuple[float, float], kind: str
) -> Tensor:
    room = _uniform(g, (batch, 3), *half_range)
    room[:, 2] = _uniform(g, (batch,), 1.2, 1.6)
    if kind == 'corridor':
        room[:, 0], room[:, 1] = _uniform(g, (batch,), 0.9, 1.4), _uniform(g, (batch,), 4, 9)
    elif kind == 'rooms':
        room[:, :2] = _uniform(g, (batch, 2), 3.5, 5.0)
    elif kind == 'open':
        room[:, :2], room[:, 2] = 12.0, 8.0
    return room


def _light(g: torch.Generator, room: Tensor) -> dict[str, Tensor]:
    """A lamp under the ceiling, and how bright ambient, lamp and sky light are."""
    position = _uniform(g, (len(room), 3), -0.6, 0.6) * room
    position[:, 2] = 1.85 * room[:, 2]
    ranges = ((0.25, 0.5), (0.4, 0.8), (0.05, 0.25))
    mix = torch.stack([_uniform(g, (len(room),), *r) for r in ranges], -1)
    return {'light': position, 'light_mix': mix}


def _uniform(g: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _place_groups(
    g: torch.Generator, room: Tensor, free_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Furniture along the walls, now and then in the open; rows [B, n, 8] per shape."""
    catalogue = furniture.load_furniture()
    b = len(room)
    pick = torch.randint(len(catalogue.size_low), (b, GROUPS), generator=g)
    low, high = catalogue.size_low[pick], catalogue.size_high[pick]
    size = low + (high - low) * torch.rand(b, GROUPS, 3, generator=g)
    size[..., 2] = torch.minimum(size[..., 2], 1.9 * room[:, None, 2])
    wall = (torch.arange(GROUPS)[None] + torch.randint(4, (b, 1), generator=g)) % 4
    free = torch.rand(b, GROUPS, generator=g) < free_share
    yaw = torch.where(free, _uniform(g, (b, GROUPS), 0, 2 * math.pi), wall * (math.pi / 2))
    along_x = (
        wall % 2 == 0
    )  # walls 0, 2 run along x: the group's back (-y) turned by yaw faces them
    span = torch.where(along_x, room[:, None, 0], room[:, None, 1])
    depth = torch.where(along_x, room[:, None, 1], room[:, None, 0])
    along = _uniform(g, (b, GROUPS), -1, 1) * (span - size[..., 0] / 2 - 0.05).clamp(min=0)
    away = -(depth - size[..., 1] / 2 - _uniform(g, (b, GROUPS), 0.02, 0.15))
    away = torch.where(free, _uniform(g, (b, GROUPS), -0.5, 0.5) * depth, away)
    c, s = torch.cos(wall * (math.pi / 2)), torch.sin(wall * (math.pi / 2))
    origin = torch.stack([c * along - s * away, s * along + c * away], -1)
    used = torch.rand(b, GROUPS, generator=g) < 0.9
    shapes = (catalogue.boxes[pick], catalogue.cylinders[pick], catalogue.spheres[pick])
    boxes, cylinders, spheres = (_transform_parts(p, size, yaw, origin, used) for p in shapes)
    cylinders[..., 4] = cylinders[..., 3]  # round, whatever the group was stretched to
    return boxes, cylinders, spheres


def _transform_parts(
    parts: Tensor, size: Tensor, yaw: Tensor, origin: Tensor, used: Tensor
) -> Tensor:
    b, groups, slots, _ = parts.shape
    center, half = parts[..., :3] * size[:, :, None], parts[..., 3:] * size[:, :, None]
    half = half * used[:, :, None, None]
    c, s = torch.cos(yaw)[..., None], torch.sin(yaw)[..., None]
    x = c * center[..., 0] - s * center[..., 1] + origin[:, :, None, 0]
    y = s * center[..., 0] + c * center[..., 1] + origin[:, :, None, 1]
    ids = torch.arange(1, groups + 1).view(1, -1, 1).expand(b, -1, slots)
    rows = [x, y, center[..., 2], *half.unbind(-1), yaw[..., None].expand(-1, -1, slots), ids]
    return torch.stack(rows, -1).flatten(1, 2)


def _wall_boxes(g: torch.Generator, room: Tensor, used: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Thin boxes on the walls: pictures, windows, and doors that reach the floor."""
    b, n = len(room), WALL_BOXES
    wall = torch.arange(n)[None].expand(b, -1) % 4
    along_x = wall % 2 == 0
    span = torch.where(along_x, room[:, None, 0], room[:, None, 1])
    depth = torch.where(along_x, room[:, None, 1], room[:, None, 0])
    width, height = _uniform(g, (b, n), 0.15, 0.6), _uniform(g, (b, n), 0.15, 0.5)
    door = torch.rand(b, n, generator=g) < 0.2
    width, height = torch.where(door, 0.45, width), torch.where(door, 1.0, height)
    z = torch.where(door, 1.0, _uniform(g, (b, n), 1.1, 1.9))
    along = _uniform(g, (b, n), -1, 1) * (span - width).clamp(min=0)
    c, s = torch.cos(wall * (math.pi / 2)), torch.sin(wall * (math.pi / 2))
    x, y = c * along + s * depth, s * along - c * depth
    thickness = _uniform(g, (b, n), 0.01, 0.06) * (torch.rand(b, n, generator=g) < 0.85 * used)
    ids = (GROUPS + 1 + torch.arange(n)).expand(b, -1)
    rows = torch.stack([x, y, z, width, thickness, height, wall * (math.pi / 2), ids], -1)
    empty = rows.new_zeros(b, 0, 8)
    return rows, empty, empty


def _partitions(room: Tensor, used: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two walls that cross in the middle; the doorways lie half-way to the outer walls."""
    rows = []
    for axis in (0, 1):  # the wall runs along this axis
        half, top = room[:, axis], 2 * room[:, 2]
        door, gap = half / 2, torch.full_like(half, DOORWAY_M / 2)
        lintel = (top - 2.05).clamp(min=0.1) / 2
        pieces = [(0 * half, door - gap, top / 2, top / 2)]
        for side in (-1, 1):
            outer = (half - door - gap) / 2
            pieces.append((side * (half - outer), outer, top / 2, top / 2))
            pieces.append((side * door, gap, top - lintel, lintel))
        for along, length, z, height in pieces:
            thin, zero = torch.full_like(half, 0.06), torch.zeros_like(half)
            place = [along, zero, z] if axis == 0 else [zero, along, z]
            size = [length, thin, height] if axis == 0 else [thin, length, height]
            rows.append(torch.stack([*place, *(x * used for x in size), zero, zero], -1))
    empty = room.new_zeros(len(room), 0, 8)
    return torch.stack(rows, 1), empty, empty


def _clutter(g: torch.Generator, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rug, small boxes on the floor, one cylinder and one ball."""
    b = len(room)
    first = GROUPS + WALL_BOXES + 1

    def scatter(n: int, low: float, high: float, first_id: int) -> Tensor:
        xy = _uniform(g, (b, n, 2), -0.85, 0.85) * room[:, None, :2]
        half = _uniform(g, (b, n, 3), low, high) * (torch.rand(b, n, 1, generator=g) < 0.8)
        ids = (first_id + torch.arange(n)).expand(b, -1)[..., None]
        yaw = _uniform(g, (b, n, 1), 0, 2 * math.pi)
        return torch.cat([xy, half[..., 2:], half, yaw, ids], -1)

    boxes = scatter(CLUTTER_BOXES, 0.06, 0.3, first)
    cylinders = scatter(CLUTTER_CYLINDERS, 0.06, 0.3, first + CLUTTER_BOXES)
    cylinders[..., 4] = cylinders[..., 3]
    spheres = scatter(CLUTTER_SPHERES, 0.08, 0.25, first + CLUTTER_BOXES + CLUTTER_CYLINDERS)
    rug = scatter(1, 0.5, 1.3, first + CLUTTER_BOXES + CLUTTER_CYLINDERS + CLUTTER_SPHERES)
    rug[..., 5] *= 0.01
    rug[..., 2] = rug[..., 5]
    rug[..., :2] *= 0.5
    return torch.cat([boxes, rug], 1), cylinders, spheres


def _sway(g: torch.Generator, instance: Tensor, moving: float) -> Tensor:
    """Amplitude and angular speed per object, the same for all parts of one object."""
    b = len(instance)
    objects = int(instance.max()) + 1
    amplitude = _uniform(g, (b, objects, 3), -0.6, 0.6)
    amplitude[..., 2] = 0
    amplitude[:, GROUPS + 1 :] = 0  # only furniture groups move
    amplitude *= torch.rand(b, objects, 1, generator=g) < moving
    per_object = torch.cat([amplitude, _uniform(g, (b, objects, 1), 0.3, 1.2)], -1)
    return per_object.gather(1, instance[..., None].expand(-1, -1, 4))


def _materials(g: torch.Generator, b: int, num_textures: int) -> dict[str, Tensor]:
    m = NUM_PRIMITIVES + ROOM_FACES
    colors = torch.rand(b, m, 3, 3, generator=g)
    grey = colors.mean(-1, keepdim=True)
    colors = grey + (colors - grey) * _uniform(g, (b, m, 1, 1), 0.2, 1.0)  # few loud colours
    period = torch.stack(
        [
            torch.exp(_uniform(g, (b, m), math.log(0.8), math.log(4.0))),
            torch.exp(_uniform(g, (b, m), math.log(0.25), math.log(1.2))),
        ],
        -1,
    )
    return {
        'texture': torch.randint(num_textures, (b, m, 2), generator=g),
        'texture_period': period,
        'texture_phase': torch.rand(b, m, 2, 2, generator=g),
        'colors': (0.08 + 0.87 * colors) ** 2.2,  # even as seen, from soot to paper as light
    }
