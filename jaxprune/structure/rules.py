"""What each primitive does to axis types, and to its own static sizes.

A rule reads the axes of an equation's inputs, sets those of its outputs, and
returns how to recompute the equation's parameters for other sizes (or None
where they hold no size). That is all there is to know of a primitive: the
types say what shrinks together, and the parameters make the smaller program.
A primitive without a rule locks every axis that it touches, under its name.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis, Size

SizeOf = Callable[[Axis], Size]
Resize = Callable[[SizeOf], dict[str, Any]]


@dataclasses.dataclass(eq=False, slots=True)
class Value:
  """An array of the traced program.

  Attributes:
    shape: its shape in the original program.
    dtype: its dtype.
    axes: the type of each of its axes.
    constant: its value, where the program closes over it or spells it out.
    sources: paths of the leaves it is computed from, if from leaves alone.
    has_data: whether it depends on an argument of the function.
  """

  shape: tuple[Size, ...]
  dtype: Any
  axes: list[Axis] = dataclasses.field(default_factory=list)
  constant: Any = None
  sources: frozenset[str] = frozenset()
  has_data: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
  """One operation of the traced program, with typed inputs and outputs.

  Attributes:
    primitive: the JAX primitive.
    params: its parameters in the original program.
    inputs: its operands.
    outputs: its results.
    why: the operation and the line of the user's code that called it.
    resize: its parameters at other sizes; None where they hold no size.
    evaluate: how to run it where binding the primitive is not enough.
    programs: the typed bodies of control flow.
    reductions: the axes it reduces over.
    products: for a matrix product or convolution, the axes whose sizes
      multiply to its number of multiply-adds.
  """

  primitive: Any
  params: dict[str, Any]
  inputs: list[Value]
  outputs: list[Value]
  why: str
  resize: Resize | None = None
  evaluate: Callable[..., list[Any]] | None = None
  programs: tuple[Any, ...] = ()
  reductions: list[Axis] = dataclasses.field(default_factory=list)
  products: list[Axis] | None = None


Rule = Callable[[Equation], Resize | None]
RULES: dict[str, Rule] = {}

_ELEMENTWISE_NAMES = """
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
  bessel_i1e cbrt ceil clamp convert_element_type copy copy_p cos cosh
  device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge
  gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic
  lt max min mul name ne neg nextafter not or polygamma population_count pow
  pvary real reduce_precision regularized_incomplete_beta rem round rsqrt
  select_n shift_left shift_right_arithmetic shift_right_logical sign sin
  sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


def infer(eqn: Equation) -> None:
  """Types the outputs of an equation by the rule of its primitive."""
  rule = RULES.get(eqn.primitive.name)
  if eqn.primitive.name in ELEMENTWISE:
    rule = _elementwise
  if rule is None:
    lock_all(eqn, f'{eqn.why} has no rule')
  else:
    eqn.resize = rule(eqn)


def lock_all(eqn: Equation, why: str) -> None:
  """Keeps every axis of the inputs and outputs of an equation whole."""
  for value in eqn.inputs:
    for axis in value.axes:
      ax.lock(axis, why)
  for value in eqn.outputs:
    value.axes = [ax.atom(n, why) for n in value.shape]


def rule(*names: str) -> Callable[[Rule], Rule]:
  """Registers a function as the rule of the primitives of these names."""

  def register(fn: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, fn))
    return fn

  return register


def _elementwise(eqn: Equation) -> None:
  """Axes of equal size are one; lax broadcasts axes of size 1 implicitly."""
  (out,) = eqn.outputs
  axes: list[Axis | None] = [None] * len(out.shape)
  for value in eqn.inputs:
    if len(value.shape) != len(out.shape):
      continue
    for k, (axis, n) in enumerate(zip(value.axes, out.shape, strict=True)):
      if not _same(value.shape[k], n):
        continue
      known = axes[k]
      if known is None:
        axes[k] = axis
      else:
        ax.unify(known, axis, eqn.why)
  out.axes = [
    ax.atom(n) if axis is None else axis
    for axis, n in zip(axes, out.shape, strict=True)
  ]


