"""What PDP is compared on: problem, targets and methods of each task."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments import evidence
from experiments.pdp import channel_contenders, contenders, phases
from jaxprune import data, models, tree
from jaxprune.data import augment
from jaxprune.data import text as text_lib
from jaxprune.io import pretrained


class Contest(NamedTuple):
  """What is compared, on what."""

  problem: phases.Problem
  targets: tuple[str, ...]  # Such as '0.98' or '2:4'.
  tune: str  # The target at which settings are chosen.
  seeds: int
  methods: Callable[[str], Mapping[str, phases.Method]]  # Of a target.
  # What else to write down of a run.
  report: Callable[[phases.Outcome], Mapping[str, Any]] = lambda outcome: {}


def _sgd(rate: Any, decay: Any) -> optax.GradientTransformation:
  kernels = lambda params: tree.map_with_path(tree.is_prunable, params)
  return optax.chain(
    optax.add_decayed_weights(5e-4 * decay, kernels),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  )


def _images(
  name: str,
  data_dir: str | None,
  validation: int,
  size: int | None = None,
  halve: bool = False,
  normal: tuple[Any, Any] | None = None,
) -> tuple[phases.Split, phases.Split, phases.Split]:
  """Returns train, validation and test; float32 of mean 0 and deviation 1."""
  train = data.load(name, 'train', data_dir)
  test = data.load(name, 'test', data_dir)
  rows = np.random.default_rng(0).permutation(len(train))
  if size is not None:
    rows = np.random.default_rng(0).permutation(
      evidence.subset(train.labels, size + validation)
    )
  if normal is None:
    mean, deviation = augment.pixel_statistics(train.images)
  else:  # Of values from 0 to 1.
    mean, deviation = (255 * np.asarray(x, np.float32) for x in normal)

  def split(images, labels):
    x = (images.astype(np.float32) - mean) / np.maximum(deviation, 1e-3)
    if halve:
      n, h, w, c = x.shape
      x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return phases.Split(jnp.asarray(x), jnp.asarray(labels))

  held, used = rows[:validation], rows[validation:]
  return (
    split(train.images[used], train.labels[used]),
    split(train.images[held], train.labels[held]),
    split(test.images, test.labels),
  )


def apply_alone(net: Any) -> Callable[..., Any]:
  """Returns the apply of a network without statistics."""

  def apply(params, stats, inputs, train):
    return net.apply({'params': params}, inputs, train=train), stats

  return apply


def _starter(net: Any, inputs: jax.Array) -> Callable[[int], Any]:
  @jax.jit
  def init(key):
    return net.init(key, inputs[:1])['params']

  return lambda seed: (init(jax.random.key(seed)), {}, None)


def _unstructured(rates: Sequence[float], which: tree.Which = None) -> Any:
  methods = {
    'dense': contenders.dense(rates),
    'PDP': contenders.pdp(rates, which),
    'PDP, published temperature': contenders.pdp_published(rates, which),
    'GMP': contenders.gradual(rates, which),
    'one-shot': contenders.one_shot(rates, which),
    'STR': contenders.soft_threshold(rates, which),
    'CS': contenders.sigmoid_gates(rates, which),
  }
  return lambda target: methods


def make_problem(
  name: str, net: Any, splits: Any, **options: Any
) -> phases.Problem:
  """Returns a problem that learns a network from scratch.

  Args:
    name: of the problem.
    net: a module of Linen, without statistics unless ``apply`` is given.
    splits: train, validation and test.
    **options: fields of :class:`experiments.pdp.phases.Problem`.
  """
  train, validation, test = splits
  defaults = {
    'apply': apply_alone(net),
    'start': _starter(net, train.inputs),
    'tx': _sgd,
    'which': None,
    'fused': True,
    'batch': 128,
  }
  return phases.Problem(
    name=name,
    train=train,
    validation=validation,
    test=test,
    **{**defaults, **options},
  )


def mnist(data_dir: str | None, epochs: int | None) -> Contest:
  """LeNet-300-100 on MNIST, from scratch."""
  splits = _images('mnist', data_dir, 5_000)
  net = models.lenet_300_100(num_classes=10)
  problem = make_problem('mnist', net, splits, epochs=epochs or 6)
  methods = _unstructured((0.05, 0.15))
  return Contest(problem, ('0.95', '0.98', '0.99'), '0.98', 5, methods)


def n_by_m(data_dir: str | None, epochs: int | None) -> Contest:
  """LeNet-300-100 on MNIST with n of every m inputs, from scratch."""
  splits = _images('mnist', data_dir, 5_000)
  net = models.lenet_300_100(num_classes=10)
  problem = make_problem('n_by_m', net, splits, epochs=epochs or 3)

  @functools.cache
  def methods(target):
    n, m = map(int, target.split(':'))
    rates = (0.05, 0.15)
    return {
      'PDP': contenders.pdp(rates, None, (n, m)),
      'SR-STE': contenders.sr_ste(rates, None, (n, m)),
      'one-shot (ASP)': contenders.n_by_m_one_shot(rates, None, (n, m)),
    }

  return Contest(problem, ('2:4', '1:4'), '', 5, methods)


def fashion(data_dir: str | None, epochs: int | None) -> Contest:
  """A small CNN on 10,000 images of Fashion-MNIST at 14 x 14, from scratch."""
  splits = _images('fashion_mnist', data_dir, 2_000, 10_000, halve=True)
  net = models.LeNet5(channels=(16, 32), hidden=(128, 64), pad=2)
  problem = make_problem(
    'fashion', net, splits, epochs=epochs or 4, batch=64, fused=False
  )
  rates = (0.02, 0.06)
  found = _unstructured(rates)('')
  found['PDP, shares of ERK'] = contenders.pdp_spread(rates, None)
  targets = ('0.9', '0.95', '0.98')
  return Contest(problem, targets, '0.95', 3, lambda target: found)


def digits(data_dir: str | None, epochs: int | None) -> Contest:
  """LeNet-300-100 on scikit-learn's digits, from scratch."""
  splits = _images('digits', data_dir, 237)
  net = models.lenet_300_100(num_classes=10)
  problem = make_problem('digits', net, splits, epochs=epochs or 40, batch=60)
  methods = _unstructured((0.05, 0.15))
  return Contest(problem, ('0.95', '0.98'), '0.98', 5, methods)


