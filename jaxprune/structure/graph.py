"""The graph of a function: what can only be removed together, and why not.

A :class:`Graph` holds the groups (atoms that nothing locked), the slices of
leaves that belong to each, and for every other axis the operation that
protects it; :mod:`jaxprune.structure.tracing` makes it. Scores and masks go
from leaves to groups (``reduce``) and back (``expand``).
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import tree
from jaxprune.numerics import sharding
from jaxprune.structure.locating import Follow, belonging, undecided
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.run import Run, Without
from jaxprune.structure.program.slices import Group, Leaf, Member, occurrences
from jaxprune.structure.program.typed import Program
from jaxprune.structure.walks.blocks import Block, Blocks, blocks, dead
from jaxprune.structure.walks.consumers import Readers, readers
from jaxprune.structure.walks.flow import Flow, flow

Norm = Literal['l1', 'l2', 'max', 'mean']
Combine = Literal['mean', 'sum', 'max', 'first']


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """What the trace of a function says of its params; made by :func:`trace`.

  Attributes:
    groups: name -> :class:`Group`, in the order of the forward pass.
    leaves: path -> :class:`Leaf`.
    protected: 'path:axis' -> why no entry of this axis can be removed.
    fingerprint: hash of leaf shapes and member slices, of nothing else: the
      same for every version of Python and JAX.
    program: the typed program of the function at the traced shapes.
    atoms: name of a group -> its axis type.
    fn: the function.
    retrace: the graph of the same function at other arguments.
    args: the shapes of the function's other arguments.
    args_like: for each array of them the leaf that it is like, or None.
    out_tree: the structure of what the function returns.
    outputs_like: for each array of it the leaf that it is like, or None.
    also: the graphs of the other functions of the trace: the same groups and
      the same plans, a program of their own.
    constrain: the graph of the same trace under other rules (of which
      :func:`trace` speaks): ``graph.constrain({'head.*': Choice(...)})``.
    ruled: name of a group that a rule protects or ties to another -> that rule,
      in words.
    refit: the graph of the same trace with another function of the params in
      the place of this one: ``graph.refit(fn, *args)``.
  """

  groups: dict[str, Group]
  leaves: dict[str, Leaf]
  protected: dict[str, str]
  fingerprint: str
  program: Program
  atoms: dict[str, Axis]
  fn: Callable[..., Any]
  retrace: Callable[..., 'Graph'] = dataclasses.field(repr=False)
  args: tuple[Any, ...] = dataclasses.field(repr=False)
  args_like: tuple[str | None, ...] = dataclasses.field(repr=False)
  out_tree: Any = dataclasses.field(repr=False)
  outputs_like: tuple[str | None, ...] = dataclasses.field(repr=False)
  also: tuple['Graph', ...] = dataclasses.field(repr=False)
  constrain: Callable[..., 'Graph'] = dataclasses.field(repr=False)
  refit: Callable[..., 'Graph'] = dataclasses.field(repr=False)
  ruled: Mapping[str, str] = dataclasses.field(repr=False)

  @functools.cached_property
  def flow(self) -> Flow:
    """What flows where in the program."""
    return flow(self.program)

  @functools.cached_property
  def _readers(self) -> Readers:
    return readers(self.flow, self.leaves, self.atoms)

  @property
  def readers(self) -> dict[str, tuple[Member, ...]]:
    """group -> the slices that read it, where a gate may act: see `scale`."""
    return self._readers.members

  @property
  def unread(self) -> dict[str, str]:
    """group -> why no gate can act on it, for all that `readers` leaves out."""
    return self._readers.refused

  @property
  def uncloseable(self) -> dict[str, str]:
    """group of `readers` -> why a gate of 0 there does not make it absent."""
    return self._readers.counted

  @functools.cached_property
  def _blocks(self) -> Blocks:
    names = list(self.groups)
    return blocks(self.flow, list(self.leaves), self.outputs_like, names)

  @property
  def blocks(self) -> dict[str, Block]:
    """name -> residual branch that a plan may drop, in the program's order."""
    return self._blocks.found

  @property
  def undropped(self) -> dict[str, str]:
    """The other residual sums -> why their branch must stay."""
    return self._blocks.refused

  def reduce(
    self,
    scores: tree.PyTree,
    *,
    norm: Norm = 'l2',
    combine: Combine = 'mean',
    follow: Follow | None = None,
  ) -> dict[str, jax.Array]:
    """Returns the score of each unit of each group from scores of leaves.

    The score of unit i is ``combine`` over the members of ``norm`` over all
    entries of the member that unit i owns. A leaf without scores (absent, or
    ``optax.MaskedNode``) has no say.

    Args:
      scores: a pytree of arrays like the params, or like a sub-tree of them;
        traced or not.
      norm: how the entries of one member become one number; the gradient of
        an 'l2' is 0 at a unit of zeros.
      combine: how the members become one; 'first' takes the first with scores.
      follow: regular expression over paths of ``scores`` -> whether these are
        of the network; else the names decide.

    Returns:
      group -> float32[size]; groups in which no member has scores are absent.

    Raises:
      ValueError: if a leaf is unknown or has another shape than its param, if
        two sub-trees could be those of the network, or if ``norm`` or
        ``combine`` is none of those.
    """
    _check_ways(norm, combine)
    named = align(self.leaves, scores, follow)
    units: dict[str, list[jax.Array]] = {name: [] for name in self.groups}
    names = {atom: name for name, atom in self.atoms.items()}
    for path, leaf in self.leaves.items():
      if path not in named:
        continue
      score = jnp.abs(jnp.asarray(named[path])).astype(jnp.float32)
      for k, axis in enumerate(leaf.axes):
        found = [
          (names[atom], labels)
          for atom, labels in occurrences(axis)
          if atom in names
        ]
        for name, labels in found:
          size = self.groups[name].size
          units[name].append(_reduce_leaf(score, k, labels, size, norm))
    return {
      name: _combine(found, combine) for name, found in units.items() if found
    }

  def expand(self, masks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mask of each leaf from masks of groups.

    An entry of a leaf is kept if every unit that owns it is kept: a mask of a
    group reaches the kernels that write it, their biases and norms, and the
    rows of all that read it.

    Args:
      masks: group -> bool[size], traced or not; absent groups are kept whole.

    Returns:
      path -> bool array, for every leaf that one of the groups touches.

    Raises:
      ValueError: if a group is unknown or a mask has another shape.
    """
    for name, mask in masks.items():
      if name not in self.groups:
        raise ValueError(
          f'There is no group {name!r}; the groups are: '
          f'{", ".join(self.groups) or "none"}.'
        )
      if np.shape(mask) != (self.groups[name].size,):
        raise ValueError(
          f'The mask of group {name!r} must have shape '
          f'({self.groups[name].size},), got {np.shape(mask)}.'
        )
    names = {self.atoms[name]: name for name in masks}
    expanded = {}
    for path, leaf in self.leaves.items():
      full = None
      for k, axis in enumerate(leaf.axes):
        for atom, labels in occurrences(axis):
          if atom not in names:
            continue
          mask = jnp.asarray(masks[names[atom]], bool)
          entries = jnp.where(labels >= 0, mask[np.maximum(labels, 0)], True)
          entries = entries.reshape(
            [-1 if j == k else 1 for j in range(len(leaf.shape))]
          )
          full = entries if full is None else full & entries
      if full is not None:
        expanded[path] = jnp.broadcast_to(full, leaf.shape)
    return expanded

  def explain(self, path: str, axis: int) -> str:
    """Returns the group of a leaf's axis, or what protects it and where.

    Args:
      path: the path of a leaf.
      axis: one of its axes; negative counts from the end.

    Raises:
      ValueError: if there is no such leaf or axis.
    """
    if path not in self.leaves:
      raise ValueError(
        f'There is no leaf {path!r}; the leaves are: {", ".join(self.leaves)}.'
      )
    leaf = self.leaves[path]
    if not -len(leaf.shape) <= axis < len(leaf.shape):
      raise ValueError(f'{path!r} has {len(leaf.shape)} axes, got axis {axis}.')
    names = {atom: name for name, atom in self.atoms.items()}
    lines = []
    for atom in dict.fromkeys(ax.atoms(leaf.axes[axis])):
      if atom in names:
        lines.append(f'group {names[atom]} ({atom.size} units)')
      elif atom.size > 1:
        lines.append(f'protected ({atom.size}): {atom.locked}')
    if not lines and leaf.shape[axis] > 1:
      first = ax.atoms(leaf.axes[axis])[0]  # Of single entries, all alike.
      lines = [f'protected ({leaf.shape[axis]}): {first.locked}']
    return '; '.join(lines) or 'protected: it has a single entry'

  def __str__(self) -> str:
    """Returns a table of the groups, the blocks, the outputs that are cut like
    a leaf, and of what is protected."""
    rows = [('group', 'units', 'members')]
    for group in self.groups.values():
      members = ', '.join(f'{m.path}:{m.axis}' for m in group.members[:4])
      more = len(group.members) - 4
      members += f' and {more} more' if more > 0 else ''
      rows.append((group.name, str(group.size), members))
    lines = _columns(rows)
    if self.blocks:
      rows = [('block', 'leaves', 'closed by')]
      for block in self.blocks.values():
        by = ', '.join(block.closing) or f'none: {block.unclosed}'
        rows.append((block.name, str(len(block.leaves)), by))
      lines += ['', *_columns(rows)]
    outputs = range(len(self.outputs_like))
    rows = [
      (path, '', f'cut like {self.outputs_like[k]}')
      for path, k in tree.leaves(self.out_tree.unflatten(outputs)).items()
      if self.outputs_like[k] is not None
    ]
    if rows:
      more = len(rows) - 4
      rows = rows[:4] + ([('', '', f'and {more} more')] if more > 0 else [])
      lines += ['', 'output', *_columns(rows)]
    whole: dict[tuple[str, str], list[str]] = {}
    for where, why in self.protected.items():
      path, _, axis = where.rpartition(':')
      whole.setdefault((path, why), []).append(axis)
    rows = [
      (f'{path}:{",".join(axes)}', '', why)
      for (path, why), axes in whole.items()
    ]
    rows += [
      (where, '', f'no block: {w}') for where, w in self.undropped.items()
    ]
    if rows:
      lines += ['', 'protected', *_columns(rows)]
    return '\n'.join(lines)


def _columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
  """Aligns a table of a name, a number (or nothing) and a text."""
  name, number = (max(len(row[k]) for row in rows) for k in (0, 1))
  number += 2 if number else 0
  return [f'{a:<{name}}{b:>{number}}  {c}'.rstrip() for a, b, c in rows]


def align(
  leaves: Mapping[str, Leaf],
  values: tree.PyTree,
  follow: Follow | None = None,
) -> dict[str, Any]:
  """Returns the leaves of a pytree by the paths that they have in a graph.

  A leaf is known by the longest path of a param in which its own path ends
  (:mod:`jaxprune.structure.locating`).

  Args:
    leaves: the leaves of a graph.
    values: a pytree of arrays; ``optax.MaskedNode`` has no leaves.
    follow: rules over its paths: which are of the network; a leaf that is not,
      by such a rule, is left out.

  Raises:
    ValueError: if a leaf is no leaf of the graph or has another shape, two are
      one leaf, or two sub-trees could be those of the network.
  """
  named, wrong = {}, []
  given = tree.leaves(values)
  own = belonging(leaves, list(given), follow)
  left_out = {*given} - {*undecided(list(given), follow)}
  for path, value in given.items():
    name = own.get(path)
    if name is None and path in left_out:
      continue
    if name in named:
      wrong.append(f'{path!r} is a second {name!r}')
    elif name is None:
      wrong.append(f'{path!r} is no leaf of the graph')
    elif np.shape(value) != leaves[name].shape:
      wrong.append(
        f'{path!r} must have shape {leaves[name].shape}, got {np.shape(value)}'
      )
    else:
      named[name] = value
  if wrong:
    raise ValueError(
      f'{"; ".join(wrong)}. The leaves are: {", ".join(leaves)}.'
    )
  return named


def _check_ways(norm: str, combine: str) -> None:
  if norm not in get_args(Norm):
    raise ValueError(
      f"`norm` must be 'l1', 'l2', 'max' or 'mean', got {norm!r}."
    )
  if combine not in get_args(Combine):
    raise ValueError(
      f"`combine` must be 'mean', 'sum', 'max' or 'first', got {combine!r}."
    )


def _reduce_leaf(
  score: jax.Array, axis: int, labels: np.ndarray, size: int, norm: Norm
) -> jax.Array:
  """One number for each unit of one member."""
  others = tuple(k for k in range(score.ndim) if k != axis)
  units = np.where(labels < 0, size, labels)
  count = np.bincount(labels[labels >= 0], minlength=size)
  count = count * (score.size // score.shape[axis])
  empty = jnp.zeros(size, jnp.float32)
  if norm == 'max':
    most = sharding.whole(jnp.max(score, others))
    return empty.at[units].max(most, mode='drop')
  powers = score * score if norm == 'l2' else score
  sums = sharding.whole(jnp.sum(powers, others))
  total = empty.at[units].add(sums, mode='drop')
  if norm == 'l2':
    # The slope of the root at 0 is infinite, and would be NaN times 0.
    is_zero = total == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, total)))
  return total / count if norm == 'mean' else total


def _combine(found: Sequence[jax.Array], combine: Combine) -> jax.Array:
  if combine == 'first':
    return found[0]
  ways = {'mean': jnp.mean, 'sum': jnp.sum, 'max': jnp.max}
  return ways[combine](jnp.stack(found), axis=0)


def like(params: tree.PyTree, named: Mapping[str, Any]) -> tree.PyTree:
  """Returns a pytree like params from leaves by path; MaskedNode elsewhere."""
  return tree.map_with_path(
    lambda path, _: named.get(path, optax.MaskedNode()), params
  )


def runner(
  graph: Graph,
  kept: Mapping[str, Any],
  masked: bool = False,
  dropped: Sequence[str] = (),
) -> Run:
  """Returns the evaluation of a graph for what is kept of its groups.

  Args:
    graph: the graph.
    kept: group -> kept indices.
    masked: whether at full size.
    dropped: names of blocks to leave out.
  """
  without = None
  if dropped:
    blocks = [graph.blocks[name] for name in dropped]
    without = Without(
      {block.result: block.shortcut for block in blocks},
      dead(graph.flow, graph.outputs_like, blocks),
    )
  return Run(
    {graph.atoms[name]: np.asarray(index, int) for name, index in kept.items()},
    masked,
    without,
  )


def leaves_like(
  graph: Graph, params: tree.PyTree, gone: Container[str] = ()
) -> dict[str, Any]:
  """Returns the leaves of params by path, once they are those of a graph.

  Args:
    graph: the graph.
    params: the pytree.
    gone: paths of leaves that must not be there.

  Raises:
    ValueError: if a leaf is missing or left over.
  """
  named = tree.leaves(params)
  missing = [p for p in graph.leaves if p not in named and p not in gone]
  extra = [p for p in named if p not in graph.leaves or p in gone]
  if missing or extra:
    raise ValueError(
      f'The params must have the leaves that were traced; missing: {missing}, '
      f'left over: {extra}.'
    )
  return named
