"""The estimator: unbiased, indifferent to scales, the same on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxprune.search import estimator as est

KEY = jax.random.key(0)
MEAN = {'a': jnp.float32(0.5), 'b': jnp.array([1.0, -2.0])}


def stacked(vectors):
  return jnp.concatenate([vectors['a'][:, None], vectors['b']], axis=1)


def quadratic(vectors):
  """(v - c)' H (v - c) / 2 + 3, with H not diagonal."""
  v = stacked(vectors) - jnp.array([[0.0, 1.0, 1.0]])
  h = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
  return 3 + 0.5 * jnp.sum((v @ h) * v, axis=1)


def test_the_gradient_by_hand():
  noise = jnp.array([1.0, 2.0, -1.0, -2.0])
  losses = jnp.array([1.0, 4.0, 3.0, 0.0])
  one = functools.partial(est.estimate, noise, losses, 0.5)
  # 1/4 (1 + 8 - 3 - 0) / 0.5 = 3; the pairs give -2 and 8.
  found = one(baseline='none')
  np.testing.assert_allclose(found.gradient, 3.0)
  np.testing.assert_allclose(found.variance, 25.0)
  np.testing.assert_allclose(found.signal, 9 / 25)
  np.testing.assert_allclose(one(baseline='mean').gradient, 3.0)
  # Less the mean of the others, single samples: 4/3 (l - 2).
  alone = one(baseline='mean', antithetic=False)
  np.testing.assert_allclose(alone.gradient, 4 / 3 * 3.0, rtol=1e-6)
  scaled = est.estimate(noise, 10 * losses + 7, 0.5)
  np.testing.assert_allclose(scaled.gradient, one().gradient, rtol=1e-5)
  # Of log s: pairs of mean 2, 2: nothing to learn.
  np.testing.assert_allclose(one(baseline='mean').spread, 0.0, atol=1e-6)


