"""Parts of a network as compiled code: what has the same shapes in every frame of a stream.

Off by default: compiling takes a minute, needs a C++ compiler (on a GPU, Triton) where the program
runs, and on a CPU gains nothing (benchmarks/RESULTS.md).
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stream3r_core.attention import attend
from stream3r_core.errors import first_line
from stream3r_core.model.network import CausalVGGT

_log = logging.getLogger(__name__)


def compile_network(model: CausalVGGT) -> CausalVGGT:
    """Compile encoder, frame blocks, dense heads and the MLPs of the global blocks, in place.

    Attention stays outside: its kernels are chosen while the program runs, and the caches of the
    global blocks grow. A part that cannot be compiled says so once and runs as it was.
    """
    for part, options in _static_parts(model):
        part.forward = _CompiledForward(part, options)
    return model


def _static_parts(model: CausalVGGT) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield modules whose inputs keep their shape, and what they are called with besides."""
    outside = torch.compiler.disable(attend)
    encoder = model.aggregator.patch_embed
    is_convolutional = model.config.encoder == 'conv'
    for module in (model.depth_head, model.point_head, *([encoder] if is_convolutional else [])):
        yield module, {}
    for block in (*model.aggregator.frame_blocks, *([] if is_convolutional else encoder.blocks)):
        yield block, {'attention': outside}
    for block in model.aggregator.global_blocks:
        yield block.mlp, {}


class _CompiledForward:
    """The forward of one module: compiled when it is first called, or as it was."""

    def __init__(self, module: nn.Module, options: dict[str, Any]):
        self.name, self.options = type(module).__name__, options
        self.plain = module.forward
        try:
            self.compiled = torch.compile(module.forward, dynamic=False)
        except RuntimeError as error:  # a Python that this PyTorch cannot compile for
            self._give_up(error)

    def __call__(self, *args, **kwargs):
        """Call the module."""
        if self.compiled is not None:
            try:
                return self.compiled(*args, **self.options, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._give_up(getattr(error, 'inner_exception', error))
        return self.plain(*args, **kwargs)

    def _give_up(self, error: BaseException) -> None:
        self.compiled = None
        text = '%s could not be compiled and runs uncompiled: %s'
        _log.warning(text, self.name, first_line(error))
