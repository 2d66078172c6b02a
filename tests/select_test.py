"""Tests of exact selection against a sort in NumPy, by hand and by law."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.numerics import counts, select
from jaxprune.numerics.select.secant import secant

METHODS = ['histogram', 'bisection']


def sorted_mask(x, keep):
  """Marks the largest entries by a stable sort in float64."""
  flat = np.asarray(x, np.float64).ravel()
  order = np.lexsort((np.arange(flat.size), -flat))
  mask = np.zeros(flat.size, bool)
  mask[order[:keep]] = True
  return mask.reshape(np.shape(x))


@functools.cache
def jitted(method):
  return jax.jit(lambda x, k: select.top_mask(x, k, method=method))


def tied(shape, dtype=jnp.float32, seed=0):
  """Returns scores with many ties, zeros of both signs, and infinities."""
  rng = np.random.default_rng(seed)
  x = np.round(rng.normal(size=shape), 1)
  x[rng.random(shape) < 0.1] = 0.0
  x[rng.random(shape) < 0.1] = -0.0
  x[rng.random(shape) < 0.01] = np.inf
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize('method', METHODS)
def test_by_hand(method):
  x = jnp.array([[2.0, -1.0, 2.0], [3.0, 2.0, 0.0]])
  expected = [[True, False, True], [True, False, False]]
  assert jitted(method)(x, 3).tolist() == expected


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('keep', [0, 1, 1000, 4096, 4999, 5000])
def test_equals_a_stable_sort(method, dtype, keep):
  x = tied((50, 100), dtype)
  np.testing.assert_array_equal(jitted(method)(x, keep), sorted_mask(x, keep))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_law_on_any_values(data):
  width = st.floats(width=32, allow_nan=False)
  values = data.draw(st.lists(width, min_size=12, max_size=12))
  keep = data.draw(st.integers(0, 12))
  x = jnp.asarray(np.array(values, np.float32))
  for method in METHODS:
    np.testing.assert_array_equal(jitted(method)(x, keep), sorted_mask(x, keep))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('keep', [0, 1, 400, 3000, 5000, 5017, 9010])
def test_pytree_as_a_whole(method, keep):
  scores = {
    'a': tied((50, 80), seed=1),
    'b': jnp.zeros(10),
    'c': (optax.MaskedNode(), tied((5000,), seed=2)),
  }
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(scores)])
  fn = jax.jit(lambda x, k: select.top_masks(x, k, method=method))
  masks = fn(scores, keep)
  assert masks['c'][0] == optax.MaskedNode()
  got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(masks)])
  np.testing.assert_array_equal(got, sorted_mask(flat, keep))


@pytest.mark.parametrize('method', METHODS)
def test_each_leaf_has_its_count(method):
  scores = {'a': tied((70, 100)), 'b': jnp.ones(3), 'c': tied((4096,))}
  keep = {'a': 6900, 'b': 2, 'c': jnp.int32(17)}
  masks = select.top_masks(scores, keep, method=method)
  for name, count in keep.items():
    expected = sorted_mask(scores[name], int(count))
    np.testing.assert_array_equal(masks[name], expected)


def test_nan_ranks_last():
  x = jnp.array([jnp.nan, -jnp.inf, -jnp.nan, 1.0])
  for method in METHODS:
    mask = select.top_mask(x, 2, method=method)
    assert mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize('method', METHODS)
def test_vmap_and_grad(method):
  x = tied((3, 500))
  keep = jnp.array([0, 499, 77])
  got = jax.vmap(jitted(method))(x, keep)
  for row, k, mask in zip(x, keep, got, strict=True):
    np.testing.assert_array_equal(mask, sorted_mask(row, int(k)))
  w = jnp.array([1.0, 3.0, 2.0])
  loss = lambda w: jnp.sum(jnp.where(jitted(method)(jnp.abs(w), 2), w, 0))
  assert jax.grad(loss)(w).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_named_sharding_needs_no_gather(axis_type):
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  sharding = NamedSharding(mesh, P('x', 'y'))
  x = tied((128, 66))  # More than a row of the count on one device.
  with jax.set_mesh(mesh):
    fn = jax.jit(lambda x: select.top_mask(x, 555, method='bisection'))
    placed = jax.device_put(x, sharding)
    compiled = fn.lower(placed).compile()
  mask = compiled(placed)
  np.testing.assert_array_equal(mask, sorted_mask(x, 555))
  assert mask.sharding.is_equivalent_to(sharding, 2)
  assert 'all-gather' not in compiled.as_text()


def test_one_device_may_be_a_mesh_with_explicit_axes(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  explicit = (AxisType.Explicit,) * 2
  mesh = jax.make_mesh((1, 1), ('x', 'y'), explicit, devices=jax.devices()[:1])
  x = {'a': tied((70, 80)), 'b': tied((8,), seed=1)}
  flat = np.concatenate([np.ravel(x) for x in x.values()])
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, P('x', 'y'))
    placed = {**x, 'a': jax.device_put(x['a'], sharding)}
    masks = jax.jit(lambda x: select.top_masks(x, 999))(placed)
  assert masks['a'].sharding.spec == P('x', 'y')
  got = np.concatenate([np.ravel(mask) for mask in masks.values()])
  np.testing.assert_array_equal(got, sorted_mask(flat, 999))


@pytest.mark.parametrize(
  'spec', [P('x', 'y'), P('y'), P(None, ('x', 'y')), P()]
)
def test_shard_map_counts_the_whole_array(spec):
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  x = tied((40, 20))
  small = jnp.zeros(6)

  def fn(x, small):
    one = select.top_mask(x, 333, spec=spec)
    both = select.top_masks([x, small], 400, specs=[spec, P()])
    return one, both

  sharded = jax.shard_map(
    fn, mesh=mesh, in_specs=(spec, P()), out_specs=(spec, [spec, P()])
  )
  one, both = jax.jit(sharded)(x, small)
  np.testing.assert_array_equal(one, sorted_mask(x, 333))
  flat = np.concatenate([np.ravel(x), small])
  got = np.concatenate([np.ravel(mask) for mask in both])
  np.testing.assert_array_equal(got, sorted_mask(flat, 400))


@pytest.mark.parametrize('method', METHODS)
def test_shard_map_and_pmap_with_a_mask_per_shard(method):
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))
  x = tied((4, 50))
  fn = lambda x: select.top_mask(x, 20, method=method)
  expected = np.stack([sorted_mask(row, 20) for row in x])
  sharded = jax.shard_map(fn, mesh=mesh, in_specs=P('x'), out_specs=P('x'))
  np.testing.assert_array_equal(jax.jit(sharded)(x), expected)
  np.testing.assert_array_equal(jax.pmap(fn)(x), expected)


def test_two_limbs_count_rows_past_the_first(monkeypatch):
  # The same arithmetic with a limit of 64 in the place of 2**32.
  lead = lambda shape: 1 if math.prod(shape) > 64 else 0
  monkeypatch.setattr(counts, 'leading', lead)
  x = tied((40, 30))
  for keep in (0, 1, 300, 700, 1199, 1200):
    mask = select.top_mask(x, keep, method='bisection')
    np.testing.assert_array_equal(mask, sorted_mask(x, keep))


def test_an_array_past_32_bits_is_traced_without_being_made():
  shape = jax.ShapeDtypeStruct((80, 8192, 8192), jnp.bfloat16)
  fn = lambda x: select.top_mask(x, 9 * 2**29 + 1)
  assert jax.eval_shape(fn, shape).shape == shape.shape


def test_kth_largest_and_boundaries():
  x = jnp.array([4.0, 1.0, 4.0, -2.0])
  assert [float(select.kth_largest(x, k)) for k in (1, 2, 3, 4)] == [
    4,
    4,
    1,
    -2,
  ]
  high = {'a': x, 'b': x}
  least, most = select.boundaries(high, {'a': 1, 'b': 3})
  assert (float(least['a']), float(most['a'])) == (4.0, 4.0)
  assert (float(least['b']), float(most['b'])) == (1.0, -2.0)


@pytest.mark.parametrize('method', ['histogram', 'bisection'])
def test_boundaries_are_the_ends_of_a_sort(method):
  x = jnp.array([3.0, 1.0, 3.0, jnp.nan, 2.0, -0.0, 3.0])
  order = [3.0, 3.0, 3.0, 2.0, 1.0, 0.0]
  fn = jax.jit(lambda k: select.boundaries({'a': x}, {'a': k}, method=method))
  for k in range(1, 6):
    low, high = fn(jnp.uint32(k))
    assert (float(low['a']), float(high['a'])) == (order[k - 1], order[k])
  assert float(fn(jnp.uint32(0))[0]['a']) == np.inf
  assert float(fn(jnp.uint32(6))[1]['a']) == -np.inf


def test_boundaries_keep_the_dtype_of_each_leaf():
  scores = {'a': jnp.array([1.0, 2.0], jnp.bfloat16), 'b': jnp.ones(2)}
  low, high = select.boundaries(scores, {'a': 1, 'b': 1})
  assert low['a'].dtype == high['a'].dtype == jnp.bfloat16
  assert (float(low['a']), float(high['a'])) == (2, 1)
  assert low['b'].dtype == jnp.float32


def test_errors():
  with pytest.raises(ValueError, match='a count for each of the 2 leaves, as'):
    select.boundaries({'a': jnp.ones(3), 'b': jnp.ones(3)}, 2)
  with pytest.raises(TypeError, match=r"Scores of 'a' must be floating, got i"):
    select.top_masks({'a': jnp.arange(3)}, 1)
  with pytest.raises(TypeError, match=r"'a' must have 16 .* float8_e4m3fn; c"):
    select.top_masks({'a': jnp.ones(3, jnp.float8_e4m3fn)}, 1)
  with pytest.raises(
    ValueError, match=r"`keep` of 'a' must be between 0 and 3"
  ):
    select.top_masks({'a': jnp.ones(3), 'b': jnp.ones(2)}, {'a': 4, 'b': 0})
  with pytest.raises(
    ValueError, match=r'whole pytree.* between 0 and 5, got 6'
  ):
    select.top_masks({'a': jnp.ones(3), 'b': jnp.ones(2)}, 6)
  with pytest.raises(ValueError, match='one for each of the 2 leaves'):
    select.top_masks([jnp.ones(3), jnp.ones(2)], [1])
  limbs = (jnp.zeros(3, jnp.uint32), jnp.ones(3, jnp.uint32))
  with pytest.raises(ValueError, match=r'each of the 2 leaves of the .* got 3'):
    select.top_masks([jnp.ones(3), jnp.ones(2)], limbs)
  with pytest.raises(ValueError, match='k must be at least 1, got 0'):
    select.kth_largest(jnp.ones(3), 0)
  with pytest.raises(ValueError, match='between 0 and 3, got 4'):
    select.top_mask(jnp.ones(3), 4)
  with pytest.raises(ValueError, match=r"`method` is one of .*, got 'sort'"):
    select.top_mask(jnp.ones(3), 1, method='sort')
  huge = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32)
  with pytest.raises(ValueError, match=r'fewer than 2\*\*31 entries'):
    jax.eval_shape(lambda x: select.top_mask(x, 1, method='histogram'), huge)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
  st.integers(0, 10**6),
  st.sampled_from(['spread', 'tied', 'one', 'zeros', 'tiny', 'odd']),
  st.floats(0.0, 1.0),
)
def test_false_position_finds_the_boundaries_of_a_sort(seed, kind, part):
  x = np.random.default_rng(seed).standard_normal((7, 11)).astype(np.float32)
  if kind == 'spread':
    x = np.sinh(25 * np.clip(x, -3.4, 3.4))  # Up to 1e36.
  elif kind == 'tied':
    x = np.round(x)
  elif kind == 'one':
    x = np.full_like(x, -0.5)
  elif kind == 'zeros':
    x = 0 * x  # Of both signs.
  elif kind == 'tiny':
    x = (1e-38 * x).astype(np.float32)
  elif kind == 'odd':
    x[0, :5] = [np.inf, -np.inf, np.inf, 0.0, -0.0]
  keep = round(part * x.size)
  low, high = _secant(x, np.uint32(keep))
  order = np.sort(x.ravel())[::-1]
  assert float(low) == (order[keep - 1] if keep else np.inf)
  assert float(high) == (order[keep] if keep < x.size else -np.inf)


_secant = jax.jit(secant)


def test_false_position_passes_over_nan():
  x = jnp.array([jnp.nan, 2.0, 1.0])
  low, high = _secant(x, jnp.uint32(2))
  assert (float(low), float(high)) == (1.0, -np.inf)
