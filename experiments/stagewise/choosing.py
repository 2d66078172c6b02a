"""What a supernet says of sub-networks, and which is taken."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stagewise.supernets import cross_entropy
from experiments.stagewise.tasks import FRACTIONS, Task
from jaxprune import plans
from jaxprune.search import evolution, joint, stagewise
from jaxprune.search.joint import PruningVector

TOLERANCE = 0.02  # Below the budget; never above.
CHUNK = 16  # Candidates of one call.


class Judge(NamedTuple):
  """What a supernet says of sub-networks, on held-out images."""

  proxies: Callable[[Any, Any], np.ndarray]  # -> [stages, n].
  accuracies: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]  # And losses.


def make_judge(task: Task) -> Judge:
  """Returns the compiled judgements; both take (variables, widths [n])."""
  size = min(task.config.judges, len(task.splits.held.labels))
  images = task.splits.prepare(task.splits.held.images[:size])
  labels = task.splits.held.labels[:size]
  whole = plans.supernet(task.graph)

  @jax.jit
  def proxies(variables, widths):
    h, found = images, []
    for k, (graph, part) in enumerate(zip(task.stages, widths, strict=True)):
      target, _ = graph.fn(variables, h)
      last = k == len(task.stages) - 1
      found.append(
        stagewise.proxy(graph, variables, h, target, part, last=last)
      )
      h = target
    return jnp.stack(found)

  @jax.jit
  def accuracies(variables, widths):
    def one(widths):
      units = {}
      for graph, part in zip(task.stages, widths, strict=True):
        units |= stagewise.prefix(graph, part)
      logits, _ = whole(variables, units, {}, images)
      loss = jnp.mean(cross_entropy(logits, labels))
      return jnp.mean(jnp.argmax(logits, -1) == labels), loss

    return jax.vmap(one)(widths)

  def in_chunks(fn, axis):
    def call(variables, widths):
      n = len(jax.tree.leaves(widths)[0])
      found = []
      for begin in range(0, n, CHUNK):
        index = np.minimum(np.arange(begin, begin + CHUNK), n - 1)
        part = jax.tree.map(lambda w, i=index: jnp.asarray(w)[i], widths)
        found.append(jax.tree.map(np.asarray, fn(variables, part)))
      joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis), *found)
      cut_off = lambda x: x[:, :n] if axis else x[:n]
      return jax.tree.map(cut_off, joined)

    return call

  return Judge(in_chunks(proxies, 1), in_chunks(accuracies, 0))


def draw(task: Task, rng: np.random.Generator) -> Any:
  """Returns the candidates of each stage: random ones, and every fraction."""
  found = []
  for part in task.space:
    widths = {}
    for name, values in part.items():
      size = int(values[-1])
      every = [max(1, round(f * size)) for f in (*FRACTIONS, 1.0)]
      drawn = rng.choice(values, task.config.candidates)
      widths[name] = np.concatenate([every, drawn])
    found.append(widths)
  return found


def by_stages(task: Task, judge: Judge, variables: Any) -> PruningVector:
  """Returns the network on the budget whose stages are nearest the full one.

  The sum of the stages' proxies is what ``--search`` makes least.
  """
  if task.config.search == 'knapsack':
    return by_knapsack(task, judge, variables)
  proxies = lambda widths: judge.proxies(variables, widths).sum(0)
  return by_evolution(task, proxies)


def by_single_path(task: Task, judge: Judge, variables: Any) -> PruningVector:
  """Returns the network of the search of MetaPruning on a single-path net."""
  return by_evolution(task, lambda w: judge.accuracies(variables, w)[1])


def by_knapsack(task: Task, judge: Judge, variables: Any) -> PruningVector:
  """Returns the network of least summed proxies on the budget.

  What the knapsack leaves of the budget is filled unit by unit.
  """
  widths = draw(task, np.random.default_rng([task.config.seed, 1]))
  values = judge.proxies(variables, widths)
  pairs = zip(task.stages, widths, strict=True)
  costs = [stagewise.macs(graph, part) for graph, part in pairs]
  index = stagewise.knapsack(list(values), costs, task.limit)
  chosen = {
    name: int(w[i])
    for part, i in zip(widths, index, strict=True)
    for name, w in part.items()
  }
  high = task.vectors.high
  vector = high._replace(widths={**high.widths, **chosen})
  unit = jax.tree.map(float, joint.to_unit(task.vectors, vector))
  return joint.project(
    task.vectors, task.cost, task.limit, unit, tolerance=TOLERANCE
  )


def by_evolution(
  task: Task, losses: Callable[[Any], np.ndarray]
) -> PruningVector:
  """Returns the network of least loss that evolution finds on the budget.

  Ten generations, a tenth of the candidates each.

  Args:
    task: the task.
    losses: widths [n] of each stage -> float [n].
  """
  each = max(2, task.config.candidates // 10)
  found = evolution.search(
    task.vectors,
    task.cost,
    task.limit,
    lambda vectors: losses(stack(task, vectors)).tolist(),
    np.random.default_rng([task.config.seed, 2]),
    population=each,
    generations=10,
    parents=max(2, each // 5),
    mutations=each // 2,
    crossovers=each - each // 2,
    tolerance=TOLERANCE,
  )
  return found[-1][0].vector


def stack(task: Task, vectors: Sequence[PruningVector]) -> Any:
  """Returns networks as the widths [n] of each stage."""
  return [
    {name: np.array([v.widths[name] for v in vectors]) for name in part}
    for part in task.space
  ]
