"""Optax transformations that hold weights at exactly zero.

Each is the *last* link of an ``optax.chain``: it sees the updates as they are
about to be applied, and gives a pruned weight the update -w, so that
``optax.apply_updates`` alone leaves exact zeros. What that asks of a chain:

* Weight decay, clipping and learning rates come before; a link after it, such
  as ``optax.scale``, breaks the zeros. ``docs/optax_wrappers.md`` has a table
  of every link and wrapper of optax, by where it may stand.
* ``optax.MultiSteps`` goes around the whole chain, so that steps are real
  ones. So does ``optax.apply_if_finite``, or NaN gets past it.
* With ``optax.lookahead``: ``chain(lookahead(...), sparsify(...))``, which
  holds both copies; ``lookahead(chain(..., sparsify))`` overwrites the zeros.
* No update makes a weight zero that is NaN or infinite: such a one stays as it
  is, and counts as one that came back. ``masks.apply`` sets it to zero.
* An average of the params (EMA) has exact zeros only once it is masked itself:
  ``masks.apply(optax.tree.get(state, 'masks'), average)``. So has what
  ``optax.contrib.schedule_free_eval_params`` returns, which is an average: of
  ``chain(schedule_free(...), sparsify(...))`` deploy
  ``masks.apply(masks, schedule_free_eval_params(state[0], params))``.

* Under ``vmap`` a mapped step makes every member draw at every step, as a
  branch that some take is taken by all: for the largest kernel of a ResNet-50
  3.6 times the CPU time of a step that only applies masks
  (``experiments.benchmark --rows=vmap``). Members that draw together leave it
  unmapped: ``SparsifyState(step=None, mask_sparsity=None, masks=0)`` among the
  axes, in and out; then only the steps that are due draw.
* On a mesh whose axes are explicit, masks are those of one device and lie as
  their params do. What regroups a leaf (channels, blocks, LAMP, packed masks)
  gathers it whole on each device while masks are drawn, and packed masks stay
  so: where that is too much memory use ``AxisType.Auto``, with which the
  compiler decides.

A chain that does not hold says so: ``'revived'`` in its state counts weights
that came back, and ``jaxprune.check_sparse`` names them. State is found by
name, under jit too: ``optax.tree.get(opt_state, 'masks')``,
``'mask_sparsity'``, ``'revived'``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import checks, schedules
from jaxprune import distributions as distributions_lib
from jaxprune import masks as masks_lib
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.transforms import recipes, zeros


class SparsifyState(NamedTuple):
  """State of :func:`sparsify`."""

  step: jax.Array  # Updates seen so far; int32, shape [].
  mask_sparsity: Any  # Asked for at the last drawing, float32, shape [], or a
  # dict of them by rule; masks.sparsity(masks) counts what came of it. Not
  # `sparsity`, which optax.inject_hyperparams may hold.
  masks: tree_lib.PyTree  # Like params; bool, or uint8 where packed.
  revived: jax.Array | int = 0  # The most weights at once that were pruned and
  # not zero on entry, int32, shape []; 0 of a chain that holds. Looked at after
  # 1 to 8 updates with masks in force, then after each 16th: a weight that
  # comes back and goes between two looks is not counted.


class KeepSparseState(NamedTuple):
  """State of :func:`keep_sparse`."""

  masks: tree_lib.PyTree  # Like params; bool, or uint8 where packed.
  step: jax.Array  # Updates seen so far; int32, shape [].
  revived: jax.Array  # As in :class:`SparsifyState`.


@kinds.checked
def sparsify(
  score: recipes.Score | None,
  sparsity: recipes.Sparsity | Mapping[str, recipes.Sparsity] | None = None,
  *,
  distribution: distributions_lib.Distribution = distributions_lib.uniform,
  granularity: recipes.Grains = None,
  every: int = 1,
  which: tree_lib.Which = None,
  regrow: bool = False,
  packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Prunes to a scheduled sparsity; the last link of a chain.

  With params w, step t applies

    mask = top(score(w), sparsity(t))   if masks are due at t,
    u'   = u where mask, else -w.

  Masks are due on every ``every``-th step on which the sparsity is not the one
  they were drawn for, and on the step on which the schedule comes to rest, so
  that its target is met whatever ``every`` is. Between, a step costs one fused
  ``where``. Where the sparsity rests masks stay as they are.

  Args:
    score: params -> scores like params, ``optax.MaskedNode()`` where a leaf
      stays dense; or None, and ``update(..., scores=scores)`` brings them, as
      it may for a score that needs batches.
    sparsity: fraction of zeros. A float prunes once, on the first step; a
      schedule maps a step to it. Rules over paths give each leaf its own (the
      first match wins, what no rule matches stays dense), met by the leaves
      of a rule together. Not needed where all is n_by_m; what is n_by_m must
      end at its 1 - n / m.
    distribution: how the leaves share the budget; for rules only ``uniform``.
    granularity: what is kept or pruned as one (``masks.elements()`` by
      default), or rules over paths; a leaf whose rule says None stays dense.
    every: steps between two drawings of masks, at least 1.
    which: the leaves to prune among those that have scores; see
      :func:`jaxprune.tree.prunable`.
    regrow: whether a pruned weight may come back when masks are drawn again.
      If not, masks only lose entries. If so, the score is that of w + u, the
      params as they would be, as pruned weights are all zero before; the
      updates then take an array of their own at every step, which costs more
      than the ``where``. A schedule that lets the sparsity fall needs it.
    packed: whether the state holds eight masks in a byte.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Raises:
    ValueError: if an argument is out of range, if a rule matches nothing, if
      nothing is left to prune, if a leaf does not fit its granularity (all such
      leaves are named), or if ``update`` is called without params, or
      without scores or with some that do not fit their leaves.

  References:
    Zhu and Gupta, 2017, arXiv:1710.01878 (gradual pruning); the projection by
    the last link is ours.

  Examples:
    >>> score = lambda params: jax.tree.map(jnp.abs, params)
    >>> tx = optax.chain(optax.sgd(1.0), sparsify(score, 0.5))
    >>> w, g = jnp.array([3.0, -1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, 0.0, 0.0])
    >>> u, state = tx.update(g, tx.init(w), w)
    >>> print(optax.apply_updates(w, u))
    [2. 0. 2. 0.]
    >>> float(optax.tree.get(state, 'mask_sparsity'))
    0.5
  """
  checks.whole('every', every, 1)
  recipe = recipes.Recipe.of(sparsity, distribution, granularity, which, regrow)

  def init_fn(params):
    masks = recipes.all_kept(score, params, recipe)
    return SparsifyState(
      step=jnp.zeros([], jnp.int32),
      mask_sparsity=jax.tree.map(lambda _: jnp.float32(0), recipe.sparsity),
      masks=masks_lib.pack(masks) if packed else masks,
      revived=jnp.zeros([], jnp.int32),
    )

  def update_fn(updates, state, params=None, *, scores=None, **extra):
    del extra
    _check_given(params, score, scores)
    old = _masks_of(state, params, recipe, packed)
    due, levels = _due(recipe, state, every)

    def redraw():
      fresh = scores
      if score is not None and scores is None:
        fresh = score(applied(params, updates) if regrow else params)
      return recipes.draw(recipe, fresh, old, levels)

    masks = jax.lax.cond(due, redraw, lambda: old)
    last = jax.tree.map(
      lambda level, s: jnp.where(due, level, s), levels, state.mask_sparsity
    )
    new = SparsifyState(
      step=next_step(state.step),
      mask_sparsity=last,
      masks=masks_lib.pack(masks) if packed else masks,
      revived=zeros.most_revived(params, old, state.revived, state.step),
    )
    return project(updates, params, masks), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@kinds.checked
