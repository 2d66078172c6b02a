"""What the gates say at one forward pass, and what is left of it."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import kinds
from jaxprune.gates.functions import Function, scale
from jaxprune.gates.records import (
  Gates,
  Scalars,
  Structure,
  Values,
  check,
  check_gates,
  names_of,
  reach,
)


@kinds.checked
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
      group that no kernel reads (``graph.unread``) has no place for gates, and
      one that a norm runs over (``graph.uncloseable``) none that closes.

  Raises:
    ValueError: if the structure contradicts itself or lacks a name.

  Examples:
    >>> print(init(Structure({'conv1': 2})).units['conv1'])
    [1. 1.]
  """
  check(structure)
  names = names_of(structure)
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


@kinds.checked
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
  check(structure)
  check_gates(gates, structure)
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


@kinds.checked
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
      for name in reach(structure, layer):
        whole[name] = np.zeros_like(whole[name])
  return whole


@kinds.checked
def closed(scalars: Scalars) -> tuple[str, ...]:
  """Returns the names of the layers or blocks that are closed; not under jit.

  Args:
    scalars: ``values.open.layers`` or ``values.open.blocks``, concrete.

  Raises:
    ValueError: if one is no scalar.

  Examples:
    >>> closed({'block1': jnp.float32(0), 'block2': jnp.float32(1)})
    ('block1',)
  """
  odd = [f'{name} {np.shape(x)}' for name, x in scalars.items() if np.ndim(x)]
  if odd:
    raise ValueError(f'`scalars` must be of shape (), got: {", ".join(odd)}.')
  return tuple(name for name, x in scalars.items() if not float(x))


def _hold(theta: jax.Array, is_open: jax.Array) -> jax.Array:
  """Opens the entry of largest theta if none is open, without derivative."""
  last = (jnp.max(is_open) < 0.5) & (
    jnp.arange(theta.size) == jnp.argmax(theta)
  )
  return jnp.where(last, 1, is_open)
