"""PDP: by hand, against float64 NumPy, and by law."""

import functools
import itertools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import slow

from jaxprune import soft, tree

NONE = optax.MaskedNode()


def weights(seed=0, dtype=jnp.float32):
  """A small net: 24 + 30 prunable weights, a bias and a step counter."""
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    'a': {
      'kernel': jax.random.normal(keys[0], (4, 6), dtype),
      'bias': jnp.ones(6, dtype),
    },
    'b': {'kernel': 0.3 * jax.random.normal(keys[1], (6, 5), dtype)},
    'steps': jnp.int32(3),
  }


def full(state, ramp=1.0):
  return state._replace(ramp=jnp.float32(ramp))


def numpy_threshold(w, pruned):
  a = np.sort(np.abs(np.asarray(w, np.float64)).ravel())
  pruned = np.clip(pruned, 1, a.size - 1)
  return (a[pruned - 1] + a[pruned]) / 2


def numpy_pdp(w, pruned, tau, c):
  w, t = np.asarray(w, np.float64), numpy_threshold(w, pruned)
  return w / (1 + np.exp(-(w * w - t * t) / (tau + c * t * t)))


def zeros(masks):
  return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


def test_four_weights_by_hand():
  params = {'kernel': jnp.array([[1.0, -2.0, 3.0, 4.0]])}
  state = full(soft.pdp_init(params, 0.5, tau=2.25))
  # t = 2.5, t^2 = 6.25: the logits are (1 - 6.25) / 2.25, ...
  logits = (np.array([1, 4, 9, 16]) - 6.25) / 2.25
  want = [1, -2, 3, 4] / (1 + np.exp(-logits))
  np.testing.assert_allclose(soft.pdp(params, state)['kernel'][0], want, 1e-6)


@pytest.mark.parametrize(('tau', 'c'), [(1e-2, 0.0), (0.0, 0.25), (1e-3, 0.1)])
def test_pdp_agrees_with_float64(tau, c):
  params = weights()
  state = soft.pdp_init(params, 0.6, tau=tau, c=c)
  pruned = jax.tree.map(int, state.pruned)
  everything = np.concatenate(
    [np.abs(params[k]['kernel']).ravel() for k in 'ab']
  )
  below = np.sort(everything)[: round(0.6 * 54)].max()
  for name in 'ab':
    w = np.asarray(params[name]['kernel'])
    assert pruned[name]['kernel'] == (np.abs(w) <= below).sum()
    for ramp in (0.5, 1.0):
      got = jax.jit(soft.pdp)(params, full(state, ramp))[name]['kernel']
      now = round(ramp * pruned[name]['kernel'])
      np.testing.assert_allclose(got, numpy_pdp(w, now, tau, c), 2e-5, 1e-7)


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(0, 99), st.sampled_from([0.05, 0.5, 0.93]))
def test_mask_is_even_and_monotone(seed, sparsity):
  w = jax.random.normal(jax.random.key(seed), (4, 8))
  w = w.at[1].set(-w[0])
  params = {'kernel': w}
  state = full(soft.pdp_init(params, sparsity, tau=0.3))
  m = np.asarray(_jitted(params, state)['kernel'] / w)
  np.testing.assert_array_equal(m[0], m[1])
  order = np.argsort(np.abs(w).ravel())
  assert (np.diff(m.ravel()[order]) >= -1e-7).all()
  assert (m[np.abs(w) > numpy_threshold(w, round(sparsity * 32))] > 0.5).all()


_jitted = jax.jit(soft.pdp)


def test_mask_is_one_half_at_the_threshold():
  params = {'kernel': jnp.array([[1.0, -2.0, 2.0, 4.0]])}
  state = full(soft.pdp_init(params, 0.5))
  np.testing.assert_allclose(soft.pdp(params, state)['kernel'][0, 1:3], [-1, 1])


def test_gradient_is_that_of_the_formula():
  w = np.asarray(weights()['a']['kernel'])
  tau, state = 0.1, full(soft.pdp_init({'kernel': w}, 0.5, tau=0.1))
  got = jax.grad(lambda p: soft.pdp(p, state)['kernel'].sum())({'kernel': w})
  w = w.astype(np.float64)
  m = numpy_pdp(w, 12, tau, 0.0) / w
  want = m + 2 * w * w / tau * m * (1 - m)
  np.testing.assert_allclose(got['kernel'], want, 1e-4, 1e-6)


