"""Operations on one entry at a time, in ONNX."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprune.io.onnx.translation import require, translation
from jaxprune.io.onnx.views import View, Writer, reorder
from jaxprune.structure.program.run import Run
from jaxprune.structure.rules import Equation

Tensors = Callable[..., str]


def _pair(op: str) -> Tensors:
  return lambda tape, eqn, *names: tape.add(op, *names)


def _number(tape: Any, eqn: Equation, value: float) -> str:
  return tape.constant(np.array(value, eqn.inputs[0].dtype))


def _integer_pow(tape: Any, eqn: Equation, x: str) -> str:
  y = eqn.params['y']
  if y == 2:
    return tape.add('Mul', x, x)
  if y == -1:
    return tape.add('Reciprocal', x)
  return tape.add('Pow', x, _number(tape, eqn, y))


def _round(tape: Any, eqn: Equation, x: str) -> str:
  require(int(eqn.params['rounding_method']) == 1, 'it rounds half away from 0')
  return tape.add('Round', x)


def _select(tape: Any, eqn: Equation, which: str, *cases: str) -> str:
  require(len(cases) == 2, f'it selects among {len(cases)} arrays')
  if eqn.inputs[0].dtype != np.bool_:
    which = tape.add('Cast', which, to=np.dtype(bool))
  return tape.add('Where', which, cases[1], cases[0])


def _logical(op: str) -> Tensors:
  def write(tape: Any, eqn: Equation, *names: str) -> str:
    require(eqn.inputs[0].dtype == np.bool_, 'it works on bits')
    return tape.add(op, *names)

  return write


def _bound(op: str) -> Tensors:
  """Max or Min; with a number as Relu or Clip, which runtimes fuse."""

  def write(tape: Any, eqn: Equation, *names: str) -> str:
    is_float = np.issubdtype(eqn.inputs[0].dtype, np.floating)
    for x, bound in (names, names[::-1]):
      value = tape.constants.get(bound)
      if is_float and value is not None and value.ndim == 0:
        if op == 'Max' and value == 0:
          return tape.add('Relu', x)
        return tape.add('Clip', x, *([bound] if op == 'Max' else ['', bound]))
    return tape.add(op, *names)

  return write


def _clamp(tape: Any, eqn: Equation, low: str, x: str, high: str) -> str:
  return tape.add('Min', tape.add('Max', x, low), high)


def _cast(tape: Any, eqn: Equation, x: str) -> str:
  source, dtype = eqn.inputs[0].dtype, np.dtype(eqn.params['new_dtype'])
  if dtype == source:
    return x
  to_integer = np.issubdtype(dtype, np.integer) and dtype != np.uint64
  if np.issubdtype(source, np.floating) and to_integer:
    return _saturated(tape, eqn, x, dtype)
  return tape.add('Cast', x, to=dtype)


def _saturated(tape: Any, eqn: Equation, x: str, dtype: np.dtype) -> str:
  """A float as an integer: what does not fit as the nearest, NaN as 0.

  So XLA has it; ONNX leaves it undefined. The largest int32 is no float32, but
  the integer after it is: from there on it is chosen, after the cast.
  """
  limits = np.iinfo(dtype)
  after = _number(tape, eqn, float(int(limits.max) + 1))
  above_lowest = tape.add('Max', x, _number(tape, eqn, float(limits.min)))
  fits = tape.add('Less', x, after)  # NaN does not.
  inside = tape.add('Where', fits, above_lowest, _number(tape, eqn, 0))
  integer = tape.add(
    'Where',  # Runtimes have it for few integers, and for int64.
    tape.add('GreaterOrEqual', x, after),
    tape.constant(np.array(limits.max, np.int64)),
    tape.add('Cast', inside, to=np.dtype(np.int64)),
  )
  if dtype == np.int64:
    return integer
  return tape.add('Cast', integer, to=dtype)


def _expm1(tape: Any, eqn: Equation, x: str) -> str:
  """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), where nothing cancels."""
  half = tape.add('Mul', x, _number(tape, eqn, 0.5))
  above = tape.add('Add', tape.add('Exp', x), _number(tape, eqn, 1))
  return tape.add('Mul', tape.add('Tanh', half), above)


def _log1p(tape: Any, eqn: Equation, x: str) -> str:
  """log(1 + x), and what the sum rounds away.

  With u the rounded 1 + x, e = x - (u - 1) is exact, and log(u + e) is
  log(u) + e / u to the last digit: at 1e-8, u is 1, e 1e-8, and the sum
  log(1) + 1e-8 / 1. Below -1/2 the sum 1 + x is exact, and above 1 the log does
  not feel e: there e is that of -1/2 and 1, which is 0. (Of infinity it would
  be NaN.)
  """
  number_one = _number(tape, eqn, 1)
  near = tape.add('Clip', x, _number(tape, eqn, -0.5), number_one)
  total = tape.add('Add', near, number_one)
  lost = tape.add('Sub', near, tape.add('Sub', total, number_one))
  log = tape.add('Log', tape.add('Add', x, number_one))
  return tape.add('Add', log, tape.add('Div', lost, total))


def _logistic(tape: Any, eqn: Equation, x: str) -> str:
  """1 / (1 + exp(-x)), since runtimes bound Sigmoid only absolutely.

  At -20 it is 2e-9, where ONNX Runtime's own is off by as much as 1e-7. At -100
  the exponential is infinite, and its reciprocal 0.
  """
  exp = tape.add('Exp', tape.add('Neg', x))
  return tape.add('Reciprocal', tape.add('Add', exp, _number(tape, eqn, 1)))


# erfc(x) = exp(-x^2) u P(u) with u = 1 / (x + 2.5) for x from 0 to 9.6: the
# coefficients of P, the constant first, by a reweighted least squares fit in
# float64 of the relative error, which is 6e-8 at most. With 2.5 the sum of P in
# float32 loses least.
_ERFC = (
  *(0.5640701, 1.4159184, 3.1431107, 7.663918, 7.1555066, 23.735935),
  *(46.385098, -208.27977, 154.40294),
)


def _erfc(tape: Any, eqn: Equation, x: str) -> str:
  """1 - erf(x), to 6e-7 of itself as far as float32 goes.

  The difference itself loses the tail: from 4 on it is 0, and GELU with it. In
  its place exp(-x^2) times a polynomial, for |x|; below 0 it is 2 less that.
  """
  dtype = np.dtype(eqn.inputs[0].dtype)
  number = lambda value: tape.constant(np.float32(value))
  if dtype.itemsize > 4:  # The polynomial is no better than float32.
    return tape.add('Sub', _number(tape, eqn, 1), tape.add('Erf', x))
  if dtype != np.float32:
    x = tape.add('Cast', x, to=np.dtype(np.float32))
  # At 11 it is 0 in float32 and each step below is finite.
  size = tape.add('Min', tape.add('Abs', x), number(11))
  inverse = tape.add('Reciprocal', tape.add('Add', size, number(2.5)))
  total = number(_ERFC[-1])
  for coefficient in _ERFC[-2::-1]:
    total = tape.add('Mul', total, inverse)
    total = tape.add('Add', total, number(coefficient))
  tail = tape.add('Mul', tape.add('Mul', total, inverse), _bell(tape, size))
  mirrored = tape.add('Sub', number(2), tail)
  value = tape.add('Where', tape.add('Less', x, number(0)), mirrored, tail)
  return value if dtype == np.float32 else tape.add('Cast', value, to=dtype)


def _bell(tape: Any, x: str) -> str:
  """exp(-x^2) for x from 0 to 11 to the last digits.

  The square of 9 rounds by 4e-6, and the exponential is off by as much of
  itself. So x is parted at a sixteenth: 9.03 is 9 + 0.03, its square 9^2, which
  is exact, and 0.03 (9.03 + 9), which is small.
  """
  number = lambda value: tape.constant(np.float32(value))
  steps = tape.add('Floor', tape.add('Mul', x, number(16)))
  coarse = tape.add('Mul', steps, number(1 / 16))
  fine = tape.add('Sub', coarse, x)
  square = tape.add('Mul', coarse, tape.add('Neg', coarse))
  remainder = tape.add('Mul', fine, tape.add('Add', x, coarse))
  exps = [tape.add('Exp', square), tape.add('Exp', remainder)]
  return tape.add('Mul', *exps)


def _is_finite(tape: Any, eqn: Equation, x: str) -> str:
  either = tape.add('Or', tape.add('IsNaN', x), tape.add('IsInf', x))
  return tape.add('Not', either)


_SAME_NAME = """
  Abs Acos Acosh Asin Asinh Atan Atanh Ceil Cos Cosh Erf Exp Floor Log Neg Sign
  Sin Sinh Sqrt Tan Tanh Add Sub Mul Div Pow
