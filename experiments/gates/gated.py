"""Networks with gates of four granularities, and what is left of them.

An :class:`Arm` is one way to meet a budget of parameters: it says which gates
train with the weights, how the network sees both, and what the small network
is in the end. ``experiments.gates`` trains and compares them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import cost, gates, models, plans, structure
from jaxprune.models import inception, layers
from jaxprune.structure.walks.branches import branches

Around = Callable[[jax.Array, tuple[int, ...]], jax.Array]
SUM = ('sum1', 'sum3', 'sum5')


class Net(NamedTuple):
  """A network, and what of it can close beside its units and blocks."""

  make: Callable[[int], Any]  # Classes -> a Linen module.
  bypassed: Mapping[str, Around] = {}  # Layers behind a bypass; what is around.
  rivals: tuple[tuple[str, ...], ...] = ()  # Of these, one has to stay.


class Task(NamedTuple):
  """A network, the budget, and what every arm may try."""

  module: Any
  bypassed: Mapping[str, Around]
  rivals: tuple[tuple[str, ...], ...]
  shape: tuple[int, ...]  # Of one image.
  target: float  # Part of the parameters that may remain.
  rates: tuple[float, ...]  # Of the weights, to be tried without gates.
  strengths: tuple[float, ...]  # Of the penalty, to be tried.


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
    width = at('stem', 16)
    x = layers.conv(width, 3, self.stride, same, jnp.float32, 'stem')(x)
    x = nn.relu(layers.norm(train, 0.9, 1e-5, jnp.float32, 'stem_norm')(x))
    x = concatenated(x, 'first', (16, 8, 16, 4, 8, 8))
    x = layers.max_pool(x, 2, 2, 'VALID')
    x = nn.relu(
      sum(
        Branch(at(f'sum{k}/conv', 24), k, name=f'sum{k}')(x, train)
        for k in (1, 3, 5)
      )
    )
    x = concatenated(x, 'second', (16, 12, 16, 4, 12, 12))
    return nn.Dense(self.num_classes, name='head')(layers.pool(x))


def _vgg16(classes: int) -> Any:
  return models.vgg16(hidden=(), num_classes=classes)


NETS: Mapping[str, Net] = {
  'lenet': Net(
    lambda classes: models.MLP((300, 100, 100), num_classes=classes),
    {'hidden3': gates.shortcut},
  ),
  'inception': Net(
    lambda classes: SmallInception(classes),
    dict.fromkeys(SUM, gates.nothing),
    (SUM,),
  ),
  'resnet': Net(
    lambda classes: models.ResNet(
      (16, 32, 32), (2, 2, 2), num_classes=classes, strides=(2, 2, 1),
      stem='small',
    )
  ),
  'vgg16': Net(
    _vgg16,
    {
      f'stage{s}_conv{i}': gates.shortcut
      for s, n in enumerate((2, 2, 3, 3, 3), 1)
      for i in range(2, n + 1)
    },
  ),
  'resnet56': Net(
    lambda classes: models.resnet56(num_classes=classes, shortcut='projection')
  ),
}  # fmt: skip


class Arm(NamedTuple):
  """One way to meet the budget.

  Attributes:
    module: the network that trains.
    gates: those that train with it.
    view: (learned, strength, target) -> params, factors of bypassed layers,
      penalty.
    settings: what is tried: (rate of the weights, strength of the penalty).
    cut: params and statistics -> a mask of each leaf, after 60 % of the steps.
    finish: (learned, statistics, masks of the cut) -> what is left.
  """

  module: Any
  gates: gates.Gates
  view: Callable[..., Any]
  settings: Sequence[tuple[float, float]]
  cut: Callable[..., Any] | None
  finish: Callable[[Any, Any, Any], 'Small']


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
    lambda v: jp.shrink(graph, plan, v), variables_of(task)
  )
  module = task.module.clone(widths=models.widths(small['params']))
  return _plain(task, module, [(rate, 0.0) for rate in task.rates])


def _plain(task: Task, module: Any, settings: Any) -> Arm:
  def finish(learned, stats, masks):
    del masks
    fn = lambda variables, x: forward(task, module, variables, x, {}, False)
    return Small(fn, {'params': learned['params'], **stats}, {})

  return Arm(
    module,
    gates.Gates({}),
    lambda learned, *_: (learned['params'], {}, 0.0),
    settings,
    None,
    finish,
  )


def slimming(task: Task, graph: Any) -> Arm:
  """Network slimming: the filters of smallest norm scale go at one cut."""

  def cut(params, stats):
    scores = graph.reduce(jp.scores.norm_scale(params))
    budget = jp.budget(parameters=int(task.target * cost.parameters(graph)))
    plan = jp.plan(graph, scores, budget, normalise=False)
    found = plans.masks(graph, plan, {'params': params, **stats})
    whole = lambda w, mask: (
      jnp.ones(w.shape, bool) if isinstance(mask, optax.MaskedNode) else mask
    )
    return jax.tree.map(whole, params, found['params'])

  def finish(learned, stats, masks):
    plan = plans.from_masks(graph, _kept(graph, {'params': masks}))
    return _shrunk(graph, plan, {'params': learned['params'], **stats})

  def view(learned, strength, target):
    del target
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
    graph = trace(task, dict.fromkeys(behind, 0.5))
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

  def view(learned, strength, target):
    values = gates.evaluate(learned['gates'], shape)
    params = structure.scale(
      graph, {'params': learned['params']}, values.units, values.blocks
    )['params']
    rho = gates.remaining(values, shape, remaining)
    factors = {name: values.layers[name] for name in behind}
    return params, factors, gates.penalty(rho, strength, target)

  def finish(learned, stats, masks):
    values = gates.evaluate(learned['gates'], shape)
    variables = {'params': learned['params'], **stats}
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
  final = trace(task, factors, variables)
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
  return final, variables, _kept(final, nested)


def _kept(graph: Any, masks: Any) -> dict[str, np.ndarray]:
  """Returns the units of which masks of leaves leave anything."""
  found = graph.reduce(masks, norm='max', combine='max')
  return {name: np.asarray(x) > 0 for name, x in found.items()}


def _shrunk(graph: Any, plan: Any, variables: Any) -> Small:
  """What a plan leaves."""
  return Small(
    jp.specialise(graph, plan),
    jp.shrink(graph, plan, variables),
    {'macs': cost.macs(graph, plan)},
  )


def variables_of(task: Task) -> Any:
  """Returns the shapes of the variables of the network that trains."""
  return jax.eval_shape(task.module.init, jax.random.key(0), _image(task))


def _image(task: Task) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)


def trace(task: Task, factors: Any, variables: Any = None) -> Any:
  """The graph of the network behind bypasses, in the form that infers."""
  fn = lambda variables, x: forward(
    task, task.module, variables, x, factors, False
  )
  found = variables_of(task) if variables is None else variables
  return jp.trace(fn, found, _image(task))


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
