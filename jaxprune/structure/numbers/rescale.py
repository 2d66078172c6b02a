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

import math
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Sequence,
)
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.structure.numbers import growth
from jaxprune.structure.numbers.literals import (
  count_of,
  is_live,
  is_plain,
  may_be_of,
  number_of,
  power_of,
  rounding,
  varying_axes,
)
from jaxprune.structure.numbers.parts import Part, parts_of
from jaxprune.structure.numbers.targets import (
  MEAN,
  ROOT,
  Target,
  Use,
  is_constant,
  targets_of,
)
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program
from jaxprune.structure.rules import Equation, Value

_SCALES = frozenset(['div', 'mul'])
_REMEDY = 'trace it at two widths (`narrow`) to tell'


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
  parts = list(parts_of(program))
  targets = [(part, target) for part in parts for target in _targets(part)]
  targets = [pair for pair in targets if pair[1].power is not None]
  seen: set[Use] = set()
  for part, target in sorted(targets, key=lambda pair: not pair[1].is_sum):
    known = _laws(part, target, {}, any_number=True).values()
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
  targets: list[tuple[Part, Target]] = []
  parts = list(parts_of(program))
  for part in parts:
    _add_tables(part, findings)
    targets += [(part, target) for target in _targets(part)]
  # What a derivative repeats is proven elsewhere, what is left is known last.
  targets.sort(key=lambda pair: pair[1].power is None)
  left = [
    (part, target, _explain(part, target, findings, proven))
    for part, target in targets
  ]
  for part in parts:
    _add_balances(part, findings, proven)
  for part, target, factors in left:
    _leave(part, target, factors, findings)
  whole = _whole_sizes(parts)
  for part in parts:
    _add_doubts(part, findings, whole)
  return findings


def _whole_sizes(parts: Iterable[Part]) -> set[int]:
  """The sizes of the axes of a program that no plan cuts."""
  axes = {
    axis
    for part in parts
    for eqn in part.program.equations
    for value in (*eqn.inputs, *eqn.outputs)
    for axis in value.axes
  }
  sizes = {ax.find(axis).size for axis in axes if not is_live([axis])}
  return {size for size in sizes if isinstance(size, int) and size > 2}


def _add_tables(part: Part, findings: Findings) -> None:
  """Adds the constants that vary along an axis that may shrink."""
  for eqn in part.program.equations:
    for place, value in enumerate(eqn.inputs):
      for axis in varying_axes(value):
        why = f'a table of constants at {eqn.why} counts it: {_REMEDY}'
        findings.tables.append((Use(eqn, place), axis, why))


def _targets(
  part: Part,
) -> list[Target]:
  """Returns what may be scaled by a size."""
  return [t for eqn in part.program.equations for t in targets_of(eqn)]


def _add_balances(part: Part, findings: Findings, proven: Proven) -> None:
  """Adds the factors that take away what a value grows by with a size.

  A derivative scales by the same number what grows in another way.
  """
  for use, value in part.meetings():
    if use.eqn.primitive.name not in _SCALES or use in part.means:
      continue
    if use.eqn.primitive.name == 'div' and use.place == 0:
      continue
    number = part.numbers[use.eqn.inputs[use.place]]
    divides = use.eqn.primitive.name == 'div'
    known = [*part.grown.get(value, ())]
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
      own = _sizes(part, use, each.axes, any_number=False)
      if len(own) != 1:
        continue
      ((root, own_power),) = own.items()
      if root in findings.laws or part.is_custom:
        continue
      if any(root == doubtful for doubtful, *_ in findings.doubts):
        continue
      findings.laws[root] = Law(each.axes, own_power)
      proven[_leaves(each.axes), power] = each.axes


def _add_doubts(part: Part, findings: Findings, whole: Collection[int]) -> None:
  """Adds a doubt for each number that may well be a size, and has no law.

  It may be the size of what the value that it meets carries, or has just
  summed over. Where the entries are counted (`iota`), any scale may be.

  Args:
    findings: what is known; doubts are added.
    whole: the sizes that no plan changes; their powers are theirs.
  """
  in_doubt = {use for use, *_ in findings.doubts}
  for use, value in part.meetings():
    eqn, number = use.eqn, part.numbers[use.eqn.inputs[use.place]]
    literal = eqn.inputs[use.place]
    if use in in_doubt or use in part.means or not number:
      continue
    if any(root in findings.laws for root in part.roots(use)):
      continue
    scales = eqn.primitive.name in _SCALES
    counts = is_constant(value) and scales
    plain = is_plain(number, rounding(literal))
    grown = part.grown.get(value, ())
    if not counts and plain:
      # At width 4, 2 is the root of it where one is due: `table[i] * 2`.
      divides = eqn.primitive.name == 'div'
      grown = [
        each
        for each in grown
        if not each.is_layer
        and scales
        and growth.power_taken(literal, number, divides, each)
      ]
    summed = [each.axes for each in grown]
    carried = [] if plain and not counts else value.axes
    if not counts and (_is_slope(part, use) or _is_bound(part, use)):
      continue
    for axes in [*((axis,) for axis in carried), *summed]:
      if not is_live(axes):
        continue
      may_be = may_be_of(literal, number, axes, eqn.primitive.name, whole)
      if (counts and abs(number) != 1) or may_be:
        why = _may_stand(number, eqn, axes)
        findings.doubts.append((use, tuple(axes), why))