def test_gradient_through_the_threshold_reaches_two_weights():
  params = {'kernel': jnp.array([[1.0, -2.0, 3.0, 4.0]])}
  state = full(soft.pdp_init(params, 0.5, tau=5.0))
  total = lambda p, through: soft.pdp(p, state, through=through)['kernel'].sum()
  constant = jax.grad(total)(params, False)['kernel'][0]
  through = jax.grad(total)(params, True)['kernel'][0]
  differs = np.asarray(through != constant)
  np.testing.assert_array_equal(differs, [False, True, True, False])
  # d/dt of sum w m is -2 t / tau sum w m (1 - m); t = (|w_1| + |w_2|) / 2.
  w = np.array([1.0, -2, 3, 4])
  m = 1 / (1 + np.exp(-(w * w - 6.25) / 5))
  slope = -2 * 2.5 / 5 * (w * m * (1 - m)).sum()
  np.testing.assert_allclose(
    (through - constant)[1:3], [-slope / 2, slope / 2], 1e-5
  )


@pytest.mark.parametrize('dtype', [jnp.float32, slow(jnp.bfloat16)])
def test_nothing_to_prune_is_the_identity_bit_for_bit(dtype):
  params = weights(dtype=dtype)
  warm_up = soft.pdp_init(params, 0.9)
  rules = full(soft.pdp_init(params, {'b/.*': 0.5}))
  none = full(soft.pdp_init(params, 0.0))
  for state in (warm_up, none):
    got, pull = jax.vjp(functools.partial(soft.pdp, state=state), params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    (back,) = pull(jax.tree.map(_cotangent, params))
    np.testing.assert_array_equal(back['a']['kernel'], 1)
  got = soft.pdp(params, rules)
  np.testing.assert_array_equal(got['a']['kernel'], params['a']['kernel'])
  assert (got['b']['kernel'] != params['b']['kernel']).any()
  assert got['b']['kernel'].dtype == dtype


def _cotangent(x):
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.ones_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.floats(0.0, 0.99), st.integers(0, 9), st.booleans())
def test_hardened_count_is_exact(sparsity, seed, tied):
  params = weights(seed)
  if tied:
    params = jax.tree.map(jnp.round, params)
  asked = round(sparsity * 54)
  for budget in (sparsity, {'.*kernel': sparsity}):
    state = soft.pdp_init(params, budget)
    hard = _harden(params, state)
    assert zeros(hard.masks) == asked
    per_leaf = jax.tree.map(lambda mask: (~mask).sum(), hard.masks)
    jax.tree.map(np.testing.assert_array_equal, state.pruned, per_leaf)
    final = soft.pdp(params, hard)
    kept = lambda w, m, f: np.testing.assert_array_equal(f, np.where(m, w, 0))
    jax.tree.map(
      kept,
      tree.restrict(params, hard.masks),
      hard.masks,
      tree.restrict(final, hard.masks),
    )


_harden = jax.jit(soft.harden)


def test_largest_remainder_by_hand():
  params = {
    k: {'kernel': jnp.ones((1, n))}
    for k, n in zip('abc', (3, 5, 7), strict=True)
  }
  state = soft.pdp_init(params, {'.*': 0.5})
  # Quotas 1.5, 2.5 and 3.5 of round(7.5) = 8: the two first get the rest.
  got = [int(state.pruned[k]['kernel']) for k in 'abc']
  assert got == [2, 3, 3]


@pytest.mark.parametrize(
  ('shape', 'axis', 'n', 'm'),
  [((8, 3), -2, 2, 4), ((3, 8), 1, 1, 4), ((3, 1, 4, 2), -2, 1, 2)],
)
def test_n_by_m_keeps_n_of_every_m(shape, axis, n, m):
  w = jax.random.normal(jax.random.key(1), shape)
  params = {'kernel': jnp.round(2 * w) / 2}  # Ties, and some all-zero pairs.
  options = {'n_by_m': (n, m), 'axis': axis}
  state = full(soft.pdp_init(params, n_by_m=(n, m), tau=0.1))
  mask = soft.harden(params, state, **options).masks['kernel']
  groups = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
  np.testing.assert_array_equal(groups.sum(-1), n)
  assert zeros(mask) == int(state.pruned['kernel'])
  # The soft mask is that of one leaf per group.
  got = soft.pdp(params, state, **options)['kernel']
  assert got.shape == shape
  rows = np.moveaxis(np.asarray(params['kernel']), axis, -1).reshape(-1, m)
  want = np.stack([numpy_pdp(row, m - n, 0.1, 0.0) for row in rows])
  got = np.moveaxis(np.asarray(got), axis, -1).reshape(-1, m)
  np.testing.assert_allclose(got, want, 1e-5, 1e-7)


