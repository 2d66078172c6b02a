"""What vectors cost, and the vectors that meet a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import cost as costs
from jaxprune.checks import kinds
from jaxprune.search.joint.vectors import (
  PruningVector,
  Space,
  check,
  from_unit,
  parts,
  rounded,
  unit_range,
)
from jaxprune.structure.queries import stages as chain

Penalty = Literal['hinge', 'two_sided', 'none']
Coster = Callable[[PruningVector], Any]  # A vector, or many -> its cost.


@kinds.checked
def coster(
  space: Space,
  measure: Callable[..., Any] = costs.macs_polynomial,
) -> Coster:
  """Returns the function from vectors to their cost, without a run.

  Args:
    space: the space.
    measure: graph -> a polynomial of :mod:`jaxprune.cost`, or a function of
      the values of its variables (a latency table's ``predict``); taken once at
      every side. Of a space with cuts the polynomials alone, which are asked
      with ``layers`` for what belongs to each part. What resizes features
      counts like a pooling: not as multiply-adds.

  Returns:
    A function of a vector of numbers (exact), of NumPy arrays (one exact result
    each), or of traced arrays (float32, differentiable in widths and depths).
    It raises a ValueError for a vector of another space.

  Raises:
    ValueError: if the space has cuts, and the measure does not tell parts, or
      what reads no leaf costs what depends on the side.

  Examples:
    >>> from jaxprune.search import joint
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 2))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 3)))
    >>> joint.coster(joint.space(graph))(joint.PruningVector({'a': 4}, {}))
    20
  """
  by_part = [
    [_function(found) for found in row] for row in _measured(space, measure)
  ]

  def call(vector: PruningVector) -> Any:
    check(space, vector)
    values = dict(vector.widths)
    for stage, names in space.stages.items():
      for i, block in enumerate(names):
        values[block] = _open(vector.depths[stage], i)
    if len(space.graphs) == 1:
      return sum(row[0](values) for row in by_part)
    own = [vector.side[name] for name in parts(space)] or [vector.side]
    ladder = np.array(space.sides)
    return sum(
      _at_side(row, values, side, ladder)
      for row, side in zip(by_part, own, strict=True)
    )

  return call


def _measured(space: Space, measure: Callable[..., Any]) -> list[list[Any]]:
  """What each part costs at each side; one part where there are no cuts."""
  if not space.cuts:
    return [[measure(graph) for graph in space.graphs]]
  at = list(space.cuts.values())
  leaves = dict(
    zip(parts(space), chain.leaves_of(space.graph, at), strict=True)
  )
  try:
    found = [measure(graph, layers=leaves) for graph in space.graphs]
  except TypeError as error:
    raise ValueError(
      f'{getattr(measure, "__name__", measure)!r} does not tell the cost of '
      f'the parts of a network ({error}): a space with cuts takes a polynomial '
      f'of jaxprune.cost.'
    ) from error
  rows = [
    [
      {
        tuple(v for v in term if v != name): n
        for term, n in one.items()
        if name in term
      }
      for one in found
    ]
    for name in leaves
  ]
  rest = [
    {t: n for t, n in one.items() if not {*t} & {*leaves}} for one in found
  ]
  if any(one != rest[-1] for one in rest):
    raise ValueError(
      'An operation that reads no leaf costs what depends on the side, so that '
      'it is in no part: leave `cuts` out.'
    )
  return [*rows[:-1], [one | rest[-1] for one in rows[-1]]]


def _function(found: Any) -> Callable[[dict[str, Any]], Any]:
  """What measures an evaluation: a polynomial's, or a table's own."""
  if callable(found):
    return found
  return lambda values: costs.evaluate(found, values)


def _at_side(
  row: Sequence[Callable[[dict[str, Any]], Any]],
  values: dict[str, Any],
  side: Any,
  ladder: np.ndarray,
) -> Any:
  """The cost of one part at a side, or at many."""
  if isinstance(side, jax.Array):
    found = [jnp.asarray(one(values), jnp.float32) for one in row]
    # Indices of the sides, 0, 1, ..: costs between two are interpolated.
    at = [
      jnp.maximum(0, 1 - jnp.abs(_rung(side, ladder) - k))
      for k in range(len(found))
    ]
    return sum(a * f for a, f in zip(at, found, strict=True))
  which = np.searchsorted(ladder, side)
  if not np.ndim(which):
    return row[int(which)](values)
  total: Any = None
  for k, one in enumerate(row):
    rows = which == k
    if rows.any():
      part = np.asarray(one({n: np.broadcast_to(v, rows.shape)[rows]
                             for n, v in values.items()}))  # fmt: skip
      total = np.zeros(rows.shape, part.dtype) if total is None else total
      total[rows] = part
  return total


def _open(depth: Any, i: int) -> Any:
  """Whether block i is open: 1 or 0, or in between at a depth in between."""
  if isinstance(depth, jax.Array):
    return jnp.clip(depth.astype(jnp.float32) - i, 0, 1)
  value = np.clip(np.asarray(depth) - i, 0, 1)
  return value if np.ndim(depth) else int(value)


def _rung(side: jax.Array, ladder: np.ndarray) -> jax.Array:
  places = jnp.arange(len(ladder), dtype=jnp.float32)
  return jnp.interp(
    side.astype(jnp.float32), jnp.asarray(ladder, jnp.float32), places
  )


@kinds.checked
def penalty(
  cost: jax.typing.ArrayLike, limit: float, kind: Penalty = 'hinge'
) -> jax.Array:
  """Returns how far a cost is from its limit, in logarithms.

  'hinge': max(0, log(cost / limit)); 'two_sided': |log(cost / limit)|;
  'none': 0.

  Examples:
    >>> float(penalty(2.0, 4.0)), f'{penalty(2.0, 4.0, "two_sided"):.3f}'
    (0.0, '0.693')
  """
  ratio = jnp.log(jnp.asarray(cost, jnp.float32) / jnp.float32(limit))
  if kind == 'none':
    return jnp.zeros_like(ratio)
  return jnp.abs(ratio) if kind == 'two_sided' else jnp.maximum(ratio, 0.0)


@kinds.checked
def objective(
  space: Space,
  loss: Callable[[PruningVector], jax.Array],
  cost: Coster,
  limit: float,
  *,
  weight: float = 1.0,
  kind: Penalty = 'hinge',
) -> Callable[[PruningVector], jax.Array]:
  """Returns what the vector is moved by: l(v) + weight * R(cost(v)).

  Args:
    space: the space.
    loss: n stacked vectors of allowed values -> float32[n], all on the same
      batch: what differs between them is then the vector alone.
    cost: of :func:`coster`.
    limit: the cost that is asked for, absolute.
    weight: of the penalty, in units of the loss.
    kind: of the penalty.

  Returns:
    A function of n stacked vectors in units of the largest network.
  """

  def call(units: PruningVector) -> jax.Array:
    vectors = from_unit(space, units)
    return loss(vectors) + weight * penalty(cost(vectors), limit, kind)

  return call


@kinds.checked
def limit(space: Space, cost: Coster, target: float | int) -> float:
  """Returns the cost that is asked for.

  Args:
    space: the space.
    cost: of :func:`coster`.
    target: a fraction of the whole network's cost (float, in (0, 1]), or a
      cost (int).

  Raises:
    ValueError: if the space has no network of that cost, with the nearest.
  """
  total = whole(space, cost)
  if isinstance(target, float) and not 0 < target <= 1:
    raise ValueError(
      f'A target as a fraction must lie in (0, 1], got {target}; a cost is an '
      f'int.'
    )
  asked = target * total if isinstance(target, float) else float(target)
  _check_range(space, cost, asked, total)
  return asked


@kinds.checked
def whole(space: Space, cost: Coster) -> Any:
  """Returns the cost of the network with nothing removed."""
  return cost(
    PruningVector(
      {name: group.size for name, group in space.graph.groups.items()},
      {stage: len(names) for stage, names in space.stages.items()},
      space.high.side,
    )
  )


def _check_range(
  space: Space, cost: Coster, asked: float, total: float
) -> None:
  least, most = cost(space.low), cost(space.high)
  nearest = least if asked < least else most if asked > most else None
  if nearest is not None:
    raise ValueError(
      f'The ranges hold no network of cost {asked:.0f}: the nearest has '
      f'{nearest:.0f} ({nearest / total:.1%} of the whole). Ask for that, or '
      f'widen the ranges.'
    )


@kinds.checked
def project(
  space: Space,
  cost: Coster,
  target: float | int,
  unit: PruningVector,
  *,
  tolerance: float = 0.005,
) -> PruningVector:
  """Returns the allowed vector near another that meets the budget.

  Moves along the gradient of the cost, u - t dF/du clipped to the ranges, to
  the largest network within the budget, and fills what rounding left, unit by
  unit, the coordinates that rounding took most from first.

  Args:
    space: the space.
    cost: of :func:`coster`.
    target: as :func:`limit`.
    unit: fractions of the largest network, numbers.
    tolerance: relative, how far below the target it may stay; never above.

  Returns:
    Python ints.

  Raises:
    ValueError: if the ranges exclude the target, or no network within the
      tolerance was found, with the nearest reachable cost; or if a coordinate
      is not a number.
  """
  flat, structure = jax.tree.flatten(jax.tree.map(float, unit))
  u, low, high = (
    np.array(jax.tree.leaves(x), float)
    for x in (structure.unflatten(flat), *map(_floats, unit_range(space)))
  )
  if np.isnan(u).any():
    raise ValueError(
      f'{np.isnan(u).sum()} of the {u.size} coordinates are nan: some loss '
      f'that moved the vector was no number.'
    )
  u = np.clip(u, low, high)
  direction = _slope(space, cost, _rounded_unit(space, structure, u))
  direction = np.maximum(direction / (direction.max() or 1.0), 0.05)
  ray = lambda t: np.clip(u - t * direction, low, high)
  asked = limit(space, cost, target)
  found = [_on_ray(space, cost, asked, structure, ray, (-20.0, 20.0))]
  if cost(found[0]) < asked * (1 - tolerance):
    # The widths are spent: one block or one side more, and narrower again.
    found += [
      _narrowed(space, cost, asked, vector)
      for vector in _raised(space, found[0])
    ]
  return _nearest([v for v in found if v is not None], cost, asked, tolerance)


@kinds.checked
def uniform(
  space: Space,
  cost: Coster,
  target: float | int,
  start: PruningVector | None = None,
  *,
  tolerance: float = 0.005,
) -> PruningVector:
  """Returns the vector of one fraction for every width that meets the budget.

  Args:
    space: the space.
    cost: of :func:`coster`.
    target: as :func:`limit`.
    start: a vector whose depths and side stay; without it, the largest.
    tolerance: as :func:`project`.

  Raises:
    ValueError: as :func:`project`, or if the depths or the side are none that
      the space allows.
  """
  start = space.high if start is None else start
  near = rounded(space, _floats(start))
  if (near.depths, near.side) != (start.depths, start.side):
    raise ValueError(
      f'The space does not allow the depths {start.depths} and side '
      f'{start.side} of `start`: the nearest are {near.depths} and {near.side}.'
    )
  asked = limit(space, cost, target)
  fixed = _fixed(space, start)
  _check_range(fixed, cost, asked, whole(space, cost))
  found = _narrowed(space, cost, asked, fixed.high)
  assert found is not None  # In range, as was checked.
  return _nearest([found], cost, asked, tolerance)


def _fixed(space: Space, vector: PruningVector) -> Space:
  """The space in which widths alone vary, up to those of a vector's like."""
  alone = lambda x: jax.tree.map(lambda n: np.array([n]), x)
  ladders = space.ladders._replace(
    depths=alone(vector.depths), side=alone(vector.side)
  )
  return dataclasses.replace(space, ladders=ladders)


