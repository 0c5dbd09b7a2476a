"""Latency from the stamp of an image to its transform on /tf, on a live graph of three processes.

Run:  python benchmarks/latency.py --duration 30 --output latency.json

A camera process stamps images with the time at which it sends them, 30 times a second; the node
takes the newest one whenever it is free; this process notes when the transform with that stamp
arrives, the way through DDS included twice. The first seconds do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image
from tf2_msgs.msg import TFMessage

from stream3r_core.evaluation.conditions import code_version, device_name
from stream3r_core.synthetic import render_sequence
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.environment import prepare_environment, private_graph
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import TOPICS
from stream3r_ros.player import interruptible_ros

WARM_UP_S, PATIENCE_S = 3.0, 120.0
FRAME = 'camera_optical_frame'


def shoot(rate_hz, size):
    """Send images until SIGTERM (the camera's process)."""
    width, height = map(int, size.split('x'))
    small = render_sequence(4, 8).images.numpy()
    views = [cv2.resize(view, (width, height), interpolation=cv2.INTER_CUBIC) for view in small]
    views += views[-2:0:-1]
    messages = rclpy_messages()
    with interruptible_ros() as create_node:
        camera = create_node('camera').create_publisher(Image, '/image', 5)
        while not camera.get_subscription_count():
            time.sleep(0.05)
        start, count = time.monotonic(), 0
        while True:
            time.sleep(max(0.0, start + count / rate_hz - time.monotonic()))
            camera.publish(messages.rgb_image(views[count % len(views)], time.time_ns(), FRAME))
            count += 1


class Observer:
    """Notes stamp and arrival of every transform, and the node's own figures."""

    def __init__(self, node, wants_all):
        self.stamps_ns, self.arrivals_ns, self.figures = [], [], {}
        node.create_subscription(TFMessage, '/tf', self._take, 100)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._note, 10)
        if wants_all:  # so that everything is built and sent
            for name, topic in TOPICS.items():
                if name != '/tf':
                    kind, full = rclpy_class(topic.type), name.replace('~', '/stream3r')
                    node.create_subscription(kind, full, ignore, topic.qos.for_rclpy(), raw=True)

    def _take(self, message):
        now = time.time_ns()
        for transform in message.transforms:
            self.stamps_ns.append(stamp_ns(transform))
            self.arrivals_ns.append(now)

    def _note(self, message):
        self.figures = {pair.key: pair.value for pair in message.status[0].values}


def ignore(raw):
    """Take a message and do nothing with it."""


def result(observer, arguments):
    """Percentiles of the latency after the warm-up, and what became of the images."""
    stamps = np.array(observer.stamps_ns, np.int64)
    if not stamps.size:
        raise SystemExit(f'no transform came; see {arguments.log}')
    latency_ms = (np.array(observer.arrivals_ns, np.int64) - stamps) / 1e6
    counted = stamps > stamps[0] + int(1e9 * WARM_UP_S)
    span_s = (stamps[counted][-1] - stamps[counted][0]) / 1e9
    p50, p95, p99 = np.percentile(latency_ms[counted], (50, 95, 99)).tolist()
    kept = (
        'images_received',
        'images_processed',
        'images_dropped',
        'latency_p50_ms',
        'map_points',
    )
    return {
        'stamp_to_tf_ms': {'p50': p50, 'p95': p95, 'p99': p99, 'max': float(latency_ms.max())},
        'num_samples': int(counted.sum()),
        'rate_out_hz': (int(counted.sum()) - 1) / span_s,
        'node': {name: float(observer.figures[name]) for name in kept if name in observer.figures},
    }


def run(arguments):
    """Run camera, node and observer on a graph of their own."""
    prepare_environment()
    with private_graph() as variables, Path(arguments.log).open('w') as log:
        os.environ.update(variables)
        pairs = [word.replace('=', ':=', 1) for word in arguments.set]
        node_command = ['-m', 'stream3r_ros', 'node', '--ros-args']
        node_command += [word for pair in pairs for word in ('-p', pair)]
        camera_command = [__file__, '--camera', '--rate', arguments.rate, '--size', arguments.size]
        children = [
            subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log)
            for words in (node_command, camera_command)
        ]
        rclpy.init(args=[])
        node = rclpy.create_node('latency')
        observer = Observer(node, not arguments.tf_only)
        try:
            give_up = time.monotonic() + PATIENCE_S
            while not observer.stamps_ns and time.monotonic() < give_up:
                rclpy.spin_once(node, timeout_sec=0.1)
            end = time.monotonic() + WARM_UP_S + arguments.duration
            while time.monotonic() < end:
                rclpy.spin_once(node, timeout_sec=0.1)
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(PATIENCE_S)
            node.destroy_node()
            rclpy.try_shutdown()
    return result(observer, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--duration', type=float, default=30.0, metavar='S')
    parser.add_argument('--rate', type=float, default=30.0, metavar='HZ')
    parser.add_argument('--size', default='640x480', help='of the camera images')
    parser.add_argument('--set', nargs='*', default=[], metavar='PARAMETER=VALUE')
    parser.add_argument('--tf-only', action='store_true', help='subscribe to nothing but /tf')
    parser.add_argument('--log', default='latency_node.log', help='what the node says')
    parser.add_argument('--output', metavar='JSON')
    parser.add_argument('--camera', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.camera:
        return shoot(arguments.rate, arguments.size)
    report = {
        'arguments': {k: v for k, v in vars(arguments).items() if k != 'camera'},
        'conditions': {'code': code_version(), 'machine': processor()},
        **run(arguments),
    }
    print(json.dumps(report, indent=1))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=1))
    return None


def processor():
    return f'{device_name(torch.device("cpu"))}, load {os.getloadavg()[0]:.1f}'


if __name__ == '__main__':
    sys.exit(main())
