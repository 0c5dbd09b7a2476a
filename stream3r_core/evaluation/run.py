"""Evaluate one input: run it through the pipeline, compare with its truth, write the results."""

import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from stream3r_core.config import to_dict
from stream3r_core.errors import DataError, InputError, OutputError, Stream3rError
from stream3r_core.evaluation import pictures
from stream3r_core.evaluation.conditions import conditions
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.datasets.frames import Clip, Frame
from stream3r_core.evaluation.depth import DepthAccumulator, depth_at
from stream3r_core.evaluation.exports import Camera, write_colmap, write_glb, write_rerun
from stream3r_core.evaluation.frame_log import FrameLog
from stream3r_core.evaluation.html import write_html
from stream3r_core.evaluation.judge import (
    compare_scales,
    judge_depth,
    judge_map,
    judge_speed,
    judge_trajectories,
)
from stream3r_core.evaluation.pipelines import PhotoSet, Stream
from stream3r_core.evaluation.report import Report
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import (
    TumWriter,
    read_trajectory,
    write_kitti,
    write_tum,
)
from stream3r_core.evaluation.truth_map import TruthMap
from stream3r_core.files import atomic_write
from stream3r_core.mapping import save_pcd, save_ply
from stream3r_core.types import FramePrediction

TRAJECTORY, KITTI, TRUTH = 'trajectory.tum', 'trajectory.kitti', 'truth.tum'
MAP, LOG, CONFIG = 'map.ply', 'frames.csv', 'config.yaml'
FEW_PIXELS = 0.05  # share of the pixels in the map that asks for a remark
REPORT_JSON, REPORT_HTML = 'report.json', 'report.html'
FILES = (TRAJECTORY, KITTI, TRUTH, MAP, LOG, CONFIG, REPORT_JSON, REPORT_HTML)


@dataclass
class _Collected:
    """What a run leaves behind, bounded but for a few numbers per frame."""

    log: FrameLog
    depth: DepthAccumulator | None
    truth_map: TruthMap
    strips: list[pictures.Strip]
    depth_stamps_ns: list[int]
    cameras: list[Camera]


def evaluate(
    clip: Clip,
    pipeline: Stream | PhotoSet,
    folder: str | Path,
    config: EvaluationConfig | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
    more_truths: Sequence[Trajectory] = (),
    source: Mapping[str, Any] = MappingProxyType({}),
    observe: Callable[[FramePrediction], None] = lambda prediction: None,
) -> Report:
    """Run a clip through a pipeline and write report, trajectories, map and configuration.

    ``clip.frames`` are taken one by one, once. The truth is only compared with, never an input:
    of a frame, the network is given the image, and K if ``known_intrinsics`` says so. Frames that
    cannot be used are named in the report. The folder is made if need be; files of an earlier run
    in it are replaced. ``more_truths`` are compared with beside the clip's own. ``source`` tells
    the reader of the report where the input came from. ``observe`` is shown every prediction.

    Raises:
        DataError: No frame could be used; no file of the run stays then.
        OutputError: The folder cannot be written.

    """
    config = config or EvaluationConfig()
    report = Report(
        clip.name,
        conditions(pipeline.model),
        {**to_dict(pipeline.config), 'evaluation': to_dict(config)},
        dict(source),
        remarks=list(clip.remarks),
    )
    folder = _make_folder(Path(folder))
    with removed_on_failure(folder, FILES):
        _evaluate(clip, pipeline, folder, config, report, is_interrupted, more_truths, observe)
    return report


