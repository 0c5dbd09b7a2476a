"""The training loop: one process or many through Accelerate, resumable to the bit."""

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stream3r_core.config import model_config, to_dict
from stream3r_core.model.network import CausalVGGT
from stream3r_core.training.batch import make_targets
from stream3r_core.training.data import attention_of, held_out_batches, training_batch
from stream3r_core.training.dense_loss import dense_loss
from stream3r_core.training.initialise import initialise
from stream3r_core.training.optimizers import learning_rate, make_optimizers
from stream3r_core.training.settings import TrainingConfig
from stream3r_core.training.validation import validate

log = logging.getLogger(__name__)


def fast_small_attention(device: torch.device) -> AbstractContextManager:
    """Avoid the fused attention of CPUs: on short sequences its backward pass is several times slower."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == 'cpu' else nullcontext()


class Trainer:
    """State of one run in ``folder``: network, averaged weights, optimisers, step."""

    def __init__(self, config: TrainingConfig, folder: Path, accelerator):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        torch.manual_seed(config.seed)
        self.bare = initialise(CausalVGGT(config.model or model_config(config.preset)))
        self.bare.autocast_heads = True
        for name, parameter in self.bare.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(config.freeze) or ('\0',)))
        self.optimizers = make_optimizers(self.bare, config.optimizer)
        self.average = {n: p.detach().clone() for n, p in self.bare.state_dict().items()}
        self.step = 0
        self._held_out = None
        self.model, *self.optimizers = accelerator.prepare(self.bare, *self.optimizers)

    def train_step(self) -> dict[str, Tensor]:
        """Do one optimiser step and return the terms of the loss."""
        config, step = self.config, self.step
        self._set_learning_rate(learning_rate(step, config.total_steps, config.optimizer))
        stage = config.stage_at(step)
        mode, window = attention_of(stage, config.seed, step)
        device, rank = self.accelerator.device, self.accelerator.process_index
        with torch.no_grad():
            batch = training_batch(config, step, rank, device)
            targets = make_targets(batch)
        with self.accelerator.autocast(), fast_small_attention(device):
            prediction = self.model(batch.images, mode=mode, window=window)
        terms = dense_loss(prediction, targets, config.dense)
        loss = sum(terms.values())
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._update_average()
        self.step += 1
        return {'loss': loss.detach(), 'grad_norm': norm, **{k: v.detach() for k, v in terms.items()}}

    def _set_learning_rate(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.optimizer.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.bare.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def averaged_model(self) -> CausalVGGT:
        """Return a network with the averaged weights."""
        model = CausalVGGT(self.bare.config)
        model.load_state_dict(self.average)
        return model.to(self.accelerator.device).eval()

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights on the held-out sequences."""
        stage = self.config.stage_at(self.step)
        if self._held_out is None or self._held_out[0] != stage:
            self._held_out = (stage, list(held_out_batches(self.config, stage)))
        return validate(self.averaged_model(), self._held_out[1], 'causal')

    def save(self) -> None:
        """Write the checkpoint; a kill in between leaves the previous one."""
        state = {
            'step': self.step,
            'model': self.bare.state_dict(),
            'average': self.average,
            'optimizers': [o.state_dict() for o in self.optimizers],
        }
        temporary = self.folder / 'state.pt.part'
        torch.save(state, temporary)
        temporary.replace(self.folder / 'state.pt')

    def resume(self) -> bool:
        """Load the checkpoint of the folder, if there is one."""
        path = self.folder / 'state.pt'
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self.step = state['step']
        self.bare.load_state_dict(state['model'])
        self.average = state['average']
        for optimizer, saved in zip(self.optimizers, state['optimizers']):
            optimizer.load_state_dict(saved)
        return True

    def run(self) -> None:
        """Train to the end of the last stage."""
        config, started, since = self.config, time.time(), self.step
        sums: dict[str, float] = {}
        while self.step < config.total_steps:
            terms = self.train_step()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + float(value)
            if self.step % 50 == 0:
                count = self.step - since
                rate = (time.time() - started) / count
                print(self.step, f'{rate:.2f} s/step', {k: round(v / count, 4) for k, v in sums.items()}, flush=True)
                sums, since, started = {}, self.step, time.time()
            if self.step % config.save_every == 0:
                self.save()
            if self.step % config.validate_every == 0 or self.step == config.total_steps:
                row = self.validate()
                print('VAL', self.step, {k: round(v, 4) for k, v in row.items()}, flush=True)
                with (self.folder / 'validation.jsonl').open('a') as f:
                    f.write(json.dumps({'step': self.step, **row}) + '\n')
                started = time.time()
        self.save()
