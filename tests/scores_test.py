"""Scores against hand-worked numbers, laws and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import scores


def small():
  return {
    'dense': {
      'kernel': jnp.array([[1.0, -2.0], [3.0, 0.5]]),
      'bias': jnp.ones(2),
    },
    'head': {'kernel': jnp.array([[-4.0], [0.25]], jnp.bfloat16)},
  }


def test_magnitude_by_hand():
  got = scores.magnitude(small())
  np.testing.assert_array_equal(got['dense']['kernel'], [[1, 2], [3, 0.5]])
  np.testing.assert_array_equal(got['head']['kernel'], [[4], [0.25]])
  assert got['head']['kernel'].dtype == jnp.bfloat16
  assert got['dense']['bias'] == optax.MaskedNode()


def test_magnitude_scores_the_leaves_it_is_told():
  by_rule = scores.magnitude(small(), {'head.*': False, '.*bias': True})
  by_function = scores.magnitude(small(), lambda path, _: 'dense' in path)
  assert by_rule['head']['kernel'] == optax.MaskedNode()
  np.testing.assert_array_equal(by_rule['dense']['bias'], [1, 1])
  assert jax.tree.structure(by_rule) == jax.tree.structure(by_function)
