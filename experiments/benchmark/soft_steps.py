"""Rows of the benchmark: a training step with PDP against the dense step.

The thresholds are found anew at every step. ``pdp_mlp`` is 784 to 10 over
4 x 500 at batch 60, where the weights are many and the products few;
``pdp_resnet20`` has batch 128, and ``pdp_mobilenet`` (V1 x 0.25, 224 pixels)
batch 8.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import models, soft

ROWS: Mapping[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
  'pdp_mlp': (models.mlp_500, (60, 28, 28, 1)),
  'pdp_resnet20': (models.resnet20, (128, 32, 32, 3)),
  'pdp_mobilenet': (
    lambda: models.mobilenet_v1(0.25, dropout=0.0),
    (8, 224, 224, 3),
  ),
}


def pair(
  row: str, sparsity: float
) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
  """Returns a step with PDP, the dense step, and the arguments of both.

  Args:
    row: one of ``ROWS``.
    sparsity: fraction of zeros, at full ramp.
  """
  make, shape = ROWS[row]
  return steps(make(), shape, sparsity)


def steps(
  module: Any, shape: tuple[int, ...], sparsity: float
) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
  """Returns :func:`pair` of a network.

  Args:
    module: a network of Linen.
    shape: of a batch of images.
    sparsity: fraction of zeros, at full ramp.
  """
  images = jax.random.normal(jax.random.key(0), shape)
  labels = jnp.arange(shape[0]) % 10
  stats = dict(jax.jit(module.init)(jax.random.key(1), images[:1]))
  params = stats.pop('params')
  tx = optax.sgd(0.1, momentum=0.9)
  state = soft.pdp_init(params, sparsity, tau=0.0, c=0.2)
  state = state._replace(ramp=jnp.float32(1))

  def step(view, params, momentum, stats, state, images, labels):
    def loss_fn(params):
      seen = {'params': view(params, state), **stats}
      logits, new = module.apply(seen, images, train=True, mutable=list(stats))
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses), new

    grads, new = jax.grad(loss_fn, has_aux=True)(params)
    updates, momentum = tx.update(grads, momentum, params)
    return optax.apply_updates(params, updates), momentum, new

  args = (params, tx.init(params), stats, state, images, labels)
  return (
    lambda *args: step(soft.pdp, *args),
    lambda *args: step(lambda params, _: params, *args),
    args,
  )
