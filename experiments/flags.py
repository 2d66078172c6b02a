"""The settings of the main job; the one place where strings become functions.

Flags fill one frozen :class:`Config`. What is wrong with them is found here,
before anything is computed or written.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import methods, recipes, settings, train
from experiments.settings import (
  ABOVE_0,
  BadInputError,
  Range,
  at_least,
  in_range,
  preset,
  setting,
)
from jaxprune import models
from jaxprune.data import augment

# Strings to functions.

METHODS: Mapping[str, tuple[str, ...]] = {
  'both': ('channel', 'pdp'),
  'channel': ('channel',),
  'pdp': ('pdp',),
  'magnitude': ('magnitude',),
  'lamp': ('lamp',),
  'erk': ('erk',),
  'all': ('channel', 'pdp', 'magnitude', 'lamp', 'erk'),
}
UNSTRUCTURED: Mapping[str, Callable[[float, int], methods.Method]] = {
  'pdp': methods.pdp,
  'magnitude': methods.magnitude,
  'lamp': methods.lamp,
  'erk': methods.erk,
}
TITLES: Mapping[str, str] = {
  'dense': 'dense training',
  'channel': 'channels pruned',
  'pdp': 'PDP',
  'magnitude': 'magnitude pruning',
  'lamp': 'LAMP pruning',
  'erk': 'ERK pruning',
}
MODELS: Mapping[str, Callable[[int], Any]] = {
  # Wide, and no stage at 2 x 2: there, and below 24 channels, XLA's
  # convolutions on CPU do a fifth of the work a second that they do elsewhere,
  # and the clock would say more of that than of the multiply-adds.
  'resnet_digits': lambda classes: models.resnet_digits(
    channels=(32, 64, 128), strides=(1, 2, 1), num_classes=classes
  ),
  'resnet20': lambda classes: models.resnet20(
    num_classes=classes, shortcut='projection'
  ),
  'resnet56': lambda classes: models.resnet56(
    num_classes=classes, shortcut='projection'
  ),
  # Wider than the classic, whose 6 channels leave nothing to round to 8.
  'lenet5': lambda classes: models.LeNet5(
    channels=(16, 32), hidden=(128, 80), num_classes=classes, pad=2
  ),
  'mlp': lambda classes: models.lenet_300_100(num_classes=classes),
}
USUAL_MODEL: Mapping[str, str] = {
  'digits': 'resnet_digits',
  'mnist': 'lenet5',
  'fashion_mnist': 'lenet5',
}  # Any other set: resnet20.
OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
  'sgd': recipes.sgd,
  'adam': recipes.adam,
}
USUAL_RATE: Mapping[str, float] = {'sgd': 0.1, 'adam': 1e-3}


def _shift(padding: int) -> train.Augment:
  return functools.partial(augment.random_crop, padding=padding)


def _flip_and_shift(padding: int) -> train.Augment:
  def change(key: jax.Array, images: jax.Array) -> jax.Array:
    flip, shift = jax.random.split(key)
    images = augment.random_flip(flip, images)
    return augment.random_crop(shift, images, padding)

  return change


AUGMENTATIONS: Mapping[str, train.Augment] = {
  'digits': _shift(1),
  'mnist': _shift(2),
  'fashion_mnist': _flip_and_shift(2),
  'cifar10': _flip_and_shift(4),
  'cifar100': _flip_and_shift(4),
}  # Any other set: none.


@dataclasses.dataclass(frozen=True)
class Config:
  """What a run is asked for."""

  method: str = setting(
    'both',
    'How to prune. channel: remove whole channels, for a network that is '
    'really smaller. pdp: zero single weights by soft masks. magnitude, lamp, '
    'erk: zero single weights little by little. both: channel and pdp.',
    choices=METHODS,
  )
  model: str = setting(
    None,
    'The network; without it the usual one of the data set.',
    choices=MODELS,
  )
  dataset: str = setting(
    'digits',
    'The data: digits comes with scikit-learn and needs no folder; mnist, '
    'fashion_mnist, cifar10 or any other image set is read from --data_dir.',
  )
  data_dir: str | None = setting(
    None,
    'A folder of sets that TFDS prepared as array_record; without it the one '
    'that the variable JAXPRUNE_DATA names.',
  )
  train_split: str = setting(
    'train', "What to train on, such as 'train[:5000]'.", smoke='train[:256]'
  )
  test_split: str = setting(
    'test', 'What the final figures are measured on.', smoke='test[:64]'
  )
  validation: float = setting(
    0.1,
    'Part of the training split held back for the curves of the report.',
    fits=in_range('[0, 1)'),
  )
  sparsity: float = setting(
    0.9,
    'Part of the weights that the methods for single weights set to zero.',
    fits=in_range('[0, 1)'),
  )
  macs: float = setting(
    0.45,
    'Part of the multiply-adds that the method channel may keep, in (0, 1].',
    fits=in_range('(0, 1]'),
  )
  round_to: int = setting(
    8,
    'Widths after channel pruning are multiples of this; machines like 8.',
    fits=at_least(1),
  )
  epochs: int = setting(
    15,
    'Passes over the data to train the dense network.',
    fits=at_least(1),
    smoke=2,
  )
  tune_epochs: int = setting(
    10,
    'Passes to fine-tune after channels are pruned.',
    fits=at_least(1),
    smoke=1,
  )
  prune_epochs: int = setting(
    20,
    'Passes for a method that zeroes single weights.',
    fits=at_least(1),
    smoke=2,
  )
  batch: int = setting(64, 'Examples a step.', fits=at_least(1))
  optimizer: str = setting(
    'sgd',
    'sgd: with Nesterov momentum. adam: with decoupled weight decay.',
    choices=OPTIMIZERS,
  )
  learning_rate: float = setting(
    None,
    'The highest rate; without it 0.1 for sgd and 0.001 for adam.',
    fits=ABOVE_0,
  )
  weight_decay: float = setting(
    5e-4, 'Pull of the kernels towards zero.', fits=at_least(0)
  )
  cutout: int = setting(
    0, 'Side of a square of each image that is set to zero.', fits=at_least(0)
  )
  mixup: float = setting(
    0.0,
    'Mixes pairs of images by shares of Beta(this, this); 0: none.',
    fits=at_least(0),
  )
  label_smoothing: float = setting(
    0.0, 'Part of each label that all classes share.', fits=in_range('[0, 1)')
  )
  ema: float = setting(
    0.0,
    'Decay of a running average of the weights, which are the result then; 0: '
    'none.',
    fits=in_range('[0, 1)'),
  )
  distill: float = setting(
    0.0,
    'Weight of what the dense network says, in the loss of the networks pruned '
    'from it; the rest is that of the labels.',
    fits=in_range('[0, 1]'),
  )
  dtype: str = setting(
    'float32',
    'What training computes in. Weights are float32, and so are the networks '
    'that are measured.',
    choices=('float32', 'bfloat16'),
  )
  remat: bool = setting(
    False,
    'Compute the activations of each block again in the backward pass: less '
    'memory, more time.',
  )
  stream: bool = setting(
    False,
    'Read the training split from its files step by step, for one too large '
    'for the device; the result is the same.',
  )
  side: int = setting(
    0,
    'With --stream: cut photos of many sizes to squares of this side, at '
    'random in training, else from the middle. 0: take images as they are.',
    fits=at_least(0),
  )
  seed: int = setting(
    0,
    'Decides the initial weights, the order and the shifts.',
    fits=Range(lambda x: 0 <= x < 2**32, 'in 0..2^32-1'),
  )
  pairs: int = setting(
    30,
    'Rounds in which the networks are timed in turn; 0: none.',
    fits=at_least(0),
    smoke=1,
  )
  save_every: int = setting(
    5, 'Epochs between two checkpoints.', fits=at_least(1), smoke=1
  )
  devices: int = setting(1, 'Devices that share a batch.', fits=at_least(1))
  parallel: Literal['jit', 'pmap'] = setting(
    'jit',
    'How they share it. jit: batch norms see the whole batch, as on one '
    'device. pmap: each device normalises its own part.',
    choices=('jit', 'pmap'),
  )
  workdir: str = setting(
    None,
    'The run folder; without it runs/ and a name made from the other flags. '
    'The same command with the same folder goes on where it was stopped.',
    decides=False,
  )
  preset: str = preset(
    'smoke: every stage with little data and few epochs, in a minute; the '
    'figures mean nothing.'
  )


def parse(argv: Sequence[str]) -> Config:
  """Returns the configuration that command-line arguments ask for.

  Args:
    argv: without the name of the program.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """

  def usual(given):
    name = given['dataset'].partition(':')[0]  # Behind it, a version.
    return {
      'model': USUAL_MODEL.get(name, 'resnet20'),
      'learning_rate': USUAL_RATE[given['optimizer']],
    }

  config = settings.parse(Config, argv, usual)
  if config.remat and not hasattr(MODELS[config.model](10), 'remat'):
    raise BadInputError(
      f'--remat: {config.model} has no blocks to compute again; leave it out.'
    )
  if config.side and not config.stream:
    raise BadInputError('--side cuts photos as they stream; give --stream too.')
  count = len(jax.devices())
  if config.devices > count:
    raise BadInputError(
      f'--devices is {config.devices}, JAX sees {count}; on CPU, XLA_FLAGS='
      f'--xla_force_host_platform_device_count={config.devices} makes more.'
    )
  if config.batch % config.devices:
    raise BadInputError(
      f'--batch of {config.batch} cannot be split over --devices of '
      f'{config.devices}.'
    )
  return settings.in_folder(config, config.dataset, config.method)


def network(config: Config, classes: int) -> Any:
  """Returns the Linen module of a configuration."""
  return MODELS[config.model](classes)


def in_training(config: Config, module: Any) -> Any:
  """Returns a network as it trains: of the same variables.

  Args:
    config: the configuration.
    module: its network.
  """
  changed = module.clone(dtype=jnp.dtype(config.dtype))
  return changed.clone(remat=True) if config.remat else changed


def chain(
  config: Config, rate: float, steps: int, link: Any
) -> optax.GradientTransformation:
  """Returns the optimizer of a configuration, a method's link at its end.

  Args:
    config: the configuration.
    rate: the highest.
    steps: of the whole stage.
    link: of the method of pruning.
  """
  links = [link, recipes.average(config.ema)] if config.ema else [link]
  recipe = OPTIMIZERS[config.optimizer]
  return recipe(rate, config.weight_decay, steps, *links)


def loss(config: Config, teacher: train.Teacher | None = None) -> train.Loss:
  """Returns the loss of a configuration.

  Args:
    config: the configuration.
    teacher: prepared images -> logits to follow, if it asks for that.
  """
  task = train.cross_entropy
  if config.label_smoothing:
    task = recipes.smoothed(config.label_smoothing)
  if teacher is None or not config.distill:
    return task
  return recipes.distilled(teacher, weight=config.distill, task=task)


def crops(config: Config) -> tuple[Any, Any]:
  """Returns how photos are cut in training and otherwise; None for not."""
  if not config.side:
    return None, None
  cut = lambda fn: functools.partial(fn, side=config.side)
  return cut(augment.random_resized_crop), cut(augment.center_crop)


def augmentation(config: Config) -> train.Augment:
  """Returns how the images of a configuration are augmented in training."""
  name = config.dataset.partition(':')[0]
  change = AUGMENTATIONS.get(name, lambda key, images: images)
  if not config.cutout:
    return change

  def cut(key: jax.Array, images: jax.Array) -> jax.Array:
    changing, cutting = jax.random.split(key)
    images = change(changing, images)
    return augment.cutout(cutting, images, config.cutout)

  return cut


def mixing(config: Config, classes: int) -> train.Mix | None:
  """Returns how examples and labels are mixed in training; None for not."""
  if not config.mixup:
    return None
  return lambda key, images, labels: augment.mixup(
    key, images, jax.nn.one_hot(labels, classes), config.mixup
  )
