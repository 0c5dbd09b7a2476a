"""Whole published protocols over their datasets, with resume and a summary beside references."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
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
from stream3r_core.evaluation.fingerprint import digest, files_digest, weights_digest
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_core.evaluation.protocols import Network, Scores, image_sizes
from stream3r_core.files import atomic_write
from stream3r_core.pipeline import load_configured_model

BONN_SEQUENCES = tuple(
    f'rgbd_bonn_{name}'
    for name in ('balloon2', 'crowd2', 'crowd3', 'person_tracking2', 'synchronous')
)


@dataclass(frozen=True)
class Selection:
    """Clips of a part that are averaged together, and the published table of the same clips."""

    title: str
    names: tuple[str, ...] = ()  # () = all of the part
    protocol: str = ''  # key of a reference table


@dataclass(frozen=True)
class Part:
    """One dataset of a suite."""

    dataset: str  # name of the reader
    folder: str  # below the data root
    names: tuple[str, ...] = ()  # clips; () = all
    step: int = 1  # every ``step``-th frame
    at_least_two: bool = False  # of a clip that has fewer than two steps
    options: tuple[tuple[str, float], ...] = ()  # of the protocol
    protocol: str = ''  # key of the reference table that may stand beside it
    also: tuple[Selection, ...] = ()  # averages over some of the clips, each in its own table

    @property
    def selections(self) -> tuple[Selection, ...]:
        """All clips together, then the further selections."""
        return (Selection(self.dataset, self.names, self.protocol), *self.also)

    @property
    def frames(self) -> str:
        """Which frames of a clip are judged, in the words of the reference tables."""
        every = 'all' if self.step == 1 else f'every {self.step}th'
        return f'{every}, two at least' if self.at_least_two else every

    def thin(self, clip: Clip) -> Clip:
        """Return the frames of a clip that are judged."""
        most = len(clip) // 2 if self.at_least_two else self.step
        return clip.every(max(1, min(self.step, most)))


@dataclass(frozen=True)
class Suite:
    """One protocol over several datasets."""

    description: str  # with the fields of ImageSizes in braces
    judge: Callable[..., Scores]
    parts: tuple[Part, ...]
    weighted: bool = False  # average by weight (valid pixels) instead of plain


def _depth_part(name, folder, names=(), max_depth_m=None, clip_depth_m=None, **rest):
    options = (('max_depth_m', max_depth_m), ('clip_depth_m', clip_depth_m))
    return Part(name, folder, names, options=options, **rest)


SUITES: dict[str, Suite] = {
    'mono_depth': Suite(
        'each image alone, long side {long_side}, median alignment per image; '
        'averages over valid pixels',
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
        'whole sequences, long side {long_side}, one alignment per sequence; '
        'averages over valid pixels',
        protocols.video_depth,
        (
            _depth_part(
                'sintel',
                'sintel',
                max_depth_m=70,
                clip_depth_m=70,
                also=(Selection('sintel, 14 clips', POSE_SEQUENCES, 'video_depth/sintel_14'),),
            ),
            _depth_part('bonn_110', 'bonn', BONN_SEQUENCES, max_depth_m=70),
            _depth_part('kitti_depth_video', 'kitti', protocol='video_depth/kitti'),
        ),
        weighted=True,
    ),
    'camera_pose': Suite(
        'whole sequences, long side {long_side}, Sim(3) alignment; plain mean over sequences',
        protocols.camera_pose,
        (
            Part('tum_90', 'tum'),
            Part('sintel', 'sintel', POSE_SEQUENCES, protocol='camera_pose/sintel'),
            Part('scannet_90', 'scannet', protocol='camera_pose/scannet'),
        ),
    ),
    'co3d_pose': Suite(
        'ten random frames per sequence, {co3d_side} x {co3d_side}; plain mean over categories',
        protocols.co3d_pose,
        (Part('co3d', 'co3d'),),
    ),
    'mv_recon': Suite(
        'sparse keyframes, {long_side} x {recon_height}, central crop {recon_crop}; ICP first; '
        'plain mean over scenes',
        protocols.reconstruction,
        (
            Part('7scenes_test', '7scenes', step=200),
            Part('neural_rgbd', 'neural_rgbd', step=500, at_least_two=True),
        ),
    ),
    'long_recon': Suite(
        'every 5th frame, {long_side} x {recon_height}, central crop {recon_crop}; ICP first; '
        'plain mean over scenes',
        protocols.reconstruction,
        (
            Part('7scenes_test', '7scenes', step=5, protocol='long_recon/7scenes'),
            Part('neural_rgbd', 'neural_rgbd', step=5, protocol='long_recon/neural_rgbd'),
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


def run_suite(
    run: SuiteRun, num_workers: int | None = None, ray_address: str = '', resume: bool = True
) -> list[dict]:
    """Evaluate all clips that lie below ``run.data``; return one record per clip.

    A record stands in ``<output>/<suite>/<dataset>/<clip>.json``; one of an earlier run with the
    same weights, options, code and files of the dataset is kept if ``resume``, a failed one is
    tried again. A dataset or a clip of the protocol that is not there (``is_absent``), or a clip
    that fails, is a record with its ``failure``; the others go on.

    Raises:
        DataError: None of the suite's datasets is there.
        OutputError: The output folder cannot be written.

    """
    records, waiting = [], {}
    for part in suite(run.name).parts:
        for record in _planned(run, part):
            path = _record_path(run, record)
            done = record if record['failure'] else resume and _stored(path, record)
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
        for outcome in run_jobs(jobs, num_workers, ray_address, run.config.model.device):
            _, record = waiting[outcome.name]
            records.append(record | (outcome.value or {}) | {'failure': outcome.failure})
            _write(Path(outcome.name), records[-1])
            progress.update()
    return sorted(records, key=lambda record: (record['dataset'], record['clip']))


def _planned(run: SuiteRun, part: Part) -> Iterator[dict]:
    """Records to be, one per clip; what is not there has its failure already."""
    folder = run.data / part.folder
    base = {'dataset': part.dataset, 'clip': '', 'failure': '', 'is_absent': False}
    absent = base | {'is_absent': True}
    try:
        names = dataset(part.dataset).names(folder)
    except DataError as error:
        yield absent | {'failure': str(error)}
        return
    key = _key(run, part)
    wanted = [name for name in names if _is_wanted(name, part)]
    yield from (base | {'clip': name, 'key': key} for name in wanted)
    needed = {name for selection in part.selections for name in selection.names}
    for name in sorted(needed - set(names)):
        yield absent | {'clip': name, 'failure': f'{folder} does not hold it'}
    if not wanted and not needed:
        yield absent | {'failure': f'{folder} has none of the clips of the protocol'}


def _is_wanted(name: str, part: Part) -> bool:
    if part.dataset == 'co3d':
        return name.split('/')[0] not in UNSEEN_CATEGORIES
    return not part.names or name in part.names


def _key(run: SuiteRun, part: Part) -> str:
    """Digest of everything that the numbers of a part's clips depend on."""
    folder = (run.data / part.folder).resolve()
    weights = weights_digest(run.config.model)
    options = part.dataset, part.frames, part.options, run.icp, to_dict(run.config)
    return digest(run.name, options, weights, folder, files_digest(folder), code_version())


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
    whole = dataset(part.dataset).read(run.data / part.folder, name)
    clip = part.thin(whole)
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
        'clip_frames': len(whole),
        'image_sizes': dataclasses.asdict(image_sizes(model.config)),
        'conditions': conditions(model),
    }


def judged(records: list[dict], dataset_name: str, names: Collection[str] = ()) -> list[dict]:
    """Records of a dataset, or of the clips ``names`` of it, that have numbers."""
    own = (r for r in records if r['dataset'] == dataset_name and r.get('numbers'))
    return [r for r in own if not names or r['clip'] in names]


def averages(run: SuiteRun, records: list[dict]) -> dict[str, dict[str, float]]:
    """Mean numbers of each selection of clips, as the suite's protocol averages them."""
    chosen = suite(run.name)
    means = {}
    for part in chosen.parts:
        for selection in part.selections:
            good = judged(records, part.dataset, selection.names)
            if part.dataset == 'co3d':
                good = list(_per_category(good))
            if good:
                weights = [r['weight'] if chosen.weighted else 1.0 for r in good]
                means[selection.title] = {
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
