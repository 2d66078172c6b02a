"""Numbers that follow a width, in the idioms of known architectures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import plans, structure
from jaxprune.structure.numbers import parts
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program import typed
from jaxprune.structure.rules import Value

pytestmark = pytest.mark.usefixtures('promote')


@pytest.fixture
def promote():
  with jax.numpy_rank_promotion('allow'):
    yield


def normal(seed, *shape):
  key = jax.random.key(seed)
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def rms(y):
  return y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)


def attention(p, y, scale):
  q, k, v = (jnp.einsum('td,dhk->thk', y, p[name]) for name in 'qkv')
  scores = jnp.einsum('thk,shk->hts', *scale(q, k))
  y = jnp.einsum('hts,shk->thk', jax.nn.softmax(scores), v)
  return jnp.einsum('thk,hkd->td', y, p['o'])


def t5(p, words):
  """Rows as they are, attention without a scale, a tied and scaled head."""
  y = p['table'][words]
  y = y + attention(p, rms(y), lambda q, k: (q, k))
  y = y + jax.nn.relu(rms(y) @ p['wi']) @ p['wo']
  return rms(y) * y.shape[-1] ** -0.5 @ p['table'].T


def gemma(p, words):
  """Rows times the root of their width."""
  y = p['table'][words]
  y = y * jnp.asarray(y.shape[-1] ** 0.5, y.dtype)
  y = y + attention(p, rms(y), lambda q, k: (q * q.shape[-1] ** -0.5, k))
  y = y + jax.nn.gelu(rms(y) @ p['wi']) @ p['wo']
  return rms(y) @ p['table'].T


def gpt_neo(p, words):
  """Queries times the root of a head, for an attention that divides by it."""
  y = p['table'][words]
  root = p['q'].shape[-1] ** 0.5
  y = y + attention(p, rms(y), lambda q, k: (q * root / root, k))
  y = y + jax.nn.gelu(rms(y) @ p['wi']) @ p['wo']
  return rms(y) @ p['table'].T


def mup(p, words):
  """Scores and logits divided by their width itself."""
  y = p['table'][words]
  y = y + attention(p, rms(y), lambda q, k: (q / q.shape[-1], k))
  y = y + jax.nn.gelu(rms(y) @ p['wi']) @ p['wo']
  return rms(y) @ p['head'] / y.shape[-1]


def transformer(hidden, heads, head, inner):
  p = {name: 3 * normal(k, hidden, heads, head) for k, name in enumerate('qkv')}
  return {
    **p,
    'o': normal(4, heads, head, hidden),
    'table': normal(5, 11, hidden),
    'wi': normal(6, hidden, inner),
    'wo': normal(7, inner, hidden),
    'head': normal(8, hidden, 5),
  }


WORDS = jnp.arange(7)


def error_at(fn, full, x, widths):
  """How far the rescaled network is from the same code at the small width."""
  graph = structure.trace(fn, full, x, reductions='rescale')
  sizes = {name: group.size for name, group in graph.groups.items()}
  assert set(widths) <= set(sizes.values()), graph.protected
  plan = plans.from_widths(
    graph, {n: widths.get(s, s) for n, s in sizes.items()}
  )
  small = plans.shrink(graph, plan, full)
  ours = jax.jit(plans.specialise(graph, plan))(small, x)
  theirs = jax.jit(fn)(small, x)
  return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))


@pytest.mark.parametrize(
  'fn',
  [
    gemma,
    *(pytest.param(f, marks=pytest.mark.slow) for f in (t5, gpt_neo, mup)),
  ],
)
def test_a_miniature_is_its_own_code_at_the_small_width(fn):
  """The order of sums differs nowhere, that of products by a number may."""
  full = transformer(24, 3, 10, 40)
  if fn is not mup:
    del full['head']
  assert error_at(fn, full, WORDS, {24: 13, 10: 6, 40: 9}) < 1e-6


def standardised(p, x):
  """Kernels of variance 1 over their number of entries, as NF-nets have."""
  names = ('NHWC', 'HWIO', 'NHWC')

  def conv(x, w):
    at = tuple(range(w.ndim - 1))
    variance = jnp.var(w, at, keepdims=True)
    scale = lax.rsqrt(jnp.maximum(variance * np.prod(w.shape[:-1]), 1e-4))
    w = (w - jnp.mean(w, at, keepdims=True)) * scale
    return lax.conv_general_dilated(
      x, w, (1, 1), 'SAME', dimension_numbers=names
    )

  act = lambda y: jax.nn.gelu(y) * 1.7015043497085571
  y = conv(x, p['stem'])
  y = y + 0.2 * conv(act(conv(act(y) * 0.98, p['a'])), p['b'])
  return jnp.mean(act(y), (1, 2)) @ p['head']


@pytest.mark.slow
def test_the_variance_of_a_kernel_times_its_entries_follows_them():
  full = {
    'stem': normal(0, 3, 3, 3, 20),
    'a': normal(1, 3, 3, 20, 14),
    'b': normal(2, 3, 3, 14, 20),
    'head': normal(3, 20, 5),
  }
  x = normal(4, 1, 5, 5, 3)
  assert error_at(standardised, full, x, {20: 11, 14: 6}) < 1e-6


D = 8
X = normal(9, 4, D)


def layer_norm(y):
  mean = y.mean(-1, keepdims=True)
  return (y - mean) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-6)


# name -> a network with numbers that concern no width, and its width.
UNCONNECTED = {
  'the root of a width beside a norm of it': (
    lambda p, x: layer_norm(x @ p['a']) @ p['b'] + jnp.tanh(x[:, :3]) / 8,
    64,
  ),
  'a tenth beside a width of 100': (
    lambda p, x: layer_norm(x @ p['a']) @ p['b'] + 0.1 * x[:, :3],
    100,
  ),
  'a mean over 4 before a layer of 16': (
    lambda p, x: jnp.mean(jnp.tanh(x @ p['a']), 0, keepdims=True) @ p['b'],
    16,
  ),
  'the numbers of a gelu': (
    lambda p, x: jax.nn.gelu(layer_norm(x @ p['a'])) @ p['b'],
    12,
  ),
  'the 6 of a hard swish of 12': (
    lambda p, x: jax.nn.hard_swish(layer_norm(x @ p['a'])) @ p['b'],
    12,
  ),
}


@pytest.mark.parametrize('name', UNCONNECTED)
def test_a_number_that_meets_no_width_locks_none(name):
  fn, width = UNCONNECTED[name]
  full = {'a': normal(0, D, width), 'b': normal(1, width, 3)}
  assert list(structure.trace(fn, full, X, reductions='rescale').groups) == [
    'a'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('name', UNCONNECTED)
def test_what_it_scales_is_the_same_at_the_small_width(name):
  fn, width = UNCONNECTED[name]
  full = {'a': normal(0, D, width), 'b': normal(1, width, 3)}
  assert error_at(fn, full, X, {width: 5}) < 1e-6


def test_a_root_that_is_2_by_a_width_of_4_keeps_it_whole():
  """Twice a row of 4 may be its root times it, or its double."""
  fn = lambda p, i: jnp.tanh(p['table'][i] * 2.0) @ p['b']
  full = {'table': normal(0, 11, 4), 'b': normal(1, 4, 3)}
  graph = structure.trace(fn, full, WORDS, reductions='rescale')
  assert '2 in mul at rescale_idioms_test.py' in graph.explain('b', 0)


def sinusoids(width, positions=7):
  angle = np.arange(positions)[:, None] / 1e4 ** (np.arange(width) / width)
  return np.sin(angle).astype(np.float32)


@pytest.mark.parametrize('is_traced', [False, True])
def test_a_table_of_sinusoids_keeps_its_width_whole(is_traced):
  """A narrower class makes other rows of it, not the first of each row."""

  def fn(p, words):
    y = p['table'][words]
    steps = jnp.arange(y.shape[-1]) * (-np.log(1e4) / y.shape[-1])
    table = jnp.sin(jnp.arange(7)[:, None] * jnp.exp(steps))
    y = y + (table if is_traced else sinusoids(y.shape[-1]))
    return jnp.tanh(y) @ p['b']

  full = {'table': normal(0, 11, 12), 'b': normal(1, 12, 3)}
  graph = structure.trace(fn, full, WORDS, reductions='rescale')
  said = graph.explain('b', 0)
  assert 'at rescale_idioms_test.py' in said
  assert 'a table of constants' in said


WIDTHS = (12, 20, 64, 100, 768)
# What no law of a sum or a contraction is, of a width d.
ODD = {
  'a part of 1': lambda y, d: jnp.tanh(y) * (0.7 / d),
  'a part of 2': lambda y, d: jnp.tanh(y) * (2 / d),
  'a power of three fourths': lambda y, d: jnp.tanh(y) * d**0.75,
  'one over such a power': lambda y, d: jnp.tanh(y) / d**0.75,
  'its square': lambda y, d: jnp.tanh(y) / d**2,
  'three of it': lambda y, d: jnp.tanh(y) * (3.0 * d),
  'one less': lambda y, d: jnp.tanh(y) / (d - 1),
  'two more': lambda y, d: jnp.tanh(y) / (d + 2),
  'a part of its root': lambda y, d: jnp.tanh(y) * 0.3 / np.sqrt(d),
  'random features of another scale': (
    lambda y, d: 1.7 * np.sqrt(2 / d) * jnp.cos(y)
  ),
  'an offset': lambda y, d: jnp.tanh(y) + 0.5 * d,
  'a bound': lambda y, d: jnp.clip(y, -0.3 / np.sqrt(d), 0.3),
  'an angle': lambda y, d: jnp.sin(y * (np.pi / d)),
  'an exponent': lambda y, d: jnp.abs(y) ** (1 / d),
  'a part of a sum': (
    lambda y, d: y * jnp.sum(jnp.tanh(y) ** 2, -1, keepdims=True) * (0.7 / d)
  ),
  'three logs': (
    lambda y, d: y - jax.nn.logsumexp(y, -1, keepdims=True) + 3 * np.log(d)
  ),
}


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', ODD)
def test_what_a_width_may_have_become_keeps_it_whole(name, width):
  """None computes another network than the code at the small width."""
  fn = lambda p, x: jnp.tanh(ODD[name](x @ p['a'], p['a'].shape[1])) @ p['b']
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  full = {'a': struct(D, width), 'b': struct(width, 3)}
  graph = structure.trace(fn, full, X, reductions='rescale')
  assert not graph.groups
  said = graph.explain('a', 1)
  assert 'at rescale_idioms_test.py' in said
  assert '`narrow`' in said


# Numbers that meet a value of every width, and say nothing of it.
OF_FORMULAS = {
  'the exact gelu': lambda y: jax.nn.gelu(y, approximate=False),
  'the gelu of a tanh': jax.nn.gelu,
  'the gelu of a logistic': lambda y: y * jax.nn.sigmoid(1.702 * y),
  'a leaky relu': jax.nn.leaky_relu,
  'a steep leaky relu': lambda y: jnp.where(y > 0, y, 0.1 * y),
  'selu': jax.nn.selu,
  'hard swish': jax.nn.hard_swish,
  'relu6': jax.nn.relu6,
  'mish': jax.nn.mish,
  'softplus': jax.nn.softplus,
  'relu of variance 1': lambda y: jax.nn.relu(y) * 1.7139588594436646,
  'dropout': lambda y: jnp.where(
    jax.random.bernoulli(jax.random.key(0), 0.7, y.shape), y / 0.7, 0
  ),
  'a floor': lambda y: y / jnp.maximum(jnp.abs(y), 1e-6),
  'an epsilon': lambda y: y * lax.rsqrt(y * y + 1e-5),
  'a half': lambda y: 0.5 * y,
  'the root of two': lambda y: y / np.sqrt(2),
  'a moving mean': lambda y: 0.9 * y + jnp.tanh(y) * (1 - 0.9),
  'a slow moving mean': lambda y: 0.9999 * y,
}


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', OF_FORMULAS)
def test_a_number_of_a_formula_keeps_no_width(name, width):
  if name == 'a moving mean' and width in (20, 100):
    pytest.skip('0.1 may be 2 / 20 and is one over the root of 100')
  fn = lambda p, x: OF_FORMULAS[name](x @ p['a']) @ p['b']
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  full = {'a': struct(D, width), 'b': struct(width, 3)}
  graph = structure.trace(fn, full, X, reductions='rescale')
  assert list(graph.groups) == ['a'], graph.protected


def chained(times):
  """A number that reads itself twice, again and again."""

  def fn(p, x):
    n = jnp.asarray(3.0)
    for _ in range(times):
      n = n + n / 2**20
    return jnp.tanh(x @ p['a'] * n) @ p['b']

  return fn


def test_a_number_that_reads_itself_twice_is_followed_once():
  """700 times would be 2^700 steps; 12 show that each literal comes once."""
  full = {'a': normal(0, D, 12), 'b': normal(1, 12, 3)}
  closed = jax.make_jaxpr(chained(12))(full, X)
  given = lambda var: Value(
    var.aval.shape, var.aval.dtype, [ax.atom(n) for n in var.aval.shape]
  )
  inputs = [given(var) for var in closed.jaxpr.invars]
  program = typed.build(closed.jaxpr, closed.consts, inputs)
  (part,) = parts.parts_of(program)
  uses = [use for use, _ in part.meetings()]
  roots = list(part.roots(uses[-1]))
  assert len(roots) == len(set(roots)) <= 14
  structure.trace(chained(700), full, X, reductions='rescale')
