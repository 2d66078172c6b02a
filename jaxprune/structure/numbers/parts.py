"""The numbers of a program, by lists of equations, and where they go."""

import functools
import math
from collections.abc import Iterator, Mapping

from jaxprune.structure.numbers import growth
from jaxprune.structure.numbers.literals import (
  UNCHANGED,
  fold,
  number_of,
  rounding,
)
from jaxprune.structure.numbers.targets import Use, entries_summed
from jaxprune.structure.program.typed import Program, loop_parts
from jaxprune.structure.rules import Equation, Value

# What a number may say of the value that it meets.
_MEETS = frozenset('add div eq ge gt le lt max min mul ne pow sub'.split())


def parts_of(
  program: Program,
  is_custom: bool = False,
  given: Mapping[Value, tuple['Part', Use]] | None = None,
) -> Iterator['Part']:
  """Yields the parts of a program: its equations and those of every body."""
  part = Part(program, is_custom, given or {})
  yield part
  for eqn in program.equations:
    custom = is_custom or eqn.primitive.name.startswith('custom_')
    for body, places in zip(bodies_of(eqn), _fixed(eqn), strict=True):
      uses = [(part, Use(eqn, place)) for place in places]
      known = dict(zip(body.inputs, uses, strict=False))
      yield from parts_of(body, custom, known)


def bodies_of(eqn: Equation) -> list[Program]:
  """Returns the programs of an equation, that of its own derivative too."""
  own = [] if eqn.derivative is None else [eqn.derivative]
  return [*eqn.programs, *own]


def _fixed(eqn: Equation) -> list[range]:
  """The inputs of an equation that each body takes first, and never anew."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'scan':
    return [range(loop_parts(params)[0])]
  if name == 'while':
    middle = params['cond_nconsts']
    return [range(middle), range(middle, middle + params['body_nconsts'])]
  first = 1 if name == 'cond' else 0
  return [range(first, len(eqn.inputs))] * len(bodies_of(eqn))


class Part:
  """The numbers of one flat list of equations.

  Attributes:
    program: the equations.
    is_custom: whether they have a derivative of their own.
    given: what the part takes -> the part around it, and where that has it.
    makers: value -> the equation that makes it.
    readers: value -> the places that read it.
    numbers: value -> the number that it is, in every entry.
  """

  def __init__(
    self,
    program: Program,
    is_custom: bool,
    given: Mapping[Value, tuple['Part', Use]],
  ):
    self.program = program
    self.is_custom = is_custom
    self.given = given
    self.makers = {out: eqn for eqn in program.equations for out in eqn.outputs}
    self.readers: dict[Value, list[Use]] = {}
    self.numbers: dict[Value, float] = {}
    for value, (part, (eqn, place)) in given.items():
      number = part.numbers.get(eqn.inputs[place])
      if number is not None:
        self.numbers[value] = number
    for eqn in program.equations:
      for place, value in enumerate(eqn.inputs):
        self.readers.setdefault(value, []).append(Use(eqn, place))
        number = number_of(value)
        if number is not None:
          self.numbers[value] = number
      known = [self.numbers.get(value) for value in eqn.inputs]
      if eqn.inputs and None not in known and len(eqn.outputs) == 1:
        number = fold(eqn, known)
        if number is not None:
          self.numbers[eqn.outputs[0]] = number

  @functools.cached_property
  def grown(self) -> growth.Grown:
    """How the values of the part grow with the sizes of axes."""
    given = {
      value: part.grown[eqn.inputs[place]]
      for value, (part, (eqn, place)) in self.given.items()
      if eqn.inputs[place] in part.grown
    }
    return growth.of(self.program.equations, self.numbers, given)

  def meetings(self) -> Iterator[tuple[Use, Value]]:
    """Yields the numbers that meet a value, and the value."""
    for eqn in self.program.equations:
      if eqn.primitive.name not in _MEETS or len(eqn.inputs) != 2:
        continue
      for place, other in ((0, 1), (1, 0)):
        number, value = eqn.inputs[place], eqn.inputs[other]
        if number in self.numbers and value not in self.numbers:
          yield Use(eqn, place), value

  @functools.cached_property
  def means(self) -> set[Use]:
    """What divides a sum, of whatever axes, by its entries: it is no root."""
    found = set()
    for eqn in self.program.equations:
      entries = entries_summed(eqn)
      if isinstance(entries, int):
        x, (out,) = eqn.inputs[0], eqn.outputs
        for use in (*self.behind(x), *self.ahead(out)):
          factor = use.eqn.inputs[use.place]
          number = self.numbers[factor] or math.inf
          number = number if use.eqn.primitive.name == 'div' else 1 / number
          if math.isclose(number, entries, rel_tol=rounding(factor)):
            found.add(use)
    return found

  def number(self, use: Use) -> float | None:
    """Returns the number that a use reads, if it is one."""
    return self.numbers.get(use.eqn.inputs[use.place])

  def roots(self, use: Use) -> Iterator[Use]:
    """Yields the literals that a number is made of, each once."""
    seen: set[Equation] = set()  # A number may read another often.
    left: list[tuple[Part, Use]] = [(self, use)]
    while left:
      part, (eqn, place) = left.pop()
      value = eqn.inputs[place]
      maker = part.makers.get(value)
      if value in part.given:
        left.append(part.given[value])
      elif maker is None:
        yield Use(eqn, place)
      elif maker not in seen:
        seen.add(maker)
        left += [(part, Use(maker, k)) for k in range(len(maker.inputs))]

  def ahead(self, value: Value) -> Iterator[Use]:
    """Yields the numbers that multiply or divide a value, in what follows."""
    seen: set[Equation] = set()  # What was parted may meet in a selection.
    left = [value]
    while left:
      for eqn, place in self.readers.get(left.pop(), ()):
        name = eqn.primitive.name
        is_masked = name == 'select_n' and place > 0
        is_scaled = (name == 'mul' or (name == 'div' and place == 0)) and (
          eqn.inputs[1 - place] in self.numbers
        )
        if is_scaled:
          yield Use(eqn, 1 - place)
        elif not is_masked and not (name in UNCHANGED and place == 0):
          continue
        if eqn not in seen:
          seen.add(eqn)
          left.append(eqn.outputs[0])

  def behind(self, value: Value) -> Iterator[Use]:
    """Yields the numbers that multiply or divide a value, before it."""
    while (eqn := self.makers.get(value)) is not None:
      name, inputs = eqn.primitive.name, eqn.inputs
      value = inputs[0]
      if name in UNCHANGED:
        continue
      places = [
        k for k, operand in enumerate(inputs) if operand in self.numbers
      ]
      if name == 'div':
        places = [k for k in places if k == 1]
      if name not in ('mul', 'div') or not places:
        return
      yield Use(eqn, places[-1])
      value = inputs[1 - places[-1]]
