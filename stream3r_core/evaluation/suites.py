"""Whole published protocols over their datasets, with resume and a summary beside references."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from stream3r_core.config import CoreConfig, WeightsConfig, to_dict
from stream3r_core.errors import ConfigError, DataError, OutputError
from stream3r_core.evaluation import protocols
from stream3r_core.evaluation.conditions import code_version, conditions
from stream3r_core.evaluation.datasets import dataset
from stream3r_core.evaluation.datasets.co3d import UNSEEN_CATEGORIES
from stream3r_core.evaluation.datasets.frames import Clip
from stream3r_core.evaluation.datasets.sintel import POSE_SEQUENCES
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_core.evaluation.protocols import Network, Scores
from stream3r_core.files import atomic_write
from stream3r_core.pipeline import load_configured_model

BONN_SEQUENCES = tuple(
    f'rgbd_bonn_{name}'
    for name in ('balloon2', 'crowd2', 'crowd3', 'person_tracking2', 'synchronous')
)


def _all_of(clip: Clip) -> Clip:
    return clip


def _every(step: int, clip: Clip) -> Clip:
    return clip.every(step)


def _half_at_most(step: int, clip: Clip) -> Clip:
    return clip.every(max(1, min(step, len(clip) // 2)))


@dataclass(frozen=True)
class Part:
    """One dataset of a suite."""

    dataset: str  # name of the reader
    folder: str  # below the data root
    names: tuple[str, ...] = ()  # clips; () = all
    thin: Callable[[Clip], Clip] = _all_of
    options: tuple[tuple[str, float], ...] = ()  # of the protocol
    protocol: str = ''  # key of the reference tables that may stand beside it


@dataclass(frozen=True)
class Suite:
    """One protocol over several datasets."""

    description: str
    judge: Callable[..., Scores]
    parts: tuple[Part, ...]
    weighted: bool = False  # average by weight (valid pixels) instead of plain


def _depth_part(name, folder, names=(), max_depth_m=None, clip_depth_m=None, protocol=''):
    options = (('max_depth_m', max_depth_m), ('clip_depth_m', clip_depth_m))
    return Part(name, folder, names, options=options, protocol=protocol)


SUITES: dict[str, Suite] = {
    'mono_depth': Suite(
        'each image alone, long side 518, median alignment per image; averages over valid pixels',
        protocols.mono_depth,
        (
            _depth_part('sintel', 'sintel', max_depth_m=70, clip_depth_m=70),
            _depth_part('bonn_110', 'bonn', BONN_SEQUENCES, max_depth_m=70),
            _depth_part('kitti_depth', 'kitti'),
            _depth_part('nyu', 'nyu-v2'),
        ),
        weighted=True,
    ),
    'video_depth': Suite(
        'whole sequences, long side 518, one alignment per sequence; averages over valid pixels',
        protocols.video_depth,
        (
            _depth_part(
                'sintel', 'sintel', max_depth_m=70, clip_depth_m=70, protocol='video_depth/sintel'
            ),
            _depth_part('bonn_110', 'bonn', BONN_SEQUENCES, 70, protocol='video_depth/bonn'),
            _depth_part('kitti_depth_video', 'kitti', protocol='video_depth/kitti'),
        ),
        weighted=True,
    ),
    'camera_pose': Suite(
        'whole sequences, long side 518, Sim(3) alignment; plain mean over sequences',
        protocols.camera_pose,
        (
            Part('tum_90', 'tum'),
            Part('sintel', 'sintel', POSE_SEQUENCES, protocol='camera_pose/sintel'),
            Part('scannet_90', 'scannet', protocol='camera_pose/scannet'),
        ),
    ),
    'co3d_pose': Suite(
        'ten random frames per sequence, 224 x 224; plain mean over categories',
        protocols.co3d_pose,
        (Part('co3d', 'co3d'),),
    ),
    'mv_recon': Suite(
        'sparse keyframes, 518 x 392, central crop; ICP first; plain mean over scenes',
        protocols.reconstruction,
        (
            Part('7scenes_test', '7scenes', thin=partial(_every, 200)),
            Part('neural_rgbd', 'neural_rgbd', thin=partial(_half_at_most, 500)),
        ),
    ),
    'long_recon': Suite(
        'every 5th frame, 518 x 392, central crop; ICP first; plain mean over scenes',
        protocols.reconstruction,
        (
            Part(
                '7scenes_test', '7scenes', thin=partial(_every, 5), protocol='long_recon/7scenes'
            ),
            Part(
                'neural_rgbd',
                'neural_rgbd',
                thin=partial(_every, 5),
                protocol='long_recon/neural_rgbd',
            ),
        ),
    ),
}


@dataclass(frozen=True)
class SuiteRun:
    """What a suite is run with."""

    name: str
    data: Path
    output: Path
    config: CoreConfig
    icp: str = 'point_to_point'  # of reconstructions


def suite(name: str) -> Suite:
    """Return the suite of that name, or raise ConfigError with the known ones."""
    if name not in SUITES:
        raise ConfigError(f'unknown suite {name!r}; known: {", ".join(SUITES)}')
    return SUITES[name]


def run_suite(run: SuiteRun, num_workers: int | None = None, ray_address: str = '') -> list[dict]:
    """Evaluate all clips that lie below ``run.data``; return one record per clip.

    A record stands in ``<output>/<suite>/<dataset>/<clip>.json``; one of an earlier run with the
    same weights, options and code is kept, a failed one is tried again. A dataset that is not
    there, or a clip that fails, is a record with its ``failure``; the others go on.

    Raises:
        DataError: None of the suite's datasets is there.
        OutputError: The output folder cannot be written.

    """
    records, waiting = [], {}
    for part in suite(run.name).parts:
        for record in _planned(run, part):
            path = _record_path(run, record)
            done = record if record['failure'] else _stored(path, record)
            if done:
                records.append(done)
            else:
                waiting[str(path)] = part, record
    if not waiting and all(record['failure'] for record in records):
        raise DataError(f'{run.data} holds no dataset of {run.name}: {records[0]["failure"]}')
    jobs = {
        path: partial(_judge_clip, run, part, record['clip'])
        for path, (part, record) in waiting.items()
    }
    with tqdm(total=len(jobs), unit='clip', desc=run.name, disable=not jobs) as progress:
        for outcome in run_jobs(jobs, num_workers, ray_address):
            _, record = waiting[outcome.name]
            records.append(record | (outcome.value or {}) | {'failure': outcome.failure})
            _write(Path(outcome.name), records[-1])
            progress.update()
    return sorted(records, key=lambda record: (record['dataset'], record['clip']))


def _planned(run: SuiteRun, part: Part) -> Iterator[dict]:
    """Records to be, one per clip; one with a failure where the dataset is not there."""
    base = {'dataset': part.dataset, 'key': _key(run, part), 'failure': ''}
    try:
        names = dataset(part.dataset).names(run.data / part.folder)
    except DataError as error:
        yield base | {'clip': '', 'failure': str(error)}
        return
    wanted = [name for name in names if _is_wanted(name, part)]
    if not wanted:
        listed = ', '.join(part.names[:3])
        yield base | {
            'clip': '',
            'failure': f'{run.data / part.folder} has none of the clips: {listed}, ...',
        }
    yield from (base | {'clip': name} for name in wanted)


def _is_wanted(name: str, part: Part) -> bool:
    if part.dataset == 'co3d':
        return name.split('/')[0] not in UNSEEN_CATEGORIES
    return not part.names or name in part.names


def _key(run: SuiteRun, part: Part) -> str:
    """Digest of everything that a clip's numbers depend on beside its data."""
    weights = Path(run.config.model.weights)
    changed = weights.stat().st_mtime_ns if weights.is_file() else None
    facts = (run.name, part.dataset, run.icp, changed, to_dict(run.config), code_version())
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record_path(run: SuiteRun, record: dict) -> Path:
    name = record['clip'].replace('/', '__') or 'missing'
    return run.output / run.name / record['dataset'] / f'{name}.json'


