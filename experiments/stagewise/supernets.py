"""Supernets: the training step of each kind, and what it costs."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import evidence, recipes, timing, train
from experiments.stagewise.tasks import Task
from jaxprune import data, plans, tree
from jaxprune.io import checkpoint
from jaxprune.search import stagewise


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
        task=cross_entropy, teacher=teacher, source=config.source,
      )  # fmt: skip
      return found.total, new
    if kind == 'full':
      logits, state = task.graph.fn(variables, images)
      return jnp.mean(cross_entropy(logits, labels)), tree.leaves(state)
    units = {}
    drawn = stagewise.sample(key, task.space, 1, tiny=False)
    for graph, widths in zip(task.stages, drawn, strict=True):
      one = {name: w[0] for name, w in widths.items()}
      units |= stagewise.prefix(graph, one)
    logits, _ = whole(variables, units, {}, images)
    return jnp.mean(cross_entropy(logits, labels)), {}

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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the loss of each example."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
