"""Starting values for training from nothing."""

from collections.abc import Iterable

import torch
from torch import nn

from stream3r_core.errors import ConfigError
from stream3r_core.model.blocks import LayerScale
from stream3r_core.model.network import CausalVGGT
from stream3r_core.training.batch import Batch, make_targets


def initialise(model: CausalVGGT) -> CausalVGGT:
    """Make an untrained network easy to train, in place.

    Residual branches start at full strength (the published 0.01 suits deep pre-trained networks),
    and the camera head answers the identity pose and a field of view of one radian: its rotation
    is trained as a raw quaternion, which must start away from zero.
    """
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
    for block in model.camera_head.trunk:  # passes on what the tokens say, to begin with
        nn.init.constant_(block.ls1.gamma, 0.1)
        nn.init.constant_(block.ls2.gamma, 0.1)
    last = model.camera_head.pose_branch.fc2
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
        last.bias[6:] = 1 / model.config.camera_iterations  # iterations add up
    return model


def require_single_answer(model: CausalVGGT) -> None:
    """Refuse a camera head whose answer is a sum over iterations."""
    if model.config.camera_iterations != 1:
        raise ConfigError(
            'fit_pose_batches needs a network with camera_iterations 1, got '
            f'{model.config.camera_iterations}; set fit_pose_batches to 0'
        )


@torch.no_grad()
def fit_pose_layer(
    model: CausalVGGT, batches: Iterable[Batch], bf16: bool = True, ridge: float = 30.0
) -> CausalVGGT:
    """Set the last layer of the camera head by least squares on ``batches``, in place.

    A network that has learned its depth and matches first carries the rotation in its camera
    tokens long before small steps have grown the last layer enough to say so.
    """
    require_single_answer(model)
    last, features, answers = model.camera_head.pose_branch.fc2, [], []
    handle = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
    for batch in batches:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            model(batch.images, mode='causal', outputs=())
        answers.append(make_targets(batch).pose_enc)
    handle.remove()
    X = torch.cat([f.flatten(0, 1) for f in features]).double()
    Y = torch.cat([a.flatten(0, 1) for a in answers]).double()
    mean, true_mean = X.mean(0), Y.mean(0)
    spread = X.std(0).clamp(min=1e-6)
    Z = (X - mean) / spread
    penalty = ridge * torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    W = torch.linalg.solve(Z.T @ Z + penalty, Z.T @ (Y - true_mean)) / spread[:, None]
    last.weight.copy_(W.T)
    last.bias.copy_(true_mean - mean @ W)
    return model
