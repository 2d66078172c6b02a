"""Exact counts of weights, beyond what an int32 or a float32 holds.

A count that is only known under jit is a pair of uint32, its *limbs*: (high,
low) stands for high * 2**16 + low, which reaches 2**48 and whose sums over up
to 2**16 leaves cannot overflow.

A part of a count is rounded by one law, half to even, whoever asks: of n
weights a sparsity s prunes round(s n) and keeps the others, :func:`kept`. A
limit that is a fraction is a bound and rounds inwards: :func:`least`,
:func:`most`. A fraction counts as the decimal that is written, traced or not:
0.05 of 450 is the half 22.5, though the nearest float32 is above 0.05.
"""

import fractions
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks
from jaxprune.checks import kinds

Keep = Any  # A count: int, an int32 or uint32 scalar, or a pair of limbs.
Limbs = tuple[jax.Array, jax.Array]  # high * 2**16 + low, both uint32.

_ROW = 4096
_PARTS = np.uint32(10**4)
_DECIMALS = (np.arange(10**4 + 1) / 10**4).astype(np.float32)


@kinds.checked
def kept(size: int, sparsity: float | jax.Array) -> Keep:
  """Returns how many of ``size`` weights a sparsity keeps, exactly.

  kept = n - round(s n), half to even.

  Args:
    size: n, static, below 2**48.
    sparsity: s in [0, 1]. A float counts as the decimal that is written. A
      float32, traced or not, counts as the decimal of up to four digits whose
      nearest it is, and any other as the number m 2**-q that it is. Either
      product is formed in integers, so that no weight is lost to the 24 bits
      of a float32.

  Returns:
    A Python int for a static s; else uint32 of shape [], or from 2**32 on the
    pair (high, low) of uint32 that :func:`jaxprune.numerics.select.top_mask`
    takes.

  Raises:
    TypeError: if s is no number.
    ValueError: if an s that is known is not in [0, 1].

  Examples:
    >>> kept(5, 0.5), kept(7, 0.5), kept(10**9, 0.9)
    (3, 3, 100000000)
    >>> int(kept(2**25 + 1, jnp.float32(2**-25)))
    33554432
  """
  checks.sparsity(sparsity)
  if isinstance(sparsity, float | int | np.floating):
    return size - round(decimal(sparsity) * size)
  high, low = kept_limbs([size], jnp.asarray(sparsity)[None])
  high, low = high[0], low[0]
  return (high, low) if size >= 1 << 32 else (high << 16) | low


def kept_limbs(sizes: Sequence[int], sparsity: jax.Array) -> Limbs:
  """Returns :func:`kept` of several leaves, for traced sparsities.

  Args:
    sizes: n of each leaf, static, below 2**48.
    sparsity: float32 of shape [leaves], traced.

  Returns:
    Limbs, uint32 of shape [leaves].

  Examples:
    >>> high, low = kept_limbs([10, 2**20], jnp.array([0.5, 0.0]))
    >>> high.tolist(), low.tolist()
    ([0, 16], [5, 0])
  """
  limbs_of = jnp.asarray(np.stack([split(size) for size in sizes]))
  pruned = jax.vmap(part)(limbs_of, sparsity)
  whole = (limbs_of[:, 1] + (limbs_of[:, 2] << 16), limbs_of[:, 0])
  return minus(whole, pruned)


def part(limbs: jax.Array, fraction: jax.Array) -> Limbs:
  """Returns round(fraction count), half to even, of a count that is traced.

  Args:
    limbs: the count, uint32 of shape [3], as :func:`split` gives it.
    fraction: float32 of shape [], in [0, 1].

  Examples:
    >>> high, low = part(jnp.asarray(split(10**9)), jnp.float32(0.5))
    >>> int(high) * 2**16 + int(low)
    500000000
  """
  high, low, point, later = scale(limbs, fraction)
  half, later = at_half(point, later)
  up = half & (later | (low & 1 == 1))
  return carry(high, low + up.astype(jnp.uint32))


def least(size: int, fraction: float) -> int:
  """Returns the fewest of ``size`` that are at least a fraction of them.

  The fraction counts as the decimal that is written: 0.07 of 100 are 7, not
  the 8 that float64 makes of 7.000000000000001.

  Args:
    size: of how many.
    fraction: in [0, 1], static.

  Examples:
    >>> least(100, 0.07), least(10, 0.25)
    (7, 3)
  """
  return math.ceil(decimal(fraction) * size)


