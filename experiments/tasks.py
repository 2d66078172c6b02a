"""What the main job trains: its task, and the stages one after another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments import flags, methods, recipes, train
from jaxprune import data, plans, scores


class Task(NamedTuple):
  """The network, the data and what follows from the flags."""

  config: flags.Config
  module: Any
  fn: Callable[[Any, Any], jax.Array]  # (variables, images) -> logits.
  prepare: Callable[[jax.Array], jax.Array]
  examples: train.Examples
  held: train.Examples | None
  test: data.Dataset
  initial: Any  # Variables.
  graph: Any


class Stage(NamedTuple):
  """A part of the training."""

  name: str
  epochs: int
  learning_rate: float


def prepare(config: flags.Config) -> Task:
  """Returns the task of a configuration; writes nothing.

  Raises:
    BadInputError: if the flags do not fit the data or the network.
    DataError: if the data are missing or damaged.
  """
  load = lambda split: data.load(config.dataset, split, config.data_dir)
  training, test = load(config.train_split), load(config.test_split)
  examples, held = train.split_off(
    training.images, training.labels, config.validation, config.seed
  )
  if len(examples.labels) < config.batch:
    raise flags.BadInputError(
      f'--batch={config.batch} must be at most the {len(examples.labels)} '
      f'examples to train on. Give a smaller one.'
    )
  module = flags.network(config, len(training.classes))
  shape = jax.ShapeDtypeStruct((1, *training.images.shape[1:]), jnp.float32)
  fn = lambda variables, x: module.apply(variables, x)
  key = jax.random.key(config.seed)
  try:
    initial = jax.jit(module.init)(key, jnp.zeros(shape.shape, shape.dtype))
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise flags.BadInputError(
      f'--model={config.model} does not take images of '
      f'{"x".join(map(str, shape.shape[1:]))} ({type(error).__name__}). '
      f'Choose another --model.'
    ) from error
  task = Task(
    config=config,
    module=module,
    fn=fn,
    prepare=train.preparation(training.images),
    examples=examples,
    held=held,
    test=test,
    initial=initial,
    graph=jp.trace(fn, initial, shape),
  )
  if 'channel' in flags.METHODS[config.method]:
    choose(task, initial)  # Refuses a budget that cannot be met.
  return task


def choose(task: Task, variables: Any) -> Any:
  """Returns the plan that keeps the channels of largest magnitude.

  Raises:
    BadInputError: if the budget cannot be met.
  """
  graph, config = task.graph, task.config
  found = graph.reduce(scores.magnitude(variables['params']))
  try:
    return jp.plan(
      graph, found, jp.budget(macs=config.macs), round_to=config.round_to
    )
  except ValueError as error:
    line = ' '.join(str(error).split())
    raise flags.BadInputError(f'--macs={config.macs}: {line}') from None


def schedule(config: flags.Config) -> list[Stage]:
  """Returns the stages of a run, in order."""
  rate = config.learning_rate
  stages = [Stage('dense', config.epochs, rate)]
  for name in flags.METHODS[config.method]:
    if name == 'channel':
      stages.append(Stage(name, config.tune_epochs, 0.5 * rate))
    else:
      stages.append(Stage(name, config.prune_epochs, 0.5 * rate))
  return stages


class Setup(NamedTuple):
  """How a stage trains."""

  tx: Any
  view: train.View
  start: Callable[[Any], train.State]  # From the dense network's variables.


def set_up(task: Task, stage: Stage, plan: Any) -> Setup:
  """Returns how a stage trains.

  Args:
    task: the task.
    stage: the stage.
    plan: for the stage of channel pruning.
  """
  config = task.config
  steps = stage.epochs * steps_per_epoch(task)
  if stage.name == 'dense':
    method = methods.dense()
  elif stage.name == 'channel':
    method = methods.channel(plans.masks(task.graph, plan, task.initial))
  else:
    method = flags.UNSTRUCTURED[stage.name](config.sparsity, steps)
  rate, decay = stage.learning_rate, config.weight_decay
  tx = recipes.sgd(rate, decay, steps, method.link)

  def start(variables):
    stats = dict(method.start(variables))
    params = stats.pop('params')
    return train.State(params, stats, tx.init(params))

  return Setup(tx, method.view, start)


def steps_per_epoch(task: Task) -> int:
  """Returns the steps of one pass over the data."""
  return len(task.examples.labels) // task.config.batch
