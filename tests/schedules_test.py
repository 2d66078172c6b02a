"""Tests of schedules: their formulas, and that they reach their targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import schedules

ALL = {
  'constant': schedules.constant(0.9, begin=7),
  'polynomial': schedules.polynomial(0.9, begin=7, end=31, power=2),
  'cubic': schedules.cubic(0.9, begin=7, end=31, initial=0.1),
  'cosine': schedules.cosine(0.9, begin=7, end=31),
  'iterative': schedules.iterative(0.9, begin=7, end=31, rounds=3),
  'regrow': schedules.prune_then_regrow(0.95, 0.9, begin=7, turn=19, end=31),
  'restarts': schedules.warm_restarts(0.9, begin=7, end=31, cycles=3),
}


@pytest.mark.parametrize('name', ALL)
def test_bounds_dtype_and_target(name):
  schedule = ALL[name]
  values = np.asarray(jax.vmap(schedule)(jnp.arange(40)))
  assert values.dtype == np.float32
  assert ((values >= 0) & (values <= 1)).all()
  assert (values[31:] == np.float32(0.9)).all()
  assert 0.9 in schedule.levels
  for level in schedule.levels:  # Each is reached to the bit.
    assert (values == np.float32(level)).any(), level


def test_cubic_golden():
  # Eq. 1 in float64.
  steps = np.arange(40)
  t = np.clip((steps - 7) / 24, 0, 1)
  expected = 0.9 + (0.1 - 0.9) * (1 - t) ** 3
  got = jax.vmap(ALL['cubic'])(jnp.asarray(steps))
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_cosine_golden():
  t = np.clip((np.arange(40) - 7) / 24, 0, 1)
  got = jax.vmap(ALL['cosine'])(jnp.arange(40))
  np.testing.assert_allclose(got, 0.9 * (1 - np.cos(np.pi * t)) / 2, atol=1e-6)


def test_iterative_keeps_one_fraction_of_the_survivors():
  schedule = schedules.iterative(0.488, begin=0, end=20, rounds=3)
  got = [1 - float(schedule(step)) for step in (0, 9, 10, 19, 20, 99)]
  np.testing.assert_allclose(got, [0.8, 0.8, 0.64, 0.64, 0.512, 0.512], 1e-6)
  single = schedules.iterative(0.5, begin=3, end=3, rounds=1)
  assert [float(single(step)) for step in (2, 3)] == [0.0, 0.5]


def test_restarts_fall_back():
  values = [float(ALL['restarts'](step)) for step in range(7, 32)]
  falls = [i for i in range(1, 25) if values[i] < values[i - 1]]
  assert falls == [8, 16]


def test_steps_far_beyond_float32_are_told_apart():
  schedule = schedules.constant(0.5, begin=2**24 + 1)
  assert float(schedule(2**24)) == 0.0
  assert float(schedule(2**24 + 1)) == 0.5


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (lambda: schedules.cubic(1.2, begin=0, end=9), r'in \[0, 1\], got 1.2'),
    (lambda: schedules.cubic(0.5, begin=9, end=9), 'begin=9, end=9'),
    (lambda: schedules.cosine(float('nan'), begin=0, end=9), 'got nan'),
    (lambda: schedules.constant(0.5, begin=-1), 'begin=-1'),
    (
      lambda: schedules.polynomial(0.5, begin=0, end=9, initial=-1),
      r'in \[0, 1\], got -1',
    ),
    (
      lambda: schedules.iterative(0.5, begin=0, end=9, rounds=0),
      '`rounds` must be at least 1, got 0',
    ),
    (
      lambda: schedules.prune_then_regrow(0.4, 0.5, begin=0, turn=4, end=9),
      '`peak` must be at least the sparsity 0.5, got 0.4',
    ),
    (
      lambda: schedules.warm_restarts(0.5, begin=0, end=9, cycles=0),
      '`cycles` must be at least 1, got 0',
    ),
  ],
)
def test_errors(make, text):
  with pytest.raises(ValueError, match=text):
    make()
