"""Axis types: what one axis of one array is made of, solved by unification.

  T ::= atom(n) | product(T major, ..., T minor) | sum(T, ..., T)

An *atom* is an axis that nothing has taken apart: either it shrinks as it is,
or (locked) it stays whole. A reshape makes products, a concatenation makes
sums, and an operation that needs two axes to be equal unifies their types. Two
axes with one type shrink together, which is all that structural pruning has to
know: the atoms that no operation has locked are the groups of the network.

The nodes form a union-find forest, so that solving is near linear in the number
of equations (Hindley and Milner's algorithm, with common refinement in the
place of failure).
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Size = Any  # int, or a symbolic dimension of jax.export
_SINGLE = 'it has a single entry'


class Axis:
  """A node of the forest: an atom, a product or a sum, or bound to another.

  Attributes:
    size: number of entries; an int, or a symbolic dimension.
    kind: 'atom', 'product' or 'sum'.
    parts: the factors, major first, or the terms in order; none for an atom.
    bound: the node that took this one's place, if any.
    locked: why an atom must stay whole, or None.
  """

  __slots__ = ('bound', 'kind', 'locked', 'parts', 'size')

  def __init__(
    self,
    size: Size,
    kind: str = 'atom',
    parts: Iterable['Axis'] = (),
    locked: str | None = None,
  ):
    # NumPy's integers reach jaxprs through numpy.cumsum and the like.
    self.size = int(size) if isinstance(size, np.integer) else size
    self.kind = kind
    self.parts = list(parts)
    self.bound: Axis | None = None
    self.locked = locked


def atom(size: Size, locked: str | None = None) -> Axis:
  """Returns a new atom; one of size 0 or 1 is locked: it cannot shrink."""
  if isinstance(size, (int, np.integer)) and size <= 1:
    locked = locked or _SINGLE
  return Axis(size, locked=locked)


def find(axis: Axis) -> Axis:
  """Returns the node that stands for this one."""
  while axis.bound is not None:
    if axis.bound.bound is not None:
      axis.bound = axis.bound.bound
    axis = axis.bound
  return axis


def factors(axis: Axis) -> list[Axis]:
  """Returns the factors of an axis, major first; itself if it is no product."""
  axis = find(axis)
  if axis.kind != 'product':
    return [axis]
  return [factor for part in axis.parts for factor in factors(part)]


def terms(axis: Axis) -> list[Axis]:
  """Returns the terms of an axis in order; itself if it is no sum."""
  axis = find(axis)
  if axis.kind != 'sum':
    return [axis]
  return [term for part in axis.parts for term in terms(part)]


def atoms(axis: Axis) -> list[Axis]:
  """Returns the atoms of an axis in order, with repetitions."""
  axis = find(axis)
  if axis.kind == 'atom':
    return [axis]
  return [leaf for part in axis.parts for leaf in atoms(part)]


def product(axes: Iterable[Axis]) -> Axis:
  """Returns the product of axes, major first, flat and without factors of 1."""
  flat = [f for axis in axes for f in factors(axis) if not _is(f.size, 1)]
  if not flat:
    return atom(1)
  if len(flat) == 1:
    return flat[0]
  return Axis(math.prod(f.size for f in flat), 'product', flat)


def concatenation(axes: Iterable[Axis]) -> Axis:
  """Returns the sum of axes in order, flat and without empty terms."""
  flat = [t for axis in axes for t in terms(axis) if not _is(t.size, 0)]
  if not flat:
    return atom(0)
  if len(flat) == 1:
    return flat[0]
  return Axis(sum(t.size for t in flat), 'sum', flat)


def is_locked(axis: Axis) -> bool:
  """Whether no entry of the axis can be removed."""
  return all(leaf.locked for leaf in atoms(axis))


def lock(axis: Axis, why: str) -> None:
  """Keeps every atom of an axis whole; the first reason given stands."""
  for leaf in atoms(axis):
    if not leaf.locked:
      leaf.locked = why


def unify(a: Axis, b: Axis, why: str) -> None:
  """Makes two axes of one size the same type, refining both where it must.

  Where no common refinement exists both are locked, with ``why`` as the
  reason: a lock costs compression, a guess would cost the network.

  Args:
    a: an axis.
    b: an axis of the same size.
    why: the operation that wants them equal, for the reason of a lock.

  Raises:
    ValueError: if the sizes differ.
  """
  a, b = find(a), find(b)
  if a is b:
    return
  if not _is(a.size, b.size):
    raise ValueError(f'Cannot unify axes of {a.size} and {b.size}: {why}.')
  if isinstance(a.size, int) and a.size <= 1:
    return
  if a.kind == 'atom':
    return _bind(a, b, why)
  if b.kind == 'atom':
    return _bind(b, a, why)
  if is_locked(a) or is_locked(b):
    return _give_up(a, b, f'tied to an axis that stays whole by {why}')
  if a.kind == b.kind == 'product':
    return _unify_products(a, b, why)
  if a.kind == b.kind == 'sum':
    return _unify_sums(a, b, why)
  if a.kind == 'sum':
    a, b = b, a
  return _unify_product_with_sum(a, b, why)


def cut(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
  """Splits an axis behind its first entries into two axes.

  Args:
    axis: the axis; an atom becomes a sum of two.
    size: entries of the first part, from 0 to the size of the axis.

  Returns:
    The two parts, or None if the cut falls inside a product.
  """
  axis = find(axis)
  if axis.kind == 'atom':
    first = atom(size, axis.locked)
    second = atom(axis.size - size, axis.locked)
    axis.bound = concatenation([first, second])
    return first, second
  if axis.kind == 'product':
    major, *minor = factors(axis)
    pitch = math.prod(f.size for f in minor)
    if size % pitch:
      return None
    halves = cut(major, size // pitch)
    if halves is None:
      return None
    first, second = (product([half, *minor]) for half in halves)
    return first, second
  before, rest = [], terms(axis)
  while rest and size:
    head = find(rest.pop(0))
    if head.size <= size:
      before.append(head)
      size -= head.size
      continue
    halves = cut(head, size)
    if halves is None:
      return None
    before.append(halves[0])
    rest.insert(0, halves[1])
    size = 0
  return concatenation(before), concatenation(rest)


def _is(n: Size, m: Size) -> bool:
  """Whether two sizes, possibly symbolic, are known to be equal."""
  return bool(n == m)


def _bind(a: Axis, b: Axis, why: str) -> None:
  """Lets b stand for the atom a."""
  if any(leaf is a for leaf in atoms(b)):
    return lock(b, f'it would have to contain itself: {why}')
  if a.locked:
    lock(b, a.locked)
  for leaf in atoms(b):
    if leaf.locked == _SINGLE and leaf is not b:
      leaf.locked = f'{why} takes it apart, entry by entry'
  a.bound = b


def _give_up(a: Axis, b: Axis, why: str) -> None:
  lock(a, why)
  lock(b, why)


def _unify_products(a: Axis, b: Axis, why: str) -> None:
  """Matches factors from the minor end, splitting the larger of two."""
  left, right = factors(a), factors(b)
  while left and right:
    x, y = find(left.pop()), find(right.pop())
    if x.kind == 'product' or y.kind == 'product':
      # An earlier step took apart an atom that occurs here again.
      left += factors(x)
      right += factors(y)
      continue
    if _is(x.size, y.size):
      unify(x, y, why)
      continue
    if x.size < y.size:
      x, y, left, right = y, x, right, left
    if x.size % y.size:
      return _give_up(a, b, f'its factors do not match: {why}')
    major, minor = atom(x.size // y.size), atom(y.size)
    if x.kind == 'sum':
      lock(x, f'a concatenation cannot be a factor: {why}')
      lock(major, f'a concatenation cannot be a factor: {why}')
      lock(minor, f'a concatenation cannot be a factor: {why}')
    else:
      _bind(x, Axis(x.size, 'product', [major, minor]), why)
    unify(minor, y, why)
    left.append(major)
  return None


def _unify_sums(a: Axis, b: Axis, why: str) -> None:
  """Matches terms from the front, cutting the larger of two."""
  left, right = terms(a), terms(b)
  while left and right:
    x, y = find(left.pop(0)), find(right.pop(0))
    if x.kind == 'sum' or y.kind == 'sum':
      left[:0] = terms(x)
      right[:0] = terms(y)
      continue
    if _is(x.size, y.size):
      unify(x, y, why)
      continue
    if x.size < y.size:
      x, y, left, right = y, x, right, left
    halves = cut(x, y.size)
    if halves is None:
      return _give_up(a, b, f'its parts do not match: {why}')
    unify(halves[0], y, why)
    left.insert(0, halves[1])
  return None


def _unify_product_with_sum(a: Axis, b: Axis, why: str) -> None:
  """Cuts the major factor of the product a as the sum b is cut."""
  major, *minor = factors(a)
  pitch = math.prod(f.size for f in minor)
  pieces = terms(b)
  if any(find(piece).size % pitch for piece in pieces):
    return _give_up(a, b, f'it is cut inside a product: {why}')
  majors = [atom(find(piece).size // pitch) for piece in pieces]
  if not _is(find(major).size, 1):
    unify(major, concatenation(majors), why)
  for part, piece in zip(majors, pieces, strict=True):
    unify(piece, product([part, *minor]), why)
  return None
