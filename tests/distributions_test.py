"""Tests of distributions: budgets met to the weight, bounds held."""

import fractions
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import distributions, masks
from jaxprune.numerics import counts

SHAPES = {
  'conv1': (3, 3, 3, 16),
  'conv2': (3, 3, 16, 32),
  'dense': (512, 10),
  'small': (2, 2),
}
SIZES = {path: math.prod(shape) for path, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())
SHARED = {
  'erk': distributions.erk,
  'uniform_plus': distributions.uniform_plus('conv1', 'dense'),
  'macs': distributions.by_macs(dict.fromkeys(SHAPES, 9.0) | {'conv1': 100.0}),
}


@pytest.mark.parametrize('name', ['uniform', *SHARED])
@pytest.mark.parametrize('sparsity', [0.0, 0.1, 0.5, 0.777, 0.83])
def test_budget_is_met_exactly(name, sparsity):
  kept = SHARED.get(name, distributions.uniform)(SHAPES, sparsity)
  assert list(kept) == list(SHAPES)
  assert sum(kept.values()) == TOTAL - round(sparsity * TOTAL)
  assert all(0 <= kept[path] <= SIZES[path] for path in kept)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 60), st.floats(0.01, 100), st.floats(0, 1)),
    min_size=1,
    max_size=6,
  ),
  st.floats(0, 1),
)
def test_share_is_a_clipped_multiple(leaves, sparsity):
  names = [str(i) for i in range(len(leaves))]
  sizes = {k: n for k, (n, _, _) in zip(names, leaves, strict=True)}
  weights = {k: w for k, (_, w, _) in zip(names, leaves, strict=True)}
  low = {k: int(n * f / 4) for k, (n, _, f) in zip(names, leaves, strict=True)}
  budget = masks.kept(sum(sizes.values()), sparsity)
  hypothesis.assume(sum(low.values()) <= budget)
  kept = distributions.share(sizes, weights, sparsity, low)
  assert sum(kept.values()) == budget
  assert all(low[k] <= kept[k] <= sizes[k] for k in names)
  # One rate serves all leaves that are off their bounds, to a weight.
  rates = [
    ((kept[k] - 1) / weights[k], (kept[k] + 1) / weights[k])
    for k in names
    if low[k] < kept[k] < sizes[k]
  ]
  if rates:
    assert max(a for a, _ in rates) <= min(b for _, b in rates) + 1e-9


def test_erk_golden():
  # Sums of dimensions 25, 54, 522, 4; 'small' and 'conv1' stay below density 1.
  kept = distributions.erk(SHAPES, 0.95)
  budget = TOTAL - round(0.95 * TOTAL)
  exact = np.array([25, 54, 522, 4]) * budget / 605
  np.testing.assert_allclose(list(kept.values()), exact, atol=1)
  # At half the weights the linear layer exceeds its size: dense, re-solved.
  kept = distributions.erk(SHAPES, 0.2)
  assert kept['dense'] == 5120
  assert kept['small'] == 4
  assert sum(kept.values()) == TOTAL - round(0.2 * TOTAL)


def test_uniform_plus_keeps_its_promises():
  kept = SHARED['uniform_plus'](SHAPES, 0.8)
  assert kept['conv1'] == SIZES['conv1']
  assert kept['dense'] >= 0.2 * SIZES['dense']


def test_by_macs_prunes_the_expensive():
  kept = SHARED['macs'](SHAPES, 0.5)
  density = {path: kept[path] / SIZES[path] for path in kept}
  assert density['conv1'] == pytest.approx(0.3 * density['conv2'], rel=0.01)


@pytest.mark.parametrize('name', ['uniform', *SHARED])
def test_traced_counts(name):
  distribution = SHARED.get(name, distributions.uniform)
  levels = (0.0, 0.8, 0.123)
  fn = jax.jit(
    lambda s: distributions.counts(distribution, SHAPES, SIZES, s, levels)
  )

  def traced(s):
    high, low = fn(jnp.float32(s))
    both = (np.asarray(high, np.int64) << 16) + np.asarray(low)
    return dict(zip(SHAPES, both.tolist(), strict=True))

  for level in levels:  # To the weight on a level.
    assert traced(level) == distribution(SHAPES, level)
  for s in np.linspace(0.01, 0.79, 14, dtype=np.float32):
    kept, exact = traced(s), distribution(SHAPES, float(s))
    if distribution is distributions.uniform:
      assert kept == exact
    else:  # Between: the sum to a unit, leaves near the exact solution.
      assert sum(kept.values()) == pytest.approx(sum(exact.values()), abs=1)
      assert all(abs(kept[k] - exact[k]) <= 0.01 * SIZES[k] + 2 for k in kept)


def test_interpolation_sums_to_the_rounded_line():
  grid = np.array([0.0, 1.0])
  pruned = np.array([[0, 0, 0, 5], [3, 3, 3, 5]])
  high, low = distributions.interpolate(grid, pruned, jnp.float32(0.5))
  assert high.tolist() == [0] * 4
  assert low.tolist() == [2, 2, 1, 5]  # 9.5 in all: ten, two of them added.


@functools.cache
def jitted_counts(sizes, levels):
  return jax.jit(lambda s: distributions.uniform_counts(sizes, s, levels))


def uniform_counts(sizes, sparsity, levels=()):
  high, low = jitted_counts(tuple(sizes), levels)(jnp.float32(sparsity))
  return ((np.asarray(high, np.int64) << 16) + np.asarray(low)).tolist()


