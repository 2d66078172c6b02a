"""The contract: every transformation through every wrapper and pytree.

A transformation is good if, whatever is around it, the pruned weights are
exactly zero after each step, in the number asked for, in one compilation.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow
from traces import counted

from jaxprune import distributions, masks, schedules, scores, transforms
from jaxprune.soft import reparam
from jaxprune.transforms import dynamic

STEPS = 4
RAMP = schedules.cubic(0.75, begin=0, end=2)
KEY = jax.random.key(0)


def mask_of(params):
  return masks.top(scores.magnitude(params), 0.75)


# name -> (link, or None) and the fraction of zeros of each kernel at the end.
LINKS = {
  'gradual': lambda: transforms.sparsify(scores.magnitude, RAMP),
  'erk': lambda: transforms.sparsify(
    scores.magnitude, RAMP, distribution=distributions.erk
  ),
  'global': lambda: transforms.sparsify(
    scores.magnitude, RAMP, distribution=distributions.global_
  ),
  'n_by_m': lambda: transforms.sparsify(
    scores.magnitude, granularity=masks.groups(1, 4)
  ),
  'channels': lambda: transforms.sparsify(
    scores.magnitude, 0.75, granularity=masks.channels()
  ),
  'packed': lambda: transforms.sparsify(scores.magnitude, RAMP, packed=True),
  'soft': lambda: transforms.soft_shrinkage(scores.magnitude, 0.75, end=2),
  'soft_packed': lambda: transforms.soft_shrinkage(
    scores.magnitude, 0.75, end=2, packed=True
  ),
  'keep': transforms.keep_sparse,
  'keep_packed': lambda: transforms.keep_sparse(packed=True),
}


def network(dtype=jnp.float32):
  keys = jax.random.split(KEY, 2)
  return {
    'a': {
      'kernel': jax.random.normal(keys[0], (8, 16), dtype),
      'bias': jnp.ones(16, dtype),
    },
    'b': {'kernel': jax.random.normal(keys[1], (16, 8), dtype)},
  }


def chained(link, optimizer=None):
  return optax.chain(optimizer or optax.adam(1e-2), link)


WRAPPERS = {
  'adam': chained,
  'adamw': lambda link: chained(link, optax.adamw(1e-2, weight_decay=0.1)),
  'momentum': lambda link: chained(link, optax.sgd(1e-2, momentum=0.9)),
  'lion': lambda link: chained(link, optax.lion(1e-2)),
  'clipped': lambda link: optax.chain(
    optax.clip_by_global_norm(0.1), chained(link)
  ),
  'multi_steps': lambda link: optax.MultiSteps(chained(link), 1),
  'inject': lambda link: optax.inject_hyperparams(
    lambda learning_rate: chained(link, optax.adam(learning_rate))
  )(learning_rate=1e-2),
  'if_finite': lambda link: optax.apply_if_finite(chained(link), 3),
  'partition': lambda link: optax.partition(
    {'x': chained(link), 'y': optax.adam(1e-2)},
    {'a': {'kernel': 'x', 'bias': 'y'}, 'b': {'kernel': 'x'}},
  ),
  'masked': lambda link: optax.chain(
    optax.adam(1e-2),
    optax.masked(link, {'a': {'kernel': True, 'bias': False}, 'b': True}),
  ),
  'named': lambda link: optax.named_chain(
    ('adam', optax.adam(1e-2)), ('prune', link)
  ),
  'schedule_free': lambda link: chained(
    link, optax.contrib.schedule_free_adamw(1e-2)
  ),
  'moments': lambda link: transforms.mask_moments(chained(link)),
}


def zeros(params):
  leaves = [np.asarray(w, np.float32) for w in jax.tree.leaves(params)]
  return [int((w == 0).sum()) for w in leaves if w.size == 128]


def start(name, params):
  """``keep_sparse`` starts from params that are sparse."""
  kept = name.startswith('keep')
  return masks.apply(mask_of(params), params) if kept else params


def train(tx, params, steps=STEPS, compiles=1):
  def step(params, state):
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step, traces = counted(step)
  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  assert len(traces) <= compiles
  return params, state


@pytest.mark.parametrize(
  'wrapper',
  [
    slow(name) if name in ('momentum', 'lion', 'clipped', 'named') else name
    for name in WRAPPERS
  ],
)
def test_wrapper_keeps_exact_zeros(wrapper):
  params, state = train(WRAPPERS[wrapper](LINKS['gradual']()), network())
  assert zeros(params) == [96, 96]
  assert float(optax.tree.get(state, 'mask_sparsity')) == 0.75


@pytest.mark.parametrize(
  'link',
  [n if n in ('global', 'packed', 'n_by_m') else slow(n) for n in LINKS],
)
@pytest.mark.parametrize('wrapper', ['multi_steps'])
def test_link_through_wrapper(link, wrapper):
  params, _ = train(WRAPPERS[wrapper](LINKS[link]()), start(link, network()))
  assert sum(zeros(params)) == 192
  if link not in ('global', 'erk'):
    assert zeros(params) == [96, 96]


@pytest.mark.slow
@pytest.mark.parametrize('link', [name for name in LINKS if name != 'gradual'])
@pytest.mark.parametrize('wrapper', [w for w in WRAPPERS if w != 'multi_steps'])
def test_every_link_through_every_wrapper(link, wrapper):
  params, _ = train(WRAPPERS[wrapper](LINKS[link]()), start(link, network()))
  assert sum(zeros(params)) == 192


# A wrapper around an optimizer, in the place of a link of its chain.
MOVERS = {
  'rigl': lambda tx: dynamic.rigl(tx, 0.75, KEY, end=9, every=2),
  'set': lambda tx: dynamic.set_(tx, 0.75, KEY, end=9, every=2),
  'rigl_packed': lambda tx: dynamic.rigl(
    tx, 0.75, KEY, end=9, every=2, packed=True
  ),
}
AROUND = {
  'multi_steps': lambda move: optax.MultiSteps(move(optax.adam(1e-2)), 1),
  'inject': lambda move: optax.inject_hyperparams(
    lambda learning_rate: move(optax.adam(learning_rate))
  )(learning_rate=1e-2),
  'if_finite': lambda move: optax.apply_if_finite(move(optax.adam(1e-2)), 3),
  'named': lambda move: optax.named_chain(('all', move(optax.lion(1e-2)))),
  'partition': lambda move: optax.partition(
    {'x': move(optax.adamw(1e-2)), 'y': optax.adam(1e-2)},
    {'a': {'kernel': 'x', 'bias': 'y'}, 'b': {'kernel': 'x'}},
  ),
  'schedule_free': lambda move: move(optax.contrib.schedule_free_adamw(1e-2)),
  'moments': lambda move: transforms.mask_moments(move(optax.adam(1e-2))),
}


@pytest.mark.parametrize(
  ('mover', 'wrapper'),
  [
    ('rigl', 'multi_steps'),
    ('rigl', 'partition'),
    ('rigl', 'schedule_free'),
    ('set', 'inject'),
    ('rigl_packed', 'moments'),
    *(slow('rigl', w) for w in ('inject', 'if_finite', 'named', 'moments')),
    slow('rigl_packed', 'multi_steps'),
  ],
)
def test_moving_masks_through_every_wrapper(mover, wrapper):
  params, state = train(AROUND[wrapper](MOVERS[mover]), network())
  assert sum(zeros(params)) >= 192  # What has just grown is zero too.
  kept = masks.unpacked(optax.tree.get(state, 'masks'), params)
  assert sum(k for k, _ in masks.count(kept).values()) == 64
  transforms.check_sparse(params, kept)


def test_members_that_draw_together_draw_only_when_it_is_due():
  link = LINKS['gradual']()
  axes = transforms.SparsifyState(step=None, mask_sparsity=None, masks=0)
  many = jax.tree.map(lambda w: jnp.stack([w, -w]), network())
  update = lambda u, state, w: link.update(u, state, w)
  together = jax.vmap(update, (0, axes, 0), (0, axes))
  state = jax.vmap(link.init, out_axes=axes)(many)
  assert ' cond[' in str(jax.make_jaxpr(together)(many, state, many))
  apart = jax.make_jaxpr(jax.vmap(update))
  assert ' cond[' not in str(apart(many, jax.vmap(link.init)(many), many))
  step = jax.jit(together)
  for _ in range(STEPS):
    updates, state = step(many, state, many)
    many = optax.apply_updates(many, updates)
  for i in range(2):
    assert zeros(jax.tree.map(lambda w, i=i: w[i], many)) == [96, 96]
  assert state.step.shape == ()


@pytest.mark.parametrize(
  'link', ['gradual', 'packed', slow('n_by_m'), slow('soft')]
)
def test_scan_equals_a_loop(link):
  tx = chained(LINKS[link]())
  first = start(link, network())

  def step(carry, _):
    params, state = carry
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = (first, tx.init(first))
  (params, _), _ = jax.lax.scan(step, carry, length=STEPS)
  looped, _ = train(tx, first)
  assert zeros(params) == zeros(looped)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), params, looped
  )


@pytest.mark.parametrize(
  ('link', 'dtype'),
  [
    ('gradual', jnp.float16),
    ('gradual', jnp.bfloat16),
    ('n_by_m', jnp.bfloat16),
    *(slow(link, jnp.bfloat16) for link in list(LINKS)[1:] if link != 'n_by_m'),
  ],
)
def test_half_precision_params(link, dtype):
  tx = chained(LINKS[link](), optax.sgd(1e-2, momentum=0.9))
  params, _ = train(tx, start(link, network(dtype)))
  assert all(w.dtype == dtype for w in jax.tree.leaves(params))
  assert sum(zeros(params)) == 192


def test_zeros_of_float32_masters_are_exact_after_the_cast():
  params, _ = train(chained(LINKS['gradual']()), network())
  low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  assert zeros(low) == zeros(params) == [96, 96]


NARROW = {
  'multi_steps': lambda link: optax.MultiSteps(chained(link), 1),
  'sgd': lambda link: chained(link, optax.sgd(1e-2)),
  'momentum': WRAPPERS['momentum'],
  'moments': WRAPPERS['moments'],
  'rigl': lambda _: MOVERS['rigl'](optax.sgd(1e-2)),
}


@pytest.mark.parametrize('narrow', [False, True])
@pytest.mark.parametrize(
  ('wrapper', 'link'),
  [
    ('sgd', 'gradual'),
    ('rigl', 'gradual'),
    *(slow('sgd', link) for link in list(LINKS)[1:]),
    *(slow(w, 'gradual') for w in ('multi_steps', 'momentum', 'moments')),
  ],
)
def test_bfloat16_compute_with_float32_masters(wrapper, link, narrow):
  low = lambda params: jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

  def loss(params):
    params = params if narrow else low(params)
    return sum(jnp.sum(w**2) / 20 for w in jax.tree.leaves(params))

  tx = NARROW[wrapper](LINKS[link]())

  @jax.jit
  def step(params, state):
    grads = jax.grad(loss)(low(params) if narrow else params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = start(link, network())
  state = tx.init(params)
  for _ in range(STEPS):
    params, state = step(params, state)
  assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(params))
  assert sum(zeros(params)) >= 192
  transforms.check_sparse(params, optax.tree.get(state, 'masks'))


@pytest.mark.parametrize(
  'link',
  [
    link if link in ('gradual', 'global', 'packed') else slow(link)
    for link in LINKS
  ],
)
def test_ensemble_under_vmap(link):
  tx = chained(LINKS[link]())
  many = jax.tree.map(
    lambda w: w[None] * jax.random.normal(KEY, (3, *w.shape)), network()
  )
  if link.startswith('keep'):
    many = jax.vmap(functools.partial(start, link))(many)

  def member(params):
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(params, state, params)
      params = optax.apply_updates(params, updates)
    return params

  params = jax.jit(jax.vmap(member))(many)
  for i in range(3):
    assert sum(zeros(jax.tree.map(lambda w, i=i: w[i], params))) == 192
  own = params['a']['kernel'] != 0
  assert (own[0] != own[1]).any()


def test_pmap_gives_each_device_the_same():
  tx = chained(LINKS['gradual']())
  params = network()
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 4), tree)

  def step(params, state, scale):
    grads = jax.tree.map(lambda w: w * scale, params)
    grads = jax.lax.pmean(grads, 'batch')
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.pmap(step, axis_name='batch')
  many, state = stack(params), stack(tx.init(params))
  for _ in range(STEPS):
    many, state = step(many, state, jnp.arange(4.0))
  for i in range(4):
    assert zeros(jax.tree.map(lambda w, i=i: w[i], many)) == [96, 96]


PLACED = {
  **LINKS,
  'lamp': lambda: transforms.sparsify(
    scores.magnitude, RAMP, distribution=distributions.lamp
  ),
  'lamp_scores': lambda: transforms.sparsify(
    scores.lamp, RAMP, distribution=distributions.global_
  ),
  'random': lambda: transforms.sparsify(
    functools.partial(scores.random, KEY), RAMP
  ),
  'fpgm': lambda: transforms.sparsify(
    scores.fpgm, 0.5, granularity=masks.channels()
  ),
  'inputs': lambda: transforms.sparsify(
    scores.magnitude, RAMP, granularity=masks.channels(-2)
  ),
  'ragged': lambda: transforms.sparsify(
    scores.magnitude, RAMP, granularity=masks.blocks({0: 3, 1: 5})
  ),
  'regrown': lambda: transforms.sparsify(
    scores.magnitude, RAMP, granularity=masks.blocks({1: 3}), regrow=True
  ),
  'wide_groups': lambda: transforms.sparsify(
    scores.magnitude, granularity=masks.groups(2, 8)
  ),
}


AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
QUICK = [
  *itertools.product(('global', 'n_by_m'), AXIS_TYPES),
  ('packed', AxisType.Explicit),
]
CASES = itertools.product((*PLACED, *MOVERS), AXIS_TYPES)


@pytest.mark.parametrize(
  ('link', 'axis_type'),
  [case if case in QUICK else slow(*case) for case in CASES],
)
def test_named_sharding_gives_the_masks_of_one_device(link, axis_type):
  if link in MOVERS:
    tx = MOVERS[link](optax.adam(1e-2))
  else:
    tx = chained(PLACED[link]())
  first = start(link, network())
  alone, there = train(tx, first)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  spec = lambda w: P('x', 'y') if w.ndim == 2 else P()
  place = lambda w: jax.device_put(w, NamedSharding(mesh, spec(w)))
  with jax.set_mesh(mesh):
    # On an explicit mesh optax's own step counter changes its placement once.
    params, here = train(tx, jax.tree.map(place, first), compiles=2)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), params, alone
  )
  drawn = [optax.tree.get(state, 'masks') for state in (here, there)]
  jax.tree.map(np.testing.assert_array_equal, *drawn)
  assert params['a']['kernel'].sharding.spec == P('x', 'y')


class Pair(NamedTuple):
  kernel: jax.Array
  bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """As an Equinox module: arrays by attribute, None for what is not there."""

  weight: jax.Array
  bias: jax.Array | None
  size: int = dataclasses.field(metadata={'static': True}, default=8)


class Net(nnx.Module):
  def __init__(self):
    self.a = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    self.b = nnx.Linear(16, 8, rngs=nnx.Rngs(1))


def pytrees():
  a, b = network()['a']['kernel'], network()['b']['kernel']
  return {
    'tuple': (Pair(a, jnp.ones(16)), Pair(b, None)),
    'list': [[a, None], [b]],
    'haiku': {'net/~/linear': {'w': a, 'b': jnp.ones(16)}, 'out': {'w': b}},
    'equinox': [Layer(a.T, jnp.ones((16, 1, 1))), Layer(b.T, None)],
    'nnx': nnx.split(Net(), nnx.Param)[1],
    'oihw': {'conv': {'weight': a.reshape(16, 8, 1, 1)}, 'head': {'weight': b}},
  }


@pytest.mark.parametrize(
  'tree', [t if t in ('tuple', 'nnx') else slow(t) for t in pytrees()]
)
def test_any_pytree(tree):
  first = pytrees()[tree]
  params, state = train(chained(LINKS['gradual']()), first)
  assert jax.tree.structure(params) == jax.tree.structure(first)
  assert zeros(params) == [96, 96]
  tx = dynamic.rigl(optax.adam(1e-2), 0.75, KEY, end=9, every=1)
  params, state = train(tx, first)
  assert sum(zeros(params)) >= 192  # What has just grown is zero too.
  transforms.check_sparse(params, state.masks)


def test_tied_leaves_have_one_mask():
  shared = network()['a']['kernel']
  params, state = train(chained(LINKS['gradual']()), {'e': shared, 'd': shared})
  masks = optax.tree.get(state, 'masks')
  np.testing.assert_array_equal(masks['e'], masks['d'])
  np.testing.assert_array_equal(params['e'] != 0, masks['d'])
  np.testing.assert_allclose(params['e'], params['d'], rtol=1e-6)
  assert zeros(params) == [96, 96]


def test_schedule_free_params_are_sparse_once_masked():
  params, state = train(
    WRAPPERS['schedule_free'](LINKS['gradual']()), network()
  )
  average = optax.contrib.schedule_free_eval_params(state[0], params)
  held = optax.tree.get(state, 'masks')
  assert zeros(masks.apply(held, average)) == zeros(params) == [96, 96]


def test_lookahead_works_inside_the_chain():
  tx = optax.chain(
    optax.lookahead(optax.adam(1e-2), 2, 0.5), LINKS['gradual']()
  )
  params, state = optax.LookaheadParams.init_synced(network()), None
  state = tx.init(params)
  for _ in range(STEPS):
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, params.fast)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert zeros(params.fast) == zeros(params.slow) == [96, 96]


def test_lookahead_around_the_chain_does_not_and_is_found():
  tx = optax.lookahead(chained(LINKS['gradual']()), 2, 0.5)
  params = optax.LookaheadParams.init_synced(network())
  state = tx.init(params)
  for _ in range(STEPS):
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, params.fast)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
  with pytest.raises(
    ValueError, match='lookahead around it writes its slow copy'
  ):
    transforms.check_sparse(params.slow, state)


def test_multi_steps_around_a_chain_counts_real_steps():
  tx = optax.MultiSteps(chained(LINKS['gradual']()), 3)
  _, state = train(tx, network(), 6)
  assert int(optax.tree.get(state, 'gradient_step')) == 2
  inner = [
    s
    for s in jax.tree.leaves(
      state, is_leaf=lambda s: isinstance(s, transforms.SparsifyState)
    )
    if isinstance(s, transforms.SparsifyState)
  ]
  assert int(inner[0].step) == 2


def test_if_finite_outside_skips_a_nan_whole():
  tx = optax.apply_if_finite(chained(LINKS['gradual']()), 5)
  params = network()
  state = tx.init(params)
  bad = jax.tree.map(lambda w: w * jnp.nan, params)
  updates, after = tx.update(bad, state, params)
  assert not any(jnp.isnan(u).any() for u in jax.tree.leaves(updates))
  before = optax.tree.get(state, 'masks')['a']['kernel']
  assert (optax.tree.get(after, 'masks')['a']['kernel'] == before).all()


def test_the_sparsity_may_be_injected():
  def make(sparsity):
    return chained(transforms.sparsify(scores.magnitude, sparsity))

  tx = optax.inject_hyperparams(make)(sparsity=0.5)
  params, state = train(tx, network(), 1)
  assert zeros(params) == [64, 64]
  state = optax.tree.set(state, sparsity=jnp.float32(0.75))
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(grads, state, params)
  assert zeros(optax.apply_updates(params, updates)) == [96, 96]


def test_params_like_state_maps():
  tx = chained(LINKS['gradual']())
  params, state = train(tx, network())
  doubled = optax.tree.map_params(
    tx, lambda x: 2 * x if x.dtype == jnp.float32 else x, state
  )
  mu = lambda s: optax.tree.get(s, 'mu')['b']['kernel']
  np.testing.assert_array_equal(mu(doubled), 2 * mu(state))
  del params


def test_straight_through_trains_what_is_masked():
  params = network()
  tree = mask_of(params)
  loss = lambda p: sum(
    jnp.sum(w) for w in jax.tree.leaves(reparam.straight_through(p, tree))
  )
  grads = jax.grad(loss)(params)
  assert all((g == 1).all() for g in jax.tree.leaves(grads))
  assert zeros(reparam.straight_through(params, tree)) == [96, 96]


def test_state_restores_from_plain_leaves():
  tx = chained(LINKS['gradual']())
  params, state = train(tx, network(), 2)
  leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
  restored = jax.tree.unflatten(jax.tree.structure(state), leaves)
  step = lambda s: tx.update(params, s, params)[0]
  jax.tree.map(np.testing.assert_array_equal, step(restored), step(state))
