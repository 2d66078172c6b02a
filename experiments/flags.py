"""The flags of the main job; the one place where strings become functions.

Flags fill one frozen :class:`Config`. What is wrong with them is found here,
before anything is computed or written.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from experiments import methods, recipes, train
from jaxprune import models
from jaxprune.data import augment


class BadInputError(ValueError):
  """What the user can put right; the message is one line that says how."""


@dataclasses.dataclass(frozen=True)
class Config:
  """What a run is asked for."""

  method: str
  model: str
  dataset: str
  data_dir: str | None
  train_split: str
  test_split: str
  validation: float
  sparsity: float
  macs: float
  round_to: int
  epochs: int
  tune_epochs: int
  prune_epochs: int
  batch: int
  optimizer: str
  learning_rate: float
  weight_decay: float
  cutout: int
  mixup: float
  label_smoothing: float
  ema: float
  distill: float
  dtype: str
  remat: bool
  stream: bool
  side: int
  seed: int
  pairs: int
  save_every: int
  devices: int
  parallel: train.Parallel
  workdir: str


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

PRESETS: Mapping[str, Mapping[str, Any]] = {
  'full': {},
  'smoke': {  # Every stage, in seconds; the figures mean nothing.
    'train_split': 'train[:256]',
    'test_split': 'test[:64]',
    'epochs': 2,
    'tune_epochs': 1,
    'prune_epochs': 2,
    'pairs': 1,
    'save_every': 1,
  },
}

# The flags.

_FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=_FLAGS)
_choice = functools.partial(flags.DEFINE_enum, flag_values=_FLAGS)
_int = functools.partial(flags.DEFINE_integer, flag_values=_FLAGS)
_float = functools.partial(flags.DEFINE_float, flag_values=_FLAGS)
_bool = functools.partial(flags.DEFINE_bool, flag_values=_FLAGS)

_choice(
  'method',
  'both',
  list(METHODS),
  'How to prune. channel: remove whole channels, for a network that is really '
  'smaller. pdp: zero single weights by soft masks. magnitude, lamp, erk: zero '
  'single weights little by little. both: channel and pdp.',
)
_choice(
  'model',
  None,
  list(MODELS),
  'The network; without it the usual one of the data set.',
)
_text(
  'dataset',
  'digits',
  'The data: digits comes with scikit-learn and needs no folder; mnist, '
  'fashion_mnist, cifar10 or any other image set is read from --data_dir.',
)
_text(
  'data_dir',
  None,
  'A folder of sets that TFDS prepared as array_record; without it the one '
  'that the variable JAXPRUNE_DATA names.',
)
_text('train_split', 'train', "What to train on, such as 'train[:5000]'.")
_text('test_split', 'test', 'What the final figures are measured on.')
_float(
  'validation',
  0.1,
  'Part of the training split held back for the curves of the report.',
)
_float(
  'sparsity',
  0.9,
  'Part of the weights that the methods for single weights set to zero.',
)
_float(
  'macs',
  0.45,
  'Part of the multiply-adds that the method channel may keep, in (0, 1].',
)
_int(
  'round_to',
  8,
  'Widths after channel pruning are multiples of this; machines like 8.',
)
_int('epochs', 15, 'Passes over the data to train the dense network.')
_int('tune_epochs', 10, 'Passes to fine-tune after channels are pruned.')
_int('prune_epochs', 20, 'Passes for a method that zeroes single weights.')
_int('batch', 64, 'Examples a step.')
_choice(
  'optimizer',
  'sgd',
  list(OPTIMIZERS),
  'sgd: with Nesterov momentum. adam: with decoupled weight decay.',
)
_float(
  'learning_rate',
  None,
  'The highest rate; without it 0.1 for sgd and 0.001 for adam.',
)
_float('weight_decay', 5e-4, 'Pull of the kernels towards zero.')
_int('cutout', 0, 'Side of a square of each image that is set to zero.')
_float(
  'mixup', 0.0, 'Mixes pairs of images by shares of Beta(this, this); 0: none.'
)
_float('label_smoothing', 0.0, 'Part of each label that all classes share.')
_float(
  'ema',
  0.0,
  'Decay of a running average of the weights, which are the result then; 0: '
  'none.',
)
_float(
  'distill',
  0.0,
  'Weight of what the dense network says, in the loss of the networks pruned '
  'from it; the rest is that of the labels.',
)
_choice(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'What training computes in. Weights are float32, and so are the networks '
  'that are measured.',
)
_bool(
  'remat',
  False,
  'Compute the activations of each block again in the backward pass: less '
  'memory, more time.',
)
_bool(
  'stream',
  False,
  'Read the training split from its files step by step, for one too large for '
  'the device; the result is the same.',
)
_int(
  'side',
  0,
  'With --stream: cut photos of many sizes to squares of this side, at random '
  'in training, else from the middle. 0: take images as they are.',
)
_int('seed', 0, 'Decides the initial weights, the order and the shifts.')
_int('pairs', 30, 'Rounds in which the networks are timed in turn; 0: none.')
_int('save_every', 5, 'Epochs between two checkpoints.')
_int('devices', 1, 'Devices that share a batch.')
_choice(
  'parallel',
  'jit',
  ['jit', 'pmap'],
  'How they share it. jit: batch norms see the whole batch, as on one device. '
  'pmap: each device normalises its own part.',
)
_text(
  'workdir',
  None,
  'The run folder; without it runs/ and a name made from the other flags. The '
  'same command with the same folder goes on where it was stopped.',
)
_choice(
  'preset',
  'full',
  list(PRESETS),
  'smoke: every stage with little data and few epochs, in a minute.',
)


def usage() -> str:
  """Returns the help: what the job does, and every flag with its default."""
  lines = [
    'Trains a network, prunes it, proves and times the result, and prints one',
    'table. Everything has a default: python -m experiments.prune',
    '',
  ]
  for name in Config.__dataclass_fields__ | {'preset': None}:
    flag = _FLAGS[name]
    values = getattr(flag.parser, 'enum_values', None)
    kind = '|'.join(values) if values else flag.flag_type()
    default = '' if flag.default is None else f' (default: {flag.default})'
    lines.append(f'  --{name}=<{kind}>{default}')
    lines += textwrap.wrap(
      flag.help, 80, initial_indent='      ', subsequent_indent='      '
    )
  return '\n'.join(lines)


def parse(argv: Sequence[str]) -> Config | None:
  """Returns the configuration that command-line arguments ask for.

  Args:
    argv: without the name of the program.

  Returns:
    A :class:`Config`; None if the arguments ask for help.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  if any(arg.lstrip('-') in ('help', 'helpfull', 'h') for arg in argv):
    return None
  _FLAGS.unparse_flags()
  for name in _FLAGS:
    _FLAGS[name].unparse()
  try:
    rest = _FLAGS(['prune', *argv])[1:]
  except flags.Error as error:
    line = ' '.join(str(error).split())
    raise BadInputError(f'{line}. See --help.'.replace('..', '.')) from None
  if rest:
    raise BadInputError(
      f'{rest[0]!r} is no flag; write --name=value. See --help.'
    )
  names = [f.name for f in dataclasses.fields(Config)]
  given: dict[str, Any] = {name: _FLAGS[name].value for name in names}
  for name, value in PRESETS[str(_FLAGS['preset'].value)].items():
    if not _FLAGS[name].present:
      given[name] = value
  if given['model'] is None:
    name = given['dataset'].partition(':')[0]  # Behind it, a version.
    given['model'] = USUAL_MODEL.get(name, 'resnet20')
  if given['learning_rate'] is None:
    given['learning_rate'] = USUAL_RATE[given['optimizer']]
  _check(given)
  if given['workdir'] is None:
    text = json.dumps(given, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f'{given["dataset"]}-{given["method"]}-{tag}'.replace(':', '-')
    given['workdir'] = str(pathlib.Path('runs', name))
  return Config(**given)


def _check(given: Mapping[str, Any]) -> None:
  """Raises BadInputError for a number that is out of range."""
  ranges = {
    'sparsity': (lambda x: 0 <= x < 1, 'in [0, 1)'),
    'macs': (lambda x: 0 < x <= 1, 'in (0, 1]'),
    'validation': (lambda x: 0 <= x < 1, 'in [0, 1)'),
    'learning_rate': (lambda x: 0 < x < float('inf'), 'above 0'),
    'weight_decay': (lambda x: 0 <= x < float('inf'), 'at least 0'),
    'cutout': (lambda x: x >= 0, 'at least 0'),
    'side': (lambda x: x >= 0, 'at least 0'),
    'mixup': (lambda x: 0 <= x < float('inf'), 'at least 0'),
    'label_smoothing': (lambda x: 0 <= x < 1, 'in [0, 1)'),
    'ema': (lambda x: 0 <= x < 1, 'in [0, 1)'),
    'distill': (lambda x: 0 <= x <= 1, 'in [0, 1]'),
    'seed': (lambda x: 0 <= x < 2**32, 'in 0..2^32-1'),
    'pairs': (lambda x: x >= 0, 'at least 0'),
  }
  for name in (
    'round_to', 'epochs', 'tune_epochs', 'prune_epochs', 'batch', 'save_every',
    'devices',
  ):  # fmt: skip
    ranges[name] = (lambda x: x >= 1, 'at least 1')
  for name, (fits, needed) in ranges.items():
    if not fits(given[name]):
      raise BadInputError(f'--{name} must be {needed}, got {given[name]}.')
  if given['remat'] and not hasattr(MODELS[given['model']](10), 'remat'):
    raise BadInputError(
      f'--remat: {given["model"]} has no blocks to compute again; leave it out.'
    )
  if given['side'] and not given['stream']:
    raise BadInputError('--side cuts photos as they stream; give --stream too.')
  found = len(jax.devices())
  if given['devices'] > found:
    raise BadInputError(
      f'--devices is {given["devices"]}, JAX sees {found}; on CPU, XLA_FLAGS='
      f'--xla_force_host_platform_device_count={given["devices"]} makes more.'
    )
  if given['batch'] % given['devices']:
    raise BadInputError(
      f'--batch of {given["batch"]} cannot be split over --devices of '
      f'{given["devices"]}.'
    )


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
