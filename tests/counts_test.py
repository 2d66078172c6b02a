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


SIZES = [1, 7, 2**24 + 1, 25_502_912, 2**31 + 5, 2**32 - 1, 2**33 + 3, 2**47]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.sampled_from(SIZES), st.floats(0, 1, width=32))
def test_traced_counts_are_those_of_exact_arithmetic(size, sparsity):
  hypothesis.assume(sparsity == 0 or sparsity >= 1e-37)
  exact = fractions.Fraction(sparsity) * size
  assert traced_kept(size, sparsity) == size - round(exact)


def test_traced_ties_round_to_even():
  # 0.5 * (2**25 + 1) is a half that no float32 holds.
  for size in (2**25 + 1, 2**25 + 3, 2**33 + 3):
    half = fractions.Fraction(size, 2)
    if size not in kept_jit:
      kept_jit[size] = jax.jit(lambda s, n=size: counts.kept(n, s))
    assert traced_kept(size, 0.5) == size - round(half)


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