def soft_shrinkage(
  score: recipes.Score | None,
  sparsity: recipes.Sparsity | None = None,
  *,
  end: int,
  factor: float = 0.95,
  distribution: distributions_lib.Distribution = distributions_lib.uniform,
  granularity: recipes.Grains = None,
  which: tree_lib.Which = None,
  packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Shrinks what would be pruned, and prunes it at ``end``.

  Up to ``end`` masks are drawn at every step, and with w + u the params as
  they would be,

    u' = u where mask, else factor (w + u) - w,

  so that a weight that gains on others comes back. At ``end`` the masks stay,
  and pruned weights are exactly zero from then on.

  Args:
    score: as for :func:`sparsify`.
    sparsity: fraction that is shrunk, as for :func:`sparsify`, rules excepted.
    end: step of the hard cut.
    factor: by which a weight shrinks in a step, in [0, 1); 0 is iterative hard
      thresholding.
    distribution: as for :func:`sparsify`.
    granularity: as for :func:`sparsify`.
    which: as for :func:`sparsify`.
    packed: as for :func:`sparsify`.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    :class:`SparsifyState`.

  Raises:
    ValueError: as :func:`sparsify`, if ``factor`` or ``end`` is out of range,
      or if the schedule does not reach its target by ``end``.

  References:
    ISS-P, 2023, arXiv:2303.09650; ``factor`` is the default of the authors'
    code (confirmed there).

  Examples:
    >>> score = lambda params: jax.tree.map(jnp.abs, params)
    >>> tx = soft_shrinkage(score, 0.5, end=1, factor=0.5)
    >>> w, state = jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2))
    >>> for _ in range(2):
    ...   u, state = tx.update(jnp.zeros(2), state, w)
    ...   w = optax.apply_updates(w, u)
    ...   print(w)
    [4. 1.]
    [4. 0.]
  """
  checks.real('factor', factor)
  if not 0 <= factor < 1:
    raise ValueError(f'`factor` must be in [0, 1), got {factor}.')
  checks.whole('end', end, 0)
  recipe = recipes.Recipe.of(
    sparsity, distribution, granularity, which, regrow=True
  )

  _check_end(recipe, end)

  def init_fn(params):
    masks = recipes.all_kept(score, params, recipe)
    return SparsifyState(
      step=jnp.zeros([], jnp.int32),
      mask_sparsity=jax.tree.map(lambda _: jnp.float32(0), recipe.sparsity),
      masks=masks_lib.pack(masks) if packed else masks,
      revived=jnp.zeros([], jnp.int32),
    )

  def update_fn(updates, state, params=None, *, scores=None, **extra):
    del extra
    _check_given(params, score, scores)
    old = _masks_of(state, params, recipe, packed)
    soft = state.step < end
    due = state.step <= end
    levels = recipes.levels_at(recipe, jnp.minimum(state.step, end))

    def redraw():
      fresh = scores
      if score is not None and scores is None:
        fresh = score(applied(params, updates))
      return recipes.draw(recipe, fresh, old, levels)

    def shrink(w, u, mask):
      if u is None or masks_lib.is_dense(mask):
        return u
      minus_w = _minus(w, u)
      part = jnp.where(soft, factor, 0).astype(minus_w.dtype)
      less = part * (u - minus_w) + minus_w
      return jnp.where(mask, u, jnp.where(part > 0, less, minus_w))

    masks = jax.lax.cond(due, redraw, lambda: old)
    held = masks_lib.pack(masks) if packed else masks
    age = jnp.maximum(state.step - end, 0)  # Before, what is pruned shrinks.
    revived = zeros.most_revived(params, old, state.revived, age)
    new = SparsifyState(next_step(state.step), levels, held, revived)
    return jax.tree.map(shrink, params, updates, masks), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@kinds.checked
def keep_sparse(
  masks: tree_lib.Arrays | None = None,
  *,
  which: tree_lib.Which = None,
  packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Holds pruned weights at zero; the last link of a chain.

  u' = u where mask, else -w.

  Args:
    masks: pytree of bool like params, ``optax.MaskedNode()`` where dense; or
      None for the zeros that the params of ``init`` have.
    which: without masks, the leaves to hold; see
      :func:`jaxprune.tree.prunable`.
    packed: whether the state holds eight masks in a byte.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its ``update`` needs
    ``params``.

  Raises:
    ValueError: if a mask has not the shape of its leaf, or if ``update`` is
      called without params.

  Examples:
    >>> tx = keep_sparse(jnp.array([True, False]))
    >>> w = jnp.array([1.0, 2.0])
    >>> u, _ = tx.update(jnp.array([0.5, 0.5]), tx.init(w), w)
    >>> print(optax.apply_updates(w, u))
    [1.5 0. ]
  """

  def init_fn(params):
    start = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    if not jax.tree.leaves(params):  # Optax asks with a placeholder.
      return KeepSparseState(params, *start)
    held = masks
    if held is None:
      held = jax.tree.map(lambda w: w != 0, tree_lib.prunable(params, which))
    masks_lib.check_like(held, params)
    zeros.check_finite(params, held)
    return KeepSparseState(masks_lib.pack(held) if packed else held, *start)

  def update_fn(updates, state, params=None, **extra):
    del extra
    if params is None:
      raise ValueError('keep_sparse needs `params`; pass it to update.')
    held = state.masks
    if packed:
      held = masks_lib.unpack(held, params)
    masks_lib.check_like(held, params)
    new = KeepSparseState(
      state.masks,
      next_step(state.step),
      zeros.most_revived(params, held, state.revived, state.step),
    )
    return project(updates, params, held), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@kinds.checked
