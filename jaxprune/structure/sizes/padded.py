"""One program for every size: a small image in the corner of a large canvas.

A function is traced at each of its allowed sizes and the traces are laid side
by side. Where they differ is what depends on the size: lengths of axes, and
constants such as the divisor of a mean. :func:`on_canvas` runs the largest of
them with both looked up by an index that may be traced, and clears what lies
outside of the image wherever an operation would see it: before a convolution,
a padding, a pooling, a sum. Inside it, everything is what the function computes
at that size, to rounding.

Of ``mean(x, axis=1)`` traced for x of [1, 2] and of [1, 4] the traces are::

  s = reduce_sum x    over an axis of length 2     over an axis of length 4
  y = div s 2.0       by 2                         by 4

Side by side they are one program for x of [1, 4]: ``s`` is the sum of x where
column < [2, 4][index], else 0, and ``y = s / [2.0, 4.0][index]``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxprune.structure.program.jaxprs import (
  INLINED,
  body_of,
  eliminate_dead_code,
  line_of,
)
from jaxprune.structure.program.run import bind
from jaxprune.structure.rules.base import ELEMENTWISE
from jaxprune.structure.rules.primitives import known, neutral_of
from jaxprune.structure.sizes.padded_rules import (
  PADDING,
  POINTWISE_CALLS,
  Sizes,
  elementwise,
  is_pointwise,
  is_ragged,
  pointwise,
  same_params,
  varying,
)

BORDER = 'jaxprune: a border of sizes'  # What marks one in a trace.


class _Table(NamedTuple):
  """The values of one constant at every size, padded to the largest."""

  values: np.ndarray  # [sizes, ...]


def on_canvas(
  fn: Callable[..., Any], examples: Sequence[Sequence[Any]]
) -> Callable[..., Any]:
  """Returns a function that computes ``fn`` at any of several sizes at once.

  ``call(index, *args)`` is ``fn`` of args of the shapes of ``examples[index]``,
  in one compile for all of them: args have the shapes of the last example, and
  only the leading part of each axis, as long as in ``examples[index]``, is
  read. An output whose shape depends on the size is right in its leading part.
  Where ``fn`` calls :func:`border`, an index for each part, in one array, lets
  every part work at a size of its own, resized where they meet.

  Axes of different lengths may be slid over (convolutions with the same
  explicit padding at every size, pooling), padded, sliced from the same start,
  reduced, contracted, and worked on point by point; a mean divides by the
  number of entries at the size. ``'SAME'`` padding at stride 2 is another at
  even than at odd sizes, and refused where the sizes mix both.

  Args:
    fn: a pure function of arrays.
    examples: its arguments, arrays or shapes, at every size; the last is the
      largest along every axis.

  Returns:
    A pure function for jit, vmap (over the index too) and grad. It raises a
    ValueError unless there is one index, or one for each part.

  Raises:
    ValueError: if an operation along such an axis is none of these, with its
      name and line, or if the function is another program at another size (a
      parameter whose shape depends on it, for one).

  References:
    Ours; the masked evaluation of several input resolutions that the search of
    JointPruning needs (Liu et al., 2020, arXiv:2005.08931).

  Examples:
    >>> fn = lambda x: jnp.mean(x, axis=1)
    >>> call = on_canvas(fn, [(jnp.ones((1, n)),) for n in (2, 4)])
    >>> x = jnp.array([[1.0, 3.0, 100.0, 100.0]])
    >>> call(0, x).tolist(), call(1, x).tolist()
    ([2.0], [51.0])
  """
  traced, shapes, out = [], [], None
  for k, args in enumerate(examples):
    try:
      closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    except Exception as error:
      first = str(error).strip().splitlines()[0]
      raise ValueError(
        f'{_name(fn)} cannot be traced at size {k} of {len(examples)}, '
        f'{_shapes(args)}: {first} A function whose parameters have a shape '
        f'that depends on the size has no canvas.'
      ) from error
    traced.append((eliminate_dead_code(closed.jaxpr), closed.consts))
    shapes.append([np.shape(x) for x in jax.tree.leaves(args)])
  for k, example in enumerate(shapes):
    fits = len(example) == len(shapes[-1]) and all(
      len(a) == len(b) and all(m <= n for m, n in zip(a, b, strict=True))
      for a, b in zip(example, shapes[-1], strict=True)
    )
    if not fits:
      raise ValueError(
        f'The last example must be the largest along every axis: {shapes[-1]} '
        f'is not, against {example} of example {k}.'
      )
  program = _align(traced, _name(fn), '')
  out_tree = jax.tree.structure(out)
  count = 1 + sum(step.border is not None for step in program.steps)

  def call(index: Any, *args: Any) -> Any:
    indices = jnp.asarray(index, jnp.int32)
    if indices.shape not in ((), (count,)):
      raise ValueError(
        f'{_name(fn)} has {count} parts of a size of their own, which take an '
        f'index each, or one for all; got {indices.shape}.'
      )
    run = _Canvas(jnp.broadcast_to(indices, (count,)))
    outs = run(program, jax.tree.leaves(args))
    return jax.tree.unflatten(out_tree, outs)

  return call


def resize(x: jax.Array, side: Any, largest: int | None = None) -> jax.Array:
  """Returns images resized to a square, in the corner of a square canvas.

  Bilinear, smoothed where it shrinks: the values of ``jax.image.resize`` at the
  same side, for a side that may be traced; zero outside.

  Args:
    x: float images, [batch, height, width, channels].
    side: of the result, at most ``largest``; static or a traced int.
    largest: side of the canvas, static; without it a static ``side``.

  Examples:
    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> print(resize(x, 1, 2)[0, :, :, 0])
    [[1.5 0. ]
     [0.  0. ]]
  """
  largest = int(side) if largest is None else largest
  rows, columns = (_weights(n, side, largest) for n in x.shape[1:3])
  y = jnp.einsum('bhwc,hi,wj->bijc', x, rows, columns, precision='highest')
  return y.astype(x.dtype)


def _weights(before: int, after: Any, largest: int) -> jax.Array:
  """Returns the weight of each old pixel in each new, [before, largest].

  A triangle around the centre of the new pixel, as wide as the larger of the
  two pixels, cut at the border and normalised. From 4 pixels to 2, a new pixel
  is 2 old ones wide: the weights of the first are [3/7, 3/7, 1/7, 0].
  """
  after = jnp.asarray(after, jnp.float32)
  pitch = before / after
  centre = (jnp.arange(largest, dtype=jnp.float32) + 0.5) * pitch - 0.5
  pixels = jnp.arange(before, dtype=jnp.float32)
  distance = jnp.abs(centre[None] - pixels[:, None]) / jnp.maximum(pitch, 1.0)
  weight = jnp.maximum(0.0, 1.0 - distance)
  total = jnp.sum(weight, axis=0, keepdims=True)
  inside = (jnp.arange(largest) < after)[None]
  return jnp.where(inside, weight / jnp.where(inside, total, 1.0), 0.0)


def border(x: jax.Array) -> jax.Array:
  """Returns features as they are; a canvas may change their side there.

  Args:
    x: float, [batch, rows, columns, channels].
  """
  return checkpoint_name(x, BORDER)


def bilinear(x: jax.Array, after: Any, before: Any = None) -> jax.Array:
  """Returns features at other sides, each the mean of the pixels beside it.

  Along each axis entry i lies at (i + 1/2) before / after - 1/2, within the
  feature, between two pixels that are weighted by their nearness: of half the
  side the means of pairs, of the same side the feature itself.

  Args:
    x: float, [batch, rows, columns, channels].
    after: rows and columns of the result, static; or traced, and then the
      result is as large as x and right in its corner alone.
    before: rows and columns that are read, traced; without them all of x.

  Examples:
    >>> x = jnp.arange(4.0).reshape(1, 1, 4, 1)
    >>> print(bilinear(x, (1, 2))[0, 0, :, 0])
    [0.5 2.5]
  """
  static = before is None
  sides = x.shape[1:3] if static else before
  for axis, n, m in zip((1, 2), sides, after, strict=True):
    if static and n == m:
      continue
    n, m, size = jnp.float32(n), jnp.float32(m), m if static else x.shape[axis]
    position = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (n / m) - 0.5
    position = jnp.maximum(position, 0)
    first = jnp.floor(position)
    second = jnp.minimum(first + 1, n - 1)  # At the border the same again.
    wide = [-1 if k == axis else 1 for k in range(4)]
    share = (position - first).reshape(wide)
    low, high = (
      jnp.take(x, at.astype(jnp.int32), axis, mode='clip')
      for at in (first, second)
    )
    x = (low * (1 - share) + high * share).astype(x.dtype)
  return x


# --- Laying the traces side by side ------------------------------------------


class _Slot:
  """A value of a trace; of a function called twice there are two."""

  def __init__(self, aval: Any, constant: Any = None):
    self.aval = aval
    self.constant = constant


class _Step(NamedTuple):
  """One operation, with what is known of it at every size."""

  eqn: Any  # At the largest size.
  writes: list[_Slot]
  reads: list[Any]  # A slot, or a _Table, or a value.
  # For each operand None, or (what to fill in outside, its sizes).
  clear: list[Any]
  bodies: list[Any]  # Aligned programs of control flow.
  border: Sizes | None = None  # Of a border.


class _Program(NamedTuple):
  """The traces at all sizes as one program."""

  inputs: list[_Slot]
  steps: list[_Step]
  outputs: list[Any]


def _sizes(slots: Sequence[_Slot]) -> Sizes:
  """Returns the shape of a value at every size."""
  return tuple(tuple(slot.aval.shape) for slot in slots)


def _align(
  traces: Sequence[tuple[Any, Sequence[Any]]], name: str, outer: str
) -> _Program:
  """Lays traces side by side; refuses what has no canvas."""
  flat = [_flatten(jaxpr, consts, outer) for jaxpr, consts in traces]
  steps: list[_Step] = []
  for k, last in enumerate(flat[-1].ops):
    row = [f.ops[k] for f in flat if k < len(f.ops)]
    alike = all(op.eqn.primitive is last.eqn.primitive for op in row)
    if len(row) < len(flat) or not alike:
      raise ValueError(
        f'{name} has no canvas: it is another program at another size, from '
        f'{_op(last)} on.'
      )
    steps.append(_step(row, name))
  if any(len(f.ops) != len(flat[-1].ops) for f in flat):
    raise ValueError(
      f'{name} has no canvas: it has fewer operations at its largest size.'
    )
  outputs = zip(*(f.outputs for f in flat), strict=True)
  return _Program(flat[-1].inputs, steps, [_operand(c) for c in outputs])


class _Op(NamedTuple):
  """One operation of a trace at one size."""

  eqn: Any
  where: str
  reads: list[_Slot]
  writes: list[_Slot]


class _Flat(NamedTuple):
  """A trace at one size, its calls inlined."""

  inputs: list[_Slot]
  ops: list[_Op]
  outputs: list[_Slot]


def _flatten(jaxpr: Any, consts: Sequence[Any], outer: str) -> _Flat:
  """Returns the operations of a trace, its calls inlined."""
  ops: list[_Op] = []

  def walk(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Slot], outer: str
  ) -> list[_Slot]:
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {
      var: _Slot(var.aval, value)
      for var, value in zip(jaxpr.constvars, consts, strict=True)
    }

    def read(var: Any) -> _Slot:
      aval = var.aval
      if isinstance(var, jex.Literal):
        return _Slot(aval, np.asarray(var.val, aval.dtype))
      return env[var]

    for eqn in jaxpr.eqns:
      where = line_of(eqn.source_info, outer)
      reads = [read(var) for var in eqn.invars]
      if eqn.primitive.name in INLINED:
        writes = walk(*body_of(eqn.params), reads, where)
      else:
        writes = [_Slot(var.aval) for var in eqn.outvars]
        ops.append(_Op(eqn, where, reads, writes))
      env |= dict(zip(eqn.outvars, writes, strict=True))
    return [read(var) for var in jaxpr.outvars]

  inputs = [_Slot(var.aval) for var in jaxpr.invars]
  outputs = walk(jaxpr, consts, inputs, outer)
  return _Flat(inputs, ops, outputs)


def _operand(slots: Sequence[_Slot]) -> Any:
  """Returns a slot, or a constant: one value, or one for each size."""
  if slots[-1].constant is None:
    return slots[-1]
  return _tabulate([slot.constant for slot in slots])


def _tabulate(values: Sequence[Any]) -> Any:
  """Returns one value if all are equal, else a table, padded at the end.

  Of the divisors 2.0 and 4.0 the table [2.0, 4.0]; of the positions [0, 1] and
  [0, 1, 2] the table [[0, 1, 0], [0, 1, 2]].
  """
  last = values[-1]
  if all(v is last for v in values) or jnp.issubdtype(
    jnp.asarray(last).dtype, jax.dtypes.extended
  ):
    return last
  host = [np.asarray(v) for v in values]
  if all(np.array_equal(v, host[-1]) for v in host):
    return last
  padded = [np.zeros_like(host[-1]) for _ in host]
  for full, value in zip(padded, host, strict=True):
    full[tuple(slice(n) for n in value.shape)] = value
  return _Table(np.stack(padded))


def _op(op: _Op) -> str:
  return f'{op.eqn.primitive.name} at {op.where}'


def _step(row: Sequence[_Op], name: str) -> _Step:
  """Returns one operation at all sizes; refuses what cannot be padded."""
  last = row[-1]
  primitive = last.eqn.primitive.name
  columns = list(zip(*(op.reads for op in row), strict=True))
  reads = [_operand(column) for column in columns]
  inputs = [_sizes(column) for column in columns]
  outputs = [
    _sizes(column) for column in zip(*(op.writes for op in row), strict=True)
  ]
  clear: list[Any] = [None] * len(reads)
  bodies: list[Any] = []
  border: Sizes | None = None
  eqns = [op.eqn for op in row]

  def refuse(why: str) -> NoReturn:
    raise ValueError(f'{name} has no canvas: {_op(last)}, {why}.')

  if primitive == 'name' and last.eqn.params['name'] == BORDER:
    (shapes,) = inputs
    # Images: [batch, rows, columns, channels], of which 1 and 2 may differ.
    is_image = not is_ragged(shapes) and len(shapes[0]) == 4
    if not is_image or set(varying(shapes)) - {1, 2}:
      refuse('where sizes can change between images alone')
    border = shapes
  elif primitive in ('cond', 'remat2'):
    bodies = _bodies(row, name)
    if any(step.border for body in bodies for step in body.steps):
      refuse('within which sizes cannot change')
  elif any(map(is_ragged, (*inputs, *outputs))):
    # A value of another rank at another size. An axis of 1 may come or go.
    small = not any(map(varying, inputs))
    if primitive not in ('squeeze', 'broadcast_in_dim') or not small:
      refuse('which has other axes at another size')
  elif any(map(varying, (*inputs, *outputs))):
    rule = known(primitive).canvas
    if primitive in ELEMENTWISE:
      rule = elementwise
    if primitive in POINTWISE_CALLS and is_pointwise(eqns):
      rule = pointwise
    if rule is None:
      refuse('which cannot tell the image from what is around it')
    neutral = rule(eqns, inputs, outputs, refuse)
    clear = [
      (value, sizes) if value is not None and varying(sizes) else None
      for value, sizes in zip(neutral, inputs, strict=True)
    ]
  elif not same_params(eqns):
    refuse('whose parameters depend on the size')
  return _Step(
    eqn=last.eqn,
    writes=last.writes,
    reads=reads,
    clear=clear,
    bodies=bodies,
    border=border,
  )


def _bodies(row: Sequence[_Op], name: str) -> list[_Program]:
  """Returns the aligned programs of a condition or of a recomputation."""
  eqns, where = [op.eqn for op in row], row[-1].where
  if eqns[-1].primitive.name != 'cond':
    return [_align([body_of(eqn.params) for eqn in eqns], name, where)]
  branches = zip(*(eqn.params['branches'] for eqn in eqns), strict=True)
  return [
    _align([body_of({'jaxpr': body}) for body in column], name, where)
    for column in branches
  ]


# --- Running -----------------------------------------------------------------


class _Canvas:
  """A run of aligned programs at sizes given by traced indices, one a part."""

  def __init__(self, indices: jax.Array):
    self.indices = indices
    self.part = 0

  @property
  def index(self) -> jax.Array:
    """The size of the part that runs, int scalar."""
    return self.indices[self.part]

  def __call__(self, program: _Program, args: Sequence[Any]) -> list[Any]:
    """Runs a program on arguments of the largest size."""
    env = dict(zip(program.inputs, args, strict=True))

    def read(operand: Any) -> Any:
      if isinstance(operand, _Slot):
        return env[operand]
      if isinstance(operand, _Table):
        return jnp.asarray(operand.values)[self.index]
      return operand

    for step in program.steps:
      values = [read(operand) for operand in step.reads]
      env |= dict(zip(step.writes, self.apply(step, values), strict=True))
    return [read(operand) for operand in program.outputs]

  def apply(self, step: _Step, values: list[Any]) -> list[Any]:
    """Runs one operation."""
    eqn = step.eqn
    if step.border is not None:
      sides = jnp.asarray([shape[1:3] for shape in step.border])
      before = sides[self.index]
      self.part += 1  # From here on, the size of the next part holds.
      return [bilinear(values[0], sides[self.index], before)]
    if eqn.primitive.name == 'cond':
      branch, *operands = values
      calls = [
        lambda *xs, body=body: tuple(self(body, xs)) for body in step.bodies
      ]
      return list(lax.switch(branch.astype(jnp.int32), calls, *operands))
    if step.bodies:
      (body,) = step.bodies
      options = {k: eqn.params[k] for k in ('prevent_cse', 'policy')}

      def call(*xs: Any) -> tuple[Any, ...]:
        return tuple(self(body, xs))

      return list(jax.checkpoint(call, **options)(*values))
    values = [
      value if clear is None else self.clear(value, clear, values)
      for value, clear in zip(values, step.clear, strict=True)
    ]
    outs = bind(eqn.primitive, values, eqn.params)
    return list(outs) if eqn.primitive.multiple_results else [outs]

  def clear(self, value: Any, clear: Any, values: list[Any]) -> Any:
    """Returns a value with what is around the image filled in.

    Args:
      value: an array of the largest size.
      clear: (neutral element of the operation, sizes of the value).
      values: all operands; PADDING fills in what a ``pad`` does, the second.
    """
    neutral, sizes = clear
    value = jnp.asarray(value)
    if neutral is PADDING:
      fill = jnp.asarray(values[1], value.dtype)
    else:
      fill = jnp.asarray(neutral_of(neutral, value.dtype), value.dtype)
    inside = jnp.ones((1,) * value.ndim, bool)
    for k in varying(sizes):
      length = jnp.asarray([shape[k] for shape in sizes])[self.index]
      axis = lax.broadcasted_iota(
        jnp.int32, [n if j == k else 1 for j, n in enumerate(value.shape)], k
      )
      inside = inside & (axis < length)
    return jnp.where(inside, value, fill.reshape((1,) * value.ndim))


def _name(fn: Callable[..., Any]) -> str:
  """Returns what errors call a function."""
  while isinstance(fn, functools.partial):
    fn = fn.func
  return f'Function {getattr(fn, "__name__", type(fn).__name__)!r}'


def _shapes(args: Any) -> str:
  """Returns the shapes of the last arguments; the params come before them."""
  return ', '.join(str(np.shape(x)) for x in jax.tree.leaves(args)[-3:])
