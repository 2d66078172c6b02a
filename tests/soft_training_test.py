"""PDP beside the loss: ramp, warnings, and one line of an optax chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from traces import counted

from jaxprune import soft, tree
from jaxprune.soft import channels as soft_channels
from jaxprune.soft import training


def problem():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'a': {'kernel': jax.random.normal(keys[0], (4, 6)), 'bias': jnp.zeros(6)},
    'b': {'kernel': jax.random.normal(keys[1], (6, 3))},
  }
  x = jax.random.normal(keys[2], (8, 4))

  def apply(params, x):
    h = jnp.tanh(x @ params['a']['kernel'] + params['a']['bias'][None])
    return h @ params['b']['kernel']

  return params, x, apply


def ramp(step):
  return jnp.clip((step + 1) / 4, 0.0, 1.0)  # Since the end of the warm-up.


def train(tx, params, opt_state, x, apply, steps):
  gated = training.with_pdp(apply)

  def step(params, opt_state):
    loss = lambda p: jnp.mean(jnp.square(gated(p, opt_state, x) - 1.0))
    grads = jax.grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  step, traces = counted(step)
  for _ in range(steps):
    params, opt_state = step(params, opt_state)
  assert len(traces) == 1
  return params, opt_state


def test_ramp_by_epoch_and_by_step():
  epochs = [0, 15, 16, 17, 90]
  got = [float(training.ramp(e)) for e in epochs]
  np.testing.assert_allclose(got, [0, 0, 0.015, 0.03, 1], 1e-5)
  np.testing.assert_allclose(training.ramp(16.5), 0.0225, 1e-5)


def test_ramps_of_updates():
  stairs = training.ramp_schedule(10)
  slope = training.ramp_schedule(10, by='step')
  steps = [0, 9, 10, 15]
  np.testing.assert_allclose(
    [float(stairs(s)) for s in steps], [0.015, 0.015, 0.03, 0.03], 1e-5
  )
  np.testing.assert_allclose(
    [float(slope(s)) for s in steps], [0.015, 0.0285, 0.03, 0.0375], 1e-5
  )


def test_warm_is_a_run_above_one_half():
  history = [0.4, 0.6, 0.6, 0.3, 0.7, 0.7]
  assert not training.is_warm(history, patience=3)
  assert training.is_warm([*history, 0.7], patience=3)
  assert not training.is_warm([60.0] * 4, upper=100)
  assert training.is_warm([60.0] * 5, upper=100)


def test_a_chain_trains_softly_then_hard():
  params, x, apply = problem()
  tx = optax.chain(
    optax.adam(0.05), training.track_pdp(0.7, begin=2, ramp=ramp, end=6)
  )
  opt_state = tx.init(params)
  middle, opt_state = train(tx, params, opt_state, x, apply, 4)
  (_, tracked) = opt_state
  assert float(tracked.pdp.ramp) == 0.75
  assert not any((w == 0).any() for w in jax.tree.leaves(middle))
  # A restart in the middle of the ramp goes on from the state alone.
  stored = jax.tree.map(
    lambda leaf: jnp.array(np.asarray(leaf)), (middle, opt_state)
  )
  one, _ = train(tx, *stored, x, apply, 5)
  other, (_, tracked) = train(tx, middle, opt_state, x, apply, 5)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  zeros = [int((other[k]['kernel'] == 0).sum()) for k in 'ab']
  assert sum(zeros) == round(0.7 * 42)
  assert zeros == [int(tracked.pdp.pruned[k]['kernel']) for k in 'ab']
  np.testing.assert_allclose(
    training.with_pdp(apply)(other, (tracked,), x), apply(other, x), 1e-6
  )


def test_budgets_are_those_of_the_params_after_warm_up():
  params = {'a': jnp.full((1, 4), 1.0), 'c': jnp.full((1, 4), 2.5)}
  grow = {'a': jnp.ones((1, 4)), 'c': jnp.zeros((1, 4))}
  which = lambda *_: True
  tx = training.track_pdp(0.5, begin=2, ramp=ramp, which=which)
  state, seen = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update(grow, state, params)
    params = optax.apply_updates(params, updates)
    seen.append([int(state.pdp.pruned[k]) for k in 'ac'])
  # 'a' is 2, 3, 4 and 5 after the updates, and 'c' stays 2.5.
  assert seen == [[4, 0], [0, 4], [0, 4], [0, 4]]


def test_a_warm_up_that_the_accuracy_ends_needs_no_new_program():
  params, x, apply = problem()
  tx = optax.chain(
    optax.sgd(0.1), training.track_pdp(0.7, begin=None, ramp=ramp)
  )
  state = tx.init(params)
  gated = training.with_pdp(apply)

  def step(params, state):
    loss = lambda p: jnp.mean(jnp.square(gated(p, state, x) - 1.0))
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  step, traces = counted(step)
  ramps = []
  for i in range(6):
    if i == 3:
      state = training.end_warm_up(state)
    params, state = step(params, state)
    ramps.append(float(state[1].pdp.ramp))
  assert ramps == [0, 0, 0, 0.25, 0.5, 0.75]
  assert len(traces) == 1
  with pytest.raises(ValueError, match='The warm-up is over since update 4'):
    training.end_warm_up(state)
  with pytest.raises(ValueError, match='end_warm_up needs an optimizer state'):
    training.end_warm_up(optax.sgd(0.1).init(params))


def test_a_warm_up_that_never_ends_is_cut_at_the_end():
  params = {'a': jnp.full((1, 4), 1.0), 'c': jnp.full((1, 4), 2.5)}
  grow = {'a': jnp.ones((1, 4)), 'c': jnp.zeros((1, 4))}
  tx = training.track_pdp(
    0.5, begin=None, end=2, ramp=ramp, which=lambda *_: True
  )
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update(grow, state, params)
    params = optax.apply_updates(params, updates)
  # At first 'a' was the smaller; after two updates it is 'c', 2.5 against 3.
  np.testing.assert_array_equal(params['a'], np.full((1, 4), 4.0))
  np.testing.assert_array_equal(params['c'], np.zeros((1, 4)))


def test_weight_decay_acts_on_the_raw_weights():
  params = {'kernel': jnp.array([[0.01, -0.02, 3.0, -4.0]])}
  tx = optax.chain(
    optax.adamw(0.1, weight_decay=0.5),
    training.track_pdp(0.5, begin=0, ramp=lambda _: 1.0),
  )
  state = tx.init(params)
  loss = training.with_pdp(lambda p: jnp.sum(jnp.square(p['kernel'])))
  grads = jax.grad(loss)(params, state)
  # Below t = 1.51 masks and gradients are zero; the pull is all there is.
  np.testing.assert_array_equal(grads['kernel'][0, :2], 0)
  updates, _ = tx.update(grads, state, params)
  np.testing.assert_allclose(
    updates['kernel'][0, :2], -0.1 * 0.5 * params['kernel'][0, :2], 1e-5
  )


@pytest.mark.slow
def test_a_mesh_with_explicit_axes_trains_as_one_device():
  params = {'kernel': jax.random.normal(jax.random.key(0), (4, 6))}
  tx = training.track_pdp(0.5, begin=0, end=2, ramp=ramp, tau=0.1)
  gated = training.with_pdp(lambda params: params['kernel'])

  @jax.jit
  def step(params, state):
    loss = lambda p: jnp.sum(jnp.square(gated(p, state) - 1.0))
    grads = jax.grad(loss)(params)
    updates = jax.tree.map(lambda g: -0.1 * g, grads)
    updates, state = tx.update(updates, state, params)
    return optax.apply_updates(params, updates), state

  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Explicit,))
  split = NamedSharding(mesh, PartitionSpec(None, 'x'))
  wide, state = jax.device_put(params, split), tx.init(params)
  with jax.set_mesh(mesh):
    wide_state = tx.init(wide)
  for _ in range(2):
    params, state = step(params, state)
    with jax.set_mesh(mesh):
      wide, wide_state = step(wide, wide_state)
  assert int((params['kernel'] == 0).sum()) == 12
  np.testing.assert_allclose(wide['kernel'], params['kernel'], 1e-5, 1e-6)
  assert wide['kernel'].sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize(
  'groups', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_several_devices_train_as_one(groups):
  params, x, apply = problem()
  channels = None
  if groups:
    channels = soft_channels.Channels(
      reduce=lambda p: {'hidden': jnp.linalg.norm(p['a']['kernel'], axis=0)},
      scale=lambda p, g: {
        **p,
        'b': {'kernel': g['hidden'][:, None] * p['b']['kernel']},
      },
    )
  options = {'which': (lambda *_: True) if groups else None}
  tx = optax.chain(
    optax.sgd(0.1),
    training.track_pdp(
      0.5,
      begin=1,
      end=4,
      ramp=ramp,
      tau=0.0,
      c=0.2,
      channels=channels,
      **options,
    ),
  )
  gated = training.with_pdp(apply, channels=channels)

  def step(params, state, x, mean):
    loss = lambda p: jnp.mean(jnp.square(gated(p, state, x) - 1.0))
    updates, state = tx.update(mean(jax.grad(loss)(params)), state, params)
    return optax.apply_updates(params, updates), state

  one = jax.jit(lambda *args: step(*args, lambda g: g))
  mean = lambda g: jax.lax.pmean(g, 'devices')
  many = jax.pmap(lambda *args: step(*args, mean), 'devices')
  copies = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * 4), tree)
  wide, wide_state = copies(params), copies(tx.init(params))
  state = tx.init(params)
  for _ in range(5):
    params, state = one(params, state, x)
    wide, wide_state = many(wide, wide_state, x.reshape(4, 2, 4))
  assert float((params['b']['kernel'] == 0).mean()) >= 0.4
  for device in range(4):
    theirs = jax.tree.map(lambda a, device=device: a[device], wide)
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6)
    jax.tree.map(close, theirs, params)


def test_an_nnx_optimizer_trains_softly_then_hard():
  layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  tx = training.track_pdp(0.5, begin=1, end=3, ramp=ramp, tau=0.1)
  optimizer = nnx.Optimizer(
    layer, optax.chain(optax.sgd(0.1), tx), wrt=nnx.Param
  )
  graph, _ = nnx.split(layer, nnx.Param)
  gated = training.with_pdp(lambda p, x: nnx.merge(graph, p)(x))

  @nnx.jit
  def step(layer, optimizer, x):
    state = nnx.as_pure(optimizer.opt_state)
    error = lambda p: gated(nnx.as_pure(p), state, x) - 1.0
    loss = lambda p: jnp.mean(jnp.square(error(p)))
    optimizer.update(layer, jax.grad(loss)(nnx.state(layer, nnx.Param)))

  zeros = []
  for _ in range(4):
    step(layer, optimizer, jnp.ones((2, 4)))
    zeros.append(int((layer.kernel[...] == 0).sum()))
  assert zeros == [0, 0, 12, 12]


def test_the_forward_pass_is_dense_in_warm_up():
  params, x, apply = problem()
  state = training.track_pdp(0.5, begin=2, ramp=ramp).init(params)
  got = training.with_pdp(apply)(params, state, x)
  np.testing.assert_array_equal(got, apply(params, x))


def test_temperatures_follow_their_schedules():
  tx = training.track_pdp(
    0.5, begin=0, ramp=lambda _: 1.0, tau=0.0, c=lambda step: 0.5 / (step + 1)
  )
  params, _, _ = problem()
  state = tx.init(params)
  np.testing.assert_allclose(state.pdp.c, 0.5)
  _, state = tx.update(params, state, params)
  np.testing.assert_allclose(state.pdp.c, 0.25)


def test_warning_names_what_is_wrong():
  params = {'kernel': jnp.array([[1.0, 2.0, 3.0, 4.0]])}
  full = lambda **kw: soft.diagnose(
    params, soft.pdp_init(params, 0.5, **kw)._replace(ramp=jnp.float32(1))
  )
  with pytest.warns(UserWarning, match='all but hard.* in kernel .*c=0.1'):
    training.warn_about(full())
  with pytest.warns(UserWarning, match=r'25-fold, in kernel \(62\)'):
    training.warn_about(full(tau=0.1))
  training.warn_about(full(tau=0, c=0.25))


def test_warning_names_a_leaf_that_closes():
  params = {
    'wide': {'kernel': jnp.array([[0.1, 0.2, 0.3]])},
    'narrow': {'kernel': jnp.array([[1.0, 2.0, 3.0]])},
  }
  find = lambda *args, **kw: soft.diagnose(
    params, soft.pdp_init(params, *args, tau=0.0, c=0.25, **kw)
  )
  closing = find(0.5)
  assert tree.leaves(closing.density) == {'wide/kernel': 0, 'narrow/kernel': 1}
  with pytest.warns(UserWarning, match='no weight of wide/kernel.*pruned='):
    training.warn_about(closing)
  open_ = find(pruned={'wide/kernel': 2, 'narrow/kernel': 1})
  np.testing.assert_allclose(open_.density['wide']['kernel'], 1 / 3)
  training.warn_about(open_)


def test_errors():
  params, x, apply = problem()
  with pytest.raises(ValueError, match='0 <= begin < end, got begin=5, end=5'):
    training.track_pdp(0.5, begin=5, ramp=ramp, end=5)
  tx = training.track_pdp(0.5, begin=0, ramp=ramp)
  with pytest.raises(ValueError, match='track_pdp needs `params`'):
    tx.update(params, tx.init(params))
  with pytest.raises(ValueError, match='one state of track_pdp, found 0'):
    training.with_pdp(apply)(params, optax.sgd(0.1).init(params), x)
  with pytest.raises(ValueError, match='must be at least 1, got 0'):
    training.ramp_schedule(0)
  with pytest.raises(ValueError, match='`patience` must be at least 1, got 0'):
    training.is_warm([], patience=0)
  with pytest.raises(ValueError, match="be 'epoch' or 'step', got 'day'"):
    training.ramp_schedule(1, by='day')
