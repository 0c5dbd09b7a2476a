"""Rotations, rigid transforms, pose encoding, pinhole unprojection and similarity alignment.

Pure functions on tensors with any leading batch axes; results keep the dtype and device of their
input, and nothing waits for the device except :func:`umeyama`. Cameras have OpenCV axes (x right,
y down, z forward); ``T_a_b`` takes points of frame ``b`` to frame ``a``.

Pixel convention of the published networks: a pixel is addressed by its integer index, and the
principal point lies at (width / 2, height / 2).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stream3r_core.errors import InputError

MIN_FOV = 0.01  # rad; the networks' ReLU can state 0, which would be an infinite focal length
MAX_FOV = torch.pi - MIN_FOV
_RANK_TOLERANCE = 1e-12  # of the covariance's singular values: squares of lengths, hence so small


def quat_xyzw_to_matrix(quat_xyzw: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4], which need not have unit length."""
    x, y, z, w = quat_xyzw.unbind(-1)
    s = 2 / (quat_xyzw * quat_xyzw).sum(-1)
    rows = (
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quat_xyzw(R: Tensor) -> Tensor:
    """Unit quaternions [..., 4] with w >= 0 of rotation matrices [..., 3, 3].

    Each of the four components can be the divisor; the largest one is used, so that none is small.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in R.unbind(-2))
    squares = (1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22, 1 + m00 + m11 + m22)
    magnitude = torch.stack(squares, -1).clamp(min=0).sqrt()  # [..., 4] = 2 |x|, |y|, |z|, |w|
    products = (  # row i = 4 * (component i) * (x, y, z, w)
        (squares[0], m10 + m01, m02 + m20, m21 - m12),
        (m10 + m01, squares[1], m21 + m12, m02 - m20),
        (m02 + m20, m21 + m12, squares[2], m10 - m01),
        (m21 - m12, m02 - m20, m10 - m01, squares[3]),
    )
    candidates = torch.stack([torch.stack(row, -1) for row in products], -2)  # [..., 4, 4]
    candidates = candidates / (2 * magnitude.unsqueeze(-1).clamp(min=0.1))
    largest = magnitude.argmax(-1)[..., None, None].expand(*magnitude.shape[:-1], 1, 4)
    quat = candidates.gather(-2, largest).squeeze(-2)
    return torch.where(quat[..., 3:] < 0, -quat, quat)


def _se3(R: Tensor, t: Tensor) -> Tensor:
    """Stack rotation [..., 3, 3] and translation [..., 3] into [..., 4, 4]."""
    T = F.pad(torch.cat([R, t.unsqueeze(-1)], -1), (0, 0, 0, 1))
    T[..., 3, 3] = 1
    return T


def invert_se3(T: Tensor) -> Tensor:
    """Inverse of rigid transforms [..., 4, 4], by transposing the rotation."""
    R_inverse = T[..., :3, :3].mT
    return _se3(R_inverse, -(R_inverse @ T[..., :3, 3:]).squeeze(-1))


def decode_pose(pose_enc: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Turn the networks' pose encoding into a rigid transform and intrinsics.

    Args:
        pose_enc: [..., 9]: translation of world to camera (3), its rotation as quat_xyzw (4, any
            length), vertical and horizontal field of view (2, rad).
        height: Rows of the image, pixels.
        width: Columns of the image, pixels.

    Returns:
        ``T_camera_world`` [..., 4, 4] and ``K`` [..., 3, 3] in pixels. Fields of view are held
        within 0.01 .. pi - 0.01 rad, so that focal lengths are finite and positive
        (at most 100 image sides).

    """
    T_camera_world = _se3(quat_xyzw_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3])
    half_fov_hw = pose_enc[..., 7:9].clamp(MIN_FOV, MAX_FOV) / 2
    K = pose_enc.new_zeros(*pose_enc.shape[:-1], 3, 3)
    K[..., 0, 0] = width / 2 / torch.tan(half_fov_hw[..., 1])
    K[..., 1, 1] = height / 2 / torch.tan(half_fov_hw[..., 0])
    K[..., 0, 2] = width / 2
    K[..., 1, 2] = height / 2
    K[..., 2, 2] = 1
    return T_camera_world, K


