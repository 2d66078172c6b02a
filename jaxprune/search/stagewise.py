"""Stage-wise pruning: sub-networks learn, and are judged, stage by stage.

A supernet with many layers has too many sub-networks to train them all. Cut
into stages it has few in each, and what a stage should compute is known: the
features of the full network. So the sub-networks of stage k learn from the full
network's feature before it to give the feature after it, and the error that is
left is the proxy by which a budget is shared out among the stages, exactly, by
a knapsack.

The widths of a stage are those of its inner groups, cut by prefix: the first c
units. Where stages meet the network stays whole.

References:
  Zhang, Yu, Rong and Ou (2020), Effective Model Compression via Stage-wise
  Pruning, arXiv:2011.04908; the losses follow Yu and Huang (2019),
  arXiv:1903.05134, and Li et al. (2020), arXiv:1911.13053.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks, cost, plans, tree
from jaxprune.checks import kinds
from jaxprune.numerics import sharding
from jaxprune.plans import recovery
from jaxprune.structure import Graph, trace
from jaxprune.structure.queries.stages import Stage

Widths = Sequence[Mapping[str, Any]]  # Of each stage: group -> int[...].
Task = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels).


class Losses(NamedTuple):
  """What a step minimises, and its parts."""

  total: jax.Array  # float32 [].
  task: jax.Array  # Of the full network; float32 [].
  stages: jax.Array  # Mean over the sub-networks of each; float32 [stages].
  logits: jax.Array  # Of the full network; float32 [batch, classes].


@kinds.checked
def graphs(
  stages: Sequence[Stage], params: tree.PyTree, x: Any
) -> tuple[Graph, ...]:
  """Returns the graph of each stage, traced on what the one before gives.

  Args:
    stages: functions ``stage(params, h) -> (h, new)``: what
      :func:`jaxprune.structure.cut` makes of the training form of a network, or
      a model's own, ``new`` a pytree with leaves of the params (``lambda v, h:
      net.apply(v, h, train=True, mutable=['batch_stats'], start=k, stop=k +
      1)``).
    params: what all of them take, arrays or shapes.
    x: what the first begins from, an array or a shape.

  Raises:
    ValueError: if a stage has no inner group, so that it has no sub-networks.
  """
  if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
    raise TypeError(f'`x` must be an array, got {kinds.shown(x)}.')
  found, spec = [], jax.ShapeDtypeStruct(x.shape, x.dtype)
  for number, stage in enumerate(stages):
    graph = trace(stage, params, spec)
    if not graph.groups:
      raise ValueError(
        f'Stage {number} of {len(stages)} has no inner group: nothing in it '
        f'can be narrowed while its ends stay whole; cut elsewhere.'
      )
    found.append(graph)
    spec, _ = jax.eval_shape(stage, params, spec)
  return tuple(found)


@kinds.checked
def choices(
  graph: Graph, fractions: Sequence[float], *, round_to: int = 1
) -> dict[str, np.ndarray]:
  """Returns the widths that each group of a stage may have, ascending.

  Args:
    graph: of the stage.
    fractions: of the full width, in (0, 1]; the full width is always one.
    round_to: widths but the full one are multiples of this, at least one.

  Returns:
    group -> int64[at least 1].

  Raises:
    ValueError: if a fraction is not in (0, 1].

  Examples:
    >>> params = {'a': jnp.ones((2, 8)), 'b': jnp.ones((8, 2))}
    >>> mlp = lambda p, x: (x @ p['a'] @ p['b'], {})
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> choices(graph, [0.25, 0.5])
    {'a': array([2, 4, 8])}
  """
  checks.whole('round_to', round_to, 1)
  for fraction in fractions:
    checks.real('fractions', fraction)
  wrong = [f for f in fractions if not 0 < f <= 1]
  if wrong:
    raise ValueError(f'Fractions must be in (0, 1], got {wrong}.')
  found = {}
  for name, group in graph.groups.items():
    raw = [round(f * group.size / round_to) * round_to for f in fractions]
    kept = {min(max(w, min(round_to, group.size)), group.size) for w in raw}
    found[name] = np.array(sorted(kept | {group.size}))
  return found


@kinds.checked
def sample(
  key: jax.Array,
  space: Sequence[Mapping[str, np.ndarray]],
  n: int,
  *,
  tiny: bool = True,
) -> list[dict[str, jax.Array]]:
  """Returns the widths of the sub-networks of one step.

  Args:
    key: that draws them.
    space: the :func:`choices` of each stage.
    n: random sub-networks, each group's width uniform over its choices; static.
    tiny: whether the narrowest comes first, in every step: without it the first
      units are trained more often than fairly (v2 of the paper). Static.

  Returns:
    For each stage group -> int32[n + tiny].

  Raises:
    ValueError: if that makes no sub-network.
  """
  if n + tiny < 1:
    raise ValueError('A step needs one sub-network or more: n, or tiny=True.')
  found = []
  for number, allowed in enumerate(space):
    at = jax.random.fold_in(key, number)
    widths = {}
    for k, (name, values) in enumerate(allowed.items()):
      drawn = jax.random.choice(
        jax.random.fold_in(at, k), jnp.asarray(values, jnp.int32), (n,)
      )
      first = jnp.full((int(tiny),), int(values[0]), jnp.int32)
      widths[name] = jnp.concatenate([first, drawn])
    found.append(widths)
  return found


@kinds.checked
def prefix(graph: Graph, widths: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Returns the masks that keep the first units: bool[..., size].

  Args:
    graph: of the stage.
    widths: group -> int[...], traced or not.

  Examples:
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 2))}
    >>> mlp = lambda p, x: x @ p['a'] @ p['b']
    >>> graph = trace(mlp, params, jnp.ones((1, 2)))
    >>> print(prefix(graph, {'a': 2})['a'])
    [ True  True False]
  """
  odd = [name for name in widths if name not in graph.groups]
  if odd:
    raise ValueError(
      f'There is no group {", ".join(odd)}; the groups are: '
      f'{", ".join(graph.groups)}.'
    )

  def one(name: str, width: Any) -> jax.Array:
    width = jnp.asarray(width)
    shape = (*width.shape, graph.groups[name].size)
    index = jax.lax.broadcasted_iota(width.dtype, shape, width.ndim)
    return index < jnp.expand_dims(width, -1)

  return {name: one(name, width) for name, width in widths.items()}