def sources(train: text_lib.TextSet, test: text_lib.TextSet) -> dict[str, Any]:
  """Returns the versions and licences of texts, and two simple accuracies.

  Args:
    train: what is learned from.
    test: what is judged.
  """
  return {
    'versions': train.version,
    'licences': {name: text_lib.LICENCES[name] for name in train.classes},
    'majority': text_lib.majority(train, test),
    'bag of words': text_lib.bag_of_words(train, test),
  }


def text(data_dir: str | None, epochs: int | None) -> Contest:
  """A BERT of 2 layers on sentences of documentation, from a dense teacher.

  The loss is 0.95 of the teacher's logits and 0.05 of the labels, for every
  method; the kernels of the encoder are pruned.
  """
  del data_dir
  train, test = text_lib.docstrings()
  rng = np.random.default_rng(0)
  rows, held = np.split(rng.permutation(len(train))[:10_000], [8_000])
  part = lambda found, index: dataclasses.replace(
    found,
    texts=tuple(found.texts[i] for i in index),
    labels=found.labels[index],
  )
  learned, checked = part(train, rows), part(train, held)
  judged = part(test, rng.permutation(len(test))[:4_000])
  vocabulary = text_lib.word_pieces(learned.texts, 4_000)

  def split(found):
    tokens, _, _ = text_lib.encode(found.texts, vocabulary, 32)
    return phases.Split(jnp.asarray(tokens), jnp.asarray(found.labels))

  net = models.BERT(
    vocab_size=len(vocabulary),
    hidden=64,
    depth=2,
    heads=4,
    intermediate=256,
    positions=32,
    types=1,
    num_classes=len(train.classes),
    dropout=0.0,
  )

  def apply(params, stats, inputs, train):
    del train  # There is no dropout.
    padding = vocabulary['[PAD]']
    return net.apply({'params': params}, inputs, mask=inputs != padding), stats

  def adam(rate, decay):
    kernels = lambda params: tree.map_with_path(tree.is_prunable, params)
    return optax.adamw(rate, weight_decay=0.01 * decay, mask=kernels)

  encoder = lambda path, leaf: (
    path.startswith('layer') and tree.is_prunable(path, leaf)
  )
  splits = split(learned), split(checked), split(judged)
  problem = make_problem(
    'text',
    net,
    splits,
    apply=apply,
    tx=adam,
    which=encoder,
    epochs=6,
    batch=32,
  )
  teach = phases.runner(problem, phases.Method(({'rate': 1e-3},)))

  @functools.cache
  def start(seed):
    lane = teach(seed, {'rate': 1e-3}, 0.0).lane
    return lane.params, {}, phases.logits(problem, lane.params, {})

  problem = problem._replace(start=start, epochs=epochs or 2, distil=0.95)
  rates = (5e-4, 1.5e-3)
  methods = {
    'dense': contenders.dense(rates)._replace(grid=({'rate': 5e-4},)),
    'PDP': contenders.pdp(rates, encoder),
    'movement': contenders.movement(rates, encoder),
    'GMP': contenders.gradual(rates, encoder),
    'one-shot': contenders.one_shot(rates, encoder),
  }
  facts = {'sources': sources(learned, judged)}
  return Contest(
    problem,
    ('0.8', '0.9'),
    '0.9',
    3,
    lambda target: methods,
    lambda outcome: facts,
  )


def apply_with_statistics(net: Any) -> Callable[..., Any]:
  """Returns the apply of a network with statistics."""

  def apply(params, stats, inputs, train):
    seen = {'params': params, **stats}
    if not train:
      return net.apply(seen, inputs, train=False), stats
    return net.apply(seen, inputs, train=True, mutable=list(stats))

  return apply


