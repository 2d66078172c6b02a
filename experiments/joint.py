"""JointPruning: channels, depth and resolution searched as one vector.

  python -m experiments.joint
  python -m experiments.joint --macs=0.15 --methods=joint,uniform --seeds=1
  python -m experiments.joint --dataset=fashion_mnist --subset=10000 --side=14
  python -m experiments.joint --model=mobilenet_v1 --dataset=cifar10 --macs=0.25
  python -m experiments.joint --preset=smoke

A supernet warms up over random vectors. Then each method looks for a network
that keeps ``--macs`` of its multiply-adds:

- joint, channel: weight steps (a vector drawn around the mean, a training
  batch) and vector steps (Adam along the estimated gradient of the held-out
  loss) take turns; channel with depth and resolution whole;
- depth, resolution: of all settings of that dimension, widths uniformly
  narrowed to the budget, the one of least held-out loss on a supernet that was
  trained as long over random vectors;
- random, evolution: a search among vectors on the budget on that supernet, over
  as many held-out images as the vector steps saw;
- uniform: one fraction of every width.

Every network found is trained from scratch equally long (or ``--start=shared``
from the weights of its supernet). Stopped at any moment, the same command goes
on: phases that ended are read, the one that ran continues from its checkpoint.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags

import jaxprune as jp
from experiments import (
  command,
  evidence,
  flags,
  recipes,
  search,
  train,
  workdir,
)
from jaxprune import (
  checkpoint,
  data,
  estimator,
  evolution,
  joint,
  models,
  plans,
  plots,
  recovery,
  report,
)
from jaxprune.structure import canvas

METHODS = (
  'joint', 'uniform', 'channel', 'depth', 'resolution', 'random', 'evolution'
)  # fmt: skip
ON_RANDOM = ('depth', 'resolution', 'random', 'evolution')  # Supernet.

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


_F = absl_flags.FlagValues()
_text = functools.partial(absl_flags.DEFINE_string, flag_values=_F)
_int = functools.partial(absl_flags.DEFINE_integer, flag_values=_F)
_float = functools.partial(absl_flags.DEFINE_float, flag_values=_F)
_list = functools.partial(absl_flags.DEFINE_list, flag_values=_F)
_choice = functools.partial(absl_flags.DEFINE_enum, flag_values=_F)

_choice('model', 'resnet20_half', list(MODELS), 'The network.')
_text('dataset', 'digits', 'The data; see experiments.prune.')
_text('data_dir', None, 'A folder of sets that TFDS prepared.')
_int('subset', 0, 'Training images, equally many of a class; 0: all.')
_int('side', 0, 'Shrink all images to this side first; 0: as they are.')
_list('sides', [], 'Sides allowed; without it 4 from half of the largest on.')
_list('methods', list(METHODS), 'What to compare.')
_float('macs', 0.25, 'Part of the multiply-adds that is kept, in (0, 1).')
_int('steps', 600, 'Weight steps of a supernet.')
_float('warmup', 0.3, 'Part of them over random vectors.')
_int('every', 2, 'Weight steps for one vector step.')
_int('n', 8, 'Vectors of one vector step.')
_float('sigma', 0.1, 'Perturbation of the vector, falls to 0.3 of it.')
_float('rate', 0.02, 'Learning rate of the vector (Adam).')
_float('rho', 1.0, 'Weight of the penalty log(MACs / target) above 0.')
_choice(
  'form',
  'pairs',
  ['pairs', 'plain', 'spsa'],
  'Of the estimate: antithetic normal, normal, or signs.',
)
_int('epochs', 12, 'Passes over the data to train the network found.')
_choice('start', 'scratch', ['scratch', 'shared'], 'Of that training.')
_int('batch', 64, 'Examples of a weight step; twice as many of a vector step.')
_float('learning_rate', 0.1, 'The highest rate of SGD with momentum.')
_float('weight_decay', 5e-4, 'Pull of the kernels towards zero.')
_float('validation', 0.2, 'Part of the training split held out for vectors.')
_int('seeds', 1, 'Runs of everything, of seeds first_seed, first_seed + 1, ..')
_int('first_seed', 0, 'The first of them.')
_int('save_every', 100, 'Steps between two checkpoints.')
_choice('canvas', 'no', ['no', 'yes'], 'One compile for all sides, or each.')
_text('workdir', None, 'Where everything is kept; by default under runs/.')
_choice('preset', 'full', ['full', 'smoke'], 'smoke: every phase, two minutes.')

PRESETS: Mapping[str, Mapping[str, Any]] = {
  'full': {},
  'smoke': {
    'subset': 800, 'steps': 12, 'epochs': 1, 'sides': ['6', '8'], 'n': 2,
    'methods': ['joint', 'uniform', 'depth', 'random'], 'save_every': 5,
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
  sides: tuple[int, ...]
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
  space: joint.Space  # Of the training form.
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
  try:
    space = joint.space(jp.trace(step, initial, spec), spec, sides=sides)
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
    space, cost, limit,
  )  # fmt: skip


# --- The supernet ------------------------------------------------------------


class Search(NamedTuple):
  """What a search changes; a pytree, and what a checkpoint holds."""

  params: Any
  opt_state: Any
  unit: joint.PruningVector
  unit_state: Any
  estimate: estimator.EstimatorState


class Steps(NamedTuple):
  """The compiled parts of a search, common to all methods and seeds."""

  weights: Callable[..., Any]
  losses: Callable[..., np.ndarray]  # (params, vectors, examples, rows).
  tx: optax.GradientTransformation


def make_steps(task: Task) -> Steps:
  """Returns the weight step and the held-out losses of vectors.

  Without ``canvas`` both are compiled once for every side, with it once.
  """
  config, space = task.config, task.space
  on_canvas = config.canvas == 'yes'
  net = joint.supernet(space, on_canvas=on_canvas)
  tx = recipes.sgd(config.learning_rate, config.weight_decay, config.steps)
  _, stats = _parted(task.initial)

  def loss(params, vector, images, labels, side):
    if side is not None:
      images = canvas.resize(images, side)
    logits, _ = net({'params': params, **stats}, vector, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  @functools.partial(jax.jit, static_argnames='side', donate_argnums=(0, 1))
  def weights(params, opt_state, vector, examples, rows, key, side):
    images = task.change(key, task.prepare(examples.images[rows]))
    labels = examples.labels[rows]
    value, grads = jax.value_and_grad(loss)(
      params, vector, images, labels, side
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  @functools.partial(jax.jit, static_argnames='side')
  def one(params, vector, examples, rows, side):
    images = task.prepare(examples.images[rows])
    return loss(params, vector, images, examples.labels[rows], side)

  @jax.jit
  def many(params, vectors, examples, rows):
    of = lambda v: loss(
      params, v, task.prepare(examples.images[rows]), examples.labels[rows],
      None,
    )  # fmt: skip
    return estimator.chunked(jax.vmap(of), 2)(vectors)  # See the benchmark.

  def losses(params, vectors, examples, rows):
    if on_canvas:
      stacked = jax.tree.map(lambda *xs: np.array(xs), *vectors)
      return np.asarray(many(params, stacked, examples, rows))
    return np.array(
      [float(one(params, v, examples, rows, v.side)) for v in vectors]
    )

  def step(params, opt_state, vector, examples, rows, key):
    side = None if on_canvas else vector.side
    return weights(params, opt_state, vector, examples, rows, key, side)

  return Steps(step, losses, tx)


def _parted(variables: Any) -> tuple[Any, Any]:
  rest = dict(variables)
  return rest.pop('params'), rest


def random_unit(space: joint.Space, rng: np.random.Generator) -> Any:
  """Returns fractions that are uniform over their ranges."""
  low, high = joint.unit_range(space)
  return jax.tree.map(lambda a, b: rng.uniform(float(a), float(b)), low, high)


def train_supernet(
  task: Task,
  steps: Steps,
  space: joint.Space,
  folder: pathlib.Path,
  moves: bool,
) -> tuple[Search, list[dict[str, Any]]]:
  """Trains a supernet, and moves the vector if ``moves``; resumes by itself.

  Returns:
    (the end, a record for every vector step).
  """
  config = task.config
  begin = int(config.warmup * config.steps) if moves else config.steps
  total = max(1, (config.steps - begin) // config.every)
  form = {
    'pairs': {},
    'plain': {'antithetic': False},
    'spsa': {'kind': 'rademacher'},
  }[config.form]
  estimate = estimator.estimator(
    n=config.n,
    sigma=optax.linear_schedule(config.sigma, 0.3 * config.sigma, total),
    **form,
  )
  ask, tell = jax.jit(estimate.ask), jax.jit(estimate.tell)
  tx = optax.adam(config.rate)
  low, high = joint.unit_range(space)

  @jax.jit
  def move(unit, state, gradient):
    updates, state = tx.update(gradient, state)
    moved = optax.apply_updates(unit, updates)
    return jax.tree.map(jnp.clip, moved, low, high), state

  params, _ = _parted(task.initial)
  unit = joint.to_unit(space, _start(task, space))
  key = jax.random.key(config.seed)
  state = Search(
    params, steps.tx.init(params), unit, tx.init(unit), estimate.init(unit, key)
  )
  state, log = train.own(state), folder / 'vector.jsonl'
  with checkpoint.Checkpointer(folder / 'checkpoints', keep=2) as keeper:
    first = 0
    if keeper.steps():
      first, state, _ = keeper.restore(jax.eval_shape(lambda: state))
    report.truncate_metrics(log, first)
    for step in range(first, config.steps):
      rng = np.random.default_rng([config.seed, step])
      if step < begin:
        unit = random_unit(space, rng)
      else:
        unit = jax.tree.map(
          lambda u, s, rng=rng: float(u) + float(s) * rng.standard_normal(),
          state.unit,
          state.estimate.sigma,
        )
      vector = joint.from_unit(space, unit)
      rows = rng.choice(len(task.examples.labels), config.batch, replace=False)
      params, opt_state, loss = steps.weights(
        state.params, state.opt_state, vector, task.examples, rows,
        data.step_key(config.seed, 0, step),
      )  # fmt: skip
      state = state._replace(params=params, opt_state=opt_state)
      if step >= begin and (step - begin) % config.every == 0:
        rows = rng.choice(
          len(task.held.labels), 2 * config.batch, replace=False
        )
        asked = jax.tree.map(np.asarray, ask(state.estimate, state.unit))
        vectors = [
          joint.from_unit(
            space, jax.tree.map(lambda x, i=i: float(x[i]), asked)
          )
          for i in range(config.n)
        ]
        found = steps.losses(state.params, vectors, task.held, rows)
        costs = [task.cost(v) for v in vectors]
        total_loss = found + config.rho * np.asarray(
          joint.penalty(np.array(costs, np.float32), task.limit)
        )
        gradient, after = tell(
          state.estimate, state.unit, jnp.asarray(total_loss, jnp.float32)
        )
        unit, unit_state = move(state.unit, state.unit_state, gradient)
        state = state._replace(unit=unit, unit_state=unit_state, estimate=after)
        mean = joint.from_unit(space, jax.tree.map(float, unit))
        report.append_metrics(log, {
          'step': step + 1,
          'loss': float(loss),
          'held_loss': float(np.mean(found)),
          'macs': task.cost(mean),
          'signal': float(after.signal),
          'unit': jax.tree.map(float, unit)._asdict(),
        })  # fmt: skip
      if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
        keeper.save(step + 1, state)
  return state, report.read_metrics(log) if moves else []


def _start(task: Task, space: joint.Space) -> joint.PruningVector:
  """Where the vector starts: on the budget, all coordinates narrowed."""
  ones = jax.tree.map(lambda _: 1.0, space.high)
  return joint.project(space, task.cost, _target(task), ones, tolerance=0.05)


def _target(task: Task) -> int:
  return int(task.limit)


# --- The methods -------------------------------------------------------------


def settings(task: Task, method: str) -> list[joint.PruningVector]:
  """Returns every setting of one dimension, widths narrowed to the budget."""
  space = task.space
  if method == 'resolution':
    rows = [space.high._replace(side=side) for side in space.sides]
  else:
    ladders = space.ladders.depths
    rows = [
      space.high._replace(depths=dict(zip(ladders, depths, strict=True)))
      for depths in itertools.product(*(map(int, x) for x in ladders.values()))
    ]
  found = []
  for row in rows:
    try:
      found.append(joint.uniform(space, task.cost, _target(task), row))
    except ValueError:  # That setting alone is below the budget.
      continue
  return found


def choose(
  task: Task, steps: Steps, method: str, folder: pathlib.Path
) -> tuple[joint.PruningVector, Any]:
  """Returns the vector that a method finds, and the params of its supernet."""
  config, space, rng = task.config, task.space, np.random.default_rng(0)
  target = _target(task)
  if method == 'uniform':
    return joint.uniform(space, task.cost, target), None
  if method in ('joint', 'channel'):
    own = space if method == 'joint' else joint.restrict(space, widths=True)
    end, records = train_supernet(task, steps, own, folder / method, moves=True)
    if records:
      history = [_flat(record['unit']) for record in records]
      figure = plots.gates(history, unit='vector step')
      (folder / method / 'vector.svg').write_text(plots.svg(figure, 'vector'))
    unit = jax.tree.map(float, end.unit)
    return joint.project(own, task.cost, target, unit), end.params
  end, _ = train_supernet(
    task, steps, space, folder / 'random_net', moves=False
  )
  size = min(4 * config.batch, len(task.held.labels))
  rows = np.sort(rng.choice(len(task.held.labels), size, replace=False))
  score = lambda vectors: steps.losses(end.params, vectors, task.held, rows)
  turns = (1 - config.warmup) * config.steps / config.every
  count = max(4, int(turns * config.n * 2 * config.batch / size))
  if method in ('depth', 'resolution'):
    found = settings(task, method)
    if len(found) > count:
      found = [found[i] for i in rng.choice(len(found), count, replace=False)]
    return found[int(np.argmin(score(found)))], end.params
  each = max(2, count // 10)
  options = (
    {'population': count, 'generations': 1}
    if method == 'random'
    else {
      'population': count - 9 * each if count > 20 else each,
      'generations': 10 if count > 20 else 2,
      'mutations': each // 2,
      'crossovers': each - each // 2,
      'parents': max(2, each // 2),
    }
  )
  rng = np.random.default_rng([config.seed, 1])
  found = evolution.search(space, task.cost, target, score, rng, **options)
  best = joint.to_unit(space, found[-1][0].vector)
  best = jax.tree.map(float, best)
  return joint.project(space, task.cost, target, best), end.params


def _flat(unit: Mapping[str, Any]) -> dict[str, np.ndarray]:
  found = {
    k: np.array(list(v.values())) for k, v in unit.items() if k != 'side'
  }
  if unit['side'] is not None:
    found['side'] = np.array([unit['side']])
  return {k: v for k, v in found.items() if v.size}


def finish(
  task: Task, vector: joint.PruningVector, params: Any
) -> dict[str, Any]:
  """Trains the network of a vector; returns its figures.

  Args:
    task: the task.
    vector: on the budget.
    params: of the supernet, to start from; None for new ones.
  """
  config = task.config
  plan = joint.plan(task.space, vector)
  shapes = jp.shrink(task.graph, plan, task.initial)
  small = _without_none(shapes)
  options = {'skippable': False} if hasattr(task.module, 'skippable') else {}
  module = task.module.clone(
    widths=models.widths(small['params']),
    **({'drop': plan.dropped} if hasattr(task.module, 'drop') else {}),
    **options,
  )
  side = vector.side
  resize = lambda x: x if side in (None, x.shape[1]) else canvas.resize(x, side)
  prepared = lambda x: resize(task.prepare(x))
  key = jax.random.key(config.seed)
  x = prepared(task.examples.images[: config.batch])
  variables = jax.jit(module.init)(key, x[:1])
  if params is not None and config.start == 'shared':
    whole = {**task.initial, 'params': params}
    variables = _without_none(jp.shrink(task.graph, plan, whole))
    params = variables['params']
    update = jax.jit(lambda stats, x: module.apply(
      {'params': params, 'batch_stats': stats}, x, train=True,
      mutable=['batch_stats'],
    )[1]['batch_stats'])  # fmt: skip
    batches = [
      prepared(task.examples.images[k : k + config.batch])
      for k in range(0, 20 * config.batch, config.batch)
      if k + config.batch <= len(task.examples.labels)
    ]
    stats = recovery.batch_statistics(update, variables['batch_stats'], batches)
    variables = {'params': params, 'batch_stats': stats}
  count = len(task.examples.labels) // config.batch
  tx = recipes.sgd(
    config.learning_rate, config.weight_decay, count * config.epochs
  )
  change = lambda key, images: resize(task.change(key, images))
  step = train.make_step(module.apply, tx, task.prepare, change=change)
  run = train.make_runner(step, seed=config.seed, batch=config.batch)
  params, stats = _parted(train.own(variables))
  state = train.State(params, stats, tx.init(params))
  for epoch in range(config.epochs):
    state, _ = run(state, task.examples, epoch, 0, count)
  evaluate = train.make_evaluate(module.apply, prepared)
  return {
    'accuracy': evaluate(train.variables(state), task.test),
    'macs': task.cost(vector) / joint.whole(task.space, task.cost),
    'vector': json.loads(joint.to_json(vector)),
    'widths': {
      name: list(pair) for name, pair in plans.widths(task.graph, plan).items()
    },
  }


def _without_none(tree: Any) -> Any:
  """A pytree of dicts without the branches that hold nothing."""
  if not isinstance(tree, Mapping):
    return tree
  kept = {name: _without_none(child) for name, child in tree.items()}
  return {
    name: child
    for name, child in kept.items()
    if child is not None and not (isinstance(child, dict) and not child)
  }


# --- Running -----------------------------------------------------------------


def run(config: Config, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Runs what is left of one seed; returns method -> figures."""
  folder = pathlib.Path(config.workdir, f'seed{config.seed}')
  files = {name: folder / f'{name}.json' for name in methods}
  left = [name for name in methods if not files[name].exists()]
  if left:
    folder.mkdir(parents=True, exist_ok=True)
    task = prepare(config)
    steps = make_steps(task)
    for name in left:
      found = folder / f'{name}.vector.json'
      vector, params = choose(task, steps, name, folder)
      workdir.write(found, joint.to_json(vector) + '\n')
      result = finish(task, vector, params)
      bars = {k: tuple(v) for k, v in result['widths'].items()}
      figure = plots.widths(bars)
      (folder / f'{name}.svg').write_text(plots.svg(figure, name))
      workdir.write(files[name], json.dumps(result, indent=1) + '\n')
      print(
        f'seed {config.seed}, {name}: {result["accuracy"]:.2%} with '
        f'{result["macs"]:.1%} of the multiply-adds',
        flush=True,
      )
  return {name: json.loads(files[name].read_text()) for name in methods}


