"""Parallel branches: groups side by side in a concatenation, and their insides.

A branch that stands beside others can be closed as a whole: the groups that it
ends in keep no unit, and what is read by nothing but them goes with it.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from jaxprune.checks import kinds
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.slices import occurrences


class Branches(NamedTuple):
  """The parallel branches of a function; fields of ``gates.Structure``.

  Attributes:
    layers: name of the branch -> the group that it ends in.
    inside: name of the branch -> the groups that go with it.
    rivals: sets of branches of which one has to stay: nothing else is beside.
  """

  layers: dict[str, tuple[str, ...]]
  inside: dict[str, tuple[str, ...]]
  rivals: tuple[tuple[str, ...], ...]


@kinds.checked
def branches(graph: Graph) -> Branches:
  """Returns the parallel branches of a function.

  A group ends a branch if something else stands beside it wherever it is read.
  Another group goes with the branch if whatever reads it is left with nothing
  to write.

  Args:
    graph: of :func:`jaxprune.trace`.

  Returns:
    :class:`Branches`; a branch is called after its group, ``'conv3 branch'``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((1, 2)), 'b': jnp.ones((1, 3)),
    ...           'c': jnp.ones((5, 1))}
    >>> fn = lambda p, x: jnp.concatenate([x @ p['a'], x @ p['b']], 1) @ p['c']
    >>> found = branches(trace(fn, params, jnp.ones((1, 1))))
    >>> found.layers, found.rivals
    ({'a branch': ('a',), 'b branch': ('b',)}, (('a branch', 'b branch'),))
  """
  ends = [name for name in graph.readers if _is_beside(graph, name)]
  title = {name: f'{name} branch' for name in ends}
  names = {atom: name for name, atom in graph.atoms.items()}
  rivals: dict[tuple[str, ...], None] = {}
  for name in ends:
    for path, axis, *_ in graph.readers[name]:
      beside = [names.get(a) for a in ax.atoms(graph.leaves[path].axes[axis])]
      if all(group in title for group in beside):
        rivals[tuple(title[str(g)] for g in dict.fromkeys(beside))] = None
  return Branches(
    {title[name]: (name,) for name in ends},
    {title[name]: _inside(graph, name) for name in ends},
    tuple(rivals),
  )


def severed(graph: Graph, empty: Collection[str]) -> list[str]:
  """Returns the groups that must keep a unit, of those that would keep none.

  A group may go whole if whatever reads it has other entries left to read, or
  is itself left with nothing to write.

  Args:
    graph: the graph.
    empty: groups without units.
  """
  gone = {graph.atoms[name] for name in empty}

  def spared(path: str, axis: int) -> bool:
    axes = list(graph.leaves[path].axes)
    read = axes.pop(axis)
    is_left = lambda k: not set(ax.atoms(k)) <= gone
    return is_left(read) or not all(map(is_left, axes))

  return [
    name
    for name in empty
    if name not in graph.readers
    or not all(spared(path, axis) for path, axis, *_ in graph.readers[name])
  ]


def _is_beside(graph: Graph, name: str) -> bool:
  """Whether other entries stand beside a group wherever it is read."""
  for path, axis, *_ in graph.readers[name]:
    found = occurrences(graph.leaves[path].axes[axis])
    own = [labels for atom, labels in found if atom is graph.atoms[name]]
    if not np.any(np.all(np.stack(own) < 0, axis=0)):
      return False
  return True


def _inside(graph: Graph, end: str) -> tuple[str, ...]:
  """The groups that nothing reads once one group is gone."""
  gone, grew = {end}, True
  while grew:
    grew = False
    for name, members in graph.readers.items():
      if name not in gone and all(
        _is_empty(graph, path, gone) for path, *_ in members
      ):
        gone.add(name)
        grew = True
  return tuple(name for name in graph.groups if name in gone - {end})


def _is_empty(graph: Graph, path: str, gone: Collection[str]) -> bool:
  """Whether a leaf has no entry left without some groups."""
  atoms = {ax.find(graph.atoms[name]) for name in gone}
  return any(set(ax.atoms(axis)) <= atoms for axis in graph.leaves[path].axes)
