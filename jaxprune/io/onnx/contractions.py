"""Products, reductions and windows, in ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.io.onnx.translation import require, translation
from jaxprune.io.onnx.views import View, Writer, all_axes, is_symbolic
from jaxprune.structure.rules import Equation

_REDUCTIONS = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
  'reduce_and': 'ReduceMin',
  'reduce_or': 'ReduceMax',
  'argmax': 'ArgMax',
  'argmin': 'ArgMin',
}


@translation(*_REDUCTIONS)
def _reduce(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,), tape = views, eqn.outputs, writer.tape
  reduced = eqn.params['axes']
  order = all_axes(x, reduced)
  tensor = writer.arrange(x, order, expand=True)
  axes = [order.index(k) for k in reduced]
  op = _REDUCTIONS[eqn.primitive.name]
  is_bool = x.dtype == np.bool_
  if is_bool:
    tensor = tape.add('Cast', tensor, to=np.dtype(np.int32))
  if op == 'ReduceSum':
    tensor = tape.add(op, tensor, tape.integers(axes), keepdims=1)
  elif op.startswith('Arg'):
    tensor = tape.add(op, tensor, axis=axes[0], keepdims=1)
  else:
    tensor = tape.add(op, tensor, axes=axes, keepdims=1)
  if is_bool or op.startswith('Arg'):
    tensor = tape.add('Cast', tensor, to=np.dtype(out.dtype))
  kept_axes = [k for k in range(len(x.shape)) if k not in reduced]
  positions = [order.index(k) if k in order else None for k in kept_axes]
  return [
    View(out.shape, np.dtype(out.dtype), tensor, tuple(positions), len(order))
  ]


@translation('cumsum')
def _cumsum(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,), axis = views, eqn.outputs, eqn.params['axis']
  order = all_axes(x, [axis])
  tensor = writer.arrange(x, order, expand=True)
  along = writer.tape.constant(np.int64(order.index(axis)))
  reverse = int(eqn.params['reverse'])
  tensor = writer.tape.add('CumSum', tensor, along, reverse=reverse)
  return [writer.view(tensor, order, out.shape, out.dtype)]


@translation('reduce_window_max', 'reduce_window_min', 'reduce_window_sum')
def _window(writer: Writer, eqn: Equation, views: list[View]) -> list[View]:
  (x,), (out,), params, tape = views, eqn.outputs, eqn.params, writer.tape
  sizes, strides = params['window_dimensions'], params['window_strides']
  padding, dilation = params['padding'], params['window_dilation']
  require(set(params['base_dilation']) == {1}, 'its base is dilated')
  still = [
    k
    for k in range(len(sizes))
    if sizes[k] == strides[k] == 1 and tuple(padding[k]) == (0, 0)
  ]
  require(len(still) > 1, 'its window spans all axes but one')
  outer = [still[0], still[-1]]  # ONNX wants two: the batch and the channels.
  inner = [k for k in range(len(sizes)) if k not in outer]
  require(inner, 'it has no window')
  attributes: dict[str, Any] = {
    'kernel_shape': [sizes[k] for k in inner],
    'strides': [strides[k] for k in inner],
    'pads': [padding[k][0] for k in inner] + [padding[k][1] for k in inner],
  }
  order = [*outer, *inner]
  tensor = writer.arrange(x, order, expand=True)
  if eqn.primitive.name == 'reduce_window_sum':
    require(set(dilation) == {1}, 'it sums a dilated window')
    tensor = tape.add('AveragePool', tensor, count_include_pad=1, **attributes)
    size = np.array(np.prod(attributes['kernel_shape']), x.dtype)
    tensor = tape.add('Mul', tensor, tape.constant(size))
  else:
    is_min = eqn.primitive.name == 'reduce_window_min'
    tensor = tape.add('Neg', tensor) if is_min else tensor
    attributes['dilations'] = [dilation[k] for k in inner]
    tensor = tape.add('MaxPool', tensor, **attributes)
    tensor = tape.add('Neg', tensor) if is_min else tensor
  return [writer.view(tensor, order, out.shape, out.dtype)]


# --- Products ----------------------------------------------------------------


@translation('conv_general_dilated')
def _convolution(
  writer: Writer, eqn: Equation, views: list[View]
) -> list[View]:
  (x, kernel), (out,), params = views, eqn.outputs, eqn.params
  numbers, padding = params['dimension_numbers'], params['padding']
  require(set(params['lhs_dilation']) <= {1}, 'its input is dilated')
  require(params['batch_group_count'] == 1, 'it groups its batch')
  require(min(min(pair) for pair in padding) >= 0, 'its padding is negative')
  data = writer.arrange(x, numbers.lhs_spec, expand=True)
  weight = writer.arrange(kernel, numbers.rhs_spec, expand=True)
  tensor = writer.tape.add(
    'Conv',
    data,
    weight,
    dilations=[int(n) for n in params['rhs_dilation']],
    group=int(params['feature_group_count']),
    kernel_shape=[int(kernel.shape[k]) for k in numbers.rhs_spec[2:]],
    pads=[int(low) for low, _ in padding] + [int(high) for _, high in padding],
    strides=[int(n) for n in params['window_strides']],
  )
  tensor = _cast_to(writer, tensor, x.dtype, out.dtype)
  return [writer.view(tensor, numbers.out_spec, out.shape, out.dtype)]


@translation('dot_general')
def _dot_general(
  writer: Writer, eqn: Equation, views: list[View]
) -> list[View]:
  """As MatMul: (batch, ..., m, k) times (batch, ..., k, n)."""
  (left, right), (out,) = views, eqn.outputs
  contract, batch = eqn.params['dimension_numbers']
  out_axes = list(range(len(out.shape)))  # Axes of the result, by operand.
  shared, out_axes = out_axes[: len(batch[0])], out_axes[len(batch[0]) :]
  free = [
    [k for k in range(len(view.shape)) if k not in (*contracted, *batched)]
    for view, contracted, batched in zip(views, contract, batch, strict=True)
  ]
  of_left, of_right = out_axes[: len(free[0])], out_axes[len(free[0]) :]
  if left.is_known and not shared:  # The weights go second.
    left, right = right, left
    contract, free = contract[::-1], free[::-1]
    of_left, of_right = of_right, of_left
  if not shared:  # Any number of axes may come first.
    ranked = {k: p for p, k in enumerate(left.axes)}
    pairs = sorted(
      zip(free[0], of_left, strict=True),
      key=lambda pair: ranked.get(pair[0], -1),
    )
    free = [[k for k, _ in pairs], free[1]]
    of_left = [k for _, k in pairs]
  first = _merged(
    writer,
    left,
    batch[0],
    [[k] for k in free[0]] if not shared else [free[0]],
    contract[0],
  )
  second = _merged(writer, right, batch[1], [contract[1]], free[1])
  tensor = writer.tape.add('MatMul', first, second)
  order = [*shared, *of_left, *of_right]
  is_split = len(of_right) == 1 and (not shared or len(of_left) == 1)
  if not is_split:
    tensor = writer.reshape(tensor, [out.shape[k] for k in order])
  tensor = _cast_to(writer, tensor, left.dtype, out.dtype)
  return [writer.view(tensor, order, out.shape, out.dtype)]


def _merged(
  writer: Writer,
  view: View,
  batch: Sequence[int],
  middle: Sequence[Sequence[int]],
  last: Sequence[int],
) -> str:
  """A tensor with each of these runs of axes as one axis."""
  runs = [*([k] for k in batch), *middle, last]
  order = [k for run in runs for k in run]
  if all(len(run) == 1 for run in runs):
    return writer.arrange(view, order, expand=True)
  shape = []
  for run in runs:
    size = 1
    for k in run:
      size *= view.shape[k]
    shape.append(size)
  if view.is_known and not any(map(is_symbolic, shape)):
    return writer.tape.constant(view.whole().transpose(order).reshape(shape))
  return writer.reshape(writer.arrange(view, order, expand=True), shape)


def _cast_to(writer: Writer, tensor: str, before: Any, after: Any) -> str:
  if np.dtype(before) == np.dtype(after):
    return tensor
  return writer.tape.add('Cast', tensor, to=np.dtype(after))
