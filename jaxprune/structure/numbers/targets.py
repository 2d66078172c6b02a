"""Sums and contractions of a program, which a size may scale."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxprune.structure.numbers.literals import count_of, is_live
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.rules import Equation, Value

MEAN, ROOT = -1.0, -0.5  # What scales a sum, what a contraction.


class Use(NamedTuple):
  """A place where an equation reads a value."""

  eqn: Equation
  place: int


class Target(NamedTuple):
  """A reduction or a contraction: what may be scaled, and by which size."""

  axes: tuple[Axis, ...]
  before: tuple[Value, ...]  # A factor may stand behind these,
  after: tuple[Value, ...]  # or before those,
  constants: tuple[Use, ...]  # or be one of these.
  power: float | None  # Of its scale; None in a derivative: as it is proven.
  is_sum: bool  # Whether a factor that it does not explain is a doubt.
  why: str


def targets_of(eqn: Equation) -> Iterator[Target]:
  """Yields what of an equation may be scaled by a size."""
  name, out = eqn.primitive.name, eqn.outputs[0] if eqn.outputs else None
  if out is None:
    return
  if name == 'reduce_sum' and is_live(eqn.reductions):
    axes, x = tuple(eqn.reductions), eqn.inputs[0]
    yield Target(axes, (x,), (out,), (), MEAN, True, eqn.why)
  elif name == 'broadcast_in_dim':  # The derivative of a sum.
    x, kept = eqn.inputs[0], eqn.params['broadcast_dimensions']
    new = tuple(axis for k, axis in enumerate(out.axes) if k not in kept)
    if is_live(new) and not is_constant(x):
      yield Target(new, (x,), (out,), (), None, False, eqn.why)
  elif name == 'dot_general':
    yield from _contractions(eqn)
  elif name == 'conv_general_dilated':
    kernel = eqn.inputs[1]
    spec = eqn.params['dimension_numbers'].rhs_spec
    summed = tuple(kernel.axes[k] for k in spec[1:])
    if is_live(summed):
      yield _contraction(eqn, summed)


def entries_summed(eqn: Equation) -> object:
  """Returns how many entries each sum of an equation has; None without one."""
  if eqn.primitive.name == 'reduce_sum':
    return count_of(eqn.reductions)
  if eqn.primitive.name == 'reduce_window_sum':
    return math.prod(eqn.params['window_dimensions'])
  return None


def _contractions(eqn: Equation) -> Iterator[Target]:
  """A matrix product: of data, as a sum, or one that is the derivative."""
  (left, right), (out,) = eqn.inputs, eqn.outputs
  (contract, batch) = eqn.params['dimension_numbers']
  summed = tuple(left.axes[k] for k in contract[0])
  if is_live(summed):
    yield _contraction(eqn, summed)
  for value, gone in ((left, 0), (right, 1)):
    free = [
      axis
      for k, axis in enumerate(value.axes)
      if k not in (*contract[gone], *batch[gone])
    ]
    live = tuple(axis for axis in free if is_live([axis]))
    if live:
      yield Target(live, (left, right), (out,), (), None, False, eqn.why)


def _contraction(eqn: Equation, summed: tuple[Axis, ...]) -> Target:
  """A contraction, which is a sum with a constant, and of squares."""
  (left, right), (out,) = eqn.inputs, eqn.outputs
  constants = tuple(
    Use(eqn, k) for k, value in enumerate(eqn.inputs) if is_constant(value)
  )
  squares = left is right and len(out.shape) + len(summed) == len(left.shape)
  power = MEAN if constants or squares else ROOT
  is_sum = bool(constants) or (left.has_data and right.has_data)
  before = (left, right)
  return Target(summed, before, (out,), constants, power, is_sum, eqn.why)


def is_constant(value: Value) -> bool:
  """Returns whether a value is of no data and no param."""
  return not value.has_data and not value.sources