def _evaluate(
    clip, pipeline, folder, config, report, is_interrupted, more_truths, observe
) -> None:
    _write_yaml(folder / CONFIG, report.config)
    pipeline.reset()
    with TumWriter(folder / TRAJECTORY) as writer:
        collected = _run(clip, pipeline, config, report, writer, is_interrupted, observe)
    collected.log.write(folder / LOG)
    if not report.num_frames:
        reasons = f': {report.refused[0]}' if report.refused else ''
        raise DataError(f'{clip.name}: none of the images could be used{reasons}')
    estimate = read_trajectory(folder / TRAJECTORY, 'tum')
    write_kitti(folder / KITTI, estimate)
    if clip.truth is not None and clip.truth.stamps_ns is not None:
        write_tum(folder / TRUTH, clip.truth)
    cloud = pipeline.map.points()
    if pipeline.map.share_taken < FEW_PIXELS:
        report.remarks.append(
            f'only {100 * pipeline.map.share_taken:.2g} % of the pixels got into the map: see '
            'mapping.min_confidence and mapping.confidence_quantile'
        )
    save_ply(cloud, folder / MAP)
    _export(folder, config, collected.cameras, cloud, report)
    truths = [*([] if clip.truth is None else [clip.truth]), *more_truths]
    figures = _judge(report, truths, estimate, cloud, collected, config)
    report.write(folder / REPORT_JSON)
    write_html(folder / REPORT_HTML, report, figures)


