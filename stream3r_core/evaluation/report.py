"""What an evaluation found: metrics with unit and alignment, what was skipped and why, as JSON."""

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stream3r_core.errors import DataError, MissingDependencyError
from stream3r_core.files import atomic_write

FORMAT = 1  # of report.json
GROUPS = ('trajectory', 'depth', 'map', 'speed', 'exports')


@dataclass(frozen=True)
class Metric:
    """One number with all that is needed to compare it."""

    group: str  # one of GROUPS
    name: str
    value: float
    unit: str  # '' = none
    alignment: str = ''  # how the estimate was brought to the truth before
    truth: str = ''  # what it was compared with; '' = nothing, or the remarks name it


@dataclass(frozen=True)
class Skipped:
    """A group of metrics that could not be computed, with reason and remedy."""

    group: str
    reason: str  # begins with the part of the group that it is about, if not all of it
    package: str = ''  # that is missing; '' = none


@dataclass
class Report:
    """All findings about one input."""

    name: str
    conditions: dict
    config: dict
    source: dict = field(default_factory=dict)  # where the input and its truth came from
    num_frames: int = 0
    refused: list[str] = field(default_factory=list)  # frames that could not be used
    remarks: list[str] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    interrupted: bool = False

    def add(
        self, group: str, name: str, value: float, unit: str, alignment: str = '', truth: str = ''
    ) -> None:
        """Add one metric."""
        self.metrics.append(Metric(group, name, float(value), unit, alignment, truth))

    def value(self, name: str, alignment: str = '', truth: str = '') -> float | None:
        """Value of a metric, against the first truth unless one is named; None: skipped."""
        found = (m for m in self.metrics if (m.name, m.alignment) == (name, alignment))
        return next((m.value for m in found if not truth or m.truth == truth), None)

    @contextmanager
    def skipping(self, group: str, part: str = ''):
        """Turn data that cannot be judged, or a missing package, into an entry of ``skipped``.

        ``part`` of the group is named where the rest of it is not skipped.
        """
        try:
            yield
        except (DataError, MissingDependencyError) as error:
            package = getattr(error.__cause__, 'name', None) or ''  # of an ImportError
            reason = f'{part}: {error}' if part else str(error)
            self.skipped.append(Skipped(group, reason, package))

    def write(self, path: Path) -> None:
        """Write report.json in one step."""
        content = {'format': FORMAT, **dataclasses.asdict(self)}
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, default=str).encode())


def read_report(path: str | Path) -> Report:
    """Read a report.json; raises DataError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if content.pop('format') != FORMAT:
            raise DataError(f'{path}: unknown report format; evaluate the input again')
        content['metrics'] = [Metric(**metric) for metric in content['metrics']]
        content['skipped'] = [Skipped(**skipped) for skipped in content['skipped']]
        return Report(**content)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'cannot read the report {path}: {error}') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path} is no report of this version ({error!r})') from error
