"""From functions to their graph: trace on shapes, type every axis, collect.

The functions run on shapes alone, their jaxprs are typed, and the atoms that
nothing locked are the groups.

Of ``tanh(x @ a) @ b`` with a[2, 4], b[4, 3] and x[1, 2]: six axes of leaves and
inputs that say nothing of each other at first. The first product ties the axes
of 2 of x and a, and x is an input: locked. The second ties the axes of 4 of a
and b, and locks nothing. The axis of 3 is that of the output: locked. One atom
is free, and the group 'a' of 4 units has slices of a and of b.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.structure import group_rules
from jaxprune.structure.graph import Graph
from jaxprune.structure.group_rules import Choice
from jaxprune.structure.locating import Follow, belonging, locate, matching
from jaxprune.structure.numbers import compare_traces, rescale
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.jaxprs import eliminate_dead_code
from jaxprune.structure.program.slices import (
  Group,
  Leaf,
  Member,
  member,
  occurrences,
)
from jaxprune.structure.program.typed import Program, all_equations, build
from jaxprune.structure.rules import Value
from jaxprune.structure.walks import absence

Reductions = Literal['protect', 'keep', 'rescale']


@kinds.checked
def trace(
  fn: Callable[..., Any],
  params: tree.PyTree,
  *args: Any,
  reductions: Reductions = 'protect',
  also: Sequence[tuple[Any, ...]] = (),
  rules: Mapping[str, Choice] | None = None,
  narrow: tuple[Any, ...] | None = None,
  follow: Follow | None = None,
) -> Graph:
  """Returns the groups of a function by tracing it on shapes alone.

  Params and args may be ``jax.ShapeDtypeStruct``, for no network is computed
  and no memory taken: but for small tables that depend on no argument, as the
  angles of a rotary embedding (see
  :mod:`jaxprune.structure.program.constants`). Each use of such a table is cut
  on its own.

  The inputs and outputs of the function stay whole, but for those that have the
  path and shape of a leaf of the params (the state of an optimizer, a statistic
  that a training step hands back), which are cut like that leaf; an output
  whose path is but one name, only where it has the units of the leaf besides.
  ``str(graph)`` names them. A leaf that the function does not use, but to hand
  it back unchanged, stays whole.

  Several functions of the same params (a network as it is evaluated and a
  step of its training) have one graph: what any of them ties or protects is
  tied or protected, and a leaf that one of them uses is not unused. The graph
  is that of ``fn``; ``graph.also`` holds those of the others, for the same
  plans: ``specialise(graph.also[0], plan)`` is the smaller training step.

  Args:
    fn: a pure function ``fn(params, *args)`` of arrays to a pytree of arrays.
    params: a pytree of arrays or shapes; ``{'params': ..., 'batch_stats':
      ...}`` is one.
    *args: the other arguments, arrays or shapes (of which a symbolic batch).
    reductions: what becomes of an axis that a reduction runs over, as the
      statistics of a LayerNorm or a softmax do, or whose size scales a
      contraction, as 1/sqrt(d) does an attention: 'protect' keeps it whole,
      'keep' offers it, and the smaller function computes what the network
      with those units absent does, the divisors of its means and the scale of
      its attention unchanged; 'rescale' offers it, and the smaller function
      computes what the same module would at its width: the divisors and the
      scale are those of what is left. Numbers are known by their place
      (see :mod:`jaxprune.structure.numbers.rescale`) or by ``narrow``; an axis
      that a number may stand for that cannot be told stays whole.
    also: other functions of the same params, each a tuple ``(fn, *args)``.
      A step that sums over whole params (an L2 term in the loss, a gradient
      clipped by its global norm) reduces over every axis: it needs
      ``reductions='keep'``, and computes what it did, for zeros add nothing.
    rules: regular expression over names of groups -> :class:`Choice`; the
      first that matches a group decides.
    narrow: for 'rescale', ``(fn, params, *args)`` of the same function at
      other widths: shapes will do. A number that differs between the two
      traces follows from a width, one that does not follows from none. Of two
      widths that shrink alike the numbers cannot be told apart: choose
      different ratios. The numbers of ``also`` are known by their places.
    follow: regular expression over paths of the other arguments (``'0/.*'`` is
      the first after the params) -> whether these are of the network and cut
      with it (an average of the params) or of another one (a teacher). The
      state of an optimizer needs no rule.

  Returns:
    The :class:`Graph`.

  Raises:
    TypeError: if ``params`` holds a leaf that is no array, or ``also`` what
      is no tuple of a function and its arguments.
    ValueError: if ``reductions`` is none of the three, if a rule matches no
      group, is no choice that its groups have, or ties groups of other sizes,
      if ``narrow`` comes without 'rescale' or has other leaves or operations,
      if an argument could be the params of another network, or a rule of
      ``follow`` matches none.

  Examples:
    >>> params = {'a': jnp.ones((2, 8)), 'b': jnp.ones((8, 3))}
    >>> mlp = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
    >>> print(trace(mlp, params, jnp.ones((1, 2))).groups['a'].members)
    (Member(path='a', axis=1, offset=0, stride=1), \
Member(path='b', axis=0, offset=0, stride=1))
  """
  if reductions not in ('protect', 'keep', 'rescale'):
    raise ValueError(
      f"`reductions` must be 'protect', 'keep' or 'rescale', got "
      f'{reductions!r}.'
    )
  if narrow is not None and reductions != 'rescale':
    raise ValueError(
      f"`narrow` tells what to rescale: it needs reductions='rescale', got "
      f'{reductions!r}.'
    )
  for path, leaf in tree.leaves(params).items():
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise TypeError(
        f'Leaf {path!r} of params must be an array, got {leaf!r}.'
      )
  for form in also:
    if not isinstance(form, tuple) or not form or not callable(form[0]):
      raise TypeError(
        f'`also` must hold tuples of a function and its arguments after the '
        f'params, got {form!r}.'
      )
  forms = [_Form(f, jax.tree.map(_spec, xs)) for f, *xs in [(fn, *args), *also]]
  specs = jax.tree.map(_spec, params)
  paths = [path for form in forms for path in tree.leaves(form.args)]
  tree.match(follow or {}, paths, None, 'argument')
  find = _evidence(specs, narrow, follow or {})
  how = _How(specs, reductions, find, follow or {})
  return _trace(how, forms, rules or {})


class _Form(NamedTuple):
  """A function of the params and the shapes of its other arguments."""

  fn: Callable[..., Any]
  args: list[Any]


class _How(NamedTuple):
  """What the graphs of a trace have in common."""

  params: tree.PyTree
  reductions: Reductions
  find: Callable[[Program, rescale.Proven], rescale.Findings]
  follow: Follow


def _evidence(
  params: tree.PyTree, narrow: tuple[Any, ...] | None, follow: Follow
) -> Callable[[Program, rescale.Proven], rescale.Findings]:
  """Returns what finds the numbers of a program that follow from its widths."""
  if narrow is None:
    return rescale.patterns
  fn, small, *args = jax.tree.map(_spec_or_function, narrow)
  if tree.leaves(small).keys() != tree.leaves(params).keys():
    raise ValueError(
      f'The params of `narrow` must have the same leaves, got '
      f'{", ".join(tree.leaves(small))}.'
    )
  form, used = _Form(fn, args), set()
  how = _How(small, 'rescale', rescale.patterns, follow)
  known: list[tuple[Program, rescale.Findings]] = []

  def find(program: Program, proven: rescale.Proven) -> rescale.Findings:
    del proven  # A second trace proves more, of the first function alone.
    if known:
      return compare_traces.transfer(*known[0], program)
    other, *_ = _program(form, how, _leaves(small), used)
    findings = rescale.patterns(program)
    known.append((program, compare_traces.confirm(program, other, findings)))
    return known[0][1]

  return find


def _spec_or_function(x: Any) -> Any:
  """Returns the first entry of ``narrow`` as it is, and the specs of arrays."""
  return x if callable(x) else _spec(x)


def _leaves(params: tree.PyTree) -> dict[str, Leaf]:
  """Returns the leaves of a pytree, each axis a new atom."""
  return {
    path: Leaf(spec.shape, spec.dtype, tuple(ax.atom(n) for n in spec.shape))
    for path, spec in tree.leaves(params).items()
  }


def _spec(x: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype that JAX gives an array or a number."""
  if not hasattr(x, 'dtype'):
    x = np.asarray(x)
  dtype = x.dtype
  if not jnp.issubdtype(dtype, jax.dtypes.extended):  # As that of a typed key.
    dtype = jax.dtypes.canonicalize_dtype(dtype)
  return jax.ShapeDtypeStruct(x.shape, dtype)


