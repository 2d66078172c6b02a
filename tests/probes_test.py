"""Small graphs that trip up tools that prune: exact here, or refused by name.

The first twenty are those on which tools of this kind were once compared; a
probe is exact if half of every group, drawn at random, computes what the
masked network does, in values and gradients (see :func:`jaxprune.check`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import plans, structure
from jaxprune.plans.proof import check


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def conv(x, w, groups=1):
  return lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def kernel(i, o, seed=0):
  return normal(3, 3, i, o, seed=seed)


IMAGE = normal(2, 4, 4, 3)
TOKENS = normal(2, 5, 8)
STEPS = normal(2, 20, 4)

# name -> (function, params, input, {group: size} or why it is refused)
PROBES = {}


def probe(x, expected=None, **sizes):
  def register(make):
    PROBES[make.__name__] = (*make(), x, expected or sizes)
    return make

  return register


@probe(IMAGE, a=6)
def raw_convolution_parameter():
  p = {'a': kernel(3, 6), 'b': kernel(6, 2)}
  return lambda p, x: conv(jnp.tanh(conv(x, p['a'])), p['b']), p


@probe(IMAGE, a=6)
def same_module_twice():
  p = {'a': kernel(3, 6), 'same': kernel(6, 6), 'b': kernel(6, 2)}

  def fn(p, x):
    same = lambda x: jnp.tanh(conv(x, p['same']))
    return conv(same(same(conv(x, p['a']))), p['b'])

  return fn, p


@probe(IMAGE, a=6, squeeze=4)
def squeeze_and_excitation():
  p = {
    'a': kernel(3, 6),
    'squeeze': normal(6, 4),
    'excite': normal(4, 6),
    'b': kernel(6, 2),
  }

  def fn(p, x):
    x = conv(x, p['a'])
    gate = jnp.tanh(x.mean((1, 2)) @ p['squeeze']) @ p['excite']
    return conv(x * jax.nn.sigmoid(gate)[:, None, None], p['b'])

  return fn, p


@probe(IMAGE, a=6)
def flatten():
  p = {'a': kernel(3, 6), 'b': normal(4 * 4 * 6, 2)}
  fn = lambda p, x: jnp.tanh(conv(x, p['a'])).reshape(len(x), -1) @ p['b']
  return fn, p


@probe(IMAGE, a=4, b=4)
def concatenate_and_add():
  p = {
    'a': kernel(3, 4),
    'b': kernel(3, 4, 1),
    'c': kernel(3, 8),
    'd': kernel(8, 2),
  }

  def fn(p, x):
    both = jnp.concatenate([conv(x, p['a']), conv(x, p['b'])], -1)
    return conv(jnp.tanh(both + conv(x, p['c'])), p['d'])

  return fn, p


@probe(IMAGE, **{'a': 2, 'b': 2, 'b.1': 4})
def misaligned_concatenations():
  """2 + 6 channels meet 4 + 4: parts of 2, 2 and 4 go together."""
  p = {
    'a': kernel(3, 2),
    'b': kernel(3, 6),
    'c': kernel(3, 4),
    'd': kernel(3, 4, 1),
    'e': kernel(8, 2),
  }

  def fn(p, x):
    left = jnp.concatenate([conv(x, p['a']), conv(x, p['b'])], -1)
    right = jnp.concatenate([conv(x, p['c']), conv(x, p['d'])], -1)
    return conv(jnp.tanh(left + right), p['e'])

  return fn, p


@probe(TOKENS, up=6)
def gated_linear_unit():
  p = {'up': normal(8, 12), 'down': normal(6, 3)}

  def fn(p, x):
    value, gate = jnp.split(x @ p['up'], 2, -1)
    return (value * jax.nn.sigmoid(gate)) @ p['down']

  return fn, p


@probe(IMAGE, **{'a': 2, 'a.1': 4, 'b': 3})
def grouped_convolution():
  p = {'a': kernel(3, 8), 'b': kernel(4, 6), 'c': kernel(6, 2)}
  fn = lambda p, x: conv(
    jnp.tanh(conv(conv(x, p['a']), p['b'], groups=2)), p['c']
  )
  return fn, p


@probe(IMAGE, a=6)
def stem_without_gradient():
  p = {'a': kernel(3, 6), 'b': kernel(6, 2)}
  stem = lambda p, x: lax.stop_gradient(jnp.tanh(conv(x, p['a'])))
  return lambda p, x: conv(stem(p, x), p['b']), p


@probe(IMAGE, a=4, b=6)
def upsample_and_skip():
  p = {'a': kernel(3, 4), 'b': kernel(4, 6), 'c': kernel(10, 2)}

  def fn(p, x):
    skip = jnp.tanh(conv(x, p['a']))
    deep = conv(skip[:, ::2, ::2], p['b'])
    deep = jax.image.resize(deep, (*skip.shape[:3], deep.shape[-1]), 'nearest')
    return conv(jnp.concatenate([skip, deep], -1), p['c'])

  return fn, p


@probe(TOKENS, a=6)
def two_modules_share_a_parameter():
  """An embedding that also unembeds: one leaf, read along both axes."""
  p = {'a': normal(8, 6), 'b': normal(6, 6)}
  fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['a'].T
  return fn, p


@probe(TOKENS, **{'query': 2, 'query.1': 4, 'value': 4})
def multi_head_attention():
  """Heads, the width of queries and keys, and that of values."""
  module = nn.MultiHeadDotProductAttention(2)
  params = module.init(jax.random.key(0), TOKENS, TOKENS)
  params = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), params)
  return lambda p, x: module.apply(p, x, x), params


@probe(IMAGE, a=6)
def broadcast_of_one_channel():
  p = {'a': kernel(3, 6), 'one': kernel(3, 1), 'b': kernel(6, 2)}
  fn = lambda p, x: conv(jnp.tanh(conv(x, p['a']) + conv(x, p['one'])), p['b'])
  return fn, p


@probe(IMAGE, **{'a': 2, 'a.1': 4})
def channel_shuffle():
  p = {'a': kernel(3, 8), 'b': kernel(8, 2)}

  def fn(p, x):
    x = conv(x, p['a'])
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, 2, c // 2).swapaxes(3, 4).reshape(n, h, w, c)
    return conv(jnp.tanh(x), p['b'])

  return fn, p


@probe(TOKENS, **{'qkv': 2, 'qkv.1': 4})
def fused_qkv_without_a_number_of_heads():
  """One kernel of (3, heads, width) columns: q, k and v have one width."""
  p = {'qkv': normal(8, 24), 'out': normal(8, 8)}

  def fn(p, x):
    n, t, d = x.shape
    qkv = (x @ p['qkv']).reshape(n, t, 3, 2, 4)
    q, k, v = (qkv[:, :, i] for i in range(3))
    weights = jax.nn.softmax(jnp.einsum('nqhd,nkhd->nhqk', q, k) / 2.0)
    mixed = jnp.einsum('nhqk,nkhd->nqhd', weights, v)
    return mixed.reshape(n, t, d) @ p['out']

  return fn, p


@probe(IMAGE, a=6)
def literal_shape():
  """The reshape spells out (2, 96): at other sizes it is recomputed."""
  p = {'a': kernel(3, 6), 'b': normal(96, 2)}
  fn = lambda p, x: jnp.tanh(conv(x, p['a'])).reshape(2, 96) @ p['b']
  return fn, p


@probe(IMAGE, a=2)
def pixel_shuffle():
  p = {'a': kernel(3, 8), 'b': kernel(2, 2)}

  def fn(p, x):
    x = conv(x, p['a'])
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return conv(jnp.tanh(x.reshape(n, 2 * h, 2 * w, c // 4)), p['b'])

  return fn, p


@probe(TOKENS, **{'a': 3, 'a.1': 4, 'mix': 6})
def einsum_with_raw_weights():
  p = {'a': normal(8, 3, 4), 'mix': normal(4, 3, 6), 'out': normal(6, 2)}

  def fn(p, x):
    y = jnp.tanh(jnp.einsum('ntd,dhk->hknt', x, p['a']))
    return jnp.einsum('hknt,kho,oc->nct', y, p['mix'], p['out'])

  return fn, p


@probe(IMAGE, a=6, b=2)
def depthwise_with_multiplier():
  p = {'a': kernel(3, 6), 'b': kernel(1, 12), 'c': kernel(12, 2)}
  fn = lambda p, x: conv(
    jnp.tanh(conv(conv(x, p['a']), p['b'], groups=6)), p['c']
  )
  return fn, p


def recurrent(cell):
  """A recurrent layer of 6 units over 20 steps, and its last output."""
  module = nn.RNN(cell(6))
  params = module.init(jax.random.key(0), STEPS)
  params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), params)
  tree = {'rnn': params, 'head': normal(6, 2)}
  return lambda p, x: module.apply(p['rnn'], x)[:, -1] @ p['head'], tree


@probe(STEPS, **{'rnn/params/cell/hn': 6})
def gated_recurrent_unit():
  return recurrent(nn.GRUCell)


TWENTY = tuple(PROBES)

# What the issue asks for beside them.


@probe(STEPS, **{'rnn/params/cell/hf': 6})
def long_short_term_memory():
  return recurrent(nn.LSTMCell)


@probe(STEPS, rnn=6)
def fused_gates():
  """All four gates of an LSTM in one kernel."""
  p = {
    'kernel': normal(4, 24),
    'recurrent': normal(6, 24),
    'bias': normal(24),
    'head': normal(6, 2),
  }

  def fn(p, x):
    def step(state, x):
      c, h = state
      gates = x @ p['kernel'] + h @ p['recurrent'] + p['bias']
      i, f, g, o = jnp.split(gates, 4, -1)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return (c, h), None

    zeros = jnp.zeros((len(x), 6))
    (_, h), _ = lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))
    return h @ p['head']

  return fn, p


@probe(TOKENS, **{'q': 2, 'q.1': 3, 'q.2': 4, 'v': 4})
def grouped_query_attention():
  """2 heads of keys and values, each read by 3 of the queries."""
  p = {
    'q': normal(8, 2, 3, 4),
    'k': normal(8, 2, 4),
    'v': normal(8, 2, 4, seed=1),
    'out': normal(2, 3, 4, 8),
  }

  def fn(p, x):
    q = jnp.einsum('ntd,dgrk->ntgrk', x, p['q'])
    k, v = (jnp.einsum('ntd,dgk->ntgk', x, p[name]) for name in 'kv')
    weights = jax.nn.softmax(jnp.einsum('nqgrk,nsgk->ngrqs', q, k) / 2.0)
    return jnp.einsum('ngrqs,nsgk,grkd->nqd', weights, v, p['out'])

  return fn, p


@probe(TOKENS, **{'q': 2, 'q.1': 3, 'q.2': 4, 'v': 4})
def repeated_keys_and_values():
  """The same with the heads of keys and values repeated."""
  p = {
    'q': normal(8, 24),
    'k': normal(8, 8),
    'v': normal(8, 8, seed=1),
    'out': normal(24, 8),
  }

  def fn(p, x):
    n, t, _ = x.shape
    q = (x @ p['q']).reshape(n, t, 6, 4)
    k, v = (
      jnp.repeat((x @ p[name]).reshape(n, t, 2, 4), 3, axis=2) for name in 'kv'
    )
    weights = jax.nn.softmax(jnp.einsum('nqhk,nshk->nhqs', q, k) / 2.0)
    mixed = jnp.einsum('nhqs,nshk->nqhk', weights, v)
    return mixed.reshape(n, t, 24) @ p['out']

  return fn, p


@probe(TOKENS, gate=4, up=6)
def mixture_of_experts():
  """Every token goes through every expert, weighted by a softmax."""
  p = {
    'gate': normal(8, 4),
    'up': normal(8, 4, 6),
    'down': normal(4, 6, 8),
  }

  def fn(p, x):
    gates = jax.nn.softmax(x @ p['gate'])
    inner = jax.nn.relu(jnp.einsum('ntd,deh->nteh', x, p['up']))
    return jnp.einsum('nteh,ehd,nte->ntd', inner, p['down'], gates)

  return fn, p


@probe(TOKENS, 'gate:1 top_k at probes_test.py:.* runs along it')
def experts_chosen_by_rank():
  p = {'gate': normal(8, 4), 'up': normal(8, 8)}

  def fn(p, x):
    best, _ = lax.top_k(x @ p['gate'], 2)
    return jnp.sum(best, -1, keepdims=True) * (x @ p['up'])

  return fn, p


def half_of_everything(graph, seed=0):
  rng = np.random.default_rng(seed)
  return plans.from_kept(
    graph,
    {
      name: rng.permutation(group.size)[: (group.size + 1) // 2]
      for name, group in graph.groups.items()
    },
  )


# Compiling them all takes half a minute: the others are among the slow tests.
QUICK = (
  'misaligned_concatenations',
  'two_modules_share_a_parameter',
  'channel_shuffle',
  'fused_qkv_without_a_number_of_heads',
  'depthwise_with_multiplier',
  'gated_recurrent_unit',
  'repeated_keys_and_values',
  'experts_chosen_by_rank',
)


def test_there_are_twenty():
  assert len(TWENTY) == 20


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in PROBES
  ],
)
def test_a_probe_is_exact_or_refused_by_name(name):
  fn, params, x, expected = PROBES[name]
  with jax.numpy_rank_promotion('allow'):
    graph = structure.trace(fn, params, x, reductions='keep')
    if isinstance(expected, str):
      place, why = expected.split(' ', 1)
      path, axis = place.rsplit(':', 1)
      with pytest.raises(AssertionError, match=why):
        raise AssertionError(graph.explain(path, int(axis)))
      assert name not in TWENTY
      return
    sizes = {name: g.size for name, g in graph.groups.items()}
    assert sorted(sizes.values()) == sorted(expected.values())
    plan = half_of_everything(graph)
    proof = check(graph, plan, params, x)
  assert proof.removed == sum(n // 2 for n in sizes.values())
  assert max(proof.values, proof.gradients) <= 1e-5
