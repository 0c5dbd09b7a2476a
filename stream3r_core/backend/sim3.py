"""Similarity transforms Sim(3) as matrices [..., 4, 4] = [[s R, t], [0, 1]]; batched, float64.

``S_a_b`` takes points of frame ``b`` to frame ``a``, so that composition is ``@``; s > 0 is the
length in units of ``a`` of what has length 1 in ``b``. A tangent vector [..., 7] is rotation (3,
rad), translation (3), log scale; it moves a transform from the right, ``S @ exp(xi)``, as in
Strasdat, Montiel and Davison, Scale drift-aware large scale monocular SLAM (2010).
"""

import numpy as np
from scipy.spatial.transform import Rotation

_TINY = 1e-9


def from_parts(scale, R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Similarities [..., 4, 4] of scales [...], rotations [..., 3, 3], translations [..., 3]."""
    scale, R, t = (np.asarray(part, np.float64) for part in (scale, R, t))
    shape = np.broadcast_shapes(scale.shape, R.shape[:-2], t.shape[:-1])
    S = np.zeros((*shape, 4, 4))
    S[..., :3, :3] = scale[..., None, None] * R
    S[..., :3, 3] = t
    S[..., 3, 3] = 1
    return S


def scale_of(S: np.ndarray) -> np.ndarray:
    """Scales [...]."""
    return np.sqrt(np.square(S[..., 0, :3]).sum(-1))


def rotation_of(S: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3]."""
    return S[..., :3, :3] / scale_of(S)[..., None, None]


def rigid_of(S: np.ndarray) -> np.ndarray:
    """Rigid transforms [..., 4, 4] with the rotation and translation of ``S``.

    For ``S_map_camera`` this is the camera's pose in the map.
    """
    return from_parts(1.0, rotation_of(S), S[..., :3, 3])


def inverse(S: np.ndarray) -> np.ndarray:
    """Inverses [..., 4, 4]."""
    M = np.swapaxes(S[..., :3, :3], -1, -2) / np.square(S[..., 0, :3]).sum(-1)[..., None, None]
    inverted = np.zeros(S.shape)
    inverted[..., :3, :3], inverted[..., 3, 3] = M, 1
    inverted[..., :3, 3:] = -M @ S[..., :3, 3:]
    return inverted


def act(S_a_b: np.ndarray, points_b: np.ndarray) -> np.ndarray:
    """Points [..., N, 3] of frame b in frame a, in the type of ``points_b``."""
    S_a_b = np.asarray(S_a_b, points_b.dtype)
    return points_b @ np.swapaxes(S_a_b[..., :3, :3], -1, -2) + S_a_b[..., None, :3, 3]


def nearest_rotation(M: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] nearest to a matrix: float32 poses are not orthogonal to 1e-12."""
    U, _, Vh = np.linalg.svd(M)
    U[:, 2] *= np.sign(np.linalg.det(U @ Vh))
    return U @ Vh


def nearest_rigid(T: np.ndarray) -> np.ndarray:
    """Rigid transform [4, 4] nearest to a matrix: products of many would not stay one."""
    return from_parts(1.0, nearest_rotation(T[:3, :3]), T[:3, 3])


def hat(v: np.ndarray) -> np.ndarray:
    """Skew matrices [..., 3, 3] whose product with w is the cross product of v and w."""
    matrix = np.zeros((*v.shape[:-1], 3, 3))
    matrix[..., 2, 1], matrix[..., 0, 2], matrix[..., 1, 0] = np.moveaxis(v, -1, 0)
    return matrix - np.swapaxes(matrix, -1, -2)


def adjoint(S: np.ndarray) -> np.ndarray:
    """Matrices A [..., 7, 7] with ``S @ exp(xi) @ inverse(S) = exp(A @ xi)``."""
    R, t = rotation_of(S), S[..., :3, 3]
    A = np.zeros((*S.shape[:-2], 7, 7))
    A[..., :3, :3] = R
    A[..., 3:6, :3] = hat(t) @ R
    A[..., 3:6, 3:6] = S[..., :3, :3]
    A[..., 3:6, 6] = -t
    A[..., 6, 6] = 1
    return A


def rotation_exp(rotvec: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] of rotation vectors [..., 3], rad."""
    matrices = Rotation.from_rotvec(np.reshape(rotvec, (-1, 3))).as_matrix()
    return matrices.reshape(*np.shape(rotvec), 3)


def rotation_log(R: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3], at most pi long, of rotations [..., 3, 3]."""
    skew = (R - np.swapaxes(R, -1, -2)) / 2
    v = np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)  # axis times sine
    sine = np.sqrt(np.square(v).sum(-1))
    cosine = (np.trace(R, axis1=-2, axis2=-1) - 1) / 2
    stretch = np.where(sine > _TINY, np.arctan2(sine, cosine) / np.maximum(sine, _TINY), 1)
    rotvec = v * stretch[..., None]
    near_pi = cosine < -0.99  # where the axis vanishes in the skew part
    if near_pi.any():
        rotvec[near_pi] = Rotation.from_matrix(R[near_pi]).as_rotvec()
    return rotvec


def exp(xi: np.ndarray) -> np.ndarray:
    """Similarities [..., 4, 4] of tangent vectors [..., 7]."""
    xi = np.asarray(xi, np.float64)
    rotvec, u, log_scale = xi[..., :3], xi[..., 3:6], xi[..., 6]
    t = (_translation_matrix(rotvec, log_scale) @ u[..., None])[..., 0]
    return from_parts(np.exp(log_scale), rotation_exp(rotvec), t)


def log(S: np.ndarray) -> np.ndarray:
    """Tangent vectors [..., 7] of similarities; rotations are at most pi."""
    log_scale, rotvec = np.log(scale_of(S)), rotation_log(rotation_of(S))
    u = np.linalg.solve(_translation_matrix(rotvec, log_scale), S[..., :3, 3:])
    return np.concatenate([rotvec, u[..., 0], log_scale[..., None]], -1)


def _translation_matrix(rotvec: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Integral over tau in 0..1 of exp(tau (log_scale I + hat(rotvec))), [..., 3, 3].

    With z = log_scale + i angle, the integrals of exp(log_scale tau) cos(angle tau) and
    sin(angle tau) are the real and imaginary part of (exp(z) - 1) / z: no series near zero.
    """
    angle = np.linalg.norm(rotvec, axis=-1)
    K = hat(rotvec / np.maximum(angle, _TINY)[..., None])
    turning = _expm1_over(log_scale + 1j * angle)
    straight = _expm1_over(log_scale + 0j).real
    sine, cosine = turning.imag[..., None, None], turning.real
    return (
        straight[..., None, None] * np.eye(3)
        + sine * K
        + (straight - cosine)[..., None, None] * (K @ K)
    )


def _expm1_over(z: np.ndarray) -> np.ndarray:
    is_zero = np.abs(z) < _TINY
    return np.where(is_zero, 1, np.expm1(z) / np.where(is_zero, 1, z))
