"""A second trace at other widths, and what it says of the numbers of a first.

Both programs have the same operations: where a number differs between them it
follows from the sizes that differ.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.structure.numbers.literals import (
  POWERS,
  count_of,
  number_of,
  power_of,
  varying_axes,
)
from jaxprune.structure.numbers.parts import bodies_of
from jaxprune.structure.numbers.rescale import Findings, Law
from jaxprune.structure.numbers.targets import Use
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program
from jaxprune.structure.rules import Equation, Value


def confirm(program: Program, other: Program, findings: Findings) -> Findings:
  """Returns what a second trace at other widths says of the numbers.

  A number that is the same in both follows from no width; one that differs
  must follow from the sizes that differ, in one way.

  Args:
    program: the typed program.
    other: the program of the same operations at other widths.
    findings: of :func:`jaxprune.structure.numbers.rescale.patterns`.

  Raises:
    ValueError: if the second trace has other operations.
  """
  pairs = list(_pairs(program, other))
  sizes: dict[Axis, Any] = {}
  for eqn, twin in pairs:
    for value, its in zip(
      [*eqn.inputs, *eqn.outputs], [*twin.inputs, *twin.outputs], strict=True
    ):
      for axis, n in zip(value.axes, its.shape, strict=True):
        sizes[ax.find(axis)] = n
  laws: dict[Use, Law] = {}
  doubts: list[tuple[Use, tuple[Axis, ...], str]] = []
  tables: list[tuple[Use, Axis, str]] = []
  for eqn, twin in pairs:
    for place, value in enumerate(eqn.inputs):
      use, its = Use(eqn, place), twin.inputs[place]
      if value.constant is None or its.constant is None:
        continue
      a, b = number_of(value), number_of(its)
      if a is None or b is None:
        tables += [
          (use, axis, f'{eqn.why} has another table at another width')
          for axis in varying_axes(value)
          if not _is_part(its, value)
        ]
      elif a != b:
        near = findings.laws.get(use)
        found = _explanations(value, a, b, sizes, near)
        if len(found) == 1:
          laws[use] = found[0]
        else:
          axes = tuple(axis for law in found for axis in law.axes)
          axes = axes or tuple(
            axis for axis, n in sizes.items() if axis.size != n
          )
          why = f'{a:g} in {eqn.why} may follow from several widths'
          doubts.append((use, axes, why))
  return Findings(laws, doubts, tables)


def transfer(program: Program, findings: Findings, other: Program) -> Findings:
  """Returns findings of a program as those of the same at another batch.

  Raises:
    ValueError: if the other has other operations.
  """
  pairs = list(_pairs(program, other))
  twins = {id(eqn): twin for eqn, twin in pairs}
  axes: dict[Axis, Axis] = {}
  for eqn, twin in pairs:
    for value, its in zip(
      [*eqn.inputs, *eqn.outputs], [*twin.inputs, *twin.outputs], strict=True
    ):
      for a, b in zip(value.axes, its.axes, strict=True):
        axes.setdefault(ax.find(a), b)
  use = lambda old: Use(twins[id(old.eqn)], old.place)
  known = lambda found: tuple(
    axes[ax.find(axis)] for axis in found if ax.find(axis) in axes
  )
  return Findings(
    {use(u): Law(known(x.axes), x.power) for u, x in findings.laws.items()},
    [(use(u), known(found), why) for u, found, why in findings.doubts],
    [(use(u), axes[ax.find(axis)], why) for u, axis, why in findings.tables],
  )


def _pairs(
  program: Program, other: Program
) -> Iterator[tuple[Equation, Equation]]:
  """The equations of two programs, side by side, those of bodies too."""
  names = lambda p: [eqn.primitive.name for eqn in p.equations]
  if names(program) != names(other):
    differ = [
      (a.why, b.why)
      for a, b in zip(program.equations, other.equations, strict=False)
      if a.primitive is not b.primitive
    ]
    first = ' and '.join(differ[0]) if differ else 'their number'
    raise ValueError(
      f'The function has other operations at the other widths (`narrow`), '
      f'first: {first}.'
    )
  for eqn, twin in zip(program.equations, other.equations, strict=True):
    yield eqn, twin
    for body, its in zip(bodies_of(eqn), bodies_of(twin), strict=True):
      yield from _pairs(body, its)


def _explanations(
  value: Value,
  a: float,
  b: float,
  sizes: Mapping[Axis, Any],
  near: Law | None,
) -> list[Law]:
  """The laws by which a number is a at these sizes and b at those."""
  is_law = lambda law: np.isclose(
    abs(b / a),
    (_count_at(law.axes, sizes) / count_of(law.axes)) ** law.power,
    rtol=4 * float(jnp.finfo(value.dtype).eps)
    if jnp.issubdtype(value.dtype, jnp.inexact)
    else 1e-9,
  )
  if not a or not b:
    return []
  if near is not None and is_law(near):
    return [near]
  seen: dict[tuple[Any, ...], Law] = {}
  for axis, n in sizes.items():
    if isinstance(n, int) and isinstance(axis.size, int) and n != axis.size:
      for power in POWERS:
        law = Law((axis,), power)
        if is_law(law):
          seen.setdefault((*map(ax.find, ax.atoms(axis)), power), law)
  laws = list(seen.values())
  exact = [law for law in laws if power_of(value, a, law.axes) == law.power]
  return exact or laws


def _count_at(axes: Iterable[Axis], sizes: Mapping[Axis, Any]) -> Any:
  return math.prod(sizes.get(ax.find(axis), 0) for axis in axes)


def _is_part(part: Value, whole: Value) -> bool:
  """Whether a table is the first entries of another."""
  if len(part.shape) != len(whole.shape):
    return False
  cut = tuple(slice(n) for n in part.shape)
  a, b = np.asarray(whole.constant)[cut], np.asarray(part.constant)
  return a.shape == b.shape and bool(np.array_equal(a, b))
