"""From a function to its graph: trace on shapes, type every axis, collect.

Nothing is computed: the function runs on shapes alone, its jaxpr is typed, and
the atoms that nothing locked are the groups.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import (
  Program,
  all_equations,
  build,
  eliminate_dead_code,
)
from jaxprune.structure.rules import Value
from jaxprune.structure.slices import Group, Leaf, Member, member, occurrences

Reductions = Literal['protect', 'keep']


def trace(
  fn: Callable[..., Any],
  params: tree.PyTree,
  *args: Any,
  reductions: Reductions = 'protect',
) -> Graph:
  """Returns the groups of a function by tracing it on shapes alone.

  Nothing is computed and no memory taken: params and args may be
  ``jax.ShapeDtypeStruct``. The inputs and outputs of the function stay whole,
  but for an output that has the path and shape of a leaf of the params (a
  statistic that a training step hands back), which is that leaf. A leaf that
  the function does not use, but to hand it back unchanged, stays whole.

  Args:
    fn: a pure function ``fn(params, *args)`` of arrays to a pytree of arrays.
    params: a pytree of arrays or shapes; ``{'params': ..., 'batch_stats':
      ...}`` is one.
    *args: the other arguments, arrays or shapes (of which a symbolic batch).
    reductions: what becomes of an axis that a reduction runs over, as the
      statistics of a LayerNorm or a softmax do: 'protect' keeps it whole,
      'keep' offers it, and the smaller function computes what the network
      with those units absent does, the divisors of its means unchanged.

  Returns:
    The :class:`Graph`.

  Raises:
    TypeError: if ``params`` holds a leaf that is no array.
    ValueError: if ``reductions`` is neither of the two.

  Examples:
    >>> params = {'a': jnp.ones((2, 8)), 'b': jnp.ones((8, 3))}
    >>> mlp = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
    >>> print(trace(mlp, params, jnp.ones((1, 2))).groups['a'].members)
    (Member(path='a', axis=1, offset=0, stride=1), \
Member(path='b', axis=0, offset=0, stride=1))
  """
  if reductions not in ('protect', 'keep'):
    raise ValueError(
      f"`reductions` must be 'protect' or 'keep', got {reductions!r}."
    )
  for path, leaf in tree.leaves(params).items():
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise TypeError(
        f'Leaf {path!r} of params must be an array, got {leaf!r}.'
      )
  specs = jax.tree.map(_spec, params)

  @functools.cache
  def traced(arg_tree: Any, arg_specs: tuple[Any, ...]) -> Graph:
    args = jax.tree.unflatten(arg_tree, arg_specs)
    return _trace(fn, specs, args, reductions, retrace)

  def retrace(*args: Any) -> Graph:
    leaves, arg_tree = jax.tree.flatten(args)
    return traced(arg_tree, tuple(_spec(leaf) for leaf in leaves))

  return retrace(*args)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
  if not hasattr(x, 'dtype'):
    x = np.asarray(x)
  dtype = x.dtype
  if not jnp.issubdtype(dtype, jax.dtypes.extended):  # As that of a typed key.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
  return jax.ShapeDtypeStruct(x.shape, dtype)


def _trace(
  fn: Callable[..., Any],
  specs: tree.PyTree,
  args: Sequence[Any],
  reductions: Reductions,
  retrace: Callable[..., Graph],
) -> Graph:
  closed, out_spec = jax.make_jaxpr(fn, return_shape=True)(specs, *args)
  jaxpr = eliminate_dead_code(closed.jaxpr)
  named = tree.leaves(specs)
  leaves = {
    path: Leaf(spec.shape, spec.dtype, tuple(ax.atom(n) for n in spec.shape))
    for path, spec in named.items()
  }
  values = [
    Value(leaf.shape, leaf.dtype, list(leaf.axes), sources=frozenset([path]))
    for path, leaf in leaves.items()
  ]
  inputs = [
    Value(
      spec.shape,
      spec.dtype,
      [ax.atom(n, 'it is an input of the function') for n in spec.shape],
      has_data=True,
    )
    for spec in jax.tree.leaves(args)
  ]
  program = build(jaxpr, closed.consts, [*values, *inputs])
  outputs, handed_back = tree.leaves(out_spec), set()
  for path, value in zip(outputs, program.outputs, strict=True):
    mirrored = _mirrored(path, value, leaves)
    handed_back.add(mirrored)
    for k, axis in enumerate(value.axes):
      if mirrored is None:
        ax.lock(axis, 'it is an output of the function')
      else:
        ax.unify(axis, leaves[mirrored].axes[k], 'an output of the function')
  read = {value for eqn in program.equations for value in eqn.inputs}
  for (path, leaf), value in zip(leaves.items(), values, strict=True):
    is_replaced = path in handed_back and value not in program.outputs
    if value not in read and not is_replaced:
      for axis in leaf.axes:
        ax.lock(axis, 'the function does not use this leaf')
  reduced: dict[Axis, list[str]] = {}
  for eqn, _ in all_equations(program):
    for axis in eqn.reductions:
      for atom in ax.atoms(axis):
        if not atom.locked:
          reduced.setdefault(atom, []).append(eqn.why)
  if reductions == 'protect':
    for atom, why in reduced.items():
      ax.lock(atom, f'{why[0]} reduces over it')
  return _graph(
    program, leaves, reduced, fn, retrace, jax.tree.structure(out_spec)
  )


def _mirrored(
  path: str, value: Value, leaves: Mapping[str, Leaf]
) -> str | None:
  """The leaf that an output hands back: same path at its end, same shape."""
  for name, leaf in leaves.items():
    ends = path == name or path.endswith('/' + name)
    numbered = all(part.isdigit() for part in name.split('/'))
    if ends and not numbered and leaf.shape == value.shape:
      return name
  return None


def _graph(
  program: Program,
  leaves: dict[str, Leaf],
  reduced: Mapping[Axis, Sequence[str]],
  fn: Callable[..., Any],
  retrace: Callable[..., Graph],
  out_tree: Any,
) -> Graph:
  """Collects the groups: atoms of leaves that nothing locked."""
  members: dict[Axis, list[Member]] = {}
  protected = {}
  for path, leaf in leaves.items():
    for k, axis in enumerate(leaf.axes):
      for atom, labels in occurrences(axis):
        if not atom.locked:
          members.setdefault(atom, []).append(member(path, k, labels))
      why = [a.locked for a in ax.atoms(axis) if a.locked and a.size > 1]
      if why and leaf.shape[k] > 1:
        protected[f'{path}:{k}'] = str(why[0])
  names = _names(program, members)
  groups = {
    name: Group(
      name, atom.size, tuple(members[atom]), tuple(reduced.get(atom, ()))
    )
    for atom, name in names.items()
  }
  description = {
    path: [list(leaf.shape), [_describe(axis, names) for axis in leaf.axes]]
    for path, leaf in leaves.items()
  }
  text = json.dumps(description, sort_keys=True)
  return Graph(
    groups=groups,
    leaves=leaves,
    protected=protected,
    fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    program=program,
    atoms={name: atom for atom, name in names.items()},
    fn=fn,
    retrace=retrace,
    out_tree=out_tree,
  )


def _names(
  program: Program, members: Mapping[Axis, Sequence[Member]]
) -> dict[Axis, str]:
  """Names a group after the first kernel that writes it, in program order."""
  first: dict[Axis, str] = {}
  for eqn, _ in all_equations(program):
    if eqn.products is None:
      continue
    kernels = [v for v in eqn.inputs if not v.has_data and len(v.sources) == 1]
    for value in kernels:
      (path,) = value.sources
      for axis in eqn.outputs[0].axes:
        for atom in ax.atoms(axis):
          if any(m.path == path for m in members.get(atom, ())):
            first.setdefault(atom, path)
  for atom, slices in members.items():
    first.setdefault(atom, slices[0].path)
  names: dict[Axis, str] = {}
  for atom, path in first.items():
    stem = path.removeprefix('params/')
    for ending in ('/kernel', '/weight', '/w', '/embedding'):
      stem = stem.removesuffix(ending)
    taken = sum(path == other for a, other in first.items() if a in names)
    names[atom] = stem if not taken else f'{stem}.{taken}'
  return names


def _describe(axis: Axis, names: Mapping[Axis, str]) -> Any:
  """An axis type as plain data: what a plan needs to know of it."""
  axis = ax.find(axis)
  if axis in names:
    return names[axis]
  if ax.is_locked(axis):
    return axis.size
  return [axis.kind, [_describe(part, names) for part in axis.parts]]
