"""What a user decides of groups: rules over their names, and who competes.

A rule names groups by a regular expression and says what may become of them;
scores meet other scores over the whole network or among groups of one shape.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.numerics import counts
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.slices import Group

Over = Literal['group', 'isomorphic']
PROTECTED = 'a rule protects it'


class Choice(NamedTuple):
  """What may become of a group.

  Attributes:
    protect: whether it stays whole.
    tie: groups of one such word are one group: the same indices go.
    least: units that stay at least; a float is a fraction, rounded up.
    most: units that stay at most; a float is a fraction, rounded down; None
      for all.
    round_to: the units that stay are a multiple of it, or all.
  """

  protect: bool = False
  tie: str | None = None
  least: int | float = 1
  most: int | float | None = None
  round_to: int = 1


def apply(
  rules: Mapping[str, Choice | None], names: Mapping[Axis, str]
) -> dict[Axis, Choice]:
  """Locks and ties atoms as rules say; returns what is chosen for the others.

  Args:
    rules: regular expression over names -> choice; the first match wins.
    names: atom -> name of its group.

  Raises:
    TypeError: if a rule is no :class:`Choice`.
    ValueError: if a rule matches no group, or ties groups of other sizes.
  """
  for rule, choice in rules.items():
    if not isinstance(choice, Choice):
      raise TypeError(f'Rule {rule!r} must be a Choice, got {choice!r}.')
  by_name = {name: atom for atom, name in names.items()}
  chosen = {
    by_name[name]: choice
    for name, choice in tree.match(rules, by_name, None, 'group').items()
    if choice is not None
  }
  ties: dict[str, list[Axis]] = {}
  for atom, choice in chosen.items():
    if choice.protect:
      ax.lock(atom, PROTECTED)
    if choice.tie is not None:
      ties.setdefault(choice.tie, []).append(atom)
  for word, (first, *others) in ties.items():
    for atom in others:
      if atom.size != first.size:
        raise ValueError(
          f'Rules tie {names[first]!r} of {first.size} units and '
          f'{names[atom]!r} of {atom.size} as {word!r}: only groups of one '
          f'size can go together.'
        )
      ax.unify(first, atom, f'the rule {word!r}')
  # The first group of a tie, in program order, chooses for all of them.
  found: dict[Axis, Choice] = {}
  for atom, choice in chosen.items():
    found.setdefault(ax.find(atom), choice)
  return found


def ruled(
  rules: Mapping[str, Choice | None], gone: Collection[str]
) -> dict[str, str]:
  """Returns group -> the rule for which it stands alone no more, in words.

  Args:
    rules: as :func:`apply`.
    gone: groups that were there without the rules.

  Examples:
    >>> ruled({'head': Choice(protect=True)}, ['head'])
    {'head': "the rule 'head', which protects it"}
  """
  deciding = {
    rule: (rule, choice)
    for rule, choice in rules.items()
    if any(re.fullmatch(rule, name) for name in gone)
  }
  found = {}
  for name, (rule, choice) in tree.match(deciding, gone, ('', None)).items():
    if choice is not None and choice.protect:
      found[name] = f'the rule {rule!r}, which protects it'
    elif choice is not None and choice.tie is not None:
      found[name] = f'the rule {rule!r}, which ties it as {choice.tie!r}'
  return found


def limits(choice: Choice | None, name: str, size: int) -> tuple[int, int, int]:
  """Returns the fewest and most units of a group, and what they are rounded to.

  Args:
    choice: of the group; None leaves it free.
    name: its name, for errors.
    size: its units.

  Raises:
    ValueError: if the group cannot have so many.

  Examples:
    >>> limits(Choice(least=0.25, round_to=8), 'conv1', 64)
    (16, 64, 8)
    >>> limits(Choice(least=3, most=0.5, round_to=4), 'conv1', 10)
    (4, 4, 4)
  """
  if choice is None:
    return 1, size, 1
  step = choice.round_to
  if step < 1:
    raise ValueError(
      f'`round_to` of group {name!r} must be at least 1, got {step}.'
    )
  least, most = choice.least, size if choice.most is None else choice.most
  least = counts.least(size, least) if isinstance(least, float) else least
  most = counts.most(size, most) if isinstance(most, float) else most
  least = max(least, 1)
  if not least <= most <= size:
    raise ValueError(
      f'Group {name!r} of {size} units cannot keep between {least} and {most}.'
    )
  least = min(-(-least // step) * step, size)
  most = most if most == size else most // step * step
  if least > most:
    raise ValueError(
      f'No multiple of {step} lies between the limits of group {name!r} of '
      f'{size} units.'
    )
  return least, most, step


def check_width(group: Group, width: int) -> None:
  """Raises unless a group may keep so many units.

  Raises:
    ValueError: naming the group and what its rules allow.
  """
  whole = width == group.size == group.most
  rounded = width % group.round_to == 0
  if not (group.least <= width <= group.most and (rounded or whole)):
    raise ValueError(
      f'Group {group.name!r} must keep {group.least} to {group.most} units in '
      f'steps of {group.round_to} by the rules of its graph, got {width}: keep '
      f'as many, or take a graph without the rule, graph.constrain(rules).'
    )


@kinds.checked
def pools(graph: Graph) -> dict[str, str]:
  """Returns group -> the first group that is isomorphic to it, perhaps itself.

  Two groups are isomorphic if they have as many units and slices of leaves of
  the same shapes and last names, at the same places: the repeated blocks of a
  network.
  """
  first: dict[Any, str] = {}
  found = {}
  for name, group in graph.groups.items():
    slices = sorted(
      (
        graph.leaves[m.path].shape,
        m.axis,
        m.offset,
        m.stride,
        m.path.rpartition('/')[2],
      )
      for m in group.members
    )
    found[name] = first.setdefault((group.size, tuple(slices)), name)
  return found


@kinds.checked
def normalise(
  graph: Graph, scores: Mapping[str, Any], *, over: Over = 'group'
) -> dict[str, Any]:
  """Returns scores divided by their mean over those that compete with them.

  Over 'group' each group has the mean 1, so that groups of different scale
  lose alike; over 'isomorphic' the units of all isomorphic groups (see
  :func:`pools`) share one mean and compete with each other as they are: of
  two blocks of one shape the weaker loses more.

  Args:
    graph: the graph.
    scores: group -> float[size], larger = keep; traced or not.
    over: 'group' or 'isomorphic'.

  Returns:
    group -> float32[size]; where the mean is 0, scores as they are.

  Raises:
    ValueError: if ``over`` is neither of the two, or a group is unknown.

  Examples:
    >>> from jaxprune.structure import trace
    >>> params = [{'w': jnp.ones((2, 2))} for _ in range(3)]
    >>> mlp = lambda p, x: x @ p[0]['w'] @ p[1]['w'] @ p[2]['w']
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> scores = {'0': jnp.array([1.0, 3.0]), '1': jnp.array([6.0, 6.0])}
    >>> print(normalise(graph, scores)['1'])
    [1. 1.]
    >>> print(normalise(graph, scores, over='isomorphic')['1'])
    [1.5 1.5]
  """
  if over not in ('group', 'isomorphic'):
    raise ValueError(f"`over` must be 'group' or 'isomorphic', got {over!r}.")
  shared = pools(graph)
  unknown = [name for name in scores if name not in shared]
  if unknown:
    raise ValueError(
      f'There is no group {", ".join(map(repr, unknown))}; the groups are: '
      f'{", ".join(graph.groups) or "none"}.'
    )
  values = {name: jnp.asarray(x, jnp.float32) for name, x in scores.items()}
  pool = {
    name: shared[name] if over == 'isomorphic' else name for name in values
  }
  means = {}
  for name in pool.values():
    mean = jnp.mean(
      jnp.concatenate([x for other, x in values.items() if pool[other] == name])
    )
    means[name] = jnp.where(mean == 0, 1.0, mean)
  return {name: x / means[pool[name]] for name, x in values.items()}
