"""What flows where in a program, into and out of the bodies of control flow.

A body has values of its own, of the same types as those outside. A *binding*
says that one value takes what another holds; equations and bindings together
are the steps of a program as if all of it were written out, loops once.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structure.program.typed import Program, loop_parts
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.base import known_entries, moved
from jaxprune.structure.rules.primitives import LAYOUT, where


class Binding(NamedTuple):
  """A value that takes what another holds, or (scan) a step of it."""

  target: Value
  source: Value


_LAYOUT = where(moves=(*LAYOUT, 'separate'))
Step = Equation | Binding  # An equation of a step has no body.


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
  """The steps of a program and who reads which value.

  Attributes:
    steps: equations without bodies, and bindings, in the order they run; the
      carries of a loop are bound again after its body.
    parents: value -> the values it is made of, in one step.
    makers: value -> the steps that make it: several where a loop or a branch
      ends.
    uses: value -> the steps that read it.
    derived: the equations inside of functions with a derivative of their own,
      which says the same once more.
    inputs: what the program takes.
    outputs: what it returns.
  """

  steps: tuple[Step, ...]
  parents: dict[Value, list[Value]]
  makers: dict[Value, list[Step]]
  uses: dict[Value, list[Step]]
  derived: frozenset[Equation]
  inputs: tuple[Value, ...]
  outputs: tuple[Value, ...]

  def is_zero(self, value: Value) -> bool:
    """Whether a value is a constant zero, of whatever shape."""
    if value.constant is not None:
      entries = known_entries(value.constant)
      return entries is not None and not np.any(entries)
    if len(self.makers.get(value, [])) != 1:
      return False
    (step,) = self.makers[value]
    if isinstance(step, Binding):
      return self.is_zero(step.source)
    return step.primitive.name in _LAYOUT and self.is_zero(moved(step, value))

  def values(self) -> set[Value]:
    """Returns every value that a step makes or reads."""
    return {
      value for step in self.steps for value in (*made(step), *read(step))
    }

  def ancestors(
    self, roots: Iterable[Value], cut: Mapping[Value, Sequence[Value]]
  ) -> set[Value]:
    """Returns the roots and all that they are made of.

    Args:
      roots: values.
      cut: value -> what it is made of instead.
    """
    found, left = set(), list(roots)
    while left:
      value = left.pop()
      if value not in found:
        found.add(value)
        left += cut.get(value, self.parents.get(value, ()))
    return found

  def descendants(
    self, roots: Iterable[Value], cut: Container[Value]
  ) -> set[Value]:
    """Returns the roots and all that is made of them, but past no cut."""
    found, left = set(), list(roots)
    while left:
      value = left.pop()
      if value not in found and value not in cut:
        found.add(value)
        left += (out for step in self.uses.get(value, ()) for out in made(step))
    return found


def read(step: Step) -> Sequence[Value]:
  """Returns the values that a step reads."""
  return (step.source,) if isinstance(step, Binding) else step.inputs


def made(step: Step) -> Sequence[Value]:
  """Returns the values that a step makes."""
  return (step.target,) if isinstance(step, Binding) else step.outputs


def flow(program: Program) -> Flow:
  """Returns the flow of a program."""
  steps = tuple(_steps(program))
  parents: dict[Value, list[Value]] = {}
  makers: dict[Value, list[Step]] = {}
  uses: dict[Value, list[Step]] = {}
  for step in steps:
    values = read(step)
    for value in made(step):
      parents.setdefault(value, []).extend(values)
      makers.setdefault(value, []).append(step)
    for value in dict.fromkeys(values):
      uses.setdefault(value, []).append(step)
  return Flow(
    steps,
    parents,
    makers,
    uses,
    frozenset(_derived(program, False)),
    tuple(program.inputs),
    tuple(program.outputs),
  )


def _derived(program: Program, inside: bool) -> Iterator[Equation]:
  for eqn in program.equations:
    if inside:
      yield eqn
    custom = inside or eqn.primitive.name.startswith('custom_')
    for body in eqn.programs:
      yield from _derived(body, custom)


def _steps(program: Program) -> Iterator[Step]:
  for eqn in program.equations:
    if not eqn.programs:
      yield eqn
      continue
    entries, returns = _bindings(eqn)
    yield from entries
    for body in eqn.programs:
      yield from _steps(body)
    yield from returns


def _bindings(eqn: Equation) -> tuple[list[Binding], list[Binding]]:
  """What the bodies of an equation take, and what it and its loop take back."""
  name, bodies, params = eqn.primitive.name, eqn.programs, eqn.params
  outer = eqn.inputs
  entries, returns = [], []
  enter = lambda body, values: entries.extend(map(Binding, body.inputs, values))
  leave = lambda targets, values: returns.extend(map(Binding, targets, values))
  if name == 'while':
    n_cond, n_body = params['cond_nconsts'], params['body_nconsts']
    cond, body = bodies
    carry = outer[n_cond + n_body :]
    enter(cond, [*outer[:n_cond], *carry])
    enter(body, [*outer[n_cond : n_cond + n_body], *carry])
    for inner, first in ((cond, n_cond), (body, n_body)):
      leave(inner.inputs[first:], body.outputs)
    leave(eqn.outputs, body.outputs)
    leave(eqn.outputs, carry)
    leave(eqn.outputs, cond.outputs * len(eqn.outputs))
    return entries, returns
  index, *operands = outer
  if name == 'cond':
    outer = operands
  for body in bodies:
    enter(body, outer)
    if name == 'scan':
      consts, carries = loop_parts(params)
      leave(body.inputs[consts : consts + carries], body.outputs[:carries])
    leave(eqn.outputs, body.outputs)
  if name == 'cond':
    leave(eqn.outputs, [index] * len(eqn.outputs))
  return entries, returns
