"""What a vector step costs, against one forward pass on the same batch.

  python -m experiments.joint.benchmark
  python -m experiments.joint.benchmark --rounds=3 --batch=8

``forward`` is ResNet-20 with batch statistics on 32 x 32 images. ``step`` is a
whole vector step with n vectors: perturbations, masks, losses, penalty,
gradient, Adam; ``chunks`` the same two vectors at a time, ``canvas`` over 16,
24 and 32 pixels in the same compile. The ratio is of CPU time, the median over
rounds in which all of them take turns.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments import command, settings, timing
from experiments.settings import at_least, setting
from jaxprune import models
from jaxprune.search import estimator, joint


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for."""

  rounds: int = setting(10, 'Rounds of the clock.', fits=at_least(1))
  batch: int = setting(32, 'Images of a batch.', fits=at_least(1))
  n: int = setting(8, 'Vectors of a step.', fits=at_least(2))
  canvas: bool = setting(False, 'Whether to time the canvas too.')


def make(
  batch: int, n: int
) -> tuple[dict[str, Any], tuple[Any, ...], joint.Space]:
  """Returns the jitted functions, their arguments, and the space."""
  model = models.resnet20(shortcut='projection')
  key = jax.random.key(0)
  x = jax.random.normal(key, (batch, 32, 32, 3))
  labels = jnp.arange(batch) % 10
  variables = jax.jit(model.init)(key, x)
  step = lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats'])
  spec = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  graph = jp.trace(step, variables, spec)
  sides = joint.space(graph, spec, sides=(16, 24, 32))
  fixed = joint.restrict(sides, widths=True, depths=True)
  e, tx = estimator.estimator(n=n), optax.adam(0.02)

  def entropy(logits):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  def move(space, chunk, on_canvas, variables, x, unit, opt, state):
    net = joint.supernet(space, on_canvas=on_canvas)
    cost = joint.coster(space)
    loss = jax.vmap(lambda v: entropy(net(variables, v, x)[0]))
    total = joint.objective(
      space, estimator.chunked(loss, chunk), cost,
      0.25 * joint.whole(space, cost),
    )  # fmt: skip
    gradient, state = e.update(total, state, unit)
    updates, opt = tx.update(gradient, opt)
    unit = optax.apply_updates(unit, updates)
    return jax.tree.map(jnp.clip, unit, *joint.unit_range(space)), opt, state

  unit = joint.to_unit(fixed, fixed.high)
  arguments = (variables, x, unit, tx.init(unit), e.init(unit, key))
  forward = lambda variables, x, *rest: entropy(step(variables, x)[0])
  calls = {
    'forward': forward,
    'step': functools.partial(move, fixed, n, False),
    'chunks': functools.partial(move, fixed, 2, False),
    'canvas': functools.partial(move, sides, n, True),
  }
  return {k: jax.jit(fn) for k, fn in calls.items()}, arguments, sides


def run(argv: Sequence[str]) -> tuple[None, str]:
  """Prints the table, line by line."""
  config = settings.parse(Config, argv)
  calls, arguments, space = make(config.batch, config.n)
  if not config.canvas:
    del calls['canvas']
  timed = timing.milliseconds(
    {k: functools.partial(fn, *arguments) for k, fn in calls.items()},
    pairs=config.rounds,
  )
  for name, (ms, speed) in timed.items():
    memory = calls[name].lower(*arguments).compile().memory_analysis()
    size = memory.temp_size_in_bytes / 2**20
    print(
      f'{name:8}  {ms:8.1f} ms  {1 / speed:5.2f} x forward  {size:7.1f} MiB',
      flush=True,
    )
  rng = np.random.default_rng(0)
  many = jax.tree.map(lambda ladder: rng.choice(ladder, 10_000), space.ladders)
  cost = joint.coster(space)
  spent = []
  for _ in range(5):
    begin = time.process_time()
    cost(many)
    spent.append(time.process_time() - begin)
  return None, f'MACs of 10,000 vectors: {1e3 * np.median(spent):.1f} ms'


if __name__ == '__main__':
  sys.exit(command.job(run, Config, sys.argv[1:], __doc__))
