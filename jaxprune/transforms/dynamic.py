"""Dynamic sparse training: the masks move, the number of weights does not.

Wrappers around a whole chain, not links of one: they see the raw gradient,
which grows connections, and they reset the optimizer's state of a weight that
comes back, whatever optax state holds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import checks
from jaxprune import distributions as distributions_lib
from jaxprune import masks as masks_lib
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import select, sharding
from jaxprune.transforms import sparsity as transforms
from jaxprune.transforms import zeros


class DynamicState(NamedTuple):
  """State of :func:`rigl` and :func:`set_`."""

  step: jax.Array  # Updates seen so far; int32, shape [].
  masks: tree_lib.PyTree  # Like params; bool, or uint8 where packed.
  inner_state: optax.OptState
  revived: jax.Array  # As in :class:`jaxprune.transforms.SparsifyState`.


@kinds.checked
def rigl(
  inner: optax.GradientTransformation,
  sparsity: float,
  key: jax.Array,
  *,
  end: int,
  begin: int = 1,
  every: int = 100,
  fraction: float = 0.3,
  distribution: distributions_lib.Distribution = distributions_lib.erk,
  which: tree_lib.Which = None,
  packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Moves connections to where the gradient is largest.

  Every ``every`` steps from ``begin`` up to ``end``, with k weights kept in a
  leaf and d = round(fraction / 2 (1 + cos(pi t / end)) k): the d smallest |w|
  are dropped, and of all weights that are then off the d with the largest |g|
  are grown, at zero and with fresh optimizer state.

  ``inner`` sees gradients with zeros where pruned.

  Args:
    inner: the optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
    sparsity: fraction of zeros, static; the same throughout.
    key: draws the first masks; may be traced, one for each member of an
      ensemble under ``vmap``.
    end: step from which masks stay.
    begin: first step on which they may move.
    every: steps between two moves.
    fraction: of the kept weights that move at first.
    distribution: how the leaves share the budget; not a pooled one.
    which: the leaves to prune; see :func:`jaxprune.tree.prunable`.
    packed: whether the state holds eight masks in a byte.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. ``masks.apply`` of its first
    masks makes the initial params sparse; else the first update does.

  Raises:
    ValueError: if an argument is out of range, or if ``update`` is called
      without params.

  References:
    Evci et al., 2020, arXiv:1911.11134, Algorithm 1.

  Examples:
    >>> tx = rigl(optax.sgd(1.0), 0.5, jax.random.key(0), end=9, every=1)
    >>> w = {'w': jnp.ones((4, 4))}
    >>> int(tx.init(w).masks['w'].sum())
    8
  """
  grow = lambda g, step: jnp.abs(g)
  return _moving(
    inner,
    sparsity,
    key,
    grow,
    (begin, end, every),
    fraction,
    distribution,
    which,
    packed,
  )


