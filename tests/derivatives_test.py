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
