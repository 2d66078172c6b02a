"""Lookahead scores against loops in float64 NumPy, and the authors' quirks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

from jaxprune import tree
from jaxprune.scores import lookahead as la

PATHS = ['conv', 'depthwise', 'grouped', 'fc', 'head']
EPS = 1e-5


def net():
  """Conv 2->4, depthwise 4, grouped 4->6 in 2 groups, flatten by 3, dense."""
  shapes = {
    'conv': (3, 3, 2, 4),
    'depthwise': (3, 3, 1, 4),
    'grouped': (1, 1, 2, 6),
    'fc': (18, 5),
    'head': (5, 3),
  }
  key = iter(jax.random.split(jax.random.key(0), 20))
  params = {k: jax.random.normal(next(key), s) for k, s in shapes.items()}
  stats = {}
  for name in PATHS[:-1]:
    n = shapes[name][-1]
    params[f'{name}_bn/scale'] = jax.random.normal(next(key), (n,))
    stats[f'{name}_bn/var'] = jax.random.uniform(next(key), (n,)) + 0.1
  norms = {k: (f'{k}_bn/scale', f'{k}_bn/var') for k in PATHS[:-1]}
  return params, stats, norms


def dense_form(params):
  """Each kernel as a list of (weight, input channel, output channel)."""
  w = {k: np.asarray(params[k], np.float64) for k in PATHS}
  entries = {}
  for k in PATHS:
    entries[k] = []
    for at, x in np.ndenumerate(w[k]):
      i, o = at[-2], at[-1]
      if k == 'depthwise':
        i = o
      if k == 'grouped':
        i = o // 3 * 2 + at[-2]
      entries[k].append((x, i, o))
  return entries


def golden(params, stats, fold, flatten=lambda i: i % 6):
  """LAP as written down: one loop over weights, one over their neighbours."""
  entries = dense_form(params)
  factor = {}
  for k in PATHS[:-1]:
    gamma = np.asarray(params[f'{k}_bn/scale'], np.float64)
    var = np.asarray(stats[f'{k}_bn/var'], np.float64)
    factor[k] = gamma**2 / (var + EPS) if fold else np.ones_like(gamma)
  scores = {}
  for n, k in enumerate(PATHS):
    into = np.ones(100) if n == 0 else np.zeros(100)
    out = np.ones(100) if n == len(PATHS) - 1 else np.zeros(100)
    if n > 0:
      for x, _, o in entries[PATHS[n - 1]]:
        into[o] += x * x * factor[PATHS[n - 1]][o]
    if n + 1 < len(PATHS):
      for x, i, _ in entries[PATHS[n + 1]]:
        c = flatten(i) if PATHS[n + 1] == 'fc' else i
        out[c] += x * x * factor[k][c]
    channel = flatten if k == 'fc' else lambda i: i
    scores[k] = np.reshape(
      [x * x * into[channel(i)] * out[o] for x, i, o in entries[k]],
      params[k].shape,
    )
  return scores


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_lap_agrees_with_float64(fold, channels_last):
  params, stats, norms = net()
  wiring = la.chain(
    params, PATHS, norms=norms if fold else None, channels_last=channels_last
  )
  got = jax.jit(lambda p, s: la.lookahead(p, wiring, stats=s))(params, stats)
  flatten = (lambda i: i % 6) if channels_last else (lambda i: i // 3)
  want = golden(params, stats, fold, flatten)
  assert set(tree.leaves(got)) == set(PATHS)
  for k in PATHS:
    np.testing.assert_allclose(got[k], want[k], 1e-5, err_msg=k)


def test_one_sided_looks_multiply_to_both():
  params, stats, norms = net()
  wiring = la.chain(params, PATHS, norms=norms)
  score = lambda look: la.lookahead(params, wiring, stats=stats, look=look)
  both, before, after = map(score, ('both', 'before', 'after'))
  for k in PATHS:
    once = before[k] * after[k] / jnp.square(params[k])
    np.testing.assert_allclose(both[k], once, 1e-5)
  np.testing.assert_allclose(before['conv'], jnp.square(params['conv']), 1e-6)


def test_equinox_layout_is_the_transpose():
  params, stats, norms = net()
  turn = lambda w: jnp.moveaxis(w, (-1, -2), (0, 1))
  turned = {k: turn(w) if k in PATHS else w for k, w in params.items()}
  here = la.chain(params, PATHS, norms=norms)
  there = la.chain(turned, PATHS, norms=norms, in_axis=1, out_axis=0)
  want = la.lookahead(params, here, stats=stats)
  got = la.lookahead(turned, there, stats=stats)
  for k in PATHS:
    np.testing.assert_allclose(
      jnp.moveaxis(got[k], (0, 1), (-1, -2)), want[k], 1e-6
    )


# A residual stream and a concatenation, wired by hand.


def streams():
  params = {
    'stem': jnp.array([[1.0, 2.0]]),
    'inner': jnp.array([[1.0], [3.0]]),
    'outer': jnp.array([[2.0, 1.0]]),
    'head': jnp.array([[1.0], [5.0]]),
  }
  wiring = {
    'stem': la.Wire(None, la.Side('stream', (1,))),
    'inner': la.Wire(la.Side('stream', (0,)), la.Side('mid', (1,))),
    'outer': la.Wire(la.Side('mid', (0,)), la.Side('stream', (1,))),
    'head': la.Wire(la.Side('stream', (0,)), None),
  }
  return params, wiring


def test_a_residual_stream_sums_over_what_comes_before_and_after():
  params, wiring = streams()
  got = la.lookahead(params, wiring)
  # Readers of the stream after the stem: inner and head; inner sees the stem
  # alone, the head both writers; the outer layer is read by the head alone.
  np.testing.assert_allclose(got['stem'], [[1 * (1 + 1), 4 * (9 + 25)]])
  np.testing.assert_allclose(got['inner'], [[1 * 1 * 5], [9 * 4 * 5]])
  np.testing.assert_allclose(got['outer'], [[4 * 10 * 1, 1 * 10 * 25]])
  np.testing.assert_allclose(got['head'], [[1 * (1 + 4)], [25 * (4 + 1)]])


def test_a_concatenation_by_offsets():
  params = {
    'a': jnp.array([[1.0]]),
    'b': jnp.array([[2.0, 3.0]]),
    'head': jnp.array([[1.0], [2.0], [3.0], [4.0]]),
  }
  wiring = {
    'a': la.Wire(None, la.Side('cat', (1,))),
    'b': la.Wire(None, la.Side('cat', (1,), np.array([1, 2]))),
    # The last row of the head reads what no leaf writes.
    'head': la.Wire(la.Side('cat', (0,), np.array([0, 1, 2, -1])), None),
  }
  got = la.lookahead(params, wiring)
  np.testing.assert_allclose(got['a'], [[1]])
  np.testing.assert_allclose(got['b'], [[4 * 4, 9 * 9]])
  np.testing.assert_allclose(got['head'], [[1], [4 * 4], [9 * 9], [16]])


def test_a_norm_before_the_reader_counts_for_both_sides():
  params = {
    'a': jnp.array([[1.0, 1.0]]),
    'b': jnp.array([[1.0], [2.0]]),
    'scale': jnp.array([2.0, 3.0]),
  }
  norm = la.Norm('scale')
  wiring = {
    'a': la.Wire(None, la.Side('x', (1,))),
    'b': la.Wire(la.Side('x', (0,), None, (norm,)), None),
  }
  got = la.lookahead(params, wiring)
  np.testing.assert_allclose(got['a'], [[4, 4 * 9]])
  np.testing.assert_allclose(got['b'], [[4], [4 * 9]])


# The authors' code misplaces two norms; wired that way, so does this.


def test_quirk_of_the_downsampling_shortcut():
  params, stats, norms = net()
  params['shortcut_bn/scale'] = 2.0 + jnp.arange(4.0)
  stats['shortcut_bn/var'] = jnp.ones(4)
  wrong = {**norms, 'conv': ('shortcut_bn/scale', 'shortcut_bn/var')}
  replaced = {**params, 'conv_bn/scale': params['shortcut_bn/scale']}
  want = golden(replaced, {**stats, 'conv_bn/var': np.ones(4)}, True)
  wiring = la.chain(params, PATHS, norms=wrong)
  got = la.lookahead(params, wiring, stats=stats)
  right = la.lookahead(
    params, la.chain(params, PATHS, norms=norms), stats=stats
  )
  np.testing.assert_allclose(got['conv'], want['conv'], 1e-5)
  assert not np.allclose(got['conv'], right['conv'], 1e-2)


def test_quirk_of_the_flatten():
  # K = 3 positions of 6 channels, channels first; the authors look up the
  # factor of input i at i // C where its channel is i // K.
  params, stats, norms = net()
  wiring = la.chain(params, PATHS, norms=norms, channels_last=False)
  norm = la.Norm(*norms['grouped'], entries=np.arange(18) // 6)
  writes = wiring['grouped'].writes._replace(norms=())
  reads = wiring['fc'].reads._replace(norms=(norm,))
  wiring['grouped'] = wiring['grouped']._replace(writes=writes)
  wiring['fc'] = wiring['fc']._replace(reads=reads)
  got = la.lookahead(params, wiring, stats=stats, look='before')['fc']
  w = np.asarray(params['fc'], np.float64)
  gamma, var = params['grouped_bn/scale'], stats['grouped_bn/var']
  factor = np.asarray(gamma, np.float64) ** 2 / (np.asarray(var) + EPS)
  written = (np.asarray(params['grouped'], np.float64) ** 2).sum((0, 1, 2))
  i = np.arange(18)
  want = w**2 * (written[i // 3] * factor[i // 6])[:, None]
  np.testing.assert_allclose(got, want, 1e-5)


# Masks, leaf by leaf.


def mlp():
  keys = jax.random.split(jax.random.key(1), 3)
  shapes = {'a': (6, 8), 'b': (8, 7), 'c': (7, 4)}
  return {
    k: jax.random.normal(key, s)
    for key, (k, s) in zip(keys, shapes.items(), strict=True)
  }


def golden_masks(params, rate, order, rounds):
  w = {k: np.asarray(x, np.float64).copy() for k, x in params.items()}
  alive = {k: np.ones(x.shape, bool) for k, x in w.items()}
  names = list(w)

  def score(k):
    n, s = names.index(k), w[k] ** 2
    if n > 0:
      s = s * (w[names[n - 1]] ** 2).sum(0)[:, None]
    if n + 1 < len(names):
      s = s * (w[names[n + 1]] ** 2).sum(1)[None]
    return s

  for r in range(rounds):
    groups = {
      'all': [names],
      'forward': [[k] for k in names],
      'backward': [[k] for k in names[::-1]],
    }[order]
    for group in groups:
      drawn = {}
      for k in group:
        share = rate / rounds / (1 - rate / rounds * r)
        keep = round((1 - share) * alive[k].sum())
        s = np.where(alive[k], score(k), -1).ravel()
        drawn[k] = np.zeros(s.size, bool)
        drawn[k][np.argsort(-s, kind='stable')[:keep]] = True
      for k in group:
        alive[k] = drawn[k].reshape(w[k].shape)
        w[k] = np.where(alive[k], w[k], 0)
  return alive


@pytest.mark.parametrize(
  ('order', 'rounds'),
  [('all', 1), slow('forward', 1), slow('backward', 1), ('forward', 3)],
)
def test_sequential_masks_agree_with_float64(order, rounds):
  params = mlp()
  wiring = la.chain(params, list(params))
  got = la.lookahead_masks(params, wiring, 0.6, order=order, rounds=rounds)
  want = golden_masks(params, 0.6, order, rounds)
  for k in params:
    np.testing.assert_array_equal(got[k], want[k], err_msg=k)


def test_dead_weights_stay_dead_and_rates_follow_rules():
  params = mlp()
  wiring = la.chain(params, list(params))
  first = la.lookahead_masks(params, wiring, {'a': 0.5, 'b': 0.25})
  again = la.lookahead_masks(params, wiring, {'a': 0.5}, masks=first)
  sizes = lambda masks: [int(mask.sum()) for mask in masks.values()]
  assert sizes(first) == [24, 42, 28]
  assert sizes(again) == [12, 42, 28]
  assert not any((again[k] & ~first[k]).any() for k in params)


# Activations.


def test_activation_scales_by_hand():
  params = {
    'conv': jnp.ones((1, 1, 1, 2)),
    'fc': jnp.ones((2, 1)),
  }
  wiring = la.chain(params, ['conv', 'fc'])
  maps = [  # Two batches of two samples, two positions, two channels.
    jnp.array([[[1.0, -1.0], [1.0, 0.0]], [[1.0, 2.0], [-1.0, 0.0]]]),
    jnp.array([[[1.0, -1.0], [-1.0, 0.0]], [[1.0, -2.0], [-1.0, 0.0]]]),
  ]
  rates = la.activation_rates(lambda x: {'conv': x}, maps)
  np.testing.assert_allclose(rates['conv'], [[1, 0.25], [0.25, 0]])
  scaled = la.scale_by_activation(params, wiring, rates)
  np.testing.assert_allclose(scaled['conv'].ravel(), [1 + 0.5, 0.5])
  got = la.lookahead(scaled, wiring)
  np.testing.assert_allclose(got['conv'].ravel(), [2.25, 0.25])
  np.testing.assert_allclose(got['fc'].ravel(), [2.25, 0.25])


def test_low_precision_scores_are_float32():
  params = {k: w.astype(jnp.bfloat16) for k, w in mlp().items()}
  got = la.lookahead(params, la.chain(params, list(params)))
  assert {x.dtype for x in got.values()} == {jnp.dtype('float32')}


def test_heads_are_scaled_one_by_one():
  params = {'a': jnp.ones((3, 2, 4))}
  wiring = {'a': la.Wire(None, la.Side('x', (1, 2), np.zeros((2, 4), int)))}
  rates = {'a': jnp.arange(8.0).reshape(2, 4) ** 2}
  got = la.scale_by_activation(params, wiring, rates)['a']
  np.testing.assert_allclose(got[1], np.arange(8.0).reshape(2, 4))


# OBD.


def test_obd_lap_agrees_with_float64_and_takes_what_is_negative_for_zero():
  params, stats, norms = net()
  wiring = la.chain(params, PATHS, norms=norms)
  noise = jax.random.normal(jax.random.key(3), params['fc'].shape)
  saliencies = {
    path: optax.MaskedNode() if 'bn' in path else jnp.square(w)
    for path, w in params.items()
  }
  saliencies['fc'] = noise
  assert (noise < 0).any()
  got = la.obd(params, saliencies, wiring, stats=stats)
  positive = np.maximum(np.asarray(noise, np.float64), 0)
  want = golden({**params, 'fc': np.sqrt(positive)}, stats, True)
  for k in PATHS:
    np.testing.assert_allclose(got[k], want[k], 1e-5, err_msg=k)


def test_obd_lap_without_the_saliencies_of_a_leaf_takes_its_weights():
  params = mlp()
  wiring = la.chain(params, list(params))
  some = {'a': 4 * params['a'] ** 2, 'c': 9 * params['c'] ** 2}
  got, want = la.obd(params, some, wiring), la.lookahead(params, wiring)
  for k, factor in {'a': 4, 'b': 36, 'c': 9}.items():
    np.testing.assert_allclose(got[k], factor * want[k], 1e-5)


# Errors.


@pytest.mark.parametrize(
  ('paths', 'text'),
  [
    (['a', 'z'], r"unknown: \['z'\]"),
    (['a', 'a'], 'takes each path of params once'),
    (['a', 'c'], r"'c' of shape \(7, 4\) has 7 inputs on axis 0"),
    (['a', 'conv'], r"'conv' .* has 16 inputs on axis 2: neither the 8"),
  ],
)
def test_chain_refuses(paths, text):
  with pytest.raises(ValueError, match=text):
    la.chain({**mlp(), 'conv': jnp.ones((3, 3, 16, 8))}, paths)


@pytest.mark.parametrize(
  ('wire', 'text'),
  [
    ({'z': la.Wire()}, "'z' is no leaf"),
    ({'a': la.Wire(la.Side('x', (2,)))}, r'no ascending axes \(2,\)'),
    (
      {'a': la.Wire(la.Side('x', (0,), np.arange(3)))},
      r'needs channels of shape \(6,\) .* got the shape \(3,\)',
    ),
    (
      {'a': la.Wire(None, la.Side('x', (1,), None, (la.Norm('n'),)))},
      "the norm 'n', which is in neither params nor stats",
    ),
    (
      {'a': la.Wire(None, la.Side('x', (1,), None, (la.Norm('b'),)))},
      r"norm of shape \(8,\), got 'b' of shape \(8, 7\); give it entries",
    ),
  ],
)
def test_wiring_that_does_not_fit_is_refused(wire, text):
  with pytest.raises(ValueError, match=text):
    la.lookahead(mlp(), wire)


def test_other_errors():
  params = mlp()
  wiring = la.chain(params, list(params))
  with pytest.raises(ValueError, match="got 'sideways' and 1"):
    la.lookahead_masks(params, wiring, 0.5, order='sideways')
  with pytest.raises(ValueError, match="got 'forward' and 0"):
    la.lookahead_masks(params, wiring, 0.5, rounds=0)
  for fn in (la.lookahead, functools.partial(la.lookahead_masks, sparsity=0.5)):
    with pytest.raises(ValueError, match="or 'after', got 'next'"):
      fn(params, wiring=wiring, look='next')
  for bad in (jnp.nan, jnp.inf):
    wrong = {**params, 'b': params['b'].at[0, 0].set(bad)}
    with pytest.raises(ValueError, match='finite; NaN or infinity in: a, b, c'):
      la.lookahead_masks(wrong, wiring, 0.5, order='all')
  with pytest.raises(ValueError, match=r"in \[0, 1\), got \{'a': 1.0"):
    la.lookahead_masks(params, wiring, 1.0)
  with pytest.raises(ValueError, match="'c' belong to no output"):
    la.scale_by_activation(params, wiring, {'c': jnp.ones(4)})
  with pytest.raises(
    ValueError, match=r"'a' must have channels of shape \(8,\) last"
  ):
    la.scale_by_activation(params, wiring, {'a': jnp.ones(4)})
  with pytest.raises(ValueError, match='Saliencies of z belong to no leaf'):
    la.obd(params, {'z': jnp.ones(4)}, wiring)
  with pytest.raises(ValueError, match='at least one batch'):
    la.activation_rates(lambda x: {'a': x}, [])
