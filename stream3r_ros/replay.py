"""``stream3r replay``: reconstruct recorded images offline, losing none, without ROS and DDS."""

import argparse
import dataclasses
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from stream3r_core.errors import ConfigError, DataError, InputError, Stream3rError
from stream3r_core.evaluation.trajectory import Trajectory, ate
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import VoxelMap
from stream3r_core.pipeline import (
    Reconstructor,
    incomplete_memory,
    known_uncertainty,
    load_configured_model,
    reconstruct_photos,
)
from stream3r_core.slam import SubmapReconstructor, make_reconstructor
from stream3r_ros.bag import BagReader
from stream3r_ros.config import NodeConfig
from stream3r_ros.ground_truth import TRUTH_TYPES, bag_truth
from stream3r_ros.options import (
    add_config_arguments,
    add_output_arguments,
    config_from_args,
    output_folder,
    write_options,
)
from stream3r_ros.provenance import Provenance
from stream3r_ros.report import Report
from stream3r_ros.results import BAG, MADE_WITH, MAP, MAP_FILE, ONLINE, TRAJECTORY, Results, RunBag
from stream3r_ros.sources import (
    DEFAULT_RATE_HZ,
    BagSource,
    EveryKth,
    Frame,
    Source,
    are_photos,
    file_source,
    is_one_bag,
)
from stream3r_ros.stamps import StampOrder
from stream3r_ros.tf import camera_frame, check_frames