def _trace(
  how: _How, forms: Sequence[_Form], rules: Mapping[str, Choice]
) -> Graph:
  """Traces all forms; they can be traced again with other arguments."""
  like_leaves = [_leaf_names(how, form.args) for form in forms]

  @functools.cache
  def traced(which: int, arg_tree: Any, specs: tuple[Any, ...]) -> list[Graph]:
    changed = list(forms)
    args = list(jax.tree.unflatten(arg_tree, specs))
    changed[which] = forms[which]._replace(args=args)
    constrain = lambda rules: _trace(how, changed, rules)
    return _graphs(how, changed, rules, retraces, refits, constrain)

  def retrace(which: int, *args: Any) -> Graph:
    specs = jax.tree.map(_spec, args)
    leaves, arg_tree = jax.tree.flatten(specs)
    if arg_tree == jax.tree.structure(tuple(forms[which].args)):
      # The state of an optimizer has the shape of its param, small or not.
      leaves = [
        spec if name is None else old
        for spec, old, name in zip(
          leaves,
          jax.tree.leaves(forms[which].args),
          like_leaves[which],
          strict=True,
        )
      ]
    first, *others = traced(which, arg_tree, tuple(leaves))
    return others[which - 1] if which else first

  def refit(which: int, fn: Callable[..., Any], *args: Any) -> Graph:
    changed = list(forms)
    changed[which] = _Form(fn, jax.tree.map(_spec, list(args)))
    first = _trace(how, changed, rules)
    return first.also[which - 1] if which else first

  retraces = [functools.partial(retrace, k) for k in range(len(forms))]
  refits = [functools.partial(refit, k) for k in range(len(forms))]
  return retrace(0, *forms[0].args)


