"""Which score finds the weights that are not needed?

  python -m experiments.compare --data_dir=$JAXPRUNE_DATA
  python -m experiments.compare --model=mlp_500 --data_dir=$JAXPRUNE_DATA
  python -m experiments.compare --table

Trains a network once per seed, prunes it by each contender to each sparsity,
trains on, and prints one table: mean and standard deviation over the seeds and
the differences to magnitude, paired by seed. The seeds are one program; initial
weights, batches and trained networks are common to all contenders.

By default that is the comparison of Lookahead pruning (Park et al., 2020,
arXiv:2002.04809) on MNIST, at a tenth of the authors' iterations: Adam at
1.2e-3, batches of 60, no weight decay, a new optimizer after pruning, 5,000
steps before it and 5,000 after; round k prunes the trained network to
(1 - p)^k of each layer, with p = 0.5, and half of that in the last. Theirs, not
run, is ``--pretrain=50000 --steps=50000 --rounds=4,5,6,7,8,9,10``.

A contender is a score of ``choices``, with ``@distribution`` for one of its
own: ``--contenders=lap,magnitude@global --schedule=cubic --granularity=4x4
--sparsities=0.9``. What has run is not run again.
"""

import dataclasses
import functools
import json
import math
import operator
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from experiments import command, runbook, settings, train
from experiments.compare import choices, standings, thin
from experiments.settings import at_least, setting
from jaxprune import (
  data,
  distributions,
  masks,
  schedules,
  structure,
  transforms,
  tree,
)
from jaxprune.scores import lookahead


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for."""

  model: str = setting('mlp', 'The network.', choices=choices.MODELS)
  dataset: str = setting('mnist', 'Name of the set.')
  data_dir: str | None = setting(None, 'Where the sets are.')
  train_split: str = setting('train', 'To train on.')
  test_split: str = setting('test', 'To measure on.')
  contenders: tuple[str, ...] = setting(
    ('random', 'magnitude', 'lap', 'lap_forward', 'lap_backward', 'lap_act',
     'obd_lap', 'lamp@global'),
    f'score or score@distribution; scores: {", ".join(choices.SCORES)}.',
    decides=False,
  )  # fmt: skip
  distribution: str = setting(
    'layerwise',
    'How layers share the budget. layerwise: the rates of --rounds.',
    choices=('layerwise', *choices.DISTRIBUTIONS),
  )
  granularity: str = setting(
    'element', 'element, channel, n:m or axb (blocks).'
  )
  schedule: str = setting(
    'one_shot', 'Over the first 60 %.', choices=choices.SCHEDULES
  )
  every: int = setting(
    0, 'Steps between two drawings; 0: a twentieth of the ramp.'
  )
  rounds: tuple[str, ...] = setting(
    ('4', '6', '8', '10'),
    'k: half of the weights k times over.',
    decides=False,
  )
  sparsities: tuple[str, ...] = setting(
    (),
    'Instead of --rounds, for the other distributions.',
    decides=False,
  )
  seeds: int = setting(5, 'Seeds.', fits=at_least(1))
  pretrain: int = setting(5000, 'Steps before pruning.')
  steps: int = setting(5000, 'Steps after it.')
  batch: int = setting(60, 'Examples a step.', fits=at_least(1))
  learning_rate: float = setting(1.2e-3, 'Of Adam.')
  score_batches: int = setting(50, 'Batches that a score may look at.')
  thin: float = setting(
    0.02,
    'Density below which dense layers pruned at once train without their '
    'zeros.',
  )
  workdir: str = setting('runs/compare', 'Run folder.', decides=False)
  table: bool = setting(False, 'Print what has run, no more.', decides=False)


P = 0.5  # What a round prunes of a layer; half of that of the last.


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """The network and its data."""

  config: Config
  module: Any
  graph: Any
  wiring: Mapping[str, lookahead.Wire]
  prepare: Callable[[jax.Array], jax.Array]
  examples: train.Examples
  test: train.Examples
  seeds: jax.Array  # int32, [seeds].

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Path in params -> shape of each kernel, in the order of the network."""
    paths = choices.kernels(self.wiring)
    return {p: self.graph.leaves[f'params/{p}'].shape for p in paths}


