"""Proof: that the smaller function computes what the masked network does.

:func:`check` runs both on data, values and gradients, and brings controls of
its own, so that it cannot pass by accident.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks, plans, tree
from jaxprune.checks import kinds
from jaxprune.structure.graph import Graph, leaves_like, runner
from jaxprune.structure.program.typed import all_equations
from jaxprune.structure.queries.gate_points import scale


class CheckError(ValueError):
  """The smaller function does not compute what the masked network does."""


class Proof(NamedTuple):
  """What :func:`check` measured; errors are relative to the largest entry.

  Attributes:
    values: max |shrunk - masked| of the outputs.
    gradients: the same of the gradients of the params, or relative to 10 % of
      the largest of all where a leaf has less; None if not asked for.
    parameters: max |shrunk - f(masked params)| with the user's own function;
      None where a reduction runs over a removed axis, which makes it differ, or
      where zeros do not close a dropped block.
    sensitivity: change of the output when the input changes; not near 0.
    mutation: error after one deliberately wrong index, or (of a plan that only
      drops blocks) with the blocks left in; above the tolerance.
    removed: units that the plan removes, those of dropped blocks too.
    closed: max |shrunk - f(params)| of params in which all that the plan
      removes is closed already, by gates of 0 or by masks; None for others.
  """

  values: float
  gradients: float | None
  parameters: float | None
  sensitivity: float
  mutation: float
  removed: int
  closed: float | None = None


@kinds.checked
def check(
  graph: Graph,
  plan: plans.Plan,
  params: tree.PyTree,
  *args: Any,
  tolerance: float | None = None,
  gradients: bool = True,
) -> Proof:
  """Proves on data that the smaller function computes what the masked one does.

  Compares values and gradients of :func:`specialise` with those of
  :func:`masked`, and, where no reduction runs over a removed axis, with those
  of the user's own function on masked params (gradients where they are finite:
  the slope of a root is not, at a unit of zeros). Controls keep it honest: the
  output must depend on the input, and one deliberately wrong index, or a
  dropped block that stays, must change it by ten times the error that was
  measured (or 1e-5), whatever the tolerance: a cut that is as wrong as an index
  is refused at any.

  Params that were trained with gates or masks may have all that the plan
  removes closed already: zero, or read by kernels through rows of zeros. Then
  what was trained is the user's own function of these very params, and the
  smaller one must compute that too. Behind a norm over the units it does not,
  for its statistics count a closed unit. (The control of a block that is closed
  already opens it with noise in its leaves.)

  Args:
    graph: the graph.
    plan: a plan of it that removes something.
    params: the full params.
    *args: the other arguments, with real data.
    tolerance: of each error, relative to the largest entry of the leaf that
      it is in; for a gradient to no less than a tenth of the largest of all
      leaves, for one that is zero but for rounding has no size of its own.
      Without it, that of the coarsest float in which the function computes:
      1e-10 of float64, 1e-5 of float32, and four times the distance from 1 to
      the next number of shorter ones, 4e-3 of float16 and 3e-2 of bfloat16.
    gradients: whether to compare gradients too; False for a function that has
      none, such as one with a while loop.

  Returns:
    The :class:`Proof`.

  Raises:
    CheckError: if an error is above the tolerance, if params with closed units
      are another network than the smaller one, or if a control fails. Of a
      difference from the masked function the first operation that differs is
      named, or the first whose derivative does on the way back; where each of
      them agrees, and of one from the user's own function, the leaf.
    TypeError: if ``tolerance`` is no number.
    ValueError: if the plan removes nothing or is of another graph, or if
      ``tolerance`` is negative, NaN or infinite.
  """
  if tolerance is not None:
    checks.real('tolerance', tolerance, 0)
  if plan.resized:  # Of the function with its features resized.
    graph = plans.at(graph, plan.resolution, plan.resized)
    plan = dataclasses.replace(plan, resized=())
  if tolerance is None:
    tolerance = _rounding(graph)
  before_after = plans.widths(graph, plan).values()
  removed = sum(before - after for before, after in before_after)
  if not removed and not plan.dropped:
    raise ValueError('The plan removes nothing, so that there is no check.')
  small_params = plans.shrink(graph, plan, params)
  cut_args = functools.partial(_cut_args, graph, plan)
  small_args = cut_args(args)
  cut = lambda outs: _map_outputs(graph, plan, args, outs, True)
  key = jax.random.key(0)
  wrap = _with_gradients if gradients else _without_gradients
  small = jax.jit(wrap(plans.specialise(graph, plan)))
  full = jax.jit(wrap(plans.masked(graph, plan)))
  cotangents = _cotangents(key, jax.eval_shape(graph.fn, params, *args))
  small_outs, small_grads = small(small_params, cut(cotangents), *small_args)
  left = _map_outputs(graph, plan, args, cotangents, False)
  outs, grads = full(params, left, *args)
  values = _error(small_outs, cut(outs))
  grads = plans.shrink(graph, plan, grads)
  slopes = _error(small_grads, grads, share=0.1)
  if not max(values, slopes) <= tolerance:
    pulls = left if gradients else None
    first = _first_difference(graph, plan, params, args, pulls, tolerance)
    raise CheckError(
      f'The smaller function differs from the masked one: values by '
      f'{values:.1e}, gradients by {slopes:.1e} (relative); first at '
      f'{first or _worst_leaf(small_grads, grads)}.'
    )
  own = None
  kept = plans.kept_indices(graph, plan)
  is_closed = [not graph.blocks[name].unclosed for name in plan.dropped]
  if not any(graph.groups[name].reduced for name in kept) and all(is_closed):
    hidden = _apply(plans.leaf_masks(graph, plan), params)
    given = lambda outs, args: _map_outputs(graph, plan, args, outs, False)
    fn = lambda p, *args: given(graph.fn(p, *args), args)
    outs, grads = jax.jit(wrap(fn))(hidden, left, *args)
    own = _error(small_outs, cut(outs))
    own_slopes, where = 0.0, ''
    if all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)):
      grads = plans.shrink(graph, plan, grads)
      own_slopes = _error(small_grads, grads, share=0.1)
      if not own_slopes <= tolerance:
        where = f', most at {_worst_leaf(small_grads, grads)}'
    if not max(own, own_slopes) <= tolerance:
      raise CheckError(
        f'The smaller function differs from the original one on masked params: '
        f'values by {own:.1e}, gradients by {own_slopes:.1e} (relative)'
        f'{where}. An operation computes with what an absent unit leaves. '
        f"Trace with reductions='keep', where it is not there, or protect the "
        f'group: rules={{name: Choice(protect=True)}}.'
      )
  closed = None
  if _are_closed(graph, plan, params):
    closed = _error(small_outs, cut(jax.jit(graph.fn)(params, *args)))
    if not closed <= tolerance:
      raise CheckError(
        f'The smaller function differs from the original one on these params, '
        f'in which all that the plan removes is closed already: values by '
        f'{closed:.1e} (relative). {_counting(graph, plan)} Close units by the '
        f"masks of plans.supernet, or trace with reductions='protect'."
      )
  seen = 10 * max(values, own or 0.0, closed or 0.0, 1e-5)
  moved_args = jax.tree.map(_moved, args)
  other, _ = small(small_params, cut(cotangents), *cut_args(moved_args))
  sensitivity = _error(other, small_outs)
  if not sensitivity > seen:
    raise CheckError(
      f'The output changes by {sensitivity:.1e} (relative) when every number '
      f'of the input moves at random by about 1 (or, of integers, changes '
      f'place): a check on it proves nothing. Use trained or rescaled params.'
    )
  mutation = 0.0
  if plan.dropped:
    opened = plans.masked(graph, _with_blocks(graph, plan))
    lively = params if closed is None else _reopened(graph, plan, params)
    outs = cut(jax.jit(opened)(lively, *args))
    mutation = _error(small_outs, outs)
    if not mutation > seen:
      raise CheckError(
        f'The dropped blocks change the output by {mutation:.1e} (relative): a '
        f'check on it proves nothing.'
      )
  if plan.kept:
    mutation = 0.0
  for wrong in _mutations(graph, plan, params, small_params):
    outs, _ = small(wrong, cut(cotangents), *small_args)
    mutation = max(mutation, _error(outs, small_outs))
    if mutation > seen:
      break
  if not mutation > seen:
    raise CheckError(
      f'A deliberately wrong index changes the output by {mutation:.1e} '
      f'(relative) at most, and the error measured is {seen / 10:.1e}: a check '
      f'on it proves nothing.'
    )
  return Proof(
    values,
    slopes if gradients else None,
    own,
    sensitivity,
    mutation,
    removed,
    closed,
  )


def _rounding(graph: Graph) -> float:
  """The default tolerance: that of the coarsest float of a program."""
  dtypes = {
    value.dtype
    for eqn, _ in all_equations(graph.program)
    for value in eqn.outputs
    if value.dtype is not None and jnp.issubdtype(value.dtype, jnp.inexact)
  }
  steps = [float(jnp.finfo(dtype).eps) for dtype in dtypes]
  coarsest = max(steps, default=float(jnp.finfo(jnp.float32).eps))
  if coarsest <= float(jnp.finfo(jnp.float64).eps):
    return 1e-10
  if coarsest <= float(jnp.finfo(jnp.float32).eps):
    return 1e-5
  return 4 * coarsest


def _are_closed(graph: Graph, plan: plans.Plan, params: tree.PyTree) -> bool:
  """Whether all that a plan removes is zero, or is read through zeros."""
  hidden = _apply(plans.leaf_masks(graph, plan), params)
  if _same(hidden, params):
    return True
  if any(name in graph.unread for name, _ in plan.kept) or any(
    graph.blocks[name].unclosed for name in plan.dropped
  ):
    return False
  units = {name: np.zeros(graph.groups[name].size) for name, _ in plan.kept}
  for name, index in plan.kept:
    units[name][list(index)] = 1
  blocks = dict.fromkeys(plan.dropped, 0.0)
  # What is closed does not change when it is closed once more.
  return _same(scale(graph, params, units, blocks, closable=False), params)


def _with_blocks(graph: Graph, plan: plans.Plan) -> plans.Plan:
  """The plan without dropped blocks, as wide in them as rules allow."""
  kept = dict(plan.kept)
  for name, (_, width) in plans.widths(graph, plan).items():
    if not width and name not in kept:
      kept[name] = tuple(range(graph.groups[name].most))
  entries = tuple(sorted(kept.items()))
  return dataclasses.replace(plan, kept=entries, dropped=())


def _reopened(
  graph: Graph, plan: plans.Plan, params: tree.PyTree
) -> tree.PyTree:
  """Params with noise in the leaves of dropped blocks, which were closed."""
  gone = plans.vanished(graph, plan.dropped)
  return tree.map_with_path(lambda p, x: _moved(x) if p in gone else x, params)


def _same(a: Any, b: Any) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x is y or np.array_equal(x, y) for x, y in pairs)


def _counting(graph: Graph, plan: plans.Plan) -> str:
  """Says what counts the units or blocks that params close, as a sentence."""
  for name, _ in plan.kept:
    if graph.groups[name].reduced:
      return f'Of group {name!r}, {graph.groups[name].reduced[0]} counts them.'
  for name in plan.dropped:
    if graph.blocks[name].unclosed:
      return f'Block {name!r} stays open: {graph.blocks[name].unclosed}.'
  return 'What computes with zeros is not what computes without them.'


def _moved(x: Any) -> Any:
  """Another input: numbers and noise, integers (tokens) in reverse order.

  A constant would not do: a norm of the first layer takes it away.
  """
  dtype = jnp.asarray(x).dtype
  if jnp.issubdtype(dtype, jnp.inexact):
    return x + jax.random.normal(jax.random.key(1), np.shape(x), dtype)
  if jnp.issubdtype(dtype, jnp.integer) and np.ndim(x):
    return jnp.flip(x, -1)
  return x


def _without_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
  """fn with no gradients, in the form of :func:`_with_gradients`."""
  return lambda params, cotangents, *args: (fn(params, *args), {})


def _with_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
  """fn with the gradient of <cotangents, outputs> by its float params.

  Of complex numbers it is that of the real part of the sum, which sees both
  parts of each.
  """

  def call(params: Any, cotangents: Any, *args: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    floats = [
      k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]

    def on_floats(*xs: Any) -> Any:
      full = list(leaves)
      for k, x in zip(floats, xs, strict=True):
        full[k] = x
      outs = fn(jax.tree.unflatten(structure, full), *args)
      dots = [
        jnp.real(jnp.vdot(c, out))
        for c, out in zip(
          jax.tree.leaves(cotangents), jax.tree.leaves(outs), strict=True
        )
        if jnp.issubdtype(out.dtype, jnp.inexact)
      ]
      return sum(dots), outs

    grad = jax.grad(on_floats, tuple(range(len(floats))), has_aux=True)
    grads, outs = grad(*(leaves[k] for k in floats))
    full = [jnp.zeros(np.shape(x)) for x in leaves]
    for k, g in zip(floats, grads, strict=True):
      full[k] = g
    return outs, jax.tree.unflatten(structure, full)

  return call


def _cotangents(key: jax.Array, specs: Any) -> Any:
  leaves, structure = jax.tree.flatten(specs)
  is_complex = lambda spec: jnp.issubdtype(spec.dtype, jnp.complexfloating)
  draws = [
    jax.random.normal(
      jax.random.fold_in(key, k),
      spec.shape,
      jnp.complex64 if is_complex(spec) else jnp.float32,
    )
    for k, spec in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, draws)


def _error(a: Any, b: Any, share: float = 0.0) -> float:
  """Largest |a - b| of any leaf, relative to the largest |b| of that leaf.

  Or to ``share`` of the largest |b| of all leaves, where that is more: a
  gradient that is zero but for rounding, as that of the bias of an attention's
  keys is, has no size of its own.
  """
  return max(_errors(a, b, share), default=0.0)


def _errors(a: Any, b: Any, share: float) -> list[float]:
  """:func:`_error` of each leaf; infinite where one is not finite."""
  pairs = [
    (_exact(x), _exact(y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  ]
  sizes = [_size(y) for _, y in pairs]
  floor = share * max(sizes, default=0.0)
  return [
    _size(x - y) / (max(size, floor) or 1.0)
    if np.all(np.isfinite(x - y))
    else float('inf')
    for (x, y), size in zip(pairs, sizes, strict=True)
  ]


def _exact(x: Any) -> np.ndarray:
  """Numbers in double precision, both parts of complex ones."""
  is_complex = jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
  return np.asarray(x, np.complex128 if is_complex else np.float64)


def _size(x: Any) -> float:
  # NumPy's largest of half precision warns of what it does not hold.
  dtype = np.result_type(jnp.result_type(x))
  wide = dtype if np.issubdtype(dtype, np.number) else np.float32
  return float(np.max(np.abs(np.asarray(x, wide)), initial=0.0))


def _worst_leaf(a: Any, b: Any) -> str:
  """Names the gradient that differs most, if there are any."""
  errors = dict(zip(tree.leaves(b), _errors(a, b, share=0.1), strict=True))
  if not errors:
    return 'no operation'
  return f'the gradient of {max(errors, key=errors.__getitem__)!r}'


def _apply(named: Mapping[str, np.ndarray], params: Any) -> Any:
  return tree.map_with_path(
    lambda path, x: jnp.where(named[path], x, 0) if path in named else x, params
  )


def _cut_args(graph: Graph, plan: plans.Plan, args: Any) -> Any:
  """Cuts the arguments that are like params: the state of an optimizer."""
  traced = graph.retrace(*args)
  run = runner(traced, plans.kept_indices(graph, plan))
  leaves, structure = jax.tree.flatten(args)
  values = traced.program.inputs[len(traced.leaves) :]
  cut = [run.take(x, v.axes) for x, v in zip(leaves, values, strict=True)]
  return jax.tree.unflatten(structure, cut)


def _map_outputs(
  graph: Graph, plan: plans.Plan, args: Any, outs: Any, cuts: bool
) -> Any:
  """Outputs at full size as the small function has them.

  Statistics that a step hands back are small, if ``cuts``, and None where they
  go with a block.
  """
  traced = graph.retrace(*args)
  run = runner(traced, plans.kept_indices(graph, plan))
  gone = plans.vanished(traced, plan.dropped)
  leaves = [
    None if path in gone else run.take(out, value.axes) if cuts else out
    for out, value, path in zip(
      traced.out_tree.flatten_up_to(outs),
      traced.program.outputs,
      traced.outputs_like,
      strict=True,
    )
  ]
  return jax.tree.unflatten(traced.out_tree, leaves)


def _mutations(graph: Graph, plan: plans.Plan, params: Any, small: Any) -> Any:
  """Shrunk params with the indices of one slice shifted by one."""
  gone = plans.vanished(graph, plan.dropped)
  full, shrunk = leaves_like(graph, params), leaves_like(graph, small, gone)
  for name, index in plan.kept:
    group = graph.groups[name]
    wrong = np.sort((np.asarray(index) + 1) % group.size)
    members = [m for m in group.members if len(graph.leaves[m.path].shape) > 1]
    members = [m for m in members if m.path not in gone]
    for member in members[:2]:
      kept = dict(plan.kept)
      right, off = runner(graph, kept), runner(graph, {**kept, name: wrong})
      axes = graph.leaves[member.path].axes
      array = full[member.path]
      for k, axis in enumerate(axes):
        mask = (off if k == member.axis else right).mask(axis)
        if mask is not None:
          array = jnp.take(array, np.flatnonzero(mask), k)
      changed = {**shrunk, member.path: array}
      yield jax.tree.unflatten(
        jax.tree.structure(small),
        [changed[path] for path in graph.leaves if path not in gone],
      )


def _first_difference(
  graph: Graph,
  plan: plans.Plan,
  params: Any,
  args: Any,
  cotangents: Any,
  tolerance: float,
) -> str | None:
  """Runs both functions operation by operation; names the first to differ.

  Or, of derivatives, the first on the way back from the outputs: what reads a
  value whose gradient differs, where all later ones agree.
  """
  traced = graph.retrace(*args)
  kept = plans.kept_indices(graph, plan)
  small, full = (
    runner(traced, kept, masked, plan.dropped) for masked in (False, True)
  )
  named = leaves_like(traced, params)
  given = [*(named[path] for path in traced.leaves), *jax.tree.leaves(args)]
  start = lambda run: [
    run.take(x, value.axes)
    for x, value in zip(given, traced.program.inputs, strict=True)
  ]
  env = [
    dict(zip(traced.program.inputs, start(run), strict=True))
    for run in (small, full)
  ]
  live = [eqn for eqn in traced.program.equations if small.needs(eqn)]
  for eqn in live:
    for run, known in zip((small, full), env, strict=True):
      known.update(zip(eqn.outputs, run.step(eqn, known), strict=True))
    for value in eqn.outputs:
      if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        continue
      a, b = env[0][value], small.take(env[1][value], value.axes)
      if np.shape(a) != np.shape(b) or _error([a], [b]) > tolerance:
        return eqn.why
  if cotangents is None:
    return None
  pulls = traced.out_tree.flatten_up_to(cotangents)
  slopes = [
    _slopes(run, traced.program, known, live, pulls)
    for run, known in zip((small, full), env, strict=True)
  ]
  for value in reversed(slopes[0]):
    readers = [eqn for eqn in live if value in eqn.inputs]
    a, b = slopes[0][value], small.take(slopes[1][value], value.axes)
    # What an operation cancels to nothing has the size of what it reads.
    beyond = [slopes[1].get(out, 0) for eqn in readers for out in eqn.outputs]
    size = max(_size(x) for x in (b, *beyond)) or 1.0
    if readers and not _size(a - b) <= tolerance * size:
      whys = dict.fromkeys(eqn.why for eqn in readers)
      return f'the derivative of {" or ".join(whys)}'
  return None


def _slopes(
  run: Any,
  program: Any,
  known: Mapping[Any, Any],
  live: Sequence[Any],
  cotangents: Sequence[Any],
) -> dict[Any, Any]:
  """The gradient of <cotangents, outputs> by each float value, in order."""
  values = [*program.inputs, *(out for eqn in live for out in eqn.outputs)]
  is_float = lambda value: jnp.issubdtype(value.dtype, jnp.inexact)
  zeros = {
    value: jnp.zeros_like(known[value])
    for value in values
    if is_float(value) and known[value] is not None
  }

  def total(moves: Sequence[Any]) -> Any:
    moved = dict(zip(zeros, moves, strict=True))
    at = lambda value, x: x + moved[value] if value in moved else x
    env = {value: at(value, known[value]) for value in program.inputs}
    for eqn in live:
      outs = run.step(eqn, env)
      env.update(
        (value, at(value, x))
        for value, x in zip(eqn.outputs, outs, strict=True)
      )
    return sum(
      jnp.real(jnp.vdot(run.take(c, value.axes), run.read(env, value)))
      for c, value in zip(cotangents, program.outputs, strict=True)
      if is_float(value) and c is not None
    )

  return dict(zip(zeros, jax.grad(total)(list(zeros.values())), strict=True))
