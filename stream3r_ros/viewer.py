"""``stream3r view``: the map in a browser, live from a node's topics or from a results folder."""

import argparse
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_ros.bag import BagReader
from stream3r_ros.conversions import (
    camera_matrix,
    cloud_from_message,
    depth_from_message,
    pose_from_message,
    stamp_ns,
)
from stream3r_ros.outputs import TOPICS
from stream3r_ros.results import BAG, MAP, NAMESPACE, TRAJECTORY
from stream3r_ros.viewer_scene import Scene

VIEW = ('~/pose', '~/depth/camera_info', '~/depth/image')  # of one image, by its stamp
MAX_VIEWS = 100  # of a folder: depth images that are kept
MAX_WAITING = 30  # images of which not all messages have come


class View(NamedTuple):
    """The camera of one image and its depth."""

    T_map_camera: np.ndarray  # [4, 4]
    K: np.ndarray  # [3, 3] pixels of the depth image
    depth_m: np.ndarray  # [H, W] map units, NaN = none


class ViewAssembler:
    """Brings the messages of an image together by stamp; what never completes is dropped."""

    def __init__(self, show: Callable[[View], None]):
        self._show = show
        self._waiting: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def take(self, topic: str, message: Any) -> None:
        """Take a message of one of the topics in ``VIEW``."""
        stamp = stamp_ns(message)
        parts = self._waiting.setdefault(stamp, {})
        parts[topic] = message
        if len(parts) == len(VIEW):
            del self._waiting[stamp]
            pose, info, depth = (parts[name] for name in VIEW)
            view = View(
                pose_from_message(pose.pose), camera_matrix(info), depth_from_message(depth)
            )
            self._show(view)
        elif len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stream3r view``."""
    parser.add_argument(
        'folder', nargs='?', help='results of demo, replay or ~/save_map; default: a running node'
    )
    parser.add_argument(
        '--node', default=NAMESPACE, metavar='NAME', help='whose topics (default: %(default)s)'
    )
    parser.add_argument(
        '--host', default='127.0.0.1', help="where to serve; '0.0.0.0' lets other machines look on"
    )
    parser.add_argument('--port', type=int, default=8080, help='default: %(default)s')
    parser.add_argument(
        '--max-points',
        type=int,
        default=300_000,
        metavar='N',
        help='points of the map that the browser gets (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if args.max_points < 1:
        raise ConfigError(f'--max-points must be at least 1, got {args.max_points}')
    if args.folder is not None:
        show = read_folder(Path(args.folder))  # is it readable? before anything is served
    scene = Scene(args.host, args.port, args.max_points)
    print(f'look at http://{args.host}:{scene.server.get_port()}; Ctrl-C ends it', flush=True)
    try:
        if args.folder is not None:
            show(scene)
            threading.Event().wait()
        else:
            follow_node(scene, args.node, args.ros_args)
    except KeyboardInterrupt:
        pass
    finally:
        scene.close()
    return 0


def read_folder(folder: Path) -> Callable[[Scene], None]:
    """Read results; return what shows them.

    Raises :class:`DataError` where there are none.
    """
    if not (folder / MAP).is_file():
        raise DataError(f'{folder}: expected results of demo, replay or ~/save_map, with {MAP}')
    cloud = load_ply(folder / MAP)
    has_path = (folder / TRAJECTORY).is_file()
    poses = read_trajectory(folder / TRAJECTORY).T_world_camera if has_path else None
    views = _views(folder / BAG) if (folder / BAG).exists() else []

    def show(scene: Scene) -> None:
        scene.set_map(cloud.points_xyz, cloud.colors_rgb)
        if poses is not None:
            scene.set_path(poses)
        if views:
            _add_slider(scene, views)

    return show


def _views(bag_path: Path) -> list[View]:
    """Return cameras and depth of up to 100 images, evenly spread over a bag of results."""
    names = {topic.replace('~', NAMESPACE): topic for topic in VIEW}
    views: list[View] = []
    assembler = ViewAssembler(views.append)
    with BagReader(bag_path) as bag:
        if not names.keys() <= bag.topics.keys():
            return []
        every = -(-bag.topics[f'{NAMESPACE}/pose'].num_messages // MAX_VIEWS)
        numbers = dict.fromkeys(names, -1)
        for recorded in bag.messages(list(names)):
            numbers[recorded.topic] += 1
            if numbers[recorded.topic] % every == 0:
                assembler.take(names[recorded.topic], bag.deserialize(recorded))
    return views


def _add_slider(scene: Scene, views: list[View]) -> None:
    slider = scene.server.gui.add_slider('image', 0, max(1, len(views) - 1), 1, 0)
    slider.on_update(lambda _: scene.set_view(*views[min(slider.value, len(views) - 1)]))
    scene.set_view(*views[0])


def follow_node(scene: Scene, name: str, ros_args: list[str]) -> None:
    """Show what a node publishes until the process is interrupted."""
    from stream3r_ros.interfaces import ensure_tf2_msgs

    ensure_tf2_msgs()
    import rclpy
    from rclpy.executors import ExternalShutdownException

    rclpy.init(args=ros_args)
    try:
        node = rclpy.create_node('stream3r_viewer')
        subscribe(node, scene, name)
        rclpy.spin(node)
    except ExternalShutdownException:
        pass
    finally:
        rclpy.try_shutdown()


def subscribe(node: Any, scene: Scene, name: str) -> None:
    """Let messages of the node ``name`` change the scene."""
    from stream3r_ros.messages import rclpy_class

    assembler = ViewAssembler(lambda view: scene.set_view(*view))
    takers: dict[str, Callable[[Any], None]] = {
        '~/map': lambda message: scene.set_map(*cloud_from_message(message)),
        '~/path': lambda message: scene.set_path(
            np.array([pose_from_message(p.pose) for p in message.poses]).reshape(-1, 4, 4)
        ),
        **{topic: lambda message, t=topic: assembler.take(t, message) for topic in VIEW},
    }
    for topic, take in takers.items():
        kind, qos = TOPICS[topic]
        full = topic.replace('~', '/' + name.strip('/'))
        node.create_subscription(rclpy_class(kind), full, take, qos.for_rclpy())
