"""Tests of the recipes of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments import recipes, train

PARAMS = {
  'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
  'norm': {'scale': jnp.ones(2)},
}


@pytest.mark.parametrize('recipe', [recipes.sgd, recipes.adam])
def test_decay_pulls_at_kernels_alone(recipe):
  tx = recipe(0.1, 0.5, 20)
  state, params = tx.init(PARAMS), PARAMS
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  for _ in range(3):  # The rate of the first step is 0.
    updates, state = tx.update(zero, state, params)
    params = optax.apply_updates(params, updates)
  assert np.all(np.asarray(params['dense']['kernel']) < 1)
  np.testing.assert_array_equal(params['dense']['bias'], 1)
  np.testing.assert_array_equal(params['norm']['scale'], 1)


def test_the_rate_rises_and_falls_to_zero():
  rate = recipes.cosine(0.5, 40)
  assert [float(rate(k)) for k in (0, 4, 40)] == pytest.approx([0, 0.5, 0])
  assert np.isfinite(float(recipes.cosine(0.5, 1)(0)))


def test_an_average_by_hand_and_its_zeros():
  masks = {'w': jnp.array([True, False])}
  tx = optax.chain(optax.sgd(1.0), jp.keep_sparse(masks), recipes.average(0.75))
  params = {'w': jnp.array([4.0, 0.0])}
  state = tx.init(params)
  for expected in (4 - 0.25 * 2, 0.75 * 3.5 + 0.25 * 0):
    grads = {'w': jnp.full(2, 2.0)}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    found = optax.tree.get(state, 'average')['w']
    np.testing.assert_allclose(found, [expected, 0.0])


def test_average_refuses():
  with pytest.raises(ValueError, match=r'in \[0, 1\), got 1.0'):
    recipes.average(1.0)
  tx = recipes.average(0.5)
  with pytest.raises(ValueError, match='needs the params'):
    tx.update({'w': jnp.ones(1)}, tx.init({'w': jnp.ones(1)}))


def test_smoothing_by_hand():
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
  labels = jnp.array([0])
  p = np.log([0.7, 0.2, 0.1])
  expected = -(0.7 * p[0] + 0.3 * p.mean())
  found = recipes.smoothed(0.3)(logits, labels, labels)
  np.testing.assert_allclose(found, [expected], rtol=1e-6)
  plain = recipes.smoothed(0.0)(logits, labels, labels)
  np.testing.assert_allclose(
    plain, train.cross_entropy(logits, labels, labels), rtol=1e-6
  )


def test_smoothing_of_mixed_targets_by_hand():
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
  targets = jnp.array([[0.5, 0.5, 0.0]])
  p = np.log([0.7, 0.2, 0.1])
  expected = -(0.7 * (p[0] + p[1]) / 2 + 0.3 * p.mean())
  found = recipes.smoothed(0.3)(logits, targets, targets)
  np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_the_averaged_network_has_statistics_of_its_own():
  x = jnp.array([[1.0, 2.0], [3.0, 8.0]])

  def apply(variables, x, train, mutable):
    y = x * variables['params']['w'][None]
    stats = variables['batch_stats']
    new = {'mean': y.mean(0), 'var': y.var(0)}
    new = jax.tree.map(lambda r, b: 0.9 * r + 0.1 * b, stats, new)
    return y, {'batch_stats': new}

  params = {'w': jnp.array([1.0, 0.0])}
  tx = optax.chain(optax.sgd(1.0), recipes.average(0.5))
  opt_state = tx.init({'w': jnp.array([3.0, 5.0])})
  stats = {'batch_stats': {'mean': jnp.full(2, 7.0), 'var': jnp.ones(2)}}
  state = train.State(params, stats, opt_state)
  found = recipes.averaged(state, apply, [x])
  np.testing.assert_array_equal(found['params']['w'], [3.0, 0.0])
  np.testing.assert_allclose(found['batch_stats']['mean'], [6.0, 0.0], 1e-6)
  np.testing.assert_allclose(found['batch_stats']['var'], [9.0, 0.0], 1e-6)


def test_distillation_by_hand_and_its_fixed_point():
  logits = jnp.array([[1.0, -1.0]])
  labels, images = jnp.array([1]), jnp.array([[3.0, 1.0]])
  loss = recipes.distilled(lambda x: x, weight=0.8, temperature=2.0)
  target = np.exp([1.5, 0.5]) / np.exp([1.5, 0.5]).sum()
  own = np.log(np.exp([0.5, -0.5]) / np.exp([0.5, -0.5]).sum())
  follow = np.sum(target * (np.log(target) - own))
  task = np.log(np.exp([1.0, -1.0]).sum()) + 1.0
  np.testing.assert_allclose(
    loss(logits, labels, images), [0.8 * 4 * follow + 0.2 * task], rtol=1e-5
  )
  alone = recipes.distilled(lambda x: x, weight=1.0)
  total = lambda x: jnp.sum(alone(x, labels, images))
  np.testing.assert_allclose(total(images), 0, atol=1e-6)
  np.testing.assert_allclose(jax.grad(total)(images), 0, atol=1e-6)
