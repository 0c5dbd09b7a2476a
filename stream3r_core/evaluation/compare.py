"""Several variants over the same input in one table and one plot: quality against cost."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stream3r_core.errors import DataError
from stream3r_core.evaluation.html import figure_tag, flat, table, write_page
from stream3r_core.evaluation.pictures import Figure, scatter
from stream3r_core.evaluation.report import Metric, Report
from stream3r_core.files import atomic_write

COMPARISON_JSON, COMPARISON_HTML = 'comparison.json', 'comparison.html'


@dataclass(frozen=True)
class Column:
    """One metric of the comparison; ``name`` may stand for the start of a longer name."""

    title: str
    group: str
    name: str
    alignment: str = ''
    unit: str = ''

    def metric(self, report: Report) -> Metric | None:
        """The metric in a report, against its first truth; None where it was skipped."""
        for metric in report.metrics:
            same = metric.group == self.group and metric.name.startswith(self.name)
            if same and metric.alignment.startswith(self.alignment):
                return metric
        return None

    def value(self, report: Report) -> float | None:
        """Value in a report, None where it was skipped."""
        metric = self.metric(report)
        return None if metric is None else metric.value

    def meaning(self, reports: Iterable[Report]) -> dict[str, str]:
        """Unit, alignment and truth of the column, as the reports say."""
        found = [metric for metric in map(self.metric, reports) if metric is not None]
        alignment, truth = (
            ' / '.join(dict.fromkeys(filter(None, (getattr(m, name) for m in found))))
            for name in ('alignment', 'truth')
        )
        return {'unit': self.unit, 'alignment': alignment, 'truth': truth}


COLUMNS = (
    Column('ATE', 'trajectory', 'ATE RMSE', 'Sim(3)', 'm'),
    Column('ATE, SE(3)', 'trajectory', 'ATE RMSE', 'SE(3)', 'm'),
    Column('RPE rotation', 'trajectory', 'RPE rotation', 'Sim(3)', 'deg'),
    Column('depth AbsRel', 'depth', 'AbsRel', 'scale'),
    Column('depth δ < 1.25', 'depth', 'δ < 1.25', 'scale'),
    Column('map accuracy', 'map', 'accuracy mean', '', 'm'),
    Column('map completeness', 'map', 'completeness mean', '', 'm'),
    Column('F-score', 'map', 'F-score'),
    Column('cache', 'speed', 'cache, largest', '', 'MiB'),
    Column('latency p50', 'speed', 'latency p50', '', 'ms'),
    Column('latency p95', 'speed', 'latency p95', '', 'ms'),
)
UNITS = {column.title: column.unit for column in COLUMNS}
QUALITIES = ('ATE', 'depth AbsRel', 'map accuracy')  # smaller is better in all
COSTS = ('cache', 'latency p50')


def compare(reports: Mapping[str, Report], folder: str | Path) -> dict[str, dict]:
    """Write comparison.json and comparison.html of reports by variant name; return the table.

    Raises DataError where the reports are of different inputs, or fewer than two.
    """
    inputs = {(report.name, report.num_frames) for report in reports.values()}
    if len(reports) < 2 or len(inputs) > 1:
        raise DataError(
            f'a comparison needs two or more variants over the same frames, got '
            f'{len(reports)} over {len(inputs)} inputs: {sorted(inputs)}'
        )
    folder = Path(folder)
    rows = {name: {c.title: c.value(report) for c in COLUMNS} for name, report in reports.items()}
    differing = _differences({name: report.config for name, report in reports.items()})
    content = {
        'input': min(inputs)[0],
        'columns': {c.title: c.meaning(reports.values()) for c in COLUMNS},
        'variants': rows,
        'options': differing,
        'conditions': {name: report.conditions for name, report in reports.items()},
    }
    with atomic_write(folder / COMPARISON_JSON) as file:
        file.write(json.dumps(content, indent=1).encode())
    _write_page(folder / COMPARISON_HTML, min(inputs)[0], reports, rows, differing)
    return rows


def _differences(configs: Mapping[str, dict]) -> dict[str, dict[str, object]]:
    """Options in which the variants differ, by dotted name."""
    leaves = {name: dict(flat(config)) for name, config in configs.items()}
    options = dict.fromkeys(option for own in leaves.values() for option in own)
    return {
        option: {name: own.get(option) for name, own in leaves.items()}
        for option in options
        if len({own.get(option) for own in leaves.values()}) > 1
    }


def _write_page(path, title, reports, rows, differing) -> None:
    known = [c for c in COLUMNS if any(row[c.title] is not None for row in rows.values())]
    header = ['variant', *(_heading(c, reports.values()) for c in known)]
    lines = [
        [name, *('' if row[c.title] is None else row[c.title] for c in known)]
        for name, row in rows.items()
    ]
    options = [[option, *values.values()] for option, values in differing.items()]
    conditions = {name: dict(flat(report.conditions)) for name, report in reports.items()}
    names = dict.fromkeys(name for own in conditions.values() for name in own)
    body = [
        f'<h1>{escape(title)}</h1>',
        '<p>In brackets: unit and alignment. Smaller is better but for δ and F-score.</p>',
        table(header, lines),
        *(figure_tag(figure) for figure in _plots(rows)),
        '<h2>Options that differ</h2>',
        table(('option', *reports), options),
        '<h2>Conditions</h2>',
        table(
            ('condition', *reports),
            [[name, *(own.get(name, '') for own in conditions.values())] for name in names],
        ),
    ]
    write_page(path, f'comparison, {title}', body)


def _heading(column: Column, reports: Iterable[Report]) -> str:
    """Title with unit and alignment."""
    meaning = column.meaning(reports)
    told = ', '.join(filter(None, (meaning['unit'], meaning['alignment'])))
    return f'{column.title} ({told})' if told else column.title


def _plots(rows: Mapping[str, Mapping[str, float | None]]) -> list[Figure]:
    panels = [
        (cost, quality, {n: (r[cost], r[quality]) for n, r in rows.items()})
        for quality in QUALITIES
        for cost in COSTS
        if all(r[cost] is not None and r[quality] is not None for r in rows.values())
    ]
    labelled = [
        tuple(f'{title} ({UNITS[title]})' if UNITS[title] else title for title in titles)
        for *titles, _ in panels
    ]
    return [scatter(labelled, [points for *_, points in panels])] if panels else []
