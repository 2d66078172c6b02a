"""Rules of what joins arrays or takes them apart, by place or by index."""

from collections.abc import Sequence
from typing import Any

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis, Size
from jaxprune.structure.rules.base import (
  Equation,
  Resize,
  SizeOf,
  Value,
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


@rule('slice')
def _slice(eqn: Equation) -> Resize:
  x, (out,) = eqn.inputs[0], eqn.outputs
  starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
  strides = eqn.params['strides'] or (1,) * len(x.shape)
  parts: dict[int, tuple[Axis, Axis]] = {}
  out.axes = []
  for k, (axis, n) in enumerate(zip(x.axes, x.shape, strict=True)):
    start, limit = starts[k], limits[k]
    if same(start, 0) and same(limit, n) and strides[k] == 1:
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
      elif same(limits[k], x.shape[k]):
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
  for k in inserted:
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


def _taken(x: Value, sizes: Sequence[Size], why: str) -> list[Axis]:
  """Axes of a window: those it spans whole pass, the others are locked."""
  axes = []
  for axis, n, m in zip(x.axes, x.shape, sizes, strict=True):
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