def _narrowed(
  space: Space, cost: Coster, asked: float, vector: PruningVector
) -> PruningVector | None:
  """A vector with its widths in one proportion smaller, on the budget."""
  fixed = _fixed(space, vector)
  if cost(fixed.low) > asked:
    return None
  low, high = (_floats(x) for x in unit_range(fixed))
  unit, structure = jax.tree.flatten(_floats(_unit_of(fixed, vector)))
  ends = [np.array(jax.tree.leaves(x)) for x in (low, high)]
  ray = lambda t: np.clip((1 - t) * np.array(unit), *ends)
  return _on_ray(fixed, cost, asked, structure, ray, (0.0, 1.0))


def _unit_of(space: Space, vector: PruningVector) -> PruningVector:
  return jax.tree.map(lambda x, high: x / (high or 1), vector, space.high)


def _raised(space: Space, vector: PruningVector) -> list[PruningVector]:
  """The vectors with one more block in one stage, or the next side."""
  found = [
    vector._replace(depths={**vector.depths, stage: depth + 1})
    for stage, depth in vector.depths.items()
    if depth < space.ladders.depths[stage][-1]
  ]
  sides, structure = jax.tree.flatten(vector.side)
  for k, side in enumerate(sides):
    larger = [n for n in space.sides if n > side][:1]
    raised = [[*sides[:k], n, *sides[k + 1 :]] for n in larger]
    found += [vector._replace(side=structure.unflatten(x)) for x in raised]
  return found


