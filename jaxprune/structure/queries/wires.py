"""The wiring of a traced function: who writes and who reads which channels.

What :mod:`jaxprune.scores.lookahead` needs to know of a network, from its
trace: for each kernel the channels it reads and writes, as numbers that hold
across flattens, concatenations, residual sums and groups, and the
normalisations in between. The program is typed once more, with kernels in the
place of walls: what a depthwise convolution writes is not what it reads.
"""

import math
import warnings
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.scores import lookahead
from jaxprune.structure import rules
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.slices import occurrences
from jaxprune.structure.program.typed import Program
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.primitives import LAYOUT, where

SPACE = 'channels'  # One space numbers the channels of the whole network.
_Powers = dict[tuple[str, float], float]  # (leaf, number added) -> power.


class _Factor(NamedTuple):
  """A normalisation on the way of data, and the axis that it runs over."""

  norm: lookahead.Norm
  axis: Axis | None  # None: one number for all channels.
  why: str  # Where it stands.


class _Trail(NamedTuple):
  """Where data come from: through which norms, and since which kernel."""

  writer: str | None = None
  factors: tuple[_Factor, ...] = ()


class _Use(NamedTuple):
  """A product of data and a kernel, in the second typing."""

  path: str
  read: tuple[Axis, ...]  # Of the data: what is contracted (or convolved).
  into: tuple[int, ...]  # The kernel's axes that run over it.
  groups: int
  written: tuple[Axis, ...]  # Of the result.
  out: tuple[int, ...]  # The kernel's axes that run over it.
  trail: _Trail  # Of the data.
  why: str


@kinds.checked
def wiring(graph: Graph) -> dict[str, lookahead.Wire]:
  """Returns the wiring of the kernels of a traced function.

  A kernel is a leaf that multiplies data in a matrix product, a convolution, or
  (a depthwise convolution written as shifts) a plain product; it must enter as
  it is, but for its dtype and the order of its axes, of which several may be
  contracted or stay (the heads of an attention). A BatchNorm that reads its
  statistics from leaves (``scale / sqrt(var + eps)``, so trace the eval form)
  counts where it stands: on the branch of a residual sum that it is on, and
  once, whatever is flattened or concatenated after it.

  What this cannot say of a network it leaves out, with a warning that names
  it; :func:`unwired` returns the same as data.

  Args:
    graph: of :func:`jaxprune.trace`.

  Returns:
    path -> :class:`jaxprune.scores.lookahead.Wire`, in the order of the forward
    pass. The paths are those of the traced params: pass the same pytree as
    ``params`` of :func:`jaxprune.scores.lookahead.lookahead`.

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
  wires, refused = _wire(graph)
  if refused:
    reasons = '; '.join(f'{path!r}: {why}' for path, why in refused.items())
    warnings.warn(f'Not in the wiring: {reasons}.', stacklevel=2)
  return wires


@kinds.checked
def unwired(graph: Graph) -> dict[str, str]:
  """Returns what :func:`wiring` leaves out: path of a leaf -> the reason.

  These are kernels without a wire, or with one that is not all there is to
  say, and factors on the way of data that no norm stands for.

  Args:
    graph: of :func:`jaxprune.trace`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jaxprune.structure import trace, unwired
    >>> params = {'a': jnp.ones((2, 2))}
    >>> graph = trace(lambda p, x: x @ -p['a'], params, jnp.ones((1, 2)))
    >>> list(unwired(graph))
    ['a']
  """
  return _wire(graph)[1]


def _wire(graph: Graph) -> tuple[dict[str, lookahead.Wire], dict[str, str]]:
  """Returns the wiring, and why some leaves are not in it."""
  second = _Second(graph)
  second.walk(graph.program)
  refused = second.refused
  number = _Numbering([use.written for use in second.uses], refused)
  wires: dict[str, lookahead.Wire] = {}
  marks: dict[str, tuple[object, ...]] = {}
  for use in second.uses:
    read = number.side(use.path, use.read)
    if use.groups > 1:
      read = _grouped(read, use, graph.leaves[use.path].shape)
    into, read = _ascending(use.into, read)
    # What a sum has given to the kernel before is not the reader's too.
    given = second.flushed.get(use.trail.writer or '', ())
    own = use.trail.factors[len(given) :]
    out, written = _ascending(use.out, number.side(use.path, use.written))
    left = second.flushed.get(use.path, ())
    wire = lookahead.Wire(
      lookahead.Side(SPACE, into, read, number.norms(own, read)),
      lookahead.Side(SPACE, out, written, number.norms(left, written)),
    )
    mark = (into, out, read.tobytes(), written.tobytes())
    if use.path not in wires:
      wires[use.path], marks[use.path] = wire, mark
    elif into != out or mark != marks[use.path]:  # It is not another tap.
      refused.setdefault(
        use.path, f'{use.why} uses it again; it is wired where it is used first'
      )
  for path, leaf in graph.leaves.items():
    if path not in wires and tree.is_prunable(path, leaf):
      refused.setdefault(path, 'it multiplies no data as it is')
  return wires, refused


def _ascending(
  axes: Sequence[int], channels: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray]:
  """Returns axes of a leaf in order, and the channels along them."""
  order = np.argsort(axes)
  return tuple(axes[k] for k in order), channels.transpose(order)


def _grouped(read: np.ndarray, use: _Use, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the channels along (input, output) of a grouped kernel."""
  (k_out,) = use.out
  each = read.size // use.groups
  group = np.arange(shape[k_out]) // (shape[k_out] // use.groups)
  read = read[group[None] * each + np.arange(each)[:, None]]
  return read[0] if len(use.into) == 1 else read


