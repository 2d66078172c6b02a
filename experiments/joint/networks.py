"""The network of a vector, trained."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

import jaxprune as jp
from experiments import recipes, search, train
from experiments.joint.supernets import parted
from experiments.joint.tasks import Task
from jaxprune import models, plans, tree
from jaxprune.plans import recovery
from jaxprune.search import joint
from jaxprune.structure.sizes import padded


def finish(
  task: Task, vector: joint.PruningVector, params: Any, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains the network of a vector; returns its figures; resumes by itself.

  Args:
    task: the task.
    vector: on the budget.
    params: of the supernet, to start from; None for new ones.
    folder: of its checkpoints.
  """
  config = task.config
  plan = joint.plan(task.space, vector)
  small = tree.compact(jp.shrink(task.graph, plan, task.initial))
  options = {'skippable': False} if hasattr(task.module, 'skippable') else {}
  module = task.module.clone(
    widths=models.widths(small['params']),
    **({'drop': plan.dropped} if hasattr(task.module, 'drop') else {}),
    **options,
  )
  apply = _apply(task, plan, module)
  side = plan.resolution and plan.resolution[0]
  resize = lambda x: x if side is None else padded.resize(x, side)
  prepared = lambda x: resize(task.prepare(x))
  key = jax.random.key(config.seed)
  x = prepared(task.examples.images[: config.batch])
  variables = jax.jit(module.init)(key, x[:1])
  if params is not None and config.start == 'shared':
    whole = {**task.initial, 'params': params}
    variables = tree.compact(jp.shrink(task.graph, plan, whole))
    params = variables['params']
    update = jax.jit(lambda stats, x: apply(
      {'params': params, 'batch_stats': stats}, x, train=True,
      mutable=['batch_stats'],
    )[1]['batch_stats'])  # fmt: skip
    batches = [
      prepared(task.examples.images[k : k + config.batch])
      for k in range(0, 20 * config.batch, config.batch)
      if k + config.batch <= len(task.examples.labels)
    ]
    stats = recovery.batch_statistics(update, variables['batch_stats'], batches)
    variables = {'params': params, 'batch_stats': stats}
  count = len(task.examples.labels) // config.batch
  tx = recipes.sgd(
    config.learning_rate, config.weight_decay, count * config.epochs
  )
  change = lambda key, images: resize(task.change(key, images))
  step = train.make_step(apply, tx, task.prepare, change=change)
  params, stats = parted(variables)
  state = search.fit(
    step, train.State(params, stats, tx.init(params)), task.examples, folder,
    seed=config.seed, epochs=config.epochs, batch=config.batch,
    save_every=config.save_every,
  )  # fmt: skip
  evaluate = train.make_evaluate(apply, prepared)
  return {
    'accuracy': evaluate(train.variables(state), task.test),
    'macs': task.cost(vector) / joint.whole(task.space, task.cost),
    'vector': json.loads(joint.to_json(vector)),
    'widths': {
      name: list(pair) for name, pair in plans.widths(task.graph, plan).items()
    },
  }


def _apply(task: Task, plan: plans.Plan, module: Any) -> Callable[..., Any]:
  """The network as Linen applies it; what is resized, from its trace."""
  if not plan.resized:
    return module.apply
  trained = jp.specialise(task.trained, plan)
  inferred = jp.specialise(task.graph, plan)

  def apply(variables, x, train=False, **options):
    del options  # It has no dropout, and its statistics alone change.
    if not train:
      return inferred(variables, x)
    logits, stats = trained(variables, x)
    return logits, tree.compact(stats)

  return apply
