"""The maths of Lookahead, over flat mappings from paths."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.lookahead.wiring import (
  Look,
  Side,
  Wiring,
  channels_of,
  complement,
)


def squares_of(w: jax.Array) -> jax.Array:
  """Returns the squares in float32 or wider."""
  return jnp.square(w.astype(jnp.promote_types(w.dtype, jnp.float32)))


def products(
  squares: Mapping[str, jax.Array],
  wiring: Wiring,
  vectors: Mapping[str, jax.Array],
  paths: Sequence[str],
  look: Look,
) -> dict[str, jax.Array]:
  """Returns the scores of some leaves from the squares of all."""
  place = {path: i for i, path in enumerate(wiring)}
  ends: dict[tuple[str, bool], list[str]] = {}  # Leaves of a space, in order.
  widths: dict[str, int] = {}
  for path, wire in wiring.items():
    for side, writes in ((wire.reads, False), (wire.writes, True)):
      if side is not None:
        ends.setdefault((side.space, writes), []).append(path)
        top = int(channels_of(side, squares[path].shape).max(initial=-1)) + 1
        widths[side.space] = max(widths.get(side.space, 0), top)

  @functools.cache
  def flow(path: str, writes: bool) -> tuple[jax.Array, np.ndarray]:
    """Returns the squared norm per channel of one leaf, and where it has one.

    One entry more than there are channels, for those that lie outside.
    """
    side = wiring[path].writes if writes else wiring[path].reads
    assert side is not None
    x, width = squares[path], widths[side.space]
    channels = channels_of(side, x.shape)
    norm = jnp.sum(x, complement(x.ndim, side.axes))
    norm = norm * _factors(side, channels.shape, vectors)
    known = np.zeros(width + 1, bool)
    known[channels] = True
    if _is_identity(channels, width):
      return jnp.pad(norm, (0, 1)), known
    return jnp.zeros(width + 1, x.dtype).at[channels].add(norm), known

  @functools.cache
  def total(
    space: str, writes: bool, count: int
  ) -> tuple[jax.Array, np.ndarray]:
    """Returns the sum over the first writers, or over the last readers."""
    leaves = ends[space, writes]
    path = leaves[count - 1] if writes else leaves[-count]
    norm, known = flow(path, writes)
    if count == 1:
      return norm, known
    norms, knowns = total(space, writes, count - 1)
    return norms + norm, knowns | known

  def seen(path: str, side: Side, writers: bool) -> jax.Array:
    """Returns what a leaf sees on one side, an array of the leaf's rank."""
    x = squares[path]
    leaves = ends.get((side.space, writers), [])
    others = [
      other
      for other in leaves
      if (place[other] < place[path] if writers else place[other] > place[path])
    ]
    if not others:
      return jnp.ones((1,) * x.ndim, x.dtype)
    norm, known = total(side.space, writers, len(others))
    channels = channels_of(side, x.shape)
    straight = _is_identity(channels, widths[side.space])
    factor = norm[:-1] if straight else norm[channels]
    factor = factor * _factors(side, channels.shape, vectors)
    known = known & (np.arange(known.size) < known.size - 1)
    factor = jnp.where(known[channels], factor, 1)
    return jnp.expand_dims(factor, complement(x.ndim, side.axes))

  scores = {}
  for path in paths:
    score, wire = squares[path], wiring[path]
    if look != 'after' and wire.reads is not None:
      score = score * seen(path, wire.reads, True)
    if look != 'before' and wire.writes is not None:
      score = score * seen(path, wire.writes, False)
    scores[path] = score
  return scores


def _factors(
  side: Side, shape: tuple[int, ...], vectors: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns the squared factors of all norms, for each entry of a side."""
  factor = jnp.ones(shape)
  for norm in side.norms:
    one = jnp.float32(1)
    if norm.scale is not None:
      one = jnp.square(vectors[norm.scale].astype(jnp.float32))
    if norm.var is not None:
      one = one / (vectors[norm.var].astype(jnp.float32) + norm.eps)
    if norm.entries is not None:
      one = jnp.ravel(one)[norm.entries]
    factor = factor * one
  return factor


def _is_identity(index: np.ndarray, width: int) -> bool:
  return index.shape == (width,) and bool((index == np.arange(width)).all())
