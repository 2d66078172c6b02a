"""Weights as functions of weights: straight-through, STR, CS, movement.

Like :func:`jaxprune.soft.pdp` each function goes where the params go in a loss;
they are the methods that PDP is compared with.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import masks as masks_lib
from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.soft import weights


@kinds.checked
def straight_through(
  params: tree.Arrays, masks: tree.Arrays, decay: float | jax.Array = 0.0
) -> tree.Arrays:
  """Returns the masked params, whose gradient passes as if they were dense.

  Forward where(mask, w, 0); backward g + decay (1 - mask) w.

  Args:
    params: any pytree.
    masks: bool, True = kept; ``optax.MaskedNode()`` where a leaf is dense.
    decay: pull of the pruned weights towards zero, static or traced.

  References:
    Bengio et al. (2013), arXiv:1308.3432; with decay, the SR-STE of Zhou et al.
    (2021), arXiv:2102.04010.

  Examples:
    >>> w, mask = jnp.array([4.0, 2.0]), jnp.array([True, False])
    >>> print(jax.grad(lambda w: straight_through(w, mask, 0.5).sum())(w))
    [1. 2.]
  """
  tree.check_alike('Masks', masks, params, shapes=True)
  cut = lambda w, mask: _straight_through(w, mask, jnp.asarray(decay, w.dtype))
  return tree.map_pruned(cut, params, masks)


@kinds.checked
def sr_ste(
  params: tree.PyTree,
  n_by_m: weights.NByM = (2, 4),
  *,
  axis: int | None = None,
  decay: float | jax.Array = 2e-4,
  which: tree.Which = None,
) -> tree.PyTree:
  """Returns n:m sparse params of the current largest |w|, straight through.

  :func:`straight_through` with masks redrawn at every call.

  Args:
    params: any pytree.
    n_by_m: keep n of every m neighbours along ``axis``; static.
    axis: the axis of the groups, as for :func:`jaxprune.masks.groups`: by
      default -2 of kernels with two or four axes, and no other layout.
    decay: the paper's lambda_W.
    which: the leaves, as for :func:`jaxprune.tree.prunable`.

  Raises:
    ValueError: if a leaf does not fit, or n_by_m is not 0 < n < m.

  References:
    Zhou et al. (2021), arXiv:2102.04010; formula from memory.

  Examples:
    >>> print(sr_ste({'kernel': jnp.array([[1.0], [-3.0]])}, (1, 2))['kernel'])
    [[ 0.]
     [-3.]]
  """
  state = weights.pdp_init(params, n_by_m=n_by_m, which=which)
  masks = weights.harden(params, state, n_by_m=n_by_m, axis=axis).masks
  return straight_through(params, masks, decay)


@kinds.checked
def soft_threshold(params: tree.Arrays, logits: tree.Arrays) -> tree.Arrays:
  """Returns the params shrunk by learned thresholds, one per leaf (STR).

  sign(w) max(|w| - sigmoid(s), 0); s learns by gradient, and weight decay on s
  and w sets the sparsity.

  Args:
    params: any pytree.
    logits: s, a pytree like ``params`` of scalars, ``optax.MaskedNode()`` where
      a leaf is dense. ImageNet nets start at s = -3200 or so, where no
      gradient flows but through weight decay; small nets at -5 to -10.

  References:
    Kusupati et al. (2020), arXiv:2002.03231; formula and starting values from
    memory, not confirmed.

  Examples:
    >>> print(soft_threshold(jnp.array([2.0, -0.25]), jnp.float32(0.0)))
    [ 1.5 -0. ]
  """
  tree.check_alike('Logits', logits, params, shapes=True)

  def shrink(w, s):
    left = jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(s).astype(w.dtype))
    return jnp.sign(w) * left

  return tree.map_pruned(shrink, params, logits)


@kinds.checked
def sigmoid_gates(
  params: tree.Arrays, logits: tree.Arrays, beta: float | jax.Array
) -> tree.Arrays:
  """Returns the params times learned sigmoid gates (CS).

  w sigmoid(beta s), with lambda sum sigmoid(beta s) in the loss and beta rising
  exponentially from 1 to 200; in the end s > 0 is the mask.

  Args:
    params: any pytree.
    logits: s, a pytree like ``params``, ``optax.MaskedNode()`` where a leaf is
      dense; its starting value decides the sparsity.
    beta: inverse temperature, traced.

  References:
    Savarese, Silva and Maire (2020), arXiv:1912.04427; from memory.

  Examples:
    >>> print(sigmoid_gates(jnp.array([2.0, 2.0]), jnp.array([0.0, 9.0]), 99.0))
    [1. 2.]
  """
  tree.check_alike('Logits', logits, params, shapes=True)
  gate = lambda w, s: w * jax.nn.sigmoid(beta * s).astype(w.dtype)
  return tree.map_pruned(gate, params, logits)


@kinds.checked
def movement(
  params: tree.Arrays, scores: tree.Arrays, masks: tree.Arrays
) -> tree.Arrays:
  """Returns the masked params, with the gradient g w for learned scores.

  Forward where(mask, w, 0); the weights learn through the mask, the scores as
  if it were not there: dL/ds = (dL/dw') w. The scores are params to train, and
  ``masks = select.top_masks(scores, keep)`` at every step.

  Args:
    params: any pytree.
    scores: float, a pytree like ``params``, ``optax.MaskedNode()`` where dense.
    masks: bool, like ``scores``.

  References:
    Sanh, Wolf and Rush (2020), arXiv:2005.07683; formula confirmed by the
    abstract's rule, constants are the caller's.

  Examples:
    >>> w, mask = jnp.array([4.0, 2.0]), jnp.array([True, False])
    >>> print(jax.grad(lambda s: movement(w, s, mask).sum())(jnp.zeros(2)))
    [4. 2.]
  """
  masks_lib.check_bool(masks)
  tree.check_alike('Scores', scores, params, shapes=True)
  tree.check_alike('Masks', masks, params, shapes=True)

  def cut(w, s, mask):
    lift = (s - lax.stop_gradient(s)).astype(w.dtype)  # 0, with a gradient.
    finite = jnp.where(jnp.isfinite(w), w, 0)  # 0 inf would be NaN.
    return jnp.where(mask, w, 0) + lift * lax.stop_gradient(finite)

  return tree.map_pruned(cut, params, scores, masks)


@jax.custom_vjp
def _straight_through(w: jax.Array, mask: jax.Array, decay: jax.Array):
  return jnp.where(mask, w, 0)


def _straight_through_fwd(w, mask, decay):
  return jnp.where(mask, w, 0), (w, mask, decay)


def _straight_through_bwd(residuals, g):
  w, mask, decay = residuals
  pulled = jnp.where(mask | ~jnp.isfinite(w), 0, w)  # 0 inf would be NaN.
  return g + decay * pulled, None, None


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
