"""The arrows between layers: kernels <- stream3r_core <- stream3r_ros <- launch, config."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROS = {
    'rclpy',
    'sensor_msgs',
    'geometry_msgs',
    'nav_msgs',
    'std_msgs',
    'tf2_msgs',
    'cv_bridge',
    'rosbags',
}
HEAVY = {'rclpy', 'rosbags', 'triton', 'flash_attn', 'open3d', 'matplotlib', 'evo', 'cv2', 'PIL'}

FORBIDDEN = {
    'kernels': ROS | {'stream3r_ros', 'test'},
    'stream3r_core': ROS | {'stream3r_ros', 'test'},
    'stream3r_ros': {'test', 'benchmarks'},
}


def imports_of(path):
    """Yield the absolute dotted names that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def files_of(layer):
    return list((ROOT / layer).rglob('*.py'))


@pytest.mark.parametrize('layer', FORBIDDEN)
def test_a_layer_imports_nothing_above_it(layer):
    files = files_of(layer)
    assert files
    for path in files:
        for name in imports_of(path):
            assert name.split('.')[0] not in FORBIDDEN[layer], f'{path} imports {name}'


def test_kernels_know_nothing_of_the_core():
    for path in (ROOT / 'kernels').rglob('*.py'):
        for name in imports_of(path):
            if name.startswith('stream3r_core'):
                assert name.startswith(('stream3r_core.kernels', 'stream3r_core.errors')), path


def test_the_network_knows_only_the_cache_interface():
    for path in (ROOT / 'stream3r_core/model').rglob('*.py'):
        caches = {n for n in imports_of(path) if n.startswith('stream3r_core.cache.')}
        assert all(n.startswith('stream3r_core.cache.base') for n in caches), (path, caches)


def modules_loaded_by(statement):
    code = f'import sys; {statement}; print(*{{m.split(".")[0] for m in sys.modules}})'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_root_loads_nothing_heavy():
    assert not modules_loaded_by('import stream3r_core') & (HEAVY | {'torch', 'numpy'})


def test_importing_every_public_name_loads_no_optional_package():
    loaded = modules_loaded_by('from stream3r_core import *')
    assert 'torch' in loaded
    assert not loaded & {'rclpy', 'rosbags', 'triton', 'flash_attn', 'open3d', 'matplotlib', 'evo'}


def test_the_command_line_starts_without_torch_or_rclpy():
    assert not modules_loaded_by('import stream3r_ros.cli') & {'rclpy', 'torch', 'rosbags'}


def test_kernels_are_one_folder_under_two_names():
    link = ROOT / 'stream3r_core' / 'kernels'
    assert link.is_symlink() and link.readlink() == Path('../kernels')
