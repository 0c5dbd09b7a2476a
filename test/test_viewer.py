"""``stream3r view`` in a real browser: results of a replay, and a node that is running."""

import os
import subprocess
import sys

import numpy as np
import pytest
from browser import BROWSER, Browser
from PIL import Image

from stream3r_core.errors import ConfigError, DataError
from stream3r_core.mapping import MapCloud, save_ply
from stream3r_ros.cli import main, parse
from stream3r_ros.conversions import cloud_from_message, pose_from_message
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.viewer import MAX_WAITING, VIEW, ViewAssembler, read_folder
from stream3r_ros.viewer_scene import depth_colours

SCREENSHOT = os.environ.get('STREAM3R_SCREENSHOT')  # a file, to look at it oneself
PINK, WALL = np.array([255, 0, 200]), 3000  # a colour that no page has by itself


@pytest.fixture
def look(tmp_path):
    """Return a function that looks at an address with a real browser until it shows something."""
    pytest.importorskip('viser', reason='viser is not installed (extra: viewer)')
    if BROWSER is None:
        pytest.skip('no chromium or chrome is installed')

    def take(url, condition):
        with Browser(url, tmp_path / 'profile') as browser:
            picture = browser.wait_for(condition)
        if SCREENSHOT:
            Image.fromarray(picture.astype(np.uint8)).save(SCREENSHOT)

    return take


def share_of(colour, picture, tolerance=40):
    return (np.abs(picture - colour).max(-1) < tolerance).mean()


def pink_wall():
    rng = np.random.default_rng(0)
    points = rng.uniform([2, -1, -1], [2.1, 1, 1], (WALL, 3)).astype(np.float32)
    return MapCloud(points, np.tile(PINK.astype(np.uint8), (WALL, 1)), np.ones(WALL, np.float32))


@pytest.fixture
def serve():
    """Start ``stream3r view`` and return its address; ends it as Ctrl-C does."""
    children = []

    def start(*arguments, env=None):
        command = [sys.executable, '-m', 'stream3r_ros', 'view', '--port', '8377', *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        children.append(child)
        for line in child.stdout:
            if 'look at' in line:
                return line.split()[2].rstrip(';')
        raise AssertionError('the viewer has ended')

    yield start
    for child in children:
        child.send_signal(2)
        assert child.wait(120) == 0


def test_results_appear_in_a_browser(look, serve, tmp_path):
    save_ply(pink_wall(), tmp_path / 'map.ply')
    (tmp_path / 'trajectory.tum').write_text('1.0 0 0 0 0 0 0 1\n2.0 1 0 0 0 0 0 1\n')
    look(serve(str(tmp_path)), lambda page: share_of(PINK, page) > 0.02)


@pytest.mark.ros
def test_a_running_node_appears_in_a_browser(look, serve):
    """Map, pose and depth of one image, as a node sends them."""
    from stream3r_ros.environment import prepare_environment, private_graph

    depth = depth_colours(half_depth())[[10, 40], 0].astype(int)

    def shows_all(page):
        has_depth = all(share_of(colour, page, 12) > 1e-4 for colour in depth)
        return has_depth and share_of(PINK, page) > 0.02

    prepare_environment(os.environ)
    with private_graph() as graph:
        environment = {**os.environ, **graph}
        node = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, text=True
        )
        try:
            look(serve('--node', '/robot/stream3r', env=environment), shows_all)
        finally:
            node.communicate('end')


def half_depth():
    depth = np.full((48, 64), 2.0, np.float32)
    depth[:24] = 1.0
    return depth


