"""Tests of masks that move: SET and RigL."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from traces import counted

from jaxprune import distributions, masks
from jaxprune.transforms import dynamic

KEY = jax.random.key(0)
PARAMS = {'w': jnp.arange(1.0, 9.0).reshape(2, 4), 'bias': jnp.ones(4)}


def test_rigl_by_hand():
  tx = dynamic.rigl(
    optax.sgd(0.0, momentum=0.9),
    0.5,
    KEY,
    begin=0,
    end=100,
    every=5,
    fraction=0.5,
    distribution=distributions.uniform,
  )
  mask = jnp.array([[True, True, False, False], [True, True, False, False]])
  tree = {'w': mask, 'bias': optax.MaskedNode()}
  state = tx.init(PARAMS)._replace(masks=tree)
  params = masks.apply(tree, PARAMS)  # 1 2 . . / 5 6 . .
  grads = {
    'w': jnp.array([[0.0, 9.0, 3.0, 1.0], [9.0, 9.0, 1.0, 4.0]]),
    'bias': jnp.zeros(4),
  }
  # Half of four weights move: 1 and 2 go, gradients 9 (the 2 again) and 4 come.
  updates, state = tx.update(grads, state, params)
  expected = [[False, True, False, False], [True, True, False, True]]
  assert state.masks['w'].tolist() == expected
  got = optax.apply_updates(params, updates)['w']
  assert got.tolist() == [[0.0, 0.0, 0.0, 0.0], [5.0, 6.0, 0.0, 0.0]]
  # Momentum is that of the masked gradient, and fresh where a weight grew.
  trace = optax.tree.get(state, 'trace')['w']
  assert trace.tolist() == [[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]]


OPTIMIZERS = {
  'momentum': optax.sgd(0.1, momentum=0.9),
  'adam': optax.adam(0.1),
  'lion': optax.lion(0.1),
  'adagrad': optax.adagrad(0.1),  # Its fresh state is not zero.
  'partition': optax.partition(
    {'a': optax.adam(0.1), 'b': optax.sgd(0.1)}, {'w': 'a', 'bias': 'b'}
  ),
  'masked': optax.masked(optax.adam(0.1), {'w': True, 'bias': False}),
  'inject': optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
  'multi': optax.MultiSteps(optax.adam(0.1), 1),
  'schedule_free': optax.contrib.schedule_free_adamw(0.1),
  'adafactor': optax.adafactor(0.1),
}
QUICK = ('adam', 'momentum', 'multi', 'schedule_free')


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    *(
      pytest.param(
        dynamic.rigl, name, marks=[] if name in QUICK else [pytest.mark.slow]
      )
      for name in OPTIMIZERS
    ),
    (dynamic.set_, 'adam'),
  ],
)
def test_counts_stay_and_state_is_fresh(make, name):
  params = {'w': jax.random.normal(KEY, (12, 10)), 'bias': jnp.ones(10)}
  tx = make(OPTIMIZERS[name], 0.7, KEY, end=9, every=2, fraction=0.5)
  state = tx.init(params)
  params = masks.apply(state.masks, params)
  fresh = tx.init(params)
  update, traces = counted(tx.update)
  moved = 0
  for step in range(8):
    key = jax.random.fold_in(KEY, step)
    grads = jax.tree.map(lambda w, k=key: jax.random.normal(k, w.shape), params)
    old = state.masks['w']
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    mask = state.masks['w']
    assert int(mask.sum()) == 36
    assert (jnp.where(mask, 0, params['w']) == 0).all()
    grown = np.asarray(mask & ~old)
    moved += grown.sum()
    if not grown.any():
      continue
    assert (params['w'][grown] == 0).all()
    for new, first in zip(
      jax.tree.leaves(state.inner_state),
      jax.tree.leaves(fresh.inner_state),
      strict=True,
    ):
      if jnp.shape(new) == grown.shape and name != 'schedule_free':
        np.testing.assert_array_equal(new[grown], first[grown])
  assert moved > 10
  assert len(traces) == 1


def test_rigl_grows_gradients_and_set_at_random():
  params = {'w': jnp.ones((20, 20))}
  grads = {'w': jax.random.normal(jax.random.key(3), (20, 20))}
  grown = {}
  for make in (dynamic.rigl, dynamic.set_):
    tx = make(optax.sgd(0.0), 0.5, KEY, end=100, begin=0, fraction=0.2)
    state = tx.init(params)
    start = masks.apply(state.masks, params)
    _, new = tx.update(grads, state, start)
    came = new.masks['w'] & ~state.masks['w']
    grown[make] = float(jnp.abs(grads['w'])[came].mean())
  assert grown[dynamic.rigl] > 1.5 * grown[dynamic.set_]


def test_ensemble_members_have_their_own_masks():
  keys = jax.random.split(KEY, 3)
  params = {'w': jnp.ones((3, 8, 8))}

  def member(key, params):
    tx = dynamic.rigl(optax.adam(0.1), 0.5, key, end=5, every=1)
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(params, state, params)
      params = optax.apply_updates(params, updates)
    return params, state.masks

  new, drawn = jax.jit(jax.vmap(member))(keys, params)
  assert (drawn['w'].sum((1, 2)) == 32).all()
  assert (drawn['w'][0] != drawn['w'][1]).any()
  assert (jnp.where(drawn['w'], 0, new['w']) == 0).all()


@pytest.mark.parametrize(
  ('kw', 'text'),
  [
    ({'sparsity': 1.5}, r'sparsity must be in \[0, 1\], got 1.5'),
    ({'fraction': 2}, r'`fraction` must be in \[0, 1\], got 2'),
    ({'every': 0}, 'every=0'),
    ({'begin': 7, 'end': 3}, 'begin=7, end=3'),
    (
      {'distribution': distributions.global_},
      'a pooled distribution fixes none',
    ),
  ],
)
def test_errors(kw, text):
  arguments = {'sparsity': 0.5, 'end': 9} | kw
  with pytest.raises(ValueError, match=text):
    dynamic.rigl(optax.sgd(0.1), key=KEY, **arguments)


def test_update_needs_params():
  tx = dynamic.rigl(optax.sgd(0.1), 0.5, KEY, end=9)
  with pytest.raises(ValueError, match='Moving masks need `params`'):
    tx.update(PARAMS, tx.init(PARAMS))
