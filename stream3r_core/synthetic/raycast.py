"""Nearest hit of rays with a room, boxes, vertical cylinders and ellipsoids; all closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.synthetic.worlds import NUM_BOXES, NUM_CYLINDERS, NUM_PRIMITIVES, World

NEAR = 0.02  # metres; closer surfaces are not seen
_TINY = 1e-6
_ID_BITS = 7  # low mantissa bits that carry the primitive's number; ties below 1.5e-5 relative
_MASK = (1 << _ID_BITS) - 1


@dataclass(frozen=True)
class Hits:
    """Per ray of F frames: R rays each."""

    distance: Tensor  # [F, R] in units of the ray vectors (z-depth if their camera z is 1)
    material: Tensor  # [F, R] int64 row of the world's material tables
    point_local: Tensor  # [F, R, 3] metres, in the frame of the hit object
    normal: Tensor  # [F, R, 3] world, unit, towards the ray's origin
    face: Tensor  # [F, R] int64 axis of the face in the object's frame, for texturing


def cast(world: World, origin: Tensor, rays: Tensor) -> Hits:
    """Intersect ``rays`` [F, R, 3] from ``origin`` [F, 3] (world frame) with frame f's world."""
    best, index = nearest_primitive(world, origin[:, :, None], rays)
    room_t, _, _ = _room_exit(world.room_half, origin, rays)
    in_room = room_t <= best * (1 + 2.0**-15)
    return _surface(world, origin, rays, index, in_room)


