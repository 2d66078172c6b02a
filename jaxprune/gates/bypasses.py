"""Layers that may be left out: a gate between the layer and a way around."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.checks import kinds


@kinds.checked
def shortcut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns x in another shape, without parameters.

  Average pooling over windows that do not overlap where a side shrinks (what
  does not fill a window is left out); then the first channels, or zero channels
  at the end.

  Args:
    x: shape (batch, ..., channels).
    shape: of the result: the same batch, and sides no larger than those of x.

  Raises:
    ValueError: if the number of axes or the batch differ, or a side grows.

  References:
    Ours, for what the abstract of arXiv:2010.02623 calls no constraint on the
    spatial dimensions.

  Examples:
    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> print(shortcut(x, (1, 2, 2))[0])
    [[0.5 0. ]
     [2.5 0. ]]
  """
  fits = len(shape) == x.ndim >= 2 and shape[0] == x.shape[0]
  if not fits or any(
    not 1 <= n <= m for n, m in zip(shape[1:-1], x.shape[1:-1], strict=True)
  ):
    raise ValueError(
      f'A shortcut can shrink the sides of {x.shape} and change its channels, '
      f'but not give {tuple(shape)}.'
    )
  for axis, n in enumerate(shape[1:-1], 1):
    window = x.shape[axis] // n
    if x.shape[axis] != n:
      x = lax.slice_in_dim(x, 0, n * window, axis=axis)
      parts = (*x.shape[:axis], n, window, *x.shape[axis + 1 :])
      x = jnp.mean(x.reshape(parts), axis + 1)
  extra = shape[-1] - x.shape[-1]
  if extra > 0:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])
  return x[..., : shape[-1]]


@kinds.checked
def nothing(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns zeros: what a closed branch adds to a sum; see :func:`bypass`.

  Args:
    x: for its dtype.
    shape: of the result.
  """
  return jnp.zeros(shape, x.dtype)


@kinds.checked
def bypass(
  layer: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  gate: float | jax.Array,
  *,
  around: Callable[[jax.Array, tuple[int, ...]], jax.Array] = shortcut,
  shape: tuple[int, ...] | None = None,
) -> jax.Array:
  """Returns gate * layer(x) + (1 - gate) * around(x).

  The gate of a sequential layer, across which shapes may change, or with
  ``around=nothing`` of one term of a sum: a model composes it, or wraps a layer
  from outside (``nn.intercept_methods``).

  Args:
    layer: of x alone.
    x: shape (batch, ..., channels).
    gate: a traced scalar in training. A Python number is static: at 1 (True)
      the layer alone is there, at 0 (False) only the way around, which is how
      the finished network is traced.
    around: (x, shape) -> what takes the layer's place.
    shape: of what the layer returns; only needed where its params are gone.

  Raises:
    ValueError: as ``around``.

  Examples:
    >>> double = lambda x: 2 * x
    >>> print(bypass(double, jnp.array([[1.0, 4.0]]), 0.5))
    [[1.5 6. ]]
  """
  if isinstance(gate, bool | int | float) and gate in (0, 1):
    if gate:
      return layer(x)
    return around(x, shape or jax.eval_shape(layer, x).shape)
  y = layer(x)
  gate = jnp.asarray(gate, y.dtype)
  return gate * y + (1 - gate) * around(x, y.shape).astype(y.dtype)
