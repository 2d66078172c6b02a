"""Derivatives of a function's own (custom_jvp, custom_vjp): read and attached.

JAX traces the rule that the author gave, as a function of arrays. Typed and run
at another size, it is attached to the function of that size. Of f(x, k), x a
float and k an integer, both have a place for x alone::

  jvp  (x, k, dx) -> (y, dy)        vjp  (x, k, dy) -> dx

and what JAX asks of k, a float0 zero, is filled in on the way out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.structure.program.run import Program, Run
from jaxprune.structure.rules import Equation


class Derivative(NamedTuple):
  """A typed function with its typed derivative."""

  body: Program
  derivative: Program  # Of the inputs and their tangents, or cotangents.
  floats: list[int]  # The inputs that have a derivative; not integers.
  slopes: list[int]  # The outputs that have one.


def original(eqn: Equation) -> Callable[..., Any]:
  """Returns the equation as a function, with its author's derivative."""
  empty = Run({})
  return lambda *xs: tuple(empty.bind(eqn.primitive, xs, eqn.params))


def _of_floats(
  fn: Callable[..., Any], floats: Sequence[int], primals: Sequence[Any]
) -> Callable[..., Any]:
  """Returns a function of its float inputs alone, the others fixed."""

  def partial(*xs: Any) -> Any:
    full = list(primals)
    for k, x in zip(floats, xs, strict=True):
      full[k] = x
    return fn(*full)

  return partial


def jvp_rule(
  fn: Callable[..., Any], floats: Sequence[int], slopes: Sequence[int]
) -> Callable[..., Any]:
  """Returns (inputs, tangents) -> (outputs, their tangents)."""

  def push(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    xs = [primals[k] for k in floats]
    partial = _of_floats(fn, floats, primals)
    outs, pushed = jax.jvp(partial, xs, list(tangents))
    return outs, [pushed[k] for k in slopes]

  return push


def vjp_rule(
  fn: Callable[..., Any], floats: Sequence[int], slopes: Sequence[int]
) -> Callable[..., Any]:
  """Returns (inputs, cotangents of outputs) -> cotangents of the inputs."""

  def pull(primals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    xs = [primals[k] for k in floats]
    outs, pulled = jax.vjp(_of_floats(fn, floats, primals), *xs)
    return pulled(tuple(_spread(outs, slopes, cotangents)))

  return pull


def with_jvp(typed: Derivative) -> Callable[[Run, list[Any]], list[Any]]:
  """Returns what runs a function under its forward derivative."""
  body, derivative, floats, slopes = typed

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    @jax.custom_jvp
    def call(*xs: Any) -> tuple[Any, ...]:
      return tuple(run(body, xs))

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
      arguments = [*primals, *(tangents[k] for k in floats)]
      results = run(derivative, arguments)
      outs = results[: -len(slopes)]
      pushed = _spread(outs, slopes, results[-len(slopes) :])
      return tuple(outs), tuple(pushed)

    return list(call(*values))

  return evaluate


def with_vjp(typed: Derivative) -> Callable[[Run, list[Any]], list[Any]]:
  """Returns what runs a function under its backward derivative."""
  body, derivative, floats, slopes = typed

  def evaluate(run: Run, values: list[Any]) -> list[Any]:
    @jax.custom_vjp
    def call(*xs: Any) -> tuple[Any, ...]:
      return tuple(run(body, xs))

    def backward(xs: Any, cotangents: Any) -> tuple[Any, ...]:
      arguments = [*xs, *(cotangents[k] for k in slopes)]
      return tuple(_spread(xs, floats, run(derivative, arguments)))

    call.defvjp(lambda *xs: (call(*xs), xs), backward)
    return list(call(*values))

  return evaluate


def _spread(
  like: Sequence[Any], positions: Sequence[int], slopes: Sequence[Any]
) -> list[Any]:
  """Returns slopes at their positions, and float0 zeros for integers.

  JAX wants a slope for every value: of (x, k), k an integer, [dx, float0].
  """
  full = [np.zeros(np.shape(x), jax.dtypes.float0) for x in like]
  for k, slope in zip(positions, slopes, strict=True):
    full[k] = slope
  return full
