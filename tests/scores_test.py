"""Scores against hand-worked numbers, laws and float64 NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import scores


def small():
  return {
    'dense': {
      'kernel': jnp.array([[1.0, -2.0], [3.0, 0.5]]),
      'bias': jnp.ones(2),
    },
    'head': {'kernel': jnp.array([[-4.0], [0.25]], jnp.bfloat16)},
  }


def test_magnitude_by_hand():
  got = scores.magnitude(small())
  np.testing.assert_array_equal(got['dense']['kernel'], [[1, 2], [3, 0.5]])
  np.testing.assert_array_equal(got['head']['kernel'], [[4], [0.25]])
  assert got['head']['kernel'].dtype == jnp.bfloat16
  assert got['dense']['bias'] == optax.MaskedNode()


def test_magnitude_scores_the_leaves_it_is_told():
  by_rule = scores.magnitude(small(), {'head.*': False, '.*bias': True})
  by_function = scores.magnitude(small(), lambda path, _: 'dense' in path)
  assert by_rule['head']['kernel'] == optax.MaskedNode()
  np.testing.assert_array_equal(by_rule['dense']['bias'], [1, 1])
  assert jax.tree.structure(by_rule) == jax.tree.structure(by_function)


def test_random_scores_depend_on_key_and_leaf():
  params = {'a': jnp.ones((3, 4)), 'v': jnp.ones((3, 4)), 'c': jnp.ones(2)}
  one = scores.random(jax.random.key(0), params)
  two = scores.random(jax.random.key(1), params)
  assert one['c'] == optax.MaskedNode()
  assert len({float(x['a'][0, 0]) for x in (one, two)}) == 2
  assert not (one['a'] == one['v']).any()
  same = scores.random(jax.random.key(0), jax.eval_shape(lambda: params))
  np.testing.assert_array_equal(same['a'], one['a'])


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(0, 99), st.booleans())
def test_lamp_agrees_with_float64(seed, tied):
  w = jax.random.normal(jax.random.key(seed), (7, 9))
  w = jnp.round(w) if tied else w
  got = np.asarray(_lamp({'kernel': w})['kernel'], np.float64).ravel()
  squares = np.asarray(w, np.float64).ravel() ** 2
  order = np.argsort(-squares, kind='stable')
  want = np.zeros(63)
  want[order] = squares[order] / np.cumsum(squares[order])
  np.testing.assert_allclose(got, want, 1e-5)
  assert got.max() == 1
  assert (np.diff(got[order]) <= 1e-7).all()


_lamp = jax.jit(scores.lamp)


def test_lamp_of_large_leaves_is_precise():
  w = jax.random.normal(jax.random.key(0), (1000, 300))
  got = np.asarray(_lamp({'kernel': w})['kernel'], np.float64).ravel()
  squares = np.asarray(w, np.float64).ravel() ** 2
  order = np.argsort(-squares, kind='stable')
  want = squares[order] / np.cumsum(squares[order])
  np.testing.assert_allclose(got[order], want, 1e-5)


def test_lamp_of_zeros_is_zero():
  got = scores.lamp({'kernel': jnp.zeros((2, 2))})
  np.testing.assert_array_equal(got['kernel'], 0)


def test_fpgm_agrees_with_float64():
  w = jax.random.normal(jax.random.key(0), (3, 2, 5))
  f = np.asarray(w, np.float64).reshape(6, 5)
  want = np.linalg.norm(f[:, :, None] - f[:, None], axis=0).sum(0)
  got = scores.fpgm({'kernel': w})['kernel']
  np.testing.assert_allclose(got, np.broadcast_to(want, w.shape), 1e-5)
  turned = scores.fpgm({'kernel': w.transpose(2, 0, 1)}, axis=0)['kernel']
  np.testing.assert_allclose(turned.transpose(1, 2, 0), got, 1e-6)


def test_norm_scale_takes_the_scales_alone():
  params = {'conv/kernel': jnp.ones((2, 2)), 'bn/scale': jnp.array([1.0, -3.0])}
  got = scores.norm_scale(params)
  assert got['conv/kernel'] == optax.MaskedNode()
  np.testing.assert_array_equal(got['bn/scale'], [1, 3])


# Scores with data: two-class logistic regression, whose derivatives we know.


def regression():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 8, 4)).astype(np.float32)
  y = (rng.random((3, 8)) > 0.5).astype(np.float32)
  w = rng.normal(size=(4, 1)).astype(np.float32)
  batches = [
    (jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)
  ]
  params = {
    'kernel': jnp.asarray(w),
    'bias': jnp.zeros(1),
    'step': jnp.int32(1),
  }
  p = 1 / (1 + np.exp(-(x @ w)[..., 0].astype(np.float64)))
  return params, batches, x.astype(np.float64), y, w[:, 0], p


def loss(params, batch):
  x, y = batch
  logits = (x @ params['kernel'])[:, 0] + params['bias']
  return optax.sigmoid_binary_cross_entropy(logits, y).mean()


def column(scores):
  assert scores['bias'] == optax.MaskedNode()
  return np.asarray(scores['kernel'])[:, 0]


def test_snip_and_saliency_agree_with_float64():
  params, batches, x, y, w, p = regression()
  g = np.einsum('bs,bsi->i', p - y, x) / 24
  got = scores.snip(loss, params, iter(batches))
  np.testing.assert_allclose(column(got), np.abs(w * g), 1e-5)
  grads = {'kernel': jnp.asarray(g[:, None]), 'bias': 0.0, 'step': 0.0}
  np.testing.assert_allclose(
    column(scores.saliency(params, grads)), np.abs(w * g), 1e-5
  )


def test_taylor_agrees_with_float64():
  params, batches, x, y, w, p = regression()
  g = np.einsum('bs,bsi->bi', p - y, x) / 8
  got = scores.taylor(loss, params, batches)
  np.testing.assert_allclose(column(got), ((w * g) ** 2).mean(0), 1e-5)


def test_obd_agrees_with_float64():
  params, batches, x, y, w, p = regression()
  want = {
    'exact': np.einsum('bs,bsi->i', p * (1 - p), x**2) / 24 * w**2 / 2,
    'fisher': np.einsum('bs,bsi->i', (p - y) ** 2, x**2) / 24 * w**2 / 2,
  }
  for hessian, value in want.items():
    got = scores.obd(loss, params, batches, hessian=hessian)
    np.testing.assert_allclose(column(got), value, 1e-4, err_msg=hessian)
  got = scores.obd(loss, params, batches, key=jax.random.key(0), samples=2000)
  np.testing.assert_allclose(column(got), want['exact'], 0.1, 1e-3)


def test_exact_diagonal_of_two_leaves():
  params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0], [4.0]])}
  product = lambda p, x: x * jnp.square((p['a'] @ p['b'])[0, 0])
  got = scores.obd(
    product, params, [2.0, 4.0], lambda *_: True, hessian='exact'
  )
  # The second derivatives of 3 (a b)^2 are 6 b^2 and 6 a^2; times w^2 / 2.
  np.testing.assert_allclose(got['a'], [[3 * 9, 3 * 16 * 4]], 1e-6)
  np.testing.assert_allclose(got['b'], [[3 * 9], [3 * 4 * 16]], 1e-6)


def test_grasp_agrees_with_float64():
  params, batches, x, y, w, p = regression()
  g = np.einsum('bs,bsi->i', p - y, x) / 24
  h = np.einsum('bs,bsi,bsj->ij', p * (1 - p), x, x) / 24
  got = scores.grasp(loss, params, iter(batches))
  np.testing.assert_allclose(column(got), w * (h @ g), 1e-4, 1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_grasp_of_half_precision(dtype):
  w = {'kernel': jnp.array([[3.0, -1.0]], dtype)}
  square = lambda p, x: jnp.sum(x * p['kernel'] ** 2)  # g = 2wx, H = 2x
  got = scores.grasp(square, w, [jnp.array([[1.0, 2.0]], dtype)])['kernel']
  assert got.dtype == jnp.float32
  assert got.tolist() == [[36, 16]]


def test_movement_accumulates():
  params, batches, x, y, w, p = regression()
  got = None
  for batch in batches[:2]:
    grads = jax.grad(loss, allow_int=True)(params, batch)
    got = scores.movement(params, grads, got)
  g = np.einsum('bs,bsi->i', (p - y)[:2], x[:2]) / 8
  np.testing.assert_allclose(column(got), -w * g, 1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_products_of_half_precision_are_of_float32(dtype):
  w = {'kernel': jnp.full((1, 2), 1e-3, dtype)}
  wide = jax.tree.map(lambda w: w.astype(jnp.float32), w)
  linear = lambda p, x: jnp.sum(p['kernel'] * x)
  batches = [jnp.full((1, 2), 1e-3, dtype)]
  total = lambda w: functools.reduce(
    lambda s, _: scores.movement(w, w, s), range(300), None
  )
  for score in (
    total,
    lambda w: scores.saliency(w, w),
    lambda w: scores.taylor(linear, w, batches),
    lambda w: scores.obd(linear, w, batches, hessian='fisher'),
  ):
    got, exact = score(w)['kernel'], score(wide)['kernel']
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, 1e-5)


def test_synflow_conserves_the_flow():
  keys = jax.random.split(jax.random.key(0), 2)
  params = {
    'a': jax.random.normal(keys[0], (3, 4)),
    'v': jax.random.normal(keys[1], (4, 2)),
  }
  apply_fn = lambda p, x: jax.nn.relu(x @ p['a']) @ p['v']
  x = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  got = scores.synflow(apply_fn, params, x)
  a, b = (np.abs(np.asarray(params[k], np.float64)) for k in 'av')
  np.testing.assert_allclose(got['a'], a * b.sum(1)[None], 1e-5)
  np.testing.assert_allclose(got['v'], b * a.sum(0)[:, None], 1e-5)
  # What flows into a unit flows out of it.
  np.testing.assert_allclose(got['a'].sum(0), got['v'].sum(1), 1e-5)


def test_wanda_agrees_with_float64():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 3, 4, 2)).astype(np.float32)
  x = rng.normal(size=(2, 5, 6, 6, 4)).astype(np.float32)
  got = scores.wanda(lambda _, x: {'kernel': x}, {'kernel': jnp.asarray(w)}, x)
  norm = np.sqrt((x.astype(np.float64) ** 2).sum((0, 1, 2, 3)))
  np.testing.assert_allclose(
    got['kernel'], np.abs(w) * norm[None, None, :, None], 1e-5
  )


def test_batches_compile_once():
  params, batches, *_ = regression()
  traces = []

  def counted(params, batch):
    traces.append(1)
    return loss(params, batch)

  scores.snip(counted, params, batches)
  assert len(traces) <= 2  # The shapes, and the program.


# Errors.


def test_errors():
  params, batches, *_ = regression()
  with pytest.raises(ValueError, match='needs at least one, got none'):
    scores.snip(loss, params, [])
  with pytest.raises(ValueError, match=r'give a `key`'):
    scores.obd(loss, params, batches)
  with pytest.raises(ValueError, match=r"is one of .*, got 'full'"):
    scores.obd(loss, params, batches, hessian='full')
  with pytest.raises(
    ValueError, match=r"inputs of 'kernel' with 4 channels.*none"
  ):
    scores.wanda(lambda *_: {}, params, batches)
  with pytest.raises(ValueError, match=r'with 4 channels last, got \(2, 3\)'):
    scores.wanda(lambda *_: {'kernel': jnp.ones((2, 3))}, params, batches)
  with pytest.raises(ValueError, match='No leaf is left to prune'):
    scores.magnitude(params, lambda *_: False)
  with pytest.raises(TypeError, match=r"True or False, got '.*': 0.5"):
    scores.magnitude(params, {'.*': 0.5})
  with pytest.raises(TypeError, match=r'function .* or rules .*, got 3'):
    scores.magnitude(params, 3)
