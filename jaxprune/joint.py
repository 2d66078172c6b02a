"""JointPruning: channels, depth and resolution as one vector of numbers.

A :class:`PruningVector` says how many units each group keeps, how many blocks
each stage, and at what side images come in; a :class:`Space` what each of them
may be. From a vector follow masks for the supernet (:func:`masks`), its exact
cost without a run (:func:`coster`), and one plan (:func:`plan`): the first
units of each group, the first blocks of each stage. Losses of vectors move it,
by :mod:`jaxprune.estimator`, and :func:`project` ends on the budget.

  space = joint.space(graph, images, sides=(20, 24, 28))
  cost = joint.coster(space)
  u = joint.to_unit(space, joint.uniform(space, cost, 0.25))
  losses = joint.objective(space, loss, cost, 0.25)
  gradient, state = estimator.update(losses, state, u)
  small = joint.plan(space, joint.project(space, cost, 0.25, u))

References:
  Liu et al. (2020), Joint Multi-Dimension Pruning via Numerical Gradient
  Update, arXiv:2005.08931. The vector, its direct optimisation and the three
  dimensions are the paper's; the form of estimate, penalty and projection ours.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import cost as costs
from jaxprune import plans, tree
from jaxprune.structure import axes as ax
from jaxprune.structure import canvas
from jaxprune.structure.graph import Graph

FORMAT = 1
Penalty = Literal['hinge', 'two_sided', 'none']
Coster = Callable[['PruningVector'], Any]  # A vector, or many -> its cost.


class PruningVector(NamedTuple):
  """How much of a network is kept; a pytree of numbers.

  Attributes:
    widths: group -> units that stay.
    depths: stage -> blocks that stay, of those that can go.
    side: of the images that come in; None where it is not searched.
  """

  widths: dict[str, Any]
  depths: dict[str, Any]
  side: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
  """What each coordinate of a vector may be; made by :func:`space`.

  Attributes:
    graph: of the network, at the largest side.
    ladders: a vector of int arrays, the values allowed, ascending.
    stages: stage -> its blocks in order; the first ones stay.
    graphs: of the network at each side; the one graph if none is searched.
  """

  graph: Graph
  ladders: PruningVector
  stages: dict[str, tuple[str, ...]]
  graphs: tuple[Graph, ...]

  @property
  def low(self) -> PruningVector:
    """The smallest network."""
    return jax.tree.map(lambda ladder: int(ladder[0]), self.ladders)

  @property
  def high(self) -> PruningVector:
    """The largest network."""
    return jax.tree.map(lambda ladder: int(ladder[-1]), self.ladders)

  @property
  def sides(self) -> tuple[int, ...]:
    """The sides that are allowed; none where they are not searched."""
    ladder = self.ladders.side
    return () if ladder is None else tuple(int(n) for n in ladder)


def space(
  graph: Graph,
  *args: Any,
  keep: tree.Rules | None = None,
  round_to: int = 1,
  sides: Sequence[int] = (),
  stages: Mapping[str, Sequence[str]] | None = None,
) -> Space:
  """Returns the vectors that a network can be pruned to.

  Groups and blocks are those of the trace, so that what a residual sum ties is
  one coordinate. A stage is what adds to one residual stream.

  Args:
    graph: of ``fn(params, images, ...)`` for sides, else of any function.
    *args: its other arguments, arrays or shapes, for sides.
    keep: rules over names of groups and stages -> the least that stays: a
      fraction (float) or a number (int). Else one unit, and no block.
    round_to: widths are multiples of it, or the whole group.
    sides: square sides of images that are allowed, of which the largest is
      that of the images in ``args``.
    stages: stage -> names of blocks in order, in place of those found.

  Raises:
    ValueError: if ``round_to`` is below 1, a rule matches nothing or leaves
      nothing, a block is unknown or in two stages, or the function is not the
      same network at every side.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 8)), 'b': jnp.ones((8, 1))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> space(graph, round_to=4).ladders.widths
    {'a': array([4, 8])}
  """
  if round_to < 1:
    raise ValueError(f'`round_to` must be at least 1, got {round_to}.')
  found = _stages(graph) if stages is None else _given_stages(graph, stages)
  both = set(found) & set(graph.groups)
  if both:
    raise ValueError(f'A stage cannot have the name of a group: {both}.')
  least = tree.match(keep or {}, [*graph.groups, *found], 0)
  widths = {
    name: _ladder(name, group, least[name], round_to)
    for name, group in graph.groups.items()
  }
  depths = {}
  for name, blocks in found.items():
    first = _least(name, least[name], len(blocks))
    depths[name] = np.arange(first, len(blocks) + 1)
  graphs = _at_sides(graph, args, sides) if len(sides) else (graph,)
  side = np.array(sorted(sides)) if len(sides) else None
  return Space(graph, PruningVector(widths, depths, side), found, graphs)


def restrict(
  whole: Space,
  *,
  widths: bool = False,
  depths: bool = False,
  side: bool = False,
) -> Space:
  """Returns the space in which only some dimensions vary; the rest is whole.

  Args:
    whole: a space.
    widths: whether widths vary.
    depths: whether depths vary.
    side: whether the side varies.
  """
  ladders = whole.ladders._asdict()
  for name, varies in (('widths', widths), ('depths', depths), ('side', side)):
    if not varies:
      ladders[name] = jax.tree.map(lambda x: x[-1:], ladders[name])
  graphs = whole.graphs if side else whole.graphs[-1:]
  return dataclasses.replace(
    whole, ladders=PruningVector(**ladders), graphs=graphs
  )


def _least(name: str, least: float | int, size: int) -> int:
  number = int(np.ceil(least * size)) if isinstance(least, float) else least
  if not 0 <= number <= size:
    raise ValueError(f'{name!r} has {size} and cannot keep {number}.')
  return number


def _ladder(name: str, group: Any, least: float | int, step: int) -> np.ndarray:
  """The widths that are allowed: multiples, and the most there may be."""
  low = max(1, group.least, _least(name, least, group.size))
  step = int(np.lcm(step, group.round_to))
  widths = np.arange(1, group.size + 1)
  fits = (widths % step == 0) | (widths == group.size)
  widths = widths[fits & (widths >= low) & (widths <= group.most)]
  if not widths.size:
    raise ValueError(
      f'Group {name!r} of {group.size} units has no width from {low} to '
      f'{group.most} that is a multiple of {step}.'
    )
  return widths


def _stages(graph: Graph) -> dict[str, tuple[str, ...]]:
  """The blocks that add to one stream, by the first word of their names."""
  found: dict[Any, list[str]] = {}
  for name, block in graph.blocks.items():
    stream = tuple(ax.find(axis) for axis in block.result.axes)
    found.setdefault(stream, []).append(name)
  words = [{re.split('[/_]', name)[0] for name in names}
           for names in found.values()]  # fmt: skip
  stages = {}
  for names, own in zip(found.values(), words, strict=True):
    (word, *others) = own
    unique = sum(word in other for other in words) == 1
    taken = word in graph.groups or word in graph.blocks
    stages[names[0] if others or taken or not unique else word] = tuple(names)
  return stages


def _given_stages(
  graph: Graph, stages: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
  names = [name for blocks in stages.values() for name in blocks]
  unknown = [name for name in names if name not in graph.blocks]
  if unknown or len(set(names)) < len(names):
    raise ValueError(
      f'Stages must name each block at most once, of: '
      f'{", ".join(graph.blocks) or "none"}; got {names}.'
    )
  return {stage: tuple(blocks) for stage, blocks in stages.items()}


def _at_sides(
  graph: Graph, args: Sequence[Any], sides: Sequence[int]
) -> tuple[Graph, ...]:
  """The graph at every side; refuses a function that is another one there."""
  shape = np.shape(args[0]) if args else ()
  largest = max(sides)
  if len(shape) != 4 or shape[1:3] != (largest, largest) or min(sides) < 1:
    raise ValueError(
      f'Sides need the images that the function takes, of shape (batch, '
      f'{largest}, {largest}, channels), after the graph; got {shape}.'
    )
  name = getattr(graph.fn, '__name__', type(graph.fn).__name__)
  graphs = []
  for side in sorted(set(sides)):
    images, *rest = args
    images = jax.ShapeDtypeStruct(
      (shape[0], side, side, shape[3]), images.dtype
    )
    try:
      found = graph.retrace(images, *rest)
    except Exception as error:
      line = str(error).strip().splitlines()[0]
      raise ValueError(
        f'Function {name!r} does not take images of side {side}: {line} Its '
        f'parameters may have shapes that depend on it; leave `sides` out.'
      ) from error
    if found.fingerprint != graph.fingerprint or list(found.blocks) != list(
      graph.blocks
    ):
      raise ValueError(
        f'Function {name!r} has other groups at side {side} than at {largest}; '
        f'leave that side out.'
      )
    graphs.append(found)
  return tuple(graphs)


# --- Vectors -----------------------------------------------------------------


def to_unit(space: Space, vector: PruningVector) -> PruningVector:
  """Returns a vector in units of the largest network, each in [0, 1]."""
  return jax.tree.map(
    lambda x, high: x / jnp.float32(high or 1), vector, space.high
  )


def from_unit(space: Space, unit: PruningVector) -> PruningVector:
  """Returns the vector, allowed values, of fractions of the largest network.

  Args:
    space: the space.
    unit: float arrays of any shape, traced or not.
  """
  scaled = jax.tree.map(lambda u, high: u * (high or 1), unit, space.high)
  return rounded(space, scaled)


def unit_range(space: Space) -> tuple[PruningVector, PruningVector]:
  """Returns the least and the largest fractions, float32."""
  return to_unit(space, space.low), to_unit(space, space.high)


def rounded(space: Space, vector: PruningVector) -> PruningVector:
  """Returns the nearest allowed value of every coordinate.

  Args:
    space: the space.
    vector: numbers, or arrays of any shape, of NumPy or traced.

  Returns:
    Python ints, int64 or int32 arrays of the same shapes.
  """

  def nearest(x: Any, ladder: np.ndarray) -> Any:
    middles = (ladder[1:] + ladder[:-1]) / 2
    if isinstance(x, jax.Array):
      spread = middles.astype(np.float32).reshape((1,) * x.ndim + (-1,))
      index = jnp.sum(x[..., None] > spread, axis=-1)
      return jnp.asarray(ladder.astype(np.int32))[index]
    value = ladder[np.searchsorted(middles, x)]
    return value if np.ndim(x) else int(value)

  return jax.tree.map(nearest, vector, space.ladders)


def masks(
  space: Space, vector: PruningVector
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns which units and which blocks a vector keeps: the first ones.

  Args:
    space: the space.
    vector: allowed values, traced or not.

  Returns:
    (group -> bool[size], block -> bool[]), as the supernet takes them; what
    cannot change is left out.
  """
  units = {
    name: jnp.arange(space.graph.groups[name].size) < vector.widths[name]
    for name, ladder in space.ladders.widths.items()
    if ladder[0] < space.graph.groups[name].size
  }
  blocks = {
    block: jnp.asarray(i < vector.depths[stage])
    for stage, names in space.stages.items()
    for i, block in enumerate(names)
    if i >= space.ladders.depths[stage][0]
  }
  return units, blocks


