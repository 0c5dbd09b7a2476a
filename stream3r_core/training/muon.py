"""Muon: momentum whose every matrix is replaced by its nearest orthogonal one (Jordan 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: Quintic that drives singular values towards 1; the published coefficients.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_RMS_OF_ADAMW = 0.2  # root mean square of an AdamW step in units of its learning rate


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with steps as large as those of AdamW (Liu et al. 2025, section 2.2).

    ``torch.optim.Muon`` does the same one matrix at a time and always in bfloat16: on a processor
    without bfloat16 products its step takes longer than forward and backward pass together. Here
    matrices of one shape are worked on at once, on a processor in float32. The state is the same.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter] | list[dict],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(matrices, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step, with the momentum of Nesterov; return what ``closure`` returns."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group['params']:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                rate = group['lr'] * _RMS_OF_ADAMW * max(shape) ** 0.5
                updates = orthogonal(
                    torch.stack([self._direction(p, group['momentum']) for p in parameters])
                )
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group['lr'] * group['weight_decay'])
                    parameter.sub_(update, alpha=rate)
        return loss

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state['momentum_buffer'] = torch.zeros_like(parameter.grad)
        average = state['momentum_buffer'].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return nearly U V^T of each U S V^T in ``matrices`` [n, rows, columns].

    Singular values end between 0.7 and 1.2, but for those below a hundredth of the largest, which
    the few steps leave smaller: near enough for a direction.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return (x.mT if tall else x).to(matrices.dtype)
