"""What is asked for: the network, the data and the vectors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments import flags, search, train
from jaxprune import models
from jaxprune.search import joint

# Those whose blocks can go and whose last layer takes any resolution.
MODELS: Mapping[str, Callable[[int, int], Any]] = {
  'resnet20_half': lambda classes, side: models.resnet20(
    channels=(8, 16, 32), num_classes=classes, shortcut='projection'
  ),
  'resnet20': lambda classes, side: models.resnet20(
    num_classes=classes, shortcut='projection'
  ),
  'resnet56': lambda classes, side: models.resnet56(
    num_classes=classes, shortcut='projection'
  ),
  'mobilenet_v1': lambda classes, side: models.mobilenet_v1(
    num_classes=classes, stem=_stem(side), dropout=0.0, skippable=True,
    tensorflow_padding=False,
  ),
  'mobilenet_v2': lambda classes, side: models.mobilenet_v2(
    num_classes=classes, stem=_stem(side), dropout=0.0
  ),
  'mobilenet_v3': lambda classes, side: models.mobilenet_v3_large(
    num_classes=classes, stem=_stem(side), dropout=0.0
  ),
}  # fmt: skip


def _stem(side: int) -> str:
  return 'large' if side > 64 else 'small'


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for, of one seed."""

  model: str
  dataset: str
  data_dir: str | None
  subset: int
  side: int
  sides: tuple[int, ...]
  spatial: str
  macs: float
  steps: int
  warmup: float
  every: int
  n: int
  sigma: float
  rate: float
  rho: float
  form: str
  epochs: int
  start: str
  batch: int
  learning_rate: float
  weight_decay: float
  validation: float
  save_every: int
  canvas: str
  seed: int
  workdir: str


class Task(NamedTuple):
  """The network, the data and the vectors."""

  config: Config
  module: Any
  initial: Any  # Variables.
  examples: train.Examples
  held: train.Examples
  test: train.Examples
  prepare: Callable[[jax.Array], jax.Array]
  change: train.Augment
  graph: Any  # Of inference.
  trained: Any  # Graph of the training form.
  space: joint.Space  # Of that.
  cost: joint.Coster
  limit: float


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
  if len(splits.held.labels) < 2 * config.batch:
    raise flags.BadInputError('--validation holds out too few images.')
  images = splits.examples.images
  side = images.shape[1]
  module = MODELS[config.model](splits.classes, side)
  spec = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
  key = jax.random.key(config.seed)
  initial = jax.jit(module.init)(key, jnp.zeros(spec.shape))
  step = lambda variables, x: module.apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  sides = config.sides or sorted(
    {int(side * part) for part in (0.5, 0.65, 0.8, 1)}
  )
  cuts = {}
  if config.spatial == 'stage':
    numbers = range(2, module.num_stages + 1)
    cuts = {f'stage{k}': f'.*stage{k}_block1/.*' for k in numbers}
  try:
    graph = jp.trace(step, initial, spec)
    space = joint.space(graph, spec, sides=sides, cuts=cuts)
    cost = joint.coster(space)
    limit = joint.limit(space, cost, config.macs)
  except ValueError as error:
    raise flags.BadInputError(' '.join(str(error).split())) from None
  name = config.dataset.partition(':')[0]
  return Task(
    config, module, initial, splits.examples, splits.held, splits.test,
    splits.prepare,
    flags.AUGMENTATIONS.get(name, lambda key, images: images),
    jp.trace(lambda variables, x: module.apply(variables, x), initial, spec),
    graph, space, cost, limit,
  )  # fmt: skip
