"""Entry to a training run; started by ``stream3r train`` or through the Accelerate launcher."""

import argparse
import dataclasses
import importlib.util
from datetime import timedelta
from pathlib import Path

import torch

from stream3r_core.training.precision import mixed_precision
from stream3r_core.training.settings import TrainingConfig, load_recipe

_PATIENCE = timedelta(hours=2)


def main(
    config: TrainingConfig, output: str | Path, device: str = 'auto', stop_at: int | None = None
) -> None:
    """Train in the folder ``output``; goes on where a run in this folder stopped.

    ``stop_at``: leave after this step with a checkpoint, to go on another time.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    from stream3r_core.training.trainer import Trainer

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    has_gpu = device != 'cpu' and torch.cuda.is_available()
    likely = torch.device('cuda' if has_gpu else 'cpu')  # Accelerate wants to know before it says
    # What a checkpoint says: a run resumed where 'auto' means something else is refused.
    config = dataclasses.replace(config, precision=mixed_precision(config, likely))
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=device == 'cpu',
        log_with=_trackers(),
        project_dir=folder,
        kwargs_handlers=[
            # Only the dense loss reaches every parameter.
            DistributedDataParallelKwargs(find_unused_parameters=config.loss != 'dense'),
            # The others wait while the first process validates.
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    accelerator.init_trackers('tensorboard')
    trainer = Trainer(config, folder, accelerator)
    resumed = trainer.resume()
    where = f'{accelerator.device}, {accelerator.num_processes} processes'
    accelerator.print(
        f'training from step {trainer.step}{" (resumed)" if resumed else ""} on {where}, '
        f'precision {config.precision}'
    )
    trainer.run(stop_at)
    accelerator.end_training()


def _trackers() -> str | None:
    return 'tensorboard' if importlib.util.find_spec('tensorboard') else None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Train a network from a recipe.')
    parser.add_argument('recipe', help='YAML recipe, see config/training/')
    parser.add_argument('--output', required=True, help='folder of checkpoints and logs')
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu'))
    return parser.parse_args(arguments)


if __name__ == '__main__':
    options = parse()
    main(load_recipe(options.recipe), options.output, options.device)
