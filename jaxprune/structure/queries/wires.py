"""The wiring of a traced function: who writes and who reads which channels.

What :mod:`jaxprune.scores.lookahead` needs to know of a network, from its
trace: for each kernel the channels it reads and writes, as numbers that hold
across flattens, concatenations, residual sums and groups, and the
normalisations in between. The axes are typed a second time, and now a product
with a kernel ends a type: what a depthwise convolution writes is not what it
reads, although both shrink together in the graph.

A small case: ``h = x @ a; y = relu(h * s) @ b`` with a[2, 4], s[4] and b[4, 3].
The 4 channels that a writes are numbered 0 to 3, the 3 that b writes 4 to 6::

  a  reads [-1, -1] (the input: no kernel writes it)   writes [0, 1, 2, 3]
  b  reads [0, 1, 2, 3], with the norm s on the way    writes [4, 5, 6]

With h of [n, 2, 2] flattened to [n, 4] between the two kernels, the axis that b
reads is a product of two atoms of 2, and entry (i, j) is channel 2 i + j again.
"""

import math
import warnings
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.scores import lookahead
from jaxprune.structure import rules
from jaxprune.structure.graph import Graph
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.program.typed import Program
from jaxprune.structure.queries.channel_numbers import Factor, Numbering
from jaxprune.structure.rules import Equation, Value
from jaxprune.structure.rules.primitives import LAYOUT, where

SPACE = 'channels'  # One space numbers the channels of the whole network.
_Powers = dict[tuple[str, float], float]  # (leaf, number added) -> power.


class _Trail(NamedTuple):
  """Where data come from: the kernel that wrote them, and the norms since."""

  writer: str | None = None
  factors: tuple[Factor, ...] = ()


class _Use(NamedTuple):
  """A product of data and a kernel, in the second typing."""

  path: str  # The leaf that is the kernel.
  read: tuple[Axis, ...]  # Of the data: what is contracted (or convolved).
  into: tuple[int, ...]  # The kernel's axes that run over it.
  groups: int
  written: tuple[Axis, ...]  # Of the result.
  out: tuple[int, ...]  # The kernel's axes that run over it.
  trail: _Trail  # Of the data.
  why: str


class _Product(NamedTuple):
  """How a kernel multiplies data: which axes of each meet, and the result."""

  channels: tuple[int, ...]  # The data's axes that are contracted.
  over: tuple[int, ...]  # The kernel's axes that they meet.
  into: tuple[int, ...]  # The kernel's axes that say what an entry reads.
  free: tuple[int, ...]  # The kernel's axes that run over the result.
  groups: int
  typed: list[Axis]  # Of the result.


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
  retyping = _Retyping(graph)
  retyping.walk(graph.program)
  refused = retyping.refused
  number = Numbering([use.written for use in retyping.uses], refused)
  wires: dict[str, lookahead.Wire] = {}
  marks: dict[str, tuple[object, ...]] = {}
  for use in retyping.uses:
    read = number.side(use.path, use.read)
    if use.groups > 1:
      read = _grouped(read, use, graph.leaves[use.path].shape)
    into, read = _ascending(use.into, read)
    # Each norm counts once. In relu(bn1(x @ a) + skip) @ b the norm bn1 is on
    # a's branch only, so it belongs to what a writes, not to what b reads.
    at_writer = retyping.flushed.get(use.trail.writer or '', ())
    reader_norms = use.trail.factors[len(at_writer) :]
    out, written = _ascending(use.out, number.side(use.path, use.written))
    writer_norms = retyping.flushed.get(use.path, ())
    wire = lookahead.Wire(
      lookahead.Side(SPACE, into, read, number.norms(reader_norms, read)),
      lookahead.Side(SPACE, out, written, number.norms(writer_norms, written)),
    )
    mark = (into, out, read.tobytes(), written.tobytes())
    if use.path not in wires:
      wires[use.path], marks[use.path] = wire, mark
    # A depthwise kernel is used once per tap, in and out along one axis.
    elif into != out or mark != marks[use.path]:
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
  """Returns the channels along (input, output) of a grouped kernel.

  Of data with the channels [0, 1, 2, 3] in 2 groups, a kernel of shape [2, 4]
  (2 inputs in each group, 4 outputs) reads, for its outputs 0 to 3,

    [[0, 0, 2, 2],
     [1, 1, 3, 3]].
  """
  (k_out,) = use.out
  each = read.size // use.groups
  group = np.arange(shape[k_out]) // (shape[k_out] // use.groups)
  read = read[group[None] * each + np.arange(each)[:, None]]
  return read[0] if len(use.into) == 1 else read


