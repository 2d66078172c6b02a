"""Rules of what joins arrays or takes them apart, by place or by index."""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis, Size
from jaxprune.structure.rules.base import (
  Equation,
  Resize,
  SizeOf,
  Value,
  known_entries,
  rule,
  same,
)


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


class _Steps(NamedTuple):
  """Every s-th entry of an axis, as the axis is taken apart for it.

  Blocks of s entries follow each other, and ``offset`` is where the entry that
  is taken stands in each: of 8 entries [1::2] takes the second of 4 pairs. Of
  7 entries [::2] takes the first of 3 pairs, and the last entry.

  Attributes:
    before: the entries before the first block.
    blocks: how many blocks there are: the entries taken, but for one alone.
    after: the entries behind the last block.
    offset: as above.
    last: the entry that is taken behind the blocks, or an empty axis.
    stride: s.
    why: the operation that takes them.
  """

  before: Axis
  blocks: Axis
  after: Axis
  offset: int
  last: Axis
  stride: int
  why: str

  def whole(self) -> Axis:
    """Returns the type of the axis: the entries of a block go together."""
    within = ax.atom(self.stride, f'{self.why} takes them by turns')
    block = ax.product([self.blocks, within])
    return ax.concatenation([self.before, block, self.after])

  def taken(self) -> Axis:
    """Returns the type of what is taken."""
    return ax.concatenation([self.blocks, self.last])

  def start(self, size: SizeOf) -> Size:
    """Returns where the first entry stands, at other sizes."""
    return size(self.before) + self.offset

  def stop(self, size: SizeOf) -> Size:
    """Returns the place behind the last entry that is taken."""
    count = size(self.blocks) + size(self.last)
    return self.start(size) + self.stride * (count - 1) + 1


def _steps(start: int, stride: int, count: int, n: int, why: str) -> _Steps:
  """Takes an axis of n entries apart for the entries start + stride * i."""
  # In step with the start of the axis, for [::2] and [1::2] to share blocks.
  offset = start % stride
  first = start - offset
  if first + stride * count > n:
    # In step with its end, where that leaves room: [2:5:2] of 5 entries.
    offset = max(start + stride * count - n, offset)
  if offset < stride and offset <= start:
    first, blocks = start - offset, count
  else:
    offset, blocks = start % stride, count - 1
  rest = n - first - stride * blocks
  return _Steps(
    ax.atom(first),
    ax.atom(blocks),
    ax.atom(rest, None if blocks == count else f'{why} takes one of it'),
    offset,
    ax.atom(count - blocks),
    stride,
    why,
  )


