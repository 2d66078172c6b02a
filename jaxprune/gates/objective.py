"""The cost that remains, penalties on it, and the chain that trains gates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune import checks, tree
from jaxprune.checks import kinds
from jaxprune.gates.functions import lift
from jaxprune.gates.records import Cost, Structure, Values, names_of, reach


@kinds.checked
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
    >>> from jaxprune.gates import evaluate, init
    >>> s = Structure({'a': 2, 'b': 2}, layers={'branch': ('a',)})
    >>> theta = init(s)._replace(layers={'branch': jnp.float32(0)})
    >>> print(*jax.jit(lambda g: widths(evaluate(g, s), s))(theta).values())
    0.0 2.0 0.0
  """
  matrix = _variables(values, structure, _scalars(values, structure)[None])
  return dict(zip(names_of(structure), matrix[0], strict=True))


@kinds.checked
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
    >>> from jaxprune.gates import Gates, evaluate
    >>> s = Structure({'a': 4})
    >>> rho = lambda theta: remaining(
    ...   evaluate(Gates({'a': theta}), s), s, lambda n: 10 * n['a']
    ... )
    >>> theta = jnp.array([1.0, 1.0, 0.5, 0.0])
    >>> print(*jax.jit(jax.value_and_grad(rho))(theta))
    0.75 [0.25 0.25 0.25 0.25]
  """
  names = names_of(structure)
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
      *(lift(jnp.sum(values.open.units[name])) for name in structure.units),
      *lift(_scalars(values, structure)),
    ]
  )
  return (found[0] + jnp.sum(lost * moved)) / found[-1]


@kinds.checked
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
  checks.real('target', target)
  checks.real('strength', strength)
  if isinstance(target, float | int) and not 0 <= target <= 1:
    raise ValueError(f'`target` must be in [0, 1], got {target}.')
  return strength * jnp.maximum(rho - target, 0)


@kinds.checked
def slimming(params: tree.PyTree, rule: str = r'(.*/)?scale') -> jax.Array:
  """Returns the sum of |w| over the scales of normalisations.

  The penalty of network slimming, a baseline: train with a small multiple of
  it, prune the channels of smallest scale, fine-tune.

  Args:
    params: a pytree of arrays.
    rule: regular expression that matches the paths of the scales; by default
      those of all leaves named ``scale``.

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


@kinds.checked
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
  checks.real('low', low)
  checks.real('high', high)
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
      [name in reach(structure, layer) for name in structure.units]
      for layer in structure.layers
    ]
    + [[False] * len(structure.units)] * len(structure.blocks),
    bool,
  ).reshape(1, scalars.shape[1], len(structure.units))
  alive = jnp.prod(jnp.where(holds, scalars[:, :, None], 1), axis=1)
  units = [jnp.sum(values.open.units[name]) for name in structure.units]
  return jnp.concatenate([jnp.stack(units)[None] * alive, scalars], axis=1)
