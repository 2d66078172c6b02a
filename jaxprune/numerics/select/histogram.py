"""Selection by histograms: the fast way on one CPU device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.numerics import sharding
from jaxprune.numerics.counts import Limbs
from jaxprune.numerics.select import keys

_ROW = 4096  # Keys per histogram block: 16 KiB, half of a first-level cache.
_BINS = 1 << 16


def histogram(
  xs: Sequence[jax.Array], keep: Limbs
) -> tuple[list[keys.Cutoff], jax.Array]:
  """Returns the cutoff of every whole leaf, and the key of every count.

  One small program serves any number of leaves: a loop over leaves, in it a
  loop over rows of keys, which are made from the scores when they are read.
  """
  xs = [sharding.whole(x) for x in xs]  # One device may be a mesh as well.
  heights = [-(-x.size // _ROW) for x in xs]
  ends = np.cumsum(heights)
  starts = ends - heights
  read = _reader(xs, starts, heights)
  pooled = keep[0].size == 1
  spans = (
    jnp.asarray(starts[:1] if pooled else starts, jnp.int32),
    jnp.asarray(ends[-1:] if pooled else ends, jnp.int32),
    (keep[0] << 16) | keep[1],
  )
  axes = keys.varying([*xs, *keep], [])
  uint = keys.unsigned(xs[0].dtype)
  find = lambda span: _find(read, uint, axes, *span)
  key, row, column = lax.map(find, spans)
  # A cutoff before a leaf takes none of its ties, one beyond it all.
  sizes = np.array([x.size for x in xs], np.int32)
  local = row - starts.astype(np.int32)
  place = jnp.minimum(local * _ROW, np.maximum(sizes - _ROW, 0)) + column
  place = jnp.where(local < np.array(heights, np.int32), place, sizes)
  place = jnp.where(local < 0, 0, place).astype(jnp.uint32)
  ranks = jnp.broadcast_to(key, place.shape)
  lead = jnp.uint32(0)
  return [keys.Cutoff(ranks[i], lead, place[i]) for i in range(len(xs))], key


def _reader(
  xs: Sequence[jax.Array], starts: np.ndarray, heights: Sequence[int]
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function from a row to its keys, in whichever leaf it lies.

  Leaves are read where they are: the scores are the one large temporary. The
  last row of a leaf begins early enough to be full, and what the row before
  has shown is replaced by 0, as is the padding of a leaf shorter than a row:
  below every key. What is particular to a leaf is one copy, as it is compiled
  once for each.
  """
  leaf_of = jnp.asarray(np.repeat(np.arange(len(xs)), heights), jnp.int32)
  first = jnp.asarray(starts, jnp.int32)
  sizes = jnp.asarray([x.size for x in xs], jnp.int32)

  def copier(x):
    flat, width = x.ravel(), min(x.size, _ROW)

    def copy(at):
      part = lax.dynamic_slice(flat, (at,), (width,))
      return jnp.pad(part, (0, _ROW - width))

    return copy

  copiers = [copier(x) for x in xs]

  def read(row):
    leaf = leaf_of[row]
    begin = (row - first[leaf]) * _ROW
    at = jnp.minimum(begin, jnp.maximum(sizes[leaf] - _ROW, 0))
    part = lax.switch(leaf, copiers, at)
    place = at + lax.iota(jnp.int32, _ROW)
    new = (place >= begin) & (place < sizes[leaf])
    return jnp.where(new, keys.of(part), 0)

  return read


class _Prefix(NamedTuple):
  """The digits found so far of the last entry kept.

  Entries rank by key, and equal ones by position, the lower one first; its
  complement follows the key as two digits more.
  """

  key: jax.Array  # uint, shape [].
  back: jax.Array  # The complement of the position, shape [].
  late: jax.Array  # Whether the digit at hand is one of `back`.
  shift: jax.Array  # Of the digit at hand.


def _find(
  read: Callable[[jax.Array], jax.Array],
  uint: Any,
  axes: frozenset,
  start: jax.Array,
  stop: jax.Array,
  keep: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns key, row and column of the cutoff of rows start..stop-1."""
  digits = 8 * uint.itemsize // 16
  wide = jnp.promote_types(uint, jnp.uint32)

  def more(carry):
    i, _, _, keep, ties = carry
    return (i < digits) | ((i < digits + 2) & (ties > keep))

  def next_digit(carry):
    i, key, back, keep, _ = carry
    late = i >= digits
    left = jnp.where(late, digits + 1 - i, digits - 1 - i)
    shift = (16 * left).astype(wide)
    add = functools.partial(_add_digits, read, _Prefix(key, back, late, shift))
    counts = sharding.vary(jnp.zeros(_BINS + 1, jnp.uint32), axes)
    counts = lax.fori_loop(start, stop, add, counts)[:_BINS]
    digit, keep, ties = _descend(counts, keep)
    part = digit.astype(wide) << shift
    key, back = (
      jnp.where(late, key, key | part),
      jnp.where(late, back | part, 0),
    )
    return i + 1, key, back, keep, ties

  vary = lambda tree: jax.tree.map(lambda x: sharding.vary(x, axes), tree)
  zero = jnp.zeros([], wide)
  carry = vary((jnp.int32(0), zero, zero, keep, keep))
  passes, key, back, _, _ = lax.while_loop(more, next_digit, carry)
  surplus = passes > digits
  place = ~back.astype(jnp.uint32)
  row = jnp.where(surplus, (place // _ROW).astype(jnp.int32), stop)
  column = jnp.where(surplus, (place % _ROW).astype(jnp.int32) + 1, 0)
  return key.astype(uint), row, column


def _add_digits(
  read: Callable[[jax.Array], jax.Array],
  prefix: _Prefix,
  row: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Counts the digits at hand of entries whose higher digits match."""
  key, back, late, shift = prefix
  ranks = read(row).astype(key.dtype)
  place = jnp.uint32(row) * _ROW + lax.iota(jnp.uint32, _ROW)
  word = jnp.where(late, (~place).astype(key.dtype), ranks)
  digit = ((word >> shift) & 0xFFFF).astype(jnp.int32)
  # In two shifts, as one by all bits of a key is not defined.
  same = (word ^ jnp.where(late, back, key)) >> shift >> 15 < 2
  same &= (ranks == key) | ~late
  return counts.at[jnp.where(same, digit, _BINS)].add(1)


def _descend(
  counts: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds the bin of the keep-th largest digit, in two steps of 256 bins.

  Returns:
    The bin, how many of its entries are wanted, and how many it has.
  """
  table = counts.reshape(256, 256)
  high, keep = _bin(jnp.sum(table, axis=1, dtype=jnp.uint32), keep)
  low, keep = _bin(table[high], keep)
  return high * 256 + low, keep, table[high, low]


def _bin(counts: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
  reached = jnp.cumsum(counts[::-1])[::-1]  # Entries in this bin and above.
  index = jnp.sum(reached >= keep, dtype=jnp.int32) - 1
  return index, keep - (reached[index] - counts[index])
