"""One compiled function is every plan's masked network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from traces import counted

from jaxprune import plans, structure, tree


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def conv(x, w):
  names = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(x, w, (1, 1), 'SAME', None, None, names)


def layer_norm(x):
  x = x - jnp.mean(x, -1, keepdims=True)
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)


PARAMS = {
  'params': {
    'stem': normal(3, 3, 2, 4),
    'bias': normal(4),
    'block': {
      'up': normal(3, 3, 4, 3),
      'down': normal(3, 3, 3, 4),
      'scale': 1 + normal(3),
    },
    'tokens': {
      'q': normal(4, 4),
      'v': normal(4, 5),
      'out': normal(5, 4),
    },
    'step': normal(4, 4, seed=1),
    'head': normal(4, 2),
  },
  'batch_stats': {'block': {'mean': jnp.zeros(3)}, 'stem': jnp.zeros(4)},
}
X = normal(2, 3, 3, 2)


def net(variables, x):
  """Convolutions, a batch statistic, attention, a loop and reductions."""
  p, stats, new = variables['params'], variables['batch_stats'], {}

  def centred(x, old):
    mean = jnp.mean(x, (0, 1, 2))
    return x - mean[None, None, None], 0.9 * old + 0.1 * mean

  x = conv(x, p['stem']) + p['bias'][None, None, None]
  x, new['stem'] = centred(x, stats['stem'])
  y, mean = centred(
    conv(jax.nn.relu(x), p['block']['up']), stats['block']['mean']
  )
  new['block'] = {'mean': mean}
  y = jax.nn.gelu(y * p['block']['scale'][None, None, None])
  x = x + conv(y, p['block']['down'])
  x = x.reshape(2, 9, 4)
  # The largest of the channels is a reduction that zeros would spoil.
  h = layer_norm(x) / (1 + jax.nn.logsumexp(x, -1, keepdims=True))
  q, v = h @ p['tokens']['q'], h @ p['tokens']['v']
  weights = jax.nn.softmax(jnp.einsum('nih,njh->nij', q, q))
  x = x + jnp.einsum('nij,njh->nih', weights, v) @ p['tokens']['out']
  step = lambda x, _: (jnp.tanh(x @ p['step']), None)
  x, _ = lax.scan(step, x, length=2)
  return jnp.mean(x, 1) @ p['head'], {'batch_stats': new}


GRAPH = structure.trace(net, PARAMS, X, reductions='keep')
BLOCKS = list(GRAPH.blocks)
CALL = plans.supernet(GRAPH)
WEIGHTS = normal(2, 2, seed=5)


@functools.cache
def run():
  def loss(params, units, blocks):
    out, new = CALL(params, units, blocks, X)
    return jnp.vdot(out, WEIGHTS), (out, new)

  return counted(jax.value_and_grad(loss, has_aux=True))


def masks_of(bits):
  """Masks from bits, of which the first unit always stays."""
  rest, masks = list(bits), {}
  for name, group in GRAPH.groups.items():
    own, rest = rest[: group.size - 1], rest[group.size - 1 :]
    masks[name] = np.array([True, *own])
  return masks


BITS = sum(group.size - 1 for group in GRAPH.groups.values())


@settings(deadline=None, max_examples=3)
@given(
  st.lists(st.booleans(), min_size=BITS, max_size=BITS),
  st.lists(st.booleans(), min_size=2, max_size=2),
)
def test_a_choice_computes_what_the_masked_network_of_its_plan_does(
  bits, is_open
):
  masks = masks_of(bits)
  switches = dict(zip(BLOCKS, is_open, strict=True))
  dropped = [name for name, stays in switches.items() if not stays]
  plan = plans.from_masks(GRAPH, masks, dropped)
  call, traces = run()
  (_, (out, new)), grads = call(PARAMS, masks, switches)

  def loss(params):
    out, new = plans.masked(GRAPH, plan)(params, X)
    return jnp.vdot(out, WEIGHTS), (out, new)

  (_, (want, stats)), slopes = jax.value_and_grad(loss, has_aux=True)(PARAMS)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
  cut = lambda values: jax.tree.leaves(plans.shrink(GRAPH, plan, values))
  for a, b in zip(cut(grads), cut(slopes), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  for path, mask in plans.leaf_masks(GRAPH, plan).items():
    # Nothing reaches what is closed.
    grad = tree.leaves(grads)[path]
    np.testing.assert_allclose(np.where(mask, 0, grad), 0, atol=1e-6)
  for a, b in zip(cut(new), cut(stats), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert len(traces) == 1
  frozen = plans.leaf_masks(GRAPH, plan)
  for path, x in tree.leaves(new).items():
    old = tree.leaves(PARAMS)[path]
    hidden = ~frozen.get(path, np.ones(x.shape, bool))
    np.testing.assert_array_equal(np.asarray(x)[hidden], old[hidden])


def test_all_open_is_the_network():
  assert BLOCKS == ['block', 'tokens']
  (_, (out, new)), _ = run()[0](
    PARAMS, masks_of([True] * BITS), dict.fromkeys(BLOCKS, True)
  )
  want = net(PARAMS, X)
  np.testing.assert_allclose(out, want[0], rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    new,
    want[1],
  )


def test_weights_stay_one_under_vmap():
  """No convolution of many choices has groups, and one program serves all."""
  units = {n: jnp.ones((3, g.size), bool) for n, g in GRAPH.groups.items()}
  units['stem'] = jnp.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
  blocks = {name: jnp.array([True, False, True]) for name in BLOCKS}
  many = jax.vmap(CALL, (None, 0, 0, None))
  text = str(jax.make_jaxpr(many)(PARAMS, units, blocks, X))
  assert text.count('conv_general_dilated[') == 3
  assert text.count('feature_group_count=1\n') == 3
  out, _ = jax.jit(many)(PARAMS, units, blocks, X)
  for k in range(3):
    choice = jax.tree.map(lambda x, k=k: x[k], (units, blocks))
    (_, (one, _)), _ = run()[0](PARAMS, *choice)
    np.testing.assert_allclose(out[k], one, rtol=1e-4, atol=1e-5)


def test_the_numbers_that_follow_from_widths_follow_the_masks():
  """A mean over what is left divides by what is left, if so traced."""
  params = {'a': normal(3, 4), 'b': normal(4, 2)}
  fn = lambda p, x: layer_norm(x @ p['a']) @ p['b']
  x = normal(5, 3)
  graph = structure.trace(fn, params, x, reductions='rescale')
  mask = np.array([True, False, True, True])
  plan = plans.from_masks(graph, {'a': mask})
  want = plans.specialise(graph, plan)(plans.shrink(graph, plan, params), x)
  call = jax.jit(plans.supernet(graph))
  np.testing.assert_allclose(
    call(params, {'a': mask}, {}, x), want, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('form', ['specialise', 'masked', 'supernet'])
def test_devices_of_a_shard_map_share_a_batch(form):
  """Params are the same on all of them, images and constants are not."""
  params = {'a': normal(3, 4), 'b': normal(4, 2)}
  scale = np.linspace(0, 1, 4, dtype=np.float32)

  def fn(p, x):
    h = jax.nn.softmax(jax.nn.relu(x @ p['a']) * scale[None], axis=0)
    return lax.scan(lambda h, _: (jnp.sin(h), None), h, length=2)[0] @ p['b']

  x, mask = normal(8, 3), np.array([True, True, False, True])
  graph = structure.trace(fn, params, x[:4])
  plan = plans.from_masks(graph, {'a': mask})
  small = plans.shrink(graph, plan, params) if form == 'specialise' else params
  call = {
    'specialise': plans.specialise(graph, plan),
    'masked': plans.masked(graph, plan),
    'supernet': lambda p, x: plans.supernet(graph)(p, {'a': mask}, {}, x),
  }[form]
  loss = lambda p, x: jnp.sum(call(p, x) ** 2)
  mesh = jax.make_mesh(
    (2,), ('devices',), devices=jax.devices()[:2],
    axis_types=(jax.sharding.AxisType.Auto,),
  )  # fmt: skip
  shared = jax.shard_map(
    jax.grad(loss), mesh=mesh, in_specs=(P(), P('devices')), out_specs=P()
  )
  wanted = jax.grad(lambda p: loss(p, x[:4]) + loss(p, x[4:]))(small)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.jit(shared)(small, x),
    wanted,
  )


@pytest.mark.parametrize(
  ('units', 'blocks', 'message'),
  [
    ({'z': True}, {}, "no group 'z'; the groups are: stem"),
    ({}, {'z': True}, "no block 'z'; the blocks are: block, tokens"),
    (
      {'stem': np.ones(3, bool)},
      {},
      r"mask of group 'stem' must be bool of shape \(4,\), got bool of shape",
    ),
    (
      {'stem': np.ones(4, np.float32)},
      {},
      r"mask of group 'stem' must be bool of shape \(4,\), got float32",
    ),
    (
      {},
      {'block': np.ones(2, bool)},
      r"switch of block 'block' must be bool of shape \(\)",
    ),
  ],
)
def test_bad_choices_are_named(units, blocks, message):
  with pytest.raises(ValueError, match=message):
    CALL(PARAMS, units, blocks, X)


def test_a_step_with_its_optimizer_is_refused():
  def step(p, state, x):
    grad = jax.grad(lambda p: jnp.sum((x @ p['a']) ** 2))(p)['a']
    momentum = 0.9 * state['a'] + grad
    return {'a': p['a'] - 0.1 * momentum}, {'a': momentum}

  params = {'a': normal(3, 4)}
  follow = {'0/.*': True}  # A momentum that no name tells from a teacher.
  graph = structure.trace(step, params, params, normal(5, 3), follow=follow)
  with pytest.raises(ValueError, match="one like 'a': trace the network alone"):
    plans.supernet(graph)
