"""Inputs of evaluations: how the command line names them, how they are opened, run, resumed."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from stream3r_core.config import CoreConfig, WeightsConfig, to_dict
from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation.conditions import code_version
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.datasets import DATASETS, dataset
from stream3r_core.evaluation.datasets.folder import read as read_folder
from stream3r_core.evaluation.datasets.frames import Clip
from stream3r_core.evaluation.fingerprint import digest, files_digest, weights_digest
from stream3r_core.evaluation.pipelines import make_pipeline
from stream3r_core.evaluation.report import Report, read_report
from stream3r_core.evaluation.run import FILES, REPORT_JSON, evaluate, removed_on_failure
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.pipeline import known_uncertainty, load_configured_model
from stream3r_ros.bag import is_bag
from stream3r_ros.clips import BagFrames, SourceFrames, bag_clip
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import PINHOLE, Lens
from stream3r_ros.ground_truth import at_camera, read_body
from stream3r_ros.options import output_folder
from stream3r_ros.results import BAG, RunBag
from stream3r_ros.sources import DEFAULT_RATE_HZ, FILES_FRAME, are_photos, file_source
from stream3r_ros.tf import camera_frame

KINDS = {
    'bag': 'a bag',
    'folder': 'a folder of images',
    'photos': 'single images',
    'video': 'a video',
    'dataset': 'of a --dataset',
}
MEANING = {  # of options: the kinds of input that they say something about
    'image_topic': ('bag',),
    'depth': ('bag', 'folder'),
    'rate': ('folder', 'photos'),
    'ground_truth_body': ('bag', 'folder', 'photos', 'video'),
    'clip': ('dataset',),
}


@dataclass(frozen=True)
class EvaluateConfig(NodeConfig):
    """The options of a replay and those of the evaluation."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class Task:
    """One input of an evaluation: everything that a worker process needs, paths absolute."""

    name: str
    inputs: tuple[str, ...]  # one recording, photos, or the root of a dataset and a clip
    folder: Path
    config: EvaluateConfig
    dataset: str = ''
    image_topic: str = ''
    depth: str = ''
    ground_truth: tuple[str, ...] = ()
    ground_truth_body: str = ''
    rate_hz: float = DEFAULT_RATE_HZ
    bag: bool = False  # write one


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
        '--ground-truth-body',
        default='',
        metavar='FILE|FRAME',
        help='what the true poses are those of: a text file with the 4x4 matrix T_body_camera, or '
        'a frame that /tf_static of the bag connects with the camera; default: the camera',
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
        metavar='HZ',
        help=f'of image files whose names are no stamps (default: {DEFAULT_RATE_HZ:g})',
    )


def check_recording_arguments(args: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for an option that means nothing to one of the inputs."""
    for text, kind in _kinds(args):
        for name, kinds in MEANING.items():
            if getattr(args, name) not in ('', None, []) and kind not in kinds:
                means = ' or '.join(KINDS[known] for known in kinds)
                option = '--' + name.replace('_', '-')
                raise ConfigError(
                    f'{option} is for an input that is {means}; {text} is '
                    f'{KINDS[kind]}: leave the option out'
                )
    if 'none' in args.ground_truth and len(args.ground_truth) > 1:
        raise ConfigError('--ground-truth none goes with no other --ground-truth')
    if args.rate is not None and not args.rate > 0:
        raise ConfigError(f'--rate must be positive, got {args.rate}')


def _kinds(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each input and its kind, one of KINDS."""
    for text in args.input:
        if args.dataset:
            yield text, 'dataset'
        elif is_bag(text):
            yield text, 'bag'
        elif are_photos([text]):
            yield text, 'photos'
        else:
            yield text, 'folder' if Path(text).is_dir() else 'video'


def tasks_from_args(args: argparse.Namespace, config: EvaluateConfig) -> list[Task]:
    """Return one task per input, or per clip of a dataset; photos are one input."""
    if not args.input:
        raise ConfigError('give an input to evaluate, or --suite NAME --data ROOT')
    check_recording_arguments(args)
    weights = _absolute(config.model.weights)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=weights))
    common = {
        'config': config,
        'dataset': args.dataset,
        'image_topic': args.image_topic,
        'depth': _absolute(args.depth),
        'ground_truth': tuple(map(_absolute, args.ground_truth)),
        'ground_truth_body': _absolute(args.ground_truth_body),
        'rate_hz': args.rate or DEFAULT_RATE_HZ,
    }
    inputs, output = [os.path.abspath(text) for text in args.input], Path(args.output).absolute()
    if args.dataset:
        found = [
            (root, name)
            for root in inputs
            for name in args.clip or dataset(args.dataset).names(root)
        ]
        named = {name.replace('/', '__'): (root, name) for root, name in found}
    elif are_photos(inputs):
        named = {'photos': tuple(inputs)}
    else:
        named = {_unique(Path(text), inputs): (text,) for text in inputs}
    if len(named) == 1:
        ((name, inputs),) = named.items()
        return [Task(name, inputs, output, **common)]
    return [Task(name, inputs, output / name, **common) for name, inputs in named.items()]


