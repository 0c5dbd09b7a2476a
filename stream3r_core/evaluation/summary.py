"""Summary of a suite: its averages beside the published rows of the same protocol."""

import dataclasses
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from stream3r_core.config import ModelConfig, to_dict
from stream3r_core.evaluation.html import configuration, flat, number, table, write_page
from stream3r_core.evaluation.protocols import image_sizes, reconstruction
from stream3r_core.evaluation.suites import Part, Selection, SuiteRun, averages, judged, suite
from stream3r_core.files import atomic_write

REFERENCE = Path(__file__).with_name('reference.yaml')


@dataclass(frozen=True)
class ReferenceTable:
    """Published rows of one protocol; None where a value was not published.

    ``clips`` are the sequences that the rows are averages over with their number of frames, None
    where the source does not list them; ``frames`` which of these were judged; ``long_side`` that
    of the images in pixels, None where it is not told; ``icp`` the registration, '' where there
    is none.
    """

    protocol: str
    title: str
    source: str
    columns: list[str]
    rows: dict[str, list[float | None]]
    clips: dict[str, int] | None = None
    frames: str = 'all'
    long_side: int | None = None
    icp: str = ''
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


def own_row(run: SuiteRun) -> str:
    """Name of a run's row: attention mode and weights."""
    model = run.config.model
    weights = f'{model.preset}, {model.weights}' if model.weights else model.preset
    return f'this run: {run.config.session.mode}, {weights}'


def summarise(run: SuiteRun, records: list[dict]) -> list[SummaryTable]:
    """One table per selection of clips that gave numbers."""
    means = averages(run, records)
    return [
        _table(run, part, selection, means[selection.title], records)
        for part, selection in _selections(run)
        if selection.title in means
    ]


def _selections(run: SuiteRun) -> list[tuple[Part, Selection]]:
    return [(part, chosen) for part in suite(run.name).parts for chosen in part.selections]


def _table(
    run: SuiteRun,
    part: Part,
    selection: Selection,
    mean: dict[str, float],
    records: list[dict],
) -> SummaryTable:
    good = judged(records, part.dataset, selection.names)
    columns, rows = list(mean), {own_row(run): list(mean.values())}
    wanted = f' of {len(selection.names)}' if selection.names else ''
    frames = sum(r['frames'] for r in good)
    remarks = [f'{len(good)}{wanted} clips, {frames} frames ({part.frames})']
    if 'NC mean' in mean:
        remarks.append(f'registration: {run.icp}')
    remarks += sorted({remark for record in good for remark in record['remarks']})
    for reference in reference_tables():
        if reference.protocol != selection.protocol or _differences(reference, run, part, good):
            continue
        columns += [c for c in reference.columns if c not in columns]
        remarks += _told(reference)
        for name, values in reference.rows.items():
            known = dict(zip(reference.columns, values))
            rows[name] = [known.get(column) for column in columns]
    own = rows[own_row(run)]
    own += [None] * (len(columns) - len(own))
    return SummaryTable(selection.title, columns, rows, remarks)


def _differences(
    reference: ReferenceTable, run: SuiteRun, part: Part, good: list[dict]
) -> list[str]:
    """What keeps published rows from standing beside a run."""
    differences = []
    if reference.clips is None:
        differences.append('the source does not list its clips')
    else:
        differences += _other_clips(reference, good)
    sides = sorted({r['image_sizes']['long_side'] for r in good})
    if reference.long_side is None:
        differences.append('the source does not tell the size of its images')
    elif sides != [reference.long_side]:
        here = ', '.join(map(str, sides))
        differences.append(f'its images have a long side of {reference.long_side}, here {here}')
    if reference.frames != part.frames:
        differences.append(f'its frames are {reference.frames}, here {part.frames}')
    if reference.icp and reference.icp != run.icp:
        differences.append(f'its registration is {reference.icp}, here {run.icp}')
    return differences


def _other_clips(reference: ReferenceTable, good: list[dict]) -> list[str]:
    """How the clips judged differ from those of a reference, in name or length."""
    here = {r['clip']: r['clip_frames'] for r in good}
    if set(reference.clips) != set(here):
        common = len(set(here).intersection(reference.clips))
        return [
            f'its {len(reference.clips)} clips are not the {len(here)} judged here '
            f'({common} in common)'
        ]
    return [
        f'its clip {name} has {frames} frames, here {here[name]}'
        for name, frames in reference.clips.items()
        if here[name] != frames
    ][:1]


def _told(reference: ReferenceTable) -> list[str]:
    return [f'published rows: {reference.source}', *filter(None, [reference.note])]


def other_protocols(run: SuiteRun, records: list[dict]) -> list[SummaryTable]:
    """Published rows of the suite's datasets that the run does not share the protocol of."""
    tables = []
    prefixes = tuple(f'other/{part.folder}' for part in suite(run.name).parts)
    for reference in reference_tables():
        if suite(run.name).judge is reconstruction and reference.protocol.startswith(prefixes):
            tables.append((reference, []))
        for part, selection in _selections(run):
            if reference.protocol == selection.protocol:
                good = judged(records, part.dataset, selection.names)
                if why := _differences(reference, run, part, good):
                    tables.append((reference, why))
    return [SummaryTable(t.title, t.columns, t.rows, [*_told(t), *why]) for t, why in tables]


def write_summary(run: SuiteRun, records: list[dict]) -> list[SummaryTable]:
    """Write summary.json and summary.html of a suite and return its tables."""
    tables = summarise(run, records)
    folder = run.output / run.name
    failures = [(r['dataset'], r['clip'], r['failure']) for r in records if r['failure']]
    first = next((r for r in records if not r['failure']), None)
    conditions = first['conditions'] if first else {}
    sizes = first['image_sizes'] if first else dataclasses.asdict(image_sizes(ModelConfig()))
    protocol = suite(run.name).description.format(**sizes)
    config = to_dict(run.config)
    content = {
        'suite': run.name,
        'protocol': protocol,
        'averages': averages(run, records),
        'failures': failures,
        'conditions': conditions,
        'config': config,
    }
    with atomic_write(folder / 'summary.json') as file:
        file.write(json.dumps(content, indent=1).encode())
    body = [f'<h1>{escape(run.name)}</h1><p>{escape(protocol)}</p>']
    body += map(_html_table, tables)
    if others := other_protocols(run, records):
        body.append('<h1>Other protocols: not comparable with this run</h1>')
        body += map(_html_table, others)
    if failures:
        body.append('<h2>Failed or missing</h2>' + table(('dataset', 'clip', 'reason'), failures))
    body.append('<h2>Conditions</h2>' + table(('condition', 'value'), flat(conditions)))
    body.append(configuration(config))
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
