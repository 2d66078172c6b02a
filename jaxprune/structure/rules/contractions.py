"""Rules of matrix products and convolutions."""

import itertools
from collections.abc import Sequence

from jaxprune.structure.program import axes as ax
from jaxprune.structure.rules.base import Equation, Resize, drop, rule


def contraction(
  eqn: Equation,
) -> tuple[Sequence[int], Sequence[int]] | None:
  """Returns the axes of both operands that a matrix product sums over.

  None if the equation is no matrix product.
  """
  if eqn.primitive.name == 'dot_general':
    contract, _ = eqn.params['dimension_numbers']
    return contract
  if eqn.primitive.name == 'ragged_dot_general':
    numbers = eqn.params['ragged_dot_dimension_numbers']
    contract, _ = numbers.dot_dimension_numbers
    return contract
  return None


@rule('dot_general')
def _dot_general(eqn: Equation) -> None:
  (left, right), (out,) = eqn.inputs, eqn.outputs
  (contract, batch) = eqn.params['dimension_numbers']
  for a, b in itertools.chain(
    zip(*contract, strict=True), zip(*batch, strict=True)
  ):
    ax.unify(left.axes[a], right.axes[b], eqn.why)
  free_left = drop(left.axes, (*contract[0], *batch[0]))
  free_right = drop(right.axes, (*contract[1], *batch[1]))
  out.axes = [left.axes[a] for a in batch[0]] + free_left + free_right
  eqn.products = [*out.axes, *(left.axes[a] for a in contract[0])]


@rule('ragged_dot_general')
def _ragged_dot(eqn: Equation) -> None:
  """Products of g runs of rows, as long as the third operand says.

  By which axis of the left operand is cut into runs, what comes out is

    a free one:        rows x out, each run with one of g kernels [in, out];
    a contracted one:  g x in x out, a product over each run, which is the
                       derivative by the kernels;
    a batch:           as of any product.

  Every row meets one kernel, so that there are rows x in x out multiply-adds.
  The axis of the runs stays whole, for their lengths are data; so does that of
  the g kernels.
  """
  (left, right, lengths), (out,) = eqn.inputs[:3], eqn.outputs
  numbers = eqn.params['ragged_dot_dimension_numbers']
  contract, batch = numbers.dot_dimension_numbers
  (ragged,) = numbers.lhs_ragged_dimensions
  kernels = numbers.rhs_group_dimensions
  ax.lock(left.axes[ragged], f'{eqn.why} takes runs of it')
  for axis in [*lengths.axes, *(right.axes[k] for k in kernels)]:
    ax.lock(axis, f'{eqn.why} numbers its entries')
  for a, b in itertools.chain(
    zip(*contract, strict=True), zip(*batch, strict=True)
  ):
    ax.unify(left.axes[a], right.axes[b], eqn.why)
  free_left = drop(left.axes, (*contract[0], *batch[0]))
  free_right = drop(right.axes, (*contract[1], *batch[1], *kernels))
  whole = [left.axes[a] for a in batch[0]] + free_left + free_right
  count = len(out.shape) - len(whole)  # Of a product over each run.
  new = [
    ax.atom(n, f'{eqn.why} numbers its entries') for n in out.shape[:count]
  ]
  out.axes = [*new, *whole]
  eqn.products = [*whole, *(left.axes[a] for a in contract[0])]


@rule('conv_general_dilated')
def _convolution(eqn: Equation) -> Resize | None:
  """Channels of g groups are products: g x in of the data, g x out.

  The derivative by a grouped kernel has the channels of the data as a batch of
  g groups: g x in of the batch, g x out of the kernel, and in of the result.
  """
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
  batch = data.axes[numbers.lhs_spec[0]]
  resize = None
  if eqn.params['batch_group_count'] > 1:
    group = ax.atom(eqn.params['batch_group_count'])
    each = ax.atom(kernel.shape[numbers.rhs_spec[0]] // group.size)
    inner = ax.atom(data.shape[numbers.lhs_spec[0]] // group.size)
    ax.unify(batch, ax.product([group, inner]), eqn.why)
    ax.unify(k_out, ax.product([group, each]), eqn.why)
    ax.unify(channels, k_in, eqn.why)
    batch = inner
    resize = lambda size: {'batch_group_count': size(group)}
  elif groups == 1:
    ax.unify(channels, k_in, eqn.why)
  else:
    group = ax.atom(groups)
    each = ax.atom(kernel.shape[numbers.rhs_spec[0]] // groups)
    ax.unify(channels, ax.product([group, k_in]), eqn.why)
    ax.unify(k_out, ax.product([group, each]), eqn.why)
    resize = lambda size: {'feature_group_count': size(group)}
  why = f'{eqn.why} slides along it'
  out.axes = [ax.atom(n, why) for n in out.shape]
  out.axes[numbers.out_spec[0]] = batch
  out.axes[numbers.out_spec[1]] = k_out
  eqn.products = [*out.axes, *(kernel.axes[k] for k in numbers.rhs_spec[1:])]
  return resize
