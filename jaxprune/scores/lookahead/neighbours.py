"""The maths of Lookahead, over flat mappings from paths."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.numerics import floats
from jaxprune.numerics.floats import Scaled
from jaxprune.scores.lookahead.wiring import (
  Look,
  Side,
  Wiring,
  channels_of,
  complement,
)


def squares_of(w: jax.Array) -> Scaled:
  """Returns the squares over a power of two, in float32 or wider."""
  (unit,) = floats.split(w)
  return floats.times(unit, unit)


def products(
  squares: Mapping[str, Scaled],
  wiring: Wiring,
  vectors: Mapping[str, jax.Array],
  paths: Sequence[str],
  look: Look,
) -> dict[str, Scaled]:
  """Returns the scores of some leaves from the squares of all.

  Each over a power of two: what a product of three squares needs, no float
  holds.
  """
  place = {path: i for i, path in enumerate(wiring)}
  ends: dict[tuple[str, bool], list[str]] = {}  # Leaves of a space, in order.
  widths: dict[str, int] = {}
  for path, wire in wiring.items():
    for side, writes in ((wire.reads, False), (wire.writes, True)):
      if side is not None:
        ends.setdefault((side.space, writes), []).append(path)
        top = int(channels_of(side, squares[path].x.shape).max(initial=-1)) + 1
        widths[side.space] = max(widths.get(side.space, 0), top)

  @functools.cache
  def flow(path: str, writes: bool) -> tuple[Scaled, np.ndarray]:
    """Returns the squared norm per channel of one leaf, and where it has one.

    One entry more than there are channels, for those that lie outside.
    """
    side = wiring[path].writes if writes else wiring[path].reads
    assert side is not None
    (x, exponent), width = squares[path], widths[side.space]
    channels = channels_of(side, x.shape)
    norm = Scaled(jnp.sum(x, complement(x.ndim, side.axes)), exponent)
    norm, exponent = floats.times(norm, _factors(side, channels.shape, vectors))
    known = np.zeros(width + 1, bool)
    known[channels] = True
    if _is_identity(channels, width):
      return Scaled(jnp.pad(norm, (0, 1)), exponent), known
    norms = jnp.zeros(width + 1, norm.dtype).at[channels].add(norm)
    return Scaled(norms, exponent), known

  @functools.cache
  def total(space: str, writes: bool, count: int) -> tuple[Scaled, np.ndarray]:
    """Returns the sum over the first writers, or over the last readers."""
    leaves = ends[space, writes]
    path = leaves[count - 1] if writes else leaves[-count]
    norm, known = flow(path, writes)
    if count == 1:
      return norm, known
    norms, knowns = total(space, writes, count - 1)
    return floats.plus(norms, norm), knowns | known

  def seen(path: str, side: Side, writers: bool) -> Scaled:
    """Returns what a leaf sees on one side, an array of the leaf's rank."""
    x = squares[path].x
    leaves = ends.get((side.space, writers), [])
    others = [
      other
      for other in leaves
      if (place[other] < place[path] if writers else place[other] > place[path])
    ]
    if not others:
      return Scaled(jnp.ones((1,) * x.ndim, x.dtype), jnp.int32(0))
    (norm, exponent), known = total(side.space, writers, len(others))
    channels = channels_of(side, x.shape)
    straight = _is_identity(channels, widths[side.space])
    factor = Scaled(norm[:-1] if straight else norm[channels], exponent)
    factor = floats.times(factor, _factors(side, channels.shape, vectors))
    known = known & (np.arange(known.size) < known.size - 1)
    one = floats.power(-factor.exponent, factor.x.dtype)
    factor = jnp.where(known[channels], factor.x, one), factor.exponent
    across = complement(x.ndim, side.axes)
    return Scaled(jnp.expand_dims(factor[0], across), factor[1])

  scores = {}
  for path in paths:
    score, wire = squares[path], wiring[path]
    if look != 'after' and wire.reads is not None:
      score = floats.times(score, seen(path, wire.reads, True))
    if look != 'before' and wire.writes is not None:
      score = floats.times(score, seen(path, wire.writes, False))
    scores[path] = score
  return scores


def _factors(
  side: Side, shape: tuple[int, ...], vectors: Mapping[str, jax.Array]
) -> Scaled:
  """Returns the squared factors of all norms, for each entry of a side."""
  factor = Scaled(jnp.ones(shape), jnp.int32(0))
  for norm in side.norms:
    one, exponent = Scaled(jnp.float32(1), jnp.int32(0))
    if norm.scale is not None:
      one, exponent = squares_of(vectors[norm.scale])
    if norm.var is not None:
      one = one / (floats.wide(vectors[norm.var]) + norm.eps)
    if norm.entries is not None:
      one = jnp.ravel(one)[norm.entries]
    factor = floats.times(factor, Scaled(one, exponent))
  return factor


def _is_identity(index: np.ndarray, width: int) -> bool:
  return index.shape == (width,) and bool((index == np.arange(width)).all())
