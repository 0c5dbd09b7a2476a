"""``stream3r train``: train or fine-tune a network from a recipe."""

import argparse
from pathlib import Path

from stream3r_ros.resources import resource

RECIPES = 'config/training'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.add_argument('recipe', help=f'YAML file, or the name of one in {RECIPES}')
    parser.add_argument(
        '--output',
        required=True,
        type=Path,
        help='checkpoints and logs; a run found there goes on',
    )
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu'))
    parser.add_argument(
        '--stop-at', type=int, metavar='STEP', help='leave after this step, to go on another time'
    )
    parser.epilog = (
        'Several GPUs or nodes: '
        'accelerate launch -m stream3r_core.training.run RECIPE.yaml --output DIR'
    )


def run(args: argparse.Namespace) -> int:
    """Train; return 0 when the run has reached its last step or ``--stop-at``."""
    from stream3r_core.training.run import main
    from stream3r_core.training.settings import load_recipe

    main(load_recipe(find_recipe(args.recipe)), args.output, args.device, args.stop_at)
    return 0


def find_recipe(name: str) -> Path:
    """Return the recipe file for a path, or for the name of a shipped recipe."""
    is_file_name = name.endswith(('.yaml', '.yml'))
    return Path(name) if is_file_name else resource(f'{RECIPES}/{name}.yaml')
