"""Running a typed program again: smaller, or masked, or under traced masks.

A :class:`Run` evaluates programs for what is kept of each atom, known in
advance: small, at sizes computed anew, or masked, at the original sizes with
every removed entry absent. A :class:`Switched` does the latter for masks that
are traced values, with weights as they are.

Of ``max(h[2, 4], axis=1)`` without units 1 and 3 of the axis of 4:

* small: h is [2, 2], its columns 0 and 2, and the maximum is over two entries;
* masked: h is [2, 4], its columns 1 and 3 are 0 between operations, and become
  -inf, which a maximum ignores, just before this one;
* switched: columns 1 and 3 hold whatever was computed; -inf just before.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxprune.numerics import sharding
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis
from jaxprune.structure.rules import Equation, Value, contraction
from jaxprune.structure.rules.primitives import known, neutral_of

Kept = Mapping[Axis, np.ndarray]  # Atom -> indices that are kept, ascending.
Program = (
  Any  # A jaxprune.structure.program.typed.Program, whose module needs this.
)


@dataclasses.dataclass(frozen=True, eq=False)
class Without:
  """What dropped blocks leave of a program.

  Attributes:
    shortcuts: the sum that adds a branch -> what it is without.
    dead: the values that nothing needs any more.
  """

  shortcuts: Mapping[Value, Value]
  dead: Container[Value]


class Run:
  """An evaluation of programs for what is kept of each atom.

  Attributes:
    kept: atom -> kept indices; an atom that is absent is kept whole.
    masked: whether to run at the original sizes, with removed entries zero.
    without: what is left where blocks are dropped; None if none is.
  """

  def __init__(
    self, kept: Kept, masked: bool = False, without: Without | None = None
  ):
    self.kept = kept
    self.masked = masked
    self.without = without
    self._masks: dict[Axis, np.ndarray | None] = {}

  def size(self, axis: Axis) -> ax.Size:
    """Entries of an axis that are left."""
    mask = self.mask(axis)
    return ax.find(axis).size if mask is None else int(mask.sum())

  def mask(self, axis: Axis) -> np.ndarray | None:
    """Which entries of an axis are left, bool[size]; None if all are."""
    axis = ax.find(axis)
    if axis not in self._masks:
      self._masks[axis] = self._compute_mask(axis)
    return self._masks[axis]

  def _compute_mask(self, axis: Axis) -> np.ndarray | None:
    if axis.kind == 'atom':
      if axis not in self.kept:
        return None
      mask = np.zeros(axis.size, bool)
      mask[self.kept[axis]] = True
      return mask
    if axis.order is not None:
      mask = self.mask(axis.parts[0])
      return None if mask is None else mask[axis.order]
    # Of A without entry 0 of 2, and B of 2 whole: sum(A, B) keeps [0, 1, 1, 1],
    # product(A, B) keeps [0, 0, 1, 1].
    masks = [self.mask(part) for part in axis.parts]
    if all(mask is None for mask in masks):
      return None
    full = [
      np.ones(ax.find(part).size, bool) if mask is None else mask
      for part, mask in zip(axis.parts, masks, strict=True)
    ]
    if axis.kind == 'sum':
      return np.concatenate(full)
    mask = full[0]
    for factor in full[1:]:
      mask = np.logical_and.outer(mask, factor).reshape(-1)
    return mask

  def take(self, array: Any, axes: Sequence[Axis]) -> Any:
    """Returns an array with what is left of it: cut, or masked."""
    if self.masked:
      return self.fill(array, axes, 0)
    # A NumPy array stays one: constants are cut now, not inside of a jaxpr.
    on_host = not isinstance(array, jax.Array)
    for k, axis in enumerate(axes):
      mask = self.mask(axis)
      if mask is not None:
        index = np.flatnonzero(mask)
        array = (
          np.take(array, index, k) if on_host else jnp.take(array, index, k)
        )
    return array

  def constant(self, value: Value) -> Any:
    """Returns what is left of a constant of the program."""
    if value.recompute is not None:
      return self.take(value.recompute(self.size), value.axes)
    if value.indexes is not None and self.masked:
      # Each entry stays where it is, absent or not: of [3, 1, 0] a removed
      # entry made 0 would write what it has over entry 0.
      return value.constant
    mask = None if value.indexes is None else self.mask(value.indexes)
    if mask is None:
      return self.take(value.constant, value.axes)
    # Entries are numbered anew: of [3, 1, 0] without entry 2 is left [2, 1, 0].
    numbers = np.cumsum(mask, dtype=value.constant.dtype) - 1
    return numbers[self.take(value.constant, value.axes)]

  def fill(self, array: Any, axes: Sequence[Axis], value: Any) -> Any:
    """Returns an array with ``value`` where an entry is removed."""
    shape = np.shape(array)
    for k, axis in enumerate(axes):
      mask = self.mask(axis)
      if mask is not None:
        mask = mask.reshape([-1 if j == k else 1 for j in range(len(shape))])
        fill = jnp.asarray(value, jnp.asarray(array).dtype)
        array = jnp.where(np.broadcast_to(mask, shape), array, fill)
    return array

  def bind(self, primitive: Any, values: Sequence[Any], params: Any) -> Any:
    """Applies a primitive, as every JAX version wants it."""
    return bind(primitive, values, params)

  def __call__(self, program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Runs a program on inputs that are already cut (or masked).

    Returns:
      Its outputs; None for those that nothing computes without dropped blocks.
    """
    env: dict[Value, Any] = dict(zip(program.inputs, inputs, strict=True))
    for eqn in program.equations:
      if self.needs(eqn):
        env.update(zip(eqn.outputs, self.step(eqn, env), strict=True))
    return [
      self.read(env, value) if self.is_live(value) else None
      for value in program.outputs
    ]

  def is_live(self, value: Value) -> bool:
    """Whether a value is needed, whatever is dropped."""
    return self.without is None or value not in self.without.dead

  def needs(self, eqn: Equation) -> bool:
    """Whether an equation is needed, whatever is dropped."""
    return any(self.is_live(out) for out in eqn.outputs)

  def read(self, env: dict[Value, Any], value: Value) -> Any:
    """Returns a value of an environment, or what is left of a constant."""
    if value not in env:
      env[value] = self.constant(value) if self.is_live(value) else None
    return env[value]

  def step(self, eqn: Equation, env: dict[Value, Any]) -> list[Any]:
    """Runs one equation in an environment.

    Where the block of y = x + F(x) is dropped, this sum returns x.
    """
    if self.without is not None:
      shortcut = self.without.shortcuts.get(eqn.outputs[0])
      if shortcut is not None:
        return [self.read(env, shortcut)]
    return self.apply(eqn, [self.read(env, value) for value in eqn.inputs])

  def apply(self, eqn: Equation, values: list[Any]) -> list[Any]:
    """Runs one equation."""
    if eqn.evaluate is not None:
      return eqn.evaluate(self, values)
    params = eqn.params
    if self.masked:
      values = self._absent(eqn, values)
    elif eqn.resize is not None:
      params = {**params, **eqn.resize(self.size)}
    outs = self.bind(eqn.primitive, values, params)
    outs = list(outs) if eqn.primitive.multiple_results else [outs]
    if self.masked:
      # Clear what is removed again: exp(0) is 1. Keys of jax.random have no 0.
      outs = [
        out
        if jnp.issubdtype(value.dtype, jax.dtypes.extended)
        else self.take(out, value.axes)
        for out, value in zip(outs, eqn.outputs, strict=True)
      ]
    return outs

  def _absent(self, eqn: Equation, values: list[Any]) -> list[Any]:
    """Gives removed entries the value that a reduction ignores."""
    neutral = _neutral(eqn)
    if not neutral:  # None or zero, which removed entries are.
      return values
    # Such a reduction has one operand: a maximum, a product, a logical and.
    (value,), x = values, eqn.inputs[0]
    return [self.fill(value, x.axes, neutral_of(neutral, value.dtype))]


