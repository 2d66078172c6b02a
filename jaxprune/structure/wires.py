"""The wiring of a traced function: who writes and who reads which channels.

What :mod:`jaxprune.lookahead` needs to know of a network, from its trace: for
each kernel the channels it reads and writes, as numbers that hold across
flattens, concatenations, residual sums and groups, and the normalisations in
between. The program is typed once more, with kernels in the place of walls:
what a depthwise convolution writes is not what it reads.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune import lookahead
from jaxprune.structure import axes as ax
from jaxprune.structure import rules
from jaxprune.structure.axes import Axis
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import Program
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.slices import occurrences

SPACE = 'channels'  # One space numbers the channels of the whole network.


class _Factor(NamedTuple):
  """A normalisation on the way of data, and the axis that it runs over."""

  norm: lookahead.Norm
  axis: Axis


class _Trail(NamedTuple):
  """Where data come from: through which norms, and since which kernel."""

  writer: str | None = None
  factors: tuple[_Factor, ...] = ()


class _Use(NamedTuple):
  """A product of data and a kernel, in the second typing."""

  path: str
  read: Axis  # Of the data, the axis that is contracted (or convolved).
  into: tuple[int, ...]  # The kernel's axes that run over it.
  groups: int
  written: Axis  # Of the result.
  out: int  # The kernel's axis that runs over it.
  trail: _Trail  # Of the data.


def wiring(graph: Graph) -> dict[str, lookahead.Wire]:
  """Returns the wiring of the kernels of a traced function.

  A kernel is a leaf that multiplies data in a matrix product, a convolution, or
  (a depthwise convolution written as shifts) a plain product; it must enter as
  it is, but for its dtype and the order of its axes. A BatchNorm that reads its
  statistics (``scale / sqrt(var + eps)``, so trace the eval form) counts where
  it stands: on the branch of a residual sum that it is on, and once, whatever
  is flattened or concatenated after it.

  Args:
    graph: of :func:`jaxprune.trace`.

  Returns:
    path -> :class:`jaxprune.lookahead.Wire`, in the order of the forward pass.
    The paths are those of the traced params: pass the same pytree as ``params``
    of :func:`jaxprune.lookahead.lookahead`. Kernels inside loops and branches
    are left out.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace, wiring
    >>> params = {'a': jnp.ones((1, 2)), 'b': jnp.ones((2, 3))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 1)))
    >>> wires = wiring(graph)
    >>> wires['a'].writes.channels.tolist(), wires['b'].reads.channels.tolist()
    ([0, 1], [0, 1])
  """
  second = _Second(graph)
  second.walk(graph.program)
  number = _Numbering(use.written for use in second.uses)
  wires: dict[str, lookahead.Wire] = {}
  for use in second.uses:
    if use.path in wires:
      continue  # A kernel used twice is wired where it is used first.
    read = number(use.read)
    if use.groups > 1:
      shape = graph.leaves[use.path].shape
      each = read.size // use.groups
      out = np.arange(shape[use.out]) // (shape[use.out] // use.groups)
      inner, outer = np.arange(each)[:, None], out[None]
      read = read[outer * each + inner]
      if len(use.into) == 1:
        read = read[0]
      elif use.into[0] == use.out:
        read = read.T
    # What a sum has given to the kernel before is not the reader's too.
    given = second.flushed.get(use.trail.writer or '', ())
    own = use.trail.factors[len(given) :]
    written = number(use.written)
    left = second.flushed.get(use.path, ())
    wires[use.path] = lookahead.Wire(
      lookahead.Side(
        SPACE, tuple(sorted(use.into)), read, number.norms(own, read)
      ),
      lookahead.Side(SPACE, (use.out,), written, number.norms(left, written)),
    )
  return wires


class _Numbering:
  """Numbers the entries of axes: equal types, equal numbers."""

  def __init__(self, written: Any):
    self.atoms = {atom for axis in written for atom in ax.atoms(axis)}
    self.bases: dict[tuple[Axis, ...], int] = {}
    self.total = 0

  def __call__(self, axis: Axis) -> np.ndarray:
    """Returns the number of each entry, -1 where no kernel writes it."""
    return np.concatenate([self._term(term) for term in ax.terms(axis)])

  def norms(
    self, found: Iterable[_Factor], channels: np.ndarray
  ) -> tuple[lookahead.Norm, ...]:
    """Returns norms with the entry of their vectors for each channel."""
    norms = []
    for norm, axis in found:
      place = np.zeros(self.total + 1, int)  # The last is for channel -1.
      own = self(axis)
      place[own] = np.arange(own.size)
      norms.append(norm._replace(entries=place[channels]))
    return tuple(norms)

  def _term(self, term: Axis) -> np.ndarray:
    found = [(a, n) for a, n in occurrences(term) if a in self.atoms]
    key = tuple(atom for atom, _ in found)
    if not key:
      return np.full(ax.find(term).size, -1)
    if key not in self.bases:
      self.bases[key] = self.total
      self.total += math.prod(atom.size for atom in key)
    index = np.zeros(ax.find(term).size, int)
    for atom, labels in found:
      index = index * atom.size + labels
    return self.bases[key] + index


class _Second:
  """The second typing: walks a program, and notes uses of kernels."""

  def __init__(self, graph: Graph):
    self.graph = graph
    self.values: dict[Value, Value] = {}
    self.trails: dict[Value, _Trail] = {}
    self.makers: dict[Value, Equation] = {}
    self.aliases: dict[Value, Value] = {}
    self.leaf_axes: dict[int, tuple[str, int]] = {}
    self.uses: list[_Use] = []
    self.flushed: dict[str, tuple[_Factor, ...]] = {}
    leaves = zip(graph.leaves, graph.program.inputs, strict=False)
    for path, value in leaves:
      new = self.value(value)
      for k, axis in enumerate(new.axes):
        self.leaf_axes[id(axis)] = (path, k)

  def value(self, old: Value) -> Value:
    """The value of the second typing; a fresh one for inputs and constants."""
    if old not in self.values:
      fresh = [ax.atom(n) for n in old.shape]
      self.values[old] = Value(old.shape, old.dtype, fresh, old.constant)
    return self.values[old]

  def trail(self, old: Value) -> _Trail:
    return self.trails.get(old, _Trail())

  def flush(self, old: Value) -> None:
    """Gives the norms on the way to a sum to the kernel they follow."""
    writer, found = self.trail(old)
    if writer is not None and found:
      self.flushed.setdefault(writer, found)

  def walk(self, program: Program) -> None:
    for eqn in program.equations:
      if len(eqn.programs) == 1 and eqn.primitive.name != 'scan':
        (body,) = eqn.programs
        for inner, outer in zip(body.inputs, eqn.inputs, strict=True):
          self.values[inner] = self.value(outer)
          self.trails[inner] = self.trail(outer)
          self.aliases[inner] = outer
        self.walk(body)
        for inner, outer in zip(body.outputs, eqn.outputs, strict=True):
          self.values[outer] = self.value(inner)
          self.trails[outer] = self.trail(inner)
          self.aliases[outer] = inner
        continue
      for out in eqn.outputs:
        self.makers[out] = eqn
      if not self.product(eqn):
        self.retype(eqn)
        self.follow(eqn)

  def retype(self, eqn: Equation) -> None:
    inputs = [self.value(v) for v in eqn.inputs]
    outputs = [Value(v.shape, v.dtype) for v in eqn.outputs]
    new = Equation(eqn.primitive, eqn.params, inputs, outputs, eqn.why)
    if eqn.programs:
      rules.lock_all(new, eqn.why)
    else:
      rules.infer(new)
    self.values.update(zip(eqn.outputs, outputs, strict=True))

  def follow(self, eqn: Equation) -> None:
    """Carries the trail through an equation, over norms and past sums."""
    data = [v for v in eqn.inputs if v.has_data]
    trail = _Trail()
    if len(data) == 1:
      trail = self.trail(data[0])
      others = [v for v in eqn.inputs if not v.has_data and v.sources]
      if eqn.primitive.name in ('mul', 'div') and others:
        norm = self.norm(others[0])
        wide = [k for k, n in enumerate(others[0].shape) if n != 1]
        if norm is not None and len(wide) == 1:
          offset = len(data[0].shape) - len(others[0].shape)
          axis = self.value(data[0]).axes[wide[0] + offset]
          factor = _Factor(norm, axis)
          trail = trail._replace(factors=(*trail.factors, factor))
    else:
      for value in data:
        self.flush(value)
    for out in eqn.outputs:
      self.trails[out] = trail

  def product(self, eqn: Equation) -> bool:
    """Notes the use of a kernel, typing its result; False if it is none."""
    name = eqn.primitive.name
    kernels = [
      (k, path)
      for k, value in enumerate(eqn.inputs)
      if not value.has_data and (path := self.kernel(value)) is not None
    ]
    data = [v for v in eqn.inputs if v.has_data]
    if len(kernels) != 1 or len(data) != 1:
      return False
    ((place, path),) = kernels
    kernel, x = self.value(eqn.inputs[place]), self.value(data[0])
    out = Value(eqn.outputs[0].shape, eqn.outputs[0].dtype)
    axes = [self.leaf_axes.get(id(axis), (path, -1))[1] for axis in kernel.axes]
    groups = 1
    if name == 'conv_general_dilated':
      numbers = eqn.params['dimension_numbers']
      groups = eqn.params['feature_group_count']
      k_out, k_in = numbers.rhs_spec[:2]
      channel, position = numbers.lhs_spec[1], numbers.out_spec[1]
      out.axes = [ax.atom(n) for n in out.shape]
      out.axes[numbers.out_spec[0]] = x.axes[numbers.lhs_spec[0]]
      into = (axes[k_in],) if groups == 1 else (axes[k_in], axes[k_out])
    elif name == 'dot_general':
      contract, batch = eqn.params['dimension_numbers']
      free = [
        k
        for k in range(len(kernel.axes))
        if k not in contract[place] and k not in batch[place]
      ]
      if len(contract[0]) != 1 or batch[0] or len(free) != 1:
        return False
      (k_in,), (channel,) = contract[place], contract[1 - place]
      (k_out,) = free
      kept = [a for k, a in enumerate(x.axes) if k != channel]
      position = 0 if place == 0 else len(kept)
      out.axes = [*kept[:position], kernel.axes[k_out], *kept[position:]]
      into = (axes[k_in],)
    elif name == 'mul' and len(self.graph.leaves[path].shape) > 3:
      # One tap of a depthwise convolution: kernel entries along one axis.
      wide = [k for k, n in enumerate(eqn.inputs[place].shape) if n != 1]
      if len(wide) != 1:
        return False
      (k_out,) = wide
      channel = position = k_out
      groups = out.shape[k_out]
      out.axes = list(x.axes)
      into = (axes[k_out],)
    else:
      return False
    if -1 in into or axes[k_out] == -1:
      return False
    out.axes[position] = kernel.axes[k_out]
    if groups == 1:
      k = kernel.axes.index(
        next(a for a, n in zip(kernel.axes, axes, strict=True) if n == into[0])
      )
      ax.unify(x.axes[channel], kernel.axes[k], eqn.why)
    self.values[eqn.outputs[0]] = out
    self.trails[eqn.outputs[0]] = _Trail(path)
    self.uses.append(
      _Use(
        path,
        x.axes[channel],
        into,
        groups,
        kernel.axes[k_out],
        axes[k_out],
        self.trail(data[0]),
      )
    )
    return True

  def kernel(self, value: Value) -> str | None:
    """The leaf that a value is, but for layout and dtype."""
    if len(value.sources) != 1:
      return None
    (path,) = value.sources
    return path if len(self.graph.leaves[path].shape) > 1 else None

  def norm(self, value: Value) -> lookahead.Norm | None:
    """Reads scale / sqrt(var + eps) off what multiplies data."""
    found = self.factors(value)
    if found is None or len(found.get('scale', ())) > 1:
      return None
    scale = found.get('scale', (None,))[0]
    var, eps = found.get('var', (None, 0.0))
    return lookahead.Norm(scale, var, eps)

  def factors(self, value: Value) -> Mapping[str, Any] | None:
    """The leaves that a value multiplies: scales, and 1 / sqrt(var + eps)."""
    while value in self.aliases:
      value = self.aliases[value]
    eqn = self.makers.get(value)
    if eqn is None:
      one = len(value.sources) == 1 and value.constant is None
      return {'scale': tuple(value.sources)} if one else None
    name = eqn.primitive.name
    if name in _LAYOUT:
      return self.factors(eqn.inputs[0])
    if name == 'mul':
      parts = [self.factors(v) for v in eqn.inputs]
      if None in parts:
        return None
      merged: dict[str, Any] = {}
      for part in parts:
        for key, leaves in (part or {}).items():
          if key in merged:
            return None
          merged[key] = leaves
      return merged
    if name == 'rsqrt':
      return self.variance(eqn.inputs[0])
    return None

  def variance(self, value: Value) -> Mapping[str, Any] | None:
    """The leaf and eps of var + eps."""
    eqn = self.makers.get(value)
    while eqn is not None and eqn.primitive.name in _LAYOUT:
      value = eqn.inputs[0]
      eqn = self.makers.get(value)
    if eqn is None or eqn.primitive.name != 'add':
      return None
    known = [v for v in eqn.inputs if v.constant is not None]
    (leaf,) = [v for v in eqn.inputs if v.constant is None] or [None]
    if len(known) != 1 or leaf is None or len(leaf.sources) != 1:
      return None
    (path,) = leaf.sources
    return {'var': (path, float(np.asarray(known[0].constant)))}


_LAYOUT = frozenset(
  ['broadcast_in_dim', 'convert_element_type', 'copy', 'expand_dims',
   'reshape', 'squeeze', 'transpose']
)  # fmt: skip