@kinds.checked
def set_(
  inner: optax.GradientTransformation,
  sparsity: float,
  key: jax.Array,
  *,
  end: int,
  begin: int = 1,
  every: int = 100,
  fraction: float = 0.3,
  distribution: distributions_lib.Distribution = distributions_lib.erk,
  which: tree_lib.Which = None,
  packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Moves connections to random places: sparse evolutionary training.

  As :func:`rigl`, but what grows is drawn at random; the fraction decays in
  the same way, and weights grow at zero (the paper draws them at random).

  Args:
    inner: the optimizer.
    sparsity: fraction of zeros, static.
    key: draws the first masks and all growth; may be traced.
    end: step from which masks stay.
    begin: first step on which they may move.
    every: steps between two moves.
    fraction: of the kept weights that move at first.
    distribution: how the leaves share the budget; not a pooled one.
    which: the leaves to prune; see :func:`jaxprune.tree.prunable`.
    packed: whether the state holds eight masks in a byte.

  Returns:
    An ``optax.GradientTransformationExtraArgs``.

  Raises:
    ValueError: as :func:`rigl`.

  References:
    Mocanu et al., 2018, arXiv:1707.04780, Algorithm 1.

  Examples:
    >>> tx = set_(optax.sgd(1.0), 0.75, jax.random.key(0), end=9)
    >>> int(tx.init({'w': jnp.ones((4, 4))}).masks['w'].sum())
    4
  """

  def grow(g, step):
    drawn = jax.random.uniform(jax.random.fold_in(key, step), g.shape)
    return sharding.like(drawn, g)

  return _moving(
    inner,
    sparsity,
    key,
    grow,
    (begin, end, every),
    fraction,
    distribution,
    which,
    packed,
  )


def _moving(
  inner: optax.GradientTransformation,
  sparsity: float,
  key: jax.Array,
  grow: Callable[[jax.Array, jax.Array], jax.Array],
  steps: tuple[int, int, int],
  fraction: float,
  distribution: distributions_lib.Distribution,
  which: tree_lib.Which,
  packed: bool,
) -> optax.GradientTransformationExtraArgs:
  """Drops the smallest kept weights and grows those of the largest ``grow``."""
  begin, end, every = steps
  checks.sparsity(sparsity)
  checks.real('fraction', fraction)
  if not 0 <= fraction <= 1:
    raise ValueError(f'`fraction` must be in [0, 1], got {fraction}.')
  for name, step in (('begin', begin), ('end', end), ('every', every)):
    checks.whole(name, step)
  if every < 1 or not 0 <= begin <= end:
    raise ValueError(
      'Steps must satisfy every >= 1 and 0 <= begin <= end, got '
      f'every={every}, begin={begin}, end={end}.'
    )
  if isinstance(distribution, distributions_lib.Pooled):
    raise ValueError(
      'Masks that move keep a fixed number of weights in each leaf; a pooled '
      'distribution fixes none. Use uniform, erk or by_macs.'
    )
  inner = optax.with_extra_args_support(inner)

  def counts(params) -> dict[str, int]:
    shapes = {k: w.shape for k, w in tree_lib.leaves(params).items()}
    return distribution(shapes, sparsity)

  def init_fn(params):
    start = revived = jnp.zeros([], jnp.int32)
    if not jax.tree.leaves(params):  # Optax asks with a placeholder.
      return DynamicState(start, params, inner.init(params), revived)
    weights = tree_lib.prunable(params, which)
    kept = counts(weights)
    scores = {
      path: jax.random.uniform(jax.random.fold_in(key, i), w.shape)
      for i, (path, w) in enumerate(tree_lib.leaves(weights).items())
    }
    drawn = select.top_masks(scores, kept)
    masks = tree_lib.map_with_path(
      lambda path, w: sharding.like(drawn[path], w), weights
    )
    zeros.check_finite(params, masks)
    state = inner.init(masks_lib.apply(masks, params))
    held = masks_lib.pack(masks) if packed else masks
    return DynamicState(start, held, state, revived)

  def update_fn(updates, state, params=None, **extra):
    if params is None:
      raise ValueError('Moving masks need `params`; pass it to update.')
    step, masks = state.step, state.masks
    if packed:
      masks = masks_lib.unpack(masks, params)
    updates_in = masks_lib.apply(masks, updates)
    out, inner_state = inner.update(
      updates_in, state.inner_state, params, **extra
    )

    def move():
      part = fraction / 2 * (1 + jnp.cos(jnp.pi * step / max(end, 1)))
      weights = tree_lib.restrict(params, masks)
      kept = counts(weights)
      stay = {k: counts_lib.kept(n, part) for k, n in kept.items()}
      flat, old = tree_lib.leaves(weights), tree_lib.leaves(masks)
      gradients = tree_lib.leaves(tree_lib.restrict(updates, masks))
      sizes = {
        k: jnp.where(old[k], jnp.abs(w), -jnp.inf) for k, w in flat.items()
      }
      staying = select.top_masks(sizes, stay)
      draw = (step + 1) * len(flat)  # Keys that the first masks did not use.
      growth = {
        k: jnp.where(staying[k], jnp.inf, _finite(grow(g, draw + i)))
        for i, (k, g) in enumerate(gradients.items())
      }
      drawn = select.top_masks(growth, kept)
      like = lambda named: tree_lib.map_with_path(
        lambda path, _: named[path], weights
      )
      return like(drawn), like(staying)

    due = (step >= begin) & (step < end) & ((step - begin) % every == 0)
    new, held = jax.lax.cond(due, move, lambda: (masks, masks))
    # What was dropped and grown again at once starts from zero as well.
    grown = jax.tree.map(lambda new, held: new & ~held, new, held)
    fresh = inner.init(masks_lib.apply(held, params))
    inner_state = transforms.replace_in_state(
      inner, inner_state, fresh, params, grown
    )
    out = transforms.project(out, params, held)
    new = masks_lib.pack(new) if packed else new
    revived = zeros.most_revived(params, masks, state.revived, step)
    after = transforms.next_step(step)
    return out, DynamicState(after, new, inner_state, revived)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _finite(x: jax.Array) -> jax.Array:
  """Returns x below infinity, which is the rank of the weights that stay."""
  return jnp.minimum(x, jnp.finfo(x.dtype).max)
