"""What the main job trains: its task, and the stages one after another."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments import flags, methods, recipes, sources, train
from jaxprune import data, plans, scores


class Task(NamedTuple):
  """The network, the data and what follows from the flags."""

  config: flags.Config
  module: Any
  fn: Callable[[Any, Any], jax.Array]  # (variables, images) -> logits.
  prepare: Callable[[jax.Array], jax.Array]
  source: sources.Source
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
  where = config.dataset, config.test_split, config.data_dir
  test = data.load(*where, transform=flags.crops(config)[1])
  source = sources.read(config)
  if source.size < config.batch:
    raise flags.BadInputError(
      f'--batch={config.batch} must be at most the {source.size} examples to '
      f'train on. Give a smaller one.'
    )
  module = flags.network(config, len(test.classes))
  shape = jax.ShapeDtypeStruct((1, *test.images.shape[1:]), jnp.float32)
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
    prepare=train.preparation(source.sample),
    source=source,
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
  tx = flags.chain(config, stage.learning_rate, steps, method.link)

  def start(variables):
    stats = dict(method.start(variables))
    params = stats.pop('params')
    return train.State(params, stats, tx.init(params))

  return Setup(tx, method.view, start)


def steps_per_epoch(task: Task) -> int:
  """Returns the steps of one pass over the data."""
  return task.source.size // task.config.batch


def trained(task: Task, state: train.State) -> dict[str, Any]:
  """Returns the variables that a stage ends with."""
  if not task.config.ema:
    return train.variables(state)
  images = jnp.asarray(task.source.sample[:2048])
  batches = [
    task.prepare(images[i : i + 256]) for i in range(0, len(images), 256)
  ]
  return recipes.averaged(state, task.module.apply, batches)


def make_step(task: Task, setup: Setup, dense: Any) -> train.Step:
  """Returns the training step of a stage, by every flag that changes it.

  Args:
    task: the task.
    setup: of the stage.
    dense: the variables of the dense network, for a stage after it, else None.
  """
  config = task.config
  # Of NumPy, which is on no device: a batch may be split over several.
  taught = jax.tree.map(np.asarray, dense)
  teacher = None if dense is None else functools.partial(task.fn, taught)
  return train.make_step(
    flags.in_training(config, task.module).apply,
    setup.tx,
    task.prepare,
    change=flags.augmentation(config),
    mix=flags.mixing(config, len(task.test.classes)),
    view=setup.view,
    loss=flags.loss(config, teacher),
  )