def _nearest(
  found: list[PruningVector], cost: Coster, asked: float, tolerance: float
) -> PruningVector:
  """The vector of the largest cost; refuses one that is too small."""
  best = max(found, key=cost)
  if cost(best) < asked * (1 - tolerance):
    raise ValueError(
      f'No network within {tolerance:.1%} below the cost {asked:.0f} was '
      f'found: the nearest has {cost(best):.0f}. Allow a larger tolerance or '
      f'finer steps (`round_to`).'
    )
  return best


def _floats(vector: Any) -> Any:
  return jax.tree.map(float, vector)


def _rounded_unit(space: Space, structure: Any, u: np.ndarray) -> PruningVector:
  """Returns the allowed vector of fractions given as one array [..., D]."""
  unit = structure.unflatten(np.moveaxis(u, -1, 0))
  scaled = jax.tree.map(lambda x, high: x * (high or 1), unit, space.high)
  return rounded(space, scaled)


def _slope(space: Space, cost: Coster, vector: PruningVector) -> np.ndarray:
  """The change of the cost with each fraction, between the rungs beside."""
  leaves, structure = jax.tree.flatten(vector)
  ladders = jax.tree.leaves(space.ladders)
  rows, spans = [], []
  for j, (value, ladder) in enumerate(zip(leaves, ladders, strict=True)):
    at = int(np.searchsorted(ladder, value))
    ends = ladder[max(at - 1, 0)], ladder[min(at + 1, len(ladder) - 1)]
    rows += [[*leaves[:j], end, *leaves[j + 1 :]] for end in ends]
    spans.append((ends[1] - ends[0]) / (ladder[-1] or 1))
  found = np.asarray(cost(structure.unflatten(list(np.array(rows).T))), float)
  change = found[1::2] - found[::2]
  return change / np.where(np.array(spans) > 0, spans, 1.0)