@pytest.mark.parametrize('baseline', ['none', 'mean', 'standard'])
def test_a_loss_that_is_no_number_counts_as_the_largest(baseline):
  e = est.estimator(n=4, sigma=0.3, baseline=baseline, learn_sigma=0.1)
  state = e.init(MEAN, KEY)
  for lost in (jnp.nan, jnp.inf, -jnp.inf):
    found = e.tell(state, MEAN, jnp.array([1.0, lost, 4.0, 2.0]))
    wanted = e.tell(state, MEAN, jnp.array([1.0, 4.0, 4.0, 2.0]))
    for a, b in zip(
      jax.tree.leaves((found[0], found[1].sigma)),
      jax.tree.leaves((wanted[0], wanted[1].sigma)), strict=True,
    ):  # fmt: skip
      np.testing.assert_array_equal(a, b)
    assert not np.isfinite(found[1].losses[1])  # It is told all the same.
  gradient, after = e.tell(state, MEAN, jnp.full(4, jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, after.sigma, state.sigma)
  assert not any(np.any(g) for g in jax.tree.leaves(gradient))


FORMS = {
  'plain': {'antithetic': False, 'baseline': 'none'},
  'baseline': {'antithetic': False, 'baseline': 'mean'},
  'pairs': {'antithetic': True, 'baseline': 'mean'},
  'spsa': {'antithetic': True, 'baseline': 'none', 'kind': 'rademacher'},
}


@pytest.mark.parametrize('form', FORMS)
def test_it_is_unbiased_on_a_quadratic(form):
  e = est.estimator(n=8, sigma=0.3, **FORMS[form])

  @jax.jit
  @jax.vmap
  def draw(key):
    gradient, state = e.update(quadratic, e.init(MEAN, key), MEAN)
    return stacked(jax.tree.map(lambda g: g[None], gradient))[0], state.variance

  found, variance = draw(jax.random.split(KEY, 4000))
  # Smoothing a quadratic does not change its gradient.
  true = jax.grad(lambda m: quadratic(jax.tree.map(lambda x: x[None], m))[0])
  true = stacked(jax.tree.map(lambda g: g[None], true(MEAN)))[0]
  error = np.std(found, axis=0) / np.sqrt(len(found))
  assert np.all(np.abs(np.mean(found, axis=0) - true) < 3 * error)
  # And says by how much it scatters.
  whole = np.sum(np.var(found, axis=0))
  np.testing.assert_allclose(np.mean(variance), whole, rtol=0.1)


def test_baselines_and_pairs_scatter_less():
  def scatter(**options):
    e = est.estimator(n=8, sigma=0.1, **options)
    run = jax.vmap(
      lambda key: e.update(quadratic, e.init(MEAN, key), MEAN)[1].variance
    )
    return float(jnp.mean(jax.jit(run)(jax.random.split(KEY, 200))))

  plain, baseline, pairs = (scatter(**FORMS[f]) for f in list(FORMS)[:3])
  assert max(pairs, baseline) < plain / 2


def test_the_gradient_of_sigma_is_unbiased():
  # E d/dlog s of s^2 tr H / 2 = s^2 H_jj for each coordinate.
  e = functools.partial(est.estimator, n=8, sigma=0.5, baseline='mean')
  for antithetic in (False, True):
    drawn = e(antithetic=antithetic)

    @jax.jit
    @jax.vmap
    def draw(key, drawn=drawn, antithetic=antithetic):
      state = drawn.init(MEAN, key)
      noise = jax.tree.map(
        lambda v, m, s: (v - m[None]) / s[None],
        drawn.ask(state, MEAN), MEAN, state.sigma,
      )  # fmt: skip
      losses = quadratic(drawn.ask(state, MEAN))
      found = est.estimate(
        noise, losses, state.sigma, baseline='mean', antithetic=antithetic
      )
      return stacked(jax.tree.map(lambda g: g[None], found.spread))[0]

    found = draw(jax.random.split(KEY, 4000))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    wanted = 0.25 * np.array([2.0, 1.0, 3.0])
    assert np.all(np.abs(np.mean(found, axis=0) - wanted) < 3 * error)


@pytest.mark.parametrize('baseline', ['mean', 'standard'])
def test_noise_does_not_move_it(baseline):
  """A loss that says nothing leaves the vector where it is, on average."""
  e = est.estimator(n=8, sigma=0.1, baseline=baseline)
  tx = optax.adam(0.02)

  @jax.jit
  @jax.vmap
  def walk(key):
    def step(carry, k):
      mean, state, opt = carry
      loss = lambda v: jax.random.normal(k, (v.shape[0],)) + 5
      gradient, state = e.update(loss, state, mean)
      updates, opt = tx.update(gradient, opt)
      return (optax.apply_updates(mean, updates), state, opt), None

    start = jnp.float32(0.5)
    init = (start, e.init(start, key), tx.init(start))
    keys = jax.random.split(jax.random.fold_in(key, 1), 40)
    return jax.lax.scan(step, init, keys)[0][0] - start

  moved = walk(jax.random.split(KEY, 300))
  assert np.abs(np.mean(moved)) < 3 * np.std(moved) / np.sqrt(len(moved))
  assert np.std(moved) > 0.02


def test_the_scale_of_a_coordinate_does_not_matter():
  """Perturbed in proportion to its range, a coordinate moves in proportion."""
  e = est.estimator(n=8, sigma={'a': 0.1, 'b': 0.1})
  wide = est.estimator(n=8, sigma={'a': 10.0, 'b': 0.1})
  grow = lambda tree: {**tree, 'a': 100 * tree['a']}
  shrink = lambda tree: {**tree, 'a': tree['a'] / 100}
  near, _ = e.update(quadratic, e.init(MEAN, KEY), MEAN)
  loss = lambda v: quadratic(shrink(v))
  far, _ = wide.update(loss, wide.init(grow(MEAN), KEY), grow(MEAN))
  np.testing.assert_allclose(far['a'] * 100, near['a'], rtol=1e-4)
  np.testing.assert_allclose(far['b'], near['b'], rtol=1e-4)


def test_sigma_follows_a_schedule_or_is_learned():
  schedule = optax.linear_schedule(0.1, 0.03, 2)
  e = est.estimator(n=4, sigma=schedule)
  state = e.init(MEAN, KEY)
  for wanted in (0.1, 0.065, 0.03):
    np.testing.assert_allclose(state.sigma['a'], wanted, rtol=1e-6)
    _, state = e.update(quadratic, state, MEAN)
  assert int(state.step) == 3
  # In a narrow valley s shrinks along it alone.
  e = est.estimator(n=32, sigma=0.3, learn_sigma=0.5, sigma_range=(0.05, 0.6))
  valley = lambda v: 100 * v[:, 0] ** 2
  mean = jnp.zeros(2)

  @jax.jit
  def run(state):
    step = lambda s, _: (e.update(valley, s, mean)[1], None)
    return jax.lax.scan(step, state, None, 60)[0]

  state = run(e.init(mean, KEY))
  assert float(state.sigma[0]) < 0.1 < float(state.sigma[1]) <= 0.6


def test_ask_and_tell_are_update():
  e = est.estimator(n=4)
  state = e.init(MEAN, KEY)
  one, after = e.update(quadratic, state, MEAN)
  two, then = e.tell(state, MEAN, quadratic(e.ask(state, MEAN)))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  np.testing.assert_array_equal(after.losses, then.losses)
  first, second = (e.ask(s, MEAN)['b'] for s in (state, after))
  assert np.abs(first - second).max() > 0.01
  # Pairs lie on both sides of the mean.
  twice = np.broadcast_to(2 * MEAN['b'], (2, 2))
  np.testing.assert_allclose(first[:2] + first[2:], twice, rtol=1e-5)


@pytest.mark.parametrize('loop', ['unroll', 'map'])
def test_chunks_give_the_same_losses(loop):
  vectors = est.directions(KEY, MEAN, 8)
  wanted = quadratic(vectors)
  found = jax.jit(est.chunked(quadratic, 2, loop=loop))(vectors)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  if loop == 'unroll':
    np.testing.assert_allclose(
      est.chunked(quadratic, 3)(vectors), wanted, rtol=1e-6
    )


@pytest.mark.parametrize('loop', ['unroll', 'map'])
def test_memory_is_bounded_by_the_chunk(loop):
  def memory(wrap, n):
    def run(vectors, weights, x):
      def loss(vectors):
        y = x[None] * vectors[:, None, None]
        for _ in range(3):
          y = jnp.sin(y @ weights)
        return jnp.sum(y @ y.mT, axis=(1, 2))

      return wrap(loss)(vectors)

    specs = [jax.ShapeDtypeStruct(s, 'f4') for s in ((n,), (64, 64), (64, 64))]
    compiled = jax.jit(run).lower(*specs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, few = (memory(lambda loss: loss, n) for n in (32, 4))
  if not whole:
    pytest.skip('This JAX does not tell.')
  assert whole > 6 * few > 0
  chunked = functools.partial(est.chunked, size=4, loop=loop)
  assert memory(chunked, 32) < 2 * few


def test_devices_share_the_work_and_agree():
  e = est.estimator(n=8, sigma=0.2)
  state = e.init(MEAN, KEY)
  one, after = jax.jit(lambda s: e.update(quadratic, s, MEAN))(state)
  seen = []

  def counted(vectors):
    seen.append(vectors['a'].shape[0])
    return quadratic(vectors)

  shared = est.spread(counted, 'devices')
  run = lambda s, m: e.update(shared, s, m)
  count = jax.device_count()
  copies = jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), (state, MEAN)
  )
  many = jax.pmap(run, axis_name='devices')(*copies)
  for k in range(count):
    for a, b in zip(
      jax.tree.leaves(jax.tree.map(lambda x, k=k: x[k], many[0])),
      jax.tree.leaves(one), strict=True,
    ):  # fmt: skip
      np.testing.assert_allclose(a, b, rtol=1e-4)
  mesh = jax.make_mesh(
    (count,), ('devices',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharded = jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=(P(), P()), out_specs=P())
  )
  gradient, then = sharded(state, MEAN)
  for a, b in zip(
    jax.tree.leaves((gradient, then.losses, then.variance)),
    jax.tree.leaves((one, after.losses, after.variance)), strict=True,
  ):  # fmt: skip
    np.testing.assert_allclose(a, b, rtol=1e-4)
  assert set(seen) == {8 // count}
  assert str(jax.make_jaxpr(sharded)(state, MEAN)).count('psum') == 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'n': 3}, '`n` must be even and at least 2, got 3.'),
    ({'n': 0, 'antithetic': False}, '`n` must be at least 1, got 0.'),
    ({'kind': 'cauchy'}, "`kind` must be 'normal' or 'rademacher', got 'cau"),
    ({'baseline': 'max'}, "`baseline` must be 'none', 'mean' or 'standard'"),
    ({'n': 1, 'antithetic': False}, 'One loss has no baseline'),
    ({'learn_sigma': 0.1, 'kind': 'rademacher'}, 'it is not in signs alone'),
    ({'learn_sigma': 0.1, 'sigma': lambda step: 0.1}, 'it follows a schedule'),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    est.estimator(**options)


def test_wrong_chunks_are_refused():
  with pytest.raises(ValueError, match='`size` must be at least 1, got 0'):
    est.chunked(quadratic, 0)
  with pytest.raises(ValueError, match="`loop` must be 'unroll' or 'map'"):
    est.chunked(quadratic, 1, loop='scan')
  vectors = est.directions(KEY, MEAN, 8)
  with pytest.raises(ValueError, match='Chunks of 3 must divide the 8 vectors'):
    est.chunked(quadratic, 3, loop='map')(vectors)
  shared = jax.vmap(
    est.spread(quadratic, 'devices'), in_axes=None, axis_size=3,
    axis_name='devices',
  )  # fmt: skip
  with pytest.raises(ValueError, match='The 3 devices of axis'):
    shared(vectors)