def test_n_by_m_is_whole_as_soon_as_the_ramp_rises():
  params = {'kernel': jax.random.normal(jax.random.key(1), (4, 1))}
  state = soft.pdp_init(params, n_by_m=(1, 4), tau=0.1)
  gate = lambda ramp: soft.pdp(params, full(state, ramp), n_by_m=(1, 4))
  np.testing.assert_array_equal(gate(0.0)['kernel'], params['kernel'])
  np.testing.assert_array_equal(gate(0.015)['kernel'], gate(1.0)['kernel'])
  kept = soft.weights.sides(params, full(state, 0.015), n_by_m=(1, 4))['kernel']
  assert int(kept.sum()) == 1


def test_n_by_m_gradient_through_the_threshold():
  params = {'kernel': jnp.array([[1.0], [2.0], [3.0], [4.0]])}
  state = full(soft.pdp_init(params, n_by_m=(2, 4), tau=5.0))
  by_group = lambda p: soft.pdp(p, state, n_by_m=(2, 4), through=True)
  by_leaf = lambda p: soft.pdp(p, state, through=True)
  total = lambda f: jax.grad(lambda p: f(p)['kernel'].sum())(params)['kernel']
  np.testing.assert_allclose(total(by_group), total(by_leaf), 1e-6)


def test_masks_are_those_that_pdp_multiplies_by():
  params = weights()
  state = full(soft.pdp_init(params, {'b/.*': 0.5, '.*kernel': 0.0}, tau=0.1))
  got, gated = soft.mask(params, state), soft.pdp(params, state)
  np.testing.assert_array_equal(got['a']['kernel'], 1)
  assert isinstance(got['a']['bias'], optax.MaskedNode)
  want = gated['b']['kernel'] / params['b']['kernel']
  np.testing.assert_allclose(got['b']['kernel'], want, 1e-5)
  hard = soft.harden(params, state)
  np.testing.assert_array_equal(
    soft.mask(params, hard)['b']['kernel'], hard.masks['b']['kernel']
  )


def test_counts_that_are_given():
  params = weights()
  state = soft.pdp_init(params, pruned={'b/kernel': 7})
  assert [int(n) for n in jax.tree.leaves(state.pruned)] == [0, 7]
  assert zeros(_harden(params, state).masks) == 7


# Diagnosis.


def test_diagnosis_by_hand():
  params = {'kernel': jnp.array([[1.0, 3.0]])}
  state = full(soft.pdp_init(params, 0.5, tau=2.0))
  before = {'kernel': jnp.array([[True, True]])}
  found = soft.diagnose(params, state, before=before)
  m = 1 / (1 + np.exp(-np.array([1 - 4, 9 - 4]) / 2.0))
  want = {
    'threshold': 2.0,
    'hardness': (4 * m * (1 - m)).mean(),
    'steepness': 2.0,
    'gain': 1.5,
    'moved': 0.5,
    'density': 0.5,
  }
  for name, value in want.items():
    got = getattr(found, name)['kernel']
    np.testing.assert_allclose(got, value, 1e-5, err_msg=name)


def test_gain_is_the_gradient_at_the_threshold():
  params = {'kernel': jnp.array([[1.0, 2.0, 2.0, 3.0]])}
  state = full(soft.pdp_init(params, 0.5, tau=0.5))
  grad = jax.grad(lambda p: soft.pdp(p, state)['kernel'].sum())(params)
  gain = soft.diagnose(params, state).gain['kernel']
  np.testing.assert_allclose(grad['kernel'][0, 1:3], gain, 1e-6)


def test_diagnosis_of_groups_is_a_mean():
  params = {'kernel': jnp.array([[1.0], [3.0], [3.0], [5.0]])}
  state = full(soft.pdp_init(params, n_by_m=(1, 2), tau=1.0))
  found = soft.diagnose(params, state, n_by_m=(1, 2))
  np.testing.assert_allclose(found.threshold['kernel'], 3.0)
  np.testing.assert_allclose(found.steepness['kernel'], (4 + 16) / 2)


