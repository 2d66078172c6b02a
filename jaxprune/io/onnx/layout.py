"""Operations that move entries: views, parts, joins and look-ups, in ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxprune.io.onnx.translation import require, translation
from jaxprune.io.onnx.views import (
  View,
  Writer,
  all_axes,
  constant,
  is_symbolic,
  reorder,
)
from jaxprune.structure.rules import Equation, Value

_IDENTITIES = (
  'copy',
  'device_put',
  'name',
  'optimization_barrier',
  'pvary',
  'sharding_constraint',
  'stop_gradient',
)


@translation(*_IDENTITIES, viewed=True)
def _identity(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  return views


@translation('transpose', viewed=True)
def _transpose(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), axes = views, eqn.params['permutation']
  return [x.at([x.shape[k] for k in axes], [x.place[k] for k in axes])]


@translation('broadcast_in_dim', viewed=True)
def _broadcast(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  x, (out,) = views[0], eqn.outputs
  axis_places: list[int | None] = [None] * len(out.shape)
  for k, axis in enumerate(eqn.params['broadcast_dimensions']):
    if x.shape[k] == out.shape[axis]:
      axis_places[axis] = x.place[k]
  return [x.at(out.shape, axis_places)]


@translation('squeeze', 'reshape', viewed=True)
def _reshape(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  x, (out,) = views[0], eqn.outputs
  runs = _runs(x.shape, out.shape)
  if all(len(before) == len(after) == 1 for before, after in runs):
    axis_places: list[int | None] = [None] * len(out.shape)
    for (k,), (axis,) in runs:
      axis_places[axis] = x.place[k]
    return [x.at(out.shape, axis_places)]
  if x.is_known and not any(map(is_symbolic, out.shape)):
    return [constant(x.whole().reshape(out.shape))]
  stays = lambda run: len(run[0]) == len(run[1]) == 1
  written = [r for r in runs if not (stays(r) and x.place[r[0][0]] is None)]
  first = lambda run: [x.place[k] for k in run[0]]
  if not any(None in first(run) for run in written):
    in_order = sorted(written, key=first)
    positions = [p for run in in_order for p in first(run)]
    if positions == sorted(
      positions
    ):  # No run is torn: the tensor's order stays.
      written = in_order
  tensor = writer.arrange(x, [k for run in written for k in run[0]], True)
  order = [k for run in written for k in run[1]]
  tensor = writer.reshape(tensor, [out.shape[k] for k in order])
  return [writer.view(tensor, order, out.shape, out.dtype)]


def _runs(
  a: Sequence[Any], b: Sequence[Any]
) -> list[tuple[list[int], list[int]]]:
  """Pairs the shortest runs of axes with equal products, 1s left out."""
  of_a = [k for k, n in enumerate(a) if n != 1]
  of_b = [k for k, n in enumerate(b) if n != 1]
  undivided = [(of_a, of_b)]
  runs, i, j = [], 0, 0
  while i < len(of_a) and j < len(of_b):
    first_i, first_j = i, j
    m, n = a[of_a[i]], b[of_b[j]]
    while m != n:
      if is_symbolic(m) or is_symbolic(n):
        return undivided
      if m < n and i + 1 < len(of_a):
        i += 1
        m *= a[of_a[i]]
      elif n < m and j + 1 < len(of_b):
        j += 1
        n *= b[of_b[j]]
      else:
        return undivided
    i, j = i + 1, j + 1
    runs.append((of_a[first_i:i], of_b[first_j:j]))
  return runs if i == len(of_a) and j == len(of_b) else undivided


@translation('iota')
def _iota(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (out,), axis = eqn.outputs, eqn.params['dimension']
  axis_places: list[int | None] = [None] * len(out.shape)
  axis_places[axis] = 0
  tensor: Any = np.arange(1)
  if not is_symbolic(out.shape[axis]):
    tensor = np.arange(out.shape[axis]).astype(out.dtype)
  else:
    scalars = writer.tape.integers([])
    stop = writer.tape.add('Reshape', writer.size(out.shape[axis]), scalars)
    zero, step = (writer.tape.constant(np.int64(k)) for k in (0, 1))
    tensor = writer.tape.add('Range', zero, stop, step)
    tensor = writer.tape.add('Cast', tensor, to=np.dtype(out.dtype))
  return [View(out.shape, np.dtype(out.dtype), tensor, tuple(axis_places), 1)]


@translation('dim_as_value')
def _size(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (out,) = eqn.outputs
  size = writer.size(eqn.params['dim'])
  tensor = writer.tape.add('Cast', size, to=np.dtype(out.dtype))
  return [View((), np.dtype(out.dtype), tensor, (), 1)]


@translation('rev')
def _reverse(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,) = views, eqn.outputs
  order = x.axes
  axes = [order.index(k) for k in eqn.params['dimensions'] if k in order]
  tensor = writer.arrange(x, order)
  steps = [-1] * len(axes)
  ends = [np.iinfo(np.int64).min] * len(axes)
  tensor = _sliced(writer, tensor, steps, ends, axes, steps)
  return [writer.view(tensor, order, out.shape, out.dtype)]


def _sliced(
  writer: Writer,
  tensor: str,
  starts: Sequence[int],
  ends: Sequence[int],
  axes: Sequence[int],
  steps: Sequence[int],
) -> str:
  if not axes:
    return tensor
  operands = [
    writer.tape.integers(entries) for entries in (starts, ends, axes, steps)
  ]
  return writer.tape.add('Slice', tensor, *operands)


# --- Parts and joins ---------------------------------------------------------


@translation('slice')
def _slice(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,), params = views, eqn.outputs, eqn.params
  starts, ends = params['start_indices'], params['limit_indices']
  steps = params['strides'] or (1,) * len(starts)
  order = x.axes
  cut = [
    k for k in order if starts[k] != 0 or steps[k] != 1 or ends[k] != x.shape[k]
  ]
  ends = [
    _END if n == size else n for n, size in zip(ends, x.shape, strict=True)
  ]
  for k in cut:
    require(not is_symbolic(ends[k]), f'its end {ends[k]} is open')
  tensor = _sliced(
    writer,
    writer.arrange(x, order),
    [starts[k] for k in cut],
    [ends[k] for k in cut],
    [order.index(k) for k in cut],
    [steps[k] for k in cut],
  )
  return [writer.view(tensor, order, out.shape, out.dtype)]


@translation('split')
def _split(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), axis, sizes = views, eqn.params['axis'], eqn.params['sizes']
  order = x.axes
  if axis not in order:
    return [x.at(out.shape, x.place) for out in eqn.outputs]
  tensors = writer.tape.add_many(
    len(sizes),
    'Split',
    writer.arrange(x, order),
    writer.tape.integers(sizes),
    axis=order.index(axis),
  )
  return [
    writer.view(tensor, order, out.shape, out.dtype)
    for tensor, out in zip(tensors, eqn.outputs, strict=True)
  ]


@translation('unstack')
def _unstack(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), axis = views, eqn.params['axis']
  order = all_axes(x, [axis])
  k = order.index(axis)
  tensor = writer.arrange(x, order, expand=True)
  kept = [j - (j > axis) for j in order if j != axis]
  outputs = []
  for index, out in enumerate(eqn.outputs):
    at = writer.tape.constant(np.int64(index))
    row = writer.tape.add('Gather', tensor, at, axis=k)
    outputs.append(writer.view(row, kept, out.shape, out.dtype))
  return outputs


@translation('concatenate')
def _concatenate(
  writer: Writer, eqn: Equation, views: list[View]
) -> list[View]:
  return [_joined(writer, views, eqn.params['dimension'], eqn.outputs[0])]


@translation('stack')
def _stack(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  axis = eqn.params['axis']
  insert = lambda items, item: (*items[:axis], item, *items[axis:])
  views = [x.at(insert(x.shape, 1), insert(x.place, None)) for x in views]
  return [_joined(writer, views, axis, eqn.outputs[0])]


def _joined(
  writer: Writer, views: Sequence[View], axis: int, out: Value
) -> View:
  """Arrays one after the other; what none of them has stays unwritten."""
  needed = {axis, *(k for x in views for k in x.axes)}
  main = max(views, key=lambda x: (not x.is_known, len(x.axes)))
  order = main.axes if needed == set(main.axes) else sorted(needed)
  tensors = [writer.arrange(x, order, expand=True) for x in views]
  tensor = writer.tape.add('Concat', *tensors, axis=order.index(axis))
  return writer.view(tensor, order, out.shape, out.dtype)


@translation('tile')
def _tile(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,), reps = views, eqn.outputs, eqn.params['reps']
  axis_places = list(x.place)
  for k, n in enumerate(x.shape):
    if n == 1:
      axis_places[k] = None  # It repeats along what was of size 1.
  x = x.at(x.shape, axis_places)
  order = x.axes
  tensor = writer.arrange(x, order)
  if any(reps[k] != 1 for k in order):
    times = writer.sizes([reps[k] for k in order])
    tensor = writer.tape.add('Tile', tensor, times)
  return [writer.view(tensor, order, out.shape, out.dtype)]


@translation('pad')
def _pad(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x, fill), (out,) = views, eqn.outputs
  config = eqn.params['padding_config']
  require(all(inner == 0 for _, _, inner in config), 'it pads between entries')
  low = [max(int(lo), 0) for lo, _, _ in config]
  high = [max(int(hi), 0) for _, hi, _ in config]
  wide = [k for k in range(len(config)) if low[k] or high[k]]
  order = all_axes(x, wide)
  tensor = writer.arrange(x, order, expand=True)
  if wide:
    margins = writer.tape.integers(
      [low[k] for k in order] + [high[k] for k in order]
    )
    value = writer.arrange(fill, ())
    tensor = writer.tape.add('Pad', tensor, margins, value, mode='constant')
  cut = [k for k in order if min(config[k][:2]) < 0]
  tensor = _sliced(
    writer,
    tensor,
    [max(-config[k][0], 0) for k in cut],
    [config[k][1] if config[k][1] < 0 else _END for k in cut],
    [order.index(k) for k in cut],
    [1] * len(cut),
  )
  return [writer.view(tensor, order, out.shape, out.dtype)]


# --- Look-ups ----------------------------------------------------------------


@translation('dynamic_slice')
def _dynamic_slice(
  writer: Writer, eqn: Equation, views: list[View]
) -> list[View]:
  x, *starts = views
  (out,), sizes, tape = eqn.outputs, eqn.params['slice_sizes'], writer.tape
  taken = [k for k, n in enumerate(sizes) if n != x.shape[k]]
  order = all_axes(x, taken)
  tensor = writer.arrange(x, order, expand=True)
  for k in taken:
    start = tape.add('Cast', writer.arrange(starts[k], ()), to=_INT64)
    width = tape.integers([sizes[k]])
    last = tape.add('Sub', writer.size(x.shape[k]), width)
    start = tape.add('Min', start, last)
    start = tape.add('Max', start, tape.integers([0]))
    index = tape.add('Add', start, tape.integers(range(sizes[k])))
    tensor = tape.add('Gather', tensor, index, axis=order.index(k))
  return [writer.view(tensor, order, out.shape, out.dtype)]


@translation('gather')
def _gather(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  """Rows by their index; one that is out of range is an error in ONNX."""
  (x, index), numbers = views, eqn.params['dimension_numbers']
  require(not numbers.operand_batching_dims, 'it looks up each row elsewhere')
  if index.is_known:
    coordinates = reorder(index, range(len(index.shape)))  # 1 where it repeats.
    coordinates = np.broadcast_to(
      coordinates, (*coordinates.shape[:-1], index.shape[-1])
    )
    ways = _separate(coordinates)
    if ways is not None:
      return [_pick(writer, eqn, x, ways)]
  looked_up = numbers.start_index_map
  is_whole = all(
    k in looked_up or n == size
    for k, (n, size) in enumerate(
      zip(eqn.params['slice_sizes'], x.shape, strict=True)
    )
  )
  require(
    is_whole and sorted(looked_up) == sorted(numbers.collapsed_slice_dims),
    'it looks up parts of rows',
  )
  require(
    not any(is_symbolic(x.shape[k]) for k in looked_up), 'it reads an open axis'
  )
  return [_look_up(writer, eqn, x, index)]


def _separate(
  index: np.ndarray,
) -> list[tuple[np.ndarray, int | None]] | None:
  """The values of each coordinate and the one axis they vary along, or None."""
  ways, used_axes = [], []
  for coordinate in np.moveaxis(index, -1, 0):
    varies = [
      k
      for k in range(coordinate.ndim)
      if np.any(coordinate != coordinate.take([0], k))
    ]
    if len(varies) > 1 or set(varies) & set(used_axes):
      return None
    used_axes += varies
    along = varies[0] if varies else None
    first = tuple(
      slice(None) if k == along else 0 for k in range(coordinate.ndim)
    )
    ways.append((np.atleast_1d(coordinate[first]), along))
  return ways


def _pick(
  writer: Writer,
  eqn: Equation,
  x: View,
  ways: Sequence[tuple[np.ndarray, int | None]],
) -> View:
  """What lies at known places, axis by axis."""
  (out,), params = eqn.outputs, eqn.params
  numbers, sizes = params['dimension_numbers'], params['slice_sizes']
  looked_up, gone = numbers.start_index_map, numbers.collapsed_slice_dims
  batch = [k for k in range(len(out.shape)) if k not in numbers.offset_dims]
  kept = [k for k in range(len(x.shape)) if k not in gone]
  after: dict[int, int | None] = dict(
    zip(kept, numbers.offset_dims, strict=True)
  )
  order = all_axes(x, looked_up)
  tensor = writer.arrange(x, order, expand=True)
  for axis, (values, along) in zip(looked_up, ways, strict=True):
    if params['mode'] == lax.GatherScatterMode.CLIP:
      values = np.clip(values, 0, x.shape[axis] - sizes[axis])
    if axis in gone:
      after[axis] = None if along is None else batch[along]
    else:
      require(len(values) == 1, 'it looks up parts of rows')
      values = values[0] + np.arange(sizes[axis])
    tensor = _take(writer, tensor, order.index(axis), values)
  return writer.view(tensor, [after[k] for k in order], out.shape, out.dtype)


def _take(writer: Writer, tensor: str, axis: int, values: np.ndarray) -> str:
  """Known entries along an axis: a slice where they are evenly spaced."""
  step = int(values[1] - values[0]) if len(values) > 1 else 1
  if step > 0 and np.all(np.diff(values) == step):
    end = int(values[-1]) + 1
    return _sliced(writer, tensor, [int(values[0])], [end], [axis], [step])
  index = writer.tape.integers(values.tolist())
  return writer.tape.add('Gather', tensor, index, axis=axis)


def _look_up(writer: Writer, eqn: Equation, x: View, index: View) -> View:
  """What lies at places that are not known before; several axes as one."""
  (out,), numbers, tape = (
    eqn.outputs,
    eqn.params['dimension_numbers'],
    writer.tape,
  )
  looked_up = numbers.start_index_map
  batch = [k for k in range(len(out.shape)) if k not in numbers.offset_dims]
  kept = [k for k in range(len(x.shape)) if k not in looked_up]
  after = dict(zip(kept, numbers.offset_dims, strict=True))
  if len(looked_up) == 1:
    index = index.at(index.shape[:-1], index.place[:-1])
  rows = writer.natural(index)
  sizes = [int(x.shape[k]) for k in looked_up]
  if eqn.params['mode'] == lax.GatherScatterMode.CLIP:
    bounds = np.array([n - 1 for n in sizes], index.dtype)
    bounds = bounds[0] if len(sizes) == 1 else bounds
    rows = tape.add('Max', rows, tape.constant(np.zeros_like(bounds)))
    rows = tape.add('Min', rows, tape.constant(bounds))
  if len(sizes) > 1:
    strides = np.array([*np.cumprod(sizes[:0:-1])[::-1], 1], index.dtype)
    rows = tape.add('Mul', rows, tape.constant(strides))
    rows = tape.add('ReduceSum', rows, tape.integers([-1]), keepdims=0)
  tensor = writer.arrange(x, [*looked_up, *kept], expand=True)
  if len(sizes) > 1:
    flat = [int(np.prod(sizes)), *(x.shape[k] for k in kept)]
    tensor = writer.reshape(tensor, flat)
  tensor = tape.add('Gather', tensor, rows, axis=0)
  order = [*batch, *(after[k] for k in kept)]
  return writer.view(tensor, order, out.shape, out.dtype)


@translation('top_k')
def _top_k(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (values, index), params = views, eqn.outputs, eqn.params
  axis = params.get('axis', -1) % len(x.shape)
  order = all_axes(x, [axis])
  best, where = writer.tape.add_many(
    2,
    'TopK',
    writer.arrange(x, order, expand=True),
    writer.tape.integers([params['k']]),
    axis=order.index(axis),
  )
  where = writer.tape.add('Cast', where, to=np.dtype(index.dtype))
  return [
    writer.view(best, order, values.shape, values.dtype),
    writer.view(where, order, index.shape, index.dtype),
  ]


_INT64 = np.dtype(np.int64)
_END = np.iinfo(np.int64).max
