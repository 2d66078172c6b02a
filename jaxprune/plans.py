"""Plans: what is kept of a network, as plain data, and what follows from it.

A :class:`Plan` names groups of a :class:`jaxprune.structure.Graph` and the
indices kept of each. It is data: JSON, hashable, comparable. From it follow the
masks of the full network, the smaller pytree (:func:`shrink`), the smaller
function (:func:`specialise`) and the proof that the two compute what the masked
network computes (:func:`jaxprune.proof.check`).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxprune import tree
from jaxprune.structure import choices
from jaxprune.structure.graph import Graph, leaves_like, like, locate, runner
from jaxprune.structure.program import Run

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is kept of each group that loses units.

  Attributes:
    graph: the fingerprint of the graph it was made for.
    kept: (group, ascending indices that stay), sorted by group; a group that
      is absent is kept whole.
    version: of the format.
  """

  graph: str
  kept: tuple[tuple[str, tuple[int, ...]], ...]
  version: int = FORMAT


def from_kept(graph: Graph, kept: Mapping[str, Sequence[int]]) -> Plan:
  """Returns the plan that keeps these indices of these groups.

  Args:
    graph: the graph.
    kept: group -> indices to keep, in any order; at least one.

  Raises:
    ValueError: if a group is unknown, or its indices are none, double or out of
      range, or if a rule of the graph allows no such width.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 2))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> from_kept(graph, {'a': [2, 0]}).kept
    (('a', (0, 2)),)
  """
  entries = []
  for name, index in sorted(kept.items()):
    size = _group(graph, name).size
    chosen = sorted({int(i) for i in index})
    if not chosen or len(chosen) != len(index):
      raise ValueError(
        f'Group {name!r} must keep one or more indices, each once, got '
        f'{list(index)}.'
      )
    if chosen[0] < 0 or chosen[-1] >= size:
      raise ValueError(
        f'Group {name!r} has units 0 to {size - 1}, got {list(index)}.'
      )
    if len(chosen) < size:
      entries.append((name, tuple(chosen)))
  for name, group in graph.groups.items():
    choices.check_width(group, len(kept.get(name, range(group.size))))
  return Plan(graph.fingerprint, tuple(entries))


def from_masks(graph: Graph, masks: Mapping[str, Any]) -> Plan:
  """Returns the plan that keeps what masks of groups keep.

  Args:
    graph: the graph.
    masks: group -> bool[size], True = kept.

  Raises:
    ValueError: as :func:`from_kept`, or if a mask has another shape.
  """
  kept = {}
  for name, mask in masks.items():
    group = _group(graph, name)
    if np.shape(mask) != (group.size,):
      raise ValueError(
        f'The mask of group {name!r} must have shape ({group.size},), got '
        f'{np.shape(mask)}.'
      )
    kept[name] = np.flatnonzero(np.asarray(mask))
  return from_kept(graph, kept)


def from_widths(
  graph: Graph,
  widths: Mapping[str, int],
  scores: Mapping[str, Any] | None = None,
) -> Plan:
  """Returns the plan that keeps so many units, the best or the first.

  Args:
    graph: the graph.
    widths: group -> units to keep, from 1 to its size.
    scores: group -> score of each unit, larger = keep, ties to the lower
      index; without them (or a group in them) the first units stay.

  Raises:
    ValueError: if a group is unknown or a width out of range.
  """
  kept = {}
  for name, width in widths.items():
    group = _group(graph, name)
    if not 1 <= width <= group.size:
      raise ValueError(
        f'Group {name!r} can keep 1 to {group.size} units, got {width}.'
      )
    order = np.arange(group.size)
    if scores is not None and name in scores:
      order = np.argsort(-np.asarray(scores[name]), kind='stable')
    kept[name] = order[:width]
  return from_kept(graph, kept)


def widths(graph: Graph, plan: Plan) -> dict[str, tuple[int, int]]:
  """Returns the units of every group, (before, after)."""
  kept = kept_indices(graph, plan)
  return {
    name: (group.size, len(kept.get(name, range(group.size))))
    for name, group in graph.groups.items()
  }


