"""Polynomials in the widths of groups, in whatever arithmetic is at hand.

The size of an axis is linear in the widths of the groups that it is made of:
an atom is a variable or a number, a concatenation a sum, a reshape a product.
What follows from sizes (entries, bytes, multiply-adds) is a polynomial with
coefficients that are not negative, made once and evaluated by arithmetic.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import kinds
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis

Term = tuple[str, ...]  # The variables of a term, sorted, with repetitions.
Polynomial = Mapping[Term, int]  # Term -> coefficient, not negative.


@kinds.checked
def evaluate(
  polynomial: Polynomial | Sequence[Polynomial], values: Mapping[str, Any]
) -> Any:
  """Returns a polynomial at the values of its variables.

  Python ints and integer NumPy arrays are exact (int64, one result for each
  entry). JAX arrays, traced or not, become float32: differentiable, and right
  to a relative error of 1e-6 (the terms are summed in pairs, so that rounding
  grows with the logarithm of their number). Under ``jax.vmap`` a million
  candidates are one fused loop.

  Args:
    polynomial: of this module; of several the largest value is returned.
    values: variable (a group: its width; a block: 1 or 0) -> its value; Python
      ints, NumPy arrays or JAX arrays that broadcast against each other.

  Raises:
    TypeError: if there is no polynomial, or no mapping of values.
    ValueError: if a variable has no value, or an exact result would not fit
      64 bits (Python ints always do).

  Examples:
    >>> evaluate({(): 2, ('a',): 3, ('a', 'b'): 1}, {'a': 4, 'b': 5})
    34
    >>> evaluate({('a',): 3}, {'a': np.array([1, 2])})
    array([3, 6])
  """
  many = [polynomial] if isinstance(polynomial, Mapping) else list(polynomial)
  if not all(isinstance(t, tuple) for p in many for t in _terms(p)):
    raise TypeError(
      '`polynomial` must be a mapping from tuples of names to integers, or '
      'several, as `cost.macs_polynomial(graph)` makes one.'
    )
  names = sorted({name for p in many for term in p for name in term})
  missing = [name for name in names if name not in values]
  if missing:
    raise ValueError(
      f'There is no width for {", ".join(map(repr, missing))}; give one for '
      f'each of: {", ".join(names)}.'
    )
  given = {name: values[name] for name in names}
  if any(isinstance(value, jax.Array) for value in given.values()):
    floats = {name: jnp.asarray(v, jnp.float32) for name, v in given.items()}
    return functools.reduce(jnp.maximum, [_in_floats(p, floats) for p in many])
  if any(isinstance(value, np.ndarray) for value in given.values()):
    exact = {name: _exact(value) for name, value in given.items()}
    for p in many:
      _check_range(p, exact)
    return functools.reduce(np.maximum, [_exactly(p, exact) for p in many])
  return max(_exactly(p, given) for p in many)


def _terms(polynomial: Any) -> Iterable[Any]:
  """Returns the terms of a polynomial; of anything else one that is none."""
  return polynomial if isinstance(polynomial, Mapping) else [None]


def _exact(value: Any) -> np.ndarray:
  value = np.asarray(value)
  return value.astype(np.int64) if value.dtype.kind in 'iub' else value


def _check_range(polynomial: Polynomial, values: Mapping[str, Any]) -> None:
  largest = {
    name: int(np.max(v)) if v.size and v.dtype.kind == 'i' else 0
    for name, v in values.items()
  }
  if _exactly(polynomial, largest) >= 2**63:
    raise ValueError(
      'The result does not fit 64 bits; evaluate one candidate at a time, with '
      'Python ints, or in float32 with JAX arrays.'
    )


def _exactly(polynomial: Polynomial, values: Mapping[str, Any]) -> Any:
  total: Any = 0
  for names, coefficient in polynomial.items():
    term: Any = coefficient
    for name in names:
      term = term * values[name]
    total = total + term
  return total


def _in_floats(polynomial: Polynomial, values: Mapping[str, Any]) -> Any:
  terms = [
    math.prod((values[name] for name in names), start=np.float32(coefficient))
    for names, coefficient in polynomial.items()
  ]
  while len(terms) > 1:
    rest = [terms[-1]] if len(terms) % 2 else []
    pairs = zip(terms[::2], terms[1::2], strict=False)
    terms = [a + b for a, b in pairs] + rest
  return terms[0] if terms else np.float32(0)


def substitute(
  polynomial: Polynomial, values: Mapping[str, int]
) -> dict[Term, int]:
  """Returns a polynomial with ints in the place of some variables.

  Examples:
    >>> substitute({('a', 'b'): 2, ('a',): 1}, {'b': 3})
    {('a',): 7}
  """
  total: dict[Term, int] = {}
  for term, coefficient in polynomial.items():
    known = math.prod(values[name] for name in term if name in values)
    rest = tuple(name for name in term if name not in values)
    add(total, {rest: coefficient * known})
  return total


def on_rows(
  many: Sequence[Polynomial], names: Sequence[str]
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns polynomials as one fast exact function of int64[..., n] values.

  Args:
    many: the polynomials.
    names: the variable of each of the n columns.

  Returns:
    A function to int64[..., polynomials].

  Examples:
    >>> cost = on_rows([{('a', 'b'): 2, (): 1}, {}], ['a', 'b'])
    >>> cost(np.array([3, 4]))
    array([25,  0])
  """
  column = {name: k for k, name in enumerate(names)}
  terms = [(*t, n) for p in many for t, n in ({(): 0} | dict(p)).items()]
  degree = max((len(term) - 1 for term in terms), default=0)
  columns = np.full((len(terms), degree), len(names))  # That of ones.
  for row, term in zip(columns, terms, strict=True):
    row[: len(term) - 1] = [column[name] for name in term[:-1]]
  coefficients = np.array([term[-1] for term in terms], np.int64)
  sizes = [len({(): 0} | dict(p)) for p in many]
  starts = np.cumsum([0, *sizes])[:-1]

  def cost(values: np.ndarray) -> np.ndarray:
    ones = np.ones((*values.shape[:-1], 1), np.int64)
    extended = np.concatenate([values, ones], -1)
    total = np.broadcast_to(coefficients, (*values.shape[:-1], len(columns)))
    for k in range(degree):
      total = total * extended[..., columns[:, k]]
    return np.add.reduceat(total, starts, -1)

  return cost