def _leaf_names(how: _How, args: Any) -> list[str | None]:
  """The leaf of the params that each leaf of the arguments is like, if any."""
  leaves, arguments = tree.leaves(how.params), tree.leaves(list(args))

  def find(path: str) -> str | None:
    return locate(leaves, path, arguments[path].shape, numbered=False)

  names = belonging(
    leaves,
    list(arguments),
    follow=matching(how.follow, list(arguments)),
    find=find,
    also=list(leaves),
  )
  return [names.get(path) for path in arguments]


def _graphs(
  how: _How,
  forms: Sequence[_Form],
  rules: Mapping[str, Choice],
  retraces: Sequence[Callable[..., Graph]],
  refits: Sequence[Callable[..., Graph]],
  constrain: Callable[[Mapping[str, Choice]], Graph],
) -> list[Graph]:
  """The graph of the first form, which holds the others, and the others."""
  leaves = _leaves(how.params)
  used: set[str] = set()
  typed = [_program(form, how, leaves, used) for form in forms]
  programs = [program for program, *_ in typed]
  for path, leaf in leaves.items():
    if path not in used:
      for axis in leaf.axes:
        ax.lock(axis, 'the function does not use this leaf')
  if how.reductions == 'rescale':
    proven: rescale.Proven = {}
    rescale.apply(how.find(programs[0], proven))
    for program in programs[1:]:
      rescale.apply(rescale.patterns(program, proven))
  for program in programs:
    for eqn, axis in absence.counted(program):
      if how.reductions == 'protect':
        ax.lock(axis, f'{eqn.why} {absence.WHY}')
      eqn.reductions.append(axis)
  if how.reductions == 'protect':
    for atom, why in _reduced(programs).items():
      ax.lock(atom, f'{why[0]} reduces over it')
    for program in programs:
      for axis, why in rescale.scaled(program):
        ax.lock(axis, why)
  free = _names(programs, _members(leaves))
  chosen = group_rules.apply(rules, free)
  members = _members(leaves)
  names = _names(programs, members)
  ruled = group_rules.ruled(rules, set(free.values()) - set(names.values()))
  reduced = _reduced(programs)
  groups = {
    name: Group(
      name,
      atom.size,
      tuple(members[atom]),
      tuple(reduced.get(atom, ())),
      *group_rules.limits(chosen.get(ax.find(atom)), name, atom.size),
    )
    for atom, name in names.items()
  }
  description = {
    path: [list(leaf.shape), [_describe(axis, names) for axis in leaf.axes]]
    for path, leaf in leaves.items()
  }
  text = json.dumps(description, sort_keys=True)
  graph = lambda form, typed, retrace, refit, also: Graph(
    groups=groups,
    leaves=leaves,
    protected=_protected(leaves),
    fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    program=typed[0],
    atoms={name: atom for atom, name in names.items()},
    fn=form.fn,
    retrace=retrace,
    args=tuple(form.args),
    args_like=typed[1],
    out_tree=typed[2],
    outputs_like=typed[3],
    also=also,
    constrain=constrain,
    refit=refit,
    ruled=ruled,
  )
  first, *others = zip(forms, typed, retraces, refits, strict=True)
  also = [graph(*other, ()) for other in others]
  return [graph(*first, tuple(also)), *also]


