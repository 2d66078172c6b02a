"""Numbers for the channels of a network: equal axis types, equal numbers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.scores import lookahead
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.slices import occurrences


class Factor(NamedTuple):
  """A normalisation on the way of data, and the axis that it runs over."""

  norm: lookahead.Norm
  axis: Axis | None  # None: one number for all channels.
  why: str  # Where it stands.


class Numbering:
  """Numbers the entries of axes: equal types, equal numbers.

  An entry is known by the atoms that it lies in and its index in each. Where
  kernels write axes of the types A (2 entries) and product(A, B) (2 x 3), the
  first has the numbers 0 and 1, the second 2 to 7 in the order of the atoms.

  Attributes:
    refused: path -> why; extended by what cannot be numbered.
    order: atom -> its rank, by first occurrence; atoms of the input have none.
    bases: atoms of some entries, by rank -> the number of the first of them.
    total: how many numbers there are.
  """

  def __init__(
    self, written: Sequence[tuple[Axis, ...]], refused: dict[str, str]
  ):
    self.refused = refused
    self.order: dict[Axis, int] = {}
    for axis in (axis for axes in written for axis in axes):
      for atom in ax.atoms(axis):
        self.order.setdefault(atom, len(self.order))
    self.bases: dict[tuple[Axis, ...], int] = {}
    self.total = 0
    for axes in written:
      for key, _, _ in self._entries(_all(axes)):
        if key and key not in self.bases:
          self.bases[key] = self.total
          self.total += math.prod(atom.size for atom in key)

  def side(self, path: str, axes: tuple[Axis, ...]) -> np.ndarray:
    """Returns the number of each entry, -1 where no kernel writes it."""
    numbers, is_partial = self._numbers(_all(axes))
    if is_partial:
      self.refused.setdefault(
        path, 'it reads some of the axes that others write together, or more'
      )
    return numbers.reshape([ax.find(axis).size for axis in axes])

  def norms(
    self, factors: Iterable[Factor], channels: np.ndarray
  ) -> tuple[lookahead.Norm, ...]:
    """Returns norms with the entry of their vectors for each channel.

    A norm of 4 channels numbered [4, 5, 6, 7], asked for the channels
    [6, -1, 4], has the entries [2, 0, 0] (that of channel -1 is not read).
    """
    norms = []
    for norm, axis, why in factors:
      if axis is None:
        norms.append(norm._replace(entries=np.zeros(channels.shape, int)))
        continue
      numbers, _ = self._numbers(axis)
      known = numbers[numbers >= 0]
      # Two entries of the vector for one channel: no factor of the channel.
      repeats = np.unique(known).size < known.size
      if repeats or not np.isin(channels, [*known, -1]).all():
        self.refused.setdefault(
          norm.scale or norm.var or '', f'{why} runs not over channels alone'
        )
        continue
      entry_of = np.zeros(self.total + 1, int)  # The last is for channel -1.
      entry_of[numbers] = np.arange(numbers.size)
      norms.append(norm._replace(entries=entry_of[channels]))
    return tuple(norms)

  def _numbers(self, axis: Axis) -> tuple[np.ndarray, bool]:
    """Returns the number of each entry, and whether some are partial.

    Of what was written as product(A, B), an axis of type A alone is partial:
    each of its entries stands for several channels.
    """
    numbers, is_partial = np.full(ax.find(axis).size, -1), False
    for key, at, index in self._entries(axis):
      if key in self.bases:
        numbers[at] = self.bases[key] + index
      is_partial = is_partial or bool(key and key not in self.bases)
    return numbers, is_partial

  def _entries(
    self, axis: Axis
  ) -> list[tuple[tuple[Axis, ...], np.ndarray, np.ndarray]]:
    """Returns the atoms of the entries: (atoms, entries, index within).

    Of sum(A, product(B, A)), with A of 2 and B of 3 entries, A first by rank:

      (A,)    entries 0, 1   index 0, 1
      (A, B)  entries 2..7   index 0, 3, 1, 4, 2, 5   (3 a + b of each)
    """
    pairs = [(a, n) for a, n in occurrences(axis) if a in self.order]
    pairs.sort(key=lambda pair: self.order[pair[0]])
    size = ax.find(axis).size
    labels = np.array([n for _, n in pairs], int).reshape(len(pairs), size)
    # One column per entry: which occurrences of atoms it lies in.
    patterns, which = np.unique(labels >= 0, axis=1, return_inverse=True)
    entries = []
    for k, pattern in enumerate(patterns.T):
      at = np.flatnonzero(which.ravel() == k)
      index = np.zeros(at.size, int)
      crossed = [p for p, is_in in zip(pairs, pattern, strict=True) if is_in]
      for atom, n in crossed:  # Mixed radix, the first atom major.
        index = index * atom.size + n[at]
      entries.append((tuple(atom for atom, _ in crossed), at, index))
    return entries


def _all(axes: tuple[Axis, ...]) -> Axis:
  """Returns several axes as a single one, the first major."""
  return axes[0] if len(axes) == 1 else ax.product(axes)