def talk():
    """Be the node: publish the wall and one image again and again, until stdin says something."""
    import select

    import rclpy

    from stream3r_ros.messages import rclpy_class, rclpy_messages
    from stream3r_ros.outputs import TOPICS

    rclpy.init()
    node, messages, wall = rclpy.create_node('talker'), rclpy_messages(), pink_wall()
    K = np.array([[40.0, 0, 32], [0, 40, 24], [0, 0, 1]])
    pose = messages.pose(np.eye(4), 7, 'map')
    said = {
        '~/map': messages.cloud(wall.points_xyz, wall.colors_rgb, wall.confidence, 7, 'map'),
        '~/path': messages.path([pose], 7, 'map'),
        '~/pose': pose,
        '~/depth/camera_info': messages.camera_info(K, 48, 64, 7, 'camera'),
        '~/depth/image': messages.float_image(half_depth(), 7, 'camera'),
    }
    publishers = {
        topic: node.create_publisher(
            rclpy_class(TOPICS[topic].type),
            topic.replace('~', '/robot/stream3r'),
            TOPICS[topic].qos.for_rclpy(),
        )
        for topic in said
    }
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        for topic, message in said.items():
            publishers[topic].publish(message)
    rclpy.try_shutdown()


def test_messages_of_one_image_come_together_in_any_order():
    make, shown = rosbags_messages(), []
    assembler = ViewAssembler(shown.append)

    def parts(stamp):
        pose = np.eye(4)
        pose[0, 3] = stamp
        return dict(
            zip(
                VIEW,
                (
                    make.pose(pose, stamp, 'map'),
                    make.camera_info(np.diag([stamp, stamp, 1.0]), 2, 2, stamp, 'c'),
                    make.float_image(np.full((2, 2), stamp, np.float32), stamp, 'c'),
                ),
            )
        )

    first, second = parts(1), parts(2)
    for topic in VIEW:
        assembler.take(topic, second[topic])
        assembler.take(topic, first[topic]) if topic != VIEW[1] else None
    assembler.take(VIEW[1], first[VIEW[1]])
    assert [view.T_map_camera[0, 3] for view in shown] == [2, 1]
    assert [view.depth_m[0, 0] for view in shown] == [2, 1] == [view.K[0, 0] for view in shown]
    for stamp in range(10, 10 + 2 * MAX_WAITING):  # never complete
        assembler.take(VIEW[0], parts(stamp)[VIEW[0]])
    assembler.take(VIEW[1], parts(10)[VIEW[1]])
    assembler.take(VIEW[2], parts(10)[VIEW[2]])
    assert len(shown) == 2  # its pose was forgotten


def test_a_cloud_and_a_pose_come_back_from_their_messages():
    make, wall = rosbags_messages(), pink_wall()
    points, colours = cloud_from_message(
        make.cloud(wall.points_xyz, wall.colors_rgb, wall.confidence, 7, 'map')
    )
    np.testing.assert_array_equal(points, wall.points_xyz)
    np.testing.assert_array_equal(colours, wall.colors_rgb)
    T = np.array([[0.0, -1, 0, 3], [1, 0, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]])
    np.testing.assert_allclose(pose_from_message(make.pose(T, 7, 'map').pose), T, atol=1e-9)


def test_depth_is_coloured_from_near_to_far_and_black_where_there_is_none():
    depth = np.array([[1.0, 2, 4, np.nan, 0, -1]])
    colours = depth_colours(depth)[0].astype(int)
    assert colours[0, 0] > colours[0, 2] and colours[2, 2] > colours[2, 0]
    np.testing.assert_array_equal(colours[3:], 0)
    np.testing.assert_array_equal(depth_colours(np.zeros((2, 2))), 0)


def test_what_cannot_be_shown_is_said(tmp_path, capsys):
    with pytest.raises(DataError, match=r'expected results of demo, replay or ~/save_map'):
        read_folder(tmp_path)
    args = parse(['view', str(tmp_path), '--max-points', '0'])
    with pytest.raises(ConfigError, match='--max-points'):
        args.run(args)
    assert main(['view', str(tmp_path / 'nothing')]) == 1
    assert 'nothing: expected results' in capsys.readouterr().err


if __name__ == '__main__':
    talk()
