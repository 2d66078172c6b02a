"""Recovery: what brings a pruned network back near the dense one.

Batch statistics are estimated again for the channels that are left, without a
gradient; and the dense network teaches the small one, by what it answers and by
what it computes on the way. All are pure functions of arrays.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks, tree
from jaxprune.checks import kinds

_LARGEST = 2.0**60  # Of a statistic; momenta are found by one of 2^96.


@kinds.checked
def batch_statistics(
  update: Callable[[tree.PyTree, Any], tree.PyTree],
  stats: tree.PyTree,
  batches: Iterable[Any],
) -> tree.PyTree:
  """Returns the statistics of all batches together, from the training form.

  A training step moves a statistic r to m r + (1 - m) b, b that of its batch.
  From r = 0 it gives (1 - m) b, without a sum that could round; and from a very
  large r it gives m, so that b is known whatever the momentum. Of batches of
  n_i examples with means b_i and variances v_i, n together, the whole has

    mean = sum_i n_i b_i / n,
    var  = sum_i n_i (v_i + (b_i - mean)^2) / n,

  whatever their order, and whatever ``stats`` held: no average that forgets.
  Each batch passes norms that use its own statistics, as in training.

  ``update`` runs on statistics of float32, even where ``stats`` is narrower,
  and once for each shape of batch in 64 bits to find m, which may depend on the
  number of examples, not on their values. Each b is then exact to a few
  roundings of float32, whatever m is. If ``update`` rounds the statistics to
  float32 even there, m is known to 2^-25 and b to a relative 2^-25 / (1 - m):
  3e-6 at 0.99, 3e-4 at 0.9999.

  Each v_i is what ``update`` calls the variance. If that is the unbiased one, a
  framework's n / (n - 1) of it for the n entries of a batch, so large is the
  part of v_i in the result: too much by one part in n - 1.

  Args:
    update: ``update(stats, batch) -> stats``, pure; with Flax Linen ``lambda
      stats, x: module.apply({'params': params, 'batch_stats': stats}, x,
      train=True, mutable=['batch_stats'])[1]['batch_stats']``.
    stats: a pytree of float arrays in pairs called ``mean`` and ``var``; only
      their paths, shapes and dtypes matter.
    batches: what ``update`` takes, one or more; the first axis of the first
      leaf of each counts its examples.

  Returns:
    A pytree like ``stats``; float64 in between, ``stats``'s dtypes at the end.

  Raises:
    ValueError: if there is no batch, a batch has no examples, or statistics
      that are not finite or above 2^60 (m is found beside 2^96), a leaf of
      ``stats`` has no partner, or ``update`` leaves a statistic as it was (it
      is the form for inference) or rounds it to fewer bits than float32 has.

  References:
    The variance of a union of samples, as of Chan, Golub and LeVeque (1979).
    Statistics of a network whose widths were cut are estimated again by Yu and
    Huang (2019, arXiv:1903.05134).

  Examples:
    >>> def update(stats, x):
    ...   return {
    ...     'mean': 0.9 * stats['mean'] + 0.1 * x.mean(0),
    ...     'var': 0.9 * stats['var'] + 0.1 * x.var(0),
    ...   }
    >>> stats = {'mean': jnp.zeros(1), 'var': jnp.ones(1)}
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[8.0]])]
    >>> whole = batch_statistics(update, stats, batches)
    >>> print(whole['mean'].round(2), whole['var'].round(2))
    [4.] [8.67]
  """
  pairs = _pairs(stats)
  wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
  zeros = jax.tree.map(wide, stats)
  call = jax.jit(update)
  shares: dict[Any, dict[str, np.ndarray]] = {}
  whole = {path: np.float64(0) for path in pairs}
  count = 0
  for i, batch in enumerate(batches):
    n = np.shape(jax.tree.leaves(batch)[0])[0]
    if not n:
      raise ValueError(
        f'Batch {i} has no examples: the first axis of its first leaf has '
        'length 0. Leave it out.'
      )
    moved = {
      path: np.asarray(leaf, np.float64)
      for path, leaf in tree.leaves(call(zeros, batch)).items()
    }
    _check_size(i, moved)
    kind = _kind(batch)
    if kind not in shares:
      shares[kind] = _shares(update, zeros, batch)
    of_batch = {path: moved[path] / shares[kind][path] for path in pairs}
    # Two samples of `count` and `n`: their union by its two halves, so that a
    # mean far from 0 is never squared.
    weight = n / (count + n)
    for path, mean in pairs.items():
      if path == mean:
        continue
      distance = of_batch[mean] - whole[mean]
      whole[mean] = whole[mean] + weight * distance
      spread = (1 - weight) * distance**2
      whole[path] = whole[path] + weight * (
        of_batch[path] - whole[path] + spread
      )
    count += n
  if not count:
    raise ValueError('Statistics need one batch or more, got none.')
  narrow = lambda path, leaf: jnp.asarray(
    np.maximum(whole[path], 0) if path != pairs[path] else whole[path],
    leaf.dtype,
  )
  return tree.map_with_path(narrow, stats)


def _pairs(stats: tree.PyTree) -> dict[str, str]:
  """The path of each statistic -> that of its mean; its own for a mean."""
  paths, pairs, odd = tree.leaves(stats), {}, []
  for path in paths:
    stem, _, name = path.rpartition('/')
    start = f'{stem}/' if stem else ''
    other = {'mean': f'{start}var', 'var': f'{start}mean'}.get(name)
    if other not in paths:
      odd.append(path)
    else:
      pairs[path] = path if name == 'mean' else other
  if odd:
    raise ValueError(
      f'Batch statistics come in pairs called "mean" and "var"; these have no '
      f'partner: {", ".join(odd)}.'
    )
  return pairs


def _kind(batch: Any) -> Any:
  """What a compiled update depends on: the structure, shapes and dtypes."""
  xs, structure = jax.tree.flatten(batch)
  return structure, tuple((np.shape(x), jnp.result_type(x)) for x in xs)


def _check_size(i: int, moved: dict[str, np.ndarray]) -> None:
  """Raises unless the statistics of a batch vanish beside a very large one."""
  large = [
    f'{path} (up to {np.max(abs(x)):.1e})'
    for path, x in moved.items()
    if not np.all(abs(x) <= _LARGEST)
  ]
  if large:
    raise ValueError(
      f'The statistics of batch {i} are not finite or too large: '
      f'{", ".join(large)}. Look for weights that diverged, or scale the data.'
    )


def _shares(
  update: Callable[[tree.PyTree, Any], tree.PyTree],
  zeros: tree.PyTree,
  batch: Any,
) -> dict[str, np.ndarray]:
  """The weight 1 - m of the batch in each statistic."""
  # Of 64 bits: in float32 0.9999 is 0.99989998, and 1 - m wrong by 2e-4.
  try:
    with jax.enable_x64(True):
      momenta, again = _momenta(update, zeros, batch, np.float64)
  except (TypeError, ValueError):  # A program that has no form in 64 bits.
    momenta, again = _momenta(update, zeros, batch, np.float32)
  # By two values that differ by 2^-20, which fewer bits than those of float32
  # cannot tell apart.
  differ = lambda m, n: not np.all(abs(m - n) <= 2**-22 * abs(m) + 2**-60)
  with np.errstate(invalid='ignore'):  # Both are infinite in float16.
    rounded = [path for path, m in momenta.items() if differ(m, again[path])]
  if rounded:
    raise ValueError(
      f'The update rounds statistics below float32: {", ".join(rounded)}; a '
      f'momentum near 1 is lost in that. Let it compute with the float32 '
      f'statistics that it is given; the result has the dtypes of `stats`.'
    )
  unmoved = [path for path, m in momenta.items() if np.any(m >= 1)]
  if unmoved:
    raise ValueError(
      f'The update leaves statistics as they were: {", ".join(unmoved)}; give '
      f'the training form of the network.'
    )
  return {path: 1 - m for path, m in momenta.items()}


def _momenta(
  update: Callable[[tree.PyTree, Any], tree.PyTree],
  zeros: tree.PyTree,
  batch: Any,
  dtype: Any,
) -> list[dict[str, np.ndarray]]:
  """What is left of a very large statistic, per unit of it; by two of them."""
  call = jax.jit(update)
  momenta = []
  for size in (2.0**96, 2.0**96 * (1 + 2**-20)):
    # So large that the batch's own statistics vanish beside it.
    fill = lambda x, size=size: jnp.full(x.shape, size, dtype)
    after = call(jax.tree.map(fill, zeros), batch)
    momenta.append(
      {
        path: np.asarray(leaf).astype(np.float64) / size
        for path, leaf in tree.leaves(after).items()
      }
    )
  return momenta


@kinds.checked
def logit_distillation(
  logits: jax.Array, teacher: jax.Array, *, temperature: float = 4.0
) -> jax.Array:
  """Returns the divergence from the teacher's softened answer, per example.

    T^2 KL(softmax(t / T) || softmax(z / T))

  The factor T^2 keeps the size of the gradients as T changes, so that a sum
  with the loss of the labels needs no new weight. No gradient reaches the
  teacher.

  Args:
    logits: z of the small network, float[..., classes].
    teacher: t of the dense network, of the same shape.
    temperature: T, above 0; static or traced.

  Returns:
    float[...].

  Raises:
    ValueError: if the shapes differ, or a static temperature is not above 0.

  References:
    Hinton, Vinyals and Dean (2015, arXiv:1503.02531), section 2; the cross
    entropy there is this divergence and a constant of the teacher.

  Examples:
    >>> z = jnp.array([0.0, 0.0])
    >>> print(logit_distillation(z, z))
    0.0
    >>> t = jnp.log(jnp.array([3.0, 1.0]))  # 3/4 and 1/4, against 1/2 and 1/2.
    >>> print(logit_distillation(z, t, temperature=1.0).round(4))
    0.1308
  """
  _check_shapes('logits', logits, teacher)
  checks.real('temperature', temperature, above=0)
  target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
  found = jax.nn.log_softmax(logits / temperature)
  divergence = jnp.sum(jnp.exp(target) * (target - found), axis=-1)
  return temperature**2 * divergence


@kinds.checked
def feature_distillation(
  features: jax.Array,
  teacher: jax.Array,
  *,
  kept: Any = None,
  axis: int = -1,
) -> jax.Array:
  """Returns half the squared distance from the teacher's features, by example.

    1/2 || u_k - r ||^2,

  u the features of the dense network, u_k those of the channels that were kept,
  r the small network's. FitNets lays a learned regressor over r, since its
  student has nothing in common with its teacher; a pruned network's channels
  are known by their indices. Apply one to ``features`` where there are none. No
  gradient reaches the teacher.

  Args:
    features: r, float[batch, ...].
    teacher: u, of the same shape, but for ``axis`` if ``kept`` is given.
    kept: int[n], the kept channels of the teacher, as a plan has them.
    axis: the channels.

  Returns:
    float[batch].

  Raises:
    ValueError: if the shapes differ after the choice of channels.

  References:
    Romero et al. (2015, arXiv:1412.6550), equation 3.

  Examples:
    >>> u = jnp.array([[1.0, 9.0, 5.0]])
    >>> print(feature_distillation(jnp.array([[3.0, 4.0]]), u, kept=[0, 2]))
    [2.5]
  """
  teacher = jax.lax.stop_gradient(teacher)
  if kept is not None:
    teacher = jnp.take(teacher, np.asarray(kept, int), axis)
  _check_shapes('features', features, teacher)
  difference = teacher - features
  return 0.5 * jnp.sum(
    difference * difference, axis=tuple(range(1, difference.ndim))
  )


def _check_shapes(what: str, found: jax.Array, teacher: jax.Array) -> None:
  if jnp.shape(found) != jnp.shape(teacher):
    raise ValueError(
      f'The {what} of the small network and of its teacher must have one '
      f'shape, got {jnp.shape(found)} and {jnp.shape(teacher)}.'
    )
