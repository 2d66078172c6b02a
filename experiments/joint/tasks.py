"""What is asked for: the network, the data and the vectors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments import flags, search, train
from experiments.settings import Range, at_least, in_range, preset, setting
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


METHODS = (
  'joint', 'uniform', 'channel', 'depth', 'resolution', 'random', 'evolution'
)  # fmt: skip
PART = Range(lambda x: 0 < x < 1)


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
  sides: tuple[int, ...] = setting(
    (),
    'Sides allowed; without it 4 from half of the largest on.',
    smoke=(6, 8),
  )
  spatial: str = setting(
    'input',
    'What has a side: the images, or every stage (needs --canvas=yes).',
    choices=('input', 'stage'),
  )
  methods: tuple[str, ...] = setting(
    METHODS,
    'What to compare.',
    choices=METHODS,
    smoke=('joint', 'uniform', 'depth', 'random'),
    decides=False,
  )
  macs: float = setting(
    0.25, 'Part of the multiply-adds that is kept, in (0, 1).', fits=PART
  )
  steps: int = setting(
    600, 'Weight steps of a supernet.', fits=at_least(1), smoke=12
  )
  warmup: float = setting(
    0.3, 'Part of them over random vectors.', fits=in_range('[0, 1)')
  )
  every: int = setting(2, 'Weight steps for one vector step.', fits=at_least(1))
  n: int = setting(
    8,
    'Vectors of one vector step, an even number.',
    fits=Range(lambda n: n >= 2 and n % 2 == 0),
    smoke=2,
  )
  sigma: float = setting(0.1, 'Perturbation of the vector, falls to 0.3 of it.')
  rate: float = setting(0.02, 'Learning rate of the vector (Adam).')
  rho: float = setting(1.0, 'Weight of the penalty log(MACs / target) above 0.')
  form: str = setting(
    'pairs',
    'Of the estimate: antithetic normal, normal, or signs.',
    choices=('pairs', 'plain', 'spsa'),
  )
  epochs: int = setting(
    12,
    'Passes over the data to train the network found.',
    fits=at_least(1),
    smoke=1,
  )
  start: str = setting(
    'scratch', 'Of that training.', choices=('scratch', 'shared')
  )
  batch: int = setting(
    64,
    'Examples of a weight step; twice as many of a vector step.',
    fits=at_least(1),
  )
  learning_rate: float = setting(0.1, 'The highest rate of SGD with momentum.')
  weight_decay: float = setting(5e-4, 'Pull of the kernels towards zero.')
  validation: float = setting(
    0.2, 'Part of the training split held out for vectors.'
  )
  seeds: int = setting(
    1,
    'Runs of everything, of seeds first_seed, first_seed + 1, ..',
    decides=False,
  )
  seed: int = setting(0, 'The first of them.', flag='first_seed')
  save_every: int = setting(
    100, 'Steps between two checkpoints.', fits=at_least(1), smoke=5
  )
  canvas: str = setting(
    'no', 'One compile for all sides, or each.', choices=('no', 'yes')
  )
  workdir: str = setting(
    None,
    'Where everything is kept; by default under runs/.',
    decides=False,
  )
  preset: str = preset('smoke: every phase, two minutes.')


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
