"""report.html: one file with its pictures inside."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from stream3r_core.evaluation.pictures import Figure
from stream3r_core.evaluation.report import GROUPS, Metric, Report
from stream3r_core.files import atomic_write

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.skipped { background: #fff4e0; border-left: 4px solid #e69500; padding: .3rem .8rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def write_html(path: Path, report: Report, figures: list[Figure]) -> None:
    """Write a report as one self-contained page."""
    body = [
        f'<h1>{escape(report.name)}</h1>',
        f'<p>{report.num_frames} frames{_ended(report)}</p>',
        *(_group(report, group) for group in GROUPS),
        '<h2>Pictures</h2>',
        *(figure_tag(figure) for figure in figures),
        _list('Remarks', report.remarks),
        _list('Frames that could not be used', report.refused),
        '<h2>Conditions</h2>',
        table(('condition', 'value'), flat({**report.source, **report.conditions})),
        configuration(report.config),
    ]
    write_page(path, report.name, body)


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """Write a page of ready HTML parts."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'
    with atomic_write(path) as file:
        file.write(page.encode())


def configuration(config: dict) -> str:
    """Return the table of all options, folded."""
    rows = table(('option', 'value'), flat(config))
    return f'<details><summary>Configuration</summary>{rows}</details>'


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return an HTML table; numbers are aligned to the right."""
    cells = ''.join(f'<th>{escape(title)}</th>' for title in header)
    lines = [f'<tr>{cells}</tr>']
    lines += ['<tr>' + ''.join(_cell(value) for value in row) + '</tr>' for row in rows]
    return f'<table>{"".join(lines)}</table>'


def number(value: float) -> str:
    """Return a number for people: four significant digits, whole numbers whole."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f'{int(value):,}'.replace(',', ' ')
    return f'{value:.4g}'


def flat(content: dict, prefix: str = '') -> list[tuple[str, object]]:
    """Return dotted names and values of nested mappings."""
    rows: list[tuple[str, object]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += flat(value, f'{prefix}{key}.')
        else:
            rows.append((prefix + key, str(value)))
    return rows


def _cell(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    return f'<td>{escape(str(value))}</td>'


def _ended(report: Report) -> str:
    return ', <strong>interrupted</strong>' if report.interrupted else ''


def _group(report: Report, group: str) -> str:
    metrics = [m for m in report.metrics if m.group == group]
    skipped = [s.reason for s in report.skipped if s.group == group]
    if not metrics and not skipped:
        return ''
    parts = [f'<h2>{group.capitalize()}</h2>']
    parts += [f'<p class="skipped">Skipped: {escape(reason)}</p>' for reason in skipped]
    for truth in dict.fromkeys(m.truth for m in metrics):
        if truth:
            parts.append(f'<h3>against {escape(truth)}</h3>')
        parts.append(_metric_table([m for m in metrics if m.truth == truth]))
    return ''.join(parts)


def _metric_table(metrics: list[Metric]) -> str:
    """One row per metric, one column per alignment."""
    alignments = list(dict.fromkeys(m.alignment for m in metrics if m.alignment))
    values = {(m.name, m.unit, m.alignment): m.value for m in metrics}
    rows = []
    for name, unit in dict.fromkeys((m.name, m.unit) for m in metrics):
        own = values.get((name, unit, ''), '')
        rows.append((name, unit, own, *(values.get((name, unit, a), '') for a in alignments)))
    header = ['metric', 'unit', 'unaligned' if alignments else 'value', *alignments]
    if not any(row[2] != '' for row in rows):
        header, rows = header[:2] + header[3:], [row[:2] + row[3:] for row in rows]
    return table(header, rows)


def figure_tag(figure: Figure) -> str:
    """Return a picture with its caption, inside the page."""
    data = base64.b64encode(figure.png).decode()
    caption = escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f'<figcaption>{caption}</figcaption></figure>'
    )


def _list(title: str, entries: list[str]) -> str:
    if not entries:
        return ''
    items = ''.join(f'<li>{escape(entry)}</li>' for entry in entries)
    return f'<h2>{escape(title)}</h2><ul>{items}</ul>'