def most(size: int, fraction: float) -> int:
  """Returns the most of ``size`` that are at most a fraction of them.

  Args:
    size: of how many.
    fraction: in [0, 1], static, as for :func:`least`.

  Examples:
    >>> most(100, 0.29), most(10, 0.25)
    (29, 2)
  """
  return math.floor(decimal(fraction) * size)


def decimal(fraction: float) -> fractions.Fraction:
  """Returns the decimal that a float stands for, as :func:`scale` has it.

  Args:
    fraction: a float counts as it is written; a float32 as the decimal of up to
      four digits that it is nearest to, else as its exact value.

  Examples:
    >>> decimal(0.3)
    Fraction(3, 10)
  """
  value = float(fraction)
  if np.float32(value) != value:
    return fractions.Fraction(repr(value))
  parts = min(max(round(value * 10**4), 0), 10**4)
  if _DECIMALS[parts] == value:
    return fractions.Fraction(parts, 10**4)
  return fractions.Fraction(value)


def split(count: int) -> np.ndarray:
  """Returns a count below 2**48 as three limbs of 16 bits, lowest first."""
  return np.array([(count >> i) & 0xFFFF for i in (0, 16, 32)], np.uint32)


def scale(
  limbs: jax.Array, fraction: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Multiplies a count by a float32 in [0, 1], exactly.

  Args:
    limbs: the count, uint32 of shape [3], as :func:`split` gives it.
    fraction: float32 of shape []; it stands for a decimal of up to four digits
      if it is the nearest float32 to one.

  Returns:
    The integer part as high * 2**16 + low, the first 32 bits after the point,
    and whether any later bit is set.
  """
  fraction = jnp.clip(fraction.astype(jnp.float32), 0.0, 1.0)
  parts = jnp.round(fraction * _PARTS).astype(jnp.uint32)
  is_decimal = jnp.asarray(_DECIMALS)[parts] == fraction
  return jax.tree.map(
    lambda decimal, binary: jnp.where(is_decimal, decimal, binary),
    _scale_decimal(limbs, parts),
    _scale_binary(limbs, fraction),
  )


def _scale_decimal(
  limbs: jax.Array, parts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """:func:`scale` by parts / 10**4: a long division in limbs of 16 bits."""
  product, over = [], jnp.uint32(0)
  for i in range(3):
    over += limbs[i] * parts
    product.append(over & 0xFFFF)
    over >>= 16
  product.append(over)
  quotient, rest = [], jnp.uint32(0)
  zero = jnp.uint32(0)
  for limb in (*reversed(product), zero, zero):  # Two limbs after the point.
    rest = (rest << 16) | limb
    quotient.append(rest // _PARTS)
    rest %= _PARTS
  _, second, first, low, *point = quotient  # The product is below 2**48.
  high = (second << 16) + first
  return high, low, (point[0] << 16) + point[1], rest > 0


def _scale_binary(
  limbs: jax.Array, fraction: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """:func:`scale` by the number that a float32 is."""
  bits = jax.lax.bitcast_convert_type(fraction, jnp.uint32)
  exponent = jnp.maximum(bits >> 23, 1).astype(jnp.int32)
  mantissa = jnp.where(bits >> 23 > 0, 1 << 23, 0) | (bits & 0x7FFFFF)
  mantissa = mantissa.astype(jnp.uint32)
  # n m in limbs of 16 bits; none of the sums of halves overflows.
  low, high = limbs * (mantissa & 0xFFFF), limbs * (mantissa >> 16)
  at = lambda i, x: jnp.pad(x, (i, 3 - i))
  halves = at(0, low & 0xFFFF) + at(1, low >> 16)
  halves += at(1, high & 0xFFFF) + at(2, high >> 16)
  product, over = [], jnp.uint32(0)
  for limb in halves:
    over += limb
    product.append(over & 0xFFFF)
    over >>= 16
  # fraction = mantissa 2**-shift, with 23 <= shift <= 149.
  shift = 150 - exponent
  # From 32 bits before the point.
  product = jnp.pad(jnp.stack(product), (2, 14))
  limb, bit = shift // 16, (shift % 16).astype(jnp.uint32)
  window = jax.lax.dynamic_slice(product, (limb,), (6,))
  parts = ((window[:5] >> bit) | (window[1:] << (16 - bit))) & 0xFFFF
  below = jnp.where(jnp.arange(22) < limb, product, 0)
  rest = jnp.any(below > 0) | (window[0] & ((np.uint32(1) << bit) - 1) > 0)
  return (
    parts[3] + (parts[4] << 16), parts[2], parts[0] + (parts[1] << 16), rest
  )  # fmt: skip


def at_half(point: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns whether a fraction is a half or more, and whether it is off it.

  Args:
    point: the first 32 bits after the point, as :func:`scale` gives them.
    rest: whether any later bit is set.
  """
  return point >> 31 == 1, rest | (point << 1 > 0)


def limbs(count: Keep) -> Limbs:
  """Returns a count as (high, low), count = high * 2**16 + low, low < 2**16."""
  if isinstance(count, tuple):
    return carry(*count)
  if isinstance(count, int | np.integer):
    high, low = divmod(int(count), 1 << 16)
    return jnp.uint32(high), jnp.uint32(low)
  count = jnp.asarray(count).astype(jnp.uint32)
  return count >> 16, count & 0xFFFF


def carry(high: jax.Array, low: jax.Array) -> Limbs:
  """Brings the low limb below 2**16."""
  return high + (low >> 16), low & 0xFFFF


def stack(limbs: Sequence[Limbs]) -> Limbs:
  """Returns several counts as one pair of arrays."""
  return jnp.stack([high for high, _ in limbs]), jnp.stack(
    [low for _, low in limbs]
  )


def at_least(a: Limbs, b: Limbs) -> jax.Array:
  """Returns whether a >= b."""
  return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def minus(a: Limbs, b: Limbs) -> Limbs:
  """Returns max(a - b, 0)."""
  borrow = (a[1] < b[1]).astype(jnp.uint32)
  high, low = a[0] - b[0] - borrow, a[1] + (borrow << 16) - b[1]
  some = at_least(a, b)
  return jnp.where(some, high, 0), jnp.where(some, low, 0)


def leading(shape: tuple[int, ...]) -> int:
  """Returns how many leading axes to count apart for the rest to fit uint32.

  Args:
    shape: shape of an array.

  Examples:
    >>> leading((80, 8192, 8192)), leading((3, 4))
    (1, 0)
  """
  lead = 0
  while math.prod(shape[lead:]) >= 1 << 32:
    lead += 1
  return lead


def _at_once(test: jax.Array) -> jax.Array:
  """Returns counts that sum to what is true; uint32, of rank 1."""
  lead = leading(test.shape)
  tail = tuple(range(lead, test.ndim))
  return jnp.sum(test, axis=tail, dtype=jnp.uint32).ravel()


def _by_rows(test: jax.Array) -> jax.Array:
  """The same where a reduction would write the array as uint32 first."""
  flat = test.ravel()
  whole = flat.size // _ROW

  def add(i, count):
    row = jax.lax.dynamic_slice(flat, (i * _ROW,), (_ROW,))
    # A sum in float32 is vectorised, and exact below 2**24.
    return count + jnp.sum(row.astype(jnp.float32)).astype(jnp.uint32)

  rest = jnp.sum(flat[whole * _ROW :], dtype=jnp.uint32)
  return jax.lax.fori_loop(0, whole, add, rest)[None]


def true(tests: Sequence[jax.Array]) -> Limbs:
  """Counts what is true of each of some arrays of any size.

  Returns:
    Limbs, uint32 of shape [arrays].
  """
  alone = jax.device_count() == 1  # Rows of an array on several are a gather.
  counts = [
    jax.lax.platform_dependent(test, cpu=_by_rows, default=_at_once)
    if alone and _ROW < test.size < 1 << 31
    else _at_once(test)
    for test in tests
  ]
  longest = max((x.size for x in counts), default=1)
  # All in one array: a kernel for each would have to be compiled.
  table = jnp.stack([jnp.pad(x, (0, longest - x.size)) for x in counts])
  if longest == 1:
    return table[:, 0] >> 16, table[:, 0] & 0xFFFF
  add = lambda x: jnp.sum(x, axis=1, dtype=jnp.uint32)
  # The sum of the low limbs in two parts, for up to 2**24 of them.
  upper, lower = add((table >> 8) & 0xFF), add(table & 0xFF)
  upper = upper + (lower >> 8)
  high = add(table >> 16) + (upper >> 8)
  return high, ((upper & 0xFF) << 8) | (lower & 0xFF)
