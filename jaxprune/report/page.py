"""What a run leaves for people: a log of metrics, a table, one page.

:func:`append_metrics` keeps the log, one JSON object a line; :func:`table` is
for the terminal; and :func:`write_html` puts everything on one page that needs
no other file, for phones and wide screens, light and dark. The input is plain
data throughout.
"""

import html
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxprune.checks import kinds
from jaxprune.report import plots

# --- The log -----------------------------------------------------------------


@kinds.checked
def append_metrics(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Adds one line of JSON to a log; first drops a last line cut by a kill.

  Args:
    path: of the log; made if need be.
    record: plain data; scalars of NumPy and JAX count as numbers, and what is
      not finite becomes ``null``, for JSON has no NaN.

  Raises:
    TypeError: if JSON cannot hold a value.
  """
  try:
    line = json.dumps(_plain(record), allow_nan=False) + '\n'
  except TypeError as error:
    raise TypeError(f'`record` must be plain data: {error}.') from None
  with open(path, 'ab+') as file:
    end = file.seek(0, os.SEEK_END)
    if end:
      file.seek(end - 1)
      if file.read(1) != b'\n':
        file.seek(0)
        file.truncate(file.read().rfind(b'\n') + 1)
    file.write(line.encode())


@kinds.checked
def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the records of a log, but a last line that a kill cut short.

  Raises:
    FileNotFoundError: if there is no log.
    ValueError: if a line is no JSON object, with its number.
  """
  return [record for record, _ in _lines(path)]


@kinds.checked
def truncate_metrics(path: str | os.PathLike, step: int) -> int:
  """Cuts a log back to a step; the lines that stay keep their bytes.

  Args:
    path: of the log; nothing is done if there is none.
    step: records with a ``step`` above it go, and so does a half-written line.

  Returns:
    The number of records that went.

  Raises:
    ValueError: if a line is no JSON object or has no ``step``.
  """
  if not os.path.exists(path):
    return 0
  lines = _lines(path)
  for number, (record, _) in enumerate(lines, 1):
    if 'step' not in record:
      raise ValueError(f"Line {number} of {path} has no 'step'.")
  kept = [line for record, line in lines if record['step'] <= step]
  _replace(pathlib.Path(path), b''.join(kept))
  return len(lines) - len(kept)


def _lines(path: str | os.PathLike) -> list[tuple[dict[str, Any], bytes]]:
  """Returns each whole line of a log, read and as it is."""
  records = []
  raw = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  for number, line in enumerate(raw, 1):
    if not line.endswith(b'\n'):
      break
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError('no object')
    except ValueError:
      raise ValueError(
        f'Line {number} of {path} is no JSON object: {line[:60]!r}.'
      ) from None
    records.append((record, line))
  return records


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  temporary.write_bytes(content)
  os.replace(temporary, path)


def _plain(value: Any) -> Any:
  """Returns data that JSON can hold."""
  if isinstance(value, Mapping):
    return {str(key): _plain(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


# --- The table ---------------------------------------------------------------


@kinds.checked
def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns rows as text in aligned columns, for the terminal.

  Args:
    rows: mappings from column to value; the columns are those of the rows in
      the order they come up. Text stays as it is; integers get separators,
      floats four significant digits. A column of numbers is aligned right.

  Examples:
    >>> print(table([{'network': 'dense', 'parameters': 12345},
    ...              {'network': 'small', 'parameters': 678}]))
    network  parameters
    -------  ----------
    dense        12,345
    small           678
  """
  columns, cells = _cells(rows)
  right = _right(cells, len(columns))
  widths = [
    max(map(len, column)) for column in zip(columns, *cells, strict=True)
  ]
  pad = lambda text, width, r: text.rjust(width) if r else text.ljust(width)
  line = lambda row: '  '.join(map(pad, row, widths, right)).rstrip()
  return '\n'.join(
    [line(columns), '  '.join('-' * width for width in widths)]
    + [line(row) for row in cells]
  )


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list]:
  """Returns the columns of rows, and the rows as lists of text."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  return columns, [[_text(row.get(c, '')) for c in columns] for row in rows]


def _right(cells: Sequence[Sequence[str]], columns: int) -> list[bool]:
  """Returns which columns hold numbers."""
  is_number = lambda text: not text or re.match(r'[-+]?\.?\d', text)
  return [all(is_number(row[i]) for row in cells) for i in range(columns)]


def _text(value: Any) -> str:
  """Returns a value as people read it."""
  value = _plain(value)
  if isinstance(value, bool) or value is None:
    return {True: 'yes', False: 'no', None: ''}[value]
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, float):
    return f'{value:.4g}'
  return value if isinstance(value, str) else json.dumps(value)


# --- The page ----------------------------------------------------------------

_PARTS = (
  'title', 'summary', 'headline', 'rows', 'metrics', 'widths', 'sparsity',
  'checks', 'config',
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f5f7f9;
  --good: #00795a; --bad: #b3261e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b;
  --card: #1d2228; --good: #45c69b; --bad: #ff8a80; --ink: #e8ebee;
  --soft: #a3adb8; --line: #333b44; --band: #1e3040; --back: #3b4550;
  --a: #56b4e9; --b: #f0954a; --c: #c09be6 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.05rem 4rem; max-width: 47.2rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans',
  'DejaVu Sans', sans-serif; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.015em;
  margin: 0 0 0.5rem }
h2 { font-size: 1.1rem; margin: 2.75rem 0 0.25rem }
p { margin: 0 0 0.9rem }
p.note, dt, th, .label { color: var(--soft) }
p.note { font-size: 0.875rem }
.cards { display: grid; gap: 0.75rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
.card { background: var(--card); border-radius: 0.6rem;
  padding: 0.8rem 1rem }
.value { display: block; font-size: 1.6rem; font-weight: 650;
  line-height: 1.2; letter-spacing: -0.02em }
.label { font-size: 0.8125rem; line-height: 1.35; display: block }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums }
th, td { padding: 0.45rem 0.5rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: baseline }
th { font-weight: 500; font-size: 0.8125rem }
th:first-child, td:first-child { padding-left: 0 }
th:last-child, td:last-child { padding-right: 0 }
td:first-child { font-weight: 600 }
.tall td:first-child { font-weight: 400; color: var(--soft) }
.tall th { color: var(--ink); font-weight: 600 }
.right { text-align: right }
.scroll { overflow-x: auto }
.tall { display: none }
svg { display: block; max-width: 100%; height: auto; margin: 0.6rem 0 }
svg text { font-family: inherit !important }
.key { display: inline-block; width: 0.7em; height: 0.7em;
  border-radius: 2px; margin-right: 0.3em }
ul { list-style: none; margin: 0.5rem 0; padding: 0 }
li { display: flex; gap: 0.75rem; padding: 0.45rem 0;
  border-bottom: 1px solid var(--line); font-size: 0.875rem }
li > span:nth-child(2) { flex: 1 }
li .label { text-align: right }
.good, .bad { font-weight: 650 }
.good { color: var(--good) } .bad { color: var(--bad) }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr;
  gap: 0.3rem 1.25rem; font-size: 0.8125rem; margin: 0.5rem 0 }
dd { margin: 0; overflow-wrap: anywhere;
  font-family: ui-monospace, 'SF Mono', Menlo, Consolas, monospace }
@media (max-width: 40rem) { .wide { display: none } .tall { display: block }
  table.tall { display: table }
  li { flex-wrap: wrap; gap: 0 0.75rem } li .label { width: 100%;
  text-align: left } li > span:nth-child(2) { flex: 1 0 70% }
  body { padding-top: 1.25rem } }
"""


@kinds.checked
def write_html(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Writes a page that needs no other file: no script, no font, no network.

  The same record gives the same bytes. A part that is not given is left out.

  Args:
    path: of the page; it appears whole or not at all.
    record: plain data, in parts:

      - ``title`` (needed) and ``summary``: text.
      - ``headline``: (value, label) pairs, such as ``('2.1x', 'faster')``.
      - ``rows``: the result, as for :func:`table`.
      - ``metrics``: as :func:`read_metrics` returns them.
      - ``widths``: layer -> (channels before, channels after).
      - ``sparsity``: layer -> fraction of zeros.
      - ``checks``: mappings with ``name``, ``result`` (text) and ``passed``.
      - ``config``: what the run was asked for; mappings may be nested.

  Raises:
    ValueError: if a part is unknown, the title is missing, or a plot refuses
      its data.
    MissingExtraError: if matplotlib is not installed.
  """
  unknown = [part for part in record if part not in _PARTS]
  if unknown or 'title' not in record:
    raise ValueError(
      f'A report has a title and some of the parts {", ".join(_PARTS[1:])}; '
      f'got {", ".join(map(str, record)) or "nothing"}.'
    )
  parts = [f'<h1>{_escape(record["title"])}</h1>']
  if record.get('summary'):
    parts.append(f'<p>{_escape(record["summary"])}</p>')
  if record.get('headline'):
    parts.append(_cards(record['headline']))
  if record.get('rows'):
    parts += ['<h2>Result</h2>', _html_table(record['rows'])]
  if record.get('metrics'):
    note = 'Pruning phases are shaded.'
    parts += _section('Training', note, plots.metrics, record['metrics'])
  if record.get('widths'):
    note = f'{_key("a")}Channels that are left, of {_key("back")}those before.'
    parts += _section(
      'Width of every layer', note, plots.widths, record['widths']
    )
  if record.get('sparsity'):
    note = f'{_key("b")}Fraction of the weights that are zero.'
    shares = record['sparsity']
    parts += _section('Sparsity of every layer', note, plots.sparsity, shares)
  if record.get('checks'):
    parts += ['<h2>Proof</h2>', _checks(record['checks'])]
  if record.get('config'):
    parts += ['<h2>Configuration</h2>', _config(record['config'])]
  light = '; '.join(
    f'--{name}: {value}' for name, value in plots.COLOURS.items()
  )
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_escape(record["title"])}</title>\n'
    f'<style>{_STYLE.replace("LIGHT", light)}</style>\n</head>\n<body>\n'
    + '\n'.join(parts)
    + '\n</body>\n</html>\n'
  )
  _replace(pathlib.Path(path), page.encode())


