"""Under which conditions a number was measured: code, weights, machine, versions."""

import dataclasses
import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stream3r_core import __version__
from stream3r_core.commit import known_commit

PACKAGES = ('torch', 'numpy', 'scipy', 'evo', 'open3d', 'rosbags')


def conditions(model) -> dict:
    """Facts about this process and ``model``, ready for JSON."""
    parameter = next(model.parameters())
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'code': code_version(),
        'weights': dataclasses.asdict(model.weights_info),
        'device': device_name(parameter.device),
        'threads': torch.get_num_threads(),
        'dtype': str(getattr(model, 'dtype', parameter.dtype)).removeprefix('torch.'),
        'python': platform.python_version(),
        'system': platform.platform(),
        'versions': {name: _version(name) for name in PACKAGES},
    }


def code_version() -> str:
    """Version of the package, and its commit where that is known."""
    commit = known_commit()
    return f'{__version__} ({commit})' if commit else __version__


def device_name(device: torch.device) -> str:
    """Name of the processor that ran the network."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {os.cpu_count()} cores, {_processor()}'


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not say."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf('SC_PAGE_SIZE')


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'