class _Retyping:
  """A second typing of a program that ends types at kernels.

  Attributes:
    graph: the graph of the program.
    values: value of the program -> its twin of the second typing.
    trails: value -> where its data come from.
    makers: value -> the equation that computes it.
    aliases: value inside a body, or output of one -> the value that it equals.
    leaf_axes: identity of an axis of the second typing -> (leaf, axis of it).
    uses: the products of data and a kernel, in the order of the program.
    refused: path of a leaf -> why it is not wired.
    flushed: kernel -> the norms between it and a sum.
  """

  def __init__(self, graph: Graph):
    self.graph = graph
    self.values: dict[Value, Value] = {}
    self.trails: dict[Value, _Trail] = {}
    self.makers: dict[Value, Equation] = {}
    self.aliases: dict[Value, Value] = {}
    self.leaf_axes: dict[int, tuple[str, int]] = {}
    self.uses: list[_Use] = []
    self.refused: dict[str, str] = {}
    self.flushed: dict[str, tuple[Factor, ...]] = {}
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
    """Where the data of a value come from."""
    return self.trails.get(old, _Trail())

  def flush(self, old: Value) -> None:
    """Gives the norms on the way to a sum to the kernel they follow."""
    writer, factors = self.trail(old)
    if writer is not None and factors:
      self.flushed.setdefault(writer, factors)

  def walk(self, program: Program) -> None:
    """Types a program and the bodies of the functions that it calls."""
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
    """Types the outputs of an equation by its rule, as in the first typing."""
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
      scales = [v for v in eqn.inputs if not v.has_data and v.sources]
      if eqn.primitive.name in ('mul', 'div') and scales:
        factors = self.factors(eqn, data[0], scales[0])
        trail = trail._replace(factors=(*trail.factors, *factors))
    else:  # Several data meet: what comes has no single writer any more.
      for value in data:
        self.flush(value)
    for out in eqn.outputs:
      self.trails[out] = trail

  def product(self, eqn: Equation) -> bool:
    """Notes the use of a kernel and types its result; False if it has none."""
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
    ((position, value),) = leaves
    name = eqn.primitive.name
    path = self.kernel(value, taps=name == 'mul')
    kernel, x = self.value(value), self.value(data[0])
    if path is None:
      if name in ('conv_general_dilated', 'dot_general'):
        self.refuse(value, f'{eqn.why} takes what is computed from it')
      return False
    product: _Product | str | None = None
    if name == 'conv_general_dilated':
      product = _convolution(eqn, position, kernel, x)
    elif name == 'dot_general':
      product = _contraction(eqn, position, kernel, x)
    elif name == 'mul' and len(self.graph.leaves[path].shape) > 3:
      product = _tap(eqn, kernel, x)
    if isinstance(product, str):
      self.refuse(value, product)
    if not isinstance(product, _Product):
      return False
    # The leaf's axis at each axis of the kernel; -1: not an axis of the leaf.
    axes = [self.leaf_axes.get(id(axis), (path, -1))[1] for axis in kernel.axes]
    into, free = product.into, product.free
    if not product.over or not free or -1 in [axes[k] for k in (*into, *free)]:
      self.refuse(value, f'{eqn.why} takes it in another shape')
      return False
    if product.groups == 1:
      for k, channel in zip(product.over, product.channels, strict=True):
        ax.unify(x.axes[channel], kernel.axes[k], eqn.why)
    (output,) = eqn.outputs
    self.values[output] = Value(output.shape, output.dtype, product.typed)
    self.trails[output] = _Trail(path)
    self.uses.append(
      _Use(
        path=path,
        read=tuple(x.axes[k] for k in product.channels),
        into=tuple(axes[k] for k in into),
        groups=product.groups,
        written=tuple(kernel.axes[k] for k in free),
        out=tuple(axes[k] for k in free),
        trail=self.trail(data[0]),
        why=eqn.why,
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
    """Returns the value before some operations, and the equation that made it.

    Args:
      value: a value of the program.
      names: primitives to look through, back to their first input.
    """
    while True:
      eqn = self.makers.get(value)
      if value in self.aliases:
        value = self.aliases[value]
      elif eqn is not None and eqn.primitive.name in names:
        value = eqn.inputs[0]
      else:
        return value, eqn

  def kernel(self, value: Value, taps: bool) -> str | None:
    """The leaf that a value is up to layout, dtype and flips, or None.

    With ``taps`` a slice of a leaf counts too: a depthwise convolution that is
    written as shifts multiplies by one tap of its kernel at a time.
    """
    names = {*_LAYOUT, *_FLIPS, *(_SLICES if taps else ())}
    value, eqn = self.origin(value, names)
    if eqn is not None or len(value.sources) != 1:
      return None
    (path,) = value.sources
    return path if len(self.graph.leaves[path].shape) > 1 else None

  def factors(
    self, eqn: Equation, data: Value, other: Value
  ) -> tuple[Factor, ...]:
    """Returns what multiplies or divides data as norms, or refuses it.

    Args:
      eqn: a ``mul`` or ``div`` of both.
      data: the operand that is data.
      other: the operand that is made of leaves.
    """
    why, powers = eqn.why, self.powers(other)
    if eqn.primitive.name == 'div':
      powers = _times({}, powers, -1) if data is eqn.inputs[0] else None
    norms = None if powers is None else _norms(powers)
    shapes = {path: self.graph.leaves[path].shape for path in other.sources}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    wide = [k for k, n in enumerate(other.shape) if n != 1]
    # A scalar, or a vector with one entry for each channel.
    is_vector = len(wide) < 2 and all(
      n == max(shapes[path], default=1) and n in (1, math.prod(other.shape))
      for path, n in sizes.items()
    )
    if norms is None or not is_vector:
      for path in sorted(other.sources):
        self.refused.setdefault(path, f'no norm says what {why} does with it')
      return ()
    axis = None
    if wide:  # Axes broadcast from the right: [4] meets the last of [n, 4].
      offset = len(data.shape) - len(other.shape)
      axis = self.value(data).axes[wide[0] + offset]
    return tuple(
      Factor(norm, axis if sizes[path] > 1 else None, why)
      for path, norm in norms
    )

  def powers(self, value: Value) -> _Powers | None:
    """Reads a value as a product of powers of (leaf + number).

    ``scale / sqrt(var + 1e-5)`` is {(scale, 0): 1, (var, 1e-5): -0.5}; None is
    returned where it is no such product, as ``scale + mean``.
    """
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
      # Only leaf + number: of two leaves, or (leaf ** 2 + number), no power.
      numbers = [n for v in eqn.inputs if (n := self.number(v)) is not None]
      leaves = [v for v in eqn.inputs if self.number(v) is None]
      base = self.powers(leaves[0]) if len(leaves) == 1 else None
      if base is None or list(base.values()) != [1]:
        return None
      ((path, eps),) = base
      return {(path, eps + numbers[0]): 1.0}
    # Signs do not matter, for a norm enters by its square.
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
    numbers = np.unique(value.constant)
    is_number = len(numbers) == 1 and not np.any(np.imag(numbers))
    return float(np.real(numbers[0])) if is_number else None


def _convolution(
  eqn: Equation, position: int, kernel: Value, x: Value
) -> _Product | str:
  """Returns how a convolution multiplies, or why that is not said."""
  numbers = eqn.params['dimension_numbers']
  if position == 0 or eqn.params['batch_group_count'] > 1:
    return f'{eqn.why} takes it for data'
  k_out, k_in = numbers.rhs_spec[:2]
  groups = eqn.params['feature_group_count']
  typed = [ax.atom(n) for n in eqn.outputs[0].shape]
  typed[numbers.out_spec[0]] = x.axes[numbers.lhs_spec[0]]  # The batch.
  typed[numbers.out_spec[1]] = kernel.axes[k_out]
  return _Product(
    channels=(numbers.lhs_spec[1],),
    over=(k_in,),
    # With groups, what an entry reads depends on its output channel too.
    into=(k_in,) if groups == 1 else (k_in, k_out),
    free=(k_out,),
    groups=groups,
    typed=typed,
  )


def _contraction(
  eqn: Equation, position: int, kernel: Value, x: Value
) -> _Product | str:
  """Returns how a matrix product multiplies, or why that is not said."""
  contract, batch = eqn.params['dimension_numbers']
  if batch[0]:
    return f'{eqn.why} shares an axis with the data'
  over, channels = tuple(contract[position]), tuple(contract[1 - position])
  free = tuple(k for k in range(len(kernel.axes)) if k not in over)
  kept = [a for k, a in enumerate(x.axes) if k not in channels]
  written = [kernel.axes[k] for k in free]
  # dot_general puts the axes of its first operand before those of the second.
  typed = [*written, *kept] if position == 0 else [*kept, *written]
  return _Product(channels, over, over, free, groups=1, typed=typed)


def _tap(eqn: Equation, kernel: Value, x: Value) -> _Product | None:
  """Returns how one tap of a depthwise convolution multiplies, or None.

  A tap of a kernel [3, 3, 1, 4] is an array [1, 1, 1, 4], multiplied with
  shifted data: entries along the one axis that is not broadcast.
  """
  wide = tuple(k for k, n in enumerate(kernel.shape) if n != 1)
  if len(wide) != 1:
    return None
  typed = list(x.axes)
  typed[wide[0]] = kernel.axes[wide[0]]
  groups = eqn.outputs[0].shape[wide[0]]
  return _Product(wide, wide, wide, wide, groups=groups, typed=typed)


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
  """Returns norms whose product has these squares; None if there are none.

  Each comes with the path of its leaf. A norm of a scale is the scale to the
  power of 1, one of a variance (var + eps) to that of -1/2: the powers
  {(scale, 0): 1, (var, 1e-5): -0.5} are one norm of each.
  """
  norms = []
  for (path, eps), power in powers.items():
    times = power if power > 0 else -2 * power
    if times % 1 or (power > 0 and eps):
      return None
    norm = lookahead.Norm(path)
    if power < 0:
      norm = lookahead.Norm(None, path, eps)
    norms += [(path, norm)] * int(times)
  return norms


_LAYOUT = where(moves=LAYOUT)
_FLIPS = where(moves='flips')
_SLICES = where(moves='slices')
