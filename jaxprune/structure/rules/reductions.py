"""Rules of what runs along an axis: reductions, windows, sorts, draws."""

from typing import Any

import numpy as np

from jaxprune.structure.program import axes as ax
from jaxprune.structure.rules.base import Equation, drop, lock_all, rule


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
  eqn.outputs[0].axes = drop(x.axes, eqn.params['axes'])


@rule('argmax', 'argmin')
def _arg_reduce(eqn: Equation) -> None:
  x = eqn.inputs[0]
  for k in eqn.params['axes']:
    ax.lock(x.axes[k], f'{eqn.why} numbers its entries')
  eqn.outputs[0].axes = drop(x.axes, eqn.params['axes'])


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


@rule('select_and_scatter_add', 'select_and_gather_add')
def _select_in_window(eqn: Equation) -> None:
  """Derivatives of pooling: what windows slide along stays whole."""
  (out,), params = eqn.outputs, eqn.params
  pooled, operand = eqn.inputs
  if eqn.primitive.name == 'select_and_gather_add':
    pooled = out  # Of tangents and operand of one shape.
    for a, b in zip(eqn.inputs[0].axes, operand.axes, strict=True):
      ax.unify(a, b, eqn.why)
  why = f'{eqn.why} slides along it'
  still = [
    params['window_dimensions'][k] == params['window_strides'][k] == 1
    and tuple(params['padding'][k]) == (0, 0)
    for k in range(len(operand.shape))
  ]
  if pooled is out:
    out.axes = [
      axis if is_still else ax.atom(n, why)
      for axis, n, is_still in zip(operand.axes, out.shape, still, strict=True)
    ]
  else:
    out.axes = list(operand.axes)
  for a, b, is_still in zip(pooled.axes, operand.axes, still, strict=True):
    if is_still:
      ax.unify(a, b, eqn.why)
    else:
      ax.lock(a, why)
      ax.lock(b, why)


@rule(
  'cumsum',
  'cumprod',
  'cummax',
  'cummin',
  'cumlogsumexp',
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


@rule('rev')
def _reverse(eqn: Equation) -> None:
  """Entry j is entry n - 1 - j: a removed unit is removed where it went."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  out.axes = list(x.axes)
  for k in eqn.params['dimensions']:
    n = x.shape[k]
    if isinstance(n, int):
      out.axes[k] = ax.permuted(x.axes[k], np.arange(n)[::-1], eqn.why)
    else:
      ax.lock(x.axes[k], f'{eqn.why} runs along it')


@rule('fft')
def _fft(eqn: Equation) -> None:
  """The transform runs along the last axes, and passes the others."""
  x, (out,) = eqn.inputs[0], eqn.outputs
  first = len(x.shape) - len(eqn.params['fft_lengths'])
  why = f'{eqn.why} runs along it'
  for axis in x.axes[first:]:
    ax.lock(axis, why)
  new = [ax.atom(n, why) for n in out.shape[first:]]
  out.axes = [*x.axes[:first], *new]


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
