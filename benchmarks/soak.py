"""A live node over minutes or hours: memory, latency, and every image accounted for.

Run:  python benchmarks/soak.py --duration 600 --output soak.json     (2 hours: --duration 7200)

The node runs in a process of its own; this process is its camera, over DDS, and its observer. The
camera sends 10 images a second, with pauses, bursts of 60 Hz and changes of the resolution at
random times (``--seed``). Every image must be processed once, dropped for a reason, or lost on
the way: published = received + lost, received = processed + dropped. Lines are fitted to memory
and latency from --settling seconds after the first image on: before, caches and allocator fill.

Three kinds of resident memory are told apart. Anonymous memory is what the node takes for itself:
it may grow by --max-slope. The map, which has a budget of its own, empties with each change of the
resolution and fills again, so the fit has a term for its points besides the one for frames. Shared
memory is the segments of DDS, one of each process on the graph, whose pages fill with use: it may
reach their size. Pages of files, mostly code of libraries, come and go as the system likes. The
exit code is 1 when something does not add up, the node fails or its memory exceeds a limit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from sensor_msgs.msg import Image
from tf2_msgs.msg import TFMessage

from stream3r_core.evaluation.conditions import code_version
from stream3r_core.synthetic import render_sequence
from stream3r_ros.environment import prepare_environment, private_graph
from stream3r_ros.messages import rclpy_messages

STEADY_HZ, BURST_HZ = 10.0, 60.0
SIZES_HW = ((240, 320), (480, 640), (320, 240))
SETTLE_S = 60.0
MAX_SHARED_MB = 2 * 37.0  # two processes with the segments of config/fastdds.xml
FRAME = 'camera_optical_frame'


class Shot(NamedTuple):
    """An image to be sent."""

    due_s: float  # since the beginning
    size_hw: tuple[int, int]
    event: str  # 'pause', 'burst', 'resolution', when one begins with this image


def schedule(duration_s: float, seed: int) -> Iterator[Shot]:
    """Yield the images of a run: 10 Hz, and something unusual every 5 to 20 seconds."""
    dice, size = random.Random(seed), SIZES_HW[0]
    now, event, event_at, burst_ends = 0.0, '', 10.0, 0.0
    while now < duration_s:
        yield Shot(now, size, event)
        now, event = now + 1 / (BURST_HZ if now < burst_ends else STEADY_HZ), ''
        if now < event_at:
            continue
        event = dice.choice(('pause', 'burst', 'resolution'))
        if event == 'pause':
            now += dice.uniform(0.3, 5.0)
        elif event == 'burst':
            burst_ends = now + dice.uniform(0.5, 3.0)
        else:
            size = dice.choice([other for other in SIZES_HW if other != size])
        event_at = now + dice.uniform(5.0, 20.0)


class Views:
    """What the camera sees: a walk through a synthetic room, there and back again for ever."""

    def __init__(self, num_views: int = 60):
        there = render_sequence(4, num_views).images.numpy()
        self._views = [*there, *there[-2:0:-1]]
        self._resized: dict[tuple[int, tuple[int, int]], np.ndarray] = {}

    def at(self, time_s: float, size_hw: tuple[int, int]) -> np.ndarray:
        """Return the view [H, W, 3] uint8 of a time."""
        key = round(STEADY_HZ * time_s) % len(self._views), size_hw
        if key not in self._resized:
            view = cv2.resize(self._views[key[0]], size_hw[::-1], interpolation=cv2.INTER_CUBIC)
            self._resized[key] = view
        return self._resized[key]


def memory_mb(pid: int) -> dict[str, float]:
    """Resident memory of a process: its own, shared with others, and pages of files."""
    kinds = {'anonymous_mb': 'RssAnon', 'shared_mb': 'RssShmem', 'files_mb': 'RssFile'}
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    values = dict(line.split(':', 1) for line in lines)
    if 'RssAnon' not in values:
        raise psutil.ZombieProcess(pid)
    return {name: int(values[kind].split()[0]) * 1024 / 1e6 for name, kind in kinds.items()}


class Observer:
    """Samples the figures of /diagnostics with the memory and processor time of the node."""

    def __init__(self, node, process: subprocess.Popen):
        self._process = psutil.Process(process.pid)
        self._start_s = time.monotonic()
        self.samples: list[dict] = []
        self.figures: dict[str, str] = {}
        self.num_transforms = 0
        node.create_subscription(DiagnosticArray, '/diagnostics', self._note, 10)
        node.create_subscription(TFMessage, '/tf', self._count, 1000)

    def _count(self, message: TFMessage) -> None:
        self.num_transforms += len(message.transforms)

    def _note(self, message: DiagnosticArray) -> None:
        self.figures = {pair.key: pair.value for pair in message.status[0].values}
        if self.figure('images_processed'):
            self._sample()

    def _sample(self) -> None:
        figures = self.figures
        try:
            with self._process.oneshot():
                cpu = self._process.cpu_times()
                self.samples.append({
                    'time_s': time.monotonic() - self._start_s,
                    **memory_mb(self._process.pid),
                    'cpu_s': cpu.user + cpu.system,
                    'threads': self._process.num_threads(),
                    'files': self._process.num_fds(),
                    'processed': int(figures['images_processed']),
                    'map_points': int(figures['map_points']),
                    'latency_p50_ms': float(figures['latency_p50_ms']),
                    'latency_p95_ms': float(figures['latency_p95_ms']),
                })  # fmt: skip
        except (psutil.NoSuchProcess, FileNotFoundError):
            pass  # the camera notices, and says so

    def figure(self, name: str) -> int:
        """Return a counter of the last diagnostics."""
        return int(self.figures.get(name, 0))

    def latest(self) -> dict:
        """Return the last sample; empty before the first."""
        return self.samples[-1] if self.samples else {}

    @property
    def is_idle(self) -> bool:
        """Whether the node has dealt with all that it has received."""
        done = self.figure('images_processed') + self.figure('images_dropped')
        return self.figure('images_received') == done


def shoot(node, observer: Observer, process, arguments) -> Counter:
    """Send all images of the schedule; return how many, and how many events of which kind."""
    messages, views = rclpy_messages(), Views()
    camera = node.create_publisher(Image, '/image', 5)
    wait(lambda: camera.get_subscription_count() and observer.figures.get('state') == 'active')
    counts, start_s, said = Counter(), time.monotonic(), 0.0
    for shot in schedule(arguments.duration, arguments.seed):
        time.sleep(max(0.0, start_s + shot.due_s - time.monotonic()))
        if process.poll() is not None:
            break
        view = views.at(shot.due_s, shot.size_hw)
        camera.publish(messages.rgb_image(view, time.time_ns(), FRAME))
        counts['published'] += 1
        counts[shot.event] += bool(shot.event)
        if shot.due_s >= said:
            said += 60.0
            print({k: round(v, 1) for k, v in observer.latest().items()}, flush=True)
    quiet = len(observer.samples) + 2

    def is_over() -> bool:
        is_settled = len(observer.samples) >= quiet and observer.is_idle
        return is_settled or process.poll() is not None

    wait(is_over)
    return counts


def wait(condition, patience_s: float = SETTLE_S) -> bool:
    """Wait for something that the observer's thread brings about."""
    end = time.monotonic() + patience_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def spin(executor: SingleThreadedExecutor) -> None:
    """Serve the observer until ROS is shut down."""
    try:
        executor.spin()
    except ExternalShutdownException:
        pass


