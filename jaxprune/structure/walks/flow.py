"""What flows where in a program, into and out of the bodies of control flow.

A body has values of its own, of the same types as those outside. A *binding*
says that one value takes what another holds; equations and bindings together
are the steps of a program as if all of it were written out, loops once.

A scan of two steps, ``s, _ = scan(lambda c, x: (c + x, None), s0, xs)`` with xs
of shape [2], has these steps::

  c <- s0         a binding: the body's carry takes the first value,
  x <- xs         a binding: and x a slice of xs (one for both iterations);
  c2 = add c x    the only equation of the body, once;
  c <- c2         a binding: the carry of the second iteration,
  s <- c2         a binding: what the scan returns.

So c has two makers, ancestors({s}) are {s, c2, c, x, s0, xs}, and no reader of
a flow has to know what a scan is.
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
    derived: the equations inside custom_jvp and custom_vjp functions. The rule
      of such a function repeats its equations: do not count them twice.
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
    # Several makers (a carry) may differ: only a single one is followed.
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
    """Returns the roots and all that they are computed from.

    Args:
      roots: values.
      cut: value -> what it is made of instead.
    """
    reached, pending = set(), list(roots)
    while pending:
      value = pending.pop()
      if value not in reached:  # A loop comes back to its own carry.
        reached.add(value)
        pending += cut.get(value, self.parents.get(value, ()))
    return reached

  def descendants(
    self, roots: Iterable[Value], cut: Container[Value]
  ) -> set[Value]:
    """Returns the roots and all computed from them, without going past cuts."""
    reached, pending = set(), list(roots)
    while pending:
      value = pending.pop()
      if value not in reached and value not in cut:
        reached.add(value)
        for step in self.uses.get(value, ()):
          pending += made(step)
    return reached


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
    for value in dict.fromkeys(values):  # x * x is one use of x.
      uses.setdefault(value, []).append(step)
  return Flow(
    steps=steps,
    parents=parents,
    makers=makers,
    uses=uses,
    derived=frozenset(_derived(program, False)),
    inputs=tuple(program.inputs),
    outputs=tuple(program.outputs),
  )


def _derived(program: Program, inside: bool) -> Iterator[Equation]:
  """Yields the equations within custom_jvp and custom_vjp functions."""
  for eqn in program.equations:
    if inside:
      yield eqn
    custom = inside or eqn.primitive.name.startswith('custom_')
    for body in eqn.programs:
      yield from _derived(body, custom)


def _steps(program: Program) -> Iterator[Step]:
  """Yields the steps in the order they run, those of bodies where they run."""
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
  """Returns what bodies take before they run, and what is bound after that.

  The second are the outputs of the equation and the carries of its loop.
  """
  name, bodies, params = eqn.primitive.name, eqn.programs, eqn.params
  outer = eqn.inputs
  entries, returns = [], []

  def enter(body: Program, values: Sequence[Value]) -> None:
    entries.extend(map(Binding, body.inputs, values))

  def leave(targets: Sequence[Value], values: Sequence[Value]) -> None:
    returns.extend(map(Binding, targets, values))

  if name == 'while':
    # Inputs: constants of the condition, constants of the body, the carry.
    n_cond, n_body = params['cond_nconsts'], params['body_nconsts']
    cond, body = bodies
    carry = outer[n_cond + n_body :]
    enter(cond, [*outer[:n_cond], *carry])
    enter(body, [*outer[n_cond : n_cond + n_body], *carry])
    for inner, first in ((cond, n_cond), (body, n_body)):
      leave(inner.inputs[first:], body.outputs)
    leave(eqn.outputs, body.outputs)
    # A loop of no iteration returns what it was given, and every output
    # depends on the condition, which says when to stop.
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
  if name == 'cond':  # The index says which branch is returned.
    leave(eqn.outputs, [index] * len(eqn.outputs))
  return entries, returns