@kinds.checked
def losses(
  stages: Sequence[Graph],
  params: tree.PyTree,
  x: jax.Array,
  labels: jax.Array,
  widths: Widths,
  *,
  task: Task,
  teacher: tree.PyTree | None = None,
  source: Literal['full', 'chain'] = 'full',
  temperature: float = 1.0,
) -> tuple[Losses, dict[str, jax.Array]]:
  """Returns the loss of one step, and the statistics of the full network.

  With F_0 = x and F_k = f_k(F_{k-1}) of the full network, sg the end of every
  gradient, and c over the sub-networks of a stage,

    L   = task(F_N, y) + sum_k mean_c L_k(c),
    L_k = mean (f_k(sg F_{k-1}; c) - sg F_k)^2 / var(sg F_k),  k < N,
    L_N = T^2 KL(softmax(sg F_N / T) || softmax(f_N(sg F_{N-1}; c) / T)).

  The weights are shared, the gradient of L_k reaches those of stage k alone.

  Args:
    stages: the :func:`graphs` of the training form.
    params: what the stages take; the full network's weights.
    x: the batch.
    labels: of the batch, what ``task`` takes.
    widths: of the sub-networks, from :func:`sample`; each leaf int32[m].
    task: (logits, labels) -> float[batch].
    teacher: params of a full network trained before, whose features are the
      targets (v1 of the paper); the task loss is then no part of the total.
      Without them the full network learns and teaches in one step (v2).
    source: what a sub-network of stage k begins from: 'full', the feature of
      the full network, or 'chain', what the same sub-network of stage k - 1
      gave, gradient ended (an ablation).
    temperature: T.

  Returns:
    :class:`Losses`, and path -> value of the leaves that the full network hands
    back: its batch statistics (:func:`updated`). Sub-networks hand back none.

  Raises:
    ValueError: if there are not as many widths as stages.
  """
  if len(widths) != len(stages):
    raise ValueError(
      f'There are {len(stages)} stages, and the widths of {len(widths)}.'
    )
  stop = jax.lax.stop_gradient
  taught = params if teacher is None else teacher
  h, new, per_stage, small = x, {}, [], None
  for number, (graph, chosen) in enumerate(zip(stages, widths, strict=True)):
    feature = h
    h, found = graph.fn(taught, h)
    new |= _handed_back(graph, found) if teacher is None else {}
    if small is None or source == 'full':
      small, axis = feature, None
    else:
      axis = 0
    small = _sub_networks(graph, params, chosen, stop(small), axis)
    errors = jax.vmap(
      functools.partial(
        _error,
        target=stop(h),
        last=number == len(stages) - 1,
        temperature=temperature,
      )
    )(small)
    per_stage.append(jnp.mean(errors))
  of_task = jnp.mean(task(h, labels))
  by_stage = jnp.stack(per_stage)
  total = jnp.sum(by_stage) + (of_task if teacher is None else 0.0)
  return Losses(total, of_task, by_stage, h), new


@kinds.checked
def updated(params: tree.PyTree, new: Mapping[str, Any]) -> tree.PyTree:
  """Returns params with what stages handed back in its place.

  Args:
    params: what the stages take.
    new: path -> value, from :func:`losses`.
  """
  return tree.map_with_path(lambda path, leaf: new.get(path, leaf), params)


@kinds.checked
def proxy(
  graph: Graph,
  params: tree.PyTree,
  h: jax.Array,
  target: jax.Array,
  widths: Mapping[str, Any],
  *,
  last: bool = False,
) -> jax.Array:
  """Returns how far each sub-network of a stage is from the full one.

  L_k of :func:`losses` on held-out features. In the training form each is
  normalised by its own statistics on these very examples, so that those of the
  full network spoil no judgement; make the batch large.

  Args:
    graph: of the stage, in the training form.
    params: what the stage takes.
    h: the full network's feature before the stage.
    target: its feature after it.
    widths: group -> int[n], the candidates; traced or not.
    last: whether the target are logits.

  Returns:
    float32[n].
  """
  small = _sub_networks(graph, params, widths, h, None)
  error = functools.partial(_error, target=target, last=last, temperature=1.0)
  return jax.vmap(error)(small)


