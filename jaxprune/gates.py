"""Learnable gates: neurons, filters, layers and blocks in one objective.

Every gate is a number theta that training moves beside the weights. At each
forward pass it says whether its unit is open, and by what its output is
multiplied; the loss has the expected cost of what is open in it::

  loss = task(scaled params, batch) + strength * remaining cost

so that weights and gates are pruned while they learn, in one optax chain::

  values = gates.evaluate(p['gates'], structure)
  seen = scale(p['params'], values.units, values.blocks)
  rho = gates.remaining(values, structure, cost)
  loss = task(seen, batch) + gates.penalty(rho, strength, target=0.2)

The structure is plain data and the network has no gate layers. ``scale`` (that
of :mod:`jaxprune.structure`) multiplies the gates of units into the rows of the
kernels that read them and the gates of blocks into the leaves that close them:
each acts at one place of every path, where it is also folded in the end.

Four granularities: a *unit* is a neuron or a filter; a *layer* is a branch that
stands beside others and ends in groups of its own (an inception module), or a
sequential layer behind a :func:`bypass`; a *block* is a residual branch. Gates
nest: a unit works if it is open and all that it lies in.

References:
  Haider and Taj (2020), arXiv:2010.02623: the four granularities, learned
  scaling factors, one objective and pruning at every forward pass are theirs
  (abstract); every formula here is ours.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune import tree

Cost = Callable[[Mapping[str, Any]], Any]  # Widths and open blocks -> cost.
Scalars = Mapping[str, jax.Array]


class Structure(NamedTuple):
  """What can close, as data.

  Attributes:
    units: group -> its number of units.
    layers: layer -> the groups in which a parallel branch ends, whose units
      its gate multiplies; none for a layer whose gate the function takes.
    blocks: names of the residual branches.
    inside: layer -> the other groups that nothing reads once it is closed.
    rivals: sets of layers, or of blocks, of which one has to stay open.
  """

  units: Mapping[str, int]
  layers: Mapping[str, tuple[str, ...]] = {}
  blocks: tuple[str, ...] = ()
  inside: Mapping[str, tuple[str, ...]] = {}
  rivals: tuple[tuple[str, ...], ...] = ()


class Gates(NamedTuple):
  """The trained numbers theta; what is absent is open and not trained."""

  units: Mapping[str, jax.Array]  # Group -> float32[units].
  layers: Mapping[str, jax.Array] = {}  # float32[] each.
  blocks: Mapping[str, jax.Array] = {}


class Values(NamedTuple):
  """What the gates say at one forward pass.

  Factors are of what has a gate. ``open`` is exactly 1 or 0, with the
  derivative that its gate function gives.
  """

  units: Mapping[str, jax.Array]  # Group -> factor of each unit; float32[n].
  layers: Scalars  # Layer -> factor; in `units` already where it ends in some.
  blocks: Scalars  # Block -> factor.
  open: Gates  # float32 of 0 and 1, for every name of the structure.


class Function(NamedTuple):
  """A gate function.

  Attributes:
    open: theta -> 1 where open, else 0, with a derivative.
    value: (theta, open) -> the factor.
  """

  open: Callable[[jax.Array], jax.Array]
  value: Callable[[jax.Array, jax.Array], jax.Array]


def _lift(x: jax.Array) -> jax.Array:
  """Returns 0 with the derivative of x."""
  return x - lax.stop_gradient(x)


def scale(dead_zone: float = 0.05) -> Function:
  """Returns the gate that is a scaling factor with a dead zone.

  g = theta where |theta| > dead_zone, else 0, with dg/dtheta = 1 everywhere: a
  closed gate still learns, and may open again. The derivative of ``open`` is
  that of |theta|.

  Args:
    dead_zone: at least 0; static.

  Raises:
    ValueError: if ``dead_zone`` is negative.

  Examples:
    >>> gate, theta = scale(0.1), jnp.array([0.7, 0.05])
    >>> print(gate.value(theta, gate.open(theta)))
    [0.7 0. ]
  """
  if not dead_zone >= 0:
    raise ValueError(f'`dead_zone` must be at least 0, got {dead_zone}.')

  def is_open(theta):
    size = jnp.abs(theta)
    return (size > dead_zone).astype(theta.dtype) + _lift(size)

  def value(theta, is_open):
    hard = lax.stop_gradient(is_open)
    return theta * hard + _lift(theta) * (1 - hard)

  return Function(is_open, value)


def binary() -> Function:
  """Returns the gate that is 1 where sigmoid(theta) >= 1/2, else 0.

  The derivative is that of the sigmoid. There is nothing to fold.

  References:
    Bengio et al. (2013), arXiv:1308.3432.

  Examples:
    >>> gate, theta = binary(), jnp.array([2.0, -2.0])
    >>> print(gate.value(theta, gate.open(theta)))
    [1. 0.]
  """
  hard = lambda theta: (theta >= 0).astype(theta.dtype)
  soft = jax.nn.sigmoid
  return Function(
    lambda theta: hard(theta) + _lift(soft(theta)), lambda _, is_open: is_open
  )


def sharp(beta: float | jax.Array) -> Function:
  """Returns the gate sigmoid(beta theta), which hardens as beta grows.

  Open where theta >= 0, with the derivative of the sigmoid: finish with
  :func:`binary`, which is its limit.

  Args:
    beta: inverse temperature, from 1 to 100 or so in the course of training;
      static or traced.

  Examples:
    >>> gate, theta = sharp(100.0), jnp.array([0.0, 2.0])
    >>> print(gate.value(theta, gate.open(theta)))
    [0.5 1. ]
  """
  soft = lambda theta: jax.nn.sigmoid(beta * theta)
  hard = lambda theta: (theta >= 0).astype(theta.dtype)
  return Function(
    lambda theta: hard(theta) + _lift(soft(theta)),
    lambda theta, _: soft(theta),
  )


def init(
  structure: Structure,
  start: float = 1.0,
  *,
  gated: Collection[str] | None = None,
) -> Gates:
  """Returns gates for what is in a structure, all alike.

  Args:
    structure: what can close.
    start: theta at first: 1 for :func:`scale`, at which the network computes
      what it does without gates; about 2 for :func:`binary`.
    gated: names of the groups, layers and blocks to gate; all by default. A
      group that no kernel reads (``graph.unread``) has no place for gates.

  Raises:
    ValueError: if the structure contradicts itself or lacks a name.

  Examples:
    >>> print(init(Structure({'conv1': 2})).units['conv1'])
    [1. 1.]
  """
  _check(structure)
  names = _names(structure)
  chosen = set(names if gated is None else gated)
  if unknown := sorted(chosen - set(names)):
    raise ValueError(
      f'`gated` has {", ".join(map(repr, unknown))}, which the structure does '
      f'not; it has: {", ".join(names)}.'
    )
  full = lambda shape: jnp.full(shape, start, jnp.float32)
  scalars = lambda some: {name: full(()) for name in some if name in chosen}
  return Gates(
    {n: full(size) for n, size in structure.units.items() if n in chosen},
    scalars(structure.layers),
    scalars(structure.blocks),
  )


def evaluate(
  gates: Gates, structure: Structure, function: Function | None = None
) -> Values:
  """Returns what the gates say: the factors, and what is open.

  The factor of a unit is its own times those of the layers that end in its
  group. The last open unit of a group cannot close, nor the last open rival:
  where all would, the one of largest theta stays, and has no part in the cost.

  Args:
    gates: theta; what is absent is open, and has no factor.
    structure: what can close.
    function: the gate function; :func:`scale` by default.

  Raises:
    ValueError: if the structure contradicts itself, if a gate is not in it, or
      if one has another shape.

  Examples:
    >>> theta = Gates({'conv1': jnp.array([0.5, 0.0])})
    >>> values = jax.jit(lambda g: evaluate(g, Structure({'conv1': 2})))(theta)
    >>> print(values.units['conv1'], values.open.units['conv1'])
    [0.5 0. ] [1. 0.]
  """
  function = function or scale()
  _check(structure)
  _check_gates(gates, structure)
  ones = lambda size: jnp.ones(size, jnp.float32)
  whole = {name: ones(size) for name, size in structure.units.items()}
  opened = {n: _hold(t, function.open(t)) for n, t in gates.units.items()}
  units = {n: function.value(t, opened[n]) for n, t in gates.units.items()}

  theta = {**gates.layers, **gates.blocks}
  is_open = {n: function.open(t) for n, t in theta.items()}
  for rivals in structure.rivals:
    if set(rivals) <= theta.keys():
      held = _hold(
        jnp.stack([theta[name] for name in rivals]),
        jnp.stack([is_open[name] for name in rivals]),
      )
      is_open |= dict(zip(rivals, held, strict=True))
  value: Scalars = {n: function.value(t, is_open[n]) for n, t in theta.items()}

  for layer, groups in structure.layers.items():
    if layer in value:
      own = {name: units.get(name, whole[name]) for name in groups}
      units |= {name: x * value[layer] for name, x in own.items()}
  scalars = lambda names: {name: is_open.get(name, ones(())) for name in names}
  return Values(
    units,
    {name: value[name] for name in gates.layers},
    {name: value[name] for name in gates.blocks},
    Gates(whole | opened, scalars(structure.layers), scalars(structure.blocks)),
  )


def widths(values: Values, structure: Structure) -> dict[str, jax.Array]:
  """Returns the variables of a cost: widths of groups, and what is open.

  The width of a group is the number of its open units, 0 where a layer that it
  ends or lies in is closed.

  Args:
    values: from :func:`evaluate`.
    structure: what can close.

  Returns:
    name -> float32[], for every group, layer and block.

  Examples:
    >>> s = Structure({'a': 2, 'b': 2}, layers={'branch': ('a',)})
    >>> theta = init(s)._replace(layers={'branch': jnp.float32(0)})
    >>> print(*jax.jit(lambda g: widths(evaluate(g, s), s))(theta).values())
    0.0 2.0 0.0
  """
  matrix = _variables(values, structure, _scalars(values, structure)[None])
  return dict(zip(_names(structure), matrix[0], strict=True))


def remaining(values: Values, structure: Structure, cost: Cost) -> jax.Array:
  """Returns the remaining part of a cost, in [0, 1], differentiable.

  rho = cost(what is open) / cost(everything), which is the count of the network
  that is left when the closed gates are cut out. Its derivative by ``open`` of
  a gate is what the cost loses with it, given all others: for a unit
  cost(width) - cost(width - 1), for a layer or block cost(open) -
  cost(closed). A gate that is held open, or whose layer is closed, has none.

  Args:
    values: from :func:`evaluate`.
    structure: what can close.
    cost: name -> number of every group, layer and block, to a number; a
      polynomial, as in ``functools.partial(evaluate, polynomial)`` of
      :mod:`jaxprune.cost`. It gets float32 vectors, one entry a case.

  References:
    Ours: the abstract of arXiv:2010.02623 gives no formula.

  Examples:
    >>> s = Structure({'a': 4})
    >>> rho = lambda theta: remaining(
    ...   evaluate(Gates({'a': theta}), s), s, lambda n: 10 * n['a']
    ... )
    >>> theta = jnp.array([1.0, 1.0, 0.5, 0.0])
    >>> print(*jax.jit(jax.value_and_grad(rho))(theta))
    0.75 [0.25 0.25 0.25 0.25]
  """
  names = _names(structure)
  groups, count = len(structure.units), len(names)
  opened = lax.stop_gradient(values.open)
  hard = values._replace(open=opened)
  now = _scalars(hard, structure)[None]
  eye = np.eye(count - groups, dtype=np.float32)
  scalars = jnp.concatenate(
    [jnp.tile(now, (1 + groups, 1)), jnp.maximum(now, eye), now * (1 - eye)]
  )
  table = _variables(hard, structure, scalars)
  fewer = np.zeros(table.shape, np.float32)
  fewer[np.arange(groups) + 1, np.arange(groups)] = 1
  table = jnp.maximum(table - fewer, 0)
  full = np.array([*structure.units.values(), *[1] * (count - groups)])
  table = jnp.concatenate([table, full.astype(np.float32)[None]])
  found = cost(dict(zip(names, table.T, strict=True)))
  found = jnp.broadcast_to(jnp.asarray(found, jnp.float32), len(table))
  units, rest = found[1 : groups + 1], found[groups + 1 : -1]
  lost = jnp.concatenate(
    [found[0] - units, rest[: len(eye)] - rest[len(eye) :]]
  )
  moved = jnp.stack(
    [
      *(_lift(jnp.sum(values.open.units[name])) for name in structure.units),
      *_lift(_scalars(values, structure)),
    ]
  )
  return (found[0] + jnp.sum(lost * moved)) / found[-1]


def penalty(
  rho: jax.Array,
  strength: float | jax.Array,
  target: float | jax.Array = 0.0,
) -> jax.Array:
  """Returns strength * max(0, rho - target).

  With a target it pushes only while the budget is exceeded, and holds it.

  Args:
    rho: from :func:`remaining`.
    strength: at least 0; static or traced, such as a ramp of the step.
    target: the part that may remain, in [0, 1]; static, or traced, such as
      one that falls in the course of training.

  Raises:
    ValueError: if a static ``target`` is out of range.

  Examples:
    >>> print(penalty(jnp.float32(0.75), 2.0, target=0.5))
    0.5
  """
  if isinstance(target, float | int) and not 0 <= target <= 1:
    raise ValueError(f'`target` must be in [0, 1], got {target}.')
  return strength * jnp.maximum(rho - target, 0)


def partition(
  weights: optax.GradientTransformation,
  gates: optax.GradientTransformation,
  low: float = 0.0,
  high: float = 1.5,
) -> optax.GradientTransformation:
  """Returns one optax transformation for ``{'params': ..., 'gates': ...}``.

  Weight decay on the gates would be a second penalty: leave it to ``weights``.

  Args:
    weights: for what is under ``params``.
    gates: for what is under ``gates``, which then stay in [low, high].
    low: 0 for :func:`scale`; ``-high`` for the gates with a sigmoid.
    high: above ``low``.

  Raises:
    ValueError: if ``low`` is not below ``high``.

  Examples:
    >>> tx = partition(optax.sgd(1.0), optax.sgd(1.0))
    >>> p = {'params': jnp.array(1.0), 'gates': jnp.array(1.0)}
    >>> gradient = {'params': 3.0, 'gates': 3.0}
    >>> updates, _ = tx.update(gradient, tx.init(p), p)
    >>> print(*optax.apply_updates(p, updates).values())
    0.0 -2.0
  """
  if not low < high:
    raise ValueError(f'Gates need low < high, got {low} and {high}.')

  def keep(updates: Any, params: Any = None) -> Any:
    if params is None:
      raise ValueError('partition needs `params`; pass it to update.')
    inside = lambda u, p: jnp.clip(p + u, low, high) - p
    return jax.tree.map(inside, updates, params)

  return optax.partition(
    {'params': weights, 'gates': optax.chain(gates, optax.stateless(keep))},
    {'params': 'params', 'gates': 'gates'},
  )


def masks(values: Values, structure: Structure) -> dict[str, np.ndarray]:
  """Returns the mask of each group, for a plan; not under jit.

  A unit is kept if it and every layer that its group ends or lies in are open:
  all False for a closed parallel branch.

  Args:
    values: from :func:`evaluate`, concrete.
    structure: what can close.

  Returns:
    group -> bool[size].

  Examples:
    >>> s = Structure({'a': 2})
    >>> masks(evaluate(Gates({'a': jnp.array([1.0, 0.0])}), s), s)
    {'a': array([ True, False])}
  """
  whole = {name: np.asarray(x) > 0 for name, x in values.open.units.items()}
  for layer, x in values.open.layers.items():
    if not float(x):
      for name in _reach(structure, layer):
        whole[name] = np.zeros_like(whole[name])
  return whole


def closed(scalars: Scalars) -> tuple[str, ...]:
  """Returns the names of the layers or blocks that are closed; not under jit.

  Args:
    scalars: ``values.open.layers`` or ``values.open.blocks``, concrete.

  Examples:
    >>> closed({'block1': jnp.float32(0), 'block2': jnp.float32(1)})
    ('block1',)
  """
  return tuple(name for name, x in scalars.items() if not float(x))


def shortcut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns x in another shape, without parameters.

  Average pooling over windows that do not overlap where a side shrinks (what
  does not fill a window is left out); then the first channels, or zero channels
  at the end.

  Args:
    x: shape (batch, ..., channels).
    shape: of the result: the same batch, and sides no larger than those of x.

  Raises:
    ValueError: if the number of axes or the batch differ, or a side grows.

  References:
    Ours, for what the abstract of arXiv:2010.02623 calls no constraint on the
    spatial dimensions.

  Examples:
    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> print(shortcut(x, (1, 2, 2))[0])
    [[0.5 0. ]
     [2.5 0. ]]
  """
  fits = len(shape) == x.ndim >= 2 and shape[0] == x.shape[0]
  if not fits or any(
    not 1 <= n <= m for n, m in zip(shape[1:-1], x.shape[1:-1], strict=True)
  ):
    raise ValueError(
      f'A shortcut can shrink the sides of {x.shape} and change its channels, '
      f'but not give {tuple(shape)}.'
    )
  for axis, n in enumerate(shape[1:-1], 1):
    window = x.shape[axis] // n
    if x.shape[axis] != n:
      x = lax.slice_in_dim(x, 0, n * window, axis=axis)
      parts = (*x.shape[:axis], n, window, *x.shape[axis + 1 :])
      x = jnp.mean(x.reshape(parts), axis + 1)
  extra = shape[-1] - x.shape[-1]
  if extra > 0:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])
  return x[..., : shape[-1]]


