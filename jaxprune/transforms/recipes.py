"""Which leaves to prune, in what units, by how much: and masks drawn so.

What ``transforms`` and ``dynamic`` share. A :class:`Recipe` is decided and
checked before any trace; :func:`draw` is the drawing itself.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import checks, schedules
from jaxprune import distributions as distributions_lib
from jaxprune import masks as masks_lib
from jaxprune import tree as tree_lib
from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import select, sharding

Score = Callable[[tree_lib.PyTree], tree_lib.PyTree]
Sparsity = float | Callable[[jax.Array], jax.Array]
Grain = masks_lib.Granularity
Grains = Grain | Mapping[str, Grain | None] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The arguments of a transformation, checked."""

  sparsity: Any  # One schedule, or a dict of rules to schedules.
  distribution: distributions_lib.Distribution
  granularity: Mapping[str, Grain | None]
  which: tree_lib.Which
  regrow: bool

  @classmethod
  def of(
    cls,
    sparsity: Sparsity | Mapping[str, Sparsity] | None,
    distribution: distributions_lib.Distribution,
    granularity: Grains,
    which: tree_lib.Which,
    regrow: bool,
  ) -> 'Recipe':
    """Checks and completes the arguments of a transformation."""
    if granularity is None:
      granularity = masks_lib.elements()
    if sparsity is None:
      sparsity = _of_groups(granularity)
    if isinstance(sparsity, Mapping):
      if distribution is not distributions_lib.uniform:
        raise ValueError(
          'Rules for the sparsity leave nothing to distribute; give one '
          'sparsity, or distribution=uniform.'
        )
      sparsity = {rule: _schedule(s) for rule, s in sparsity.items()}
    else:
      sparsity = _schedule(sparsity)
    falling = any(getattr(s, 'falls', False) for s in jax.tree.leaves(sparsity))
    if falling and not regrow:
      raise ValueError(
        'The schedule lets the sparsity fall, for which weights must be '
        'allowed to grow again: regrow=True.'
      )
    if not isinstance(granularity, Mapping):
      granularity = {'.*': granularity}
    return cls(sparsity, distribution, granularity, which, regrow)

  def choose(self, scores: tree_lib.PyTree) -> tree_lib.PyTree:
    """Returns scores with ``MaskedNode`` where a leaf is to stay dense."""
    if self.which is not None:
      scores = tree_lib.prunable(scores, self.which)
    paths = list(tree_lib.leaves(scores))
    grains = tree_lib.match(self.granularity, paths, None)
    dense = {path for path, grain in grains.items() if grain is None}
    if isinstance(self.sparsity, dict):
      rules = tree_lib.match(dict.fromkeys(self.sparsity, True), paths, False)
      dense |= {path for path, ruled in rules.items() if not ruled}
    return tree_lib.map_with_path(
      lambda path, x: optax.MaskedNode() if path in dense else x, scores
    )

  def grains(self, paths: Iterable[str]) -> dict[str, Grain | None]:
    """Returns the granularity of each leaf."""
    return _decide(self.granularity, paths, None)

  def rules(self, paths: Iterable[str]) -> dict[str, str | None]:
    """Returns the rule for the sparsity of each leaf, None for the only one."""
    if not isinstance(self.sparsity, dict):
      return dict.fromkeys(paths)
    return _decide({rule: rule for rule in self.sparsity}, paths, None)


def _of_groups(granularity: Grains) -> float | dict[str, float]:
  """Returns the sparsity that n_by_m has of itself, by rule if they differ."""
  rules = granularity
  if not isinstance(rules, Mapping):
    rules = {'.*': granularity}
  found = {}
  for rule, grain in rules.items():
    if grain is not None and not isinstance(grain, masks_lib.NByM):
      raise ValueError('`sparsity` is needed unless all is n_by_m.')
    if grain is not None:
      found[rule] = 1 - grain.n / grain.m
  return (
    found if len(set(found.values())) > 1 else max(found.values(), default=0.0)
  )


def _schedule(sparsity: Sparsity) -> Callable[[jax.Array], jax.Array]:
  if callable(sparsity):
    return sparsity
  if isinstance(sparsity, jax.Array):  # As optax.inject_hyperparams gives it.
    return lambda step: jnp.asarray(sparsity, jnp.float32)
  return schedules.constant(float(checks.sparsity(sparsity)))