def mask_moments(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Zeroes moments where ``inner`` prunes, so that they carry nothing back.

  A wrapper, as no link of a chain can reach the state of another.

  Args:
    inner: a chain that ends in :func:`sparsify` or :func:`keep_sparse`.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with the state of ``inner``.

  Raises:
    ValueError: from ``init``, unless exactly one link of ``inner`` prunes.

  Examples:
    >>> mask = jnp.array([True, False])
    >>> tx = mask_moments(optax.chain(optax.trace(0.9), keep_sparse(mask)))
    >>> w = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)
    >>> print(optax.tree.get(state, 'trace'))
    [3. 0.]
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    state = inner.init(params)
    links = len(optax.tree.get_all_with_path(state, 'masks'))
    if links != 1:
      raise ValueError(
        f'mask_moments needs one link that prunes, {links} of its chain do. '
        'Wrap a chain that ends in one of sparsify, soft_shrinkage and '
        'keep_sparse.'
      )
    return state

  def update_fn(updates, state, params=None, **extra):
    updates, state = inner.update(updates, state, params, **extra)
    masks = masks_lib.unpacked(optax.tree.get(state, 'masks'), params)
    blank = jax.tree.map(jnp.zeros_like, state)
    pruned = jax.tree.map(
      lambda w, mask: mask if masks_lib.is_dense(mask) else ~mask,
      params,
      masks,
    )
    return updates, replace_in_state(inner, state, blank, params, pruned)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@kinds.checked
