"""Statistics re-estimated and distillation losses, by hand and by law."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.plans import recovery


class Net(nn.Module):
  momentum: float = 0.99

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(4)(x)
    x = nn.BatchNorm(not train, momentum=self.momentum, name='first')(x)
    x = nn.relu(x)
    return nn.BatchNorm(not train, momentum=0.9, name='second')(nn.Dense(3)(x))


DATA = np.random.default_rng(0).normal(2, 3, (24, 5)).astype(np.float32)
NET = Net()
VARIABLES = NET.init(jax.random.key(0), DATA[:2], train=False)
STATS = VARIABLES['batch_stats']


def update(stats, x):
  variables = {'params': VARIABLES['params'], 'batch_stats': stats}
  return NET.apply(variables, x, train=True, mutable=['batch_stats'])[1][
    'batch_stats'
  ]


def close(a, b, rtol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def test_statistics_are_those_of_all_examples_whatever_the_momentum():
  """Of the first norm, whose input knows no batches, in float64."""
  dense = VARIABLES['params']['Dense_0']
  y = DATA.astype(np.float64) @ np.asarray(dense['kernel'], np.float64)
  y += np.asarray(dense['bias'])
  ragged = [DATA[:10], DATA[10:20], DATA[20:]]
  found = recovery.batch_statistics(update, STATS, iter(ragged))
  np.testing.assert_allclose(found['first']['mean'], y.mean(0), rtol=1e-5)
  np.testing.assert_allclose(found['first']['var'], y.var(0), rtol=1e-5)


def test_one_batch_gives_the_output_of_training_form():
  """In the form for inference, with the statistics of the same examples."""
  found = recovery.batch_statistics(update, STATS, [DATA])
  variables = {'params': VARIABLES['params'], 'batch_stats': found}
  trained, _ = NET.apply(
    {**variables, 'batch_stats': STATS},
    DATA,
    train=True,
    mutable=['batch_stats'],
  )
  wanted = NET.apply(variables, DATA, train=False)
  np.testing.assert_allclose(wanted, trained, rtol=1e-4, atol=1e-5)


def test_order_and_the_old_statistics_do_not_matter():
  batches = [DATA[:8], DATA[8:12], DATA[12:]]
  once = recovery.batch_statistics(update, STATS, batches)
  other = jax.tree.map(lambda x: x + 7, STATS)
  again = recovery.batch_statistics(update, other, batches[::-1])
  close(once, again, 1e-7)


def law(momentum, float32=False):
  """A training step by hand: r' = m r + (1 - m) b, of 3 channels."""
  m = np.float32(momentum) if float32 else momentum
  move = lambda r, b: m * r + (1 - m) * b
  return lambda stats, x: {
    'mean': move(stats['mean'], x.mean(0)),
    'var': move(stats['var'], x.var(0)),
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_statistics_are_numpys_for_every_dtype_and_momentum(dtype):
  """To some roundings of float32, and one of the dtype they are kept in."""
  x = np.random.default_rng(1).normal(5, 2, (24, 3)).astype(np.float32)
  momenta = (0.0, 0.1, 0.9, 0.99, 0.999, 0.9999)
  norms = {
    f'{momentum} {float32}': law(momentum, float32)
    for momentum in momenta
    for float32 in (False, True)
  }
  update = lambda stats, x: {k: norms[k](stats[k], x) for k in norms}
  norm = {'mean': jnp.zeros(3, dtype), 'var': jnp.ones(3, dtype)}
  stats, batches = dict.fromkeys(norms, norm), [x[:3], x[3:17], x[17:]]
  wanted = {'mean': x.mean(0, np.float64), 'var': x.var(0, np.float64)}
  tolerance = 2e-6 + float(jnp.finfo(dtype).eps) / 2
  whole = recovery.batch_statistics(update, stats, batches)
  for norm in whole.values():
    for name, value in wanted.items():
      assert norm[name].dtype == dtype
      np.testing.assert_allclose(np.float64(norm[name]), value, rtol=tolerance)


def test_a_mean_far_from_0_is_not_squared():
  """A variance of 1 around 3,000: from squares float32 had no digit left."""
  x = np.random.default_rng(1).normal(3000, 1, (24, 3)).astype(np.float32)
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  whole = recovery.batch_statistics(law(0.99), stats, [x[:10], x[10:]])
  np.testing.assert_allclose(whole['var'], x.var(0, np.float64), rtol=2e-3)


def test_an_update_that_insists_on_float32_is_as_exact_as_its_momentum():
  """m is known to 2^-25 only, and 1 - m with it."""
  x = np.random.default_rng(1).normal(5, 2, (24, 3)).astype(np.float32)
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  for momentum in (0.9, 0.99, 0.9999):
    insists = lambda s, x, m=momentum: law(m)(
      jax.tree.map(lambda r: r.astype(jnp.float32), s), x
    )
    whole = recovery.batch_statistics(insists, stats, [x])
    bound = 1e-6 + 2**-25 / (1 - momentum)
    np.testing.assert_allclose(whole['mean'], x.mean(0), rtol=bound)


def test_an_update_without_a_form_in_64_bits_is_run_in_32():
  """Such as a scan whose carry is of float32."""

  def scanned(stats, x):
    step = lambda total, row: (total + row, None)
    total, _ = jax.lax.scan(step, jnp.zeros_like(stats['mean']), x)
    return law(0.99)(stats, x) | {
      'mean': 0.99 * stats['mean'] + 0.01 * total.astype(jnp.float32) / len(x)
    }

  def refuses(stats, x):
    carry = jnp.zeros(3, jnp.float32)
    step = lambda c, row: (c + row + 0 * stats['mean'], None)
    total, _ = jax.lax.scan(step, carry, x)
    return law(0.99)(stats, x) | {
      'mean': 0.99 * stats['mean'] + 0.01 * total / len(x)
    }

  x = np.random.default_rng(1).normal(5, 2, (24, 3)).astype(np.float32)
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  for update in (scanned, refuses):
    whole = recovery.batch_statistics(update, stats, [x])
    np.testing.assert_allclose(whole['mean'], x.mean(0), rtol=5e-6)
    np.testing.assert_allclose(whole['var'], x.var(0), rtol=5e-6)


def test_flax_in_bfloat16_has_the_statistics_of_float32():
  """At the momentum 0.99, which bfloat16 holds as 0.98828: 15 % off."""
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STATS)
  batches = [DATA[:10], DATA[10:]]
  whole = recovery.batch_statistics(update, half, batches)
  assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype('bfloat16')}
  wanted = recovery.batch_statistics(update, STATS, batches)
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))