class Contender(NamedTuple):
  """One way to prune to one sparsity."""

  name: str
  score: str
  distribution: str
  amount: str  # The round, or the sparsity.


class Recipe(NamedTuple):
  """How much is pruned, where and when; nothing of the score."""

  distribution: distributions.Distribution
  sparsity: Any  # One, or rules over paths; static.
  link: optax.GradientTransformationExtraArgs
  ramp: schedules.Schedule  # Of the sparsest leaf.
  every: int
  draw: Callable[..., Any]  # (params, state, scores) -> params, state.


class Scored(NamedTuple):
  """State of a link that is given its scores from outside."""

  scores: Any
  inner: transforms.SparsifyState


# The seeds of an ensemble draw their masks on the same steps: what says when is
# not mapped, so that a step between two drawings draws nothing.
_NONE: Any = None
SEEDS: Any = transforms.SparsifyState(_NONE, mask_sparsity=None, masks=0)
PLAIN: Any = lambda key, images: images  # Augments nothing.


def prepare(config: Config) -> Task:
  """Reads the data and traces the network."""
  load = lambda split: data.load(config.dataset, split, config.data_dir)
  training, test = load(config.train_split), load(config.test_split)
  module = choices.MODELS[config.model](len(training.classes))
  shape = training.images.shape[1:]
  init = lambda key: module.init(key, jnp.zeros((1, *shape)))
  variables = jax.eval_shape(init, jax.random.key(0))
  on_device = lambda d: train.Examples(*map(jnp.asarray, (d.images, d.labels)))
  graph = choices.trace(module, variables, shape)
  return Task(
    config=config,
    module=module,
    graph=graph,
    wiring=structure.wiring(graph),
    prepare=train.preparation(training.images),
    examples=on_device(training),
    test=on_device(test),
    seeds=jnp.arange(config.seeds),
  )


def rows(task: Task, seed: jax.Array, phase: int, step: jax.Array) -> jax.Array:
  """Returns the examples of a step, the same for every contender."""
  key = jax.random.fold_in(jax.random.key(seed), phase)
  key = jax.random.fold_in(key, step)
  return jax.random.randint(
    key, (task.config.batch,), 0, len(task.examples.labels)
  )


def steps(task: Task, step: Any, phase: int, axes: Any = 0) -> Any:
  """Returns ``advance(state, i)``: a step of every seed, in one program.

  Args:
    task: the network and its data.
    step: (state, examples, rows, key) -> (state, metrics) of one seed.
    phase: 0 before the pruning, 1 after it; draws other batches.
    axes: of the state, where its seeds are.
  """

  def one(state, seed, examples, i):
    taken = rows(task, seed, phase, i)
    return step(state, examples, taken, jax.random.key(0))[0]

  many = jax.vmap(one, (axes, 0, None, None), axes)
  compiled = jax.jit(many, donate_argnums=0)
  return lambda state, i: compiled(state, task.seeds, task.examples, i)


@functools.cache
def pretrain(task: Task) -> train.State:
  """Returns the trained networks, from the run folder if they are there."""
  path = folder(task.config) / f'dense-{task.config.pretrain}.npz'
  shape = task.examples.images.shape[1:]

  def start(seed):
    variables = task.module.init(jax.random.key(seed), jnp.zeros((1, *shape)))
    params = variables.pop('params')
    return train.State(params, variables, ())

  state = jax.vmap(start)(task.seeds)
  treedef = jax.tree.structure(state)
  if path.exists():
    with np.load(path) as found:
      return treedef.unflatten([jnp.asarray(found[n]) for n in found.files])
  tx = optax.adam(task.config.learning_rate)
  state = state._replace(opt_state=jax.vmap(tx.init)(state.params))
  step = train.make_step(task.module.apply, tx, task.prepare, change=PLAIN)
  advance = steps(task, step, 0)
  for i in range(task.config.pretrain):
    state = advance(state, i)
  state = state._replace(opt_state=())
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, *map(np.asarray, jax.tree.leaves(state)))
  return state


