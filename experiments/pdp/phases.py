"""Training in three phases, the same for every method: dense, soft, frozen.

A method says what the loss sees of the params in the soft phase and how it
turns them into masks at the end of it; epochs, batches, learning rates and the
two moments of change are the same for all. Each run is a function of
(problem, method, seed, settings) alone.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import data, tree

CHUNKS = 40  # Parts of a run, between which masks may be drawn anew.
DENSE, FROZEN = 4, 30  # The chunks at which the soft and the last phase begin.

Hyper = Mapping[str, float]


class Split(NamedTuple):
  """Examples on the device."""

  inputs: jax.Array  # [n, ...].
  labels: jax.Array  # int32, [n].


class Problem(NamedTuple):
  """What is learned: the network, the data and the clock."""

  name: str
  apply: Callable[..., Any]  # (params, stats, inputs, train) -> logits, stats.
  start: Callable[[int], Any]  # seed -> (params, stats, targets or None).
  train: Split
  validation: Split
  test: Split
  tx: Callable[..., optax.GradientTransformation]  # Of (rate, decay).
  which: tree.Which
  epochs: int
  batch: int
  fused: bool  # Whether lax.scan runs the steps; slow for convolutions on CPU.
  distil: float = 0.0  # Weight of the teacher's logits in the loss.
  change: Callable[..., Any] = lambda key, inputs: inputs  # Augmentation.


class Method(NamedTuple):
  """What a method of pruning adds; the defaults are those of dense training.

  ``control`` is a pytree of the method's own. ``progress`` runs from 0 to 1
  over the soft phase.
  """

  grid: tuple[Hyper, ...]  # The settings tried on the validation split.
  # params, hyper -> further params to learn.
  extra: Callable[..., Any] = lambda params, hyper: {}
  # params, extra, hyper, sparsity -> control.
  begin: Callable[..., Any] = lambda params, extra, hyper, sparsity: {}
  # params, extra, control, hyper, sparsity, progress -> params, control.
  refresh: Callable[..., Any] = lambda params, extra, control, *_: (
    params,
    control,
  )
  # params, extra, control, hyper, progress -> params as the loss sees them.
  view: Callable[..., Any] = lambda params, *_: params
  # params, extra, control, hyper, sparsity -> params, masks.
  harden: Callable[..., Any] | None = None


class Lane(NamedTuple):
  """What training changes."""

  params: Any
  extra: Any
  stats: Any
  states: Any  # Of the optimizers of both.


class Outcome(NamedTuple):
  """What a run leaves."""

  lane: Lane
  masks: Any
  accuracy: float  # Of the last epoch under hard masks; in percent.
  zeros: float  # Fraction of the prunable weights.
  seconds: float  # CPU time.


Run = Callable[..., Outcome]


def runner(problem: Problem, method: Method) -> Run:
  """Returns ``run(seed, hyper, sparsity, split) -> Outcome``; compiles once.

  ``split`` names what the accuracy is of: 'validation' or 'test'.
  """
  steps = _rows(problem, 0).shape[1]
  total = CHUNKS * steps
  begin, end = DENSE * steps, FROZEN * steps

  def rate(t, peak):
    warm = jnp.minimum(1.0, (t + 1) / (0.05 * total))
    return peak * warm * 0.5 * (1 + jnp.cos(jnp.pi * t / total))

  def step(soft, lane, control, hyper, split, targets, rows, t, key):
    inputs = problem.change(key, split.inputs[rows])
    labels = split.labels[rows]
    progress = jnp.clip((t - begin) / (end - begin), 0.0, 1.0)

    def loss_fn(learned):
      params, extra = learned
      if soft:
        params = method.view(params, extra, control, hyper, progress)
      logits, stats = problem.apply(params, lane.stats, inputs, True)
      loss = jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      )
      if targets is not None:
        taught = jax.nn.softmax(targets[rows])
        far = jnp.mean(optax.safe_softmax_cross_entropy(logits, taught))
        loss = (1 - problem.distil) * loss + problem.distil * far
      return loss, stats

    learned = (lane.params, lane.extra)
    grads, stats = jax.grad(loss_fn, has_aux=True)(learned)
    peak = rate(t, hyper['rate'])
    txs = (
      problem.tx(peak, hyper.get('decay', 1.0)),
      problem.tx(peak * hyper.get('gain', 1.0), 0.0),
    )
    after = []
    for tx, g, s, p in zip(txs, grads, lane.states, learned, strict=True):
      updates, s = tx.update(g, s, p)
      after.append((optax.apply_updates(p, updates), s))
    (params, of_params), (extra, of_extra) = after
    if not soft:
      cut = lambda w, mask: jnp.where(mask, w, 0)
      params = tree.map_pruned(cut, params, control)
    return Lane(params, extra, stats, (of_params, of_extra))

  def key_at(seed, t):
    return jax.random.fold_in(jax.random.key(seed), t)

  @functools.partial(jax.jit, static_argnums=0)
  def one(soft, lane, control, hyper, split, targets, rows, t, seed):
    key = key_at(seed, t)
    return step(soft, lane, control, hyper, split, targets, rows, t, key)

  @functools.partial(jax.jit, static_argnums=0)
  def scan(soft, lane, control, hyper, split, targets, rows, t, seed):
    def body(lane, x):
      at, now = x
      key = key_at(seed, now)
      return step(
        soft, lane, control, hyper, split, targets, at, now, key
      ), None

    times = t + jnp.arange(rows.shape[0])
    return jax.lax.scan(body, lane, (rows, times))[0]

  def chunk(soft, lane, control, hyper, targets, rows, t, seed):
    args = (hyper, problem.train, targets)
    if problem.fused:
      return scan(soft, lane, control, *args, rows, t, seed)
    for i in range(rows.shape[0]):
      lane = one(soft, lane, control, *args, rows[i], t + i, seed)
    return lane

  evaluate = make_evaluate(problem)

  def run(seed, hyper, sparsity, split='test'):
    started = time.process_time()
    params, stats, targets = problem.start(seed)
    hyper = {k: jnp.float32(v) for k, v in hyper.items()}
    extra = method.extra(params, hyper)
    states = (
      problem.tx(0.0, 1.0).init(params),
      problem.tx(0.0, 0.0).init(extra),
    )
    lane = Lane(params, extra, stats, states)
    live = tree.prunable(params, problem.which)
    masks = control = jax.tree.map(lambda w: jnp.ones(w.shape, bool), live)
    rows = _rows(problem, seed)
    for i in range(CHUNKS):
      soft = DENSE <= i < FROZEN and method.harden is not None
      if i == DENSE and soft:
        control = method.begin(lane.params, lane.extra, hyper, sparsity)
      if soft:
        progress = jnp.float32((i - DENSE) / (FROZEN - DENSE))
        params, control = method.refresh(
          lane.params, lane.extra, control, hyper, sparsity, progress
        )
        lane = lane._replace(params=params)
      if i == FROZEN and method.harden:
        params, masks = method.harden(
          lane.params, lane.extra, control, hyper, sparsity
        )
        lane, control = lane._replace(params=params), masks
      t = jnp.int32(i * steps)
      lane = chunk(soft, lane, control, hyper, targets, rows[i], t, seed)
    accuracy = evaluate(lane.params, lane.stats, getattr(problem, split))
    size = tree.size(live)
    kernels = jax.tree.leaves(tree.restrict(masks, live))
    zeros = sum(int(jnp.sum(~mask)) for mask in kernels) / size
    seconds = time.process_time() - started
    return Outcome(lane, masks, 100 * accuracy, zeros, seconds)

  return run


def make_evaluate(problem: Problem) -> Callable[[Any, Any, Split], float]:
  """Returns ``evaluate(params, stats, split) -> accuracy`` in [0, 1]."""

  @jax.jit
  def hits(params, stats, split, rows, valid):
    logits, _ = problem.apply(params, stats, split.inputs[rows], False)
    return jnp.sum((jnp.argmax(logits, -1) == split.labels[rows]) & valid)

  def evaluate(params, stats, split):
    n = len(split.labels)
    batches = zip(*data.eval_batches(n, min(n, 500)), strict=True)
    return sum(int(hits(params, stats, split, r, v)) for r, v in batches) / n

  return evaluate


def logits(problem: Problem, params: Any, stats: Any) -> jax.Array:
  """Returns the logits of every training example, for a student to learn."""
  rows = np.arange(len(problem.train.labels))
  fn = jax.jit(lambda inputs: problem.apply(params, stats, inputs, False)[0])
  parts = [
    fn(problem.train.inputs[rows[k : k + 500]])
    for k in range(0, len(rows), 500)
  ]
  return jnp.concatenate(parts)


def _rows(problem: Problem, seed: int) -> jax.Array:
  """Returns the examples of every step; int32, [chunks, steps, batch]."""
  n = len(problem.train.labels)
  rng = np.random.default_rng(seed)
  epoch = n // problem.batch * problem.batch
  order = np.concatenate(
    [rng.permutation(n)[:epoch] for _ in range(problem.epochs)]
  )
  steps = max(1, order.size // problem.batch // CHUNKS)
  order = np.resize(order, CHUNKS * steps * problem.batch)
  return jnp.asarray(order.reshape(CHUNKS, steps, problem.batch), jnp.int32)
