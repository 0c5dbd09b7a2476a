"""The synthetic rooms: exact geometry, seeded, and motions that a camera could make."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stream3r_core.errors import ConfigError, OutputError
from stream3r_core.geometry import invert_se3, transform_points, unproject_to_world
from stream3r_core.synthetic import (
    CALM,
    DRONE,
    HAND_HELD,
    WHEELED,
    ClipConfig,
    render_sequence,
    sample_clips,
)
from stream3r_core.synthetic.clips import pinhole, texture_pool
from stream3r_core.synthetic.folders import write_scene_folder, write_tum
from stream3r_core.synthetic.render import camera_rays, render
from stream3r_core.synthetic.sensor import degrade
from stream3r_core.synthetic.textures import LEVELS, SIDE, make_textures, sample_textures
from stream3r_core.synthetic.trajectories import (
    MOUNTING_DEG,
    clear_path,
    clearance,
    sample_paths,
    to_objects,
)
from stream3r_core.synthetic.worlds import make_world, without_objects

SIZE = (24, 32)


def scene(seed=0, batch=3, frames=4, moving=0.0):
    g = torch.Generator().manual_seed(seed)
    world = make_world(batch, g, 256, moving)
    time_s = torch.arange(frames).expand(batch, -1) / 5.0
    T = sample_paths(world, time_s, HAND_HELD, g)
    K = pinhole(torch.full((batch,), 1.2), *SIZE).repeat_interleave(frames, 0)
    per_frame = world.repeat_frames(frames, time_s)
    return (
        per_frame,
        T.flatten(0, 1),
        K,
        render(per_frame, T.flatten(0, 1), K, SIZE, texture_pool(0)),
    )


def test_every_seen_point_lies_on_a_surface():
    world, T, K, frames = scene()
    points = unproject_to_world(frames.depth_m, K, T).flatten(1, 2)
    distance = clearance(world, points).abs()
    # The distance to an ellipsoid is a bound only, but zero on its surface all the same.
    assert distance.quantile(0.999) < 2e-3 and distance.max() < 0.02


def test_nothing_stands_between_camera_and_seen_point():
    world, T, K, frames = scene(seed=3)
    for share in (0.3, 0.7, 0.97):
        free = unproject_to_world(frames.depth_m * share, K, T).flatten(1, 2)
        assert clearance(world, free).quantile(0.001) > 0


def test_normals_are_unit_vectors_towards_the_camera_and_follow_the_surface():
    _, T, K, frames = scene(seed=1)
    points = unproject_to_world(frames.depth_m, K, T)
    normal = frames.normal_world.movedim(1, -1)
    to_camera = T[:, None, None, :3, 3] - points
    assert (normal.norm(dim=-1) - 1).abs().max() < 1e-4
    assert ((normal * to_camera).sum(-1) > -1e-4).float().mean() > 0.999
    # Neighbours on one flat patch differ by vectors perpendicular to their normal.
    step = points[:, :, 1:] - points[:, :, :-1]
    same = (normal[:, :, 1:] - normal[:, :, :-1]).norm(dim=-1) < 1e-3
    same &= frames.instance[:, :, 1:] == frames.instance[:, :, :-1]
    slope = (step * normal[:, :, 1:]).sum(-1).abs() / step.norm(dim=-1)
    assert slope[same].quantile(0.9) < 1e-2


def test_two_views_agree_about_the_world():
    _, T, K, frames = scene(seed=5, batch=1, frames=2)
    points = unproject_to_world(frames.depth_m[:1], K[:1], T[:1])
    in_other = transform_points(invert_se3(T[1:]), points)
    pixel = in_other @ K[1].T
    z = pixel[..., 2]
    u, v = (pixel[..., :2] / z[..., None]).unbind(-1)
    inside = (z > 0.1) & (u >= 0) & (u <= SIZE[1] - 1) & (v >= 0) & (v <= SIZE[0] - 1)
    there = frames.depth_m[1][
        v.round().clamp(0, SIZE[0] - 1).long(), u.round().clamp(0, SIZE[1] - 1).long()
    ]
    assert inside.float().mean() > 0.3
    relative = ((there - z) / z)[inside]
    assert relative.abs().median() < 0.02
    assert (relative > -0.1).float().mean() > 0.9  # hidden points lie behind, never in front


def test_the_same_seed_gives_the_same_clips_and_another_seed_others():
    config = ClipConfig(height=24, width=32, frames=2)
    a, b, c = (sample_clips(2, config, seed) for seed in (4, 4, 5))
    assert torch.equal(a.images, b.images) and torch.equal(a.depth_m, b.depth_m)
    assert (a.images - c.images).abs().mean() > 0.05
    assert 0 <= a.images.min() and a.images.max() <= 1


def test_instance_ids_name_the_object_that_a_pixel_lies_on():
    world, T, K, frames = scene(seed=1, batch=6, frames=1)
    points = unproject_to_world(frames.depth_m, K, T).flatten(1, 2)
    seen = frames.instance.flatten(1)  # [F, N]
    own = world.instance[:, None, : world.center.shape[1]] == seen[..., None]
    gap = torch.where(own, to_objects(world, points).abs(), torch.inf).amin(-1)
    in_room = points - torch.nn.functional.pad(world.room_half[:, None, 2:], (2, 0))
    to_wall = (world.room_half[:, None] - in_room.abs()).amin(-1).abs()
    gap = torch.where(seen == 0, torch.minimum(gap, to_wall), gap)
    assert gap.quantile(0.999) < 2e-3 and gap.max() < 0.02
    assert 0.05 < (seen > 0).float().mean() < 0.9 and len(seen.unique()) > 4


def test_what_changes_before_a_camera_at_rest_is_marked_as_moving():
    g = torch.Generator().manual_seed(2)
    world = make_world(3, g, 256, moving=1.0)
    time_s = torch.tensor([[0.0, 0.7]]).expand(3, -1)
    T = sample_paths(world, torch.zeros(3, 2), HAND_HELD, g).flatten(0, 1)
    K = pinhole(torch.full((6,), 1.2), *SIZE)
    drawn = render(world.repeat_frames(2, time_s), T, K, SIZE, texture_pool(0))
    depth_m, moving = (x.unflatten(0, (3, 2)) for x in (drawn.depth_m, drawn.moving))
    changed = (depth_m[:, 1] - depth_m[:, 0]).abs() > 0.01
    assert changed.any() and not moving.all()
    assert moving.any(1)[changed].all()
    assert changed[moving.any(1)].float().mean() > 0.4
    assert not scene(seed=2, batch=2)[3].moving.any()


def test_shadows_lie_where_something_stands_before_the_lamp_and_nowhere_else():
    world, T, K, _ = scene(seed=3, batch=6, frames=1)
    lit, shadowed = (render(world, T, K, SIZE, texture_pool(0), shadows=s) for s in (False, True))
    points = unproject_to_world(lit.depth_m, K, T).flatten(1, 2)
    to_lamp = world.light[:, None] - points
    share = torch.linspace(0.03, 0.97, 60)[:, None]
    on_the_way = (points[:, :, None] + share * to_lamp[:, :, None]).flatten(1, 2)
    nearest = to_objects(world, on_the_way).amin(-1).view(6, -1, 60).amin(-1)
    faces = (lit.normal_world.flatten(2).mT * to_lamp).sum(-1) / to_lamp.norm(dim=-1) > 0.1
    darker = (lit.rgb - shadowed.rgb).flatten(2).amax(1)
    blocked, free = faces & (nearest < -0.02), nearest > 0.03
    assert blocked.float().mean() > 0.01 and free.float().mean() > 0.2
    assert darker[blocked].quantile(0.05) > 1e-3 and darker[free].max() < 1e-5


def test_a_sensor_adds_noise_of_its_own_to_every_pixel_and_clip():
    grey = torch.full((40, 3, 16, 16), 0.5)
    images = degrade(grey, 1, torch.Generator().manual_seed(0))
    bend = images[..., 2:] - 2 * images[..., 1:-1] + images[..., :-2]  # a vignette is smooth
    sigma = bend.flatten(1).std(1) / math.sqrt(6)
    assert 0.01 < sigma.mean() < 0.02 and sigma.min() < 0.007 and 0.02 < sigma.max() < 0.035


def test_a_sensor_exposes_each_clip_for_grey_and_stores_values_on_a_curve():
    half_dark = torch.full((4, 3, 8, 16), 0.02)
    half_dark[..., 8:] = 0.08
    half_dark[2:] *= 3  # the second clip of two frames: more light, the same picture
    plain = degrade(half_dark, 2, torch.Generator().manual_seed(0), strength=0.0)
    assert torch.allclose(plain[:2], plain[2:], atol=1e-6)
    assert torch.allclose(plain[..., 0], torch.tensor((0.18 * 0.4) ** (1 / 2.2)))
    assert torch.allclose(plain[..., 15] / plain[..., 0], torch.tensor(4 ** (1 / 2.2)))
    flicker = half_dark.clone()
    flicker[1] *= 2  # within a clip, light that changes is seen to change
    first, second = degrade(flicker, 2, torch.Generator().manual_seed(0), strength=0.0)[:2]
    assert torch.allclose(second / first, torch.tensor(2 ** (1 / 2.2)), atol=1e-4)


@pytest.mark.parametrize(
    ('motion', 'fastest'), [(HAND_HELD, 3.0), (CALM, 3.0), (WHEELED, 3.0), (DRONE, 6.0)]
)
def test_cameras_move_smoothly_and_keep_away_from_things(motion, fastest):
    g = torch.Generator().manual_seed(8)
    world = make_world(12, g, 256)
    time_s = torch.arange(60).expand(12, -1) / 20
    T = sample_paths(world, time_s, motion, g)
    eye = torch.eye(3).expand(12, 60, 3, 3)
    torch.testing.assert_close(T[..., :3, :3] @ T[..., :3, :3].mT, eye, atol=1e-5, rtol=0)
    assert (torch.linalg.det(T[..., :3, :3]) > 0).all()
    speed = T[..., :3, 3].diff(dim=1).norm(dim=-1) * 20
    assert speed.max() < fastest
    assert (T[..., :3, 3].diff(dim=1).diff(dim=1).norm(dim=-1) * 400).max() < 8 * fastest
    nearest = clearance(world, T[..., :3, 3]).amin(1)
    assert (nearest > 0.1).float().mean() >= 0.75 and nearest.median() > 0.2
    if motion is WHEELED:
        assert T[..., 2, 3].diff(dim=1).abs().max() < 1e-5


def drawn_paths(motion, kind='room', batch=100):
    """Positions [B, S, 3] and rotations [B, S, 3, 3] at 10 Hz."""
    g = torch.Generator().manual_seed(4)
    time_s = torch.arange(30).expand(batch, -1) / 10
    T = sample_paths(make_world(batch, g, 256, kind=kind), time_s, motion, g)
    return T[..., :3, 3], T[..., :3, :3]


def angle_deg(cosine):
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


@pytest.mark.parametrize('motion', [HAND_HELD, WHEELED])
def test_a_camera_that_stands_still_does_not_turn_and_the_others_move(motion):
    position, R = drawn_paths(dataclasses.replace(motion, still_share=0.4))
    far = (position - position[:, :1]).norm(dim=-1).amax(1)
    turn = angle_deg(((R[:, :1] * R).sum((-1, -2)) - 1) / 2).amax(1)
    still = far < 1e-6
    assert 0.3 < still.float().mean() < 0.7  # of several paths the one that hits nothing is taken
    assert turn[still].max() < 2  # tremor
    assert turn[~still].median() > 4


@pytest.mark.parametrize('kind', ['room', 'corridor'])
def test_what_drives_looks_where_it_drives_and_turns_no_faster_than_robots(kind):
    position, R = drawn_paths(dataclasses.replace(WHEELED, still_share=0.0), kind)
    velocity = 10 * position.diff(dim=1)[..., :2]
    axis = torch.nn.functional.normalize(R[:, :-1, :2, 2] + R[:, 1:, :2, 2], dim=-1)
    speed = velocity.norm(dim=-1)
    fast = speed > 0.05
    assert fast.float().mean() > 0.6
    aside = angle_deg((velocity * axis).sum(-1)[fast] / speed[fast])
    backwards = aside > 90
    assert 0.01 < backwards.float().mean() < 0.3  # it stops and reverses now and then
    assert torch.minimum(aside, 180 - aside).max() < MOUNTING_DEG + 3
    assert torch.minimum(aside, 180 - aside).median() < 15
    # also where the speed passes zero
    turn = angle_deg(
        (R[:, 1:, :2, 2] * R[:, :-1, :2, 2]).sum(-1)
        / (R[:, 1:, :2, 2].norm(dim=-1) * R[:, :-1, :2, 2].norm(dim=-1))
    )
    assert (10 * turn).max() < 120 and (10 * turn).square().mean().sqrt() > 3


def test_textures_repeat_and_blur_without_changing_their_mean():
    pool = make_textures(3, count=8)
    uv = torch.rand(200, 2)
    index = torch.arange(200) % 8
    near = torch.ones(200)
    torch.testing.assert_close(
        sample_textures(pool, index, uv, near),
        sample_textures(pool, index, uv + torch.tensor([3.0, -2.0]), near),
        atol=2e-3,
        rtol=0,
    )
    coarse = sample_textures(pool, index, uv, torch.full((200,), 2.0**LEVELS))
    mean = pool.texels.view(8, -1)[:, : SIDE * SIDE].mean(1)
    torch.testing.assert_close(coarse, mean[index], atol=1e-4, rtol=0)
    assert near.shape == coarse.shape


def test_a_sequence_is_a_recording_with_truth():
    recording = render_sequence(seed=1, num_frames=4, height=42, width=56, fps=5.0, fov_deg=90.0)
    assert recording.images.shape == (4, 42, 56, 3) and recording.images.dtype == torch.uint8
    assert recording.images.float().std() > 10
    assert recording.depth_m.min() > 0.02 and recording.depth_m.max() < 12
    assert [b - a for a, b in zip(recording.stamps_ns, recording.stamps_ns[1:])] == [
        200_000_000
    ] * 3
    assert 2 * math.atan(28 / recording.K[0, 0]) == pytest.approx(math.pi / 2, abs=1e-5)
    with pytest.raises(ConfigError, match='positive rate'):
        render_sequence(seed=1, fps=0.0)


def test_a_walk_through_four_rooms_comes_back_to_where_it_began():
    recording = render_sequence(seed=5, num_frames=240, height=12, width=16, fps=4, kind='rooms')
    path = recording.T_world_camera[:, :3, 3]
    away = (path - path[0]).norm(dim=-1)
    assert away.max() > 3  # it has been in the opposite room
    later = away[int(away.argmax()) :]
    assert later.min() < 0.3
    again = int(away.argmax()) + int(later.argmin())
    change = (recording.depth_m[again] - recording.depth_m[0]).abs() / recording.depth_m[0]
    assert change.median() < 0.15
    quadrants = {(bool(x > 0), bool(y > 0)) for x, y in path[:, :2].tolist()}
    assert len(quadrants) == 4


def test_walls_divide_the_four_rooms():
    g = torch.Generator().manual_seed(1)
    world = make_world(3, g, 256, kind='rooms')
    half, height = world.room_half, torch.full((3,), 1.5)
    for axis in (0, 1):
        wall, doorway = torch.zeros(3, 3), torch.zeros(3, 3)
        wall[:, axis], doorway[:, axis] = 0.25 * half[:, axis], 0.5 * half[:, axis]
        wall[:, 2] = doorway[:, 2] = height
        assert (clearance(world, wall[:, None]) < 0).all()
        assert (_partition_clearance(world, doorway) > 0.3).all()


def _partition_clearance(world, points):
    """Distance to the walls that belong to the room, not to furniture in a doorway."""
    furniture = world.instance[:, : world.center.shape[1]] > 0
    return clearance(without_objects(world, furniture), points[:, None])[:, 0]


def test_the_sky_has_no_depth_and_the_ground_has():
    clips = sample_clips(3, ClipConfig(height=24, width=32, frames=2, kind='open'), seed=2)
    assert 0 < (clips.depth_m == 0).float().mean() < 0.7
    assert (clips.depth_m[:, :, -1] > 0).all()


def test_a_recording_tells_what_moves_what_is_seen_and_through_which_lens(tmp_path):
    plain, rich = (
        render_sequence(1, 3, 24, 32, fps=1.0, fov_deg=80.0, **options)
        for options in (
            {},
            {'moving': 1.0, 'principal_shift': 0.1, 'distortion': (-0.2, 0.05), 'surfaces': True},
        )
    )
    assert plain.normal_world is None and plain.instance is None and not plain.moving.any()
    assert rich.moving.shape == rich.instance.shape == rich.depth_m.shape and rich.moving.any()
    assert (rich.instance[rich.moving] > 0).all()
    assert torch.equal(rich.K[:2, :2], plain.K[:2, :2]) and (rich.K != plain.K).any()
    # Points of one flat patch, found with the lens, lie across its normal; without it they do not.
    bent, straight = (
        _slopes(rich, camera_rays(rich.K[None], 24, 32, lens)[0])
        for lens in (rich.distortion, (0.0, 0.0))
    )
    assert bent < 1e-5 and straight > 1e-3, (bent, straight)
    write_tum(rich, tmp_path / 'tum')
    numbers = [float(x) for x in (tmp_path / 'tum' / 'camera.txt').read_text().split()]
    assert numbers[4:] == [-0.2, 0.05, 0, 0, 0] and len(numbers) == 9
    with pytest.raises(OutputError, match='pinhole'):
        write_scene_folder(rich, tmp_path / 'scene')


def _slopes(recording, rays):
    """How far neighbours on one flat patch lie off it, as a share of their distance; median."""
    points = (rays * recording.depth_m.flatten(1)[..., None]) @ recording.T_world_camera[
        :, :3, :3
    ].mT
    points = points.unflatten(1, (24, 32))
    normal = recording.normal_world.movedim(1, -1)
    step = points[:, :, 4:] - points[:, :, :-4]
    same = (normal[:, :, 4:] == normal[:, :, :-4]).all(-1)
    same &= recording.instance[:, :, 4:] == recording.instance[:, :, :-4]
    return ((step * normal[:, :, 4:]).sum(-1).abs() / step.norm(dim=-1))[same].median()


def test_the_lens_of_a_batch_is_drawn_from_its_range():
    def drawn(seed, **options):
        return sample_clips(1, ClipConfig(height=8, width=8, frames=1, **options), seed)

    lenses = [drawn(seed, k1=(-0.1, 0.1)).distortion for seed in range(4)]
    assert len(set(lenses)) == 4 and all(-0.1 <= k1 <= 0.1 and k2 == 0 for k1, k2 in lenses)


def test_depth_that_a_tum_image_cannot_hold_is_unknown(tmp_path):
    yard = render_sequence(seed=0, num_frames=1, height=24, width=32, kind='open')
    write_tum(yard, tmp_path)
    [path] = (tmp_path / 'depth').iterdir()
    read = torch.from_numpy(np.array(Image.open(path)) / 5000.0).float()
    far = yard.depth_m[0] > 13.1
    assert far.any() and not far.all()
    torch.testing.assert_close(read, yard.depth_m[0].where(~far, 0.0), atol=1.1e-4, rtol=0)


def test_a_corridor_is_long_and_narrow():
    world = make_world(20, torch.Generator().manual_seed(0), 256, kind='corridor')
    assert (world.room_half[:, 1] > 2.5 * world.room_half[:, 0]).all()
    with pytest.raises(ConfigError, match='unknown kind of world'):
        make_world(1, torch.Generator(), 256, kind='castle')


@pytest.mark.parametrize(
    ('fov_deg', 'k1', 'k2'),
    [(69, -0.2, 0.05), (90, -0.3, 0.1), (100, -0.2, 0.05), (100, 0.3, 0.1), (80, 0.2, -0.1)],
)
def test_distorted_rays_project_back_to_their_pixels(fov_deg, k1, k2):
    K = pinhole(torch.tensor([math.radians(fov_deg)]), 24, 32)
    rays = camera_rays(K, 24, 32, distortion=(k1, k2))[0]
    square = rays[:, :2].square().sum(-1, keepdim=True)
    distorted = rays[:, :2] * (1 + k1 * square + k2 * square**2)
    pixel = distorted * K[0, 0, 0] + K[0, :2, 2]
    v, u = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing='ij')
    torch.testing.assert_close(pixel, torch.stack([u, v], -1).view(-1, 2), atol=1e-3, rtol=0)


def test_a_lens_that_folds_the_image_over_is_refused():
    for fov_deg, k1, k2 in ((100, -0.3, 0.0), (80, -0.35, 0.03), (90, 0.2, -0.3)):
        K = pinhole(torch.tensor([math.radians(fov_deg)]), 24, 32)
        with pytest.raises(ConfigError, match='cannot be inverted'):
            camera_rays(K, 24, 32, distortion=(k1, k2))


def test_the_principal_point_can_lie_off_the_middle():
    clips = sample_clips(4, ClipConfig(height=24, width=32, frames=1, principal_shift=0.1), seed=1)
    offset = clips.K[:, 0, :2, 2] - torch.tensor([16.0, 12.0])
    assert (offset.abs() <= torch.tensor([3.2, 2.4])).all() and offset.abs().max() > 0.3


def test_no_object_stands_in_the_way_of_a_chosen_path():
    g = torch.Generator().manual_seed(3)
    world = make_world(10, g, 256)
    path = torch.rand(10, 80, 3, generator=g) * 2 - 1
    path[..., 2] += 1.2
    cleared = clear_path(world, path, 0.2)
    objects = clearance(cleared, path)
    assert (objects > 0.15).all() and (clearance(world, path) < 0).any()


@pytest.mark.heavy
def test_the_compiled_renderer_draws_what_the_plain_one_draws():
    plain, compiled = (
        sample_clips(2, ClipConfig(height=24, width=32, compiled=how, shadows=True), seed=5)
        for how in (False, True)
    )
    assert torch.equal(plain.T_world_camera, compiled.T_world_camera)
    differs = (plain.depth_m - compiled.depth_m).abs() > 1e-3
    assert differs.float().mean() < 1e-3  # rays along an edge may fall to either side
    assert (plain.images - compiled.images).abs().quantile(0.995) < 1e-3
