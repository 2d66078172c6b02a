"""The wiring of a trace: as written by hand, and as a chain says it."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import models, structure, tree
from jaxprune.scores import lookahead


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


def test_a_downsampling_block_by_hand():
  """a, then b and c beside the shortcut d, each with a norm; e reads the sum.

  The authors' code takes the norm of d for that of c.
  """
  shapes = {'a': (3, 2), 'b': (2, 4), 'c': (4, 5), 'd': (2, 5), 'e': (5, 3)}
  params = {name: normal(3, 3, *shape) for name, shape in shapes.items()}
  for seed, name in enumerate('abcd'):
    made = norm_params(name, shapes[name][1])
    params |= {k: v + 0.1 * seed for k, v in made.items()}

  def fn(p, x):
    layer = lambda x, name: norm(p, conv(x, p[name]), name)
    x = jax.nn.relu(layer(x, 'a'))
    y = layer(jax.nn.relu(layer(x, 'b')), 'c')
    return conv(jax.nn.relu(y + layer(x, 'd')), p['e'])

  _, found = scores(fn, params, IMAGE)
  exact = {k: np.float64(v) for k, v in params.items()}
  w = {name: exact[name] ** 2 for name in shapes}
  gain = {
    k: exact[f'{k}_scale'] ** 2 / (exact[f'{k}_var'] + 1e-3) for k in 'abcd'
  }
  out = {k: gain[k] * w[k].sum((0, 1, 2)) for k in 'abcd'}
  read = {k: w[k].sum((0, 1, 3)) for k in 'bcde'}
  want = {
    'a': w['a'] * gain['a'] * (read['b'] + read['d']),
    'b': w['b'] * out['a'][:, None] * gain['b'] * read['c'],
    'c': w['c'] * out['b'][:, None] * gain['c'] * read['e'],
    'd': w['d'] * out['a'][:, None] * gain['d'] * read['e'],
    'e': w['e'] * (out['c'] + out['d'])[:, None],
  }
  assert found.keys() == want.keys()
  for name, score in want.items():
    np.testing.assert_allclose(found[name], score, rtol=1e-5, err_msg=name)


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


def dense_norm(form):
  """x @ a, a norm written in one of its forms, @ b."""
  params = {
    'a': jnp.array([[1.0, 2.0]]),
    'b': jnp.array([[3.0], [1.0]]),
    'scale': jnp.array([2.0, 0.5]),
    'var': jnp.array([3.0, 8.0]),
  }
  apply = lambda p, x: (
    form(x @ p['a'], p['scale'][None], p['var'][None]) @ p['b']
  )
  return scores(apply, params, jnp.ones((1, 1)))[1]


@pytest.mark.parametrize(
  'form',
  [
    lambda x, s, v: x * (lax.rsqrt(v + 1.0) * s),
    lambda x, s, v: (x - s) / jnp.sqrt(v + 1.0) * s + s,
    lambda x, s, v: x / (jnp.sqrt(1.0 + v) / s),
    lambda x, s, v: x * (v + 1.0) ** -0.5 * s,
    lambda x, s, v: x * (1.0 / jnp.sqrt(v + 1.0)) * s,
    lambda x, s, v: x * (jnp.sqrt(v + 1.0) / (v + 1.0)) * s,
    lambda x, s, v: x * (s / lax.integer_pow(lax.sqrt(v + 1.0), 1)),
    lambda x, s, v: jax.vmap(lambda x, s, v: x / jnp.sqrt(v + 1.0) * s)(
      x[0], s[0], v[0]
    )[None],
  ],
)
def test_a_norm_counts_in_whatever_form_it_is_written(form):
  """scale^2 / (var + 1) is 4 / 4 and 1/4 / 9."""
  found = dense_norm(form)
  np.testing.assert_allclose(found['a'], [[9, 4 / 36]], rtol=1e-6)
  np.testing.assert_allclose(found['b'], [[9], [4 / 36]], rtol=1e-6)


def test_what_divides_is_not_what_multiplies():
  found = dense_norm(lambda x, s, v: x / s * v * v)
  np.testing.assert_allclose(found['a'], [[9 / 4 * 81, 4 * 4 * 64**2]])


def test_one_number_is_a_factor_of_all_channels():
  params = {
    'a': jnp.ones((1, 2)),
    'b': jnp.ones((2, 1)),
    'gain': jnp.array(3.0),
  }
  fn = lambda p, x: (x @ p['a'] * p['gain']) @ p['b']
  _, found = scores(fn, params, jnp.ones((1, 1)))
  np.testing.assert_allclose(found['a'], [[9, 9]])


def test_equinox_batch_norm_is_the_rsqrt_form():
  model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
    4, 'batch', eps=1e-3, mode='ema'
  )
  model = eqx.tree_at(lambda m: m.weight, model, norm_params('n', 4)['n_scale'])
  model = eqx.nn.inference_mode(model)
  params = {'a': normal(3, 4), 'b': normal(4, 2), 'n': (model, state)}
  arrays, static = eqx.partition(params, eqx.is_array)
  arrays = jax.tree.map(lambda x: jnp.abs(x) + 0.5, arrays)

  def fn(arrays, x):
    p = eqx.combine(arrays, static)
    one = lambda x: p['n'][0](p['a'].T @ x, p['n'][1])[0]
    with jax.numpy_rank_promotion('allow'):
      return jax.vmap(one, axis_name='batch')(x) @ p['b']

  _, found = scores(fn, arrays, jnp.ones((5, 3)))
  n, (_, var) = arrays['n'][0], arrays['n'][1].get(model.ema_state_index)
  gain = (n.weight**2 / (var + 1e-3))[None]
  a, b = arrays['a'] ** 2, arrays['b'] ** 2
  np.testing.assert_allclose(found['a'], a * gain * b.sum(1)[None], rtol=1e-5)
  np.testing.assert_allclose(found['b'], b * gain.T * a.sum(0)[:, None], 1e-5)


@pytest.mark.parametrize(
  ('form', 'path'),
  [
    (lambda x, s, v: x * (1 + s), 'scale'),
    (lambda x, s, v: x * jnp.exp(s), 'scale'),
    (lambda x, s, v: x * jnp.sqrt(v), 'var'),
    (lambda x, s, v: s / (1 + x * x), 'scale'),
    (lambda x, s, v: x + jnp.sum(x[:, None] * s.T[None], 1), 'scale'),
  ],
)
def test_a_factor_that_no_norm_stands_for_is_named(form, path):
  with pytest.warns(UserWarning, match=f"'{path}': .*mul|div at wires_test"):
    found = dense_norm(form)
  np.testing.assert_allclose(found['a'], [[9, 4]])


def test_an_attention_is_wired_head_by_head():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name='a')(x)
      x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(x)
      return nn.Dense(3, name='b')(x)

  x = jnp.ones((1, 5, 2))
  params = Net().init(jax.random.key(0), x)
  wiring, found = scores(Net().apply, params, x)
  w = {
    path.split('/')[-2]: np.float64(leaf) ** 2
    for path, leaf in tree.leaves(params).items()
    if path in wiring
  }
  found = {path.split('/')[-2]: score for path, score in found.items()}
  into = w['a'].sum(0)
  want = {
    'query': w['query'] * into[:, None, None],
    'key': w['key'] * into[:, None, None],
    'value': w['value'] * into[:, None, None] * w['out'].sum(2),
    'out': w['out'] * w['value'].sum(0)[..., None] * w['b'].sum(1),
    'b': w['b'] * w['out'].sum((0, 1))[:, None],
    'a': w['a'] * sum(w[k].sum((1, 2)) for k in ('query', 'key', 'value')),
  }
  assert found.keys() == want.keys()
  for name, score in want.items():
    np.testing.assert_allclose(found[name], score, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('order', ['bhk,hkd->bd', 'bhk,khd->bd'])
def test_heads_read_in_any_order_are_the_flat_kernels(order):
  a, b = normal(3, 2, 4), normal(*((2, 4) if order[4] == 'h' else (4, 2)), 5)

  def fn(p, x):
    return jnp.einsum(order, jnp.einsum('bi,ihk->bhk', x, p['a']), p['b'])

  _, found = scores(fn, {'a': a, 'b': b}, jnp.ones((1, 3)))
  straight = b if order[4] == 'h' else b.swapaxes(0, 1)
  flat = {'a': a.reshape(3, 8), 'b': straight.reshape(8, 5)}
  want = lookahead.lookahead(flat, lookahead.chain(flat, ['a', 'b']))
  np.testing.assert_allclose(found['a'].reshape(3, 8), want['a'], rtol=1e-5)
  turned = found['b'] if order[4] == 'h' else found['b'].swapaxes(0, 1)
  np.testing.assert_allclose(turned.reshape(8, 5), want['b'], rtol=1e-5)


def test_heads_that_a_flat_kernel_reads_or_writes():
  params = {'a': normal(3, 2, 4), 'b': normal(8, 6), 'c': normal(3, 2, 5)}

  def fn(p, x):
    x = jnp.einsum('bi,ihk->bhk', x, p['a']).swapaxes(1, 2)
    x = (x.reshape(-1, 8) @ p['b']).reshape(-1, 2, 3)
    return jnp.einsum('bhk,khd->bd', x, p['c'])

  _, found = scores(fn, params, jnp.ones((1, 3)))
  a, b, c = (params[name] ** 2 for name in 'abc')
  before = a.sum(0).T.reshape(8, 1)
  after = c.sum(2).T.reshape(1, 6)
  np.testing.assert_allclose(found['b'], b * before * after, rtol=1e-5)


@pytest.mark.parametrize(
  ('fn', 'why'),
  [
    (lambda p, x: jnp.tanh(p['b']), 'takes what is computed from it'),
    (lambda p, x: p['b'][::-1], 'takes it in another shape'),
    (lambda p, x: p['b'].reshape(6, 3)[:4], 'takes what is computed from it'),
    (lambda p, x: p['b'].reshape(3, 6).T[:, :2].T, 'computed from it'),
  ],
)
def test_a_kernel_that_enters_changed_is_named(fn, why):
  params = {'b': normal(3, 6)}
  apply = lambda p, x: x[:, : len(fn(p, x))] @ fn(p, x)
  graph = structure.trace(apply, params, jnp.ones((1, 9)))
  with pytest.warns(UserWarning, match=f"'b': dot_general at .*{why}"):
    assert not structure.wiring(graph)


def test_what_a_wiring_leaves_out_has_a_reason():
  params = {
    'idle': normal(2, 2),
    'shared': normal(2, 2),
    'each': normal(3, 4, 2),
    'heads': normal(2, 3, 4),
    'some': normal(4, 5),
  }

  def fn(p, x):
    x = jnp.tanh(x @ p['shared']) @ p['shared']
    x = jnp.einsum('bi,ihk->bhk', x, p['heads'])
    y = jnp.einsum('bhk,hkj->bhj', x, p['each'])
    return x @ p['some'], y

  graph = structure.trace(fn, params, jnp.ones((1, 2)))
  why = structure.unwired(graph)
  assert list(why) == ['each', 'shared', 'some', 'idle']
  assert 'shares an axis with the data' in why['each']
  assert 'is wired where it is used first' in why['shared']
  assert 'reads some of the axes that others write' in why['some']
  assert why['idle'] == 'it multiplies no data as it is'
  with pytest.warns(UserWarning, match="'idle': it multiplies no data"):
    assert list(structure.wiring(graph)) == ['shared', 'heads', 'some']


def test_a_kernel_inside_a_loop_is_left_out():
  params = {'a': normal(3, 3), 'b': normal(3, 2)}

  def fn(p, x):
    step = lambda h, _: (jnp.tanh(h @ p['a']), None)
    return lax.scan(step, x, length=2)[0] @ p['b']

  with pytest.warns(UserWarning, match="'a': scan at .* is a loop"):
    wiring, _ = scores(fn, params, jnp.ones((1, 3)))
  assert list(wiring) == ['b']
  assert (wiring['b'].reads.channels == -1).all()
