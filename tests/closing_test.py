"""All ways to close units and blocks end in the network that a plan makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from marks import slow

from jaxprune import plans, structure, tree
from jaxprune.plans import proof
from jaxprune.soft import channels as soft_channels


def normal(*shape, seed=0):
  key = jax.random.key(seed + 7 * sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def conv(x, w, groups=1):
  return lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )  # fmt: skip


def batch_norm(p, x, train):
  """Normalised by the statistics of the batch, or by those of p."""
  mean, var = p['mean'], p['var']
  if train:
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
  wide = lambda v: v[None, None, None]
  y = (x - wide(mean)) * lax.rsqrt(wide(var) + 1e-3)
  new = {'mean': mean, 'var': var}
  return y * wide(p['scale']) + wide(p['bias']), {**p, **new}


def norm_params(n):
  names = ('scale', 'var', 'mean', 'bias')
  return {k: 1 + jnp.abs(normal(n, seed=i)) for i, k in enumerate(names)}


IMAGE, TOKENS, ROWS = normal(3, 4, 4, 2), normal(2, 5, 4), normal(5, 3)
# name -> (function, params, input).
NETS = {}


def net(x, **params):
  def register(fn):
    NETS[fn.__name__] = (fn, params, x)
    return fn

  return register


@net(ROWS, a=normal(3, 6), bias=1 + normal(6), b=normal(6, 2), out=normal(2))
def mlp(p, x):
  return jax.nn.sigmoid(x @ p['a'] + p['bias'][None]) @ p['b'] + p['out'][None]


@net(IMAGE, a=normal(3, 3, 2, 4), n=norm_params(4), b=normal(3, 3, 4, 2))
def norm_in_evaluation(p, x):
  x, _ = batch_norm(p['n'], conv(x, p['a']), train=False)
  return conv(jax.nn.relu(x), p['b'])


@net(IMAGE, a=normal(3, 3, 2, 4), n=norm_params(4), b=normal(3, 3, 4, 2))
def norm_in_training(p, x):
  x, new = batch_norm(p['n'], conv(x, p['a']), train=True)
  return conv(jax.nn.relu(x), p['b']), {'n': new}


@net(IMAGE, a=normal(3, 3, 2, 4), k=normal(3, 3, 1, 4), n=norm_params(4),
     b=normal(3, 3, 4, 2))  # fmt: skip
def depthwise(p, x):
  x = conv(jax.nn.relu6(conv(x, p['a'])), p['k'], groups=4)
  return conv(batch_norm(p['n'], x, train=False)[0], p['b'])


@net(ROWS, a=normal(3, 6), s=1 + normal(6), t=normal(6), b=normal(6, 2))
def layer_norm(p, x):
  x = x @ p['a'] + 1
  x = x - jnp.mean(x, -1, keepdims=True)
  x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)
  return (x * p['s'][None] + p['t'][None]) @ p['b']


@net(ROWS, a=normal(3, 6), s=1 + normal(6), b=normal(6, 2))
def rms_norm(p, x):
  x = x @ p['a']
  x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)
  return (x * p['s'][None]) @ p['b']


@net(IMAGE, a=normal(3, 3, 2, 6), s=1 + normal(6), b=normal(3, 3, 6, 2))
def group_norm(p, x):
  x = conv(x, p['a']) + 1
  y = x.reshape(*x.shape[:3], 2, 3)
  y = y - jnp.mean(y, (1, 2, 4), keepdims=True)
  y = y * lax.rsqrt(jnp.mean(y * y, (1, 2, 4), keepdims=True) + 1e-3)
  return conv(y.reshape(x.shape) * p['s'][None, None, None], p['b'])


@net(ROWS, a=normal(3, 6), b=normal(6, 2))
def softmax(p, x):
  return jax.nn.softmax(x @ p['a']) @ p['b']


@net(TOKENS, q=normal(4, 4), k=normal(4, 4, seed=1), v=normal(4, 6),
     o=normal(6, 3))  # fmt: skip
def attention(p, x):
  q, k, v = (x @ p[name] for name in 'qkv')
  weights = jax.nn.softmax(jnp.einsum('nih,njh->nij', q, k) * 4**-0.5)
  return jnp.einsum('nij,njh->nih', weights, v) @ p['o']


@net(ROWS, stem=normal(3, 4), a=normal(4, 5), b=normal(5, 4), c=normal(4, 3),
     d=normal(3, 4), head=normal(4, 2))  # fmt: skip
def residual(p, x):
  x = x @ p['stem']
  x = x + jnp.tanh(x @ p['a']) @ p['b']
  x = x + jnp.cos(x @ p['c']) @ p['d']
  return x @ p['head']


@net(TOKENS, w=normal(4, 6), u=normal(6, 6), b=normal(6, 2))
def recurrent(p, x):
  """What the state adds is a block: without it the first state is not read."""
  step = lambda h, x: (jnp.tanh(x @ p['w'] + h @ p['u']), None)
  h, _ = lax.scan(step, jnp.zeros((2, 6)), x.swapaxes(0, 1))
  return h @ p['b']


@net(ROWS, a=normal(3, 6), b=normal(3, 4), c=normal(10, 2))
def mean_over_units(p, x):
  """What sums over units without a kernel: no gate has a place behind it."""
  h = jnp.exp(x @ p['a'])
  both = jnp.concatenate([h, jnp.cos(x @ p['b'])], -1)
  return both @ p['c'] + jnp.mean(h, -1, keepdims=True)


@net(ROWS, a=normal(3, 6), b=normal(6, 2))
def scaled_by_the_width_in_a_kernel(p, x):
  return jnp.tanh(x @ p['a']) @ (p['b'] * 6**-0.5)


SEMANTICS = ('protect', 'keep', 'rescale')


@functools.cache
def planned(name, semantics):
  """A graph, a plan of it, its masks, and what its network returns.

  Every third unit goes, and the last block.
  """
  fn, params, x = NETS[name]
  graph = structure.trace(fn, params, x, reductions=semantics)
  masks = {n: np.arange(g.size) % 3 != 1 for n, g in graph.groups.items()}
  plan = plans.from_masks(graph, masks, list(graph.blocks)[-1:])
  small = jax.jit(plans.specialise(graph, plan))
  return graph, plan, masks, small(plans.shrink(graph, plan, params), x)


def scaled(graph, params, units, plan=None):
  blocks = dict.fromkeys(plan.dropped, 0.0) if plan else {}
  return structure.scale(graph, params, units, blocks)


def gates(graph, plan, masks, params):
  """Gates of 0, folded."""
  units = {name: jnp.float32(mask) for name, mask in masks.items()}
  return scaled(graph, params, units, plan)


def soft(graph, plan, masks, params):
  """Hardened soft channels."""
  channels = soft_channels.Channels(
    graph.reduce, lambda p, units: scaled(graph, p, units)
  )
  params = soft_channels.close(params, masks, channels)
  return scaled(graph, params, {}, plan)


def on_weights(graph, plan, masks, params):
  """Masks of a plan on the params."""
  named = plans.leaf_masks(graph, plan)
  cut = lambda path, w: jnp.where(named[path], w, 0) if path in named else w
  return tree.map_with_path(cut, params)


WAYS = {'gates': gates, 'soft': soft, 'masks': on_weights}


def differ(graph, plan, outs, small):
  """The largest difference; statistics that are handed back are cut."""
  outs = [
    out if path is None else plans.shrink(graph, plan, {path: out})[path]
    for out, path in zip(jax.tree.leaves(outs), graph.outputs_like, strict=True)
  ]
  return max(
    float(jnp.max(jnp.abs(a - b)))
    for a, b in zip(outs, jax.tree.leaves(small), strict=True)
  )


# What reduces over its units, where they are offered; the rest are slow tests.
QUICK = [
  (name, s)
  for name in ('layer_norm', 'rms_norm', 'group_norm', 'softmax')
  for s in ('keep', 'rescale')
]
QUICK += [('norm_in_training', 'protect'), ('residual', 'keep')]
QUICK += [('recurrent', 'protect')]
CASES = [
  (name, s) if (name, s) in QUICK else slow(name, s)
  for name in NETS
  for s in SEMANTICS
]


@pytest.mark.parametrize(('name', 'semantics'), CASES)
def test_a_supernet_and_the_masked_network_end_in_the_small_one(
  name, semantics
):
  _, params, x = NETS[name]
  graph, plan, masks, small = planned(name, semantics)
  open_ = dict.fromkeys(plan.dropped, False)
  outs = jax.jit(plans.supernet(graph))(params, masks, open_, x)
  assert differ(graph, plan, outs, small) <= 1e-5
  outs = jax.jit(plans.masked(graph, plan))(params, x)
  assert differ(graph, plan, outs, small) <= 1e-5


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(('name', 'semantics'), CASES)
def test_closed_params_end_in_the_small_network_or_are_refused(
  name, semantics, way
):
  """By name: no gate where one would not close, no proof of closed params."""
  fn, params, x = NETS[name]
  graph, plan, masks, small = planned(name, semantics)
  if not plan.kept:
    assert not graph.groups
    return
  opened = [
    name for name in masks if name in {*graph.unread, *graph.uncloseable}
  ]
  if opened and way != 'masks':
    pattern = f'group {opened[0]!r}|Group {opened[0]!r} has no gate'
    with pytest.raises(ValueError, match=pattern):
      WAYS[way](graph, plan, masks, params)
    return
  params = WAYS[way](graph, plan, masks, params)
  error = differ(graph, plan, jax.jit(fn)(params, x), small)
  if error > 1e-5:
    assert any(group.reduced for group in graph.groups.values())
    with pytest.raises(proof.CheckError, match='is closed already: values by'):
      proof.check(graph, plan, params, x, gradients=False)


def test_a_gate_behind_a_norm_closes_its_unit_with_the_supernet():
  """Gates of 0.3 and 1.7 act in front of the readers, those of 0 everywhere."""
  _, params, x = NETS['layer_norm']
  for semantics in ('keep', 'rescale'):
    graph, plan, masks, _ = planned('layer_norm', semantics)
    gate = jnp.where(masks['a'], jnp.array([0.3, 1.7] * 3), 0)

    def seen(p, gate, graph=graph):
      p = structure.scale(graph, p, {'a': gate}, closable=False)
      return plans.supernet(graph)(p, {'a': gate > 0}, {}, x)

    folded = structure.scale(graph, params, {'a': gate}, closable=False)
    small = plans.shrink(graph, plan, folded)
    want = jax.jit(plans.specialise(graph, plan))(small, x)
    np.testing.assert_allclose(
      jax.jit(seen)(params, gate), want, rtol=1e-5, atol=1e-5
    )
    slope = jax.grad(lambda g, seen=seen: jnp.sum(seen(params, g)))(gate)
    assert np.count_nonzero(slope) == 4  # Of what is open.


def test_a_check_sees_that_closed_params_are_another_network():
  """It compared both ways to run what is left, and passed."""
  _, params, x = NETS['layer_norm']
  for semantics in ('keep', 'rescale'):
    graph, plan, masks, _ = planned('layer_norm', semantics)
    assert proof.check(graph, plan, params, x).closed is None
    gate = {'a': jnp.float32(masks['a'])}
    folded = structure.scale(graph, params, gate, closable=False)
    with pytest.raises(
      proof.CheckError, match=r"Of group 'a', .*: reduce_sum|a"
    ):
      proof.check(graph, plan, folded, x)


def test_a_check_proves_that_closed_params_are_the_small_network():
  _, params, x = NETS['residual']
  graph, plan, masks, small = planned('residual', 'keep')
  found = proof.check(graph, plan, gates(graph, plan, masks, params), x)
  assert found.closed is not None
  assert found.closed <= 1e-5
  open_outs = jax.jit(graph.fn)(params, x)
  assert differ(graph, plan, open_outs, small) > 0.1


def test_a_block_that_zeros_do_not_close_is_seen():
  """What the branch adds is 1 where its leaves are zero."""

  def fn(p, x):
    return (x + jnp.cos(x @ p['c'])) @ p['head']

  params = {'c': normal(3, 3), 'head': normal(3, 2)}
  graph = structure.trace(fn, params, ROWS)
  (block,) = graph.blocks
  plan = plans.from_kept(graph, {}, dropped=[block])
  with pytest.raises(
    ValueError, match=f'Block {block!r} has no gate'.replace('+', r'\+')
  ):
    scaled(graph, params, {}, plan)
  zeros = {**params, 'c': jnp.zeros((3, 3))}
  with pytest.raises(proof.CheckError, match=r"Block '\+c' stays open: cos at"):
    proof.check(graph, plan, zeros, ROWS)


def test_channels_that_cannot_close_are_refused_before_they_train():
  _, params, _ = NETS['layer_norm']
  graph, *_ = planned('layer_norm', 'keep')
  channels = soft_channels.Channels(
    graph.reduce, lambda p, units: scaled(graph, p, units)
  )
  with pytest.raises(ValueError, match="does not close a unit of group 'a'"):
    soft_channels.init(params, channels, 0.5)
