"""Gate functions: from a trained number to open or closed, and a factor."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import checks
from jaxprune.checks import kinds


class Function(NamedTuple):
  """A gate function.

  Attributes:
    open: theta -> 1 where open, else 0, with a derivative.
    value: (theta, open) -> the factor.
  """

  open: Callable[[jax.Array], jax.Array]
  value: Callable[[jax.Array, jax.Array], jax.Array]


def lift(x: jax.Array) -> jax.Array:
  """Returns 0 with the derivative of x."""
  return x - lax.stop_gradient(x)


@kinds.checked
def scale(dead_zone: float = 0.05) -> Function:
  """Returns the gate that is a scaling factor with a dead zone.

  g = theta where |theta| > dead_zone, else 0, with dg/dtheta = 1 everywhere: a
  closed gate still learns, and may open again. One that is held open has the
  edge of the dead zone instead of 0. The derivative of ``open`` is that of
  |theta|.

  Args:
    dead_zone: at least 0; static.

  Raises:
    TypeError: if ``dead_zone`` is no number.
    ValueError: if ``dead_zone`` is negative, infinite or NaN.

  Examples:
    >>> gate, theta = scale(0.1), jnp.array([0.7, 0.05])
    >>> print(gate.value(theta, gate.open(theta)))
    [0.7 0. ]
  """
  checks.real('dead_zone', dead_zone, 0)

  def is_open(theta):
    size = jnp.abs(theta)
    return (size > dead_zone).astype(theta.dtype) + lift(size)

  def value(theta, is_open):
    edge = jnp.where(theta < 0, -dead_zone, dead_zone)
    held = jnp.where(jnp.abs(theta) > dead_zone, theta, edge)
    return lax.stop_gradient(held * is_open) + lift(theta)

  return Function(is_open, value)


@kinds.checked
def binary() -> Function:
  """Returns the gate that is 1 where sigmoid(theta) >= 1/2, else 0.

  The derivative is that of the sigmoid. There is nothing to fold.

  References:
    Bengio et al. (2013), arXiv:1308.3432.

  Examples:
    >>> gate, theta = binary(), jnp.array([2.0, -2.0])
    >>> print(gate.value(theta, gate.open(theta)))
    [1. 0.]
  """
  hard = lambda theta: (theta >= 0).astype(theta.dtype)
  soft = jax.nn.sigmoid
  return Function(
    lambda theta: hard(theta) + lift(soft(theta)),
    lambda theta, is_open: lax.stop_gradient(is_open) + lift(soft(theta)),
  )


@kinds.checked
def sharp(beta: float | jax.Array) -> Function:
  """Returns the gate sigmoid(beta theta), which hardens as beta grows.

  Open where theta >= 0, with the derivative of the sigmoid: finish with
  :func:`binary`, which is its limit. One that is held open is 1.

  Args:
    beta: inverse temperature, from 1 to 100 or so in the course of training;
      static or traced.

  Raises:
    TypeError: if a static ``beta`` is no number.
    ValueError: if a static ``beta`` is not above 0, infinite or NaN.

  Examples:
    >>> gate, theta = sharp(100.0), jnp.array([0.0, 2.0])
    >>> print(gate.value(theta, gate.open(theta)))
    [0.5 1. ]
  """
  checks.real('beta', beta, above=0)
  soft = lambda theta: jax.nn.sigmoid(beta * theta)
  hard = lambda theta: (theta >= 0).astype(theta.dtype)

  def value(theta, is_open):
    held = (theta < 0) & (is_open > 0.5)
    return jnp.where(held, 1 + lift(soft(theta)), soft(theta))

  return Function(lambda theta: hard(theta) + lift(soft(theta)), value)
