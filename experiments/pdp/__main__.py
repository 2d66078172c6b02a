"""PDP against its baselines: the same loop, epochs, batches and trials for all.

  python -m experiments.pdp --task=mnist --data_dir=DIR
  python -m experiments.pdp --task=mnist --table

One run in four settings tunes each method on a validation split, at one
sparsity and a seed of its own; the best setting then runs on every seed and at
every sparsity, and its accuracy of the last epoch, under hard masks, is that
of the test set. Runs are appended to a file as they end: the same command goes
on where it was stopped, and ``--table`` prints what is there.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import jaxprune as jp
from experiments import command, evidence
from experiments.flags import BadInputError
from experiments.pdp import channel_contenders, contenders, phases
from jaxprune import augment, data, models, tree, weights
from jaxprune import text as text_lib

_F = flags.FlagValues()
_TASK = flags.DEFINE_string('task', 'mnist', 'What to learn.', flag_values=_F)
_METHODS = flags.DEFINE_list(
  'methods', [], 'Only these; all without it.', flag_values=_F
)
_TARGETS = flags.DEFINE_list(
  'targets', [], 'Only these sparsities.', flag_values=_F
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, 'Runs of each; its own number.', flag_values=_F
)
_EPOCHS = flags.DEFINE_integer(
  'epochs', None, 'Epochs; its own number.', flag_values=_F
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'See experiments.prune.', flag_values=_F
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/pdp', 'Where runs are kept.', flag_values=_F
)
_TABLE = flags.DEFINE_bool(
  'table', False, 'Print the results; run nothing.', flag_values=_F
)

TUNING_SEED = 100


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
  methods = _unstructured((0.02, 0.06))
  return Contest(problem, ('0.9', '0.95', '0.98'), '0.95', 3, methods)


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


def channels(data_dir: str | None, epochs: int | None) -> Contest:
  """A ResNet of 7 convolutions on digits, half of the multiply-adds."""
  splits = _images('digits', data_dir, 237)
  net = models.resnet_digits(num_classes=10)
  x = splits[0].inputs[:8]

  @jax.jit
  def init(key):
    return net.init(key, x)

  def start(seed):
    variables = dict(init(jax.random.key(seed)))
    return variables.pop('params'), variables, None

  problem = make_problem(
    'channels',
    net,
    splits,
    apply=apply_with_statistics(net),
    start=start,
    epochs=epochs or 12,
    batch=60,
    fused=False,
  )
  fn = lambda variables, x: net.apply(variables, x)
  graph = jp.trace(fn, init(jax.random.key(0)), x[:1])
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


def cifar10(data_dir: str | None, epochs: int | None) -> Contest:
  """The pretrained ResNet-20 on 10,000 images of CIFAR-10, one setting each.

  The statistics of the norms are those of training; the folder of the weights
  lies beside that of the data.
  """
  root = pathlib.Path(data_dir or os.environ.get('JAXPRUNE_DATA', '.'))
  arrays = weights.read(root.parent / 'pretrained' / 'resnet20_cifar10.npz')
  facts = root.parent / 'pretrained' / 'pretrained.json'
  normal = json.loads(facts.read_text())['resnet20']['normalisation']
  splits = _images(
    'cifar10', data_dir, 1_000, 10_000, normal=(normal['mean'], normal['std'])
  )
  net = models.resnet20()
  empty = jax.eval_shape(net.init, jax.random.key(0), splits[0].inputs[:1])
  found = weights.from_torch(arrays, empty, weights.cifar_resnet)
  variables = dict(jax.tree.map(jnp.asarray, found))
  params = variables.pop('params')

  def change(key, images):
    flip, shift = jax.random.split(key)
    images = augment.random_flip(flip, images)
    return augment.random_crop(shift, images, 4)

  problem = make_problem(
    'cifar10',
    net,
    splits,
    apply=apply_with_statistics(net),
    start=lambda seed: (params, variables, None),
    epochs=epochs or 2,
    fused=False,
    change=change,
  )
  one = lambda method, **setting: method._replace(
    grid=({'rate': 0.02, **setting},)
  )
  methods = {
    'dense': one(contenders.dense((0.02, 0.02))),
    'PDP': one(contenders.pdp((0.02,), None), c=0.25, end=0.6),
    'GMP': one(contenders.gradual((0.02,), None), end=0.6),
    'one-shot': one(contenders.one_shot((0.02,), None), cut=0.25),
  }
  return Contest(problem, ('0.9', '0.95'), '0.9', 1, lambda target: methods)


TASKS: Mapping[str, Callable[..., Contest]] = {
  'mnist': mnist,
  'n_by_m': n_by_m,
  'fashion': fashion,
  'digits': digits,
  'text': text,
  'channels': channels,
  'cifar10': cifar10,
}


def sparsity_of(target: str) -> float:
  """Returns the fraction of zeros that a target asks for.

  Examples:
    >>> sparsity_of('0.9'), sparsity_of('1:4')
    (0.9, 0.75)
  """
  if ':' in target:
    n, m = map(int, target.split(':'))
    return 1 - n / m
  return float(target)


class Book:
  """The runs of a file, by what they are."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    lines = path.read_text().splitlines() if path.exists() else []
    self.rows = [json.loads(line) for line in lines]

  def find(self, **what: Any) -> list[dict[str, Any]]:
    """Returns the runs with these values."""
    agrees = lambda row: all(row[k] == v for k, v in what.items())
    return [row for row in self.rows if agrees(row)]

  def add(self, **row: Any) -> None:
    """Appends a run."""
    self.rows.append(row)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')


