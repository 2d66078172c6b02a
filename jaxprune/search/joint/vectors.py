"""Pruning vectors and what each of their coordinates may be."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks, plans, tree
from jaxprune.checks import kinds
from jaxprune.numerics import counts
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.queries import stages as chain

FORMAT = 2
READABLE = (1, 2)  # Format 1 knew of one side alone.
INPUT = 'input'  # The stage that images enter.


class PruningVector(NamedTuple):
  """How much of a network is kept; a pytree of numbers.

  Attributes:
    widths: group -> units that stay.
    depths: stage -> blocks that stay, of those that can go.
    side: of the images that come in; None where it is not searched. Of each
      stage where stages have sides of their own: 'input' for the images, and
      the name of a cut for what follows it, which works as at images of that
      side.
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
    cuts: where the side may change on the way: name -> path of the leaf before
      whose first use it does, in order.
  """

  graph: Graph
  ladders: PruningVector
  stages: dict[str, tuple[str, ...]]
  graphs: tuple[Graph, ...]
  cuts: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
    if self.ladders.side is None:
      return ()
    ladders = jax.tree.leaves(self.ladders.side)
    return tuple(sorted({int(n) for ladder in ladders for n in ladder}))


@kinds.checked
def space(
  graph: Graph,
  *args: Any,
  keep: tree.Rules | None = None,
  round_to: int = 1,
  sides: Sequence[int] = (),
  stages: Mapping[str, Sequence[str]] | None = None,
  cuts: Mapping[str, str] | None = None,
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
    cuts: where the side may change on the way, in order: a name -> a regular
      expression over leaves, as :func:`jaxprune.structure.cut` takes it, such
      as ``{'stage2': '.*stage2_block1/.*'}``. Each part of the network then
      has a side of its own, one of ``sides``; features are resized where two
      differ. For functions of the params and images alone.

  Raises:
    ValueError: if ``round_to`` is below 1, a rule matches nothing or leaves
      nothing, a block is unknown or in two stages, the function is not the
      same network at every side, or it cannot be cut.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 8)), 'b': jnp.ones((8, 1))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> space(graph, round_to=4).ladders.widths
    {'a': array([4, 8])}
  """
  checks.whole('round_to', round_to, 1)
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
  cuts = dict(cuts or {})
  if cuts:
    first = chain.first_read(graph, list(cuts.values()))
    cuts = dict(zip(cuts, first, strict=True))
    graph = _in_parts(graph, cuts, sides)
  graphs = _at_sides(graph, args, sides) if len(sides) else (graph,)
  side: Any = np.array(sorted(sides)) if len(sides) else None
  if cuts:
    side = dict.fromkeys((INPUT, *cuts), side)
  return Space(graph, PruningVector(widths, depths, side), found, graphs, cuts)


@kinds.checked
def restrict(
  full: Space,
  *,
  widths: bool = False,
  depths: bool = False,
  side: bool = False,
) -> Space:
  """Returns the space in which only some dimensions vary; the rest is whole.

  Args:
    full: a space.
    widths: whether widths vary.
    depths: whether depths vary.
    side: whether the side varies.
  """
  ladders = full.ladders._asdict()
  for name, varies in (('widths', widths), ('depths', depths), ('side', side)):
    if not varies:
      ladders[name] = jax.tree.map(lambda x: x[-1:], ladders[name])
  graphs = full.graphs if side else full.graphs[-1:]
  return dataclasses.replace(
    full, ladders=PruningVector(**ladders), graphs=graphs
  )


@kinds.checked
def parts(space: Space) -> tuple[str, ...]:
  """Returns the names of the parts that have sides of their own, in order."""
  return (INPUT, *space.cuts) if space.cuts else ()


def _in_parts(
  graph: Graph, cuts: Mapping[str, str], sides: Sequence[int]
) -> Graph:
  """The graph of the same function with its cuts marked."""
  taken = {INPUT, *graph.groups, *graph.blocks} & {*cuts}
  if taken or not len(sides):
    raise ValueError(
      f'Cuts need the sides that are allowed, and names other than {INPUT!r} '
      f'and those of groups and blocks, got {list(cuts)} and sides '
      f'{tuple(sides)}.'
    )
  at = list(cuts.values())
  seen: set[str] = set()
  for name, own in zip((INPUT, *cuts), chain.leaves_of(graph, at), strict=True):
    both = sorted(seen & own)
    if both:
      raise ValueError(
        f'The part {name!r} reads {both[0]!r}, as one before it does: only '
        f'parts with params of their own have sides of their own.'
      )
    seen |= own
  found = graph.refit(chain.resized(graph, at), *graph.args)
  assert found.fingerprint == graph.fingerprint
  return found


def _least(name: str, least: float | int, size: int) -> int:
  number = counts.least(size, least) if isinstance(least, float) else least
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


@kinds.checked
def to_unit(space: Space, vector: PruningVector) -> PruningVector:
  """Returns a vector in units of the largest network, each in [0, 1]."""
  return jax.tree.map(
    lambda x, high: x / jnp.float32(high or 1), vector, space.high
  )


