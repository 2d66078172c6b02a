"""Training as one pure function of (state, examples, key).

What a method adds is a link of the optax chain, and perhaps a view of the
params inside the loss. The data are on the device, or stream there, and the
examples of a step depend on (seed, epoch, step) alone: a run resumes by its
epoch, and is the same on one device, on several under ``jit``, and under
``pmap``.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import data
from jaxprune.data import augment

Apply = Callable[..., Any]  # flax.linen's Module.apply.
Augment = Callable[[jax.Array, jax.Array], jax.Array]  # (key, images).
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
View = Callable[[Any, optax.OptState], Any]  # (params, state) -> params.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # See make_step.
Teacher = Callable[[jax.Array], jax.Array]  # Prepared images -> logits.
Parallel = Literal['jit', 'pmap']
AXIS = 'devices'  # Over which a batch is split.
_DROPOUT, _MIX = 0x64726F70, 0x6D697865  # Keys beside that of `change`.


class State(NamedTuple):
  """What training changes."""

  params: Any
  stats: Any  # The other collections of Linen, such as batch statistics.
  opt_state: optax.OptState


class Examples(NamedTuple):
  """A split on the device."""

  images: jax.Array  # [n, height, width, channels]; uint8 as a rule.
  labels: jax.Array  # int32, [n].


class Stream(NamedTuple):
  """A split that is read as training goes, too large for the device."""

  # (first step over all epochs) -> (images, labels) of it and of those after
  # it, the examples that `data.epoch_batches` names.
  begin: Callable[[int], Iterator[tuple[Any, Any]]]
  size: int  # Examples.


class Metrics(NamedTuple):
  """Of one step, on its batch; scalars, or [steps] for several."""

  loss: jax.Array
  accuracy: jax.Array


Step = Callable[..., tuple[State, Metrics]]


def variables(state: State) -> dict[str, Any]:
  """Returns the variables of Linen in a state."""
  return {'params': state.params, **state.stats}


def cross_entropy(
  logits: jax.Array, labels: jax.Array, images: jax.Array
) -> jax.Array:
  """Returns -sum_c target_c log softmax(logits)_c of each example.

  Args:
    logits: float, [batch, classes].
    labels: int, [batch], or the targets; float, [batch, classes].
    images: not used.
  """
  del images
  if labels.ndim == logits.ndim:
    return optax.softmax_cross_entropy(logits, labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_step(
  apply: Apply,
  tx: optax.GradientTransformation,
  prepare: Callable[[jax.Array], jax.Array],
  *,
  change: Augment,
  mix: Mix | None = None,
  view: View = lambda params, _: params,
  loss: Loss = cross_entropy,
) -> Step:
  """Returns the training step of one batch.

  It maps (state, examples, rows, key) to (state, metrics), with the mean of
  loss(apply(view(params, opt_state), images), labels, images) over the batch
  and the statistics of the batch in force. With ``axis``, the name of a mapped
  axis, each of its devices takes its part of the rows, and gradients,
  statistics and metrics are the means over the devices. A network drops out by
  the key of the step, under such an axis by one of each device.

  Args:
    apply: the network; takes ``rngs``.
    tx: the optax chain; a method of pruning is its last link.
    prepare: images as stored -> what the network takes.
    change: augmentation of the prepared images, a function of a key.
    mix: (key, images, labels) -> (images, targets), after ``change``; targets
      are float, [batch, classes], and the labels of ``loss``. With
      ``augment.mixup``, which takes one-hot labels:
      ``lambda key, x, y: augment.mixup(key, x, jax.nn.one_hot(y, classes))``.
    view: the params as the network sees them, such as soft masks.
    loss: (logits, labels, images) -> float[batch].
  """

  def step(state, examples, rows, key, axis=None):
    # The whole batch is drawn and changed everywhere, so that its numbers do
    # not depend on how many devices share it.
    images = change(key, prepare(examples.images[rows]))
    labels = targets = examples.labels[rows]
    if mix is not None:
      images, targets = mix(jax.random.fold_in(key, _MIX), images, labels)
    dropout = jax.random.fold_in(key, _DROPOUT)
    if axis is not None:
      images, labels, targets = (
        _part(x, axis) for x in (images, labels, targets)
      )
      dropout = jax.random.fold_in(dropout, jax.lax.axis_index(axis))

    def loss_fn(params):
      seen = {'params': view(params, state.opt_state), **state.stats}
      logits, stats = apply(
        seen,
        images,
        train=True,
        mutable=list(state.stats),
        rngs={'dropout': dropout},
      )
      accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
      return jnp.mean(loss(logits, targets, images)), (stats, accuracy)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    found = gradient(state.params)
    if axis is not None:
      found = jax.lax.pmean(found, axis)
    (value, (stats, accuracy)), grads = found
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, stats, opt_state), Metrics(value, accuracy)

  return step


def _part(x: jax.Array, axis: str) -> jax.Array:
  """The share of a batch that belongs to this device."""
  size = x.shape[0] // jax.lax.axis_size(axis)
  start = jax.lax.axis_index(axis) * size
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def make_runner(
  step: Step,
  *,
  seed: int,
  batch: int,
  fused: bool | None = None,
  devices: int = 1,
  parallel: Parallel = 'jit',
) -> Callable[..., Any]:
  """Returns ``run(state, examples, epoch, begin, end) -> (state, metrics)``.

  It runs the steps begin..end-1 of an epoch, and takes the state over. The
  examples are :class:`Examples`, or a :class:`Stream` of them, whose steps are
  dispatched one by one. Over several devices a batch is split, and the state
  that comes in and goes out is on one. Under 'jit' the step is that of one
  device, partitioned by the compiler: batch norms see the whole batch. Under
  'pmap' each device normalises its own part.

  Args:
    step: from :func:`make_step`.
    seed: of the order of the examples and of the augmentation.
    batch: examples of a step, a multiple of ``devices``.
    fused: whether ``lax.scan`` makes one program of them, or each is a dispatch
      of its own; without it, fused but on CPU, where XLA's convolutions are
      several times slower inside a loop (170 ms for a step of 25 ms).
    devices: how many share a batch, the first that JAX lists.
    parallel: 'jit' or 'pmap'.

  Raises:
    ValueError: if there are fewer devices, or they do not divide the batch.
  """
  if devices > len(jax.devices()):
    raise ValueError(
      f'{devices} devices were asked for, JAX sees {len(jax.devices())}.'
    )
  if batch % devices:
    raise ValueError(
      f'A batch of {batch} cannot be split over {devices} devices; take '
      f'{batch - batch % devices or devices}.'
    )
  if fused is None:
    fused = jax.default_backend() != 'cpu'

  @jax.jit
  def order(epoch, labels):
    return data.epoch_batches(seed, epoch, size=len(labels), batch=batch)

  mapped = parallel == 'pmap' and devices > 1
  axis = AXIS if mapped else None
  mesh = Mesh(np.asarray(jax.devices()[:devices]), (AXIS,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  shared = NamedSharding(mesh, PartitionSpec(AXIS))

  def one(state, examples, rows, epoch, i):
    rows = rows[i]
    if devices > 1 and not mapped:
      rows = jax.lax.with_sharding_constraint(rows, shared)
    return step(state, examples, rows, data.step_key(seed, epoch, i), axis=axis)

  def several(state, examples, rows, epoch, steps):
    body = lambda s, i: one(s, examples, rows, epoch, i)
    return jax.lax.scan(body, state, steps)

  def compiled(fn):
    if not mapped:
      return jax.jit(fn, donate_argnums=0)
    return jax.pmap(
      fn,
      AXIS,
      in_axes=(0, 0, None, None, None),
      devices=jax.devices()[:devices],
      donate_argnums=0,
    )

  one_step, all_steps = compiled(one), compiled(several)

  @jax.jit
  def copies(tree):
    spread = lambda x: jnp.broadcast_to(x, (devices, *x.shape))
    return jax.lax.with_sharding_constraint(jax.tree.map(spread, tree), shared)

  def place(tree):
    tree = jax.device_put(tree, everywhere)
    return copies(tree) if mapped else tree

  def collect(tree):
    if mapped:
      tree = jax.tree.map(lambda x: x[0], tree)
    return jax.device_put(tree, jax.devices()[0]) if devices > 1 else tree

  # Examples go to the devices once, and stay there; a stream is read on.
  kept: list[tuple[Examples, Examples]] = []
  reading: list[tuple[Stream, int, Iterator[Any]]] = []

  def placed(examples):
    if devices == 1:
      return examples
    if not kept or kept[0][0] is not examples:
      kept[:] = [(examples, place(examples))]
    return kept[0][1]

  def streamed(stream, at, count):
    found = reading.pop() if reading else None
    if found is None or found[:2] != (stream, at):
      found = stream, at, data.prefetch(stream.begin(at))
    for _ in range(count):
      examples = Examples(*next(found[2]))
      yield place(examples) if devices > 1 else examples
    reading.append((stream, at + count, found[2]))

  def run(state, examples, epoch, begin, end):
    streams = isinstance(examples, Stream)
    if streams:  # A batch is all the examples of its step.
      steps = examples.size // batch
      rows = jnp.broadcast_to(jnp.arange(batch), (steps, batch))
      batches = streamed(examples, epoch * steps + begin, end - begin)
    else:
      rows = order(epoch, examples.labels)
      batches = itertools.repeat(placed(examples), end - begin)
    if devices > 1:
      state, rows = place(state), jax.device_put(rows, everywhere)
    if fused and not streams:
      state, metrics = all_steps(
        state, next(batches), rows, epoch, jnp.arange(begin, end)
      )
      return collect(state), collect(metrics)
    found = []
    for i, examples in enumerate(batches, begin):
      state, metrics = one_step(state, examples, rows, epoch, i)
      found.append(collect(metrics))
    return collect(state), jax.tree.map(lambda *xs: jnp.stack(xs), *found)

  return run


def own(state: Any) -> Any:
  """Returns a copy of a state that a runner may take over (donate)."""
  return jax.tree.map(jnp.copy, state)


def make_evaluate(
  fn: Callable[[Any, jax.Array], jax.Array],
  prepare: Callable[[jax.Array], jax.Array],
) -> Callable[[Any, Examples], float]:
  """Returns ``evaluate(variables, examples) -> accuracy`` over every example.

  Args:
    fn: (variables, images) -> logits.
    prepare: images as stored -> what the network takes.
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