class _Numbering:
  """Numbers the entries of axes: equal types, equal numbers."""

  def __init__(
    self, written: Sequence[tuple[Axis, ...]], refused: dict[str, str]
  ):
    self.refused = refused
    self.order: dict[Axis, int] = {}
    for axis in (axis for axes in written for axis in axes):
      for atom in ax.atoms(axis):
        self.order.setdefault(atom, len(self.order))
    self.bases: dict[tuple[Axis, ...], int] = {}
    self.total = 0
    for axes in written:
      for key, _, _ in self._entries(_all(axes)):
        if key and key not in self.bases:
          self.bases[key] = self.total
          self.total += math.prod(atom.size for atom in key)

  def side(self, path: str, axes: tuple[Axis, ...]) -> np.ndarray:
    """Returns the number of each entry, -1 where no kernel writes it."""
    numbers, partly = self._numbers(_all(axes))
    if partly:
      self.refused.setdefault(
        path, 'it reads some of the axes that others write together, or more'
      )
    return numbers.reshape([ax.find(axis).size for axis in axes])

  def norms(
    self, found: Iterable[_Factor], channels: np.ndarray
  ) -> tuple[lookahead.Norm, ...]:
    """Returns norms with the entry of their vectors for each channel."""
    norms = []
    for norm, axis, why in found:
      if axis is None:
        norms.append(norm._replace(entries=np.zeros(channels.shape, int)))
        continue
      own, _ = self._numbers(axis)
      known = own[own >= 0]
      several = np.unique(known).size < known.size
      if several or not np.isin(channels, [*known, -1]).all():
        self.refused.setdefault(
          norm.scale or norm.var or '', f'{why} runs not over channels alone'
        )
        continue
      place = np.zeros(self.total + 1, int)  # The last is for channel -1.
      place[own] = np.arange(own.size)
      norms.append(norm._replace(entries=place[channels]))
    return tuple(norms)

  def _numbers(self, axis: Axis) -> tuple[np.ndarray, bool]:
    """Returns the number of each entry, and whether some are parts of one."""
    numbers, partly = np.full(ax.find(axis).size, -1), False
    for key, at, index in self._entries(axis):
      if key in self.bases:
        numbers[at] = self.bases[key] + index
      partly = partly or bool(key and key not in self.bases)
    return numbers, partly

  def _entries(
    self, axis: Axis
  ) -> list[tuple[tuple[Axis, ...], np.ndarray, np.ndarray]]:
    """Returns the atoms of the entries: (atoms, entries, index within)."""
    found = [(a, n) for a, n in occurrences(axis) if a in self.order]
    found.sort(key=lambda pair: self.order[pair[0]])
    size = ax.find(axis).size
    labels = np.array([n for _, n in found], int).reshape(len(found), size)
    patterns, which = np.unique(labels >= 0, axis=1, return_inverse=True)
    entries = []
    for k, pattern in enumerate(patterns.T):
      at = np.flatnonzero(which.ravel() == k)
      index = np.zeros(at.size, int)
      own = [pair for pair, there in zip(found, pattern, strict=True) if there]
      for atom, n in own:
        index = index * atom.size + n[at]
      entries.append((tuple(atom for atom, _ in own), at, index))
    return entries


