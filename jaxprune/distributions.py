"""How a budget of weights is shared out among the leaves.

A distribution is a function ``(shapes, sparsity) -> kept``: from the leaves
that are pruned, by path, and one sparsity for all of them together, to the
number of weights each leaf keeps. It runs on the host, exactly, on static
data; what is kept adds up to n - round(s n) over all prunable weights to the
unit, and a leaf that reaches its bound stays there while the others take over
its share. Leaves that stay dense are no part of the budget.

A :class:`Pooled` distribution has no such function: one threshold is drawn
through the scores of all leaves, and the scores decide.
"""

import fractions
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checks
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import floats, select, sharding
from jaxprune.numerics.select import keys

Shapes = Mapping[str, tuple[int, ...]]
Kept = dict[str, int]


class Pooled(NamedTuple):
  """One threshold for all leaves together, after ``rescale`` of the scores."""

  rescale: Callable[[tree_lib.PyTree], tree_lib.PyTree] | None = None


Distribution = Callable[[Shapes, float], Kept] | Pooled


@kinds.checked
def uniform(shapes: Shapes, sparsity: float) -> Kept:
  """Gives every leaf the same sparsity, to a weight.

  Of a leaf floor(s n) weights go, and one more where the fraction is largest,
  until all leaves together keep N - round(s N). Of equal fractions, compared
  to 32 bits, the earlier leaf keeps its weight.

  Args:
    shapes: path -> shape of a leaf that is pruned.
    sparsity: s in [0, 1], static.

  Returns:
    path -> number of weights kept; the sum is N - round(s N).

  Examples:
    >>> uniform({'a': (2, 5), 'b': (4, 4)}, 0.5)
    {'a': 5, 'b': 8}
    >>> uniform({'a': (5,), 'b': (5,), 'c': (5,)}, 0.5)
    {'a': 3, 'b': 2, 'c': 2}
  """
  return _evenly(_sizes(shapes), sparsity)