def _is_slope(part: Part, use: Use) -> bool:
  """Whether a number times a value is chosen against the value itpart."""
  (out,), value = use.eqn.outputs, use.eqn.inputs[1 - use.place]
  readers = [reader for reader, _ in part.readers.get(out, ())]
  return (
    use.eqn.primitive.name == 'mul'
    and bool(readers)
    and all(
      reader.primitive.name in ('select_n', 'max', 'min')
      and value in reader.inputs
      for reader in readers
    )
  )


def _is_bound(part: Part, use: Use) -> bool:
  """Whether a number divides what it bounds, as 6 does in a hard swish."""
  eqn = part.makers.get(use.eqn.inputs[1 - use.place])
  if use.eqn.primitive.name != 'div' or eqn is None:
    return False
  while eqn.programs:  # With a derivative of its own, as relu6 has.
    body = eqn.programs[0]
    makers = [e for e in body.equations if body.outputs[0] in e.outputs]
    if len(eqn.outputs) != 1 or not makers:
      return False
    eqn = makers[0]
  number = part.numbers[use.eqn.inputs[use.place]]
  return eqn.primitive.name == 'min' and number in map(number_of, eqn.inputs)


def _explain(
  part: Part, target: Target, findings: Findings, proven: Proven
) -> list[Use]:
  """Looks for the factors of a target that are powers of its size.

  Returns:
    Those that are none, where none is.
  """
  known = _laws(part, target, proven)
  for use, (root, law, power) in known.items():
    if part.is_custom:
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
  if known and not part.is_custom:
    return []
  return [use for use in _factors(part, target) if use not in known]


def _laws(
  part: Part, target: Target, proven: Proven, any_number: bool = False
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
  for use in _factors(part, target):
    known = _law(part, use, target, proven, any_number and target.is_sum)
    if known is not None:
      found[use] = known
  if target.power != ROOT:
    return found
  powers = [power for *_, power in found.values()]
  gone = set()
  if powers.count(ROOT / 2) != 2:
    gone.add(ROOT / 2)
  if ROOT not in powers:
    gone.add(-ROOT)  # It undoes no scale.
  return {use: law for use, law in found.items() if law[2] not in gone}


def _factors(part: Part, target: Target) -> list[Use]:
  factors = [
    *(use for use in target.constants if part.number(use) is not None),
    *(use for value in target.before for use in part.behind(value)),
    *(use for value in target.after for use in part.ahead(value)),
  ]
  means = part.means if target.power == ROOT else ()
  return [use for use in factors if use not in means]


def _leave(
  part: Part, target: Target, left: Sequence[Use], findings: Findings
) -> None:
  """Adds a doubt for each factor of a target that may follow its size."""
  for use in left:
    value = use.eqn.inputs[use.place]
    number = part.numbers[value]
    if any(root in findings.laws for root in part.roots(use)):
      continue
    if target.is_sum and abs(number) != 1:
      why = (
        f'{target.why} sums {count_of(target.axes)} entries and {number:g} '
        f'in {use.eqn.why} scales it: {_REMEDY}'
      )
      findings.doubts.append((use, target.axes, why))
    elif (
      not is_plain(number)
      and power_of(value, number, target.axes)
      and not _is_slope(part, use)
    ):
      why = _may_stand(number, use.eqn, target.axes)
      findings.doubts.append((use, target.axes, why))


def _law(
  part: Part, use: Use, target: Target, proven: Proven, any_number: bool
) -> tuple[Use, Law, float] | None:
  """The law of a factor at the literal it is made of, and its power.

  The power is that of the size in the factor, the law's that in the literal:
  8 divides, for the root of 64.
  """
  powers = [target.power]
  if target.power == ROOT:
    powers += [ROOT / 2, -ROOT]
  elif target.power is None:
    atoms = _leaves(target.axes)
    powers = [power for known, power in proven if known == atoms]
  value = use.eqn.inputs[use.place]
  number = part.numbers[value]
  roots = _sizes(part, use, target.axes, any_number)
  if len(roots) != 1 or not number:
    return None
  ((root, own),) = roots.items()
  divides = use.eqn.primitive.name == 'div'
  scale = power_of(value, 1 / number if divides else number, target.axes)
  if scale is None and divides and own == 1 and root != use:
    scale = MEAN  # A sample variance divides by one less.
  if scale is None or scale not in powers:
    return None
  return root, Law(target.axes, own), scale


def _sizes(
  part: Part, use: Use, axes: Iterable[Axis], any_number: bool = True
) -> dict[Use, float]:
  """The literals of a number that are powers of a size, and the power."""
  sizes = {}
  for root in part.roots(use):
    literal = root.eqn.inputs[root.place]
    digits = number_of(literal) or 0.0
    power = power_of(literal, digits, axes)
    if power is not None and (any_number or not is_plain(digits)):
      sizes[root] = power
  return sizes


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
