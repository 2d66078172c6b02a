"""Derivatives that an author gave his functions: kept, whatever they return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import plans, structure


def normal(*shape):
  key = jax.random.key(sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


X = normal(3, 4)
PARAMS = {'a': normal(4, 6), 'o': normal(6, 2)}


def by_vjp():
  @jax.custom_vjp
  def step(h):
    return jnp.sign(h), (h[:, 0] > 0).astype(jnp.int32), h > 0

  step.defvjp(lambda h: (step(h), None), lambda _, g: (7.0 * g[0],))
  return step


def by_jvp():
  @jax.custom_jvp
  def step(h):
    return jnp.sign(h), (h[:, 0] > 0).astype(jnp.int32), h > 0

  @step.defjvp
  def _(primals, tangents):
    sign, whole, positive = step(*primals)
    none = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    return (sign, whole, positive), (
      7.0 * tangents[0],
      none(whole),
      none(positive),
    )

  return step


@pytest.mark.parametrize('make', [by_vjp, by_jvp])
def test_a_derivative_stays_where_some_outputs_are_integers(make):
  step = make()

  def fn(p, x):
    sign, whole, positive = step(x @ p['a'])
    return jnp.where(positive, sign, 2 * sign) @ p['o'], whole

  graph = structure.trace(fn, PARAMS, X)
  plan = plans.from_widths(graph, {'a': 3})
  loss = lambda fn: lambda p: jnp.sum(fn(p, X)[0] ** 2)
  small = plans.shrink(graph, plan, PARAMS)
  ours = jax.grad(loss(plans.specialise(graph, plan)))(small)
  masks = plans.leaf_masks(graph, plan)
  hidden = {name: jnp.where(masks[name], w, 0) for name, w in PARAMS.items()}
  wanted = plans.shrink(graph, plan, jax.grad(loss(fn))(hidden))
  assert jnp.any(wanted['a'])
  for name in PARAMS:
    np.testing.assert_allclose(ours[name], wanted[name], rtol=1e-5)


def scaled_gradient(scale):
  """The identity, whose gradient is scaled."""

  @jax.custom_vjp
  def identity(h):
    return 1.0 * h

  identity.defvjp(lambda h: (h, None), lambda _, g: (g * scale(g),))
  return lambda p, x: identity(x @ p['a']) @ p['o']


def test_what_a_derivative_reduces_over_counts_as_reduced():
  fn = scaled_gradient(lambda g: 1 / jnp.linalg.norm(g, axis=1, keepdims=True))
  graph = structure.trace(fn, PARAMS, X)
  assert 'reduces over it' in graph.explain('a', 1)
  graph = structure.trace(fn, PARAMS, X, reductions='keep')
  assert 'reduce_sum' in graph.groups['a'].reduced[0]


def test_numbers_of_a_derivative_are_in_doubt_or_told_by_another_width():
  fn = scaled_gradient(lambda g: jnp.mean(g**2, axis=1, keepdims=True))
  how = {'reductions': 'rescale'}
  graph = structure.trace(fn, PARAMS, X, **how)
  assert 'has a derivative of its own' in graph.explain('a', 1)
  other = {'a': normal(4, 5), 'o': normal(5, 2)}
  graph = structure.trace(fn, PARAMS, X, **how, narrow=(fn, other, X))
  plan = plans.from_widths(graph, {'a': 3})
  small = plans.shrink(graph, plan, PARAMS)
  slope = lambda fn: jax.grad(lambda p: jnp.sum(fn(p, X) ** 2))(small)
  ours, theirs = slope(plans.specialise(graph, plan)), slope(fn)
  np.testing.assert_allclose(ours['a'], theirs['a'], rtol=1e-5)


def test_a_leaf_that_such_a_function_ignores_is_not_used():
  @jax.custom_jvp
  def double(h, w):
    jnp.tanh(w)
    return 2 * h

  double.defjvp(lambda values, slopes: (double(*values), 2 * slopes[0]))
  loop = lambda h, w: jax.lax.fori_loop(0, 2, lambda _, h: double(h, w), h)
  fn = lambda p, x: loop(x @ p['a'], p['w']) @ p['o']
  graph = structure.trace(fn, {**PARAMS, 'w': normal(6, 5)}, X)
  assert list(graph.groups) == ['a']
  assert 'does not use this leaf' in graph.explain('w', 0)
