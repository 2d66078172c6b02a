"""What follows from a plan for a pytree: masks, the smaller one, and back."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.plans import states
from jaxprune.plans.plan import Plan, kept_indices, vanished
from jaxprune.structure.graph import Graph, like, runner
from jaxprune.structure.locating import Follow, belonging, locate, undecided
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.run import Run


@kinds.checked
def masks(
  graph: Graph,
  plan: Plan,
  params: tree.PyTree,
  *,
  follow: Follow | None = None,
) -> tree.PyTree:
  """Returns the mask of each leaf: what the plan keeps at full size.

  With these masks on its params the full network computes what the small one
  will, unless a reduction runs over a removed axis: of params that were trained
  so :func:`jaxprune.plans.proof.check` says whether it does, and a
  :func:`jaxprune.plans.supernet` closes the same units in every case.

  Args:
    graph: the graph.
    plan: a plan of it.
    params: a pytree like the params, or a sub-tree of them.
    follow: as :func:`shrink`.

  Returns:
    A pytree like ``params``: bool arrays, True = kept, where the plan touches
    a leaf, ``optax.MaskedNode()`` elsewhere.

  Raises:
    ValueError: if the plan is of another graph, or two sub-trees could be
      those of the network.
  """
  named = leaf_masks(graph, plan)
  own = belonging(graph.leaves, list(tree.leaves(params)), follow)
  located = {path: named[name] for path, name in own.items() if name in named}
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
def shrink(
  graph: Graph,
  plan: Plan,
  values: tree.PyTree,
  *,
  follow: Follow | None = None,
) -> tree.PyTree:
  """Returns a pytree with what the plan removes cut out of its leaves.

  Works alike on params, gradients, batch statistics, averages, the state of an
  optimizer, a Flax NNX module or optimizer, shapes
  (``jax.ShapeDtypeStruct``), and a tree of them all: a leaf is known by the end
  of its path. Single numbers and keys pass. States that keep params in another
  form are cut by what :func:`jaxprune.plans.register_state` knows of them.

  A cut array lies where it did: on its devices, and split over the axes of a
  mesh, but for an axis of a width that its parts no longer divide, which is
  whole on each device.

  Args:
    graph: the graph.
    plan: a plan of it.
    values: the pytree; arrays of the full shapes, traced or not.
    follow: regular expression over paths of ``values`` -> whether these leaves
      are of the network (True) or stay as they are (False): where there is more
      than one network, ``{'teacher/.*': False}``. The first match wins; where
      none does, the names decide.

  Returns:
    A pytree of the same structure, each array a new one; None in the place of a
    leaf that goes with a dropped block (:func:`jaxprune.tree.compact` leaves
    such places out).

  Raises:
    TypeError: if a rule of ``follow`` is neither True nor False.
    ValueError: if the plan is of another graph, a rule matches nothing, two
      sub-trees could be those of the network, or a leaf is neither a param nor
      a single number, or has another shape than its param and is in no state
      that is known.
  """
  run = runner(graph, kept_indices(graph, plan))
  gone = vanished(graph, plan.dropped)
  return _map_leaves(
    graph,
    values,
    lambda name, array, axes: None if name in gone else _cut(run, array, axes),
    lambda name, axes: tuple(ax.find(axis).size for axis in axes),
    follow,
  )


@kinds.checked
def grow(
  graph: Graph,
  plan: Plan,
  values: tree.PyTree,
  *,
  follow: Follow | None = None,
) -> tree.PyTree:
  """Returns a shrunk pytree at the full shapes, zero where it was cut.

  The inverse of :func:`shrink` on what the plan keeps. Where a leaf went with a
  block, zeros of the leaf's dtype come back.

  Args:
    graph: the graph.
    plan: a plan of it.
    values: a pytree that :func:`shrink` returned, or one like it.
    follow: as :func:`shrink`.

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

  def embed(name: str, array: Any, axes: Sequence[Axis]) -> Any:
    if array is None:
      full = tuple(ax.find(axis).size for axis in axes)
      return jnp.zeros(full, graph.leaves[name].dtype)
    for k, axis in enumerate(axes):
      mask = run.mask(axis)
      if mask is not None:
        shape = (*array.shape[:k], mask.size, *array.shape[k + 1 :])
        if isinstance(array, jax.ShapeDtypeStruct):
          array = array.update(shape=shape)
          continue
        place = (slice(None),) * k + (np.flatnonzero(mask),)
        array = jnp.zeros(shape, array.dtype).at[place].set(array)
    return array

  return _map_leaves(
    graph,
    values,
    embed,
    lambda name, axes: (
      None if name in gone else tuple(run.size(axis) for axis in axes)
    ),
    follow,
  )