CONFIG, SUMMARY = 'config.yaml', 'summary.json'
INTERRUPTED = 130  # exit code of a shell command ended by Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r replay``."""
    parser.add_argument(
        'input',
        nargs='+',
        help='a bag (rosbag2 folder, .mcap, .db3, ROS 1 .bag), a video, a folder of images, or '
        'image files: photos that all see each other (session.mode=full)',
    )
    add_output_arguments(parser)
    add_config_arguments(parser)
    add_input_arguments(parser)
    parser.add_argument(
        '--ground-truth',
        default='',
        metavar='FILE|TOPIC|none',
        help='trajectory to compare with: a TUM, KITTI or EuRoC file, or a topic of the bag; '
        'default: what the bag has',
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how an input is to be read."""
    parser.add_argument('--image-topic', default='', metavar='TOPIC', help='images of a bag')
    parser.add_argument(
        '--camera-info',
        nargs='?',
        const='auto',
        default='',
        metavar='TOPIC',
        help="use the bag's intrinsics, and rectify; without TOPIC those beside the images",
    )
    parser.add_argument(
        '--rate',
        type=float,
        default=DEFAULT_RATE_HZ,
        metavar='HZ',
        help='of image files whose names are no stamps (default: %(default)g)',
    )
    parser.add_argument(
        '--every', type=int, default=1, metavar='K', help='take every K-th image only'
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    config = config_from_args(args, {'session.mode': 'full'} if are_photos(args.input) else {})
    check_frames(config)
    _check_offline(config)
    with open_source(args, config.rectify) as (source, bag):
        truth = _named_truth(args.ground_truth, bag)
        model = load_configured_model(config.model)
        names = (TRAJECTORY, MAP, MADE_WITH, BAG, CONFIG, SUMMARY, ONLINE, MAP_FILE)
        folder = output_folder(args.output, names, args.overwrite, args.input)
        write_options(folder / CONFIG, config)
        Provenance(model.weights_info, config).write(folder / MADE_WITH)
        print(f'{source.name}: {source.num_frames} images; weights: {model.weights_info.source}')
        with first_interrupt_ends_the_loop() as is_interrupted:
            report = replay(source, model, config, folder, is_interrupted)
        if report.images_out:
            _judge(report, read_trajectory(folder / TRAJECTORY), truth, bag, args.ground_truth)
    report.write(folder / SUMMARY)
    print(report)
    print(f'results in {folder}: {", ".join(n for n in names if (folder / n).exists())}')
    if report.failure is not None:
        raise report.failure
    if not report.images_out and not report.interrupted:
        raise DataError(f'{source.name}: none of {report.images_in} images could be used')
    return INTERRUPTED if report.interrupted else 0


def _check_offline(config: NodeConfig) -> None:
    """Refuse what only a live graph can give; without it the map is map_frame -> camera."""
    if config.map_orientation == 'level' and config.odom_frame:
        raise ConfigError(
            "map_orientation 'level' with odom_frame asks a live /tf: for a replay set "
            "odom_frame='' and camera_roll and camera_pitch"
        )
    if config.scale.source != 'none':
        raise ConfigError(
            f'scale.source {config.scale.source!r} needs live topics: not in a replay'
        )


@contextmanager
def open_source(
    args: argparse.Namespace, rectify: str = 'auto'
) -> Iterator[tuple[Source, BagReader | None]]:
    """Open what the arguments of :func:`add_input_arguments` and ``input`` name; and its bag."""
    if args.every < 1:
        raise ConfigError(f'--every must be at least 1 (every image), got {args.every}')
    if is_one_bag(args.input):
        with BagReader(args.input[0]) as bag:
            source = BagSource(bag, args.image_topic, args.camera_info, rectify)
            yield EveryKth(source, args.every), bag
        return
    if args.image_topic or args.camera_info:
        raise ConfigError(f'--image-topic and --camera-info are for bags; {args.input[0]} is none')
    if not args.rate > 0:
        raise ConfigError(f'--rate must be positive, got {args.rate}')
    yield EveryKth(file_source(args.input, args.rate), args.every), None


def replay(
    source: Source,
    model,
    config: NodeConfig,
    folder: Path,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Report:
    """Reconstruct all images of a source; write trajectory, map and bag into ``folder``.

    An image that cannot be used is refused and reported, as in the node. When
    ``is_interrupted`` or the source fails midway, the run ends early: that stands in the report,
    and the results up to there are whole.
    """
    started = time.perf_counter()
    with tqdm(source, total=source.num_frames, unit='image') as progress:
        report = Report(source.name, model.weights_info, say=progress.write)
        frames = _usable_frames(progress, config, report, is_interrupted)
        uncertainty = known_uncertainty(model, config)
        corrected = pack = None  # what a back end says when all images are in
        if config.session.mode == 'full':
            voxel_map = VoxelMap(config.mapping)
            predictions = _photo_predictions(frames, model, config, voxel_map)
        else:
            reconstructor = make_reconstructor(model, config)
            voxel_map = reconstructor.map
            predictions = _stream_predictions(frames, reconstructor, report)
            if isinstance(reconstructor, SubmapReconstructor):
                corrected = reconstructor.trajectory
                pack = None if config.backend.localize_only else reconstructor.pack
            report.backend = reconstructor.figures
        bag = RunBag(folder, config, voxel_map, uncertainty, corrected)
        with Results(bag, pack) as results:
            try:
                for prediction, frame in predictions:
                    results.add(prediction, frame.frame_id, frame.lens)
                    report.images_out += 1
                    report.camera_frame = frame.frame_id
            except Stream3rError as failure:
                report.failure = failure
    report.map_points = voxel_map.num_points
    report.seconds = time.perf_counter() - started
    return report


def _usable_frames(
    loaders, config: NodeConfig, report: Report, is_interrupted: Callable[[], bool]
) -> Iterator[Frame]:
    """Yield the images that can be loaded and are newer than the one before."""
    stamps = StampOrder()
    for load in loaders:
        if is_interrupted():
            report.interrupted = True
            return
        report.images_in += 1
        try:
            frame = load()
            frame = frame._replace(frame_id=camera_frame(frame.frame_id, config))
            _check_order(frame.stamp_ns, stamps, config)
        except InputError as error:
            report.refuse(error)
            continue
        stamps.note(frame.stamp_ns)
        yield frame


def _check_order(stamp_ns: int, stamps: StampOrder, config: NodeConfig) -> None:
    """Refuse what the node refuses; where the node would start anew, end the replay."""
    ahead_s = stamps.check(stamp_ns, config.backward_jump_s)
    if ahead_s >= 0:
        return
    raise DataError(
        f'time jumps back by {-ahead_s:.3f} s, from {stamps.last_ns} to {stamp_ns} ns: the input '
        'holds several recordings; replay them one by one. The results end before the jump'
    )


def _stream_predictions(frames, reconstructor: Reconstructor, report: Report):
    waiting: deque[Frame] = deque()  # without their images; their chunk is not full
    last_pose = None
    for frame in frames:
        try:
            predictions = reconstructor.feed(frame.rgb, frame.stamp_ns, frame.K)
        except InputError as error:
            report.refuse(error)
            continue
        except Exception as error:
            if not reconstructor.session.is_broken:
                raise
            for _ in (frame, *waiting):
                report.refuse(incomplete_memory(error))
            waiting.clear()
            _begin_from(last_pose, reconstructor)
            continue
        waiting.append(frame._replace(rgb=None))
        for prediction in predictions:
            last_pose = prediction.T_world_camera
            yield prediction, waiting.popleft()
    try:
        predictions = reconstructor.flush()
    except Exception as error:
        if not reconstructor.session.is_broken:
            raise
        for _ in waiting:
            report.refuse(incomplete_memory(error))
        return
    for prediction in predictions:
        yield prediction, waiting.popleft()


def _begin_from(T_world_camera, reconstructor: Reconstructor) -> None:
    """Start a new session in the same map."""
    if T_world_camera is None:
        reconstructor.reset(keep_map=True)
    else:
        reconstructor.restart_at(T_world_camera)


def _photo_predictions(frames, model, config: NodeConfig, voxel_map: VoxelMap):
    frames = list(frames)
    if any(frame.K is not None for frame in frames):
        raise ConfigError("session.mode 'full' takes no --camera-info; leave it out")
    if not frames:
        return
    images = [frame.rgb for frame in frames]
    for frame, prediction in zip(frames, reconstruct_photos(model, images, config)):
        voxel_map.integrate(prediction)
        yield dataclasses.replace(prediction, stamp_ns=frame.stamp_ns), frame


@contextmanager
def first_interrupt_ends_the_loop() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM finish the image at hand; the second acts as usual."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named_truth(name: str, bag: BagReader | None) -> Trajectory | None:
    """Return the trajectory of a file; make sure that a topic is one before the run."""
    if not name or name == 'none':
        return None
    if bag is None or Path(name).is_file():
        return read_trajectory(name)
    try:
        bag.topic(name, TRUTH_TYPES)
    except DataError as error:
        raise DataError(f'--ground-truth {name} is no file, and {error}') from error
    return None


def _judge(
    report: Report,
    estimate: Trajectory,
    truth: Trajectory | None,
    bag: BagReader | None,
    truth_name: str,
) -> None:
    """Note gaps in time and, where there is a truth, the absolute trajectory error."""
    report.find_gaps(estimate.stamps_ns)
    try:
        if truth is None and bag is not None and truth_name != 'none':
            found = bag_truth(bag, truth_name, report.camera_frame, estimate.stamps_ns)
            truth, report.no_accuracy = found.trajectory, '; '.join(found.remarks)
        if truth is not None:
            report.accuracy = ate(truth, estimate, 'sim3')
    except DataError as error:
        report.no_accuracy = f'no ATE: {error}'