def all_kept(
  score: Score | None, params: tree_lib.PyTree, recipe: Recipe
) -> tree_lib.PyTree:
  """Checks that every leaf can be pruned as asked; returns masks of True."""
  if not jax.tree.leaves(params):  # Optax asks with a placeholder.
    return params
  if score is None:
    scores = tree_lib.prunable(params, recipe.which)
  else:
    scores = jax.eval_shape(score, params)
  chosen = recipe.choose(scores)
  shapes = {path: x.shape for path, x in tree_lib.leaves(chosen).items()}
  if not shapes:
    raise ValueError(
      'No leaf is left to prune; the paths are: '
      f'{", ".join(tree_lib.leaves(params))}.'
    )
  problems = [
    f'{path} ({refusal})' for path, refusal in refusals(recipe, shapes).items()
  ]
  if problems:
    raise ValueError(
      f'Leaves that cannot be pruned in the granularity asked for: '
      f'{"; ".join(problems)}. Give them another by a rule, or None to keep '
      'them dense.'
    )
  if callable(recipe.distribution):
    grains = recipe.grains(shapes)
    shared = {
      path: shape
      for path, shape in shapes.items()
      if isinstance(grains[path], masks_lib.Blocks)
    }
    for level in getattr(recipe.sparsity, 'levels', ()):
      recipe.distribution(shared, max(level, 0.0))
  ones = lambda w, x: (
    x if masks_lib.is_dense(x) else jnp.ones_like(w, dtype=bool)
  )
  return jax.tree.map(ones, params, chosen)


def _decide(rules: Mapping[str, Any], paths: Iterable[str], default: Any):
  """Returns the value of each path; rules for other leaves may be idle."""
  paths = list(paths)
  live = {
    rule: value
    for rule, value in rules.items()
    if any(re.fullmatch(rule, path) for path in paths)
  }
  return tree_lib.match(live, paths, default)


def refusals(
  recipe: Recipe, shapes: distributions_lib.Shapes
) -> dict[str, str]:
  """Returns why leaves cannot be pruned as asked, by path."""
  rules, found = recipe.rules(shapes), {}
  for path, grain in recipe.grains(shapes).items():
    if not isinstance(grain, masks_lib.NByM):
      refusal = grain.problem(shapes[path]) if grain else None
    else:
      refusal = grain.problem(shapes[path], path)
      levels = getattr(_pick(recipe.sparsity, rules[path]), 'levels', ())
      most = 1 - grain.n / grain.m
      odd = [s for s in levels if s > most + 1e-6]
      odd += [s for s in levels[-1:] if s < most - 1e-6]
      if odd and refusal is None:
        refusal = (
          f'{grain.n}:{grain.m} prunes {most:.4g}, not {odd[0]:.4g}; say '
          f'{most:.4g} by a rule for its sparsity'
        )
    if refusal:
      found[path] = refusal
  return found


def _pick(levels: Any, rule: str | None) -> Any:
  return levels if rule is None else levels[rule]


def levels_at(recipe: Recipe, step: jax.Array) -> Any:
  """Returns the sparsity at a step: a scalar, or a dict of them by rule."""
  value = lambda fn: jnp.asarray(fn(step), jnp.float32)
  return jax.tree.map(value, recipe.sparsity)


def draw(
  recipe: Recipe, scores: tree_lib.PyTree, old: tree_lib.PyTree, levels: Any
) -> tree_lib.PyTree:
  """Returns masks of the best entries at the given sparsities."""
  _check_scores(scores, old)
  scores = tree_lib.restrict(scores, old)
  scores = jax.tree.map(sharding.like, scores, old)
  flat, previous = tree_lib.leaves(scores), tree_lib.leaves(old)
  shapes = {path: x.shape for path, x in flat.items()}
  grains, rules = recipe.grains(shapes), recipe.rules(shapes)
  drawn, units, sizes = {}, {}, {}
  for path, x in flat.items():
    grain = grains[path]
    if isinstance(grain, masks_lib.NByM):
      if not recipe.regrow:
        x = _dead_last(x, previous[path])
      s = _pick(levels, rules[path])
      fewer = grain.m - jnp.round(s * grain.m).astype(jnp.int32)
      n = jnp.maximum(fewer, grain.n)
      axis = -2 if grain.axis is None else grain.axis
      drawn[path] = masks_lib.n_by_m(x, n, grain.m, axis=axis)
    else:
      sizes[path] = grain.along(x.shape) if grain else (1,) * x.ndim
      units[path] = masks_lib.block_means(x, sizes[path])
  if units:
    distribution = recipe.distribution
    rescale = getattr(distribution, 'rescale', None)
    if rescale is not None:
      units = rescale(units)
    alive = None
    if not recipe.regrow:
      alive = {}
      for path, x in units.items():
        steps = tuple(slice(None, None, n) for n in sizes[path])
        held = previous[path]
        if any(n > 1 for n in sizes[path]):
          held = sharding.whole(held)[steps]
        units[path] = _dead_last(x, held)
        alive[path] = held
    shared = {path: shapes[path] for path in units}
    keep = kept_units(recipe, shared, levels, alive)
    for path, mask in select.top_masks(units, keep).items():
      mask = masks_lib.spread(mask, sizes[path], shapes[path])
      drawn[path] = sharding.like(mask, previous[path])
  if not recipe.regrow:  # A sparsity that falls leaves masks as they are.
    drawn = {path: mask & previous[path] for path, mask in drawn.items()}
  return tree_lib.map_with_path(lambda path, _: drawn[path], scores)


