"""Slices of leaves: what a group removes, unit by unit, and where it sits."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis


class Member(NamedTuple):
  """A slice of a leaf that belongs to a group.

  Unit i of the group sits at ``offset + i * stride`` of the leaf's axis, and
  at every other entry of that axis which a product or a repetition adds. Where
  the function permutes the units, that is so of the first two alone, and of
  all where it flips them (a stride of -1).
  """

  path: str
  axis: int
  offset: int
  stride: int


class Group(NamedTuple):
  """Slices of leaves that can only be removed together, unit by unit."""

  name: str
  size: int
  members: tuple[Member, ...]
  reduced: tuple[str, ...]  # Operations that reduce over it; see trace.
  least: int  # Units that must stay; this and the next two are of rules.
  most: int  # Units that may stay.
  round_to: int  # The units that stay are a multiple of it, or all.


class Leaf(NamedTuple):
  """A leaf of the params with the type of each of its axes."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[Axis, ...]


def occurrences(axis: Axis) -> list[tuple[Axis, np.ndarray]]:
  """Returns where each atom of an axis occurs in it.

  Returns:
    A list of (atom, labels): labels is int[size of the axis], the index
    within the atom of each entry, -1 where the entry is not of this atom.
  """
  axis = ax.find(axis)
  if axis.kind == 'atom':
    return [(axis, np.arange(axis.size))]
  if axis.order is not None:
    within = occurrences(axis.parts[0])
    return [(atom, labels[axis.order]) for atom, labels in within]
  found = []
  for k, part in enumerate(axis.parts):
    sizes = [ax.find(p).size for p in axis.parts]
    for atom, labels in occurrences(part):
      if axis.kind == 'sum':
        before, after = sum(sizes[:k]), sum(sizes[k + 1 :])
        labels = np.pad(labels, (before, after), constant_values=-1)
      else:
        outer = int(np.prod(sizes[:k], dtype=int))
        inner = int(np.prod(sizes[k + 1 :], dtype=int))
        labels = np.tile(np.repeat(labels, inner), outer)
      found.append((atom, labels))
  return found


def member(path: str, axis: int, labels: np.ndarray) -> Member:
  """Returns the slice of a leaf that the labels of an atom describe."""
  offset = int(np.flatnonzero(labels == 0)[0])
  second = np.flatnonzero(labels == 1)
  stride = int(second[0]) - offset if second.size else 1
  return Member(path, axis, offset, stride)
