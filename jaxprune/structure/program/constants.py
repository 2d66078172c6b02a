"""Constants of a program: what depends on no param and on no input.

A table that a function closes over, one that it makes of ``jnp.arange`` and a
number of a formula are alike: they are known when the function is traced. They
enter its program where an operation that is no constant reads them, each time
with axis types of their own:

  angles = jnp.arange(8) / 8                    no equation of the program,
  h = x @ p['a'] * jnp.cos(angles)              a table, cut as 'a' is,
  y = x @ p['b'] * jnp.cos(angles)              another, cut as 'b' is.

One table for both would tie 'a' to 'b', though each can have the entries that
it needs.
"""

import dataclasses
import itertools
import math
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure.program.run import bind
from jaxprune.structure.rules.base import ELEMENTWISE, Value, known_entries
from jaxprune.structure.rules.primitives import LAYOUT, where

# What is larger stays the operations that make it. Axes that can be removed are
# short: a table of angles for 2048 positions and a head width of 128 is as
# large. A larger one is a mask of positions by positions, or a copy of weights,
# and would be stored in whatever is exported.
MOST_BYTES = 2**20

# No constant, whatever they read: two calls may differ, or code of others runs.
_IMPURE = frozenset(
  ['ffi_call', 'pallas_call', 'pure_callback', 'rng_uniform', 'shard_map']
)
# Never evaluated at a trace: they say on which devices a program has an array.
_PLACED = frozenset(['device_put', 'sharding_constraint'])
# What has no operands and yet the same value wherever it stands.
_MAKERS = frozenset(['empty', 'empty2', 'iota'])
# Of one number in every entry they make another such.
_UNIFORM = {*ELEMENTWISE, *where(moves=LAYOUT)}


@dataclasses.dataclass(eq=False, slots=True)
class Step:
  """An operation on constants.

  Attributes:
    equation: of the jaxpr.
    operands: the constants that it reads.
    where: the line that called it, for what has no line of its own.
    is_number: whether it makes one number in every entry, by how it is made.
    results: its values, once they are evaluated; None if they cannot be.
    is_evaluated: whether they are, or were found not to be.
    order: later steps have larger ones.
  """

  equation: Any
  operands: list['Constant']
  where: str
  is_number: bool
  results: list[np.ndarray] | None = None
  is_evaluated: bool = False
  order: int = dataclasses.field(default_factory=itertools.count().__next__)


@dataclasses.dataclass(eq=False, slots=True)
class Constant:
  """An array that depends on no input of a program.

  Attributes:
    shape: its shape.
    dtype: its dtype.
    value: what the program closes over or spells out; else None.
    step: what makes it, else.
    place: which result of the step it is.
  """

  shape: tuple[Any, ...]
  dtype: Any
  value: Any = None
  step: Step | None = None
  place: int = 0


def given(value: Any, aval: Any) -> Constant:
  """Returns the constant that a program closes over or spells out.

  Args:
    value: an array.
    aval: what the program takes it for: float64 of the host is float32 there.
  """
  return Constant(tuple(aval.shape), getattr(aval, 'dtype', None), value)


def made(
  equation: Any, operands: Sequence[Constant | Value], where: str
) -> list[Constant] | None:
  """Returns what an operation makes of constants; None if it is none itself.

  Args:
    equation: of a jaxpr; no call, whose body is walked.
    operands: what it reads.
    where: the line that called it.
  """
  name = equation.primitive.name
  constants = [x for x in operands if isinstance(x, Constant)]
  if len(constants) < len(operands) or equation.effects or name in _IMPURE:
    return None
  if not operands and name not in _MAKERS:
    return None
  if name == 'iota' and (counted := _count(equation, where)) is not None:
    return [counted]
  is_uniform = name in _UNIFORM and all(map(is_number, constants))
  step = Step(equation, constants, where, is_uniform)
  avals = [var.aval for var in equation.outvars]
  return [
    Constant(tuple(x.shape), getattr(x, 'dtype', None), step=step, place=k)
    for k, x in enumerate(avals)
  ]