def split_rows(
  size: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows to train on and those to validate on, both ascending.

  Args:
    size: number of examples.
    fraction: of the examples that validate, in [0, 1).
    seed: that draws them.
  """
  order = np.random.default_rng(seed).permutation(size)
  count = round(fraction * size)
  return np.sort(order[count:]), np.sort(order[:count])


def split_off(
  images: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> tuple[Examples, Examples | None]:
  """Returns (what to train on, what to validate on); None for no example.

  Args:
    images: [n, ...].
    labels: int32, [n].
    fraction: of the examples that validate, in [0, 1).
    seed: that draws them.
  """
  rest, held = split_rows(len(labels), fraction, seed)
  part = lambda i: Examples(jnp.asarray(images[i]), jnp.asarray(labels[i]))
  return part(rest), part(held) if held.size else None


def preparation(images: np.ndarray) -> Callable[[jax.Array], jax.Array]:
  """Returns pixels -> float32 of mean 0 and deviation 1, as ``images``."""
  mean, deviation = augment.pixel_statistics(images)
  # A channel that does not vary stays as it is, whatever the unit of pixels.
  varies = deviation > 1e-6 * np.abs(mean)
  scale = np.where(varies, deviation, np.float32(1))
  return lambda x: augment.normalise(x, mean, scale)
