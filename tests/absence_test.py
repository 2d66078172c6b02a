"""Where the entries of an absent unit are zero, and what counts them if not."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.structure.rules import primitives
from jaxprune.structure.rules.base import ELEMENTWISE
from jaxprune.structure.walks import absence

X = jax.random.normal(jax.random.key(9), (3, 4))


def weights(*shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  names = 'abcdefgh'
  return {
    name: jax.random.normal(key, shape)
    for name, key, shape in zip(names, keys, shapes, strict=False)
  }


def elu_attention(p, x):
  """Linear attention: every token meets every other by elu + 1 features."""
  features = lambda w: jax.nn.elu(x @ w) + 1
  return features(p['a']) @ (features(p['b']).T @ x)


def in_runs(of_data, of_kernel):
  """Rows that meet one of two kernels each, as experts do."""

  def fn(p, x):
    kernels = of_kernel(jnp.stack([p['b'].T, -p['b'].T]))
    return jax.lax.ragged_dot(of_data(x @ p['a']), kernels, jnp.array([2, 1]))

  return fn


COUNTED = {
  'runs of rows': in_runs(jnp.exp, jnp.cos),
  'gram matrix of exp': lambda p, x: jnp.einsum(
    'bd,cd->bc', jnp.exp(x @ p['a']), jnp.exp(x @ p['b'])
  ),
  'linear attention': elu_attention,
  'a kernel that is 0 nowhere': lambda p, x: (
    jax.nn.sigmoid(x @ p['a']) @ jax.nn.softplus(p['b']).T
  ),
  'features and a constant': lambda p, x: (
    jnp.cos(x @ p['a']) @ np.ones((8, 2), np.float32) + p['b'][:1, :2]
  ),
  'a kernel shifted by one': lambda p, x: jnp.exp(x @ p['a']) @ (1 + p['b']).T,
  'a loop that adds one': lambda p, x: (
    jax.lax.scan(lambda h, _: (h + 1, None), x @ p['a'], length=2)[0]
    @ jnp.exp(x @ p['b']).T
  ),
  'the other side of a branch': lambda p, x: (
    jax.lax.cond(x[0, 0] > 0, jnp.tanh, jnp.exp, x @ p['a'])
    @ jnp.exp(x @ p['b']).T
  ),
}


@pytest.mark.parametrize('name', COUNTED)
def test_what_counts_an_absent_unit_protects_it(name):
  params, fn = weights((4, 8), (4, 8)), COUNTED[name]
  graph = jp.trace(fn, params, X)
  reason = graph.protected['a:1']
  assert 'dot_general at absence_test.py:' in reason
  assert reason.endswith(absence.WHY)
  # Offered by request, it is not counted: what is removed is not there.
  kept = jp.trace(fn, params, X, reductions='keep')
  assert 'dot_general' in kept.groups['a'].reduced[0]
  plan = jp.plans.from_kept(kept, {'a': np.arange(5)})
  proof = jp.check(kept, plan, params, X)
  assert proof.values < 1e-5
  assert proof.parameters is None  # Zeros in the params are another network.


OFFERED = {
  'runs of rows': in_runs(jnp.tanh, jnp.cos),
  'runs of rows by kernels': in_runs(jnp.exp, jnp.sin),
  'one side is zero': lambda p, x: jnp.einsum(
    'bd,cd->bc', jax.nn.relu(x @ p['a']), jnp.exp(x @ p['b'])
  ),
  'one factor is zero': lambda p, x: (
    (jnp.exp(x @ p['a']) * (x @ p['b'])) @ jnp.exp(x @ p['a']).T
  ),
  'a raw kernel': lambda p, x: jnp.exp(x @ p['a']) @ p['b'].T,
  'a rounded kernel': lambda p, x: (
    jnp.exp(x @ p['a']) @ (jnp.round(p['b'] / 0.1) * 0.1).T
  ),
  'a bounded activation': lambda p, x: (
    jax.nn.relu6(x @ p['a']) @ jnp.exp(x @ p['b']).T
  ),
  'gates of a unit': lambda p, x: (
    jax.nn.silu(x @ p['a']) @ jax.nn.sigmoid(x @ p['b']).T
  ),
  'a loop that keeps zero': lambda p, x: (
    jax.lax.scan(lambda h, _: (jnp.tanh(h), None), x @ p['a'], length=2)[0]
    @ jnp.exp(x @ p['b']).T
  ),
}


@pytest.mark.parametrize('name', OFFERED)
def test_what_is_zero_by_one_operand_is_offered(name):
  params, fn = weights((4, 8), (4, 8)), OFFERED[name]
  graph = jp.trace(fn, params, X)
  plan = jp.plans.from_kept(graph, {'a': np.arange(5)})
  proof = jp.check(graph, plan, params, X)
  assert proof.parameters is not None
  assert max(proof.values, proof.gradients, proof.parameters) < 1e-5


def test_a_convolution_by_a_kernel_that_is_zero_nowhere():
  params = {
    'a': jax.random.normal(jax.random.key(0), (3, 3, 2, 8)),
    'b': jax.random.normal(jax.random.key(1), (3, 3, 8, 4)),
  }
  x = jax.random.normal(jax.random.key(2), (2, 5, 5, 2))

  def fn(change, params, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return conv(jax.nn.sigmoid(conv(x, params['a'])), change(params['b']))

  raw = jp.trace(lambda p, x: fn(lambda w: w, p, x), params, x)
  assert list(raw.groups) == ['a']
  soft = jp.trace(lambda p, x: fn(jax.nn.softplus, p, x), params, x)
  assert not soft.groups
  assert soft.protected['b:2'].startswith('conv_general_dilated at ')


# --- A program drawn at random ------------------------------------------------

UNARY = {
  'tanh': jnp.tanh,
  'exp': jnp.exp,
  'softplus': jax.nn.softplus,
  'gelu': jax.nn.gelu,
  'sigmoid': jax.nn.sigmoid,
  'relu': jax.nn.relu,
  'cos': jnp.cos,
  'expm1': jnp.expm1,
  'square': jnp.square,
  'shift': lambda h: h + 0.5,
  'bound': lambda h: jnp.minimum(h, 1.0),
  'floor': lambda h: jnp.maximum(h, 0.25),
  'elu': jax.nn.elu,
}
LAYOUTS = ['bd,cd->bc', 'bd,cd->cb', 'bd,bd->b', 'db,dc->bc', 'bd,dc->bc']


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  left=st.lists(st.sampled_from([*UNARY]), min_size=1, max_size=2),
  right=st.lists(st.sampled_from([*UNARY]), max_size=2),
  layout=st.sampled_from(LAYOUTS),
  joined=st.sampled_from(['alone', 'times', 'plus']),
  data=st.booleans(),
)
def test_whatever_is_offered_is_exact(left, right, layout, joined, data):
  """Data times data, or times a changed kernel, in any layout."""
  params = weights((4, 6), (4, 6))

  def changed(h, names):
    for name in names:
      h = UNARY[name](h)
    return h

  def fn(p, x):
    h = changed(x @ p['a'], left)
    other = changed(x @ p['b'] if data else p['b'], right)
    if joined != 'alone':
      beside = jnp.tanh(x @ p['a'])
      h = h * beside if joined == 'times' else h + beside
    terms = layout.split('->')[0].split(',')
    turn = lambda v, term: v.T if term[0] == 'd' else v
    if terms == ['bd', 'bd']:
      other = other[: h.shape[0]]
    return jnp.einsum(layout, turn(h, terms[0]), turn(other, terms[1]))

  graph = jp.trace(fn, params, X)
  if 'a' in graph.groups:
    plan = jp.plans.from_kept(graph, {'a': np.arange(4)})
    small = jp.specialise(graph, plan)(jp.shrink(graph, plan, params), X)
    masks = jp.plans.masks(graph, plan, params)
    masked = fn(jp.masks.apply(masks, params), X)
    np.testing.assert_allclose(small, masked, rtol=2e-5, atol=2e-5)
  else:  # Neither side is zero at an absent unit: none was withheld.
    zero = np.zeros(())
    sides = [changed(zero, names) for names in (left, right)]
    assert joined != 'times'
    assert all(side != 0 for side in sides)


# --- The column ---------------------------------------------------------------

OF_LAX = {
  name: getattr(jax.lax, name)
  for name in sorted(ELEMENTWISE)
  if hasattr(jax.lax, name)
}
OF_TWO = frozenset('add atan2 eq ge gt le lt ne nextafter sub'.split())
OF_COMPLEX = frozenset(['real', 'imag', 'conj', 'complex'])
# Of three operands, with options, or by a rule of their own.
SKIPPED = frozenset(
  """
  clamp complex convert_element_type copy device_put div igamma
  igamma_grad_a igammac integer_pow max min mul mulhi polygamma pow pvary
  reduce_precision regularized_incomplete_beta rem select_n shift_left
  shift_right_arithmetic shift_right_logical stop_gradient zeta
  """.split()
)


@pytest.mark.parametrize('name', sorted(set(OF_LAX) - SKIPPED))
def test_the_column_is_what_jax_computes(name):
  dtype = np.complex64 if name in OF_COMPLEX else np.float32
  if name in ('population_count', 'clz'):
    dtype = np.int32
  result = OF_LAX[name](*[jnp.zeros((), dtype)] * (2 if name in OF_TWO else 1))
  is_kept = primitives.known(name).zero == 'all'
  assert is_kept == (not np.any(np.asarray(result)))


FILLED = {
  'by a number': ({'mode': 'fill', 'fill_value': 2.0}, False),
  'by zero': ({'mode': 'fill', 'fill_value': 0.0}, True),
  'by NaN': ({'mode': 'fill'}, True),
  'never': ({'mode': 'clip'}, True),
}


@pytest.mark.parametrize('name', FILLED)
def test_what_a_gather_fills_in_is_not_zero(name):
  options, is_offered = FILLED[name]
  params = weights((4, 8), (4, 8))

  def fn(p, x):
    rows = jnp.take(x @ p['a'], jnp.array([0, 2]), 0, **options)
    return rows @ jnp.exp(x @ p['b']).T

  graph = jp.trace(fn, params, X)
  assert ('a' in graph.groups) == is_offered
  kept = jp.trace(fn, params, X, reductions='keep')
  plan = jp.plans.from_kept(kept, {'a': np.arange(5)})
  assert jp.check(kept, plan, params, X).values < 1e-5


def test_an_index_of_a_unit_does_not_make_its_entry_zero():
  """Row 0 of a table is read where the index of an absent unit is 0."""
  params = {**weights((4, 8), (4, 8)), 't': jnp.linspace(1.0, 2.0, 16)}

  def fn(p, x):
    places = jnp.floor(jnp.abs(x @ p['a'])).astype(jnp.int32)
    return p['t'][places] @ jnp.exp(x @ p['b']).T

  graph = jp.trace(fn, params, X)
  assert 'a' not in graph.groups
