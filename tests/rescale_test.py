"""Rescaled: what the same module computes when it is made smaller."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import models, plans, structure
from jaxprune.plans.proof import check


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def lively(variables):
  """The leaves of an initialiser, none of them constant."""
  return jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
    variables,
  )


class Block(nn.Module):
  """A pre-norm transformer block whose widths are all its own."""

  hidden: int
  heads: int
  head: int
  inner: int

  @nn.compact
  def __call__(self, x):
    width = self.heads * self.head
    attend = nn.MultiHeadDotProductAttention(self.heads, qkv_features=width)
    y = nn.LayerNorm()(x)
    x = x + attend(y, y)
    y = nn.gelu(nn.Dense(self.inner)(nn.RMSNorm()(x)))
    return x + nn.Dense(self.hidden)(y)


class ViT(nn.Module):
  """Patches, one block and a mean over them."""

  hidden: int
  heads: int
  head: int
  inner: int

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.hidden, (4, 4), (4, 4))(x)
    x = x.reshape(x.shape[0], -1, self.hidden)
    shape = (1, x.shape[1], self.hidden)
    x = x + self.param('positions', nn.initializers.normal(1.0), shape)
    x = Block(self.hidden, self.heads, self.head, self.inner)(x)
    return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


IMAGES = normal(2, 8, 8, 3)
ATTENTION = 'Block_0/MultiHeadDotProductAttention_0'
WIDTHS = {
  'Conv_0': 16,
  f'{ATTENTION}/query': 3,
  f'{ATTENTION}/query.1': 6,
  f'{ATTENTION}/value': 6,
  'Block_0/Dense_0': 20,
}


def error(a, b):
  return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@pytest.fixture(scope='module')
def vit():
  big = ViT(24, 4, 8, 32)
  variables = lively(big.init(jax.random.key(1), IMAGES))
  return big, variables


@pytest.mark.parametrize(
  ('reductions', 'is_equal'), [('rescale', True), ('keep', False)]
)
def test_a_small_vit_is_what_the_module_makes_of_it(vit, reductions, is_equal):
  big, variables = vit
  graph = structure.trace(big.apply, variables, IMAGES, reductions=reductions)
  assert set(graph.groups) == set(WIDTHS)
  plan = plans.from_widths(graph, WIDTHS)
  small = plans.shrink(graph, plan, variables)
  ours = jax.jit(plans.specialise(graph, plan))(small, IMAGES)
  theirs = jax.jit(ViT(16, 3, 6, 20).apply)(small, IMAGES)
  assert (error(ours, theirs) < 1e-6) == is_equal
  assert (error(ours, theirs) > 1e-2) != is_equal


def test_protect_keeps_what_a_norm_runs_over(vit):
  big, variables = vit
  graph = structure.trace(big.apply, variables, IMAGES)
  assert set(WIDTHS) - set(graph.groups) == {'Conv_0', f'{ATTENTION}/query.1'}
  said = graph.explain(f'params/{ATTENTION}/query/kernel', 2)
  line = Block.__call__.__wrapped__.__code__.co_firstlineno + 5
  assert said.startswith(f'protected (8): 8 in sqrt at rescale_test.py:{line} ')
  assert said.endswith('follows from its size')


@pytest.mark.slow
def test_a_small_bert_is_what_the_module_makes_of_it():
  sizes = {'hidden': 24, 'heads': 3, 'intermediate': 32, 'head_dim': 8}
  fewer = {'hidden': 16, 'heads': 2, 'intermediate': 20, 'head_dim': 6}
  make = lambda sizes: models.BERT(
    vocab_size=50, depth=2, positions=16, **sizes
  )
  words = jax.random.randint(jax.random.key(0), (2, 12), 0, 50)
  variables = lively(make(sizes).init(jax.random.key(1), words))
  graph = structure.trace(
    make(sizes).apply, variables, words, reductions='rescale'
  )
  to = {sizes[name]: fewer[name] for name in sizes}
  widths = {name: to[group.size] for name, group in graph.groups.items()}
  assert len(widths) == 2 + 2 * 4  # Residual, pooler; 4 of each layer.
  widths['pooler'] = fewer['hidden']
  plan = plans.from_widths(graph, widths)
  small = plans.shrink(graph, plan, variables)
  ours = plans.specialise(graph, plan)(small, words)
  assert error(ours, make(fewer).apply(small, words)) < 1e-6
  check(graph, plan, variables, words)
  # A second width finds the same numbers as their places do.
  told = structure.trace(
    make(sizes).apply,
    variables,
    words,
    reductions='rescale',
    narrow=(make(fewer).apply, jax.eval_shape(lambda: small), words),
  )
  assert told.groups == graph.groups


# A network whose norm is to be found out: name -> (norm, is it known?)

E, D = 12, 8
NORMS = {
  'layer norm': lambda y: (
    (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-6)
  ),
  'sample variance': lambda y: y / jnp.std(y, -1, ddof=1, keepdims=True),
  'rms norm': lambda y: (
    y * lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) * (1 / y.shape[-1]) + 1e-6)
  ),
  'softmax': lambda y: jax.nn.softmax(y),
  'l2 norm': lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True),
  'group norm': lambda y: _group_norm(y),
  'mean in bfloat16': lambda y: (
    y - jnp.mean(y.astype(jnp.bfloat16), -1, keepdims=True).astype(y.dtype)
  ),
  'a norm scaled by its width': lambda y: (
    y / jnp.linalg.norm(y, axis=-1, keepdims=True) * y.shape[-1] ** 0.5
  ),
  'a root mean square by a norm': lambda y: (
    y / (jnp.linalg.norm(y, axis=-1, keepdims=True) / y.shape[-1] ** 0.5)
  ),
  'variance of two moments': lambda y: (
    (y - y.mean(-1, keepdims=True))
    * lax.rsqrt(
      jnp.mean(y * y, -1, keepdims=True)
      - jnp.mean(y, -1, keepdims=True) ** 2
      + 1e-3
    )
  ),
  'a mean made a sum again': lambda y: (
    y * lax.rsqrt(y.var(-1, keepdims=True) * y.shape[-1] + 1e-3)
  ),
  'inside a scan': lambda y: lax.scan(
    lambda c, _: ((c - c.mean(-1, keepdims=True)) * 1.5, None), y, length=3
  )[0],
}
UNKNOWN = {
  'a scale that no size explains': (
    lambda y: y / (0.3 * jnp.sum(y * y, -1, keepdims=True)),
    'sums 12 entries and 0.3 in mul at rescale_test.py',
  ),
  'random features': (
    lambda y: np.sqrt(2 / E) * jnp.cos(y),
    '0.408248 in mul at rescale_test.py:.* may stand for its 12 entries',
  ),
  'a temperature': (
    lambda y: jnp.tanh(y) * np.log(E),
    '2.48491 in mul at rescale_test.py:.* may stand for its 12 entries',
  ),
  'a temperature that JAX computes': (
    lambda y: jnp.tanh(y) * jnp.log(E),
    '2.48491 in mul at rescale_test.py:.* may stand for its 12 entries',
  ),
  'one more than the width': (
    lambda y: jnp.tanh(y) / (1 + y.shape[-1]),
    '13 in div at rescale_test.py:.* may stand for its 12 entries',
  ),
  'the log of a mean of exponentials': (
    lambda y: (
      y - (jax.nn.logsumexp(y, -1, keepdims=True) - np.log(y.shape[-1]))
    ),
    '2.48491 in sub at rescale_test.py:.* may stand for its 12 entries',
  ),
  'a table that counts': (
    lambda y: y * np.linspace(1, 2, E, dtype=np.float32),
    'a table of constants at .* at rescale_test.py',
  ),
}


def _group_norm(y):
  parts = y.reshape(*y.shape[:-1], 3, -1)
  mean = parts.mean(-1, keepdims=True)
  var = jnp.mean(jnp.square(parts - mean), -1, keepdims=True)
  return ((parts - mean) / jnp.sqrt(var + 1e-6)).reshape(y.shape)


def net(norm):
  return lambda p, x: jnp.tanh(norm(x @ p['a'])) @ p['b']


def params(width=E):
  return {'a': normal(D, width), 'b': normal(width, 3)}


X = normal(4, D)


@pytest.fixture
def promote():
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.usefixtures('promote')
@pytest.mark.parametrize('name', NORMS)
def test_what_follows_from_a_width_is_found(name):
  """The first channels stay, so that the same code runs on what is left."""
  fn, full = net(NORMS[name]), params()
  graph = structure.trace(fn, full, X, reductions='rescale')
  width = 6
  if name == 'group norm':  # 3 groups of 4, of which 2 stay.
    assert sorted(g.size for g in graph.groups.values()) == [3, 4]
    per = next(name for name, g in graph.groups.items() if g.size == 4)
    plan = plans.from_widths(graph, {per: 2})
  else:
    plan = plans.from_widths(graph, {'a': width})
  small = plans.shrink(graph, plan, full)
  ours = plans.specialise(graph, plan)(small, X)
  assert error(ours, fn(small, X)) < 1e-6
  full_size = plans.masked(graph, plan)(full, X)
  assert error(ours, full_size) < 1e-5


@pytest.mark.usefixtures('promote')
@pytest.mark.parametrize('name', UNKNOWN)
def test_what_cannot_be_told_is_protected_by_name(name):
  norm, why = UNKNOWN[name]
  graph = structure.trace(net(norm), params(), X, reductions='rescale')
  assert not graph.groups
  with pytest.raises(AssertionError, match=why):
    raise AssertionError(graph.explain('a', 1))


def attend(p, x, scale=lambda d: 1 / np.sqrt(d)):
  q, k, v = (x @ p[name] for name in ('q', 'k', 'v'))
  return jax.nn.softmax(q @ k.T * scale(q.shape[1])) @ v @ p['o']


def decode(p, x):
  """Attention of a state that starts from nothing."""
  k, v = x @ p['k'], x @ p['v']

  def step(h, _):
    scores = h @ p['q'] @ k.T / np.sqrt(k.shape[1])
    return jnp.tanh(h + 1 + jax.nn.softmax(scores) @ v), None

  h, _ = lax.scan(step, jnp.zeros((1, v.shape[1])), length=3)
  return h @ p['o']


def by_halves(p, x):
  """Attention of which each factor is scaled, by a fourth root."""
  q, k, v = (x @ p[name] for name in ('q', 'k', 'v'))
  scale = q.shape[1] ** -0.25
  return jax.nn.softmax((q * scale) @ (k * scale).T) @ v @ p['o']


def scaled_outside(p, x):
  """Attention in a loop, by a scale that is computed before it."""
  k, v = x @ p['k'], x @ p['v']
  scale = 1 / jnp.sqrt(k.shape[1])

  def step(h, _):
    return jnp.tanh(h + 1 + jax.nn.softmax(h @ p['q'] @ k.T * scale) @ v), None

  h, _ = lax.scan(step, jnp.zeros((1, v.shape[1])), length=3)
  return h @ p['o']


def masked_first(p, x):
  """Attention to what came before, scaled once the rest is hidden."""
  q, k, v = (x @ p[name] for name in ('q', 'k', 'v'))
  past = np.tri(len(x), dtype=bool)
  scores = jnp.where(past, q @ k.T, -1e9) / np.sqrt(q.shape[1])
  return jax.nn.softmax(scores) @ v @ p['o']


def fused(p, x):
  """What JAX calls an attention, of one head."""
  q, k, v = ((x @ p[name])[None, :, None] for name in ('q', 'k', 'v'))
  return jax.nn.dot_product_attention(q, k, v)[0, :, 0] @ p['o']


def attention(width):
  return {
    'q': 3 * normal(D, width),
    'k': 3 * normal(D, width, seed=1),
    'v': normal(D, D),
    'o': normal(D, 3),
  }


def from_host(y):
  """A mean by a product with a constant of the host."""
  return y - y @ np.full((y.shape[1], 1), 1 / y.shape[1], np.float32)


def averaged(y):
  mean = jnp.einsum('bc,c->b', y, jnp.ones(y.shape[1])) / y.shape[1]
  return y - mean[:, None]


def equalised(p, x):
  """Kernels of variance 1, scaled by the root of what they read."""
  return jnp.tanh(x @ p['a']) @ p['b'] / np.sqrt(p['b'].shape[0])


def convolved(p, x):
  x = jnp.tanh(x @ p['a']).T[None]
  y = lax.conv_general_dilated(x, p['c'], (1,), 'SAME')
  return (y / np.sqrt(np.prod(p['c'].shape[1:])))[0]


SCALED = {
  'attention': (attend, attention, 'k'),
  'attention in a loop': (decode, attention, 'k'),
  'attention scaled by halves': (by_halves, attention, 'k'),
  'attention scaled outside of its loop': (scaled_outside, attention, 'k'),
  'attention scaled behind its mask': (masked_first, attention, 'k'),
  'a product with a constant': (net(from_host), lambda n: params(n), 'a'),
  'a contraction with ones': (net(averaged), lambda n: params(n), 'a'),
  'equalised kernels': (equalised, lambda n: params(n), 'a'),
  'equalised convolutions': (
    convolved,
    lambda n: {'a': normal(D, n), 'c': normal(3, n, 3)},
    'a',
  ),
}


@pytest.mark.usefixtures('promote')
@pytest.mark.parametrize('name', SCALED)
def test_what_scales_a_contraction_follows_its_width(name):
  fn, make, group = SCALED[name]
  full = make(E)
  graph = structure.trace(fn, full, X, reductions='rescale')
  members = {m.path: g for g in graph.groups for m in graph.groups[g].members}
  plan = plans.from_widths(graph, {members[group]: 5})
  small = plans.shrink(graph, plan, full)
  assert error(plans.specialise(graph, plan)(small, X), fn(small, X)) < 1e-6
  masked = plans.masked(graph, plan)(full, X)
  assert error(plans.specialise(graph, plan)(small, X), masked) < 1e-5


def standardised(p, x):
  """A convolution whose kernels have mean 0 and variance 1."""
  mean = jnp.mean(p['c'], (1, 2), keepdims=True)
  variance = jnp.var(p['c'], (1, 2), keepdims=True)
  kernel = (p['c'] - mean) * lax.rsqrt(variance + 1e-5)
  x = jnp.tanh(x @ p['a']).T[None]
  return lax.conv_general_dilated(x, kernel, (1,), 'SAME')[0]


def test_standardised_kernels_are_protected_kept_or_rescaled():
  full = {'a': normal(D, E), 'c': normal(3, E, 3)}
  said = structure.trace(standardised, full, X).explain('a', 1)
  first = standardised.__code__.co_firstlineno
  assert f'reduce_sum at rescale_test.py:{first + 2} reduces over it' in said
  for how, is_equal in (('keep', False), ('rescale', True)):
    graph = structure.trace(standardised, full, X, reductions=how)
    plan = plans.from_kept(graph, {'a': [1, 2, 5, 8, 9]})
    assert check(graph, plan, full, X, gradients=False).parameters is None
    small = plans.shrink(graph, plan, full)
    ours = plans.specialise(graph, plan)(small, X)
    assert (error(ours, standardised(small, X)) < 1e-6) == is_equal
    assert (error(ours, standardised(small, X)) > 1e-2) != is_equal


@pytest.mark.usefixtures('promote')
@pytest.mark.parametrize('name', SCALED)
def test_what_scales_a_contraction_protects_its_width(name):
  fn, make, path = SCALED[name]
  graph = structure.trace(fn, make(E), X)
  assert 'follows from its size' in graph.explain(path, 1)
  assert structure.trace(fn, make(E), X, reductions='keep').groups


CHANCE = {
  'a half of a sum over 4': (
    lambda p, x: 0.5 * jnp.sum((x @ p['a']) ** 2, 1),
    {'a': normal(D, 4)},
  ),
  'a quarter of a sum over 16': (
    lambda p, x: 0.25 * jnp.sum((x @ p['a']) ** 2, 1),
    {'a': normal(D, 16)},
  ),
  'twice a sum over 16': (
    lambda p, x: 2.0 * jnp.sum(jnp.tanh(x @ p['a']), 1),
    {'a': normal(D, 16)},
  ),
  'scores of 16 units times 4': (
    lambda p, x: attend(p, x, lambda _: 4.0),
    attention(16),
  ),
  'scores of 4 units times a half': (
    lambda p, x: attend(p, x, lambda _: 0.5),
    attention(4),
  ),
  'a layer times the size of what it reads': (
    lambda p, x: jnp.tanh(x @ p['a']) @ p['b'] * 16.0,
    params(16),
  ),
  'a scale of one of two layers': (
    lambda p, x: jnp.tanh(x @ p['a']) @ p['m'] / np.sqrt(E) @ p['b'],
    {**params(), 'm': normal(E, E)},
  ),
  'a constant with rows of its own': (
    lambda p, x: x @ p['a'] @ np.full((E, 2), [1 / E, 2 / E], np.float32),
    {'a': normal(D, E)},
  ),
}


@pytest.mark.parametrize('name', CHANCE)
def test_a_number_that_may_be_one_by_chance_is_no_law(name):
  """Where it stands next to a width, the width stays; another width tells."""
  fn, full = CHANCE[name]
  graph = structure.trace(fn, full, X, reductions='rescale')
  path = 'k' if 'k' in full else 'a'
  assert 'trace it at two widths' in graph.explain(path, 1)


def after_a_layer(p, x):
  """An attention whose heads are as wide as what it reads."""
  return attend(p, jnp.tanh(x @ p['a']))


def inside(control):
  """Attention inside of control flow, its scale computed outside."""

  def fn(p, x):
    q, k, v = (x @ p[name] for name in ('q', 'k', 'v'))
    scale = 1 / jnp.sqrt(q.shape[1])
    return control(lambda: jax.nn.softmax(q @ k.T * scale) @ v) @ p['o']

  return fn


def twice(attend):
  """A loop that does not know how often it runs."""
  step = lambda state: (state[0] + 1, state[1] + attend())
  return lax.while_loop(
    lambda state: state[0] < 2, step, (0, jnp.ones(X.shape))
  )[1]


def pooled(p, x):
  """A mean over 4 rows; what reads it has 16 inputs, whose root is 4."""
  return jnp.mean(jnp.tanh(x @ p['a']), 0, keepdims=True) @ p['b']


def pooled_by_windows(p, x):
  """The same, of windows."""
  y = jnp.tanh(x @ p['a'])
  sums = lax.reduce_window(y, 0.0, lax.add, (4, 1), (1, 1), 'VALID')
  return sums / 4 @ p['b']


# name -> a network, its params, a leaf, and whether its columns stay whole.
NEAR = {
  'a head of 4, scaled by a half': (
    *CHANCE['scores of 4 units times a half'],
    'k',
    True,
  ),
  'a head of 16, scaled by 4': (
    *CHANCE['scores of 16 units times 4'],
    'k',
    False,
  ),
  'a head of 8, as JAX scales it': (fused, attention(D), 'k', True),
  'a head of 12 in a while loop': (inside(twice), attention(E), 'k', True),
  'a head of 12 in a branch': (
    inside(
      lambda f: lax.cond(jnp.sum(X) > 0, f, lambda: 1 + jnp.zeros(X.shape))
    ),
    attention(E),
    'k',
    True,
  ),
  'a head of 12, computed again': (
    inside(lambda f: jax.checkpoint(f)()),
    attention(E),
    'k',
    True,
  ),
  'a head of 12, not scaled': (
    lambda p, x: attend(p, x, lambda _: 1.0),
    attention(E),
    'k',
    False,
  ),
  'a layer of 16, times 16': (
    *CHANCE['a layer times the size of what it reads'],
    'a',
    False,
  ),
  'what is pooled over 4 rows': (pooled, params(16), 'a', False),
  'what is pooled by windows of 4': (
    pooled_by_windows,
    params(16),
    'a',
    False,
  ),
  'what an attention of its width reads': (
    after_a_layer,
    {**attention(D), 'a': normal(D, D, seed=5)},
    'a',
    False,
  ),
}


@pytest.mark.parametrize('name', NEAR)
def test_a_scale_protects_the_width_that_it_counts_alone(name):
  fn, full, path, is_whole = NEAR[name]
  said = structure.trace(fn, full, X).explain(path, 1)
  assert ('follows from its size' in said) == is_whole
  assert said.startswith('group') == (not is_whole)


@pytest.mark.parametrize('fn', [pooled, pooled_by_windows])
def test_the_divisor_of_another_mean_is_left_alone(fn):
  full = params(16)
  graph = structure.trace(fn, full, X, reductions='rescale')
  plan = plans.from_widths(graph, {'a': 5})
  small = plans.shrink(graph, plan, full)
  assert error(plans.specialise(graph, plan)(small, X), fn(small, X)) < 1e-6


def test_gradients_of_scaled_contractions_follow_the_widths():
  slopes = jax.grad(lambda p, x: jnp.sum(equalised(p, x) ** 2))
  full = params()
  graph = structure.trace(
    equalised, full, X, reductions='rescale', also=[(slopes, X)]
  )
  plan = plans.from_widths(graph, {'a': 5})
  small = plans.shrink(graph, plan, full)
  ours = plans.specialise(graph.also[0], plan)(small, X)
  for name, slope in slopes(small, X).items():
    np.testing.assert_allclose(ours[name], slope, rtol=1e-5, atol=1e-6)


def scaled(p, x):
  """sqrt(width) times a unit vector, and 0.3 of a sum."""
  y = x @ p['a']
  width = y.shape[-1]
  y = jnp.tanh(y / jnp.linalg.norm(y, axis=-1, keepdims=True) * width**0.5)
  return (y + 0.3 * jnp.sum(y, -1, keepdims=True)) @ p['b']


@pytest.mark.usefixtures('promote')
def test_a_second_width_tells_what_the_places_cannot():
  full, other = params(), params(10)
  doubtful = structure.trace(scaled, full, X, reductions='rescale')
  assert not doubtful.groups
  graph = structure.trace(
    scaled, full, X, reductions='rescale', narrow=(scaled, other, X)
  )
  plan = plans.from_widths(graph, {'a': 6})
  small = plans.shrink(graph, plan, full)
  fn = plans.specialise(graph, plan)
  assert error(fn(small, X), scaled(small, X)) < 1e-6
  more = jnp.concatenate([X, X])
  assert error(fn(small, more), scaled(small, more)) < 1e-6
  check(graph, plan, full, X)


@pytest.mark.usefixtures('promote')
def test_a_number_that_only_looks_like_a_width_is_left_alone():
  """12 is the width by chance: at width 10 it is 12 still."""
  fn = lambda p, x: jnp.tanh(jnp.sum(x @ p['a'], -1) / 12.0)
  full = {'a': params()['a']}
  graph = structure.trace(fn, full, X, reductions='rescale')
  plan = plans.from_widths(graph, {'a': 6})
  small = plans.shrink(graph, plan, full)
  ours = plans.specialise(graph, plan)(small, X)
  assert error(ours, jnp.tanh(jnp.sum(X @ small['a'], -1) / 6.0)) < 1e-6
  graph = structure.trace(
    fn, full, X, reductions='rescale', narrow=(fn, {'a': params(10)['a']}, X)
  )
  ours = plans.specialise(graph, plan)(small, X)
  assert error(ours, fn(small, X)) < 1e-6


def test_widths_that_shrink_alike_leave_a_number_in_doubt():
  def fn(p, x):
    y = jnp.tanh(x @ p['a']) @ p['c'] * (5.0 / p['a'].shape[1])
    return jnp.tanh(y) @ p['b']

  at = lambda n, m: {
    'a': normal(D, n),
    'c': normal(n, m),
    'b': normal(m, 3),
  }
  how = {'reductions': 'rescale'}
  alike = structure.trace(fn, at(12, 24), X, **how, narrow=(fn, at(6, 12), X))
  assert not alike.groups
  assert 'may follow from several widths' in alike.explain('a', 1)
  apart = structure.trace(fn, at(12, 24), X, **how, narrow=(fn, at(6, 20), X))
  assert set(apart.groups) == {'a', 'c'}
  plan = plans.from_widths(apart, {'a': 4, 'c': 9})
  small = plans.shrink(apart, plan, at(12, 24))
  assert error(plans.specialise(apart, plan)(small, X), fn(small, X)) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures('promote')
def test_gradients_follow_the_widths_too():
  """A step of training under rescale: the transposes of means and scales."""
  norm = NORMS['layer norm']

  def forward(p, x):
    q, k = (jnp.einsum('td,dhk->thk', x, p[name]) for name in ('q', 'k'))
    weights = jax.nn.softmax(
      jnp.einsum('thk,shk->hts', q, k) * q.shape[-1] ** -0.5
    )
    y = x + jnp.einsum('hts,shk->thk', weights, k).reshape(4, -1) @ p['o']
    return jnp.tanh(norm(y @ p['a'])) @ p['b']

  def step(p, x):
    grads = jax.grad(lambda p: jnp.sum(forward(p, x) ** 2))(p)
    return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads)

  at = lambda heads, head, width: {
    'q': normal(D, heads, head),
    'k': normal(D, heads, head, seed=3),
    'o': normal(heads * head, D),
    'a': normal(D, width),
    'b': normal(width, 3),
  }
  full = at(2, 9, 12)
  graph = structure.trace(
    forward, full, X, reductions='rescale', also=[(step, X)]
  )
  plan = plans.from_widths(graph, {'q.1': 5, 'a': 7})
  small = plans.shrink(graph, plan, full)
  ours = plans.specialise(graph.also[0], plan)(small, X)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    ours,
    step(small, X),
  )


def test_a_derivative_of_its_own_keeps_its_numbers_in_doubt():
  @jax.custom_vjp
  def mean(y):
    return jnp.mean(y, -1)

  expand = lambda g: jnp.broadcast_to(g[:, None] / E, (len(g), E))
  mean.defvjp(lambda y: (mean(y), None), lambda _, g: (expand(g),))
  fn = lambda p, x: jnp.tanh(x @ p['a'] - mean(x @ p['a'])[:, None]) @ p['b']
  with jax.numpy_rank_promotion('allow'):
    graph = structure.trace(fn, params(), X, reductions='rescale')
  assert 'has a derivative of its own' in graph.explain('a', 1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'narrow': (scaled, params(10), X)},
      "`narrow` tells what to rescale: it needs reductions='rescale'",
    ),
    (
      {'reductions': 'rescale', 'narrow': (scaled, {'a': normal(8, 10)}, X)},
      'The params of `narrow` must have the same leaves, got a',
    ),
    (
      {
        'reductions': 'rescale',
        'narrow': (lambda p, x: x @ p['a'] @ p['b'], params(10), X),
      },
      'has other operations at the other widths',
    ),
  ],
)
def test_a_second_trace_that_does_not_fit_is_named(options, message):
  with (
    jax.numpy_rank_promotion('allow'),
    pytest.raises(ValueError, match=message),
  ):
    structure.trace(scaled, params(), X, **options)
