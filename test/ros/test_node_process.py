"""The node as a process: it starts or says why not, and it ends when told to."""

import os
import signal
import socket
import time

import pytest

pytestmark = pytest.mark.ros
END_S = 3.0  # from the signal to the end of the process, on an idle machine
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def end(process, number):
    """Send a signal; return exit code and seconds until the process had ended."""
    start = time.monotonic()
    process.send_signal(number)
    return process.wait(timeout=30), time.monotonic() - start


def assert_clean(live, code, took_s):
    assert code == 0, live.log
    assert took_s < END_S * max(1.0, os.getloadavg()[0] / os.cpu_count())
    assert 'Traceback' not in live.log and 'Error' not in live.log


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_ends_the_node_after_images(live, number):
    live.start()
    live.connect_camera()
    live.feed(0, 1)
    assert_clean(live, *end(live.process, number))


def test_ctrl_c_under_ros2_launch_sends_the_signal_twice(live):
    live.start(**{'image.long_side': 672})
    live.connect_camera()
    before = live.figure('images_received')
    live.camera.publish(live.image(0))
    live.wait_until(lambda: live.figure('images_received') > before)
    live.process.send_signal(signal.SIGINT)
    assert_clean(live, *end(live.process, signal.SIGINT))


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_ends_the_node_in_the_middle_of_a_frame(live, number):
    live.start(**{'image.long_side': 672})  # seconds per frame
    live.connect_camera()
    before = live.figure('images_received')
    live.camera.publish(live.image(0))
    live.wait_until(lambda: live.figure('images_received') > before)
    assert_clean(live, *end(live.process, number))
    assert not live.received['/tf']


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_ends_the_node_while_weights_load(live, number, monkeypatch, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as silent_hub:  # accepts, and never answers
        monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{silent_hub.getsockname()[1]}')
        monkeypatch.setenv('HF_HOME', str(tmp_path))
        live.start(wait_until_active=False, **{'model.weights': 'someone/something'})
        silent_hub.settimeout(60)
        with silent_hub.accept()[0]:
            assert_clean(live, *end(live.process, number))
    assert 'loading' in live.log


def test_a_signal_ends_a_node_that_waits_for_its_lifecycle_manager(live):
    live.start(wait_until_active=False, autostart='false')
    live.wait_until(lambda: live.figure('state') == 'unconfigured')
    assert_clean(live, *end(live.process, signal.SIGTERM))


@pytest.mark.parametrize(
    ('parameters', 'ros_args', 'reason'),
    [
        ({'mapping.voxelsize': 1}, [], "unknown option 'voxelsize' in mapping"),
        ({'map_frame': '/map'}, [], 'map_frame: tf2 takes no leading slash'),
        ({'qos_overrides./nope.subscription.depth': 1}, [], 'unknown QoS parameter'),
        ({}, ['--params-file', 'missing.yaml'], 'parameter file missing.yaml'),
        ({}, ['-r', 'image'], 'ROS arguments: '),
        ({'model.weights': 'missing.safetensors'}, [], 'missing.safetensors: no such file'),
        ({'model.device': 'abacus'}, [], "'abacus' is no torch device"),
    ],
)
def test_what_it_cannot_start_with_is_one_clear_line(live, parameters, ros_args, reason):
    live.start(*ros_args, wait_until_active=False, **parameters)
    assert live.process.wait(timeout=60) == 1
    (line,) = [line for line in live.log.splitlines() if reason in line]
    assert line.startswith('stream3r: error: ') or '[FATAL]' in line
    assert 'Traceback' not in live.log


def test_a_parameter_file_for_another_node_is_noticed(live, tmp_path):
    file = tmp_path / 'params.yaml'
    file.write_text('someone_else:\n  ros__parameters: {map_frame: world}\n')
    live.start_bare('--params-file', str(file))
    live.wait_until(lambda: f'{file}: nothing in it is for /stream3r' in live.log)