def _variables(net: Any, inputs: jax.Array) -> Callable[[int], Any]:
  @jax.jit
  def init(key):
    return net.init(key, inputs[:1])

  def start(seed):
    variables = dict(init(jax.random.key(seed)))
    return variables.pop('params'), variables, None

  return start


def channels(data_dir: str | None, epochs: int | None) -> Contest:
  """A ResNet of 7 convolutions on digits, half of the multiply-adds."""
  splits = _images('digits', data_dir, 237)
  net = models.resnet_digits(num_classes=10)
  x = splits[0].inputs[:8]

  problem = make_problem(
    'channels',
    net,
    splits,
    apply=apply_with_statistics(net),
    start=_variables(net, x),
    epochs=epochs or 12,
    batch=60,
    fused=False,
  )
  fn = lambda variables, x: net.apply(variables, x)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x[:1])
  graph = jp.trace(fn, shapes, x[:1])
  rates = (0.05, 0.15)
  methods = {
    'dense': contenders.dense(rates),
    'PDP': channel_contenders.pdp(
      rates, graph, channel_contenders.readers(graph)
    ),
    'PDP, masks on the kernels': channel_contenders.pdp(
      rates, graph, channel_contenders.writers(graph)
    ),
    'L1 filters': channel_contenders.filters(rates, graph, 'l1'),
    'L2 filters': channel_contenders.filters(rates, graph, 'l2'),
  }
  report = channel_contenders.report(graph, x)
  return Contest(problem, ('0.5',), '0.5', 3, lambda target: methods, report)


def _flip_and_shift(key: jax.Array, images: jax.Array) -> jax.Array:
  flip, shift = jax.random.split(key)
  images = augment.random_flip(flip, images)
  return augment.random_crop(shift, images, 4)


def cifar10(
  data_dir: str | None, epochs: int | None, whole: bool = False
) -> Contest:
  """The pretrained ResNet-20 on CIFAR-10.

  The statistics of the norms are those of training; the folder of the weights
  lies beside that of the data. On 10,000 images each method has one setting;
  on the whole set, for a GPU, four, as elsewhere.
  """
  root = pathlib.Path(data_dir or os.environ.get('JAXPRUNE_DATA', '.'))
  arrays = pretrained.read(root.parent / 'pretrained' / 'resnet20_cifar10.npz')
  facts = root.parent / 'pretrained' / 'pretrained.json'
  normal = json.loads(facts.read_text())['resnet20']['normalisation']
  held, size = (5_000, None) if whole else (1_000, 10_000)
  splits = _images(
    'cifar10', data_dir, held, size, normal=(normal['mean'], normal['std'])
  )
  net = models.resnet20()
  empty = jax.eval_shape(net.init, jax.random.key(0), splits[0].inputs[:1])
  found = pretrained.from_torch(arrays, empty, pretrained.cifar_resnet)
  variables = dict(jax.tree.map(jnp.asarray, found))
  params = variables.pop('params')
  problem = make_problem(
    'cifar10',
    net,
    splits,
    apply=apply_with_statistics(net),
    start=lambda seed: (params, variables, None),
    epochs=epochs or (100 if whole else 2),
    fused=False,
    change=_flip_and_shift,
  )
  if whole:
    methods = _unstructured((0.02, 0.06))
    return Contest(problem, ('0.9', '0.95'), '0.9', 3, methods)
  one = lambda method, **setting: method._replace(
    grid=({'rate': 0.02, **setting},)
  )
  few = {
    'dense': one(contenders.dense((0.02, 0.02))),
    'PDP': one(contenders.pdp((0.02,), None), c=0.25, end=0.6),
    'GMP': one(contenders.gradual((0.02,), None), end=0.6),
    'one-shot': one(contenders.one_shot((0.02,), None), cut=0.25),
  }
  return Contest(problem, ('0.9', '0.95'), '0.9', 1, lambda target: few)


def mobilenet(data_dir: str | None, epochs: int | None) -> Contest:
  """MobileNet V1 on CIFAR-10, at the published 86.6 %; for a GPU."""
  splits = _images('cifar10', data_dir, 5_000)
  net = models.mobilenet_v1(num_classes=10, stem='small', dropout=0.0)
  problem = make_problem(
    'mobilenet',
    net,
    splits,
    apply=apply_with_statistics(net),
    start=_variables(net, splits[0].inputs),
    epochs=epochs or 100,
    fused=False,
    change=_flip_and_shift,
  )
  methods = _unstructured((0.05, 0.15))
  return Contest(problem, ('0.866',), '0.866', 3, methods)


TASKS: Mapping[str, Callable[..., Contest]] = {
  'mnist': mnist,
  'n_by_m': n_by_m,
  'fashion': fashion,
  'digits': digits,
  'text': text,
  'channels': channels,
  'cifar10': cifar10,
  'cifar10_whole': functools.partial(cifar10, whole=True),
  'mobilenet': mobilenet,
}
