"""The axis that a product sums over, from the trace and not from the layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxprune as jp
from jaxprune import structure


def found(fn, params, x):
  graph = structure.trace(fn, params, x)
  return {p: axis for p, (axis, _) in structure.input_axes(graph).items()}


def conv(x, w, layout, groups=1):
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=layout, feature_group_count=groups
  )


NHWC, NCHW = ('NHWC', 'HWIO', 'NHWC'), ('NCHW', 'OIHW', 'NCHW')
X, IMAGE = jnp.ones((2, 8)), jnp.ones((1, 4, 4, 8))


@pytest.mark.parametrize(
  ('fn', 'shape', 'x', 'axis'),
  [
    (lambda w, x: x @ w, (8, 8), X, -2),
    (lambda w, x: x @ w.T, (8, 8), X, -1),
    (lambda w, x: (w @ x.T).T, (8, 8), X, -1),
    (lambda w, x: x @ (w * (w > 0)).T.astype('bfloat16'), (6, 8), X, -1),
    (lambda w, x: conv(x, w, NHWC), (3, 3, 8, 5), IMAGE, -2),
    (lambda w, x: conv(x, w, NHWC, 2), (3, 3, 4, 6), IMAGE, -2),
    (lambda w, x: conv(x, w, NHWC, 8), (3, 3, 1, 8), IMAGE, None),
    (lambda w, x: conv(x.mT, w, NCHW), (8, 4, 3, 3), IMAGE, -3),
    (
      lambda w, x: conv(x, w.transpose(2, 3, 1, 0), NHWC),
      (5, 8, 3, 3),
      IMAGE,
      -3,
    ),
    (lambda w, x: x @ w.reshape(8, 6), (8, 2, 3), X, -3),
    (lambda w, x: x @ w.reshape(8, 6), (2, 4, 6), X, None),
    (lambda w, x: x @ w.reshape(2, 8, 3)[0], (16, 3), X, None),
    (lambda w, x: jnp.einsum('bi,io->bo', x @ w, w), (8, 8), X, -2),
    (lambda w, x: x @ w @ w.T, (8, 4), X, None),
    (lambda w, x: lax.scan(lambda h, w: (h @ w, h), x, w)[0], (3, 8, 8), X, -2),
    (lambda w, x: x + w[:1], (2, 8), X, None),
  ],
)
def test_the_input_axis_is_the_one_that_is_summed_over(fn, shape, x, axis):
  call = lambda p, x: fn(p['kernel'], x)
  assert found(call, {'kernel': jnp.ones(shape)}, x) == {'kernel': axis}


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), name='conv')(x)
    x = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
    x = nn.DenseGeneral((2, 4), name='split')(x)
    x = nn.DenseGeneral(12, axis=(-2, -1), name='join')(x)
    return nn.Dense(4, name='head')(nn.LayerNorm(name='norm')(x))


@pytest.mark.parametrize('collection', [True, False])
def test_rules_of_a_graph_prune_along_its_inputs(collection):
  variables = Net().init(jax.random.key(0), IMAGE)
  fn, params = Net().apply, variables
  if not collection:
    params = variables['params']
    fn = lambda p, x: Net().apply({'params': p}, x)
  graph = structure.trace(fn, params, IMAGE)
  rules = structure.n_by_m(graph, 2, 4)
  reasons = [why for _, why in structure.input_axes(graph).values() if why]
  assert len(reasons) == 2
  assert 'sums over one channel' in reasons[0]
  assert reasons[1] == 'axes [0, 1] are summed over together'
  params = variables['params']
  tx = jp.sparsify(
    jp.scores.magnitude,
    granularity={'head.*': None, **rules},
    sparsity=0.5,
  )
  _, state = tx.update(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  masks = optax.tree.get(state, 'masks')
  for name in ('depthwise', 'join', 'head'):
    assert isinstance(masks[name]['kernel'], optax.MaskedNode)
  groups = np.moveaxis(masks['conv']['kernel'], 2, -1).reshape(-1, 4)
  np.testing.assert_array_equal(groups.sum(1), 2)
  groups = masks['split']['kernel'].reshape(2, 4, -1)
  np.testing.assert_array_equal(groups.sum(1), 2)
