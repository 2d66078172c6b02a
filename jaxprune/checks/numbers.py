"""Checks of numbers that a caller gives, before any trace.

Each returns the number, or raises one line with the argument's name, what it
may be and what came. A traced number is known to nobody yet and passes.
"""

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import core

T = TypeVar('T')


def whole(name: str, value: T, least: int | None = None, remedy: str = '') -> T:
  """Returns a count, a number of steps or an axis, if it is an integer.

  Args:
    name: of the argument, for the error.
    value: a static int, an integer of NumPy or a scalar array of integers.
    least: the smallest that it may be.
    remedy: a sentence to end the error with.

  Raises:
    TypeError: if it is no integer; a bool is none, and neither is 5.7 or 5.0.
    ValueError: if it is below ``least``.

  Examples:
    >>> whole('every', 3, 1)
    3
  """
  given: Any = value
  dtype = getattr(given, 'dtype', None)
  if dtype is None or isinstance(given, np.generic):
    fits = isinstance(given, numbers.Integral) and not isinstance(given, bool)
  else:
    fits = np.issubdtype(dtype, np.integer) and np.ndim(given) == 0
  end = f' {remedy}' if remedy else ''
  if not fits:
    raise TypeError(f'`{name}` must be an integer, got {_shown(value)}.{end}')
  if least is not None and is_static(given) and int(given) < least:
    raise ValueError(f'`{name}` must be at least {least}, got {value}.{end}')
  return value


def real(
  name: str,
  value: T,
  least: float = -math.inf,
  most: float = math.inf,
  *,
  below: float = math.inf,
  above: float = -math.inf,
) -> T:
  """Returns a number, if it is finite and lies within its bounds.

  Args:
    name: of the argument, for the error.
    value: a static number, or an array of any shape.
    least: the smallest that it may be.
    most: the largest that it may be.
    below: what it must stay below.
    above: what it must exceed.

  Raises:
    TypeError: if it is no number; a bool is none.
    ValueError: if it is NaN, infinite or out of bounds.

  Examples:
    >>> real('factor', 0.5, 0, below=1)
    0.5
  """
  dtype = getattr(value, 'dtype', None)
  if dtype is None or isinstance(value, np.generic):
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
  else:
    fits = jax.numpy.issubdtype(dtype, np.number)
  bounds = [
    f'{text} {bound}'
    for text, bound in (
      ('at least', least),
      ('above', above),
      ('at most', most),
      ('below', below),
    )
    if math.isfinite(bound)
  ]
  need = ' and '.join(bounds) or 'finite'
  if not fits:
    raise TypeError(f'`{name}` must be a number, got {_shown(value)}.')
  if not is_static(value):
    return value
  x = np.asarray(value, np.float64)
  within = np.isfinite(x) & (least <= x) & (x <= most) & (above < x)
  if not np.all(within & (x < below)):
    if not np.isfinite(x).all():
      need = ' and '.join(['finite', *bounds])
    raise ValueError(f'`{name}` must be {need}, got {_shown(value)}.')
  return value


def sparsity(value: T, *, below: float = math.inf) -> T:
  """Returns a fraction of zeros, if it lies in [0, 1].

  Args:
    value: a static number, or an array.
    below: what it must stay below; 1 where something has to be left.

  Raises:
    TypeError: if it is no number; a bool is none.
    ValueError: if it is out of range.

  Examples:
    >>> sparsity(0.9)
    0.9
  """
  try:
    return real('sparsity', value, 0, 1, below=below)
  except ValueError:
    end = ')' if below <= 1 else ']'
    raise ValueError(
      f'A sparsity must be in [0, 1{end}, got {_shown(value)}.'
    ) from None


def has_each(name: str, value: Mapping[str, Any], names: Iterable[str]) -> None:
  """Raises unless a mapping has an entry for each name.

  Args:
    name: of the argument, for the error.
    value: the mapping.
    names: what must be there.

  Raises:
    ValueError: naming what is missing.

  Examples:
    >>> has_each('weights', {'a': 1.0, 'b': 2.0}, ['a', 'b'])
  """
  missing = [entry for entry in names if entry not in value]
  if missing:
    raise ValueError(
      f'`{name}` must have an entry for each leaf; missing: '
      f'{", ".join(missing)}.'
    )


def is_static(value: Any) -> bool:
  """Whether a number is known before a trace."""
  return not isinstance(value, core.Tracer | jax.ShapeDtypeStruct)


def dumps(data: Any, indent: int | None = None) -> str:
  """Returns plain data as JSON, which has no NaN and no infinity.

  Args:
    data: what ``json.dumps`` takes.
    indent: as for ``json.dumps``.

  Raises:
    ValueError: naming every entry that is not finite.

  Examples:
    >>> dumps({'a': [1, 2.5]})
    '{"a": [1, 2.5]}'
  """
  odd = list(_not_finite(data, ''))
  if odd:
    raise ValueError(
      f'JSON has no NaN and no infinity; found: {", ".join(odd)}. Write a '
      'number, or null for what is not known.'
    )
  return json.dumps(data, indent=indent, allow_nan=False)


def loads(text: str) -> Any:
  """Returns what JSON of any origin holds, if each name stands once.

  Python takes the last of two entries of one name, and NaN for a number: of a
  file that says two things neither is known to be meant.

  Args:
    text: the JSON.

  Raises:
    ValueError: if it is not JSON, has a name twice, NaN or an infinity, or is
      nested too deeply to be read.

  Examples:
    >>> loads('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
  """
  try:
    return json.loads(
      text, object_pairs_hook=_once, parse_constant=_refuse_constant
    )
  except RecursionError:
    raise ValueError('The JSON is nested too deeply.') from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  entries = dict(pairs)
  if len(entries) < len(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f'The JSON has {", ".join(map(repr, twice))} twice.')
  return entries


def _refuse_constant(word: str) -> float:
  raise ValueError(f'JSON has no {word}: write a number, or null.')


def _not_finite(data: Any, path: str):
  if isinstance(data, float) and not math.isfinite(data):
    yield f'{path or "the value"} = {data}'
  items: Any = ()
  if isinstance(data, Mapping):
    items = data.items()
  elif isinstance(data, list | tuple):
    items = enumerate(data)
  for name, value in items:
    yield from _not_finite(value, f'{path}/{name}' if path else str(name))


def _shown(value: Any) -> str:
  """Returns a value as an error shows it: short, an array by what it is."""
  if np.ndim(value) or not is_static(value):
    return f'{value.dtype}{list(np.shape(value))}'
  return repr(value.item() if hasattr(value, 'item') else value)
