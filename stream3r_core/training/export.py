"""Write the averaged weights of a run as the one small file that is shipped."""

import argparse
from pathlib import Path

import torch

from stream3r_core.checkpoints import load_model, save_model
from stream3r_core.errors import CheckpointError
from stream3r_core.training.checkpointing import WEIGHTS, latest_checkpoint


def export(run: str | Path, path: str | Path) -> Path:
    """Store the weights of the newest checkpoint of ``run`` in float16, with their configuration.

    Loading casts them back; activations never see float16. Returns the checkpoint's folder.
    """
    folder = latest_checkpoint(Path(run))
    if folder is None:
        raise CheckpointError(f'{run}: no checkpoint (step_*) in this folder')
    model = load_model(None, folder / WEIGHTS, dtype=torch.float32).half()
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise CheckpointError(f'{folder}: some weights do not fit into float16')
    save_model(model, path)
    return folder


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', help='folder of the training run')
    parser.add_argument('file', help='the .safetensors file to write')
    options = parser.parse_args()
    print(f'{export(options.run, options.file)} -> {options.file}')


if __name__ == '__main__':
    main()