@rule('bitcast_convert_type')
def _bitcast(eqn: Equation) -> None:
  """To a dtype of the same size; any other adds or takes an axis."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  if len(x.shape) == len(out.shape):
    return _elementwise(eqn)
  return lock_all(eqn, f'{eqn.why} changes the number of axes')


@rule('optimization_barrier')
def _barrier(eqn: Equation) -> None:
  for value, out in zip(eqn.inputs, eqn.outputs, strict=True):
    out.axes = list(value.axes)


@rule('broadcast_in_dim')
def _broadcast(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  out.axes = [ax.atom(n) for n in out.shape]
  for axis, n, k in zip(
    x.axes, x.shape, eqn.params['broadcast_dimensions'], strict=True
  ):
    if _same(n, out.shape[k]):
      out.axes[k] = axis
  return lambda size: {'shape': _shape(out, size)}


@rule('iota')
def _iota(eqn: Equation) -> Resize:
  (out,) = eqn.outputs
  counted = eqn.params['dimension']
  out.axes = [
    ax.atom(n, f'{eqn.why} numbers its entries' if k == counted else None)
    for k, n in enumerate(out.shape)
  ]
  return lambda size: {'shape': _shape(out, size)}


@rule('transpose')
def _transpose(eqn: Equation) -> None:
  eqn.outputs[0].axes = [
    eqn.inputs[0].axes[k] for k in eqn.params['permutation']
  ]


@rule('squeeze')
def _squeeze(eqn: Equation) -> None:
  eqn.outputs[0].axes = _drop(eqn.inputs[0].axes, eqn.params['dimensions'])


@rule('expand_dims')
def _expand_dims(eqn: Equation) -> None:
  (out,) = eqn.outputs
  rest = iter(eqn.inputs[0].axes)
  new = eqn.params['dimensions']
  out.axes = [
    ax.atom(1) if k in new else next(rest) for k in range(len(out.shape))
  ]


@rule('reshape')
def _reshape(eqn: Equation) -> Resize | None:
  """Splits both shapes into the shortest runs of equal product."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  runs = None
  if eqn.params.get('dimensions') is None:
    runs = _matching_runs(x.shape, out.shape)
  if runs is None:
    return lock_all(eqn, f'{eqn.why} cannot be followed')
  out.axes = [ax.atom(n) for n in out.shape]
  for before, after in runs:
    whole = ax.product(x.axes[k] for k in before)
    if len(after) == 1:
      out.axes[after[0]] = whole
      continue
    parts = ax.factors(whole)
    if len(parts) == len(after) and all(
      _same(p.size, out.shape[k]) for p, k in zip(parts, after, strict=True)
    ):
      for part, k in zip(parts, after, strict=True):
        out.axes[k] = part
      continue
    pieces = [out.axes[k] for k in after]
    ax.unify(whole, Axis(whole.size, 'product', pieces), eqn.why)
  return lambda size: {'new_sizes': _shape(out, size)}


def _matching_runs(
  a: Sequence[Size], b: Sequence[Size]
) -> list[tuple[list[int], list[int]]] | None:
  """Pairs runs of axes of two shapes with equal products, 1s left out."""
  left = [k for k, n in enumerate(a) if not _same(n, 1)]
  right = [k for k, n in enumerate(b) if not _same(n, 1)]
  if any(_same(n, 0) for n in (*a, *b)):
    return None
  runs = []
  while left and right:
    before, after = [left.pop(0)], [right.pop(0)]
    m, n = a[before[0]], b[after[0]]
    while not _same(m, n):
      try:
        grow_left = bool(m < n)
      except Exception:  # Two symbolic sizes that cannot be compared.
        return None
      rest = left if grow_left else right
      if not rest:
        return None
      if grow_left:
        before.append(left.pop(0))
        m *= a[before[-1]]
      else:
        after.append(right.pop(0))
        n *= b[after[-1]]
    runs.append((before, after))
  return None if left or right else runs


