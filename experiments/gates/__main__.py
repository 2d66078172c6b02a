"""Gates of four granularities in one objective, against one alone and others.

  python -m experiments.gates
  python -m experiments.gates --task=resnet --data_dir=DIR
  python -m experiments.gates --task=resnet --data_dir=DIR --speed=30
  python -m experiments.gates --preset=smoke

Every arm has to get by with one budget of parameters and the same epochs,
batches and trials:

``all``       gates of units, layers and blocks together
``units``     gates of neurons or filters alone
``layers``    gates of parallel branches, or of layers behind a bypass, alone
``blocks``    gates of residual branches alone
``student``   every width reduced alike, trained from the start
``slimming``  network slimming: L1 on the scales of the norms over 60 % of the
              steps, one cut, fine-tuning for the rest
``dense``     nothing pruned

Weights and gates train together and there is no fine-tuning: what may remain
falls along a cubic to the budget, the penalty pushes while more is open, and
after the last step the gates are folded into the weights and what is closed is
cut out. Two settings are tried for each arm on held-out images and a seed of
its own; the better one within the budget, or else the smaller network, runs on
every seed. Stopped at any moment, the same command goes on: runs that ended are
read, the one that ran continues from its checkpoint. ``--speed`` times a
training step with all gates against one without, in turn.
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments import (
  command,
  evidence,
  flags,
  recipes,
  runbook,
  search,
  settings,
  timing,
  train,
  workdir,
)
from experiments.gates import gated
from experiments.settings import ABOVE_0, Range, at_least, preset, setting
from jaxprune import cost, data, gates
from jaxprune.io import checkpoint
from jaxprune.report import plots

TUNING_SEED = 100
WARM, CUT, FROZEN = 0.1, 0.6, 0.8  # Parts of the steps: see `make_step`.

_FASHION = {
  'dataset': 'fashion_mnist', 'subset': 10_000, 'side': 14, 'validation': 0.2,
  'target': 0.2, 'epochs': 6, 'batch': 100, 'augment': False, 'rate': 0.1,
  'strengths': '4,16',
}  # fmt: skip
_CIFAR = {
  'dataset': 'cifar10', 'subset': 0, 'side': 0, 'validation': 0.1,
  'target': 0.2, 'epochs': 60, 'batch': 128, 'augment': True, 'rate': 0.1,
  'strengths': '4,16',
}  # fmt: skip
TASKS: Mapping[str, Mapping[str, Any]] = {
  'lenet': {
    'dataset': 'mnist', 'subset': 20_000, 'side': 0, 'validation': 0.1,
    'target': 0.1, 'epochs': 10, 'batch': 100, 'augment': False, 'rate': 0.05,
    'strengths': '4,16',
  },
  'inception': _FASHION,
  'resnet': _FASHION,
  'vgg16': _CIFAR,
  'resnet56': _CIFAR,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for; what is None follows from the task."""

  task: str = setting(
    'inception', 'The network, and these flags of it:', choices=TASKS
  )
  dataset: str = setting(
    None, 'The data; see experiments.prune.', smoke='digits'
  )
  subset: int = setting(
    None, 'Training images, equally many of a class; 0: all.', smoke=500
  )
  side: int = setting(
    None, 'Shrink all images to this side first; 0: as they are.', smoke=0
  )
  validation: float = setting(
    None, 'Part of the training split held out for trials.'
  )
  target: float = setting(
    None,
    'Part of the parameters that may remain, in (0, 1).',
    fits=Range(lambda x: 0 < x < 1),
    smoke=0.5,
  )
  epochs: int = setting(
    None, 'Passes over the data.', fits=at_least(1), smoke=1
  )
  batch: int = setting(None, 'Examples of a step.', fits=at_least(1), smoke=50)
  augment: bool = setting(None, 'Whether images are flipped and shifted.')
  rate: float = setting(
    None,
    'Of the weights; arms without gates try twice it, too.',
    fits=ABOVE_0,
  )
  strengths: str = setting(
    None, 'Of the penalty, to be tried by arms with gates.'
  )
  trials: int = setting(
    2,
    'Settings that every arm tries on held-out images, 1 or 2.',
    fits=Range(lambda n: n in (1, 2)),
    smoke=1,
  )
  data_dir: str | None = setting(None, 'A folder of sets that TFDS prepared.')
  arms: tuple[str, ...] = setting(
    (),
    'What to compare; all that fit the network without it.',
    choices=gated.ARMS,
    decides=False,
  )
  seeds: int = setting(
    3, 'Runs of each arm, of seeds seed, seed + 1, ..', smoke=1, decides=False
  )
  seed: int = setting(0, 'The first of them.')
  save_every: int = setting(
    500, 'Steps between two checkpoints.', fits=at_least(1), smoke=5
  )
  speed: int = setting(
    0, 'Pairs of steps to time, and nothing else.', decides=False
  )
  workdir: str = setting(
    None,
    'Where everything is kept; by default under runs/.',
    decides=False,
  )
  preset: str = preset('smoke: every arm, two minutes.')


