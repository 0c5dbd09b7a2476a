"""An installed package is complete, finds its own files, and leaves other packages alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from stream3r_core.commit import commit_of

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ('setup.py', 'setup.cfg', 'package.xml', 'README.md', 'LICENSE', 'resource', 'launch',
           'config', 'kernels', 'stream3r_core', 'stream3r_ros')  # fmt: skip


@pytest.fixture(scope='module')
def prefix(tmp_path_factory):
    """Build a wheel of a copy of the sources and install it, without network, into a prefix."""
    base = tmp_path_factory.mktemp('packaging')
    (base / 'source').mkdir()
    for name in SOURCES:
        origin, copy = ROOT / name, base / 'source' / name
        if origin.is_dir():
            shutil.copytree(origin, copy, symlinks=True, ignore=shutil.ignore_patterns('*.pyc'))
        else:
            shutil.copy(origin, copy)
    commit_all(base / 'source')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    offline = ['--no-deps', '--no-index', '--no-build-isolation']
    wheel = [*pip, 'wheel', *offline, '--wheel-dir', base / 'dist', base / 'source']
    subprocess.run(wheel, check=True, env=os.environ | {'PIP_USE_PEP517': '1'})
    (built,) = (base / 'dist').glob('*.whl')
    install = [*pip, 'install', *offline, '--ignore-installed', '--prefix', base / 'prefix', built]
    subprocess.run(install, check=True)
    return base / 'prefix'


def git(folder, *arguments):
    who = ['-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'commit.gpgsign=false']
    command = ['git', '-C', folder, *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(folder):
    git(folder, 'init', '-q')
    git(folder, 'add', '.')
    git(folder, 'commit', '-q', '-m', 'all')


def site(prefix):
    return Path(sysconfig.get_path('purelib', vars={'base': str(prefix)}))


def python(prefix, *arguments):
    """Run Python far from the checkout, with the installed package first on its path."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=prefix,
        env=os.environ | {'PYTHONPATH': str(site(prefix))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def files_below(folder, pattern='*'):
    return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}


def test_every_module_is_installed_and_nothing_else(prefix):
    modules = {Path(p) / m for p in ('stream3r_core', 'stream3r_ros')
               for m in files_below(ROOT / p, '*.py')}  # fmt: skip
    modules |= {'stream3r_core/kernels' / m for m in files_below(ROOT / 'kernels', '*.py')}
    assert files_below(site(prefix), '*.py') == modules
    assert {path.name.split('-')[0] for path in site(prefix).iterdir()} == {
        'stream3r_core', 'stream3r_ros'
    }  # fmt: skip


def test_configuration_launch_files_and_weights_are_installed(prefix):
    share = prefix / 'share' / 'stream3r_ros'
    for folder in ('config', 'launch'):
        shown = {p for p in files_below(ROOT / folder) if p.suffix not in ('.png', '.pyc')}
        assert shown <= files_below(share / folder)
    assert (share / 'package.xml').read_text() == (ROOT / 'package.xml').read_text()
    assert (prefix / 'share/ament_index/resource_index/packages/stream3r_ros').is_file()
    data = files_below(ROOT / 'stream3r_core', '*.yaml')
    data |= {'weights' / name for name in files_below(ROOT / 'stream3r_core' / 'weights')}
    assert data <= files_below(site(prefix) / 'stream3r_core')


def test_the_installed_package_finds_its_own_files(prefix):
    code = 'from stream3r_ros.resources import resource; print(resource("config/fastdds.xml"))'
    assert python(prefix, '-c', code) == str(prefix / 'share/stream3r_ros/config/fastdds.xml')


def test_kernels_are_found_under_the_core_only(prefix):
    code = (
        'import importlib.util as u, stream3r_core.kernels.registry as r; '
        'print(r.__file__); print(getattr(u.find_spec("kernels"), "origin", None))'
    )
    ours, theirs = python(prefix, '-c', code).splitlines()
    assert ours.startswith(str(site(prefix)))
    assert str(prefix) not in theirs


def test_the_command_is_installed_where_a_shell_finds_it(prefix):
    assert python(prefix, prefix / 'bin' / 'stream3r', '--version')


def test_a_checkout_finds_its_own_files():
    code = 'from stream3r_ros.resources import resource; print(resource("config/fastdds.xml"))'
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(ROOT / 'config' / 'fastdds.xml')


def test_an_installed_package_knows_its_commit(prefix):
    commit = git(prefix.parent / 'source', 'rev-parse', '--short=12', 'HEAD')
    code = 'from stream3r_core.commit import known_commit; print(known_commit())'
    assert python(prefix, '-c', code) == commit


def test_every_state_of_a_changed_checkout_has_its_own_name(tmp_path):
    assert commit_of(tmp_path) == ''
    (tmp_path / 'code.py').write_text('a = 1')
    commit_all(tmp_path)
    names = [commit_of(tmp_path)]
    for text in ('a = 2', 'a = 3'):
        (tmp_path / 'code.py').write_text(text)
        names.append(commit_of(tmp_path))
    assert len(set(names)) == 3 and all(name.startswith(names[0]) for name in names)