def _map_leaves(
  graph: Graph,
  values: Any,
  fn: Callable[[str, Any, Sequence[Axis]], Any],
  shape_of: Callable[[str, Sequence[Axis]], tuple[Any, ...] | None],
  follow: Follow | None,
) -> Any:
  """Maps fn(leaf, array, axes) over what belongs to params; numbers pass.

  ``shape_of`` is what an array of these axes must have, None if None must be in
  its place.
  """
  is_none = lambda x: x is None
  flat, _ = tree.flatten(values, is_none)
  paths = [path for path, _ in flat]
  own = belonging(graph.leaves, paths, follow)
  stays = {*paths} - {*undecided(paths, follow)}
  wrong: list[str] = []

  def one(path: str, value: Any) -> Any:
    if rule := states.rule_of(value):
      inside = lambda p: p == path or p.startswith(f'{path}/') or not path
      if all(p in stays for p in paths if inside(p)):
        return value
      return rule(value, functools.partial(in_state, path))
    if path in stays:
      return value
    name = own.get(path)
    if name is None:
      if not _passes(value):
        wrong.append(_stranger(graph, values, path, value))
      return value
    return fitted(path, value, name, graph.leaves[name].axes)

  def fitted(path: str, value: Any, name: str, axes: Sequence[Axis]) -> Any:
    shape = None if value is None else np.shape(value)
    wanted = shape_of(name, axes)
    if shape == wanted:
      return fn(name, value, axes)
    if shape is None:
      return None
    want = 'nothing' if wanted is None else f'the shape {wanted}'
    wrong.append(
      f'{path!r} must have {want} of its param {name!r}, got {shape}'
      f'{_remedy(states.kind_of(values, path))}; a leaf of another network '
      f'stays as it is by follow={{{re.escape(path)!r}: False}}'
    )
    return value

  def in_state(
    before: str, values: Any, axes: states.Axes | None = None
  ) -> Any:
    def each(path: str, value: Any) -> Any:
      full = f'{before}/{path}'.strip('/')
      name = locate(graph.leaves, path)
      if name is None and axes is not None:
        name = locate(graph.leaves, path.rpartition('/')[0])
      if name is None:
        if not _passes(value):
          wrong.append(f'{full!r} of shape {np.shape(value)} has no param')
        return value
      whole = graph.leaves[name].axes
      if axes is not None:
        at = axes(path, value)
        whole = [
          ax.atom(n, 'a state holds it') if k is None else whole[k]
          for k, n in zip(at, np.shape(value), strict=True)
        ]
      return fitted(full, value, name, whole)

    return tree.map_with_path(each, values, is_leaf=is_none)

  is_leaf = lambda x: x is None or states.rule_of(x) is not None
  mapped = tree.map_with_path(one, values, is_leaf=is_leaf)
  if wrong:
    raise ValueError(f'{"; ".join(wrong)}.')
  return mapped


def _passes(value: Any) -> bool:
  """Whether a leaf that is of no param is one that any width has."""
  dtype = getattr(value, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return True
  return value is None or math.prod(np.shape(value)) <= 1


def _stranger(graph: Graph, values: Any, path: str, value: Any) -> str:
  """Says what is wrong with a leaf that is of no param."""
  what = f'{path!r} of shape {np.shape(value)}'
  parts = path.split('/')
  for stop in range(len(parts) - 1, 0, -1):
    if name := locate(graph.leaves, '/'.join(parts[:stop])):
      kind = states.kind_of(values, path)
      return f'{what} holds {name!r} in another form{_remedy(kind)}'
  kind = states.kind_of(values, path)
  return (
    f'{what} ends in the path of no param; what is no part of the network '
    f'stays as it is by follow={{{re.escape(path)!r}: False}}'
    f'{_remedy(kind, ", and") if kind else ""}'
  )


def _remedy(kind: str, word: str = ':') -> str:
  """Says what to do about what is not of the shape of its param."""
  return (
    f'{word} how a {kind or "state of your own"} is cut, '
    f'plans.register_state({kind}) is told; or initialise the optimizer anew '
    f'for the smaller params'
  )


def _cut(run: Run, array: Any, axes: Sequence[Axis]) -> Any:
  """Cuts a concrete array on the host: a compilation per shape costs more."""
  if isinstance(array, jax.ShapeDtypeStruct):
    shape = tuple(run.size(axis) for axis in axes)
    return array.update(shape=shape, sharding=_sharding(array.sharding, shape))
  if isinstance(array, core.Tracer) or not isinstance(array, jax.Array):
    return run.take(array, axes)
  if all(run.mask(axis) is None for axis in axes):
    return array
  is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
  if is_key or not array.is_fully_addressable:
    cut = run.take(array, axes)
  else:
    cut = run.take(np.asarray(array), axes)
  if not array.committed:
    return jnp.asarray(cut)
  return jax.device_put(cut, _sharding(array.sharding, cut.shape))


def _sharding(sharding: Any, shape: tuple[int, ...]) -> Any:
  """A sharding at another shape: axes that it does not divide are whole."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
  parts = lambda axes: math.prod(
    sharding.mesh.shape[name]
    for name in (axes if isinstance(axes, tuple) else (axes,))
    if isinstance(name, str)
  )
  spec = [
    None if size % parts(axes) else axes
    for axes, size in zip(names, shape, strict=True)
  ]
  return sharding.update(spec=PartitionSpec(*spec))
