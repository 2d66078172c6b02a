"""Gates of four granularities in one objective, against one alone and others.

  python -m experiments.gates --task=lenet --data_dir=DIR
  python -m experiments.gates --task=resnet --data_dir=DIR
  python -m experiments.gates --task=resnet --table
  python -m experiments.gates --task=resnet --speed=30
  python -m experiments.gates --preset=smoke

Every arm has to get by with one budget of parameters and the same epochs,
batches and trials:

``all``       gates of units, layers and blocks together
``units``     gates of neurons or filters alone
``layers``    gates of parallel branches, or of layers behind a bypass, alone
``blocks``    gates of residual branches alone
``student``   every width reduced alike, trained from the start
``slimming``  network slimming: L1 on the scales of the norms over 60 % of the
              epochs, one cut, fine-tuning for the rest
``dense``     nothing pruned

Weights and gates train together and there is no fine-tuning: after the last
epoch the gates are folded into the weights, what is closed is cut out, and the
accuracy is that of the small network. Two settings are tried for each arm on a
validation split and a seed of its own; the better one runs on every seed. Runs
are appended to a file as they end, so that the same command goes on where it
was stopped; ``--table`` prints what is there. ``--speed`` times a training step
with all gates against one without, in turn.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import jaxprune as jp
from experiments import evidence, timing, train
from jaxprune import cost, data, gates, models, plans, plots, structure, tree
from jaxprune.models import inception, layers
from jaxprune.structure.branches import branches

_TASK = flags.DEFINE_string('task', 'lenet', 'The network and its data.')
_ARMS = flags.DEFINE_list('arms', [], 'Only these; all without it.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each arm.')
_EPOCHS = flags.DEFINE_integer('epochs', None, 'Epochs; its own number.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'See experiments.prune.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/gates', 'Where runs are kept.')
_TABLE = flags.DEFINE_bool('table', False, 'Print the results; run nothing.')
_SPEED = flags.DEFINE_integer('speed', 0, 'Pairs of steps to time.')
_PRESET = flags.DEFINE_enum(
  'preset', 'full', ['full', 'smoke'], 'smoke: digits, two epochs, every arm.'
)

TUNING_SEED = 100
WARM, RISEN, FROZEN = 0.1, 0.4, 0.8  # Parts of the epochs: see `ramp`, `rate`.


Around = Callable[[jax.Array, tuple[int, ...]], jax.Array]
SUM = ('sum1', 'sum3', 'sum5')


class Task(NamedTuple):
  """What is learned and how."""

  name: str
  module: Any  # Linen.
  bypassed: Mapping[str, Around]  # Layers behind a bypass, and what is around.
  rivals: tuple[tuple[str, ...], ...]  # Of these, one has to stay.
  examples: train.Examples
  validation: train.Examples
  test: train.Examples
  target: float  # Part of the parameters that may remain.
  epochs: int
  batch: int
  rates: tuple[float, float]  # Of the weights, to be tried without gates.
  strengths: tuple[float, float]  # Of the penalty, to be tried.


class Branch(nn.Module):
  """A convolution and its norm.

  Attributes:
    features: width.
    kernel: side of the convolution.
  """

  features: int
  kernel: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns norm(conv(x))."""
    same = layers.same(self.kernel)
    x = layers.conv(self.features, self.kernel, 1, same, jnp.float32, 'conv')(x)
    return layers.norm(train, 0.9, 1e-5, jnp.float32, 'norm')(x)


