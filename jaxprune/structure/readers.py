"""Readers: the one place on each path where a real-valued gate may act.

A mask may sit on every slice of a group at once; a gate of 0.3 may not, for it
would count once for each. A gate acts where the group's data are *read*: in a
matrix product or convolution with a kernel, over the group's axis. There the
gate on the data and the gate on the kernel's rows are the same number, so
:func:`scale` needs the params alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structure import axes as ax
from jaxprune.structure import rules
from jaxprune.structure.axes import Axis
from jaxprune.structure.flow import Binding, Flow, Step, flow, made, read
from jaxprune.structure.program import Program
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.slices import Leaf, Member, member, occurrences


class Readers(NamedTuple):
  """Where gates of groups act, and where they cannot.

  Attributes:
    members: group -> the slices of leaves that read it.
    refused: group -> why there is no such place on some path.
  """

  members: dict[str, tuple[Member, ...]]
  refused: dict[str, str]


class _Read(NamedTuple):
  """A product that contracts an axis of a kernel with one of data."""

  eqn: Equation
  kernel: Value
  axis: int


def readers(
  program: Program, leaves: Mapping[str, Leaf], atoms: Mapping[str, Axis]
) -> Readers:
  """Returns the slices of each group that read it.

  A group is refused if its data reach a product or an output past no kernel's
  rows (two arrays of data multiplied over it, a mean over it that leaves the
  group), or if a kernel does not scale as its leaf does (it is normalised, or
  used elsewhere too). A norm over the group passes, and the gate comes after.

  Args:
    program: the typed program, whose first inputs are the leaves.
    leaves: path -> leaf, in the order of the inputs.
    atoms: group -> its axis.
  """
  search = _Search(flow(program), program, leaves, atoms)
  return search.result()


class _Search:
  """The data of a program, the kernels that read them, and what leaks."""

  def __init__(
    self,
    stream: Flow,
    program: Program,
    leaves: Mapping[str, Leaf],
    atoms: Mapping[str, Axis],
  ):
    self.flow = stream
    self.leaves = leaves
    self.groups = {atom: name for name, atom in atoms.items()}
    self.atoms = atoms
    self.paths = dict(zip(program.inputs, leaves, strict=False))
    arguments = program.inputs[len(leaves) :]
    self.data = stream.descendants(arguments, ())
    self.refused: dict[str, str] = {}
    self.fresh: dict[Value, list[Axis]] = {}
    self.reads: dict[str, list[_Read]] = {}

  def result(self) -> Readers:
    for step in self.flow.steps:
      if not any(out in self.data for out in made(step)):
        self.retype(step)
      if isinstance(step, Equation):
        self.find_reads(step)
    self.follow_leaks()
    members = {}
    for name in self.atoms:
      if name not in self.reads and name not in self.refused:
        self.refuse(name, 'no product reads it')
      if name not in self.refused:
        found = self.members(name)
        if name not in self.refused:
          members[name] = found
    refused = {n: self.refused[n] for n in self.atoms if n in self.refused}
    return Readers(members, refused)

  def refuse(self, name: str, why: str) -> None:
    self.refused.setdefault(name, why)

  def names(self, axes: Iterable[Axis]) -> list[str]:
    """The groups that occur in some axes."""
    found = (self.groups.get(atom) for axis in axes for atom in ax.atoms(axis))
    return list(dict.fromkeys(name for name in found if name is not None))

  def retype(self, step: Step) -> None:
    """Types what is made of leaves alone once more, each axis of a leaf apart.

    Equal types then say from which axis of which leaf an axis of a kernel
    comes, where the first typing makes both axes of a square kernel one.
    """
    if isinstance(step, Binding):
      axes, rank = self.typed(step.source), len(step.target.shape)
      lost = max(len(axes) - rank, 0)
      new = [ax.atom(n) for n in step.target.shape[: rank - len(axes) + lost]]
      self.fresh.setdefault(step.target, [*new, *axes[lost:]])
      return
    inputs = [
      Value(v.shape, v.dtype, self.typed(v), v.constant) for v in step.inputs
    ]
    outputs = [Value(v.shape, v.dtype) for v in step.outputs]
    rules.infer(
      Equation(step.primitive, dict(step.params), inputs, outputs, step.why)
    )
    for old, new in zip(step.outputs, outputs, strict=True):
      self.fresh[old] = new.axes

  def typed(self, value: Value) -> list[Axis]:
    if value not in self.fresh:
      self.fresh[value] = [ax.atom(n) for n in value.shape]
    return self.fresh[value]

  def find_reads(self, eqn: Equation) -> None:
    """Notes who reads a group in a product; two arrays of data leak it."""
    for pair in contracted(eqn):
      for name in self.names(over(pair)):
        kernels = [(v, k) for v, k in pair if v not in self.data]
        if not kernels:
          continue
        if len(kernels) == len(pair):
          # Leaves alone: the one on the right reads what the left one writes.
          kernels = kernels[-1:]
        ((kernel, axis),) = kernels
        self.reads.setdefault(name, []).append(_Read(eqn, kernel, axis))

  def follow_leaks(self) -> None:
    """Refuses groups whose data reach a product or an output as numbers.

    What a reduction over a group makes may go on where it meets the group
    again, as the statistics of a norm do: a reader comes after.
    """
    leaks: dict[Value, dict[str, str]] = {}
    changed = True
    while changed:
      changed = False
      for step in self.flow.steps:
        coming: dict[str, str] = {}
        for value in read(step):
          coming.update(leaks.get(value, {}))
        if isinstance(step, Equation):
          if step.products is not None:
            for name, why in coming.items():
              self.refuse(name, f'{why}, and {step.why} reads the result')
            coming = {}
          coming.update(self.leaking(step))
        if not coming:
          continue
        for out in made(step):
          meets = self.names(out.axes)
          left = {n: why for n, why in coming.items() if n not in meets}
          known = leaks.setdefault(out, {})
          changed = changed or not left.keys() <= known.keys()
          known.update(left)
    for out in self.flow.outputs:
      for name, why in leaks.get(out, {}).items():
        self.refuse(name, f'{why}, and the function returns the result')

  def leaking(self, eqn: Equation) -> dict[str, str]:
    """Groups that an equation sums away without a kernel."""
    found = {}
    for pair in contracted(eqn):
      if all(value in self.data for value, _ in pair):
        for name in self.names(over(pair)):
          found[name] = f'{eqn.why} multiplies two arrays of data over it'
    if any(value in self.data for value in eqn.inputs):
      for name in self.names(eqn.reductions):
        found[name] = f'{eqn.why} reduces over it'
    return found

  def members(self, name: str) -> tuple[Member, ...]:
    """The slices of leaves that are the rows of all kernels that read it."""
    atom, found = self.atoms[name], dict[Member, None]()
    kernels = [
      (r.kernel, self.typed(r.kernel)[r.axis]) for r in self.reads[name]
    ]
    scaled: dict[Value, set[Axis]] = {}
    for kernel, axis in kernels:
      why = self.scales(kernel, set(ax.atoms(axis)), scaled)
      if why is not None:
        self.refuse(name, why)
        return ()
    readers = {(eqn, kernel) for eqn, kernel, _ in self.reads[name]}
    for value, own in scaled.items():
      why = self.misused(value, scaled, readers)
      if why is not None:
        self.refuse(name, why)
        return ()
      path = self.paths.get(value)
      if path is None:
        continue
      for k, (axis, fresh) in enumerate(
        zip(self.leaves[path].axes, self.typed(value), strict=True)
      ):
        touched = np.zeros(ax.find(fresh).size, bool)
        for part, labels in occurrences(fresh):
          touched |= (labels >= 0) & (part in own)
        for part, labels in occurrences(axis):
          if part is atom and np.any(touched & (labels >= 0)):
            found[member(path, k, labels)] = None
    return tuple(found)

  def scales(
    self, value: Value, own: set[Axis], scaled: dict[Value, set[Axis]]
  ) -> str | None:
    """Notes the values that scale with a kernel, down to its leaves.

    Args:
      value: a value made of leaves.
      own: the atoms (of the second typing) whose rows are scaled.
      scaled: value -> atoms, extended.

    Returns:
      Why the kernel does not scale as its leaves do, or None.
    """
    if own <= scaled.get(value, set()):
      return None
    if not any(own & set(ax.atoms(axis)) for axis in self.typed(value)):
      return 'a product reads it with what no leaf scales along it'
    scaled.setdefault(value, set()).update(own)
    if value in self.paths:
      return None
    makers = self.flow.makers.get(value, ())
    if len(makers) != 1:
      return 'a kernel that reads it is a constant or comes out of a loop'
    (step,) = makers
    if isinstance(step, Binding):
      return self.scales(step.source, own, scaled)
    needed = linear_operands(self.flow, step)
    why: str | None = f'{step.why} is not linear in a kernel that reads it'
    if needed is None:
      return why
    operands = [step.inputs[k] for k in needed]
    if step.primitive.name in PRODUCTS:
      for operand in reversed(operands):
        tried = {v: set(s) for v, s in scaled.items()}
        why = self.scales(operand, own, tried)
        if why is None:
          scaled.update(tried)
          return None
      return why
    if step.primitive.name == 'concatenate':
      runs = lambda v: any(own & set(ax.atoms(a)) for a in self.typed(v))
      operands = [v for v in operands if runs(v)]
    for operand in operands:
      why = self.scales(operand, own, scaled)
      if why is not None:
        return why
    return None

  def misused(
    self,
    value: Value,
    scaled: Mapping[Value, set[Axis]],
    readers: set[tuple[Equation, Value]],
  ) -> str | None:
    """Why a scaled value would act elsewhere too, or None."""
    if value in self.flow.outputs:
      return 'the function returns a kernel that reads it'
    for step in self.flow.uses.get(value, ()):
      if isinstance(step, Equation) and (step, value) in readers:
        continue
      if not any(out in scaled for out in made(step)):
        why = step.why if isinstance(step, Equation) else 'a loop'
        leaf = self.paths.get(value, 'a kernel that reads it')
        return f'{why} uses {leaf} in another way'
      if (
        isinstance(step, Equation)
        and step.primitive.name in PRODUCTS
        and sum(v in scaled for v in step.inputs) > 1
      ):
        return f'{step.why} multiplies two kernels that read it'
    return None


_LAYOUT_NAMES = """
  broadcast_in_dim convert_element_type copy copy_p cumsum dynamic_slice
  expand_dims gather name neg reduce_precision reduce_sum reshape rev slice
  split squeeze stop_gradient tile transpose unstack
