"""Weights in 8 bits: half the memory of bfloat16, for GPUs that are small or shared."""

import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core.kernels.quantized import quantize
from stream3r_core.model.blocks import Attention, Mlp
from stream3r_core.model.network import CausalVGGT

_UNIT = 1 / 128  # codes of the size of weights: exact in every type, and no sum leaves float16


class Int8Linear(nn.Module):
    """A linear layer that keeps each row of its weights as codes of 8 bits and one scale.

    They are widened to the type of the input for every product; the scales are applied to the
    sums, in float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        codes, scale = quantize(linear.weight.detach(), 8)
        self.register_buffer('codes', codes)  # [out, in] int8
        self.register_buffer('factor', scale[:, 0] / _UNIT)  # [out] float32
        self.bias = linear.bias
        # Whoever calls a layer asks its weights for the type that it multiplies in.
        self.register_buffer('weight', linear.weight.new_empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        products = F.linear(x, self.codes.to(x.dtype) * _UNIT)
        return (products * self.factor + self.bias).to(x.dtype)


def with_int8_weights(network: CausalVGGT) -> CausalVGGT:
    """Replace the linear layers of encoder, aggregator and camera trunk, in place.

    These hold nearly all parameters. What writes the answers stays: the dense heads and the last
    layers of the camera head, whose nine numbers would feel every step.
    """
    parts = (network.aggregator, network.camera_head.trunk)
    owners = [m for part in parts for m in part.modules() if isinstance(m, (Attention, Mlp))]
    for owner in owners:
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(owner, name, Int8Linear(layer))
    return network


def parameter_bytes(network: nn.Module) -> int:
    """Return how many bytes the parameters and codes of ``network`` take."""
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
