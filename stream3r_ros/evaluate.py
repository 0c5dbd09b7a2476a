"""``stream3r evaluate``: a lossless run over recordings with truth, numbers and pictures."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from stream3r_core.config import to_dict
from stream3r_core.errors import ConfigError
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.html import number
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_core.evaluation.report import Report
from stream3r_core.evaluation.run import REPORT_HTML, REPORT_JSON
from stream3r_core.evaluation.suites import SUITES, SuiteRun, run_suite
from stream3r_core.evaluation.summary import as_text, write_summary
from stream3r_core.pipeline import resolve_device
from stream3r_ros.evaluation_tasks import (
    EvaluateConfig,
    Task,
    add_recording_arguments,
    core_config,
    evaluate_task,
    is_done,
    tasks_from_args,
)
from stream3r_ros.options import add_config_arguments, add_output_arguments, config_from_args
from stream3r_ros.replay import INTERRUPTED, first_interrupt_ends_the_loop
from stream3r_ros.sources import are_photos

HEADLINES = (
    ('ATE RMSE', 'Sim(3)', 'ATE Sim(3)', 'm'),
    ('ATE RMSE', 'SE(3)', 'ATE SE(3)', 'm'),
    ('AbsRel', 'scale', 'depth AbsRel', ''),
    ('accuracy mean', '', 'map accuracy', 'm'),
    ('latency p50', '', 'latency', 'ms'),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r evaluate``."""
    parser.add_argument(
        'input',
        nargs='*',
        help='bags, videos, folders of images, dataset roots (--dataset), or photos',
    )
    add_output_arguments(parser)
    add_config_arguments(parser)
    add_recording_arguments(parser)
    parser.add_argument(
        '--bag', action='store_true', help='also write pose, depth, clouds and map as a bag (mcap)'
    )
    parser.add_argument('--suite', choices=tuple(SUITES), help='run a whole published protocol')
    parser.add_argument('--data', metavar='ROOT', help='folder of the datasets of --suite')
    parser.add_argument(
        '--workers', type=int, metavar='N', help='local processes for several inputs or a suite'
    )
    parser.add_argument(
        '--ray',
        default='',
        metavar='ADDRESS',
        help='use a Ray cluster instead of processes; it needs a shared file system: the same '
        'paths of inputs, weights and output on every machine',
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    photos = bool(args.input) and are_photos(args.input)
    mode = 'full' if photos else 'causal' if args.suite else None
    config = config_from_args(args, mode and {'session.mode': mode}, EvaluateConfig)
    _check_arguments(args, config)
    if args.suite:
        return _run_suite(args, config)
    tasks = [replace(task, bag=args.bag) for task in tasks_from_args(args, config)]
    if len(tasks) == 1:
        if args.workers is not None or args.ray:
            raise ConfigError('--workers and --ray are for several inputs or a suite')
        return _run_one(tasks[0], args.overwrite)
    return _run_many(tasks, args)


def _check_arguments(args: argparse.Namespace, config: EvaluateConfig) -> None:
    """Raise :class:`ConfigError` for arguments that mean nothing to what is asked for."""
    if not args.suite:
        if args.data:
            raise ConfigError('--data is the folder of the datasets of a --suite; name one')
        return
    if not args.data or args.input:
        raise ConfigError('--suite needs --data ROOT and takes no other input')
    names = ('image_topic', 'ground_truth', 'ground_truth_body', 'depth', 'dataset', 'clip')
    for name in (*names, 'rate', 'bag'):
        if getattr(args, name) not in ('', None, False, []):
            option = '--' + name.replace('_', '-')
            raise ConfigError(f'{option} says nothing to a --suite, which is a whole protocol')
    default = to_dict(EvaluationConfig())
    for name, value in to_dict(config.evaluation).items():
        if name != 'icp' and value != default[name]:
            raise ConfigError(f'evaluation.{name} says nothing to a --suite; only evaluation.icp')


def _run_one(task: Task, overwrite: bool) -> int:
    with first_interrupt_ends_the_loop() as is_interrupted:
        report = evaluate_task(task, is_interrupted, overwrite)
    print(headline(report))
    for skipped in report.skipped:
        print(f'  skipped {skipped.group}: {skipped.reason}')
    print(f'results in {task.folder}: {REPORT_HTML}, {REPORT_JSON}, ...')
    return INTERRUPTED if report.interrupted else 0


def headline(report: Report) -> str:
    """The numbers that a reader looks for first, on one line."""
    parts = [f'{report.name}: {report.num_frames} frames']
    for name, alignment, label, unit in HEADLINES:
        found = [
            metric.value
            for metric in report.metrics
            if metric.name == name and metric.alignment.startswith(alignment)
        ]
        if found:
            parts.append(f'{label} {number(found[0])} {unit}'.rstrip())
    return ', '.join(parts)


def _run_many(tasks: list[Task], args: argparse.Namespace) -> int:
    waiting = [task for task in tasks if args.overwrite or not is_done(task)]
    for task in tasks:
        if task not in waiting:
            print(f'{task.name}: done before; --overwrite runs it again')
    jobs = {task.name: partial(evaluate_task, task) for task in waiting}
    failures, config = 0, tasks[0].config
    for outcome in run_jobs(jobs, workers(args.workers, config), args.ray, config.model.device):
        failures += bool(outcome.failure)
        failed = f'FAILED {outcome.name}: {outcome.failure}'
        print(failed if outcome.failure else headline(outcome.value))
    print(f'{len(tasks) - failures} of {len(tasks)} inputs evaluated; results in {args.output}')
    return 1 if failures else 0


def workers(wanted: int | None, config: EvaluateConfig) -> int | None:
    """Number of processes: as asked for; a GPU serves one."""
    if wanted is None and resolve_device(config.model.device).type == 'cuda':
        return 1
    return wanted


def _run_suite(args: argparse.Namespace, config: EvaluateConfig) -> int:
    run = SuiteRun(
        args.suite,
        Path(args.data).resolve(),
        Path(args.output).resolve(),
        core_config(config),
        config.evaluation.icp,
    )
    records = run_suite(run, workers(args.workers, config), args.ray, not args.overwrite)
    for table in write_summary(run, records):
        print(as_text(table) + '\n')
    failures = [record for record in records if record['failure']]
    for record in failures:
        print(f'not evaluated: {record["dataset"]} {record["clip"]}: {record["failure"]}')
    print(f'results in {run.output / run.name}: summary.html, summary.json')
    return 0 if all(record['is_absent'] for record in failures) else 1