def plan(space: Space, vector: PruningVector) -> plans.Plan:
  """Returns the one plan that a vector stands for.

  Args:
    space: the space.
    vector: numbers; each is rounded to an allowed value.
  """
  vector = rounded(space, jax.tree.map(float, vector))
  dropped = [
    block
    for stage, names in space.stages.items()
    for block in names[vector.depths[stage] :]
  ]
  side = vector.side
  whole = not space.sides or side == space.sides[-1]
  resolution = None if whole else (side, side)
  return plans.from_widths(
    space.graph, vector.widths, dropped=dropped, resolution=resolution
  )


def to_json(vector: PruningVector) -> str:
  """Returns a vector of numbers as JSON, one coordinate a line.

  Examples:
    >>> print(to_json(PruningVector({'a': 3}, {}, 28)))
    {
     "version": 1,
     "widths": {
      "a": 3
     },
     "depths": {},
     "side": 28
    }
  """
  plain = jax.tree.map(lambda x: x.item() if hasattr(x, 'item') else x, vector)
  return json.dumps({'version': FORMAT, **plain._asdict()}, indent=1)


def from_json(text: str) -> PruningVector:
  """Returns the vector that :func:`to_json` wrote.

  Raises:
    ValueError: if it is none, or of a format that this version does not know.
  """
  try:
    data = json.loads(text)
    version = data.pop('version')
    vector = PruningVector(**data)
    sound = isinstance(vector.widths, dict) and isinstance(vector.depths, dict)
  except (ValueError, KeyError, TypeError, AttributeError):
    sound, version, vector = False, FORMAT, PruningVector({}, {})
  if not sound:
    raise ValueError(
      'This is no pruning vector: a JSON object with "version", "widths", '
      '"depths" and "side" is.'
    )
  if version != FORMAT:
    raise ValueError(
      f'The pruning vector has format {version}, this version of jaxprune '
      f'reads format {FORMAT}.'
    )
  return vector


