"""Plans are data, and what is shrunk is what was masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import plans, structure


def normal(*shape):
  key = jax.random.key(sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


PARAMS = {'a': normal(5, 6), 'bias': normal(6), 'b': normal(6, 3)}
X = normal(4, 5)


def net(p, x):
  return jnp.tanh(x @ p['a'] + p['bias'][None]) @ p['b']


GRAPH = structure.trace(net, PARAMS, X)
PLAN = plans.from_kept(GRAPH, {'a': [4, 0, 1]})


def test_a_plan_is_data():
  assert plans.from_kept(GRAPH, {'a': [0, 1, 4]}) == PLAN
  assert hash(PLAN) == hash(plans.from_json(plans.to_json(PLAN)))
  assert PLAN.kept == (('a', (0, 1, 4)),)
  assert plans.from_kept(GRAPH, {'a': range(6)}).kept == ()
  assert plans.widths(GRAPH, PLAN) == {'a': (6, 3)}
  with pytest.raises(dataclasses.FrozenInstanceError):
    PLAN.graph = ''


def test_plans_from_masks_and_widths():
  mask = np.array([True, True, False, False, True, False])
  assert plans.from_masks(GRAPH, {'a': mask}) == PLAN
  scores = {'a': np.array([3.0, 2.0, 1.0, 1.0, 2.0, 1.0])}
  assert plans.from_widths(GRAPH, {'a': 3}, scores) == PLAN
  assert plans.from_widths(GRAPH, {'a': 2}).kept == (('a', (0, 1)),)
  tied = {'a': np.ones(6)}
  assert plans.from_widths(GRAPH, {'a': 2}, tied).kept == (('a', (0, 1)),)


def test_shrink_by_hand_and_grow_back():
  small = plans.shrink(GRAPH, PLAN, PARAMS)
  np.testing.assert_array_equal(small['a'], PARAMS['a'][:, [0, 1, 4]])
  np.testing.assert_array_equal(
    small['bias'], PARAMS['bias'][jnp.array([0, 1, 4])]
  )
  np.testing.assert_array_equal(small['b'], PARAMS['b'][jnp.array([0, 1, 4])])
  masks = plans.masks(GRAPH, PLAN, PARAMS)
  grown = plans.grow(GRAPH, PLAN, small)
  for path, mask in masks.items():
    np.testing.assert_array_equal(grown[path], jnp.where(mask, PARAMS[path], 0))


def test_shrink_and_grow_run_under_jit():
  small = plans.shrink(GRAPH, PLAN, PARAMS)
  again = jax.jit(lambda p: plans.shrink(GRAPH, PLAN, p))(PARAMS)
  back = jax.jit(lambda p: plans.grow(GRAPH, PLAN, p))(small)
  for path in PARAMS:
    np.testing.assert_array_equal(again[path], small[path])
    assert back[path].shape == PARAMS[path].shape


@pytest.mark.parametrize(
  'tx',
  [
    optax.adam(1e-2),
    optax.sgd(1e-2, momentum=0.9),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    optax.MultiSteps(optax.adam(1e-2), 2),
    optax.masked(optax.adam(1e-2), {'a': True, 'bias': False, 'b': True}),
  ],
  ids=['adam', 'momentum', 'adamw', 'multi-steps', 'masked'],
)
def test_training_goes_on_warm_after_the_cut(tx):
  """A step of the small network equals the step of the masked one, cut."""
  loss = lambda fn: lambda p: jnp.sum(fn(p, X) ** 2)
  masks = plans.masks(GRAPH, PLAN, PARAMS)
  hide = lambda p: jax.tree.map(lambda x, m: jnp.where(m, x, 0), p, masks)
  params, state = hide(PARAMS), tx.init(PARAMS)
  step = lambda fn, p, s: tx.update(jax.grad(loss(fn))(p), s, p)
  for _ in range(2):
    updates, state = step(lambda p, x: net(hide(p), x), params, state)
    params = optax.apply_updates(params, updates)
  small = plans.shrink(GRAPH, PLAN, params)
  small_state = plans.shrink(GRAPH, PLAN, state)
  updates, _ = step(lambda p, x: net(hide(p), x), params, state)
  small_updates, _ = step(plans.specialise(GRAPH, PLAN), small, small_state)
  want = plans.shrink(GRAPH, PLAN, updates)
  for path in PARAMS:
    np.testing.assert_allclose(
      small_updates[path], want[path], rtol=1e-4, atol=1e-7
    )


def test_specialise_under_the_transformations():
  small, fn = plans.shrink(GRAPH, PLAN, PARAMS), plans.specialise(GRAPH, PLAN)
  want = fn(small, X)
  np.testing.assert_allclose(jax.jit(fn)(small, X), want, rtol=1e-5)
  rows = jax.vmap(lambda x: fn(small, x[None])[0])(X)
  np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-6)
  grads = jax.grad(lambda p: jnp.sum(fn(p, X)))(small)
  assert grads['a'].shape == (5, 3)
  _, scanned = jax.lax.scan(lambda c, x: (c, fn(small, x[None])[0]), 0, X)
  np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-6)
  mapped = jax.pmap(lambda x: fn(small, x))(X[:, None])
  np.testing.assert_allclose(mapped[:, 0], want, rtol=1e-5, atol=1e-6)


def test_a_custom_derivative_survives_the_cut():
  """relu has slope 0 at 0 by its custom rule, 1/2 by that of max."""
  params = {'a': jnp.zeros((5, 6)), 'b': normal(6, 3)}
  fn = lambda p, x: jax.nn.relu(x @ p['a']) @ p['b']
  graph = structure.trace(fn, params, X)
  plan = plans.from_kept(graph, {'a': [0, 3]})
  small = plans.shrink(graph, plan, params)
  grads = jax.grad(lambda p: jnp.sum(plans.specialise(graph, plan)(p, X)))(
    small
  )
  assert not grads['a'].any()


def kept(*index):
  plan = plans.Plan(GRAPH.fingerprint, (('a', index),))
  return plans.shrink(GRAPH, plan, PARAMS)


def small(path):
  shrunk = plans.shrink(GRAPH, PLAN, PARAMS)
  return {**shrunk, path: PARAMS[path]}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: plans.from_kept(GRAPH, {'z': [0]}),
      "no group 'z'; the groups are: a",
    ),
    (lambda: plans.from_kept(GRAPH, {'a': []}), "'a' must keep one or more"),
    (lambda: plans.from_kept(GRAPH, {'a': [1, 1]}), 'each once, got'),
    (lambda: plans.from_kept(GRAPH, {'a': [6]}), "'a' has units 0 to 5, got"),
    (
      lambda: plans.from_masks(GRAPH, {'a': np.ones(5, bool)}),
      r"mask of group 'a' must have shape \(6,\), got \(5,\)",
    ),
    (
      lambda: plans.from_widths(GRAPH, {'a': 0}),
      "'a' can keep 1 to 6 units, got 0",
    ),
    (lambda: plans.from_json('[]'), 'This is no plan'),
    (lambda: plans.from_json('{"version": 9}'), 'has format 9, this version'),
    (
      lambda: plans.from_json('{"version": 1, "graph": "x", "kept": 3}'),
      'The plan is damaged',
    ),
    (
      lambda: plans.shrink(GRAPH, plans.Plan('other', ()), PARAMS),
      'The plan is of graph other, got graph',
    ),
    (
      lambda: plans.shrink(
        GRAPH, plans.Plan(GRAPH.fingerprint, (('a', (7,)),)), PARAMS
      ),
      r"'a' has units 0 to 5, got \[7\]",
    ),
    (lambda: kept(-1, 2), r"'a' has units 0 to 5, got \[-1, 2\]"),
    (lambda: kept(2, 2), r"ascending units of group 'a', .* got \[2, 2\]"),
    (lambda: kept(3, 1), r"ascending units of group 'a', .* got \[3, 1\]"),
    (lambda: kept(), "Group 'a' must keep one or more indices"),
    (
      lambda: plans.from_json(
        '{"version": 2, "graph": "x", "kept": {"a": [0.5]}}'
      ),
      'The plan is damaged',
    ),
    (
      lambda: plans.shrink(GRAPH, PLAN, {'v_row': {'a': jnp.ones(5)}}),
      r"'v_row/a' must have the shape \(5, 6\) .* got \(5,\).*initialise",
    ),
    (
      lambda: plans.shrink(GRAPH, PLAN, {'q': jnp.ones(5)}),
      r"'q' of shape \(5,\) ends in the path of no param.*{'q': False}",
    ),
    (
      lambda: plans.specialise(GRAPH, PLAN)(small('b'), X),
      r"'b' must have shape \(3, 3\), got \(6, 3\).*Shrink the params",
    ),
    (
      lambda: plans.specialise(GRAPH, PLAN)({'a': X}, X),
      r"missing: \['b', 'bias'\]",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
