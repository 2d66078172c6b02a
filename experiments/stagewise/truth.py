"""Networks trained from scratch, beside what supernets said of them."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats as statistics

import jaxprune as jp
from experiments import search, workdir
from experiments.stagewise.choosing import TOLERANCE, Judge, stack
from experiments.stagewise.tasks import Task
from jaxprune import models, plans
from jaxprune.report import plots
from jaxprune.search import evolution, joint
from jaxprune.search.joint import PruningVector


def finish(
  task: Task, vector: PruningVector, folder: pathlib.Path
) -> dict[str, Any]:
  """Returns the figures of a network trained from scratch; resumes by itself.

  Args:
    task: the task.
    vector: of the network.
    folder: of its checkpoints.
  """
  config = task.config
  plan = joint.plan(task.vectors, vector)
  small = jp.shrink(task.graph, plan, task.initial)
  accuracy = search.train_from_scratch(
    task.module.clone(widths=models.widths(small['params'])),
    task.splits,
    folder,
    seed=config.seed,
    epochs=config.epochs,
    batch=config.batch,
    rate=config.learning_rate,
    decay=config.weight_decay,
    change=task.change,
    save_every=config.save_every,
  )
  return {
    'accuracy': accuracy,
    'macs': jp.cost.macs(task.graph, plan) / jp.cost.macs(task.graph),
    'widths': {
      name: list(pair) for name, pair in plans.widths(task.graph, plan).items()
    },
  }


def proxy_against_truth(
  task: Task, judge: Judge, nets: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
  """Returns what both supernets said of the same networks, and the truth."""
  rng = np.random.default_rng([task.config.seed, 3])
  chosen, truth = [], []
  for k in range(task.config.nets):
    vector = evolution.draw(
      task.vectors, task.cost, task.limit, rng, tolerance=TOLERANCE
    )
    chosen.append(vector)
    file = folder / f'net{k}.json'
    if not file.exists():
      result = finish(task, vector, folder / f'net{k}')
      workdir.write(file, json.dumps(result, indent=1) + '\n')
    truth.append(json.loads(file.read_text())['accuracy'])
  widths = stack(task, chosen)
  found: dict[str, Any] = {'truth': truth}
  summed = judge.proxies(nets['stagewise'], widths).sum(0)
  found['stagewise_proxy'] = summed.tolist()
  for kind, variables in nets.items():
    accuracies, losses = judge.accuracies(variables, widths)
    found[f'{kind}_accuracy'] = accuracies.tolist()
    found[f'{kind}_loss'] = losses.tolist()
  said = {
    'stage-wise': -np.asarray(found['stagewise_proxy']),
    'single-path': -np.asarray(found['single_loss']),
  }
  found['tau'] = {
    name: float(statistics.kendalltau(values, truth)[0])  # type: ignore
    for name, values in said.items()
  }
  found['gap'] = {
    'stage-wise': _gap(found['stagewise_accuracy'], truth),
    'single-path': _gap(found['single_accuracy'], truth),
  }
  figure = plots.scatter(
    {name: (values.tolist(), truth) for name, values in said.items()},
    across='what the supernet says (minus the loss)',
    up='accuracy from scratch',
  )
  (folder / 'proxy.svg').write_text(plots.svg(figure, 'proxy and truth'))
  return found


def _gap(said: Sequence[float], truth: Sequence[float]) -> float:
  return float(np.mean(np.abs(np.asarray(said) - np.asarray(truth))))
