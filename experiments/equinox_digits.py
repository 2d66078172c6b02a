"""Channel pruning of an Equinox network, from training to a smaller module.

  python -m experiments.equinox_digits

Two things are particular to Equinox. ``eqx.partition`` makes the network a
function of its arrays, and that is what jaxprune reads. And its kernels are
OIHW, its images without a batch: the groups follow from the program itself, so
that nothing here has to say so. PDP is the second method that is shown.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import cost, data, masks, plans, scores
from jaxprune.soft.training import track_pdp, with_pdp


class Net(eqx.Module):
  """Two convolutions and a head, for one image of 8 x 8."""

  conv1: eqx.nn.Conv2d
  conv2: eqx.nn.Conv2d
  head: eqx.nn.Linear

  def __init__(self, first: int, second: int, key: jax.Array):
    keys = jax.random.split(key, 3)
    self.conv1 = eqx.nn.Conv2d(1, first, 3, padding=1, key=keys[0])
    self.conv2 = eqx.nn.Conv2d(first, second, 3, 2, padding=1, key=keys[1])
    self.head = eqx.nn.Linear(second * 4 * 4, 10, key=keys[2])

  def __call__(self, x):
    """Returns the logits, [10], of an image, [1, 8, 8]."""
    x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
    return self.head(jnp.ravel(x))


class Result(NamedTuple):
  """What :func:`run` made, for whoever wants to look further."""

  graph: Any
  plan: Any
  params: Net  # Fine-tuned, at full size, with exact zeros.
  opt_state: optax.OptState  # Of the fine-tuning.
  small: Net
  sparse: Net  # The dense network, thinned out to single weights instead.
  proof: Any
  accuracy: dict[str, float]


def run(epochs: int = 8, widths: tuple[int, int] = (16, 32)) -> Result:
  """Trains, prunes, fine-tunes, shrinks, checks and prints how it went.

  Args:
    epochs: of each of the three trainings, at least 1.
    widths: of the two convolutions.
  """
  images, labels = load('test')
  net = Net(*widths, key=jax.random.key(0))
  params, static = eqx.partition(net, eqx.is_inexact_array)
  fn = jax.jit(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
  plain = lambda params, opt_state, x: fn(params, x)
  dense, _ = train(plain, params, optax.adam(3e-3), epochs)
  accuracy = {'dense': hits(fn(dense, images), labels)}

  # Which channels go together, and which of them half of the MACs has room for.
  graph = jp.trace(fn, dense, images[:1])
  magnitude = graph.reduce(scores.magnitude(dense))
  plan = jp.plan(graph, magnitude, jp.budget(macs=0.5))

  # Fine-tuning at full size, the channels that leave at exactly zero.
  keep = plans.masks(graph, plan, dense)
  tx = optax.chain(optax.adam(1e-3), jp.keep_sparse(keep))
  params, opt_state = train(plain, masks.apply(keep, dense), tx, epochs)
  accuracy['channels masked'] = hits(fn(params, images), labels)

  # The smaller function of the smaller params, and the proof that it is right.
  small_fn = jax.jit(jp.specialise(graph, plan))
  small_params = jp.shrink(graph, plan, params)
  proof = jp.check(graph, plan, params, images[:64])
  accuracy['channels removed'] = hits(small_fn(small_params, images), labels)

  # The arrays also fit the module as it would be written at these widths.
  left = plans.widths(graph, plan)
  make = lambda key: Net(left['conv1'][1], left['conv2'][1], key=key)
  structure = jax.tree.structure(eqx.filter_eval_shape(make, jax.random.key(0)))
  small = jax.tree.unflatten(structure, jax.tree.leaves(small_params))

  # Single weights instead of channels: a last link, and a view in the loss.
  half = 11 * epochs  # Steps to the target; then the masks harden.
  ramp = lambda step: jnp.minimum(1.0, 2 * (step + 1) / half)
  link = track_pdp(0.9, begin=0, end=half, ramp=ramp, tau=0.0, c=0.1)
  tx = optax.chain(optax.adam(1e-3), link)
  sparse, _ = train(with_pdp(fn), dense, tx, epochs)
  accuracy['90 % zeros, PDP'] = hits(fn(sparse, images), labels)

  for name, value in accuracy.items():
    print(f'{name:<16} {value:6.1%}')
  before, after = cost.macs(graph), cost.macs(graph, plan)
  print(f'MACs an image: {before:,} -> {after:,} ({after / before:.0%})')
  print(f'widths: {left}; largest error of the proof: {proof.values:.0e}')
  return Result(graph, plan, params, opt_state, small, sparse, proof, accuracy)


def train(
  apply: Callable[..., jax.Array],
  params: Any,
  tx: optax.GradientTransformation,
  epochs: int,
) -> tuple[Any, optax.OptState]:
  """Returns the trained params and the state of the optimizer.

  Args:
    apply: (params, state of the optimizer, images) -> logits.
    params: to begin with.
    tx: the chain.
    epochs: passes over the data.
  """

  def loss_fn(params, opt_state, images, labels):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(entropy(apply(params, opt_state, images), labels))

  @jax.jit
  def step(params, opt_state, images, labels):
    grads = jax.grad(loss_fn)(params, opt_state, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  images, labels = load('train')
  for epoch in range(epochs):
    order = data.epoch_batches(0, epoch, size=len(labels), batch=64)
    for rows in np.asarray(order):
      params, opt_state = step(params, opt_state, images[rows], labels[rows])
  return params, opt_state


@functools.cache
def load(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the digits of a split, [n, 1, 8, 8] in 0..1, and their labels."""
  digits = data.load('digits', split)
  images = np.divide(digits.images, 16, dtype=np.float32)
  return images.transpose(0, 3, 1, 2), digits.labels


def hits(logits: jax.Array, labels: np.ndarray) -> float:
  """Returns the fraction of labels that have the largest logit."""
  return float(jnp.mean(jnp.argmax(logits, -1) == labels))


if __name__ == '__main__':
  run()
