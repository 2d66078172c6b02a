"""What a transformation will do to each leaf, and why, before it runs.

:func:`decide` takes the arguments of ``transforms.sparsify`` and answers for
every leaf of params: what it will be pruned to, or why it stays dense, or why
it would be refused. The answer is data; :func:`table` prints it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import distributions as distributions_lib
from jaxprune import masks as masks_lib
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.transforms import recipes


class Decision(NamedTuple):
  """What becomes of one leaf."""

  path: str
  shape: tuple[int, ...]
  verdict: str  # 'pruned', 'dense' or 'refused'.
  sparsity: float | None  # Of its units; None where the scores will decide.
  unit: str  # What is kept or pruned as one, such as 'element' or '2:4'.
  why: str  # Of a leaf that is not pruned, or of its sparsity; may be empty.


@kinds.checked
def decide(
  params: tree_lib.PyTree,
  sparsity: recipes.Sparsity | Mapping[str, recipes.Sparsity] | None = None,
  *,
  distribution: distributions_lib.Distribution = distributions_lib.uniform,
  granularity: recipes.Grains = None,
  which: tree_lib.Which = None,
  step: int | None = None,
) -> list[Decision]:
  """Returns what ``sparsify`` with these arguments does to each leaf.

  Args:
    params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    sparsity: as for :func:`jaxprune.transforms.sparsify`.
    distribution: as for ``sparsify``.
    granularity: as for ``sparsify``.
    which: as for ``sparsify``.
    step: of the schedules; None for the highest sparsity each one rests on.

  Returns:
    One :class:`Decision` for each leaf of params, in their order. A leaf is
    refused where ``sparsify`` would raise: it does not fit its granularity.

  Raises:
    ValueError: if a rule matches no leaf, if nothing is left to prune, or
      from the distribution.

  Examples:
    >>> shapes = {'k': (8, 4), 'v': (6, 4), 'bias': (4,)}
    >>> params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    >>> for row in decide(params, granularity=masks_lib.groups(2, 4)):
    ...   print(row.path, row.verdict, row.why or row.sparsity)
    bias dense leaves named 'bias' stay dense by default
    k pruned 0.5
    v refused 4 does not divide axis -2 of (6, 4)
  """
  recipe = recipes.Recipe.of(
    sparsity, distribution, granularity, which, regrow=True
  )
  named = tree_lib.leaves(params)
  weights = tree_lib.leaves(tree_lib.prunable(params, which))
  scored = jax.tree.map(
    lambda w: jax.ShapeDtypeStruct(np.shape(w), jnp.float32), weights
  )
  grains = tree_lib.match(recipe.granularity, scored, None)
  rules = recipe.rules(scored)
  dense: dict[str, str] = {}
  for path, leaf in named.items():
    if path not in scored:
      dense[path] = tree_lib.why_dense(path, leaf)
      if isinstance(which, Mapping) or callable(which):
        dense[path] = 'not among the leaves that `which` chooses'
    elif grains[path] is None:
      dense[path] = 'its granularity rule says None, or there is none'
    elif isinstance(recipe.sparsity, dict) and rules[path] is None:
      dense[path] = 'no rule for its sparsity'
  live = {k: x.shape for k, x in scored.items() if k not in dense}
  refused = recipes.refusals(recipe, live)
  pruned = [path for path in scored if path not in {**dense, **refused}]
  shapes = {path: scored[path].shape for path in pruned}
  kept = _kept(recipe, shapes, grains, rules, step)
  rows = []
  for path, leaf in named.items():
    shape = np.shape(leaf)
    if path in pruned:
      part, why = kept[path]
      rows.append(
        Decision(path, shape, 'pruned', part, _unit(grains[path]), why)
      )
    else:
      verdict = 'refused' if path in refused else 'dense'
      why = {**dense, **refused}[path]
      rows.append(Decision(path, shape, verdict, 0.0, '', why))
  return rows


@kinds.checked
def table(rows: Iterable[Decision]) -> str:
  """Returns decisions as lines of text, one for each leaf.

  Args:
    rows: from :func:`decide`.

  Examples:
    >>> print(table(decide({'kernel': jnp.ones((8, 4))}, 0.75)))
    leaf    shape  verdict  sparsity  unit     why
    kernel  8x4    pruned     75.00%  element
  """
  cells = [('leaf', 'shape', 'verdict', 'sparsity', 'unit', 'why')]
  for row in rows:
    part = 'by score' if row.sparsity is None else f'{row.sparsity:.2%}'
    shape = 'x'.join(map(str, row.shape)) or 'scalar'
    cells.append((row.path, shape, row.verdict, part, row.unit, row.why))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  sides = [str.ljust, str.ljust, str.ljust, str.rjust, str.ljust, str.ljust]
  line = lambda row: '  '.join(
    side(cell, width)
    for side, cell, width in zip(sides, row, widths, strict=True)
  )
  return '\n'.join(line(row).rstrip() for row in cells)


def _kept(
  recipe: recipes.Recipe,
  shapes: distributions_lib.Shapes,
  grains: Mapping[str, recipes.Grain | None],
  rules: Mapping[str, str | None],
  step: int | None,
) -> dict[str, tuple[float | None, str]]:
  """Returns (sparsity, remark) of each leaf that is pruned."""
  found: dict[str, tuple[float | None, str]] = {}
  levels = {path: _level(recipe.sparsity, rules[path], step) for path in shapes}
  shared = {}
  for path, shape in shapes.items():
    grain = grains[path]
    if isinstance(grain, masks_lib.NByM):
      pruned = min(round(levels[path] * grain.m), grain.m - grain.n)
      found[path] = pruned / grain.m, ''
    else:
      shared[path] = shape
  if isinstance(recipe.distribution, distributions_lib.Pooled):
    return {**found, **dict.fromkeys(shared, (None, 'one threshold for all'))}
  if not shared:
    return found
  if isinstance(recipe.sparsity, dict):
    given = {rules[path]: levels[path] for path in shared}
  else:
    given = next(iter(levels.values()))
  kept = recipes.kept_units(recipe, shared, given)
  for path, size in recipes.unit_counts(recipe, shared).items():
    bound = kept[path] == size and levels[path] > 0
    why = 'at its bound: the distribution keeps all' if bound else ''
    found[path] = 1 - kept[path] / size if size else 0.0, why
  return found


def _level(sparsity: object, rule: str | None, step: int | None) -> float:
  schedule = sparsity[rule] if isinstance(sparsity, dict) else sparsity
  levels = getattr(schedule, 'levels', ())
  if step is None and levels:
    return float(max(levels))
  found = float(schedule(jnp.int32(step or 0)))  # type: ignore
  return next((s for s in levels if np.float32(s) == found), found)


def _unit(grain: recipes.Grain | None) -> str:
  if isinstance(grain, masks_lib.NByM):
    return f'{grain.n}:{grain.m}'
  assert grain is not None
  if not grain.sizes:
    return 'element'
  sizes = ', '.join(
    f'{size or "all"} along {axis}' for axis, size in grain.sizes.items()
  )
  return f'block of {sizes}' + ('' if grain.others == 1 else ', all else whole')
