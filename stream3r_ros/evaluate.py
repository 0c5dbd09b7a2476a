"""``stream3r evaluate``: a lossless run over recordings with truth, numbers and pictures."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from stream3r_core.config import CoreConfig, WeightsConfig, to_dict
from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation.conditions import code_version
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.datasets import DATASETS, dataset
from stream3r_core.evaluation.datasets.folder import read as read_folder
from stream3r_core.evaluation.datasets.frames import Clip
from stream3r_core.evaluation.html import number
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_core.evaluation.pipelines import make_pipeline
from stream3r_core.evaluation.report import Report, read_report
from stream3r_core.evaluation.run import FILES, REPORT_HTML, REPORT_JSON, evaluate
from stream3r_core.evaluation.suites import SUITES, SuiteRun, run_suite
from stream3r_core.evaluation.summary import as_text, write_summary
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.pipeline import load_configured_model, resolve_device
from stream3r_ros.bag import is_bag
from stream3r_ros.clips import SourceFrames, bag_clip
from stream3r_ros.config import NodeConfig
from stream3r_ros.options import (
    add_config_arguments,
    add_output_arguments,
    config_from_args,
    output_folder,
)
from stream3r_ros.replay import INTERRUPTED, first_interrupt_ends_the_loop
from stream3r_ros.results import BAG, RunBag
from stream3r_ros.sources import DEFAULT_RATE_HZ, FILES_FRAME, are_photos, file_source
from stream3r_ros.tf import camera_frame

HEADLINES = (
    ('ATE RMSE', 'Sim(3)', 'ATE Sim(3)', 'm'),
    ('ATE RMSE', 'SE(3)', 'ATE SE(3)', 'm'),
    ('AbsRel', 'scale', 'depth AbsRel', ''),
    ('accuracy mean', '', 'map accuracy', 'm'),
    ('latency p50', '', 'latency', 'ms'),
)


@dataclass(frozen=True)
class EvaluateConfig(NodeConfig):
    """The options of a replay and those of the evaluation."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class Task:
    """One input of an evaluation: everything that a worker process needs."""

    name: str
    inputs: tuple[str, ...]  # one recording, or photos
    folder: Path
    config: EvaluateConfig
    dataset: str = ''
    image_topic: str = ''
    depth: str = ''
    ground_truth: tuple[str, ...] = ()
    rate_hz: float = DEFAULT_RATE_HZ
    bag: bool = False  # write one


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
        '--ray', default='', metavar='ADDRESS', help='use a Ray cluster instead of processes'
    )