def _evenly(sizes: Mapping[str, int], sparsity: float) -> Kept:
  total = sum(sizes.values())
  pruned = total - counts_lib.kept(total, sparsity)
  numerator, denominator = counts_lib.decimal(sparsity).as_integer_ratio()
  kept, points = {}, []
  for path, size in sizes.items():
    whole, rest = divmod(size * numerator, denominator)
    kept[path] = size - whole
    pruned -= whole
    points.append((-((rest << 32) // denominator), -len(points), path))
  for _, _, path in sorted(points)[:pruned]:
    kept[path] -= 1
  return kept


@kinds.checked
def uniform_plus(
  first: str, last: str, *, last_density: float = 0.2
) -> Callable[[Shapes, float], Kept]:
  """Uniform, but the first layer stays dense and the last one not too sparse.

  Args:
    first: path of the first layer's kernel, which keeps all of its weights.
    last: path of the last layer's kernel.
    last_density: the least fraction of its weights that it keeps.

  Returns:
    A distribution; the other layers share what is left of the budget evenly.

  Raises:
    ValueError: from the distribution, if it is given no leaf of these paths
      or if the budget is too small.

  References:
    Gale et al., 2019, arXiv:1902.09574, Section 6; as in Lee et al., 2021,
    arXiv:2010.07611, Section 3.

  Examples:
    >>> distribution = uniform_plus('a', 'c')
    >>> distribution({'a': (10,), 'b': (80,), 'c': (10,)}, 0.8)
    {'a': 10, 'b': 8, 'c': 2}
  """
  checks.real('last_density', last_density)
  if not 0 <= last_density <= 1:
    raise ValueError(f'`last_density` must be in [0, 1], got {last_density}.')

  def distribution(shapes: Shapes, sparsity: float) -> Kept:
    missing = [path for path in (first, last) if path not in shapes]
    if missing:
      raise ValueError(
        f'uniform_plus knows no leaf {missing[0]!r} among those that are '
        f'pruned: {", ".join(shapes)}.'
      )
    sizes = _sizes(shapes)
    lowest = dict.fromkeys(sizes, 0)
    lowest[last] = counts_lib.least(sizes[last], last_density)
    lowest[first] = sizes[first]
    return share(sizes, sizes, sparsity, lowest)

  return distribution


@kinds.checked
def erk(shapes: Shapes, sparsity: float) -> Kept:
  """Keeps weights in proportion to the sum of a leaf's dimensions.

  density_l proportional to (sum of dims of l) / (product of dims of l); a leaf
  that would exceed density 1 is dense, and the others are solved again.

  Args:
    shapes: path -> shape of a leaf that is pruned.
    sparsity: s in [0, 1], static.

  Returns:
    path -> number of weights kept; the sum is N - round(s N).

  References:
    Evci et al., 2020, arXiv:1911.11134, Section 3 (Erdos-Renyi-Kernel); Mocanu
    et al., 2018, arXiv:1707.04780, Eq. 2 for two dimensions.

  Examples:
    >>> erk({'a': (10, 10), 'b': (30, 30)}, 0.9)
    {'a': 25, 'b': 75}
    >>> erk({'a': (2, 2), 'b': (30, 30)}, 0.5)  # 'a' would exceed its size.
    {'a': 4, 'b': 448}
  """
  weights = {path: float(sum(shape)) for path, shape in shapes.items()}
  return share(_sizes(shapes), weights, sparsity)


@kinds.checked
def by_macs(
  macs: Mapping[str, float], *, power: float = 0.5
) -> Callable[[Shapes, float], Kept]:
  """Keeps fewer of the weights that are used in more places.

  density_l proportional to (multiply-adds per weight of l) ** -power. A weight
  of a convolution costs one multiply-add per output position, so that early
  layers get sparser and the multiply-adds fall faster than the weights; power
  0 is uniform. The rule is ours.

  Args:
    macs: path -> multiply-adds per weight, above 0.
    power: how strongly the cost counts.

  Returns:
    A distribution; the sum of what it keeps is N - round(s N).

  Raises:
    ValueError: if a cost is not above 0; from the distribution, if the cost of
      a leaf is missing.

  Examples:
    >>> distribution = by_macs({'conv': 4.0, 'dense': 1.0})
    >>> distribution({'conv': (60,), 'dense': (60,)}, 0.5)
    {'conv': 20, 'dense': 40}
  """
  checks.real('power', power)
  for path, cost in macs.items():
    if cost > 0:  # What is not is named below.
      checks.real(f'macs[{path!r}]', cost)
  bad = [path for path, cost in macs.items() if not cost > 0]
  if bad:
    raise ValueError(
      f'Multiply-adds per weight must be above 0; {bad[0]!r} has '
      f'{macs[bad[0]]}.'
    )

  def distribution(shapes: Shapes, sparsity: float) -> Kept:
    missing = [path for path in shapes if path not in macs]
    if missing:
      raise ValueError(
        'by_macs needs the multiply-adds per weight of every leaf that is '
        f'pruned; missing: {", ".join(missing)}.'
      )
    sizes = _sizes(shapes)
    weights = {path: n * macs[path] ** -power for path, n in sizes.items()}
    return share(sizes, weights, sparsity)

  return distribution


@kinds.checked
def share(
  sizes: Mapping[str, int],
  weights: Mapping[str, float],
  sparsity: float,
  lowest: Mapping[str, int] | None = None,
) -> Kept:
  """Shares N - round(s N) kept weights out in proportion to ``weights``.

  kept_l = clip(c weights_l, lowest_l, sizes_l), with the c that meets the
  budget; fractions are settled by the largest remainder, the earlier leaf
  first. Leaves of weight 0 share what the others cannot hold by their sizes.

  Args:
    sizes: path -> number of weights.
    weights: path -> what the share is proportional to.
    sparsity: s in [0, 1], static.
    lowest: path -> the least a leaf keeps; 0 by default.

  Returns:
    path -> number of weights kept.

  Raises:
    ValueError: if the least of all leaves together exceeds the budget.

  Examples:
    >>> share({'a': 10, 'b': 10}, {'a': 1.0, 'b': 2.0}, 0.7)
    {'a': 2, 'b': 4}
  """
  paths = list(sizes)
  budget = counts_lib.kept(sum(sizes.values()), sparsity)
  lowest = lowest or dict.fromkeys(paths, 0)
  if sum(lowest.values()) > budget:
    raise ValueError(
      f'A sparsity of {sparsity} keeps {budget} weights, fewer than the '
      f'{sum(lowest.values())} that bounded leaves hold; lower it, or the '
      'bounds.'
    )
  checks.has_each('weights', weights, paths)
  exact = _water(
    [fractions.Fraction(weights[path]) for path in paths],
    [lowest[path] for path in paths],
    [sizes[path] for path in paths],
    budget,
  )
  whole = [int(x) for x in exact]
  order = sorted(range(len(paths)), key=lambda i: (whole[i] - exact[i], i))
  for i in order[: budget - sum(whole)]:
    whole[i] += 1
  return dict(zip(paths, whole, strict=True))


def _water(
  weights: Sequence[fractions.Fraction],
  low: Sequence[int],
  high: Sequence[int],
  budget: int,
) -> list[fractions.Fraction]:
  """Returns clip(c w, low, high) with the c for which the sum is the budget.

  Leaves are bound one side at a time: were all that hit a bound fixed, those
  on the side that is in excess stay fixed in the solution, so each round
  settles at least one leaf.
  """
  zero = fractions.Fraction(0)
  values = [zero] * len(weights)
  free = set(range(len(weights)))
  left = fractions.Fraction(budget)
  while free:
    if not any(weights[i] for i in free):
      weights = [fractions.Fraction(n) for n in high]
    total = sum((weights[i] for i in free), zero)
    rate = left / total if total else zero
    over = {i for i in free if rate * weights[i] > high[i]}
    under = {i for i in free if rate * weights[i] < low[i]}
    if not over and not under:
      for i in free:
        values[i] = rate * weights[i]
      break
    excess = sum((rate * weights[i] - high[i] for i in over), zero)
    lack = sum((low[i] - rate * weights[i] for i in under), zero)
    fixed, bound = (over, high) if excess >= lack else (under, low)
    for i in fixed:
      values[i] = fractions.Fraction(bound[i])
      left -= bound[i]
    free -= fixed
  return values


def _normalise(scores: tree_lib.PyTree) -> tree_lib.PyTree:
  """Divides each leaf by the root of the sum of its squares."""

  def one(x):
    (unit,) = floats.split(x)
    norm = jnp.sqrt(jnp.sum(jnp.square(unit.x)))
    return unit.x / jnp.where(norm > 0, norm, 1)

  return jax.tree.map(one, scores)


@kinds.checked
def survival(x: jax.Array) -> jax.Array:
  """Returns each square over the sum of those at least as large.

  It sorts: the sums need the whole order. The earlier of equal entries counts
  as the larger, as in selection, and the largest has 1. What is below 0 is no
  part of the sums and comes last, in its own order: x over the largest |x| of
  those.

  Rounding turns no two entries round, at any scale, subnormal ones included:
  a smaller entry never scores more. Entries 1e-19 times the largest of their
  leaf, whose squares no float32 holds, score 0 and rank by position.

  Args:
    x: scores of one leaf, of any shape and size.

  Returns:
    An array like x, float32 or wider.

  Examples:
    >>> print(survival(jnp.array([1.0, 2.0, 0.0])))
    [0.2 1.  0. ]
  """
  unit = floats.split(sharding.whole(x))[0].x
  flat = unit.ravel()
  ordered, *places = jax.lax.sort(
    (-flat, *_places(unit)), num_keys=1, is_stable=True
  )
  squares = jnp.square(jnp.minimum(ordered, 0))
  sums = jax.lax.associative_scan(jnp.add, squares)
  ratio = squares / jnp.where(sums > 0, sums, 1)
  ratio = jax.lax.cummin(ratio)  # Sums are rounded, and may fall by a bit.
  if flat.size < 1 << 31 and len(places) == 1:
    found = jnp.zeros_like(flat).at[places[0]].set(ratio, unique_indices=True)
  else:  # No index is so wide: what a sort has moved a sort moves back.
    *_, found = jax.lax.sort((*places, ratio), num_keys=len(places))
  most = jnp.max(jnp.where(flat < 0, -flat, 0), initial=0)
  below = flat / jnp.where(most > 0, most, 1)
  return sharding.like(jnp.where(flat < 0, below, found).reshape(x.shape), x)


def _places(x: jax.Array) -> list[jax.Array]:
  """Returns where each entry of a flat array is, in one uint32 or two."""
  split = keys.Split(x.shape, ((),) * x.ndim)
  spans = ((0, split.lead),) if split.lead else ()
  return [
    keys.positions(x, split, start, stop).ravel()
    for start, stop in (*spans, (split.lead, x.ndim))
  ]


global_ = Pooled()
normalised = Pooled(_normalise)
lamp = Pooled(lambda scores: jax.tree.map(survival, scores))


@kinds.checked
def select_pooled(
  scores: tree_lib.PyTree, keep: counts_lib.Keep, distribution: Pooled
) -> tree_lib.PyTree:
  """Returns masks of the best ``keep`` entries of all leaves together.

  Args:
    scores: pytree of scores.
    keep: how many; static or traced.
    distribution: ``global_`` takes scores as they are; ``normalised`` divides
      each leaf by its norm; ``lamp`` is the layer-adaptive score, the square
      over the sum of all squares in its leaf that are at least as large, by
      which the best entry of every leaf scores 1 and no leaf is emptied as
      long as ``keep`` is at least the number of leaves.

  References:
    Lee et al., 2021, arXiv:2010.07611, Eq. 4 (LAMP).

  Examples:
    >>> scores = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([10.0, 30.0])}
    >>> select_pooled(scores, 2, global_)['a'].tolist()
    [False, False]
    >>> select_pooled(scores, 2, lamp)['a'].tolist()
    [False, True]
  """
  if distribution.rescale is not None:
    scores = distribution.rescale(scores)
  return select.top_masks(scores, keep)


@kinds.checked
def table(
  distribution: Callable[[Shapes, float], Kept],
  shapes: Shapes,
  units: Mapping[str, int],
  levels: Sequence[float],
  *,
  grid: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
  """Tabulates a distribution, for a sparsity that is only known under jit.

  Args:
    distribution: from shapes and a static sparsity to counts.
    shapes: path -> shape of a leaf that is pruned.
    units: path -> how many units (blocks, channels; the size, for elements)
      the leaf has; counts of weights become counts of units.
    levels: sparsities to hold exactly.
    grid: whether to hold the multiples of 1/128 beside them.

  Returns:
    Sparsities, ascending, float64 of shape [rows], and pruned units, int64 of
    shape [rows, leaves]. A sparsity that bounds of the distribution exclude
    has the row of the highest one that they allow.

  Raises:
    ValueError: from the distribution, at one of ``levels``.
  """
  for level in levels:
    distribution(shapes, level)
  # One row per float32; a level wins over a multiple of 1/128 beside it.
  multiples = [i / 128 for i in range(129)] if grid else []
  rows_at = sorted({np.float32(x): x for x in (*multiples, *levels)}.values())
  sizes = _sizes(shapes)
  checks.has_each('units', units, shapes)
  rows = []
  for sparsity in rows_at:
    try:
      kept = distribution(shapes, sparsity)
    except ValueError:
      if not rows:
        raise
      rows.append(rows[-1])
      continue
    rows.append(
      [
        units[path] - round(units[path] * count / sizes[path])
        if units[path] != sizes[path]
        else sizes[path] - count
        for path, count in kept.items()
      ]
    )
  return np.array(rows_at), np.array(rows, np.int64)


@kinds.checked
def interpolate(
  grid: np.ndarray, pruned: np.ndarray, sparsity: jax.Array
) -> counts_lib.Limbs:
  """Returns how many units of each leaf a traced sparsity prunes.

  On a row of the table the counts are the row's. Between two rows each leaf's
  count lies on the line between them; what is left of the line's sum, rounded
  half to even, goes to leaves with a fraction, first to those with a half or
  more.

  Args:
    grid: sparsities, as :func:`table` gives them.
    pruned: counts, as :func:`table` gives them.
    sparsity: float32, shape [].

  Returns:
    Counts as (high, low), uint32 of shape [leaves] each; a count is
    high * 2**16 + low.
  """
  at = jnp.asarray(grid, jnp.float32)
  last = len(grid) - 1
  row = jnp.sum(at <= sparsity, dtype=jnp.int32) - 1
  row = jnp.clip(row, 0, last)
  width = at[jnp.minimum(row + 1, last)] - at[row]
  weight = (sparsity - at[row]) / jnp.where(width > 0, width, 1)
  # The sum of the leaves is the last column, and goes the same way.
  counts = np.concatenate([pruned, pruned.sum(1, keepdims=True)], 1)
  steps = np.diff(counts, axis=0, append=counts[-1:])
  split = jax.vmap(counts_lib.scale, (0, None))
  limbs = [(np.abs(steps) >> shift) & 0xFFFF for shift in (0, 16, 32)]
  step = jnp.asarray(np.stack(limbs, -1), jnp.uint32)[row]
  high, low, point, rest = split(step, weight)
  half, rest = counts_lib.at_half(point, rest)
  base = (
    jnp.asarray(counts >> 16, jnp.uint32)[row],
    jnp.asarray(counts & 0xFFFF, jnp.uint32)[row],
  )
  part = half | rest
  falls = jnp.asarray(steps < 0)[row]  # Rounding can make a leaf lose a unit.
  up = counts_lib.carry(base[0] + high, base[1] + low)
  ceiling = counts_lib.carry(high, low + part.astype(jnp.uint32))
  down = counts_lib.minus(base, ceiling)
  whole = [jnp.where(falls, d, u) for d, u in zip(down, up, strict=True)]
  value = (whole[0] << 16) + whole[1]  # Modulo 2**32, as is the difference.
  odd = value[-1] & 1 == 1
  total = value[-1] + (half[-1] & (rest[-1] | odd)).astype(jnp.uint32)
  missing = total - jnp.sum(value[:-1], dtype=jnp.uint32)
  rank = jnp.where(part[:-1], jnp.where(half[:-1] | falls[:-1], 0, 1), 2)
  place = jnp.argsort(jnp.argsort(rank, stable=True))
  extra = (place < missing).astype(jnp.uint32)
  return counts_lib.carry(whole[0][:-1], whole[1][:-1] + extra)


@kinds.checked
def counts(
  distribution: Callable[[Shapes, float], Kept],
  shapes: Shapes,
  units: Mapping[str, int],
  sparsity: float | jax.Array,
  levels: Sequence[float] = (),
) -> Kept | counts_lib.Limbs:
  """Returns how many units of each leaf to keep, exactly.

  Args:
    distribution: from shapes and a static sparsity to counts of weights.
    shapes: path -> shape of a leaf that is pruned.
    units: path -> how many units the leaf has: its size, or the number of its
      blocks or channels, of which as large a part is kept as of the weights,
      to half a unit of each leaf; :func:`uniform` meets the sum of units.
    sparsity: s in [0, 1]; static, or traced float32.
    levels: static sparsities that a traced one stands for wherever it equals
      their float32.

  Returns:
    For a static sparsity, path -> count; else limbs of shape [leaves], as
    :func:`jaxprune.numerics.select.top_masks` takes them.

  Raises:
    ValueError: from the distribution.

  Examples:
    >>> shapes, units = {'a': (10, 10), 'b': (30, 30)}, {'a': 100, 'b': 900}
    >>> counts(erk, shapes, units, 0.9)
    {'a': 25, 'b': 75}
    >>> high, low = counts(erk, shapes, units, jnp.float32(0.9), (0.9,))
    >>> high.tolist(), low.tolist()
    ([0, 0], [25, 75])
  """
  if distribution is uniform:
    if isinstance(sparsity, float | int):
      return _evenly(units, sparsity)
    return uniform_counts(list(units.values()), sparsity, levels)
  if isinstance(sparsity, float | int):
    _, pruned = table(distribution, shapes, units, [sparsity], grid=False)
    pairs = zip(shapes, pruned[0], strict=True)
    return {path: units[path] - int(count) for path, count in pairs}
  sizes = list(units.values())
  pruned = interpolate(*table(distribution, shapes, units, levels), sparsity)
  whole = counts_lib.stack([counts_lib.limbs(size) for size in sizes])
  return counts_lib.minus(whole, pruned)


@kinds.checked
def uniform_counts(
  sizes: Sequence[int], sparsity: jax.Array, levels: Sequence[float]
) -> counts_lib.Limbs:
  """Returns what :func:`uniform` keeps at a sparsity known under jit.

  Args:
    sizes: n of each leaf, static.
    sparsity: s in [0, 1], float32, shape [], traced.
    levels: the static sparsities that s stands for wherever it equals their
      float32.

  Returns:
    Limbs, uint32 of shape [leaves].

  Examples:
    >>> s = jnp.float32(0.90001)
    >>> high, low = uniform_counts([10**9], s, [])
    >>> int(high[0]) * 2**16 + int(low[0])
    99990010
    >>> high, low = uniform_counts([10**9], s, [0.90001])
    >>> int(high[0]) * 2**16 + int(low[0])
    99990000
  """
  whole = counts_lib.stack([counts_lib.limbs(size) for size in sizes])
  total = counts_lib.limbs(sum(sizes))
  kept = counts_lib.kept_limbs([sum(sizes)], jnp.asarray(sparsity)[None])
  split = jnp.asarray(np.stack([counts_lib.split(size) for size in sizes]))
  scale = jax.vmap(counts_lib.scale, (0, None))
  high, low, point, _ = scale(split, jnp.asarray(sparsity))
  value = lambda limbs: (limbs[0] << 16) + limbs[1]  # Modulo 2**32.
  pruned = value(total) - value(kept)[0]
  missing = pruned - jnp.sum(value((high, low)), dtype=jnp.uint32)
  order = jnp.argsort(~point[::-1], stable=True)  # Last first, where equal.
  extra = (jnp.argsort(order)[::-1] < missing).astype(jnp.uint32)
  keep = counts_lib.minus(whole, counts_lib.carry(high, low + extra))
  for level in levels:
    named = {str(i): size for i, size in enumerate(sizes)}
    exact = list(_evenly(named, float(level)).values())
    here = sparsity == np.float32(level)
    high = np.array([count >> 16 for count in exact], np.uint32)
    low = np.array([count & 0xFFFF for count in exact], np.uint32)
    keep = jnp.where(here, high, keep[0]), jnp.where(here, low, keep[1])
  return keep


def _sizes(shapes: Shapes) -> dict[str, int]:
  return {path: math.prod(shape) for path, shape in shapes.items()}