def table(results: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
  """Returns accuracies by method, and joint less each, paired by seed."""
  names = list(results[0])
  column = lambda name: [100 * r[name]['accuracy'] for r in results]
  rows = []
  for name in names:
    vector = results[0][name]['vector']
    depth = sum(vector['depths'].values())
    macs = np.mean([r[name]['macs'] for r in results])
    row = [name, str(evidence.summary(column(name)))]
    if 'joint' in names:
      same = name == 'joint' or len(results) < 2
      row.append(
        '' if same else str(evidence.paired(column('joint'), column(name)))
      )
    rows.append([*row, f'{100 * macs:.1f}', depth, vector['side']])
  header = ['method', 'top-1, %']
  header += ['joint less it'] if 'joint' in names else []
  return evidence.table(
    [*header, 'MACs, %', 'blocks (seed 0)', 'side (seed 0)'], rows
  )


def parse(argv: Sequence[str]) -> tuple[list[Config], list[str]]:
  """Returns a configuration for every seed, and the methods.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  given = command.parse(_F, argv, PRESETS)
  methods = given.pop('methods')
  unknown = [name for name in methods if name not in METHODS]
  if unknown or not methods:
    raise flags.BadInputError(
      f'--methods must be of {",".join(METHODS)}, got {",".join(methods)}.'
    )
  try:
    given['sides'] = tuple(sorted(int(side) for side in given['sides']))
  except ValueError:
    raise flags.BadInputError(
      f'--sides must be ints, got {given["sides"]}.'
    ) from None
  seeds, first = given.pop('seeds'), given.pop('first_seed')
  whole = {'macs': 0 < given['macs'] < 1, 'warmup': 0 <= given['warmup'] < 1}
  for name in ('steps', 'every', 'epochs', 'batch', 'save_every'):
    whole[name] = given[name] >= 1
  whole['n'] = given['n'] >= 2 and given['n'] % 2 == 0
  for name, holds in whole.items():
    if not holds:
      raise flags.BadInputError(f'--{name} is out of range: {given[name]}.')
  if given['workdir'] is None:
    text = json.dumps(given, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    given['workdir'] = f'runs/joint-{given["dataset"]}-{tag}'.replace(':', '-')
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
    folder = pathlib.Path(configs[0].workdir)
    folder.mkdir(parents=True, exist_ok=True)
    results = [run(config, methods) for config in configs]
  except (flags.BadInputError, data.DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  text = table(results)
  workdir.write(folder / 'results.md', text + '\n')
  print(text)
  print(f'\nThe run folder is {folder}.')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