def encode_pose(T_camera_world: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Inverse of :func:`decode_pose`, [..., 9]; the principal point has no place in it."""
    quat_xyzw = matrix_to_quat_xyzw(T_camera_world[..., :3, :3])
    fov_h = 2 * torch.atan(height / 2 / K[..., 1, 1])
    fov_w = 2 * torch.atan(width / 2 / K[..., 0, 0])
    fov_hw = torch.stack([fov_h, fov_w], -1)
    return torch.cat([T_camera_world[..., :3, 3], quat_xyzw, fov_hw], -1)


def transform_points(T_a_b: Tensor, points_b: Tensor) -> Tensor:
    """Points [..., *, 3] of frame b in frame a; T_a_b [..., 4, 4] shares the leading axes."""
    batch = T_a_b.shape[:-2]
    planes = points_b.reshape(*batch, -1, 3).mT  # [..., 3, N]
    points_a = T_a_b[..., :3, :3] @ planes + T_a_b[..., :3, 3:]
    return points_a.mT.reshape(points_b.shape)


def unproject(depth: Tensor, K: Tensor) -> Tensor:
    """Points in the camera frame [..., H, W, 3] of depth along the optical axis [..., H, W].

    ``K`` [..., 3, 3] without skew. Pixels are integer indices. Depth that is zero, negative or NaN
    is carried through, for the caller to mask. In memory x, y and z are one plane each, which
    makes what follows several times faster.
    """
    height, width = depth.shape[-2:]
    u = torch.arange(width, dtype=depth.dtype, device=depth.device)
    v = torch.arange(height, dtype=depth.dtype, device=depth.device).unsqueeze(-1)
    fx, fy, cx, cy = (K[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    planes = [(u - cx) / fx * depth, (v - cy) / fy * depth, depth]
    return torch.stack(planes, -3).movedim(-3, -1)


def unproject_to_world(depth: Tensor, K: Tensor, T_world_camera: Tensor) -> Tensor:
    """Points in the world frame [..., H, W, 3] of depth [..., H, W]."""
    return transform_points(T_world_camera, unproject(depth, K))


def umeyama(source: Tensor, target: Tensor, with_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares similarity that takes ``source`` onto ``target`` (Umeyama 1991, eq. 40-43).

    Args:
        source: Points [..., N, 3], N >= 3, paired with ``target``.
        target: Points [..., N, 3].
        with_scale: Estimate the scale; otherwise it is 1.

    Returns:
        scale [...], R [..., 3, 3] and t [..., 3] of ``target = scale * R @ source + t``, computed
        in float64, in the dtype of ``source``.

    Raises:
        InputError: Shapes differ, fewer than 3 points, values are not finite, or the points of
            either set lie on one line, so that the rotation is not determined.

    """
    if source.shape != target.shape or source.ndim < 2 or source.shape[-1] != 3:
        raise InputError(
            f'alignment needs two paired sets [..., N, 3] of equal shape, '
            f'got {list(source.shape)} and {list(target.shape)}'
        )
    if source.shape[-2] < 3:
        raise InputError(f'alignment needs at least 3 point pairs, got {source.shape[-2]}')
    x, y = source.double(), target.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise InputError(
            'alignment needs finite points, got NaN or infinity; filter them out first'
        )
    mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    x, y = x - mean_x, y - mean_y
    U, singular, Vh = torch.linalg.svd(y.mT @ x / x.shape[-2])  # covariance, eq. 38
    if (singular[..., 1] <= _RANK_TOLERANCE * singular[..., 0]).any():
        raise InputError(
            'alignment is degenerate: the points lie on one line or in one place; '
            'use points, or a trajectory, that turn at least once'
        )
    sign = torch.ones_like(singular)
    sign[..., 2] = torch.linalg.det(U @ Vh).sign()  # eq. 39 and 43: no reflection
    R = U * sign.unsqueeze(-2) @ Vh
    variance = x.square().sum(-1).mean(-1)
    scale = (singular * sign).sum(-1) / variance if with_scale else torch.ones_like(variance)
    t = mean_y.squeeze(-2) - scale.unsqueeze(-1) * (R @ mean_x.mT).squeeze(-1)
    return scale.to(source.dtype), R.to(source.dtype), t.to(source.dtype)
