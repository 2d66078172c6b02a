"""Masks, order statistics and boundaries, by whichever way is faster."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import checks
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics.counts import Keep, Limbs
from jaxprune.numerics.select import keys
from jaxprune.numerics.select.bisection import bisection
from jaxprune.numerics.select.histogram import histogram
from jaxprune.numerics.select.secant import secant

Method = Literal['auto', 'histogram', 'bisection']


@kinds.checked
def top_mask(
  x: jax.Array,
  keep: Keep,
  *,
  spec: jax.sharding.PartitionSpec | None = None,
  method: Method = 'auto',
) -> jax.Array:
  """Marks exactly the ``keep`` largest entries; the lower index wins a tie.

  mask_i = #{j : x_j > x_i} + #{j < i : x_j = x_i} < keep.

  Args:
    x: scores of any shape; float32, bfloat16, float16 or float64. Infinities
      rank as themselves, -0 equals 0, and NaN ranks below everything.
    keep: how many to mark, 0 <= keep <= x.size; a static int or a traced int32
      or uint32 scalar. From 2**32 on, a traced count is a pair of uint32
      (high, low), which stands for high * 2**16 + low.
    spec: inside ``jax.shard_map``, how the whole array is split over the mesh;
      counts and positions are then those of the whole array.
    method: ``'histogram'``, ``'bisection'``, or ``'auto'``: histograms on a
      single CPU device, bisection elsewhere and for sharded arrays.

  Returns:
    bool, the shape of ``x``, with exactly ``keep`` true entries.

  Raises:
    TypeError: if ``x`` is not floating, or narrower than 16 bits, or if
      ``keep`` is no integer.
    ValueError: if ``method`` is unknown, if a static ``keep`` is out of range,
      or if histograms are asked for with ``spec`` or for 2**31 entries and
      more.

  Examples:
    >>> print(top_mask(jnp.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2))
    [False  True  True False False]
  """
  return top_masks([x], keep, specs=[spec], method=method)[0]


@kinds.checked
def top_masks(
  scores: tree_lib.Arrays,
  keep: Keep | tree_lib.PyTree,
  *,
  specs: Any = None,
  method: Method = 'auto',
) -> tree_lib.PyTree:
  """Marks exactly the largest entries of each leaf, or of the whole pytree.

  Args:
    scores: pytree of scores, as :func:`top_mask` takes them. A leaf that is
      not pruned is ``optax.MaskedNode()`` and stays so.
    keep: a pytree of counts, one per leaf (or limbs of shape [leaves]), or one
      count for all leaves together (then equal scores are taken in the order
      of the leaves).
    specs: inside ``jax.shard_map``, a pytree of PartitionSpecs like
      ``scores``.
    method: see :func:`top_mask`.

  Returns:
    pytree of bool like ``scores``.

  Raises:
    TypeError: if a leaf is not floating, or narrower than 16 bits, or if a
      count is no integer.
    ValueError: as :func:`top_mask`, or if ``keep`` does not match ``scores``.

  Examples:
    >>> scores = {'a': jnp.array([1.0, 4.0]), 'b': jnp.array([3.0, 2.0])}
    >>> top_masks(scores, {'a': 1, 'b': 1})['b'].tolist()
    [True, False]
    >>> top_masks(scores, 3)['b'].tolist()
    [True, True]
  """
  xs, treedef, limbs, splits = _arguments(scores, keep, specs)
  cuts, _ = _select(xs, limbs, splits, method)
  return treedef.unflatten(map(keys.kept, xs, cuts, splits))


@kinds.checked
def kth_largest(x: jax.Array, k: Keep, *, method: Method = 'auto') -> jax.Array:
  """Returns the k-th largest entry, exactly; 1 is the largest.

  Args:
    x: scores, as :func:`top_mask` takes them.
    k: 1 <= k <= x.size; static or traced.
    method: see :func:`top_mask`.

  Returns:
    Scalar of the dtype of ``x``; without a gradient.

  Raises:
    TypeError: as :func:`top_mask`.
    ValueError: if a static ``k`` is out of range.

  Examples:
    >>> print(kth_largest(jnp.array([5.0, -1.0, 7.0, 5.0]), 2))
    5.0
  """
  if isinstance(k, float | bool):
    checks.whole('k', k)
  if isinstance(k, int | np.integer) and k < 1:
    raise ValueError(f'k must be at least 1, got {k}.')
  xs, _, keep, splits = _arguments(x, k, None)
  _, key = _select(xs, keep, splits, method)
  return keys.value(key[0], x.dtype)


@kinds.checked
def boundaries(
  scores: tree_lib.Arrays,
  keep: tree_lib.PyTree,
  *,
  method: Method = 'auto',
) -> tuple[tree_lib.PyTree, tree_lib.PyTree]:
  """Returns the smallest kept and the largest pruned score of every leaf.

  On a single device 'auto' parts the entries by false position, which is
  twice as fast as the search for the order statistic and one more pass.

  Args:
    scores: pytree of scores, as :func:`top_masks` takes them; NaN is no
      boundary.
    keep: a pytree of counts, one per leaf, as :func:`top_masks` takes them;
      each at least 1 and below the leaf's size for both to exist.
    method: see :func:`top_mask`.

  Returns:
    Two pytrees of scalars in the dtype of the scores. A leaf of which all is
    kept has -inf for the largest pruned score, one of which nothing is kept
    has +inf for the smallest kept one.

  Raises:
    TypeError: as :func:`top_masks`.
    ValueError: as :func:`top_masks`, or if one count is for several leaves.

  Examples:
    >>> low, high = boundaries(jnp.array([1.0, 4.0, 3.0, 2.0]), 2)
    >>> float(low), float(high)
    (3.0, 2.0)
  """
  xs, treedef, limbs, splits = _arguments(scores, keep, None)
  if len(limbs[0]) != len(xs):
    raise ValueError(
      f'`keep` must be a count for each of the {len(xs)} leaves, as each has '
      'boundaries of its own; got one for all.'
    )
  if method == 'auto' and jax.device_count() == 1 and _are_short(xs):
    counts = (limbs[0] << 16) | limbs[1]
    found = [secant(x.astype(jnp.float32), counts[i]) for i, x in enumerate(xs)]
    lows, highs = zip(*found, strict=True) if found else ((), ())
    return _like(scores, treedef, lows), _like(scores, treedef, highs)
  cuts, _ = _select(xs, limbs, splits, method)
  some = (limbs[0] | limbs[1]) > 0
  lows, highs = [], []
  for i, (x, cut, split) in enumerate(zip(xs, cuts, splits, strict=True)):
    low = jnp.where(some[i], keys.value(cut.key, x.dtype), jnp.inf)
    equal = some[i] & keys.surplus(cut, split)
    lows.append(low)
    below = jnp.max(jnp.where(x < low, x, -jnp.inf))
    highs.append(jnp.where(equal, low, below))
  return _like(scores, treedef, lows), _like(scores, treedef, highs)


def _are_short(xs: Sequence[jax.Array]) -> bool:
  """Whether float32 holds the entries, and int32 their number."""
  return all(x.dtype.itemsize <= 4 and x.size < 1 << 31 for x in xs)


def _like(scores: Any, treedef: Any, bounds: Sequence[jax.Array]) -> Any:
  back = lambda x, bound: bound.astype(jnp.result_type(x))
  return jax.tree.map(back, scores, treedef.unflatten(bounds))


def _arguments(scores: Any, keep: Any, specs: Any):
  """Checks and flattens: leaves, treedef, counts as limbs, splits."""
  named = tree_lib.leaves(scores)
  treedef = jax.tree.structure(scores)
  empty = [
    f'{path or "the array"} {x.shape}'
    for path, x in named.items()
    if not x.size
  ]
  if empty or not named:
    raise ValueError(
      'There must be scores to rank in each leaf, got none in: '
      f'{", ".join(empty) or "an empty pytree"}. Leaves to keep whole are '
      '`optax.MaskedNode()`, as `which` makes them.'
    )
  for path, x in named.items():
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(f'Scores of {path!r} must be floating, got {dtype}.')
    if dtype.itemsize < 2:
      raise TypeError(
        f'Scores of {path!r} must have 16 bits or more, got {dtype}; cast them.'
      )
  xs = [lax.stop_gradient(jnp.asarray(x)) for x in named.values()]
  xs = [x.astype(jnp.result_type(*xs)) for x in xs]  # Keys of one width.
  if specs is None:
    specs = [None] * len(xs)
  else:
    is_spec = lambda s: s is None or isinstance(s, jax.sharding.PartitionSpec)
    specs = jax.tree.leaves(specs, is_leaf=is_spec)
  splits = [_split(x, spec) for x, spec in zip(xs, specs, strict=True)]
  limits = {n: s.size for n, s in zip(named, splits, strict=True)}
  if _is_count(keep) and isinstance(keep, tuple) and jnp.ndim(keep[0]) == 1:
    if len(keep[0]) != len(xs):
      raise ValueError(
        f'`keep` must have a count for each of the {len(xs)} leaves of the '
        f'scores; got {len(keep[0])}.'
      )
    return xs, treedef, keep, splits
  if _is_count(keep):
    counts = [keep]
    limits = {'the whole pytree': sum(limits.values())}
  else:
    counts = jax.tree.leaves(keep, is_leaf=_is_count)
    if len(counts) != len(xs):
      raise ValueError(
        f'`keep` must be one count, or one for each of the {len(xs)} leaves '
        f'of the scores; got {len(counts)}.'
      )
  for (name, limit), count in zip(limits.items(), counts, strict=True):
    if not isinstance(count, tuple):
      remedy = 'A fraction of zeros is what masks.top(scores, sparsity) takes.'
      checks.whole(f'keep` of `{name}', count, remedy=remedy)
    if isinstance(count, int | np.integer) and not 0 <= count <= limit:
      raise ValueError(
        f'`keep` of {name!r} must be between 0 and {limit}, got {count}.'
      )
  limbs = counts_lib.stack([counts_lib.limbs(c) for c in counts])
  return xs, treedef, limbs, splits


def _is_count(keep: Any) -> bool:
  """Whether this is one count: a scalar, or a pair of limbs."""
  if type(keep) is tuple and len(keep) == 2:
    return all(getattr(limb, 'dtype', None) == jnp.uint32 for limb in keep)
  number = int | float | np.generic | np.ndarray | jax.Array
  return isinstance(keep, number)


def _split(x: jax.Array, spec: jax.sharding.PartitionSpec | None) -> keys.Split:
  axes = [
    () if a is None else (a,) if isinstance(a, str) else tuple(a)
    for a in (spec or ())
  ]
  axes += [()] * (x.ndim - len(axes))
  parts = [math.prod(lax.axis_size(name) for name in names) for names in axes]
  shape = tuple(n * part for n, part in zip(x.shape, parts, strict=True))
  return keys.Split(shape, tuple(axes))


def _select(
  xs: Sequence[jax.Array],
  keep: Limbs,
  splits: Sequence[keys.Split],
  method: Method,
) -> tuple[list[keys.Cutoff], jax.Array]:
  """Returns the cutoff of every leaf, and the key of the last entry kept.

  One count is for all leaves together, and then there is one key.
  """
  if method not in get_args(Method):
    raise ValueError(f'`method` is one of {get_args(Method)}, got {method!r}.')
  if not xs:
    return [], jnp.zeros(0, jnp.uint32)
  sharded = any(split.names for split in splits)
  fits = sum(split.size for split in splits) < 1 << 31
  if method == 'histogram' and (sharded or not fits):
    raise ValueError(
      'Histograms need whole arrays of fewer than 2**31 entries in all; use '
      "method='bisection'."
    )
  bisect = lambda *args: bisection(args[:-1], args[-1], splits)
  count = lambda *args: histogram(args[:-1], args[-1])
  if method == 'histogram':
    return count(*xs, keep)
  if method == 'bisection' or sharded or not fits or jax.device_count() > 1:
    return bisect(*xs, keep)
  return lax.platform_dependent(*xs, keep, cpu=count, default=bisect)
