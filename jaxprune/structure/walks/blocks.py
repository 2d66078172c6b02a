"""Blocks: the branches F of y = x + F(x) that a network can do without.

A residual sum whose one operand is an input of the other has an identity
shortcut: the network without the branch is y = x. What only the branch needs,
equations and leaves, goes with it; statistics of its norms that the function
hands back are no need of their own.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.base import moved
from jaxprune.structure.rules.primitives import where
from jaxprune.structure.walks import scaling
from jaxprune.structure.walks.flow import Binding, Flow


class Block(NamedTuple):
  """A residual branch.

  Attributes:
    name: what its leaves have in common; never the name of a group.
    leaves: paths of the leaves that nothing else uses: they vanish with it.
    closing: paths of leaves; multiplied by g >= 0, all of them multiply what
      the branch adds by exactly g. None if there are no such leaves.
    unclosed: why there are none, or ''.
    inside: names of the blocks that contain this one.
    where: the operation that adds it, and the line.
    equations: the operations that nothing else needs.
    result: the sum.
    shortcut: what the sum is without the branch.
  """

  name: str
  leaves: tuple[str, ...]
  closing: tuple[str, ...]
  unclosed: str
  inside: tuple[str, ...]
  where: str
  equations: frozenset[Equation]
  result: Value
  shortcut: Value


class Blocks(NamedTuple):
  """The blocks of a program, and the residual sums that are none.

  Attributes:
    found: name -> block, in the order of the forward pass.
    refused: the operation that adds a branch -> why it must stay.
  """

  found: dict[str, Block]
  refused: dict[str, str]


def blocks(
  stream: Flow,
  paths: Sequence[str],
  outputs_like: Sequence[str | None],
  taken: Sequence[str],
) -> Blocks:
  """Returns the residual branches of a program.

  Args:
    stream: the flow of the program, whose first inputs are the leaves.
    paths: of the leaves, in order.
    outputs_like: for each output the leaf that it hands back, or None.
    taken: names that no block may have.
  """
  search = _Search(stream, paths, outputs_like)
  drafts, refused = [], {}
  for step in search.flow.steps:
    if isinstance(step, Equation) and step.primitive.name in ('add', 'sub'):
      draft = search.branch(step)
      if draft is not None and step in stream.derived:
        draft = 'it is in a function with a derivative of its own'
      if isinstance(draft, str):
        refused[step.why] = draft
      elif draft is not None:
        drafts.append(draft)
  names = _names(drafts, paths, taken)
  inside = lambda own: tuple(
    name
    for name, other in zip(names, drafts, strict=True)
    if own.equations < other.equations
  )
  found = {
    name: draft._replace(name=name, inside=inside(draft))
    for name, draft in zip(names, drafts, strict=True)
  }
  return Blocks(found, refused)


def dead(
  stream: Flow,
  outputs_like: Sequence[str | None],
  dropped: Sequence[Block],
) -> set[Value]:
  """Returns the values of a program that nothing needs without some blocks."""
  gone = {path for block in dropped for path in block.leaves}
  roots = [
    out
    for out, path in zip(stream.outputs, outputs_like, strict=True)
    if path not in gone
  ]
  cut = {block.result: (block.shortcut,) for block in dropped}
  return stream.values() - stream.ancestors(roots, cut)


class _Search:
  """The flow of a program, read for branches."""

  def __init__(
    self,
    stream: Flow,
    paths: Sequence[str],
    outputs_like: Sequence[str | None],
  ):
    self.flow = stream
    self.leaves = dict(zip(stream.inputs, paths, strict=False))
    self.data = stream.descendants(stream.inputs[len(paths) :], ())
    self.weights = stream.descendants(self.leaves, ()) - self.data
    pairs = list(zip(stream.outputs, outputs_like, strict=True))
    self.handed_back = {out: path for out, path in pairs if path is not None}
    self.results = [out for out, path in pairs if path is None]

  def branch(self, eqn: Equation) -> Block | str | None:
    """The branch that a sum adds; None if it adds none, or why it must stay."""
    first, second = eqn.inputs
    turns = [(first, second), (second, first)]
    if eqn.primitive.name == 'sub':
      turns = turns[:1]
    for shortcut, branch in turns:
      if shortcut in self.data and branch in self.data:
        needed = self.flow.ancestors([branch], {})
        if self.origin(shortcut) in needed:
          return self.parts(eqn, shortcut, branch, needed)
    return None

  def origin(self, value: Value) -> Value:
    """The value that another is, but for its dtype or the body it is in."""
    steps = self.flow.makers.get(value, ())
    if len(steps) != 1:
      return value
    (step,) = steps
    if isinstance(step, Binding):
      return self.origin(step.source)
    is_same = step.primitive.name in _SAME
    return self.origin(moved(step, value)) if is_same else value

  def parts(
    self, eqn: Equation, shortcut: Value, branch: Value, needed: set[Value]
  ) -> Block | str | None:
    """The block of a branch, None without leaves, or why it must stay."""
    (result,) = eqn.outputs
    cut = {result: (shortcut,)}
    path = needed - self.flow.ancestors([shortcut], {})
    if not any(self.is_weighted(value) for value in path):
      return None
    alive = self.flow.ancestors([*self.results, shortcut], cut)
    if branch in alive:
      return 'what it adds is needed elsewhere too'
    own = needed - alive
    # Statistics of the branch that are handed back go with it.
    made_of_it = self.flow.descendants(own - self.leaves.keys(), {result})
    gone = [out for out in self.handed_back if out in made_of_it]
    stays = [out for out in self.handed_back if out not in made_of_it]
    alive = self.flow.ancestors([*self.results, *stays, shortcut], cut)
    own = self.flow.ancestors([branch, *gone], cut) - alive
    leaves = {self.leaves[value] for value in own if value in self.leaves}
    if not leaves:
      return 'it has no leaf of its own'
    if lost := {self.handed_back[out] for out in gone} - leaves:
      return f'the function updates {min(lost)} by it, which is used elsewhere'
    closing, unclosed = self.closing(eqn, branch)
    return Block(
      name='',
      leaves=tuple(path for path in self.leaves.values() if path in leaves),
      closing=closing,
      unclosed=unclosed,
      inside=(),
      where=eqn.why,
      equations=frozenset(
        step
        for step in self.flow.steps
        if isinstance(step, Equation) and own.issuperset(step.outputs)
      ),
      result=result,
      shortcut=shortcut,
    )

  def is_weighted(self, value: Value) -> bool:
    """Whether data meet a leaf, or what is made of leaves, in a value."""
    made_of = self.flow.parents.get(value, ())
    return value in self.data and not self.weights.isdisjoint(made_of)

  def closing(
    self, eqn: Equation, branch: Value
  ) -> tuple[tuple[str, ...], str]:
    """The leaves that scale what a branch adds, or why there are none."""
    found: set[Value] = set()
    why = scaling.walk(
      self.flow, branch, self.leaves, found, data=self.data, positive=True
    )
    if why is not None:
      return (), why
    wrong = scaling.misuse(
      self.flow, found, found, lambda step, value: step is eqn
    )
    if wrong is not None:
      return (), wrong[1]
    return tuple(p for v, p in self.leaves.items() if v in found), ''


_SAME = where(moves=('stays', 'separate', 'reshapes'))


def _names(
  drafts: Sequence[Block], paths: Sequence[str], taken: Sequence[str]
) -> list[str]:
  """Names each block after what its leaves, or else its kernels, share.

  A prefix names a block if it names no other, and if no leaf outside has it;
  else the block has the name of its first leaf behind a plus.
  """
  names: list[str] = []
  for draft in drafts:
    inner = [path for path in draft.leaves if path.startswith('params/')]
    every = inner or list(draft.leaves)
    options = [every]
    options += [[p for p in every if not p.endswith(_SMALL)]]
    for chosen in options:
      name = os.path.commonpath(chosen) if chosen else ''
      name = name if len(chosen) > 1 else os.path.dirname(name)
      stem = name.removeprefix('params').removeprefix('/')
      has = [p for p in paths if p.startswith(f'{name}/')]
      fits = stem and set(has) <= {*draft.leaves}
      if fits and stem not in taken and stem not in names:
        break
    else:
      stem = f'+{_stem(every[0])}'
    while stem in taken or stem in names:
      stem = f'+{stem}'
    names.append(stem)
  return names


_SMALL = ('/bias', '/b', '/scale', '/offset')


def _stem(path: str) -> str:
  stem = path.removeprefix('params/')
  for ending in ('/kernel', '/weight', '/w', *_SMALL):
    stem = stem.removesuffix(ending)
  return stem