def _on_ray(
  space: Space,
  cost: Coster,
  asked: float,
  structure: Any,
  ray: Callable[[float], np.ndarray],
  ends: tuple[float, float],
) -> PruningVector:
  """The first vector on a ray that fits the budget, filled up to it."""
  least, most = ends
  for _ in range(4):  # The cost falls along the ray: 32 points at a time.
    points = np.linspace(least, most, 33)
    at = np.stack([ray(t) for t in points])
    fits = np.asarray(cost(_rounded_unit(space, structure, at))) <= asked
    first = int(np.argmax(fits))
    least, most = points[max(first - 1, 0)], points[first]
  exact = ray(most) * np.array(
    [high or 1 for high in jax.tree.leaves(space.high)], float
  )
  values = jax.tree.leaves(_rounded_unit(space, structure, ray(most)))
  values = _fill(space, cost, structure, np.array(values), exact, asked)
  return structure.unflatten([int(x) for x in values])


def _fill(
  space: Space,
  cost: Coster,
  structure: Any,
  values: np.ndarray,
  exact: np.ndarray,
  asked: float,
) -> np.ndarray:
  """Steps up, one coordinate at a time, then swaps, while the budget holds."""
  ladders = jax.tree.leaves(space.ladders)
  at = np.array(
    [np.searchsorted(x, v) for x, v in zip(ladders, values, strict=True)]
  )
  last = np.array([len(ladder) - 1 for ladder in ladders])
  of = lambda rungs: np.stack(
    [x[rungs[:, j]] for j, x in enumerate(ladders)], axis=1
  )
  price = lambda rungs: np.asarray(cost(structure.unflatten(list(of(rungs).T))))
  scale = np.array([ladder[-1] or 1 for ladder in ladders], float)
  ups = np.eye(len(ladders), dtype=int)
  while True:
    rungs = (at + ups)[at < last]
    if not len(rungs):
      return of(at[None])[0]
    rungs = rungs[price(rungs) <= asked]
    if not len(rungs):
      break
    lost = ((exact - of(rungs)) / scale * (rungs != at)).sum(axis=1)
    at = rungs[np.argmax(lost)]
  # Two coordinates at once, a few steps up or down, while that comes nearer.
  swaps = _pairs(len(ladders))
  for _ in range(8):
    rungs = at + swaps
    rungs = rungs[((rungs >= 0) & (rungs <= last)).all(axis=1)]
    found = np.where((prices := price(rungs)) <= asked, prices, -1)
    if found.max() <= price(at[None])[0]:
      break
    at = rungs[np.argmax(found)]
  return of(at[None])[0]


def _pairs(count: int, reach: int = 3) -> np.ndarray:
  """Steps of up to two coordinates, int[moves, coordinates]."""
  steps = np.arange(-reach, reach + 1)
  moves = []
  for i in range(count):
    for j in range(i + 1, count):
      pair = np.zeros((steps.size**2, count), int)
      pair[:, i], pair[:, j] = (x.ravel() for x in np.meshgrid(steps, steps))
      moves.append(pair)
  alone = steps[:, None] * np.eye(count, dtype=int)[:1]
  return np.concatenate([alone, *moves])
