"""What a rule is: an equation's types in, its types and sizes out.

A rule reads the axes of an equation's inputs, sets those of its outputs, and
returns how to recompute the equation's parameters for other sizes (or None
where they hold no size). That is all there is to know of a primitive: the
types say what shrinks together, and the parameters make the smaller program.
A primitive without a rule locks every axis that it touches, under its name. The
rules stand in :mod:`jaxprune.structure.rules.primitives`, beside all else that
is known of a primitive.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import core

from jaxprune.structure.program import axes as ax
from jaxprune.structure.program.axes import Axis, Size
from jaxprune.structure.rules.primitives import Primitive, add, known, where

SizeOf = Callable[[Axis], Size]
Resize = Callable[[SizeOf], dict[str, Any]]


@dataclasses.dataclass(eq=False, slots=True)
class Value:
  """An array of the traced program.

  Attributes:
    shape: its shape in the original program.
    dtype: its dtype.
    axes: the type of each of its axes.
    constant: its value, where the program closes over it or spells it out.
    sources: paths of the leaves it is computed from, if from leaves alone.
    has_data: whether it depends on an argument of the function.
    recompute: its value at other sizes, if it follows from them.
    indexes: the axis whose entries a constant numbers; None if it does not.
  """

  shape: tuple[Size, ...]
  dtype: Any
  axes: list[Axis] = dataclasses.field(default_factory=list)
  constant: Any = None
  sources: frozenset[str] = frozenset()
  has_data: bool = False
  recompute: Callable[[SizeOf], Any] | None = None
  indexes: Axis | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
  """One operation of the traced program, with typed inputs and outputs.

  Attributes:
    primitive: the JAX primitive.
    params: its parameters in the original program.
    inputs: its operands.
    outputs: its results.
    why: the operation and the line of the user's code that called it.
    resize: its parameters at other sizes; None where they hold no size.
    evaluate: how to run it where binding the primitive is not enough.
    programs: the typed bodies of control flow.
    derivative: the typed derivative, if it has one of its own.
    reductions: the axes it reduces over.
    products: for a matrix product or convolution, the axes whose sizes
      multiply to its number of multiply-adds.
  """

  primitive: Any
  params: dict[str, Any]
  inputs: list[Value]
  outputs: list[Value]
  why: str
  resize: Resize | None = None
  evaluate: Callable[..., list[Any]] | None = None
  programs: tuple[Any, ...] = ()
  derivative: Any = None
  reductions: list[Axis] = dataclasses.field(default_factory=list)
  products: list[Axis] | None = None


Rule = Callable[[Equation], Resize | None]
ELEMENTWISE = where(elementwise=True)


def infer(eqn: Equation) -> None:
  """Types the outputs of an equation by the rule of its primitive."""
  name = eqn.primitive.name
  row = known(name)
  if row.rule is None:
    reason = f' (it {row.refused})' if row.refused else ''
    remedy = f"add one with jaxprune.structure.rule('{name}')"
    lock_all(eqn, f'{eqn.why} has no rule{reason}; {remedy}')
  else:
    eqn.resize = row.rule(eqn)


def lock_all(eqn: Equation, why: str) -> None:
  """Keeps every axis of the inputs and outputs of an equation whole."""
  for value in eqn.inputs:
    for axis in value.axes:
      ax.lock(axis, why)
  for value in eqn.outputs:
    value.axes = [ax.atom(n, why) for n in value.shape]


def rule(
  *names: str,
  zero: str | None = None,
  linear: str | None = None,
  positive: str | None = None,
  moves: str | None = None,
  neutral: float | None = None,
  counts: str | None = None,
) -> Callable[[Rule], Rule]:
  """Returns a decorator that makes a function the rule of primitives.

  A rule takes an :class:`Equation`, sets ``axes`` of each output to axes of its
  inputs (or to ``axes.atom(size)`` where it makes one), ties those that must
  shrink together by ``axes.unify(a, b, eqn.why)``, keeps what it cannot follow
  by ``axes.lock(axis, why)``, and returns None, or a function that gives the
  parameters of the equation at other sizes. What works entry by entry has its
  rule already: :func:`elementwise`. Known primitives may be given another rule.

  The traits are those of
  :class:`jaxprune.structure.rules.primitives.Primitive`; one that is None stays
  as it is, which for a new primitive is the careful choice.

  Args:
    *names: of primitives, as a jaxpr prints them.
    zero: where the result is zero if entries of operands are: 'all' of them,
      the 'first', 'any'; else the entries of an absent unit count.
    linear: 'first' (operand), 'jointly' (a sum) or 'each' (a product).
    positive: as ``linear``, for factors >= 0 alone.
    moves: 'stays' if the result is the first operand, in another guise.
    neutral: of a reduction (``eqn.reductions``), what does not change it.
    counts: 'norms', 'activations' or 'pooling', where those are counted.

  Raises:
    TypeError: if a name is not a string, or none is given.
    ValueError: if a trait has another value.

  Examples:
    >>> import jax.numpy as jnp
    >>> from jax.extend.core import Primitive
    >>> import jaxprune as jp
    >>> soft = Primitive('softsign_of_mine')
    >>> _ = soft.def_abstract_eval(lambda x: x)
    >>> net = lambda p, x: soft.bind(x @ p['a']) @ p['b']
    >>> p = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 2))}
    >>> len(jp.structure.trace(net, p, jnp.ones((1, 3))).groups)
    0
    >>> elementwise = jp.structure.elementwise
    >>> _ = jp.structure.rule('softsign_of_mine', zero='all')(elementwise)
    >>> len(jp.structure.trace(net, p, jnp.ones((1, 3))).groups)
    1
  """
  if not names or not all(isinstance(name, str) for name in names):
    raise TypeError(
      f"rule needs names of primitives, as in rule('name'), got {names!r}."
    )
  given = {
    'zero': zero,
    'linear': linear,
    'positive': positive,
    'moves': moves,
    'neutral': neutral,
    'counts': counts,
  }
  traits = {k: v for k, v in given.items() if v is not None}
  Primitive(**traits)  # Refuses a wrong word here, rather than at its use.

  def register(fn: Rule) -> Rule:
    is_elementwise = fn is elementwise
    add(*names, rule=fn, elementwise=is_elementwise, refused='', **traits)
    return fn

  return register


def elementwise(eqn: Equation) -> None:
  """Axes of equal size are one; lax broadcasts axes of size 1 implicitly."""
  (out,) = eqn.outputs
  axes: list[Axis | None] = [None] * len(out.shape)
  for value in eqn.inputs:
    if len(value.shape) != len(out.shape):
      continue
    for k, (axis, n) in enumerate(zip(value.axes, out.shape, strict=True)):
      if not same(value.shape[k], n):
        continue
      known = axes[k]
      if known is None:
        axes[k] = axis
      else:
        ax.unify(known, axis, eqn.why)
  out.axes = [
    ax.atom(n) if axis is None else axis
    for axis, n in zip(axes, out.shape, strict=True)
  ]


add(*ELEMENTWISE, rule=elementwise)


def known_entries(array: Any) -> np.ndarray | None:
  """Returns the entries of an array on the host; None if they are not known.

  Those of a trace around this one are not, nor are those of other processes.
  """
  if isinstance(array, core.Tracer):
    return None
  return (
    np.asarray(array) if getattr(array, 'is_fully_addressable', True) else None
  )


def drop(axes: Sequence[Axis], gone: Sequence[int]) -> list[Axis]:
  """Returns axes without those at some places."""
  return [axis for k, axis in enumerate(axes) if k not in gone]


def shape(value: Value, size: SizeOf) -> tuple[Size, ...]:
  """Returns the shape of a value at other sizes."""
  return tuple(size(axis) for axis in value.axes)


def same(n: Size, m: Size) -> bool:
  """Whether two sizes, possibly symbolic, are known to be equal."""
  return bool(n == m)


def moved(eqn: Equation, out: Value) -> Value:
  """Returns the operand whose entries a result of a moving operation has."""
  is_separate = known(eqn.primitive.name).moves == 'separate'
  return eqn.inputs[eqn.outputs.index(out) if is_separate else 0]
