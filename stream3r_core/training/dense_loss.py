"""The loss that trains the small network from nothing: dense, scale-aware, easy to start from.

The published objective (``published_loss``) refines a network that already works. A network that
starts from random numbers needs every pixel to say where the cameras are: the error of a world
point is split into its part along the viewing ray (depth) and across it (rotation), each relative
to the distance.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from stream3r_core.config import option
from stream3r_core.training.batch import Targets


@dataclass(frozen=True)
class DenseLossConfig:
    """Weights of the terms."""

    log_depth: float = option(1.0, 'absolute error of the logarithm of depth')
    gradient: float = option(0.5, 'difference of that error between neighbouring pixels')
    points_along: float = option(1.0, 'error of world points along the viewing ray, over distance')
    points_across: float = option(
        4.0, 'error of world points across the viewing ray, over distance'
    )
    translation: float = option(5.0, 'absolute error of the translation')
    rotation: float = option(10.0, 'absolute error of the raw quaternion')
    fov: float = option(1.0, 'absolute error of the fields of view')
    confidence: float = option(0.1, 'the two confidences, on errors taken as given')
    confidence_alpha: float = option(
        0.2, 'reward of confidence: the best confidence is alpha over error'
    )
    iteration_decay: float = option(0.6, 'weight of an earlier iteration of the camera head')


def dense_loss(
    prediction: Mapping[str, Tensor], targets: Targets, config: DenseLossConfig
) -> dict[str, Tensor]:
    """Return the terms by name, each already weighted; their sum is the loss."""
    valid = targets.valid.float()
    count = valid.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return (x * valid).sum() / count

    log_error = prediction['depth'].squeeze(-1).float().log() - targets.depth.log()
    ray = targets.world_points - targets.camera_position[..., None, None, :]
    distance = ray.norm(dim=-1)
    error = (prediction['world_points'].float() - targets.world_points) / distance[..., None]
    along = (error * ray).sum(-1) / distance
    across = (error - along[..., None] * (ray / distance[..., None])).norm(dim=-1)
    depth_reward = _confidence(prediction['depth_conf'], log_error.abs(), config)
    point_reward = _confidence(prediction['world_points_conf'], error.norm(dim=-1), config)
    return {
        'log_depth': config.log_depth * mean(log_error.abs()),
        'gradient': config.gradient * _gradient(log_error, valid),
        'points_along': config.points_along * mean(along.abs()),
        'points_across': config.points_across * mean(across),
        **_camera(prediction['pose_enc_list'], targets.pose_enc, config),
        'confidence': config.confidence * mean(depth_reward + point_reward),
    }


def _confidence(confidence: Tensor, error: Tensor, config: DenseLossConfig) -> Tensor:
    confidence = confidence.float()
    return confidence * error.detach() - config.confidence_alpha * confidence.log()


def _gradient(error: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference of ``error`` between horizontal and vertical neighbours."""
    along_x = (error.diff(dim=-1).abs() * valid[..., 1:] * valid[..., :-1]).mean()
    along_y = (error.diff(dim=-2).abs() * valid[..., 1:, :] * valid[..., :-1, :]).mean()
    return along_x + along_y


def _camera(answers: list[Tensor], target: Tensor, config: DenseLossConfig) -> dict[str, Tensor]:
    weights = [config.iteration_decay ** (len(answers) - 1 - i) for i in range(len(answers))]

    def term(part: slice) -> Tensor:
        losses = [
            w * F.l1_loss(a[..., part].float(), target[..., part])
            for w, a in zip(weights, answers)
        ]
        return sum(losses) / sum(weights)

    return {
        'translation': config.translation * term(slice(0, 3)),
        'rotation': config.rotation * term(slice(3, 7)),
        'fov': config.fov * term(slice(7, 9)),
    }