def to_json(plan: Plan) -> str:
  """Returns a plan as JSON, one group a line, the same bytes each time.

  Examples:
    >>> print(to_json(Plan('c0ffee', (('conv1', (0, 2)),))))
    {
     "version": 1,
     "graph": "c0ffee",
     "kept": {
      "conv1": [0, 2]
     }
    }
  """
  lines = [
    f'  {json.dumps(name)}: {json.dumps(list(index))}'
    for name, index in plan.kept
  ]
  kept = '{\n' + ',\n'.join(lines) + '\n }' if lines else '{}'
  return (
    f'{{\n "version": {plan.version},\n "graph": {json.dumps(plan.graph)},\n'
    f' "kept": {kept}\n}}'
  )


def from_json(text: str) -> Plan:
  """Returns the plan that :func:`to_json` wrote.

  Raises:
    ValueError: if the text is no plan, or of a format this version does not
      know.

  Examples:
    >>> plan = Plan('c0ffee', (('conv1', (0, 2)),))
    >>> from_json(to_json(plan)) == plan
    True
  """
  try:
    data = json.loads(text)
    version = data['version']
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      'This is no plan: a JSON object with "version", "graph" and "kept" is.'
    ) from None
  if version != FORMAT:
    raise ValueError(
      f'The plan has format {version}, this version of jaxprune reads format '
      f'{FORMAT}; install the version that wrote it.'
    )
  try:
    kept = tuple(
      (str(name), tuple(int(i) for i in index))
      for name, index in sorted(data['kept'].items())
    )
    return Plan(str(data['graph']), kept)
  except (KeyError, TypeError, AttributeError):
    raise ValueError(
      'The plan is damaged: "graph" must be a string and "kept" map each group '
      'to a list of indices.'
    ) from None


def masks(graph: Graph, plan: Plan, params: tree.PyTree) -> tree.PyTree:
  """Returns the mask of each leaf: what the plan keeps at full size.

  With these masks on its params the full network computes what the small one
  will, unless a reduction runs over a removed axis (see
  :func:`jaxprune.proof.check`).

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


def leaf_masks(graph: Graph, plan: Plan) -> dict[str, np.ndarray]:
  """Returns path -> bool mask, for every leaf that a plan touches."""
  run = runner(graph, kept_indices(graph, plan))
  found = {}
  for path, leaf in graph.leaves.items():
    full = None
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
    A pytree of the same structure, each array a new one.

  Raises:
    ValueError: if the plan is of another graph, or a leaf is neither a param
      nor a single number, or has another shape than its param (a factored or
      preconditioner state).
  """
  run = runner(graph, kept_indices(graph, plan))
  return _map_leaves(graph, values, lambda array, axes: _cut(run, array, axes))


def grow(graph: Graph, plan: Plan, values: tree.PyTree) -> tree.PyTree:
  """Returns a shrunk pytree at the full shapes, zero where it was cut.

  The inverse of :func:`shrink` on what the plan keeps.

  Args:
    graph: the graph.
    plan: a plan of it.
    values: a pytree that :func:`shrink` returned, or one like it.

  Raises:
    ValueError: as :func:`shrink`.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 3)), 'b': jnp.ones((3, 1))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> plan = from_kept(graph, {'a': [0, 2]})
    >>> print(grow(graph, plan, shrink(graph, plan, params))['a'])
    [[1. 0. 1.]]
  """
  run = runner(graph, kept_indices(graph, plan))

  def embed(array: Any, axes: Any) -> Any:
    for k, axis in enumerate(axes):
      mask = run.mask(axis)
      if mask is not None:
        shape = [*array.shape[:k], mask.size, *array.shape[k + 1 :]]
        place = (slice(None),) * k + (np.flatnonzero(mask),)
        array = jnp.zeros(shape, array.dtype).at[place].set(array)
    return array

  return _map_leaves(graph, values, embed, small=run)


def specialise(graph: Graph, plan: Plan) -> Callable[..., Any]:
  """Returns the smaller function: the traced one at the sizes that are left.

  Args:
    graph: the graph of ``fn(params, *args)``; ``graph.also`` holds those of
      other functions of the params, such as a training step.
    plan: a plan of it.

  Returns:
    ``small(params, *args)`` of shrunk params; a pure function for ``jit``,
    ``grad``, ``vmap``, ``scan``, ``jax.export``. Arguments like the params
    (the state of an optimizer) are shrunk too. Other shapes of args (another
    batch, a symbolic one) are traced again, once each.

  Raises:
    ValueError: if the plan is of another graph; when called, if params have
      not the shapes that :func:`shrink` gives, or if at the shapes of args
      the function has other groups.
  """
  kept = kept_indices(graph, plan)
  return functools.partial(_call, graph, kept, False)


