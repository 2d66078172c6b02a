"""Where the entries of an absent unit are zero, derived from the program.

The params of an absent unit are zero. What follows from it is not: with
``h = tanh(x @ a)`` the entry of h is zero too, and ``h @ h.T`` sums over the
unit as if it were not there; with ``h = exp(x @ a)`` the entry is 1, and the
sum counts it. A removed unit is not counted, so that the smaller function would
compute something else than the network with zeros in its params.

The entries are followed from the leaves onwards, one set of atoms for each
value: those at whose absent units the value is zero::

  a        {units}   a leaf
  x @ a    {units}   a product is zero where one operand is
  tanh     {units}   tanh(0) = 0
  exp      {}        exp(0) = 1
  exp * a  {units}   one operand is enough
  h + 1    {}        both would have to be

An operation that contracts an axis needs one operand that is zero there. Of the
others :func:`counted` tells, and they are what they compute: reductions.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program, all_equations
from jaxprune.structure.rules import Equation, Value, contraction
from jaxprune.structure.rules.base import known_entries
from jaxprune.structure.rules.primitives import known
from jaxprune.structure.walks.flow import Binding, Flow, flow

Atoms = frozenset[Axis]
Zeros = Mapping[Value, Atoms]  # Value -> the atoms at whose units it is zero.

_NOWHERE: Atoms = frozenset()
# Stands in the set of a value that is zero in every entry, as a constant may be
# that has no axis yet: what is made of it is zero at every unit.
_EVERYWHERE = ax.atom(1)

# What a protected axis says of an operation that :func:`counted` names.
WHY = 'sums over it, and where a unit is absent neither operand is zero'


def counted(program: Program) -> list[tuple[Equation, Axis]]:
  """Returns the contractions that count absent units, with the axis of each.

  Args:
    program: a typed program, all of whose axes are unified.

  Returns:
    For every matrix product and convolution that contracts an axis with an
    atom that nothing locks, neither of whose operands is zero where a unit is
    absent: (equation, axis), in the order of the program.
  """
  leaves = {value for value in program.inputs if not value.has_data}
  doubtful = [
    (eqn, left, right)
    for eqn, _ in all_equations(program)
    for left, right in _contracted(eqn)
    if not ax.is_locked(left) and leaves.isdisjoint(eqn.inputs)
  ]
  if not doubtful:
    return []  # In most networks every product reads a leaf as it is.
  zeros = where_zero(flow(program))
  return [
    (eqn, left)
    for eqn, left, right in doubtful
    if not all(
      atom.locked
      or atom in zeros.get(eqn.inputs[0], _NOWHERE)
      or atom in zeros.get(eqn.inputs[1], _NOWHERE)
      for atom in {*ax.atoms(left), *ax.atoms(right)}
    )
  ]


def where_zero(stream: Flow) -> Zeros:
  """Returns for each value the atoms at whose absent units it is zero.

  The greatest solution of the rules of this module: what a loop carries is
  taken for zero until a step of its body makes it otherwise.
  """
  zeros: dict[Value, Atoms] = {}
  for value in stream.inputs:
    zeros[value] = _atoms(value)  # Arguments like a leaf are cut like it.
  is_stable = False
  while not is_stable:
    is_stable = True
    for step in stream.steps:
      if isinstance(step, Binding):
        results = {step.target: _bound(step, zeros)}
      else:
        results = _results(step, zeros)
      for value, atoms in results.items():
        # Several steps make the value that a loop or a branch ends with.
        known = zeros.get(value)
        atoms = atoms if known is None else atoms & known
        if atoms != known:
          zeros[value] = atoms
          is_stable = False
  return zeros


def _contracted(eqn: Equation) -> Iterable[tuple[Axis, Axis]]:
  """The axes of both operands that an equation sums over, in pairs."""
  contracted = contraction(eqn)
  if contracted is not None:
    left, right = eqn.inputs[:2]
    for a, b in zip(*contracted, strict=True):
      yield left.axes[a], right.axes[b]
  elif eqn.primitive.name == 'conv_general_dilated':
    kernel = eqn.inputs[1]
    numbers = eqn.params['dimension_numbers']
    inner = kernel.axes[numbers.rhs_spec[1]]
    if not ax.is_locked(inner):
      yield inner, inner


def _atoms(value: Value) -> Atoms:
  return frozenset(atom for axis in value.axes for atom in ax.atoms(axis))


def _zeros_of(value: Value, zeros: Zeros) -> Atoms:
  """Where a value is zero: of a constant, everywhere or nowhere."""
  if value.constant is not None:
    entries = known_entries(value.constant)
    is_zero = entries is not None and not np.any(entries)
    return _atoms(value) | {_EVERYWHERE} if is_zero else _NOWHERE
  return zeros.get(value, _atoms(value))


def _within(out: Value, atoms: Atoms) -> Atoms:
  """What a set says of a result: every atom of it, or those it has."""
  if _EVERYWHERE in atoms:
    return _atoms(out) | {_EVERYWHERE}
  return _atoms(out) & atoms


def _bound(binding: Binding, zeros: Zeros) -> Atoms:
  """What a value takes from another; the index of a branch says nothing."""
  target, source = binding
  known = _zeros_of(source, zeros)
  if _EVERYWHERE in known:
    return _within(target, known)
  return _atoms(target) & (known | _atoms(target) - _atoms(source))


def _results(eqn: Equation, zeros: Zeros) -> dict[Value, Atoms]:
  """Where the outputs of an equation are zero, if its inputs are."""
  row = known(eqn.primitive.name)
  rule = _RULES.get(row.zero, _elementwise if row.elementwise else None)
  if rule is None:
    return dict.fromkeys(eqn.outputs, _NOWHERE)
  return {out: rule(eqn, out, zeros) for out in eqn.outputs}


def _product(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  """Each axis that is left comes from one operand (or, of a batch, from both).

  A unit may lie on several axes, as in a product of features with themselves:
  each of its places has to be zero by the operand that it comes from.
  """
  left, right = (_zeros_of(value, zeros) for value in eqn.inputs[:2])
  if eqn.primitive.name == 'conv_general_dilated':
    # The channels of the result are those of the kernel; in groups, of both.
    is_grouped = eqn.params['feature_group_count'] > 1
    return _atoms(out) & (left | right if is_grouped else right | _batch(eqn))
  params, ragged = eqn.params, eqn.params.get('ragged_dot_dimension_numbers')
  (contract, batch), kernels = (
    (params['dimension_numbers'], ())
    if ragged is None
    else (ragged.dot_dimension_numbers, ragged.rhs_group_dimensions)
  )
  inner = len(contract[0])
  free = len(eqn.inputs[1].shape) - inner - len(batch[1]) - len(kernels)
  first = len(out.shape) - free  # From here on they are those of the right.
  shared = first - (len(eqn.inputs[0].shape) - inner - len(batch[0]))
  atoms = set(_atoms(out))
  for k, axis in enumerate(out.axes):
    by = left | right if k < shared else left if k < first else right
    atoms -= {atom for atom in ax.atoms(axis) if atom not in by}
  return frozenset(atoms)


def _batch(eqn: Equation) -> Atoms:
  data = eqn.inputs[0]
  return frozenset(
    ax.atoms(data.axes[eqn.params['dimension_numbers'].lhs_spec[0]])
  )


def _broadcast(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  """An axis that is new repeats one entry, zero or not, for every unit."""
  x = eqn.inputs[0]
  known = _zeros_of(x, zeros)
  if _EVERYWHERE in known:
    return _within(out, known)
  new = [
    axis
    for k, axis in enumerate(out.axes)
    if k not in eqn.params['broadcast_dimensions']
  ]
  return known & _atoms(out) - _on(new)


def _on(axes: Sequence[Axis]) -> Atoms:
  return frozenset(atom for axis in axes for atom in ax.atoms(axis))


def _handed_on(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  """Zero where every operand is that has the unit; indices have none."""
  operands = eqn.inputs
  if eqn.primitive.name == 'sort' and out.dtype != operands[0].dtype:
    return _NOWHERE  # An argsort hands on where entries stood.
  if len(eqn.outputs) == len(operands) > 1:
    operands = [operands[eqn.outputs.index(out)]]
  known = [_zeros_of(value, zeros) for value in operands]
  if all(_EVERYWHERE in atoms for atoms in known):
    return _within(out, known[0])
  # An operand without the unit says nothing of it: it is joined beside it.
  return _atoms(out) & frozenset.intersection(
    *(
      atoms | _atoms(out) - _atoms(value)
      for value, atoms in zip(operands, known, strict=True)
    )
  )


def _gather(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  """Entries of the first operand, or what is filled in out of bounds.

  A fill of NaN is not told from zero: it fills the kept entries of the row too,
  so that the result is NaN whatever is absent.
  """
  x, fill = eqn.inputs[0], eqn.params['fill_value']
  may_fill = eqn.params['mode'] == lax.GatherScatterMode.FILL_OR_DROP
  if fill is None:
    is_neutral = jnp.issubdtype(x.dtype, jnp.inexact)
  else:
    is_neutral = not np.any(fill) or bool(np.all(np.isnan(fill)))
  if may_fill and not is_neutral:
    return _NOWHERE
  known = _zeros_of(x, zeros)
  return _within(out, known) if _EVERYWHERE in known else _atoms(out) & known


def _pad(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  x, filling = eqn.inputs
  if _EVERYWHERE not in _zeros_of(filling, zeros):
    return _NOWHERE
  return _within(out, _zeros_of(x, zeros))


def _elementwise(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  zero, inputs = known(eqn.primitive.name).zero, eqn.inputs
  each = [_within(out, _zeros_of(value, zeros)) for value in inputs]
  if zero == 'any':  # Whatever finite numbers the others hold.
    return frozenset().union(*each)
  if zero == 'first':
    return each[0]
  if zero == 'quotient':  # 0 / 0 is not zero.
    return each[0] - each[1]
  if zero == 'cases':  # Whichever case is taken.
    return frozenset.intersection(*each[1:])
  if zero == 'all':
    return frozenset.intersection(*each)
  if zero == 'power':
    return each[0] if eqn.params['y'] > 0 else _NOWHERE
  if zero == 'bounds':
    return _ordered(eqn.primitive.name, inputs, each)
  return _NOWHERE


def _ordered(
  name: str, inputs: Sequence[Value], known: Sequence[Atoms]
) -> Atoms:
  """A bound that zero lies within leaves it zero: max(0, -1), min(0, 6)."""
  signs = {'max': [-1, -1], 'min': [1, 1], 'clamp': [-1, 0, 1]}[name]
  zero = frozenset.intersection(
    *(
      atoms
      for value, atoms, sign in zip(inputs, known, signs, strict=True)
      if not _bounds(value, sign)
    ),
    # Where every operand is a bound, the result may be any of them.
    *([_NOWHERE] if all(map(_bounds, inputs, signs)) else []),
  )
  return zero


def _bounds(value: Value, sign: int) -> bool:
  """Whether a value is a constant of a sign (or zero), in every entry."""
  if value.constant is None or not sign:
    return False
  entries = known_entries(value.constant)
  return entries is not None and bool(np.all(entries * sign >= 0))


# Words of the trait ``zero`` that need more than the sets of the operands.
_RULES = {
  'product': _product,
  'broadcast': _broadcast,
  'gather': _gather,
  'handed': _handed_on,
  'pad': _pad,
}