def _escape(value: Any) -> str:
  return html.escape(_text(value))


def _key(colour: str) -> str:
  return f'<span class="key" style="background: var(--{colour})"></span>'


def _cards(pairs: Iterable[Sequence[Any]]) -> str:
  cards = [
    f'<div class="card"><span class="value">{_escape(value)}</span>'
    f'<span class="label">{_escape(label)}</span></div>'
    for value, label in pairs
  ]
  return f'<div class="cards">{"".join(cards)}</div>'


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table twice: for wide screens, and turned for phones."""
  columns, cells = _cells(rows)
  right = [' class="right"' if r else '' for r in _right(cells, len(columns))]
  line = lambda tag, row, kinds: (
    '<tr>'
    + ''.join(
      f'<{tag}{kind}>{html.escape(cell)}</{tag}>'
      for cell, kind in zip(row, kinds, strict=True)
    )
    + '</tr>'
  )
  wide = line('th', columns, right) + ''.join(
    line('td', row, right) for row in cells
  )
  kinds = ['', *[' class="right"'] * len(cells)]
  turned = list(zip(columns, *cells, strict=True))
  tall = line('th', ['', *turned[0][1:]], kinds) + ''.join(
    line('td', row, kinds) for row in turned[1:]
  )
  return (
    f'<div class="wide scroll"><table>{wide}</table></div>'
    f'<div class="scroll"><table class="tall">{tall}</table></div>'
  )


def _section(title: str, note: str, plot: Any, values: Any) -> list[str]:
  """Returns a heading, a note and a plot for wide screens and for phones."""
  name = title.split()[0].lower()
  wide = plots.svg(plot(values, width=7.5), f'{name}-wide')
  tall = plots.svg(plot(values, width=3.45), f'{name}-tall')
  return [
    f'<h2>{title}</h2>',
    f'<p class="note">{note}</p>',
    f'<div class="wide" role="img" aria-label="{title}">{wide}</div>',
    f'<div class="tall" role="img" aria-label="{title}">{tall}</div>',
  ]


def _checks(checks: Iterable[Mapping[str, Any]]) -> str:
  items = []
  for check in checks:
    kind, word = ('good', 'holds') if check['passed'] else ('bad', 'fails')
    items.append(
      f'<li><span class="{kind}">{word}</span>'
      f'<span>{_escape(check["name"])}</span>'
      f'<span class="label">{_escape(check.get("result", ""))}</span></li>'
    )
  return f'<ul>{"".join(items)}</ul>'


def _config(config: Mapping[str, Any]) -> str:
  flat = dict(_flat(config))
  items = [
    f'<dt>{html.escape(name)}</dt><dd>{_escape(value)}</dd>'
    for name, value in flat.items()
  ]
  return f'<dl>{"".join(items)}</dl>'


def _flat(config: Mapping[str, Any], prefix: str = '') -> Iterable:
  """Yields the values of nested mappings under dotted names."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
