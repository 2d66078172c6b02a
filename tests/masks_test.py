"""Tests of counts, masks and granularities."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import check_sparse, masks, transforms
from jaxprune.numerics import select


def test_top_by_hand_and_per_leaf():
  scores = {
    'a': jnp.array([[3.0, 1.0], [2.0, 2.0]]),
    'b': optax.MaskedNode(),
    'c': jnp.array([1.0, 2.0, 3.0]),
  }
  got = masks.top(scores, 0.5)
  assert got['a'].tolist() == [[True, False], [True, False]]
  assert got['b'] == optax.MaskedNode()
  per_leaf = {'a': 0.25, 'b': optax.MaskedNode(), 'c': 2 / 3}
  got = masks.top(scores, per_leaf)
  assert got['a'].tolist() == [[True, False], [True, True]]
  assert got['c'].tolist() == [False, False, True]


def ranked(score, n, m, axis):
  """N:M by a stable sort of each group."""
  moved = np.moveaxis(np.asarray(score, np.float64), axis, -1)
  groups = moved.reshape(*moved.shape[:-1], -1, m)
  order = np.argsort(-groups, axis=-1, kind='stable')
  rank = np.argsort(order, axis=-1, kind='stable')
  return np.moveaxis((rank < n).reshape(moved.shape), -1, axis)


@pytest.mark.parametrize(
  ('shape', 'n', 'm', 'axis'),
  [
    ((8, 3), 2, 4, -2),
    ((2, 16), 1, 8, 1),
    ((3, 3, 4, 5), 3, 4, 2),
    ((6,), 0, 3, 0),
  ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_n_by_m_equals_a_sort_of_each_group(shape, n, m, axis, dtype):
  score = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), dtype)
  got = masks.n_by_m(score, n, m, axis=axis)
  np.testing.assert_array_equal(got, ranked(score, n, m, axis))
  traced = jax.jit(lambda x, n: masks.n_by_m(x, n, m, axis=axis))
  np.testing.assert_array_equal(traced(score, n), got)


def test_n_by_m_ranks_nan_below_everything():
  score = jnp.array([jnp.nan, -jnp.inf, jnp.nan, 1.0])
  for n, kept in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3])):
    got = masks.n_by_m(score, n, 4, axis=0)
    assert np.flatnonzero(got).tolist() == kept


def test_blocks_refuse_two_names_of_one_axis():
  grain = masks.blocks({-1: 4, 1: 2})
  assert grain.problem((8, 8)) == 'axes [-1, 1] are one axis of (8, 8)'
  assert grain.problem((8, 8, 8)) is None


def test_n_by_m_default_axis_is_the_input_of_linen():
  score = jnp.array([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
  expected = [[True, False], [True, False], [False, True], [False, True]]
  assert masks.n_by_m(score, 2, 4).tolist() == expected


def test_blocks_of_ragged_edges():
  score = jnp.arange(15.0).reshape(3, 5)
  grain = masks.blocks({0: 2, 1: 3})
  sizes = grain.along(score.shape)
  means = masks.block_means(score, sizes)
  assert means.tolist() == [[3.5, 6.0], [11.0, 13.5]]
  mask = masks.spread(means > 5.0, sizes, score.shape)
  expected = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
  assert mask.astype(int).tolist() == expected


def test_channels_are_whole():
  score = jnp.arange(24.0).reshape(2, 3, 4)
  for axis, kept in ((-1, [2, 3]), (1, [1, 2])):
    sizes = masks.channels(axis).along(score.shape)
    means = masks.block_means(score, sizes)
    mask = masks.spread(
      means >= jnp.sort(means.ravel())[-2], sizes, score.shape
    )
    others = tuple(i for i in range(3) if i != axis % 3)
    assert np.flatnonzero(mask.all(others)).tolist() == kept
    assert mask.all(others).sum() == mask.any(others).sum() == 2


def test_apply_stops_what_is_not_finite():
  params = {'w': jnp.array([jnp.inf, 2.0]), 'b': jnp.ones(1)}
  tree = {'w': jnp.array([False, True]), 'b': optax.MaskedNode()}
  got = masks.apply(tree, params)
  assert got['w'].tolist() == [0.0, 2.0]
  assert got['b'].tolist() == [1.0]


def test_count_sparsity_and_pack():
  tree = {'w': jnp.arange(11) % 3 == 0, 'b': optax.MaskedNode()}
  params = {'w': jnp.zeros(11), 'b': jnp.zeros(2)}
  assert masks.count(tree) == {'w': (4, 11)}
  assert masks.sparsity(tree) == 7 / 11
  packed = masks.pack(tree)
  assert packed['w'].shape == (2,)
  back = masks.unpack(packed, params)
  np.testing.assert_array_equal(back['w'], tree['w'])
  assert back['b'] == optax.MaskedNode()


@pytest.mark.parametrize('shape', [(23,), (2, 11), (0, 12, 3)])
def test_a_mask_that_an_int32_cannot_count_is_counted(monkeypatch, shape):
  mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
  expected = {'w': (int(mask.sum()), mask.size)}

  def overflow(*args, **kw):
    assert kw.get('dtype') == jnp.uint32
    return total(*args, **kw)

  total = jnp.sum
  monkeypatch.setattr(masks, '_WIDE', 0)
  monkeypatch.setattr(masks.jnp, 'sum', overflow)
  assert masks.count({'w': mask}) == expected


def test_errors():
  with pytest.raises(
    ValueError, match=r'sparsity must be in \[0, 1\], got 1.5'
  ):
    masks.kept(3, 1.5)
  bad = {'a': jnp.array([jnp.nan]), 'b': jnp.ones(1), 'c': jnp.array([jnp.inf])}
  with pytest.raises(ValueError, match='NaN or infinity in: a, c'):
    masks.top(bad, 0.5)
  with pytest.raises(ValueError, match='must divide axis 0 of shape'):
    masks.n_by_m(jnp.ones((6, 2)), 2, 4)
  with pytest.raises(ValueError, match='m >= 1, got n=0, m=0'):
    masks.n_by_m(jnp.ones((4, 2)), 0, 0)
  with pytest.raises(ValueError, match='got n=5, m=4'):
    masks.n_by_m(jnp.ones((4, 2)), np.int64(5), 4)
  with pytest.raises(ValueError, match='has no axis 3'):
    masks.n_by_m(jnp.ones((4, 2)), 2, 4, axis=3)
  with pytest.raises(ValueError, match='N:M needs 1 <= n <= m, got n=0'):
    masks.groups(0, 4)
  with pytest.raises(ValueError, match='at least 1'):
    masks.blocks({0: 0})
  with pytest.raises(ValueError, match=r"mask of 'w' must have shape \(2,\)"):
    masks.apply({'w': jnp.ones(3, bool)}, {'w': jnp.ones(2)})


LAWS = hypothesis.settings(deadline=None, max_examples=8)
SCORES = {
  'dtype': st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
  'ties': st.sampled_from([0, 1, 3]),
}


def drawn(shape, dtype, ties):
  x = np.random.default_rng(0).standard_normal(shape)
  return jnp.asarray(np.round(x * ties) if ties < 3 else x, dtype)


@LAWS
@hypothesis.given(
  st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
  st.integers(0, 2),
  st.integers(1, 5),
  st.data(),
)
def test_every_group_keeps_n_the_best_of_it(shape, axis, m, data):
  shape = tuple(k * m if i == axis else k for i, k in enumerate(shape))
  n = data.draw(st.integers(0, m))
  score = drawn(shape, **{k: data.draw(v) for k, v in SCORES.items()})
  got = masks.n_by_m(score, n, m, axis=axis)
  np.testing.assert_array_equal(got, ranked(score, n, m, axis))


@LAWS
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=2, max_size=3
  ),
  st.data(),
)
def test_means_and_masks_of_blocks_are_those_of_their_entries(axes, data):
  shape, sides = zip(*axes, strict=True)
  score = drawn(shape, **{k: data.draw(v) for k, v in SCORES.items()})
  sizes = masks.blocks(dict(enumerate(sides))).along(shape)
  means = masks.block_means(score, sizes)
  spread = masks.spread(means > 0, sizes, shape)
  for at in np.ndindex(means.shape):
    block = tuple(
      slice(i * n, i * n + n) for i, n in zip(at, sizes, strict=True)
    )
    exact = np.asarray(score, np.float64)[block].mean()
    np.testing.assert_allclose(means[at], exact, 1e-5, 1e-6)
    assert (spread[block] == (means[at] > 0)).all()


@pytest.mark.parametrize(
  ('shape', 'path', 'axis', 'text'),
  [
    ((3, 3, 1, 8), 'kernel', None, 'depthwise'),
    ((4, 2, 8), 'kernel', None, 'is not known; say the axis'),
    ((8, 8), 'layer/weight', None, 'is not known; say the axis'),
    ((6, 8), 'kernel', None, '4 does not divide axis -2'),
    ((8, 8), 'kernel', 2, 'has no axis 2'),
  ],
)
def test_layouts_that_groups_refuse(shape, path, axis, text):
  assert text in masks.groups(2, 4, axis=axis).problem(shape, path)


def test_layouts_that_groups_know():
  assert masks.groups(2, 4).problem((8, 3), 'kernel') is None
  assert masks.groups(2, 4).problem((3, 3, 8, 2), 'kernel') is None
  assert masks.groups(2, 4, axis=1).problem((5, 8, 3), 'weight') is None


def test_masks_of_members_unpack_along_their_axis():
  """The padding of each member was read as masks."""
  drawn = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 9))
  packed = jax.vmap(masks.pack)(drawn)
  np.testing.assert_array_equal(masks.unpack(packed, drawn), drawn)
  params = {'w': jnp.where(drawn, 1.0, 0.0).reshape(3, 3, 3)}
  state = jax.vmap(transforms.keep_sparse(packed=True).init)(params)
  check_sparse(params, state)
  with pytest.raises(ValueError, match='not zero in w'):
    check_sparse({'w': jnp.ones((3, 3, 3))}, state)


@pytest.mark.parametrize(
  ('packed', 'shape', 'message'),
  [
    (masks.pack(jnp.ones((4, 4), bool)), (8, 9), 'has 9 bytes, got'),
    (masks.pack(jnp.ones((9, 9), bool)), (3, 3), 'has 2 bytes, got'),
    (jnp.ones((3, 3), jnp.uint8), (3, 3), r'w of shape \(3, 3\)'),
    (jnp.ones((3, 1), jnp.uint8), (3, 1), 'bits set beyond its 1 entries'),
    (jnp.ones(2, jnp.uint8), (3, 3), 'bits set beyond its 9 entries'),
  ],
)
def test_bytes_of_other_shapes_are_not_read_as_masks(packed, shape, message):
  for read in (masks.unpack, masks.unpacked):
    with pytest.raises(ValueError, match=message):
      read({'w': packed}, {'w': jnp.zeros(shape)})


def test_what_is_no_array_of_masks_is_named():
  with pytest.raises(TypeError, match='must be an array, got True'):
    masks.count({'w': True})
  with pytest.raises(TypeError, match=r'uint8, of another type: w \(bool\)'):
    masks.unpack({'w': jnp.ones(9, bool)}, {'w': jnp.ones(9)})
  with pytest.raises(TypeError, match=r'must be an integer, got int32\[2\]'):
    select.top_mask(jnp.ones(3), jnp.array([1, 2]))