def _all(axes: tuple[Axis, ...]) -> Axis:
  return axes[0] if len(axes) == 1 else ax.product(axes)


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
    self.refused: dict[str, str] = {}
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
        found = self.factors(eqn, data[0], others[0])
        trail = trail._replace(factors=(*trail.factors, *found))
    else:
      for value in data:
        self.flush(value)
    for out in eqn.outputs:
      self.trails[out] = trail

  def product(self, eqn: Equation) -> bool:
    """Notes the use of a kernel, typing its result; False if it is none."""
    name = eqn.primitive.name
    data = [v for v in eqn.inputs if v.has_data]
    leaves = [(k, v) for k, v in enumerate(eqn.inputs) if v.sources]
    leaves = [(k, v) for k, v in leaves if not v.has_data]
    if not data or not leaves:
      return False
    if eqn.programs:
      for _, value in leaves:
        self.refuse(value, f'{eqn.why} is a loop or a branch')
      return False
    if len(data) != 1 or len(leaves) != 1:
      return False
    ((place, value),) = leaves
    path = self.kernel(value, taps=name == 'mul')
    kernel, x = self.value(value), self.value(data[0])
    if path is None:
      if name in ('conv_general_dilated', 'dot_general'):
        self.refuse(value, f'{eqn.why} takes what is computed from it')
      return False
    out = Value(eqn.outputs[0].shape, eqn.outputs[0].dtype)
    axes = [self.leaf_axes.get(id(axis), (path, -1))[1] for axis in kernel.axes]
    groups = 1
    if name == 'conv_general_dilated':
      numbers = eqn.params['dimension_numbers']
      groups = eqn.params['feature_group_count']
      if place == 0 or eqn.params['batch_group_count'] > 1:
        self.refuse(value, f'{eqn.why} takes it for data')
        return False
      k_out, k_in = numbers.rhs_spec[:2]
      free, over, channels = (k_out,), (k_in,), (numbers.lhs_spec[1],)
      out.axes = [ax.atom(n) for n in out.shape]
      out.axes[numbers.out_spec[0]] = x.axes[numbers.lhs_spec[0]]
      out.axes[numbers.out_spec[1]] = kernel.axes[k_out]
      into = over if groups == 1 else (k_in, k_out)
    elif name == 'dot_general':
      contract, batch = eqn.params['dimension_numbers']
      if batch[0]:
        self.refuse(value, f'{eqn.why} shares an axis with the data')
        return False
      into = over = tuple(contract[place])
      channels = tuple(contract[1 - place])
      rank = range(len(kernel.axes))
      free = tuple(k for k in rank if k not in over)
      kept = [a for k, a in enumerate(x.axes) if k not in channels]
      own = [kernel.axes[k] for k in free]
      out.axes = [*own, *kept] if place == 0 else [*kept, *own]
    elif name == 'mul' and len(self.graph.leaves[path].shape) > 3:
      # One tap of a depthwise convolution: kernel entries along one axis.
      wide = tuple(k for k, n in enumerate(value.shape) if n != 1)
      if len(wide) != 1:
        return False
      into = over = free = channels = wide
      groups = out.shape[wide[0]]
      out.axes = list(x.axes)
      out.axes[wide[0]] = kernel.axes[wide[0]]
    else:
      return False
    if not over or not free or -1 in [axes[k] for k in (*into, *free)]:
      self.refuse(value, f'{eqn.why} takes it in another shape')
      return False
    if groups == 1:
      for k, channel in zip(over, channels, strict=True):
        ax.unify(x.axes[channel], kernel.axes[k], eqn.why)
    self.values[eqn.outputs[0]] = out
    self.trails[eqn.outputs[0]] = _Trail(path)
    self.uses.append(
      _Use(
        path,
        tuple(x.axes[k] for k in channels),
        tuple(axes[k] for k in into),
        groups,
        tuple(kernel.axes[k] for k in free),
        tuple(axes[k] for k in free),
        self.trail(data[0]),
        eqn.why,
      )
    )
    return True

  def refuse(self, value: Value, why: str) -> None:
    """Notes why the kernels that a value is made of are not wired."""
    for path in sorted(value.sources):
      if len(self.graph.leaves[path].shape) > 1:
        self.refused.setdefault(path, why)

  def origin(
    self, value: Value, names: Container[str]
  ) -> tuple[Value, Equation | None]:
    """Returns what a value is, but for some operations, and its equation."""
    while True:
      eqn = self.makers.get(value)
      if value in self.aliases:
        value = self.aliases[value]
      elif eqn is not None and eqn.primitive.name in names:
        value = eqn.inputs[0]
      else:
        return value, eqn

  def kernel(self, value: Value, taps: bool) -> str | None:
    """The leaf that a value is, but for layout and dtype, or a slice of it."""
    names = {*_LAYOUT, *_FLIPS, *(_SLICES if taps else ())}
    value, eqn = self.origin(value, names)
    if eqn is not None or len(value.sources) != 1:
      return None
    (path,) = value.sources
    return path if len(self.graph.leaves[path].shape) > 1 else None

  def factors(
    self, eqn: Equation, data: Value, other: Value
  ) -> tuple[_Factor, ...]:
    """Returns what multiplies or divides data as norms, or refuses it."""
    why, powers = eqn.why, self.powers(other)
    if eqn.primitive.name == 'div':
      powers = _times({}, powers, -1) if data is eqn.inputs[0] else None
    norms = None if powers is None else _norms(powers)
    shapes = {path: self.graph.leaves[path].shape for path in other.sources}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    wide = [k for k, n in enumerate(other.shape) if n != 1]
    plain = len(wide) < 2 and all(
      n == max(shapes[path], default=1) and n in (1, math.prod(other.shape))
      for path, n in sizes.items()
    )
    if norms is None or not plain:
      for path in sorted(other.sources):
        self.refused.setdefault(path, f'no norm says what {why} does with it')
      return ()
    axis = None
    if wide:
      offset = len(data.shape) - len(other.shape)
      axis = self.value(data).axes[wide[0] + offset]
    return tuple(
      _Factor(norm, axis if sizes[path] > 1 else None, why)
      for path, norm in norms
    )

  def powers(self, value: Value) -> _Powers | None:
    """Reads a value as a product of powers of leaves plus numbers."""
    value, eqn = self.origin(value, _LAYOUT)
    if eqn is None:
      if value.constant is not None:
        return {} if np.all(np.asarray(value.constant) == 1) else None
      return {(path, 0.0): 1.0 for path in value.sources}
    name = eqn.primitive.name
    if name in ('mul', 'div'):
      left, right = map(self.powers, eqn.inputs)
      return _times(left, right, 1 if name == 'mul' else -1)
    if name == 'add':
      numbers = [n for v in eqn.inputs if (n := self.number(v)) is not None]
      leaves = [v for v in eqn.inputs if self.number(v) is None]
      base = self.powers(leaves[0]) if len(leaves) == 1 else None
      if base is None or list(base.values()) != [1]:
        return None
      ((path, eps),) = base
      return {(path, eps + numbers[0]): 1.0}
    power = {'neg': 1, 'abs': 1, 'square': 2, 'sqrt': 0.5, 'rsqrt': -0.5}.get(
      name, eqn.params['y'] if name == 'integer_pow' else None
    )
    if name == 'pow':
      power = self.number(eqn.inputs[1])
    return (
      None if power is None else _times({}, self.powers(eqn.inputs[0]), power)
    )

  def number(self, value: Value) -> float | None:
    """The number that a constant holds, if it is one throughout."""
    value, _ = self.origin(value, _LAYOUT)
    if value.constant is None:
      return None
    found = np.unique(value.constant)
    is_number = len(found) == 1 and not np.any(np.imag(found))
    return float(np.real(found[0])) if is_number else None


def _times(
  left: _Powers | None, right: _Powers | None, power: float
) -> _Powers | None:
  """Returns left * right ** power."""
  if left is None or right is None:
    return None
  return {
    base: left.get(base, 0.0) + power * right.get(base, 0.0)
    for base in {**left, **right}
  }


def _norms(powers: _Powers) -> list[tuple[str, lookahead.Norm]] | None:
  """Returns norms with the same squares, each with its leaf; None if none."""
  norms = []
  for (path, eps), power in powers.items():
    times = power if power > 0 else -2 * power
    if times % 1 or (power > 0 and eps):
      return None
    one = lookahead.Norm(path) if power > 0 else lookahead.Norm(None, path, eps)
    norms += [(path, one)] * int(times)
  return norms


_LAYOUT = where(moves=LAYOUT)
_FLIPS = where(moves='flips')
_SLICES = where(moves='slices')
