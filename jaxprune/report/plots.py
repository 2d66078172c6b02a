"""Plots of a run: metrics over steps, and the layers before and after.

Each function returns a matplotlib figure of its own, which a notebook shows and
:func:`svg` turns into a part of a page. Lines and bars are named where they
are, not in a legend.
"""

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxprune.checks import extras

# Told apart by colour-blind people too. The page replaces each by a variable
# of the same name, which has another value on a dark screen.
COLOURS = {
  'ink': '#1b1f24',
  'soft': '#5b6470',
  'line': '#d5dbe1',
  'band': '#e4eef7',
  'back': '#ccd6e0',
  'a': '#0072b2',
  'b': '#c8500a',
  'c': '#7a4fa3',
}
_SERIES = ('a', 'b', 'c', 'soft')
_SIZE = 8.5  # Of text, in points.
_LETTER = 0.075  # The width of one at that size, in inches.
_PRUNING = re.compile('prun|pdp|spars', re.IGNORECASE)


def metrics(records: Sequence[Mapping[str, Any]], width: float = 7.5) -> Any:
  """Returns a figure of loss, accuracy and sparsity over steps.

  Every key that ends in ``loss``, ``accuracy`` or ``sparsity`` is a line of
  that panel. Stages are marked above the first panel, and shaded where their
  name speaks of pruning.

  Args:
    records: records with a ``step``, and perhaps a ``stage``; a line is broken
      where the value of ``run`` changes.
    width: in inches.

  Raises:
    MissingExtraError: if matplotlib is not installed.
    ValueError: if no record has anything to draw.
  """
  panels = [
    (kind, keys)
    for kind in ('loss', 'accuracy', 'sparsity')
    if (keys := _keys(records, kind))
  ]
  if not panels:
    raise ValueError(
      "The metrics have no key that ends in 'loss', 'accuracy' or 'sparsity'."
    )
  names = [_name(key, kind) for kind, keys in panels for key in keys]
  left, right = 0.55, 0.12 + _LETTER * max(map(len, names))
  inner = width - left - right
  stages = _stages(records)
  labels = _place_stages(stages, inner)
  heights = [0.9 if kind == 'sparsity' else 1.7 for kind, _ in panels]
  top = 0.12 + 0.18 * (1 + max((row for _, row in labels), default=-1))
  height = top + sum(heights) + 0.32 * (len(panels) - 1) + 0.5
  figure = _figure(width, height)
  low = height - top
  for (kind, keys), tall in zip(panels, heights, strict=True):
    low -= tall
    box = (left / width, low / height, inner / width, tall / height)
    low -= 0.32
    axes = figure.add_axes(box)
    _panel(axes, records, kind, keys, stages)
    axes.tick_params(labelbottom=kind == panels[-1][0])
    _label_ends(axes, records, kind, keys, 0.15 / tall)
  for (name, _, _), (x, row) in zip(stages, labels, strict=True):
    figure.axes[0].annotate(
      name,
      (x / inner, 1),
      xycoords='axes fraction',
      xytext=(0, 15 + 12 * row),
      textcoords='offset points',
      color=COLOURS['a' if _PRUNING.search(name) else 'soft'],
      fontsize=_SIZE,
      parse_math=False,
    )
  figure.axes[-1].set_xlabel('step', color=COLOURS['soft'], fontsize=_SIZE)
  return figure


def widths(layers: Mapping[str, tuple[int, int]], width: float = 7.5) -> Any:
  """Returns a figure of the width of every layer before and after.

  Args:
    layers: name of the layer -> (channels before, channels after).
    width: in inches.

  Raises:
    MissingExtraError: if matplotlib is not installed.
    ValueError: if there is no layer, or a width after is above the one before.
  """
  most = max((before for before, _ in layers.values()), default=0)
  for name, (before, after) in layers.items():
    if not 0 <= after <= before or before < 1:
      raise ValueError(
        f'The width of {name!r} must go down, got {before} before and {after} '
        f'after.'
      )
  text = lambda n, m: f'{m:,} of {n:,}' if m < n else f'{n:,}'
  bars = [
    (name, before / most, after / most, text(before, after))
    for name, (before, after) in layers.items()
  ]
  return _bars(bars, width, 'a')