@rule('dot_general')
def _dot_general(eqn: Equation) -> None:
  (left, right), (out,) = eqn.inputs, eqn.outputs
  (contract, batch) = eqn.params['dimension_numbers']
  for a, b in itertools.chain(
    zip(*contract, strict=True), zip(*batch, strict=True)
  ):
    ax.unify(left.axes[a], right.axes[b], eqn.why)
  free_left = _drop(left.axes, (*contract[0], *batch[0]))
  free_right = _drop(right.axes, (*contract[1], *batch[1]))
  out.axes = [left.axes[a] for a in batch[0]] + free_left + free_right
  eqn.products = [*out.axes, *(left.axes[a] for a in contract[0])]


@rule('conv_general_dilated')
def _convolution(eqn: Equation) -> Resize | None:
  """Channels of g groups are products: g x in of the data, g x out."""
  if eqn.params['batch_group_count'] != 1:
    return lock_all(eqn, f'{eqn.why} groups its batch')
  (data, kernel), (out,) = eqn.inputs, eqn.outputs
  numbers, groups = (
    eqn.params['dimension_numbers'],
    eqn.params['feature_group_count'],
  )
  for k in numbers.lhs_spec[2:]:
    ax.lock(data.axes[k], f'{eqn.why} slides along it')
  for k in numbers.rhs_spec[2:]:
    ax.lock(kernel.axes[k], f'{eqn.why} slides along it')
  channels = data.axes[numbers.lhs_spec[1]]
  k_out, k_in = (kernel.axes[k] for k in numbers.rhs_spec[:2])
  resize = None
  if groups == 1:
    ax.unify(channels, k_in, eqn.why)
  else:
    group = ax.atom(groups)
    each = ax.atom(kernel.shape[numbers.rhs_spec[0]] // groups)
    ax.unify(channels, ax.product([group, k_in]), eqn.why)
    ax.unify(k_out, ax.product([group, each]), eqn.why)
    resize = lambda size: {'feature_group_count': size(group)}
  why = f'{eqn.why} slides along it'
  out.axes = [ax.atom(n, why) for n in out.shape]
  out.axes[numbers.out_spec[0]] = data.axes[numbers.lhs_spec[0]]
  out.axes[numbers.out_spec[1]] = k_out
  eqn.products = [*out.axes, *(kernel.axes[k] for k in numbers.rhs_spec[1:])]
  return resize


@rule('concatenate')
def _concatenate(eqn: Equation) -> None:
  (out,), joined = eqn.outputs, eqn.params['dimension']
  first, *others = eqn.inputs
  out.axes = list(first.axes)
  for value in others:
    for k, axis in enumerate(value.axes):
      if k != joined:
        ax.unify(out.axes[k], axis, eqn.why)
  out.axes[joined] = ax.concatenation(v.axes[joined] for v in eqn.inputs)


@rule('split')
def _split(eqn: Equation) -> Resize:
  x, axis = eqn.inputs[0], eqn.params['axis']
  parts = [ax.atom(n) for n in eqn.params['sizes']]
  ax.unify(x.axes[axis], ax.concatenation(parts), eqn.why)
  for out, part in zip(eqn.outputs, parts, strict=True):
    out.axes = list(x.axes)
    out.axes[axis] = part
  return lambda size: {'sizes': tuple(size(part) for part in parts)}


@rule('slice')
def _slice(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
  strides = eqn.params['strides'] or (1,) * len(x.shape)
  parts: dict[int, tuple[Axis, Axis]] = {}
  out.axes = []
  for k, (axis, n) in enumerate(zip(x.axes, x.shape, strict=True)):
    start, limit = starts[k], limits[k]
    if _same(start, 0) and _same(limit, n) and strides[k] == 1:
      out.axes.append(axis)
    elif strides[k] != 1 or ax.is_locked(axis):
      ax.lock(axis, f'{eqn.why} takes a part of it')
      out.axes.append(ax.atom(out.shape[k], f'{eqn.why} made it'))
    else:
      pieces = [ax.atom(start), ax.atom(limit - start), ax.atom(n - limit)]
      ax.unify(axis, ax.concatenation(pieces), eqn.why)
      parts[k] = (pieces[0], pieces[1])
      out.axes.append(pieces[1])

  def resize(size: SizeOf) -> dict[str, Any]:
    new_starts, new_limits = list(starts), list(limits)
    for k, axis in enumerate(x.axes):
      if k in parts:
        new_starts[k] = size(parts[k][0])
        new_limits[k] = new_starts[k] + size(parts[k][1])
      elif _same(limits[k], x.shape[k]):
        new_limits[k] = size(axis)
    return {
      'start_indices': tuple(new_starts),
      'limit_indices': tuple(new_limits),
    }

  return resize


@rule('pad')
def _pad(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  margins: dict[int, tuple[Axis, Axis]] = {}
  out.axes = []
  for k, config in enumerate(eqn.params['padding_config']):
    low, high, inner = map(int, config)
    axis = x.axes[k]
    if low == high == inner == 0:
      out.axes.append(axis)
    elif min(low, high) < 0 or inner or ax.is_locked(axis):
      ax.lock(axis, f'{eqn.why} pads it')
      out.axes.append(ax.atom(out.shape[k], f'{eqn.why} made it'))
    else:
      margins[k] = (ax.atom(low), ax.atom(high))
      out.axes.append(ax.concatenation([margins[k][0], axis, margins[k][1]]))

  def resize(size: SizeOf) -> dict[str, Any]:
    config = [
      (size(margins[k][0]), size(margins[k][1]), 0) if k in margins else old
      for k, old in enumerate(eqn.params['padding_config'])
    ]
    return {'padding_config': tuple(config)}

  return resize


@rule(
  'reduce_sum',
  'reduce_max',
  'reduce_min',
  'reduce_prod',
  'reduce_and',
  'reduce_or',
  'reduce_xor',
)
def _reduce(eqn: Equation) -> None:
  x = eqn.inputs[0]
  eqn.reductions = [x.axes[k] for k in eqn.params['axes']]
  eqn.outputs[0].axes = _drop(x.axes, eqn.params['axes'])


@rule('argmax', 'argmin')
def _arg_reduce(eqn: Equation) -> None:
  x = eqn.inputs[0]
  for k in eqn.params['axes']:
    ax.lock(x.axes[k], f'{eqn.why} numbers its entries')
  eqn.outputs[0].axes = _drop(x.axes, eqn.params['axes'])


@rule(
  'reduce_window_max',
  'reduce_window_min',
  'reduce_window_sum',
  'reduce_window',
)
def _reduce_window(eqn: Equation) -> None:
  (out, *more), params = eqn.outputs, eqn.params
  if more:
    return lock_all(eqn, f'{eqn.why} reduces several arrays at once')
  x = eqn.inputs[0]
  dilation = params.get('base_dilation') or (1,) * len(x.shape)
  out.axes = []
  for k, axis in enumerate(x.axes):
    if (
      params['window_dimensions'][k] == params['window_strides'][k] == 1
      and tuple(params['padding'][k]) == (0, 0)
      and dilation[k] == 1
    ):
      out.axes.append(axis)
    else:
      ax.lock(axis, f'{eqn.why} slides along it')
      out.axes.append(ax.atom(out.shape[k], f'{eqn.why} slides along it'))
  return None


@rule(
  'cumsum',
  'cumprod',
  'cummax',
  'cummin',
  'cumlogsumexp',
  'rev',
  'sort',
  'top_k',
)
def _along(eqn: Equation) -> None:
  """Operations whose result along some axes depends on order or number."""
  params, first = eqn.params, eqn.inputs[0]
  along = params.get(
    'axis', params.get('dimension', params.get('dimensions', -1))
  )
  along = along if isinstance(along, tuple) else (along,)
  along = {k % len(first.shape) for k in along if k is not None}
  for value in eqn.inputs:
    for k, axis in enumerate(value.axes):
      if k in along:
        ax.lock(axis, f'{eqn.why} runs along it')
      else:
        ax.unify(first.axes[k], axis, eqn.why)
  for out in eqn.outputs:
    out.axes = [
      ax.atom(n, f'{eqn.why} runs along it') if k in along else first.axes[k]
      for k, n in enumerate(out.shape)
    ]


@rule('tile')
def _tile(eqn: Equation) -> None:
  x, (out,) = eqn.inputs[0], eqn.outputs
  times = [ax.atom(r, f'{eqn.why} counts it') for r in eqn.params['reps']]
  out.axes = [
    ax.product([time, axis]) for time, axis in zip(times, x.axes, strict=True)
  ]


@rule('stack')
def _stack(eqn: Equation) -> None:
  first, *others = eqn.inputs
  for value in others:
    for a, b in zip(first.axes, value.axes, strict=True):
      ax.unify(a, b, eqn.why)
  new = ax.atom(len(eqn.inputs), f'{eqn.why} made it')
  axes = list(first.axes)
  axes.insert(eqn.params['axis'], new)
  eqn.outputs[0].axes = axes


@rule('unstack')
def _unstack(eqn: Equation) -> None:
  x, axis = eqn.inputs[0], eqn.params['axis']
  ax.lock(x.axes[axis], f'{eqn.why} takes it apart')
  for out in eqn.outputs:
    out.axes = _drop(x.axes, (axis,))


@rule('dynamic_slice')
def _dynamic_slice(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  sizes = eqn.params['slice_sizes']
  out.axes = _taken(x, sizes, eqn.why)
  return lambda size: {'slice_sizes': _window(x, sizes, size)}


@rule('dynamic_update_slice')
def _dynamic_update_slice(eqn: Equation) -> None:
  x, update = eqn.inputs[:2]
  for a, b, n, m in zip(
    x.axes, update.axes, x.shape, update.shape, strict=True
  ):
    if _same(n, m):
      ax.unify(a, b, eqn.why)
    else:
      ax.lock(a, f'{eqn.why} writes a part of it')
      ax.lock(b, f'{eqn.why} writes it into a part')
  eqn.outputs[0].axes = list(x.axes)


@rule('gather')
def _gather(eqn: Equation) -> Resize:
  (x, index), (out,) = eqn.inputs, eqn.outputs
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  batching = tuple(numbers.operand_batching_dims)
  gone = {*numbers.collapsed_slice_dims, *batching}
  for k in numbers.collapsed_slice_dims:
    ax.lock(x.axes[k], f'{eqn.why} indexes it')
  for k, j in zip(batching, numbers.start_indices_batching_dims, strict=True):
    ax.unify(x.axes[k], index.axes[j], eqn.why)
  ax.lock(index.axes[-1], f'{eqn.why} reads it as one index')
  taken = _taken(x, sizes, eqn.why)
  offsets = iter(axis for k, axis in enumerate(taken) if k not in gone)
  batch = iter(index.axes[:-1])
  out.axes = [
    next(offsets) if k in numbers.offset_dims else next(batch)
    for k in range(len(out.shape))
  ]
  return lambda size: {'slice_sizes': _window(x, sizes, size)}


@rule('random_bits')
def _random_bits(eqn: Equation) -> None:
  """Bits are drawn at the original shape and cut: the same for what is left."""
  (out,) = eqn.outputs
  out.axes = [ax.atom(n) for n in out.shape]
  original = dict(eqn.params)

  def evaluate(run: Any, values: list[Any]) -> list[Any]:
    bits = run.bind(eqn.primitive, values, original)
    return [run.take(bits, out.axes)]

  eqn.evaluate = evaluate


def _taken(x: Value, sizes: Sequence[Size], why: str) -> list[Axis]:
  """Axes of a window: those it spans whole pass, the others are locked."""
  axes = []
  for axis, n, m in zip(x.axes, x.shape, sizes, strict=True):
    if _same(n, m):
      axes.append(axis)
    else:
      ax.lock(axis, f'{why} takes a part of it')
      axes.append(ax.atom(m, f'{why} made it'))
  return axes


def _window(x: Value, sizes: Sequence[Size], size: SizeOf) -> tuple[Size, ...]:
  return tuple(
    size(axis) if _same(n, m) else m
    for axis, n, m in zip(x.axes, x.shape, sizes, strict=True)
  )


def _drop(axes: Sequence[Axis], gone: Sequence[int]) -> list[Axis]:
  return [axis for k, axis in enumerate(axes) if k not in gone]


def _shape(value: Value, size: SizeOf) -> tuple[Size, ...]:
  return tuple(size(axis) for axis in value.axes)


def _same(n: Size, m: Size) -> bool:
  return bool(n == m)
