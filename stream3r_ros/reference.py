"""``stream3r reference``: tables of all topics, services and parameters, made from the code.

The end of REFERENCE.md is what this prints; a test holds them together, and the tables to a
running node.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stream3r_ros.config import NodeConfig
from stream3r_ros.outputs import TOPICS
from stream3r_ros.parameters import leaves
from stream3r_ros.qos import SENSOR_DATA, Qos

BEGIN = '<!-- From here on: stream3r reference -->\n'


class Input(NamedTuple):
    """A topic that the node listens to."""

    type: str
    qos: Qos
    about: str


TF_WANTED = 'with `odom_frame`, `base_frame` or `scale.source: depth`'
INPUTS = {
    'image': Input(
        'sensor_msgs/msg/Image or CompressedImage',
        SENSOR_DATA,
        'the camera; its frame_id is the optical frame (or `camera_frame`)',
    ),
    'camera_info': Input(
        'sensor_msgs/msg/CameraInfo', SENSOR_DATA, 'intrinsics and distortion, optional'
    ),
    'depth': Input(
        'sensor_msgs/msg/Image',
        SENSOR_DATA,
        '16UC1 (mm) or 32FC1 (m), with `scale.source: depth`; registered to the camera, or with '
        '`depth_camera_info`',
    ),
    'depth_camera_info': Input(
        'sensor_msgs/msg/CameraInfo',
        SENSOR_DATA,
        'of the depth images: they are moved into the camera by the transform between the frames',
    ),
    '/tf': Input('tf2_msgs/msg/TFMessage', Qos(depth=100), TF_WANTED),
    '/tf_static': Input(
        'tf2_msgs/msg/TFMessage',
        Qos(depth=100, latched=True),
        TF_WANTED,
    ),
}
OUTPUTS = {
    '/tf': ('map', 'map to odometry, base or camera, at the stamp of the image'),
    '~/pose': ('map', 'the camera'),
    '~/odometry': (
        'map',
        'pose and velocity of `base_frame` or the camera, with covariance where it was fitted; '
        'else its element 0 is -1',
    ),
    '~/depth/image': ('camera', '32FC1 along the optical axis, NaN = none'),
    '~/depth/confidence': ('camera', "32FC1, the network's own, >= 1; no probability"),
    '~/depth/sigma': ('camera', '32FC1, standard deviation of the depth, NaN = not known'),
    '~/depth/camera_info': ('camera', 'of the depth image; D = 0 but with `rectify: never`'),
    '~/cloud': ('camera', 'reliable pixels of the image: x y z rgb confidence'),
    '~/path': ('map', 'recent poses, each with its own stamp'),
    '~/map': ('map', 'the whole map: x y z rgb confidence'),
    '~/map_changes': (
        'map',
        'changed voxels: x y z rgb confidence weight voxel_id_low voxel_id_high; weight 0 = '
        'removed; an empty message = forget all, the whole map follows',
    ),
    '~/occupancy_grid': (
        'map',
        'obstacles 100, free 0, unknown -1, for Nav2; with `outputs.occupancy_grid.enabled`, '
        'made while somebody listens',
    ),
}
SERVICES = {
    '~/reset': 'a new session with an empty map',
    '~/pause': 'drop images; the session stays',
    '~/resume': 'take images again',
    '~/save_map': 'write map, trajectory and origin (`save_map.*`); the reply lists the paths',
    '~/get_status': 'the status line and all figures of /diagnostics',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    print(tables(), end='')
    return 0


def tables() -> str:
    """Return the tables as Markdown."""
    inputs = ((f'`{name}`', i.type, _qos(i.qos), i.about) for name, i in INPUTS.items())
    outputs = (
        (f'`{name}`', topic.type, OUTPUTS[name][0], _qos(topic.qos), OUTPUTS[name][1])
        for name, topic in TOPICS.items()
    )
    diagnostics = (
        '`/diagnostics`', 'diagnostic_msgs/msg/DiagnosticArray', '', _qos(Qos()), 'all figures'
    )  # fmt: skip
    parts = [
        '## Topics in\n',
        _table(('topic', 'type', 'QoS', 'what'), inputs),
        '## Topics out\n',
        _table(('topic', 'type', 'frame', 'QoS', 'what'), [*outputs, diagnostics]),
        '## Services (std_srvs/srv/Trigger)\n',
        _table(('service', 'what'), ((f'`{name}`', text) for name, text in SERVICES.items())),
        '## Parameters\n',
        _table(('parameter', 'default', 'values', 'live', 'what'), _parameters()),
    ]
    return '\n'.join(parts)


def _parameters() -> Iterable[Sequence[str]]:
    for name, leaf in leaves(NodeConfig):
        limits = leaf.metadata
        values = ', '.join(f'`{choice}`' for choice in limits.get('choices', ()))
        low, high = limits.get('minimum'), limits.get('maximum')
        if high is not None:
            values = f'{"" if low is None else low} .. {high}'
        elif low is not None:
            values = f'>= {low}'
        default = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
        is_live = 'yes' if limits.get('live') else ''
        yield f'`{name}`', f'`{default!r}`', values, is_live, limits['help']


def _qos(qos: Qos) -> str:
    reliability = 'best effort' if qos.best_effort else 'reliable'
    durability = ', transient local' if qos.latched else ''
    return f'{reliability}{durability}, depth {qos.depth}'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
