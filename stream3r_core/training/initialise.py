"""Starting values for training from nothing."""

import torch
from torch import nn

from stream3r_core.model.blocks import LayerScale
from stream3r_core.model.network import CausalVGGT


def initialise(model: CausalVGGT) -> CausalVGGT:
    """Make an untrained network easy to train, in place.

    Residual branches start at full strength (the published 0.01 suits deep pre-trained networks),
    and the camera head answers the identity pose and a field of view of one radian: its rotation
    is trained as a raw quaternion, which must start away from zero.
    """
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
    last = model.camera_head.pose_branch.fc2
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
        last.bias[6:] = 1 / model.config.camera_iterations  # iterations add up
    return model