# --- Cost --------------------------------------------------------------------


def coster(
  space: Space,
  measure: Callable[[Graph], Any] = costs.macs_polynomial,
) -> Coster:
  """Returns the function from vectors to their cost, without a run.

  Args:
    space: the space.
    measure: graph -> a polynomial of :mod:`jaxprune.cost`, or a function of
      the values of its variables (a latency table's ``predict``); taken once at
      every side.

  Returns:
    A function of a vector of numbers (exact), of NumPy arrays (one exact result
    each), or of traced arrays (float32, differentiable in widths and depths).

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 2))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 3)))
    >>> coster(space(graph))(PruningVector({'a': 4}, {}))
    20
  """
  measured = []
  for graph in space.graphs:
    found = measure(graph)
    measured.append(
      found
      if callable(found)
      else lambda values, found=found: costs.evaluate(found, values)
    )

  def call(vector: PruningVector) -> Any:
    values = dict(vector.widths)
    for stage, names in space.stages.items():
      for i, block in enumerate(names):
        values[block] = _open(vector.depths[stage], i)
    if len(measured) == 1:
      return measured[0](values)
    ladder = space.ladders.side
    if isinstance(vector.side, jax.Array):
      found = [jnp.asarray(m(values), jnp.float32) for m in measured]
      # Indices of the sides, 0, 1, ..: costs between two are interpolated.
      at = [
        jnp.maximum(0, 1 - jnp.abs(_rung(vector.side, ladder) - k))
        for k in range(len(found))
      ]
      return sum(a * f for a, f in zip(at, found, strict=True))
    which = np.searchsorted(ladder, vector.side)
    if not np.ndim(which):
      return measured[int(which)](values)
    total: Any = None
    for k, one in enumerate(measured):
      rows = which == k
      if rows.any():
        part = one({n: np.broadcast_to(v, rows.shape)[rows]
                    for n, v in values.items()})  # fmt: skip
        total = np.zeros(rows.shape, part.dtype) if total is None else total
        total[rows] = part
    return total

  return call


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


