"""Boundaries by false position: the fast way where no mask is asked for.

Between the smallest kept entry and the largest pruned one *any* number will do,
and one that parts the entries is found sooner than the last digit of a key:
counts at two quantiles of a sample close in on it, then counts at interpolated
places, some seven passes of nothing but sums. A last pass reads both entries.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.numerics.select import keys

_SAMPLE = 1024
_SIGN = np.uint32(1 << 31)
_INFINITY = np.uint32(0xFF800000)  # The largest key.


def secant(x: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the smallest kept and the largest pruned entry, exactly.

  Args:
    x: float32 of any shape, fewer than 2**31 entries; NaN ranks below
      everything and is no boundary.
    keep: how many are kept, up to x.size; uint32, traced.

  Returns:
    Two float32 scalars; -inf for the largest pruned one where all are kept,
    +inf for the smallest kept one where none is.

  Examples:
    >>> low, high = secant(jnp.array([1.0, 4.0, 3.0, 2.0]), jnp.uint32(2))
    >>> float(low), float(high)
    (3.0, 2.0)
  """
  ranks = keys.of(x)
  keep = keep.astype(jnp.int32)
  guesses = _guesses(ranks, keep)

  def going(carry):
    _, low, high, more, _ = carry
    return (high - low > 1) & (more != keep)

  def closer(carry):
    i, low, high, more, fewer = carry
    share = (more - keep).astype(jnp.float32) / (more - fewer)
    width = (high - low).astype(jnp.float32)
    between = low + (share * width).astype(jnp.uint32)
    # False position, and every fourth time the middle, lest one end stays.
    middle = jnp.where(i % 4 == 3, low + (high - low) // 2, between)
    at = jnp.where(i < 2, guesses[jnp.minimum(i, 1)], middle)
    at = jnp.clip(at, low + 1, high - 1)
    count = _count(ranks, at)
    above = count >= keep
    return (
      i + 1,
      jnp.where(above, at, low),
      jnp.where(above, high, at),
      jnp.where(above, count, more),
      jnp.where(above, fewer, count),
    )

  # At `low` at least `keep` entries lie above or equal, at `high` fewer.
  start = (
    jnp.int32(0),
    jnp.uint32(0),
    _INFINITY + np.uint32(1),
    jnp.int32(x.size),
    jnp.int32(0),
  )
  _, cut, _, more, _ = lax.while_loop(going, closer, start)
  least = jnp.min(jnp.where(ranks >= cut, ranks, _INFINITY))
  most = jnp.max(jnp.where(ranks < cut, ranks, 0))
  tie = more != keep  # `cut` itself, of which some are kept and some are not.
  value = lambda key: keys.value(jnp.where(tie, cut, key), x.dtype)
  high = jnp.where((most > 1) | tie, value(most), -jnp.inf)
  return value(least), high


def _count(ranks: jax.Array, at: jax.Array) -> jax.Array:
  """Returns how many entries are at least ``at``; int32."""
  rows = ranks.reshape(-1, ranks.shape[-1]) if ranks.ndim > 1 else ranks[None]
  return jnp.sum(_sums(rows, at).astype(jnp.int32))


def _sums(rows: jax.Array, at: jax.Array) -> jax.Array:
  """Returns how many entries of each row are at least ``at``; float32."""
  # Processors compare signed integers. Sums of a row in float32 are exact below
  # 2**24, and vectorised.
  signed = lambda x: lax.bitcast_convert_type(x ^ _SIGN, jnp.int32)
  return jnp.sum((signed(rows) >= signed(at)).astype(jnp.float32), axis=1)


def _guesses(ranks: jax.Array, keep: jax.Array) -> jax.Array:
  """Returns two quantiles of a sample, three deviations to each side."""
  flat = ranks.ravel()
  flat = flat[:: max(1, flat.size // _SAMPLE)]
  n = flat.size
  part = keep.astype(jnp.float32) / ranks.size
  spread = 3 * jnp.sqrt(n * part * (1 - part)) + 1
  places = jnp.stack([n * part + spread, n * part - spread])
  places = jnp.floor(jnp.clip(places, 1, n))

  def refine(i, found):
    trial = found | (np.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(_sums(flat[None], trial[:, None]) >= places, trial, found)

  return lax.fori_loop(0, 32, refine, jnp.zeros(2, jnp.uint32))
