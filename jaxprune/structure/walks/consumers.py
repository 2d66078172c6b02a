"""Readers: the one place on each path where a real-valued gate may act.

A mask may sit on every slice of a group at once; a gate of 0.3 may not, for it
would count once for each. A gate acts where the group's data are *read*: in a
matrix product or convolution with a kernel, over the group's axis. There the
gate on the data and the gate on the kernel's rows are the same number, so
:func:`scale` needs the params alone.

With 4 hidden units, ``h = tanh(x @ a); y = h @ b``, a[2, 4] and b[4, 3]: the
group has slices ``a[:, u]`` and ``b[u, :]``. A gate g on unit u that scaled
``a[:, u]`` would compute tanh(g z), not g tanh(z); one that scaled both would
count twice. The product that reads h contracts axis 0 of b, so the gate acts on
``b[u, :]`` alone: (g h_u) b[u, :] = h_u (g b[u, :]).
"""

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxprune.structure import rules
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.slices import Leaf, Member, member, occurrences
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.walks import scaling
from jaxprune.structure.walks.flow import Binding, Flow, made, read


class Readers(NamedTuple):
  """Where gates of groups act, and where they cannot.

  Attributes:
    members: group -> the slices of leaves that read it.
    refused: group -> why a gate cannot act on some path.
    counted: group of ``members`` -> what counts a unit before its gate does,
      as the statistics of a norm do: a gate of 0 does not make it absent.
  """

  members: dict[str, tuple[Member, ...]]
  refused: dict[str, str]
  counted: dict[str, str]


class _Read(NamedTuple):
  """A product that contracts an axis of a kernel with one of data."""

  eqn: Equation
  kernel: Value
  axis: int


def readers(
  stream: Flow, leaves: Mapping[str, Leaf], atoms: Mapping[str, Axis]
) -> Readers:
  """Returns the slices of the kernels that read each group.

  A group is refused if its data reach a product or an output past no kernel's
  rows (two arrays of data multiplied over it, a mean over it that leaves the
  group), or if a kernel does not scale as its leaf does (it is normalised, or
  used elsewhere too). A norm over the group passes, and the gate comes after.

  Args:
    stream: the flow of the program, whose first inputs are the leaves.
    leaves: path -> leaf, in the order of the inputs.
    atoms: group -> its axis.
  """
  return _Search(stream, leaves, atoms).result()


class _Search:
  """Searches a program for the kernels that read each group.

  A group *leaks* where a reduction or a product of two arrays of data mixes its
  units before any kernel reads them: no gate after that can act on one unit.
  """

  def __init__(
    self,
    stream: Flow,
    leaves: Mapping[str, Leaf],
    atoms: Mapping[str, Axis],
  ):
    self.flow = stream
    self.leaves = leaves
    self.groups = {atom: name for name, atom in atoms.items()}
    self.atoms = atoms
    self.paths = dict(zip(stream.inputs, leaves, strict=False))
    arguments = stream.inputs[len(leaves) :]
    self.data = stream.descendants(arguments, ())
    self.refused: dict[str, str] = {}
    self.counted: dict[str, str] = {}
    self.fresh = apart(stream, self.data)
    self.reads: dict[str, list[_Read]] = {}

  def result(self) -> Readers:
    for step in self.flow.steps:
      if isinstance(step, Equation):
        self.find_reads(step)
    self.follow_leaks()
    members = {}
    for name in self.atoms:
      if name not in self.reads and name not in self.refused:
        self.refuse(name, 'no product reads it')
      if name not in self.refused:
        slices = self.members(name)
        if name not in self.refused:  # Collecting the members may refuse it.
          members[name] = slices
    refused = {n: self.refused[n] for n in self.atoms if n in self.refused}
    counted = {n: self.counted[n] for n in members if n in self.counted}
    return Readers(members, refused, counted)

  def refuse(self, name: str, why: str) -> None:
    """Notes why a group has no gate; the first reason stands."""
    self.refused.setdefault(name, why)

  def names(self, axes: Iterable[Axis]) -> list[str]:
    """The groups that occur in some axes."""
    names = (self.groups.get(atom) for axis in axes for atom in ax.atoms(axis))
    return list(dict.fromkeys(name for name in names if name is not None))

  def typed(self, value: Value) -> list[Axis]:
    """The axes of a value made of leaves alone, as :func:`apart` types them."""
    return types_of(self.fresh, value)

  def find_reads(self, eqn: Equation) -> None:
    """Notes the kernels that read a group in a product."""
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
    leaks: dict[Value, dict[str, str]] = {}  # Value -> group -> reason.
    # Until nothing changes: the carry of a loop feeds steps before its end.
    changed = True
    while changed:
      changed = False
      for step in self.flow.steps:
        coming: dict[str, str] = {}
        for value in read(step):
          coming.update(leaks.get(value, {}))
        if isinstance(step, Equation):
          self.note_counts(step)
          if step.products is not None:
            for name, why in coming.items():
              self.refuse(name, f'{why}, and {step.why} reads the result')
            coming = {}
          coming.update(self.leaking(step))
        if not coming:
          continue
        for out in made(step):
          meets = self.names(out.axes)
          leaving = {n: why for n, why in coming.items() if n not in meets}
          reasons = leaks.setdefault(out, {})
          changed = changed or not leaving.keys() <= reasons.keys()
          reasons.update(leaving)
    for out in self.flow.outputs:
      for name, why in leaks.get(out, {}).items():
        self.refuse(name, f'{why}, and the function returns the result')

  def note_counts(self, eqn: Equation) -> None:
    """Notes groups whose units an equation counts, by data or in a number."""
    counted = self.leaking(eqn)
    # A number that follows from the width, in a kernel too: w / sqrt(d).
    if any(value.recompute is not None for value in eqn.inputs):
      for name in self.names(eqn.reductions):
        counted[name] = f'a number in {eqn.why} follows from its size'
    self.counted = counted | self.counted

  def leaking(self, eqn: Equation) -> dict[str, str]:
    """Groups that an equation sums away without a kernel."""
    reasons = {}
    for pair in contracted(eqn):
      if all(value in self.data for value, _ in pair):
        for name in self.names(over(pair)):
          reasons[name] = f'{eqn.why} multiplies two arrays of data over it'
    if any(value in self.data for value in eqn.inputs):
      for name in self.names(eqn.reductions):
        reasons[name] = f'{eqn.why} reduces over it'
    return reasons

  def members(self, name: str) -> tuple[Member, ...]:
    """The slices of leaves that are the rows of all kernels that read it."""
    scaled: dict[Value, set[Axis]] = {}
    for _, kernel, k in self.reads[name]:
      # Back from the kernel to its leaves, along its rows: of (s * w)[r, :],
      # either w or a vector s over r can carry the gate, a scalar s cannot.
      rows = set(ax.atoms(self.typed(kernel)[k]))

      def has_rows(v: Value, rows: set[Axis] = rows) -> bool:
        return any(rows & set(ax.atoms(axis)) for axis in self.typed(v))

      passed: set[Value] = set()
      why = scaling.walk(self.flow, kernel, self.paths, passed, runs=has_rows)
      if why is not None:
        self.refuse(name, f'of a kernel that reads it: {why}')
        return ()
      for value in passed:
        scaled.setdefault(value, set()).update(rows)
    readers = {(eqn, kernel) for eqn, kernel, _ in self.reads[name]}
    # Whoever else uses a scaled value would see the gate too.
    wrong = scaling.misuse(
      self.flow, scaled, scaled, lambda eqn, value: (eqn, value) in readers
    )
    if wrong is not None:
      value, why = wrong
      kernel = self.paths.get(value, 'a kernel')
      self.refuse(name, f'{kernel} reads it, and {why}')
      return ()
    members = dict[Member, None]()
    for value, path in self.paths.items():
      if value in scaled:
        members |= dict.fromkeys(self.rows(name, path, value, scaled[value]))
    return tuple(members)

  def rows(
    self, name: str, path: str, value: Value, scaled: set[Axis]
  ) -> Iterable[Member]:
    """The slices of a leaf that are of a group and on the scaled axes.

    A square kernel w[4, 4] of one group has it on both axes, and only the axis
    that the kernel's readers contract is scaled: the second typing tells.
    """
    axes = zip(self.leaves[path].axes, self.typed(value), strict=True)
    for k, (axis, fresh) in enumerate(axes):
      touched = np.zeros(ax.find(fresh).size, bool)
      for atom, labels in occurrences(fresh):
        touched |= (labels >= 0) & (atom in scaled)
      for atom, labels in occurrences(axis):
        if atom is self.atoms[name] and np.any(touched & (labels >= 0)):
          yield member(path, k, labels)


