"""What follows from a plan for a pytree: masks, the smaller one, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxprune import kinds, tree
from jaxprune.plans.record import Plan, kept_indices, vanished
from jaxprune.structure.graph import Graph, like, locate, runner
from jaxprune.structure.run import Run


@kinds.checked
def masks(graph: Graph, plan: Plan, params: tree.PyTree) -> tree.PyTree:
  """Returns the mask of each leaf: what the plan keeps at full size.

  With these masks on its params the full network computes what the small one
  will, unless a reduction runs over a removed axis: of params that were trained
  so :func:`jaxprune.proof.check` says whether it does, and a
  :func:`jaxprune.plans.supernet` closes the same units in every case.

  Args:
    graph: the graph.
    plan: a plan of it.
    params: a pytree like the params, or a sub-tree of them.

  Returns:
    A pytree like ``params``: bool arrays, True = kept, where the plan touches
    a leaf, ``optax.MaskedNode()`` elsewhere.
  """
  named = leaf_masks(graph, plan)
  located = {
    path: named[name]
    for path in tree.leaves(params)
    if (name := locate(graph.leaves, path)) in named
  }
  return like(params, located)


@kinds.checked
def leaf_masks(graph: Graph, plan: Plan) -> dict[str, np.ndarray]:
  """Returns path -> bool mask, for every leaf that a plan touches."""
  run = runner(graph, kept_indices(graph, plan))
  gone = vanished(graph, plan.dropped)
  found = {}
  for path, leaf in graph.leaves.items():
    full = np.zeros((), bool) if path in gone else None
    for k, axis in enumerate(leaf.axes):
      mask = run.mask(axis)
      if mask is not None:
        mask = mask.reshape(
          [-1 if j == k else 1 for j in range(len(leaf.axes))]
        )
        full = mask if full is None else full & mask
    if full is not None:
      found[path] = np.broadcast_to(full, leaf.shape)
  return found


@kinds.checked
def shrink(graph: Graph, plan: Plan, values: tree.PyTree) -> tree.PyTree:
  """Returns a pytree with what the plan removes cut out of its leaves.

  Works alike on params, gradients, batch statistics, averages and the state of
  an optimizer: a leaf is known by the end of its path. Leaves that are no slice
  of a param (counts, keys, learning rates) pass if they hold a single number.

  Args:
    graph: the graph.
    plan: a plan of it.
    values: the pytree; arrays of the full shapes, traced or not.

  Returns:
    A pytree of the same structure, each array a new one; None in the place of a
    leaf that goes with a dropped block (:func:`jaxprune.tree.compact` leaves
    such places out).

  Raises:
    ValueError: if the plan is of another graph, or a leaf is neither a param
      nor a single number, or has another shape than its param (a factored or
      preconditioner state).
  """
  run = runner(graph, kept_indices(graph, plan))
  gone = vanished(graph, plan.dropped)
  return _map_leaves(
    graph,
    values,
    lambda name, array: (
      None if name in gone else _cut(run, array, graph.leaves[name].axes)
    ),
    lambda name: graph.leaves[name].shape,
  )


@kinds.checked
def grow(graph: Graph, plan: Plan, values: tree.PyTree) -> tree.PyTree:
  """Returns a shrunk pytree at the full shapes, zero where it was cut.

  The inverse of :func:`shrink` on what the plan keeps. Where a leaf went with a
  block, zeros of the leaf's dtype come back.

  Args:
    graph: the graph.
    plan: a plan of it.
    values: a pytree that :func:`shrink` returned, or one like it.

  Raises:
    ValueError: as :func:`shrink`.

  Examples:
    >>> from jaxprune.plans import from_kept
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 3)), 'b': jnp.ones((3, 1))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> plan = from_kept(graph, {'a': [0, 2]})
    >>> print(grow(graph, plan, shrink(graph, plan, params))['a'])
    [[1. 0. 1.]]
  """
  run = runner(graph, kept_indices(graph, plan))
  gone = vanished(graph, plan.dropped)

  def embed(name: str, array: Any) -> Any:
    if array is None:
      leaf = graph.leaves[name]
      return jnp.zeros(leaf.shape, leaf.dtype)
    for k, axis in enumerate(graph.leaves[name].axes):
      mask = run.mask(axis)
      if mask is not None:
        shape = [*array.shape[:k], mask.size, *array.shape[k + 1 :]]
        place = (slice(None),) * k + (np.flatnonzero(mask),)
        array = jnp.zeros(shape, array.dtype).at[place].set(array)
    return array

  return _map_leaves(
    graph,
    values,
    embed,
    lambda name: (
      None
      if name in gone
      else tuple(run.size(axis) for axis in graph.leaves[name].axes)
    ),
  )


def _map_leaves(
  graph: Graph,
  values: Any,
  fn: Callable[[str, Any], Any],
  shape_of: Callable[[str], tuple[int, ...] | None],
) -> Any:
  """Maps fn(leaf, array) over what belongs to params; numbers pass.

  ``shape_of`` is what a leaf must have, None if None must be in its place.
  """
  wrong = []

  def one(path: str, value: Any) -> Any:
    name = locate(graph.leaves, path)
    shape = None if value is None else np.shape(value)
    if name is None:
      if shape is not None and int(np.prod(shape, dtype=int)) > 1:
        wrong.append(f'{path!r} of shape {shape} is no slice of a param')
      return value
    wanted = shape_of(name)
    if shape == wanted:
      return fn(name, value)
    if shape is None:
      return None
    want = 'nothing' if wanted is None else f'the shape {wanted}'
    wrong.append(
      f'{path!r} must have {want} of its param {name!r}, got {shape}'
    )
    return value

  mapped = tree.map_with_path(one, values, is_leaf=lambda x: x is None)
  if wrong:
    raise ValueError(
      f'{"; ".join(wrong)}. A factored or preconditioner state cannot be cut: '
      f'initialise the optimizer anew for the smaller params.'
    )
  return mapped


def _cut(run: Run, array: Any, axes: Any) -> Any:
  """Cuts a concrete array on the host: a compilation per shape costs more."""
  if isinstance(array, core.Tracer) or not isinstance(array, jax.Array):
    return run.take(array, axes)
  if all(run.mask(axis) is None for axis in axes):
    return array
  return jnp.asarray(run.take(np.asarray(array), axes))