# One compile, any wrapper.


def test_a_whole_training_compiles_once():
  traces = itertools.count()

  @jax.jit
  def step(params, state):
    next(traces)
    return jax.grad(lambda p: _loss(p, state), allow_int=True)(params)

  params = weights()
  state = soft.pdp_init(params, 0.9)
  for k in range(4):
    state = full(state, k / 3)._replace(tau=jnp.float32(0.1 / (k + 1)))
    step(params, state)
  assert next(traces) == 1


def _loss(params, state):
  gated = soft.pdp(params, state)
  return sum(jnp.sum(jnp.sin(gated[k]['kernel'])) for k in 'ab')


def test_an_ensemble_under_vmap_is_its_members():
  members = [weights(seed) for seed in range(3)]
  budgets = [0.3, 0.6, 0.9]
  stack = lambda *xs: jnp.stack(xs)
  params = jax.tree.map(stack, *members)
  init = functools.partial(soft.pdp_init, tau=0.1)

  def gate(params, sparsity):
    return soft.pdp(params, full(init(params, sparsity)))

  got = jax.jit(jax.vmap(gate))(params, jnp.array(budgets))
  want = [
    soft.pdp(p, full(init(p, r))) for p, r in zip(members, budgets, strict=True)
  ]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, got, jax.tree.map(stack, *want))


@pytest.mark.parametrize('kind', [slow(AxisType.Auto), AxisType.Explicit])
@pytest.mark.parametrize('n_by_m', [slow(None), (2, 4)])
def test_a_mesh_agrees_with_one_device(kind, n_by_m):
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 16))}
  sparsity = None if n_by_m else 0.7
  state = full(soft.pdp_init(params, sparsity, n_by_m=n_by_m, tau=0.1))

  @jax.jit
  def work(params, state):
    gate = lambda p: soft.pdp(p, state, n_by_m=n_by_m, through=True)
    gated, pull = jax.vjp(gate, params)
    hard = soft.harden(params, state, n_by_m=n_by_m)
    found = soft.diagnose(params, state, n_by_m=n_by_m, before=hard.masks)
    return gated, pull(gated)[0], soft.pdp(params, hard), found

  want = work(params, state)
  mesh = jax.make_mesh((4,), ('x',), axis_types=(kind,))
  # Groups of 4 lie on two devices each.
  place = NamedSharding(mesh, PartitionSpec('x', None))
  split = jax.device_put(params, place)
  with jax.set_mesh(mesh):
    got = work(
      split, jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    )
    drawn = soft.pdp_init(split, sparsity, n_by_m=n_by_m)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-6)
  for gated in got[:3]:
    assert gated['kernel'].sharding.is_equivalent_to(place, 2)
  assert int(drawn.pruned['kernel']) == int(state.pruned['kernel'])


@pytest.mark.parametrize('how', ['pmap', 'scan'])
def test_wrappers_agree_with_one_device(how):
  params = {'kernel': jax.random.normal(jax.random.key(0), (8, 16))}
  state = full(soft.pdp_init(params, 0.7, tau=0.1))
  want = soft.pdp(params, state)['kernel']
  if how == 'pmap':
    copies = lambda x: jnp.stack([x] * 4)
    got = jax.pmap(soft.pdp)(*jax.tree.map(copies, (params, state)))['kernel']
  else:
    again = lambda carry, _: (carry, soft.pdp(params, carry)['kernel'])
    got = jax.lax.scan(again, state, length=2)[1]
  for x in got:
    np.testing.assert_allclose(x, want, 1e-6)


def test_an_nnx_state_goes_through():
  layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer, nnx.Param)
  state = full(soft.pdp_init(params, 0.5, tau=0.1))
  gated = _jitted(params, state)
  want = soft.pdp(
    {'kernel': layer.kernel[...]},
    full(soft.pdp_init({'kernel': layer.kernel[...]}, 0.5, tau=0.1)),
  )
  got = nnx.merge(graph, gated)
  np.testing.assert_allclose(got.kernel[...], want['kernel'], 1e-6)
  np.testing.assert_array_equal(got.bias[...], layer.bias[...])
  hard = soft.harden(params, state)
  final = nnx.merge(graph, soft.pdp(params, hard))
  assert int((final.kernel[...] == 0).sum()) == 12


