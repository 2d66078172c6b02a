"""Which leaves to multiply by g, for a value of a program to become g times it.

The walk goes back from the value over operations that are linear (or, for
g >= 0, positively homogeneous) without offset, down to leaves of the params: in
a sum every term must scale, in a product one factor.
"""

from collections.abc import Callable, Container, Iterable

from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.primitives import known
from jaxprune.structure.walks.flow import Binding, Flow, made


def walk(
  stream: Flow,
  value: Value,
  leaves: Container[Value],
  found: set[Value],
  *,
  runs: Callable[[Value], bool] = lambda value: True,
  data: Container[Value] = (),
  positive: bool = False,
) -> str | None:
  """Adds the values that scale with one, down to leaves.

  Args:
    stream: the flow of the program.
    value: the value to scale.
    leaves: where the walk may end.
    found: extended by the values on the way and the leaves; by some of them
      if the walk fails.
    runs: which values are scaled at all: those that have the scaled axis.
    data: values to scale only where no other factor of a product can be.
    positive: whether g >= 0 may be assumed.

  Returns:
    Why the value cannot be scaled, or None.
  """
  if value in found:
    return None
  if not runs(value):
    return 'a product reads it with what no leaf scales along it'
  found.add(value)
  if value in leaves:
    return None
  makers = stream.makers.get(value, ())
  if len(makers) != 1:
    return 'it comes from a constant, an argument or a loop'
  (step,) = makers
  options = {'runs': runs, 'data': data, 'positive': positive}
  if isinstance(step, Binding):
    return walk(stream, step.source, leaves, found, **options)
  operands = _operands(stream, step, positive)
  why: str | None = f'{step.why} is not linear in it'
  if operands is None:
    return why
  if known(step.primitive.name).linear == 'each':
    # Leaves before data; of two, the one on the right reads the other.
    turns = sorted(
      range(len(operands)), key=lambda k: (operands[k] in data, -k)
    )
    for operand in (operands[k] for k in turns):
      tried = set(found)
      why = walk(stream, operand, leaves, tried, **options)
      if why is None:
        found |= tried
        return None
    return why
  if step.primitive.name == 'concatenate':
    operands = [v for v in operands if runs(v)]
  for operand in operands:
    why = walk(stream, operand, leaves, found, **options)
    if why is not None:
      return why
  return None


def misuse(
  stream: Flow,
  found: Container[Value],
  values: Iterable[Value],
  expected: Callable[[Equation, Value], bool],
) -> tuple[Value, str] | None:
  """Returns a scaled value that would act elsewhere too, and where, or None.

  Args:
    stream: the flow of the program.
    found: all values that scale.
    values: those to look at.
    expected: the uses (step, value) that are meant to see the value scaled.
  """
  for value in values:
    if value in stream.outputs:
      return value, 'the function returns it'
    for step in stream.uses.get(value, ()):
      if isinstance(step, Binding):
        if step.target not in found:
          return value, 'a loop or a branch takes it'
        continue
      if expected(step, value):
        continue
      if not any(out in found for out in made(step)):
        return value, f'{step.why} uses it in another way'
      if (
        known(step.primitive.name).linear in ('first', 'each')
        and sum(v in found for v in step.inputs) > 1
      ):
        return value, f'{step.why} would count it twice'
  return None


def _operands(
  stream: Flow, eqn: Equation, positive: bool
) -> list[Value] | None:
  """The operands in which an operation is linear and without offset.

  All of them must scale for the result of a sum to scale, any one of them for
  that of a product; None if there is no such operand.
  """
  row, inputs = known(eqn.primitive.name), eqn.inputs
  if row.linear == 'each':
    return inputs[:2]  # Of ragged products there is the length of each too.
  if row.linear == 'first' or (positive and row.positive == 'first'):
    return inputs[:1]
  terms = [v for v in inputs if not stream.is_zero(v)]
  if row.linear == 'jointly':
    return terms
  if row.linear == 'cases':
    return [v for v in inputs[1:] if v in terms]
  # The larger of two that both scale does so too; zero is as good as none.
  is_bound = positive and row.positive == 'jointly' and len(terms) == 1
  return terms if is_bound else None
