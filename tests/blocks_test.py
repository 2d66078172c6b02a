"""Residual branches are found, and their gates multiply what they add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structure


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def norm(p, x):
  y = (x - jnp.mean(x, 0)[None]) * lax.rsqrt(jnp.var(x, 0)[None] + 1e-3)
  return y * p['scale'][None] + p['bias'][None]


def norm_params(n):
  return {'scale': 1 + jnp.abs(normal(n)), 'bias': normal(n, seed=1)}


X = normal(5, 4)


def two_layers(seed=0):
  return {'up': normal(4, 6, seed=seed), 'down': normal(6, 4, seed=seed)}


# name -> (params, fn(params, x, *gates), block -> (leaves, closing)). A gate
# multiplies what a branch adds.
NETS = {}


def net(**found):
  def register(make):
    NETS[make.__name__] = (*make(), found)
    return make

  return register


@net(
  first=(
    ('first/conv/down', 'first/conv/up', 'first/norm/bias', 'first/norm/scale'),
    ('first/norm/bias', 'first/norm/scale'),
  ),
  last=(('last/bias', 'last/down', 'last/up'), ('last/bias', 'last/down')),
)
def with_norms_and_biases():
  p = {
    'in': normal(4, 4),
    'first': {'conv': two_layers(), 'norm': norm_params(4)},
    'last': {**two_layers(1), 'bias': normal(4)},
  }

  def fn(p, x, g, h):
    x = x @ p['in']
    w = p['first']['conv']
    y = norm(p['first']['norm'], jnp.tanh(x @ w['up']) @ w['down'])
    x = jax.nn.relu(x + g * y)
    y = jax.nn.gelu(x @ p['last']['up']) @ p['last']['down']
    return h * (y + p['last']['bias'][None]) + x

  return p, fn


@net(
  outer=(
    ('outer/inner/down', 'outer/inner/up', 'outer/out'),
    ('outer/out',),
  ),
  **{
    'outer/inner': (
      ('outer/inner/down', 'outer/inner/up'),
      ('outer/inner/down',),
    )
  },
)
def nested():
  p = {'outer': {'inner': two_layers(), 'out': normal(4, 4)}, 'head': X.T}

  def fn(p, x, g, h):
    y = x
    w = p['outer']['inner']
    y = y + h * (jnp.tanh(y @ w['up']) @ w['down'])
    return (x + g * jnp.maximum(y @ p['outer']['out'], 0)) @ p['head']

  return p, fn


@net(**{'+a': (('a', 'b'), ('b',)), '+c': (('c', 'd'), ('d',))})
def flat_and_checkpointed():
  p = dict(
    zip('abcd', [*two_layers().values(), *two_layers(1).values()], strict=False)
  )

  def fn(p, x, g, h):
    step = lambda a, b, g, x: x + g * (jnp.tanh(x @ a) @ b)
    x = jax.checkpoint(step)(p['a'], p['b'], g, x)
    return step(p['c'], p['d'], h, x)

  return p, fn


@pytest.mark.parametrize('name', NETS)
def test_blocks_and_their_gates(name):
  params, fn, found = NETS[name]
  plain = lambda p, x: fn(p, x, 1.0, 1.0)
  graph = structure.trace(plain, params, X, reductions='keep')
  assert {k: (b.leaves, b.closing) for k, b in graph.blocks.items()} == found
  assert not graph.undropped
  gates = dict(zip(found, (0.3, 1.7), strict=True))
  weights = normal(*plain(params, X).shape, seed=3)

  def loss(p, gates, is_scaled):
    if is_scaled:
      out = plain(structure.scale(graph, p, blocks=gates), X)
    else:
      out = fn(p, X, *gates.values())
    return jnp.vdot(out, weights)

  got, slopes = jax.value_and_grad(loss, (0, 1))(params, gates, True)
  want, wanted = jax.value_and_grad(loss, (0, 1))(params, gates, False)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(slopes), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def branch(p, x):
  return jnp.tanh(x @ p['up']) @ p['down']


PARAMS = {**two_layers(), 'head': normal(4, 2)}


@pytest.mark.parametrize(
  ('fn', 'why'),
  [
    (lambda p, x: jnp.tanh(branch(p, x)), 'tanh at .* is not linear in it'),
    (
      lambda p, x: branch(p, x) * jax.nn.sigmoid(jnp.mean(branch(p, x))),
      'uses it in another way',
    ),
    (lambda p, x: branch(p, x) + 1, 'it comes from a constant'),
    (lambda p, x: x @ p['up'] @ p['up'].T, 'uses it in another way'),
  ],
)
def test_a_block_that_cannot_be_closed_says_why(fn, why):
  net = lambda p, x: (x + fn(p, x)) @ p['head']
  graph = structure.trace(net, PARAMS, X)
  (name,) = graph.blocks
  with pytest.raises(ValueError, match=f'{name!r}'.replace('+', '.')) as error:
    structure.scale(graph, PARAMS, blocks={name: 0.5})
  assert error.match(f'has no gate: .*{why}')


def shared(p, x):
  x = x + branch(p, x)
  return (x + branch(p, x)) @ p['head']


def returned(p, x):
  y = branch(p, x)
  return (x + y) @ p['head'], y


@pytest.mark.parametrize(
  ('fn', 'why'),
  [
    (shared, 'it has no leaf of its own'),
    (returned, 'what it adds is needed elsewhere too'),
  ],
)
def test_a_branch_that_must_stay_is_named(fn, why):
  graph = structure.trace(fn, PARAMS, X)
  assert not graph.blocks
  assert set(graph.undropped.values()) == {why}
  assert all('add at blocks_test.py' in place for place in graph.undropped)


def test_a_sum_that_is_no_residual_is_no_block():
  """A projected shortcut, a norm, a GELU, a weighted mean of two."""

  def fn(p, x):
    y = jax.nn.gelu(x @ p['up'], approximate=True)
    y = norm({'scale': p['scale'], 'bias': p['bias']}, y)
    return 0.5 * (y @ p['down']) + 0.5 * (x @ p['head'])

  params = {**two_layers(), 'head': normal(4, 4), **norm_params(6)}
  graph = structure.trace(fn, params, X)
  assert not graph.blocks
  assert not graph.undropped


@pytest.mark.parametrize(
  ('gates', 'message'),
  [
    ({'blocks': {'z': 1.0}}, r"no block 'z'; the blocks are: \+down"),
    ({'blocks': {'+down': X}}, r"block '\+down' must be a scalar, got \(5, 4"),
    ({'units': {'z': X}}, "no group 'z'; the groups are: up"),
    ({'units': {'up': X}}, r"group 'up' must have shape \(6,\), got \(5, 4\)"),
  ],
)
def test_bad_gates_are_named(gates, message):
  fn = lambda p, x: (x + branch(p, x)) @ p['head']
  graph = structure.trace(fn, PARAMS, X)
  with pytest.raises(ValueError, match=message):
    structure.scale(graph, PARAMS, **gates)


def test_leaves_that_are_missing_are_named():
  graph = structure.trace(branch, two_layers(), X)
  with pytest.raises(ValueError, match='The gates scale down, which the par'):
    structure.scale(graph, {'up': PARAMS['up']}, {'up': jnp.ones(6)})


def test_statistics_that_a_step_hands_back_go_with_their_branch():
  params = {
    'params': {'layer': two_layers(), 'head': normal(4, 2)},
    'batch_stats': {'layer': {'mean': jnp.zeros(4)}, 'first': jnp.zeros(4)},
  }

  def fn(p, x):
    stats, p = p['batch_stats'], p['params']
    y = branch(p['layer'], x)
    mean = jnp.mean(y, 0)
    new = {
      'layer': {'mean': 0.9 * stats['layer']['mean'] + 0.1 * mean},
      'first': 0.9 * stats['first'] + 0.1 * jnp.mean(x, 0),
    }
    return (x + (y - mean[None])) @ p['head'], {'batch_stats': new}

  graph = structure.trace(fn, params, X)
  (block,) = graph.blocks.values()
  assert block.leaves == (
    'batch_stats/layer/mean',
    'params/layer/down',
    'params/layer/up',
  )
