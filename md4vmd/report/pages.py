"""A report as text, Markdown and HTML. All text of the runs is escaped: it is not ours."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence

from md4vmd.report.tables import NOTHING, Table

PLOTS = {
  "bits": "Bits per token against training steps",
  "noise": "Noise of the training bound",
  "calls": "Quality against the number of network calls",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2.5rem auto; max-width: 76rem;
  padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { color: #6b7280; max-width: 60rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 600; vertical-align: bottom; border-bottom: 2px solid #1f2937; }
td { border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th, td { padding: .35rem .8rem .35rem 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:hover { background: #f3f4f6; }
img { max-width: 100%; }
"""


def terminal(table: Table) -> str:
  """The table in columns."""
  cells = [table.header, *table.rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  numeric = _numeric(table)
  lines = [
    "  ".join(
      cell.rjust(width) if is_number else cell.ljust(width)
      for cell, width, is_number in zip(row, widths, numeric, strict=True)
    ).rstrip()
    for row in cells
  ]
  return "\n".join([table.title, *(f"  {line}" for line in lines)])


def markdown(
  title: str, tables: Sequence[Table], plots: Mapping[str, str], lines: Sequence[str]
) -> str:
  """A page of tables; `plots` maps the name of a plot to its file, `lines` are remarks."""
  parts = [f"# {_escape_markdown(title)}"]
  for table in tables:
    parts.append(f"## {_escape_markdown(table.title)}")
    rule = ["--:" if is_number else ":--" for is_number in _numeric(table)]
    rows = [[_escape_markdown(cell) for cell in row] for row in (table.header, *table.rows)]
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))
    parts += [_escape_markdown(table.note)] * bool(table.note)
  parts += [f"## {PLOTS[name]}\n\n![{PLOTS[name]}]({file})" for name, file in plots.items()]
  parts += ["\n".join(f"- {_escape_markdown(line)}" for line in lines)] * bool(lines)
  return "\n\n".join(parts) + "\n"


def page(
  title: str, tables: Sequence[Table], plots: Mapping[str, bytes], lines: Sequence[str]
) -> str:
  """The same page in HTML, with its pictures inside; it loads nothing and runs nothing."""
  escape = html.escape
  body = [f"<h1>{escape(title)}</h1>"]
  for i, table in enumerate(tables):
    body.append(f"<h2>{escape(table.title)}</h2>{_html_table(table)}")
    body += [f"<p>{escape(table.note)}</p>"] * bool(table.note)
    if i == 0:
      for name, png in plots.items():
        data = base64.b64encode(png).decode()
        picture = f'<img alt="{escape(PLOTS[name])}" src="data:image/png;base64,{data}">'
        body.append(f"<h2>{escape(PLOTS[name])}</h2>{picture}")
  body += [f"<p>{escape(line)}</p>" for line in lines]
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
    + "\n".join(body)
    + "\n</body></html>\n"
  )


def _html_table(table: Table) -> str:
  numeric = _numeric(table)

  def row(tag: str, cells: Sequence[str]) -> str:
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    inside = (
      f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
    )
    return f"<tr>{''.join(inside)}</tr>"

  rows = "\n".join(row("td", cells) for cells in table.rows)
  head = row("th", table.header)
  return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'


def _numeric(table: Table) -> list[bool]:
  """Which columns hold numbers alone."""
  is_number = lambda cell: cell == NOTHING or re.match(r"-?[0-9]", cell) is not None
  return [
    all(is_number(row[i]) for row in table.rows) and any(row[i] != NOTHING for row in table.rows)
    for i in range(len(table.header))
  ]


def _escape_markdown(text: str) -> str:
  return re.sub(r"([\\`*_|\[\]<>#])", r"\\\1", text)
