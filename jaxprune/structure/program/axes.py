"""Axis types: what one axis of one array is made of, solved by unification.

  T ::= atom(n) | product(T major, ..., T minor) | sum(T, ..., T)
      | permuted(atom, order)

An *atom* is an axis that nothing has taken apart: either it shrinks as it is,
or (locked) it stays whole. A reshape makes products, a concatenation makes
sums, and an operation that needs two axes to be equal unifies their types. Two
axes with one type shrink together, which is all that structural pruning has to
know: the atoms that no operation has locked are the groups of the network.

A reshape of [2, 6] to [2, 3, 2]: the axis of 6 is an atom a, until the reshape
makes it product(p, q) with new atoms p of 3 and q of 2, the two last axes of
the result. Entry 2 i + j of a is entry (i, j). From now on a has no units of
its own: without unit 0 of q, a keeps its entries 1, 3 and 5.

A *permuted* axis has the entries of an atom in another order: entry j is the
atom's entry ``order[j]``. A flip makes one, or an index that takes each entry
once. Where its atom is taken apart, the order is that of the parts:

  reversed(sum(A, B)) = sum(reversed(B), reversed(A))
  reversed(product(A, B)) = product(reversed(A), reversed(B))

and an axis that must equal its own reverse is made of pairs that go together:
A = sum(P, reversed(P)).

The nodes form a union-find forest, so that solving is near linear in the number
of equations (Hindley and Milner's algorithm, with common refinement in the
place of failure).
"""