def masked(graph: Graph, plan: Plan) -> Callable[..., Any]:
  """Returns the function at its full size with the removed units absent.

  Every intermediate array is zero where a removed unit would be, and every
  reduction passes over it: what :func:`specialise` must compute, at the full
  shapes. The arguments are as there, params of the full shapes.
  """
  kept = kept_indices(graph, plan)
  return functools.partial(_call, graph, kept, True)


def _call(
  graph: Graph,
  kept: Mapping[str, Sequence[int]],
  is_masked: bool,
  params: tree.PyTree,
  *args: Any,
) -> Any:
  traced = graph.retrace(*args)
  if traced.fingerprint != graph.fingerprint:
    shapes = [np.shape(x) for x in jax.tree.leaves(args)]
    raise ValueError(
      f'At arguments of shapes {shapes} the function has other groups than '
      f'where it was traced; trace it there and plan again.'
    )
  run = runner(traced, kept, is_masked)
  leaves, wrong = leaves_like(traced, params), []
  given = {path: leaves[path] for path in traced.leaves}
  given |= {f'args/{path}': x for path, x in tree.leaves(args).items()}
  inputs = list(zip(given.values(), traced.program.inputs, strict=True))
  for path, (x, value) in zip(given, inputs, strict=True):
    shape = tuple(run.size(axis) for axis in value.axes)
    shape = tuple(value.shape) if is_masked else shape
    if np.shape(x) != shape:
      wrong.append(f'{path!r} must have shape {shape}, got {np.shape(x)}')
  if wrong:
    raise ValueError(
      f'{"; ".join(wrong)}. Shrink the params with the same plan.'
    )
  if is_masked:
    inputs = [(run.take(x, value.axes), value) for x, value in inputs]
  outs = run(traced.program, [x for x, _ in inputs])
  return jax.tree.unflatten(traced.out_tree, outs)


def _group(graph: Graph, name: str) -> Any:
  if name not in graph.groups:
    raise ValueError(
      f'There is no group {name!r}; the groups are: '
      f'{", ".join(graph.groups) or "none"}.'
    )
  return graph.groups[name]


def kept_indices(graph: Graph, plan: Plan) -> dict[str, tuple[int, ...]]:
  """Returns group -> kept indices, once the plan is known to be of the graph.

  Raises:
    ValueError: if it is not, or keeps an index that a group does not have.
  """
  if plan.graph != graph.fingerprint:
    raise ValueError(
      f'The plan is of graph {plan.graph}, got graph {graph.fingerprint}: '
      f'trace the function and params that it was made for.'
    )
  for name, index in plan.kept:
    if index and max(index) >= _group(graph, name).size:
      raise ValueError(
        f'Group {name!r} has units 0 to {graph.groups[name].size - 1}, the '
        f'plan keeps {max(index)}.'
      )
  return dict(plan.kept)


def _map_leaves(
  graph: Graph,
  values: Any,
  fn: Callable[[Any, Any], Any],
  small: Run | None = None,
) -> Any:
  """Maps fn(array, axes) over what belongs to params; numbers pass."""
  wrong = []

  def one(path: str, value: Any) -> Any:
    name = locate(graph.leaves, path)
    shape = np.shape(value)
    if name is None:
      if int(np.prod(shape, dtype=int)) > 1:
        wrong.append(f'{path!r} of shape {shape} is no slice of a param')
      return value
    leaf = graph.leaves[name]
    wanted = leaf.shape
    if small is not None:
      wanted = tuple(small.size(axis) for axis in leaf.axes)
    if shape != wanted:
      wrong.append(
        f'{path!r} must have the shape {wanted} of its param {name!r}, got '
        f'{shape}'
      )
      return value
    return fn(value, leaf.axes)

  mapped = tree.map_with_path(one, values)
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