class Job(NamedTuple):
  """The network, the data, and the dense graph."""

  config: Config
  task: gated.Task
  splits: search.Splits
  change: train.Augment
  graph: Any

  @property
  def steps(self) -> int:
    """Of an epoch."""
    return len(self.splits.examples.labels) // self.config.batch


def prepare(config: Config) -> Job:
  """Returns the job of a configuration.

  Raises:
    BadInputError: if the flags do not fit the data.
    DataError: if the data are missing or damaged.
  """
  splits = search.load(
    config.dataset,
    config.data_dir,
    subset=config.subset,
    side=config.side,
    validation=config.validation,
    seed=TUNING_SEED,
  )
  if config.batch > len(splits.examples.labels):
    raise flags.BadInputError(
      f'--batch={config.batch}: there are {len(splits.examples.labels)} images.'
    )
  net = gated.NETS[config.task]
  task = gated.Task(
    net.make(splits.classes),
    net.bypassed,
    net.rivals,
    splits.examples.images.shape[1:],
    config.target,
    (config.rate, 2 * config.rate)[: config.trials],
    tuple(map(float, config.strengths.split(',')))[: config.trials],
  )
  change = lambda key, images: images
  if config.augment:
    change = flags.AUGMENTATIONS.get(config.dataset.partition(':')[0], change)
  return Job(config, task, splits, change, gated.trace(task, {}))


# --- Training ----------------------------------------------------------------


class State(NamedTuple):
  """What training changes."""

  learned: Any  # {'params': ..., 'gates': ...}.
  stats: Any
  opt_state: Any
  masks: Any  # What a cut left of the params; empty without one.