@rule('slice')
def _slice(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
  strides = eqn.params['strides'] or (1,) * len(x.shape)
  parts: dict[int, tuple[Axis, Axis]] = {}
  steps: dict[int, _Steps] = {}
  out.axes = []
  for k, (axis, n) in enumerate(zip(x.axes, x.shape, strict=True)):
    start, limit = starts[k], limits[k]
    if same(start, 0) and same(limit, n) and strides[k] == 1:
      out.axes.append(axis)
    elif ax.is_locked(axis) or (strides[k] != 1 and not isinstance(n, int)):
      ax.lock(axis, f'{eqn.why} takes a part of it')
      out.axes.append(ax.atom(out.shape[k], f'{eqn.why} made it'))
    elif strides[k] != 1:
      steps[k] = _steps(start, strides[k], out.shape[k], n, eqn.why)
      ax.unify(axis, steps[k].whole(), eqn.why)
      out.axes.append(steps[k].taken())
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
      elif k in steps:
        new_starts[k], new_limits[k] = steps[k].start(size), steps[k].stop(size)
      elif same(limits[k], x.shape[k]):
        new_limits[k] = size(axis)
    return {
      'start_indices': tuple(new_starts),
      'limit_indices': tuple(new_limits),
    }

  return resize


@rule('pad')
def _pad(eqn: Equation) -> Resize:
  """Zeros around an axis, or (the derivative of a stride) between entries."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  margins: dict[int, tuple[Axis, Axis]] = {}
  steps: dict[int, _Steps] = {}
  out.axes = []
  for k, config in enumerate(eqn.params['padding_config']):
    low, high, inner = map(int, config)
    axis, n = x.axes[k], out.shape[k]
    if low == high == inner == 0:
      out.axes.append(axis)
    elif (
      min(low, high) < 0
      or ax.is_locked(axis)
      or (inner and not isinstance(n, int))
    ):
      ax.lock(axis, f'{eqn.why} pads it')
      out.axes.append(ax.atom(out.shape[k], f'{eqn.why} made it'))
    elif inner:
      steps[k] = _steps(low, inner + 1, x.shape[k], n, eqn.why)
      ax.unify(axis, steps[k].taken(), eqn.why)
      out.axes.append(steps[k].whole())
    else:
      margins[k] = (ax.atom(low), ax.atom(high))
      out.axes.append(ax.concatenation([margins[k][0], axis, margins[k][1]]))

  def resize(size: SizeOf) -> dict[str, Any]:
    config = [
      (size(margins[k][0]), size(margins[k][1]), 0) if k in margins else old
      for k, old in enumerate(eqn.params['padding_config'])
    ]
    for k, step in steps.items():
      behind = size(out.axes[k]) - step.stop(size)
      config[k] = (step.start(size), behind, step.stride - 1)
    return {'padding_config': tuple(config)}

  return resize


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
    if same(n, m):
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
  collapsed = numbers.collapsed_slice_dims
  is_picked = numbers.start_index_map == collapsed and _pick(
    x, index, collapsed, eqn.why
  )
  for k in () if is_picked else collapsed:
    ax.lock(x.axes[k], f'{eqn.why} indexes it')
  for k, j in zip(batching, numbers.start_indices_batching_dims, strict=True):
    ax.unify(x.axes[k], index.axes[j], eqn.why)
  ax.lock(index.axes[-1], f'{eqn.why} reads it as one index')
  offsets = iter(_taken(x, sizes, eqn.why, gone))
  batch = iter(index.axes[:-1])
  out.axes = [
    next(offsets) if k in numbers.offset_dims else next(batch)
    for k in range(len(out.shape))
  ]
  return lambda size: {'slice_sizes': _window(x, sizes, size)}


@rule(
  'scatter',
  'scatter-add',
  'scatter-sub',
  'scatter-mul',
  'scatter-min',
  'scatter-max',
)
def _scatter(eqn: Equation) -> None:
  """The derivative of a gather: what a window spans whole passes."""
  x, index, update = eqn.inputs
  numbers = eqn.params['dimension_numbers']
  batching = tuple(numbers.operand_batching_dims)
  inserted = tuple(numbers.inserted_window_dims)
  is_picked = numbers.scatter_dims_to_operand_dims == inserted and _pick(
    x, index, inserted, eqn.why
  )
  for k in () if is_picked else inserted:
    ax.lock(x.axes[k], f'{eqn.why} indexes it')
  for k, j in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
    ax.unify(x.axes[k], index.axes[j], eqn.why)
  ax.lock(index.axes[-1], f'{eqn.why} reads it as one index')
  window = [k for k in range(len(x.shape)) if k not in (*inserted, *batching)]
  places = dict(zip(numbers.update_window_dims, window, strict=True))
  batch = iter(index.axes[:-1])
  for j, axis in enumerate(update.axes):
    if j not in places:
      ax.unify(axis, next(batch), eqn.why)
    elif same(update.shape[j], x.shape[places[j]]):
      ax.unify(axis, x.axes[places[j]], eqn.why)
    else:
      ax.lock(axis, f'{eqn.why} writes it into a part')
      ax.lock(x.axes[places[j]], f'{eqn.why} writes a part of it')
  eqn.outputs[0].axes = list(x.axes)


def _pick(x: Value, index: Value, along: Sequence[int], why: str) -> bool:
  """Types a constant index into one axis, where each entry has one place.

  What it takes must be neighbours, in whatever order: [3, 1, 2] takes the
  entries 1 to 3, permuted. The index is cut with what is taken, and its numbers
  follow those that are left.

  Returns:
    Whether it is such an index.
  """
  if index.constant is None or len(along) != 1 or index.shape[1:] != (1,):
    return False
  axis, n = x.axes[along[0]], x.shape[along[0]]
  entries = known_entries(index.constant)
  if entries is None or not entries.size:
    return False
  low, high = int(entries.min()), int(entries.max()) + 1
  if not isinstance(n, int) or low < 0 or high > n or ax.is_locked(axis):
    return False
  if not np.array_equal(np.sort(entries[:, 0]), np.arange(low, high)):
    return False
  taken = ax.atom(len(entries))
  middle = ax.permuted(taken, np.argsort(entries[:, 0]), why)
  whole = ax.concatenation([ax.atom(low), middle, ax.atom(n - high)])
  ax.unify(axis, whole, why)
  ax.unify(index.axes[0], taken, why)
  index.constant, index.indexes = entries, axis
  return True


def _taken(
  x: Value, sizes: Sequence[Size], why: str, gone: Container[int] = ()
) -> list[Axis]:
  """Axes of a window: those it spans whole pass, the others are locked."""
  axes = []
  for k, (axis, n, m) in enumerate(zip(x.axes, x.shape, sizes, strict=True)):
    if k in gone:
      continue
    if same(n, m):
      axes.append(axis)
    else:
      ax.lock(axis, f'{why} takes a part of it')
      axes.append(ax.atom(m, f'{why} made it'))
  return axes


def _window(x: Value, sizes: Sequence[Size], size: SizeOf) -> tuple[Size, ...]:
  return tuple(
    size(axis) if same(n, m) else m
    for axis, n, m in zip(x.axes, x.shape, sizes, strict=True)
  )
