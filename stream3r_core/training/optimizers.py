"""AdamW, or Muon for the matrices of the transformer with AdamW for the rest; one schedule."""

import math

import torch
from torch import nn

from stream3r_core.errors import MissingDependencyError
from stream3r_core.training.settings import OptimizerConfig


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all parameters that want a gradient."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if config.name == 'muon' and p.ndim == 2 and '_blocks.' in n]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {'params': [p for p in rest if p.ndim > 1], 'weight_decay': config.weight_decay},
        {'params': [p for p in rest if p.ndim <= 1], 'weight_decay': 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))]
    if matrices:
        if not hasattr(torch.optim, 'Muon'):
            raise MissingDependencyError(
                f'optimizer muon needs torch >= 2.9, this is {torch.__version__}; use adamw'
            )
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn='match_rms_adamw',
            )
        )
    return optimizers


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.min_lr + (config.lr - config.min_lr) * cosine
