"""Numbers that stand in a program, and the sizes that they are powers of."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.base import known_entries
from jaxprune.structure.rules.primitives import LAYOUT, where

POWERS = (1.0, -1.0, 0.5, -0.5, 0.25, -0.25)
# Numbers of formulas, rather than of widths.
_PLAIN = (1.0, 2.0, 0.5, 2.0**0.5, 0.5**0.5)
# Numbers that formulas have and widths do not, of gates and activations: their
# digits tell them apart.
_FORMULAS = (
  math.pi,
  2 * math.pi,
  math.pi / 2,
  math.e,
  math.log(2),
  math.log(10),
  math.log2(10),
  (2 / math.pi) ** 0.5,  # gelu
  (2 * math.pi) ** 0.5,
  0.5 * math.log(2 * math.pi),
  0.044715,
  1.702,  # gelu by a logistic
  1.0507009873554805,  # selu
  1.6732632423543772,
  1.0507009873554805 * 1.6732632423543772,
  1.7015043497085571,  # gelu, relu and silu of variance 1
  1.7139588594436646,
  1.7881293296813965,
)
_ADDS = frozenset(['add', 'sub'])
_BOUNDS = frozenset(['eq', 'ge', 'gt', 'le', 'lt', 'max', 'min', 'ne'])
_COEFFICIENTS = (1.0, 2.0, 3.0, 0.5, 1 / 3)
_WIDER_POWERS = (*POWERS, 0.75, -0.75, 1.5, -1.5, 2.0, -2.0)
_EPSILON, _HIDDEN = 1e-3, 1e8
_DIGITS = 3  # Of a number that may be written by hand.
_UNIFORM: dict[str, Callable[..., float]] = {
  'add': lambda a, b: a + b,
  'sub': lambda a, b: a - b,
  'mul': lambda a, b: a * b,
  'div': lambda a, b: a / b,
  'max': max,
  'min': min,
  'pow': lambda a, b: a**b,
  'neg': lambda a: -a,
  'sqrt': math.sqrt,
  'rsqrt': lambda a: 1 / math.sqrt(a),
  'square': lambda a: a * a,
  'cbrt': math.cbrt,
  'exp': math.exp,
  'log': math.log,
  'log1p': math.log1p,
}
# What hands a number on: it scales what comes out as what goes in.
UNCHANGED = where(moves=(*LAYOUT, 'negates'))


def number_of(value: Value) -> float | None:
  """Returns the number that a constant is, in every entry; None if none is.

  A complex number is one where it has no imaginary part: it is no size else.
  """
  if value.constant is None or not jnp.issubdtype(value.dtype, jnp.number):
    return None
  array = known_entries(value.constant)
  if array is None or not array.size or np.any(array != array.flat[0]):
    return None
  number = array.flat[0]
  return None if np.imag(number) else float(np.real(number))


def fold(eqn: Equation, known: Sequence[Any]) -> float | None:
  """Returns the number that an operation on numbers gives, in every entry."""
  name = eqn.primitive.name
  try:
    if name in _UNIFORM:
      return _UNIFORM[name](*known)
    if name == 'integer_pow':
      return known[0] ** eqn.params['y']
  except (ValueError, ZeroDivisionError, OverflowError):
    return None
  return known[0] if name in UNCHANGED else None


def is_plain(number: float, tolerance: float = 4e-3) -> bool:
  """Whether a number may be one of a formula, as well as of a width."""
  return _is_any(number, _PLAIN, tolerance)


def count_of(axes: Iterable[Axis]) -> Any:
  """Returns the product of the sizes of axes."""
  return math.prod(ax.find(axis).size for axis in axes)


def is_live(axes: Iterable[Axis]) -> bool:
  """Whether an entry of the axes may go, and their number is known."""
  axes = list(axes)
  sizes = [ax.find(axis).size for axis in axes]
  return all(isinstance(n, int) for n in sizes) and any(
    not leaf.locked for axis in axes for leaf in ax.atoms(axis)
  )


def rounding(value: Value) -> float:
  """Returns the relative error to which a number is known, by its dtype."""
  is_exact = not jnp.issubdtype(value.dtype, jnp.inexact)
  return 1e-12 if is_exact else 2 * float(jnp.finfo(value.dtype).eps)


def power_of(value: Value, number: float, axes: Iterable[Axis]) -> float | None:
  """Returns the power of the size of axes that a number is, if it is one."""
  count = count_of(axes)
  if not isinstance(count, int) or count < 2:
    return None
  tolerance = rounding(value)
  for power in POWERS:
    wanted = count**power
    if abs(abs(number) - wanted) <= tolerance * wanted:
      return power
  return None


def may_be_of(
  value: Value,
  number: float,
  axes: Iterable[Axis],
  operation: str,
  whole: Collection[int] = (),
) -> bool:
  """Whether a number may have been computed from the size of axes.

  A power of the size, or one more or less than it, always may. Of the others
  those may not that a formula has, those that are a power of a size that stays
  as it is, and those that are written by hand: in three digits, where no small
  coefficient or shorter number times a power of the size gives them too. At 20,
  0.035 may be 0.7 / 20, and 0.1 twice a twentieth; at 64, 0.1 is a tenth.

  Args:
    value: the literal, whose dtype says how well it is known.
    number: what it is.
    axes: those whose size it may be of.
    operation: what it does to a value; an added epsilon is no size, nor is the
      6 of a bound.
    whole: sizes that stay.
  """
  axes = list(axes)
  if power_of(value, number, axes) is not None:
    return True
  count, tolerance = count_of(axes), rounding(value)
  if not isinstance(count, int) or count < 3 or not _is_usual(number):
    return False
  near = [count - 1, count + 1]
  if _length(abs(number), tolerance) > 1:  # 0.1 is no 1 / (9 + 1).
    near += [1 / k for k in near]
  if _is_any(number, near, tolerance):
    return True
  formulas = [n for k in _FORMULAS for n in (k, 1 / k)]
  if _is_any(number, formulas, tolerance):
    return False
  # A literal of 0.9999 is 1e-4 less than 1, a scale of 1.1111 is 1 / 0.9.
  absolute = abs(number)
  forms = (absolute, 1 / absolute)
  by_hand = any(_digits(form, tolerance) <= _DIGITS for form in forms)
  if not by_hand and not _is_momentum(absolute, tolerance):
    kept = [n for k in whole for n in (*(k**p for p in POWERS), k - 1, k + 1)]
    return not _is_any(number, kept, tolerance)
  is_epsilon = operation in _ADDS and absolute <= _EPSILON
  length = min(_length(form, tolerance) for form in forms)
  if is_epsilon or (operation in _BOUNDS and length == 1):
    return False
  further = [1 - 1 / count, math.log2(count)]
  further += [count - 2, count + 2] if length > 1 else []
  if _is_any(number, [n for k in further for n in (k, 1 / k)], tolerance):
    return True
  coefficients = [absolute / count**power for power in _WIDER_POWERS]
  return any(
    _is_any(c, _COEFFICIENTS, tolerance) or _length(c, tolerance) < length
    for c in coefficients
  )


def _is_usual(number: float) -> bool:
  """Whether a number is no mark of what is hidden, as -1e9 of scores is."""
  return 1e-280 < abs(number) < _HIDDEN


def _is_momentum(number: float, tolerance: float) -> bool:
  """Whether one digit writes what is left to 1."""
  left = abs(1 - number)
  return left < 0.1 and (
    not left or _digits(left, max(tolerance / left, tolerance)) == 1
  )


def _is_any(number: float, wanted: Iterable[float], tolerance: float) -> bool:
  return any(math.isclose(abs(number), n, rel_tol=tolerance) for n in wanted)


def _digits(number: float, tolerance: float) -> int:
  """How many digits write a number, without the zeros around them."""
  fits = lambda n: math.isclose(
    float(f'{number:.{n - 1}e}'), number, rel_tol=tolerance
  )
  return next((n for n in range(1, _DIGITS + 1) if fits(n)), 17)


def _length(number: float, tolerance: float) -> int:
  """How many digits write a number, with the zeros behind its point."""
  return _digits(number, tolerance) + max(
    0, -1 - math.floor(math.log10(number))
  )


def varying_axes(value: Value) -> list[Axis]:
  """Returns the axes that may shrink along which a constant is not the same."""
  if value.constant is None or not value.shape:
    return []
  live = [k for k, axis in enumerate(value.axes) if is_live([axis])]
  is_plain_type = any(
    jnp.issubdtype(value.dtype, kind) for kind in (jnp.number, jnp.bool_)
  )
  if not live or not is_plain_type:
    return []
  table = known_entries(value.constant)
  return [
    value.axes[k]
    for k in live
    if table is None or np.any(table != np.take(table, [0], k))
  ]