@contextmanager
def removed_on_failure(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Let a run that fails take these files with it, and the folder if nothing else is in it."""
    try:
        yield
    except Stream3rError:
        with suppress(OSError):  # the folder is not empty, or the disk fails: the reason counts
            for path in (folder / name for name in names):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            folder.rmdir()
        raise


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f'cannot write results into {folder}: {error}') from error
    return folder


def _write_yaml(path: Path, content: dict) -> None:
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _run(clip, pipeline, config, report, writer, is_interrupted, observe) -> _Collected:
    truth_map = TruthMap(config.truth_voxel_m, config.truth_points)
    collected = _Collected(FrameLog(), None, truth_map, [], [], [])
    strips_due = np.arange(config.depth_strips) * len(clip.frames) / (config.depth_strips or 1)
    feeder = _Feeder(pipeline, collected.log, report)
    answers = feeder.answers(clip.frames, config.known_intrinsics, is_interrupted)
    for answer in tqdm(answers, clip.name, len(clip.frames), unit='frame', disable=None):
        frame, image, prediction = answer.frame, answer.image, answer.prediction
        report.num_frames += 1
        observe(prediction)
        collected.cameras.append(_camera(answer))
        writer.write(frame.stamp_ns, collected.cameras[-1].T_world_camera)
        if frame.load_depth_m is None:
            continue
        try:
            truth_m = frame.load_depth_m()
        except DataError as error:
            report.remarks.append(f'{frame.name}: no true depth: {error}')
            continue
        if collected.depth is None:
            collected.depth = DepthAccumulator(config.max_depth_m or None, config.depth_pixels)
        predicted = depth_at(prediction, truth_m.shape)
        collected.depth.add(predicted, truth_m)
        collected.depth_stamps_ns.append(frame.stamp_ns)
        collected.truth_map.add(frame, image, truth_m)
        if np.count_nonzero(strips_due < report.num_frames) > len(collected.strips):
            collected.strips.append(pictures.Strip(frame.name, image, truth_m, predicted))
    return collected


def _export(folder: Path, config: EvaluationConfig, cameras, cloud, report: Report) -> None:
    """Write the further files that were asked for, but for those of a missing package."""
    writers = {
        'pcd': lambda: save_pcd(cloud, folder / 'map.pcd'),
        'colmap': lambda: write_colmap(folder / 'colmap', cameras, cloud),
        'glb': lambda: write_glb(folder / 'map.glb', cameras, cloud),
        'rrd': lambda: write_rerun(folder / 'run.rrd', cameras, cloud),
    }
    for name in config.exports:
        with report.skipping('exports'):
            writers[name]()


@dataclass
class _Answer:
    """A frame with its image and what the network says about it."""

    frame: Frame
    image: np.ndarray
    prediction: FramePrediction


class _Feeder:
    """Feeds frames to a pipeline in order; frames wait here until their answer comes."""

    def __init__(self, pipeline: Stream | PhotoSet, log: FrameLog, report: Report):
        self._pipeline, self._log, self._report = pipeline, log, report
        self._waiting: deque[tuple[Frame, np.ndarray]] = deque()
        self._busy_ms = 0.0
        self._last_ns = -1
        self._without_K = 0

    def answers(
        self, frames: Iterable[Frame], use_K: bool, is_interrupted: Callable[[], bool]
    ) -> Iterator[_Answer]:
        """Yield the answers in the order of the frames; name those that cannot be used."""
        for frame in frames:
            if is_interrupted():
                self._report.interrupted = True
                break
            try:
                image = frame.load_image()
                self._check_order(frame.stamp_ns)
                self._waiting.append((frame, image))
                K = frame.K if use_K else None
                self._without_K += use_K and K is None
                yield from self._answered(partial(self._pipeline.feed, image, frame.stamp_ns, K))
            except (DataError, InputError) as error:
                self._report.refused.append(f'{frame.name}: {error}')
        yield from self._answered(self._pipeline.flush)
        if self._without_K:
            self._report.remarks.append(
                f'known_intrinsics: {self._without_K} frames have none; theirs are predicted'
            )

    def _check_order(self, stamp_ns: int) -> None:
        if stamp_ns <= self._last_ns:
            raise InputError(f'stamp {stamp_ns} ns is not after the one before, {self._last_ns}')
        self._last_ns = stamp_ns

    def _answered(self, ask: Callable[[], list[FramePrediction]]) -> Iterator[_Answer]:
        started = time.perf_counter()
        predictions = ask()
        self._busy_ms += 1000 * (time.perf_counter() - started)
        share_ms = self._busy_ms / max(len(predictions), 1)
        for prediction in predictions:
            frame, image = self._waiting.popleft()
            while frame.stamp_ns != prediction.stamp_ns:  # it was refused
                frame, image = self._waiting.popleft()
            pipeline = self._pipeline
            self._log.add(frame.stamp_ns, share_ms, pipeline.cache_bytes, pipeline.map.num_points)
            self._busy_ms = 0.0
            yield _Answer(frame, image, prediction)


def _camera(answer: _Answer) -> Camera:
    """The estimated view, in pixels of the camera image."""
    frame, prediction = answer.frame, answer.prediction
    name = frame.image_path.name if frame.image_path else frame.name.replace(' ', '_')
    K = prediction.geometry.camera_K(prediction.K).double().numpy()
    pose = prediction.T_world_camera.double().numpy()
    return Camera(name, frame.stamp_ns, pose, K, prediction.geometry.camera_size_hw)


def _judge(report, truths, estimate, predicted, collected, config) -> list[pictures.Figure]:
    """Fill the report and return its pictures."""
    ates = judge_trajectories(report, truths, estimate, config)
    depth = judge_depth(report, collected.depth, config)
    compare_scales(report, ates[0].get('sim3'), depth)
    true_cloud = collected.truth_map.cloud()
    judged_map = judge_map(report, predicted, true_cloud.points_xyz, ates[0].get('sim3'), config)
    judge_speed(report, collected.log, config)
    if not config.pictures:
        return []
    figures = []
    for errors in filter(None, ates):
        figures += [pictures.trajectory(errors), pictures.error_over_time(errors)]
    if depth is not None:
        per_frame = collected.depth.abs_rel_per_frame(depth.scale, depth.shift_m)
        if collected.strips:
            figures.append(pictures.depth_strips(collected.strips, depth))
        figures.append(pictures.depth_over_time(collected.depth_stamps_ns, per_frame, depth))
    if judged_map is not None:
        figures.append(pictures.map_errors(judged_map, ates[0]['sim3'].truth.T_world_camera))
    elif len(predicted):
        figures.append(pictures.predicted_map(predicted))
    return [*figures, pictures.speed(collected.log)]