@functools.cache
def recipe(task: Task, name: str, amount: str) -> Recipe:
  """Returns the recipe of a distribution and an amount, compiled once."""
  if name == 'layerwise':
    k, last = float(amount), list(task.shapes)[-1]
    sparsity = {last: 1 - (1 - P / 2) ** k, '.*': 1 - (1 - P) ** k}
    distribution = distributions.uniform
  else:
    sparsity = total(task, amount)
    distribution = choices.DISTRIBUTIONS[name](task.graph)
  end = max(1, round(0.6 * task.config.steps))
  make = lambda s: choices.SCHEDULES[task.config.schedule](s, end)
  if isinstance(sparsity, dict):  # In its own order, unlike jax.tree.map.
    ramps = {rule: make(s) for rule, s in sparsity.items()}
  else:
    ramps = make(sparsity)
  ramp = make(max(jax.tree.leaves(sparsity)))
  once = task.config.schedule == 'one_shot'
  every = task.config.every or (1 if once else max(1, end // 20))
  link = transforms.sparsify(
    None,
    ramps,
    distribution=distribution,
    granularity=choices.granularity(task.config.granularity),
    every=every,
    regrow=ramp.falls,
  )

  def draw(params, state, scores):
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = link.update(still, state, params, scores=scores)
    return optax.apply_updates(params, updates), state

  many = jax.jit(jax.vmap(draw, (0, SEEDS, 0), (0, SEEDS)))
  return Recipe(distribution, sparsity, link, ramp, every, many)


def total(task: Task, amount: str) -> float:
  """Returns the sparsity of an amount over all kernels."""
  grain = choices.granularity(task.config.granularity)
  if isinstance(grain, masks.NByM):
    return 1 - grain.n / grain.m
  if task.config.sparsities:
    return float(amount)
  sizes = [math.prod(shape) for shape in task.shapes.values()]
  left = [(1 - P) ** float(amount)] * len(sizes)
  left[-1] = (1 - P / 2) ** float(amount)
  return 1 - sum(map(operator.mul, sizes, left)) / sum(sizes)


def shares(task: Task, recipe: Recipe, step: int) -> dict[str, float] | None:
  """Returns the sparsity of each leaf at a step, or None if scores decide."""
  if isinstance(recipe.distribution, distributions.Pooled):
    return None
  shapes, now = task.shapes, float(recipe.ramp(step))
  highest = max(jax.tree.leaves(recipe.sparsity))
  part = now / highest if highest else 0.0
  if isinstance(recipe.sparsity, dict):
    rates = tree.match(recipe.sparsity, shapes, 0.0)
    return {path: part * rate for path, rate in rates.items()}
  kept = recipe.distribution(shapes, part * recipe.sparsity)
  return {p: 1 - kept[p] / math.prod(shape) for p, shape in shapes.items()}


def score_all(
  task: Task, name: str, state: train.State, rates: Any = None
) -> Any:
  """Returns the scores of every seed, on the same batches."""
  key = lambda seed: jax.random.fold_in(jax.random.key(seed), 2)
  keys = jax.vmap(key)(task.seeds)

  def score(own, key, batches=()):
    params, stats = own
    given = choices.Given(
      task.module, params, stats, task.wiring, batches, key, rates
    )
    return choices.SCORES[name](given)

  if name in choices.OF_WEIGHTS:
    return jax.jit(jax.vmap(score))((state.params, state.stats), keys)
  rng = np.random.default_rng(0)
  size = min(task.config.batch, len(task.examples.labels))
  batches = []
  for _ in range(task.config.score_batches):
    taken = rng.choice(len(task.examples.labels), size, replace=False)
    images = task.prepare(task.examples.images[taken])
    batches.append((images, task.examples.labels[taken]))
  of = lambda i: jax.tree.map(lambda x: x[i], (state.params, state.stats))
  found = [score(of(i), keys[i], batches) for i in range(len(task.seeds))]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *found)


@functools.cache
def score_dense(task: Task, name: str) -> Any:
  """Returns the scores of the networks before any pruning."""
  return score_all(task, name, pretrain(task))


def finetune(
  task: Task, contender: Contender, dense: train.State
) -> tuple[train.State, Any, str]:
  """Prunes and trains on; returns the networks, their masks and the form."""
  how = recipe(task, contender.distribution, contender.amount)
  link = how.link

  def look(state, step):
    if contender.score in choices.SEQUENTIAL:
      rates = shares(task, how, step)
      return score_all(task, contender.score, state, rates)
    if step == 0:
      return score_dense(task, contender.score)
    return score_all(task, contender.score, state)

  # The first drawing comes before the first gradient.
  inner = jax.vmap(link.init, out_axes=SEEDS)(dense.params)
  found = look(dense, 0)
  params, inner = how.draw(dense.params, inner, found)
  state = train.State(params, dense.stats, ())
  if task.config.schedule == 'one_shot':
    few = 1 - masks.sparsity(inner.masks) < task.config.thin
    if few and hasattr(task.module, 'hidden') and not state.stats:
      return finetune_thin(task, state, inner.masks), inner.masks, 'thin'
    return finetune_masked(task, state, inner.masks), inner.masks, 'dense'

  def update_fn(updates, state, params=None):
    updates, inner = link.update(
      updates, state.inner, params, scores=state.scores
    )
    return updates, state._replace(inner=inner)

  adam = optax.adam(task.config.learning_rate)
  given = optax.GradientTransformation(lambda _: None, update_fn)  # type: ignore
  step = train.make_step(
    task.module.apply, optax.chain(adam, given), task.prepare, change=PLAIN
  )
  opt_state = (jax.vmap(adam.init)(params), Scored(found, inner))
  state = train.own(state._replace(opt_state=opt_state))
  places: Any = train.State(0, 0, (0, Scored(0, SEEDS)))
  advance = steps(task, step, 1, places)
  last, target = how.ramp(0), how.ramp(task.config.steps)
  for i in range(1, task.config.steps + 1):
    now = how.ramp(i)
    if now != last and (i % how.every == 0 or now == target):
      inner = state.opt_state[1].inner
      scored = Scored(look(state, i), inner)
      state = state._replace(opt_state=(state.opt_state[0], scored))
    last = now
    state = advance(state, i)
  return state, state.opt_state[1].inner.masks, 'dense'


@functools.cache
def masked_steps(task: Task) -> Callable[..., Any]:
  """Returns a step of Adam that holds masks."""
  tx = optax.chain(
    optax.adam(task.config.learning_rate), transforms.keep_sparse()
  )
  step = train.make_step(task.module.apply, tx, task.prepare, change=PLAIN)
  return steps(task, step, 1)


def finetune_masked(task: Task, state: train.State, drawn: Any) -> train.State:
  """Trains what is left, with zeros in between."""
  adam = jax.vmap(optax.adam(task.config.learning_rate).init)(state.params)
  hold = lambda masks, w: transforms.keep_sparse(masks).init(w)
  held = (adam, jax.vmap(hold)(drawn, state.params))
  state = train.own(state._replace(opt_state=held))
  for i in range(task.config.steps):
    state = masked_steps(task)(state, i)
  return state._replace(opt_state=())


@functools.cache
def thin_steps(task: Task) -> Callable[..., Any]:
  """Returns a step of Adam on the weights that are left."""
  tx = optax.adam(task.config.learning_rate)

  def step(own, examples, taken, key):
    del key
    values, opt_state, places = own
    images = task.prepare(examples.images[taken])

    def loss(values):
      logits = thin.apply(values, places, images)
      losses = train.cross_entropy(logits, examples.labels[taken], images)
      return jnp.mean(losses)

    updates, opt_state = tx.update(jax.grad(loss)(values), opt_state, values)
    return (optax.apply_updates(values, updates), opt_state, places), None

  return steps(task, step, 1)


def finetune_thin(task: Task, state: train.State, drawn: Any) -> train.State:
  """Trains what is left, without the zeros."""
  layers = [path.rsplit('/', 1)[0] for path in task.shapes]
  values, places = thin.pack(state.params, drawn, layers)
  adam = jax.vmap(optax.adam(task.config.learning_rate).init)(values)
  own = train.own((values, adam, places))
  for i in range(task.config.steps):
    own = thin_steps(task)(own, i)
  params = thin.unpack(own[0], own[2], layers, state.params)
  return state._replace(params=params)


@functools.cache
def evaluation(task: Task) -> Callable[..., float]:
  """Returns (variables, examples) -> accuracy."""
  fn = lambda variables, images: task.module.apply(variables, images)
  return train.make_evaluate(fn, task.prepare)


def accuracy(task: Task, state: train.State) -> list[float]:
  """Returns the test accuracy of every seed, in per cent."""
  of = lambda i: jax.tree.map(lambda x: x[i], train.variables(state))
  seeds = range(len(task.seeds))
  return [100 * evaluation(task)(of(i), task.test) for i in seeds]


# What runs, and what has run.


def contenders(config: Config) -> Iterator[Contender]:
  """Yields what is asked for: every contender at every sparsity."""
  for amount in config.sparsities or config.rounds:
    for name in config.contenders:
      score, _, own = name.partition('@')
      distribution = own or config.distribution
      choices.check(score, distribution)
      if distribution == 'layerwise' and config.sparsities:
        raise ValueError('--sparsities need another --distribution.')
      yield Contender(name, score, distribution, amount)


def folder(config: Config) -> pathlib.Path:
  """Returns where the runs of this network on these data are."""
  split = f'{config.train_split}-{config.seeds}-{config.batch}'
  split = f'{split}-{config.learning_rate:g}'
  safe = ''.join(c if c.isalnum() or c in '.-' else '_' for c in split)
  return pathlib.Path(config.workdir, config.model, config.dataset, safe)


def compare(argv: Sequence[str]) -> tuple[None, str]:
  """Runs what has not run; returns (None, the table)."""
  config = settings.parse(Config, argv)
  try:
    return None, standings.table(list(run(config)))
  except ValueError as error:  # Names that do not go together, too.
    raise settings.BadInputError(str(error)) from error


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, Config, argv, __doc__)


