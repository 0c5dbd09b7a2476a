"""Writing result files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stream3r_core.errors import OutputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only once all of it is on the disk.

    Until then a previous file of that name stays as it is, whatever happens to the process.

    Raises:
        OutputError: The folder does not exist, is not writable, or the disk is full.

    """
    path = Path(path)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with partial.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f'cannot write {path}: {reason}; choose an existing, writable folder with free space'
        ) from error
    finally:
        with suppress(OSError):  # it is gone already, or never was
            partial.unlink()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file, as :func:`atomic_write` does."""
    with atomic_write(path) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
