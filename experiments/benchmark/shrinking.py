"""The structural rows of the benchmark: planning, shrinking, and what it gives.

``plan_resnet50`` and ``plan_densenet121`` meet half of the multiply-adds of a
network at 224 px and cut its variables out, the trace and the scores aside;
``budget_resnet50`` is its first half. ``small_*`` is the specialised function
at half of every width against the same Linen module made by hand at the small
widths; ``half_*`` the specialised function against the dense network. Both run
under XLA at batch 1. ``analysis`` describes the rows that trace.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import analysis
from jaxprune import cost, models, plans, structure

SIDE = 224  # Pixels.


class DenseNet(nn.Module):
  """A network of the shapes of DenseNet-121, in the form for inference."""

  growth: int = 32
  blocks: tuple[int, ...] = (6, 12, 24, 16)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns logits, shape (batch, 1000)."""
    norm = lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(x))
    conv = functools.partial(nn.Conv, use_bias=False)
    x = norm(conv(2 * self.growth, (7, 7), (2, 2))(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, count in enumerate(self.blocks):
      for _ in range(count):
        y = norm(conv(4 * self.growth, (1, 1))(norm(x)))
        x = jnp.concatenate([x, conv(self.growth, (3, 3))(y)], -1)
      x = norm(x)
      if stage + 1 < len(self.blocks):
        x = nn.avg_pool(conv(x.shape[-1] // 2, (1, 1))(x), (2, 2), (2, 2))
    return nn.Dense(1000)(jnp.mean(x, (1, 2)))


MODELS: dict[str, Callable[..., nn.Module]] = {
  'resnet50': models.resnet50,
  'mobilenet_v2': models.mobilenet_v2,
  'densenet121': DenseNet,
}


class Network(NamedTuple):
  """A traced network with random variables."""

  fn: Callable[[Any, jax.Array], Any]
  variables: Any
  graph: structure.Graph
  scores: dict[str, np.ndarray]


@functools.cache
def network(name: str) -> Network:
  """Returns a network by name, traced at batch 1."""
  module = MODELS[name]()
  fn = lambda variables, x: module.apply(variables, x)
  x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  specs = jax.eval_shape(module.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)
  draw = lambda s: jnp.asarray(
    0.05 * np.abs(rng.standard_normal(s.shape)), s.dtype
  )
  variables = jax.tree.map(draw, specs)
  graph = structure.trace(fn, specs, x)
  scores = {k: rng.random(group.size) for k, group in graph.groups.items()}
  return Network(fn, variables, graph, scores)


Call = Callable[[], Any]


def calls(row: str) -> tuple[Call, Call | None]:
  """Returns what a row measures, and what against, if anything.

  Raises:
    ValueError: if there is no such row.
  """
  if row not in ROWS:
    raise ValueError(f'No row is called {row!r}; the rows: {", ".join(ROWS)}.')
  if row in analysis.ROWS:
    return analysis.call(row), None
  what, _, name = row.partition('_')
  net = network(name)
  bound = cost.budget(macs=0.5)
  choose = lambda: cost.plan(net.graph, net.scores, bound)
  if what == 'budget':
    return choose, None
  if what == 'plan':
    return lambda: plans.shrink(net.graph, choose(), net.variables), None
  halves = {name: g.size // 2 for name, g in net.graph.groups.items()}
  plan = plans.from_widths(net.graph, halves)
  small = plans.shrink(net.graph, plan, net.variables)
  x = jnp.full((1, SIDE, SIDE, 3), 0.5)
  ours = jax.jit(plans.specialise(net.graph, plan))
  if what == 'half':
    dense = jax.jit(net.fn)
    return lambda: ours(small, x), lambda: dense(net.variables, x)
  module = MODELS[name](widths=models.widths(small['params']))
  made = jax.jit(lambda variables, x: module.apply(variables, x))
  np.testing.assert_allclose(made(small, x), ours(small, x), rtol=1e-4)
  return lambda: ours(small, x), lambda: made(small, x)


ROWS = (
  *analysis.ROWS,
  'budget_resnet50',
  'plan_resnet50',
  'plan_densenet121',
  'small_resnet50',
  'small_mobilenet_v2',
  'half_resnet50',
  'half_mobilenet_v2',
)


def measure(row: str, pairs: int, seconds: float) -> dict[str, Any]:
  """Returns the figures of a row: CPU seconds, medians over pairs.

  Args:
    row: its name.
    pairs: how often both are called, in turns.
    seconds: wall time after which no pair is begun.
  """
  ours, other = calls(row)
  both = [ours] if other is None else [ours, other]
  for call in both:
    jax.block_until_ready(call())  # Compiles.
  begun, times = time.monotonic(), []
  for k in range(pairs):
    found = {}
    for call in both[:: -1 if k % 2 else 1]:
      start = time.process_time()
      jax.block_until_ready(call())
      found[call] = time.process_time() - start
    times.append([found[call] for call in both])
    if time.monotonic() - begun > seconds:
      break
  times = np.array(times)
  figures: dict[str, Any] = {
    'row': row,
    'seconds': float(np.median(times[:, 0])),
    'pairs': len(times),
  }
  if other is None:
    figures['interval'] = _interval(times[:, 0])
  else:
    ratios = times[:, 0] / times[:, 1]
    figures['against'] = float(np.median(times[:, 1]))
    figures['ratio'] = float(np.median(ratios))
    figures['interval'] = _interval(ratios)
  return figures


def _interval(values: np.ndarray) -> list[float]:
  """The 95 % bootstrap interval of the median."""
  draws = np.random.default_rng(0).choice(values, (2000, len(values)))
  return np.percentile(np.median(draws, axis=1), [2.5, 97.5]).tolist()


def line(figures: dict[str, Any]) -> str:
  """Returns the figures of a row as a sentence."""
  low, high = figures['interval']
  text = f'{figures["row"]}: {figures["seconds"]:.3f} s'
  if 'ratio' not in figures:
    return f'{text} [{low:.3f}, {high:.3f}], {figures["pairs"]} times'
  return (
    f'{text} against {figures["against"]:.3f} s, ratio '
    f'{figures["ratio"]:.3f} [{low:.3f}, {high:.3f}], {figures["pairs"]} pairs'
  )
