"""``stream3r benchmark``: time and memory per frame, beside published figures and arithmetic."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stream3r_core.benchmark.measure import FRAMES, MODES, Plan, Publish
from stream3r_core.benchmark.stages import STAGES
from stream3r_core.config import model_config
from stream3r_core.errors import ConfigError, Stream3rError
from stream3r_core.evaluation.jobs import run_jobs
from stream3r_core.files import atomic_write
from stream3r_core.types import FramePrediction
from stream3r_ros.config import NodeConfig
from stream3r_ros.environment import private_graph
from stream3r_ros.interfaces import ensure_tf2_msgs
from stream3r_ros.messages import rclpy_class
from stream3r_ros.options import add_config_arguments, config_from_args
from stream3r_ros.outputs import FRAME_TOPICS, TOPICS
from stream3r_ros.tf import Carrier

CAMERA_FRAME = 'camera_optical_frame'
DISCOVERY_S = 10.0

#: The seeds' own figures: NVIDIA H200, 518 x 384, full-size network, both dense heads.
PUBLISHED = {
    'conditions': 'published figures: H200, 518x384, full size',
    'causal': {1: {'p50_s': 0.116, 'peak_gb': 5.49}, 200: {'p50_s': 1.170, 'peak_gb': 45.41}},
    'window': {1: {'p50_s': 0.146, 'peak_gb': 6.53}, 200: {'p50_s': 0.146, 'peak_gb': 6.53}},
}

HEADER = (
    f'{"frame":>6}{"p50 ms":>10}{"p95 ms":>10}{"CPU ms":>10}{"floor ms":>10}{"peak GB":>9}'
    '  published'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r benchmark``."""
    parser.add_argument('--output', metavar='JSON', type=Path, help='also write all figures here')
    parser.add_argument(
        '--size', metavar='WxH', help='network image (default: 4:3 at the size of the preset)'
    )
    parser.add_argument(
        '--modes', nargs='+', choices=MODES, default=MODES, help='default: %(default)s'
    )
    parser.add_argument(
        '--frames', nargs='+', type=int, default=FRAMES, metavar='N', help='reported, from 1'
    )
    parser.add_argument('--repeats', type=int, default=3, help='streams (default: %(default)s)')
    parser.add_argument('--warmup', type=int, default=3, help='frames that do not count')
    parser.add_argument(
        '--chunks',
        type=int,
        nargs='+',
        default=(),
        metavar='N',
        help='also measure frames processed N at a time, in the modes with a spatial memory',
    )
    parser.add_argument('--threads', type=int, default=0, help='of PyTorch; 0 = all cores')
    parser.add_argument(
        '--peak-tflops',
        type=float,
        default=0.0,
        metavar='T',
        help='rate of the device, for the floor; 0 = measured with a large matrix product',
    )
    parser.add_argument('--no-publish', action='store_true', help='leave the ROS stage out')
    add_config_arguments(parser)
    parser.epilog = (
        'Time does not depend on the values of weights: --set model.weights=random measures a '
        'network whose weights are not at hand. The network: --set model.preset=stream3r, '
        'model.dtype, model.device.'
    )


def run(args: argparse.Namespace) -> int:
    """Measure every mode in a fresh process, print the tables, write the JSON."""
    if args.chunks and not all(1 <= n <= 8 for n in args.chunks):
        raise ConfigError(f'--chunks takes sizes from 1 to 8, got {list(args.chunks)}')
    if args.threads < 0 or args.peak_tflops < 0:
        raise ConfigError('--threads and --peak-tflops must not be negative')
    config = config_from_args(args)
    plan = _plan(args, config)
    plan.check(model_config(config.model.preset).patch_size)
    report: dict[str, Any] = {
        'preset': config.model.preset,
        'plan': dataclasses.asdict(plan),
        'published': PUBLISHED,
        'modes': {},
    }
    for mode in args.modes:  # in fresh processes: the peak of one is not that of another
        job = partial(
            measure, config, mode, plan, args.threads, args.peak_tflops, _can_publish(args),
            tuple(args.chunks),
        )  # fmt: skip
        (outcome,) = run_jobs({mode: job}, num_workers=1)
        if outcome.failure:
            raise Stream3rError(f'mode {mode} could not be measured: {outcome.failure}')
        report['conditions'] = outcome.value.pop('conditions')
        report['floor'] = outcome.value.pop('floor')
        report['modes'][mode] = outcome.value
    print('\n'.join(tables(report)))
    if args.output is not None:
        with atomic_write(args.output) as file:
            file.write(json.dumps(report, indent=2).encode())
    return 0


