"""``ros2 launch`` starts what the launch files say, plays the bag, and ends it all at Ctrl-C."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_ros.cli import main
from stream3r_ros.environment import private_graph

pytest.importorskip(
    'ros2launch', reason='ros2 launch is not installed: it comes with ROS 2, not with its wheels'
)
pytestmark = pytest.mark.ros
ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 300
ENDED = 'process has finished cleanly'
PATIENCE = ('sigterm_timeout:=100', 'sigkill_timeout:=100')  # launch kills after 15 s else
ROS2 = 'import sys; from ros2cli.cli import main; sys.exit(main())'
COMMAND = f"""#!{sys.executable}
import sys
from stream3r_ros.cli import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = """
/**:
  ros__parameters:
    model: {weights: random}
    image: {long_side: 56}
    status: {log_period_s: 0.1}
    save_map: {on_exit: true}
"""


IN_NAMESPACES = """
/**:
  ros__parameters:
    model: {weights: random}
    image: {long_side: 56}
    status: {period_s: 0.1}
/**/stream3r:
  ros__parameters: {max_gap_s: 7.0}
/robot1/stream3r:
  ros__parameters: {map_frame: yard}
/robot2/stream3r:
  ros__parameters: {map_frame: street}
"""


@pytest.fixture
def graph(monkeypatch):
    """A private graph, for this process too."""
    with private_graph() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield variables


