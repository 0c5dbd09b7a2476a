"""AdamW, or Muon for the matrices of the transformer with AdamW for the rest; one schedule."""

import math

import torch
from torch import nn

from stream3r_core.training.muon import Muon
from stream3r_core.training.settings import OptimizerConfig

_POSE = 'camera_head.pose_branch.'


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all parameters that want a gradient.

    Every parameter group has a ``factor``, which :func:`set_learning_rate` applies.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if _is_matrix(n, p)]
    others = [(n, p) for n, p in named if not _is_matrix(n, p)]
    groups = []
    for factor, chosen in (
        (config.pose_factor, [p for n, p in others if n.startswith(_POSE)]),
        (config.rest_factor, [p for n, p in others if not n.startswith(_POSE)]),
        (1.0, matrices if config.name == 'adamw' else []),
    ):
        for decay, some in (
            (config.weight_decay, [p for p in chosen if p.ndim > 1]),
            (0.0, [p for p in chosen if p.ndim <= 1]),
        ):
            if some:
                groups.append({'params': some, 'weight_decay': decay, 'factor': factor})
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))] if groups else []
    if config.name == 'muon' and matrices:
        group = {'params': matrices, 'factor': 1.0}
        optimizers.append(Muon([group], lr=config.lr, weight_decay=config.weight_decay))
    return optimizers


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell the matrices of the transformer from everything else."""
    return parameter.ndim == 2 and '_blocks.' in name


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every parameter group its share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['factor']


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.min_lr + (config.lr - config.min_lr) * cosine
