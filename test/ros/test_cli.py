"""The command line: light to start, one line per known error, one spelling of options."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stream3r_core.errors import ConfigError, InputError
from stream3r_ros import cli
from stream3r_ros.config import NodeConfig
from stream3r_ros.options import (
    add_config_arguments,
    config_from_args,
    read_options,
    write_options,
)

ROOT = Path(__file__).resolve().parents[2]


def stream3r(*arguments):
    command = [sys.executable, '-m', 'stream3r_ros', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_names_every_command():
    run = stream3r('--help')
    assert run.returncode == 0
    for name, command in cli.COMMANDS.items():
        assert name in run.stdout and command.help.split()[0] in run.stdout


def test_help_of_the_whole_loads_no_command():
    code = (
        'import sys; from stream3r_ros import cli\n'
        'try: cli.main(["--help"])\n'
        'except SystemExit: print(*sorted(sys.modules), file=sys.stderr)'
    )
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.partition('.')[0] for name in run.stderr.split()}
    assert 'stream3r_ros' in loaded
    assert not loaded & {'torch', 'numpy', 'rclpy', 'rosbags', 'cv2', 'scipy'}


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, '--help'])
    assert ended.value.code == 0 and f'usage: stream3r {name}' in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(['fly'])
    assert ended.value.code == 2 and "'replay'" in capsys.readouterr().err


def test_a_known_error_is_one_line_and_exit_code_1(tmp_path):
    run = stream3r('replay', tmp_path / 'nothing', '--output', tmp_path / 'out')
    assert run.returncode == 1 and not run.stdout
    assert run.stderr == f'stream3r: error: {tmp_path}/nothing: no such file or folder\n'


class Probe:
    """A command module whose ``run`` does what the test wants."""

    def __init__(self, behaviour):
        self._behaviour = behaviour

    def add_arguments(self, parser):
        parser.add_argument('--flag')

    def run(self, args):
        return self._behaviour(args)


@pytest.fixture
def probe(monkeypatch):
    """Install a subcommand ``probe``; return a function that runs it."""

    def install(behaviour, *argv, takes_ros_args=True):
        monkeypatch.setitem(sys.modules, 'probe_module', Probe(behaviour))
        command = cli.Command('probe_module', 'a probe', takes_ros_args)
        monkeypatch.setitem(cli.COMMANDS, 'probe', command)
        return cli.main(['probe', *argv])

    return install


def test_the_exit_code_is_that_of_the_command(probe):
    assert probe(lambda args: 7) == 7


def test_an_unknown_error_keeps_its_traceback(probe):
    with pytest.raises(ZeroDivisionError):
        probe(lambda args: 1 / 0)


def test_an_error_of_several_lines_stays_readable(probe, capsys):
    def fail(args):
        raise InputError('no\n  such\n  thing')

    assert probe(fail) == 1
    assert capsys.readouterr().err == 'stream3r: error: no\n  such\n  thing\n'


@pytest.mark.parametrize(
    'argv, flag, ros_args',
    [
        (['--flag', 'a'], 'a', []),
        (['--flag', 'a', '--ros-args'], 'a', []),
        (['--ros-args', '-r', 'x:=y'], None, ['--ros-args', '-r', 'x:=y']),
        (['--ros-args', '-r', 'x:=y', '--', '--flag', 'a'], 'a', ['--ros-args', '-r', 'x:=y']),
        (
            ['--ros-args', '-p', 'a:=1', '--', '--flag', 'a', '--ros-args', '--params-file', 'p'],
            'a',
            ['--ros-args', '-p', 'a:=1', '--params-file', 'p'],
        ),
    ],
)
def test_ros_arguments_are_kept_apart(probe, argv, flag, ros_args):
    seen = []
    assert probe(lambda args: seen.append((args.flag, args.ros_args)) or 0, *argv) == 0
    assert seen == [(flag, ros_args)]


def test_ros_arguments_for_a_command_without_node_are_refused(probe, capsys):
    argv = ['--ros-args', '-p', 'a:=1']
    assert probe(lambda args: 0, *argv, takes_ros_args=False) == 1
    assert 'probe starts no ROS node' in capsys.readouterr().err
    assert probe(lambda args: 0, '--ros-args', takes_ros_args=False) == 0


def config_of(*argv, defaults=None):
    """Return the configuration that a command with these arguments gets."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return config_from_args(parser.parse_args(argv), defaults)


def test_options_come_from_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / 'options.yaml'
    file.write_text('session: {window: 7, mode: causal}\nmapping.max_points: 1000')
    assert config_of() == NodeConfig()
    defaults = {'session.mode': 'full', 'map_frame': 'site'}
    config = config_of(
        '--config',
        str(file),
        '--set',
        'session.window=9',
        '--set',
        'model.weights=random',
        defaults=defaults,
    )
    assert (config.session.window, config.session.mode) == (9, 'causal')
    assert (config.mapping.max_points, config.map_frame) == (1000, 'site')
    assert config.model.weights == 'random'


@pytest.mark.parametrize(
    'text',
    [
        '/**:\n  ros__parameters:\n    use_sim_time: true\n    session:\n      window: 7',
        '/stream3r:\n  ros__parameters:\n    session.window: 7\n    qos_overrides: {/a: {}}',
        '/**: {ros__parameters: {map_frame: a}}\nn: {ros__parameters: {session.window: 7}}',
        '/**:\n  ros__parameters:\nstream3r:\n  ros__parameters: {session: {window: 7}}',
    ],
)
def test_a_parameter_file_of_the_node_is_a_configuration(tmp_path, text):
    file = tmp_path / 'params.yaml'
    file.write_text(text)
    assert read_options(file)['session'] == {'window': 7}


def test_a_written_configuration_reads_back(tmp_path):
    config = config_of('--set', 'session.window=4', '--set', 'mapping.voxel_size=0.5')
    write_options(tmp_path / 'config.yaml', config)
    assert config_of('--config', str(tmp_path / 'config.yaml')) == config


@pytest.mark.parametrize(
    'text, complaint',
    [
        (None, 'cannot read the configuration'),
        ('a: [1', 'is no YAML'),
        ('- 1\n- 2', 'expected options by name'),
        ('sesion: {window: 3}', "unknown option 'sesion'"),
        ('session: {windows: 3}', "unknown option 'windows' in session"),
        ('session: {window: many}', 'session.window: expected int'),
        ('session.window.size: 3', 'session.window: expected int'),
        ('session: 5', 'session: expected a mapping'),
        ('session: 5\nsession.window: 3', "'session' is an option, not a group"),
        ('session: {window: 0}', 'expected a value >= 1'),
    ],
)
def test_a_useless_file_says_what_is_wrong(tmp_path, text, complaint):
    file = tmp_path / 'options.yaml'
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        config_of('--config', str(file))


@pytest.mark.parametrize(
    'text, complaint',
    [
        ('session.window', 'expected NAME=VALUE'),
        ('=3', 'expected NAME=VALUE'),
        ('session.window=[', 'is no YAML value'),
        ('session.window=', 'session.window: expected int'),
        ('nothing=3', "unknown option 'nothing'"),
    ],
)
def test_a_useless_flag_says_what_is_wrong(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        config_of('--set', text)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / 'empty.yaml').write_text('# nothing\n')
    assert read_options(tmp_path / 'empty.yaml') == {}


def test_the_shipped_configurations_are_valid():
    files = sorted((ROOT / 'config').glob('*.yaml'))
    assert files
    for file in files:
        assert 'ros__parameters' in str(yaml.safe_load(file.read_text()))
        config_of('--config', str(file))