def _program(
  form: _Form, how: _How, leaves: Mapping[str, Leaf], used: set[str]
) -> tuple[Program, tuple[str | None, ...], Any, tuple[str | None, ...]]:
  """Types one function; adds the leaves that it uses.

  Returns:
    The program, the leaves that its arguments are like, the structure of its
    outputs and the leaves that they are like.
  """
  closed, out_spec = jax.make_jaxpr(form.fn, return_shape=True)(
    how.params, *form.args
  )
  values = [
    Value(leaf.shape, leaf.dtype, list(leaf.axes), sources=frozenset([path]))
    for path, leaf in leaves.items()
  ]
  inputs, args_like = [], _leaf_names(how, form.args)
  for spec, name in zip(jax.tree.leaves(form.args), args_like, strict=True):
    axes = (
      [ax.atom(n, 'it is an input of the function') for n in spec.shape]
      if name is None
      else list(leaves[name].axes)
    )
    inputs.append(Value(spec.shape, spec.dtype, axes, has_data=True))
  jaxpr = eliminate_dead_code(closed.jaxpr)
  program = build(jaxpr, closed.consts, [*values, *inputs])
  outputs_like = []
  for path, value in zip(tree.leaves(out_spec), program.outputs, strict=True):
    name = locate(leaves, path, value.shape, numbered=False)
    # A path of one component, such as 'w', may be a coincidence: an output of
    # that name must also have the groups of the leaf.
    if name is not None and '/' not in name:
      name = name if _is_tied(value, leaves[name]) else None
    outputs_like.append(name)
    for k, axis in enumerate(value.axes):
      if name is None:
        ax.lock(axis, 'it is an output of the function')
      else:
        ax.unify(axis, leaves[name].axes[k], 'an output of the function')
  read = _read(program)
  used.update(
    path
    for path, value in zip(leaves, values, strict=True)
    if value in read or (path in outputs_like and value not in program.outputs)
  )
  out_tree = jax.tree.structure(out_spec)
  return program, tuple(args_like), out_tree, tuple(outputs_like)