def replace_in_state(
  tx: optax.GradientTransformation,
  state: optax.OptState,
  fresh: optax.OptState,
  params: tree_lib.PyTree,
  where: tree_lib.PyTree,
) -> optax.OptState:
  """Replaces entries of every floating array in a state that is like params.

  Args:
    tx: the transformation whose state it is.
    state: its state.
    fresh: a state of the same structure, which replaces.
    params: the params.
    where: pytree of bool like params, True where to replace;
      ``optax.MaskedNode()`` where a leaf has nothing to replace.

  Returns:
    The new state. Arrays of another shape than their leaf, such as factored
    second moments, are left as they are.
  """
  choose = jax.tree.map(
    lambda w, x: jnp.zeros([], bool) if masks_lib.is_dense(x) else x,
    params,
    where,
  )
  is_leaf = lambda x: x is None or masks_lib.is_dense(x)
  chosen = optax.tree.map_params(
    tx,
    lambda _, x: x,
    state,
    choose,
    transform_non_params=lambda _: jnp.zeros([], bool),
    is_leaf=is_leaf,
  )

  def pick(old, new, x):
    if is_leaf(old) or jnp.shape(x) not in ((), jnp.shape(old)):
      return old
    if not jnp.issubdtype(jnp.result_type(old), jnp.floating):
      return old
    return jnp.where(x, new, old) if jnp.ndim(x) == jnp.ndim(old) else old

  return jax.tree.map(pick, state, fresh, chosen, is_leaf=is_leaf)