def run(config: Config) -> Iterator[dict[str, Any]]:
  """Yields what has run, and then runs the rest of what is asked for."""
  book = runbook.Book(folder(config) / 'runs.jsonl', 'experiments.compare')
  yield from book.read()
  if config.table:
    return
  asked = list(contenders(config))
  common = settings.deciding(config)
  del common['data_dir']  # The same data, wherever they lie.
  task = prepare(config)
  choices.check_norms({contender.score for contender in asked}, task.wiring)
  dense = pretrain(task)
  for contender in (None, *asked):
    name, amount = 'dense', None
    if contender is not None:
      name, amount = contender.name, contender.amount
    what = {'contender': name, 'amount': amount, **common}
    if book.find(what) is not None:
      continue
    begun = time.process_time()
    state, kept, form = dense, {}, 'dense'
    if contender is not None:
      state, drawn, form = finetune(task, contender, dense)
      transforms.check_sparse(state.params, drawn)
      one = jax.tree.map(lambda x: x[0], drawn)
      kept = {p: k for p, (k, _) in masks.count(one).items()}
    row = book.add(
      what,
      seed=np.asarray(task.seeds).tolist(),
      accuracy=accuracy(task, state),
      counts={
        'weights': sum(map(math.prod, task.shapes.values())),
        'kept': kept,
      },
      cpu_seconds=time.process_time() - begun,
      details={'form': form},
    )
    print(json.dumps(row), flush=True)
    yield row


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  sys.exit(main(sys.argv[1:]))