class SmallInception(nn.Module):
  """Two modules of GoogLeNet and a sum of parallel branches between them.

  Attributes:
    num_classes: width of the last layer.
    stride: of the stem.
    widths: path of a layer -> width, where it is not the usual one.
  """

  num_classes: int = 10
  stride: int = 2
  widths: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns the logits of images."""
    at = lambda name, n: self.widths.get(name, n)

    def concatenated(x, name, sizes):
      names = ('branch1', 'branch2_reduce', 'branch2', 'branch3_reduce',
               'branch3', 'branch4')  # fmt: skip
      sizes = [at(f'{name}/{k}', n) for k, n in zip(names, sizes, strict=True)]
      return inception.Inception(sizes, 5, name=name)(x, train)

    same = layers.same(3)
    width = at('stem', 24)
    x = layers.conv(width, 3, self.stride, same, jnp.float32, 'stem')(x)
    x = nn.relu(layers.norm(train, 0.9, 1e-5, jnp.float32, 'stem_norm')(x))
    x = concatenated(x, 'first', (24, 16, 24, 8, 16, 16))
    x = layers.max_pool(x, 2, 2, 'VALID')
    x = nn.relu(
      sum(
        Branch(at(f'sum{k}/conv', 48), k, name=f'sum{k}')(x, train)
        for k in (1, 3, 5)
      )
    )
    x = concatenated(x, 'second', (32, 24, 32, 8, 24, 24))
    return nn.Dense(self.num_classes, name='head')(layers.pool(x))


def _images(
  name: str, data_dir: str | None, sizes: tuple[int, int], halved: bool
) -> tuple[train.Examples, train.Examples, train.Examples]:
  """Returns what to train, to validate and to test on.

  The first two are a fixed subset of the training split, equally many images of
  each class; ``halved`` makes pixels of the means of 2 x 2.
  """
  loaded = data.load(name, 'train', data_dir)
  rows = evidence.subset(loaded.labels, sum(sizes))
  rows = np.random.default_rng(0).permutation(rows)

  def examples(found, index):
    images = found.images[index]
    if halved:
      n, height, width, channels = images.shape
      parts = images.reshape(n, height // 2, 2, width // 2, 2, channels)
      images = np.round(parts.mean((2, 4))).astype(np.uint8)
    return train.Examples(jnp.asarray(images), jnp.asarray(found.labels[index]))

  test = data.load(name, 'test', data_dir)
  return (
    examples(loaded, rows[: sizes[0]]),
    examples(loaded, rows[sizes[0] :]),
    examples(test, slice(None)),
  )


def lenet(data_dir: str | None) -> Task:
  """LeNet-300-100 and one more layer of 100, 20,000 images of MNIST."""
  return Task(
    'lenet',
    models.MLP((300, 100, 100)),
    {'hidden3': gates.shortcut},
    (),
    *_images('mnist', data_dir, (18_000, 2_000), False),
    target=0.1,
    epochs=10,
    batch=100,
    rates=(0.05, 0.1),
    strengths=(4.0, 16.0),
  )


def small_inception(data_dir: str | None) -> Task:
  """A small Inception, 10,000 images of Fashion-MNIST at 14 x 14."""
  return Task(
    'inception',
    SmallInception(),
    dict.fromkeys(SUM, gates.nothing),
    (SUM,),
    *_images('fashion_mnist', data_dir, (8_000, 2_000), True),
    target=0.2,
    epochs=6,
    batch=100,
    rates=(0.1, 0.2),
    strengths=(4.0, 16.0),
  )


def small_resnet(data_dir: str | None) -> Task:
  """A ResNet of six blocks, 10,000 images of Fashion-MNIST at 14 x 14."""
  return small_inception(data_dir)._replace(
    name='resnet',
    bypassed={},
    rivals=(),
    module=models.ResNet(
      (16, 32, 32), (2, 2, 2), num_classes=10, strides=(2, 2, 1), stem='small'
    ),
  )


def cifar(name: str, module: Any, bypassed: Sequence[str]) -> Any:
  """Returns the task of a network on CIFAR-10."""

  def make(data_dir: str | None) -> Task:
    return Task(
      name,
      module,
      dict.fromkeys(bypassed, gates.shortcut),
      (),
      *_images('cifar10', data_dir, (45_000, 5_000), False),
      target=0.2,
      epochs=60,
      batch=128,
      rates=(0.1, 0.2),
      strengths=(1.0, 4.0),
    )

  return make


def digits(data_dir: str | None) -> Task:
  """The small Inception on digits, for a look at every arm in a minute."""
  return Task(
    'digits',
    SmallInception(stride=1),
    dict.fromkeys(SUM, gates.nothing),
    (SUM,),
    *_images('digits', data_dir, (400, 100), False),
    target=0.5,
    epochs=2,
    batch=50,
    rates=(0.1, 0.2),
    strengths=(4.0, 16.0),
  )


TASKS: Mapping[str, Callable[[str | None], Task]] = {
  'digits': digits,
  'lenet': lenet,
  'inception': small_inception,
  'resnet': small_resnet,
  'vgg16': cifar(
    'vgg16',
    models.vgg16(hidden=(), num_classes=10),
    [
      f'stage{s}_conv{i}'
      for s, n in enumerate((2, 2, 3, 3, 3), 1)
      for i in range(2, n + 1)
    ],
  ),
  'resnet56': cifar('resnet56', models.resnet56(shortcut='projection'), ()),
}


# --- Training ----------------------------------------------------------------


class State(NamedTuple):
  """What training changes."""

  learned: Any  # {'params': ..., 'gates': ...}.
  stats: Any
  opt_state: Any


class Arm(NamedTuple):
  """One way to meet the budget.

  Attributes:
    module: the network that trains.
    gates: those that train with it.
    view: (learned, strength) -> params, factors of bypassed layers, penalty.
    settings: what is tried: (rate of the weights, strength of the penalty).
    cut: params and statistics -> a mask of each leaf, after 60 % of the epochs.
    finish: a state -> what is left of the network.
  """

  module: Any
  gates: gates.Gates
  view: Callable[..., Any]
  settings: Sequence[tuple[float, float]]
  cut: Callable[..., Any] | None
  finish: Callable[[State], 'Small']


class Small(NamedTuple):
  """What is left of a network."""

  fn: Callable[[Any, jax.Array], jax.Array]  # (variables, images) -> logits.
  variables: Any
  report: Mapping[str, Any]


def forward(
  task: Task,
  module: Any,
  variables: Any,
  x: jax.Array,
  factors: Any,
  train: Any,
) -> Any:
  """Returns the logits (and the statistics in training) behind bypasses.

  Args:
    task: says what is around a layer.
    module: a Linen module without gates.
    variables: of it.
    x: images.
    factors: path of a layer that keeps the sides -> the gate of its bypass.
    train: static.
  """

  def gated(call, args, kwargs, context):
    name = '/'.join(context.module.path)
    if name not in factors or context.method_name != '__call__':
      return call(*args, **kwargs)
    x, *rest = args
    return gates.bypass(
      lambda x: call(x, *rest, **kwargs),
      x,
      factors[name],
      around=task.bypassed[name],
      shape=(*x.shape[:-1], context.module.features),
    )

  mutable = ['batch_stats'] if train else False
  with nn.intercept_methods(gated):
    return module.apply(variables, x, train, mutable=mutable)


def make_step(
  task: Task, arm: Arm, prepare: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns the training step: one compile for every seed and setting.

  It maps (state, masks, examples, rows, setting, progress) to a state, where
  the masks are those of a cut and progress runs from 0 to 1.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, masks, examples, rows, setting, progress):
    images, labels = prepare(examples.images[rows]), examples.labels[rows]
    rate, strength = setting
    strength *= jnp.clip((progress - WARM) / (RISEN - WARM), 0.0, 1.0)
    tx = _chain(
      rate * jnp.minimum(1.0, progress / 0.05) * _cosine(progress),
      0.05 * _cosine(jnp.minimum(progress / FROZEN, 1.0)),
    )

    def loss_fn(learned):
      params, factors, penalty = arm.view(learned, strength)
      variables = {'params': params, **state.stats}
      logits, stats = forward(
        task, arm.module, variables, images, factors, True
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses) + penalty, stats

    grads, stats = jax.grad(loss_fn, has_aux=True)(state.learned)
    updates, opt_state = tx.update(grads, state.opt_state, state.learned)
    learned: Any = optax.apply_updates(state.learned, updates)
    cut = lambda w, mask: jnp.where(mask, w, 0)
    params = jax.tree.map(cut, learned['params'], masks)
    return State({**learned, 'params': params}, stats, opt_state)

  return step


def _cosine(progress: Any) -> Any:
  return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _chain(rate: Any, gate_rate: Any) -> optax.GradientTransformation:
  """Weights and gates in one chain; weight decay is on kernels alone."""
  kernels = lambda params: tree.map_with_path(tree.is_prunable, params)
  weights = optax.chain(
    optax.add_decayed_weights(5e-4, kernels),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  )
  return gates.partition(weights, optax.sgd(gate_rate, momentum=0.9))


def infer(task: Task, arm: Arm, state: State, x: jax.Array) -> jax.Array:
  """Returns the logits of the full network with its gates."""
  params, factors, _ = arm.view(state.learned, 0.0)
  variables = {'params': params, **state.stats}
  return forward(task, arm.module, variables, x, factors, False)


def start(arm: Arm, example: jax.Array, seed: int) -> tuple[State, Any]:
  """Returns the state at first, and masks that cut nothing."""
  init: Any = jax.jit(arm.module.init)
  variables = init(jax.random.key(seed), example)
  stats = {k: v for k, v in variables.items() if k != 'params'}
  learned = train.own({'params': variables['params'], 'gates': arm.gates})
  masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), learned['params'])
  return State(learned, stats, _chain(0.0, 0.0).init(learned)), masks


def fit(
  task: Task,
  arm: Arm,
  step: Callable[..., Any],
  seed: int,
  setting: tuple[float, float],
) -> tuple[State, list[gates.Gates]]:
  """Returns the state after the last epoch, and the gates after each."""
  example = jnp.zeros((1, *task.examples.images.shape[1:]))
  state, masks = start(arm, example, seed)
  n, history = len(task.examples.labels), []
  steps = n // task.batch
  values = tuple(map(jnp.float32, setting))
  for epoch in range(task.epochs):
    if arm.cut is not None and epoch == round(0.6 * task.epochs):
      masks = arm.cut(state.learned['params'], state.stats)
      values = (values[0], jnp.float32(0))
    rows = data.epoch_batches(seed, epoch, size=n, batch=task.batch)
    for i in range(steps):
      progress = jnp.float32((epoch + i / steps) / task.epochs)
      state = step(state, masks, task.examples, rows[i], values, progress)
    history.append(jax.tree.map(np.asarray, state.learned['gates']))
  return state, history


# --- Arms --------------------------------------------------------------------


def dense(task: Task, graph: Any) -> Arm:
  """The whole network; two learning rates are tried."""
  del graph
  return _plain(task, task.module, [(rate, 0.0) for rate in task.rates])


def student(task: Task, graph: Any) -> Arm:
  """The network with every width reduced alike, trained from the start."""
  budget = task.target * cost.parameters(graph)

  def plan_of(share):
    sizes = {n: max(1, int(share * g.size)) for n, g in graph.groups.items()}
    return plans.from_widths(graph, sizes)

  shares = np.arange(512, 0, -1) / 512
  fits = lambda share: cost.parameters(graph, plan_of(share)) <= budget
  plan = plan_of(next(share for share in shares if fits(share)))
  small = jax.eval_shape(
    lambda v: jp.shrink(graph, plan, v), _variables(task, jax.eval_shape)
  )
  module = task.module.clone(widths=models.widths(small['params']))
  return _plain(task, module, [(rate, 0.0) for rate in task.rates])


def _plain(task: Task, module: Any, settings: Any) -> Arm:
  def finish(state):
    fn = lambda variables, x: forward(task, module, variables, x, {}, False)
    variables = {'params': state.learned['params'], **state.stats}
    return Small(fn, variables, {})

  return Arm(
    module,
    gates.Gates({}),
    lambda learned, strength: (learned['params'], {}, 0.0 * strength),
    settings,
    None,
    finish,
  )


def slimming(task: Task, graph: Any) -> Arm:
  """Network slimming: the filters of smallest norm scale go at one cut."""
  made: dict[str, Any] = {}

  def cut(params, stats):
    scores = graph.reduce(jp.scores.norm_scale(params))
    budget = jp.budget(parameters=int(task.target * cost.parameters(graph)))
    made['plan'] = jp.plan(graph, scores, budget, normalise=False)
    found = plans.masks(graph, made['plan'], {'params': params, **stats})
    whole = lambda w, mask: (
      jnp.ones(w.shape, bool) if isinstance(mask, optax.MaskedNode) else mask
    )
    return jax.tree.map(whole, params, found['params'])

  def finish(state):
    variables = {'params': state.learned['params'], **state.stats}
    return _shrunk(graph, made['plan'], variables)

  def view(learned, strength):
    params = learned['params']
    return params, {}, strength * gates.slimming(params)

  settings = [(task.rates[0], strength) for strength in (1e-4, 1e-3)]
  arm = _plain(task, task.module, settings)
  return arm._replace(view=view, cut=cut, finish=finish)


def gated(names: Sequence[str], task: Task, graph: Any) -> Arm:
  """Gates of some granularities, trained with the weights.

  Args:
    names: of 'units', 'layers', 'blocks'.
    task: what is learned.
    graph: of the network, without bypasses.
  """
  behind = tuple(task.bypassed) if 'layers' in names else ()
  if behind:  # Both paths are traced, whose channels are one.
    graph = _trace(task, dict.fromkeys(behind, 0.5))
  parallel = branches(graph)
  shape = gates.Structure(
    units={name: group.size for name, group in graph.groups.items()},
    layers={**parallel.layers, **dict.fromkeys(behind, ())},
    blocks=tuple(graph.blocks),
    inside=parallel.inside,
    rivals=(*parallel.rivals, *(task.rivals if behind else ())),
  )
  places = {
    'units': graph.readers,
    'layers': shape.layers,
    'blocks': [b.name for b in graph.blocks.values() if not b.unclosed],
  }
  start = gates.init(shape, gated=[n for k in names for n in places[k]])
  remaining = _cost(graph, behind)

  def view(learned, strength):
    values = gates.evaluate(learned['gates'], shape)
    params = structure.scale(
      graph, {'params': learned['params']}, values.units, values.blocks
    )['params']
    rho = gates.remaining(values, shape, remaining)
    factors = {name: values.layers[name] for name in behind}
    return params, factors, gates.penalty(rho, strength, task.target)

  def finish(state):
    values = gates.evaluate(state.learned['gates'], shape)
    variables = {'params': state.learned['params'], **state.stats}
    folded = structure.scale(graph, variables, values.units, values.blocks)
    masks = gates.masks(values, shape)
    factors = {name: float(values.layers[name]) for name in behind}
    final = graph
    if behind:
      final, folded, masks = _without(task, graph, folded, masks, factors)
    dropped = gates.closed(values.open.blocks)
    plan = plans.from_masks(final, masks, dropped=dropped)
    small = _shrunk(final, plan, folded)
    rho = float(gates.remaining(values, shape, remaining))
    counted = sum(w.size for w in jax.tree.leaves(small.variables['params']))
    share = counted / cost.parameters(graph)
    if abs(rho - share) > 1e-5:
      raise AssertionError(f'Expected {rho}, counted {share}.')
    closed = {
      'units': float(np.mean(~np.concatenate([*masks.values()]))),
      'layers': gates.closed(values.open.layers),
      'blocks': dropped,
    }
    return small._replace(report={**small.report, 'closed': closed})

  settings = [(task.rates[0], strength) for strength in task.strengths]
  return Arm(task.module, start, view, settings, None, finish)


def _cost(graph: Any, behind: Sequence[str]) -> gates.Cost:
  """The parameters as a function of widths and of what is open."""
  own = {
    layer: [p for p in graph.leaves if p.startswith(f'params/{layer}/')]
    for layer in behind
  }
  polynomial = cost.parameters_polynomial(graph, layers=own)
  return functools.partial(cost.evaluate, polynomial)


def _without(
  task: Task, graph: Any, variables: Any, masks: Any, factors: Any
) -> tuple[Any, Any, Any]:
  """The graph, variables and masks without the layers that are closed."""
  params = {
    name: leaf
    for name, leaf in variables['params'].items()
    if factors.get(name, 1)
  }
  variables = {**variables, 'params': params}
  final = _trace(task, factors, variables)
  kept = {
    path: mask
    for path, mask in graph.expand(masks).items()
    if path in final.leaves
  }
  nested: dict[str, Any] = {}
  for path, mask in kept.items():
    inner = nested
    *parents, last = path.split('/')
    for name in parents:
      inner = inner.setdefault(name, {})
    inner[last] = mask
  open_units = final.reduce(nested, norm='max', combine='max')
  return final, variables, {n: np.asarray(x) > 0 for n, x in open_units.items()}


def _shrunk(graph: Any, plan: Any, variables: Any) -> Small:
  """What a plan leaves."""
  return Small(
    jp.specialise(graph, plan),
    jp.shrink(graph, plan, variables),
    {'macs': cost.macs(graph, plan)},
  )


def _variables(task: Task, evaluate: Callable[..., Any] = jax.eval_shape):
  x = jax.ShapeDtypeStruct((1, *task.examples.images.shape[1:]), jnp.float32)
  return evaluate(task.module.init, jax.random.key(0), x)


def _trace(task: Task, factors: Any, variables: Any = None) -> Any:
  """The graph of the network behind bypasses, in the form that infers."""
  x = jax.ShapeDtypeStruct((1, *task.examples.images.shape[1:]), jnp.float32)
  fn = lambda variables, x: forward(
    task, task.module, variables, x, factors, False
  )
  return jp.trace(fn, _variables(task) if variables is None else variables, x)


EVERY = ('units', 'layers', 'blocks')
ARMS: Mapping[str, Callable[[Task, Any], Arm]] = {
  'dense': dense,
  'student': student,
  'slimming': slimming,
  'all': functools.partial(gated, EVERY),
  **{name: functools.partial(gated, (name,)) for name in EVERY},
}


def arms_of(task: Task, graph: Any) -> list[str]:
  """Returns the arms that make sense for a task."""
  norms = any(path.endswith('/scale') for path in graph.leaves)
  parallel = task.bypassed or branches(graph).layers
  return [
    name
    for name, fits in (
      ('all', True),
      ('student', True),
      ('slimming', norms),
      ('units', True),
      ('layers', parallel),
      ('blocks', graph.blocks),
      ('dense', True),
    )
    if fits
  ]


# --- Runs --------------------------------------------------------------------


def contend(
  task: Task, graph: Any, name: str, seeds: int, file: pathlib.Path
) -> None:
  """Runs what the file does not hold yet of an arm, and appends it."""
  arm = ARMS[name](task, graph)
  prepare = train.preparation(np.asarray(task.examples.images))
  step = make_step(task, arm, prepare)
  whole = functools.partial(infer, task, arm)
  evaluate = train.make_evaluate(whole, prepare)

  def run(seed, trial, setting):
    what = {'arm': name, 'seed': seed, 'trial': trial}
    for row in read(file):
      if all(row[k] == v for k, v in what.items()):
        return row
    clock = time.process_time()
    state, history = fit(task, arm, step, seed, setting)
    small = arm.finish(state)
    split = task.validation if trial is not None else task.test
    row = {
      **what,
      'setting': setting,
      'accuracy': 100 * evaluate(state, split),
      'parameters': jp.tree.size(small.variables['params']),
      **small.report,
    }
    if trial is None:  # The small network gives the same logits.
      x = prepare(task.examples.images[:16])
      wanted = jax.jit(whole)(state, x)
      error = jax.jit(small.fn)(small.variables, x) - wanted
      row['error'] = float(jnp.max(jnp.abs(error)) / jnp.max(jnp.abs(wanted)))
      if seed == 0 and any(history[0]):
        figure = plots.gates([_picture(h) for h in history])
        figure.savefig(file.with_name(f'{task.name}-{name}.png'), dpi=120)
    row['seconds'] = time.process_time() - clock
    with file.open('a') as out:
      out.write(json.dumps(row) + '\n')
    print(json.dumps(row), flush=True)
    return row

  trials = [run(TUNING_SEED, i, s) for i, s in enumerate(arm.settings)]
  limit = 1.01 * task.target * cost.parameters(graph)
  fits = [row for row in trials if row['parameters'] <= limit]
  best = max(fits or trials, key=lambda row: row['accuracy'])
  for seed in range(seeds):
    run(seed, None, tuple(best['setting']))


def speed(task: Task, graph: Any, pairs: int) -> str:
  """Returns the CPU time of a step with all gates, against one without."""
  prepare = train.preparation(np.asarray(task.examples.images))
  example = jnp.zeros((1, *task.examples.images.shape[1:]))
  rows = jnp.arange(task.batch, dtype=jnp.int32)

  def stepping(arm):
    step = make_step(task, arm, prepare)
    state, masks = start(arm, example, 0)

    def call():
      nonlocal state
      setting = (jnp.float32(0.01), jnp.float32(1.0))
      state = step(state, masks, task.examples, rows, setting, jnp.float32(0.5))
      return state

    return call

  calls = {name: stepping(ARMS[name](task, graph)) for name in ('dense', 'all')}
  ratios = []
  for _ in range(pairs):
    found = timing.milliseconds(calls, pairs=1)
    ratios.append(found['all'][0] / found['dense'][0])
  draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
  low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
  return (
    f'{task.name}, batch {task.batch}: {np.median(ratios):.3f} '
    f'[{low:.3f}, {high:.3f}] of the dense step, {pairs} pairs'
  )


def _picture(theta: gates.Gates) -> dict[str, np.ndarray]:
  """The factors of each granularity in one row."""
  gate = gates.scale()
  factor = lambda x: np.ravel(gate.value(jnp.asarray(x), gate.open(x)))
  found = {
    'neurons and filters': theta.units,
    'layers': theta.layers,
    'blocks': theta.blocks,
  }
  return {
    name: np.concatenate([factor(x) for x in some.values()])
    for name, some in found.items()
    if some
  }


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the runs of a file."""
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines]


