"""What lies beside every map: the weights and the configuration that it was made with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from stream3r_core.checkpoints import WeightsInfo
from stream3r_core.config import to_dict
from stream3r_core.files import atomic_write
from stream3r_ros.config import NodeConfig


class Provenance(NamedTuple):
    """Weights, with their SHA-256, and the options in effect."""

    weights: WeightsInfo
    config: NodeConfig

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; raises :class:`OutputError`."""
        content = {'weights': asdict(self.weights), 'config': to_dict(self.config)}
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=2).encode())
