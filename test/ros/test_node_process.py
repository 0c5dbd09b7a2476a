"""The node as a process: it starts or says why not, and it ends when told to."""

import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import DEADLINE_S, stamp
from rclpy.executors import SingleThreadedExecutor
from rclpy.task import Future

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_ros.node import spin_until

pytestmark = pytest.mark.ros
END_S = 3.0  # from the signal to the end of the process, on an idle machine
SIGNALS = [signal.SIGINT, signal.SIGTERM]
SECONDS_PER_FRAME = {'image.long_side': 560}


def end(process, number):
    """Send a signal; return exit code and seconds to the end, without those without a core."""
    start, delay_s = time.monotonic(), 0.0
    before_s = without_core_s(process.pid)
    process.send_signal(number)
    while process.poll() is None:
        delay_s = max(delay_s, without_core_s(process.pid) - before_s)
        time.sleep(0.01)
        assert time.monotonic() < start + DEADLINE_S, 'it does not end'
    return process.returncode, time.monotonic() - start - delay_s


def without_core_s(pid):
    """Seconds that the threads of a process could have run and other processes did instead."""
    total_ns = 0
    for thread in Path(f'/proc/{pid}/task').glob('*/schedstat'):
        try:
            total_ns += int(thread.read_text().split()[1])
        except OSError:  # the thread has ended meanwhile
            continue
    return total_ns / 1e9


def assert_clean(log, code, took_s):
    assert code == 0, log
    assert took_s < END_S
    assert 'Traceback' not in log and 'Error' not in log


def unconfigured(live, options):
    live.start(wait_until_active=False, autostart='false', **options)
    live.wait_until(lambda: live.figure('state') == 'unconfigured')


def active(live, options):
    live.start(**options)
    live.connect_camera()
    live.feed(0)


def inactive(live, options):
    active(live, options)
    transition = Transition(id=Transition.TRANSITION_DEACTIVATE)
    assert live.request(ChangeState, 'change_state', transition=transition).success


def finalized(live, options):
    active(live, options)
    transition = Transition(id=Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert live.request(ChangeState, 'change_state', transition=transition).success


def in_a_frame(live, options):
    active(live, {**SECONDS_PER_FRAME, **options})
    before = live.figure('images_received')
    live.camera.publish(live.image(1))
    live.wait_until(lambda: live.figure('images_received') > before)


def failed(live, options):
    active(live, {'session.mode': 'causal', 'session.max_frames': 1, **options})
    live.camera.publish(live.image(1))
    live.wait_until(lambda: live.figure('state') == 'failed')


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('reach', [unconfigured, active, inactive, finalized, in_a_frame, failed])
def test_a_signal_ends_the_node_in_every_state_and_its_map_is_saved(
    live, node, reach, number, tmp_path
):
    folder = tmp_path / 'saved'
    reach(live, {'save_map.on_exit': 'true', 'save_map.directory': str(folder)})
    said_before = len(live.log)
    code, took_s = end(live.process, number)
    assert_clean(live.log[said_before:], code, took_s)
    if reach is unconfigured:
        assert not folder.exists()
    else:
        assert read_trajectory(folder / 'trajectory.tum').stamps_ns.tolist() == [stamp(0)]
        assert len(load_ply(folder / 'map.ply')) > 0
        assert f'saved {folder}/map.ply, {folder}/trajectory.tum, {folder}/map.json' in live.log
    live.wait_until_gone()


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_ends_the_node_while_weights_load(live, number, monkeypatch, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as silent_hub:  # accepts, and never answers
        monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{silent_hub.getsockname()[1]}')
        monkeypatch.setenv('HF_HOME', str(tmp_path))
        live.start(wait_until_active=False, **{'model.weights': 'someone/something'})
        silent_hub.settimeout(DEADLINE_S)
        with silent_hub.accept()[0]:
            code, took_s = end(live.process, number)
    assert_clean(live.log, code, took_s)
    assert 'loading' in live.log


def test_ctrl_c_under_ros2_launch_sends_the_signal_twice(live):
    in_a_frame(live, {})
    live.process.send_signal(signal.SIGINT)
    code, took_s = end(live.process, signal.SIGINT)
    assert_clean(live.log, code, took_s)


def test_a_map_that_cannot_be_saved_at_the_end_is_an_error(live, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    active(live, {'save_map.on_exit': 'true', 'save_map.directory': str(tmp_path / 'file')})
    code, _ = end(live.process, signal.SIGTERM)
    assert code == 1
    (line,) = [line for line in live.log.splitlines() if 'nothing was saved' in line]
    assert str(tmp_path / 'file') in line and 'Traceback' not in live.log


@pytest.mark.parametrize(
    ('parameters', 'ros_args', 'reason'),
    [
        ({'mapping.voxelsize': 1}, [], "unknown option 'voxelsize' in mapping"),
        ({'map_frame': '/map'}, [], 'map_frame: tf2 takes no leading slash'),
        ({'qos_overrides./nope.subscription.depth': 1}, [], 'unknown QoS parameter'),
        ({}, ['--params-file', 'missing.yaml'], 'parameter file missing.yaml'),
        ({}, ['-r', 'image'], 'ROS arguments: '),
        ({'model.weights': 'missing.safetensors'}, [], 'missing.safetensors: no such file'),
        ({'save_map.on_exit': 'true'}, [], 'without save_map.directory'),
        ({'model.device': 'abacus'}, [], "'abacus' is no torch device"),
    ],
)
def test_what_it_cannot_start_with_is_one_clear_line(live, parameters, ros_args, reason):
    live.start(*ros_args, wait_until_active=False, **parameters)
    assert live.wait_for_end() == 1
    (line,) = [line for line in live.log.splitlines() if reason in line]
    assert line.startswith('stream3r: error: ') or '[FATAL]' in line
    assert 'Traceback' not in live.log


def test_a_parameter_file_for_another_node_is_noticed(live, tmp_path):
    file = tmp_path / 'params.yaml'
    file.write_text('someone_else:\n  ros__parameters: {map_frame: world}\n')
    live.start_bare('--params-file', str(file))
    live.wait_until(lambda: f'{file}: nothing in it is for /stream3r' in live.log)


def test_serving_callbacks_leaves_nothing_on_the_future_that_ends_it(node, ros):
    executor, ended, held = SingleThreadedExecutor(context=ros), Future(), []

    def tick():
        held.append(len(ended._callbacks))
        if len(held) == 100:
            ended.set_result(0)

    node.create_timer(1e-4, tick)
    executor.add_node(node)
    spin_until(executor, ended)
    assert len(held) == 100 and held[-1] == held[0]
    executor.shutdown()


def test_serving_ends_at_once_when_another_thread_ends_it_and_nothing_else_happens(node, ros):
    executor, ended, is_serving = SingleThreadedExecutor(context=ros), Future(), threading.Event()
    executor.add_node(node)
    executor.create_task(is_serving.set)
    serving = threading.Thread(target=spin_until, args=(executor, ended), daemon=True)
    serving.start()
    assert is_serving.wait(timeout=30)
    ended.set_result(0)
    serving.join(timeout=30)
    assert not serving.is_alive()
    executor.shutdown()
