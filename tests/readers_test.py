"""A gate on the readers' rows is a gate on the activation, at any value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from marks import slow

from jaxprune import structure


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def conv(x, w, groups=1):
  return lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def norm(p, x, train):
  """A BatchNorm, by the statistics of the batch or by those of p."""
  mean, var = p['mean'], p['var']
  if train:
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
  wide = lambda v: v[None, None, None]
  y = (x - wide(mean)) * lax.rsqrt(wide(var) + 1e-3)
  return y * wide(p['scale']) + wide(p['bias'])


def norm_params(n):
  names = ('scale', 'var', 'mean', 'bias')
  return {k: 1 + jnp.abs(normal(n, seed=i)) for i, k in enumerate(names)}


def layer_norm(p, x):
  x = x - jnp.mean(x, -1, keepdims=True)
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * p[None]


# name -> (function of params, input, gate and train; params; input; groups).
# gate(group, x) stands in front of every product that reads the group.
NETS = {}


def net(x, *groups):
  def register(make):
    NETS[make.__name__] = (*make(), x, groups)
    return make

  return register


IMAGE = normal(3, 4, 4, 2)


@net(IMAGE, 'a')
def sequential():
  p = {'a': normal(3, 3, 2, 4), 'n': norm_params(4), 'b': normal(3, 3, 4, 2)}

  def fn(p, x, gate, train):
    x = jax.nn.relu(norm(p['n'], conv(x, p['a']), train))
    return conv(gate('a', x), p['b'])

  return fn, p


@net(IMAGE, 'a', 'b')
def residual():
  p = {
    'a': normal(3, 3, 2, 4),
    'b': normal(3, 3, 4, 6),
    'c': normal(3, 3, 6, 4),
    'd': normal(4, 2),
    'n': norm_params(6),
    'm': norm_params(4),
  }

  def fn(p, x, gate, train):
    x = jax.nn.relu(conv(x, p['a']))
    y = jax.nn.relu(norm(p['n'], conv(gate('a', x), p['b']), train))
    y = norm(p['m'], conv(gate('b', y), p['c']), train)
    return jnp.mean(gate('a', jax.nn.relu(x + y)), (1, 2)) @ p['d']

  return fn, p


@net(IMAGE, 'a', 'b')
def concatenated_and_flattened():
  p = {
    'a': normal(3, 3, 2, 3),
    'b': normal(3, 3, 2, 2, seed=1),
    'c': normal(16 * 5, 2),
    'n': norm_params(5),
  }

  def fn(p, x, gate, train):
    both = jnp.concatenate([conv(x, p['a']), conv(x, p['b'])], -1)
    both = jnp.tanh(norm(p['n'], both, train))
    a, b = gate('a', both[..., :3]), gate('b', both[..., 3:])
    # Traced without the gates the parts are never taken apart.
    x = both if gate is free else jnp.concatenate([a, b], -1)
    return x.reshape(x.shape[0], -1) @ p['c']

  return fn, p


@net(IMAGE, 'a')
def depthwise():
  p = {
    'a': normal(3, 3, 2, 4),
    'b': normal(3, 3, 1, 4),
    'c': normal(3, 3, 4, 2),
    'n': norm_params(4),
    'm': norm_params(4),
  }

  def fn(p, x, gate, train):
    x = jax.nn.relu6(norm(p['n'], conv(x, p['a']), train))
    x = jax.nn.relu6(norm(p['m'], conv(x, p['b'], groups=4), train))
    return conv(gate('a', x), p['c'])

  return fn, p


@net(normal(3, 5, 4), 'in', 'up')
def pre_norm_with_a_gated_unit():
  p = {
    'in': normal(4, 6),
    'n': 1 + normal(6),
    'up': normal(6, 8),
    'part': normal(6, 8, seed=1),
    'down': normal(8, 6),
    'm': 1 + normal(6, seed=2),
    'out': normal(6, 2),
  }

  def fn(p, x, gate, train):
    x = x @ p['in']
    h = gate('in', layer_norm(p['n'][None], x))
    x = x + gate('up', jax.nn.silu(h @ p['up']) * (h @ p['part'])) @ p['down']
    return gate('in', layer_norm(p['m'][None], x)) @ p['out']

  return fn, p


def free(name, x):
  return x


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize(
  'name', [n if i < 2 else slow(n) for i, n in enumerate(NETS)]
)
def test_scaled_readers_are_a_gate_on_the_activation(name, train):
  fn, params, x, groups = NETS[name]
  plain = lambda p, x: fn(p, x, free, train)
  graph = structure.trace(plain, params, x, reductions='keep')
  assert set(graph.readers) == set(graph.groups) == set(groups)
  gates = {
    g: jnp.where(jnp.arange(graph.groups[g].size) % 2, 0.3, 1.7) for g in groups
  }
  weights = jax.random.normal(
    jax.random.key(0), jax.eval_shape(plain, params, x).shape
  )

  def loss(p, gates, is_scaled):
    if is_scaled:
      scaled = structure.scale(graph, p, gates, closable=False)
      return jnp.vdot(weights, plain(scaled, x))
    gate = lambda name, x: x * gates[name][(None,) * (x.ndim - 1)]
    return jnp.vdot(weights, fn(p, x, gate, train))

  grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
  (scaled, slopes), (gated, wanted) = (
    grad(params, gates, k) for k in (True, False)
  )
  np.testing.assert_allclose(scaled, gated, rtol=1e-5, atol=1e-5)
  assert abs(gated - jnp.vdot(weights, plain(params, x))) > 1e-3
  for a, b in zip(
    jax.tree.leaves(slopes), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


X = jnp.ones((2, 3, 4))


def head(p, x):
  return jnp.tanh(x @ p['a']) @ p['b']


HEAD = {'a': normal(4, 6), 'b': normal(6, 2)}
REFUSED = {
  'of queries and keys': (
    lambda p, x: (
      jax.nn.softmax(jnp.einsum('nid,njd->nij', x @ p['a'], x @ p['b'].T))
      @ (x @ p['c'])
    ),
    {**HEAD, 'b': normal(6, 4), 'c': normal(4, 2)},
    'a',
    r'dot_general at readers_test.py:\d+ multiplies two arrays of data over '
    r'it, and dot_general at readers_test.py:\d+ reads the result',
  ),
  'whose mean is returned': (
    lambda p, x: (head(p, x), jnp.mean(jnp.tanh(x @ p['a']))),
    HEAD,
    'a',
    r'reduce_sum at .* reduces over it, and the function returns the result',
  ),
  'of a standardised kernel': (
    lambda p, x: head({**p, 'b': p['b'] / jnp.linalg.norm(p['b'])}, x),
    HEAD,
    'a',
    r'b reads it, and .* uses it in another way',
  ),
  'of a kernel that is a square': (
    lambda p, x: head({**p, 'b': p['b'] ** 2}, x),
    HEAD,
    'a',
    r'of a kernel that reads it: (square|integer_pow) at .* is not linear',
  ),
  'of a tied embedding': (
    lambda p, x: (p['a'][jnp.array([0, 2])] + 1) @ p['a'].T,
    {'a': normal(4, 6)},
    'a',
    r'a reads it, and gather at .* uses it in another way',
  ),
  'that a constant reads': (
    lambda p, x: jnp.tanh(x @ p['a']) @ jnp.ones((6, 2)),
    HEAD,
    'a',
    r'with what no leaf scales along it',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_group_without_a_place_is_refused(name):
  fn, params, group, why = REFUSED[name]
  graph = structure.trace(fn, params, X, reductions='keep')
  assert group in graph.groups
  assert group not in graph.readers
  with pytest.raises(ValueError, match=f"Group '{group}' has no gate: .*{why}"):
    structure.scale(graph, params, {group: jnp.ones(6)})