def nearest_primitive(world: World, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate distance [F, R] (inf: none) and number of the first primitive hit.

    origin [F, 3, 1] or [F, 3, R], rays [F, R, 3].
    """
    dx, dy, dz = (rays[..., i].unsqueeze(1) for i in range(3))  # [F, 1, R]
    c, s = torch.cos(world.yaw)[..., None], torch.sin(world.yaw)[..., None]
    offset = [origin[:, None, i] - world.center[:, :, i, None] for i in range(3)]
    lo_x = c * offset[0] + s * offset[1]
    lo_y = c * offset[1] - s * offset[0]
    keys = []
    groups = ((_box_hit, 0, NUM_BOXES), (_cylinder_hit, NUM_BOXES, NUM_CYLINDERS))
    groups += (
        (_sphere_hit, NUM_BOXES + NUM_CYLINDERS, NUM_PRIMITIVES - NUM_BOXES - NUM_CYLINDERS),
    )
    for intersect, first, count in groups:
        part = slice(first, first + count)
        cp, sp = c[:, part], s[:, part]
        t = intersect(
            (lo_x[:, part], lo_y[:, part], offset[2][:, part]),
            (cp * dx + sp * dy, cp * dy - sp * dx, dz),
            [world.half_size[:, part, i, None] for i in range(3)],
        )
        ids = torch.arange(first, first + count, dtype=torch.int32, device=t.device)[:, None]
        keys.append(((t.view(torch.int32) & ~_MASK) | ids).view(torch.float32).amin(1))
    key = torch.minimum(torch.minimum(keys[0], keys[1]), keys[2])
    bits = key.view(torch.int32)
    return (bits & ~_MASK).view(torch.float32), (bits & _MASK).long()


_FAR = 1e6  # a number rather than inf, so that its bits can carry an id


def _safe(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, torch.where(x < 0, -_TINY, _TINY), x)


def _slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1 / _safe(d)
    middle, reach = -o * inverse, half * inverse.abs()
    return middle - reach, middle + reach


def _accept(enter: Tensor, leave: Tensor) -> Tensor:
    return torch.where((enter < leave) & (enter > NEAR), enter, _FAR)


def _box_hit(o, d, half) -> Tensor:
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i], half[i]) for i in range(3))
    enter = torch.maximum(torch.maximum(x0, y0), z0)
    return _accept(enter, torch.minimum(torch.minimum(x1, y1), z1))


def _quadric(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    inverse = 1 / a.clamp(min=1e-12)
    enter = torch.where(discriminant > 0, (-b - root) * inverse, _FAR)
    return enter, torch.where(discriminant > 0, (-b + root) * inverse, -_FAR)


def _cylinder_hit(o, d, half) -> Tensor:
    ox, oy, dx, dy = o[0] / half[0], o[1] / half[1], d[0] / half[0], d[1] / half[1]
    q0, q1 = _quadric(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - 1)
    z0, z1 = _slab(o[2], d[2], half[2])
    return _accept(torch.maximum(q0, z0), torch.minimum(q1, z1))


def _sphere_hit(o, d, half) -> Tensor:
    (ox, oy, oz), (dx, dy, dz) = (tuple(v[i] / half[i] for i in range(3)) for v in (o, d))
    a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
    return _accept(*_quadric(a, b, ox * ox + oy * oy + oz * oz - 1))


def _room_exit(half: Tensor, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, face number 0..5 and local point of the wall, floor or ceiling behind it all."""
    o = torch.stack([origin[:, 0], origin[:, 1], origin[:, 2] - half[:, 2]], -1)[:, None]
    inverse = 1 / _safe(rays)
    exits = -o * inverse + half[:, None] * inverse.abs()
    x, y, z = exits.unbind(-1)
    t = torch.minimum(torch.minimum(x, y), z)
    axis = torch.where(t == x, 0, torch.where(t == y, 1, 2))
    direction = torch.where(
        axis == 0, rays[..., 0], torch.where(axis == 1, rays[..., 1], rays[..., 2])
    )
    return t, 2 * axis + (direction > 0).long(), o + rays * t[..., None]


def _surface(world: World, origin: Tensor, rays: Tensor, index: Tensor, in_room: Tensor) -> Hits:
    """Distance, normal and local point of the chosen primitive, in full precision."""
    table = torch.cat(
        [
            world.center,
            world.half_size,
            torch.cos(world.yaw)[..., None],
            torch.sin(world.yaw)[..., None],
        ],
        -1,
    )
    rows = table.gather(1, index[..., None].expand(-1, -1, 8))
    center, half, c, s = rows[..., :3], rows[..., 3:6], rows[..., 6], rows[..., 7]
    offset = origin[:, None] - center
    o = (
        c * offset[..., 0] + s * offset[..., 1],
        c * offset[..., 1] - s * offset[..., 0],
        offset[..., 2],
    )
    d = (
        c * rays[..., 0] + s * rays[..., 1],
        c * rays[..., 1] - s * rays[..., 0],
        rays[..., 2],
    )
    h = half.unbind(-1)
    is_box, is_sphere = index < NUM_BOXES, index >= NUM_BOXES + NUM_CYLINDERS
    t = torch.where(
        is_box,
        _box_hit(o, d, h),
        torch.where(is_sphere, _sphere_hit(o, d, h), _cylinder_hit(o, d, h)),
    )
    room_t, room_face, room_point = _room_exit(world.room_half, origin, rays)
    t = torch.where(in_room, room_t, t)
    local = torch.stack([o[i] + d[i] * t for i in range(3)], -1)
    normal_local, axis = _local_normal(local, half, is_box, is_sphere)
    nx, ny, nz = normal_local.unbind(-1)
    normal = torch.stack([c * nx - s * ny, s * nx + c * ny, nz], -1)
    room_axis = room_face // 2
    room_normal = torch.nn.functional.one_hot(room_axis, 3) * (1 - 2 * (room_face % 2))[..., None]
    room = in_room[..., None]
    return Hits(
        distance=t,
        material=torch.where(in_room, NUM_PRIMITIVES + room_face, index),
        point_local=torch.where(room, room_point, local),
        normal=torch.where(room, room_normal.to(normal.dtype), normal),
        face=torch.where(in_room, room_axis, axis),
    )


def _local_normal(
    point: Tensor, half: Tensor, is_box: Tensor, is_sphere: Tensor
) -> tuple[Tensor, Tensor]:
    scaled = point / half
    size = scaled.abs()
    on_cap = ~is_sphere & ~is_box & (size[..., 2] > size[..., :2].norm(dim=-1))
    box_axis = torch.where(
        size[..., 2] >= torch.maximum(size[..., 0], size[..., 1]),
        2,
        torch.where(size[..., 1] > size[..., 0], 1, 0),
    )
    axis_normal = torch.nn.functional.one_hot(torch.where(on_cap, 2, box_axis), 3) * scaled.sign()
    flat = torch.cat(
        [scaled[..., :2], torch.where(is_sphere[..., None], scaled[..., 2:], 0.0)], -1
    )
    curved = torch.nn.functional.normalize(flat / half, dim=-1)
    normal = torch.where((is_box | on_cap)[..., None], axis_normal, curved)
    round_axis = torch.where(curved[..., 0].abs() > curved[..., 1].abs(), 0, 1)
    round_axis = torch.where(curved[..., 2].abs() > 0.7, 2, round_axis)
    return normal, torch.where(is_box | on_cap, box_axis.where(is_box, 2), round_axis)