def test_a_share_that_follows_the_batch_is_measured_for_each_shape():
  """Batches of 40 and 24 gave 62.5 where the mean of all is 50."""
  x = np.random.default_rng(2).normal(50, 1, (64, 3)).astype(np.float32)
  move = lambda r, b, n: r + (b - r) / n
  update = lambda stats, x: {
    'mean': move(stats['mean'], x.mean(0), len(x)),
    'var': move(stats['var'], x.var(0), len(x)),
  }
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  whole = recovery.batch_statistics(update, stats, [x[:40], x[40:]])
  np.testing.assert_allclose(whole['mean'], x.mean(0, np.float64), rtol=1e-5)
  np.testing.assert_allclose(whole['var'], x.var(0, np.float64), rtol=1e-3)


@pytest.mark.parametrize(
  ('batch', 'message'),
  [
    (jnp.ones((0, 3)), 'Batch 1 has no examples'),
    (
      jnp.array([[1e18] * 3, [-1e18] * 3]),
      r'batch 1 are not finite or too large: var \(up to 1.0e\+34\)',
    ),
    (jnp.full((2, 3), jnp.nan), 'batch 1 are not finite'),
  ],
)
def test_a_batch_without_sound_statistics_is_named(batch, message):
  """All of them were said to round statistics below float32."""
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  with pytest.raises(ValueError, match=message):
    recovery.batch_statistics(law(0.99), stats, [jnp.ones((2, 3)), batch])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('place', ['before', 'after'])
