"""PDP and what it is compared with, as methods of ``phases``.

Each has four settings to try, two learning rates by two of its own. Soft masks
and gradual ones alike follow a ramp that ends ``end`` of the way through the
soft phase.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.pdp.phases import Method
from jaxprune import distributions, masks, soft, tree
from jaxprune.numerics import select
from jaxprune.soft import reparam

COLD = 0.01  # The relative temperature at which soft masks harden.

# Of a Method; a sparsity that is static gives exact counts.
_first = functools.partial(jax.jit, static_argnums=3)
_last = functools.partial(jax.jit, static_argnums=4)


def grid(rates: Sequence[float], **options: Sequence[float]) -> tuple:
  """Returns the settings to try: every rate with every value of the others."""
  names = ('rate', *options)
  values = itertools.product(rates, *options.values())
  return tuple(dict(zip(names, v, strict=True)) for v in values)


def dense(rates: Sequence[float]) -> Method:
  """Prunes nothing; four learning rates."""
  return Method(grid([rates[0] / 2, *rates, 2 * rates[-1]]))


def pdp(
  rates: Sequence[float],
  which: tree.Which,
  n_by_m: soft.NByM | None = None,
) -> Method:
  """PDP with a temperature relative to t^2, cooled before masks harden."""
  return _pdp(grid(rates, c=(0.25, 0.1), end=(0.6,)), which, n_by_m)


def pdp_spread(rates: Sequence[float], which: tree.Which) -> Method:
  """PDP with the shares of ERK, which leave some weights of every leaf."""

  def begin(params, extra, hyper, sparsity):
    del extra
    live = tree.leaves(tree.prunable(params, which))
    kept = distributions.erk({k: x.shape for k, x in live.items()}, sparsity)
    shares = {path: x.size - kept[path] for path, x in live.items()}
    options = {'tau': jnp.float32(0), 'c': hyper['c']}
    return soft.pdp_init(params, pruned=shares, which=which, **options)

  return pdp(rates, which)._replace(begin=_first(begin))


def pdp_published(
  rates: Sequence[float],
  which: tree.Which,
  n_by_m: soft.NByM | None = None,
) -> Method:
  """PDP with the two absolute temperatures that are published."""
  return _pdp(grid(rates, tau=(1e-4, 1e-5), end=(0.6,)), which, n_by_m)


def _pdp(
  settings: tuple, which: tree.Which, n_by_m: soft.NByM | None
) -> Method:
  def begin(params, extra, hyper, sparsity):
    del extra
    budget = None if n_by_m else sparsity
    tau, c = hyper.get('tau', jnp.float32(0)), hyper.get('c', jnp.float32(0))
    return soft.pdp_init(
      params, budget, n_by_m=n_by_m, which=which, tau=tau, c=c
    )

  def view(params, extra, control, hyper, progress):
    del extra
    state = soft_state(control, hyper, progress)
    return soft.pdp(params, state, n_by_m=n_by_m)

  def harden(params, extra, control, hyper, sparsity):
    del extra, hyper, sparsity
    hard = soft.harden(params, control, n_by_m=n_by_m)
    return soft.pdp(params, hard), hard.masks

  return Method(settings, begin=_first(begin), view=view, harden=_last(harden))


def soft_state(state: soft.PDPState, hyper: Any, progress: Any) -> Any:
  """Returns the state of PDP at a time of the soft phase."""
  cool = jnp.clip((progress - hyper['end']) / (1 - hyper['end']), 0.0, 1.0)
  cold = jnp.where(state.c > 0, state.c * (COLD / state.c) ** cool, 0.0)
  return state._replace(ramp=jnp.minimum(1.0, progress / hyper['end']), c=cold)


def cubic(hyper: Any, sparsity: Any, progress: Any) -> jax.Array:
  """Returns the sparsity of a cubic ramp at a time of the soft phase."""
  return sparsity * (1 - (1 - jnp.minimum(1.0, progress / hyper['end'])) ** 3)


def _masked(params: Any, control: Any) -> Any:
  return masks.apply(control, params)


def _largest(values: Any, sparsity: Any) -> Any:
  keep = masks.kept(tree.size(values), sparsity)
  return select.top_masks(values, keep)


def _projected(settings: tuple, which: tree.Which, draw: Any) -> Method:
  """A method that draws masks now and then: ``draw(w, hyper, s, progress)``."""

  def begin(params, *_):
    live = tree.prunable(params, which)
    return jax.tree.map(lambda w: jnp.ones(w.shape, bool), live)

  def refresh(params, extra, control, hyper, sparsity, progress):
    del extra
    live = tree.restrict(params, control)
    control = draw(live, hyper, sparsity, progress)
    return _masked(params, control), control

  def harden(params, extra, control, hyper, sparsity):
    params, control = refresh(params, extra, control, hyper, sparsity, 1.0)
    return params, control

  return Method(
    settings,
    begin=_first(begin),
    refresh=jax.jit(refresh),
    view=lambda params, extra, control, *_: _masked(params, control),
    harden=_last(harden),
  )


def gradual(rates: Sequence[float], which: tree.Which) -> Method:
  """Gradual magnitude pruning (GMP): a cubic ramp, one global threshold."""

  def draw(live, hyper, sparsity, progress):
    level = cubic(hyper, sparsity, progress)
    return _largest(jax.tree.map(jnp.abs, live), level)

  return _projected(grid(rates, end=(0.6, 1.0)), which, draw)


def one_shot(rates: Sequence[float], which: tree.Which) -> Method:
  """One cut by magnitude, one global threshold."""

  def draw(live, hyper, sparsity, progress):
    level = jnp.where(progress >= hyper['cut'], sparsity, 0.0)
    return _largest(jax.tree.map(jnp.abs, live), level)

  return _projected(grid(rates, cut=(0.25, 0.75)), which, draw)


def n_by_m_one_shot(
  rates: Sequence[float], which: tree.Which, n_by_m: soft.NByM
) -> Method:
  """One cut to the n largest of every m inputs (ASP)."""

  def draw(live, hyper, sparsity, progress):
    del sparsity
    due = progress >= hyper['cut']
    best = lambda w: masks.n_by_m(jnp.abs(w), *n_by_m, axis=-2) | ~due
    return jax.tree.map(best, live)

  return _projected(grid(rates, cut=(0.25, 0.75)), which, draw)


def sr_ste(
  rates: Sequence[float], which: tree.Which, n_by_m: soft.NByM
) -> Method:
  """Straight-through n:m masks drawn at every step, with decay."""

  def view(params, extra, control, hyper, progress):
    del extra, control, progress
    return reparam.sr_ste(params, n_by_m, decay=hyper['pull'], which=which)

  def harden(params, *_):
    live = tree.prunable(params, which)
    best = lambda w: masks.n_by_m(jnp.abs(w), *n_by_m, axis=-2)
    found = jax.tree.map(best, live)
    return _masked(params, found), found

  return Method(grid(rates, pull=(2e-4, 2e-3)), view=view, harden=_last(harden))


def soft_threshold(rates: Sequence[float], which: tree.Which) -> Method:
  """STR, its thresholds learned and moved together to meet the ramp.

  The published rule reaches a sparsity by tuning a decay on the thresholds,
  one run after another. Here one shift of all logits follows the cubic ramp:
  the share of each leaf is learned, and every run meets its budget.
  """

  def extra(params, hyper):
    del hyper
    live = tree.prunable(params, which)
    return jax.tree.map(lambda _: jnp.float32(-5.0), live)

  def margin(params, logits):
    size = lambda w: jnp.clip(jnp.abs(w), 1e-7, 1 - 1e-6)
    odds = lambda w, s: jax.scipy.special.logit(size(w)) - s
    return jax.tree.map(odds, tree.restrict(params, logits), logits)

  def shift_at(params, logits, level):
    found = margin(params, logits)
    best = _largest(found, level)
    most = lambda x, mask: jnp.max(jnp.where(mask, -jnp.inf, x))
    pruned = jax.tree.leaves(jax.tree.map(most, found, best))
    return jnp.maximum(jnp.max(jnp.stack(pruned)), -20.0), best

  def shifted(logits, shift):
    return jax.tree.map(lambda s: s + shift, logits)

  def refresh(params, logits, control, hyper, sparsity, progress):
    del control
    level = cubic(hyper, sparsity, progress)
    return params, shift_at(params, logits, level)[0]

  def view(params, logits, control, *_):
    return reparam.soft_threshold(params, shifted(logits, control))

  def harden(params, logits, control, hyper, sparsity):
    del control, hyper
    shift, found = shift_at(params, logits, sparsity)
    small = reparam.soft_threshold(params, shifted(logits, shift))
    return _masked(small, found), found

  return Method(
    grid(rates, gain=(0.1, 1.0), end=(0.6,)),
    extra=extra,
    begin=lambda *_: jnp.float32(-20.0),
    refresh=jax.jit(refresh),
    view=view,
    harden=_last(harden),
  )


def sigmoid_gates(rates: Sequence[float], which: tree.Which) -> Method:
  """CS, its gates learned and moved together to meet the ramp.

  The published rule meets a sparsity by its penalty and starting value; here
  the gates that the cubic ramp leaves out are those below one shift.
  """

  def extra(params, hyper):
    del hyper
    return jax.tree.map(jnp.zeros_like, tree.prunable(params, which))

  def shift_at(logits, level):
    best = _largest(logits, level)
    most = lambda x, mask: jnp.max(jnp.where(mask, -jnp.inf, x))
    pruned = jax.tree.leaves(jax.tree.map(most, logits, best))
    return jnp.maximum(jnp.max(jnp.stack(pruned)), -1.0), best

  def gated(params, logits, shift, progress):
    moved = jax.tree.map(lambda s: s - shift, logits)
    return reparam.sigmoid_gates(params, moved, 200.0**progress)

  def refresh(params, logits, control, hyper, sparsity, progress):
    del control
    return params, shift_at(logits, cubic(hyper, sparsity, progress))[0]

  def view(params, logits, control, hyper, progress):
    del hyper
    return gated(params, logits, control, progress)

  def harden(params, logits, control, hyper, sparsity):
    del control, hyper
    shift, found = shift_at(logits, sparsity)
    return _masked(gated(params, logits, shift, 1.0), found), found

  return Method(
    grid(rates, gain=(1.0, 10.0), end=(0.6,)),
    extra=extra,
    begin=lambda *_: jnp.float32(-1.0),
    refresh=jax.jit(refresh),
    view=view,
    harden=_last(harden),
  )


def movement(rates: Sequence[float], which: tree.Which) -> Method:
  """Movement pruning: learned scores, a global cubic ramp, drawn every step."""

  def extra(params, hyper):
    del hyper
    return jax.tree.map(jnp.zeros_like, tree.prunable(params, which))

  def best(values, level):
    return _largest(jax.lax.stop_gradient(values), level)

  def view(params, learned, control, hyper, progress):
    found = best(learned, cubic(hyper, control, progress))
    return reparam.movement(params, learned, found)

  def harden(params, learned, control, hyper, sparsity):
    del control, hyper
    found = best(learned, sparsity)
    return _masked(params, found), found

  return Method(
    grid(rates, gain=(1.0, 10.0), end=(0.6,)),
    extra=extra,
    begin=lambda params, learned, hyper, sparsity: sparsity,
    view=view,
    harden=_last(harden),
  )