def compete(contest: Contest, book: Book, names: Sequence[str]) -> None:
  """Runs what the book does not hold yet."""
  problem = contest.problem
  made = functools.lru_cache(
    lambda target, name: phases.runner(problem, contest.methods(target)[name])
  )

  def run(name, target, seed, trial, hyper, split):
    what = {'method': name, 'target': target, 'seed': seed, 'trial': trial}
    found = book.find(**what)
    if not found:
      target_of = target if ':' in target else contest.tune
      out = made(target_of, name)(seed, hyper, sparsity_of(target), split)
      figures = {
        'accuracy': out.accuracy,
        'zeros': out.zeros,
        'seconds': out.seconds,
      }
      figures |= contest.report(out)
      book.add(**what, split=split, hyper=dict(hyper), **figures)
      print(json.dumps(book.rows[-1]), flush=True)
      found = book.rows[-1:]
    return found[0]

  for target in contest.targets:
    for name, method in contest.methods(target).items():
      if names and name not in names:
        continue
      if method.harden is None and target != contest.targets[0]:
        continue  # A dense network has no target.
      tune = target if ':' in target else contest.tune
      best = method.grid[0]
      if len(method.grid) > 1:
        trials = [
          run(name, tune, TUNING_SEED, i, hyper, 'validation')
          for i, hyper in enumerate(method.grid)
        ]
        best = max(trials, key=lambda row: row['accuracy'])['hyper']
      for seed in range(contest.seeds):
        run(name, target, seed, None, best, 'test')


def summarise(book: Book) -> str:
  """Returns the tables of a book, one for each target, and its sources."""
  finals = book.find(trial=None)
  parts = []
  for target in dict.fromkeys(row['target'] for row in finals):
    by = {
      name: {
        row['seed']: row['accuracy']
        for row in finals
        if row['target'] == target and row['method'] == name
      }
      for name in dict.fromkeys(row['method'] for row in finals)
    }
    rows = []
    for name, found in by.items():
      if not found:
        continue
      both = sorted(by.get('PDP', {}).keys() & found.keys())
      against = (
        ''
        if name == 'PDP' or len(both) < 2
        else evidence.paired(
          [by['PDP'][s] for s in both], [found[s] for s in both]
        )
      )
      chosen = book.find(method=name, target=target, trial=None)[0]['hyper']
      setting = ', '.join(f'{k} {v:g}' for k, v in chosen.items())
      accuracy = evidence.summary(list(found.values()))
      rows.append([name, setting, len(found), accuracy, against])
    header = ['method', 'setting', 'seeds', 'accuracy, %', 'PDP minus it']
    parts.append(f'{target}\n\n{evidence.table(header, rows)}')
  minutes = sum(row['seconds'] for row in book.rows) / 60
  lines = dict.fromkeys(
    _line(row['sources']) for row in book.rows if 'sources' in row
  )
  return '\n\n'.join([*parts, *lines, f'{minutes:.1f} CPU-minutes'])


def _line(found: Mapping[str, Any]) -> str:
  """Returns what :func:`sources` found, in words."""
  licences = ', '.join(f'{k} {v}' for k, v in found['licences'].items())
  majority, words = (100 * found[k] for k in ('majority', 'bag of words'))
  return (
    f'Sentences of {found["versions"]}; licences: {licences}.\n'
    f'Without a network, %: majority {majority:.1f}, bag of words {words:.1f}.'
  )


def narrowed(contest: Contest) -> Contest:
  """Returns a contest with the targets and the seeds of the flags.

  Args:
    contest: with its own.

  Raises:
    BadInputError: if it has no such targets or methods.
  """
  first = contest.targets[0]
  for target in _TARGETS.value:
    if ':' in first:
      found = re.fullmatch(r'(\d+):(\d+)', target)
      fits = found and 0 < int(found[1]) < int(found[2])
    else:
      fits = re.fullmatch(r'0\.\d*[1-9]\d*', target)
    if not fits:
      raise BadInputError(
        f'--targets must be like {",".join(contest.targets)}, got {target!r}.'
      )
  known = contest.methods(first)
  unknown = [name for name in _METHODS.value if name not in known]
  if unknown:
    raise BadInputError(
      f'--methods must be of {"; ".join(known)}, got {"; ".join(unknown)}.'
    )
  seeds = contest.seeds if _SEEDS.value is None else _SEEDS.value
  targets = tuple(_TARGETS.value) or contest.targets
  return contest._replace(seeds=seeds, targets=targets)


def main() -> None:
  """Runs one contest, or prints it."""
  if _TASK.value not in TASKS:
    raise BadInputError(
      f'No task is called {_TASK.value!r}; there are {", ".join(TASKS)}.'
    )
  for flag in (_SEEDS, _EPOCHS):
    if flag.value is not None and flag.value < 1:
      raise BadInputError(
        f'--{flag.name} must be at least 1, got {flag.value}.'
      )
  # Runs of another length are not those that are there.
  length = '' if _EPOCHS.value is None else f'-{_EPOCHS.value}-epochs'
  book = Book(pathlib.Path(_WORKDIR.value, f'{_TASK.value}{length}.jsonl'))
  if not _TABLE.value:
    contest = TASKS[_TASK.value](_DATA_DIR.value, _EPOCHS.value)
    compete(narrowed(contest), book, _METHODS.value)
  print(summarise(book))


if __name__ == '__main__':
  command.run(main, _F, __doc__)
