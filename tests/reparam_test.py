"""Reparametrisations: values and gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.soft import reparam

W = np.array([[1.0, -2.0], [3.0, -0.5]], np.float32)
MASK = np.array([[True, False], [True, False]])
G = np.array([[0.5, 1.0], [2.0, 4.0]], np.float32)  # A gradient from above.


def params():
  return {'kernel': jnp.asarray(W), 'bias': jnp.ones(2)}


def pull(fn, *args):
  """Returns the value at 'kernel' and what G there pulls back to."""
  value, vjp = jax.vjp(fn, *args)
  back = vjp({'kernel': jnp.asarray(G), 'bias': jnp.zeros(2)})
  np.testing.assert_array_equal(value['bias'], 1)
  return value['kernel'], *(x['kernel'] for x in back)


@pytest.mark.parametrize('decay', [0.0, 0.25])
def test_straight_through(decay):
  masks = {'kernel': jnp.asarray(MASK), 'bias': optax.MaskedNode()}
  fn = lambda p: reparam.straight_through(p, masks, decay)
  value, back = pull(fn, params())
  np.testing.assert_array_equal(value, [[1, 0], [3, 0]])
  np.testing.assert_allclose(back, G + decay * np.where(MASK, 0, W))


def test_sr_ste_draws_its_masks_from_the_weights():
  fn = jax.jit(lambda p: reparam.sr_ste(p, (1, 2), decay=0.5))
  value, back = pull(fn, params())
  np.testing.assert_array_equal(value, [[0, -2], [3, 0]])
  np.testing.assert_allclose(back, G + 0.5 * np.array([[1, 0], [0, -0.5]]))


@pytest.mark.parametrize(
  ('name', 'shape'), [('weight', (4, 4)), ('kernel', (4, 4, 4))]
)
def test_sr_ste_takes_no_axis_of_a_layout_it_does_not_know(name, shape):
  leaf = {name: jnp.ones(shape)}
  with pytest.raises(ValueError, match=f'{name} .* is not known; say the axis'):
    reparam.sr_ste(leaf)
  assert reparam.sr_ste(leaf, axis=-1)[name].sum() == jnp.ones(shape).sum() / 2


def test_soft_threshold():
  s = {'kernel': jnp.log(3.0), 'bias': optax.MaskedNode()}  # sigmoid is 3/4.
  value, w, s = pull(reparam.soft_threshold, params(), s)
  np.testing.assert_allclose(value, [[0.25, -1.25], [2.25, 0]], 1e-6)
  alive = np.abs(W) > 0.75
  np.testing.assert_allclose(w, G * alive, 1e-6)
  slope = -np.sum(G * np.sign(W) * alive) * 0.75 * 0.25
  np.testing.assert_allclose(s, slope, 1e-6)


def test_sigmoid_gates():
  s = {'kernel': jnp.asarray(G - 1), 'bias': optax.MaskedNode()}
  fn = lambda p, s: reparam.sigmoid_gates(p, s, 3.0)
  gate = 1 / (1 + np.exp(-3.0 * (G - 1)))
  value, w, s = pull(fn, params(), s)
  np.testing.assert_allclose(value, W * gate, 1e-5)
  np.testing.assert_allclose(w, G * gate, 1e-5)
  np.testing.assert_allclose(s, G * W * 3 * gate * (1 - gate), 1e-5)


def test_movement():
  masks = {'kernel': jnp.asarray(MASK), 'bias': optax.MaskedNode()}
  s = {'kernel': jnp.zeros((2, 2)), 'bias': optax.MaskedNode()}
  fn = lambda p, s: reparam.movement(p, s, masks)
  value, w, s = pull(fn, params(), s)
  np.testing.assert_array_equal(value, [[1, 0], [3, 0]])
  np.testing.assert_array_equal(w, G * MASK)
  np.testing.assert_array_equal(s, G * W)  # Also where the mask is zero.