def make_step(job: Job, arm: gated.Arm) -> Callable[..., State]:
  """Returns the training step: one compile for every seed and setting.

  It maps (state, examples, rows, key, (rate, strength), progress) to a state,
  where progress runs from 0 to 1. What may remain falls from all at ``WARM`` to
  the budget at ``CUT``; from there on gates slow down, until ``FROZEN``.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, examples, rows, key, setting, progress):
    images = job.change(key, job.splits.prepare(examples.images[rows]))
    labels = examples.labels[rows]
    rate, strength = setting
    left = 1 - jnp.clip((progress - WARM) / (CUT - WARM), 0.0, 1.0)
    target = job.task.target + (1 - job.task.target) * left**3
    tx = _chain(
      rate * jnp.minimum(1.0, progress / 0.05) * _cosine(progress),
      GATE_RATE * jnp.clip((FROZEN - progress) / (FROZEN - CUT), 0.0, 1.0),
    )

    def loss_fn(learned):
      params, factors, penalty = arm.view(learned, strength, target)
      variables = {'params': params, **state.stats}
      logits, stats = gated.forward(
        job.task, arm.module, variables, images, factors, True
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses) + penalty, stats

    grads, stats = jax.grad(loss_fn, has_aux=True)(state.learned)
    updates, opt_state = tx.update(grads, state.opt_state, state.learned)
    learned: Any = optax.apply_updates(state.learned, updates)
    if state.masks:
      cut = lambda w, mask: jnp.where(mask, w, 0)
      params = jax.tree.map(cut, learned['params'], state.masks)
      learned = {**learned, 'params': params}
    return State(learned, stats, opt_state, state.masks)

  return step


GATE_RATE = 0.05


def _cosine(progress: Any) -> Any:
  return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _chain(rate: Any, gate_rate: Any) -> optax.GradientTransformation:
  """Weights and gates in one chain; weight decay is on kernels alone."""
  weights = optax.chain(
    optax.add_decayed_weights(5e-4, recipes.kernels),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  )
  return gates.partition(weights, optax.sgd(gate_rate, momentum=0.9))


def infer(job: Job, arm: gated.Arm, state: State, x: jax.Array) -> jax.Array:
  """Returns the logits of the full network with its gates."""
  params, factors, _ = arm.view(state.learned, 0.0, 0.0)
  variables = {'params': params, **state.stats}
  return gated.forward(job.task, arm.module, variables, x, factors, False)


def start(job: Job, arm: gated.Arm, seed: int) -> State:
  """Returns the state at first."""
  init: Any = jax.jit(arm.module.init)
  variables = init(jax.random.key(seed), jnp.zeros((1, *job.task.shape)))
  stats = {k: v for k, v in variables.items() if k != 'params'}
  params = variables['params']
  masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
  learned = train.own({'params': params, 'gates': arm.gates})
  opt_state = _chain(0.0, 0.0).init(learned)
  return State(learned, stats, opt_state, masks if arm.cut else {})


def fit(
  job: Job,
  arm: gated.Arm,
  step: Callable[..., State],
  seed: int,
  setting: tuple[float, float],
  folder: pathlib.Path,
) -> tuple[State, gates.Gates]:
  """Returns the state after the last step, and the gates after each epoch.

  It resumes by itself from the checkpoints in a folder.
  """
  config = job.config
  total, cut_at = config.epochs * job.steps, None
  state = start(job, arm, seed)
  history = jax.tree.map(
    lambda x: np.zeros((config.epochs, *x.shape), np.float32), arm.gates
  )
  if arm.cut is not None:
    cut_at = round(CUT * total)
  with checkpoint.Checkpointer(folder, keep=2) as keeper:
    first = 0
    if keeper.steps():
      like = jax.eval_shape(lambda: (state, history))
      first, (state, history), _ = keeper.restore(like)
      history = jax.tree.map(np.array, history)
    rows = None
    for number in range(first, total):
      epoch, i = divmod(number, job.steps)
      if rows is None or i == 0:
        rows = data.epoch_batches(
          seed, epoch, size=len(job.splits.examples.labels), batch=config.batch
        )
      if number == cut_at and arm.cut is not None:
        masks = arm.cut(state.learned['params'], state.stats)
        state = state._replace(masks=masks)
      now = setting if cut_at is None or number < cut_at else (setting[0], 0.0)
      state = step(
        state, job.splits.examples, rows[i], data.step_key(seed, epoch, i),
        tuple(map(jnp.float32, now)), jnp.float32(number / total),
      )  # fmt: skip
      if i + 1 == job.steps:
        for kept, x in zip(
          jax.tree.leaves(history),
          jax.tree.leaves(state.learned['gates']),
          strict=True,
        ):
          kept[epoch] = x
      if (number + 1) % config.save_every == 0 and number + 1 < total:
        keeper.save(number + 1, (state, history))
  return state, history


# --- Runs --------------------------------------------------------------------


def book_of(folder: pathlib.Path) -> runbook.Book:
  """Returns the run book of a run folder."""
  return runbook.Book(folder / 'runs.jsonl', 'experiments.gates')


def contend(job: Job, name: str, seeds: Sequence[int]) -> None:
  """Runs what the run folder does not hold yet of an arm."""
  folder = pathlib.Path(job.config.workdir)
  book = book_of(folder)
  arm = gated.ARMS[name](job.task, job.graph)
  step = make_step(job, arm)
  whole = functools.partial(infer, job, arm)
  evaluate = train.make_evaluate(whole, job.splits.prepare)

  def run(seed, trial, setting):
    what = {
      **settings.deciding(job.config),
      'arm': name,
      'seed': seed,
      'trial': trial,
      'setting': list(setting),
    }
    if (ended := book.find(what)) is not None:
      return ended
    begun = time.process_time()
    saved = folder / f'{name}-{seed}-{"final" if trial is None else trial}'
    state, history = fit(job, arm, step, seed, setting, saved)
    small = arm.finish(state.learned, state.stats, state.masks)
    split = job.splits.test if trial is None else job.splits.held
    accuracy = 100 * evaluate(state, split)
    details = dict(small.report)
    counts = {'parameters': jp.tree.size(small.variables['params'])}
    if 'macs' in details:
      counts['macs'] = details.pop('macs')
    if trial is None:  # The small network gives the same logits.
      x = job.splits.prepare(job.splits.examples.images[:16])
      wanted = jax.jit(whole)(state, x)
      error = jax.jit(small.fn)(small.variables, x) - wanted
      details['error'] = float(
        jnp.max(jnp.abs(error)) / jnp.max(jnp.abs(wanted))
      )
      if seed == job.config.seed and any(history):
        figure = plots.gates(_pictures(history))
        text = plots.svg(figure, f'gates of {job.config.task}: {name}')
        workdir.write(folder / f'{name}.svg', text)
    row = book.add(
      what,
      seed=seed,
      accuracy=accuracy,
      counts=counts,
      cpu_seconds=time.process_time() - begun,
      details=details,
    )
    shutil.rmtree(saved)
    print(
      f'{name}, seed {seed}: {row["accuracy"]:.2f} % with '
      f'{counts["parameters"]:,} parameters at {setting}',
      flush=True,
    )
    return row

  trials = [run(TUNING_SEED, i, s) for i, s in enumerate(arm.settings)]
  best = choose(trials, job.task.target * cost.parameters(job.graph))
  for seed in seeds:
    run(seed, None, tuple(best['settings']['setting']))


def choose(
  trials: Sequence[Mapping[str, Any]], budget: float
) -> Mapping[str, Any]:
  """Returns the best trial within 1 % of a budget, or else the smallest.

  Args:
    trials: their records.
    budget: of parameters.

  Examples:
    >>> rows = [
    ...   {'accuracy': 95, 'counts': {'parameters': 110}},
    ...   {'accuracy': 96, 'counts': {'parameters': 140}},
    ... ]
    >>> choose(rows, 140)['accuracy'], choose(rows, 100)['accuracy']
    (96, 95)
  """
  size = lambda row: row['counts']['parameters']
  fits = [row for row in trials if size(row) <= 1.01 * budget]
  if fits:
    return max(fits, key=lambda row: row['accuracy'])
  return min(trials, key=lambda row: (size(row), -row['accuracy']))


def speed(job: Job, pairs: int) -> str:
  """Returns the CPU time of a step with all gates, against one without."""
  rows = jnp.arange(job.config.batch, dtype=jnp.int32)

  def stepping(arm):
    step = make_step(job, arm)
    state = start(job, arm, 0)
    rest = (jax.random.key(0), (jnp.float32(0.01), jnp.float32(1.0)))

    def call():
      nonlocal state
      state = step(state, job.splits.examples, rows, *rest, jnp.float32(0.5))
      return state

    return call

  calls = {
    name: stepping(gated.ARMS[name](job.task, job.graph))
    for name in ('dense', 'all')
  }
  ratios = []
  for _ in range(pairs):
    found = timing.milliseconds(calls, pairs=1)
    ratios.append(found['all'][0] / found['dense'][0])
  draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
  low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
  return (
    f'{job.config.task}, batch {job.config.batch}: {np.median(ratios):.3f} '
    f'[{low:.3f}, {high:.3f}] of the dense step, {pairs} pairs'
  )


def _pictures(history: gates.Gates) -> list[dict[str, np.ndarray]]:
  """The factors of each granularity in one row, after each epoch."""
  gate = gates.scale()
  factor = lambda x: np.asarray(gate.value(jnp.asarray(x), gate.open(x)))
  rows = {
    name: np.concatenate(
      [factor(x).reshape(len(x), -1) for x in some.values()], axis=1
    )
    for name, some in {
      'neurons and filters': history.units,
      'layers': history.layers,
      'blocks': history.blocks,
    }.items()
    if some
  }
  epochs = len(next(iter(rows.values())))
  return [{name: x[k] for name, x in rows.items()} for k in range(epochs)]


def summarise(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table of what was run."""
  finals: dict[str, dict[int, Any]] = {}
  for row in runbook.matching(rows, {'trial': None}):
    finals.setdefault(row['settings']['arm'], {})[row['seed']] = row
  lines = []
  for name, found in finals.items():
    both = sorted(found.keys() & finals.get('all', {}).keys())
    against = ''
    if name != 'all' and len(both) > 1:
      ours = [finals['all'][s]['accuracy'] for s in both]
      against = evidence.paired(ours, [found[s]['accuracy'] for s in both])
    sizes = [row['counts']['parameters'] for row in found.values()]
    lines.append(
      [
        name,
        len(found),
        f'{np.mean(sizes):,.0f} ± {np.std(sizes):,.0f}',
        evidence.summary([row['accuracy'] for row in found.values()]),
        against,
      ]
    )
  header = ['arm', 'seeds', 'parameters', 'accuracy, %', 'all minus it']
  return f'{evidence.table(header, lines)}\n\n{runbook.minutes(rows)}'


