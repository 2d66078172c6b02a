"""Budgets: the best units within bounds on what a network costs."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import checks, plans, tree
from jaxprune.checks import kinds
from jaxprune.cost import latency, polynomials, totals
from jaxprune.cost.polynomials import Polynomial
from jaxprune.cost.steps import Assume
from jaxprune.numerics import counts
from jaxprune.plans.plan import vanished_groups
from jaxprune.structure.graph import Graph
from jaxprune.structure.queries import held

TOLERANCE = 1e-3  # Of a bound: what may be left of it unused.


class Budget(NamedTuple):
  """Upper bounds: a fraction of the whole in (0, 1], or an absolute int.

  Milliseconds are absolute.
  """

  macs: float | int | None = None
  parameters: float | int | None = None
  bytes: float | int | None = None
  ms: float | None = None


class Reached(NamedTuple):
  """What a plan makes of a bound, in the unit of the bound."""

  asked: float
  reached: float
  whole: float  # What the whole network costs.

  @property
  def gap(self) -> float:
    """The part of the bound that is left unused; negative beyond it."""
    return 1 - self.reached / self.asked


@kinds.checked
def budget(
  *,
  macs: float | int | None = None,
  parameters: float | int | None = None,
  bytes: float | int | None = None,
  ms: float | None = None,
) -> Budget:
  """Returns a budget for :func:`plan`; several bounds hold together.

  Args:
    macs: multiply-adds at the traced arguments: a float is a fraction of the
      whole network's in (0, 1], an int an absolute number.
    parameters: entries of the leaves, in the same two ways.
    bytes: bytes of all leaves, statistics too, in the same two ways.
    ms: milliseconds of a call by a table of :func:`jaxprune.cost.measure`,
      always absolute.

  Raises:
    ValueError: if there is no bound or one is out of range.

  Examples:
    >>> budget(macs=0.5).macs
    0.5
  """
  found = Budget(macs, parameters, bytes, ms)
  if all(bound is None for bound in found):
    raise ValueError(
      'A budget needs a bound: `macs`, `parameters`, `bytes` or `ms`.'
    )
  if ms is not None:
    checks.real('ms', ms, above=0)
  for name, bound in found._replace(ms=None)._asdict().items():
    if bound is not None:
      checks.real(name, bound)
    if isinstance(bound, float) and not 0 < bound <= 1:
      raise ValueError(
        f'`{name}` as a fraction must lie in (0, 1], got {bound}; an absolute '
        f'number is an int.'
      )
    if isinstance(bound, int) and bound < 1:
      raise ValueError(f'`{name}` must be at least 1, got {bound}.')
  return found


class _Bound(NamedTuple):
  what: str
  cost: Callable[[np.ndarray], np.ndarray]  # Of widths, int64[..., groups].
  whole: float
  limit: float


def _bounds(
  graph: Graph,
  bound: Budget,
  table: latency.Table | None,
  frame: plans.Plan,
  assume: Assume | None,
) -> list[_Bound]:
  """What is bounded, as functions of the widths within blocks and sides."""
  if bound.ms is not None and table is None:
    raise ValueError(
      'A bound in `ms` needs `table`: measure one with `cost.measure(graph)`.'
    )
  names, found = list(graph.groups), []
  blocks = plans.open_blocks(graph, frame)
  seen = totals.at(graph, frame)
  count_macs = functools.partial(totals.macs_polynomial, assume=assume)
  makers: dict[str, tuple[str, Callable[[Graph], Polynomial]]] = {
    'macs': ('MACs', count_macs),
    'parameters': ('parameters', totals.parameters_polynomial),
    'bytes': ('bytes', totals.weight_bytes_polynomial),
  }
  for field, (what, make) in makers.items():
    limit = getattr(bound, field)
    if limit is not None:
      polynomial = polynomials.substitute(make(seen), blocks)
      rows = polynomials.on_rows([polynomial], names)
      cost = lambda widths, rows=rows: rows(widths)[..., 0]
      full = polynomials.evaluate(make(graph), totals.variables(graph))
      limit = limit if isinstance(limit, int) else limit * full
      found.append(_Bound(what, cost, full, limit))
  if bound.ms is not None and table is not None:
    if seen is not graph and table.program != latency.digest(seen):
      raise ValueError(
        f'The table is not of the network at resolution {frame.resolution}, '
        f'resized {frame.resized}: measure it there, with '
        f'`cost.measure(plans.at(graph, resolution, resized))`.'
      )
    full = float(latency.predict(table, totals.variables(graph)))
    cost = latency.on_rows(table, names, blocks)
    found.append(_Bound('ms', cost, full, bound.ms))
  return found


@kinds.checked
def reached(
  graph: Graph,
  plan: plans.Plan,
  bound: Budget,
  *,
  table: latency.Table | None = None,
  assume: Assume | None = None,
) -> dict[str, Reached]:
  """Returns what a plan costs beside each bound of a budget.

  Args:
    graph: the graph.
    plan: a plan of it.
    bound: the budget.
    table: of :func:`jaxprune.cost.measure`, for a bound in ``ms``; for a plan
      with a resolution of its own, or one on the way, measured there.
    assume: as :func:`jaxprune.cost.macs`.

  Returns:
    'MACs', 'parameters', 'bytes', 'ms' -> :class:`Reached`, those bounded.

  Raises:
    ValueError: if ``ms`` is bounded and there is no table, or one of another
      resolution; or as :func:`jaxprune.cost.macs`.
  """
  widths = [after for _, after in plans.widths(graph, plan).values()]
  return {
    what: Reached(limit, cost(np.array(widths, np.int64)).item(), whole)
    for what, cost, whole, limit in _bounds(graph, bound, table, plan, assume)
  }


@kinds.checked
def plan(
  graph: Graph,
  scores: Mapping[str, Any],
  bound: Budget,
  *,
  table: latency.Table | None = None,
  round_to: int | tree.Rules = 1,
  keep: tree.Rules | None = None,
  normalise: bool = True,
  dropped: Iterable[str] = (),
  resolution: Sequence[int] | None = None,
  resized: Iterable[tuple[str, Sequence[int]]] = (),
  assume: Assume | None = None,
) -> plans.Plan:
  """Returns the plan that keeps the best units within a budget.

  Units leave in the order of their scores, all groups together, until every
  bound holds; what still fits is then put back, best first. The last unit of a
  group never leaves, and the rules of the graph hold. With several bounds the
  score of a unit is divided by

    sum_k w_k c_k / mean_k c_k,

  c_k the part of cost k that a unit of its group carries; the weights w (of
  mean 1) are chosen so that all bounds are used up, where widths exist that do
  so. Where more than a thousandth of a bound would be left, a few units of one
  group are traded for those of another; :func:`reached` says how near it came.

  Args:
    graph: the graph.
    scores: group -> float[size], larger = keep; a group without scores stays
      whole. Ties leave the higher index first.
    bound: a :func:`budget`.
    table: of :func:`jaxprune.cost.measure`, for a bound in ``ms``.
    round_to: widths are multiples of it and of what the rules of the graph
      say (or the whole group), and at least it; or rules over group names ->
      such a number.
    keep: rules over group names -> what must stay: a fraction (float) or a
      number of units (int); ``{'head.*': 1.0}`` protects.
    normalise: whether to divide the scores of each group by their mean, so
      that groups of different scale compete fairly.
    dropped: names of blocks to leave out; what they cost is not in the budget.
    resolution: sides of the first argument after its batch, at which the
      multiply-adds count; None for those of the trace.
    resized: where the resolution changes on the way, as
      :class:`jaxprune.plans.Plan` has it.
    assume: as :func:`jaxprune.cost.macs`.

  Raises:
    ValueError: if a group or block is unknown, scores are of another shape or
      not finite, ``round_to`` is below 1, a rule matches no group, ``ms`` is
      bounded without a table of that resolution, what ``assume`` must say is
      not given (:func:`jaxprune.cost.macs`), or the budget cannot be met or
      asks for more than the whole network has (the message says what can be
      reached).
  """
  values = {name: _checked(graph, name, v) for name, v in scores.items()}
  frame = plans.Plan(
    graph.fingerprint,
    dropped=tuple(sorted(dropped)),
    resolution=None if resolution is None else tuple(resolution),
    resized=tuple((cut, tuple(sides)) for cut, sides in resized),
  )
  bounds = _bounds(graph, bound, table, frame, assume)
  # What rules of the graph allow, `_ranges` sees to.
  lost = vanished_groups(graph, frame.dropped)
  widths = {
    name: (group.size, 0 if name in lost else group.size)
    for name, group in graph.groups.items()
  }
  ranges = _ranges(graph, round_to, keep, widths)
  units = []
  for name, group in graph.groups.items():
    score = values.get(name, np.zeros(group.size))
    low, high, pitch = ranges[name]
    units.append(
      _units(score, low if name in values else high, high, pitch, normalise)
    )
  top = np.array([high for _, high, _ in ranges.values()], np.int64)
  _check_reach(graph, bounds, top, units)
  tight = [b for b in bounds if b.limit < b.cost(top)]
  best = top
  if tight:
    best = _solve(tight, top, units)
    for _ in range(4):
      best = _trade(tight, top, units, best)
  kept = {
    name: unit.order[unit.order.size - width :].tolist()
    for name, unit, width in zip(graph.groups, units, best, strict=True)
    if width
  }
  return plans.from_kept(
    graph, kept, frame.dropped, frame.resolution, frame.resized
  )


class _Units(NamedTuple):
  """The chunks of units that leave a group at a time."""

  order: np.ndarray  # The first unit to leave first.
  sizes: np.ndarray  # Units of each chunk.
  worths: np.ndarray  # Scores of chunks, never falling.


def _units(
  scores: np.ndarray, low: int, high: int, pitch: int, normalise: bool
) -> _Units:
  if normalise:
    scores = scores / (scores.mean() or 1.0)
  order = np.argsort(-scores, kind='stable')[::-1]
  sizes = _chunks(high, low, pitch)
  starts = np.cumsum(sizes) - sizes
  taken = scores[order[order.size - high :][: sizes.sum()]]
  means = np.add.reduceat(taken, starts) / sizes if sizes.size else sizes
  return _Units(order, sizes, np.maximum.accumulate(means))


def _slack(bounds: list[_Bound], widths: np.ndarray) -> np.ndarray:
  """The part of the bounds that is left, summed; infinite if one is broken."""
  left = np.stack([1 - b.cost(widths) / b.limit for b in bounds])
  return np.where((left >= 0).all(0), left.sum(0), np.inf)


def _solve(
  bounds: list[_Bound], top: np.ndarray, units: list[_Units]
) -> np.ndarray:
  """The widths of :func:`plan`, before any trade."""
  shares = np.stack([_shares(b, top) for b in bounds])
  even = np.maximum(shares.mean(0), 1e-30)

  def attempt(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max())
    prices = (weights / weights.mean()) @ shares / len(bounds) / even
    return _leave(bounds, top, units, np.maximum(prices, 1e-9))

  logs = np.zeros(len(bounds))
  best = attempt(logs)
  for _ in range(3 if len(bounds) > 2 else 1):
    # In turn, the weight of one bound: more of it leaves more of its cost.
    for k in range(1, len(bounds)):
      low, high = -12.0, 12.0
      for _ in range(18):
        if _slack(bounds, best) <= TOLERANCE:
          return best
        logs[k] = (low + high) / 2
        widths = attempt(logs)
        best = min(best, widths, key=lambda w: float(_slack(bounds, w)))
        left = np.array([1 - b.cost(widths) / b.limit for b in bounds])
        if left[k] > np.delete(left, k).min():  # It is another that binds.
          high = logs[k]
        else:
          low = logs[k]
  return best


def _shares(bound: _Bound, top: np.ndarray) -> np.ndarray:
  """The part of a cost that one unit of each group carries."""
  half = (top + 1) // 2
  saved = 1 - bound.cost(top - np.diag(half)) / bound.cost(top)
  return np.maximum(saved, 0) / np.maximum(half, 1)


def _leave(
  bounds: list[_Bound],
  top: np.ndarray,
  units: list[_Units],
  prices: np.ndarray,
) -> np.ndarray:
  """The widths once the worst have left, and what still fits has come back."""
  counts = [unit.sizes.size for unit in units]
  which = np.repeat(np.arange(len(units)), counts)
  rank = np.concatenate([np.arange(n) for n in counts])
  taken = np.concatenate([unit.sizes for unit in units])
  worth = np.concatenate([unit.worths for unit in units])
  # A negative score is not raised by a high price.
  worth = np.where(worth > 0, worth / prices[which], worth)
  first = np.lexsort((rank, which, worth))
  which, taken = which[first], taken[first]

  def after(count: int) -> np.ndarray:
    gone = np.bincount(which[:count], taken[:count], len(units))
    return top - gone.astype(np.int64)

  fits = lambda widths: all(b.cost(widths) <= b.limit for b in bounds)
  low, high = 0, len(taken)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(after(middle)) else (middle + 1, high)
  widths, is_open = after(low), [True] * len(units)
  for group, size in zip(
    which[:low][::-1].tolist(), taken[:low][::-1].tolist(), strict=True
  ):
    if is_open[group]:
      widths[group] += size
      if not fits(widths):
        widths[group] -= size
        is_open[group] = False
  return widths


def _trade(
  bounds: list[_Bound],
  top: np.ndarray,
  units: list[_Units],
  widths: np.ndarray,
) -> np.ndarray:
  """Widths that use up more of the bounds: chunks of one group for another's.

  Of the trades of a few chunks a side that come near enough the one that costs
  the least score; else the one that comes nearest.
  """
  if _slack(bounds, widths) <= TOLERANCE:
    return widths
  ladders = [
    (size - np.cumsum([0, *unit.sizes]))[::-1]
    for size, unit in zip(top, units, strict=True)
  ]
  losses = [np.cumsum([0, *(unit.sizes * unit.worths)])[::-1] for unit in units]
  reach = min(3, max(1, 100 // len(units)))
  steps = []  # Group, width, loss of score.
  for group, ladder in enumerate(ladders):
    now = int(np.searchsorted(ladder, widths[group]))
    steps += [
      (group, ladder[k], losses[group][k] - losses[group][now])
      for k in range(max(0, now - reach), min(ladder.size, now + reach + 1))
    ]
  down = [step for step in steps if step[1] < widths[step[0]]]
  up = [step for step in steps if step[1] > widths[step[0]]]
  pairs = [(a, b) for a in down for b in up if a[0] != b[0]]
  if not pairs:
    return widths
  many, rows = np.tile(widths, (len(pairs), 1)), np.arange(len(pairs))
  for side in zip(*pairs, strict=True):
    groups, sizes, _ = zip(*side, strict=True)
    many[rows, groups] = sizes
  slack = _slack(bounds, many)
  loss = [a[2] + b[2] for a, b in pairs]
  best = np.lexsort((loss, np.maximum(slack, TOLERANCE)))[0]
  return many[best] if slack[best] < _slack(bounds, widths) else widths


def _check_reach(
  graph: Graph, bounds: list[_Bound], top: np.ndarray, units: list[_Units]
) -> None:
  """Refuses a budget beyond what the widths can cost, at either end."""
  least = top - np.array([unit.sizes.sum() for unit in units], np.int64)
  if any(b.cost(least) > b.limit for b in bounds):
    found = ', '.join(
      f'{_number(b.cost(least).item())} {b.what} '
      f'({b.cost(least) / b.whole:.1%}) '
      f'where at most {_number(b.limit)} are asked'
      for b in bounds
    )
    raise ValueError(
      f'The budget cannot be met: with every group at its smallest there '
      f'remain {found}. Ask for more, or allow smaller groups (`round_to`, '
      f'`keep`). {held.remedy(graph)}'.rstrip()
    )
  if all(b.limit > b.whole for b in bounds):
    found = ', '.join(
      f'{_number(b.whole)} {b.what} where {_number(b.limit)} are asked'
      for b in bounds
    )
    raise ValueError(
      f'There is nothing to remove: the whole network has {found}. Ask for '
      f'less than it has.'
    )


def _number(x: float) -> str:
  return f'{x:.3g}' if isinstance(x, float) and x < 100 else f'{x:.0f}'


def _ranges(
  graph: Graph,
  round_to: int | tree.Rules,
  keep: tree.Rules | None,
  widths: Mapping[str, tuple[int, int]],
) -> dict[str, tuple[int, int, int]]:
  """The fewest and most units of each group, and what they are multiples of."""
  rules = {'.*': round_to} if isinstance(round_to, int) else round_to
  pitches = tree.match(rules, graph.groups, 1, 'group') if graph.groups else {}
  floors = tree.match(keep or {}, graph.groups, 1, 'group')
  ranges = {}
  for name, group in graph.groups.items():
    pitch, least = pitches[name], floors[name]
    if not isinstance(pitch, int) or pitch < 1:
      raise ValueError(f'`round_to` must be at least 1, got {pitch}.')
    if isinstance(least, float):
      least = counts.least(group.size, least)
    if not 0 <= least <= group.size:
      raise ValueError(
        f'Group {name!r} has {group.size} units and cannot keep {least} of '
        f'them.'
      )
    high = min(group.most, widths[name][1])  # None of a dropped block.
    low = min(high, max(least, group.least, pitch, 1))
    ranges[name] = (low, high, math.lcm(pitch, group.round_to))
  return ranges


def _chunks(size: int, floor: int, pitch: int) -> np.ndarray:
  """How many units leave at a time: the first chunk meets the rounding."""
  rest = size % pitch
  top, bottom = size - rest, -(-floor // pitch) * pitch
  chunks = [rest] if rest and top >= floor else []
  return np.array(chunks + [pitch] * max(0, (top - bottom) // pitch), int)


def _checked(graph: Graph, name: str, values: Any) -> np.ndarray:
  if name not in graph.groups:
    raise ValueError(
      f'There is no group {name!r}; the groups are: '
      f'{", ".join(graph.groups) or "none"}.'
    )
  values = np.asarray(values, np.float64)
  if values.shape != (graph.groups[name].size,):
    raise ValueError(
      f'The scores of group {name!r} must have shape '
      f'({graph.groups[name].size},), got {values.shape}.'
    )
  if not np.all(np.isfinite(values)):
    raise ValueError(f'The scores of group {name!r} are not all finite.')
  return values
