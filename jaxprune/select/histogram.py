"""Selection by histograms: the fast way on one CPU device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.counts import Limbs
from jaxprune.select import keys

_ROW = 4096  # Keys per histogram block: 16 KiB, half of a first-level cache.
_BINS = 1 << 16


def histogram(
  xs: Sequence[jax.Array], keep: Limbs
) -> tuple[list[keys.Cutoff], jax.Array]:
  """Returns the cutoff of every whole leaf, and the key of every count.

  One small program serves any number of leaves: a loop over leaves, in it a
  loop over rows of keys, which are made from the scores when they are read.
  """
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
  cuts = []
  for i, x in enumerate(xs):
    # A cutoff before this leaf takes none of its ties, one beyond it all.
    g = 0 if pooled else i
    local = row[g] - np.int32(starts[i])
    place = jnp.minimum(local * _ROW, max(x.size - _ROW, 0)) + column[g]
    place = jnp.where(local < heights[i], place, x.size)
    place = jnp.where(local < 0, 0, place).astype(jnp.uint32)
    cuts.append(keys.Cutoff(key[g], jnp.uint32(0), place))
  return cuts, key


def _reader(
  xs: Sequence[jax.Array], starts: np.ndarray, heights: Sequence[int]
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function from a row to its keys, in whichever leaf it lies.

  Leaves are read where they are: the scores are the one large temporary. The
  last row of a leaf begins early enough to be full, and what the row before
  has shown is replaced by 0, as is the padding of a leaf shorter than a row:
  below every key.
  """
  leaf_of = jnp.asarray(np.repeat(np.arange(len(xs)), heights), jnp.int32)
  first = jnp.asarray(starts, jnp.int32)

  def reader(x):
    flat, width = x.ravel(), min(x.size, _ROW)

    def read(row):
      at = jnp.minimum(row * _ROW, flat.size - width)
      ranks = keys.of(lax.dynamic_slice(flat, (at,), (width,)))
      new = lax.iota(jnp.int32, width) >= row * _ROW - at
      return jnp.pad(jnp.where(new, ranks, 0), (0, _ROW - width))

    return read

  readers = [reader(x) for x in xs]
  if len(readers) == 1:
    return readers[0]

  def read(row):
    leaf = leaf_of[row]
    return lax.switch(leaf, readers, row - first[leaf])

  return read


def _find(
  read: Callable[[jax.Array], jax.Array],
  uint: Any,
  axes: frozenset,
  start: jax.Array,
  stop: jax.Array,
  keep: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns key, row and column of the cutoff of rows start..stop-1."""
  width = 8 * uint.itemsize

  def next_digit(i, carry):
    key, keep, _ = carry
    shift = (width - 16 - 16 * i).astype(uint)
    add = functools.partial(_add_digits, read, key, shift)
    counts = keys.vary(jnp.zeros(_BINS + 1, jnp.uint32), axes)
    counts = lax.fori_loop(start, stop, add, counts)[:_BINS]
    digit, keep, ties = _descend(counts, keep)
    return key | (digit.astype(uint) << shift), keep, ties

  vary = lambda tree: jax.tree.map(lambda x: keys.vary(x, axes), tree)
  carry = vary((jnp.zeros([], uint), keep, keep))
  key, keep, ties = lax.fori_loop(0, width // 16, next_digit, carry)

  # Rows are counted off until the places run out, where they do.
  def more(carry):
    _, seen, _, _ = carry
    return seen < keep

  def count_row(carry):
    row, seen, _, _ = carry
    equal = read(row) == key
    return row + 1, seen + jnp.sum(equal, dtype=jnp.uint32), seen, equal

  surplus = ties > keep
  none = jnp.where(surplus, 0, keep)
  carry = vary((start, none, none, jnp.zeros(_ROW, bool)))
  row, _, seen, equal = lax.while_loop(more, count_row, carry)
  taken = jnp.cumsum(equal.astype(jnp.uint32))
  column = jnp.sum(taken < keep - seen, dtype=jnp.int32) + 1
  row = jnp.where(surplus, jnp.maximum(row - 1, start), stop)
  return key, row, jnp.where(surplus, column, 0)


def _add_digits(
  read: Callable[[jax.Array], jax.Array],
  prefix: jax.Array,
  shift: jax.Array,
  row: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Counts the digits at ``shift`` of keys whose higher digits match."""
  ranks = read(row)
  digit = ((ranks >> shift) & 0xFFFF).astype(jnp.int32)
  # In two shifts, as one by all bits of a key is not defined.
  same = (ranks ^ prefix) >> shift >> np.array(15, ranks.dtype) < 2
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
