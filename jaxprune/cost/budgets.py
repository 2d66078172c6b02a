"""Budgets: the best units within bounds on what a network costs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune import plans, tree
from jaxprune.cost.polynomials import evaluate
from jaxprune.cost.totals import macs_polynomial, parameters_polynomial
from jaxprune.structure.graph import Graph


class Budget(NamedTuple):
  """Upper bounds: a fraction of the whole in (0, 1], or an absolute int."""

  macs: float | int | None = None
  parameters: float | int | None = None


def budget(
  *,
  macs: float | int | None = None,
  parameters: float | int | None = None,
) -> Budget:
  """Returns a budget for :func:`plan`; several bounds hold together.

  Args:
    macs: multiply-adds at the traced arguments: a float is a fraction of the
      whole network's in (0, 1], an int an absolute number.
    parameters: entries of the leaves, in the same two ways.

  Raises:
    ValueError: if there is no bound or one is out of range.

  Examples:
    >>> budget(macs=0.5)
    Budget(macs=0.5, parameters=None)
  """
  found = Budget(macs, parameters)
  if all(bound is None for bound in found):
    raise ValueError('A budget needs a bound: `macs` or `parameters`.')
  for name, bound in found._asdict().items():
    if isinstance(bound, float) and not 0 < bound <= 1:
      raise ValueError(
        f'`{name}` as a fraction must lie in (0, 1], got {bound}; an absolute '
        f'number is an int.'
      )
    if isinstance(bound, int) and bound < 1:
      raise ValueError(f'`{name}` must be at least 1, got {bound}.')
  return found


def plan(
  graph: Graph,
  scores: Mapping[str, Any],
  bound: Budget,
  *,
  round_to: int = 1,
  keep: tree.Rules | None = None,
  normalise: bool = True,
) -> plans.Plan:
  """Returns the plan that keeps the best units within a budget.

  Units leave in the order of their scores, all groups together, until every
  bound holds; what still fits is then put back, best first. The last unit of a
  group never leaves.

  Args:
    graph: the graph.
    scores: group -> float[size], larger = keep; a group without scores stays
      whole. Ties leave the higher index first.
    bound: a :func:`budget`.
    round_to: widths are multiples of it (or the whole group), and at least it.
    keep: rules over group names -> what must stay: a fraction (float) or a
      number of units (int); ``{'head.*': 1.0}`` protects.
    normalise: whether to divide the scores of each group by their mean, so
      that groups of different scale compete fairly.

  Raises:
    ValueError: if a group is unknown, scores are of another shape or not
      finite, ``round_to`` is below 1, a rule matches no group, or the budget
      cannot be met (the message says what can).
  """
  if round_to < 1:
    raise ValueError(f'`round_to` must be at least 1, got {round_to}.')
  orders, steps = {}, []
  floors = _floors(graph, keep, round_to)
  for number, (name, values) in enumerate(scores.items()):
    values = _checked(graph, name, values)
    if normalise:
      values = values / (values.mean() or 1.0)
    order = np.argsort(-values, kind='stable')[::-1]  # First to leave first.
    orders[name] = order
    sizes = _chunks(values.size, floors[name], round_to)
    ends = np.cumsum([0, *sizes])
    worst = -np.inf
    for k, size in enumerate(sizes):
      chunk = values[order[ends[k] : ends[k + 1]]]
      worst = max(worst, float(chunk.mean()))
      steps.append((worst, number, k, name, size))
  steps.sort(key=lambda step: step[:3])
  names = list(orders)
  whole = {name: group.size for name, group in graph.groups.items()}
  bounds = [
    (what, polynomial, limit if isinstance(limit, int) else limit * full)
    for what, polynomial, limit, full in (
      (what, p, limit, evaluate(p, whole))
      for what, p, limit in (
        ('MACs', macs_polynomial(graph), bound.macs),
        ('parameters', parameters_polynomial(graph), bound.parameters),
      )
      if limit is not None
    )
  ]
  position = {name: k for k, name in enumerate(names)}
  which = np.array([position[step[3]] for step in steps], int)
  taken = np.array([step[4] for step in steps], int)

  def after(count: int) -> dict[str, int]:
    gone = np.bincount(
      which[:count], weights=taken[:count], minlength=len(names)
    )
    return {
      **whole,
      **{name: whole[name] - int(gone[k]) for k, name in enumerate(names)},
    }

  fits = lambda widths: all(
    evaluate(p, widths) <= limit for _, p, limit in bounds
  )
  smallest = after(len(steps))
  if not fits(smallest):
    left = [(evaluate(p, smallest), evaluate(p, whole)) for _, p, _ in bounds]
    reached = ', '.join(
      f'{least} {what} ({least / full:.1%}) where at most {limit:.0f} are asked'
      for (what, _, limit), (least, full) in zip(bounds, left, strict=True)
    )
    raise ValueError(
      f'The budget cannot be met: with every group at its smallest there '
      f'remain {reached}. Ask for more, or allow smaller groups (`round_to`, '
      f'`keep`).'
    )
  low, high = 0, len(steps)
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(after(middle)) else (middle + 1, high)
  widths, closed = after(low), set()
  for _, _, _, name, size in reversed(steps[:low]):
    if name in closed:
      continue
    wider = {**widths, name: widths[name] + size}
    if fits(wider):
      widths = wider
    else:
      closed.add(name)
  kept = {name: orders[name][whole[name] - widths[name] :] for name in names}
  return plans.from_kept(graph, kept)


def _floors(
  graph: Graph, keep: tree.Rules | None, round_to: int
) -> dict[str, int]:
  """The smallest width of each group."""
  asked = tree.match(keep or {}, graph.groups, 1)
  floors = {}
  for name, least in asked.items():
    size = graph.groups[name].size
    if isinstance(least, float):
      least = int(np.ceil(least * size))
    if not 0 <= least <= size:
      raise ValueError(
        f'Group {name!r} has {size} units and cannot keep {least} of them.'
      )
    floors[name] = min(size, max(least, round_to, 1))
  return floors


def _chunks(size: int, floor: int, round_to: int) -> list[int]:
  """How many units leave at a time: the first chunk meets the rounding."""
  chunks = []
  while size > floor:
    step = size % round_to or round_to
    if size - step < floor:
      break
    chunks.append(step)
    size -= step
  return chunks


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
