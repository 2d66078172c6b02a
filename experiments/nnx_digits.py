"""Channel pruning of a Flax NNX network, from training to a smaller module.

  python -m experiments.nnx_digits

Three things are particular to NNX. ``nnx.split`` makes the network a function
of a state, and that is what jaxprune reads. Masks are made like the
``nnx.Param`` part of the state, the part that is trained. And what prunes is
the last link of the chain inside ``nnx.Optimizer``, as it is of any chain.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune as jp
from jaxprune import cost, data, masks, plans, schedules, scores
from jaxprune.distributions import global_


class Net(nnx.Module):
  """Two convolutions with norms and a head, for images of 8 x 8."""

  def __init__(self, first: int, second: int, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, first, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(first, rngs=rngs)
    self.conv2 = nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)
    self.norm2 = nnx.BatchNorm(second, rngs=rngs)
    self.head = nnx.Linear(4 * 4 * second, 10, rngs=rngs)

  def __call__(self, x):
    """Returns the logits, [n, 10], of images, [n, 8, 8, 1]."""
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    return self.head(x.reshape(len(x), -1))


class Result(NamedTuple):
  """What :func:`run` made, for whoever wants to look further."""

  graph: Any
  plan: Any
  state: nnx.State  # Fine-tuned, at full size, with exact zeros.
  optimizer: nnx.Optimizer  # That fine-tuned it.
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
  net = Net(*widths, rngs=nnx.Rngs(0))
  train(net, optax.adam(3e-3), epochs)
  sparse = nnx.clone(net)
  fn, state = function(net), nnx.state(net)
  accuracy = {'dense': hits(fn(state, images), labels)}

  # Which channels go together, and which of them half of the MACs has room for.
  graph = jp.trace(fn, state, images[:1])
  magnitude = scores.magnitude(nnx.state(net, nnx.Param))
  plan = jp.plan(graph, graph.reduce(magnitude), jp.budget(macs=0.5))

  # Fine-tuning at full size, the channels that leave at exactly zero.
  nnx.update(net, masks.apply(plans.masks(graph, plan, state), state))
  keep = plans.masks(graph, plan, nnx.state(net, nnx.Param))
  tx = optax.chain(optax.adam(1e-3), jp.keep_sparse(keep))
  optimizer = train(net, tx, epochs)
  state = nnx.state(net)
  accuracy['channels masked'] = hits(fn(state, images), labels)

  # The smaller function of the smaller state, and the proof that it is right.
  small_fn = jax.jit(jp.specialise(graph, plan))
  small_state = jp.shrink(graph, plan, state)
  proof = jp.check(graph, plan, state, images[:64])
  accuracy['channels removed'] = hits(small_fn(small_state, images), labels)

  # The state also fits the module as it would be written at these widths.
  left = plans.widths(graph, plan)
  make = lambda: Net(left['conv1'][1], left['conv2'][1], rngs=nnx.Rngs(0))
  small = nnx.eval_shape(make)
  nnx.update(small, small_state)

  # Single weights instead of channels: one more link, and that is all.
  ramp = schedules.cubic(0.9, begin=0, end=11 * epochs)
  link = jp.sparsify(scores.magnitude, ramp, distribution=global_, every=8)
  train(sparse, optax.chain(optax.adam(1e-3), link), epochs)
  accuracy['90 % zeros'] = hits(fn(nnx.state(sparse), images), labels)

  for name, value in accuracy.items():
    print(f'{name:<16} {value:6.1%}')
  before, after = cost.macs(graph), cost.macs(graph, plan)
  print(f'MACs an image: {before:,} -> {after:,} ({after / before:.0%})')
  print(f'widths: {left}; largest error of the proof: {proof.values:.0e}')
  return Result(graph, plan, state, optimizer, small, sparse, proof, accuracy)


def function(net: Net) -> Any:
  """Returns a network, now set to evaluate, as ``fn(state, images)``."""
  net.eval()
  graphdef, _ = nnx.split(net)
  return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))


@nnx.jit
def step(net: Net, optimizer: nnx.Optimizer, images: Any, labels: Any) -> None:
  """Takes one step on a batch."""
  entropy = optax.softmax_cross_entropy_with_integer_labels
  loss_fn = lambda net: jnp.mean(entropy(net(images), labels))
  optimizer.update(net, nnx.grad(loss_fn)(net))


def train(
  net: Net, tx: optax.GradientTransformation, epochs: int
) -> nnx.Optimizer:
  """Trains a network in place; returns the optimizer."""
  net.train()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  images, labels = load('train')
  for epoch in range(epochs):
    order = data.epoch_batches(0, epoch, size=len(labels), batch=64)
    for rows in np.asarray(order):
      step(net, optimizer, images[rows], labels[rows])
  return optimizer


@functools.cache
def load(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the digits of a split, in 0..1, and their labels."""
  digits = data.load('digits', split)
  return np.divide(digits.images, 16, dtype=np.float32), digits.labels


def hits(logits: jax.Array, labels: np.ndarray) -> float:
  """Returns the fraction of labels that have the largest logit."""
  return float(jnp.mean(jnp.argmax(logits, -1) == labels))


if __name__ == '__main__':
  run()
