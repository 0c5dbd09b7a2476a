"""Summary of a suite: its averages beside the published rows of the same protocol."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from stream3r_core.config import to_dict
from stream3r_core.evaluation.html import flat, number, table, write_page
from stream3r_core.evaluation.protocols import reconstruction
from stream3r_core.evaluation.suites import Part, SuiteRun, averages, judged, suite
from stream3r_core.files import atomic_write

REFERENCE = Path(__file__).with_name('reference.yaml')
OWN_ROW = 'this run'


@dataclass(frozen=True)
class ReferenceTable:
    """Published rows of one protocol; None where a value was not published."""

    protocol: str
    title: str
    source: str
    columns: list[str]
    rows: dict[str, list[float | None]]
    note: str = ''


@dataclass(frozen=True)
class SummaryTable:
    """One dataset of a run: own numbers first, then published rows of the same protocol."""

    title: str
    columns: list[str]
    rows: dict[str, list[float | None]]
    remarks: list[str]


def reference_tables() -> list[ReferenceTable]:
    """Read the published rows that come with the package."""
    content = yaml.safe_load(REFERENCE.read_text(encoding='utf-8'))
    return [ReferenceTable(**entry) for entry in content]


def summarise(run: SuiteRun, records: list[dict]) -> list[SummaryTable]:
    """One table per dataset that gave numbers."""
    means = averages(run, records)
    tables = []
    for part in suite(run.name).parts:
        if part.dataset in means:
            good = judged(records, part.dataset)
            tables.append(_table(run, part, means[part.dataset], good))
    return tables


def _table(run: SuiteRun, part: Part, mean: dict[str, float], good: list[dict]) -> SummaryTable:
    columns, rows = list(mean), {OWN_ROW: list(mean.values())}
    remarks = [f'{len(good)} clips, {sum(r["frames"] for r in good)} frames']
    if 'NC mean' in mean:
        remarks.append(f'registration: {run.icp}')
    remarks += sorted({remark for record in good for remark in record['remarks']})
    published = [t for t in reference_tables() if t.protocol == part.protocol]
    for reference in published:
        columns += [c for c in reference.columns if c not in columns]
        remarks += [f'published rows: {reference.source}', *filter(None, [reference.note])]
        for name, values in reference.rows.items():
            known = dict(zip(reference.columns, values))
            rows[name] = [known.get(column) for column in columns]
    rows[OWN_ROW] += [None] * (len(columns) - len(rows[OWN_ROW]))
    return SummaryTable(part.dataset, columns, rows, remarks)


def other_protocols(run: SuiteRun) -> list[SummaryTable]:
    """Published rows of the suite's datasets under other protocols, without a row of the run."""
    prefixes = tuple(f'other/{part.folder}' for part in suite(run.name).parts)
    return [
        SummaryTable(t.title, t.columns, t.rows, [f'published rows: {t.source}'])
        for t in reference_tables()
        if suite(run.name).judge is reconstruction and t.protocol.startswith(prefixes)
    ]


def write_summary(run: SuiteRun, records: list[dict]) -> list[SummaryTable]:
    """Write summary.json and summary.html of a suite and return its tables."""
    tables = summarise(run, records)
    folder = run.output / run.name
    failures = [(r['dataset'], r['clip'], r['failure']) for r in records if r['failure']]
    conditions = next((r['conditions'] for r in records if not r['failure']), {})
    content = {
        'suite': run.name,
        'protocol': suite(run.name).description,
        'averages': averages(run, records),
        'failures': failures,
        'conditions': conditions,
        'config': to_dict(run.config),
    }
    with atomic_write(folder / 'summary.json') as file:
        file.write(json.dumps(content, indent=1).encode())
    body = [f'<h1>{escape(run.name)}</h1><p>{escape(suite(run.name).description)}</p>']
    body += map(_html_table, tables)
    if others := other_protocols(run):
        body.append('<h1>Other protocols: not comparable with this run</h1>')
        body += map(_html_table, others)
    if failures:
        body.append('<h2>Failed or missing</h2>' + table(('dataset', 'clip', 'reason'), failures))
    body.append('<h2>Conditions</h2>' + table(('condition', 'value'), flat(conditions)))
    write_page(folder / 'summary.html', run.name, body)
    return tables


def _html_table(entry: SummaryTable) -> str:
    rows = [[name, *('' if v is None else v for v in row)] for name, row in entry.rows.items()]
    remarks = escape('; '.join(entry.remarks))
    return f'<h2>{escape(entry.title)}</h2>{table(["", *entry.columns], rows)}<p>{remarks}</p>'


def as_text(entry: SummaryTable) -> str:
    """Return a table for the console."""
    header = [entry.title, *entry.columns]
    lines = [
        [name, *('' if value is None else number(value) for value in row)]
        for name, row in entry.rows.items()
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = [
        '  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(row))
        for row in (list(zip(line, widths)) for line in [header, *lines])
    ]
    return '\n'.join([*text, *(f'  {remark}' for remark in entry.remarks)])