def _handed_back(graph: Graph, found: Any) -> dict[str, Any]:
  """Path -> value of the leaves that a stage computes anew.

  A model hands back all its statistics, those of other stages as they were.
  """
  given, results = set(graph.program.inputs), graph.program.outputs[1:]
  leaves = zip(tree.leaves(found).items(), results, strict=True)
  return {path: x for (path, x), value in leaves if value not in given}


def _sub_networks(
  graph: Graph,
  params: tree.PyTree,
  widths: Mapping[str, Any],
  h: jax.Array,
  axis: int | None,
) -> jax.Array:
  """What sub-networks of a stage make of one feature, or each of its own."""
  call, units = plans.supernet(graph), prefix(graph, widths)
  run = lambda units, h: call(params, units, {}, h)[0]
  if max(sharding.parts(h)) == 1:
    return jax.vmap(run, (0, axis))(units, h)
  # A batch that explicit axes of a mesh split cannot be merged with another.
  if axis is None:
    return jax.lax.map(lambda units: run(units, h), units)
  return jax.lax.map(lambda both: run(*both), (units, h))


def _error(
  found: jax.Array, target: jax.Array, last: bool, temperature: float
) -> jax.Array:
  if last:
    return jnp.mean(
      recovery.logit_distillation(found, target, temperature=temperature)
    )
  return jnp.mean((found - target) ** 2) / (jnp.var(target) + 1e-12)


@kinds.checked
def knapsack(
  values: Sequence[Any], costs: Sequence[Any], limit: int
) -> tuple[int, ...]:
  """Returns which candidate of each stage to take: the exact optimum.

    min sum_k values[k][i_k]  subject to  sum_k costs[k][i_k] <= limit.

  The multiple-choice knapsack over pairs (cost, value) that no other pair
  betters in both (Dyer, 1984); costs are whole numbers and stay so.

  Args:
    values: for each stage float[candidates], smaller is better.
    costs: for each stage int[candidates].
    limit: of the sum of the costs.

  Returns:
    One index a stage; of equal sums the cheaper.

  Raises:
    ValueError: if even the cheapest cost more than the limit, costs are not
      whole, or values are not finite, or not as many as costs.

  Examples:
    >>> knapsack([[3.0, 1.0], [2.0, 0.0]], [[1, 2], [1, 3]], limit=4)
    (1, 0)
  """
  points: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
  for k, price in enumerate(costs):
    if not np.array_equal(price, np.floor(price)):
      raise ValueError(f'The costs of stage {k} must be whole, got {price}.')
  least = sum(int(np.min(c)) for c in costs)
  if least > limit:
    raise ValueError(
      f'The cheapest candidates together cost {least}, above the limit of '
      f'{limit}.'
    )
  for k, (value, price) in enumerate(zip(values, costs, strict=True)):
    v, c = np.asarray(value, float), np.asarray(price)
    if v.shape != c.shape or not np.all(np.isfinite(v)):
      raise ValueError(
        f'Stage {k} needs a finite value for each of its costs, got values of '
        f'shape {v.shape} and costs of shape {c.shape}.'
      )
    pairs = sorted(
      (cost + int(c[i]), total + float(v[i]), (*index, i))
      for cost, total, index in points
      for i in range(len(v))
      if cost + int(c[i]) <= limit
    )
    points, best = [], np.inf
    for pair in pairs:
      if pair[1] < best:
        points.append(pair)
        best = pair[1]
  return min(points, key=lambda pair: (pair[1], pair[0]))[2]


@kinds.checked
def macs(
  graph: Graph,
  widths: Mapping[str, Any],
  *,
  assume: Mapping[str, int] | None = None,
) -> np.ndarray:
  """Returns the exact multiply-adds of candidates of a stage: int64[n].

  Args:
    graph: of the stage.
    widths: group -> int[n].
    assume: as :func:`jaxprune.cost.macs`.

  Raises:
    ValueError: as :func:`jaxprune.cost.macs`.
  """
  whole = cost.variables(graph)
  arrays = {name: np.asarray(w, np.int64) for name, w in widths.items()}
  return np.asarray(
    cost.evaluate(
      cost.macs_polynomial(graph, assume=assume), {**whole, **arrays}
    )
  )


@kinds.checked
def plan(graph: Graph, widths: Widths) -> plans.Plan:
  """Returns the plan of the whole network: each stage at its widths.

  Args:
    graph: of the whole network.
    widths: for each stage group -> int, of one candidate.

  Raises:
    ValueError: if the whole network has no such group.
  """
  merged = {name: int(w) for part in widths for name, w in part.items()}
  return plans.from_widths(graph, merged)