def penalty(cost: Any, limit: float, kind: Penalty = 'hinge') -> jax.Array:
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


# --- Onto the budget ---------------------------------------------------------


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
  whole = cost(PruningVector(
    {name: group.size for name, group in space.graph.groups.items()},
    {stage: len(names) for stage, names in space.stages.items()},
    space.high.side,
  ))  # fmt: skip
  if isinstance(target, float) and not 0 < target <= 1:
    raise ValueError(
      f'A target as a fraction must lie in (0, 1], got {target}; a cost is an '
      f'int.'
    )
  asked = target * whole if isinstance(target, float) else float(target)
  _check_range(space, cost, asked, whole)
  return asked


def _check_range(
  space: Space, cost: Coster, asked: float, whole: float
) -> None:
  least, most = cost(space.low), cost(space.high)
  nearest = least if asked < least else most if asked > most else None
  if nearest is not None:
    raise ValueError(
      f'The ranges hold no network of cost {asked:.0f}: the nearest has '
      f'{nearest:.0f} ({nearest / whole:.1%} of the whole). Ask for that, or '
      f'widen the ranges.'
    )


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
      tolerance was found; with the nearest reachable cost.
  """
  flat, structure = jax.tree.flatten(jax.tree.map(float, unit))
  u, low, high = (
    np.array(jax.tree.leaves(x), float)
    for x in (structure.unflatten(flat), *map(_floats, unit_range(space)))
  )
  direction = _slope(space, cost, rounded_unit(space, structure, u))
  direction = np.maximum(direction / (direction.max() or 1.0), 0.05)
  ray = lambda t: np.clip(u - t * direction, low, high)
  asked = limit(space, cost, target)
  return _meet(space, cost, asked, structure, ray, tolerance)


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
    ValueError: as :func:`project`.
  """
  start = space.high if start is None else start
  ladders = space.ladders._replace(
    depths={name: np.array([n]) for name, n in start.depths.items()},
    side=None if space.ladders.side is None else np.array([start.side]),
  )
  fixed = dataclasses.replace(space, ladders=ladders)
  if start.side is not None:
    which = space.sides.index(start.side)
    fixed = dataclasses.replace(fixed, graphs=space.graphs[which : which + 1])
  structure = jax.tree.structure(fixed.high)
  asked = limit(space, cost, target)
  _check_range(fixed, cost, asked, cost(space.high))
  low, high = (
    np.array(jax.tree.leaves(_floats(x)), float) for x in unit_range(fixed)
  )
  ray = lambda t: np.clip((1 - t) / 2 * np.ones_like(low), low, high)
  return _meet(fixed, cost, asked, structure, ray, tolerance, ends=(-1.0, 1.0))


