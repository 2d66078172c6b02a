"""Training recipes: optax chains and losses, each a plain function.

A chain takes the links of a pruning method at its end, where they see the
updates as they are applied.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import train
from jaxprune import masks, tree
from jaxprune.plans import recovery


def kernels(params: Any) -> Any:
  """Returns which leaves weight decay pulls at: kernels, no bias, no norm."""
  return tree.map_with_path(tree.is_prunable, params)


def cosine(rate: float, steps: int) -> optax.Schedule:
  """Returns a rate that rises over a tenth of the steps and falls to zero.

  Args:
    rate: the highest.
    steps: of the whole stage, at least 1.
  """
  return optax.warmup_cosine_decay_schedule(
    0.0, rate, max(1, steps // 10), max(2, steps)
  )


def sgd(
  rate: float, decay: float, steps: int, *links: Any
) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum 0.9 along a cosine.

  Args:
    rate: the highest.
    decay: coefficient of w in the gradient, on kernels alone.
    steps: of the whole stage, at least 1.
    *links: what comes last in the chain.
  """
  return optax.chain(
    optax.add_decayed_weights(decay, kernels),
    optax.sgd(cosine(rate, steps), momentum=0.9, nesterov=True),
    *links,
  )


def adam(
  rate: float, decay: float, steps: int, *links: Any
) -> optax.GradientTransformation:
  """Returns AdamW along a cosine; arguments as :func:`sgd`.

  The decay is decoupled: each step takes rate * decay * w off a kernel.
  """
  return optax.chain(
    optax.adamw(cosine(rate, steps), weight_decay=decay, mask=kernels), *links
  )


class AverageState(NamedTuple):
  """State of :func:`average`."""

  average: Any  # Like params.


def average(decay: float) -> optax.GradientTransformation:
  """Returns a link that averages the params and leaves the updates alone.

  average <- decay * average + (1 - decay) * (w + update), from the first w on.
  Evaluate with :func:`averaged`: after a pruning link the average sees the
  zeros, and is itself masked to be exactly zero there.

  Args:
    decay: in [0, 1).

  Raises:
    ValueError: if ``decay`` is not in [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f'`decay` must be in [0, 1), got {decay}.')

  def init(params):
    return AverageState(jax.tree.map(jnp.copy, params))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('`average` needs the params: update(g, state, params).')
    ahead = optax.apply_updates(params, updates)
    moved = optax.incremental_update(ahead, state.average, 1 - decay)
    return updates, AverageState(moved)

  return optax.GradientTransformation(init, update)


def averaged(
  state: train.State, apply: train.Apply, batches: Iterable[jax.Array]
) -> dict[str, Any]:
  """Returns the variables of the averaged params, zero where the params are.

  Batch statistics are estimated again, on the averaged params.

  Args:
    state: at the end of training with :func:`average` in the chain.
    apply: the network.
    batches: prepared images, one batch or more.
  """
  average = optax.tree.get(state.opt_state, 'average')
  keep = jax.tree.map(lambda w: w != 0, state.params)
  found = {**state.stats, 'params': masks.apply(keep, average)}
  if 'batch_stats' in found:

    def update(stats, images):
      seen = {**found, 'batch_stats': stats}
      _, new = apply(seen, images, train=True, mutable=['batch_stats'])
      return new['batch_stats']

    found['batch_stats'] = recovery.batch_statistics(
      update, found['batch_stats'], batches
    )
  return found


def smoothed(smoothing: float) -> train.Loss:
  """Returns the cross-entropy against labels that are smoothed.

  The target is 1 - smoothing on the label plus smoothing / classes on each
  (Szegedy et al., 2016, arXiv 1512.00567, section 7).

  Args:
    smoothing: in [0, 1); of labels or of targets, such as mixed ones.
  """

  def loss(logits, labels, images):
    del images
    if labels.ndim < logits.ndim:
      labels = jax.nn.one_hot(labels, logits.shape[-1])
    target = optax.smooth_labels(labels, smoothing)
    return optax.softmax_cross_entropy(logits, target)

  return loss


def distilled(
  teacher: train.Teacher,
  *,
  weight: float = 0.9,
  temperature: float = 4.0,
  task: train.Loss = train.cross_entropy,
) -> train.Loss:
  """Returns a loss that follows a teacher: the dense network, say.

  weight * T^2 KL(softmax(teacher / T) || softmax(logits / T))
  + (1 - weight) * task (Hinton et al., 2015, arXiv 1503.02531).

  Args:
    teacher: prepared images -> its logits.
    weight: of the teacher, in [0, 1].
    temperature: T.
    task: the loss on the labels.
  """

  def loss(logits, labels, images):
    target = jax.lax.stop_gradient(teacher(images)) / temperature
    follow = optax.losses.kl_divergence_with_log_targets(
      jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(target)
    )
    own = task(logits, labels, images)
    return weight * temperature**2 * follow + (1 - weight) * own

  return loss
