"""What package.xml, setup.py and the code say about the package agrees."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import stream3r_core

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ElementTree.parse(ROOT / 'package.xml').getroot()


def stated_by_setup(*fields):
    run = subprocess.run(
        [sys.executable, 'setup.py', *(f'--{field}' for field in fields)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.splitlines()[-len(fields) :]


def test_name_version_and_licence_agree():
    name, version, licence = (MANIFEST.findtext(tag) for tag in ('name', 'version', 'license'))
    assert stated_by_setup('name', 'version', 'license') == [name, version, licence]
    assert stream3r_core.__version__ == version


def imported_packages():
    """Yield the top-level packages that the ROS side imports, at any depth of nesting."""
    for path in (ROOT / 'stream3r_ros').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split('.')[0]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if match := re.fullmatch(r'(\w+)/(msg|srv)/\w+', node.value):  # a type by name
                    yield match[1]


def test_every_ros_package_in_use_is_a_dependency():
    declared = {tag.text for tag in MANIFEST if tag.tag in ('depend', 'exec_depend')}
    used = {p for p in imported_packages() if p.endswith(('_msgs', '_srvs', '_interfaces'))}
    assert {'sensor_msgs', 'tf2_msgs'} <= used
    assert used <= declared


def test_the_manifest_is_of_format_3_and_built_by_ament_python():
    assert MANIFEST.get('format') == '3'
    assert MANIFEST.findtext('export/build_type') == 'ament_python'
    assert (ROOT / 'resource' / MANIFEST.findtext('name')).is_file()


@pytest.mark.parametrize('number', [0, 1])
def test_the_first_code_blocks_of_the_readme_are_one_command_each(number):
    fences = (ROOT / 'README.md').read_text().split('```')
    lines = fences[2 * number + 1].splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith('.ci/bootstrap && .venv/bin/' + ('stream3r demo', 'pytest')[number])
