"""What protects an axis is named with the line of the user's own code."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxprune import structure

PARAMS = {'a': jnp.ones((5, 6)), 'b': jnp.ones((6, 3))}
X = jnp.ones((4, 5))
PADS = ((0, 0, 0), (-1, 1, 0))
ACROSS = jnp.array([0, 3, 1, 4, 2, 5])

# kind -> what becomes of the 6 channels, and what is said of it.
KINDS = {
  'reduction': (lambda y: y / jnp.sum(y, -1, keepdims=True), 'reduces over it'),
  'no rule': (
    lambda y: lax.linalg.qr(y, full_matrices=False)[1],
    'has no rule',
  ),
  'frequencies': (lambda y: jnp.abs(jnp.fft.fft(y)), 'runs along it'),
  'order': (
    lambda y: jnp.concatenate([y[:, :3], -y[:, 3:]], 1)[:, ACROSS],
    'reorders it across its parts',
  ),
  'running sum': (lambda y: jnp.cumsum(y, 1), 'runs along it'),
  'sort': (lambda y: jnp.sort(y, 1), 'runs along it'),
  'rank': (lambda y: jnp.argmax(y, 1)[:, None] * y, 'numbers its entries'),
  'gather': (lambda y: y[:, jnp.array([5, 4, 4, 2, 1, 0])], 'indexes it'),
  'window': (
    lambda y: lax.dynamic_slice(y, (0, 0), (4, 6)) + near(y),
    'slides',
  ),
  'loop': (lambda y: lax.map(jnp.sin, y.T).T, 'steps along it'),
  'shift': (lambda y: lax.pad(y, 0.0, PADS), 'pads it'),
  'each': (lambda y: jnp.stack([*y.T], 1), 'takes it apart'),
}


def near(y):
  """Sums two neighbours."""
  window, pads = (1, 2), ((0, 0), (1, 0))
  return lax.reduce_window(y, 0.0, lax.add, window, (1, 1), pads)


@pytest.mark.parametrize('kind', KINDS)
def test_the_line_that_protects_an_axis_is_named(kind):
  fn, why = KINDS[kind]
  net = lambda p, x: fn(x @ p['a']) @ p['b']
  graph = structure.trace(net, PARAMS, X)
  said = graph.explain('a', 1)
  assert said.startswith('protected (')
  assert why in said
  culprit = near if kind == 'window' else fn
  first = culprit.__code__.co_firstlineno
  lines = range(first, first + (4 if kind == 'window' else 2))
  assert any(f' at explain_test.py:{line}' in said for line in lines), said


def test_what_flax_does_is_named_by_the_line_that_calls_it():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(6)(x)
      x = nn.LayerNorm()(x)  # Here.
      return nn.Dense(3)(x)

  params = jax.eval_shape(Net().init, jax.random.key(0), X)
  graph = structure.trace(Net().apply, params, X)
  line = Net.__call__.__wrapped__.__code__.co_firstlineno + 3
  said = graph.explain('params/Dense_0/kernel', 1)
  # The line of the user, and that of the library, which is Flax's to move.
  pattern = (
    rf'protected \(6\): reduce_sum at explain_test\.py:{line} '
    r'\(flax/linen/normalization\.py:\d+\) reduces over it'
  )
  assert re.fullmatch(pattern, said), said


def test_groups_and_single_entries():
  net = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  params = {'a': jnp.ones((5, 6)), 'b': jnp.ones((6, 1))}
  graph = structure.trace(net, params, X)
  assert graph.explain('a', 1) == 'group a (6 units)'
  assert graph.explain('b', -2) == 'group a (6 units)'
  assert graph.explain('b', 1) == 'protected: it has a single entry'


def test_what_the_user_computes_is_named_by_one_line():
  params = {'a': jnp.ones((5, 4)), 'b': jnp.ones((4, 2))}
  mine = lambda p, x: jax.nn.softmax(x @ p['a']) @ p['b']
  said = structure.trace(mine, params, X).protected['a:1']
  assert re.match(r'\w+ at explain_test\.py:\d+ [^(]*$', said), said
