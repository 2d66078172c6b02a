"""With which power of a size the values of a program grow.

A sum over d entries grows with d, its root with d^1/2, what is divided by that
root with d^-1/2. A number that takes the growth away follows from the size:

  mean           sum(h) / d               d^1   x d^-1
  norm           sqrt(sum(h * h)) / d^.5  d^.5  x d^-.5
  unit vector    h / norm * d^.5          d^-.5 x d^.5
  layer          h @ w / d^.5, or / d     d^.5 of random weights, d^1 of weights
                                          that learn alike (muP)
  row of a table table[i] * d^.5          d^-.5, as rows are initialised

Any other number that meets a value which carries an axis, or has just summed
over it, says nothing that could be told.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxprune.structure.numbers.literals import UNCHANGED, is_live, power_of
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.rules import Equation, Value

# What leaves a number that scales its first operand a number that scales it.
_ALIKE = frozenset(['abs', 'gather', 'name', 'slice', 'dynamic_slice'])
_ROOTS = {'sqrt': 0.5, 'rsqrt': -0.5, 'square': 2.0, 'cbrt': 1 / 3}
# With one number and one value, these are about the value: a floor, an offset.
_OFFSETS = frozenset(['add', 'max', 'min', 'sub'])
_UNARY = frozenset(['exp', 'exp2', 'log', 'log1p', 'logistic', 'tanh'])


class Growth(NamedTuple):
  """How a value grows with the size of axes.

  Attributes:
    axes: what it summed over, or carries.
    powers: those of their size that it may grow with; none: not told.
    is_layer: whether it grows only until something that is not linear reads
      it: a product with a kernel, or a mean, which its count makes a sum.
  """

  axes: tuple[Axis, ...]
  powers: tuple[float, ...]
  is_layer: bool = False


Grown = Mapping[Value, tuple[Growth, ...]]


def of(
  equations: Iterable[Equation],
  numbers: Mapping[Value, float],
  given: Grown,
) -> dict[Value, tuple[Growth, ...]]:
  """Returns how each value of a list of equations grows with sizes.

  Args:
    equations: in the order in which they run.
    numbers: the values that are a number in every entry.
    given: how the values grow that come from elsewhere.
  """
  grown = dict(given)
  for eqn in equations:
    if len(eqn.outputs) == 1 and eqn.outputs[0] not in numbers:
      growths = _growths(eqn, numbers, grown)
      if growths:
        grown[eqn.outputs[0]] = growths
  return grown


def _growths(
  eqn: Equation, numbers: Mapping[Value, float], grown: Grown
) -> tuple[Growth, ...]:
  """How the result of an equation grows."""
  name, inputs = eqn.primitive.name, eqn.inputs
  values = [v for v in inputs if v not in numbers]
  known = grown.get(values[0], ()) if values else ()
  if name == 'reduce_sum' and is_live(eqn.reductions):
    axes = tuple(eqn.reductions)
    return (*(g for g in known if not _meet(g.axes, axes)), Growth(axes, (1,)))
  if name == 'dot_general':
    return _contracted(eqn)
  if name == 'gather' and _is_table(inputs[0]):
    rows = inputs[0].axes[-1:]
    return (Growth(tuple(rows), (-0.5,)),) if is_live(rows) else ()
  if name == 'select_n':
    return next((grown[v] for v in inputs[1:] if v in grown), ())
  if name in _ALIKE or name in UNCHANGED:
    return known
  if name in _ROOTS:
    return _times(known, _ROOTS[name])
  if name == 'integer_pow':
    return _times(known, eqn.params['y'])
  if name in ('mul', 'div') and len(values) == 1:
    number = next((numbers[v] for v in inputs if v in numbers), 1.0)
    is_over = name == 'div' and inputs[0] in numbers
    over = [_over(g) for g in known] if is_over else known
    divides = name == 'div' and not is_over
    taken = ((g, power_taken(eqn.outputs[0], number, divides, g)) for g in over)
    return tuple(
      g if power is None else Growth(g.axes, (-1.0,), is_layer=True)
      for g, power in taken
      if power in (None, -1.0)
    )
  if name in ('mul', 'div'):
    return _product(name, *(grown.get(v, ()) for v in inputs))
  if name in _OFFSETS and len(values) == 1:
    return known
  if name in _OFFSETS or name == 'add_any':
    every = [g for v in inputs for g in grown.get(v, ())]
    return tuple(Growth(g.axes, ()) for g in every if not g.is_layer)
  if name in _UNARY:
    return tuple(Growth(g.axes, ()) for g in known if not g.is_layer)
  return ()


def power_taken(
  value: Value, number: float, divides: bool, growth: Growth
) -> float | None:
  """Returns the power of the size that a factor takes away, if it does."""
  if not number:
    return None
  scale = power_of(value, 1 / number if divides else number, growth.axes)
  return scale if scale is not None and -scale in growth.powers else None


def _contracted(eqn: Equation) -> tuple[Growth, ...]:
  (left, right), ((summed, _), _) = eqn.inputs, eqn.params['dimension_numbers']
  axes = tuple(left.axes[k] for k in summed)
  if not axes or not is_live(axes):
    return ()
  is_layer = not (left.has_data and right.has_data)
  powers = (1.0,) if left is right else (0.5, 1.0)
  return (Growth(axes, powers, is_layer),)


def _product(
  name: str, left: tuple[Growth, ...], right: tuple[Growth, ...]
) -> tuple[Growth, ...]:
  """Of a product of two values; that of a layer with another is not told."""
  over = tuple(_over(g) for g in right) if name == 'div' else right
  both = [g for g in (*left, *over) if not g.is_layer]
  merged: list[Growth] = []
  for g in both:
    at = next((k for k, h in enumerate(merged) if _meet(g.axes, h.axes)), None)
    if at is None:
      merged.append(g)
      continue
    powers = {a + b for a in merged[at].powers for b in g.powers}
    merged[at] = Growth(merged[at].axes, tuple(powers))
  return tuple(merged)


def _times(growths: Iterable[Growth], power: float) -> tuple[Growth, ...]:
  return tuple(
    Growth(g.axes, tuple(power * p for p in g.powers))
    for g in growths
    if not g.is_layer
  )


def _over(growth: Growth) -> Growth:
  return growth._replace(powers=tuple(-p for p in growth.powers))


def _meet(a: Iterable[Axis], b: Iterable[Axis]) -> bool:
  leaves = lambda axes: {leaf for axis in axes for leaf in ax.atoms(axis)}
  return bool(leaves(a) & leaves(b))


def _is_table(value: Value) -> bool:
  """Whether a value is of params alone, of rows."""
  return bool(value.sources) and not value.has_data and len(value.shape) == 2