def sparsity(layers: Mapping[str, float], width: float = 7.5) -> Any:
  """Returns a figure of the fraction of zeros of every layer.

  Args:
    layers: name of the layer -> fraction of zeros, in [0, 1].
    width: in inches.

  Raises:
    MissingExtraError: if matplotlib is not installed.
    ValueError: if there is no layer, or a fraction is not in [0, 1].
  """
  for name, fraction in layers.items():
    if not 0 <= fraction <= 1:
      raise ValueError(
        f'The sparsity of {name!r} must be in [0, 1], got {fraction}.'
      )
  bars = [(n, 1.0, float(f), f'{100 * f:.1f} %') for n, f in layers.items()]
  return _bars(bars, width, 'b')


def gates(
  history: Sequence[Mapping[str, Any]], width: float = 7.5, unit: str = 'epoch'
) -> Any:
  """Returns a figure of gates over time, one panel a granularity.

  Each line is a gate, each column a moment; white is closed, and the deeper the
  colour the larger the factor. The gates that close first are at the top.

  Args:
    history: for each moment, name of a granularity -> factor of every gate,
      a float array of any length, 0 where closed.
    width: in inches.
    unit: what the moments are.

  Raises:
    MissingExtraError: if matplotlib is not installed.
    ValueError: if there is no gate, or if their numbers change.
  """
  names = list(history[0]) if history else []
  if not names:
    raise ValueError('There is no gate to draw.')
  height = 0.45 + 1.75 * len(names)
  figure = _figure(width, height)
  for k, name in enumerate(names):
    sizes = sorted({len(moment[name]) for moment in history})
    if len(sizes) > 1:
      raise ValueError(
        f'The gates of {name!r} must stay as many as they are, got {sizes}.'
      )
    table = [[float(moment[name][i]) for moment in history]
             for i in range(sizes[0])]  # fmt: skip
    open_for = lambda row: (sum(x != 0 for x in row), row[-1])
    table.sort(key=open_for)
    low = 0.45 + 1.75 * (len(names) - 1 - k)
    box = (0.02, low / height, 0.96, 1.42 / height)
    axes = figure.add_axes(box)
    axes.imshow(
      [[abs(x) for x in row] for row in table],
      aspect='auto',
      cmap='Blues',
      vmin=0,
      interpolation='nearest',
      extent=(0.5, len(history) + 0.5, len(table), 0),
    )
    for spine in axes.spines.values():
      spine.set_color(COLOURS['line'])
    axes.set_yticks([])
    last = k == len(names) - 1
    axes.tick_params(
      length=0, labelcolor=COLOURS['soft'], labelsize=_SIZE, labelbottom=last
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    still = sum(row[-1] != 0 for row in table)
    axes.set_title(
      f'{name}: {still:,} of {len(table):,} open at the end',
      loc='left',
      color=COLOURS['ink'],
      weight='bold',
      fontsize=_SIZE,
      parse_math=False,
    )
  figure.axes[-1].set_xlabel(unit, color=COLOURS['soft'], fontsize=_SIZE)
  return figure


def scatter(
  clouds: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  across: str,
  up: str,
  width: float = 7.5,
) -> Any:
  """Returns a figure of points, a panel for each cloud, one height for all.

  Args:
    clouds: title -> (x of each point, y of each point).
    across: what x is.
    up: what y is.
    width: in inches.

  Raises:
    MissingExtraError: if matplotlib is not installed.
    ValueError: if there is no cloud, or one has no point or not as many x as y.
  """
  if not clouds:
    raise ValueError('There is no cloud of points to draw.')
  for name, (x, y) in clouds.items():
    if not len(x) or len(x) != len(y):
      raise ValueError(
        f'The points of {name!r} need as many x as y, got {len(x)} and '
        f'{len(y)}.'
      )
  figure = _figure(width, 0.9 * width / len(clouds) + 0.6)
  panels = figure.subplots(1, len(clouds), sharey=True, squeeze=False)[0]
  soft = {'color': COLOURS['soft'], 'fontsize': _SIZE}
  for axes, series, (name, (x, y)) in zip(
    panels, itertools.cycle(_SERIES), clouds.items(), strict=False
  ):
    _bare(axes)
    axes.grid(color=COLOURS['line'], linewidth=0.6)
    axes.plot(x, y, 'o', color=COLOURS[series], markersize=4, zorder=3)
    axes.set_xlabel(across, **soft)
    title = {'color': COLOURS['ink'], 'weight': 'bold', 'fontsize': _SIZE}
    axes.text(0, 1.02, name, transform=axes.transAxes, va='bottom', **title)
  panels[0].set_ylabel(up, **soft)
  return figure


def _figure(width: float, height: float) -> Any:
  """Returns an empty figure that is not known to pyplot."""
  figure = extras.require('matplotlib.figure')
  return figure.Figure(figsize=(width, height))


def _bare(axes: Any) -> None:
  """Leaves of the frame a thin line below."""
  axes.patch.set_visible(False)
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(COLOURS['line'])
  axes.tick_params(length=0, labelcolor=COLOURS['soft'], labelsize=_SIZE, pad=5)
  axes.set_axisbelow(True)


def _panel(
  axes: Any,
  records: Sequence[Mapping[str, Any]],
  kind: str,
  keys: Sequence[str],
  stages: Sequence[tuple[str, float, float]],
) -> None:
  """Draws the curves of one kind over the stages."""
  _bare(axes)
  axes.grid(axis='y', color=COLOURS['line'], linewidth=0.6)
  axes.locator_params(axis='both', nbins=5)
  steps = [record['step'] for record in records]
  axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
  for stage, begin, end in stages:
    pruning = _PRUNING.search(stage) is not None
    if pruning:
      axes.axvspan(begin, end, color=COLOURS['band'], linewidth=0, zorder=0)
    if pruning or begin > stages[0][1]:
      colour = COLOURS['a' if pruning else 'line']
      axes.axvline(begin, color=colour, linewidth=0.8, zorder=1)
  for key, series in zip(keys, itertools.cycle(_SERIES), strict=False):
    for x, y in _curves(records, key):
      dot = {'marker': '.', 'markersize': 4} if len(x) < 30 else {}
      axes.plot(x, y, color=COLOURS[series], linewidth=1.4, zorder=3, **dot)
  if kind != 'loss':
    axes.yaxis.set_major_formatter(lambda y, _: f'{100 * y:.4g} %')
  title = {'color': COLOURS['ink'], 'weight': 'bold', 'fontsize': _SIZE}
  axes.text(0, 1.02, kind, transform=axes.transAxes, va='bottom', **title)


def _label_ends(
  axes: Any,
  records: Sequence[Mapping[str, Any]],
  kind: str,
  keys: Sequence[str],
  gap: float,
) -> None:
  """Names each curve at its end, moved apart where two ends are close."""
  low, high = axes.get_ylim()
  ends = []
  for key, series in zip(keys, itertools.cycle(_SERIES), strict=False):
    x, y = _curves(records, key)[-1]
    height = (y[-1] - low) / (high - low)
    ends.append((height, x[-1], _name(key, kind), COLOURS[series]))
  for height, (_, x, name, colour) in zip(
    _spread([end[0] for end in sorted(ends)], gap), sorted(ends), strict=True
  ):
    axes.annotate(
      name,
      (x, low + height * (high - low)),
      xytext=(5, 0),
      textcoords='offset points',
      color=colour,
      fontsize=_SIZE,
      va='center',
      annotation_clip=False,
      parse_math=False,
    )


def _spread(places: Sequence[float], gap: float) -> list[float]:
  """Returns sorted places moved as little as need be to be a gap apart.

  Neighbours that are too close become a block around their mean.
  """
  blocks: list[list[float]] = []
  middle = lambda block: sum(block) / len(block)
  for position in places:
    blocks.append([position])
    while len(blocks) > 1 and (
      middle(blocks[-1]) - middle(blocks[-2])
      < gap * (len(blocks[-1]) + len(blocks[-2])) / 2
    ):
      blocks[-2:] = [blocks[-2] + blocks[-1]]
  return [
    middle(block) + gap * (i - (len(block) - 1) / 2)
    for block in blocks
    for i in range(len(block))
  ]


def _name(key: str, kind: str) -> str:
  """Returns what tells a key from the others of its kind."""
  return re.sub(f'[ _/]*{kind}$', '', key).replace('_', ' ')


def _keys(metrics: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
  """Returns the keys of a panel, in the order they come up."""
  keys = dict.fromkeys(key for record in metrics for key in record)
  return [
    k for k in keys
    if k.endswith(kind) and any(_is_number(r.get(k)) for r in metrics)
  ]  # fmt: skip


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _curves(
  metrics: Iterable[Mapping[str, Any]], key: str, points: int = 300
) -> list[tuple[list[float], list[float]]]:
  """Returns the curves of a key, one a run, averaged to not too many points."""
  runs: list[list[tuple[float, float]]] = []
  last = object()
  for record in metrics:
    if _is_number(record.get(key)):
      if not runs or record.get('run') != last:
        runs.append([])
      last = record.get('run')
      runs[-1].append((record['step'], record[key]))
  curves = []
  for run in runs:
    each = -(-len(run) // points)
    pieces = [run[i : i + each] for i in range(0, len(run), each)]
    mean = lambda piece, axis: sum(p[axis] for p in piece) / len(piece)
    curves.append(([mean(p, 0) for p in pieces], [mean(p, 1) for p in pieces]))
  return curves


def _stages(
  metrics: Iterable[Mapping[str, Any]],
) -> list[tuple[str, float, float]]:
  """Returns the stages as (name, first step, first step of the next)."""
  stages: list[tuple[str, float, float]] = []
  for record in metrics:
    name, step = record.get('stage'), record['step']
    if stages:
      stages[-1] = (*stages[-1][:2], step)
    if name is not None and (not stages or stages[-1][0] != name):
      stages.append((str(name), step, step))
  return stages


def _place_stages(
  stages: Sequence[tuple[str, float, float]], inches: float
) -> list[tuple[float, int]]:
  """Returns where the name of each stage begins: in inches, and on which line.

  A name begins where its stage does, unless it would end off the plot; it is
  on the lowest line where it meets no other.
  """
  free: list[float] = []  # Where each line is free again, in inches.
  corners = []
  for name, begin, _ in stages:
    start, end = stages[0][1], max(stages[-1][2], stages[0][1] + 1)
    length = _LETTER * len(name)
    x = (begin - start) / (end - start) * inches
    x = max(0, min(x, inches - length))
    row = next((i for i, f in enumerate(free) if f <= x), len(free))
    free[row : row + 1] = [x + length + 0.1]
    corners.append((x, row))
  return corners


def _bars(
  bars: Sequence[tuple[str, float, float, str]], width: float, series: str
) -> Any:
  """Returns a figure of bars on bars: (name, behind, in front, text)."""
  if not bars:
    raise ValueError('There is no layer to draw.')
  columns = 2 if width > 6 and len(bars) > 3 else 1
  rows = -(-len(bars) // columns)
  height = 0.36 * rows + 0.08
  figure = _figure(width, height)
  gap = 0.35 / width
  for column in range(columns):
    column_bars = bars[column * rows : (column + 1) * rows]
    share = (1 - gap * (columns - 1)) / columns
    axes = figure.add_axes((column * (share + gap), 0, share, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(rows, -0.15)
    for y, (name, behind, front, text) in enumerate(column_bars):
      axes.barh(y + 0.72, behind, 0.2, color=COLOURS['back'])
      axes.barh(y + 0.72, front, 0.2, color=COLOURS[series])
      style = {'fontsize': _SIZE, 'va': 'center', 'parse_math': False}
      axes.text(0, y + 0.34, name, color=COLOURS['ink'], **style)
      colour = COLOURS['ink' if front < behind else 'soft']
      axes.text(1, y + 0.34, text, color=colour, ha='right', **style)
  return figure


def svg(figure: Any, name: str) -> str:
  """Returns a figure as SVG for a page: coloured by the variables of the page.

  Its text stays text; its ids get the name in front, for a page has many.
  """
  matplotlib = extras.require('matplotlib')
  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
    dates = {'Date': None, 'Creator': None}
    figure.savefig(buffer, format='svg', transparent=True, metadata=dates)
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'( id="|url\(#|href="#)', rf'\1{name}-', text)
  for colour, value in COLOURS.items():
    text = text.replace(value, f'var(--{colour})')
  return text
