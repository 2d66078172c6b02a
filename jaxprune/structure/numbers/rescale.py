"""Numbers in a program that stand for a width, and what they become.

A module that is made at a smaller width divides its means by that width and
scales its attention by that of a head. In a trace these are literals. Here they
are found, each with the axes that it counts and to which power:

  literal = c |axes|^p,    p in {1, -1, 1/2, -1/2, 1/4, -1/4},

by the places where they stand (:func:`patterns`), or by a second trace at other
widths (:mod:`jaxprune.structure.numbers.compare_traces`). What cannot be told
protects its axes, under its name.

Two places tell: a sum that is divided by its number of entries, and a
contraction (of queries with keys, of data with a kernel) that is divided by the
root of it, at once or by halves (each factor by the fourth root); and the
derivatives of these two. Further on a number tells only where it takes away
what the value grew by (:mod:`jaxprune.structure.numbers.growth`). Any other
number that may have been computed from a size is a doubt where it meets a value
that carries the axis or has just summed over it, and nowhere else. The places
say also which axes stay whole where nothing may be rescaled (:func:`scaled`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.structure.numbers import growth
from jaxprune.structure.numbers.literals import (
  UNCHANGED,
  count_of,
  fold,
  is_live,
  is_plain,
  may_be_of,
  number_of,
  power_of,
  rounding,
  varying_axes,
)
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program, loop_parts
from jaxprune.structure.rules import Equation, Value

_MEAN, _ROOT = -1.0, -0.5  # What scales a sum, what a contraction.
_SCALES = frozenset(['div', 'mul'])
# What a number may say of the value that it meets.
_MEETS = _SCALES | frozenset(
  ['add', 'eq', 'ge', 'gt', 'le', 'lt', 'max', 'min', 'ne', 'pow', 'sub']
)
_REMEDY = 'trace it at two widths (`narrow`) to tell'


class Use(NamedTuple):
  """A place where an equation reads a value."""

  eqn: Equation
  place: int


class Law(NamedTuple):
  """How a number follows from the sizes of axes: c |axes|^power."""

  axes: tuple[Axis, ...]
  power: float


class Findings(NamedTuple):
  """What is known of the numbers of a program.

  Attributes:
    laws: uses of numbers that follow from sizes.
    doubts: uses of numbers of which it cannot be told, the axes that they may
      stand for, and why.
    tables: uses of constant arrays that vary along axes that may shrink.
  """

  laws: dict[Use, Law]
  doubts: list[tuple[Use, tuple[Axis, ...], str]]
  tables: list[tuple[Use, Axis, str]]


class _Target(NamedTuple):
  """A reduction or a contraction: what may be scaled, and by which size."""

  axes: tuple[Axis, ...]
  before: tuple[Value, ...]  # A factor may stand behind these,
  after: tuple[Value, ...]  # or before those,
  constants: tuple[Use, ...]  # or be one of these.
  power: float | None  # Of its scale; None in a derivative: as it is proven.
  is_sum: bool  # Whether a factor that it does not explain is a doubt.
  why: str


# What is known to be scaled by its size: (its atoms, the power) -> its axes.
Proven = dict[tuple[frozenset[Axis], float], tuple[Axis, ...]]


def apply(findings: Findings) -> None:
  """Lets the numbers of a program follow the sizes that are left.

  What is in doubt locks its axes. An equation with such a number is known
  after as one that reduces over the axes: it is not the same for a mask.

  Args:
    findings: of :func:`patterns` or
      :func:`jaxprune.structure.numbers.compare_traces.confirm`; their program
      changes.
  """
  for _, axes, why in findings.doubts:
    for axis in axes:
      ax.lock(axis, why)
  for _, axis, why in findings.tables:
    ax.lock(axis, why)
  for (eqn, place), law in findings.laws.items():
    value = eqn.inputs[place]
    eqn.inputs[place] = Value(
      value.shape,
      value.dtype,
      value.axes,
      value.constant,
      recompute=_recompute(value, law),
    )
    eqn.reductions = [*eqn.reductions, *law.axes]


def scaled(program: Program) -> Iterator[tuple[Axis, str]]:
  """Yields the axes whose size scales a sum or a contraction, and where.

  Beside what :func:`patterns` proves there are numbers that could stand for
  themselves, but scale data by data as an attention of that width is scaled: a
  half, of 4 entries. A number that scales queries and keys says nothing of the
  layer that made the queries, where it stands too.

  Args:
    program: a typed program.
  """
  parts = list(_parts(program))
  targets = [(part, target) for part in parts for target in part.targets()]
  targets = [pair for pair in targets if pair[1].power is not None]
  seen: set[Use] = set()
  for part, target in sorted(targets, key=lambda pair: not pair[1].is_sum):
    known = part.laws(target, {}, any_number=True).values()
    for root, law, _ in known:
      if root not in seen:
        number = number_of(root.eqn.inputs[root.place])
        why = f'{number:g} in {root.eqn.why} follows from its size'
        yield from ((axis, why) for axis in law.axes)
    seen.update(root for root, *_ in known)


def _recompute(value: Value, law: Law) -> Callable[[Any], Any]:
  count = lambda size: math.prod(size(axis) for axis in law.axes)
  whole = math.prod(ax.find(axis).size for axis in law.axes)
  original = np.asarray(value.constant)

  def recompute(size: Any) -> Any:
    ratio = (count(size) / whole) ** law.power
    if isinstance(ratio, float):
      return np.asarray(original * ratio, original.dtype)
    return jnp.asarray(original * ratio, original.dtype)

  return recompute


def patterns(program: Program, proven: Proven | None = None) -> Findings:
  """Returns what the places of its numbers tell of a typed program.

  Args:
    program: the program.
    proven: what other functions of the same params have proven, which a
      derivative repeats; what this one proves is added.
  """
  proven = {} if proven is None else proven
  findings = Findings({}, [], [])
  targets: list[tuple[_Part, _Target]] = []
  parts = list(_parts(program))
  for part in parts:
    part.tables(findings)
    targets += [(part, target) for target in part.targets()]
  # What a derivative repeats is proven elsewhere, what is left is known last.
  targets.sort(key=lambda pair: pair[1].power is None)
  left = [
    (part, target, part.explain(target, findings, proven))
    for part, target in targets
  ]
  for part in parts:
    part.balance(findings, proven)
  for part, target, factors in left:
    part.leave(target, factors, findings)
  for part in parts:
    part.doubt(findings)
  return findings


def _parts(
  program: Program,
  is_custom: bool = False,
  given: Mapping[Value, tuple['_Part', Use]] | None = None,
) -> Iterator['_Part']:
  """The parts of a program: its own equations and those of every body."""
  part = _Part(program, is_custom, given or {})
  yield part
  for eqn in program.equations:
    custom = is_custom or eqn.primitive.name.startswith('custom_')
    for body, places in zip(bodies_of(eqn), _fixed(eqn), strict=True):
      uses = [(part, Use(eqn, place)) for place in places]
      known = dict(zip(body.inputs, uses, strict=False))
      yield from _parts(body, custom, known)


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


class _Part:
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
    given: Mapping[Value, tuple['_Part', Use]],
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

  def tables(self, findings: Findings) -> None:
    """Adds the constants that vary along an axis that may shrink."""
    for eqn in self.program.equations:
      for place, value in enumerate(eqn.inputs):
        for axis in varying_axes(value):
          why = f'a table of constants at {eqn.why} counts it: {_REMEDY}'
          findings.tables.append((Use(eqn, place), axis, why))

  def targets(self) -> list[_Target]:
    """Returns what may be scaled by a size."""
    return [t for eqn in self.program.equations for t in _targets(eqn)]

  @functools.cached_property
  def grown(self) -> growth.Grown:
    """How the values of the part grow with the sizes of axes."""
    given = {
      value: part.grown[eqn.inputs[place]]
      for value, (part, (eqn, place)) in self.given.items()
      if eqn.inputs[place] in part.grown
    }
    return growth.of(self.program.equations, self.numbers, given)

  def balance(self, findings: Findings, proven: Proven) -> None:
    """Adds the factors that take away what a value grows by with a size.

    A derivative scales by the same number what grows in another way.
    """
    for use, value in self._meetings():
      if use.eqn.primitive.name not in _SCALES or use in self.means:
        continue
      if use.eqn.primitive.name == 'div' and use.place == 0:
        continue
      number = self.numbers[use.eqn.inputs[use.place]]
      divides = use.eqn.primitive.name == 'div'
      known = [*self.grown.get(value, ())]
      known += [
        growth.Growth(axes, (-power,))
        for (_, power), axes in proven.items()
        if _leaves(axes) & _leaves(value.axes)
      ]
      for each in known:
        power = growth.power_taken(
          use.eqn.inputs[use.place], number, divides, each
        )
        if power is None or not is_live(each.axes):
          continue
        own = self._sizes(use, each.axes, any_number=False)
        if len(own) != 1:
          continue
        ((root, own_power),) = own.items()
        if root in findings.laws or self.is_custom:
          continue
        if any(root == doubtful for doubtful, *_ in findings.doubts):
          continue
        findings.laws[root] = Law(each.axes, own_power)
        proven[_leaves(each.axes), power] = each.axes

  def doubt(self, findings: Findings) -> None:
    """Adds a doubt for each number that may well be a size, and has no law.

    It may be the size of what the value that it meets carries, or has just
    summed over. Where the entries are counted (`iota`), any scale may be.
    """
    in_doubt = {use for use, *_ in findings.doubts}
    for use, value in self._meetings():
      eqn, number = use.eqn, self.numbers[use.eqn.inputs[use.place]]
      literal = eqn.inputs[use.place]
      if use in in_doubt or use in self.means or not number:
        continue
      if any(root in findings.laws for root in self._roots(use)):
        continue
      counts = _is_constant(value) and eqn.primitive.name in _SCALES
      grown = self.grown.get(value, ())
      if not counts and is_plain(number):
        # At width 4, 2 is the root of it where one is due: `table[i] * 2`.
        divides = eqn.primitive.name == 'div'
        grown = [
          each
          for each in grown
          if not each.is_layer
          and eqn.primitive.name in _SCALES
          and growth.power_taken(literal, number, divides, each)
        ]
      summed = [each.axes for each in grown]
      carried = [] if is_plain(number) and not counts else value.axes
      for axes in [*((axis,) for axis in carried), *summed]:
        if not is_live(axes):
          continue
        if (counts and abs(number) != 1) or may_be_of(literal, number, axes):
          why = _may_stand(number, eqn, axes)
          findings.doubts.append((use, tuple(axes), why))

  def _meetings(self) -> Iterator[tuple[Use, Value]]:
    """The numbers that meet a value, and the value."""
    for eqn in self.program.equations:
      if eqn.primitive.name not in _MEETS or len(eqn.inputs) != 2:
        continue
      for place, other in ((0, 1), (1, 0)):
        number, value = eqn.inputs[place], eqn.inputs[other]
        if number in self.numbers and value not in self.numbers:
          yield Use(eqn, place), value

  def explain(
    self, target: _Target, findings: Findings, proven: Proven
  ) -> list[Use]:
    """Looks for the factors of a target that are powers of its size.

    Returns:
      Those that are none, where none is.
    """
    known = self.laws(target, proven)
    for use, (root, law, power) in known.items():
      if self.is_custom:
        why = f'{target.why} has a derivative of its own: {_REMEDY}'
        findings.doubts.append((use, target.axes, why))
      else:
        other = findings.laws.setdefault(root, law)
        proven[_leaves(target.axes), power] = target.axes
        if _leaves(other.axes) != _leaves(law.axes):
          why = f'{target.why} and another may be scaled by it: {_REMEDY}'
          findings.doubts.append((root, (*other.axes, *law.axes), why))
    for use in target.constants:
      if _is_scaled_table(use.eqn.inputs[use.place]):
        why = f'a table of constants at {target.why} may count it: {_REMEDY}'
        findings.doubts.append((use, target.axes, why))
    if known and not self.is_custom:
      return []
    return [use for use in self._factors(target) if use not in known]

  def laws(
    self, target: _Target, proven: Proven, any_number: bool = False
  ) -> dict[Use, tuple[Use, Law, float]]:
    """Returns the factors of a target that are powers of its size.

    Args:
      target: the target.
      proven: what a derivative repeats.
      any_number: whether one of a formula may be a factor of data by data.

    Returns:
      factor -> the literal that it is made of, its law, and the power of the
      size in the factor.
    """
    found = {}
    for use in self._factors(target):
      known = self._law(use, target, proven, any_number and target.is_sum)
      if known is not None:
        found[use] = known
    if target.power != _ROOT:
      return found
    powers = [power for *_, power in found.values()]
    gone = set()
    if powers.count(_ROOT / 2) != 2:
      gone.add(_ROOT / 2)
    if _ROOT not in powers:
      gone.add(-_ROOT)  # It undoes no scale.
    return {use: law for use, law in found.items() if law[2] not in gone}

  def _factors(self, target: _Target) -> list[Use]:
    factors = [
      *(use for use in target.constants if self._number(use) is not None),
      *(use for value in target.before for use in self._behind(value)),
      *(use for value in target.after for use in self._ahead(value)),
    ]
    means = self.means if target.power == _ROOT else ()
    return [use for use in factors if use not in means]

  @functools.cached_property
  def means(self) -> set[Use]:
    """What divides a sum, of whatever axes, by its entries: it is no root."""
    found = set()
    for eqn in self.program.equations:
      entries = _summed(eqn)
      if isinstance(entries, int):
        x, (out,) = eqn.inputs[0], eqn.outputs
        for use in (*self._behind(x), *self._ahead(out)):
          factor = use.eqn.inputs[use.place]
          number = self.numbers[factor] or math.inf
          number = number if use.eqn.primitive.name == 'div' else 1 / number
          if math.isclose(number, entries, rel_tol=rounding(factor)):
            found.add(use)
    return found

  def leave(
    self, target: _Target, left: Sequence[Use], findings: Findings
  ) -> None:
    """Adds a doubt for each factor of a target that may follow its size."""
    for use in left:
      value = use.eqn.inputs[use.place]
      number = self.numbers[value]
      if any(root in findings.laws for root in self._roots(use)):
        continue
      if target.is_sum and abs(number) != 1:
        why = (
          f'{target.why} sums {count_of(target.axes)} entries and {number:g} '
          f'in {use.eqn.why} scales it: {_REMEDY}'
        )
        findings.doubts.append((use, target.axes, why))
      elif not is_plain(number) and power_of(value, number, target.axes):
        why = _may_stand(number, use.eqn, target.axes)
        findings.doubts.append((use, target.axes, why))

  def _number(self, use: Use) -> float | None:
    return self.numbers.get(use.eqn.inputs[use.place])

  def _law(
    self, use: Use, target: _Target, proven: Proven, any_number: bool
  ) -> tuple[Use, Law, float] | None:
    """The law of a factor at the literal it is made of, and its power.

    The power is that of the size in the factor, the law's that in the literal:
    8 divides, for the root of 64.
    """
    powers = [target.power]
    if target.power == _ROOT:
      powers += [_ROOT / 2, -_ROOT]
    elif target.power is None:
      atoms = _leaves(target.axes)
      powers = [power for known, power in proven if known == atoms]
    value = use.eqn.inputs[use.place]
    number = self.numbers[value]
    roots = self._sizes(use, target.axes, any_number)
    if len(roots) != 1 or not number:
      return None
    ((root, own),) = roots.items()
    divides = use.eqn.primitive.name == 'div'
    scale = power_of(value, 1 / number if divides else number, target.axes)
    if scale is None and divides and own == 1 and root != use:
      scale = _MEAN  # A sample variance divides by one less.
    if scale is None or scale not in powers:
      return None
    return root, Law(target.axes, own), scale

  def _sizes(
    self, use: Use, axes: Iterable[Axis], any_number: bool = True
  ) -> dict[Use, float]:
    """The literals of a number that are powers of a size, and the power."""
    sizes = {}
    for root in self._roots(use):
      literal = root.eqn.inputs[root.place]
      digits = number_of(literal) or 0.0
      power = power_of(literal, digits, axes)
      if power is not None and (any_number or not is_plain(digits)):
        sizes[root] = power
    return sizes

  def _roots(self, use: Use) -> Iterator[Use]:
    """The literals that a number is made of."""
    value = use.eqn.inputs[use.place]
    if value in self.given:
      part, outer = self.given[value]
      yield from part._roots(outer)
      return
    maker = self.makers.get(value)
    if maker is None:
      yield use
      return
    for place in range(len(maker.inputs)):
      yield from self._roots(Use(maker, place))

  def _ahead(self, value: Value) -> Iterator[Use]:
    """The numbers that multiply or divide a value, in what follows."""
    for eqn, place in self.readers.get(value, ()):
      name = eqn.primitive.name
      is_masked = name == 'select_n' and place > 0
      if is_masked or (name in UNCHANGED and place == 0):
        yield from self._ahead(eqn.outputs[0])
      elif (name == 'mul' or (name == 'div' and place == 0)) and (
        eqn.inputs[1 - place] in self.numbers
      ):
        yield Use(eqn, 1 - place)
        yield from self._ahead(eqn.outputs[0])

  def _behind(self, value: Value) -> Iterator[Use]:
    """The numbers that multiply or divide a value, in what came before."""
    eqn = self.makers.get(value)
    if eqn is None:
      return
    name = eqn.primitive.name
    if name in UNCHANGED:
      yield from self._behind(eqn.inputs[0])
    elif name in ('mul', 'div'):
      for place, other in ((1, 0), (0, 1)):
        is_factor = eqn.inputs[place] in self.numbers
        if is_factor and not (name == 'div' and place == 0):
          yield Use(eqn, place)
          yield from self._behind(eqn.inputs[other])
          return


def _targets(eqn: Equation) -> Iterator[_Target]:
  """What of an equation may be scaled by a size."""
  name, out = eqn.primitive.name, eqn.outputs[0] if eqn.outputs else None
  if out is None:
    return
  if name == 'reduce_sum' and is_live(eqn.reductions):
    axes, x = tuple(eqn.reductions), eqn.inputs[0]
    yield _Target(axes, (x,), (out,), (), _MEAN, True, eqn.why)
  elif name == 'broadcast_in_dim':  # The derivative of a sum.
    x, kept = eqn.inputs[0], eqn.params['broadcast_dimensions']
    new = tuple(axis for k, axis in enumerate(out.axes) if k not in kept)
    if is_live(new) and not _is_constant(x):
      yield _Target(new, (x,), (out,), (), None, False, eqn.why)
  elif name == 'dot_general':
    yield from _contractions(eqn)
  elif name == 'conv_general_dilated':
    kernel = eqn.inputs[1]
    spec = eqn.params['dimension_numbers'].rhs_spec
    summed = tuple(kernel.axes[k] for k in spec[1:])
    if is_live(summed):
      yield _contraction(eqn, summed)


def _summed(eqn: Equation) -> Any:
  """How many entries each sum has that an equation makes, if it makes any."""
  if eqn.primitive.name == 'reduce_sum':
    return count_of(eqn.reductions)
  if eqn.primitive.name == 'reduce_window_sum':
    return math.prod(eqn.params['window_dimensions'])
  return None


def _contractions(eqn: Equation) -> Iterator[_Target]:
  """A matrix product: of data, as a sum, or one that is the derivative."""
  (left, right), (out,) = eqn.inputs, eqn.outputs
  (contract, batch) = eqn.params['dimension_numbers']
  summed = tuple(left.axes[k] for k in contract[0])
  if is_live(summed):
    yield _contraction(eqn, summed)
  for value, gone in ((left, 0), (right, 1)):
    free = [
      axis
      for k, axis in enumerate(value.axes)
      if k not in (*contract[gone], *batch[gone])
    ]
    live = tuple(axis for axis in free if is_live([axis]))
    if live:
      yield _Target(live, (left, right), (out,), (), None, False, eqn.why)


def _contraction(eqn: Equation, summed: tuple[Axis, ...]) -> _Target:
  """A contraction, which is a sum with a constant, and of squares."""
  (left, right), (out,) = eqn.inputs, eqn.outputs
  constants = tuple(
    Use(eqn, k) for k, value in enumerate(eqn.inputs) if _is_constant(value)
  )
  squares = left is right and len(out.shape) + len(summed) == len(left.shape)
  power = _MEAN if constants or squares else _ROOT
  is_sum = bool(constants) or (left.has_data and right.has_data)
  before = (left, right)
  return _Target(summed, before, (out,), constants, power, is_sum, eqn.why)


def _is_constant(value: Value) -> bool:
  return not value.has_data and not value.sources


def _is_scaled_table(value: Value) -> bool:
  """Whether a constant has several numbers, and others than 0 and 1."""
  if value.constant is None or number_of(value) is not None:
    return False
  return not np.all(np.isin(np.asarray(value.constant), (0, 1, -1)))


def _leaves(axes: Iterable[Axis]) -> frozenset[Axis]:
  return frozenset(leaf for axis in axes for leaf in ax.atoms(axis))


def _may_stand(number: float, eqn: Equation, axes: Iterable[Axis]) -> str:
  return (
    f'{number:g} in {eqn.why} may stand for its {count_of(axes)} entries: '
    f'{_REMEDY}'
  )