"""
LAYOUT = frozenset(_LAYOUT_NAMES.split())
SUMS = frozenset(['add', 'add_any', 'concatenate', 'stack', 'sub'])
PRODUCTS = frozenset(['conv_general_dilated', 'div', 'dot_general', 'mul'])


def linear_operands(stream: Flow, eqn: Equation) -> Sequence[int] | None:
  """Returns the operands in which an operation is linear and without offset.

  All of them must scale for the result of a sum to scale, any one of them for
  that of a product; None if there is no such operand.
  """
  name = eqn.primitive.name
  zero = stream.is_zero
  if name in LAYOUT or name == 'div':
    return [0]
  if name == 'pad':
    return [0] if zero(eqn.inputs[1]) else None
  if name == 'select_n':
    return [k for k, v in enumerate(eqn.inputs) if k and not zero(v)]
  if name in SUMS:
    return [k for k, v in enumerate(eqn.inputs) if not zero(v)]
  return [0, 1] if name in PRODUCTS else None


def over(pair: tuple[tuple[Value, int], ...]) -> list[Axis]:
  """Returns what a pair of :func:`contracted` sums over: the kernel's axis.

  The channels of a grouped convolution's data are more: groups of it.
  """
  value, k = pair[-1]
  return [value.axes[k]]


def contracted(eqn: Equation) -> list[tuple[tuple[Value, int], ...]]:
  """Returns the axes that a product sums over: pairs of (operand, axis)."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    left, right = eqn.inputs
    over, _ = params['dimension_numbers']
    return [((left, a), (right, b)) for a, b in zip(*over, strict=True)]
  if name == 'conv_general_dilated' and eqn.products is not None:
    data, kernel = eqn.inputs
    numbers = params['dimension_numbers']
    return [((data, numbers.lhs_spec[1]), (kernel, numbers.rhs_spec[1]))]
  return []
