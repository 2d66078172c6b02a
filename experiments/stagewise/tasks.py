"""What is asked for: the network in stages, and the data."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from experiments import flags, search, train
from jaxprune import models
from jaxprune.search import joint, stagewise
from jaxprune.structure import cut

FRACTIONS = tuple(k / 10 for k in range(1, 10))


class Net(NamedTuple):
  """A network and where its stages are cut: before these leaves."""

  make: Callable[[int], Any]
  cuts: tuple[str, ...]


def _resnet(make: Callable[..., Any], **options: Any) -> Net:
  return Net(
    lambda classes: make(num_classes=classes, shortcut='projection', **options),
    ('.*stage2_block1.*', '.*stage3_block1.*'),
  )


MODELS: Mapping[str, Net] = {
  'resnet20_half': _resnet(models.resnet20, channels=(8, 16, 32)),
  'resnet20': _resnet(models.resnet20),
  'resnet56': _resnet(models.resnet56),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for, of one seed."""

  model: str
  dataset: str
  data_dir: str | None
  subset: int
  side: int
  macs: float
  steps: int
  epochs: int
  m: int
  candidates: int
  nets: int
  tiny: bool
  teacher: str
  source: Literal['full', 'chain']
  search: str
  stages: int
  batch: int
  judges: int
  learning_rate: float
  weight_decay: float
  validation: float
  save_every: int
  seed: int
  workdir: str


class Task(NamedTuple):
  """The network in stages, the data, and the sub-networks there are."""

  config: Config
  module: Any
  initial: Any  # Variables.
  splits: search.Splits
  change: train.Augment
  graph: Any  # Of the whole, in the training form.
  stages: tuple[Any, ...]  # Graphs.
  space: list[dict[str, np.ndarray]]  # Of each stage, for the supernets.
  vectors: joint.Space  # Of the whole; where stages meet it stays full.
  cost: joint.Coster
  limit: int  # Multiply-adds.


def prepare(config: Config) -> Task:
  """Returns the task of a configuration.

  Raises:
    BadInputError: if the flags do not fit the data or the network.
    DataError: if the data are missing or damaged.
  """
  splits = search.load(
    config.dataset,
    config.data_dir,
    subset=config.subset,
    side=config.side,
    validation=config.validation,
    seed=config.seed,
  )
  net = MODELS[config.model]
  module = net.make(splits.classes)
  x = splits.prepare(splits.examples.images[: config.batch])
  initial = jax.jit(module.init)(jax.random.key(config.seed), x[:1])
  step = lambda variables, x: module.apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  graph = jp.trace(step, initial, x)
  count = config.stages or len(net.cuts) + 1
  cuts = net.cuts[len(net.cuts) + 1 - count :]
  stages = stagewise.graphs(cut(graph, cuts), initial, x)
  space = [stagewise.choices(part, FRACTIONS) for part in stages]
  inner = {name for part in space for name in part}
  stays = {re.escape(name): 1.0 for name in graph.groups if name not in inner}
  vectors = joint.space(graph, keep={**stays, '.*': 1})
  vectors = joint.restrict(vectors, widths=True)
  cost = joint.coster(vectors)
  try:
    limit = int(joint.limit(vectors, cost, config.macs))
  except ValueError as error:
    raise flags.BadInputError(' '.join(str(error).split())) from None
  change = flags.AUGMENTATIONS.get(
    config.dataset.partition(':')[0], lambda key, images: images
  )
  return Task(
    config, module, initial, splits, change, graph, stages, space, vectors,
    cost, limit,
  )  # fmt: skip
