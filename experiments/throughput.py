"""How fast the loop of the experiments is, against one written by hand.

  python -m experiments.throughput
  python -m experiments.throughput --models=mlp --pairs=5

Both run the same steps of SGD with momentum on random images; the bare loop is
a jitted step and a ``for``. The figure is its CPU time over that of ours, the
median of interleaved pairs: 1 is as fast, above 1 is faster.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import command, evidence, recipes, settings, timing, train
from experiments.settings import at_least, setting
from jaxprune import models

MODELS = {
  'mlp': lambda: models.lenet_300_100(num_classes=10),
  'lenet5': lambda: models.LeNet5(num_classes=10),
  'resnet20': lambda: models.resnet20(num_classes=10),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for."""

  models: tuple[str, ...] = setting(
    tuple(MODELS), 'What to train.', choices=MODELS
  )
  pairs: int = setting(30, 'Interleaved pairs.', fits=at_least(1))
  steps: int = setting(10, 'Steps of one measurement.', fits=at_least(1))
  batch: int = setting(64, 'Examples a step.', fits=at_least(1))


def ratio(name: str, *, steps: int, batch: int, pairs: int) -> list[Any]:
  """Returns [model, ms a step of ours, ms of the bare loop, ratio]."""
  module = MODELS[name]()
  rng = np.random.default_rng(0)
  shape = (steps * batch, 32, 32, 3) if name == 'resnet20' else (
    steps * batch, 28, 28, 1
  )  # fmt: skip
  examples = train.Examples(
    jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
    jnp.asarray(rng.integers(0, 10, steps * batch, np.int32)),
  )
  prepare = lambda x: x.astype(jnp.float32) / 255
  tx = recipes.sgd(0.01, 1e-4, 1000)
  variables = jax.jit(module.init)(
    jax.random.key(0), prepare(examples.images[:1])
  )
  params = variables['params']
  stats = {k: v for k, v in variables.items() if k != 'params'}
  begin = train.State(params, stats, tx.init(params))
  step = train.make_step(
    module.apply, tx, prepare, change=lambda key, images: images
  )
  run = train.make_runner(step, seed=0, batch=batch)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def bare_step(params, stats, opt_state, images, labels, rows):
    images, labels = images[rows], labels[rows]

    def loss_fn(params):
      logits, new = module.apply(
        {'params': params, **stats},
        prepare(images),
        train=True,
        mutable=list(stats),
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses), new

    (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), new, opt_state, loss

  ours, bare = [train.own(begin)], [train.own(begin)]

  def run_ours():
    ours[0], metrics = run(ours[0], examples, 0, 0, steps)
    return metrics.loss

  def run_bare():
    params, stats, opt_state = bare[0]
    order = np.random.default_rng(0).permutation(steps * batch)
    order = jnp.asarray(order.reshape(steps, batch))
    losses = []
    for i in range(steps):
      params, stats, opt_state, loss = bare_step(
        params, stats, opt_state, *examples, order[i]
      )
      losses.append(loss)
    bare[0] = train.State(params, stats, opt_state)
    return losses

  found = timing.milliseconds({'bare': run_bare, 'ours': run_ours}, pairs=pairs)
  return [
    name,
    f'{found["ours"][0] / steps:.2f}',
    f'{found["bare"][0] / steps:.2f}',
    f'{found["ours"][1]:.3f}',
  ]


def run(argv: Sequence[str]) -> tuple[None, str]:
  """Returns (None, a table with a row for each model)."""
  config = settings.parse(Config, argv)
  rows = [
    ratio(name, steps=config.steps, batch=config.batch, pairs=config.pairs)
    for name in config.models
  ]
  header = ['model', 'ours, ms a step', 'bare, ms a step', 'ratio']
  return None, evidence.table(header, rows)


if __name__ == '__main__':
  sys.exit(command.job(run, Config, sys.argv[1:], __doc__))