def measure(
    config: NodeConfig,
    mode: str,
    plan: Plan,
    threads: int,
    peak_tflops: float,
    publishes: bool,
    chunks: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Measure one mode in this process."""
    import torch

    from stream3r_core.benchmark.arithmetic import count_operations, matrix_rate
    from stream3r_core.benchmark.chunks import measure_chunks
    from stream3r_core.benchmark.measure import measure_mode
    from stream3r_core.evaluation.conditions import conditions
    from stream3r_core.pipeline import load_configured_model

    if threads:
        torch.set_num_threads(threads)
    session = dataclasses.replace(config.session, mode=mode)
    config = dataclasses.replace(config, session=session)
    model = load_configured_model(config.model)
    rate = 1e12 * peak_tflops or matrix_rate(model.device, model.dtype)
    with _publisher(config) if publishes else _nothing() as publish:
        result = measure_mode(model, config, plan, publish)
    if chunks and mode in ('stac', 'stac_paper'):
        result['chunks'] = measure_chunks(model, config, plan, chunks)
    arithmetic = count_operations(model.config, plan.height, plan.width)
    for row in result['frames']['rows']:
        row['floor_s'] = arithmetic.flop(row['cached_tokens']) / rate
    floor = {'flop_per_s': rate, 'is_measured': not peak_tflops, **dataclasses.asdict(arithmetic)}
    return {'conditions': conditions(model), 'floor': floor, **result}


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _publisher(config: NodeConfig) -> Iterator[Publish]:
    """Build and publish the messages of every frame, on a graph of their own.

    There is a subscriber to each topic, as nothing is built that nobody wants.
    """
    ensure_tf2_msgs()
    with private_graph() as variables:
        os.environ.update(variables)
        import rclpy

        from stream3r_ros.publishers import Publishers

        context = rclpy.Context()
        rclpy.init(context=context)
        node = rclpy.create_node('benchmark', context=context)
        try:
            publishers = Publishers(node, config)
            _subscribe(node)
            camera = Carrier(CAMERA_FRAME, np.eye(4))

            def publish(frame: FramePrediction) -> None:
                publishers.publish(frame, CAMERA_FRAME, config, camera, camera)
                publishers.finish()

            yield publish
        finally:
            node.destroy_node()
            rclpy.try_shutdown(context=context)


def _subscribe(node: Any) -> None:
    """Subscribe to every topic of a frame and wait until the publishers know of it."""
    for name in FRAME_TOPICS:
        topic = TOPICS[name]
        node.create_subscription(
            rclpy_class(topic.type), name, _ignore, topic.qos.for_rclpy(), raw=True
        )
    end = time.monotonic() + DISCOVERY_S
    while not all(node.count_subscribers(node.resolve_topic_name(n)) for n in FRAME_TOPICS):
        if time.monotonic() > end:
            raise Stream3rError(f'no subscription was discovered within {DISCOVERY_S:.0f} s')
        time.sleep(0.01)


def _ignore(raw: bytes) -> None:
    """Take a message and do nothing with it."""


def _can_publish(args: argparse.Namespace) -> bool:
    return not args.no_publish and importlib.util.find_spec('rclpy') is not None


def _plan(args: argparse.Namespace, config: NodeConfig) -> Plan:
    sizes = model_config(config.model.preset)
    width = config.image.long_side or sizes.img_size
    patch = sizes.patch_size
    height = round(width * 3 / 4 / patch) * patch
    if args.size:
        found = re.fullmatch(r'(\d+)x(\d+)', args.size)
        if not found:
            raise ConfigError(f'--size: expected WIDTHxHEIGHT such as 518x392, got {args.size!r}')
        width, height = map(int, found.groups())
    return Plan(height, width, tuple(sorted(set(args.frames))), args.repeats, args.warmup)


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report: one table of frames per mode, one of stages, what was asked."""
    plan, floor = report['plan'], report['floor']
    yield from _conditions(report)
    for mode, result in report['modes'].items():
        yield ''
        yield (
            f'{mode}: all frames p50 {1e3 * result["frames"]["all_frames"]["p50_s"]:.1f} ms, '
            f'p95 {1e3 * result["frames"]["all_frames"]["p95_s"]:.1f} ms'
        )
        yield '  attention: ' + '; '.join(f'{k}: {v}' for k, v in result['attention'].items())
        yield HEADER
        for row in result['frames']['rows']:
            yield _row(row, PUBLISHED.get(mode, {}).get(row['frame']))
        yield f'  stages of a whole frame, ms ({plan["width"]}x{plan["height"]}):'
        yield from _stage_lines(result['stages'])
        yield from _chunk_lines(result.get('chunks', ()))
    rate = 'measured matrix product' if floor['is_measured'] else 'given'
    yield ''
    yield (
        f'floor: {floor["first_frame_flop"] / 1e9:.2f} GFLOP + '
        f'{floor["flop_per_cached_token"] / 1e6:.3f} MFLOP per cached token, at '
        f'{floor["flop_per_s"] / 1e12:.3f} TFLOP/s ({rate})'
    )
    yield PUBLISHED['conditions']


def _conditions(report: dict[str, Any]) -> Iterator[str]:
    c, plan = report['conditions'], report['plan']
    yield (
        f'{report["preset"]}, weights {c["weights"]["source"]}, {c["dtype"]}, '
        f'{plan["width"]}x{plan["height"]}; {c["device"]}, {c["threads"]} threads, '
        f'torch {c["versions"]["torch"]}, {c["code"]}'
    )
    if c['weights']['source'] == 'random':
        yield 'the weights are random: times hold for any others, results mean nothing'
    yield (
        f'{plan["repeats"]} streams of {max(plan["frames"])} frames after {plan["warmup"]} frames '
        'of warm-up, device synchronised; frames: network and cache, both dense heads'
    )


def _row(row: dict[str, Any], published: dict[str, float] | None) -> str:
    peak = '-' if row['peak_bytes'] is None else f'{row["peak_bytes"] / 1e9:.3f}'
    text = (
        f'{row["frame"]:>6}{1e3 * row["p50_s"]:>10.1f}{1e3 * row["p95_s"]:>10.1f}'
        f'{1e3 * row["processor_p50_s"]:>10.1f}{1e3 * row["floor_s"]:>10.1f}{peak:>9}'
    )
    if published is None:
        return text
    return f'{text}  {1e3 * published["p50_s"]:.0f} ms, {published["peak_gb"]:.2f} GB'


def _stage_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f'{"frame":>16}' + ''.join(f'{row["frame"]:>8}' for row in rows)
    for stage in STAGES:
        if any(stage in row['stages'] for row in rows):
            yield f'{stage:>16}' + ''.join(
                f'{1e3 * row["stages"].get(stage, 0.0):>8.2f}' for row in rows
            )
    yield f'{"sum":>16}' + ''.join(f'{1e3 * sum(row["stages"].values()):>8.2f}' for row in rows)
    yield f'{"whole frame":>16}' + ''.join(f'{1e3 * row["seconds"]:>8.2f}' for row in rows)


def _chunk_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield (
            f'  chunks of {row["chunk_size"]}: {1e3 * row["per_frame_s"]:.1f} ms per frame; a '
            f'chunk takes p50 {1e3 * row["p50_s"]:.1f}, p95 {1e3 * row["p95_s"]:.1f} ms'
        )