def _is_tied(value: Value, leaf: Leaf) -> bool:
  """Whether a value has the groups of a leaf along every axis."""
  return all(
    ax.is_locked(a) or _nested(a) == _nested(b)
    for a, b in zip(leaf.axes, value.axes, strict=True)
  )


def _nested(axis: Axis) -> Any:
  """Returns an axis type as nested lists of atoms, to compare two by."""
  axis = ax.find(axis)
  if not axis.parts:
    return axis
  return [axis.kind, _order(axis), *map(_nested, axis.parts)]


def _read(program: Program) -> set[Value]:
  """Returns the values that an operation reads.

  A custom_jvp or custom_vjp function may ignore inputs; those do not count.
  """
  read: set[Value] = set()
  for eqn in program.equations:
    bodies = [*eqn.programs, *([eqn.derivative] if eqn.derivative else [])]
    if not bodies or eqn.primitive.name in ('cond', 'while'):
      read.update(eqn.inputs)
    for body in bodies:
      inner = {*_read(body), *body.outputs}
      pairs = zip(eqn.inputs, body.inputs, strict=False)
      read.update(value for value, twin in pairs if twin in inner)
  return read


def _reduced(programs: Sequence[Program]) -> dict[Axis, list[str]]:
  """Atoms that nothing locked, with the operations that reduce over them."""
  reduced: dict[Axis, list[str]] = {}
  for program in programs:
    for eqn, _ in all_equations(program, derivatives=True):
      for axis in eqn.reductions:
        for atom in ax.atoms(axis):
          if not atom.locked:
            reduced.setdefault(atom, []).append(eqn.why)
  return reduced


def _members(leaves: Mapping[str, Leaf]) -> dict[Axis, list[Member]]:
  """The slices of leaves that belong to each atom that nothing locked."""
  members: dict[Axis, list[Member]] = {}
  for path, leaf in leaves.items():
    for k, axis in enumerate(leaf.axes):
      for atom, labels in occurrences(axis):
        if not atom.locked:
          members.setdefault(atom, []).append(member(path, k, labels))
  return members


def _protected(leaves: Mapping[str, Leaf]) -> dict[str, str]:
  """Returns 'path:axis' -> why that axis, or a part of it, stays whole."""
  protected = {}
  for path, leaf in leaves.items():
    for k, axis in enumerate(leaf.axes):
      # An atom of a single entry is always locked: name a larger one's reason.
      atoms = ax.atoms(axis)
      if any(a.size > 1 for a in atoms):
        atoms = [a for a in atoms if a.size > 1]
      why = [a.locked for a in atoms if a.locked]
      if why and leaf.shape[k] > 1:
        protected[f'{path}:{k}'] = str(why[0])
  return protected


def _names(
  programs: Sequence[Program], members: Mapping[Axis, Sequence[Member]]
) -> dict[Axis, str]:
  """Names a group after the first kernel that writes it, in program order."""
  first: dict[Axis, str] = {}
  for eqn in (e for program in programs for e, _ in all_equations(program)):
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
    # Several groups of one kernel: 'qkv', 'qkv.1', 'qkv.2'.
    taken = sum(path == writer for a, writer in first.items() if a in names)
    names[atom] = stem if not taken else f'{stem}.{taken}'
  return names


def _describe(axis: Axis, names: Mapping[Axis, str]) -> Any:
  """Returns an axis type as plain data, for the fingerprint of a graph.

  A free atom is the name of its group, a locked axis its size:
  ``['product', ['conv', 4]]``.
  """
  axis = ax.find(axis)
  if axis in names:
    return names[axis]
  if ax.is_locked(axis):
    return axis.size
  inner = [_describe(child, names) for child in axis.parts]
  return [axis.kind, inner] if axis.order is None else [_order(axis), inner]


def _order(axis: Axis) -> list[int] | None:
  """The order of a permuted axis, as plain data."""
  return None if axis.order is None else axis.order.tolist()
