"""Checkpoints of a run: folders ``step_00001000`` of safetensors and JSON, whole or absent."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stream3r_core.checkpoints import read_weights, save_model
from stream3r_core.errors import CheckpointError
from stream3r_core.model.network import CausalVGGT

WEIGHTS = 'weights.safetensors'  # the averaged weights: what is shipped and evaluated
LIVE = 'live.safetensors'  # those that training goes on from
OPTIMIZER = 'optimizer.safetensors'
RUN = 'run.json'
_FOLDER = re.compile(r'step_(\d+)')


def save_checkpoint(
    output: Path,
    step: int,
    live: CausalVGGT,
    averaged: CausalVGGT,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the state of a run and delete all but the ``keep`` newest checkpoints."""
    folder = output / f'step_{step:08d}'
    unfinished = output / 'unfinished'
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(averaged, unfinished / WEIGHTS)
    save_model(live, unfinished / LIVE)
    tensors, rest = _flatten([o.state_dict() for o in optimizers])
    save_file(tensors, unfinished / OPTIMIZER)
    run = {'step': step, 'recipe': recipe, 'optimizers': rest}
    (unfinished / RUN).write_text(json.dumps(run, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for old in _folders(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint folder of a run, if it has any."""
    folders = _folders(output)
    return folders[-1] if folders else None


def read_run(folder: Path) -> dict[str, Any]:
    """Return step, recipe and optimiser groups of a checkpoint."""
    try:
        return json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise _incomplete(folder, error) from error


def _incomplete(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'{folder} is not a complete training checkpoint ({error}); delete it to go on from '
        'the one before'
    )


def load_checkpoint(
    folder: Path,
    live: CausalVGGT,
    averaged: CausalVGGT,
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Put everything back in place and return the step."""
    run = read_run(folder)
    try:
        tensors = load_file(folder / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise _incomplete(folder, error) from error
    for model, name in ((live, LIVE), (averaged, WEIGHTS)):
        weights, _ = read_weights(folder / name)
        model.load_state_dict(weights)
    states = _unflatten(tensors, run['optimizers'])
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)
    return run['step']


def _folders(output: Path) -> list[Path]:
    found = [p for p in output.iterdir() if _FOLDER.fullmatch(p.name)] if output.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split('_')[1]))


def _flatten(states: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split optimiser states into tensors ``optimizer.parameter.name`` and the JSON rest."""
    tensors, rest = {}, []
    for i, state in enumerate(states):
        for parameter, values in state['state'].items():
            for name, value in values.items():
                tensors[f'{i}.{parameter}.{name}'] = torch.as_tensor(value).contiguous()
        rest.append({'param_groups': state['param_groups']})
    return tensors, rest


def _unflatten(tensors: Mapping[str, Tensor], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    states = [{'state': {}, 'param_groups': r['param_groups']} for r in rest]
    for key, tensor in tensors.items():
        i, parameter, name = key.split('.')
        states[int(i)]['state'].setdefault(int(parameter), {})[name] = tensor
    return states
