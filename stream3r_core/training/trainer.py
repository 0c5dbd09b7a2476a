"""The training loop: one process or many through Accelerate, exactly resumable."""

import functools
import json
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from stream3r_core.checkpoints import load_model
from stream3r_core.config import from_dict, model_config, to_dict
from stream3r_core.errors import CheckpointError, ConfigError, Stream3rError
from stream3r_core.model.network import CausalVGGT
from stream3r_core.training.checkpointing import (
    latest_checkpoint,
    load_checkpoint,
    read_run,
    save_checkpoint,
)
from stream3r_core.training.data import DataMixture, Visibility
from stream3r_core.training.initialise import fit_pose_layer, initialise, require_single_answer
from stream3r_core.training.objectives import make_objective
from stream3r_core.training.optimizers import (
    learning_rate,
    make_optimizers,
    set_learning_rate,
)
from stream3r_core.training.precision import mixed_precision
from stream3r_core.training.settings import TrainingConfig
from stream3r_core.training.validation import validate

LOG = 'log.jsonl'
_LOG_EVERY = 50  # steps
#: Options of which a resumed run does not depend, and places that may have moved.
_MAY_CHANGE = (
    'save_every',
    'validate_every',
    'validation_scenes',
    'validation_frames',
    'compile_renderer',
    'checkpoint_blocks',
    'init',
    'teacher',
)


class Trainer:
    """State of one run: network, averaged weights, optimisers, step."""

    def __init__(self, config: TrainingConfig, output: Path, accelerator: Accelerator):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.network = make_network(config).to(accelerator.device)
        self.averaged = make_network(config).to(accelerator.device).requires_grad_(False).eval()
        self.averaged.load_state_dict(self.network.state_dict())
        if config.fit_pose_batches:
            require_single_answer(self.network)
        freeze(self.network, config.freeze)
        if config.checkpoint_blocks:
            recompute_blocks(self.network)
        optimizers = make_optimizers(self.network, config.optimizer)
        self.model, *self.optimizers = accelerator.prepare(self.network, *optimizers)
        self.objective = make_objective(config, accelerator.device)
        self.data = DataMixture(config, accelerator.process_index, accelerator.device)
        self.bf16 = mixed_precision(config, accelerator.device) == 'bf16'
        self.step = 0

    def train_step(self) -> dict[str, Tensor]:
        """Do one optimiser step and return loss, gradient norm and the terms of the loss."""
        config = self.config.optimizer
        set_learning_rate(
            self.optimizers, learning_rate(self.step, self.config.total_steps, config)
        )
        sums: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros((), device=self.accelerator.device)
        )
        for part in range(config.accumulate):
            is_last = part == config.accumulate - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                for name, term in self._accumulate_gradient(part).items():
                    sums[name] += term.detach() / config.accumulate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._update_average()
        return {'loss': sum(sums.values()), 'grad_norm': norm, **sums}

    def _accumulate_gradient(self, part: int) -> dict[str, Tensor]:
        draw = self.step * self.config.optimizer.accumulate + part
        batch = self.data.batch(self.step, draw)
        sight = Visibility.draw(self.config.stage_at(self.step), self.config.seed, draw)
        with fast_small_attention(self.accelerator.device):  # recomputed blocks need it as well
            # The prepared network has its own autocast; targets and losses stay in float32.
            terms = self.objective(self.model, batch, sight)
            loss = sum(terms.values())
            require_finite(loss, self.step)
            self.accelerator.backward(loss / self.config.optimizer.accumulate)
        return terms

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.optimizer.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.averaged.parameters(), self.network.parameters()):
            mean.lerp_(value, 1 - decay)

    def _fit_pose_layer(self) -> None:
        """Fit the last layer of the camera head to batches that are not trained on."""
        count = self.config.fit_pose_batches
        first = self.config.total_steps * self.config.optimizer.accumulate
        draws = range(first, first + count)
        batches = (self.data.batch(self.step, draw) for draw in draws)
        fit_pose_layer(self.network, batches, self.bf16)
        # Each process has fitted its own batches; one network goes on.
        broadcast([p.data for p in self.network.camera_head.pose_branch.fc2.parameters()])
        self.averaged.load_state_dict(self.network.state_dict())

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights on the held-out sequences, seen as in training."""
        sight = Visibility.of(self.config.stage_at(self.step).windows[0])
        batches = self.data.held_out(self.step)
        return validate(self.averaged, batches, sight.mode, sight.window, self.bf16)

    def save(self) -> None:
        """Write a checkpoint; a kill in between leaves the previous one."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output,
                self.step,
                self.network,
                self.averaged,
                self.optimizers,
                to_dict(self.config),
            )

    def resume(self) -> bool:
        """Load the newest checkpoint of the folder, if there is one."""
        folder = latest_checkpoint(self.output)
        if folder is not None:
            require_same_recipe(folder, to_dict(self.config))
            self.step = load_checkpoint(folder, self.network, self.averaged, self.optimizers)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device))
        if len(steps.unique()) > 1:
            raise CheckpointError(
                f'the processes found checkpoints of steps {steps.tolist()}: all need the same '
                f'folder {self.output}'
            )
        if folder is not None and self.accelerator.is_main_process:
            forget_later_lines(self.output / LOG, self.step)
        return folder is not None

    def run(self, stop_at: int | None = None) -> None:
        """Train to the end of the last stage, writing logs, checkpoints and validations."""
        config, main = self.config, self.accelerator.is_main_process
        last = config.total_steps if stop_at is None else min(config.total_steps, stop_at)
        sums: dict[str, Tensor] = defaultdict(float)
        started, since = time.monotonic(), self.step
        bar = tqdm(total=config.total_steps, initial=self.step, unit='step', disable=not main)
        while self.step < last:
            if self.step == config.fit_pose_step and config.fit_pose_batches:
                self._fit_pose_layer()
            for name, value in self.train_step().items():
                sums[name] = sums[name] + value.detach()
            bar.update()
            if self.step % _LOG_EVERY == 0:
                means = {
                    name: float(self.accelerator.reduce(value, 'mean')) / (self.step - since)
                    for name, value in sums.items()
                }
                self._log(
                    {**means, 'seconds': (time.monotonic() - started) / (self.step - since)},
                    'train',
                )
                bar.set_postfix(loss=f'{means["loss"]:.3f}')
                sums, started, since = defaultdict(float), time.monotonic(), self.step
            ends = self.step == last
            if self.step % config.save_every == 0 or ends:
                self.save()
            if (self.step % config.validate_every == 0 or ends) and main:
                self._log(self.validate(), 'validation')
        bar.close()

    def _log(self, values: dict[str, float], kind: str) -> None:
        """Append one line to ``log.jsonl`` and hand the values to TensorBoard."""
        self.accelerator.log({f'{kind}/{k}': v for k, v in values.items()}, step=self.step)
        if self.accelerator.is_main_process:
            line = {'kind': kind, 'step': self.step, **{k: round(v, 6) for k, v in values.items()}}
            with (self.output / LOG).open('a') as file:
                file.write(json.dumps(line) + '\n')