def _absolute(text: str) -> str:
    """An existing file or folder as a path that a worker elsewhere understands; else the text."""
    return os.path.abspath(text) if text and Path(text).exists() else text


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
    if task.ground_truth_body and not Path(task.ground_truth_body).is_file():
        raise DataError(f'--ground-truth-body {task.ground_truth_body} is no file')
    clip = _open_files(task, path)
    if task.dataset and not wanted:
        return clip.with_truth(None) if task.ground_truth else clip, []
    T_body_camera = read_body(task.ground_truth_body) if task.ground_truth_body else None
    truths = [read_trajectory(name) for name in wanted]
    if not task.ground_truth and clip.truth is not None:
        truths = [clip.truth]
    moved = [at_camera(truth, T_body_camera) for truth in truths]
    remarks = tuple(remark for truth in moved for remark in truth.remarks)
    clip = dataclasses.replace(clip, remarks=(*clip.remarks, *remarks))
    first, *more = [truth.trajectory for truth in moved] or [None]
    return clip.with_truth(first), more


def _open_files(task: Task, path: Path) -> Clip:
    if task.dataset:
        return dataset(task.dataset).read(path, task.inputs[1])
    if len(task.inputs) == 1 and path.is_dir():
        return read_folder(path, depth_folder=task.depth or None, rate_hz=task.rate_hz)
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
        body=task.ground_truth_body,
        truth_gap_s=task.config.evaluation.truth_gap_s,
    )
    if not task.ground_truth:
        return read(), []
    truths = [_truth_of_bag(name) for name in wanted]
    clips = [read(truth=truth) for truth in truths or [None]]
    remarks = dict.fromkeys(remark for clip in clips for remark in clip.remarks)
    clip = dataclasses.replace(clips[0], remarks=tuple(remarks))
    return clip, [other.truth for other in clips[1:]]


def _truth_of_bag(name: str) -> Trajectory | str:
    """Read a trajectory file; return the name of a topic as it is."""
    if Path(name).is_file():
        return read_trajectory(name)
    if not name.startswith('/') or '.' in name:
        raise DataError(
            f'--ground-truth {name} is no file, and no topic either: these begin with a slash and '
            'have no dot'
        )
    return name


@lru_cache(maxsize=1)
def _model(config: WeightsConfig):
    return load_configured_model(config)


def evaluate_task(
    task: Task, is_interrupted: Callable[[], bool] = lambda: False, overwrite: bool = True
) -> Report:
    """Evaluate one input and write its results; a run that fails leaves none."""
    clip, more_truths = open_clip(task)
    pipeline = make_pipeline(_model(task.config.model), core_config(task.config))
    output_folder(task.folder, (*FILES, BAG), overwrite, task.inputs[:1])
    compared = partial(
        evaluate,
        clip,
        pipeline,
        task.folder,
        task.config.evaluation,
        is_interrupted,
        more_truths,
        _source(task, pipeline.model.weights_info.sha256),
    )
    if not task.bag:
        return compared()
    frame_id = camera_frame(clip.camera_frame or FILES_FRAME, task.config)
    uncertainty = known_uncertainty(pipeline.model, core_config(task.config))
    recorder = RunBag(task.folder, task.config, pipeline.map, uncertainty)
    with removed_on_failure(task.folder, (BAG,)), recorder as bag:
        lens = _lens(clip, task.config.evaluation)
        return compared(observe=partial(bag.add, camera_frame=frame_id, lens=lens))


def _lens(clip: Clip, config: EvaluationConfig) -> Lens:
    """The distortion of the images as to the intrinsics in use; predicted ones know of none."""
    is_known = config.known_intrinsics and isinstance(clip.frames, BagFrames)
    return clip.frames.lens if is_known else PINHOLE


def core_config(config: EvaluateConfig) -> CoreConfig:
    """The part of the configuration that the core reads."""
    return CoreConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(CoreConfig)})


def _source(task: Task, weights_sha256: str) -> dict[str, Any]:
    """What the report says about where the input came from, and the digest of the task."""
    names = ('inputs', 'dataset', 'image_topic', 'depth', 'ground_truth', 'ground_truth_body')
    told = {name: getattr(task, name) for name in names if getattr(task, name)}
    told = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
    return told | {'digest': task_digest(task, weights_sha256)}


def task_digest(task: Task, weights_sha256: str) -> str:
    """Digest of all that the results of a task depend on: options, weights, code and files."""
    root, *more = task.inputs
    if task.dataset and (Path(root) / more[0]).is_dir():
        paths = [Path(root) / more[0]]
    else:
        paths = [root] if task.dataset else task.inputs
    paths = *paths, *filter(None, (task.depth, task.ground_truth_body, *task.ground_truth))
    files = [files_digest(path) for path in paths]
    facts = {f.name: getattr(task, f.name) for f in dataclasses.fields(Task)}
    facts |= {'config': to_dict(task.config), 'folder': ''}  # results may be moved
    return digest(facts, files, weights_sha256, code_version())


def is_done(task: Task) -> bool:
    """Tell whether a whole report of just this task lies there, lacking no package of today."""
    try:
        report = read_report(task.folder / REPORT_JSON)
    except DataError:
        return False
    digest_now = task_digest(task, weights_digest(task.config.model))
    if report.interrupted or report.source.get('digest') != digest_now:
        return False
    return not any(_is_installed(skipped.package) for skipped in report.skipped)


def _is_installed(package: str) -> bool:
    try:
        return bool(package) and bool(import_module(package))
    except ImportError:
        return False
