"""A check measures, catches what is wrong, and cannot pass by accident."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import plans, structure
from jaxprune.plans.proof import CheckError, check
from jaxprune.structure import rules
from jaxprune.structure.numbers import literals
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program import run, typed


def normal(*shape):
  key = jax.random.key(sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


PARAMS = {'a': normal(5, 6), 'bias': normal(6), 'b': normal(6, 3)}
X = normal(4, 5)


def net(p, x):
  return jnp.tanh(x @ p['a'] + p['bias'][None]) @ p['b']


GRAPH = structure.trace(net, PARAMS, X)
PLAN = plans.from_kept(GRAPH, {'a': [4, 0, 1]})


def test_a_check_passes_and_says_what_it_measured():
  proof = check(GRAPH, PLAN, PARAMS, X)
  assert proof.removed == 3
  assert max(proof.values, proof.gradients, proof.parameters) <= 1e-5
  assert proof.sensitivity > 1e-3
  assert proof.mutation > 1e-3


def two_branches():
  params = {'a': normal(5, 6), 'b': normal(5, 6) + 1, 'c': normal(12, 3)}

  def fn(p, x):
    both = jnp.concatenate([jnp.tanh(x @ p['a']), jnp.sin(x @ p['b'])], -1)
    return both @ p['c']

  return fn, params


def test_a_check_catches_a_wrong_index_of_a_leaf(monkeypatch):
  """One unit of b is cut in the place of another."""
  fn, params = two_branches()
  graph = structure.trace(fn, params, X)
  plan = plans.from_kept(graph, {'a': [0, 1, 2], 'b': [3, 4, 5]})
  assert check(graph, plan, params, X).values <= 1e-5
  good = plans.shrink

  def swapped(graph, plan, values):
    other = plans.from_kept(graph, {'a': [0, 1, 2], 'b': [2, 4, 5]})
    mixed = good(graph, other, values)
    return {**good(graph, plan, values), 'b': mixed['b']}

  monkeypatch.setattr(plans, 'shrink', swapped)
  with pytest.raises(CheckError, match='differs from the masked one'):
    check(graph, plan, params, X)


COMPLEX = {**PARAMS, 'b': PARAMS['b'] + 1j * normal(6, 3)[::-1]}


def test_complex_numbers_are_compared_whole():
  graph = structure.trace(net, COMPLEX, X)
  plan = plans.from_kept(graph, {'a': [4, 0, 1]})
  with warnings.catch_warnings():
    warnings.simplefilter('error')  # As of an imaginary part that is dropped.
    proof = check(graph, plan, COMPLEX, X)
  assert max(proof.values, proof.gradients, proof.parameters) <= 1e-5
  scores = graph.reduce({'b': 1j * np.arange(18.0).reshape(6, 3)}, norm='l1')
  assert scores['a'].tolist() == [3, 12, 21, 30, 39, 48]


def test_a_check_catches_an_error_of_an_imaginary_part(monkeypatch):
  graph = structure.trace(net, COMPLEX, X)
  plan = plans.from_kept(graph, {'a': [4, 0, 1]})
  good = plans.shrink

  def conjugated(graph, plan, values):
    small = good(graph, plan, values)
    return {**small, 'b': jnp.conj(small['b'])}

  monkeypatch.setattr(plans, 'shrink', conjugated)
  with pytest.raises(CheckError, match='differs from the masked one'):
    check(graph, plan, COMPLEX, X)


@pytest.mark.slow
def test_a_check_catches_an_error_of_an_imaginary_gradient(monkeypatch):
  graph = structure.trace(net, COMPLEX, X)
  plan = plans.from_kept(graph, {'a': [4, 0, 1]})
  good = plans.specialise

  @jax.custom_vjp
  def bent(y):
    return y

  bent.defvjp(lambda y: (y, None), lambda _, slope: (jnp.conj(slope),))
  bend = lambda graph, plan: lambda *xs: bent(good(graph, plan)(*xs))
  monkeypatch.setattr(plans, 'specialise', bend)
  with pytest.raises(CheckError, match='gradients by'):
    check(graph, plan, COMPLEX, X)


def test_a_complex_constant_is_a_number_where_it_is_real():
  value = lambda x: rules.Value((), np.dtype(np.complex64), constant=x)
  assert literals.number_of(value(np.complex64(8))) == 8
  assert literals.number_of(value(np.complex64(8 + 1j))) is None


def test_a_check_catches_a_wrong_rule(monkeypatch):
  """A concatenation that thinks its parts stand in the other order."""
  row = rules.TABLE['concatenate']

  def wrong(eqn):
    row.rule(eqn)
    axis = eqn.params['dimension']
    parts = [value.axes[axis] for value in eqn.inputs]
    eqn.outputs[0].axes[axis] = ax.concatenation(reversed(parts))

  mutant = dataclasses.replace(row, rule=wrong)
  monkeypatch.setitem(rules.TABLE, 'concatenate', mutant)
  fn, params = two_branches()
  graph = structure.trace(fn, params, X)
  plan = plans.from_kept(graph, {'a': [0, 1, 2], 'b': [3, 4, 5]})
  with pytest.raises(CheckError, match='differs from the'):
    check(graph, plan, params, X)


def attend(p, x):
  """Attention, which the bias of its keys changes in nothing but rounding."""
  q, k, v = (x @ p[name] for name in ('q', 'k', 'v'))
  k = k + p['bias'][None, None]
  weights = jax.nn.softmax(jnp.einsum('nih,njh->nij', q, k))
  return jnp.einsum('nij,njh->nih', weights, v) @ p['out']


def test_a_check_allows_for_a_gradient_that_is_but_rounding():
  names = ('q', 'k', 'v', 'out')
  keys = jax.random.split(jax.random.key(0), len(names))
  params = {
    n: jax.random.normal(k, (8, 8)) for n, k in zip(names, keys, strict=True)
  }
  params['bias'] = jnp.linspace(-1.0, 1.0, 8)
  x = jax.random.normal(jax.random.key(1), (2, 16, 8))
  graph = structure.trace(attend, params, x)
  plan = plans.from_kept(graph, {'q': [0, 2, 5], 'v': [1, 2, 3]})
  slopes = jax.grad(lambda p: jnp.sum(attend(p, x)))(params)
  assert jnp.max(jnp.abs(slopes['bias'])) < 1e-5 * jnp.max(jnp.abs(slopes['v']))
  assert check(graph, plan, params, x).gradients < 1e-5


@pytest.mark.parametrize('leaf', ['a', 'bias', 'b'])
def test_a_check_catches_a_wrong_gradient_of_one_leaf(leaf, monkeypatch):
  """A slope that is off by 1e-3 of its leaf, of any leaf, is no rounding."""
  shrink = plans.shrink

  def bent(graph, plan, values):
    small = shrink(graph, plan, values)
    if values is PARAMS:
      return small
    return {**small, leaf: 1.001 * small[leaf]}

  monkeypatch.setattr(plans, 'shrink', bent)
  message = f"gradients by 1.0e-03 .*first at the gradient of '{leaf}'"
  with pytest.raises(CheckError, match=message):
    check(GRAPH, PLAN, PARAMS, X)


@pytest.mark.parametrize('name', ['tanh', 'add', 'dot_general'])
def test_a_check_names_the_operation_whose_derivative_differs(
  name, monkeypatch
):
  """Its value is right in the small function, its slope is off by a third."""
  apply = run.Run.apply

  def bent(self, eqn, values):
    outs = apply(self, eqn, values)
    if eqn.primitive.name != name or self.masked:
      return outs
    x = 0.3 * values[0]
    return [outs[0] + jnp.sum(x - jax.lax.stop_gradient(x))]

  monkeypatch.setattr(run.Run, 'apply', bent)
  line = net.__code__.co_firstlineno + 1
  message = f'first at the derivative of {name} at proof_test.py:{line}'
  with pytest.raises(CheckError, match=message):
    check(GRAPH, PLAN, PARAMS, X)


def test_a_check_that_proves_nothing_is_an_error():
  nothing = plans.from_kept(GRAPH, {})
  with pytest.raises(ValueError, match='The plan removes nothing'):
    check(GRAPH, nothing, PARAMS, X)
  dead = {**PARAMS, 'b': jnp.zeros((6, 3))}
  with pytest.raises(CheckError, match='the input moves at random by about 1'):
    check(GRAPH, PLAN, dead, X)


def test_a_norm_that_takes_a_constant_away_does_not_deafen_the_check():
  def fn(p, x):
    y = x @ p['a']
    return jnp.tanh(y - jnp.mean(y, 0)[None]) @ p['b']

  params = {'a': normal(5, 6), 'b': normal(6, 3)}
  graph = structure.trace(fn, params, X)
  plan = plans.from_kept(graph, {'a': [0, 2, 5]})
  assert check(graph, plan, params, X).sensitivity > 0.1


def test_a_check_moves_tokens_too():
  """The input is integers: sensitivity comes from another order of them."""
  params = {'table': normal(9, 6), 'b': normal(6, 3)}
  fn = lambda p, x: jnp.tanh(p['table'][x]) @ p['b']
  tokens = jnp.array([[1, 2, 3], [4, 5, 8]])
  graph = structure.trace(fn, params, tokens)
  plan = plans.from_kept(graph, {'b': [0, 2, 5]})
  assert check(graph, plan, params, tokens).sensitivity > 0.1


COUNTS = {
  'sum': lambda y: jnp.sum(y, 1, keepdims=True),
  'xor': lambda y: jnp.bitwise_xor.reduce(y.astype(jnp.int32), 1)[:, None],
}


@pytest.mark.parametrize('name', COUNTS)
def test_absent_units_are_not_counted(name):
  fn = lambda p, x: COUNTS[name](x @ p['a'] > -0.5) * (x @ p['o'])
  params = {'a': normal(5, 6), 'o': normal(5, 2)}
  graph = structure.trace(fn, params, X, reductions='keep')
  plan = plans.from_kept(graph, {'a': [0, 2, 3]})
  masked = plans.masked(graph, plan)(params, X)
  small = plans.shrink(graph, plan, params)
  assert jnp.array_equal(plans.specialise(graph, plan)(small, X), masked)
  units = {'a': jnp.array([True, False, True, True, False, False])}
  assert jnp.array_equal(plans.supernet(graph)(params, units, {}, X), masked)
  check(graph, plan, params, X)


def test_a_check_catches_a_derivative_that_is_lost(monkeypatch):
  """In the small function and in the masked one alike."""

  @jax.custom_vjp
  def tanh(y):
    return jnp.tanh(y)

  tanh.defvjp(lambda y: (tanh(y), None), lambda _, g: (7.0 * g,))
  fn = lambda p, x: tanh(x @ p['a']) @ p['b']
  params = {'a': normal(5, 6), 'b': normal(6, 3)}

  def proved():
    graph = structure.trace(fn, params, X)
    return check(graph, plans.from_kept(graph, {'a': [0, 1, 4]}), params, X)

  assert proved().gradients <= 1e-5
  monkeypatch.setattr(typed, '_is_float', lambda value: False)
  message = "the original one on masked params: .*most at the gradient of 'a'"
  with pytest.raises(CheckError, match=message):
    proved()


def deep(params, x):
  """Four layers and a norm over the batch, in the dtype of the params."""
  h = x.astype(params['a'].dtype)
  for name in 'abc':
    h = jax.nn.gelu(h @ params[name])
    h = h * jax.lax.rsqrt(jnp.mean(h * h, 0, keepdims=True) + 1e-2)
  return (h @ params['d']).astype(x.dtype)


def deep_case(dtype):
  """Params of a dtype, data of float32 or finer, a graph and half a plan."""
  shapes = {'a': (6, 32), 'b': (32, 32), 'c': (32, 24), 'd': (24, 5)}
  params = {
    name: normal(*shape).astype(dtype) for name, shape in shapes.items()
  }
  x = jax.random.normal(jax.random.key(1), (16, 6))
  x = x.astype(jnp.promote_types(dtype, jnp.float32))
  graph = structure.trace(deep, params, x)
  half = {n: np.arange(0, g.size, 2) for n, g in graph.groups.items()}
  return params, x, graph, plans.from_kept(graph, half)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
def test_the_default_tolerance_is_that_of_the_dtype(dtype):
  with jax.enable_x64(dtype == 'float64'):
    params, x, graph, plan = deep_case(dtype)
    proof = check(graph, plan, params, x)
    assert proof.mutation > 10 * proof.values
    # The controls do not move with the tolerance.
    for tolerance in (0.05, 0.5):
      loose = check(graph, plan, params, x, tolerance=tolerance)
      assert loose.mutation == proof.mutation


@pytest.mark.parametrize(
  ('tolerance', 'error'),
  [
    ('a', TypeError),
    (True, TypeError),
    (np.nan, ValueError),
    (-1, ValueError),
    (np.inf, ValueError),
  ],
)
def test_a_tolerance_that_is_none_is_not_blamed_on_the_cut(tolerance, error):
  params, x, graph, plan = deep_case('float32')
  with pytest.raises(error, match='`tolerance` must be'):
    check(graph, plan, params, x, tolerance=tolerance)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('tolerance', [None, 0.9])
def test_a_wrong_cut_is_refused_in_every_dtype(dtype, tolerance, monkeypatch):
  params, x, graph, plan = deep_case(dtype)
  right = plans.shrink

  def wrong(graph, plan, tree):
    small = right(graph, plan, tree)
    shifted = {'b': jnp.roll(small['b'], 1, 0)}
    return {**small, **shifted} if tree is params else small

  monkeypatch.setattr(plans, 'shrink', wrong)
  with pytest.raises(CheckError):
    check(graph, plan, params, x, tolerance=tolerance)