def nothing(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns zeros: what a closed branch adds to a sum; see :func:`bypass`.

  Args:
    x: for its dtype.
    shape: of the result.
  """
  return jnp.zeros(shape, x.dtype)


def bypass(
  layer: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  gate: float | jax.Array,
  *,
  around: Callable[[jax.Array, tuple[int, ...]], jax.Array] = shortcut,
  shape: tuple[int, ...] | None = None,
) -> jax.Array:
  """Returns gate * layer(x) + (1 - gate) * around(x).

  The gate of a sequential layer, across which shapes may change, or with
  ``around=nothing`` of one term of a sum: a model composes it, or wraps a layer
  from outside (``nn.intercept_methods``).

  Args:
    layer: of x alone.
    x: shape (batch, ..., channels).
    gate: a traced scalar in training. A Python number is static: at 1 (True)
      the layer alone is there, at 0 (False) only the way around, which is how
      the finished network is traced.
    around: (x, shape) -> what takes the layer's place.
    shape: of what the layer returns; only needed where its params are gone.

  Raises:
    ValueError: as ``around``.

  Examples:
    >>> double = lambda x: 2 * x
    >>> print(bypass(double, jnp.array([[1.0, 4.0]]), 0.5))
    [[1.5 6. ]]
  """
  if isinstance(gate, bool | int | float) and gate in (0, 1):
    if gate:
      return layer(x)
    return around(x, shape or jax.eval_shape(layer, x).shape)
  y = layer(x)
  gate = jnp.asarray(gate, y.dtype)
  return gate * y + (1 - gate) * around(x, y.shape).astype(y.dtype)


def slimming(
  params: tree.PyTree, rule: str = r'.*norm[^/]*/scale'
) -> jax.Array:
  """Returns the sum of |w| over the scales of normalisations.

  The penalty of network slimming, a baseline: train with a small multiple of
  it, prune the channels of smallest scale, fine-tune.

  Args:
    params: a pytree of arrays.
    rule: regular expression that matches the paths of the scales.

  Raises:
    ValueError: if no path matches.

  References:
    Liu et al. (2017), arXiv:1708.06519, Eq. 1; from memory.

  Examples:
    >>> print(slimming({'norm1': {'scale': jnp.array([1.0, -2.0])}}))
    3.0
  """
  named = tree.leaves(params)
  chosen = tree.match({rule: True}, named, False)
  found = [jnp.sum(jnp.abs(w)) for path, w in named.items() if chosen[path]]
  return jnp.sum(jnp.stack(found))


def _hold(theta: jax.Array, is_open: jax.Array) -> jax.Array:
  """Opens the entry of largest theta if none is open, without derivative."""
  last = (jnp.max(is_open) < 0.5) & (
    jnp.arange(theta.size) == jnp.argmax(theta)
  )
  return jnp.where(last, 1, is_open)


def _names(structure: Structure) -> list[str]:
  return [*structure.units, *structure.layers, *structure.blocks]


def _reach(structure: Structure, layer: str) -> set[str]:
  """The groups that have no width once a layer is closed."""
  return {*structure.layers[layer], *structure.inside.get(layer, ())}


def _scalars(values: Values, structure: Structure) -> jax.Array:
  """Whether each layer and block is open; float32[layers + blocks]."""
  found = [
    *(values.open.layers[name] for name in structure.layers),
    *(values.open.blocks[name] for name in structure.blocks),
  ]
  return jnp.stack(found) if found else jnp.zeros(0)


def _variables(
  values: Values, structure: Structure, scalars: jax.Array
) -> jax.Array:
  """The variables of a cost for rows of open layers and blocks."""
  holds = np.array(
    [
      [name in _reach(structure, layer) for name in structure.units]
      for layer in structure.layers
    ]
    + [[False] * len(structure.units)] * len(structure.blocks),
    bool,
  ).reshape(1, scalars.shape[1], len(structure.units))
  alive = jnp.prod(jnp.where(holds, scalars[:, :, None], 1), axis=1)
  units = [jnp.sum(values.open.units[name]) for name in structure.units]
  return jnp.concatenate([jnp.stack(units)[None] * alive, scalars], axis=1)


def _check(structure: Structure) -> None:
  """Raises ValueError if a structure contradicts itself."""
  names = _names(structure)
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f'Groups, layers and blocks must have different names; given twice: '
      f'{", ".join(twice)}.'
    )
  if not structure.units:
    raise ValueError('A structure needs groups of units.')
  empty = [name for name, size in structure.units.items() if size < 1]
  if empty:
    raise ValueError(f'Groups must have units; without: {", ".join(empty)}.')
  for what, given, known in (
    ('`layers` end in', structure.layers.values(), structure.units),
    ('`inside` holds', structure.inside.values(), structure.units),
    ('`inside` speaks of', [structure.inside], structure.layers),
    ('`rivals` holds', structure.rivals, names[len(structure.units) :]),
  ):
    lost = sorted({n for some in given for n in some} - set(known))
    if lost:
      raise ValueError(
        f'{what} {", ".join(map(repr, lost))}; known are: '
        f'{", ".join(known) or "none"}.'
      )


def _check_gates(gates: Gates, structure: Structure) -> None:
  """Raises ValueError if gates do not fit a structure."""
  for what, given, known in zip(
    Gates._fields,
    gates,
    (structure.units, structure.layers, structure.blocks),
    strict=True,
  ):
    for name, theta in given.items():
      if name not in known:
        raise ValueError(
          f'`{what}` has a gate for {name!r}, which the structure does not '
          f'have; it has: {", ".join(known) or "none"}.'
        )
      shape = (structure.units[name],) if what == 'units' else ()
      if jnp.shape(theta) != shape:
        raise ValueError(
          f'The gate of {name!r} must have shape {shape}, got '
          f'{jnp.shape(theta)}.'
        )
