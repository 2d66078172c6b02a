"""Floats as integers in the same order, and positions in whole arrays."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import sharding


class Cutoff(NamedTuple):
  """What an entry of one leaf must exceed to be kept.

  An entry is kept where its key is above ``key``, or equals it while the
  entry's position (``lead``, ``trail``) comes before the one given here.
  """

  key: jax.Array  # Unsigned integer of the scores' width, shape [].
  lead: jax.Array  # Index over the leading axes; uint32, shape [].
  trail: jax.Array  # Index over the trailing axes; uint32, shape [].


class Split(NamedTuple):
  """The whole array of which one leaf is a shard."""

  shape: tuple[int, ...]  # Of the whole array.
  axes: tuple[tuple[str, ...], ...]  # Mesh axes that split each dimension.

  @property
  def names(self) -> tuple[str, ...]:
    """The mesh axes that split the array."""
    return tuple(name for names in self.axes for name in names)

  @property
  def size(self) -> int:
    """Entries of the whole array."""
    return math.prod(self.shape)

  @property
  def lead(self) -> int:
    """How many leading axes to count apart for indices to fit uint32."""
    return counts_lib.leading(self.shape)


def unsigned(dtype: Any) -> Any:
  """Returns the unsigned integer that is as wide as a float."""
  return np.dtype(f'uint{8 * jnp.dtype(dtype).itemsize}')


def of(x: jax.Array) -> jax.Array:
  """Maps floats to keys > 0; all but NaN (to 1) are above 1."""
  uint = unsigned(x.dtype)
  bits = lax.bitcast_convert_type(x, uint)
  sign = uint.type(1 << (8 * uint.itemsize - 1))
  infinity = np.array(jnp.inf, x.dtype).view(uint)[()]
  magnitude = bits & ~sign
  keys = jnp.where(bits < sign, bits | sign, ~bits)
  keys = jnp.where(magnitude == 0, sign, keys)  # -0 equals 0.
  return jnp.where(magnitude > infinity, uint.type(1), keys)


def value(key: jax.Array, dtype: Any) -> jax.Array:
  """Returns the float of a key."""
  sign = unsigned(dtype).type(1 << (8 * key.dtype.itemsize - 1))
  bits = jnp.where(key >= sign, key ^ sign, ~key)
  return lax.bitcast_convert_type(bits, dtype)


def kept(x: jax.Array, cut: Cutoff, split: Split) -> jax.Array:
  """Marks the entries of a leaf that a cutoff keeps."""
  keys = of(x)
  tie = (keys == cut.key) & before(x, cut, split)
  return (keys > cut.key) | tie


def surplus(cut: Cutoff, split: Split) -> jax.Array:
  """Whether a cutoff keeps only some of the entries that equal it."""
  if split.lead:
    return cut.lead < np.uint32(math.prod(split.shape[: split.lead]))
  return cut.trail < np.uint32(split.size)  # Beyond what an int32 holds.


def before(x: jax.Array, cut: Cutoff, split: Split) -> jax.Array:
  """Whether the position of an entry in the whole array precedes a cutoff."""
  lead = split.lead
  trail = positions(x, split, lead, x.ndim)
  if not lead:
    return trail < cut.trail
  major = positions(x, split, 0, lead)
  return (major < cut.lead) | ((major == cut.lead) & (trail < cut.trail))


def positions(x: jax.Array, split: Split, start: int, stop: int) -> jax.Array:
  """Row-major index over axes start..stop-1 of the whole array, as uint32."""
  found = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(start, stop):
    stride = math.prod(split.shape[axis + 1 : stop])
    index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    if split.axes[axis]:
      shard = lax.axis_index(split.axes[axis]).astype(jnp.uint32)
      index = index + shard * np.uint32(x.shape[axis])
    found = found + index * np.uint32(stride)
  return found


# Inside shard_map a loop's carry must vary over the axes its result varies on.


def varying(xs: Sequence[jax.Array], splits: Sequence[Split]) -> frozenset:
  """Returns the mesh axes over which sums over whole leaves still vary."""
  axes = list(map(sharding.varying, xs))
  for i, split in enumerate(splits):
    axes[i] = axes[i] - frozenset(split.names)
  return frozenset().union(*axes)