def _stored(path: Path, record: dict) -> dict | None:
    """Return the record of an earlier run that still holds."""
    try:
        stored = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    same = isinstance(stored, dict) and stored.get('key') == record['key']
    return stored if same and not stored.get('failure') else None


def _write(path: Path, record: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'cannot make the folder {path.parent}: {error}') from error
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1).encode())


@lru_cache(maxsize=1)
def _model(config: WeightsConfig):
    """The network of this process: loaded for the first clip, kept for the others."""
    return load_configured_model(config)


def _judge_clip(run: SuiteRun, part: Part, name: str) -> dict:
    """Run one clip through the suite's protocol; return what its record holds."""
    clip = part.thin(dataset(part.dataset).read(run.data / part.folder, name))
    model = _model(run.config.model)
    options = dict(part.options)
    judge = suite(run.name).judge
    if judge is protocols.reconstruction:
        options['icp'] = run.icp
    scores = judge(clip, Network(model, run.config), **options)
    return {
        'numbers': scores.numbers,
        'weight': scores.weight,
        'remarks': list(scores.remarks),
        'frames': len(clip),
        'conditions': conditions(model),
    }


def judged(records: list[dict], dataset_name: str) -> list[dict]:
    """Records of a dataset that have numbers."""
    return [r for r in records if r['dataset'] == dataset_name and r.get('numbers')]


def averages(run: SuiteRun, records: list[dict]) -> dict[str, dict[str, float]]:
    """Mean numbers of each dataset, as the suite's protocol averages them."""
    chosen = suite(run.name)
    means = {}
    for part in chosen.parts:
        good = judged(records, part.dataset)
        if part.dataset == 'co3d':
            good = list(_per_category(good))
        if good:
            weights = [r['weight'] if chosen.weighted else 1.0 for r in good]
            means[part.dataset] = {
                name: sum(w * r['numbers'][name] for w, r in zip(weights, good)) / sum(weights)
                for name in good[0]['numbers']
            }
    return means


def _per_category(records: list[dict]) -> Iterator[dict]:
    """One record per CO3D category, the plain mean of its sequences."""
    categories: dict[str, list[dict]] = {}
    for record in records:
        categories.setdefault(record['clip'].split('/')[0], []).append(record)
    for members in categories.values():
        names = members[0]['numbers']
        mean = {n: sum(m['numbers'][n] for m in members) / len(members) for n in names}
        yield members[0] | {'numbers': mean}
