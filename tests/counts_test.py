"""Tests of exact counts against integer and rational arithmetic."""

import fractions

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.numerics import counts

kept_jit = {}


def traced_kept(size, sparsity):
  """Returns ``kept`` of a traced sparsity as a Python int."""
  if size not in kept_jit:
    kept_jit[size] = jax.jit(lambda s: counts.kept(size, s))
  out = kept_jit[size](jnp.float32(sparsity))
  if isinstance(out, tuple):
    return (int(out[0]) << 16) + int(out[1])
  return int(out)


@pytest.mark.parametrize(
  ('size', 'sparsity', 'expected'),
  [(5, 0.5, 3), (7, 0.5, 3), (10, 0.9, 1), (3, 0.0, 3), (3, 1.0, 0)],
)
def test_kept_by_hand(size, sparsity, expected):
  assert counts.kept(size, sparsity) == expected
  assert traced_kept(size, sparsity) == expected


def meant(sparsity):
  """The decimal that a float32 is the nearest to, or the number it is."""
  decimal = fractions.Fraction(round(sparsity * 10**4), 10**4)
  same = np.float32(float(decimal)) == np.float32(sparsity)
  return decimal if same else fractions.Fraction(sparsity)


SIZES = [1, 7, 2**24 + 1, 25_502_912, 2**31 + 5, 2**32 - 1, 2**33 + 3, 2**47]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.sampled_from(SIZES), st.floats(0, 1, width=32))
def test_traced_counts_are_those_of_exact_arithmetic(size, sparsity):
  hypothesis.assume(sparsity == 0 or sparsity >= 1e-37)
  exact = meant(sparsity) * size
  assert traced_kept(size, sparsity) == size - round(exact)


def test_traced_ties_round_to_even():
  # 0.5 * (2**25 + 1) is a half that no float32 holds.
  for size in (2**25 + 1, 2**25 + 3, 2**33 + 3):
    half = fractions.Fraction(size, 2)
    if size not in kept_jit:
      kept_jit[size] = jax.jit(lambda s, n=size: counts.kept(n, s))
    assert traced_kept(size, 0.5) == size - round(half)


USUAL = [k / 100 for k in range(101)] + [0.001, 0.005, 0.975, 0.995, 0.9995]


def test_a_traced_sparsity_prunes_as_many_as_a_static_one():
  """0.05 of 450 weights were 22 static and 23 traced, 0.95 were 428 and 427.

  A half of a decimal, which neither the float32 nor a float64 product need be.
  """
  sizes = [*range(1, 3001), 266_610, 10**9, 2**33 + 3]
  limbs = jnp.asarray(np.stack([counts.split(size) for size in sizes]))
  by_fraction = jax.vmap(counts.part, (None, 0))
  pruned = jax.jit(jax.vmap(by_fraction, (0, None)))
  high, low = pruned(limbs, jnp.asarray(USUAL, jnp.float32))
  traced = (np.asarray(high, np.int64) << 16) + np.asarray(low)
  parts = np.array([int(fractions.Fraction(str(s)) * 10**4) for s in USUAL])
  whole, over = np.divmod(np.outer(sizes, parts), 10**4)
  up = (over > 5000) | ((over == 5000) & (whole % 2 == 1))
  np.testing.assert_array_equal(traced, whole + up)
  for s in USUAL:
    for size in (450, 150, 50, 30, 10**9, 2**33 + 3):
      static = counts.kept(size, s)
      assert static == counts.kept(size, np.float32(s)), (size, s)
      assert static == size - round(fractions.Fraction(str(s)) * size)
  assert [traced_kept(450, s) for s in (0.05, 0.95)] == [428, 22]
  assert [counts.kept(450, s) for s in (0.05, 0.95)] == [428, 22]


def test_counts_past_32_bits_are_exact():
  ones = jnp.uint32(0xFFFF)
  # 2**33 + 5 of 2**33 + 2**17 and borrow across the limbs.
  a = counts.limbs((1 << 33) + 5)
  b = counts.limbs((1 << 17) + 7)
  high, low = counts.minus(a, b)
  assert int(high) * 65536 + int(low) == (1 << 33) - (1 << 17) - 2
  assert bool(counts.at_least(a, b))
  assert not bool(counts.at_least(b, a))
  assert [int(x) for x in counts.carry(ones, ones + 1)] == [65536, 0]
  assert [int(x) for x in counts.minus(b, a)] == [0, 0]


def test_true_counts_what_a_float_cannot(monkeypatch):
  test = jnp.ones((3, 70), bool).at[1, 5].set(False)
  few = jnp.array([[True], [False]])
  assert [x.tolist() for x in counts.true([few, test])] == [[0, 0], [1, 209]]
  monkeypatch.setattr(counts, 'leading', lambda shape: 1)
  many = jnp.ones((2, 300, 300), bool)
  found = counts.true([test, many, few])
  assert [x.tolist() for x in found] == [[0, 2, 0], [209, 48_928, 1]]


@pytest.mark.parametrize('size', [0, 1, 4096, 4097, 8191, 8192, 8193])
def test_rows_on_one_device_count_as_numpy_does(monkeypatch, size):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  tests = np.random.default_rng(size).random((2, size, 1)) < 0.3
  high, low = jax.vmap(lambda test: counts.true([test]))(jnp.asarray(tests))
  assert (high == 0).all()
  np.testing.assert_array_equal(low, tests.sum(1))


def test_a_sparsity_out_of_range_is_refused():
  with pytest.raises(ValueError, match=r'must be in \[0, 1\], got 1.5'):
    counts.kept(3, 1.5)
