"""Supernets: the weight step, the vector step and the loop around both."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import flags, recipes, train
from experiments.joint.tasks import Task
from jaxprune import data, report
from jaxprune.io import checkpoint
from jaxprune.search import estimator, joint
from jaxprune.structure.sizes import padded


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
  _, stats = parted(task.initial)

  def loss(params, vector, images, labels, side):
    if side is not None:
      images = padded.resize(images, side)
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
      found = []
      for start in range(0, len(vectors), config.n):
        # Always n of them, the last of them again: one program for any number.
        some = vectors[start : start + config.n]
        some = [*some, *some[-1:] * (config.n - len(some))]
        stacked = jax.tree.map(lambda *xs: np.array(xs), *some)
        found.append(np.asarray(many(params, stacked, examples, rows)))
      return np.concatenate(found)[: len(vectors)]
    return np.array(
      [float(one(params, v, examples, rows, v.side)) for v in vectors]
    )

  def step(params, opt_state, vector, examples, rows, key):
    side = None if on_canvas else vector.side
    return weights(params, opt_state, vector, examples, rows, key, side)

  return Steps(step, losses, tx)


def parted(variables: Any) -> tuple[Any, Any]:
  """Returns (params, the other collections)."""
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

  Raises:
    BadInputError: if the loss is no number any more.
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

  params, _ = parted(task.initial)
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
        if not np.isfinite(loss):
          raise flags.BadInputError(
            f'The supernet of {folder.name} has the loss {loss} after '
            f'{step + 1} steps: lower --learning_rate.'
          )
        keeper.save(step + 1, state)
  return state, report.read_metrics(log) if moves else []


def _start(task: Task, space: joint.Space) -> joint.PruningVector:
  """Where the vector starts: on the budget, all coordinates narrowed."""
  ones = jax.tree.map(lambda _: 1.0, space.high)
  return joint.project(space, task.cost, target_of(task), ones, tolerance=0.05)


def target_of(task: Task) -> int:
  """Returns the multiply-adds that may remain."""
  return int(task.limit)