def _check_scores(scores: tree_lib.PyTree, masks: tree_lib.PyTree) -> None:
  """Raises if a leaf that has a mask has no floats of its shape as scores."""
  given, problems = tree_lib.leaves(scores), []
  for path, mask in tree_lib.leaves(masks).items():
    x = given.get(path)
    kind = 'none' if x is None else f'{jnp.result_type(x)}{list(np.shape(x))}'
    fits = x is not None and np.shape(x) == mask.shape
    if not fits or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      problems.append(f'{path} needs floats{list(mask.shape)}, got {kind}')
  if problems:
    raise ValueError(
      f'Scores do not fit the leaves to prune: {"; ".join(problems)}. Score '
      'them all, or choose with `which` those that have scores.'
    )


def _dead_last(x: jax.Array, alive: jax.Array) -> jax.Array:
  """Returns scores in which what is pruned ranks below all else, NaN too."""
  least = jnp.finfo(x.dtype).min
  return jnp.where(alive, jnp.where(x > least, x, least), -jnp.inf)


def unit_counts(
  recipe: Recipe, shapes: distributions_lib.Shapes
) -> dict[str, int]:
  """Returns how many blocks each leaf has."""
  found = {}
  for path, grain in recipe.grains(shapes).items():
    assert isinstance(grain, masks_lib.Blocks)
    lengths = zip(shapes[path], grain.along(shapes[path]), strict=True)
    found[path] = math.prod(-(-n // size) for n, size in lengths)
  return found


def kept_units(
  recipe: Recipe,
  shapes: distributions_lib.Shapes,
  levels: Any,
  alive: Mapping[str, jax.Array] | None = None,
) -> Any:
  """Returns how many blocks to keep: one count if pooled, else one by leaf.

  Args:
    recipe: the arguments of a transformation.
    shapes: path -> shape of a leaf that is pruned in blocks.
    levels: the sparsity, or a dict of them by rule: static, which gives ints
      by path; or traced, which gives limbs.
    alive: which blocks of a leaf may be kept, all by default. What rounding
      would give a leaf beyond, others of its rule keep.
  """
  units, groups = unit_counts(recipe, shapes), {}
  for path, rule in recipe.rules(shapes).items():
    groups.setdefault(rule, []).append(path)
  exact = lambda rule: getattr(_pick(recipe.sparsity, rule), 'levels', ())
  if isinstance(recipe.distribution, distributions_lib.Pooled):
    total = [sum(units.values())]
    pooled = distributions_lib.uniform_counts(total, levels, exact(None))
    return pooled[0][0], pooled[1][0]
  found = []
  for rule, paths in groups.items():
    keep = distributions_lib.counts(
      recipe.distribution,
      {path: shapes[path] for path in paths},
      {path: units[path] for path in paths},
      _pick(levels, rule),
      exact(rule),
    )
    if alive is not None and not isinstance(keep, dict):
      most = counts_lib.true([alive[path] for path in paths])
      keep = _at_most(most, keep)
    found.append(keep)
  if isinstance(found[0], dict):
    return {path: n for keep in found for path, n in keep.items()}
  named = [path for paths in groups.values() for path in paths]
  order = np.array([named.index(path) for path in units])
  high, low = (jnp.concatenate(limbs) for limbs in zip(*found, strict=True))
  return high[order], low[order]


def _at_most(
  most: counts_lib.Limbs, keep: counts_lib.Limbs
) -> counts_lib.Limbs:
  """Returns counts at most ``most``, with the sum kept where there is room."""
  small = lambda limbs: jnp.where(limbs[0] > 0, 0xFFFF, limbs[1])
  lack = jnp.sum(small(counts_lib.minus(keep, most)), dtype=jnp.uint32)
  over = counts_lib.at_least(keep, most)
  high, low = (jnp.where(over, a, b) for a, b in zip(most, keep, strict=True))
  room = small(counts_lib.minus(most, keep))
  before = jnp.cumsum(room, dtype=jnp.uint32) - room
  left = jnp.where(lack > before, lack - before, 0)
  return counts_lib.carry(high, low + jnp.minimum(left, room))