def entries(axes: Iterable[Axis], names: Mapping[Axis, str]) -> dict[Term, int]:
  """Returns the product of the sizes of axes.

  Args:
    axes: axis types of a traced graph.
    names: atom -> its variable; other atoms have their traced size.

  Raises:
    ValueError: if the size of an axis is symbolic.
  """
  total: dict[Term, int] = {(): 1}
  for axis in axes:
    total = times(total, _size(axis, names))
  return total


def _size(axis: Axis, names: Mapping[Axis, str]) -> dict[Term, int]:
  """The size of an axis."""
  axis = ax.find(axis)
  if axis.kind == 'product':
    return entries(axis.parts, names)
  if axis.kind == 'permuted':
    return _size(axis.parts[0], names)
  if axis.kind == 'sum':
    total: dict[Term, int] = {}
    for part in axis.parts:
      add(total, _size(part, names))
    return total
  if axis in names:
    return {(names[axis],): 1}
  if not isinstance(axis.size, int):
    raise ValueError(
      f'The graph was traced with the symbolic size {axis.size}; trace it with '
      f'the batch that is to be counted.'
    )
  return {(): axis.size}


def times(a: Polynomial, b: Polynomial | int) -> dict[Term, int]:
  """Returns the product of two polynomials, or of one and a number."""
  if isinstance(b, int):
    return {term: n * b for term, n in a.items()}
  product: dict[Term, int] = {}
  for left, m in a.items():
    for right, n in b.items():
      term = tuple(sorted(left + right)) if left and right else left or right
      product[term] = product.get(term, 0) + m * n
  return product


def add(total: dict[Term, int], other: Polynomial, sign: int = 1) -> None:
  """Adds a polynomial to ``total``, or takes it away; no term is left at 0."""
  for term, coefficient in other.items():
    found = total.get(term, 0) + sign * coefficient
    if found:
      total[term] = found
    else:
      total.pop(term, None)


def total(many: Iterable[Polynomial]) -> dict[Term, int]:
  """Returns the sum of polynomials."""
  summed: dict[Term, int] = {}
  for polynomial in many:
    add(summed, polynomial)
  return summed


def undominated(many: Iterable[Polynomial]) -> tuple[Polynomial, ...]:
  """Returns those that can be the largest of all for some widths.

  One that another exceeds term by term cannot.

  Examples:
    >>> undominated([{('a',): 2}, {('a',): 3, (): 1}, {('b',): 1}])
    ({('a',): 3, (): 1}, {('b',): 1})
  """
  unique = {tuple(sorted(p.items())): p for p in many}
  ordered = sorted(unique.values(), key=lambda p: -sum(p.values()))
  found: list[Polynomial] = []
  for p in ordered:
    if not any(
      all(q.get(term, 0) >= n for term, n in p.items()) for q in found
    ):
      found.append(p)
  return tuple(found)
