"""PDP beside the loss: its ramp, its warnings, and one line of optax."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune import soft, tree


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

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203; the rule is quoted at second
    hand, its role as the end of warm-up is inferred.

  Examples:
    >>> is_warm([0.2, 0.6, 0.7], patience=2)
    True
  """
  recent = accuracies[-patience:]
  return len(recent) == patience and min(recent) > upper / 2


def warn_about(diagnosis: soft.Diagnosis) -> None:
  """Warns if the temperature makes PDP plain hard-mask training, or worse.

  Where the mean of 4 m (1 - m) is below 0.001 the masks are hard and frozen;
  where t^2 / (tau + c t^2) exceeds 50 the gradient at t is more than 25 times
  the dense one. Call it once, at the end of warm-up, with
  ``diagnose(params, state._replace(ramp=jnp.float32(1)))``; not under jit.

  Args:
    diagnosis: from :func:`jaxprune.soft.diagnose`, concrete.

  Examples:
    >>> calm = {'kernel': jnp.float32(0.1)}
    >>> warn_about(soft.Diagnosis(calm, calm, calm, calm, calm))
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
  pdp: (
    soft.PDPState
  )  # In force at the next forward pass; never hardened itself.
  masks: tree.PyTree | None  # Like params; bool, all True until hardened.
  hard: jax.Array  # Whether the masks have taken over; bool, shape [].


def track_pdp(
  sparsity: float | Mapping[str, float] | None = None,
  *,
  begin: int,
  ramp: optax.Schedule,
  end: int | None = None,
  n_by_m: soft.NByM | None = None,
  axis: int = -2,
  which: tree.Which = None,
  tau: float | optax.Schedule = 1e-4,
  c: float | optax.Schedule = 0.0,
) -> optax.GradientTransformation:
  """Keeps the state of PDP in an optax chain; place it last.

  The updates pass unchanged while the masks are soft. The forward pass reads
  the state through :func:`with_pdp`::

    tx = optax.chain(optax.adam(1e-3), track_pdp(0.9, begin=500, ramp=ramp))
    loss = lambda p, s, batch: task(with_pdp(model.apply)(p, s, batch))

  Budgets are drawn from the params after ``begin`` updates, masks from those
  after ``end`` updates; from then on params are exactly zero where pruned.

  Args:
    sparsity: static, as for :func:`jaxprune.soft.pdp_init`.
    begin: updates of dense warm-up.
    ramp: step -> fraction of the target in force, as :func:`ramp` of
      ``step / steps_per_epoch``; taken as 0 before ``begin``.
    end: the step that hardens, after which training fine-tunes under frozen
      masks; None to leave it to :func:`jaxprune.soft.harden` after training.
    n_by_m: as for :func:`jaxprune.soft.pdp`.
    axis: as for :func:`jaxprune.soft.pdp`.
    which: as for :func:`jaxprune.soft.pdp_init`.
    tau: as for :func:`jaxprune.soft.pdp_init`, or a schedule of the step.
    c: as for :func:`jaxprune.soft.pdp_init`, or a schedule of the step.

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
  if begin < 0 or (end is not None and end <= begin):
    raise ValueError(
      f'track_pdp needs 0 <= begin < end, got begin={begin}, end={end}.'
    )

  def at(value: Any, step: jax.Array) -> Any:
    return value(step) if callable(value) else value

  def budgets(params, step):
    return soft.pdp_init(
      params,
      sparsity,
      n_by_m=n_by_m,
      which=which,
      tau=at(tau, step),
      c=at(c, step),
    )

  def in_force(step, state):
    fraction = jnp.where(step < begin, 0.0, ramp(step))
    scalar = lambda x: jnp.asarray(x, jnp.float32)
    return state._replace(
      ramp=scalar(fraction), tau=scalar(at(tau, step)), c=scalar(at(c, step))
    )

  def init_fn(params: Any) -> Any:
    step = jnp.zeros([], jnp.int32)
    state = in_force(step, budgets(params, step))
    masks = None
    if end is not None:
      full = lambda w: jnp.ones(w.shape, bool)
      masks = jax.tree.map(full, tree.restrict(params, state.pruned))
    return TrackPDPState(step, state, masks, jnp.zeros([], bool))

  def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
    if params is None:
      raise ValueError('track_pdp needs `params`; pass it to update.')
    step = jnp.asarray(optax.safe_increment(state.step))
    after = optax.apply_updates(params, updates)
    pruned = lax.cond(
      step == begin,
      lambda: budgets(after, step).pruned,
      lambda: state.pdp.pruned,
    )
    pdp_state = in_force(step, state.pdp._replace(pruned=pruned))
    if end is None:
      return updates, TrackPDPState(step, pdp_state, None, state.hard)
    hardened = lambda: (
      soft.harden(after, pdp_state, n_by_m=n_by_m, axis=axis).masks
    )
    masks = lax.cond(step == end, hardened, lambda: state.masks)
    project = lambda u, mask, w: jnp.where(mask, u, -w)
    updates = tree.map_pruned(project, updates, masks, params)
    return updates, TrackPDPState(step, pdp_state, masks, step >= end)

  return optax.GradientTransformation(init_fn, update_fn)


def with_pdp(
  apply_fn: Callable[..., Any],
  *,
  n_by_m: soft.NByM | None = None,
  axis: int = -2,
  through: bool = False,
) -> Callable[..., Any]:
  """Returns ``(params, opt_state, *args) -> apply_fn(pdp(params), *args)``.

  Args:
    apply_fn: a function whose first argument is the params.
    n_by_m: as for :func:`jaxprune.soft.pdp`; what :func:`track_pdp` was given.
    axis: as for :func:`jaxprune.soft.pdp`.
    through: as for :func:`jaxprune.soft.pdp`.

  Raises:
    ValueError: when called, if the optimizer state holds not exactly one state
      of :func:`track_pdp`.

  Examples:
    >>> params = {'kernel': jnp.array([[1.0, 3.0]])}
    >>> tx = optax.chain(optax.sgd(0.1), track_pdp(0.5, begin=9, ramp=ramp))
    >>> with_pdp(lambda p, x: p['kernel'] * x)(params, tx.init(params), 2.0)
    Array([[2., 6.]], dtype=float32)
  """
  is_ours = lambda node: isinstance(node, TrackPDPState)

  def apply(params, opt_state, *args, **kwargs):
    states = [
      s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)
    ]
    if len(states) != 1:
      raise ValueError(
        f'with_pdp needs an optimizer state with one state of track_pdp, found '
        f'{len(states)}; put track_pdp last in the chain.'
      )
    (state,) = states
    gate = lambda p: soft.pdp(
      p, state.pdp, n_by_m=n_by_m, axis=axis, through=through
    )
    if state.masks is None:
      return apply_fn(gate(params), *args, **kwargs)
    hard = lambda p: soft.pdp(p, state.pdp._replace(masks=state.masks))
    return apply_fn(lax.cond(state.hard, hard, gate, params), *args, **kwargs)

  return apply