@kinds.checked
def project(
  updates: tree_lib.Arrays, params: tree_lib.Arrays, masks: tree_lib.Arrays
) -> optax.Updates:
  """Returns updates that make pruned weights exactly zero.

  u where mask, else -w; w + (-w) is 0 in every floating type. Updates that
  are narrower than their params take the type of the two together, as a
  bfloat16 holds no -w of float32. A weight that is NaN or infinite, which no
  update brings to zero, has the update 0 and stays what it is.

  Args:
    updates: pytree like params; None where a leaf is not updated.
    params: pytree of arrays.
    masks: pytree of bool like params; ``optax.MaskedNode()`` where dense.

  Examples:
    >>> w, u = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5])
    >>> print(project(u, w, jnp.array([True, False])))
    [ 0.5 -2. ]
  """
  tree_lib.check_alike('Updates', updates, params, shapes=True)
  tree_lib.check_alike('Masks', masks, params, shapes=True)

  def one(w, u, mask):
    if u is None or masks_lib.is_dense(mask):
      return u
    return jnp.where(mask, u, _minus(w, u))

  return jax.tree.map(one, params, updates, masks)


def _check_end(recipe: recipes.Recipe, end: int) -> None:
  for schedule in jax.tree.leaves(recipe.sparsity):
    if not isinstance(schedule, schedules.Schedule):
      continue
    with jax.ensure_compile_time_eval():
      last, target = schedule(end), schedule.levels[-1]
      short = bool(last != target)
    if short:
      raise ValueError(
        f'The schedule is at {float(last):.4g} at `end`={end}, when masks are '
        f'cut, not at its target {target}; end it by then, or raise `end`.'
      )


def _check_given(params, score, scores) -> None:
  if params is None:
    raise ValueError('sparsify needs `params`; pass it to update.')
  if score is None and scores is None:
    raise ValueError(
      'Without a score function, scores are needed at each step: '
      'tx.update(updates, state, params, scores=scores).'
    )


def _masks_of(
  state: SparsifyState,
  params: tree_lib.PyTree,
  recipe: recipes.Recipe,
  packed: bool,
) -> tree_lib.PyTree:
  """Returns the masks of a state as bool; refuses one of other settings."""
  there, needed = map(
    jax.tree.structure, (state.mask_sparsity, recipe.sparsity)
  )
  if there != needed:
    raise ValueError(
      f'The state is of other settings: it has {_form(state.mask_sparsity)}, '
      f'and this link {_form(recipe.sparsity)}. Restore it with the settings '
      'that it was made with, or begin with tx.init(params).'
    )
  masks = masks_lib.unpack(state.masks, params) if packed else state.masks
  masks_lib.check_like(masks, params)
  return masks


def _form(sparsity: Any) -> str:
  if isinstance(sparsity, Mapping):
    return f'a sparsity for each of the rules {", ".join(sparsity)}'
  return 'one sparsity for all'


def _due(
  recipe: recipes.Recipe, state: SparsifyState, every: int
) -> tuple[jax.Array, Any]:
  """Returns whether masks are drawn at this step, and for which sparsities."""
  levels = recipes.levels_at(recipe, state.step)
  after = recipes.levels_at(recipe, state.step + 1)
  tick = state.step % every == 0
  due = jax.tree.map(
    lambda s, after, last: (s != last) & (tick | (after == s)),
    levels,
    after,
    state.mask_sparsity,
  )
  return jnp.any(jnp.stack(jax.tree.leaves(due))), levels


def _minus(w: jax.Array, u: jax.Array) -> jax.Array:
  """Returns -w, exactly, in the type of w and u together; 0 if not finite."""
  minus_w = -w.astype(jnp.promote_types(u.dtype, w.dtype))
  return jnp.where(jnp.isfinite(w), minus_w, 0)  # inf - inf would be NaN.


@kinds.checked
def applied(
  params: tree_lib.Arrays, updates: tree_lib.Arrays
) -> tree_lib.PyTree:
  """Returns the params as the updates would leave them."""
  tree_lib.check_alike('Updates', updates, params, shapes=True)
  add = lambda w, u: w if u is None else (w + u).astype(w.dtype)
  return jax.tree.map(add, params, updates)


@kinds.checked
def next_step(step: jax.Array) -> jax.Array:
  """Returns step + 1, at most the largest int32."""
  return jnp.asarray(optax.safe_increment(step))
