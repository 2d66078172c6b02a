"""Stage-wise pruning: is the proxy nearer the truth, and the network better?

  python -m experiments.stagewise
  python -m experiments.stagewise --dataset=fashion_mnist --subset=10000
  python -m experiments.stagewise --preset=smoke

Two supernets are trained equally long. In the *stage-wise* one the sub-networks
of every stage learn from the full network's features; in the *single-path* one
a random sub-network of the whole learns from the labels. Then

- proxy: ``--nets`` sub-networks of ``--macs`` of the multiply-adds are trained
  from scratch, and what each supernet said of them is compared with what they
  reach: Kendall's tau, and the gap in accuracy;
- found: each way chooses a network on the budget, trained from scratch as long:
  *stage-wise* by the exact knapsack over its stages, *evolution* by the search
  of MetaPruning on the single-path supernet, *uniform* by one fraction of every
  width.

Ablations: ``--notiny`` (no narrowest sub-network in every step), ``--teacher=
before`` (the full network is trained first and then fixed: v1 of the paper),
``--source=chain``, ``--stages=1``. Stopped at any moment, the same command goes
on: what ended is read, what ran continues from its checkpoint. ``--pairs=30``
times a step of each supernet against one of the full network instead.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags
from scipy import stats as statistics

import jaxprune as jp
from experiments import (
  command,
  evidence,
  flags,
  recipes,
  search,
  timing,
  train,
  workdir,
)
from jaxprune import (
  checkpoint,
  data,
  evolution,
  joint,
  models,
  plans,
  plots,
  stagewise,
  tree,
)
from jaxprune.joint import PruningVector
from jaxprune.structure import cut

METHODS = ('stagewise', 'evolution', 'uniform')
FRACTIONS = tuple(k / 10 for k in range(1, 10))
TOLERANCE = 0.02  # Below the budget; never above.


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

_F = absl_flags.FlagValues()
_text = functools.partial(absl_flags.DEFINE_string, flag_values=_F)
_int = functools.partial(absl_flags.DEFINE_integer, flag_values=_F)
_float = functools.partial(absl_flags.DEFINE_float, flag_values=_F)
_list = functools.partial(absl_flags.DEFINE_list, flag_values=_F)
_bool = functools.partial(absl_flags.DEFINE_bool, flag_values=_F)
_choice = functools.partial(absl_flags.DEFINE_enum, flag_values=_F)

_choice('model', 'resnet20_half', list(MODELS), 'The network.')
_text('dataset', 'digits', 'The data; see experiments.prune.')
_text('data_dir', None, 'A folder of sets that TFDS prepared.')
_int('subset', 0, 'Training images, equally many of a class; 0: all.')
_int('side', 0, 'Shrink all images to this side first; 0: as they are.')
_list('methods', list(METHODS), 'What to compare.')
_float('macs', 0.4, 'Part of the multiply-adds that is kept, in (0, 1).')
_int('steps', 600, 'Of a supernet.')
_int('epochs', 10, 'Passes over the data to train a network from scratch.')
_int('m', 2, 'Random sub-networks of each stage in a step.')
_int('candidates', 256, 'Judged in each stage, and by evolution.')
_int('nets', 12, 'Sub-networks of equal cost for the proxy; 0: none.')
_bool('tiny', True, 'Whether the narrowest learn in every step.')
_choice('teacher', 'now', ['now', 'before'], 'Which full network teaches.')
_choice('source', 'full', ['full', 'chain'], 'What a stage begins from.')
_int('stages', 0, 'Use so many stages at most; 0: all.')
_int('batch', 64, 'Examples of a step.')
_int('judges', 512, 'Held-out images that the proxies are measured on.')
_float('learning_rate', 0.1, 'The highest rate of SGD with momentum.')
_float('weight_decay', 5e-4, 'Pull of the kernels towards zero.')
_float('validation', 0.2, 'Part of the training split held out.')
_int('seeds', 1, 'Runs of everything, of seeds first_seed, first_seed + 1, ..')
_int('first_seed', 0, 'The first of them.')
_int('save_every', 100, 'Steps between two checkpoints.')
_int('pairs', 0, 'Time the steps instead, in so many interleaved pairs.')
_text('workdir', None, 'Where everything is kept; by default under runs/.')
_choice('preset', 'full', ['full', 'smoke'], 'smoke: every phase, a minute.')

PRESETS: Mapping[str, Mapping[str, Any]] = {
  'full': {},
  'smoke': {
    'subset': 800, 'steps': 6, 'epochs': 1, 'candidates': 16, 'nets': 3,
    'm': 1, 'judges': 64, 'save_every': 4,
  },
}  # fmt: skip


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


# --- Supernets ---------------------------------------------------------------


class State(NamedTuple):
  """What the training of a supernet changes."""

  variables: Any
  opt_state: Any


def make_step(task: Task, kind: str, teacher: Any = None) -> Any:
  """Returns (the optax chain, step(state, examples, rows, number) -> state).

  Args:
    task: the task.
    kind: 'stagewise', 'single' (a random path of the whole learns from the
      labels) or 'full' (the full network alone).
    teacher: variables of a full network trained before, for 'stagewise'.
  """
  config = task.config
  tx = recipes.sgd(config.learning_rate, config.weight_decay, config.steps)
  whole = plans.supernet(task.graph)

  def loss(params, rest, images, labels, key):
    variables = {'params': params, **rest}
    if kind == 'stagewise':
      widths = stagewise.sample(key, task.space, config.m, tiny=config.tiny)
      found, new = stagewise.losses(
        task.stages, variables, images, labels, widths,
        task=_cross_entropy, teacher=teacher, source=config.source,
      )  # fmt: skip
      return found.total, new
    if kind == 'full':
      logits, state = task.graph.fn(variables, images)
      return jnp.mean(_cross_entropy(logits, labels)), tree.leaves(state)
    units = {}
    drawn = stagewise.sample(key, task.space, 1, tiny=False)
    for graph, widths in zip(task.stages, drawn, strict=True):
      one = {name: w[0] for name, w in widths.items()}
      units |= stagewise.prefix(graph, one)
    logits, _ = whole(variables, units, {}, images)
    return jnp.mean(_cross_entropy(logits, labels)), {}

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, examples, rows, number):
    key = data.step_key(config.seed, 0, number)
    images = task.change(key, task.splits.prepare(examples.images[rows]))
    rest = dict(state.variables)
    params = rest.pop('params')
    grads, new = jax.grad(loss, has_aux=True)(
      params, rest, images, examples.labels[rows], jax.random.fold_in(key, 1)
    )
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    variables = stagewise.updated({'params': params, **rest}, new)
    return State(variables, opt_state)

  return tx, step


def supernet(task: Task, kind: str, folder: pathlib.Path) -> Any:
  """Returns the variables of a trained supernet; resumes by itself.

  Args:
    task: the task.
    kind: as in :func:`make_step`.
    folder: of its checkpoints.
  """
  config, teacher = task.config, None
  if kind == 'stagewise' and config.teacher == 'before':
    teacher = supernet(task, 'full', folder.with_name('full'))
  tx, step = make_step(task, kind, teacher)
  state = State(task.initial, tx.init(task.initial['params']))
  state, examples = train.own(state), task.splits.examples
  with checkpoint.Checkpointer(folder, keep=2) as keeper:
    first = 0
    if keeper.steps():
      first, state, _ = keeper.restore(jax.eval_shape(lambda: state))
    for number in range(first, config.steps):
      rng = np.random.default_rng([config.seed, number])
      rows = rng.choice(len(examples.labels), config.batch, replace=False)
      state = step(state, examples, rows, number)
      if (number + 1) % config.save_every == 0 or number + 1 == config.steps:
        keeper.save(number + 1, state)
  return state.variables


def speed(task: Task, pairs: int) -> str:
  """Returns a table of what a step costs against one of the full network."""
  rows = np.arange(task.config.batch)
  calls = {}
  for kind in ('full', 'stagewise', 'single'):
    tx, step = make_step(task, kind)
    state = [train.own(State(task.initial, tx.init(task.initial['params'])))]

    def call(step=step, state=state):
      state[0] = step(state[0], task.splits.examples, rows, 0)
      return state[0]

    calls[kind] = call
  found = timing.milliseconds(calls, pairs=pairs)
  lines = [
    [kind, f'{ms:.1f}', f'{1 / ratio:.2f}']
    for kind, (ms, ratio) in found.items()
  ]
  return evidence.table(['step', 'CPU ms', 'against full'], lines)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# --- Judging -----------------------------------------------------------------

CHUNK = 16  # Candidates of one call.


class Judge(NamedTuple):
  """What a supernet says of sub-networks, on held-out images."""

  proxies: Callable[[Any, Any], np.ndarray]  # -> [stages, n].
  accuracies: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]  # And losses.


def make_judge(task: Task) -> Judge:
  """Returns the compiled judgements; both take (variables, widths [n])."""
  size = min(task.config.judges, len(task.splits.held.labels))
  images = task.splits.prepare(task.splits.held.images[:size])
  labels = task.splits.held.labels[:size]
  whole = plans.supernet(task.graph)

  @jax.jit
  def proxies(variables, widths):
    h, found = images, []
    for k, (graph, part) in enumerate(zip(task.stages, widths, strict=True)):
      target, _ = graph.fn(variables, h)
      last = k == len(task.stages) - 1
      found.append(
        stagewise.proxy(graph, variables, h, target, part, last=last)
      )
      h = target
    return jnp.stack(found)

  @jax.jit
  def accuracies(variables, widths):
    def one(widths):
      units = {}
      for graph, part in zip(task.stages, widths, strict=True):
        units |= stagewise.prefix(graph, part)
      logits, _ = whole(variables, units, {}, images)
      loss = jnp.mean(_cross_entropy(logits, labels))
      return jnp.mean(jnp.argmax(logits, -1) == labels), loss

    return jax.vmap(one)(widths)

  def in_chunks(fn, axis):
    def call(variables, widths):
      n = len(jax.tree.leaves(widths)[0])
      found = []
      for begin in range(0, n, CHUNK):
        index = np.minimum(np.arange(begin, begin + CHUNK), n - 1)
        part = jax.tree.map(lambda w, i=index: jnp.asarray(w)[i], widths)
        found.append(jax.tree.map(np.asarray, fn(variables, part)))
      joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis), *found)
      cut_off = lambda x: x[:, :n] if axis else x[:n]
      return jax.tree.map(cut_off, joined)

    return call

  return Judge(in_chunks(proxies, 1), in_chunks(accuracies, 0))


# --- Choosing ----------------------------------------------------------------


def draw(task: Task, rng: np.random.Generator) -> Any:
  """Returns the candidates of each stage: random ones, and every fraction."""
  found = []
  for part in task.space:
    widths = {}
    for name, values in part.items():
      size = int(values[-1])
      every = [max(1, round(f * size)) for f in (*FRACTIONS, 1.0)]
      drawn = rng.choice(values, task.config.candidates)
      widths[name] = np.concatenate([every, drawn])
    found.append(widths)
  return found


def by_knapsack(task: Task, judge: Judge, variables: Any) -> PruningVector:
  """Returns the network of least summed proxies on the budget.

  What the knapsack leaves of the budget is filled unit by unit.
  """
  widths = draw(task, np.random.default_rng([task.config.seed, 1]))
  values = judge.proxies(variables, widths)
  pairs = zip(task.stages, widths, strict=True)
  costs = [stagewise.macs(graph, part) for graph, part in pairs]
  index = stagewise.knapsack(list(values), costs, task.limit)
  chosen = {
    name: int(w[i])
    for part, i in zip(widths, index, strict=True)
    for name, w in part.items()
  }
  high = task.vectors.high
  vector = high._replace(widths={**high.widths, **chosen})
  unit = jax.tree.map(float, joint.to_unit(task.vectors, vector))
  return joint.project(
    task.vectors, task.cost, task.limit, unit, tolerance=TOLERANCE
  )


def by_evolution(task: Task, judge: Judge, variables: Any) -> PruningVector:
  """Returns the network of the search of MetaPruning on a single-path net.

  Ten generations, a tenth of the candidates each.
  """
  each = max(2, task.config.candidates // 10)

  def score(vectors):
    _, losses = judge.accuracies(variables, stack(task, vectors))
    return losses.tolist()

  found = evolution.search(
    task.vectors,
    task.cost,
    task.limit,
    score,
    np.random.default_rng([task.config.seed, 2]),
    population=each,
    generations=10,
    parents=max(2, each // 5),
    mutations=each // 2,
    crossovers=each - each // 2,
    tolerance=TOLERANCE,
  )
  return found[-1][0].vector


def stack(task: Task, vectors: Sequence[PruningVector]) -> Any:
  """Returns networks as the widths [n] of each stage."""
  return [
    {name: np.array([v.widths[name] for v in vectors]) for name in part}
    for part in task.space
  ]


# --- Running -----------------------------------------------------------------


def finish(task: Task, vector: PruningVector) -> dict[str, Any]:
  """Returns the figures of a network trained from scratch."""
  config = task.config
  plan = joint.plan(task.vectors, vector)
  small = jp.shrink(task.graph, plan, task.initial)
  accuracy = search.train_from_scratch(
    task.module.clone(widths=models.widths(small['params'])),
    task.splits,
    seed=config.seed,
    epochs=config.epochs,
    batch=config.batch,
    rate=config.learning_rate,
    decay=config.weight_decay,
    change=task.change,
  )
  return {
    'accuracy': accuracy,
    'macs': jp.cost.macs(task.graph, plan) / jp.cost.macs(task.graph),
    'widths': {
      name: list(pair) for name, pair in plans.widths(task.graph, plan).items()
    },
  }


def proxy_against_truth(
  task: Task, judge: Judge, nets: Mapping[str, Any], folder: pathlib.Path
) -> dict[str, Any]:
  """Returns what both supernets said of the same networks, and the truth."""
  rng = np.random.default_rng([task.config.seed, 3])
  chosen, truth = [], []
  for k in range(task.config.nets):
    vector = evolution.draw(
      task.vectors, task.cost, task.limit, rng, tolerance=TOLERANCE
    )
    chosen.append(vector)
    file = folder / f'net{k}.json'
    if not file.exists():
      workdir.write(file, json.dumps(finish(task, vector), indent=1) + '\n')
    truth.append(json.loads(file.read_text())['accuracy'])
  widths = stack(task, chosen)
  found: dict[str, Any] = {'truth': truth}
  summed = judge.proxies(nets['stagewise'], widths).sum(0)
  found['stagewise_proxy'] = summed.tolist()
  for kind, variables in nets.items():
    accuracies, losses = judge.accuracies(variables, widths)
    found[f'{kind}_accuracy'] = accuracies.tolist()
    found[f'{kind}_loss'] = losses.tolist()
  said = {
    'stage-wise': -np.asarray(found['stagewise_proxy']),
    'single-path': -np.asarray(found['single_loss']),
  }
  found['tau'] = {
    name: float(statistics.kendalltau(values, truth)[0])  # type: ignore
    for name, values in said.items()
  }
  found['gap'] = {
    'stage-wise': _gap(found['stagewise_accuracy'], truth),
    'single-path': _gap(found['single_accuracy'], truth),
  }
  figure = plots.scatter(
    {name: (values.tolist(), truth) for name, values in said.items()},
    across='what the supernet says (minus the loss)',
    up='accuracy from scratch',
  )
  (folder / 'proxy.svg').write_text(plots.svg(figure, 'proxy and truth'))
  return found


def _gap(said: Sequence[float], truth: Sequence[float]) -> float:
  return float(np.mean(np.abs(np.asarray(said) - np.asarray(truth))))


def run(config: Config, methods: Sequence[str]) -> dict[str, Any]:
  """Runs what is left of one seed; returns name -> figures."""
  folder = pathlib.Path(config.workdir, f'seed{config.seed}')
  wanted = [*methods, *(['proxy'] if config.nets else [])]
  files = {name: folder / f'{name}.json' for name in wanted}
  left = [name for name in wanted if not files[name].exists()]
  if left:
    folder.mkdir(parents=True, exist_ok=True)
    task = prepare(config)
    judge = make_judge(task)
    net = functools.cache(lambda kind: supernet(task, kind, folder / kind))
    for name in left:
      if name == 'proxy':
        both = {kind: net(kind) for kind in ('stagewise', 'single')}
        result = proxy_against_truth(task, judge, both, folder)
      else:
        if name == 'stagewise':
          vector = by_knapsack(task, judge, net('stagewise'))
        elif name == 'evolution':
          vector = by_evolution(task, judge, net('single'))
        else:
          vector = joint.uniform(
            task.vectors, task.cost, task.limit, tolerance=TOLERANCE
          )
        result = finish(task, vector)
        print(
          f'seed {config.seed}, {name}: {result["accuracy"]:.2%} with '
          f'{result["macs"]:.1%} of the multiply-adds',
          flush=True,
        )
      workdir.write(files[name], json.dumps(result, indent=1) + '\n')
  return {name: json.loads(files[name].read_text()) for name in wanted}


def tables(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
  """Returns the networks found, and the proxies, over the seeds."""
  column = lambda name: [100 * r[name]['accuracy'] for r in results]
  rows = []
  for name in methods:
    macs = 100 * np.mean([r[name]['macs'] for r in results])
    row = [name, str(evidence.summary(column(name))), f'{macs:.1f}']
    if 'stagewise' in methods:
      same = name == 'stagewise' or len(results) < 2
      row.append(
        '' if same else str(evidence.paired(column('stagewise'), column(name)))
      )
    rows.append(row)
  header = ['method', 'top-1, %', 'MACs, %']
  header += ['stage-wise less it'] if 'stagewise' in methods else []
  text = evidence.table(header, rows)
  if 'proxy' not in results[0]:
    return text
  rows = [
    [
      kind,
      str(evidence.summary([r['proxy']['tau'][kind] for r in results])),
      str(evidence.summary([100 * r['proxy']['gap'][kind] for r in results])),
    ]
    for kind in ('stage-wise', 'single-path')
  ]
  header = ['supernet', "Kendall's tau", 'gap in accuracy, points']
  return f'{text}\n\n{evidence.table(header, rows)}'


def parse(argv: Sequence[str]) -> tuple[list[Config], list[str]]:
  """Returns a configuration for every seed, and the methods.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  given = command.parse(_F, argv, PRESETS)
  given.pop('pairs')
  methods = given.pop('methods')
  unknown = [name for name in methods if name not in METHODS]
  if unknown or not methods:
    raise flags.BadInputError(
      f'--methods must be of {",".join(METHODS)}, got {",".join(methods)}.'
    )
  seeds, first = given.pop('seeds'), given.pop('first_seed')
  holds = {
    'macs': 0 < given['macs'] < 1,
    'm': given['m'] + given['tiny'] >= 1,
    'nets': given['nets'] == 0 or given['nets'] >= 3,
    'candidates': given['candidates'] >= 3,
    'stages': 0 <= given['stages'] <= len(MODELS[given['model']].cuts) + 1,
  }
  for name in ('steps', 'epochs', 'batch', 'judges', 'save_every'):
    holds[name] = given[name] >= 1
  for name, true in holds.items():
    if not true:
      raise flags.BadInputError(f'--{name} is out of range: {given[name]}.')
  if given['workdir'] is None:
    text = json.dumps(given, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f'runs/stagewise-{given["dataset"]}-{tag}'
    given['workdir'] = name.replace(':', '-')
  configs = [Config(**given, seed=seed) for seed in range(first, first + seeds)]
  return configs, methods


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code.

  Args:
    argv: without the name of the program.
  """
  try:
    if any(arg.lstrip('-') in ('help', 'h') for arg in argv):
      print(__doc__)
      print(_F.get_help())
      return 0
    configs, methods = parse(argv)
    if _F['pairs'].value:
      print(speed(prepare(configs[0]), _F['pairs'].value))
      return 0
    folder = pathlib.Path(configs[0].workdir)
    folder.mkdir(parents=True, exist_ok=True)
    results = [run(config, methods) for config in configs]
  except (flags.BadInputError, data.DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  text = tables(results, methods)
  workdir.write(folder / 'results.md', text + '\n')
  print(text)
  print(f'\nThe run folder is {folder}.')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
