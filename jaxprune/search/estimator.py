"""A gradient from losses alone: natural evolution for what has no derivative.

The width of a layer, the depth of a stage and the side of an image have no
derivative, their expected loss under Gaussian noise has:

  J(m) = E loss(m + s e), e ~ N(0, I);  dJ/dm = E loss(m + s e) e / s,

estimated from n losses on one batch. :func:`estimator` is a pair in the way of
optax, whose optimizers take the gradient; a loss is a function of n vectors at
once, which :func:`chunked` and :func:`spread` divide over time and devices.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import checks, tree
from jaxprune.checks import kinds

Baseline = Literal['none', 'mean', 'standard']
Directions = Literal['normal', 'rademacher']
Losses = Callable[[Any], jax.Array]  # n vectors, stacked -> float32[n].


class Estimate(NamedTuple):
  """A gradient and how far to trust it."""

  gradient: Any  # Like the vector.
  spread: Any  # Gradient of J by log s, like the vector.
  variance: jax.Array  # Of the gradient: sum over coordinates; float32 [].
  signal: jax.Array  # |gradient|^2 / variance; float32 [].


class EstimatorState(NamedTuple):
  """State of :func:`estimator`; the figures are those of the last step."""

  key: jax.Array  # Typed key.
  step: jax.Array  # int32 [].
  sigma: Any  # Like the vector; float32.
  losses: jax.Array  # float32 [n].
  variance: jax.Array  # float32 [].
  signal: jax.Array  # float32 [].


class Estimator(NamedTuple):
  """What :func:`estimator` returns; ``update`` is ``tell`` after ``ask``."""

  init: Callable[[Any, jax.Array], EstimatorState]
  ask: Callable[[EstimatorState, Any], Any]
  tell: Callable[[EstimatorState, Any, jax.Array], tuple[Any, EstimatorState]]
  update: Callable[[Losses, EstimatorState, Any], tuple[Any, EstimatorState]]


@kinds.checked
def directions(
  key: jax.Array,
  mean: tree.PyTree,
  n: int,
  *,
  kind: Directions = 'normal',
  antithetic: bool = True,
) -> tree.PyTree:
  """Returns n random directions of mean 0 and variance 1.

  Args:
    key: the same key gives the same directions, on every device.
    mean: the vector, a pytree of float arrays.
    n: how many, static; even if antithetic.
    kind: 'normal', or 'rademacher': -1 or 1 (SPSA).
    antithetic: whether the second half is the first with the other sign.

  Returns:
    A pytree like ``mean``, each leaf float32[n, ...].
  """
  draw = jax.random.normal if kind == 'normal' else jax.random.rademacher
  leaves, structure = jax.tree.flatten(mean)
  count = n // 2 if antithetic else n
  drawn = [
    draw(k, (count, *jnp.shape(leaf)), jnp.float32)
    for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
  ]
  if antithetic:
    drawn = [jnp.concatenate([x, -x]) for x in drawn]
  return jax.tree.unflatten(structure, drawn)


@kinds.checked
def estimate(
  noise: tree.PyTree,
  losses: jax.Array,
  sigma: tree.PyTree,
  *,
  baseline: Baseline = 'standard',
  antithetic: bool = True,
) -> Estimate:
  """Returns the gradient of the smoothed loss from n losses.

  g = 1/n sum_i a_i e_i / s, with a_i the loss less a baseline:

  - 'none': a_i = l_i;
  - 'mean': less the mean of the other losses, n / (n - 1) (l_i - mean l); of
    antithetic pairs less the mean, which falls out. Unbiased, as 'none' is;
  - 'standard': (l_i - mean l) / (sd l + 1e-8), the size of the losses does not
    matter; along the gradient only in expectation of the direction.

  The gradient by log s is 1/n sum_i b_i (e_i^2 - 1), with b_i the same of the
  losses, or of the means of the pairs. A loss that is not finite counts as the
  largest of those that are; where none is, both gradients are 0.

  Args:
    noise: from :func:`directions`.
    losses: float32[n], of the vectors m + s e.
    sigma: s, a pytree like the vector.
    baseline: one of the three.
    antithetic: as the directions were drawn.

  References:
    Wierstra et al. (2014), Natural evolution strategies, arXiv:1106.4487,
    section 3; Spall (1992), IEEE TAC 37(3), for pairs and signs (SPSA). That
    JointPruning (Liu et al., 2020, arXiv:2005.08931) uses it in this form is
    our reading of its "adapted stochastic gradient estimation".

  Examples:
    >>> noise, losses = jnp.array([1.0, -1.0]), jnp.array([5.0, 1.0])
    >>> float(estimate(noise, losses, 0.5, baseline='none').gradient)
    4.0
  """
  n = losses.shape[0]
  losses = _finite(losses.astype(jnp.float32))
  centred, size = _centre(losses, baseline, exact=not antithetic)
  paired = losses
  half = lambda e: e
  samples = jax.tree.map(
    lambda e, s: e * _like(centred / size, e) / jnp.asarray(s)[None],
    noise,
    sigma,
  )
  if antithetic:
    half = lambda e: e[: n // 2]
    paired = jnp.mean(losses.reshape(2, n // 2), axis=0)
    samples = jax.tree.map(
      lambda g: jnp.mean(g.reshape(2, n // 2, *g.shape[1:]), axis=0), samples
    )
  widths = _centre(paired, baseline, exact=True)[0] / size
  spread = jax.tree.map(
    lambda e: jnp.mean(
      (half(e) * half(e) - 1) * _like(widths, half(e)), axis=0
    ),
    noise,
  )
  gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), samples)
  count = max(paired.shape[0], 1)
  rest = max(count - 1, 1) * count
  deviations = jax.tree.map(
    lambda g, m: jnp.sum(jnp.square(g - m[None])) / rest, samples, gradient
  )
  zero = jnp.zeros((), jnp.float32)
  variance = sum(jax.tree.leaves(deviations), zero)
  power = sum((jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)), zero)
  return Estimate(gradient, spread, variance, power / (variance + 1e-30))


def _finite(losses: jax.Array) -> jax.Array:
  """Losses, the largest in place of what is infinite or no number."""
  finite = jnp.isfinite(losses)
  largest = jnp.max(jnp.where(finite, losses, -jnp.inf))
  return jnp.where(finite, losses, jnp.where(jnp.any(finite), largest, 0.0))


def _centre(
  losses: jax.Array, baseline: Baseline, exact: bool
) -> tuple[jax.Array, jax.Array]:
  """Losses less their baseline, and what to divide them by."""
  n, one = losses.shape[0], jnp.float32(1)
  if baseline == 'none':
    return losses, one
  centred = losses - jnp.mean(losses)
  if baseline == 'mean':
    return centred * (n / max(n - 1, 1) if exact else 1.0), one
  return centred, jnp.std(losses) + 1e-8


def _like(values: jax.Array, e: jax.Array) -> jax.Array:
  return values.reshape(-1, *[1] * (e.ndim - 1))


@kinds.checked
def estimator(
  *,
  n: int = 8,
  sigma: Any = 0.1,
  baseline: Baseline = 'standard',
  kind: Directions = 'normal',
  antithetic: bool = True,
  learn_sigma: float = 0.0,
  sigma_range: tuple[float, float] = (1e-3, 1.0),
) -> Estimator:
  """Returns an estimator in the form of an optax pair.

  ``init(mean, key)`` gives a state, ``update(loss, state, mean)`` a gradient
  and the next state; ``optax.adam`` makes a step of it. Where the losses come
  from outside of jit, ``ask(state, mean)`` gives the n vectors and
  ``tell(state, mean, losses)`` takes their losses. All are pure functions.

  Args:
    n: vectors a step, static.
    sigma: s: a number, a pytree like the vector (perturbations in proportion
      to the ranges of coordinates that are not scaled to one), or a schedule,
      step -> number or pytree.
    baseline: see :func:`estimate`.
    kind: 'normal', or 'rademacher', with which antithetic pairs are SPSA's.
    antithetic: whether to draw pairs e, -e.
    learn_sigma: rate of s <- s exp(-rate / 2 * gradient by log s), for each
      coordinate; 0 leaves s as it is.
    sigma_range: the least and the largest s that is learned.

  Raises:
    ValueError: if n is too small or odd, an option is unknown, or s is to be
      learned where it follows a schedule or the directions tell nothing of it.

  References:
    Schaul, Glasmachers and Schmidhuber (2011), separable natural evolution
    strategies, for s.

  Examples:
    >>> e = estimator(n=64, sigma=0.1, baseline='mean')
    >>> mean = jnp.array([1.0, 2.0])
    >>> state = e.init(mean, jax.random.key(0))
    >>> loss = lambda vectors: vectors[:, 0] - 3 * vectors[:, 1]
    >>> gradient, state = e.update(loss, state, mean)
    >>> print((gradient > 0).tolist())
    [True, False]
  """
  checks.whole('n', n)
  if isinstance(sigma, float | int):
    checks.real('sigma', sigma, above=0)
  least = 2 if antithetic else 1
  if n < least or (antithetic and n % 2):
    raise ValueError(
      f'`n` must be {"even and " if antithetic else ""}at least {least}, got '
      f'{n}.'
    )
  if kind not in ('normal', 'rademacher'):
    raise ValueError(f"`kind` must be 'normal' or 'rademacher', got {kind!r}.")
  if baseline not in ('none', 'mean', 'standard'):
    raise ValueError(
      f"`baseline` must be 'none', 'mean' or 'standard', got {baseline!r}."
    )
  if n == 1 and baseline != 'none':
    raise ValueError("One loss has no baseline: give baseline='none'.")
  if learn_sigma and (kind == 'rademacher' or callable(sigma)):
    why = 'follows a schedule' if callable(sigma) else 'is not in signs alone'
    raise ValueError(
      f'`sigma` cannot be learned: it {why}. Give a number and '
      f"kind='normal', or learn_sigma=0."
    )

  def at(step: jax.Array, mean: Any) -> Any:
    value: Any = sigma(step) if callable(sigma) else sigma
    if jax.tree.structure(value) == jax.tree.structure(mean):
      return jax.tree.map(
        lambda s, m: jnp.broadcast_to(jnp.float32(s), jnp.shape(m)),
        value,
        mean,
      )
    return jax.tree.map(lambda m: jnp.full(jnp.shape(m), value, 'f4'), mean)

  def init_fn(mean: Any, key: jax.Array) -> EstimatorState:
    zero = jnp.int32(0)
    figures = jnp.zeros(n), jnp.float32(0), jnp.float32(0)
    return EstimatorState(key, zero, at(zero, mean), *figures)

  def noise_of(state: EstimatorState, mean: Any) -> Any:
    key = jax.random.fold_in(state.key, state.step)
    return directions(key, mean, n, kind=kind, antithetic=antithetic)

  def ask_fn(state: EstimatorState, mean: Any) -> Any:
    return jax.tree.map(
      lambda m, s, e: m[None] + s[None] * e,
      jax.tree.map(jnp.asarray, mean),
      state.sigma,
      noise_of(state, mean),
    )

  def tell_fn(
    state: EstimatorState, mean: Any, losses: jax.Array
  ) -> tuple[Any, EstimatorState]:
    found = estimate(
      noise_of(state, mean),
      losses,
      state.sigma,
      baseline=baseline,
      antithetic=antithetic,
    )
    step = state.step + 1
    following = at(step, mean) if callable(sigma) else state.sigma
    if learn_sigma:
      following = jax.tree.map(
        lambda s, g: jnp.clip(s * jnp.exp(-learn_sigma / 2 * g), *sigma_range),
        state.sigma,
        found.spread,
      )
    figures = losses.astype(jnp.float32), found.variance, found.signal
    return found.gradient, EstimatorState(state.key, step, following, *figures)

  def update_fn(
    loss: Losses, state: EstimatorState, mean: Any
  ) -> tuple[Any, EstimatorState]:
    return tell_fn(state, mean, loss(ask_fn(state, mean)))

  return Estimator(init_fn, ask_fn, tell_fn, update_fn)


@kinds.checked
def chunked(
  loss: Losses, size: int, *, loop: Literal['unroll', 'map'] = 'unroll'
) -> Losses:
  """Returns the same losses, ``size`` vectors at a time: memory is bounded.

  Args:
    loss: n stacked vectors -> float32[n].
    size: vectors at a time, static.
    loop: 'unroll' writes the chunks one after another into the program, each
      waiting for the one before; 'map' is a ``lax.map``, a smaller program,
      whose convolutions XLA runs several times slower on CPU.

  Returns:
    A function like ``loss``; with 'map' a ValueError where size does not
    divide n.

  Raises:
    ValueError: if ``size`` is below 1 or ``loop`` unknown.
  """
  checks.whole('size', size, 1)
  if loop not in ('unroll', 'map'):
    raise ValueError(f"`loop` must be 'unroll' or 'map', got {loop!r}.")

  def unroll(vectors: Any) -> jax.Array:
    n = jax.tree.leaves(vectors)[0].shape[0]
    found: list[jax.Array] = []
    for start in range(0, n, size):
      part = jax.tree.map(
        operator.itemgetter(slice(start, start + size)), vectors
      )
      if found:
        part = _after(found[-1][0], part)
      found.append(loss(part))
    return jnp.concatenate(found)

  def mapped(vectors: Any) -> jax.Array:
    n = jax.tree.leaves(vectors)[0].shape[0]
    if n % size:
      raise ValueError(f'Chunks of {size} must divide the {n} vectors.')
    parts = jax.tree.map(
      lambda x: x.reshape(n // size, size, *x.shape[1:]), vectors
    )
    return lax.map(loss, parts).reshape(n)

  return unroll if loop == 'unroll' else mapped


def _after(last: jax.Array, vectors: Any) -> Any:
  """The same vectors, known only after ``last``: chunks take turns in memory.

  What selects is never true, which no compiler knows; XLA drops an
  optimization_barrier on CPU.
  """
  never = (last != last) & (last > 0)
  return jax.tree.map(lambda x: lax.select(never, -x, x), vectors)


@kinds.checked
def spread(loss: Losses, axis_name: str) -> Losses:
  """Returns the same losses, each device computing its share of the vectors.

  Within ``pmap`` or ``shard_map`` over ``axis_name``, with the same vectors and
  the same batch on every device; one psum tells all of them all losses.

  Args:
    loss: n stacked vectors -> float32[n].
    axis_name: of the devices, whose number divides n.

  Returns:
    A function like ``loss``; when traced, a ValueError where the devices do
    not divide the vectors.
  """

  def call(vectors: Any) -> jax.Array:
    n = jax.tree.leaves(vectors)[0].shape[0]
    devices = lax.axis_size(axis_name)
    if n % devices:
      raise ValueError(
        f'The {devices} devices of axis {axis_name!r} must divide the {n} '
        f'vectors.'
      )
    share = n // devices
    start = lax.axis_index(axis_name) * share
    own = jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, share), vectors
    )
    found = lax.dynamic_update_slice(
      jnp.zeros(n, jnp.float32), loss(own).astype(jnp.float32), (start,)
    )
    return lax.psum(found, axis_name)

  return call
