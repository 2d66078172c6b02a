"""What is asked for: the network in stages, and the data."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from experiments import flags, search, train
from experiments.settings import Range, at_least, preset, setting
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


METHODS = ('stagewise', 'evolution', 'uniform')


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for; of one seed."""

  model: str = setting('resnet20_half', 'The network.', choices=MODELS)
  dataset: str = setting('digits', 'The data; see experiments.prune.')
  data_dir: str | None = setting(None, 'A folder of sets that TFDS prepared.')
  subset: int = setting(
    0, 'Training images, equally many of a class; 0: all.', smoke=800
  )
  side: int = setting(
    0, 'Shrink all images to this side first; 0: as they are.'
  )
  methods: tuple[str, ...] = setting(
    METHODS, 'What to compare.', choices=METHODS, decides=False
  )
  macs: float = setting(
    0.4,
    'Part of the multiply-adds that is kept, in (0, 1).',
    fits=Range(lambda x: 0 < x < 1),
  )
  steps: int = setting(600, 'Of a supernet.', fits=at_least(1), smoke=6)
  epochs: int = setting(
    10,
    'Passes over the data to train a network from scratch.',
    fits=at_least(1),
    smoke=1,
  )
  m: int = setting(2, 'Random sub-networks of each stage in a step.', smoke=1)
  candidates: int = setting(
    256,
    'Judged in each stage, and by evolution.',
    fits=at_least(3),
    smoke=16,
  )
  nets: int = setting(
    12,
    'Sub-networks of equal cost for the proxy, at least 3; 0: none.',
    fits=Range(lambda n: n == 0 or n >= 3),
    smoke=3,
  )
  tiny: bool = setting(True, 'Whether the narrowest learn in every step.')
  teacher: str = setting(
    'now', 'Which full network teaches.', choices=('now', 'before')
  )
  source: Literal['full', 'chain'] = setting(
    'full', 'What a stage begins from.', choices=('full', 'chain')
  )
  search: str = setting(
    'knapsack', 'Over the stages.', choices=('knapsack', 'evolution')
  )
  stages: int = setting(0, 'Use so many stages at most; 0: all.')
  batch: int = setting(64, 'Examples of a step.', fits=at_least(1))
  judges: int = setting(
    512,
    'Held-out images that the proxies are measured on.',
    fits=at_least(1),
    smoke=64,
  )
  learning_rate: float = setting(0.1, 'The highest rate of SGD with momentum.')
  weight_decay: float = setting(5e-4, 'Pull of the kernels towards zero.')
  validation: float = setting(0.2, 'Part of the training split held out.')
  seeds: int = setting(
    1,
    'Runs of everything, of seeds first_seed, first_seed + 1, ..',
    decides=False,
  )
  seed: int = setting(0, 'The first of them.', flag='first_seed')
  save_every: int = setting(
    100, 'Steps between two checkpoints.', fits=at_least(1), smoke=4
  )
  pairs: int = setting(
    0,
    'Time the steps instead, in so many interleaved pairs.',
    decides=False,
  )
  workdir: str = setting(
    None,
    'Where everything is kept; by default under runs/.',
    decides=False,
  )
  preset: str = preset('smoke: every phase, a minute.')


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
