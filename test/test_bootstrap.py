"""What .ci/bootstrap says where it cannot work; that it works is shown by this test running."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READ = (
    '.ci/bootstrap',
    '.ci/constraints.txt',
    'setup.py',
    'setup.cfg',
    'stream3r_ros/interfaces.py',
)


@pytest.fixture
def bootstrap(tmp_path):
    """Run the script in a checkout of what it reads, with some commands replaced."""
    checkout = tmp_path / 'checkout'
    for name in READ:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (tmp_path / 'bin').mkdir()

    def run(commands, **environ):
        for name, script in commands.items():
            command = tmp_path / 'bin' / name
            command.write_text(f'#!/bin/sh\n{script}\n')
            command.chmod(0o755)
        path = f'{tmp_path / "bin"}:{os.defpath}'
        return subprocess.run(
            [checkout / '.ci' / 'bootstrap'],
            env={'PATH': path, 'PYTHON': sys.executable, **environ},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def test_other_processors_are_told_where_to_get_ros(bootstrap, tmp_path):
    run = bootstrap({'uname': 'echo aarch64'})
    assert run.returncode == 1
    assert 'not for aarch64' in run.stderr
    assert 'docs.ros.org' in run.stderr and '/opt/ros/jazzy/setup.bash' in run.stderr
    assert not (tmp_path / 'checkout' / '.venv').exists()


@pytest.mark.parametrize('python', ['no-such-python', 'old-python'])
def test_a_missing_or_old_python_is_named(bootstrap, python):
    run = bootstrap({'old-python': '[ "$1" = -V ] && echo Python 3.8.10; exit 1'}, PYTHON=python)
    assert run.returncode == 1
    assert 'Python 3.10 or newer is needed' in run.stderr
    assert 'PYTHON=python3.12' in run.stderr


def test_a_python_without_venv_is_told_which_package_it_lacks(bootstrap):
    without_venv = f'[ "$1" = -m ] && [ "$2" = venv ] && exit 1; exec {sys.executable} "$@"'
    run = bootstrap(
        {'python': without_venv, 'uname': 'echo x86_64', 'nvidia-smi': ''}, PYTHON='python'
    )
    assert run.returncode == 1
    assert 'apt install python3-venv' in run.stderr
