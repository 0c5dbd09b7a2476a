"""``ros2 launch`` starts what the launch files say, plays the bag, and ends it all at Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

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


@pytest.fixture
def launch(tmp_path):
    """Start ``ros2 launch stream3r_ros ...`` on a private graph, the package being installed."""
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
            env=os.environ | graph | {
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
    with private_graph() as graph:
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
