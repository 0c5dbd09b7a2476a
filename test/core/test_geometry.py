from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stream3r_core.errors import InputError
from stream3r_core.geometry import (
    MIN_FOV,
    decode_pose,
    encode_pose,
    invert_se3,
    matrix_to_quat_xyzw,
    quat_xyzw_to_matrix,
    transform_points,
    umeyama,
    unproject,
    unproject_to_world,
)

GOLDEN = Path(__file__).parents[1] / 'golden' / 'geometry.safetensors'
HEIGHT, WIDTH = 42, 70


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN)


def random_quaternions(*shape, dtype=torch.float64, seed=0):
    quat = torch.randn(*shape, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    quat = quat / quat.norm(dim=-1, keepdim=True)
    return torch.where(quat[..., 3:] < 0, -quat, quat)


def random_se3(*shape, seed=0):
    T = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    T[..., :3, :3] = quat_xyzw_to_matrix(random_quaternions(*shape, seed=seed))
    T[..., :3, 3] = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed + 1))
    return T


def test_decode_encode_and_inverse_equal_the_golden_tensors(golden):
    T_camera_world, K = decode_pose(golden['pose_enc'], HEIGHT, WIDTH)
    torch.testing.assert_close(T_camera_world[..., :3, :], golden['extrinsic'], atol=1e-6, rtol=0)
    torch.testing.assert_close(K, golden['intrinsic'], atol=0, rtol=1e-6)
    torch.testing.assert_close(
        invert_se3(T_camera_world[0]), golden['cam_to_world'], atol=1e-6, rtol=0
    )
    reencoded = encode_pose(T_camera_world, K, HEIGHT, WIDTH)
    torch.testing.assert_close(reencoded, golden['reencoded'], atol=1e-6, rtol=0)


def test_unprojected_depth_equals_the_golden_world_points(golden):
    T_camera_world, K = decode_pose(golden['pose_enc'][0, [0, 6]], HEIGHT, WIDTH)
    points = unproject_to_world(golden['depth'][..., 0], K, invert_se3(T_camera_world))
    torch.testing.assert_close(points, golden['world_points'], atol=2e-6, rtol=0)


@pytest.mark.parametrize('model', ['stream3r', 'streamvggt'])
def test_depth_of_a_network_equals_the_golden_world_points(golden, model):
    group = {k.split('.')[-1]: v for k, v in golden.items() if k.startswith(model)}
    depth = group['depth'][..., 0]
    T_camera_world, K = decode_pose(group['pose_enc'], *depth.shape[-2:])
    torch.testing.assert_close(T_camera_world[..., :3, :], group['extrinsic'], atol=1e-6, rtol=0)
    torch.testing.assert_close(K, group['intrinsic'], atol=0, rtol=1e-6)
    points = unproject_to_world(depth, K, invert_se3(T_camera_world))
    torch.testing.assert_close(points, group['world_points_from_depth'], atol=2e-6, rtol=1e-6)


def test_quaternions_survive_the_round_trip_also_at_half_turns():
    half_turns = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]).double()
    half_turns[3] /= 2**0.5
    quat = torch.cat([random_quaternions(1000), half_turns])
    R = quat_xyzw_to_matrix(quat)
    assert (R.mT @ R - torch.eye(3)).abs().max() < 1e-14
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-14
    back = matrix_to_quat_xyzw(R)
    alignment = (back * quat).sum(-1).abs()  # a half turn has two signs
    assert (alignment - 1).abs().max() < 1e-14
    assert (back[:1000] - quat[:1000]).abs().max() < 1e-14 and (back[:, 3] >= 0).all()


def test_a_quaternion_needs_no_unit_length():
    quat = random_quaternions(10)
    torch.testing.assert_close(quat_xyzw_to_matrix(3.7 * quat), quat_xyzw_to_matrix(quat))


@pytest.mark.parametrize('fov', [0.0, 1e-6, 3.2, 50.0])
def test_impossible_fields_of_view_give_finite_positive_focal_lengths(fov):
    pose_enc = torch.tensor([0, 0, 0, 0, 0, 0, 1, fov, fov])
    _, K = decode_pose(pose_enc, HEIGHT, WIDTH)
    assert K.isfinite().all() and K[0, 0] > 0 and K[1, 1] > 0
    assert K[0, 0] <= 1.01 * WIDTH / MIN_FOV


