"""What may run along an axis whose length depends on the size of the input.

For :mod:`jaxprune.structure.sizes.padded`. A rule refuses an operation by
raising, or says what to fill in around the image before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from jaxprune.structure.program.jaxprs import INLINED, body_of
from jaxprune.structure.rules.base import ELEMENTWISE
from jaxprune.structure.rules.primitives import add, known, where

Sizes = tuple[tuple[int, ...], ...]  # The shape at every size.


def varying(sizes: Sizes) -> list[int]:
  """The axes whose length depends on the size; none if their number does."""
  if is_ragged(sizes):
    return []
  columns = zip(*sizes, strict=True)
  return [k for k, column in enumerate(columns) if len(set(column)) > 1]


def is_ragged(sizes: Sizes) -> bool:
  """Whether the number of axes depends on the size.

  So it is of what jnp broadcasts: it drops axes of length 1, but not where
  those of the image have length 1 too.
  """
  return len({len(shape) for shape in sizes}) > 1


POINTWISE_CALLS = where(bodies='derivative')


def is_pointwise(row: Sequence[Any]) -> bool:
  """Whether a call with a derivative of its own works point by point."""
  names = {*ELEMENTWISE, *INLINED, 'broadcast_in_dim'}

  def fits(jaxpr: Any) -> bool:
    return all(
      eqn.primitive.name in names
      and (eqn.primitive.name not in INLINED or fits(body_of(eqn.params)[0]))
      for eqn in jaxpr.eqns
    )

  bodies = [body_of(eqn.params)[0] for eqn in row]
  return all(map(fits, bodies)) and len({_literals(b) for b in bodies}) == 1


def _literals(jaxpr: Any) -> tuple[Any, ...]:
  """The constants spelled out in a body, in order."""
  found: list[Any] = []
  for eqn in jaxpr.eqns:
    found += [
      np.asarray(v.val).tobytes()
      for v in eqn.invars
      if isinstance(v, jex.Literal)
    ]
    if eqn.primitive.name in INLINED:
      found += _literals(body_of(eqn.params)[0])
  return tuple(found)


def same_params(row: Sequence[Any], *but: str) -> bool:
  """Whether parameters are alike at every size, but for some."""
  texts = {
    str([(k, v) for k, v in sorted(eqn.params.items()) if k not in but])
    for eqn in row
  }
  return len(texts) == 1


# A rule raises (by `refuse`), or returns for each operand what to fill in
# around the image before the operation; None leaves it as it is.

Rule = Callable[[Sequence[Any], list[Sizes], list[Sizes], Any], list[Any]]


def _rule(*names: str) -> Callable[[Rule], Rule]:
  def register(fn: Rule) -> Rule:
    add(*names, canvas=fn)
    return fn

  return register


def elementwise(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  """The rule of what works entry by entry."""
  if not same_params(row, 'sharding'):
    refuse('whose parameters depend on the size')
  eqn = row[-1]
  inverse = eqn.primitive.name == 'integer_pow' and eqn.params['y'] < 0
  # Where there is no derivative at 0, or none beyond an interval, 0 times
  # infinity would be the gradient of what is around.
  none = (1,) if inverse else (None,) * len(inputs)
  return list(known(eqn.primitive.name).harmless or none)


def pointwise(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  """The rule of calls that :func:`is_pointwise` has passed."""
  return [None] * len(inputs)


@_rule('broadcast_in_dim', 'iota', 'optimization_barrier', 'transpose',
       'squeeze')  # fmt: skip
def _shaped(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row, 'shape', 'sharding'):
    refuse('whose parameters depend on the size')
  return [None] * len(inputs)


@_rule('reshape')
def _reshape(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  """An axis of several lengths has to stay an axis of its own."""
  (before, *_), (after,) = inputs, outputs
  ones = lambda sizes: [
    [shape[k] for shape in sizes]
    for k in range(len(sizes[0]))
    if any(shape[k] != 1 for shape in sizes)
  ]
  varying = lambda columns: [
    (int(np.prod([c[-1] for c in columns[:k]], dtype=int)), column)
    for k, column in enumerate(columns)
    if len(set(column)) > 1
  ]
  left, right = varying(ones(before)), varying(ones(after))
  if left != right:
    refuse('which joins an axis that depends on the size to another')
  return [None] * len(inputs)


@_rule('reduce_sum', 'reduce_max', 'reduce_min', 'argmax', 'argmin',
       'reduce_and', 'reduce_or')  # fmt: skip
def _reduce(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row, 'out_sharding'):
    refuse('whose parameters depend on the size')
  eqn = row[-1]
  # Along other axes alone, what is around the image stays there, and finite.
  along = set(eqn.params['axes']) & set(varying(inputs[0]))
  neutral = known(eqn.primitive.name).neutral if along else None
  return [neutral] * len(inputs)


@_rule('dot_general')
def _dot(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row, 'out_sharding'):
    refuse('whose parameters depend on the size')
  contracted = row[-1].params['dimension_numbers'][0]
  return [
    0 if set(axes) & set(varying(sizes)) else None
    for axes, sizes in zip(contracted, inputs, strict=True)
  ]


@_rule('conv_general_dilated')
def _convolution(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row, 'lhs_shape', 'rhs_shape'):
    refuse("whose padding is not the same at every size ('SAME' at stride 2)")
  params = row[-1].params
  spatial = params['dimension_numbers'].lhs_spec[2:]
  if any(d != 1 for d in params['lhs_dilation']):
    refuse('which is dilated')
  if varying(inputs[1]) or set(varying(inputs[0])) - set(spatial):
    refuse('whose kernel or channels depend on the size')
  return [0, None]


@_rule('reduce_window_max', 'reduce_window_min', 'reduce_window_sum')
def _window(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row):
    refuse("whose padding is not the same at every size ('SAME' at stride 2)")
  if any(d != 1 for d in row[-1].params['base_dilation']):
    refuse('which is dilated')
  return [known(row[-1].primitive.name).neutral]


@_rule('pad')
def _pad(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row):
    refuse('which pads by another amount at another size')
  for k in varying(inputs[0]):
    _, high, inner = row[-1].params['padding_config'][k]
    if high < 0 or inner:
      refuse('which cuts the end of an axis or spreads its entries')
  return [PADDING, None]


PADDING = object()  # Fill in what the pad fills in.


@_rule('slice')
def _slice(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if not same_params(row, 'limit_indices'):
    refuse('which starts elsewhere at another size')
  return [None]


@_rule('concatenate')
def _concatenate(row: Any, inputs: Any, outputs: Any, refuse: Any) -> list[Any]:
  if row[-1].params['dimension'] in varying(outputs[0]):
    refuse('which joins axes that depend on the size')
  return [None] * len(inputs)