import itertools
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
    kind: 'atom', 'product', 'sum' or 'permuted'.
    parts: the factors, major first, the terms in order, or the atom that is
      permuted; none for an atom.
    bound: the node that took this one's place, if any.
    locked: why an atom must stay whole, or None.
    order: of a permuted axis, the entry of its atom at each entry, int[size].
  """

  __slots__ = ('bound', 'kind', 'locked', 'order', 'parts', 'size')

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
    self.order: np.ndarray | None = None


def atom(size: Size, locked: str | None = None) -> Axis:
  """Returns a new atom; one of size 0 or 1 is locked: it cannot shrink."""
  if isinstance(size, (int, np.integer)) and size <= 1:
    locked = locked or _SINGLE
  return Axis(size, locked=locked)


def find(axis: Axis) -> Axis:
  """Returns the node that stands for this one."""
  while axis.bound is not None:
    if axis.bound.bound is not None:  # Halve the path for the next who asks.
      axis.bound = axis.bound.bound
    axis = axis.bound
  return axis


def factors(axis: Axis) -> list[Axis]:
  """Returns the factors of an axis, major first; itself if it is no product."""
  axis = find(axis)
  if axis.kind != 'product':
    return [axis]
  return [factor for child in axis.parts for factor in factors(child)]


def terms(axis: Axis) -> list[Axis]:
  """Returns the terms of an axis in order; itself if it is no sum."""
  axis = find(axis)
  if axis.kind != 'sum':
    return [axis]
  return [term for child in axis.parts for term in terms(child)]


def atoms(axis: Axis) -> list[Axis]:
  """Returns the atoms of an axis in order, with repetitions."""
  axis = find(axis)
  if axis.kind == 'atom':
    return [axis]
  return [leaf for child in axis.parts for leaf in atoms(child)]


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


def permuted(axis: Axis, order: Any, why: str) -> Axis:
  """Returns the entries of an axis in another order.

  Of a product or a sum the parts are permuted, each within itself, and their
  order. An order that crosses the borders of its parts locks the axis.

  Args:
    axis: an axis whose size is an int.
    order: int[size], which entry of the axis each entry is; each occurs once.
    why: the operation that orders it so, for the reason of a lock.
  """
  axis, order = find(axis), np.asarray(order)
  if is_locked(axis) or np.array_equal(order, np.arange(axis.size)):
    return axis  # Of an axis that stays whole no entry has to be known.
  if axis.order is not None:
    return permuted(axis.parts[0], axis.order[order], why)
  if axis.kind == 'atom':
    view = Axis(axis.size, 'permuted', [axis])
    view.order = order
    return view
  reorder = _reordered_terms if axis.kind == 'sum' else _reordered_factors
  pieces = reorder(axis, order)
  if pieces is None:
    lock(axis, f'{why} reorders it across its parts')
    return atom(axis.size, f'{why} reorders it across its parts')
  join = concatenation if axis.kind == 'sum' else product
  return join([permuted(piece, inner, why) for piece, inner in pieces])


def _reordered_terms(
  axis: Axis, order: np.ndarray
) -> list[tuple[Axis, np.ndarray]] | None:
  """The terms in another order, each with the order within it.

  Of the terms (A of 2, B of 3) the order [4, 3, 2, 0, 1] is B, reversed, and
  A; [0, 2, 1, 3, 4] is no order of terms.
  """
  ordered = terms(axis)
  starts = np.cumsum([0, *(find(term).size for term in ordered)])
  # Each term must come as one run: its first entry says which, and how long.
  reordered, at = [], 0
  while at < len(order):
    which = int(np.searchsorted(starts, order[at], 'right')) - 1
    first, last = starts[which : which + 2]
    inner = order[at : at + last - first] - first
    if not np.array_equal(np.sort(inner), np.arange(last - first)):
      return None
    reordered.append((ordered[which], inner))
    at += len(inner)
  return reordered


def _reordered_factors(
  axis: Axis, order: np.ndarray
) -> list[tuple[Axis, np.ndarray]] | None:
  """The factors in another order, each with the order within it.

  Of the factors (A of 3, B of 2) the order [1, 3, 5, 0, 2, 4] is B, reversed,
  as the major factor and A as the minor one: a transposition.
  """
  ordered = factors(axis)
  sizes = [find(factor).size for factor in ordered]
  entries = np.unravel_index(order, sizes)
  # Each way to order the factors gives the result a shape. It is the right one
  # if along the axis of each factor the index of that factor alone decides.
  for ranking in itertools.permutations(range(len(sizes))):
    shape = [sizes[k] for k in ranking]
    lines = [
      np.moveaxis(entries[k].reshape(shape), at, 0).reshape(sizes[k], -1)
      for at, k in enumerate(ranking)
    ]
    if all(np.all(line == line[:, :1]) for line in lines):
      pairs = zip(ranking, lines, strict=True)
      return [(ordered[k], line[:, 0]) for k, line in pairs]
  return None


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
  a, b = _settled(a, why), _settled(b, why)
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
  # Both are made of parts. What stays whole on either side needs no match.
  if is_locked(a) or is_locked(b):
    return _give_up(a, b, f'tied to an axis that stays whole by {why}')
  for view, twin in ((a, b), (b, a)):
    if view.order is not None:  # permuted(c, order) = b: c = b, ordered back.
      back = permuted(twin, np.argsort(view.order), why)
      return unify(view.parts[0], back, why)
  if a.kind == b.kind == 'product':
    return _unify_products(a, b, why)
  if a.kind == b.kind == 'sum':
    return _unify_sums(a, b, why)
  if a.kind == 'sum':
    a, b = b, a
  return _unify_product_with_sum(a, b, why)


def cut(axis: Axis, size: int, why: str) -> tuple[Axis, Axis] | None:
  """Splits an axis behind its first entries into two axes.

  Of product(A of 4, B of 3) behind 6 entries: A becomes sum(A1 of 2, A2 of 2),
  and the two are product(A1, B) and product(A2, B). Behind 5 it cannot be cut.

  Args:
    axis: the axis; an atom becomes a sum of two.
    size: entries of the first part, from 0 to the size of the axis.
    why: the operation that splits it, for the reason of a lock.

  Returns:
    The two parts, or None if the cut falls inside a product.
  """
  axis = find(axis)
  if axis.kind == 'atom':
    first = atom(size, axis.locked)
    second = atom(axis.size - size, axis.locked)
    axis.bound = concatenation([first, second])
    return first, second
  if axis.order is not None:
    first, second = atom(size), atom(axis.size - size)
    unify(axis, concatenation([first, second]), why)
    return first, second
  if axis.kind == 'product':
    major, *minor = factors(axis)
    pitch = math.prod(f.size for f in minor)  # Entries per entry of major.
    if size % pitch:
      return None
    halves = cut(major, size // pitch, why)
    if halves is None:
      return None
    first, second = (product([half, *minor]) for half in halves)
    return first, second
  before, after = [], terms(axis)
  while after and size:
    head = find(after.pop(0))
    if head.size <= size:
      before.append(head)
      size -= head.size
      continue
    halves = cut(head, size, why)
    if halves is None:
      return None
    before.append(halves[0])
    after.insert(0, halves[1])
    size = 0
  return concatenation(before), concatenation(after)


def _is(n: Size, m: Size) -> bool:
  """Whether two sizes, possibly symbolic, are known to be equal."""
  return bool(n == m)


def _bind(a: Axis, b: Axis, why: str) -> None:
  """Lets b stand for the atom a."""
  if b.order is not None and find(b.parts[0]) is a:
    return _tie_cycles(a, b.order, why)
  # An infinite type, such as a = product(a, c): the occurs check.
  if any(leaf is a for leaf in atoms(b)):
    return lock(b, f'it would have to contain itself: {why}')
  if a.locked:
    lock(b, a.locked)
  # An axis of 3 cut into 3 terms of 1: say why, not just that each is single.
  for leaf in atoms(b):
    if leaf.locked == _SINGLE and leaf is not b:
      leaf.locked = f'{why} takes it apart, entry by entry'
  a.bound = b


def _settled(axis: Axis, why: str) -> Axis:
  """The node that stands for an axis; its order taken down to its parts.

  A permuted axis is a view of an atom. Once that atom is taken apart, the view
  becomes the permuted parts.
  """
  axis = find(axis)
  if axis.order is not None and find(axis.parts[0]).kind != 'atom':
    axis.bound = permuted(axis.parts[0], axis.order, why)
  return find(axis)


def _tie_cycles(a: Axis, order: np.ndarray, why: str) -> None:
  """Ties each entry of an atom with the one that an order puts in its place.

  The entries of a cycle go together: one unit of a new atom stands for each
  cycle of a length, and occurs as often as the cycle is long. Of the reverse
  of 5 entries these are (0, 4), (1, 3) and (2), so that

    a = sum(P, M, reversed(P)),    P of 2 units, M of 1.
  """
  cycles: dict[int, list[list[int]]] = {}
  visited: set[int] = set()
  for start in range(a.size):
    cycle = []
    while start not in visited:
      visited.add(start)
      cycle.append(start)
      start = int(order[start])
    if cycle:
      cycles.setdefault(len(cycle), []).append(cycle)
  copies, entries = [], []
  for length, alike in cycles.items():
    # The same atom `length` times: first the heads of all cycles, then each
    # entry's successor, so that unit k of every copy is of cycle k.
    copies += [atom(len(alike))] * length
    entries += np.transpose(alike).reshape(-1).tolist()
  _bind(a, permuted(concatenation(copies), np.argsort(entries), why), why)


def _give_up(a: Axis, b: Axis, why: str) -> None:
  """Keeps both axes whole where they cannot be one type."""
  lock(a, why)
  lock(b, why)


def _unify_products(a: Axis, b: Axis, why: str) -> None:
  """Matches factors from the minor end, splitting the larger of two.

  Of product(A of 2, B of 6) and product(C of 4, D of 3): B is taken apart into
  product(M of 2, D of 3), then C into product(A of 2, M of 2).
  """
  xs, ys = factors(a), factors(b)
  while xs and ys:
    x, y = find(xs.pop()), find(ys.pop())
    if x.kind == 'product' or y.kind == 'product':
      # An earlier step took apart an atom that occurs here again.
      xs += factors(x)
      ys += factors(y)
      continue
    if _is(x.size, y.size):
      unify(x, y, why)
      continue
    if x.size < y.size:
      x, y, xs, ys = y, x, ys, xs
    if x.size % y.size:
      return _give_up(a, b, f'its factors do not match: {why}')
    major, minor = atom(x.size // y.size), atom(y.size)
    if x.kind == 'sum':
      lock(x, f'a concatenation cannot be a factor: {why}')
      lock(major, f'a concatenation cannot be a factor: {why}')
      lock(minor, f'a concatenation cannot be a factor: {why}')
    else:
      unify(x, Axis(x.size, 'product', [major, minor]), why)
    unify(minor, y, why)
    xs.append(major)
  return None


def _unify_sums(a: Axis, b: Axis, why: str) -> None:
  """Matches terms from the front, cutting the larger of two.

  Of sum(A of 2, B of 4) and sum(C of 5, D of 1): C becomes sum(A, E of 3) and B
  becomes sum(E, D).
  """
  xs, ys = terms(a), terms(b)
  while xs and ys:
    x, y = find(xs.pop(0)), find(ys.pop(0))
    if x.kind == 'sum' or y.kind == 'sum':
      xs[:0] = terms(x)
      ys[:0] = terms(y)
      continue
    if _is(x.size, y.size):
      unify(x, y, why)
      continue
    if x.size < y.size:
      x, y, xs, ys = y, x, ys, xs
    halves = cut(x, y.size, why)
    if halves is None:
      return _give_up(a, b, f'its parts do not match: {why}')
    unify(halves[0], y, why)
    xs.insert(0, halves[1])
  return None


def _unify_product_with_sum(a: Axis, b: Axis, why: str) -> None:
  """Cuts the major factor of the product a as the sum b is cut.

  Of product(A of 3, B of 2) and sum(C of 4, D of 2): A becomes sum(A1 of 2,
  A2 of 1), C becomes product(A1, B) and D becomes product(A2, B), that is B.
  """
  major, *minor = factors(a)
  pitch = math.prod(f.size for f in minor)
  pieces = terms(b)
  if any(find(piece).size % pitch for piece in pieces):
    return _give_up(a, b, f'it is cut inside a product: {why}')
  majors = [atom(find(piece).size // pitch) for piece in pieces]
  if not _is(find(major).size, 1):
    unify(major, concatenation(majors), why)
  for half, piece in zip(majors, pieces, strict=True):
    unify(piece, product([half, *minor]), why)
  return None