def add_recording_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how an input and its truth are to be read."""
    parser.add_argument('--image-topic', default='', metavar='TOPIC', help='images of a bag')
    parser.add_argument(
        '--ground-truth',
        action='append',
        default=[],
        metavar='FILE|TOPIC|none',
        help='true trajectory; repeat it to compare with several; default: what the input has',
    )
    parser.add_argument(
        '--depth',
        default='',
        metavar='TOPIC|FOLDER|none',
        help='true depth: a topic of the bag, or a folder of depth maps named like the images',
    )
    parser.add_argument(
        '--dataset', default='', choices=('', *DATASETS), metavar='NAME', help='published layout'
    )
    parser.add_argument(
        '--clip', action='append', default=[], metavar='NAME', help='of --dataset; default: all'
    )
    parser.add_argument(
        '--rate',
        type=float,
        default=DEFAULT_RATE_HZ,
        metavar='HZ',
        help='of image files whose names are no stamps (default: %(default)g)',
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    photos = bool(args.input) and are_photos(args.input)
    mode = 'full' if photos else 'causal' if args.suite else None
    config = config_from_args(args, mode and {'session.mode': mode}, EvaluateConfig)
    if args.suite:
        return _run_suite(args, config)
    tasks = [replace(task, bag=args.bag) for task in tasks_from_args(args, config)]
    if len(tasks) == 1:
        return _run_one(tasks[0], args.overwrite)
    return _run_many(tasks, args)


def tasks_from_args(args: argparse.Namespace, config: EvaluateConfig) -> list[Task]:
    """Return one task per input, or per clip of a dataset; photos are one input."""
    if not args.input:
        raise ConfigError('give an input to evaluate, or --suite NAME --data ROOT')
    common = {
        'config': config,
        'dataset': args.dataset,
        'image_topic': args.image_topic,
        'depth': args.depth,
        'ground_truth': tuple(args.ground_truth),
        'rate_hz': args.rate,
    }
    output = Path(args.output)
    if args.dataset:
        found = [
            (root, name)
            for root in args.input
            for name in args.clip or dataset(args.dataset).names(root)
        ]
        named = {name.replace('/', '__'): (root, name) for root, name in found}
    elif are_photos(args.input):
        named = {'photos': tuple(args.input)}
    else:
        named = {_unique(Path(text), args.input): (text,) for text in args.input}
    if len(named) == 1:
        ((name, inputs),) = named.items()
        return [Task(name, inputs, output, **common)]
    return [Task(name, inputs, output / name, **common) for name, inputs in named.items()]


def _unique(path: Path, among: Sequence[str]) -> str:
    """Name of an input: its last part, or as much of the path as tells it apart."""
    parts = path.resolve().parts
    others = [Path(text).resolve().parts for text in among]
    for length in range(1, len(parts)):
        if sum(other[-length:] == parts[-length:] for other in others) == 1:
            return '__'.join(parts[-length:])
    raise ConfigError(f'{path} is given twice')


def open_clip(task: Task) -> tuple[Clip, list[Trajectory]]:
    """Return the clip of a task, its truth being the first one named, and the further truths."""
    wanted = [name for name in task.ground_truth if name != 'none']
    path = Path(task.inputs[0])
    if len(task.inputs) == 1 and not task.dataset and is_bag(path):
        return _open_bag(task, wanted)
    for name in wanted:
        if not Path(name).is_file():
            raise DataError(f'--ground-truth {name} is no file')
    clip = _open_files(task, path)
    if not task.ground_truth:
        return clip, []
    first, *more = [read_trajectory(name) for name in wanted] or [None]
    return clip.with_truth(first), more


def _open_files(task: Task, path: Path) -> Clip:
    if task.dataset:
        return dataset(task.dataset).read(path, task.inputs[1])
    if len(task.inputs) == 1 and path.is_dir():
        return read_folder(path, depth_folder=task.depth or None)
    source = file_source(task.inputs, task.rate_hz)
    return Clip(source.name, SourceFrames(source))


def _open_bag(task: Task, wanted: Sequence[str]) -> tuple[Clip, list[Trajectory]]:
    """Truths of a bag are files, or topics of the bag."""
    rectify = task.config.rectify if task.config.evaluation.known_intrinsics else 'never'
    read = partial(
        bag_clip,
        task.inputs[0],
        task.image_topic,
        task.depth,
        config=task.config,
        rectify=rectify,
    )
    if not task.ground_truth:
        return read(), []
    truths = [read_trajectory(name) if Path(name).is_file() else name for name in wanted]
    first, *others = truths or [None]
    more = [t if isinstance(t, Trajectory) else read(truth=t).truth for t in others]
    return read(truth=first), more


@lru_cache(maxsize=1)
def _model(config: WeightsConfig):
    return load_configured_model(config)


def evaluate_task(task: Task, is_interrupted: Callable[[], bool] = lambda: False) -> Report:
    """Evaluate one input and write its results."""
    clip, more_truths = open_clip(task)
    pipeline = make_pipeline(_model(task.config.model), _core(task.config))
    compared = partial(
        evaluate,
        clip,
        pipeline,
        task.folder,
        task.config.evaluation,
        is_interrupted,
        more_truths,
        _source(task),
    )
    if not task.bag:
        return compared()
    output_folder(task.folder, (BAG,), overwrite=True, inputs=task.inputs[:1])
    frame_id = camera_frame(clip.camera_frame or FILES_FRAME, task.config)
    uncertainty = pipeline.model.uncertainties.get(task.config.session.mode)
    with RunBag(task.folder, task.config, pipeline.map, uncertainty) as bag:
        return compared(observe=partial(bag.add, camera_frame=frame_id))


def _core(config: EvaluateConfig) -> CoreConfig:
    """The part of the configuration that the core reads."""
    return CoreConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(CoreConfig)})


def _source(task: Task) -> dict[str, Any]:
    """What the report says about where the input came from."""
    names = ('inputs', 'dataset', 'image_topic', 'depth', 'ground_truth')
    told = {name: getattr(task, name) for name in names if getattr(task, name)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}


def _run_one(task: Task, overwrite: bool) -> int:
    output_folder(task.folder, (*FILES, BAG), overwrite, task.inputs[:1])
    with first_interrupt_ends_the_loop() as is_interrupted:
        report = evaluate_task(task, is_interrupted)
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
    waiting = [task for task in tasks if args.overwrite or not _is_done(task)]
    for task in tasks:
        if task not in waiting:
            print(f'{task.name}: done before; --overwrite runs it again')
    jobs = {task.name: partial(evaluate_task, task) for task in waiting}
    failures = 0
    for outcome in run_jobs(jobs, workers(args.workers, tasks[0].config), args.ray):
        failures += bool(outcome.failure)
        failed = f'FAILED {outcome.name}: {outcome.failure}'
        print(failed if outcome.failure else headline(outcome.value))
    print(f'{len(tasks) - failures} of {len(tasks)} inputs evaluated; results in {args.output}')
    return 1 if failures else 0


def _is_done(task: Task) -> bool:
    """Tell whether a whole report of the same input, options and code lies there."""
    try:
        report = read_report(task.folder / REPORT_JSON)
    except DataError:
        return False
    options = {**to_dict(_core(task.config)), 'evaluation': to_dict(task.config.evaluation)}
    same = report.config == json.loads(json.dumps(options)) and report.source == _source(task)
    return same and not report.interrupted and report.conditions['code'] == code_version()


def workers(wanted: int | None, config: EvaluateConfig) -> int | None:
    """Number of processes: as asked for; a GPU serves one."""
    if wanted is None and resolve_device(config.model.device).type == 'cuda':
        return 1
    return wanted


def _run_suite(args: argparse.Namespace, config: EvaluateConfig) -> int:
    if not args.data or args.input:
        raise ConfigError('--suite needs --data ROOT and takes no other input')
    run = SuiteRun(
        args.suite,
        Path(args.data).resolve(),
        Path(args.output).resolve(),
        _core(config),
        config.evaluation.icp,
    )
    records = run_suite(run, workers(args.workers, config), args.ray)
    for table in write_summary(run, records):
        print(as_text(table) + '\n')
    failures = [record for record in records if record['failure']]
    for record in failures:
        print(f'not evaluated: {record["dataset"]} {record["clip"]}: {record["failure"]}')
    print(f'results in {run.output / run.name}: summary.html, summary.json')
    return 0 if all(record['is_absent'] for record in failures) else 1
