"""Tests of numbers at their limits: scales, sizes, NaN, and what is a count."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

import jaxprune as jp
from jaxprune import (
  checks,
  distributions,
  masks,
  schedules,
  scores,
  soft,
  transforms,
)
from jaxprune.numerics import counts, select
from jaxprune.scores import lookahead
from jaxprune.soft import channels as soft_channels
from jaxprune.soft import reparam, training
from jaxprune.transforms import dynamic

NAN, INF = float('nan'), float('inf')


# Scores keep their order at every scale.


def drawn(seed, shape, exponent):
  """Returns distinct weights of one size, in either sign, as float32."""
  rng = np.random.default_rng(seed)
  size = np.linspace(0.5, 3.3, int(np.prod(shape)))
  sign = rng.choice([-1.0, 1.0], size.shape)
  with np.errstate(under='ignore'):
    return np.float32(rng.permutation(size * sign).reshape(shape)) * (
      np.float64(10) ** exponent
    )


def assert_order(found, exact):
  """Asserts that scores rank as exact figures that differ by 1e-5 do."""
  found = np.concatenate([np.float64(x).ravel() for x in found])
  exact = np.concatenate([np.float64(x).ravel() for x in exact])
  assert np.isfinite(found).all()
  order = np.argsort(exact)
  steps, gaps = np.diff(found[order]), np.diff(exact[order])
  clear = gaps > 1e-5 * np.abs(exact[order][1:])
  assert (steps[clear] > 0).all()


def plain_lamp(w):
  square = np.sort(np.square(w / np.abs(w).max()).ravel())[::-1]
  sums = np.cumsum(square)
  ratio = dict(zip(square, square / sums, strict=True))
  return np.vectorize(ratio.get)(np.square(w / np.abs(w).max()))


@hypothesis.settings(deadline=None, max_examples=4)
@hypothesis.given(st.integers(-44, 38), st.integers(0, 9))
@hypothesis.example(38, 0)
@hypothesis.example(-40, 0)
def test_scores_of_weights_of_every_size_keep_their_order(exponent, seed):
  with np.errstate(under='ignore'):
    w = np.float32(drawn(seed, (6, 4), exponent))
  params = {'kernel': jnp.asarray(w)}
  exact = np.float64(w)
  tied = len(np.unique(np.abs(w))) < w.size  # As few subnormal numbers are.
  hypothesis.assume(not tied)
  assert_order(scores.magnitude(params).values(), [abs(exact)])
  assert_order(scores.lamp(params).values(), [plain_lamp(exact)])
  both = distributions.normalised.rescale(scores.magnitude(params))
  assert_order(both.values(), [abs(exact)])
  hypothesis.assume(exponent > -42)  # A mean of few subnormal bits is rounded.
  means = masks.block_means(jnp.abs(params['kernel']), (2, 1))
  assert_order([means], [abs(exact).reshape(3, 2, 4).mean(1)])
  far = lambda j: np.linalg.norm(exact - exact[:, [j]], axis=0).sum()
  unit = 10.0**exponent
  distances = np.array([far(j) / unit for j in range(4)])
  assert_order([scores.fpgm(params)['kernel'][0]], [distances])


@hypothesis.settings(deadline=None, max_examples=4)
@hypothesis.given(st.integers(-37, 38), st.integers(-37, 38), st.integers(0, 9))
@hypothesis.example(38, 38, 0)
@hypothesis.example(-37, -37, 0)
def test_products_of_every_size_keep_their_order_between_leaves(a, b, seed):
  w = {k: np.float32(drawn(seed + i, (6, 4), a)) for i, k in enumerate('pq')}
  g = {k: np.float32(drawn(seed + 5, (6, 4), b)) for k in 'pq'}
  exact = [abs(np.float64(w[k]) * 10.0**-a * np.float64(g[k])) for k in w]
  arrays = lambda tree: {k: jnp.asarray(x) for k, x in tree.items()}
  params, grads = arrays(w), arrays(g)
  assert_order(scores.saliency(params, grads).values(), exact)
  linear = lambda p, x: sum(jnp.sum(p[k] * x[k]) for k in p)
  assert_order(scores.snip(linear, params, [grads]).values(), exact)
  curved = lambda p, x: sum(jnp.sum(p[k] ** 2 * x[k]) / 2 for k in p)
  if abs(a) < 18:  # The loss itself squares the weights.
    found = scores.obd(curved, params, [grads], hessian='exact')
    exact = [(np.float64(w[k]) * 10.0**-a) ** 2 * g[k] for k in w]
    assert_order(found.values(), exact)


@hypothesis.settings(deadline=None, max_examples=3)
@hypothesis.given(st.integers(-40, 37), st.integers(-40, 37))
@hypothesis.example(37, 37)
@hypothesis.example(-40, -40)
def test_lookahead_keeps_the_order_within_a_leaf_at_every_scale(a, b):
  sizes = {'a': a, 'b': b, 'c': a}
  w = {
    k: np.float32(drawn(i, (4, 4), e)) for i, (k, e) in enumerate(sizes.items())
  }
  params = {k: jnp.asarray(x) for k, x in w.items()}
  wiring = lookahead.chain(params, list(w))
  found = lookahead.lookahead(params, wiring)
  unit = {k: np.float64(x) / 10.0 ** sizes[k] for k, x in w.items()}
  square = {k: x**2 for k, x in unit.items()}
  exact = {
    'a': square['a'] * square['b'].sum(1)[None],
    'b': square['b'] * square['a'].sum(0)[:, None] * square['c'].sum(1)[None],
    'c': square['c'] * square['b'].sum(0)[:, None],
  }
  for path in w:
    assert_order([found[path]], [exact[path]])
  drawn_masks = lookahead.lookahead_masks(params, wiring, 0.5, order='all')
  for path, mask in drawn_masks.items():
    kept = np.sort(exact[path].ravel())[8:]
    assert sorted(exact[path][np.asarray(mask)]) == kept.tolist()


def test_lookahead_is_the_product_of_squares_where_a_float_holds_it():
  params = {'a': jnp.array([[3.0, 2.0]]) * 1e-4, 'b': jnp.full((2, 1), 1e-3)}
  found = lookahead.lookahead(params, lookahead.chain(params, ['a', 'b']))
  np.testing.assert_allclose(found['a'], [[9e-14, 4e-14]], rtol=1e-5)


def test_lamp_of_large_and_of_subnormal_weights_is_that_of_ordinary_ones():
  lamp = jax.jit(lambda w: scores.lamp({'kernel': w})['kernel'])
  for w in ([[3e38, 1e38]], [[3e-40, -1e-40]], [[3.0, 1.0]]):
    np.testing.assert_allclose(lamp(jnp.array(w)), [[1, 0.1]], rtol=1e-4)


def test_lamp_finds_the_same_places_in_leaves_past_32_bits(monkeypatch):
  w = jnp.asarray(np.random.default_rng(0).integers(0, 9, (5, 6)), jnp.float32)
  expected = distributions.survival(w)
  monkeypatch.setattr(counts, 'leading', lambda shape: 1)
  np.testing.assert_array_equal(distributions.survival(w), expected)


def test_a_float64_leaf_is_scored_in_float64():
  with jax.enable_x64(True):
    w = {'kernel': jnp.array([[1.0, 1 + 1e-12, 2.0]])}
    for score in (scores.lamp(w), scores.fpgm(w), scores.saliency(w, w)):
      assert score['kernel'].dtype == jnp.float64
    assert scores.lamp(w)['kernel'][0, 0] < scores.lamp(w)['kernel'][0, 1]
    means = masks.block_means(w['kernel'], (1, 3))
    assert means.dtype == jnp.float64


def test_norms_of_filters_neither_overflow_nor_vanish():
  for scale in (1e-30, 1.0, 1e30):
    params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 2.0]]) * scale}
    channels = soft_channels.kernel_channels(params)
    norms = channels.reduce(params)['kernel'] / scale
    np.testing.assert_allclose(norms, [5, 2], rtol=1e-5)
    total = lambda p, of: of.reduce(p)['kernel'].sum()
    slope = jax.grad(total)(params, channels)
    np.testing.assert_allclose(slope['kernel'], [[0.6, 0], [0.8, 1]], rtol=1e-5)


# One law for counts.


@pytest.mark.parametrize(
  ('size', 'sparsity'), [(450, 0.95), slow(25, 0.5), slow(7, 0.5)]
)
def test_every_function_keeps_the_same_number_of_weights(size, sparsity):
  w = {'kernel': jnp.asarray(drawn(0, (1, size), 0), jnp.float32)}
  expected = counts.kept(size, sparsity)
  keeps = [
    masks.top(scores.magnitude(w), sparsity),
    lookahead.lookahead_masks(w, lookahead.chain(w, ['kernel']), sparsity),
    soft.harden(w, soft.pdp_init(w, sparsity)).masks,
    soft.harden(w, soft.pdp_init(w, {'.*': sparsity})).masks,
    dynamic.set_(optax.sgd(0.1), sparsity, jax.random.key(0), end=9).init(w)[1],
  ]
  link = jp.sparsify(scores.magnitude, sparsity)
  keeps.append(link.update(w, link.init(w), w)[1].masks)
  found = [kept for x in keeps for kept, _ in masks.count(x).values()]
  assert found == [expected] * len(found)
  if size == 450:
    assert expected == 22


def test_a_ramp_prunes_the_exact_part_of_a_large_leaf():
  pruned = 2**25 + 1  # Float32 has no such number.
  for ramp in (0.0, 0.25, 0.5, 1.0):
    state = soft.PDPState(
      {'w': jnp.uint32(pruned)}, jnp.float32(ramp), jnp.float32(0), None
    )
    assert int(soft.weights._counts(state, None)['w']) == round(ramp * pruned)


@hypothesis.given(st.integers(0, 100), st.integers(1, 40))
def test_limits_count_decimals_as_they_are_written(percent, hundreds):
  exact = percent * hundreds  # Of 100 * hundreds.
  assert counts.least(100 * hundreds, percent / 100) == exact
  assert counts.most(100 * hundreds, percent / 100) == exact


# A count is an integer.


@pytest.mark.parametrize(
  'call',
  [
    lambda n: select.top_mask(jnp.ones(8), n),
    lambda n: select.top_masks({'a': jnp.ones(8)}, {'a': n}),
    lambda n: select.kth_largest(jnp.ones(8), n),
    lambda n: select.boundaries({'a': jnp.ones(8)}, {'a': n}),
    lambda n: distributions.select_pooled(
      {'a': jnp.ones(8)}, n, distributions.global_
    ),
    lambda n: masks.n_by_m(jnp.ones(8), n, 4, axis=0),
    lambda n: masks.groups(n, 8),
    lambda n: masks.blocks({0: n}),
    lambda n: soft.pdp_init({'w': jnp.ones((4, 4))}, pruned={'w': n}),
    lambda n: soft.pdp_init({'w': jnp.ones((4, 4))}, n_by_m=(n, 8)),
    lambda n: jp.sparsify(scores.magnitude, 0.5, every=n),
    lambda n: transforms.soft_shrinkage(scores.magnitude, 0.5, end=n),
    lambda n: schedules.cubic(0.5, begin=0, end=n),
    lambda n: schedules.iterative(0.5, begin=0, end=9, rounds=n),
    lambda n: schedules.warm_restarts(0.5, begin=0, end=9, cycles=n),
    lambda n: dynamic.rigl(optax.sgd(0.1), 0.5, jax.random.key(0), end=n),
    lambda n: dynamic.rigl(
      optax.sgd(0.1), 0.5, jax.random.key(0), end=9, every=n
    ),
    lambda n: training.ramp_schedule(n),
    lambda n: training.is_warm([1.0], patience=n),
    lambda n: training.track_pdp(0.5, begin=n, ramp=lambda step: 1.0),
    lambda n: lookahead.lookahead_masks(
      {'w': jnp.ones((2, 2))}, {}, 0.5, rounds=n
    ),
  ],
)
@pytest.mark.parametrize('number', [5.7, 5.0, True, NAN])
def test_a_count_that_is_no_integer_is_refused(call, number):
  with pytest.raises(TypeError, match=r'must be an integer, got '):
    call(number)


def test_a_count_may_be_an_integer_of_any_library():
  x = jnp.arange(8.0)
  for n in (5, np.int64(5), jnp.int32(5), jnp.uint32(5), counts.limbs(5)):
    assert int(select.top_mask(x, n).sum()) == 5
  with pytest.raises(TypeError, match=r'5\.7\. A fraction of zeros is what'):
    select.top_mask(x, 5.7)
  with pytest.raises(TypeError, match=r'got float32\[\]'):
    jax.jit(lambda n: select.top_mask(x, n))(5.0)


# What is no number, or out of range.


@pytest.mark.parametrize(
  'call',
  [
    lambda x: soft.pdp_init({'w': jnp.ones((4, 4))}, 0.5, tau=x),
    lambda x: soft.pdp_init({'w': jnp.ones((4, 4))}, 0.5, c=x),
    lambda x: soft.pdp_init({'w': jnp.ones((4, 4))}, x),
    lambda x: soft.pdp_init({'w': jnp.ones((4, 4))}, {'w': x}),
    lambda x: training.track_pdp(0.5, begin=0, ramp=lambda step: 1.0, tau=x),
    lambda x: training.ramp_schedule(4, x),
    lambda x: masks.top({'w': jnp.ones(4)}, x),
    lambda x: counts.kept(5, x),
    lambda x: jp.sparsify(scores.magnitude, x),
    lambda x: jp.sparsify(scores.magnitude, {'.*': x}),
    lambda x: transforms.soft_shrinkage(scores.magnitude, 0.5, end=1, factor=x),
    lambda x: dynamic.set_(optax.sgd(0.1), x, jax.random.key(0), end=9),
    lambda x: dynamic.set_(
      optax.sgd(0.1), 0.5, jax.random.key(0), end=9, fraction=x
    ),
    lambda x: schedules.constant(x),
    lambda x: schedules.cubic(x, begin=0, end=9),
    lambda x: schedules.cubic(0.5, begin=0, end=9, initial=x),
    lambda x: schedules.polynomial(0.5, begin=0, end=9, power=x),
    lambda x: schedules.prune_then_regrow(x, 0.1, begin=0, turn=2, end=9),
    lambda x: distributions.uniform_plus('a', 'b', last_density=x),
    lambda x: distributions.by_macs({'a': x}),
    lambda x: jp.gates.scale(x),
    lambda x: jp.gates.sharp(x),
    lambda x: jp.gates.penalty(jnp.float32(1), 1.0, target=x),
    lambda x: jp.plans.recovery.logit_distillation(
      jnp.ones((1, 2)), jnp.ones((1, 2)), temperature=x
    ),
    lambda x: jp.search.estimator.estimator(n=2, sigma=x),
    lambda x: jp.budget(macs=x),
    lambda x: jp.budget(ms=x),
    lambda x: lookahead.lookahead_masks(
      {'w': jnp.ones((2, 2))}, {'w': lookahead.Wire()}, x
    ),
  ],
)
def test_numbers_of_factories_are_finite_and_in_range(call):
  for x in (NAN, INF, -1.0):
    with pytest.raises(ValueError, match=f'(got|has) .*{x}'):
      call(x)
  with pytest.raises(TypeError, match='must be a number, got True'):
    call(True)


def test_a_traced_number_passes_and_an_array_is_checked():
  jax.jit(lambda x: checks.real('tau', x, 0))(NAN)
  with pytest.raises(ValueError, match='`tau` must be finite and at least 0'):
    checks.real('tau', jnp.float32(NAN), 0)


def test_json_names_what_is_not_finite():
  with pytest.raises(ValueError, match=r'a/1 = nan, b = inf\. Write'):
    checks.dumps({'a': [1.0, NAN], 'b': INF})
  vector = jp.search.joint.PruningVector({'a': 3}, {}, NAN)
  with pytest.raises(ValueError, match='side = nan'):
    jp.search.joint.to_json(vector)
  with pytest.raises(ValueError, match='This is no pruning vector'):
    jp.search.joint.from_json(
      '{"version": 2, "widths": {"a": NaN}, "depths": {}, "side": null}'
    )


def test_a_vector_of_nan_is_no_full_width():
  params = {'a': jnp.ones((1, 8)), 'b': jnp.ones((8, 1))}
  graph = jp.trace(lambda p, x: x @ p['a'] @ p['b'], params, jnp.ones((1, 1)))
  space = jp.search.joint.space(graph)
  for odd in (NAN, jnp.float32(INF), np.array([1.0, NAN])):
    vector = jp.search.joint.PruningVector({'a': odd}, {}, None)
    with pytest.raises(ValueError, match=r'widths/a = .*(nan|inf)'):
      jp.search.joint.rounded(space, vector)
  with pytest.raises(TypeError, match=r"`widths\['a'\]` must be an integer"):
    jp.plans.from_widths(graph, {'a': 2.5})
  with pytest.raises(TypeError, match=r"`kept\['a'\]` must be an integer"):
    jp.plans.from_kept(graph, {'a': [0, 1.5]})


# Masks are bool.


@pytest.mark.parametrize(
  'call',
  [
    masks.count,
    masks.sparsity,
    masks.pack,
    lambda tree: masks.apply(tree, {'w': jnp.ones(2)}),
    lambda tree: jp.keep_sparse(tree).init({'w': jnp.ones(2)}),
    lambda tree: jp.check_sparse({'w': jnp.ones(2)}, tree),
  ],
)
def test_masks_of_floats_are_refused(call):
  with pytest.raises(TypeError, match=r'w \(float32\)\. Compare it: mask != 0'):
    call({'w': jnp.array([1.0, 0.5])})


def test_packed_masks_are_not_counted_as_if_they_were_masks():
  packed = masks.pack({'w': jnp.array([True] * 15 + [False])})
  for count in (masks.count, masks.sparsity):
    with pytest.raises(TypeError, match=r'masks\.unpacked\(masks, params\)'):
      count(packed)
  assert masks.sparsity(masks.unpacked(packed, {'w': jnp.ones(16)})) == 1 / 16


# Weights that are not finite.


@pytest.mark.parametrize('bad', [INF, slow(-INF), slow(NAN)])
@pytest.mark.parametrize(
  'link',
  [
    transforms.sparsify(lambda w: -jnp.abs(w), 0.5),
    transforms.soft_shrinkage(lambda w: -jnp.abs(w), 0.5, end=0),
    transforms.keep_sparse(jnp.array([False, True])),
  ],
)
def test_a_pruned_weight_that_is_infinite_does_not_become_nan(link, bad):
  w = jnp.array([2.0, 1.0])
  state = link.init(w)
  _, state = link.update(jnp.zeros(2), state, w)
  w = jnp.array([bad, 1.0])  # It diverged.
  u, state = link.update(jnp.zeros(2), state, w)
  np.testing.assert_array_equal(optax.apply_updates(w, u), w)
  assert int(state.revived) == 1
  with pytest.raises(
    ValueError, match=r'some are NaN or infinite.*masks\.apply'
  ):
    jp.check_sparse({'w': w}, {'w': state.masks})
  assert masks.apply(state.masks, w).tolist() == [0.0, 1.0]


@pytest.mark.parametrize('bad', [INF, NAN])
def test_links_refuse_to_begin_with_a_pruned_weight_that_is_not_finite(bad):
  w = {'w': jnp.array([[bad, 1.0]])}
  with pytest.raises(ValueError, match='Weights to prune are NaN or infinite'):
    jp.keep_sparse({'w': jnp.array([[False, True]])}).init(w)
  tx = dynamic.set_(optax.sgd(0.1), 1.0, jax.random.key(0), end=9)
  with pytest.raises(ValueError, match='Weights to prune are NaN or infinite'):
    tx.init(w)
  for given in ({'sparsity': 0.5}, {'n_by_m': (1, 2)}, {'pruned': {'w': 1}}):
    with pytest.raises(ValueError, match='NaN or infinity in: w'):
      soft.pdp_init(w, **given)


def test_straight_through_and_movement_have_no_product_with_infinity():
  w, mask = jnp.array([INF, 2.0]), jnp.array([False, True])
  for decay in (0.0, 0.5):
    slope = jax.grad(
      lambda w, d=decay: reparam.straight_through(w, mask, d).sum()
    )(w)
    assert slope.tolist() == [1.0, 1.0]
  assert reparam.movement(w, jnp.ones(2), mask).tolist() == [0.0, 2.0]


# Leaves of more entries than an int32 counts, by their shapes alone.

HUGE = {'kernel': jax.ShapeDtypeStruct((80, 8192, 8192), jnp.float32)}
LARGE = {'kernel': jax.ShapeDtypeStruct((1 << 16, 3 << 14), jnp.float32)}
KEY = jax.random.key(0)


def stepped(tx):
  return lambda p: tx.update(p, tx.init(p), p)


def softly(fn, **given):
  return lambda p: fn(p, soft.pdp_init(p, **(given or {'sparsity': 0.9})))


ANY_SIZE = {
  'lamp': scores.lamp,
  'normalised': lambda p: distributions.normalised.rescale(p),
  'fpgm': scores.fpgm,
  'random': lambda p: scores.random(KEY, p),
  'saliency': lambda p: scores.saliency(p, p),
  'top': lambda p: masks.top(p, 0.5),
  'boundaries': lambda p: select.boundaries(p, {'kernel': 5}),
  'packed': lambda p: masks.unpack(
    masks.pack(jax.tree.map(lambda w: w > 0, p)), p
  ),
  'lookahead': lambda p: lookahead.lookahead(p, lookahead.chain(p, ['kernel'])),
  'sparsify': stepped(jp.sparsify(scores.magnitude, 0.9)),
  'sparsify_lamp': stepped(
    jp.sparsify(scores.magnitude, 0.9, distribution=distributions.lamp)
  ),
  'keep_sparse': stepped(jp.keep_sparse()),
  'rigl': stepped(dynamic.rigl(optax.sgd(0.1), 0.9, KEY, end=9)),
}
PDP = {
  'pdp': softly(soft.pdp),
  'diagnose': softly(soft.diagnose),
  'harden': softly(soft.harden),
  'rules': softly(soft.pdp, sparsity={'.*': 0.9}),
}


@pytest.mark.parametrize(
  'name',
  [n if n in ('lamp', 'boundaries', 'rigl') else slow(n) for n in ANY_SIZE],
)
def test_leaves_past_32_bits(name):
  jax.eval_shape(ANY_SIZE[name], HUGE)


@pytest.mark.parametrize(
  'name',
  [
    *(n if n in ('lamp', 'boundaries', 'pdp', 'diagnose') else slow(n)
      for n in (*ANY_SIZE, *PDP))
  ],
)  # fmt: skip
def test_leaves_past_31_bits(name):
  jax.eval_shape({**ANY_SIZE, **PDP}[name], LARGE)


def test_pdp_says_that_it_counts_in_32_bits():
  with pytest.raises(ValueError, match=r'kernel has 2\*\*32 or more'):
    jax.eval_shape(lambda p: soft.pdp_init(p, 0.5), HUGE)
