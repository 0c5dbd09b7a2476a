"""GTSAM factors of the pose graph's measurements; GTSAM is loaded on first use."""

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.errors import MissingDependencyError

_FREE = 1e6  # standard deviation of what a measurement does not speak of


def load_gtsam():
    """Return the gtsam module.

    Raises:
        MissingDependencyError: It is absent, or older than 4.3.

    """
    try:
        import gtsam
    except ImportError as error:
        raise MissingDependencyError(
            "the back end needs GTSAM: install the extra 'backend' (pip install 'gtsam>=4.3'), or "
            'run without a back end'
        ) from error
    if not hasattr(gtsam, 'BetweenFactorSimilarity3'):
        raise MissingDependencyError(
            'this GTSAM has no Sim(3) factors; version 4.3 or newer has (CPython 3.11 or newer)'
        )
    return gtsam


def to_gtsam(S: np.ndarray):
    """Return the Similarity3 of GTSAM, which moves p to s (R p + t)."""
    gtsam = load_gtsam()
    scale = float(sim3.scale_of(S))
    return gtsam.Similarity3(gtsam.Rot3(sim3.rotation_of(S)), S[:3, 3] / scale, scale)


def make_factor(edge, config):
    """Return the factor of an :class:`~stream3r_core.backend.pose_graph.Edge`."""
    gtsam = load_gtsam()
    if edge.kind == 'scale':
        sigmas = np.array([_FREE] * 6 + [np.sqrt(edge.covariance[0, 0])])
        target = gtsam.Similarity3(gtsam.Rot3(), np.zeros(3), float(edge.measurement[0]))
        noise = _robust(gtsam.noiseModel.Diagonal.Sigmas(sigmas), config)
        return gtsam.PriorFactorSimilarity3(edge.keys[0], target, noise)
    noise = gtsam.noiseModel.Gaussian.Covariance(edge.covariance)
    if edge.kind == 'anchor':
        return gtsam.PriorFactorSimilarity3(edge.keys[0], to_gtsam(edge.measurement), noise)
    if edge.kind == 'gravity':
        return gtsam.CustomFactor(noise, list(edge.keys), _gravity_error(*edge.measurement))
    if edge.kind == 'motion':
        return gtsam.CustomFactor(noise, list(edge.keys), _motion_error(edge.measurement))
    if edge.kind == 'loop' and not edge.on_trial:
        noise = _robust(noise, config)
    return gtsam.BetweenFactorSimilarity3(*edge.keys, to_gtsam(edge.measurement), noise)


def _robust(noise, config):
    """Noise model whose outliers lose their pull."""
    gtsam = load_gtsam()
    kernel = gtsam.noiseModel.mEstimator.Cauchy.Create(config.kernel)
    return gtsam.noiseModel.Robust.Create(kernel, noise)


def _gravity_error(up_submap: np.ndarray, up_map: np.ndarray):
    """Difference [3] of the directions in the map."""

    def error(factor, values, jacobians):
        R = values.atSimilarity3(factor.keys()[0]).rotation().matrix()
        if jacobians is not None:
            jacobians[0] = np.asfortranarray(
                np.hstack([-R @ sim3.hat(up_submap), np.zeros((3, 4))])
            )
        return R @ up_submap - up_map

    return error


def _motion_error(T_i_j: np.ndarray):
    """Rotation [3] and translation [3] that the submaps' origins miss, in the frame of i.

    Derivatives of the rotation to first order in what is missed.
    """
    R_i_j, t_i_j = T_i_j[:3, :3], T_i_j[:3, 3]

    def error(factor, values, jacobians):
        first, second = (values.atSimilarity3(key) for key in factor.keys())
        (Ri, ti, si), (Rj, tj, sj) = (
            (S.rotation().matrix(), S.scale() * S.translation(), S.scale())
            for S in (first, second)
        )
        t = Ri.T @ (tj - ti)
        if jacobians is not None:
            Ji, Jj = np.zeros((2, 6, 7), order='C')
            Ji[:3, :3], Jj[:3, :3] = -Rj.T @ Ri, np.eye(3)
            Ji[3:, :3], Ji[3:, 3:6], Jj[3:, 3:6] = sim3.hat(t), -si * np.eye(3), sj * Ri.T @ Rj
            jacobians[0], jacobians[1] = np.asfortranarray(Ji), np.asfortranarray(Jj)
        return np.concatenate([sim3.rotation_log(R_i_j.T @ Ri.T @ Rj), t - t_i_j])

    return error