def test_traced_counts_past_float32():
  sizes = [3 * 10**9, 10, 3 * 10**9]
  assert uniform_counts(sizes, 0.9, (0.0, 0.9)) == [3 * 10**8, 1, 3 * 10**8]
  assert uniform_counts(sizes, 0.9) == [3 * 10**8, 1, 3 * 10**8]
  rough = uniform_counts(sizes, 0.90001)  # No decimal of four digits.
  share = 1 - fractions.Fraction(float(np.float32(0.90001)))
  assert sum(rough) == round(share * sum(sizes))
  assert all(abs(k - share * n) < 1 for k, n in zip(rough, sizes, strict=True))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  st.sampled_from([(5, 5, 5), (0, 1, 7, 2**28), (2**40, 3, 2**33 + 1)]),
  st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1, width=32)
  ),
)
def test_uniform_is_fair_to_a_weight_and_the_same_traced(sizes, sparsity):
  hypothesis.assume(sparsity == 0 or sparsity >= 1e-37)
  shapes = {str(i): (n,) for i, n in enumerate(sizes)}
  kept = list(distributions.uniform(shapes, sparsity).values())
  assert sum(kept) == masks.kept(sum(sizes), sparsity)
  share = counts.decimal(sparsity)
  exact = [n - share * n for n in sizes]
  assert all(abs(k - x) < 1 for k, x in zip(kept, exact, strict=True))
  if sum(sizes) < 2**29:  # Beyond, the static product is one of float64.
    assert uniform_counts(sizes, sparsity) == kept


def test_uniform_rounds_the_whole():
  shapes = dict.fromkeys('abc', (5,))
  assert distributions.uniform(shapes, 0.5) == {'a': 3, 'b': 2, 'c': 2}
  assert uniform_counts([5, 5, 5], 0.5) == [3, 2, 2]


def test_leaves_of_no_weight_take_what_is_left():
  sizes, weights = {'a': 10, 'b': 10}, {'a': 1, 'b': 0}
  assert distributions.share(sizes, weights, 0.1) == {'a': 10, 'b': 8}
  assert distributions.share(sizes, weights, 0.5) == {'a': 10, 'b': 0}


@pytest.mark.parametrize('shape', [(10, 5), (10, 7)])
def test_counts_of_units_are_the_same_static_and_traced(shape):
  given = distributions.uniform, {'a': shape}, {'a': shape[-1]}
  static = distributions.counts(*given, 0.5)
  high, low = distributions.counts(*given, jnp.float32(0.5), (0.5,))
  assert (high.tolist(), low.tolist()) == ([0], [static['a']])


def test_units_keep_the_same_part():
  units = {path: shape[-1] for path, shape in SHAPES.items()}
  kept = distributions.counts(distributions.uniform, SHAPES, units, 0.5)
  assert kept == {'conv1': 8, 'conv2': 16, 'dense': 5, 'small': 1}


def test_lamp_golden():
  rng = np.random.default_rng(0)
  scores = {'a': rng.random((4, 5)), 'b': 9 * rng.random(30)}

  def lamp(x):
    flat = np.sort(x.ravel())
    squares = flat**2
    ratio = squares / np.cumsum(squares[::-1])[::-1]
    return ratio[np.searchsorted(flat, x.ravel())].reshape(x.shape)

  rows = {k: lamp(x) for k, x in scores.items()}
  cut = np.sort(np.concatenate([x.ravel() for x in rows.values()]))[-12]
  got = distributions.select_pooled(
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), scores),
    12,
    distributions.lamp,
  )
  for k in rows:
    np.testing.assert_array_equal(got[k], rows[k] >= cut)


def test_a_leaf_without_entries_has_none_that_survive():
  found = distributions.survival(jnp.zeros((0, 4), jnp.bfloat16))
  assert (found.shape, found.dtype) == ((0, 4), jnp.float32)


@pytest.mark.parametrize(
  'pooled', [distributions.lamp, distributions.normalised]
)
def test_rescaling_keeps_the_order_of_signed_scores(pooled):
  x = jax.random.normal(jax.random.key(0), (40,))
  got = pooled.rescale({'a': x, 'b': -jnp.abs(x)})
  order = lambda x: jnp.argsort(x, stable=True).tolist()
  assert order(got['a']) == order(x)
  assert order(got['b']) == order(-jnp.abs(x))


def test_normalised_divides_by_the_norm():
  scores = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([300.0, 100.0])}
  got = distributions.select_pooled(scores, 2, distributions.normalised)
  assert got['a'].tolist() == [False, True]
  assert got['b'].tolist() == [True, False]
  zeros = {'a': jnp.zeros(2), 'b': jnp.ones(2)}
  for pooled in (distributions.normalised, distributions.lamp):
    got = distributions.select_pooled(zeros, 2, pooled)
    assert got['b'].tolist() == [True, True]


def test_errors():
  with pytest.raises(ValueError, match=r"knows no leaf 'head'"):
    distributions.uniform_plus('head', 'dense')(SHAPES, 0.5)
  with pytest.raises(ValueError, match=r'`last_density` must be in \[0, 1\]'):
    distributions.uniform_plus('conv1', 'dense', last_density=2)
  with pytest.raises(ValueError, match='fewer than the 1456 that bounded'):
    SHARED['uniform_plus'](SHAPES, 0.99)
  with pytest.raises(ValueError, match='missing: conv2, dense, small'):
    distributions.by_macs({'conv1': 1.0})(SHAPES, 0.5)
  with pytest.raises(ValueError, match="above 0; 'conv1' has 0"):
    distributions.by_macs({'conv1': 0})
