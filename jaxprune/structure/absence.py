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

import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis
from jaxprune.structure.flow import Binding, Flow, flow
from jaxprune.structure.program import Program, all_equations
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.base import ELEMENTWISE

Atoms = frozenset[Axis]
Zeros = Mapping[Value, Atoms]  # Value -> the atoms at whose units it is zero.

_NOWHERE: Atoms = frozenset()
# Stands in the set of a value that is zero in every entry, as a constant may be
# that has no axis yet: what is made of it is zero at every unit.
_EVERYWHERE = ax.atom(1)

# What a protected axis says of an operation that :func:`counted` names.
WHY = 'sums over it, and where a unit is absent neither operand is zero'

# Zero wherever any operand is, whatever finite numbers the others hold.
_ANY = frozenset(['mul', 'mulhi', 'and'])
# Zero wherever the first operand is; of a quotient, unless the second is too.
_FIRST = frozenset(
  ['rem', 'shift_left', 'shift_right_arithmetic', 'shift_right_logical']
)
# Zero where all operands are.
KEEPS_ZERO = frozenset(
  """
  abs add add_any asin asinh atan atan2 atanh bessel_i1e cbrt ceil conj
  convert_element_type copy erf erf_inv expm1 floor gt imag log1p lt name ne
  neg nextafter or population_count pvary real reduce_precision round
  sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor
  """.split()
)
# The same, and where a constant bound lets zero pass.
_ORDERED = frozenset(['max', 'min', 'clamp'])
# What hands entries on, adds them up or picks one: zeros give zero. Along the
# axes that it runs over there are no atoms left in the result.
_HANDED_ON = frozenset(
  """
  all_gather all_to_all bitcast_convert_type concatenate cumprod cumsum
  dynamic_slice dynamic_update_slice gather optimization_barrier pbroadcast
  ppermute psum psum_invariant reduce_and reduce_max reduce_min reduce_or
  reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum
  reshape rev scatter scatter-add scatter-sub select_and_gather_add
  select_and_scatter_add slice sort split squeeze stack tile transpose unstack
  """.split()
)


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
  if eqn.primitive.name == 'dot_general':
    left, right = eqn.inputs
    (contract, _) = eqn.params['dimension_numbers']
    for a, b in zip(*contract, strict=True):
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
    is_zero = not np.any(np.asarray(value.constant))
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
  name = eqn.primitive.name
  if name in ('dot_general', 'conv_general_dilated'):
    rule = _product
  elif name == 'broadcast_in_dim':
    rule = _broadcast
  elif name in _HANDED_ON:
    rule = _handed_on
  elif name == 'pad':
    rule = _pad
  elif name in ELEMENTWISE:
    rule = _elementwise
  else:
    return dict.fromkeys(eqn.outputs, _NOWHERE)
  return {out: rule(eqn, out, zeros) for out in eqn.outputs}


def _product(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  """Each axis that is left comes from one operand (or, of a batch, from both).

  A unit may lie on several axes, as in a product of features with themselves:
  each of its places has to be zero by the operand that it comes from.
  """
  left, right = (_zeros_of(value, zeros) for value in eqn.inputs)
  if eqn.primitive.name == 'conv_general_dilated':
    # The channels of the result are those of the kernel; in groups, of both.
    is_grouped = eqn.params['feature_group_count'] > 1
    return _atoms(out) & (left | right if is_grouped else right | _batch(eqn))
  (contract, batch) = eqn.params['dimension_numbers']
  counts = [len(v.shape) for v in eqn.inputs]
  first = len(batch[0]) + counts[0] - len(contract[0]) - len(batch[0])
  atoms = set(_atoms(out))
  for k, axis in enumerate(out.axes):
    by = left | right if k < len(batch[0]) else left if k < first else right
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


def _pad(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  x, filling = eqn.inputs
  if _EVERYWHERE not in _zeros_of(filling, zeros):
    return _NOWHERE
  return _within(out, _zeros_of(x, zeros))


def _elementwise(eqn: Equation, out: Value, zeros: Zeros) -> Atoms:
  name, inputs = eqn.primitive.name, eqn.inputs
  known = [_within(out, _zeros_of(value, zeros)) for value in inputs]
  if name in _ANY:
    return frozenset().union(*known)
  if name in _FIRST:
    return known[0]
  if name == 'div':  # 0 / 0 is not zero.
    return known[0] - known[1]
  if name == 'select_n':  # Whichever case is taken.
    return frozenset.intersection(*known[1:])
  if name in KEEPS_ZERO:
    return frozenset.intersection(*known)
  if name == 'integer_pow':
    return known[0] if eqn.params['y'] > 0 else _NOWHERE
  if name in _ORDERED:
    return _ordered(name, inputs, known)
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
  return bool(np.all(np.asarray(value.constant) * sign >= 0))