@kinds.checked
def from_unit(space: Space, unit: PruningVector) -> PruningVector:
  """Returns the vector, allowed values, of fractions of the largest network.

  Args:
    space: the space.
    unit: float arrays of any shape, traced or not.
  """
  scaled = jax.tree.map(lambda u, high: u * (high or 1), unit, space.high)
  return rounded(space, scaled)


@kinds.checked
def unit_range(space: Space) -> tuple[PruningVector, PruningVector]:
  """Returns the least and the largest fractions, float32."""
  return to_unit(space, space.low), to_unit(space, space.high)


def check(space: Space, vector: PruningVector) -> None:
  """Raises ValueError unless a vector has the coordinates of the space."""
  own, given = ([*tree.leaves(x)] for x in (space.ladders, vector))
  if own != given:
    lacks = ', '.join(repr(name) for name in own if name not in given)
    more = ', '.join(repr(name) for name in given if name not in own)
    raise ValueError(
      f'The vector is not of this space: it lacks {lacks or "nothing"}, and '
      f'the space has no {more or "other"}.'
    )


@kinds.checked
def rounded(space: Space, vector: PruningVector) -> PruningVector:
  """Returns the nearest allowed value of every coordinate.

  Args:
    space: the space.
    vector: numbers, or arrays of any shape, of NumPy or traced.

  Returns:
    Python ints, int64 or int32 arrays of the same shapes.

  Raises:
    ValueError: if the vector has other coordinates than the space, or one that
      is NaN or infinite (a traced one cannot be told: it is the smallest).
  """
  check(space, vector)
  odd = [
    f'{path} = {np.asarray(x).tolist()}'
    for path, x in tree.leaves(vector).items()
    if checks.is_static(x) and not np.isfinite(x).all()
  ]
  if odd:
    raise ValueError(
      f'A pruning vector holds finite numbers, got {", ".join(odd)}; a loss '
      'that is not finite makes such a gradient.'
    )

  def nearest(x: Any, ladder: np.ndarray) -> Any:
    middles = (ladder[1:] + ladder[:-1]) / 2
    if isinstance(x, jax.Array):
      spread = middles.astype(np.float32).reshape((1,) * x.ndim + (-1,))
      index = jnp.sum(x[..., None] > spread, axis=-1)
      return jnp.asarray(ladder.astype(np.int32))[index]
    value = ladder[np.searchsorted(middles, x)]
    return value if np.ndim(x) else int(value)

  return jax.tree.map(nearest, vector, space.ladders)


@kinds.checked
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

  Raises:
    ValueError: as :func:`rounded`.
  """
  check(space, vector)
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


@kinds.checked
def plan(space: Space, vector: PruningVector) -> plans.Plan:
  """Returns the one plan that a vector stands for.

  Args:
    space: the space.
    vector: numbers; each is rounded to an allowed value.

  Raises:
    ValueError: as :func:`rounded`.
  """
  vector = rounded(space, jax.tree.map(float, vector))
  dropped = [
    block
    for stage, names in space.stages.items()
    for block in names[vector.depths[stage] :]
  ]
  first = vector.side[INPUT] if space.cuts else vector.side
  whole = not space.sides or first == space.graphs[-1].args[0].shape[1]
  resolution = None if whole else (first, first)
  resized = [
    (cut, (vector.side[name], vector.side[name]))
    for name, cut in space.cuts.items()
  ]
  return plans.from_widths(
    space.graph,
    vector.widths,
    dropped=dropped,
    resolution=resolution,
    resized=resized,
  )


@kinds.checked
def to_json(vector: PruningVector) -> str:
  """Returns a vector of numbers as JSON, one coordinate a line.

  Raises:
    ValueError: naming every coordinate that is NaN or infinite.

  Examples:
    >>> print(to_json(PruningVector({'a': 3}, {}, 28)))
    {
     "version": 2,
     "widths": {
      "a": 3
     },
     "depths": {},
     "side": 28
    }
  """
  plain = jax.tree.map(lambda x: x.item() if hasattr(x, 'item') else x, vector)
  return checks.dumps({'version': FORMAT, **plain._asdict()}, indent=1)


@kinds.checked
def from_json(text: str) -> PruningVector:
  """Returns the vector that :func:`to_json` wrote.

  Raises:
    ValueError: if it is none, or of a format that this version does not know.
  """
  try:
    data = checks.loads(text)
    version = data.pop('version')
    vector = PruningVector(**data)
    sound = isinstance(vector.widths, dict) and isinstance(vector.depths, dict)
    sound &= all(_is_number(x) for x in jax.tree.leaves(vector))
  except (ValueError, KeyError, TypeError, AttributeError):
    sound, version, vector = False, FORMAT, PruningVector({}, {})
  if not sound:
    raise ValueError(
      'This is no pruning vector: a JSON object with "version", "widths", '
      '"depths" and "side" is.'
    )
  if type(version) is not int or version not in READABLE:
    raise ValueError(
      f'The pruning vector has format {version}, this version of jaxprune '
      f'reads formats {" and ".join(map(str, READABLE))}.'
    )
  return vector


def _is_number(x: Any) -> bool:
  plain = isinstance(x, int | float) and not isinstance(x, bool)
  return plain and bool(np.isfinite(x))
