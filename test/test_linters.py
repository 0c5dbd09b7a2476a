"""What the linters of ROS say: flake8 and pep257 as ROS runs them, with what setup.cfg excepts."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [str(ROOT / name) for name in ('kernels', 'launch', 'stream3r_core', 'stream3r_ros')]
OTHERS = [str(ROOT / name) for name in ('benchmarks', 'test', 'setup.py')]
# Summaries begin in the first line, are no orders where they describe things, and the sections of
# Google's style have no underlines.
PEP257_EXCEPTIONS = ('D213', 'D400', 'D401', 'D406', 'D407', 'D413')


@pytest.mark.linter
def test_flake8():
    linter = pytest.importorskip('ament_flake8.main', reason='ament_flake8 is not installed')
    arguments = ['--config', str(ROOT / 'setup.cfg'), *PACKAGES, *OTHERS]
    code, problems = linter.main_with_errors(argv=arguments)
    assert code == 0, '\n'.join(problems)


@pytest.mark.linter
def test_pep257():
    linter = pytest.importorskip('ament_pep257.main', reason='ament_pep257 is not installed')
    assert linter.main(argv=['--add-ignore', *PEP257_EXCEPTIONS, '--', *PACKAGES]) == 0
