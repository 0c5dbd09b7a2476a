"""``stream3r compare``: cache modes or checkpoints over one input, in one table and one plot."""

import argparse
import copy
import dataclasses
from functools import partial
from pathlib import Path

from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation.compare import COMPARISON_HTML, COMPARISON_JSON, UNITS, compare
from stream3r_core.evaluation.html import number
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_ros.evaluation_tasks import (
    EvaluateConfig,
    Task,
    add_recording_arguments,
    evaluate_task,
    open_clip,
    tasks_from_args,
)
from stream3r_ros.options import (
    add_config_arguments,
    add_output_arguments,
    config_from_args,
    output_folder,
)

DEFAULT_VARIANTS = (
    'causal:session.mode=causal',
    'window:session.mode=window',
    'stac:session.mode=stac',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r compare``."""
    parser.add_argument('input', nargs='+', help='a bag, a video, a folder or a dataset root')
    add_output_arguments(parser)
    add_config_arguments(parser)
    add_recording_arguments(parser)
    parser.add_argument(
        '--variant',
        action='append',
        default=[],
        metavar='NAME:OPTION=VALUE[,OPTION=VALUE...]',
        help=f'what to compare; repeatable (default: {", ".join(DEFAULT_VARIANTS)})',
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    tasks = _variants(args)
    open_clip(next(iter(tasks.values())))  # what cannot be read is said before a folder is made
    folder = output_folder(
        args.output, (*tasks, COMPARISON_JSON, COMPARISON_HTML), args.overwrite, args.input[:1]
    )
    reports = {}
    for name, task in tasks.items():  # one by one, each in a fresh process: costs are comparable
        (outcome,) = run_jobs({name: partial(evaluate_task, task)}, num_workers=1)
        if outcome.failure:
            print(f'FAILED {name}: {outcome.failure}')
        else:
            reports[name] = outcome.value
    if len(reports) < 2:
        raise DataError('fewer than two variants gave results; see the messages above')
    rows = compare(reports, folder)
    for name, row in rows.items():
        known = (
            f'{title} {number(value)} {UNITS[title]}'.rstrip()
            for title, value in row.items()
            if value is not None
        )
        print(f'{name}: {", ".join(known)}')
    print(f'results in {folder}: {COMPARISON_HTML}, {COMPARISON_JSON}, and a folder per variant')
    return 1 if len(reports) < len(tasks) else 0


def _variants(args: argparse.Namespace) -> dict[str, Task]:
    """Return one task per variant, by its name."""
    tasks: dict[str, Task] = {}
    for text in args.variant or DEFAULT_VARIANTS:
        name, colon, options = text.partition(':')
        if not colon or not name or Path(name).name != name or name in tasks:
            raise ConfigError(
                f'--variant: expected NAME:OPTION=VALUE with a new, plain name, got {text!r}'
            )
        own = copy.copy(args)
        own.overrides = [*args.overrides, *filter(None, options.split(','))]
        config = config_from_args(own, config_type=EvaluateConfig)
        found = tasks_from_args(own, config)
        if len(found) > 1:
            raise ConfigError(f'compare takes one input, got {len(found)}; choose one --clip')
        tasks[name] = dataclasses.replace(found[0], folder=Path(args.output).absolute() / name)
    if len(tasks) < 2:
        raise ConfigError('a comparison needs two or more --variant')
    return tasks