def summarise(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table of what was run."""
  finals: dict[str, dict[int, Any]] = {}
  for row in rows:
    if row['trial'] is None:
      finals.setdefault(row['arm'], {})[row['seed']] = row
  lines = []
  for name, found in finals.items():
    column = lambda key, found=found: [row[key] for row in found.values()]
    both = sorted(found.keys() & finals.get('all', {}).keys())
    against = ''
    if name != 'all' and len(both) > 1:
      ours = [finals['all'][s]['accuracy'] for s in both]
      against = evidence.paired(ours, [found[s]['accuracy'] for s in both])
    sizes = column('parameters')
    lines.append(
      [
        name,
        len(found),
        f'{np.mean(sizes):,.0f} ± {np.std(sizes):,.0f}',
        evidence.summary(column('accuracy')),
        against,
      ]
    )
  minutes = sum(row['seconds'] for row in rows) / 60
  header = ['arm', 'seeds', 'parameters', 'accuracy, %', 'all minus it']
  return f'{evidence.table(header, lines)}\n\n{minutes:.1f} CPU-minutes'


def main(argv: list[str]) -> None:
  """Runs one task, or prints it."""
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {" ".join(argv[1:])}.')
  smoke = _PRESET.value == 'smoke'
  name = 'digits' if smoke else _TASK.value
  if name not in TASKS:
    raise app.UsageError(
      f'No task is called {name!r}; there are {", ".join(TASKS)}.'
    )
  unknown = sorted(set(_ARMS.value) - set(ARMS))
  if unknown:
    raise app.UsageError(
      f'No arm is called {", ".join(unknown)}; there are {", ".join(ARMS)}.'
    )
  file = pathlib.Path(_WORKDIR.value) / f'{name}.jsonl'
  if not _TABLE.value:
    file.parent.mkdir(parents=True, exist_ok=True)
    task = TASKS[name](_DATA_DIR.value)
    if _EPOCHS.value is not None:
      task = task._replace(epochs=_EPOCHS.value)
    graph = _trace(task, {})
    if _SPEED.value:
      print(speed(task, graph, _SPEED.value))
      return
    for arm in _ARMS.value or arms_of(task, graph):
      contend(task, graph, arm, 1 if smoke else _SEEDS.value, file)
  print(summarise(read(file)))


if __name__ == '__main__':
  app.run(main)
