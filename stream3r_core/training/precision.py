"""In which precision a training multiplies: as its recipe says, or what the device does fast."""

from contextlib import AbstractContextManager

import torch

from stream3r_core.kernels.processor import has_bfloat16
from stream3r_core.training.settings import TrainingConfig


def mixed_precision(config: TrainingConfig, device: torch.device) -> str:
    """Return 'bf16' or 'no', in the words of Accelerate.

    'auto' is bfloat16, but for processors that do not multiply it: there it takes ten times as
    long as float32.
    """
    if config.precision != 'auto':
        return config.precision
    return 'bf16' if device.type != 'cpu' or has_bfloat16() else 'no'


def precision_of(config: TrainingConfig, device: torch.device) -> AbstractContextManager:
    """Return the autocast that the recipe asks for; to be put round networks, never losses."""
    narrow = mixed_precision(config, device) == 'bf16'
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)
