"""The plan itself: what is kept of a network, as plain data."""

import dataclasses
import itertools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import checks
from jaxprune.checks import kinds
from jaxprune.plans.differences import Change, Diff, Resized
from jaxprune.structure import group_rules
from jaxprune.structure.graph import Graph, runner
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.run import Run
from jaxprune.structure.program.slices import Group, member, occurrences
from jaxprune.structure.queries import held
from jaxprune.structure.walks.branches import severed

FORMAT = 3
# Format 1 knew of groups alone, format 2 of one resolution.
READABLE = (1, 2, 3)
Kept = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is kept of a network.

  Attributes:
    graph: the fingerprint of the graph it was made for.
    kept: (group, ascending indices that stay), sorted by group; a group that
      is absent is kept whole, or goes with its block.
    dropped: names of the blocks to leave out, sorted, with the blocks inside.
    resolution: sides of the first argument after its batch, (rows, columns) of
      images; None for those of the trace.
    resized: where the resolution changes on the way, in order, (cut, sides):
      from the first operation on data on that reads the leaf of the path
      ``cut``, the function works as at these sides of its first argument, and
      the feature that crosses is resized.
    version: of the format.
  """

  graph: str
  kept: Kept = ()
  dropped: tuple[str, ...] = ()
  resolution: tuple[int, ...] | None = None
  resized: Resized = ()
  version: int = FORMAT


@kinds.checked
def from_kept(
  graph: Graph,
  kept: Mapping[str, Sequence[int]],
  dropped: Iterable[str] = (),
  resolution: Sequence[int] | None = None,
  resized: Iterable[tuple[str, Sequence[int]]] = (),
) -> Plan:
  """Returns the plan that keeps these indices and drops these blocks.

  Args:
    graph: the graph.
    kept: group -> indices to keep, in any order; at least one, but for a
      parallel branch of a concatenation, which may go whole.
    dropped: names of blocks of ``graph.blocks``; those inside go too.
    resolution: sides of the first argument after its batch; None for those of
      the trace.
    resized: (cut, sides) as :class:`Plan` has them; one that changes nothing
      is left out.

  Raises:
    ValueError: if a group or block is unknown, the indices of a group are none,
      double or out of range, a rule of the graph allows no such width, a side
      is no positive int, or a cut is no path of a leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 2))}
    >>> mlp = lambda p, x: x + x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> from_kept(graph, {'a': [2, 0]}).kept
    (('a', (0, 2)),)
    >>> from_kept(graph, {}, dropped=['+a']).dropped
    ('+a',)
  """
  closed = _with_inner(graph, dropped)
  lost = vanished_groups(graph, closed)
  entries = []
  for name, index in sorted(kept.items()):
    size = group(graph, name).size
    chosen = sorted({_unit(name, i) for i in index})
    if len(chosen) != len(index):
      raise ValueError(
        f'Group {name!r} must keep one or more indices, each once, got '
        f'{list(index)}.'
      )
    _check_range(name, size, index)
    if len(chosen) < size and name not in lost:
      entries.append((name, tuple(chosen)))
  sides = None
  if resolution is not None:
    sides = _positive('resolution', resolution)
  now, changes = sides, []
  for cut, asked in resized:
    there = _positive('resized', asked)
    if now is None:
      now = tuple(graph.args[0].shape[1 : 1 + len(there)])
    if there != now:
      changes.append((str(cut), there))
    now = there
  plan = Plan(graph.fingerprint, tuple(entries), closed, sides, tuple(changes))
  check(graph, plan)
  return plan


def _unit(name: str, index: Any) -> int:
  return int(checks.whole(f'kept[{name!r}]', index))


def _positive(what: str, sides: Sequence[int]) -> tuple[int, ...]:
  """Returns sides as ints, once all are known to be positive."""
  whole = tuple(int(side) for side in sides)
  if not whole or min(whole) < 1 or whole != tuple(sides):
    raise ValueError(
      f'`{what}` must be positive ints, one or more, got {sides}.'
    )
  return whole


@kinds.checked
def from_masks(
  graph: Graph,
  masks: Mapping[str, Any],
  dropped: Iterable[str] = (),
  resolution: Sequence[int] | None = None,
  resized: Iterable[tuple[str, Sequence[int]]] = (),
) -> Plan:
  """Returns the plan that keeps what masks of groups keep.

  Args:
    graph: the graph.
    masks: group -> bool[size], True = kept.
    dropped: as :func:`from_kept`.
    resolution: as :func:`from_kept`.
    resized: as :func:`from_kept`.

  Raises:
    ValueError: as :func:`from_kept`, or if a mask has another shape.
  """
  kept = {}
  for name, mask in masks.items():
    size = group(graph, name).size
    if np.shape(mask) != (size,):
      raise ValueError(
        f'The mask of group {name!r} must have shape ({size},), got '
        f'{np.shape(mask)}.'
      )
    kept[name] = np.flatnonzero(np.asarray(mask))
  return from_kept(graph, kept, dropped, resolution, resized)


@kinds.checked
def from_widths(
  graph: Graph,
  widths: Mapping[str, int],
  scores: Mapping[str, Any] | None = None,
  dropped: Iterable[str] = (),
  resolution: Sequence[int] | None = None,
  resized: Iterable[tuple[str, Sequence[int]]] = (),
) -> Plan:
  """Returns the plan that keeps so many units, the best or the first.

  Args:
    graph: the graph.
    widths: group -> units to keep, from 1 to its size.
    scores: group -> score of each unit, larger = keep, ties to the lower
      index; without them (or a group in them) the first units stay.
    dropped: as :func:`from_kept`.
    resolution: as :func:`from_kept`.
    resized: as :func:`from_kept`.

  Raises:
    ValueError: as :func:`from_kept`, or if a width is out of range.
  """
  kept = {}
  for name, width in widths.items():
    size = group(graph, name).size
    checks.whole(f'widths[{name!r}]', width)
    if not 1 <= width <= size:
      raise ValueError(
        f'Group {name!r} can keep 1 to {size} units, got {width}.'
      )
    order = np.arange(size)
    if scores is not None and name in scores:
      order = np.argsort(-np.asarray(scores[name]), kind='stable')
    kept[name] = order[:width]
  return from_kept(graph, kept, dropped, resolution, resized)


@kinds.checked
def widths(graph: Graph, plan: Plan) -> dict[str, tuple[int, int]]:
  """Returns the units of every group, (before, after).

  After is 0 for a group that goes with its blocks.
  """
  kept = kept_indices(graph, plan)
  lost = vanished_groups(graph, plan.dropped)
  return {
    name: (
      found.size,
      0 if name in lost else len(kept.get(name, range(found.size))),
    )
    for name, found in graph.groups.items()
  }


@kinds.checked
def open_blocks(graph: Graph, plan: Plan) -> dict[str, int]:
  """Returns block -> 1 if it stays, 0 if the plan drops it."""
  _check_graph(graph, plan)
  closed = _with_inner(graph, plan.dropped)
  return {name: int(name not in closed) for name in graph.blocks}


@kinds.checked
def compose(
  graph: Graph, first: Plan, small_graph: Graph, second: Plan
) -> Plan:
  """Returns the plan that does at once what two do one after the other.

  Args:
    graph: the graph of the original function.
    first: a plan of it.
    small_graph: the graph of ``specialise(graph, first)`` with shrunk params.
    second: a plan of that.

  Returns:
    A plan of ``graph``: its indices are those of the original units.

  Raises:
    ValueError: if a plan is not of its graph, ``small_graph`` is not of what
      ``first`` leaves, or ``second`` cuts a group or drops a block that is
      none of ``graph`` (a group that falls apart without a dropped block), or
      changes resolutions where ``first`` has resized features.
  """
  kept = dict(kept_indices(graph, first))
  run = runner(graph, kept)
  gone = vanished(graph, first.dropped)
  shapes = {
    path: tuple(run.size(axis) for axis in leaf.axes)
    for path, leaf in graph.leaves.items()
    if path not in gone
  }
  if shapes != {path: leaf.shape for path, leaf in small_graph.leaves.items()}:
    raise ValueError(
      'The small graph has other leaves than the first plan leaves: trace '
      'specialise(graph, first) with shrunk params.'
    )
  for name, index in kept_indices(small_graph, second).items():
    original, units = _original(graph, run, gone, small_graph, name)
    kept[original] = tuple(int(units[i]) for i in index)
  dropped = [*first.dropped]
  for name in second.dropped:
    leaves = {*small_graph.blocks[name].leaves}
    match = [
      b.name for b in graph.blocks.values() if {*b.leaves} - gone == leaves
    ]
    if not match:
      raise ValueError(f'Block {name!r} is no block of the original graph.')
    dropped.append(match[0])
  if first.resized and (second.resolution or second.resized):
    raise ValueError(
      f'The second plan changes resolutions, where the first has resized '
      f'features already, {first.resized}: give them in one plan.'
    )
  resolution = second.resolution or first.resolution
  resized = second.resized or first.resized
  return from_kept(graph, kept, dropped, resolution, resized)


def _original(
  graph: Graph, run: Run, gone: Container[str], small_graph: Graph, name: str
) -> tuple[str, dict[int, int]]:
  """The original of a group of a smaller graph: its name, unit -> unit."""
  found = small_graph.groups[name]
  path, axis = found.members[0][:2]
  small = next(
    labels
    for atom, labels in occurrences(small_graph.leaves[path].axes[axis])
    if atom is ax.find(small_graph.atoms[name])
    and member(path, axis, labels) == found.members[0]
  )
  full = graph.leaves[path].axes[axis]
  mask = run.mask(full)
  names = {atom: group for group, atom in graph.atoms.items()}
  for atom, labels in occurrences(full):
    labels = labels if mask is None else labels[mask]
    pairs = {*zip(small.tolist(), labels.tolist(), strict=True)} - {(-1, -1)}
    units = dict(pairs)
    if (
      atom in names
      and len(pairs) == len(units) == found.size == len({*units.values()})
      and -1 not in units
    ):
      members = [
        m for m in graph.groups[names[atom]].members if m[0] not in gone
      ]
      if len(members) == len(found.members):
        return names[atom], units
  raise ValueError(
    f'Group {name!r} of the small graph is no group of the original one: '
    f'without the dropped blocks it stands alone.'
  )


@kinds.checked
def diff(graph: Graph, first: Plan, second: Plan) -> Diff:
  """Returns what a second plan does otherwise than a first.

  Args:
    graph: the graph of both.
    first: a plan.
    second: another.

  Raises:
    ValueError: if one is of another graph.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 2))}
    >>> mlp = lambda p, x: x + x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> narrow = from_kept(graph, {'a': [1]}, resolution=[2])
    >>> print(diff(graph, from_kept(graph, {}), narrow))
    a: -0,2
    resolution: as traced -> 2
    >>> print(diff(graph, narrow, from_kept(graph, {}, ['+a'])))
    +a: dropped
    resolution: 2 -> as traced
  """
  before, after = kept_indices(graph, first), kept_indices(graph, second)
  lost = {
    *vanished_groups(graph, first.dropped),
    *vanished_groups(graph, second.dropped),
  }
  groups = {}
  for name, found in graph.groups.items():
    whole = range(found.size)
    had, has = {*before.get(name, whole)}, {*after.get(name, whole)}
    if had != has and name not in lost:
      groups[name] = Change(tuple(sorted(had - has)), tuple(sorted(has - had)))
  closed = _with_inner(graph, first.dropped), _with_inner(graph, second.dropped)
  agree = first.resolution == second.resolution
  alike = first.resized == second.resized
  return Diff(
    groups,
    tuple(name for name in closed[1] if name not in closed[0]),
    tuple(name for name in closed[0] if name not in closed[1]),
    None if agree else (first.resolution, second.resolution),
    None if alike else (first.resized, second.resized),
  )


@kinds.checked
def to_json(plan: Plan) -> str:
  """Returns a plan as JSON, one group a line, the same bytes each time.

  Examples:
    >>> print(to_json(Plan('c0ffee', (('conv1', (0, 2)),), ('block3',))))
    {
     "version": 3,
     "graph": "c0ffee",
     "kept": {
      "conv1": [0, 2]
     },
     "dropped": ["block3"],
     "resolution": null,
     "resized": []
    }
  """
  lines = [
    f'  {json.dumps(name)}: {checks.dumps(list(index))}'
    for name, index in plan.kept
  ]
  kept = '{\n' + ',\n'.join(lines) + '\n }' if lines else '{}'
  return (
    f'{{\n "version": {plan.version},\n "graph": {json.dumps(plan.graph)},\n'
    f' "kept": {kept},\n "dropped": {json.dumps(list(plan.dropped))},\n'
    f' "resolution": {checks.dumps(plan.resolution)},\n'
    f' "resized": {checks.dumps(plan.resized)}\n}}'
  )


_NO_PLAN = (
  'This is no plan: a JSON object with "version", "graph" and "kept" is.'
)


@kinds.checked
def from_json(text: str) -> Plan:
  """Returns the plan that :func:`to_json` wrote.

  Raises:
    ValueError: if the text is no plan, or of a format this version does not
      know.

  Examples:
    >>> plan = Plan('c0ffee', (('conv1', (0, 2)),), resolution=(24, 24))
    >>> from_json(to_json(plan)) == plan
    True
  """
  try:
    data = checks.loads(text)
    version = data['version']
  except (KeyError, TypeError):
    raise ValueError(_NO_PLAN) from None
  except ValueError as error:
    raise ValueError(f'{_NO_PLAN} {error}') from None
  if type(version) is not int or version not in READABLE:
    raise ValueError(
      f'The plan has format {version}, this version of jaxprune reads formats '
      f'{" and ".join(map(str, READABLE))}; install the version that wrote it.'
    )
  try:
    kept = tuple(
      (str(name), tuple(map(_index, index)))
      for name, index in sorted(data['kept'].items())
    )
    dropped = tuple(str(name) for name in data.get('dropped', ()))
    sides = data.get('resolution')
    resolution = None if sides is None else tuple(map(_index, sides))
    resized = tuple(
      (str(cut), tuple(map(_index, there)))
      for cut, there in data.get('resized', ())
    )
    return Plan(str(data['graph']), kept, dropped, resolution, resized)
  except (KeyError, TypeError, ValueError, AttributeError):
    raise ValueError(
      'The plan is damaged: "graph" must be a string, "kept" map each group to '
      'a list of indices, "dropped" be a list of blocks, "resolution" a list '
      'of ints or null and "resized" a list of cuts with such lists.'
    ) from None


def _index(value: Any) -> int:
  """Returns an int of JSON; true is none, though Python counts it as 1."""
  if type(value) is not int:
    raise TypeError(f'{value!r} is no index.')
  return value


def check(graph: Graph, plan: Plan) -> None:
  """Raises unless a plan is of a graph, asks for what is there and keeps its
  rules, wherever the plan comes from.

  Raises:
    ValueError: if it is of another graph (or cuts what a rule of this one
      protects), keeps an index that a group does not have, indices that do not
      ascend, none where one must stay, or a width that a rule does not allow,
      has a group twice, drops a block that is not there, or has sides that are
      no positive ints, or a cut that is no path of a leaf.
  """
  _check_graph(graph, plan)
  names = [name for name, _ in plan.kept]
  for name, index in plan.kept:
    if not all(type(i) is int for i in index):  # A bool and 0.5 are none.
      index = [_unit(name, i) for i in index]
    _check_range(name, group(graph, name).size, index)
    if names.count(name) > 1:
      raise ValueError(
        f'The plan has group {name!r} twice; make plans with plans.from_kept.'
      )
    if any(first >= second for first, second in itertools.pairwise(index)):
      raise ValueError(
        f'The plan must keep ascending units of group {name!r}, each once, got '
        f'{list(index)}; make plans with plans.from_kept.'
      )
  empty = [name for name, index in plan.kept if not index]
  if empty and (cut := severed(graph, empty)):
    raise ValueError(
      f'Group {cut[0]!r} must keep one or more indices, each once, got [].'
    )
  closed = _with_inner(graph, plan.dropped)
  lost, kept = vanished_groups(graph, closed), dict(plan.kept)
  for name, found in graph.groups.items():
    width = len(kept.get(name, range(found.size)))
    if name not in lost and (width or found.least > 1):
      group_rules.check_width(found, width)
  if plan.resolution is not None:
    _positive('resolution', plan.resolution)
  check_cuts(graph, plan.resized)


def check_cuts(graph: Graph, resized: Resized) -> None:
  """Raises unless resolutions change at leaves of a graph, to positive sides.

  Raises:
    ValueError: if a cut is no path of a leaf or a side is no positive int.
  """
  for cut, sides in resized:
    _positive('resized', sides)
    if cut not in graph.leaves:
      raise ValueError(
        f'`resized` must name a leaf by its whole path, got {cut!r}: '
        f'structure.first_read(graph, [rule]) gives that of a rule. The leaves '
        f'are: {", ".join(graph.leaves)}.'
      )


def _check_range(name: str, size: int, index: Sequence[int]) -> None:
  if len(index) and not 0 <= min(index) <= max(index) < size:
    raise ValueError(
      f'Group {name!r} has units 0 to {size - 1}, got {list(index)}.'
    )


def _check_graph(graph: Graph, plan: Plan) -> None:
  """Raises unless a plan is of a graph; names what a rule keeps or ties."""
  if plan.graph == graph.fingerprint:
    return
  for name, index in plan.kept:
    if name in graph.groups or name not in graph.ruled:
      continue
    raise ValueError(
      f'Group {name!r} stays whole or goes with another, for '
      f'{graph.ruled[name]}, and the plan keeps {len(index)} units of it: plan '
      f'on this graph, or trace without the rule.'
    )
  raise ValueError(
    f'The plan is of graph {plan.graph}, got graph {graph.fingerprint}: trace '
    f'the function and params that it was made for, with its rules. One plan '
    f'for several functions of the same params, such as the evaluation and the '
    f'training step, needs one trace: trace(fn, params, *args, '
    f'also=[(step, *others)]).'
  )


@kinds.checked
def kept_indices(graph: Graph, plan: Plan) -> dict[str, tuple[int, ...]]:
  """Returns group -> kept indices, once the plan is known to be of the graph.

  Raises:
    ValueError: as :func:`check`.
  """
  check(graph, plan)
  return dict(plan.kept)


def group(graph: Graph, name: str) -> Group:
  """Returns a group by name.

  Raises:
    ValueError: if there is none.
  """
  if name not in graph.groups:
    raise ValueError(
      f'There is no group {name!r}; the groups are: '
      f'{", ".join(graph.groups) or "none"}. {held.remedy(graph)}'.rstrip()
    )
  return graph.groups[name]


@kinds.checked
def vanished(graph: Graph, dropped: Iterable[str]) -> set[str]:
  """Returns the paths of the leaves that go with dropped blocks."""
  dropped = list(dropped)
  _with_inner(graph, dropped)  # Raises where a name is unknown.
  return {path for name in dropped for path in graph.blocks[name].leaves}


def vanished_groups(graph: Graph, dropped: Iterable[str]) -> set[str]:
  """Returns the groups whose every slice goes with dropped blocks."""
  gone = vanished(graph, dropped)
  return {
    name
    for name, found in graph.groups.items()
    if all(slice_.path in gone for slice_ in found.members)
  }


def _with_inner(graph: Graph, dropped: Iterable[str]) -> tuple[str, ...]:
  """Blocks and those inside of them, sorted, once all are known."""
  names = {*dropped}
  for name in sorted(names):
    if name not in graph.blocks:
      raise ValueError(
        f'There is no block {name!r} to drop; the blocks are: '
        f'{", ".join(graph.blocks) or "none"}.'
      )
  inner = [
    b.name for b in graph.blocks.values() if names.intersection(b.inside)
  ]
  return tuple(sorted(names.union(inner)))
