"""How an option of a configuration is declared."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a leaf: default, help text and optional ``choices``, ``minimum``, ``maximum``."""
    unknown = set(limits) - {'choices', 'minimum', 'maximum', 'live'}
    if unknown:
        raise TypeError(f'unknown option limits {sorted(unknown)}')
    return field(default=default, metadata={'help': help, **limits})