@pytest.fixture
def launch(tmp_path, graph):
    """Start ``ros2 launch stream3r_ros ...`` on the graph, the package being installed."""
    share, command = tmp_path / 'prefix' / 'share', tmp_path / 'prefix/lib/stream3r_ros/stream3r'
    for folder in (share / 'ament_index/resource_index/packages', command.parent):
        folder.mkdir(parents=True)
    (share / 'ament_index/resource_index/packages/stream3r_ros').touch()
    (share / 'stream3r_ros').symlink_to(ROOT)
    command.write_text(COMMAND)
    command.chmod(0o755)
    prefixes = [str(tmp_path / 'prefix'), os.environ.get('AMENT_PREFIX_PATH', sys.prefix)]
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    started = []

    def start(*arguments):
        child = subprocess.Popen(
            [sys.executable, '-c', ROS2, 'launch', 'stream3r_ros', *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {
                'AMENT_PREFIX_PATH': os.pathsep.join(prefixes),
                'PYTHONPATH': os.pathsep.join(filter(None, paths)),
                'ROS_LOG_DIR': str(tmp_path / 'log'),
                'OMP_NUM_THREADS': '1',
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(child)
        return child

    def kill_all():
        for child in started:
            os.killpg(child.pid, signal.SIGKILL)

    watchdog = threading.Timer(DEADLINE_S, kill_all)
    watchdog.start()
    yield start
    watchdog.cancel()
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.fixture
def bag(tmp_path):
    """A bag of the synthetic room, with intrinsics beside the images."""
    from stream3r_ros.sample import write_sample

    write_sample(tmp_path / 'bag', num_frames=4)
    (tmp_path / 'options.yaml').write_text(OPTIONS)
    return tmp_path / 'bag'


def test_the_node_and_the_player_of_a_bag_start_work_and_end(launch, bag, tmp_path):
    running = launch(
        'reconstruct.launch.py', f'bag:={bag}', f'params_file:={tmp_path}/options.yaml',
        f'save_directory:={tmp_path}/saved', 'map_frame:=site', *PATIENCE,
    )  # fmt: skip
    log = ''
    for line in running.stdout:
        log += line
        if ENDED in log and re.search(r'active: .* [1-9]\d* processed', line):
            running.send_signal(signal.SIGINT)
            break
    log += running.stdout.read()
    assert running.wait() == 0, log
    assert log.count(ENDED) == 2 and 'played ' in log, log
    assert 'Traceback' not in log
    assert len(load_ply(tmp_path / 'saved' / 'map.ply')) > 0


@pytest.fixture
def observer(graph):
    """A node of this process, with what has come to it."""
    import rclpy

    rclpy.init()
    made = rclpy.create_node('observer')
    yield made
    made.destroy_node()
    rclpy.try_shutdown()


def test_a_namespace_holds_topics_services_and_parameters(launch, observer, tmp_path):
    import rclpy
    from rcl_interfaces.srv import GetParameters
    from sensor_msgs.msg import Image

    from stream3r_ros.messages import rclpy_class, rclpy_messages
    from stream3r_ros.outputs import TOPICS

    def spin_until(condition):
        while not condition():
            assert running.poll() is None, running.stdout.read()
            rclpy.spin_once(observer, timeout_sec=0.1)

    (tmp_path / 'fleet.yaml').write_text(IN_NAMESPACES)
    running = launch(
        'reconstruct.launch.py', f'params_file:={tmp_path}/fleet.yaml', 'namespace:=robot1',
        'image_topic:=camera/image_raw', *PATIENCE,
    )  # fmt: skip
    poses, edges = [], []
    for topic, name, came in (
        ('~/pose', '/robot1/stream3r/pose', poses), ('/tf', '/tf', edges)
    ):  # fmt: skip
        kind, qos = TOPICS[topic]
        observer.create_subscription(rclpy_class(kind), name, came.append, qos.for_rclpy())
    camera = observer.create_publisher(Image, '/robot1/camera/image_raw', 5)
    picture, number = np.full((60, 80, 3), 99, np.uint8), itertools.count(1)

    def pose_has_come():
        stamp = next(number) * 10**8  # best effort: an early image may find no listener
        camera.publish(rclpy_messages().rgb_image(picture, stamp, 'eye'))
        return poses and edges

    spin_until(lambda: observer.count_subscribers('/robot1/camera/image_raw'))
    spin_until(pose_has_come)
    assert poses[0].header.frame_id == 'yard'
    edge = edges[0].transforms[0]
    assert (edge.header.frame_id, edge.child_frame_id) == ('yard', 'eye')

    names = ['max_gap_s', 'image.long_side', 'model.weights']
    client = observer.create_client(GetParameters, '/robot1/stream3r/get_parameters')
    asked = client.call_async(GetParameters.Request(names=names))
    spin_until(asked.done)
    gap, side, weights = asked.result().values
    assert (gap.double_value, side.integer_value, weights.string_value) == (7.0, 56, 'random')

    node = 'stream3r', '/robot1'
    shared = {'/tf', '/diagnostics', '/rosout', '/parameter_events'}
    said = {name for name, _ in observer.get_publisher_names_and_types_by_node(*node)}
    expected = {topic.replace('~', '/robot1/stream3r') for topic in TOPICS}
    assert said >= expected and all(n.startswith('/robot1/stream3r/') for n in said - shared)
    heard = {name for name, _ in observer.get_subscriber_names_and_types_by_node(*node)}
    assert heard - shared == {'/robot1/camera/image_raw', '/robot1/camera/camera_info'}
    offered = {name for name, _ in observer.get_service_names_and_types_by_node(*node)}
    services = ('reset', 'pause', 'resume', 'save_map', 'get_status', 'change_state')
    assert offered >= {f'/robot1/stream3r/{service}' for service in services}
    assert all(name.startswith('/robot1/stream3r/') for name in offered)
    running.send_signal(signal.SIGINT)
    assert running.wait() == 0


def test_a_replay_writes_what_the_command_writes(launch, bag, tmp_path):
    options = tmp_path / 'options.yaml'
    options.write_text(OPTIONS.replace('    save_map: {on_exit: true}\n', ''))
    running = launch(
        'replay.launch.py', f'input:={bag}', f'output:={tmp_path}/launched', f'config:={options}'
    )
    log = running.stdout.read()
    assert running.wait() == 0, log
    assert ENDED in log, log
    words = ['replay', str(bag), '--output', str(tmp_path / 'alone'), '--config', str(options)]
    assert main(words) == 0
    ours, theirs = (
        read_trajectory(tmp_path / n / 'trajectory.tum') for n in ('launched', 'alone')
    )
    assert ours.stamps_ns.tolist() == theirs.stamps_ns.tolist()