def test_an_equinox_module_goes_through():
  layer = eqx.nn.Linear(4, 6, key=jax.random.key(0))
  params, rest = eqx.partition(layer, eqx.is_inexact_array)
  state = full(soft.pdp_init(params, 0.5, tau=0.1))
  got = eqx.combine(_jitted(params, state), rest)
  plain = {'weight': layer.weight}
  want = soft.pdp(plain, full(soft.pdp_init(plain, 0.5, tau=0.1)))
  np.testing.assert_allclose(got.weight, want['weight'], 1e-6)
  np.testing.assert_array_equal(got.bias, layer.bias)
  grads = eqx.filter_grad(
    lambda p: eqx.combine(_jitted(p, state), rest)(jnp.ones(4)).sum()
  )(params)
  assert (grads.weight != 0).any()


def test_extreme_leaves_stay_finite():
  params = {
    'zeros': {'kernel': jnp.zeros((2, 3))},
    'one': {'kernel': jnp.ones((1, 1))},
    'tiny': {'kernel': 1e-20 * jnp.ones((2, 2))},
  }
  for tau, c in ((1e-4, 0.0), (0.0, 0.1)):
    state = full(soft.pdp_init(params, {'.*': 0.5}, tau=tau, c=c))
    got, pull = jax.vjp(functools.partial(soft.pdp, state=state), params)
    for x in jax.tree.leaves((got, pull(got))):
      assert np.isfinite(x).all()


# Errors.


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'sparsity': 1.0}, r'`sparsity` must be in \[0, 1\), got 1.0'),
    ({'sparsity': {'a/.*': 1.5}}, r'must be in \[0, 1\), got a/kernel: 1.5'),
    ({'sparsity': {'c/.*': 0.5}}, "No leaf matches 'c/.*'"),
    ({}, 'Give one of `sparsity`, `n_by_m` and `pruned`'),
    ({'sparsity': 0.5, 'n_by_m': (1, 2)}, 'Give one of `sparsity`'),
    ({'pruned': {'c': 1}}, "'c' is no leaf to prune"),
    ({'pruned': {'b/kernel': 30}}, "'b/kernel' has 30 weights, got 30"),
    ({'n_by_m': (4, 4)}, r'0 < n < m, got \(4, 4\)'),
    ({'sparsity': 0.5, 'tau': -1.0}, '`tau` must be at least 0, got -1.0'),
    ({'sparsity': 0.5, 'tau': 0, 'c': 0}, 'a mask needs a temperature'),
  ],
)
def test_init_refuses(options, text):
  with pytest.raises(ValueError, match=text):
    soft.pdp_init(weights(), **options)


def test_weights_that_diverged_are_refused_by_name():
  params = weights()
  params['b']['kernel'] = params['b']['kernel'].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match='finite; NaN or infinity in: b/kernel'):
    soft.pdp_init(params, 0.5)


def test_groups_that_do_not_fit_are_refused_by_name():
  params = {'a': {'kernel': jnp.ones((6, 4))}}
  state = soft.pdp_init(params, n_by_m=(2, 4))
  text = r'No groups of \(2, 4\) in: a/kernel \(4 does not divide axis -2'
  with pytest.raises(ValueError, match=text):
    soft.pdp(params, state, n_by_m=(2, 4))
  with pytest.raises(ValueError, match=r'a/kernel \(it has no axis 2\)\. Give'):
    soft.harden(params, state, n_by_m=(2, 4), axis=2)


@pytest.mark.parametrize(
  ('name', 'shape'), [('weight', (4, 8)), ('kernel', (4, 2, 4))]
)
def test_groups_in_a_layout_that_is_not_known_need_an_axis(name, shape):
  params = {name: jax.random.normal(jax.random.key(0), shape)}
  state = full(soft.pdp_init(params, n_by_m=(1, 2)))
  with pytest.raises(ValueError, match=f'{name} .* is not known; say the axis'):
    soft.pdp(params, state, n_by_m=(1, 2))
  mask = soft.harden(params, state, n_by_m=(1, 2), axis=-1).masks[name]
  np.testing.assert_array_equal(mask.reshape(-1, 2).sum(-1), 1)
