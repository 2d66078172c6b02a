"""Blocks leave the plan, the pytrees and the program; nothing else changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import cost, plans, structure, tree
from jaxprune.plans import proof
from jaxprune.structure.sizes import padded


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def two_layers(seed):
  return {'up': normal(4, 6, seed=seed), 'down': normal(6, 4, seed=seed)}


PARAMS = {
  'params': {
    'stem': normal(3, 4),
    'block1': two_layers(1),
    'block2': two_layers(2),
    'head': normal(4, 2),
  },
  'batch_stats': {'mean1': jnp.full(6, 0.5), 'mean': jnp.full(4, 0.5)},
}
X = normal(5, 3)


def net(v, x, train=False, blocks=('block1', 'block2')):
  """Two residual blocks, the first with a running mean; written out."""
  p, stats, new = v['params'], v['batch_stats'], {}

  def centred(name, x):
    mean = jnp.mean(x, 0) if train else stats[name]
    new[name] = 0.9 * stats[name] + 0.1 * mean
    return x - mean[None]

  x = jnp.tanh(centred('mean', x @ p['stem']))
  if 'block1' in blocks:
    y = jnp.tanh(centred('mean1', x @ p['block1']['up']))
    x = x + y @ p['block1']['down']
  if 'block2' in blocks:
    y = jnp.sin(x @ p['block2']['up'])
    x = x + y @ p['block2']['down']
  out = x @ p['head']
  return (out, {'batch_stats': new}) if train else out


def step(v, x):
  return net(v, x, True)


GRAPH = structure.trace(net, PARAMS, X)
KEPT = {'block1/up': [0, 2, 3], 'block2/up': [1, 4], 'stem': [0, 1, 3]}
PLAN = plans.from_kept(GRAPH, KEPT, dropped=['block1'])
ONLY = plans.from_kept(GRAPH, {}, dropped=['block1'])


def test_blocks_are_part_of_the_data():
  assert PLAN.kept == (('block2/up', (1, 4)), ('stem', (0, 1, 3)))
  assert PLAN.dropped == ('block1',)
  assert plans.widths(GRAPH, PLAN) == {
    'stem': (4, 3),
    'block1/up': (6, 0),
    'block2/up': (6, 2),
  }
  assert plans.open_blocks(GRAPH, PLAN) == {'block1': 0, 'block2': 1}
  assert len({PLAN, plans.from_kept(GRAPH, KEPT, ['block1']), ONLY}) == 2
  masks = {'stem': np.array([1, 1, 0, 1], bool)}
  by_mask = plans.from_masks(GRAPH, masks, ['block1'], [3])
  by_width = plans.from_widths(
    GRAPH, {'stem': 3}, {'stem': [4, 3, 1, 2]}, ['block1'], (3,)
  )
  assert by_mask == by_width
  assert by_mask.resolution == (3,)


def test_a_block_inside_of_another_goes_with_it():
  def nested(p, x):
    y = x + jnp.tanh(x @ p['in']['up']) @ p['in']['down']
    return (x + jnp.tanh(y @ p['out'])) @ p['head']

  params = {'in': two_layers(0), 'out': normal(4, 4), 'head': normal(4, 2)}
  graph = structure.trace(nested, params, normal(2, 4))
  (outer,) = (name for name, b in graph.blocks.items() if not b.inside)
  (inner,) = (name for name, b in graph.blocks.items() if b.inside)
  assert graph.blocks[inner].inside == (outer,)
  plan = plans.from_kept(graph, {}, dropped=[outer])
  assert set(plan.dropped) == {outer, inner}
  small = plans.shrink(graph, plan, params)
  assert tree.compact(small).keys() == {'head'}
  by_hand = plans.Plan(graph.fingerprint, dropped=(outer,))
  assert plans.open_blocks(graph, by_hand) == {outer: 0, inner: 0}


GOLDEN = """{
 "version": 3,
 "graph": "%s",
 "kept": {
  "block2/up": [1, 4],
  "stem": [0, 1, 3]
 },
 "dropped": ["block1"],
 "resolution": [3],
 "resized": [["head", [2]]]
}"""


def test_json_is_the_same_bytes_on_every_version():
  """The fingerprint too: it was written by Python 3.11 with JAX 0.10."""
  resized = (('head', (2,)),)
  plan = dataclasses.replace(PLAN, resolution=(3,), resized=resized)
  assert plans.to_json(plan) == GOLDEN % 'f62a6ab9abe0d49c'
  assert plans.from_json(plans.to_json(plan)) == plan


def test_the_first_formats_are_still_read():
  text = '{"version": 1, "graph": "c0ffee", "kept": {"a": [0, 2]}}'
  assert plans.from_json(text) == plans.Plan('c0ffee', (('a', (0, 2)),))
  text = """{"version": 2, "graph": "c0ffee", "kept": {}, "dropped": ["b"],
    "resolution": [3]}"""
  assert plans.from_json(text) == plans.Plan('c0ffee', (), ('b',), (3,))


def test_a_difference_is_data_and_reads_well():
  other = plans.from_kept(GRAPH, {'stem': [0, 2]}, ['block2'], (3,))
  found = plans.diff(GRAPH, PLAN, other)
  assert found.groups == {'stem': plans.Change((1, 3), (2,))}
  assert (found.dropped, found.restored) == (('block2',), ('block1',))
  assert str(found) == (
    'stem: -1,3 +2\nblock2: dropped\nblock1: restored\n'
    'resolution: as traced -> 3'
  )
  assert str(plans.diff(GRAPH, PLAN, PLAN)) == 'no difference'


def test_leaves_vanish_and_come_back_as_zeros():
  small = plans.shrink(GRAPH, PLAN, PARAMS)
  assert small['params']['block1'] == {'up': None, 'down': None}
  assert small['batch_stats'] == {'mean1': None, 'mean': approx([0.5] * 3)}
  masks = plans.masks(GRAPH, PLAN, PARAMS)
  assert not masks['params']['block1']['up'].any()
  grown = plans.grow(GRAPH, PLAN, small)
  hidden = jax.tree.map(
    lambda x, m: x if isinstance(m, optax.MaskedNode) else jnp.where(m, x, 0),
    PARAMS,
    masks,
  )
  jax.tree.map(np.testing.assert_array_equal, grown, hidden)
  assert tree.compact(small)['params'].keys() == {'stem', 'block2', 'head'}


def approx(values):
  return pytest.approx(np.array(values))


def test_the_branch_is_gone_from_the_program():
  """No operation of it is left, and no multiply-add."""
  small = plans.shrink(GRAPH, ONLY, PARAMS)
  fn = plans.specialise(GRAPH, ONLY)
  short = lambda v, x: net(v, x, blocks=('block2',))
  full = {**PARAMS, 'batch_stats': {'mean': PARAMS['batch_stats']['mean']}}
  a, b = (
    jax.make_jaxpr(f)(v, X).jaxpr for f, v in ((fn, small), (short, full))
  )
  names = [[eqn.primitive.name for eqn in jaxpr.eqns] for jaxpr in (a, b)]
  for name, count in (('dot_general', 4), ('tanh', 1), ('sin', 1), ('add', 1)):
    assert names[0].count(name) == count
    assert names[1].count(name) >= count
  np.testing.assert_allclose(fn(small, X), short(full, X), rtol=1e-6)
  again = structure.trace(fn, small, X)
  assert cost.macs(again) == cost.macs(GRAPH) - 2 * 5 * 4 * 6


@pytest.mark.parametrize('plan', [PLAN, ONLY], ids=['units too', 'block alone'])
@pytest.mark.parametrize('form', [net, step], ids=['eval', 'train'])
def test_what_is_left_is_the_masked_network(form, plan):
  graph = structure.trace(form, PARAMS, X)
  assert graph.fingerprint == GRAPH.fingerprint
  found = proof.check(graph, plan, PARAMS, X)
  assert max(found.values, found.gradients, found.parameters) < 1e-5
  assert found.mutation > 1e-3
  assert found.removed == sum(
    before - after for before, after in plans.widths(graph, plan).values()
  )
  if form is step:
    out = plans.specialise(graph, plan)(plans.shrink(graph, plan, PARAMS), X)
    assert out[1]['batch_stats']['mean1'] is None


def test_a_block_that_adds_nothing_proves_nothing():
  """Its last kernel is not zero, so that nothing closed it on purpose."""
  silent = {**PARAMS['params']['block1'], 'up': jnp.zeros((4, 6))}
  stats = {**PARAMS['batch_stats'], 'mean1': jnp.zeros(6)}
  dead = {
    'params': {**PARAMS['params'], 'block1': silent},
    'batch_stats': stats,
  }
  with pytest.raises(proof.CheckError, match='The dropped blocks change the o'):
    proof.check(GRAPH, ONLY, dead, X)


def test_a_check_sees_a_branch_that_is_not_closed(monkeypatch):
  """The smaller function forgets to leave the block out of its sum."""
  params = {'up': normal(4, 6), 'down': normal(6, 4), 'head': normal(4, 2)}

  def fn(p, x):
    return (x + jnp.tanh(x @ p['up']) @ p['down']) @ p['head']

  graph = structure.trace(fn, params, normal(5, 4))
  (name,) = graph.blocks
  plan = plans.from_kept(graph, {}, dropped=[name])
  wrong = lambda p, x: 1.01 * (x @ p['head'])
  monkeypatch.setattr(plans, 'specialise', lambda graph, plan: wrong)
  with pytest.raises(proof.CheckError, match='differs from the masked one'):
    proof.check(graph, plan, params, normal(5, 4))


@pytest.mark.slow
def test_the_optimizer_goes_on_warm_after_a_block_is_dropped():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
  params = PARAMS['params']
  stats = {'batch_stats': PARAMS['batch_stats']}
  full = plans.masked(GRAPH, PLAN)
  loss = lambda fn, stats: lambda p: jnp.sum(fn({'params': p, **stats}, X) ** 2)
  masks = plans.masks(GRAPH, PLAN, params)
  keep = lambda p: jax.tree.map(
    lambda x, m: x if isinstance(m, optax.MaskedNode) else jnp.where(m, x, 0),
    p,
    masks,
  )
  params, state = keep(params), tx.init(params)
  for _ in range(2):
    updates, state = tx.update(
      jax.grad(loss(full, stats))(params), state, params
    )
    params = keep(optax.apply_updates(params, updates))
  cut = lambda values: plans.shrink(GRAPH, PLAN, values)
  small, small_state = cut(params), cut(state)
  assert jax.tree.structure(small_state) == jax.tree.structure(tx.init(small))
  fn = plans.specialise(GRAPH, PLAN)
  grads = jax.grad(loss(fn, cut(stats)))(small)
  updates, _ = tx.update(grads, small_state, small)
  want, _ = tx.update(jax.grad(loss(full, stats))(params), state, params)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
  jax.tree.map(close, updates, cut(want))
  back = plans.grow(GRAPH, PLAN, small_state)
  assert jax.tree.structure(back) == jax.tree.structure(state)


@pytest.mark.parametrize('second', [['block2'], []], ids=['block', 'units'])
def test_two_plans_are_one(second):
  small = plans.shrink(GRAPH, PLAN, PARAMS)
  fn = plans.specialise(GRAPH, PLAN)
  graph = structure.trace(fn, small, X)
  after = plans.from_kept(
    graph, {'stem': [0, 2], 'block2/up': [1]}, second, resolution=(3,)
  )
  both = plans.compose(GRAPH, PLAN, graph, after)
  assert both == plans.from_kept(
    GRAPH, {'stem': [0, 3], 'block2/up': [4]}, ['block1', *second], (3,)
  )
  twice = plans.specialise(graph, after)(plans.shrink(graph, after, small), X)
  once = plans.specialise(GRAPH, both)(plans.shrink(GRAPH, both, PARAMS), X)
  np.testing.assert_array_equal(twice, once)


def mean_net(p, x):
  x = jnp.tanh(x @ p['a'])
  return jnp.mean(x, (1, 2)) @ p['b']


MEAN = {'a': normal(3, 4), 'b': normal(4, 2)}
IMAGE = normal(2, 6, 6, 3)
IMAGES = structure.trace(mean_net, MEAN, IMAGE)


def test_a_resolution_is_another_trace_of_the_same_plan():
  plan = plans.from_kept(IMAGES, {'a': [0, 3]}, resolution=(4, 4))
  there = plans.at(IMAGES, plan.resolution)
  assert there.args[0].shape == (2, 4, 4, 3)
  assert plans.at(IMAGES, None) is IMAGES
  assert cost.macs(there) == 2 * 16 * 3 * 4 + 2 * 4 * 2
  small = plans.shrink(IMAGES, plan, MEAN)
  x = IMAGE[:, :4, 1:5]
  want = mean_net({'a': MEAN['a'][:, ::3], 'b': MEAN['b'][::3]}, x)
  np.testing.assert_allclose(
    plans.specialise(IMAGES, plan)(small, x), want, rtol=1e-6
  )


def two(p, x):
  x = jnp.tanh(x @ p['a'])
  return jnp.mean(jnp.tanh(x @ p['b']), (1, 2)) @ p['c']


TWO = {'a': normal(3, 4), 'b': normal(4, 5), 'c': normal(5, 2)}
PARTS = structure.trace(two, TWO, IMAGE)


def test_a_plan_resizes_features_on_the_way():
  plan = plans.from_kept(
    PARTS, {'a': [0, 3]}, resolution=(4, 4), resized=[('b', (2, 3))]
  )
  assert plan.resized == (('b', (2, 3)),)
  small = plans.shrink(PARTS, plan, TWO)
  x = IMAGE[:, :4, 1:5]

  @jax.jit
  def by_hand(x):
    h = padded.bilinear(jnp.tanh(x @ TWO['a'][:, ::3]), (2, 3))
    return jnp.mean(jnp.tanh(h @ TWO['b'][::3]), (1, 2)) @ TWO['c']

  want, call = by_hand(x), jax.jit(plans.specialise(PARTS, plan))
  np.testing.assert_allclose(call(small, x), want, rtol=1e-5)
  masked = jax.jit(plans.masked(PARTS, plan))(TWO, x)
  np.testing.assert_allclose(masked, want, rtol=1e-5)
  # Another batch; and the cost is that of what was built.
  np.testing.assert_allclose(call(small, x[:1]), want[:1], rtol=1e-5)
  built = structure.trace(call, tree.compact(small), x)
  wanted = 2 * (16 * 3 * 2 + 6 * 2 * 5 + 5 * 2)
  assert cost.macs(PARTS, plan) == cost.macs(built) == wanted
  found = proof.check(PARTS, plan, TWO, x, gradients=False)
  assert found.parameters is not None


def test_a_plan_says_what_changes_alone():
  make = lambda resolution, *resized: plans.from_kept(
    PARTS, {}, resolution=resolution, resized=resized
  )
  assert make(None, ('b', (6, 6))).resized == ()
  assert make((4, 4), ('b', (4, 4)), ('c', (6, 6))).resized == (('c', (6, 6)),)
  first, second = make((4, 4)), make((4, 4), ('b', (3, 2)))
  assert str(plans.diff(PARTS, first, second)) == (
    'resized: nowhere -> 3x2 from b'
  )
  graph = structure.trace(plans.specialise(PARTS, first), TWO, IMAGE[:, :4, :4])
  assert plans.compose(PARTS, first, graph, make(None, ('b', (3, 2)))) == second
  graph = structure.trace(
    plans.specialise(PARTS, second), TWO, IMAGE[:, :4, :4]
  )
  with pytest.raises(ValueError, match='where the first has resized features'):
    plans.compose(PARTS, second, graph, first)


FLAT = structure.trace(
  lambda p, x: x.reshape(2, -1) @ p['a'], {'a': normal(108, 2)}, IMAGE
)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: plans.from_kept(GRAPH, {}, dropped=['stem']),
      "no block 'stem' to drop; the blocks are: block1, block2",
    ),
    (
      lambda: plans.from_kept(PARTS, {}, resized=[('b', (0, 4))]),
      r'`resized` must be positive ints, one or more, got \(0, 4\)',
    ),
    (
      lambda: plans.at(PARTS, (4, 4), (('b', (2, 2)), ('c', (3, 3)))),
      r"resolution \(4, 4\), \(2, 2\) from 'b', .* At the cut 'c' no image",
    ),
    (
      lambda: plans.at(PARTS, None, (('z', (2, 2)),)),
      r"name a leaf by its whole path, got 'z': structure\.first_read",
    ),
    (
      lambda: plans.from_kept(GRAPH, {}, resolution=(0, 4)),
      r'must be positive ints, one or more, got \(0, 4\)',
    ),
    (
      lambda: plans.shrink(
        GRAPH, dataclasses.replace(PLAN, dropped=('z',)), PARAMS
      ),
      "no block 'z' to drop",
    ),
    (
      lambda: plans.from_json('{"version": 4, "graph": "x", "kept": {}}'),
      'has format 4, this version of jaxprune reads formats 1 and 2 and 3; i',
    ),
    (
      lambda: plans.from_json(
        '{"version": 2, "graph": "x", "kept": {}, "resolution": "big"}'
      ),
      'The plan is damaged: .*"resolution" a list of ints or null and',
    ),
    (
      lambda: plans.specialise(GRAPH, PLAN)(
        plans.grow(GRAPH, PLAN, plans.shrink(GRAPH, PLAN, PARAMS)), X
      ),
      r"left over: \['batch_stats/mean1', 'params/block1/down'",
    ),
    (
      lambda: plans.grow(GRAPH, PLAN, PARAMS),
      "'batch_stats/mean1' must have nothing of its param",
    ),
    (
      lambda: plans.diff(GRAPH, PLAN, plans.Plan('other')),
      'The plan is of graph other',
    ),
    (
      lambda: plans.compose(GRAPH, PLAN, GRAPH, PLAN),
      r'trace specialise\(graph, first\) with shrunk params',
    ),
    (
      lambda: plans.specialise(
        IMAGES, plans.from_kept(IMAGES, {}, resolution=(4, 4))
      )(MEAN, IMAGE),
      r'first argument of sides \(4, 4\) .* got shape \(2, 6, 6, 3\): resize',
    ),
    (
      lambda: plans.at(FLAT, (4, 4)),
      r'does not run at resolution \(4, 4\): .*keep the resolution of the trac',
    ),
    (
      lambda: plans.at(GRAPH, (4, 4)),
      r'must have a batch and 2 axes of the resolution .* got shape \(5, 3\)',
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
    call()
