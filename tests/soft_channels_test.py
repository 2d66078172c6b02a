"""PDP over channels: seen behind a norm in training, and removable for real."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from traces import counted

import jaxprune as jp
from jaxprune import plans, structure, tree
from jaxprune.soft import channels as soft_channels

# By hand: a dense layer of 6, a norm in training, a reader.


def weights(seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    'a': {'kernel': jax.random.normal(keys[0], (4, 6)), 'bias': jnp.ones(6)},
    'b': {'kernel': 0.3 * jax.random.normal(keys[1], (6, 5))},
    'steps': jnp.int32(3),
  }


def forward(params, x):
  h = x @ params['a']['kernel']
  mean, var = h.mean(0, keepdims=True), h.var(0, keepdims=True)
  h = (h - mean) / jnp.sqrt(var + 1e-5) + params['a']['bias'][None]
  return jax.nn.relu(h) @ params['b']['kernel']


def norms(params):
  return {'hidden': jnp.linalg.norm(params['a']['kernel'], axis=0)}


def on_readers(params, groups):
  rows = groups['hidden'][:, None] * params['b']['kernel']
  return {**params, 'b': {'kernel': rows}}


READERS = soft_channels.Channels(norms, on_readers)


def full(state, ramp=1.0):
  return state._replace(ramp=jnp.float32(ramp))


def pull_of_masks(channels, loss, params, state):
  """Gradient of a loss with respect to c, which acts by the masks alone."""
  gated = lambda c: soft_channels.pdp(params, state._replace(c=c), channels)
  return abs(float(jax.jit(jax.grad(lambda c: loss(gated(c))))(state.c)))


def test_a_mask_on_the_readers_is_seen_behind_a_norm_in_training():
  params, x = weights(), jax.random.normal(jax.random.key(2), (16, 4))
  loss = lambda p: jnp.mean(jnp.square(forward(p, x) - 1.0))
  only = lambda path, _: path == 'a/kernel'
  kernels = soft_channels.kernel_channels(params, which=only)
  pulls = []
  for channels in (READERS, kernels):
    state = full(soft_channels.init(params, channels, 0.5, c=0.3))
    pulls.append(pull_of_masks(channels, loss, params, state))
  assert pulls[0] > 1e-2
  assert pulls[1] < 1e-3


def test_masks_by_hand():
  params = weights()
  u = np.linalg.norm(np.asarray(params['a']['kernel'], np.float64), axis=0)
  t = np.sort(u)[2:4].mean()
  state = full(soft_channels.init(params, READERS, 0.5, tau=0.7, c=0.0))
  got = soft_channels.pdp(params, state, READERS)
  m = 1 / (1 + np.exp(-(u * u - t * t) / 0.7))
  np.testing.assert_allclose(
    got['b']['kernel'], m[:, None] * params['b']['kernel'], 1e-5
  )
  np.testing.assert_array_equal(got['a']['kernel'], params['a']['kernel'])
  warm = soft_channels.pdp(params, full(state, 0.0), READERS)
  jax.tree.map(np.testing.assert_array_equal, warm, params)


def test_the_gradient_reaches_the_weights_of_the_norm_through_the_mask():
  params = weights()
  state = full(soft_channels.init(params, READERS, 0.5))
  total = lambda p: soft_channels.pdp(p, state, READERS)['b']['kernel'].sum()
  grad = jax.grad(total, allow_int=True)(params)
  assert (grad['a']['kernel'] != 0).all()


def test_closed_channels_are_exactly_zero_where_they_are_read():
  params, x = weights(), jax.random.normal(jax.random.key(2), (16, 4))
  hard = soft_channels.harden(
    params, soft_channels.init(params, READERS, 0.5), READERS
  )
  kept = np.flatnonzero(hard.masks['hidden'])
  assert kept.size == 3
  closed = soft_channels.pdp(params, hard, READERS)
  assert int((closed['b']['kernel'] == 0).sum()) == 15
  small = {
    'a': {k: v[..., kept] for k, v in params['a'].items()},
    'b': {'kernel': params['b']['kernel'][kept]},
  }
  np.testing.assert_allclose(forward(closed, x), forward(small, x), 1e-5, 1e-6)


def test_groups_that_a_rule_leaves_out_stay_open():
  seen = {}
  params = weights()
  channels = soft_channels.Channels(
    reduce=lambda p: {**norms(p), 'other': jnp.ones(2)},
    scale=lambda p, groups: seen.update(groups) or p,
  )
  rules = {'hidden': True, 'other': False}
  state = soft_channels.init(params, channels, 0.5, which=rules)
  soft_channels.pdp(params, full(state), channels)
  assert list(seen) == ['hidden']
  seen.clear()
  hard = soft_channels.harden(params, state, channels)
  soft_channels.pdp(params, hard, channels)
  assert list(seen) == ['hidden']


def test_groups_that_a_mesh_splits_close_as_on_one_device():
  params = {k: v['kernel'] for k, v in weights().items() if k != 'steps'}
  mlp = lambda p, x: jax.nn.relu(x @ p['a']) @ p['b']
  graph = jp.trace(mlp, params, jnp.ones((2, 4)))
  everything = lambda *_: True
  channels = soft_channels.Channels(
    reduce=lambda p: graph.reduce(tree.prunable(p, everything)),
    scale=lambda p, units: structure.scale(graph, p, units),
  )

  def close(params):
    state = full(soft_channels.init(params, channels, 0.5))
    hard = soft_channels.harden(params, state, channels)
    most = graph.reduce(params, norm='max')
    gated = soft_channels.pdp(params, state, channels)
    return gated, soft_channels.pdp(params, hard, channels), most

  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Explicit,))
  split = {'a': PartitionSpec(None, 'x'), 'b': PartitionSpec('x', None)}
  with jax.set_mesh(mesh):
    place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
    got = jax.jit(close)(jax.tree.map(place, params, split))
  for a, b in zip(*map(jax.tree.leaves, (got, close(params))), strict=True):
    np.testing.assert_allclose(a, b, 1e-5)


def test_kernel_channels_mask_filters_and_warn_about_norms():
  params = {'conv/kernel': jnp.array([[3.0, 0.0], [4.0, 0.0]])}
  channels = soft_channels.kernel_channels(params)
  state = soft_channels.init(params, channels, 0.5)
  hard = soft_channels.harden(params, state, channels)
  got = soft_channels.pdp(params, hard, channels)['conv/kernel']
  np.testing.assert_array_equal(got, [[3, 0], [4, 0]])
  total = lambda p: soft_channels.pdp(p, full(state), channels)['conv/kernel']
  grad = jax.grad(lambda p: total(p).sum())(params)['conv/kernel']
  assert np.isfinite(grad).all()  # A filter of zeros has a norm of zero.
  for norm in ('norm/scale', 'norm/weight'):  # Of Flax, of Equinox.
    with pytest.warns(UserWarning, match=f'{norm!r} looks like the norm'):
      soft_channels.kernel_channels({**params, norm: jnp.ones(2)})
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    soft_channels.kernel_channels({**params, 'norm/scale': jnp.ones(3)})


# Over the groups of a traced network.


class Net(nn.Module):
  """Two convolutions with norms, a residual add and a head."""

  @nn.compact
  def __call__(self, x, train):
    norm = lambda name: nn.BatchNorm(
      use_running_average=not train, name=name, momentum=0.9
    )
    x = nn.relu(norm('norm1')(nn.Conv(6, (3, 3), name='conv1')(x)))
    y = nn.relu(norm('norm2')(nn.Conv(8, (3, 3), name='conv2')(x)))
    x = norm('norm3')(nn.Conv(6, (1, 1), name='conv3')(y)) + x
    return nn.Dense(3, name='head')(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope='module')
def traced():
  net, x = Net(), jax.random.normal(jax.random.key(0), (4, 5, 5, 2))
  variables = jax.jit(lambda k: net.init(k, x, train=False))(jax.random.key(1))
  fn = lambda v, x: net.apply(v, x, train=False)
  graph = jp.trace(fn, variables, x)
  channels = soft_channels.Channels(
    reduce=lambda p: graph.reduce(tree.prunable(p)),
    scale=lambda p, units: structure.scale(graph, p, units),
  )
  return net, variables, x, graph, channels


def test_groups_behind_train_mode_norms_feel_their_masks(traced):
  net, variables, x, graph, channels = traced
  assert len(graph.groups) == 2

  @jax.jit
  def loss(params):
    seen = {**variables, 'params': params}
    logits, _ = net.apply(seen, x, train=True, mutable=['batch_stats'])
    return jnp.mean(jnp.square(logits - 1.0))

  params = variables['params']
  with pytest.warns(UserWarning, match='looks like the norm'):
    kernels = soft_channels.kernel_channels(
      params, which=lambda path, _: path in ('conv2/kernel', 'conv1/kernel')
    )
  pulls = []
  for way in (channels, kernels):
    state = full(soft_channels.init(params, way, 0.5, c=0.3))
    pulls.append(pull_of_masks(way, loss, params, state))
  assert pulls[0] > 1e-2
  assert pulls[1] < 1e-2 * pulls[0]  # What the norms' epsilon leaves.


def test_what_pdp_closes_is_removed_for_real(traced):
  _, variables, x, graph, channels = traced
  budget = jp.budget(macs=0.5)
  plan = jp.plan(graph, channels.reduce(variables['params']), budget)
  pruned = {
    name: width - kept
    for name, (width, kept) in plans.widths(graph, plan).items()
  }
  params = variables['params']
  state = soft_channels.init(params, channels, pruned=pruned)
  hard = jax.jit(lambda p, s: soft_channels.harden(p, s, channels))(
    params, state
  )
  found = plans.from_masks(graph, hard.masks)
  assert found == plan  # The same norms and counts.
  closed = {**variables, 'params': soft_channels.pdp(params, hard, channels)}
  jp.check(graph, found, closed, x)
  # Zeros in the rows alone already make the full network the small one.
  small = jp.shrink(graph, found, closed)
  want = jax.jit(jp.specialise(graph, found))(small, x)
  got = jax.jit(graph.fn)(closed, x)
  np.testing.assert_allclose(got, want, 1e-5, 1e-6)
  assert jp.cost.macs(graph, found) <= 0.5 * jp.cost.macs(graph)


@pytest.mark.slow
def test_one_line_of_optax_closes_groups(traced):
  net, variables, x, graph, channels = traced
  tx = optax.chain(
    optax.sgd(0.05),
    jp.soft.training.track_pdp(
      0.5,
      begin=1,
      end=4,
      ramp=lambda step: jnp.minimum(1.0, (step + 1) / 2),
      channels=channels,
      tau=0.0,
      c=0.2,
    ),
  )
  apply = jp.soft.training.with_pdp(
    lambda p, x: net.apply({**variables, 'params': p}, x, train=False),
    channels=channels,
  )

  def step(params, state):
    loss = lambda p: jnp.mean(jnp.square(apply(p, state, x) - 1.0))
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  step, traces = counted(step)
  params, state = variables['params'], tx.init(variables['params'])
  for _ in range(6):
    params, state = step(params, state)
  assert len(traces) == 1
  masks = state[1].masks
  closed = sum(int((~mask).sum()) for mask in masks.values())
  assert closed == 7  # Half of 6 + 8.
  rows = params['conv2']['kernel']
  dead = (rows == 0).all((0, 1, 3))
  name = next(n for n, g in graph.groups.items() if g.size == 6)
  np.testing.assert_array_equal(dead, ~masks[name])
  plan = plans.from_masks(graph, masks)
  jp.check(graph, plan, {**variables, 'params': params}, x)