def parse(argv: Sequence[str]) -> Config:
  """Returns what a command line asks for.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  config = settings.parse(Config, argv, lambda given: TASKS[given['task']])
  if not _are_positive(config.strengths, config.trials):
    raise settings.BadInputError(
      f'--strengths is out of range: {config.strengths}.'
    )
  if config.seeds < 1 or config.speed < 0:
    raise settings.BadInputError(
      f'--seeds must be at least 1 and --speed 0, got {config.seeds} and '
      f'{config.speed}.'
    )
  return settings.in_folder(config, 'gates', config.task)


def _are_positive(text: str, count: int) -> bool:
  """Whether text lists at least count numbers above 0."""
  try:
    found = [float(x) for x in text.split(',')]
  except ValueError:
    return False
  return len(found) >= count and min(found) > 0


def compare(argv: Sequence[str]) -> tuple[pathlib.Path | None, str]:
  """Runs the comparison, or the clock; returns (the run folder, its table)."""
  config = parse(argv)
  job = prepare(config)
  if config.speed:
    return None, speed(job, config.speed)
  folder = workdir.claim(config)
  seeds = range(config.seed, config.seed + config.seeds)
  for name in config.arms or gated.arms_of(job.task, job.graph):
    contend(job, name, seeds)
  return folder, summarise(book_of(folder).read())


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, Config, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
