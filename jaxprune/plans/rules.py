"""What the rules of a graph allow in a plan."""

from collections.abc import Container, Mapping, Sequence

from jaxprune.structure import choices
from jaxprune.structure.graph import Graph


def check_widths(
  graph: Graph, kept: Mapping[str, Sequence[int]], lost: Container[str]
) -> None:
  """Raises unless the rules of a graph allow the units that its groups keep.

  A parallel branch that goes whole keeps none; a rule of its own forbids that.
  """
  for name, units in graph.groups.items():
    width = len(kept.get(name, range(units.size)))
    if name not in lost and (width or units.least > 1):
      choices.check_width(units, width)


def check_cut(graph: Graph, cut: str) -> None:
  """Raises unless a cut is a path: a pattern out of a file could hang."""
  if cut not in graph.leaves:
    raise ValueError(
      f'A plan is resized from the path of a leaf on, literally, got {cut!r}; '
      f'structure.stages.paths gives those of patterns, the leaves are: '
      f'{", ".join(graph.leaves)}.'
    )


def positive(what: str, sides: Sequence[int]) -> tuple[int, ...]:
  """Returns sides as ints, once all are known to be positive."""
  whole = tuple(int(side) for side in sides)
  if not whole or min(whole) < 1 or whole != tuple(sides):
    raise ValueError(
      f'`{what}` must be positive ints, one or more, got {sides}.'
    )
  return whole


def check_protected(graph: Graph, name: str) -> None:
  """Raises if a group is none because a rule of the graph protects it."""
  if name in graph.groups:
    return
  for where, why in graph.protected.items():
    path = where.rpartition(':')[0]
    if why == choices.PROTECTED and f'{path}/'.startswith(f'{name}/'):
      raise ValueError(
        f'Group {name!r} must stay whole, {why} ({where}), and the plan cuts '
        f'it: plan without it, or trace without the rule.'
      )