def account(counts: Counter, observer: Observer) -> dict:
    """Where every image has gone."""
    prefix = 'images_dropped.'
    drops = {k.removeprefix(prefix): int(v) for k, v in observer.figures.items() if prefix in k}
    received, processed = observer.figure('images_received'), observer.figure('images_processed')
    return {
        'published': counts['published'],
        'received': received,
        'lost_on_the_way': counts['published'] - received,
        'lost_on_the_way_as_the_node_says': {
            k: int(v) for k, v in observer.figures.items() if k.startswith('images_lost')
        },
        'processed': processed,
        'dropped': drops,
        'unaccounted': received - processed - sum(drops.values()),
        'transforms': observer.num_transforms,
    }


def trends(samples: list[dict], settling_s: float) -> dict:
    """Lines through what should be level, once the node has settled."""
    table = {name: np.array([s[name] for s in samples], float) for name in samples[0]}
    is_late = table['time_s'] > table['time_s'][0] + settling_s
    late = {name: values[is_late] for name, values in table.items()}
    hours, frames, points = late['time_s'] / 3600, late['processed'], late['map_points']
    third = max(1, len(hours) // 3)

    def per(name, *over):
        """Return the slopes of what is fitted over these quantities together."""
        design = np.stack([*over, np.ones(len(hours))], 1)
        return np.linalg.lstsq(design, late[name], rcond=None)[0].tolist()

    def ends(values):
        return [float(np.median(values[:third])), float(np.median(values[-third:]))]

    cpu_ms = 1e3 * np.diff(late['cpu_s']) / np.maximum(np.diff(frames), 1)
    return {
        'memory': {
            name: {
                'first': float(table[name][0]),
                'settled': ends(late[name]),
                'max': float(table[name].max()),
                'per_1000_frames': 1000 * per(name, frames, points)[0],
                'per_1000_map_points': 1000 * per(name, frames, points)[1],
                'per_hour': per(name, hours, points)[0],
            }
            for name in ('anonymous_mb', 'shared_mb', 'files_mb')
        },
        'threads': ends(late['threads']),
        'open_files': ends(late['files']),
        'latency_p50_ms': ends(late['latency_p50_ms']),
        'latency_p50_ms_per_hour': per('latency_p50_ms', hours)[0],
        'latency_p95_ms': ends(late['latency_p95_ms']),
        'latency_p95_ms_per_hour': per('latency_p95_ms', hours)[0],
        'processor_ms_per_frame': ends(cpu_ms),
    }


def problems(result: dict, log: str, max_slope: float) -> list[str]:
    """What makes the run a failure."""
    images, memory = result['images'], result['trends']['memory']
    slope = memory['anonymous_mb']['per_1000_frames']
    checks = {
        'images are not accounted for': images['unaccounted'] or images['lost_on_the_way'] < 0,
        'not one transform per processed image': images['transforms'] != images['processed'],
        f'memory grows by more than {max_slope} MB per 1000 frames': slope > max_slope,
        f'more than {MAX_SHARED_MB} MB are shared': memory['shared_mb']['max'] > MAX_SHARED_MB,
        'no clean end on SIGINT': result['exit_code'] != 0,
        'errors in the log of the node': 'Traceback' in log or '[ERROR]' in log,
    }
    return [text for text, is_wrong in checks.items() if is_wrong]


def run(arguments) -> dict:
    """Run the whole soak on a graph of its own; return the result for JSON."""
    prepare_environment()
    with private_graph() as variables, Path(arguments.log).open('w') as log:
        os.environ.update(variables)
        options = ['status.period_s=1.0', 'max_gap_s=1.0', *arguments.set]
        parameters = [word for pair in options for word in ('-p', pair.replace('=', ':=', 1))]
        process = subprocess.Popen(
            [sys.executable, '-m', 'stream3r_ros', 'node', '--ros-args', *parameters],
            stdout=log, stderr=log,
        )  # fmt: skip
        rclpy.init(args=[])
        node = rclpy.create_node('soak')
        observer = Observer(node, process)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        spinning = threading.Thread(target=spin, args=(executor,))
        spinning.start()
        try:
            counts = shoot(node, observer, process, arguments)
            wait(lambda: observer.num_transforms >= observer.figure('images_processed'), 10.0)
        finally:
            told_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            exit_code = process.wait(SETTLE_S)
            ended_s = time.monotonic() - told_s
            rclpy.try_shutdown()
            spinning.join()
    return {
        'arguments': vars(arguments),
        'code': code_version(),
        'events': {k: n for k, n in counts.items() if k and k != 'published'},
        'images': account(counts, observer),
        'restarts': {k: v for k, v in observer.figures.items() if k.startswith('restarts')},
        'trends': trends(observer.samples, arguments.settling),
        'exit_code': exit_code,
        'end_s': ended_s,
        'samples': observer.samples[:: max(1, len(observer.samples) // 200)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--duration', type=float, default=600.0, metavar='S')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--settling', type=float, default=180.0, metavar='S')
    parser.add_argument('--max-slope', type=float, default=1.0, metavar='MB_PER_1000_FRAMES')
    parser.add_argument('--set', nargs='*', default=[], metavar='PARAMETER=VALUE')
    parser.add_argument('--log', default='soak_node.log', help='what the node says')
    parser.add_argument('--output', default='', metavar='JSON')
    arguments = parser.parse_args()
    result = run(arguments)
    result['problems'] = problems(result, Path(arguments.log).read_text(), arguments.max_slope)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != 'samples'}, indent=1))
    return 1 if result['problems'] else 0


if __name__ == '__main__':
    sys.exit(main())
