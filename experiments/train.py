"""Training as one pure function of (state, examples, key).

What a method adds is a link of the optax chain, and perhaps a view of the
params inside the loss. The data are on the device, and the examples of a step
depend on (seed, epoch, step) alone: a run resumes by its epoch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import augment, data, tree

Apply = Callable[..., Any]  # flax.linen's Module.apply.
Augment = Callable[[jax.Array, jax.Array], jax.Array]  # (key, images).
View = Callable[[Any, optax.OptState], Any]  # (params, state) -> params.


class State(NamedTuple):
  """What training changes."""

  params: Any
  stats: Any  # The other collections of Linen, such as batch statistics.
  opt_state: optax.OptState


class Examples(NamedTuple):
  """A split on the device."""

  images: jax.Array  # uint8, [n, height, width, channels].
  labels: jax.Array  # int32, [n].


class Metrics(NamedTuple):
  """Of one step, on its batch; scalars, or [steps] for several."""

  loss: jax.Array
  accuracy: jax.Array


Step = Callable[[State, Examples, jax.Array, jax.Array], tuple[State, Metrics]]


def variables(state: State) -> dict[str, Any]:
  """Returns the variables of Linen in a state."""
  return {'params': state.params, **state.stats}


def make_step(
  apply: Apply,
  tx: optax.GradientTransformation,
  prepare: Callable[[jax.Array], jax.Array],
  *,
  change: Augment,
  view: View = lambda params, _: params,
) -> Step:
  """Returns the training step of one batch.

  It maps (state, examples, rows, key) to (state, metrics), with
  loss = mean cross-entropy of apply(view(params, opt_state), batch), with the
  statistics of the batch in force.

  Args:
    apply: the network.
    tx: the optax chain; a method of pruning is its last link.
    prepare: uint8 images -> what the network takes.
    change: augmentation of the prepared images, a function of a key.
    view: the params as the network sees them, such as soft masks.
  """

  def step(state, examples, rows, key):
    images = change(key, prepare(examples.images[rows]))
    labels = examples.labels[rows]

    def loss_fn(params):
      seen = {'params': view(params, state.opt_state), **state.stats}
      logits, stats = apply(seen, images, train=True, mutable=list(state.stats))
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
      return jnp.mean(losses), (stats, accuracy)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (stats, accuracy)), grads = gradient(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, stats, opt_state), Metrics(loss, accuracy)

  return step


def make_runner(
  step: Step, *, seed: int, batch: int, fused: bool | None = None
) -> Callable[..., Any]:
  """Returns ``run(state, examples, epoch, begin, end) -> (state, metrics)``.

  It runs the steps begin..end-1 of an epoch, and takes the state over.

  Args:
    step: from :func:`make_step`.
    seed: of the order of the examples and of the augmentation.
    batch: examples of a step.
    fused: whether ``lax.scan`` makes one program of them, or each is a dispatch
      of its own; without it, fused but on CPU, where XLA's convolutions are
      several times slower inside a loop (170 ms for a step of 25 ms).
  """
  if fused is None:
    fused = jax.default_backend() != 'cpu'

  @jax.jit
  def order(epoch, labels):
    return data.epoch_batches(seed, epoch, size=len(labels), batch=batch)

  @functools.partial(jax.jit, donate_argnums=0)
  def one(state, examples, rows, epoch, i):
    return step(state, examples, rows[i], data.step_key(seed, epoch, i))

  @functools.partial(jax.jit, donate_argnums=0)
  def scan(state, examples, rows, epoch, steps):
    body = lambda s, i: step(
      s, examples, rows[i], data.step_key(seed, epoch, i)
    )
    return jax.lax.scan(body, state, steps)

  def run(state, examples, epoch, begin, end):
    rows = order(epoch, examples.labels)
    if fused:
      return scan(state, examples, rows, epoch, jnp.arange(begin, end))
    found = []
    for i in range(begin, end):
      state, metrics = one(state, examples, rows, epoch, i)
      found.append(metrics)
    return state, jax.tree.map(lambda *xs: jnp.stack(xs), *found)

  return run


def own(state: Any) -> Any:
  """Returns a copy of a state that a runner may take over (donate)."""
  return jax.tree.map(jnp.copy, state)


def optimizer(
  learning_rate: float, weight_decay: float, steps: int, *links: Any
) -> optax.GradientTransformation:
  """Returns SGD with momentum along a cosine, and ``links`` at the end.

  The rate rises over the first tenth of the steps and falls to zero; weight
  decay is on kernels alone.

  Args:
    learning_rate: the highest.
    weight_decay: coefficient of w in the gradient.
    steps: of the whole stage, at least 1.
    *links: what comes last in the chain.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, max(1, steps // 10), max(2, steps)
  )
  kernels = lambda params: tree.map_with_path(tree.is_prunable, params)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, kernels),
    optax.sgd(schedule, momentum=0.9, nesterov=True),
    *links,
  )


def make_evaluate(
  fn: Callable[[Any, jax.Array], jax.Array],
  prepare: Callable[[jax.Array], jax.Array],
) -> Callable[[Any, Examples], float]:
  """Returns ``evaluate(variables, examples) -> accuracy`` over every example.

  Args:
    fn: (variables, images) -> logits.
    prepare: uint8 images -> what the network takes.
  """

  @jax.jit
  def hits(variables, examples, rows, valid):
    logits = fn(variables, prepare(examples.images[rows]))
    right = jnp.argmax(logits, -1) == examples.labels[rows]
    return jnp.sum(right & valid)

  def evaluate(variables, examples):
    n = len(examples.labels)
    batches = zip(*data.eval_batches(n, min(n, 256)), strict=True)
    return sum(int(hits(variables, examples, r, v)) for r, v in batches) / n

  return evaluate


def interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
  """Returns the 95 % interval of an accuracy over n examples (Wilson, 1927).

  (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

  Examples:
    >>> low, high = interval(0.5, 96)
    >>> print(f'{low:.2f} {high:.2f}')
    0.40 0.60
  """
  middle = accuracy + z * z / (2 * n)
  spread = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
  low, high = (
    (middle - spread) / (1 + z * z / n),
    (middle + spread) / (1 + z * z / n),
  )
  return max(0.0, low), min(1.0, high)


def split_off(
  images: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> tuple[Examples, Examples | None]:
  """Returns (what to train on, what to validate on); None for a fraction of 0.

  Args:
    images: uint8, [n, ...].
    labels: int32, [n].
    fraction: of the examples that validate, in [0, 1).
    seed: that draws them.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  count = round(fraction * len(labels))
  part = lambda i: Examples(jnp.asarray(images[i]), jnp.asarray(labels[i]))
  if not count:
    return part(np.arange(len(labels))), None
  return part(np.sort(order[count:])), part(np.sort(order[:count]))


def preparation(images: np.ndarray) -> Callable[[jax.Array], jax.Array]:
  """Returns uint8 -> float32 of mean 0 and deviation 1, as over ``images``."""
  mean, deviation = augment.pixel_statistics(images)
  return lambda x: augment.normalise(x, mean, np.maximum(deviation, 1e-3))