def test_an_update_that_rounds_below_float32_is_refused(dtype, place):
  cast = lambda s: jax.tree.map(lambda r: r.astype(dtype), s)
  rounding = {
    'before': lambda s, x: law(0.99)(cast(s), x),
    'after': lambda s, x: cast(law(0.99)(s, x)),
  }[place]
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  with pytest.raises(ValueError, match=r'below float32: mean, var; .* Let it'):
    recovery.batch_statistics(rounding, stats, [jnp.ones((4, 3))])


def test_logit_distillation_by_hand():
  """At T = 2 the teacher's logits 2 log 3, 0 are 3/4, 1/4 and the student 1/2.

  KL = 3/4 log(3/2) + 1/4 log(1/2); times 4.
  """
  teacher = jnp.array([[2 * np.log(3.0), 0.0]])
  found = recovery.logit_distillation(
    jnp.zeros((1, 2)), teacher, temperature=2.0
  )
  wanted = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
  np.testing.assert_allclose(found, [wanted], rtol=1e-5)


def test_the_gradient_of_distillation_keeps_its_size():
  """d/dz = T (softmax(z / T) - softmax(t / T)): for large T (z - t) / classes.

  Both have mean 0 (Hinton et al., equation 4, times T^2).
  """
  z, t = jnp.array([0.5, -0.5, 0.0]), jnp.array([0.1, 0.2, -0.3])
  loss = lambda z, heat: recovery.logit_distillation(z, t, temperature=heat)
  np.testing.assert_allclose(
    jax.grad(loss)(z, 100.0), (z - t) / 3, rtol=2e-2, atol=1e-3
  )
  soft = lambda x: np.exp(x / 3) / np.exp(x / 3).sum()
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss))(z, 3.0), 3 * (soft(z) - soft(t)), rtol=1e-4
  )


def test_feature_distillation_by_hand():
  """Channels 0 and 2 of [1, 2, 3] and [4, 5, 6] against zeros and ones."""
  teacher = jnp.array([[[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]])
  found = recovery.feature_distillation(
    jnp.array([[[0.0, 0.0], [1.0, 1.0]]]), teacher, kept=(0, 2), axis=1
  )
  assert found.tolist() == [0.5 * (1 + 16 + 4 + 25)]


def test_no_gradient_reaches_the_teacher():
  x, y = jnp.arange(6.0).reshape(2, 3), jnp.zeros((2, 3))
  for loss in (recovery.logit_distillation, recovery.feature_distillation):
    slope = jax.grad(lambda t, loss=loss: loss(x, t).sum())(y)
    assert not slope.any()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: recovery.batch_statistics(update, STATS, []),
      'need one batch or more',
    ),
    (
      lambda: recovery.batch_statistics(update, {'a': {'mean': 1.0}}, [DATA]),
      'these have no partner: a/mean',
    ),
    (
      lambda: recovery.batch_statistics(lambda s, x: s, STATS, [DATA]),
      'leaves statistics as they were: first/mean, .* the training form',
    ),
    (
      lambda: recovery.logit_distillation(jnp.ones(3), jnp.ones(2)),
      r'The logits .* one shape, got \(3,\) and \(2,\)',
    ),
    (
      lambda: recovery.logit_distillation(
        jnp.ones(2), jnp.ones(2), temperature=0
      ),
      '`temperature` must be above 0, got 0',
    ),
    (
      lambda: recovery.feature_distillation(
        jnp.ones((1, 2)), jnp.ones((1, 4)), kept=[0, 1, 2]
      ),
      r'The features .* got \(1, 2\) and \(1, 3\)',
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
