"""Cost: multiply-adds and parameters of any widths, exactly, without a run.

Both are polynomials in the widths of the groups: a product of sizes for each
matrix product or convolution, and for each leaf. They are made once from a
graph and evaluated by arithmetic, in exact integers or as a jnp function. On
them rests :func:`plan`, which meets a budget rather than a ratio.

MACs are the multiply-adds of convolutions and matrix products; FLOPs = 2 MACs.
Data multiplied by a slice of a convolution kernel is one too: a depthwise
convolution has the same count whether it is written as one or as shifts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune import plans, tree
from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import all_equations

Polynomial = Mapping[tuple[str, ...], int]  # Groups of a term -> coefficient.


class Layer(NamedTuple):
  """A leaf that takes part in products: its multiply-adds and entries."""

  name: str
  macs: int
  parameters: int


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


def macs_polynomial(graph: Graph) -> Polynomial:
  """Returns the multiply-adds at the traced arguments as a polynomial."""
  total: dict[tuple[str, ...], int] = {}
  for _, polynomial in _products(graph):
    _add(total, polynomial)
  return total


def parameters_polynomial(graph: Graph) -> Polynomial:
  """Returns the number of entries of all leaves as a polynomial.

  Where the leaves come in Flax's collections, those of ``params`` alone count.
  """
  names = _names(graph)
  total: dict[tuple[str, ...], int] = {}
  collected = any(path.startswith('params/') for path in graph.leaves)
  for path, leaf in graph.leaves.items():
    if path.startswith('params/') or not collected:
      _add(total, _product(leaf.axes, names))
  return total


def evaluate(polynomial: Polynomial, widths: Mapping[str, Any]) -> Any:
  """Returns a polynomial at widths; whatever arithmetic they have.

  Args:
    polynomial: of this module.
    widths: group -> width: Python ints (exact), int64 NumPy arrays (exact, one
      result each), or traced float32 arrays (differentiable; relative error
      of about 1e-6).

  Examples:
    >>> evaluate({(): 2, ('a',): 3, ('a', 'b'): 1}, {'a': 4, 'b': 5})
    34
  """
  total: Any = 0
  for groups, coefficient in polynomial.items():
    term: Any = coefficient
    for name in groups:
      term = term * widths[name]
    total = total + term
  return total


def macs(graph: Graph, plan: plans.Plan | None = None) -> int:
  """Returns the multiply-adds at the traced arguments, an exact int.

  Args:
    graph: the graph; trace it with a batch of 1 for multiply-adds an example.
    plan: what is kept; None for the whole network.
  """
  return int(evaluate(macs_polynomial(graph), _widths(graph, plan)))


def parameters(graph: Graph, plan: plans.Plan | None = None) -> int:
  """Returns the number of entries of all leaves, an exact int."""
  return int(evaluate(parameters_polynomial(graph), _widths(graph, plan)))


def layers(graph: Graph, plan: plans.Plan | None = None) -> list[Layer]:
  """Returns the cost of each leaf that takes part in products, in order.

  A product of two arrays that both depend on the data (attention) counts
  under the name of its operation; a kernel used twice is one layer.
  """
  widths, names = _widths(graph, plan), _names(graph)
  totals: dict[str, int] = {}
  for name, polynomial in _products(graph):
    totals[name] = totals.get(name, 0) + int(evaluate(polynomial, widths))
  entries = {
    path: int(evaluate(_product(leaf.axes, names), widths))
    for path, leaf in graph.leaves.items()
  }
  return [
    Layer(name, count, entries.get(name, 0)) for name, count in totals.items()
  ]


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


def _widths(graph: Graph, plan: plans.Plan | None) -> dict[str, int]:
  if plan is None:
    return {name: group.size for name, group in graph.groups.items()}
  return {name: after for name, (_, after) in plans.widths(graph, plan).items()}


def _names(graph: Graph) -> dict[Axis, str]:
  return {atom: name for name, atom in graph.atoms.items()}


def _products(graph: Graph) -> list[tuple[str, Polynomial]]:
  """The multiply-adds of each matrix product and convolution, by leaf."""
  names, found = _names(graph), []
  for eqn, times in all_equations(graph.program):
    paths = [
      path
      for value in eqn.inputs
      if not value.has_data and len(value.sources) == 1
      for path in value.sources
    ]
    axes = eqn.products
    if (
      eqn.primitive.name == 'mul'
      and eqn.outputs[0].has_data
      and any(len(graph.leaves[path].shape) > 3 for path in paths)
    ):
      axes = eqn.outputs[0].axes
    if axes is None:
      continue
    polynomial = _product(axes, names)
    scaled = {term: n * times for term, n in polynomial.items()}
    found.append((paths[0] if paths else eqn.why, scaled))
  return found


def _product(
  axes: Any, names: Mapping[Axis, str]
) -> dict[tuple[str, ...], int]:
  """The product of the sizes of axes."""
  total: dict[tuple[str, ...], int] = {(): 1}
  for axis in axes:
    size = _size(axis, names)
    product: dict[tuple[str, ...], int] = {}
    for left, m in total.items():
      for right, n in size.items():
        _add(product, {tuple(sorted(left + right)): m * n})
    total = product
  return total


def _size(axis: Axis, names: Mapping[Axis, str]) -> dict[tuple[str, ...], int]:
  """The size of an axis."""
  axis = ax.find(axis)
  if axis.kind == 'product':
    return _product(axis.parts, names)
  if axis.kind == 'sum':
    total: dict[tuple[str, ...], int] = {}
    for part in axis.parts:
      _add(total, _size(part, names))
    return total
  return {(names[axis],): 1} if axis in names else {(): axis.size}


def _add(total: dict[tuple[str, ...], int], other: Polynomial) -> None:
  for term, coefficient in other.items():
    total[term] = total.get(term, 0) + coefficient
