"""Digests of what a result depends on: by them a rerun tells what it need not do again."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from stream3r_core.checkpoints import weights_sha256
from stream3r_core.config import WeightsConfig


def digest(*facts: Any) -> str:
    """Return 16 hexadecimal digits that differ when any of the facts does."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_digest(path: str | Path) -> str:
    """Digest of name, size and time of change of a file, or of all in a folder; '': neither."""
    path = Path(path)
    return digest(sorted(_facts(path))) if path.is_file() or path.is_dir() else ''


@lru_cache
def weights_digest(config: WeightsConfig) -> str:
    """Return the SHA-256 of the weights that a configuration names; '' for untrained ones."""
    return weights_sha256(config.preset, config.weights or None, config.revision or None)


def _facts(path: Path) -> Iterator[tuple[str, int, int]]:
    names = [path] if path.is_file() else (Path(f, n) for f, _, ns in os.walk(path) for n in ns)
    for name in names:
        if name.exists():  # a link may lead nowhere
            facts = name.stat()
            yield str(name.relative_to(path)), facts.st_size, facts.st_mtime_ns