def require_same_recipe(folder: Path, recipe: dict) -> None:
    """Refuse to go on with another recipe than the one a checkpoint was made with.

    Options that came later have their defaults in an older checkpoint.
    """
    old, new = read_run(folder)['recipe'], json.loads(json.dumps(recipe))
    with suppress(ConfigError):  # of an option that is gone: compared as it stands
        old = json.loads(json.dumps(to_dict(from_dict(TrainingConfig, old))))
    for name in sorted(old.keys() | new.keys()):
        if name not in _MAY_CHANGE and old.get(name) != new.get(name):
            raise CheckpointError(
                f'{folder} was made with {name} = {old.get(name)}, the recipe now says '
                f'{new.get(name)}; put it back, or start in a new folder from the weights (init)'
            )


def forget_later_lines(log: Path, step: int) -> None:
    """Drop what was logged after ``step``: those steps are done again."""
    if log.is_file():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text(''.join(line for line in lines if json.loads(line)['step'] <= step))


def make_network(config: TrainingConfig) -> CausalVGGT:
    """Return the network of the recipe with its starting weights."""
    sizes = config.model or model_config(config.preset)
    if config.init:
        shipped = config.init == 'shipped'
        which, weights = (config.preset, None) if shipped else (sizes, config.init)
        model = load_model(which, weights, dtype=torch.float32).train()
    else:
        torch.manual_seed(config.seed)
        model = initialise(CausalVGGT(sizes))
    model.autocast_heads = config.loss == 'dense'
    return model


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Keep the parameters whose names start with one of ``prefixes`` as they are."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(f'freeze: no parameter starts with {prefix!r}')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(prefixes) or ('\0',)))


def recompute_blocks(model: CausalVGGT) -> None:
    """Recompute the blocks of the aggregator in the backward pass; saves memory."""
    for block in [*model.aggregator.frame_blocks, *model.aggregator.global_blocks]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def fast_small_attention(device: torch.device) -> AbstractContextManager:
    """Avoid the fused attention of CPUs: its backward pass is slow on short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == 'cpu' else nullcontext()


def require_finite(loss: Tensor, step: int) -> None:
    """Stop a run that has diverged."""
    if not loss.isfinite():
        raise Stream3rError(f'the loss is {loss.item()} at step {step}; lower the learning rate')