def test_unprojected_points_project_onto_their_own_pixels():
    K = torch.tensor([[60.0, 0, 33], [0, 50, 20], [0, 0, 1]], dtype=torch.float64)
    depth = torch.rand(2, 5, 7, dtype=torch.float64) + 0.5
    points = unproject(depth, K)
    pixels = points @ K.mT
    pixels = pixels[..., :2] / pixels[..., 2:]
    v, u = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing='ij')
    torch.testing.assert_close(pixels, torch.stack([u, v], -1).double().expand(2, 5, 7, 2))
    torch.testing.assert_close(points[..., 2], depth)


def test_rigid_transforms_compose_with_their_inverse_to_identity():
    T = random_se3(3, 4)
    torch.testing.assert_close(invert_se3(T) @ T, torch.eye(4).double().expand(3, 4, 4, 4))
    points = torch.randn(3, 4, 6, 5, 3, dtype=torch.float64)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    expected = (T[:, :, None, None] @ homogeneous.unsqueeze(-1))[..., :3, 0]
    torch.testing.assert_close(transform_points(T, points), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_functions_keep_the_dtype_of_their_input(dtype):
    pose_enc = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=dtype)
    T, K = decode_pose(pose_enc, HEIGHT, WIDTH)
    points = unproject_to_world(torch.ones(3, 4, dtype=dtype), K, invert_se3(T))
    encoded = encode_pose(T, K, HEIGHT, WIDTH)
    similarity = umeyama(torch.eye(3, dtype=dtype), torch.eye(3, dtype=dtype), True)
    assert {x.dtype for x in (T, K, points, encoded, *similarity)} == {dtype}


@pytest.mark.parametrize('with_scale', [True, False])
@pytest.mark.parametrize('planar', [True, False])
def test_alignment_finds_the_similarity_that_made_the_points(with_scale, planar):
    source = torch.randn(4, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if planar:
        source[..., 2] = 0.3
    T, true_scale = random_se3(4, seed=3), 2.5 if with_scale else 1.0
    target = true_scale * transform_points(T, source)
    scale, R, t = umeyama(source, target, with_scale)
    torch.testing.assert_close(scale, torch.full_like(scale, true_scale))
    torch.testing.assert_close(R, T[:, :3, :3])
    torch.testing.assert_close(t, true_scale * T[:, :3, 3])


def test_alignment_of_mirrored_points_is_a_rotation_and_not_a_reflection():
    source = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    _, R, _ = umeyama(source, source * torch.tensor([1.0, 1.0, -1.0]), True)
    assert torch.linalg.det(R) > 0.999


def test_alignment_is_the_least_squares_minimum():
    generator = torch.Generator().manual_seed(5)
    source = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    target = 1.3 * source.flip(-1) + 0.1 * torch.randn(40, 3, generator=generator)
    scale, R, t = umeyama(source, target, True)

    def error(scale, R, t):
        return (scale * source @ R.mT + t - target).square().sum()

    best = error(scale, R, t)
    for _ in range(20):
        turn = quat_xyzw_to_matrix(
            torch.cat([0.01 * torch.randn(3, generator=generator), torch.ones(1)]).double()
        )
        shift = 0.01 * torch.randn(3, generator=generator)
        assert error(scale * (1 + 0.01 * shift[0]), turn @ R, t + shift) > best


LINE = torch.linspace(0, 1, 9).unsqueeze(-1) * torch.tensor([1.0, 2.0, -0.5])


@pytest.mark.parametrize(
    'source, target, reason',
    [
        (LINE, LINE, 'degenerate'),
        (torch.zeros(5, 3), torch.zeros(5, 3), 'degenerate'),
        (torch.eye(3)[:2], torch.eye(3)[:2], 'at least 3'),
        (torch.eye(3), torch.eye(3).expand(2, 3, 3), 'equal shape'),
        (torch.eye(3) * torch.nan, torch.eye(3), 'finite'),
    ],
)
def test_alignment_refuses_what_does_not_determine_it(source, target, reason):
    with pytest.raises(InputError, match=reason):
        umeyama(source, target, True)
