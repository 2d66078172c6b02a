"""How each method finds its vector."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.joint.supernets import Steps, target_of, train_supernet
from experiments.joint.tasks import Task
from jaxprune.report import plots
from jaxprune.search import evolution, joint

MOST = 256  # Settings of the sides of all stages that are looked at.


def settings(task: Task, method: str) -> list[joint.PruningVector]:
  """Returns every setting of one dimension, widths narrowed to the budget."""
  space = task.space
  if method == 'resolution':
    sides, structure = jax.tree.flatten(space.ladders.side)
    products = list(itertools.product(*(map(int, x) for x in sides)))
    if len(products) > MOST:
      rng = np.random.default_rng(0)
      chosen = rng.choice(len(products), MOST, replace=False)
      products = [products[i] for i in np.sort(chosen)]
    rows = [space.high._replace(side=structure.unflatten(x)) for x in products]
  else:
    ladders = space.ladders.depths
    rows = [
      space.high._replace(depths=dict(zip(ladders, depths, strict=True)))
      for depths in itertools.product(*(map(int, x) for x in ladders.values()))
    ]
  found = []
  for row in rows:
    try:
      found.append(joint.uniform(space, task.cost, target_of(task), row))
    except ValueError:  # That setting alone is below the budget.
      continue
  return found


def choose(
  task: Task, steps: Steps, method: str, folder: pathlib.Path
) -> tuple[joint.PruningVector, Any]:
  """Returns the vector that a method finds, and the params of its supernet."""
  config, space, rng = task.config, task.space, np.random.default_rng(0)
  target = target_of(task)
  if method == 'uniform' and config.start == 'scratch':
    return joint.uniform(space, task.cost, target), None
  if method in ('joint', 'channel'):
    own = space if method == 'joint' else joint.restrict(space, widths=True)
    end, records = train_supernet(task, steps, own, folder / method, moves=True)
    if records:
      history = [_flat(record['unit']) for record in records]
      figure = plots.gates(history, unit='vector step')
      (folder / method / 'vector.svg').write_text(plots.svg(figure, 'vector'))
    unit = jax.tree.map(float, end.unit)
    return joint.project(own, task.cost, target, unit), end.params
  end, _ = train_supernet(
    task, steps, space, folder / 'random_net', moves=False
  )
  if method == 'uniform':
    return joint.uniform(space, task.cost, target), end.params
  size = min(4 * config.batch, len(task.held.labels))
  rows = np.sort(rng.choice(len(task.held.labels), size, replace=False))
  score = lambda vectors: steps.losses(end.params, vectors, task.held, rows)
  turns = (1 - config.warmup) * config.steps / config.every
  count = max(4, int(turns * config.n * 2 * config.batch / size))
  if method in ('depth', 'resolution'):
    found = settings(task, method)
    if len(found) > count:
      found = [found[i] for i in rng.choice(len(found), count, replace=False)]
    return found[int(np.argmin(score(found)))], end.params
  each = max(2, count // 10)
  options = (
    {'population': count, 'generations': 1}
    if method == 'random'
    else {
      'population': count - 9 * each if count > 20 else each,
      'generations': 10 if count > 20 else 2,
      'mutations': each // 2,
      'crossovers': each - each // 2,
      'parents': max(2, each // 2),
    }
  )
  rng = np.random.default_rng([config.seed, 1])
  found = evolution.search(space, task.cost, target, score, rng, **options)
  best = joint.to_unit(space, found[-1][0].vector)
  best = jax.tree.map(float, best)
  return joint.project(space, task.cost, target, best), end.params


def _flat(unit: Mapping[str, Any]) -> dict[str, np.ndarray]:
  found = {
    k: np.array(list(v.values())) for k, v in unit.items() if k != 'side'
  }
  if unit['side'] is not None:
    found['side'] = np.array(jax.tree.leaves(unit['side']))
  return {k: v for k, v in found.items() if v.size}
