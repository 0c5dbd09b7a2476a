"""Rules for all tests: waiting threads do not spin, and in CI what matters most may not skip."""

import os
import signal
from pathlib import PurePath

# Before torch is loaded: on a busy machine its threads otherwise burn tenfold time in waiting.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

# Test processes side by side (pytest -n) share the cores, or they would wait for each other.
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault('OMP_NUM_THREADS', str(threads))

import pytest

# A shell that starts us in the background ignores SIGINT for all that follows: children that are
# to be interrupted would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAIL_SKIPPED = 'STREAM3R_FAIL_SKIPPED'  # set by .ci/run
#: What no set-up can give a machine: reasons of test_interfaces.py and test_native.py.
EXCUSES = ('ROS 2 comes from an installation here', 'this processor has neither AVX2 nor AVX-512')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    fail_if_skipped((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    fail_if_skipped((yield).get_result())


def fail_if_skipped(report):
    """Fail a skipped ROS, kernel or golden test where the environment promises all it takes."""
    path = PurePath(report.nodeid.split('::')[0])
    must_run = {'ros', 'kernels'} & {*path.parts} or path.name.startswith('test_golden')
    is_skipped = report.skipped and not hasattr(report, 'wasxfail')
    is_excused = any(excuse in str(report.longrepr) for excuse in EXCUSES)
    if is_skipped and must_run and not is_excused and os.environ.get(FAIL_SKIPPED):
        report.outcome = 'failed'
        report.longrepr = f'skipped, where nothing may be missing: {report.longrepr[2]}'
