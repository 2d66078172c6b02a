"""Sparsity as a function of the step.

A schedule is any function from a step (int32, traced) to a sparsity in [0, 1].
Those made here also say which sparsities they reach exactly, their
``levels``: a float32 cannot hold 0.9, which costs up to 24 weights of 1e9, so
that counts are taken from the levels, in float64, wherever a schedule rests on
one. Masks are redrawn at the step on which a schedule comes to rest, whatever
the update period, so that every schedule reaches its target.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune import checks
from jaxprune.checks import kinds


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A function of the step that knows the sparsities it rests on.

  Attributes:
    fn: step (int32, shape []) -> sparsity (float32, shape []).
    levels: the sparsities that ``fn`` reaches exactly.
    falls: whether the sparsity ever falls, so that weights grow again.
  """

  fn: Callable[[jax.Array], jax.Array]
  levels: tuple[float, ...]
  falls: bool = False

  def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the sparsity at a step; float32, shape []."""
    return jnp.asarray(self.fn(jnp.asarray(step)), jnp.float32)


@kinds.checked
def constant(sparsity: float, *, begin: int = 0) -> Schedule:
  """Returns 0 before ``begin``, ``sparsity`` from there on: one-shot pruning.

  Args:
    sparsity: fraction of zeros in [0, 1]; static.
    begin: the step of the cut.

  Raises:
    ValueError: if ``sparsity`` or ``begin`` is out of range.

  Examples:
    >>> schedule = constant(0.5, begin=10)
    >>> float(schedule(9)), float(schedule(10))
    (0.0, 0.5)
  """
  _check(sparsity, begin, begin + 1)
  return Schedule(
    lambda step: jnp.where(step < begin, 0.0, sparsity), (0.0, sparsity)
  )


@kinds.checked
def polynomial(
  sparsity: float,
  *,
  begin: int,
  end: int,
  power: float = 3,
  initial: float = 0.0,
) -> Schedule:
  """Ramps from ``initial`` to ``sparsity`` as a power of the time left.

  s(t) = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin)) ** power; s_i
  before ``begin`` and s_f from ``end`` on.

  Args:
    sparsity: s_f, in [0, 1]; static.
    begin: first step of the ramp.
    end: step on which the target is reached, after ``begin``.
    power: 3 is the cubic ramp, 1 a straight line.
    initial: s_i, in [0, 1].

  Raises:
    ValueError: if a sparsity or a step is out of range.

  References:
    Zhu and Gupta, 2017, arXiv:1710.01878, Eq. 1.

  Examples:
    >>> schedule = polynomial(0.8, begin=0, end=4, power=1)
    >>> [round(float(schedule(step)), 2) for step in (0, 1, 2, 4, 9)]
    [0.0, 0.2, 0.4, 0.8, 0.8]
  """
  _check(sparsity, begin, end)
  _check(initial, begin, end)
  checks.real('power', power, above=0)

  def fn(step):
    left = (1 - _progress(step, begin, end)) ** power
    ramp = sparsity + (initial - sparsity) * left
    return _between(step, begin, end, initial, ramp, sparsity)

  return Schedule(fn, (initial, sparsity), sparsity < initial)


@kinds.checked
def cubic(
  sparsity: float, *, begin: int, end: int, initial: float = 0.0
) -> Schedule:
  """Ramps fast at first and slowly at last: gradual pruning.

  s(t) = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin)) ** 3.

  Args:
    sparsity: s_f, in [0, 1]; static.
    begin: first step of the ramp.
    end: step on which the target is reached, after ``begin``.
    initial: s_i, in [0, 1].

  Raises:
    ValueError: if a sparsity or a step is out of range.

  References:
    Zhu and Gupta, 2017, arXiv:1710.01878, Eq. 1.

  Examples:
    >>> schedule = cubic(0.8, begin=10, end=20)
    >>> [round(float(schedule(step)), 2) for step in (9, 15, 20)]
    [0.0, 0.7, 0.8]
  """
  return polynomial(sparsity, begin=begin, end=end, initial=initial)


@kinds.checked
def cosine(
  sparsity: float, *, begin: int, end: int, initial: float = 0.0
) -> Schedule:
  """Ramps from ``initial`` to ``sparsity`` along half a cosine.

  s(t) = s_i + (s_f - s_i) (1 - cos(pi (t - begin) / (end - begin))) / 2.

  Args:
    sparsity: s_f, in [0, 1]; static.
    begin: first step of the ramp.
    end: step on which the target is reached, after ``begin``.
    initial: s_i, in [0, 1].

  Raises:
    ValueError: if a sparsity or a step is out of range.

  Examples:
    >>> round(float(cosine(0.8, begin=0, end=10)(5)), 2)
    0.4
  """
  _check(sparsity, begin, end)
  _check(initial, begin, end)

  def fn(step):
    wave = (1 - jnp.cos(jnp.pi * _progress(step, begin, end))) / 2
    ramp = initial + (sparsity - initial) * wave
    return _between(step, begin, end, initial, ramp, sparsity)

  return Schedule(fn, (initial, sparsity), sparsity < initial)


@kinds.checked
def iterative(
  sparsity: float, *, begin: int, end: int, rounds: int
) -> Schedule:
  """Prunes in rounds of one fraction of the survivors, and retrains between.

  In round k = 1..rounds, s = 1 - (1 - s_f) ** (k / rounds); the rounds begin at
  equal distances, the first at ``begin``, the last at ``end``.

  Args:
    sparsity: s_f, in [0, 1); static.
    begin: step of the first cut.
    end: step of the last cut; equal to ``begin`` for a single round.
    rounds: how many cuts, at least 1.

  Raises:
    ValueError: if an argument is out of range.

  References:
    Han et al., 2015, arXiv:1506.02626, Section 3.3; the fraction per round as
    in Lee et al., 2020, arXiv:2010.07611 (20 % of the survivors).

  Examples:
    >>> schedule = iterative(0.75, begin=10, end=20, rounds=2)
    >>> [float(schedule(step)) for step in (9, 10, 19, 20)]
    [0.0, 0.5, 0.5, 0.75]
  """
  checks.whole('rounds', rounds, 1)
  _check(sparsity, begin, end + (rounds == 1))
  cuts = [
    begin + (end - begin) * k // max(rounds - 1, 1) for k in range(rounds)
  ]
  levels = [1 - (1 - sparsity) ** (k / rounds) for k in range(rounds)]
  levels.append(sparsity)

  def fn(step):
    table = jnp.array(levels, jnp.float32)
    return table[jnp.sum(step >= jnp.array(cuts), dtype=jnp.int32)]

  return Schedule(fn, tuple(levels))


@kinds.checked
def prune_then_regrow(
  peak: float, sparsity: float, *, begin: int, turn: int, end: int
) -> Schedule:
  """Ramps to ``peak`` (cubic), then lets weights grow back to ``sparsity``.

  Args:
    peak: the highest sparsity, reached at ``turn``; static.
    sparsity: the sparsity from ``end`` on, at most ``peak``; static. It falls
      from the peak along a straight line.
    begin: first step of the ramp.
    turn: step on which the peak is reached.
    end: step on which the target is reached, after ``turn``.

  Raises:
    ValueError: if a sparsity or a step is out of range.

  Examples:
    >>> schedule = prune_then_regrow(0.9, 0.5, begin=0, turn=10, end=20)
    >>> [round(float(schedule(step)), 2) for step in (0, 10, 15, 20)]
    [0.0, 0.9, 0.7, 0.5]
  """
  _check(sparsity, turn, end)
  checks.sparsity(peak)
  if not sparsity <= peak:
    raise ValueError(
      f'`peak` must be at least the sparsity {sparsity}, got {peak}.'
    )
  up = cubic(peak, begin=begin, end=turn)
  down = polynomial(sparsity, begin=turn, end=end, power=1, initial=peak)
  fn = lambda step: jnp.where(step < turn, up(step), down(step))
  return Schedule(fn, (0.0, peak, sparsity), sparsity < peak)


@kinds.checked
def warm_restarts(
  sparsity: float,
  *,
  begin: int,
  end: int,
  cycles: int,
  initial: float = 0.0,
) -> Schedule:
  """Ramps ``cycles`` times from ``initial`` to ``sparsity``, each a cubic.

  At the start of a cycle the sparsity falls back and weights grow again; the
  last cycle ends at ``end`` and stays.

  Args:
    sparsity: s_f, in [0, 1]; static.
    begin: first step of the first cycle.
    end: step on which the last cycle reaches the target.
    cycles: how many, at least 1.
    initial: where each cycle starts, in [0, 1].

  Raises:
    ValueError: if an argument is out of range.

  References:
    The restarts are those of Loshchilov and Hutter, 2017, arXiv:1608.03983;
    their use for the sparsity is ours.

  Examples:
    >>> schedule = warm_restarts(0.8, begin=0, end=20, cycles=2)
    >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 15, 20)]
    [0.0, 0.7, 0.0, 0.7, 0.8]
  """
  checks.whole('cycles', cycles, 1)
  _check(sparsity, begin, end)
  _check(initial, begin, end)

  def fn(step):
    turns = _progress(step, begin, end) * cycles
    left = (1 - (turns - jnp.floor(turns))) ** 3
    ramp = sparsity + (initial - sparsity) * left
    return _between(step, begin, end, initial, ramp, sparsity)

  return Schedule(fn, (initial, sparsity), cycles > 1 or sparsity < initial)


def _progress(step: jax.Array, begin: int, end: int) -> jax.Array:
  """Returns the part of begin..end that is over, in [0, 1]."""
  over = jnp.clip(step, begin, end) - begin
  return over.astype(jnp.float32) / (end - begin)


def _between(step, begin, end, before, during, after) -> jax.Array:
  """Returns the exact float32 of the ends outside begin..end."""
  during = jnp.clip(during, 0.0, 1.0)
  return jnp.where(step <= begin, before, jnp.where(step >= end, after, during))


def _check(sparsity: float, begin: int, end: int) -> None:
  checks.sparsity(sparsity)
  checks.whole('begin', begin)
  checks.whole('end', end)
  if not 0 <= begin < end:
    raise ValueError(
      f'Steps must satisfy 0 <= begin < end, got begin={begin}, end={end}.'
    )
