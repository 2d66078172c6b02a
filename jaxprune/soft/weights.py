"""Soft masks inside the loss: PDP, parameter-free differentiable pruning.

PDP is a function of the params that goes where the params go in a loss::

  loss = lambda p, state, batch: task(model.apply(soft.pdp(p, state), batch))

Each weight is multiplied by a soft mask that depends on nothing but the weight
itself and on the threshold t between the weights to keep and to prune, which
every call finds anew::

  m(w) = sigmoid((w^2 - t^2) / (tau + c t^2))

so that dm/dw pushes the weights near t to one side. :func:`pdp_init` makes the
state at the end of a dense warm-up, its ``ramp`` is raised from 0 to 1, and
:func:`harden` turns it into masks with an exact count of zeros.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import checks, tree
from jaxprune import masks as masks_lib
from jaxprune.checks import kinds
from jaxprune.numerics import counts, select, sharding

NByM = tuple[int, int]  # Keep n of every m.


class PDPState(NamedTuple):
  """State of :func:`pdp`."""

  pruned: tree.PyTree  # Like params; uint32[], weights to prune at full ramp.
  ramp: jax.Array  # Fraction of `pruned` in force, 0 in warm-up; float32[].
  tau: jax.Array  # Absolute part of the temperature; float32[].
  c: jax.Array  # Temperature relative to t^2; float32[].
  masks: tree.PyTree | None = None  # Like params; bool, once hardened.


class Diagnosis(NamedTuple):
  """What :func:`diagnose` finds, each a pytree like params of float32[]."""

  threshold: tree.PyTree  # t.
  hardness: tree.PyTree  # Mean of 4 m (1 - m): 0 is a hard mask.
  steepness: tree.PyTree  # t^2 / (tau + c t^2).
  gain: tree.PyTree  # d(m w)/dw at w = t: 1/2 + steepness / 2.
  moved: tree.PyTree  # Share of weights on the other side than before.
  density: tree.PyTree  # Share of weights that the full ramp keeps.


@kinds.checked
def pdp_init(
  params: tree.PyTree,
  sparsity: float | jax.Array | Mapping[str, float] | None = None,
  *,
  n_by_m: NByM | None = None,
  pruned: Mapping[str, int] | None = None,
  which: tree.Which = None,
  tau: float | jax.Array = 1e-4,
  c: float | jax.Array = 0.0,
) -> PDPState:
  """Returns the state of :func:`pdp` at the end of the dense warm-up.

  One sparsity for all leaves draws one global magnitude threshold and gives
  each leaf the share of its weights below it; from then on weights compete
  within their leaf. The shares are kept as counts, whose sum is exactly
  round(sparsity * size). After a short warm-up the threshold follows the scales
  of the initial weights: at a high sparsity it can close a whole leaf, which
  :func:`jaxprune.soft.training.warn_about` tells; ``pruned`` then gives shares
  that leave some of each, such as those of ``distributions.erk``.

  Args:
    params: the weights after warm-up.
    sparsity: fraction of zeros over all prunable weights, in [0, 1), static or
      traced; or rules over paths with one sparsity per leaf, 0 where no rule
      matches (their counts are rounded by largest remainder). None with
      ``n_by_m`` or ``pruned``.
    n_by_m: for :func:`pdp` with the same argument: n kept of every m.
    pruned: path -> how many weights of this leaf to prune, less than it has;
      static. Leaves without a count stay whole.
    which: the leaves to prune, as for :func:`jaxprune.tree.prunable`.
    tau: absolute temperature, in units of a squared weight, at least 0.
    c: temperature relative to t^2, at least 0. The published rule is c = 0;
      small nets, whose weights are large, want tau = 0 and c of 0.1 to 0.5.

  Returns:
    A :class:`PDPState` with ramp 0: the identity, until it is raised.

  Raises:
    TypeError: if a count is no integer, or another argument no number.
    ValueError: if weights are not finite, if a sparsity or a count is out of
      range, if not exactly one of sparsity, ``n_by_m`` and ``pruned`` is given,
      if ``n_by_m`` is not 0 < n < m, if tau or c is NaN, infinite or negative
      or both are zero, if a leaf has 2**32 weights or more, or as
      :func:`jaxprune.tree.prunable`.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203. The global threshold, tau and
    the sigmoid are confirmed from two independent implementations; c is ours.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, -2.0], [3.0, -4.0]])}
    >>> int(pdp_init(params, 0.75).pruned['kernel'])
    3
  """
  weights = tree.prunable(params, which)
  if sum(x is not None for x in (sparsity, n_by_m, pruned)) != 1:
    raise ValueError('Give one of `sparsity`, `n_by_m` and `pruned`.')
  checks.real('tau', tau, 0)
  checks.real('c', c, 0)
  _check_weights(weights)
  fixed = isinstance(tau, float | int) and isinstance(c, float | int)
  if fixed and tau == c == 0:
    raise ValueError('`tau` and `c` are both 0: a mask needs a temperature.')
  if n_by_m is not None:
    n, m = _check_n_by_m(n_by_m)
    goal = jax.tree.map(lambda w: _uint32(w.size // m * (m - n)), weights)
  elif pruned is not None:
    goal = _counted(weights, _checked(weights, pruned))
  elif isinstance(sparsity, Mapping):
    goal = _counted(weights, _shares(weights, sparsity))
  else:
    assert sparsity is not None
    goal = _global_counts(weights, sparsity)
  scalar = lambda x: jnp.asarray(x, jnp.float32)
  return PDPState(goal, scalar(0.0), scalar(tau), scalar(c))


@kinds.checked
def pdp(
  params: tree.PyTree,
  state: PDPState,
  *,
  n_by_m: NByM | None = None,
  axis: int | None = None,
  through: bool = False,
) -> tree.PyTree:
  """Returns the params with each weight multiplied by its soft mask.

  m(w) w with m(w) = sigmoid((w^2 - t^2) / (tau + c t^2)), where t is halfway
  between the smallest |w| to keep and the largest to prune. The gradient at t
  is 1/2 + t^2 / (2 (tau + c t^2)) times that of the masked weight: the
  temperature sets how hard the weights near t are pushed. Far below t both
  mask and gradient vanish, and only a falling t or other forces bring a weight
  back. Once hardened, plain ``where(mask, w, 0)``.

  Weight decay acts on the raw weights. Never write the result back to params.

  Args:
    params: any pytree; leaves that the state does not prune pass unchanged.
    state: from :func:`pdp_init`; its ramp, tau and c are traced values, so a
      whole training compiles once.
    n_by_m: static (n, m) for a threshold in each group of m neighbours along
      ``axis``, in force as soon as the ramp is above 0.
    axis: the axis of the groups, as for :func:`jaxprune.masks.groups`: by
      default -2, the input axis, of kernels with two or four axes, and no
      other layout.
    through: whether gradients flow through t to the two weights that set it.

  Returns:
    Like ``params``, of the same dtypes; masks are computed in float32. Where
    nothing is to prune the very bits of ``params``, but for subnormal numbers,
    which XLA may flush. The softest mask prunes at least one weight and keeps
    at least one.

  Raises:
    ValueError: if a leaf has no such groups.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203, confirmed from two independent
    implementations. The paper takes t as a constant in the gradient.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 3.0]])}
    >>> state = pdp_init(params, 0.5, tau=3.0)._replace(ramp=jnp.float32(1.0))
    >>> print(pdp(params, state)['kernel'])  # t = 2: m(1) is sigmoid(-1)
    [[0.26894143 2.5233927 ]]
  """
  if state.masks is not None:
    cut = lambda w, mask: jnp.where(mask, w, 0)
    tree.check_alike('Masks', state.masks, params, shapes=True)
    return tree.map_pruned(cut, params, state.masks)
  views = _views(params, state, n_by_m, axis)
  ts = _thresholds(views, state, n_by_m, axis, through)
  soften = lambda x, t, k: _soften(x, t, state.tau, state.c, k > 0)
  soft = jax.tree.map(soften, views, ts, _counts(state, n_by_m))
  return tree.map_pruned(_back, params, soft)


@kinds.checked
def mask(
  params: tree.PyTree,
  state: PDPState,
  *,
  n_by_m: NByM | None = None,
  axis: int | None = None,
  through: bool = False,
) -> tree.PyTree:
  """Returns the masks by which :func:`pdp` multiplies the weights.

  Args:
    params: as for :func:`pdp`.
    state: from :func:`pdp_init`; of a hardened one the frozen masks.
    n_by_m: as for :func:`pdp`.
    axis: as for :func:`pdp`.
    through: as for :func:`pdp`.

  Returns:
    float32 in [0, 1], 1 where nothing is to prune; ``optax.MaskedNode()``
    where a leaf is not pruned.

  Raises:
    ValueError: as :func:`pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 2.0, 2.0, 4.0]])}
    >>> state = pdp_init(params, 0.5, tau=1.0)._replace(ramp=jnp.float32(1.0))
    >>> print(mask(params, state)['kernel'][0, 1])  # At t.
    0.5
  """
  if state.masks is not None:
    return jax.tree.map(lambda mask: mask.astype(jnp.float32), state.masks)
  views = _views(params, state, n_by_m, axis)
  ts = _thresholds(views, state, n_by_m, axis, through)

  def one(w, x, t, k):
    m = _soft_mask(x.astype(jnp.float32), t, state.tau, state.c)
    return _back(w, jnp.where(k > 0, m, 1.0))

  live = tree.restrict(params, state.pruned)
  return jax.tree.map(one, live, views, ts, _counts(state, n_by_m))


@kinds.checked
def sides(
  params: tree.PyTree,
  state: PDPState,
  *,
  n_by_m: NByM | None = None,
  axis: int | None = None,
) -> tree.PyTree:
  """Returns which weights lie on the kept side of t, at the ramp in force.

  Args:
    params: as for :func:`pdp`; for channels, their norms.
    state: from :func:`pdp_init`.
    n_by_m: as for :func:`pdp`.
    axis: as for :func:`pdp`.

  Returns:
    bool masks, ``optax.MaskedNode()`` where a leaf is not pruned. The count of
    zeros of each leaf is exact; the lower index wins a tie.

  Raises:
    ValueError: as :func:`pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, -2.0, 3.0, -4.0]])}
    >>> state = pdp_init(params, 0.5)._replace(ramp=jnp.float32(0.5))
    >>> print(sides(params, state)['kernel'])
    [[False  True  True  True]]
  """
  views = jax.tree.map(jnp.abs, _views(params, state, n_by_m, axis))
  ks = _counts(state, n_by_m)
  if n_by_m is None:
    keep = jax.tree.map(lambda x, k: _uint32(x.size) - k, views, ks)
    masks = select.top_masks(views, keep)
  else:
    draw = lambda x, k: _top_of_group(x, n_by_m[0], axis) | (k == 0)
    masks = jax.tree.map(draw, views, ks)
  live = tree.restrict(params, state.pruned)
  return jax.tree.map(_back, live, masks)


@kinds.checked
def harden(
  params: tree.PyTree,
  state: PDPState,
  *,
  n_by_m: NByM | None = None,
  axis: int | None = None,
) -> PDPState:
  """Returns the state with the masks of the full sparsity frozen into it.

  mask = |w| >= t, ties by position: exactly ``state.pruned`` zeros in each
  leaf and the asked number over all leaves, whatever the ramp. The final
  weights are ``pdp(params, harden(params, state))``; that state serves for
  fine-tuning under the frozen masks too.

  Args:
    params: as for :func:`sides`.
    state: from :func:`pdp_init`.
    n_by_m: as for :func:`pdp`.
    axis: as for :func:`pdp`.

  Raises:
    ValueError: as :func:`pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, -2.0, 3.0, -4.0]])}
    >>> print(pdp(params, harden(params, pdp_init(params, 0.75)))['kernel'])
    [[ 0.  0.  0. -4.]]
  """
  full = state._replace(ramp=jnp.ones_like(state.ramp))
  return state._replace(masks=sides(params, full, n_by_m=n_by_m, axis=axis))


@kinds.checked
def diagnose(
  params: tree.PyTree,
  state: PDPState,
  *,
  n_by_m: NByM | None = None,
  axis: int | None = None,
  before: tree.PyTree | None = None,
) -> Diagnosis:
  """Returns the figures that tell why a soft mask works, or does not.

  Args:
    params: as for :func:`sides`.
    state: from :func:`pdp_init`, not hardened; its ramp counts.
    n_by_m: as for :func:`pdp`; figures are means over the groups.
    axis: as for :func:`pdp`.
    before: masks from :func:`sides` at an earlier step; ``moved`` is 0 if None.

  Returns:
    A :class:`Diagnosis`, fit for jit and for logging. Leaves of which nothing
    is pruned yet are described by the mildest threshold, one weight pruned.

  Raises:
    ValueError: as :func:`pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 3.0]])}
    >>> found = diagnose(params, pdp_init(params, 0.5, tau=0.0, c=0.5))
    >>> print(found.steepness['kernel'], found.gain['kernel'])
    2.0 1.5
  """
  views = _views(params, state, n_by_m, axis)
  ts = _thresholds(views, state, n_by_m, axis, False)
  temper = lambda t: _temperature(t, state.tau, state.c)

  def hardness(x, t):
    m = _soft_mask(x.astype(jnp.float32), t, state.tau, state.c)
    return _mean(4 * m * (1 - m))

  steep = jax.tree.map(lambda t: _mean(t * t / temper(t)), ts)
  if before is None:
    moved = jax.tree.map(lambda _: jnp.float32(0), ts)
  else:
    now = sides(params, state, n_by_m=n_by_m, axis=axis)
    moved = jax.tree.map(lambda a, b: _mean(a != b), now, before)
  density = lambda x, n: (_uint32(x.size) - n) / jnp.float32(x.size)
  return Diagnosis(
    threshold=jax.tree.map(_mean, ts),
    hardness=jax.tree.map(hardness, views, ts),
    steepness=steep,
    gain=jax.tree.map(lambda x: 0.5 + 0.5 * x, steep),
    moved=moved,
    density=jax.tree.map(density, views, state.pruned),
  )


# The maths of PDP.


def _uint32(count: int) -> jax.Array:
  """Returns a count that an int32 may not hold."""
  return jnp.asarray(np.uint32(count))


def _mean(x: jax.Array) -> jax.Array:
  """Returns the mean in float32, also of more entries than an int32 counts."""
  return jnp.sum(x, dtype=jnp.float32) / jnp.float32(x.size)


def _temperature(t: jax.Array, tau: jax.Array, c: jax.Array) -> jax.Array:
  # A threshold of zero, where most weights are, must not divide by zero.
  return jnp.maximum(tau + c * lax.stop_gradient(t * t), 1e-30)


def _soft_mask(
  x: jax.Array, t: jax.Array, tau: jax.Array, c: jax.Array
) -> jax.Array:
  return jax.nn.sigmoid(_logit(x, t, tau, c))


def _logit(
  x: jax.Array, t: jax.Array, tau: jax.Array, c: jax.Array
) -> jax.Array:
  return (x * x - t * t) / _temperature(t, tau, c)


@jax.checkpoint  # The mask is cheaper to compute again than to hold.
def _soften(
  w: jax.Array, t: jax.Array, tau: jax.Array, c: jax.Array, on: jax.Array
) -> jax.Array:
  x = w.astype(jnp.float32)
  z = jnp.where(on, _logit(x, t, tau, c), jnp.inf)
  return _gated(x, z).astype(w.dtype)


@jax.custom_jvp
def _gated(x: jax.Array, z: jax.Array) -> jax.Array:
  """Returns sigmoid(z) x; at z = inf the very bits of x."""
  # XLA computes a division once. A product or a select it would fuse into every
  # tap of a depthwise convolution that reads the kernel, once for each pixel.
  return x / (1 + jnp.exp(-z))


@_gated.defjvp
def _gated_jvp(primals, tangents):
  (x, z), (dx, dz) = primals, tangents
  m = jax.nn.sigmoid(z)
  return _gated(x, z), m * dx + x * m * (1 - m) * dz


def _counts(state: PDPState, n_by_m: NByM | None) -> tree.PyTree:
  """Returns how many weights of each leaf are to prune now, uint32[]."""
  ramp = state.ramp

  def count(n):
    if n_by_m is not None:  # No group can lose a part of a weight.
      return jnp.where(ramp > 0, n, 0)
    limbs = jnp.stack([n & 0xFFFF, n >> 16, jnp.zeros_like(n)])
    high, low = counts.part(limbs, ramp)
    return (high << 16) | low

  return jax.tree.map(count, state.pruned)


def _thresholds(
  views: tree.PyTree,
  state: PDPState,
  n_by_m: NByM | None,
  axis: int | None,
  through: bool,
) -> tree.PyTree:
  """Returns t of every leaf, float32: a scalar, or one per group of m."""
  scores = jax.tree.map(jnp.abs, views)
  if n_by_m is not None:
    ts = jax.tree.map(lambda x: _group_threshold(x, n_by_m[0], axis), scores)
    return ts if through else jax.tree.map(lax.stop_gradient, ts)
  clip = lambda x, k: jnp.clip(
    _uint32(x.size) - k, np.uint32(1), np.uint32(max(x.size - 1, 1))
  )
  keep = jax.tree.map(clip, scores, _counts(state, n_by_m))
  low, high = select.boundaries(scores, keep)
  if through:
    low, high = (jax.tree.map(_pick, scores, side) for side in (low, high))
  return jax.tree.map(_middle, low, high)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
  low, high = low.astype(jnp.float32), high.astype(jnp.float32)
  high = jnp.where(jnp.isfinite(high), high, low)  # A leaf of one weight.
  return 0.5 * (low + high)


def _pick(x: jax.Array, value: jax.Array) -> jax.Array:
  """Returns the value as an entry of x, so that gradients reach it."""
  return jnp.max(jnp.where(x == value, x, -jnp.inf))


def _group_threshold(x: jax.Array, n: int, axis: int | None) -> jax.Array:
  kept = _top_of_group(lax.stop_gradient(x), n, axis)
  inner = _inner(axis)
  least = lambda x: jnp.min(
    x, inner, keepdims=True, where=kept, initial=jnp.inf
  )
  most = lambda x: jnp.max(x, inner, keepdims=True, where=~kept, initial=-1.0)
  return _middle(least(x), most(x))


def _top_of_group(x: jax.Array, n: int, axis: int | None) -> jax.Array:
  """Marks the n largest along the inner axis, the lower index first."""
  inner = _inner(axis) % x.ndim
  return masks_lib.n_by_m(x, n, x.shape[inner], axis=inner)


def _inner(axis: int | None) -> int:
  """Returns the axis within groups, of a view that split ``axis`` in two."""
  axis = -2 if axis is None else axis
  return axis if axis < 0 else axis + 1


def _views(
  params: tree.PyTree,
  state: PDPState,
  n_by_m: NByM | None,
  axis: int | None,
) -> tree.PyTree:
  """Returns the leaves to prune, split into groups of m where asked."""
  live = tree.restrict(params, state.pruned)
  if n_by_m is None:
    return live
  n, m = _check_n_by_m(n_by_m)
  grain = masks_lib.groups(n, m, axis=axis)
  named = tree.leaves(live)
  found = {path: grain.problem(w.shape, path) for path, w in named.items()}
  wrong = [f'{path} ({text})' for path, text in found.items() if text]
  if wrong:
    raise ValueError(
      f'No groups of {n_by_m} in: {"; ".join(wrong)}. Give another `axis`, or '
      f'leave them out with `which`.'
    )

  def split(w):
    at = (-2 if axis is None else axis) % w.ndim
    groups = (w.shape[at] // m, m)
    if groups[0] % sharding.parts(w)[at]:
      w = sharding.whole(w)  # A group would lie on two devices.
    return w.reshape(*w.shape[:at], *groups, *w.shape[at + 1 :])

  return jax.tree.map(split, live)


def _back(w: jax.Array, view: jax.Array) -> jax.Array:
  """Returns a view of groups in the shape of its leaf, and placed as it is."""
  return sharding.like(view.reshape(w.shape), w)


def _check_n_by_m(n_by_m: NByM) -> NByM:
  n, m = n_by_m
  checks.whole('n', n)
  checks.whole('m', m)
  if not 0 < n < m:
    raise ValueError(f'`n_by_m` must be (n, m) with 0 < n < m, got {n_by_m}.')
  return n, m


def _check_weights(weights: tree.PyTree) -> None:
  """Raises unless weights are finite, and as many as a count can tell."""
  large = [
    path for path, w in tree.leaves(weights).items() if w.size >= 1 << 32
  ]
  if large:
    raise ValueError(
      f'PDP counts the weights of a leaf in 32 bits, and {", ".join(large)} '
      'has 2**32 or more: split it, or leave it out with `which`.'
    )
  masks_lib.check_finite(weights)


def _global_counts(
  weights: tree.PyTree, sparsity: float | jax.Array
) -> tree.PyTree:
  checks.sparsity(sparsity)
  if isinstance(sparsity, float | int) and not 0 <= sparsity < 1:
    raise ValueError(f'`sparsity` must be in [0, 1), got {sparsity}.')
  scores = jax.tree.map(jnp.abs, weights)
  keep = counts.kept(tree.size(weights), sparsity)
  masks = select.top_masks(scores, keep)
  return jax.tree.map(lambda mask: jnp.sum(~mask, dtype=jnp.uint32), masks)


def _checked(
  weights: tree.PyTree, pruned: Mapping[str, int]
) -> Mapping[str, int]:
  named = tree.leaves(weights)
  for path, n in pruned.items():
    checks.whole(f'pruned[{path!r}]', n)
  wrong = [
    f'{path!r} is no leaf to prune'
    if path not in named
    else f'{path!r} has {named[path].size} weights, got {n}'
    for path, n in pruned.items()
    if path not in named or not 0 <= n < max(1, named[path].size)
  ]
  if wrong:
    raise ValueError(
      f'`pruned` gives leaves a count from 0 to less than their size: '
      f'{"; ".join(wrong)}.'
    )
  return pruned


def _counted(weights: tree.PyTree, pruned: Mapping[str, int]) -> tree.PyTree:
  count = lambda path, _: _uint32(int(pruned.get(path, 0)))
  return tree.map_with_path(count, weights)


def _shares(weights: tree.PyTree, rules: Mapping[str, float]) -> dict[str, int]:
  named = tree.leaves(weights)
  given = tree.match(rules, named, 0.0)
  for path, r in given.items():
    checks.real(f'sparsity[{path!r}]', r)
  odd = [f'{path}: {r}' for path, r in given.items() if not 0 <= r < 1]
  if odd:
    raise ValueError(f'A sparsity must be in [0, 1), got {", ".join(odd)}.')
  quotas = {path: r * named[path].size for path, r in given.items()}
  pruned = {path: int(quota) for path, quota in quotas.items()}
  missing = round(sum(quotas.values())) - sum(pruned.values())
  by_remainder = sorted(pruned, key=lambda path: pruned[path] - quotas[path])
  for path in by_remainder[:missing]:
    pruned[path] += 1
  return pruned