class Switched:
  """An evaluation at full size under masks and switches that may be traced.

  Entries of removed units hold what they hold, until an operation would mix
  them with others: there, before it reduces or contracts the axis, they are
  made absent. So weights are never masked: under vmap over choices they stay
  unbatched, which keeps convolutions fast.

  Attributes:
    masks: atom -> bool[size]; an atom that is absent is kept whole.
    switches: the sum that adds a branch -> (its shortcut, whether it adds).
  """

  def __init__(
    self,
    masks: Mapping[Axis, Any],
    switches: Mapping[Value, tuple[Value, Any]],
  ):
    self.masks = masks
    self.switches = switches

  def size(self, axis: Axis) -> Any:
    """Entries of an axis that are left; traced where a mask is."""
    mask = self.mask(axis)
    return ax.find(axis).size if mask is None else jnp.sum(mask)

  def mask(self, axis: Axis) -> Any:
    """Which entries of an axis are left, bool[size]; None if all are."""
    # Made anew wherever it is asked for, in the body of a loop too.
    axis = ax.find(axis)
    if axis.kind == 'atom':
      return self.masks.get(axis)
    if axis.order is not None:
      mask = self.mask(axis.parts[0])
      return None if mask is None else mask[axis.order]
    masks = [self.mask(part) for part in axis.parts]
    if all(mask is None for mask in masks):
      return None
    full = [
      jnp.ones(ax.find(part).size, bool) if mask is None else mask
      for part, mask in zip(axis.parts, masks, strict=True)
    ]
    if axis.kind == 'sum':
      return jnp.concatenate(full)
    mask = full[0]
    for factor in full[1:]:
      mask = (mask[:, None] & factor[None]).reshape(-1)
    return mask

  def take(self, array: Any, axes: Sequence[Axis]) -> Any:
    """Returns an array as it is: entries go where they would mix."""
    del axes
    return array

  def constant(self, value: Value) -> Any:
    """Returns a constant of the program."""
    if value.recompute is not None:
      return value.recompute(self.size)
    return value.constant

  def fill(self, array: Any, axes: Mapping[int, Axis], value: Any) -> Any:
    """Returns an array with ``value`` where some axes have no entry."""
    masks = {k: self.mask(axis) for k, axis in axes.items()}
    masks = {k: mask for k, mask in masks.items() if mask is not None}
    if not masks:
      return array
    kept: Any = True
    for k, mask in masks.items():
      wide = [-1 if j == k else 1 for j in range(np.ndim(array))]
      kept = kept & mask.reshape(wide)
    return jnp.where(kept, array, jnp.asarray(value, jnp.result_type(array)))

  def bind(self, primitive: Any, values: Sequence[Any], params: Any) -> Any:
    """Applies a primitive, as every JAX version wants it."""
    return bind(primitive, values, params)

  def __call__(self, program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Runs a program on inputs of the full shapes."""
    env: dict[Value, Any] = dict(zip(program.inputs, inputs, strict=True))

    def read(value: Value) -> Any:
      if value not in env:
        env[value] = self.constant(value)
      return env[value]

    for eqn in program.equations:
      if eqn.evaluate is None:
        self.clear(eqn, env, read)
      outs = self.apply(eqn, [read(value) for value in eqn.inputs])
      if eqn.outputs[0] in self.switches:
        shortcut, is_open = self.switches[eqn.outputs[0]]
        outs = [jnp.where(is_open, outs[0], read(shortcut))]
      env.update(zip(eqn.outputs, outs, strict=True))
    return [read(value) for value in program.outputs]

  def clear(
    self,
    eqn: Equation,
    env: dict[Value, Any],
    read: Callable[[Value], Any],
  ) -> None:
    """Makes absent what an equation would mix, for those that follow too."""
    if not _neutral(eqn):
      for k, axes in mixed(eqn):
        value = eqn.inputs[k]
        env[value] = self.fill(read(value), axes, 0)

  def apply(self, eqn: Equation, values: list[Any]) -> list[Any]:
    """Runs one equation on values that are clear where it mixes them."""
    if eqn.evaluate is not None:
      return eqn.evaluate(self, values)
    neutral = _neutral(eqn)
    if neutral:
      for k, axes in mixed(eqn):
        fill = neutral_of(neutral, eqn.inputs[k].dtype)
        values[k] = self.fill(values[k], axes, fill)
    outs = self.bind(eqn.primitive, values, eqn.params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def mixed(eqn: Equation) -> Iterator[tuple[int, dict[int, Axis]]]:
  """Yields the axes along which an operation mixes entries: (operand, axes).

  Of a product it is enough to clear one operand: data rather than weights.
  """
  contract = contraction(eqn)
  if contract is not None:
    factors = enumerate(eqn.inputs[:2])
    data = [k for k, value in factors if value.has_data] or [0]
    for k in data:
      yield k, {axis: eqn.inputs[k].axes[axis] for axis in contract[k]}
  elif eqn.primitive.name == 'conv_general_dilated':
    numbers = eqn.params['dimension_numbers']
    data, kernel = eqn.inputs
    if not ax.is_locked(kernel.axes[numbers.rhs_spec[1]]):
      channel = numbers.lhs_spec[1]
      yield 0, {channel: data.axes[channel]}
  elif eqn.reductions or eqn.products is not None:
    over = {ax.find(axis) for axis in eqn.reductions}
    for k, value in enumerate(eqn.inputs):
      axes = dict(enumerate(value.axes))
      if eqn.reductions:
        axes = {j: a for j, a in axes.items() if ax.find(a) in over}
      yield k, axes


def bind(primitive: Any, values: Sequence[Any], params: Any) -> Any:
  """Applies a primitive, as every JAX version wants it."""
  values, params = _varying_alike(values, params)
  prepared = primitive.get_bind_params(dict(params))
  if isinstance(prepared, tuple):
    functions, params = prepared
    return primitive.bind(*functions, *values, **params)
  return primitive.bind(*values, **prepared)


def _varying_alike(
  values: Sequence[Any], params: Any
) -> tuple[Sequence[Any], Any]:
  """Returns values that vary over the same axes of a ``shard_map``, and params.

  jnp inserts these casts before it binds a primitive; a primitive that is bound
  directly wants its operands alike.
  """
  every = frozenset().union(*map(sharding.varying, values))
  if not every:
    return values, params
  values = [sharding.vary(value, every) for value in values]
  if 'call_jaxpr' in params:
    # Literals vary over no axis; under vmap they are arrays, and refused.
    body = jax.make_jaxpr(functools.partial(_evaluate, params['call_jaxpr']))
    params = {**params, 'call_jaxpr': body(*values)}
  return values, params


def _evaluate(closed: Any, *values: Any) -> list[Any]:
  """Returns the outputs of a jaxpr, each equation applied by :func:`bind`."""
  env = dict(zip(closed.jaxpr.invars, values, strict=True))
  env |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

  def read(v: Any) -> Any:
    return v.val if isinstance(v, jex.Literal) else env[v]

  for eqn in closed.jaxpr.eqns:
    outs = bind(eqn.primitive, [read(v) for v in eqn.invars], eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    env |= dict(zip(eqn.outvars, outs, strict=True))
  return [read(v) for v in closed.jaxpr.outvars]


def _neutral(eqn: Equation) -> float | None:
  """Returns the number that a reduction over whole axes ignores, or None."""
  return known(eqn.primitive.name).neutral if eqn.reductions else None
