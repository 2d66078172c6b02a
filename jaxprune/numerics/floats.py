"""Floats and powers of two, for figures that would leave the range of a float.

A square leaves the range of float32 below 1e-19 and above 1e19, where weights
are still in it; and arithmetic on a CPU takes subnormal numbers, those below
1.2e-38, for zero. :func:`split` writes an array as one of ordinary size times a
power of two: nothing is rounded, so that every product is what it would be,
and whoever has one puts the powers together again with :func:`join`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import tree as tree_lib

_LEAST, _MOST = -96, 120  # Exponents that join keeps to: 1e-29 and 1e36.


class Scaled(NamedTuple):
  """An array that stands for ``x * 2 ** exponent``."""

  x: jax.Array  # float32 or wider.
  exponent: jax.Array  # int32, shape [].


def wide(x: jax.Array) -> jax.Array:
  """Returns x in float32 or wider: products of half precision are not exact.

  Examples:
    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
  """
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def split(*xs: jax.Array) -> list[Scaled]:
  """Returns arrays over one power of two: the largest |x| lies in [1, 2).

  The numbers are read by their bits, so that subnormal ones count too. What is
  2**-126 times smaller than the largest becomes 0; NaN and infinities stay.

  Args:
    *xs: floating arrays, which share the power.

  Examples:
    >>> big, = split(jnp.array([3e38, 1e38]))
    >>> print(big.x, big.exponent)
    [1.7632415  0.58774716] 127
    >>> tiny, = split(jnp.array([4e-40, -1e-40]))
    >>> round(float(tiny.x[0] / tiny.x[1]), 3)
    -4.0
  """
  xs = tuple(map(wide, xs))
  dtype = jnp.result_type(*xs) if xs else jnp.float32
  xs = tuple(x.astype(dtype) for x in xs)
  top = jnp.int32(_zero_exponent(dtype))
  for x in xs:
    top = jnp.maximum(top, _exponent(x))
  return [Scaled(_over(x, top), top) for x in xs]


def join(value: Scaled, most: int = _MOST) -> jax.Array:
  """Returns x 2**exponent, with the exponent held between -96 and ``most``.

  An array whose largest entry is near 1 so comes out exactly, where it lies
  between 1e-29 and 1e36; beyond, it comes out by a power of two larger or
  smaller, and its entries keep their order.

  Args:
    value: an array and its exponent.
    most: 120 leaves room for sums; 127 where |x| stays below 2.

  Examples:
    >>> print(join(Scaled(jnp.array([1.5, 1.0]), jnp.int32(1))))
    [3. 2.]
  """
  at = jnp.clip(value.exponent, _LEAST, most)
  return value.x * power(at, value.x.dtype)


def times(*values: Scaled) -> Scaled:
  """Returns the product of arrays.

  Examples:
    >>> value = times(*split(jnp.array(3e38)), *split(jnp.array(1e38)))
    >>> print(value.x * 2.0 ** (value.exponent - 200))
    1.8669046e+16
  """
  x, exponent = values[0]
  for value in values[1:]:
    x, exponent = x * value.x, exponent + value.exponent
  return Scaled(x, exponent)


def products(*factors: tree_lib.PyTree) -> tree_lib.PyTree:
  """Returns the products of like pytrees, all leaves over one power of two.

  Where the largest product could lie beyond 1e-29 to 1e36, all come out by one
  power of two larger or smaller: their order stays, between leaves too.

  Args:
    *factors: pytrees of floating arrays, of one structure.

  Returns:
    A pytree like the first, each leaf in float32 or wider.

  Examples:
    >>> big = {'a': jnp.array([2.0**127, 2.0**126])}
    >>> print(products(big, big)['a'] / 2.0**120)
    [1.   0.25]
  """
  first, treedef = jax.tree.flatten(factors[0])
  scaled = [split(*jax.tree.leaves(factor)) for factor in factors]
  made = [
    join(times(*values)).astype(wide(x).dtype)
    for x, *values in zip(first, *scaled, strict=True)
  ]
  return treedef.unflatten(made)


def plus(a: Scaled, b: Scaled) -> Scaled:
  """Returns the sum of two arrays.

  Examples:
    >>> one = Scaled(jnp.float32(1), jnp.int32(0))
    >>> print(*plus(one, Scaled(jnp.float32(1.5), jnp.int32(1))))
    2.0 1
  """
  top = jnp.maximum(a.exponent, b.exponent)
  scale = lambda v: v.x * power(v.exponent - top, v.x.dtype)
  return Scaled(scale(a) + scale(b), top)


def power(exponent: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns 2**exponent, exactly; 0 below the normal numbers.

  Args:
    exponent: int32, at most the largest exponent of the type.
    dtype: float32 or float64.

  Examples:
    >>> print(power(jnp.array([3, -1, -127]), jnp.float32))
    [8.  0.5 0. ]
  """
  info = jnp.finfo(dtype)
  uint = _unsigned(dtype)
  field = jnp.clip(exponent + _bias(dtype), 0, 2 * _bias(dtype))
  return lax.bitcast_convert_type(field.astype(uint) << info.nmant, dtype)


def _unsigned(dtype: jax.typing.DTypeLike) -> np.dtype:
  return np.dtype(f'uint{8 * jnp.dtype(dtype).itemsize}')


def _bias(dtype: jax.typing.DTypeLike) -> int:
  return int(jnp.finfo(dtype).maxexp) - 1


def _zero_exponent(dtype: jax.typing.DTypeLike) -> int:
  """Returns the exponent of the smallest subnormal number, which 0 shares."""
  info = jnp.finfo(dtype)
  return int(info.minexp) - info.nmant


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the magnitude of x by its bits, and whether it is subnormal."""
  uint = _unsigned(x.dtype)
  sign = uint.type(1 << (8 * uint.itemsize - 1))
  magnitude = lax.bitcast_convert_type(x, uint) & ~sign
  return magnitude, magnitude >> jnp.finfo(x.dtype).nmant == 0


def _exponent(x: jax.Array) -> jax.Array:
  """Returns floor(log2) of the largest finite |x|; int32, shape []."""
  info = jnp.finfo(x.dtype)
  magnitude, _ = _parts(x)
  infinity = np.array(jnp.inf, x.dtype).view(_unsigned(x.dtype))[()]
  most = jnp.max(jnp.where(magnitude < infinity, magnitude, 0), initial=0)
  field = (most >> info.nmant).astype(jnp.int32)
  # A subnormal number is its bits, as an integer, times the smallest of them.
  count = lax.bitcast_convert_type(most.astype(x.dtype), most.dtype)
  below = (count >> info.nmant).astype(jnp.int32) - _bias(x.dtype)
  low = jnp.maximum(below, 0) + _zero_exponent(x.dtype)
  return jnp.where(field == 0, low, field - _bias(x.dtype))


def _over(x: jax.Array, top: jax.Array) -> jax.Array:
  """Returns x / 2**top, in two steps so that neither leaves the range."""
  magnitude, small = _parts(x)
  count = magnitude.astype(x.dtype)
  negative = lax.bitcast_convert_type(x, _unsigned(x.dtype)) != magnitude
  value = jnp.where(small, jnp.where(negative, -count, count), x)
  shift = jnp.where(small, _zero_exponent(x.dtype), 0) - top
  half = shift // 2
  return value * power(half, x.dtype) * power(shift - half, x.dtype)
