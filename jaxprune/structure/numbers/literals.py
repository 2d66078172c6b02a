"""Numbers that stand in a program, and the sizes that they are powers of."""

import math
from collections.abc import Callable, Iterable, Sequence
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
# What a width may become on its way into a program, beside its powers: of
# random features, of temperatures, of neighbours and positions.
_FORMS: tuple[Callable[[int], float], ...] = (
  lambda d: 2 * d,
  lambda d: d / 2,
  lambda d: (2 * d) ** 0.5,
  lambda d: (d / 2) ** 0.5,
  lambda d: 3 * d,
  lambda d: (3 * d) ** 0.5,
  lambda d: (d / 3) ** 0.5,
  lambda d: math.log(d),
  lambda d: math.log2(d),
  lambda d: math.log(d) ** 0.5,
  lambda d: math.log1p(d),
  lambda d: d + 1,
  lambda d: d - 1,
  lambda d: (d + 1) ** 0.5,
  lambda d: (d - 1) ** 0.5,
)
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


def is_plain(number: float) -> bool:
  """Whether a number may be one of a formula, as well as of a width."""
  return any(math.isclose(abs(number), n, rel_tol=4e-3) for n in _PLAIN)


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


def may_be_of(value: Value, number: float, axes: Iterable[Axis]) -> bool:
  """Whether a number may have been computed from the size of axes.

  Of a number of few digits, which a formula has as often as a width (the 6 of
  ``relu6`` is half of 12), only the powers of the size and its neighbours are.
  """
  axes = list(axes)
  if power_of(value, number, axes) is not None:
    return True
  count = count_of(axes)
  if not isinstance(count, int) or count < 3 or not number:
    return False
  tolerance = 2 * rounding(value)
  if _is_short(number, tolerance):
    return abs(number) in (count - 1, count + 1)
  sizes = [form(count) for form in _FORMS]
  return any(
    math.isclose(abs(number), wanted, rel_tol=tolerance)
    for size in sizes
    for wanted in (size, 1 / size)
  )


def _is_short(number: float, tolerance: float) -> bool:
  """Whether two digits write a number."""
  return math.isclose(float(f'{number:.1e}'), number, rel_tol=tolerance)


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
