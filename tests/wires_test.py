"""The wiring of a trace: as written by hand, and as a chain says it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import lookahead, models, structure, tree


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def conv(x, w, groups=1):
  return lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def norm(p, x, name):
  mul = lax.rsqrt(p[f'{name}_var'] + 1e-3) * p[f'{name}_scale']
  y = x - p[f'{name}_mean'][None, None, None]
  return y * mul[None, None, None] + p[f'{name}_bias'][None, None, None]


def norm_params(name, n):
  return {
    f'{name}_{what}': 1 + jnp.abs(normal(n, seed=k))
    for k, what in enumerate(('scale', 'var', 'mean', 'bias'))
  }


def scores(fn, params, x):
  graph = structure.trace(fn, params, x)
  wiring = structure.wiring(graph)
  return wiring, tree.leaves(lookahead.lookahead(params, wiring))


IMAGE = jnp.zeros((1, 4, 4, 3))


def test_a_chain_with_norms_and_a_flatten_is_what_chain_says():
  params = {
    'a': normal(3, 3, 3, 4),
    'b': normal(3, 3, 4, 5),
    'c': normal(4 * 5, 6),
    'd': normal(6, 2),
    **norm_params('n', 4),
    **norm_params('m', 5),
  }

  def fn(p, x):
    x = jax.nn.relu(norm(p, conv(x, p['a']), 'n'))
    x = jax.nn.relu(norm(p, conv(x, p['b']), 'm'))
    x = lax.reduce_window(
      x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID'
    )
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ p['c'])
    return x @ p['d']

  norms = {
    'a': lookahead.Norm('n_scale', 'n_var', 1e-3),
    'b': lookahead.Norm('m_scale', 'm_var', 1e-3),
  }
  chain = lookahead.chain(params, ['a', 'b', 'c', 'd'], norms=norms)
  want = tree.leaves(lookahead.lookahead(params, chain))
  wiring, found = scores(fn, params, IMAGE)
  assert list(wiring) == ['a', 'b', 'c', 'd']
  assert found.keys() == want.keys()
  for path, score in want.items():
    np.testing.assert_allclose(found[path], score, rtol=1e-5)


def test_a_norm_before_a_sum_counts_on_its_branch_alone():
  """y = relu(n a x); z = y + m b y; out = c z, two channels throughout.

  a is read by b and c behind its norm n, b by c behind its norm m.
  """
  params = {
    'a': jnp.array([[0.5, 1.0]]),
    'b': jnp.array([[0.25, 0.5], [1.0, 2.0]]),
    'c': jnp.array([[2.0], [1.0]]),
    'n': jnp.array([3.0, 2.0]),
    'm': jnp.array([2.0, 4.0]),
  }

  def fn(p, x):
    y = jax.nn.relu((x @ p['a']) * p['n'][None])
    return (y + (y @ p['b']) * p['m'][None]) @ p['c']

  _, found = scores(fn, params, jnp.ones((1, 1)))
  a, b, c, n, m = (np.square(params[name]) for name in 'abcnm')
  np.testing.assert_allclose(found['a'], a * n * (b.sum(1) + c[:, 0]))
  np.testing.assert_allclose(found['b'], b * (a[0] * n)[:, None] * m * c[:, 0])
  np.testing.assert_allclose(
    found['c'][:, 0], c[:, 0] * (a[0] * n + m * b.sum(0))
  )


def test_a_concatenation_keeps_offsets():
  params = {
    'a': normal(3, 3, 3, 2),
    'b': normal(3, 3, 3, 4),
    'c': normal(3, 3, 6, 5),
  }

  def fn(p, x):
    both = [conv(x, p['a']), conv(x, p['b'])]
    return conv(jnp.concatenate(both, -1), p['c'])

  wiring, found = scores(fn, params, IMAGE)
  a, b = (wiring[name].writes.channels for name in 'ab')
  np.testing.assert_array_equal(
    wiring['c'].reads.channels, np.concatenate([a, b])
  )
  rows = jnp.sum(params['c'] ** 2, (0, 1, 3))
  np.testing.assert_allclose(
    found['b'], params['b'] ** 2 * rows[2:][None, None, None], rtol=1e-5
  )


def test_a_depthwise_convolution_is_wired_the_same_in_both_forms():
  totals = []
  spec = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  for grouped in (True, False):
    model = models.mobilenet_v1(0.25, grouped=grouped)
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, spec)
    variables = jax.tree.map(
      lambda s: 1 + np.arange(s.size, dtype='f').reshape(s.shape) / s.size,
      shapes,
    )
    wiring = structure.wiring(structure.trace(model.apply, variables, spec))
    assert len(wiring) == 28
    total = lambda v, wiring=wiring: [
      jnp.log(jnp.sum(score))
      for score in tree.leaves(lookahead.lookahead(v, wiring)).values()
    ]
    totals.append(jax.jit(total)(variables))
  np.testing.assert_allclose(*totals, rtol=1e-5)


def test_a_kernel_inside_a_loop_is_left_out():
  params = {'a': normal(3, 3), 'b': normal(3, 2)}

  def fn(p, x):
    step = lambda h, _: (jnp.tanh(h @ p['a']), None)
    return lax.scan(step, x, length=2)[0] @ p['b']

  wiring, _ = scores(fn, params, jnp.ones((1, 3)))
  assert list(wiring) == ['b']
  assert (wiring['b'].reads.channels == -1).all()
