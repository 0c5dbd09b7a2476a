"""Which commit the code is of: git knows in a checkout, setup.py notes it in what it builds."""

import hashlib
import subprocess
from pathlib import Path

NOTE = 'commit.txt'  # in the package stream3r_core of an installation


def commit_of(root: Path) -> str:
    """Return the commit of a checkout and a digest of the changes since; '': no checkout."""
    if not (root / '.git').exists():
        return ''
    commit = _git(root, 'rev-parse', '--short=12', 'HEAD').decode().strip()
    changes = _git(root, 'diff', 'HEAD')
    return f'{commit}+changes {hashlib.sha256(changes).hexdigest()[:8]}' if changes else commit


def known_commit() -> str:
    """Return the commit of this very package; '': unknown."""
    package = Path(__file__).resolve().parent
    note = package / NOTE
    return commit_of(package.parent) or (note.read_text() if note.exists() else '')


def _git(root: Path, *arguments: str) -> bytes:
    try:
        run = subprocess.run(['git', '-C', str(root), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return b''
    return run.stdout