def _floats(vector: Any) -> Any:
  return jax.tree.map(float, vector)


def rounded_unit(space: Space, structure: Any, u: np.ndarray) -> PruningVector:
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


def _meet(
  space: Space,
  cost: Coster,
  asked: float,
  structure: Any,
  ray: Callable[[float], np.ndarray],
  tolerance: float,
  ends: tuple[float, float] = (-20.0, 20.0),
) -> PruningVector:
  """The vector on a ray that meets the target, filled up to it."""
  least, most = ends
  for _ in range(50):
    middle = (least + most) / 2
    fits = cost(rounded_unit(space, structure, ray(middle))) <= asked
    least, most = (least, middle) if fits else (middle, most)
  exact = ray(most) * np.array(
    [high or 1 for high in jax.tree.leaves(space.high)], float
  )
  values = jax.tree.leaves(rounded_unit(space, structure, ray(most)))
  values = _fill(space, cost, structure, np.array(values), exact, asked)
  vector = structure.unflatten([int(x) for x in values])
  reached = cost(vector)
  if not asked * (1 - tolerance) <= reached <= asked:
    raise ValueError(
      f'No network within {tolerance:.1%} below the cost {asked:.0f} was '
      f'found: the nearest has {reached:.0f}. Allow a larger tolerance or '
      f'finer steps (`round_to`).'
    )
  return vector


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
  # One up and another one down, where that comes nearer.
  swaps = np.concatenate(
    [ups[:, None] - ups[None], 2 * ups[:, None] - ups[None]]
  )
  swaps = swaps.reshape(-1, len(ladders))
  for _ in range(8):
    rungs = at + swaps
    rungs = rungs[((rungs >= 0) & (rungs <= last)).all(axis=1)]
    found = price(rungs) if len(rungs) else np.zeros(0)
    fits = found <= asked
    if not fits.any() or found[fits].max() <= price(at[None])[0]:
      break
    at = rungs[np.argmax(np.where(fits, found, -1))]
  return of(at[None])[0]


# --- The supernet ------------------------------------------------------------


def supernet(space: Space, *, on_canvas: bool = False) -> Callable[..., Any]:
  """Returns the network under a vector that may be traced.

  Args:
    space: the space, of ``fn(params, *args)``.
    on_canvas: whether the side is traced too. Then images come at the largest
      side, are resized to that of the vector in the corner of a canvas, and
      everything works on that corner alone: one compile for all sides, at the
      cost of the largest. Without it images come at the side of the vector
      (see :func:`jaxprune.structure.canvas.resize`), one compile for each.

  Returns:
    ``call(params, vector, *args)``; a pure function for jit, grad, and vmap
    over vectors, under which the weights stay one.

  Raises:
    ValueError: when called, if the network has no canvas; it names the
      operation.
  """
  net = plans.supernet(space.graph)

  def call(params: Any, vector: PruningVector, *args: Any) -> Any:
    return net(params, *masks(space, vector), *args)

  if not on_canvas or not space.sides:
    return call
  fitted: dict[Any, Any] = {}

  def on_any(
    params: Any, vector: PruningVector, images: Any, *args: Any
  ) -> Any:
    switches = masks(space, vector)
    leaves, structure = jax.tree.flatten((params, switches, images, args))
    specs = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in leaves]
    key = structure, tuple(specs)
    if key not in fitted:
      given, (units, blocks), image, rest = structure.unflatten(specs)
      at = lambda side: jax.ShapeDtypeStruct(
        (image.shape[0], side, side, image.shape[3]), image.dtype
      )
      fitted[key] = canvas.on_canvas(
        net, [(given, units, blocks, at(s), *rest) for s in space.sides]
      )
    side = jnp.asarray(vector.side, jnp.int32)
    index = jnp.sum(side > jnp.asarray(space.sides, jnp.int32))
    small = canvas.resize(images, side, space.sides[-1])
    return fitted[key](index, params, *switches, small, *args)

  return on_any