def apart(stream: Flow, data: Container[Value]) -> dict[Value, list[Axis]]:
  """Re-infers axis types of leaf-only values, a fresh atom per leaf axis.

  Equal types then say from which axis of which leaf an axis of a kernel
  comes, where the first typing makes both axes of a square kernel one. For
  ``w.T`` with w[4, 4], tied in the graph, it is [q, p] for the leaf's [p, q].

  Args:
    stream: the flow of the program.
    data: the values that are not typed.
  """
  fresh: dict[Value, list[Axis]] = {}
  for step in stream.steps:
    if any(out in data for out in made(step)):
      continue
    if isinstance(step, Binding):
      # A scan reads a leaf [2, 4] as slices of [4] and stacks [4] to [2, 4]:
      # the leading axis goes, or a new one comes.
      axes, rank = types_of(fresh, step.source), len(step.target.shape)
      lost = max(len(axes) - rank, 0)
      new = [ax.atom(n) for n in step.target.shape[: rank - len(axes) + lost]]
      fresh.setdefault(step.target, [*new, *axes[lost:]])
      continue
    inputs = [
      Value(v.shape, v.dtype, types_of(fresh, v), v.constant)
      for v in step.inputs
    ]
    outputs = [Value(v.shape, v.dtype) for v in step.outputs]
    rules.infer(
      Equation(step.primitive, dict(step.params), inputs, outputs, step.why)
    )
    for old, new in zip(step.outputs, outputs, strict=True):
      fresh[old] = new.axes
  return fresh


def types_of(fresh: dict[Value, list[Axis]], value: Value) -> list[Axis]:
  """Returns the types of a value's axes among those of :func:`apart`."""
  if value not in fresh:
    fresh[value] = [ax.atom(n) for n in value.shape]
  return fresh[value]


def over(pair: tuple[tuple[Value, int], ...]) -> list[Axis]:
  """Returns what a pair of :func:`contracted` sums over: the kernel's axis.

  Not the data's: of 6 channels in 2 groups a grouped convolution sums over 3.
  """
  value, k = pair[-1]
  return [value.axes[k]]


def contracted(eqn: Equation) -> list[tuple[tuple[Value, int], ...]]:
  """Returns the axes that a product sums over: pairs of (operand, axis)."""
  name, params = eqn.primitive.name, eqn.params
  over = rules.contraction(eqn)
  if over is not None:
    left, right = eqn.inputs[:2]
    return [((left, a), (right, b)) for a, b in zip(*over, strict=True)]
  if name == 'conv_general_dilated' and eqn.products is not None:
    data, kernel = eqn.inputs
    numbers = params['dimension_numbers']
    return [((data, numbers.lhs_spec[1]), (kernel, numbers.rhs_spec[1]))]
  return []
