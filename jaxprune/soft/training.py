"""PDP beside the loss: its ramp, its warnings, and one line of optax."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune import checks, transforms, tree
from jaxprune.checks import kinds
from jaxprune.numerics import sharding
from jaxprune.soft import channels as soft_channels
from jaxprune.soft import weights
from jaxprune.transforms import zeros


@kinds.checked
def ramp(
  epoch: float | jax.Array, begin: float = 16, rate: float = 0.015
) -> jax.Array:
  """Returns the fraction of the target sparsity that is in force.

  min(1, rate * (epoch - begin + 1)) from epoch ``begin`` on, 0 before.

  Args:
    epoch: counted from 0, static or traced; a whole number as published, or
      step / steps_per_epoch to ramp at every step with the same slope.
    begin: the first epoch after warm-up.
    rate: per epoch; 0.015 reaches the target after 67 epochs.

  Returns:
    float32[], for ``state._replace(ramp=...)``.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203; figures confirmed at second
    hand.

  Examples:
    >>> [round(float(ramp(e, begin=2, rate=0.4)), 1) for e in range(6)]
    [0.0, 0.0, 0.4, 0.8, 1.0, 1.0]
  """
  epoch = jnp.asarray(epoch, jnp.float32)
  ramp = jnp.clip(rate * (epoch - begin + 1), 0.0, 1.0)
  return jnp.where(epoch < begin, 0.0, ramp)


@kinds.checked
def ramp_schedule(
  steps_per_epoch: int, rate: float = 0.015, by: str = 'epoch'
) -> optax.Schedule:
  """Returns :func:`ramp` as a function of the updates since the warm-up.

  Args:
    steps_per_epoch: at least 1.
    rate: per epoch.
    by: 'epoch', the published staircase, or 'step', of the same slope.

  Returns:
    A schedule for :func:`track_pdp`.

  Raises:
    ValueError: if ``steps_per_epoch`` is below 1 or ``by`` is another word.

  Examples:
    >>> stairs, slope = (ramp_schedule(4, 0.1, by) for by in ('epoch', 'step'))
    >>> [round(float(f(step)), 3) for f in (stairs, slope) for step in (0, 2)]
    [0.1, 0.1, 0.1, 0.15]
  """
  checks.whole('steps_per_epoch', steps_per_epoch, 1)
  checks.real('rate', rate, above=0)
  if by not in ('epoch', 'step'):
    raise ValueError(f"`by` must be 'epoch' or 'step', got {by!r}.")

  def schedule(step):
    if by == 'epoch':
      return ramp(step // steps_per_epoch, begin=0, rate=rate)
    return ramp(step / steps_per_epoch, begin=0, rate=rate)

  return schedule


@kinds.checked
def is_warm(
  accuracies: Sequence[float], *, upper: float = 1.0, patience: int = 5
) -> bool:
  """Whether warm-up may end, by validation accuracy.

  True once the last ``patience`` accuracies all exceed half of what is
  attainable.

  Args:
    accuracies: validation accuracy after each epoch so far.
    upper: upper bound of the accuracy, in the same unit.
    patience: epochs in a row, at least 1.

  Raises:
    ValueError: if ``patience`` is below 1.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203; the rule is quoted at second
    hand, its role as the end of warm-up is inferred.

  Examples:
    >>> is_warm([0.2, 0.6, 0.7], patience=2)
    True
  """
  checks.whole('patience', patience, 1)
  checks.real('upper', upper)
  recent = accuracies[-patience:]
  return len(recent) == patience and min(recent) > upper / 2


@kinds.checked
def warn_about(diagnosis: weights.Diagnosis) -> None:
  """Warns if a leaf closes, or if the temperature makes masks hard, or worse.

  Where the full ramp keeps no weight of a leaf, nothing passes it any more.
  Where the mean of 4 m (1 - m) is below 0.001 the masks are hard and frozen;
  where t^2 / (tau + c t^2) exceeds 50 the gradient at t is more than 25 times
  the dense one. Call it once, at the end of warm-up, with
  ``diagnose(params, state._replace(ramp=jnp.float32(1)))``; not under jit.

  Args:
    diagnosis: from :func:`jaxprune.soft.diagnose`, concrete.

  Examples:
    >>> calm = {'kernel': jnp.float32(0.1)}
    >>> warn_about(weights.Diagnosis(calm, calm, calm, calm, calm, calm))
  """
  hard = tree.leaves(diagnosis.hardness)
  steep = tree.leaves(diagnosis.steepness)
  frozen = [f'{path} ({x:.1e})' for path, x in hard.items() if x < 1e-3]
  rough = [f'{path} ({x:.0f})' for path, x in steep.items() if x > 50]
  parts = []
  if frozen:
    parts.append(
      f'the masks are all but hard, mean 4 m (1 - m) below 0.001, in '
      f'{", ".join(frozen)}'
    )
  if rough:
    parts.append(
      f't^2 / temperature exceeds 50, so that gradients near t grow more than '
      f'25-fold, in {", ".join(rough)}'
    )
  closed = [
    path for path, x in tree.leaves(diagnosis.density).items() if x == 0
  ]
  if closed:
    warnings.warn(
      f'PDP will keep no weight of {", ".join(closed)}. Warm up for longer, or '
      'give counts that keep some of each leaf, pdp_init(..., pruned=...), as '
      'distributions.erk does.',
      stacklevel=2,
    )
  if parts:
    warnings.warn(
      f'The temperature of PDP does not fit these weights: '
      f'{"; ".join(parts)}. Use a relative temperature, pdp_init(..., tau=0, '
      f'c=0.1 to 0.5) with c annealed towards 0.01, or a larger tau.',
      stacklevel=2,
    )


class TrackPDPState(NamedTuple):
  """State of :func:`track_pdp`."""

  step: jax.Array  # Updates seen so far; int32, shape [].
  begin: jax.Array  # Updates of dense warm-up; int32, shape [].
  pdp: (
    weights.PDPState
  )  # In force at the next forward pass; itself not hardened.
  masks: tree.PyTree | None  # Like pdp.pruned; bool, all True until hardened.
  hard: jax.Array  # Whether the masks have taken over; bool, shape [].
  revived: jax.Array  # As in :class:`jaxprune.transforms.SparsifyState`.


_NEVER = 2**31 - 1


@kinds.checked
def track_pdp(
  sparsity: float | Mapping[str, float] | None = None,
  *,
  begin: int | None,
  ramp: optax.Schedule,
  end: int | None = None,
  n_by_m: weights.NByM | None = None,
  axis: int | None = None,
  channels: soft_channels.Channels | None = None,
  pruned: Mapping[str, int] | None = None,
  which: tree.Which = None,
  tau: float | optax.Schedule = 1e-4,
  c: float | optax.Schedule = 0.0,
) -> optax.GradientTransformation:
  """Keeps the state of PDP in an optax chain; place it last.

  The updates pass unchanged while the masks are soft. The forward pass reads
  the state through :func:`with_pdp`::

    tx = optax.chain(optax.adam(1e-3), track_pdp(0.9, begin=500, ramp=ramp))
    loss = lambda p, s, batch: task(with_pdp(model.apply)(p, s, batch))

  Budgets are drawn from the params after ``begin`` updates (or ``end``, if the
  warm-up still goes on then), masks from those after ``end`` updates; from then
  on params are exactly zero where pruned. Whether the temperature fits,
  :func:`warn_about` says of :func:`jaxprune.soft.diagnose`.

  Args:
    sparsity: static, as for :func:`jaxprune.soft.pdp_init`.
    begin: updates of dense warm-up; None to go on until :func:`end_warm_up`.
    ramp: updates since the warm-up -> fraction of the target in force, such as
      :func:`ramp_schedule`.
    end: the step that hardens, after which training fine-tunes under frozen
      masks; None to leave it to :func:`jaxprune.soft.harden` after training.
    n_by_m: as for :func:`jaxprune.soft.pdp`.
    axis: as for :func:`jaxprune.soft.pdp`.
    channels: of :mod:`jaxprune.soft.channels`, to close whole groups; the
      sparsity, ``pruned`` and ``which`` are then those of groups.
    pruned: as for :func:`jaxprune.soft.pdp_init`.
    which: as for :func:`jaxprune.soft.pdp_init`.
    tau: as for :func:`jaxprune.soft.pdp_init`, or a schedule of the step.
    c: as for :func:`jaxprune.soft.pdp_init`, or a schedule of the step, such as
      ``optax.exponential_decay`` from 0.25 to 0.01 before ``end``.

  Returns:
    An ``optax.GradientTransformation``; its ``update`` needs params.

  Raises:
    ValueError: if 0 <= begin < end does not hold, if ``update`` is called
      without params, or as :func:`jaxprune.soft.pdp_init`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, -2.0, 3.0, -4.0]])}
    >>> tx = track_pdp(0.5, begin=0, ramp=lambda step: 1.0, end=1)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['kernel'])
    [[ 0.  0.  6. -8.]]
  """
  first = 0 if begin is None else checks.whole('begin', begin)
  if end is not None:
    checks.whole('end', end)
  for name, value in (('tau', tau), ('c', c)):
    if not callable(value):
      checks.real(name, value, 0)
  if first < 0 or (end is not None and end <= first):
    raise ValueError(
      f'track_pdp needs 0 <= begin < end, got begin={begin}, end={end}.'
    )

  def at(value: Any, step: jax.Array) -> Any:
    return value(step) if callable(value) else value

  def budgets(params, step):
    options = {'pruned': pruned, 'tau': at(tau, step), 'c': at(c, step)}
    if channels is not None:
      return soft_channels.init(
        params, channels, sparsity, which=which, **options
      )
    return weights.pdp_init(
      params, sparsity, n_by_m=n_by_m, which=which, **options
    )

  def hardened(params, state):
    if channels is not None:
      return soft_channels.harden(params, state, channels).masks
    return weights.harden(params, state, n_by_m=n_by_m, axis=axis).masks

  def in_force(step, begin, state):
    fraction = jnp.where(step < begin, 0.0, ramp(jnp.maximum(step - begin, 0)))
    scalar = lambda x: jnp.asarray(x, jnp.float32)
    return state._replace(
      ramp=scalar(fraction), tau=scalar(at(tau, step)), c=scalar(at(c, step))
    )

  def init_fn(params: Any) -> Any:
    step = jnp.zeros([], jnp.int32)
    start = jnp.int32(_NEVER if begin is None else begin)
    state = in_force(step, start, budgets(params, step))
    masks = None
    if end is not None:
      like = params if channels is None else channels.reduce(params)
      full = lambda x: sharding.like(jnp.ones(x.shape, bool), x)
      masks = jax.tree.map(full, tree.restrict(like, state.pruned))
    hard, revived = jnp.zeros([], bool), jnp.zeros([], jnp.int32)
    return TrackPDPState(step, start, state, masks, hard, revived)

  def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
    if params is None:
      raise ValueError('track_pdp needs `params`; pass it to update.')
    step = jnp.asarray(optax.safe_increment(state.step))
    after = optax.apply_updates(params, updates)
    due = step == state.begin
    if end is not None:  # A warm-up that is not over ends with one cut.
      due |= (step == end) & (step < state.begin)
    goal = lax.cond(
      due,
      lambda: budgets(after, step).pruned,
      lambda: state.pdp.pruned,
    )
    pdp_state = in_force(step, state.begin, state.pdp._replace(pruned=goal))
    new = state._replace(step=step, pdp=pdp_state)
    if end is None:
      return updates, new
    masks = lax.cond(
      step == end, lambda: hardened(after, pdp_state), lambda: state.masks
    )
    cuts, before = masks, state.masks
    if channels is not None:
      cuts = soft_channels.leaf_masks(params, masks, channels)
      before = soft_channels.leaf_masks(params, state.masks, channels)
    age = jnp.maximum(step - end, 0)
    revived = zeros.most_revived(params, before, state.revived, age)
    updates = transforms.project(updates, params, cuts)
    return updates, new._replace(masks=masks, hard=step >= end, revived=revived)

  return optax.GradientTransformation(init_fn, update_fn)


@kinds.checked
def end_warm_up(opt_state: optax.OptState) -> optax.OptState:
  """Returns the optimizer state in which the next update ends the warm-up.

  For ``track_pdp(begin=None)``, once :func:`is_warm` says so; not under jit.
  The step that was compiled goes on.

  Args:
    opt_state: holds one state of :func:`track_pdp`, still in its warm-up.

  Raises:
    ValueError: if it holds another number of them, or if the warm-up is over.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 3.0]])}
    >>> tx = track_pdp(0.5, begin=None, ramp=lambda step: 1.0)
    >>> state = end_warm_up(tx.init(params))
    >>> _, state = tx.update(params, state, params)
    >>> float(state.pdp.ramp)
    1.0
  """
  state = _find(opt_state, 'end_warm_up')
  if state.begin <= state.step:
    raise ValueError(
      f'The warm-up is over since update {int(state.begin)}; end_warm_up is '
      f'for track_pdp(begin=None), once.'
    )
  fresh = state._replace(begin=state.step + 1)
  replace = lambda node: fresh if _is_ours(node) else node
  return jax.tree.map(replace, opt_state, is_leaf=_is_ours)


@kinds.checked
def with_pdp(
  apply_fn: Callable[..., Any],
  *,
  n_by_m: weights.NByM | None = None,
  axis: int | None = None,
  channels: soft_channels.Channels | None = None,
  through: bool = False,
) -> Callable[..., Any]:
  """Returns ``(params, opt_state, *args) -> apply_fn(pdp(params), *args)``.

  Flax wraps every array of an ``nnx.Optimizer``: give it ``nnx.as_pure`` of the
  params and of ``optimizer.opt_state``.

  Args:
    apply_fn: a function whose first argument is the params.
    n_by_m: as for :func:`jaxprune.soft.pdp`; what :func:`track_pdp` was given.
    axis: as for :func:`jaxprune.soft.pdp`.
    channels: what :func:`track_pdp` was given.
    through: as for :func:`jaxprune.soft.pdp`.

  Raises:
    ValueError: when called, if the optimizer state holds not exactly one state
      of :func:`track_pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 3.0]])}
    >>> ramp = ramp_schedule(100)
    >>> tx = optax.chain(optax.sgd(0.1), track_pdp(0.5, begin=9, ramp=ramp))
    >>> with_pdp(lambda p, x: p['kernel'] * x)(params, tx.init(params), 2.0)
    Array([[2., 6.]], dtype=float32)
  """

  def view(params, state):
    if channels is not None:
      return soft_channels.pdp(params, state, channels, through=through)
    return weights.pdp(params, state, n_by_m=n_by_m, axis=axis, through=through)

  def apply(params, opt_state, *args, **kwargs):
    state = _find(opt_state, 'with_pdp')
    gate = lambda p: view(p, state.pdp)
    if state.masks is None:
      return apply_fn(gate(params), *args, **kwargs)
    hard = lambda p: view(p, state.pdp._replace(masks=state.masks))
    return apply_fn(lax.cond(state.hard, hard, gate, params), *args, **kwargs)

  return apply


def _is_ours(node: Any) -> bool:
  return isinstance(node, TrackPDPState)


def _find(opt_state: optax.OptState, who: str) -> TrackPDPState:
  """Returns the one state of track_pdp in the state of a chain."""
  nodes = jax.tree.leaves(opt_state, is_leaf=_is_ours)
  states = [node for node in nodes if _is_ours(node)]
  if len(states) != 1:
    raise ValueError(
      f'{who} needs an optimizer state with one state of track_pdp, found '
      f'{len(states)}; put track_pdp last in the chain.'
    )
  return states[0]
