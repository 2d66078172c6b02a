"""Scores, distributions, granularities and schedules by name.

The flags of an experiment that compares the maths of pruning become functions
here, and nowhere else.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from experiments import flags
from jaxprune import (
  cost,
  distributions,
  masks,
  models,
  schedules,
  scores,
  structure,
  tree,
)
from jaxprune.scores import lookahead

Batch = tuple[jax.Array, jax.Array]  # Prepared images and labels.

MODELS: Mapping[str, Callable[[int], Any]] = {
  **flags.MODELS,
  'mlp_500': lambda classes: models.mlp_500(num_classes=classes),
}


class Given(NamedTuple):
  """What a score may look at: one network, and data of the training split."""

  module: Any
  params: Any
  stats: Any  # The other collections of Linen.
  wiring: Mapping[str, lookahead.Wire]  # By the paths of the variables.
  batches: Sequence[Batch]
  key: jax.Array
  rates: Mapping[str, float] | None  # Sparsity of each leaf, if decided.

  @property
  def variables(self) -> dict[str, Any]:
    """The variables of Linen."""
    return {'params': self.params, **self.stats}

  def outputs(self, params: Any, images: jax.Array) -> jax.Array:
    """Returns the logits."""
    return self.module.apply({'params': params, **self.stats}, images)

  def loss(self, params: Any, batch: Batch) -> jax.Array:
    """Returns the mean cross-entropy of a batch."""
    logits = self.outputs(params, batch[0])
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(entropy(logits, batch[1]))

  def sampled(self) -> Iterator[Batch]:
    """Yields the batches with labels drawn from the network's own answers.

    With these the mean square of a gradient is the diagonal of the Gauss-Newton
    matrix, which is the Hessian's for a network of ReLUs under cross-entropy.
    """
    draw = jax.jit(
      lambda images, key: jax.random.categorical(
        key, self.outputs(self.params, images)
      )
    )
    for i, (images, _) in enumerate(self.batches):
      yield images, draw(images, jax.random.fold_in(self.key, i))

  def features(self, images: jax.Array, inputs: bool) -> dict[str, jax.Array]:
    """Returns what goes into each layer with a kernel, or comes out of it."""
    found = {}

    def record(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if isinstance(context.module, nn.Dense | nn.Conv):
        path = '/'.join((*context.module.path, 'kernel'))
        found[path] = args[0] if inputs else out
      return out

    with nn.intercept_methods(record):
      self.outputs(self.params, images)
    return found


Score = Callable[[Given], Any]  # -> scores like params.


def _lap(given: Given, params: Any = None, look: lookahead.Look = 'both'):
  variables = given.variables
  if params is not None:
    variables = {**variables, 'params': params}
  return lookahead.lookahead(variables, given.wiring, look=look)['params']


def _sequential(order: lookahead.Order) -> Score:
  """LAP that sees the layers before (or after) a layer already pruned."""

  def score(given):
    if given.rates is None:
      raise ValueError(
        f'lap_{order} prunes one leaf after the other and needs a '
        'distribution that gives each its share, such as layerwise or erk.'
      )
    rates = {f'params/{re.escape(p)}': r for p, r in given.rates.items()}
    kept = lookahead.lookahead_masks(
      given.variables, given.wiring, rates, order=order
    )['params']
    # What is kept ranks before what is not.
    unit = lambda s: s / jnp.maximum(jnp.max(s), jnp.finfo(s.dtype).tiny)
    return jax.tree.map(
      lambda mask, s: unit(s) + jnp.where(mask, 1, 0), kept, _lap(given)
    )

  return score


def _lap_act(given: Given) -> Any:
  """LAP of weights scaled by how often their unit is active, but the last."""
  last = list(given.wiring)[-1]

  def capture(batch):
    found = given.features(batch[0], inputs=False)
    named = {f'params/{path}': out for path, out in found.items()}
    return {p: jax.nn.relu(x) for p, x in named.items() if p != last}

  rates = lookahead.activation_rates(capture, given.batches)
  scaled = lookahead.scale_by_activation(given.variables, given.wiring, rates)
  return _lap(given, scaled['params'])


def _obd(given: Given) -> Any:
  return scores.obd(given.loss, given.params, given.sampled(), hessian='fisher')


def _obd_lap(given: Given) -> Any:
  saliencies = {'params': _obd(given)}
  return lookahead.obd(given.variables, saliencies, given.wiring)['params']


def _movement(given: Given) -> Any:
  gradient = jax.jit(jax.grad(given.loss))
  total = None
  for batch in given.batches:
    total = scores.movement(given.params, gradient(given.params, batch), total)
  return total


class Scale(NamedTuple):
  """The learned scale of the norm after a kernel."""

  path: str
  entries: Any  # Of the scale, for each of the side's; None: all in order.
  axes: tuple[int, ...]  # Of the kernel.


def scale_after(wire: lookahead.Wire) -> Scale | None:
  """Returns the scale of the norm after a kernel, if there is one."""
  if wire.writes is None:
    return None
  for norm in reversed(wire.writes.norms):
    if norm.scale is not None:
      return Scale(norm.scale, norm.entries, wire.writes.axes)
  return None


def _bn_scale(given: Given) -> Any:
  """|gamma| of the norm that follows; |w| where none does, as in the head."""
  vectors = tree.leaves(given.variables)

  def score(path, w):
    found = scale_after(given.wiring[f'params/{path}'])
    if found is None:
      return jnp.abs(w)
    gamma = jnp.abs(jnp.ravel(vectors[found.path]))
    if found.entries is not None:
      gamma = gamma[found.entries]
    shape = [n if i in found.axes else 1 for i, n in enumerate(w.shape)]
    return jnp.broadcast_to(gamma.reshape(shape), w.shape)

  return tree.map_with_path(score, scores.magnitude(given.params))


def _with_data(fn: Callable[..., Any]) -> Score:
  return lambda given: fn(given.loss, given.params, given.batches)


OF_WEIGHTS: Mapping[str, Score] = {
  'random': lambda given: scores.random(given.key, given.params),
  'magnitude': lambda given: scores.magnitude(given.params),
  'lap': _lap,
  'lap_after': lambda given: _lap(given, look='after'),
  'lap_before': lambda given: _lap(given, look='before'),
  'lap_forward': _sequential('forward'),
  'lap_backward': _sequential('backward'),
  'lamp': lambda given: scores.lamp(given.params),
  'fpgm': lambda given: scores.fpgm(given.params),
  'bn_scale': _bn_scale,
}
OF_DATA: Mapping[str, Score] = {
  'lap_act': _lap_act,
  'obd': _obd,
  'obd_exact': lambda given: scores.obd(
    given.loss, given.params, given.batches, hessian='exact'
  ),
  'obd_hutchinson': lambda given: scores.obd(
    given.loss, given.params, given.batches, key=given.key
  ),
  'obd_lap': _obd_lap,
  'snip': _with_data(scores.snip),
  'taylor': _with_data(scores.taylor),
  'grasp': _with_data(scores.grasp),
  'movement': _movement,
  'synflow': lambda given: scores.synflow(
    given.outputs, given.params, given.batches[0][0][:1]
  ),
  'wanda': lambda given: scores.wanda(
    lambda params, batch: given.features(batch[0], inputs=True),
    given.params,
    given.batches,
  ),
}
SCORES = {**OF_WEIGHTS, **OF_DATA}
SEQUENTIAL = ('lap_forward', 'lap_backward')  # Need the rate of each leaf.
SIGNED = ('grasp', 'movement', 'obd_exact', 'obd_hutchinson')  # May be < 0.

DISTRIBUTIONS: Mapping[str, Callable[[Any], distributions.Distribution]] = {
  'uniform': lambda graph: distributions.uniform,
  'uniform_plus': lambda graph: distributions.uniform_plus(
    *(kernels(structure.wiring(graph))[i] for i in (0, -1))
  ),
  'erk': lambda graph: distributions.erk,
  'global': lambda graph: distributions.global_,
  'normalised': lambda graph: distributions.normalised,
  'lamp': lambda graph: distributions.lamp,
  'macs': lambda graph: distributions.by_macs(macs_per_weight(graph)),
}

SCHEDULES: Mapping[str, Callable[[float, int], schedules.Schedule]] = {
  'one_shot': lambda s, end: schedules.constant(s),
  'iterative': lambda s, end: schedules.iterative(
    s, begin=0, end=end, rounds=10
  ),
  'linear': lambda s, end: schedules.polynomial(s, begin=0, end=end, power=1),
  'cubic': lambda s, end: schedules.cubic(s, begin=0, end=end),
  'cosine': lambda s, end: schedules.cosine(s, begin=0, end=end),
  'prune_then_regrow': lambda s, end: schedules.prune_then_regrow(
    (1 + s) / 2, s, begin=0, turn=end // 2, end=end
  ),
  'warm_restarts': lambda s, end: schedules.warm_restarts(
    s, begin=0, end=end, cycles=3
  ),
}


def check(score: str, distribution: str) -> None:
  """Raises if a distribution cannot take a score.

  Args:
    score: its name.
    distribution: its name; ``layerwise`` gives each leaf its share.

  Raises:
    ValueError: if there is none of these names, or if they do not go together.
  """
  if score not in SCORES:
    raise ValueError(
      f'No score is called {score!r}; there are {", ".join(SCORES)}.'
    )
  if distribution not in ('layerwise', *DISTRIBUTIONS):
    raise ValueError(
      f'No distribution is called {distribution!r}; there are layerwise, '
      f'{", ".join(DISTRIBUTIONS)}.'
    )
  if score in SEQUENTIAL and distribution in ('global', 'normalised', 'lamp'):
    raise ValueError(
      f'{score} prunes one leaf after the other and needs a distribution that '
      f'gives each its share, such as layerwise or erk, not {distribution}.'
    )
  if score in SIGNED and distribution in ('normalised', 'lamp'):
    raise ValueError(
      f'{score} may be below 0, and {distribution} divides by sums of squares: '
      f'take another distribution, such as global.'
    )


def check_norms(
  asked: Iterable[str], wiring: Mapping[str, lookahead.Wire]
) -> None:
  """Raises if a score of norms is asked for of a network that has none."""
  if 'bn_scale' in asked and not any(map(scale_after, wiring.values())):
    raise ValueError(
      'bn_scale is the scale of the norm after a kernel, and this network has '
      'no norm; take a --model with batch norm, or magnitude.'
    )


def granularity(text: str) -> masks.Granularity:
  """Returns the granularity of a text: element, channel, 2:4 or 4x4.

  ``4x4`` are blocks over the input and output axes of Linen kernels.

  Raises:
    ValueError: if the text is none of these.

  Examples:
    >>> granularity('2:4')
    NByM(n=2, m=4, axis=None)
  """
  plain = {'element': masks.elements, 'channel': masks.channels}
  if text in plain:
    return plain[text]()
  if found := re.fullmatch(r'(\d+):(\d+)', text):
    return masks.groups(int(found[1]), int(found[2]))
  if found := re.fullmatch(r'(\d+)x(\d+)', text):
    return masks.blocks({-2: int(found[1]), -1: int(found[2])})
  raise ValueError(
    f'A granularity is element, channel, n:m or axb, got {text!r}.'
  )


def kernels(wiring: Mapping[str, Any]) -> list[str]:
  """Returns the paths of the kernels in params, in the order of the network."""
  return [path.removeprefix('params/') for path in wiring]


def macs_per_weight(graph: Any) -> dict[str, float]:
  """Returns the multiply-adds of each kernel's layer over its weights."""
  macs = {row.name: row.macs for row in cost.layers(graph)}
  found = {}
  for path in kernels(structure.wiring(graph)):
    size = math.prod(graph.leaves[f'params/{path}'].shape)
    found[path] = macs[path.rsplit('/', 1)[0]] / size
  return found


def trace(module: Any, variables: Any, shape: tuple[int, ...]) -> Any:
  """Returns the graph of a network's eval form, by its variables."""
  one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return jp.trace(lambda v, x: module.apply(v, x), variables, one)