"""
_POINTWISE: dict[str, Tensors] = {
  **{op.lower(): _pair(op) for op in _SAME_NAME.split()},
  'add_any': _pair('Add'),
  'logistic': _logistic,
  'eq': _pair('Equal'),
  'ne': lambda tape, eqn, a, b: tape.add('Not', tape.add('Equal', a, b)),
  'lt': _pair('Less'),
  'le': _pair('LessOrEqual'),
  'gt': _pair('Greater'),
  'ge': _pair('GreaterOrEqual'),
  'max': _bound('Max'),
  'min': _bound('Min'),
  'and': _logical('And'),
  'or': _logical('Or'),
  'xor': _logical('Xor'),
  'not': _logical('Not'),
  'rem': lambda tape, eqn, a, b: tape.add('Mod', a, b, fmod=1),
  'rsqrt': lambda tape, eqn, x: tape.add('Reciprocal', tape.add('Sqrt', x)),
  'square': lambda tape, eqn, x: tape.add('Mul', x, x),
  'integer_pow': _integer_pow,
  'exp2': lambda tape, eqn, x: tape.add('Pow', _number(tape, eqn, 2), x),
  'expm1': _expm1,
  'log1p': _log1p,
  'erfc': _erfc,
  'round': _round,
  'select_n': _select,
  'clamp': _clamp,
  'convert_element_type': _cast,
  'is_finite': _is_finite,
}


def _order(views: Sequence[View], rank: int) -> list[int]:
  """The order of axes in which tensors of these arrays meet."""
  views = [view for view in views if len(view.shape) == rank]
  needed = {k for v in views for k in v.axes if v.shape[k] != 1}
  unknown = [view for view in views if not view.is_known]
  if not unknown:
    return sorted(needed)
  main = max(unknown, key=lambda view: len(view.axes))
  missing = needed - set(main.axes)
  return sorted({*needed, *main.axes}) if missing else main.axes


@translation(*_POINTWISE, viewed=True)
def _pointwise(
  writer: Writer, eqn: Equation, views: list[View]
) -> Sequence[View]:
  (out,) = eqn.outputs
  rank = len(out.shape)
  order = _order(views, rank)
  if all(view.is_known for view in views):
    return [_computed(eqn, views, order)]
  names = []
  for view in views:
    if len(view.shape) != rank:
      names.append(writer.arrange(view, ()))
    elif view.is_known:  # The leading axes of size 1 are implied.
      value = reorder(view, order)
      lead = next((k for k, n in enumerate(value.shape) if n > 1), value.ndim)
      names.append(writer.tape.constant(value.reshape(value.shape[lead:])))
    else:
      names.append(writer.arrange(view, order))
  tensor = _POINTWISE[eqn.primitive.name](writer.tape, eqn, *names)
  return [writer.view(tensor, order, out.shape, out.dtype)]


def _computed(eqn: Equation, views: list[View], order: Sequence[int]) -> View:
  """Its value from known operands, once for what repeats."""
  (out,) = eqn.outputs
  rank = len(out.shape)
  arrays = [
    reorder(view, order if len(view.shape) == rank else ()) for view in views
  ]
  shape = np.broadcast_shapes(*(array.shape for array in arrays))
  arrays = [np.broadcast_to(a, shape) if a.ndim else a for a in arrays]
  value = np.asarray(Run({}).apply(eqn, arrays)[0])
  positions = [order.index(k) if k in order else None for k in range(rank)]
  return View(out.shape, value.dtype, value, tuple(positions), value.ndim)
