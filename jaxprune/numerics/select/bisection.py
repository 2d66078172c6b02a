"""Selection bit by bit, from nothing but sums: accelerators and shards."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import sharding
from jaxprune.numerics.counts import Limbs
from jaxprune.numerics.select import keys


def bisection(
  xs: Sequence[jax.Array], keep: Limbs, splits: Sequence[keys.Split]
) -> tuple[list[keys.Cutoff], jax.Array]:
  """Returns the cutoff of every leaf, and the key of every count."""
  ranks = [keys.of(x) for x in xs]
  uint = ranks[0].dtype
  width = 8 * uint.itemsize
  leaves = range(len(xs))
  pooled = keep[0].size == 1
  group = [0 if pooled else i for i in leaves]
  axes = keys.varying(xs, splits) | keys.varying(keep, [])

  def count(test: Callable[[int], jax.Array]) -> Limbs:
    return _count([test(i) for i in leaves], splits)

  def total(counts: Limbs) -> Limbs:
    if not pooled:
      return counts
    return counts_lib.carry(
      *(jnp.sum(x, keepdims=True, dtype=x.dtype) for x in counts)
    )

  def refine(i, key):
    trial = key | (uint.type(1) << (width - 1 - i).astype(uint))
    reach = total(count(lambda i: ranks[i] >= trial[group[i]]))
    return jnp.where(counts_lib.at_least(reach, keep), trial, key)

  key = sharding.vary(jnp.zeros(keep[0].shape, uint), axes)
  key = lax.fori_loop(0, width, refine, key)
  equal = [ranks[i] == key[group[i]] for i in leaves]
  above = total(count(lambda i: ranks[i] > key[group[i]]))
  ties = count(lambda i: equal[i])
  places = counts_lib.minus(keep, above)
  if pooled:  # Earlier leaves come first.
    low = jnp.cumsum(ties[1], dtype=jnp.uint32) - ties[1]
    high = jnp.cumsum(ties[0], dtype=jnp.uint32) - ties[0]
    places = counts_lib.minus(places, counts_lib.carry(high, low))
  surplus = ~counts_lib.at_least(places, ties)

  def place(test: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
    """Returns the last index before which no more ties lie than places."""

    def refine(i, index):
      trial = index | (np.uint32(1) << (31 - i).astype(jnp.uint32))
      reach = count(lambda i: equal[i] & test(i, trial[i]))
      return jnp.where(counts_lib.at_least(places, reach), trial, index)

    start = jnp.where(surplus, np.uint32(0), np.uint32(0xFFFFFFFF))
    passes = jnp.where(jnp.any(surplus), 32, 0)
    return lax.fori_loop(0, passes, refine, sharding.vary(start, axes))

  lead = jnp.zeros(len(xs), jnp.uint32)
  if any(split.lead for split in splits):
    major = lambda i: keys.positions(xs[i], splits[i], 0, splits[i].lead)
    lead = place(lambda i, at: major(i) < at)
  trail = place(
    lambda i, at: keys.before(
      xs[i], keys.Cutoff(key[group[i]], lead[i], at), splits[i]
    )
  )
  return [keys.Cutoff(key[group[i]], lead[i], trail[i]) for i in leaves], key


def _count(tests: Sequence[jax.Array], splits: Sequence[keys.Split]) -> Limbs:
  """Counts what is true of each whole leaf; one all-reduce for like leaves."""
  together: dict[tuple[str, ...], list[int]] = {}
  for i, split in enumerate(splits):
    together.setdefault(split.names, []).append(i)
  counts: dict[int, jax.Array] = {}
  for names, members in together.items():
    found = jnp.stack(counts_lib.true([tests[i] for i in members]), axis=1)
    if names:
      found = lax.psum(found, names)
    counts.update(zip(members, found, strict=True))
  high, low = jnp.stack([counts[i] for i in range(len(tests))], axis=1)
  return counts_lib.carry(high, low)