def table(constant: Constant) -> Any:
  """Returns the array of a constant, or None where operations should make it.

  They should where it is one number in every entry, which needs no memory, and
  where it is too large or cannot be evaluated at a trace.
  """
  if constant.step is None:
    return constant.value
  return None if is_number(constant) else _evaluate(constant)


def is_number(constant: Constant) -> bool:
  """Returns whether one number is in every entry, by how it is made."""
  if constant.step is None:
    return math.prod(constant.shape) == 1
  return constant.step.is_number


def steps(constant: Constant, known: Container[Constant]) -> list[Step]:
  """Returns the steps that make a constant, in order.

  Args:
    constant: a constant.
    known: what is made already.
  """
  needed: set[Step] = set()
  waiting = [constant]
  while waiting:
    x = waiting.pop()
    if x in known or x.step is None or x.step in needed:
      continue
    if table(x) is None:
      needed.add(x.step)
      waiting += x.step.operands
  return sorted(needed, key=lambda step: step.order)


def _count(equation: Any, where: str) -> Constant | None:
  """The numbers that an iota makes, a table, and what repeats it.

  The numbers of an axis are few, whatever size the others have: symbolic, or
  that of a mask of positions by positions.

  Returns:
    The constant; None where the numbers themselves are not known, or too many.
  """
  shape, counted = equation.params['shape'], equation.params['dimension']
  dtype, size = equation.params['dtype'], shape[counted]
  if not _is_small((size,), dtype):
    return None
  spec = jax.ShapeDtypeStruct((size,), dtype)
  numbers = given(np.arange(size).astype(dtype), spec)
  if len(shape) == 1:
    return numbers
  repeat = lambda x: lax.broadcast_in_dim(x, shape, (counted,))
  (repeated,) = jax.make_jaxpr(repeat)(spec).jaxpr.eqns
  repeated = repeated.replace(source_info=equation.source_info)
  return Constant(shape, dtype, step=Step(repeated, [numbers], where, False))


def _evaluate(constant: Constant) -> np.ndarray | None:
  """The entries of a constant; None where a trace should not know them."""
  pending: set[Step] = set()
  waiting = [constant] if _is_small(constant.shape, constant.dtype) else []
  while waiting:
    step = waiting.pop().step
    if step is not None and not step.is_evaluated and step not in pending:
      pending.add(step)
      waiting += step.operands
  for step in sorted(pending, key=lambda step: step.order):
    step.results, step.is_evaluated = _results(step), True
  return _entries(constant)


def _entries(constant: Constant) -> np.ndarray | None:
  """The entries of a constant whose step is evaluated."""
  if constant.step is not None:
    results = constant.step.results
    return None if results is None else results[constant.place]
  if not _is_small(constant.shape, constant.dtype):
    return None
  return known_entries(constant.value)


def _is_small(shape: Sequence[Any], dtype: Any) -> bool:
  """Whether an array is one of numbers that a trace may hold."""
  is_plain = dtype is not None and (
    jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
  )
  if not is_plain or not all(isinstance(n, int) for n in shape):
    return False
  return math.prod(shape) * np.dtype(dtype).itemsize <= MOST_BYTES


def _results(step: Step) -> list[np.ndarray] | None:
  """The results of a step, computed; None where that cannot be."""
  equation = step.equation
  results = [var.aval for var in equation.outvars]
  is_small = all(
    _is_small(aval.shape, getattr(aval, 'dtype', None)) for aval in results
  )
  if equation.primitive.name in _PLACED or not is_small:
    return None
  operands = list(map(_entries, step.operands))
  if any(x is None for x in operands) or not operands:
    return None
  try:
    with jax.ensure_compile_time_eval():
      outs = bind(equation.primitive, operands, equation.params)
    outs = outs if equation.primitive.multiple_results else [outs]
    return [np.asarray(x, v.dtype) for x, v in zip(outs, results, strict=True)]
  except Exception:  # It needs what is not here: then it stays an operation.
    return None
