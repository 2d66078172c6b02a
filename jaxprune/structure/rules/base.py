"""What a rule is: an equation's types in, its types and sizes out.

A rule reads the axes of an equation's inputs, sets those of its outputs, and
returns how to recompute the equation's parameters for other sizes (or None
where they hold no size). That is all there is to know of a primitive: the
types say what shrinks together, and the parameters make the smaller program.
A primitive without a rule locks every axis that it touches, under its name.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import core

from jaxprune.structure import axes as ax
from jaxprune.structure.axes import Axis, Size

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
RULES: dict[str, Rule] = {}

_ELEMENTWISE_NAMES = """
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
  bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy
  copy_p cos cosh device_put digamma div eq eq_to erf erf_inv erfc exp exp2
  expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite
  le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi name ne
  neg nextafter not one_minus_square or polygamma population_count pow pvary
  real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
  sharding_constraint shift_left shift_right_arithmetic shift_right_logical
  sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


def infer(eqn: Equation) -> None:
  """Types the outputs of an equation by the rule of its primitive."""
  rule = RULES.get(eqn.primitive.name)
  if eqn.primitive.name in ELEMENTWISE:
    rule = elementwise
  if rule is None:
    lock_all(eqn, f'{eqn.why} has no rule')
  else:
    eqn.resize = rule(eqn)


def lock_all(eqn: Equation, why: str) -> None:
  """Keeps every axis of the inputs and outputs of an equation whole."""
  for value in eqn.inputs:
    for axis in value.axes:
      ax.lock(axis, why)
  for value in eqn.outputs:
    value.axes = [ax.atom(n, why) for n in value.shape]


def rule(*names: str) -> Callable[[Rule], Rule]:
  """Registers a function as the rule of the primitives of these names."""

  def register(fn: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, fn))
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
