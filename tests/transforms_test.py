"""Tests of the transformations that prune, one at a time."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow
from traces import counted

from jaxprune import distributions, masks, schedules, scores, transforms


def weights(seed=0):
  """Returns params of a small network, with leaves that stay dense."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'conv': {
      'kernel': jax.random.normal(keys[0], (3, 3, 4, 8)),
      'bias': jnp.ones(8),
    },
    'head': {'kernel': jax.random.normal(keys[1], (16, 10))},
  }


def run(tx, params, steps, **extra):
  """Trains on a quadratic; returns params, state and zeros after each step."""

  def step(params, state):
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, params)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  step, traces = counted(step)
  state, zeros = tx.init(params), []
  for _ in range(steps):
    params, state = step(params, state)
    flat = jax.tree.leaves(params)
    zeros.append([int(jnp.sum(w == 0)) for w in flat])
  assert len(traces) == 1
  return params, state, np.array(zeros)


@pytest.mark.parametrize(
  ('regrow', 'expected'),
  [
    (False, [0.0, -4.0, 0.0, 0.5]),  # Ranked by |w| = 1, 4, 2, 3.
    (True, [6.0, -4.0, 0.0, 0.0]),  # Ranked by |w + u| = 6, 4, 2, 0.5.
  ],
)
def test_by_hand(regrow, expected):
  tx = transforms.sparsify(lambda w: jnp.abs(w), 0.5, regrow=regrow)
  w = jnp.array([1.0, -4.0, 2.0, 3.0])
  u = jnp.array([5.0, 0.0, 0.0, -2.5])
  out, state = tx.update(u, tx.init(w), w)
  assert optax.apply_updates(w, out).tolist() == expected
  assert state.masks.tolist() == [x != 0 for x in expected]
  assert (int(state.step), float(state.mask_sparsity)) == (1, 0.5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  'link',
  [
    transforms.sparsify(jnp.abs, 2 / 3),
    transforms.soft_shrinkage(jnp.abs, 2 / 3, end=0),
  ],
)
def test_zeros_are_exact_under_narrower_updates(link, dtype):
  w = jnp.array([1.2345678, 2.3456789, 9.0])
  u, _ = link.update(jnp.zeros(3, dtype), link.init(w), w)
  assert optax.apply_updates(w, u).tolist() == [0, 0, 9]


@pytest.mark.parametrize('every', [1, 3, 4, 7])
def test_zeros_follow_the_schedule_and_reach_the_target(every):
  schedule = schedules.cubic(0.8, begin=2, end=10)
  tx = optax.chain(
    optax.adam(1e-2),
    transforms.sparsify(scores.magnitude, schedule, every=every),
  )
  _, state, zeros = run(tx, weights(), 13)
  for step, (_, conv, head) in enumerate(zeros):
    drawn = step if step >= 10 else step - step % every
    s = 0.8 if drawn >= 10 else float(schedule(drawn))
    kept = distributions.uniform({'conv': (288,), 'head': (160,)}, s)
    assert (288 - conv, 160 - head) == tuple(kept.values()), (step, every)
  assert (zeros[:, 0] == 0).all()
  assert float(optax.tree.get(state, 'mask_sparsity')) == np.float32(0.8)


def test_masks_rest_with_the_schedule():
  tx = transforms.sparsify(lambda w: jnp.abs(w), 0.5)
  w = jnp.array([1.0, 2.0])
  _, state = tx.update(jnp.zeros(2), tx.init(w), w)
  out, state = tx.update(jnp.array([9.0, 0.0]), state, w)
  assert state.masks.tolist() == [False, True]
  assert out.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
  'distribution',
  [
    distributions.erk,
    distributions.global_,
    distributions.normalised,
    distributions.lamp,
    distributions.by_macs({'conv/kernel': 9.0, 'head/kernel': 1.0}),
  ],
)
def test_budgets_are_met_on_every_step(distribution):
  schedule = schedules.cubic(0.9, begin=0, end=5)
  tx = transforms.sparsify(
    scores.magnitude, schedule, distribution=distribution
  )
  _, _, zeros = run(tx, weights(), 7)
  got = zeros[:, 1] + zeros[:, 2]
  exact = [round(float(schedule(step)) * 448) for step in range(7)]
  assert got[5:].tolist() == [round(0.9 * 448)] * 2
  np.testing.assert_allclose(got, exact, atol=1)


@pytest.mark.parametrize('every', [slow(1), 5])
@pytest.mark.parametrize(
  'schedule',
  [
    schedules.constant(0.7, begin=2),
    schedules.polynomial(0.7, begin=1, end=8, power=1),
    schedules.cubic(0.7, begin=1, end=8, initial=0.2),
    schedules.cosine(0.7, begin=1, end=8),
    schedules.iterative(0.7, begin=1, end=8, rounds=3),
    schedules.prune_then_regrow(0.9, 0.7, begin=0, turn=4, end=8),
    schedules.warm_restarts(0.7, begin=1, end=8, cycles=2),
  ],
)
def test_every_schedule_ends_at_its_target_whatever_the_period(schedule, every):
  tx = transforms.sparsify(jnp.abs, schedule, every=every, regrow=True)
  w = jax.random.normal(jax.random.key(0), (23,))
  _, _, zeros = run(tx, w, 9)
  assert zeros[-1].tolist() == [16]


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=8)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=2, max_size=2
  ),
  st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
  st.sampled_from([0, 1, 9]),
  st.floats(0, 1),
)
def test_zeros_are_as_many_as_asked(shapes, dtype, ties, sparsity):
  draw = lambda i, shape: jnp.round(
    ties * jax.random.normal(jax.random.key(i), shape)
  ).astype(dtype)
  params = {f'{i}/kernel': draw(i, shape) for i, shape in enumerate(shapes)}
  tx = transforms.sparsify(scores.magnitude, sparsity)
  _, state = tx.update(params, tx.init(params), params)
  kept = sum(k for k, _ in masks.count(state.masks).values())
  assert kept == masks.kept(sum(a * b for a, b in shapes), sparsity)


@pytest.mark.parametrize(
  ('regrow', 'ruled'),
  [(False, True), *(slow(True, x) for x in (False, True)), slow(False, False)],
)
def test_many_small_leaves_meet_the_whole_budget(regrow, ruled):
  keys = jax.random.split(jax.random.key(0), 20)
  shapes = [(3, 1 + i % 5) for i in range(20)]
  params = {
    f'{"ab"[i % 2]}{i}': {'kernel': jax.random.normal(key, shape)}
    for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
  }
  ramp = schedules.cubic(0.7, begin=0, end=30)
  levels = {'a.*': ramp, 'b.*': ramp} if ruled else ramp
  tx = transforms.sparsify(scores.magnitude, levels, regrow=regrow)
  _, state, _ = run(tx, params, 31)
  pruned = {'a': 0, 'b': 0}
  for path, (kept, size) in masks.count(state.masks).items():
    pruned[path[0]] += size - kept
  size = {
    rule: sum(a * b for a, b in shapes[i::2]) for i, rule in enumerate('ab')
  }
  if ruled:
    assert pruned == {rule: round(0.7 * n) for rule, n in size.items()}
  assert sum(pruned.values()) == round(0.7 * sum(size.values()))


def test_rules_for_the_sparsity():
  rules = {'head/.*': 0.0, '.*kernel': schedules.constant(0.75, begin=2)}
  tx = transforms.sparsify(scores.magnitude, rules)
  _, state, zeros = run(tx, weights(), 4)
  assert zeros[:, 1].tolist() == [0, 0, 216, 216]
  assert (zeros[:, 2] == 0).all()
  assert {k: float(v) for k, v in state.mask_sparsity.items()} == {
    'head/.*': 0.0,
    '.*kernel': 0.75,
  }
  # What no rule matches stays dense, and has no mask.
  tx = transforms.sparsify(scores.magnitude, {'conv.*': 0.5})
  assert tx.init(weights()).masks['head']['kernel'] == optax.MaskedNode()


def test_granularities_by_rule():
  rules = {
    'conv.*': masks.groups(1, 4),
    'head.*': masks.channels(),
  }
  tx = transforms.sparsify(scores.magnitude, 0.75, granularity=rules)
  params, _, _ = run(tx, weights(), 2)
  groups = params['conv']['kernel'] != 0
  assert (groups.sum(2) == 1).all()
  columns = np.asarray(params['head']['kernel'] != 0)
  assert (columns.all(0) == columns.any(0)).all()
  assert columns.any(0).sum() == masks.kept(10, 0.75)
  tx = transforms.sparsify(
    scores.magnitude, 0.5, granularity={'conv.*': None, '.*': masks.elements()}
  )
  assert tx.init(weights()).masks['conv']['kernel'] == optax.MaskedNode()


def test_blocks_count_blocks():
  grain = masks.blocks({-2: 4, -1: 4})
  tx = transforms.sparsify(scores.magnitude, 0.5, granularity=grain)
  params, _, _ = run(tx, weights(), 2)
  head = np.asarray(params['head']['kernel'] != 0).astype(int)
  blocks = np.add.reduceat(
    np.add.reduceat(head, [0, 4, 8, 12], 0), [0, 4, 8], 1
  )
  assert set(blocks[:, :2].ravel()) <= {0, 16}
  assert set(blocks[:, 2]) <= {0, 8}  # A ragged edge is a block of its own.
  assert (blocks > 0).sum() == 6


def test_n_by_m_alone_needs_no_sparsity_and_may_ramp():
  tx = transforms.sparsify(scores.magnitude, granularity=masks.groups(2, 4))
  params, _, _ = run(tx, weights(), 1)
  assert ((params['conv']['kernel'] != 0).sum(2) == 2).all()
  ramp = schedules.polynomial(0.5, begin=0, end=4, power=1)
  tx = transforms.sparsify(
    scores.magnitude, ramp, granularity=masks.groups(2, 4)
  )
  _, _, zeros = run(tx, weights(), 5)
  assert (zeros[:, 1] / 288).tolist() == [0.0, 0.0, 0.25, 0.5, 0.5]


def test_groups_of_two_kinds_need_no_sparsity():
  rules = {'conv.*': masks.groups(1, 4), 'head.*': masks.groups(2, 4)}
  tx = transforms.sparsify(scores.magnitude, granularity=rules)
  _, _, zeros = run(tx, weights(), 2)
  assert zeros[-1].tolist() == [0, 216, 80]
  same = {'conv.*': None, '.*': masks.groups(1, 4)}
  tx = transforms.sparsify(scores.magnitude, granularity=same)
  _, state, zeros = run(tx, weights(), 1)
  assert zeros[-1].tolist() == [0, 0, 120]
  assert float(state.mask_sparsity) == 0.75


def test_without_regrowth_masks_only_lose():
  schedule = schedules.polynomial(0.8, begin=0, end=6, power=1)
  key = jax.random.key(0)

  def trace(regrow, **kw):
    tx = transforms.sparsify(None, schedule, regrow=regrow, **kw)
    params = weights()
    state, rows = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(7):
      noise = jax.random.split(jax.random.fold_in(key, step), 2)
      given = {
        'conv': {
          'kernel': jax.random.uniform(noise[0], (3, 3, 4, 8)),
          'bias': optax.MaskedNode(),
        },
        'head': {'kernel': jax.random.uniform(noise[1], (16, 10))},
      }
      zero = jax.tree.map(jnp.zeros_like, params)
      _, state = update(zero, state, params, scores=given)
      rows.append(state.masks['conv']['kernel'])
    return rows

  def regrown(rows):
    return any((b & ~a).any() for a, b in itertools.pairwise(rows))

  assert regrown(trace(True))
  assert not regrown(trace(False))
  assert not regrown(trace(False, distribution=distributions.lamp))
  assert not regrown(trace(False, granularity=masks.channels()))


@pytest.mark.parametrize(
  'granularity',
  [None, slow(masks.blocks({0: 2})), slow(masks.groups(2, 4, axis=0))],
)
@pytest.mark.parametrize('bad', [jnp.nan, -jnp.inf])
def test_without_regrowth_no_score_brings_back_the_dead(bad, granularity):
  levels = lambda step: jnp.array([0.25, 0.5, 0.25])[step]
  tx = transforms.sparsify(
    None, levels, granularity=granularity, which=lambda *_: True
  )
  w = jnp.arange(1.0, 17.0)
  scores_by_step = [w, w.at[4:].set(bad), w]
  state, alive = tx.init(w), jnp.ones(16, bool)
  for x in scores_by_step:
    _, state = tx.update(jnp.zeros(16), state, w, scores=x)
    assert not (state.masks & ~alive).any()
    alive = state.masks
  assert int(alive.sum()) == 8


def test_a_falling_sparsity_grows_weights_again():
  schedule = schedules.prune_then_regrow(0.9, 0.5, begin=0, turn=2, end=4)
  tx = transforms.sparsify(scores.magnitude, schedule, regrow=True)
  _, _, zeros = run(tx, weights(), 5)
  assert zeros[:, 2].tolist() == [0, 126, 144, 112, 80]


def test_packed_masks_are_the_same():
  schedule = schedules.cubic(0.8, begin=0, end=4)
  plain = transforms.sparsify(scores.magnitude, schedule)
  small = transforms.sparsify(scores.magnitude, schedule, packed=True)
  params, state, _ = run(plain, weights(), 5)
  packed_params, packed, _ = run(small, weights(), 5)
  assert packed.masks['head']['kernel'].shape == (20,)
  got = masks.unpack(packed.masks, packed_params)
  jax.tree.map(np.testing.assert_array_equal, got, state.masks)
  held = transforms.keep_sparse(got, packed=True)
  params, _, zeros = run(held, params, 2)
  assert (zeros[-1] == zeros[0]).all()
  assert zeros[-1][2] == 128


def test_soft_shrinkage_shrinks_then_cuts():
  tx = transforms.soft_shrinkage(lambda w: jnp.abs(w), 0.5, end=3, factor=0.5)
  w = jnp.array([8.0, 4.0])
  state, seen = tx.init(w), []
  for step in range(5):
    u = jnp.array([0.0, 8.0]) if step == 2 else jnp.zeros(2)
    out, state = tx.update(u, state, w)
    w = optax.apply_updates(w, out)
    seen.append(w.tolist())
  # 1 + 8 passes 8 on the third step: the weight has come back.
  assert seen == [[8, 2], [8, 1], [4, 9], [0, 9], [0, 9]]


@pytest.mark.parametrize('factor', [0.0, 0.5])
def test_not_a_number_does_not_get_past_the_cut(factor):
  tx = transforms.soft_shrinkage(
    lambda w: jnp.abs(w), 0.5, end=0, factor=factor
  )
  w = jnp.array([8.0, 4.0])
  u, state = tx.update(jnp.zeros(2), tx.init(w), w)
  w = optax.apply_updates(w, u)
  u, _ = tx.update(jnp.array([0.0, jnp.nan]), state, w)
  assert optax.apply_updates(w, u).tolist() == [8, 0]


def test_keep_sparse_finds_zeros_and_checks_shapes():
  params = masks.apply(masks.top(scores.magnitude(weights()), 0.5), weights())
  tx = optax.chain(optax.adamw(1e-2), transforms.keep_sparse())
  _, state, zeros = run(tx, params, 3)
  assert zeros[-1].tolist() == [0, 144, 80]
  assert optax.tree.get(state, 'masks')['conv']['bias'] == optax.MaskedNode()
  with pytest.raises(ValueError, match=r"mask of 'w' must have shape \(2,\)"):
    transforms.keep_sparse({'w': jnp.ones(3, bool)}).init({'w': jnp.ones(2)})


@pytest.mark.parametrize('packed', [False, True])
def test_mask_moments(packed):
  chain = optax.chain(
    optax.adam(1e-2), transforms.sparsify(scores.magnitude, 0.5, packed=packed)
  )
  params, state, _ = run(transforms.mask_moments(chain), weights(), 3)
  kept = masks.unpacked(optax.tree.get(state, 'masks'), params)
  kept = kept['head']['kernel']
  for name in ('mu', 'nu'):
    moment = optax.tree.get(state, name)
    assert (moment['head']['kernel'] != 0).tolist() == kept.tolist()
    assert (moment['conv']['bias'] != 0).all()
  assert int(optax.tree.get(state, 'mask_sparsity') * 2) == 1


def test_decay_clipping_and_ema_in_the_order_that_works():
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-2, weight_decay=0.1),
    transforms.sparsify(scores.magnitude, 0.5),
  )
  params, state, zeros = run(tx, weights(), 3)
  assert zeros[-1].tolist() == [0, 144, 80]
  tree = optax.tree.get(state, 'masks')
  average = jax.tree.map(lambda w, v: 0.9 * v + 0.1 * w, params, weights())
  assert (average['head']['kernel'] != 0).all()
  exact = masks.apply(tree, average)
  assert int((exact['head']['kernel'] == 0).sum()) == 80


@pytest.mark.parametrize(
  'chain',
  [
    lambda link: optax.chain(link, optax.scale(0.5)),
    lambda link: optax.chain(link, optax.adam(1e-2)),
    lambda link: optax.chain(link, optax.add_decayed_weights(0.1)),
  ],
)
def test_chains_that_do_not_hold_are_found(chain):
  params, state, zeros = run(
    chain(transforms.sparsify(scores.magnitude, 0.5)), weights(), 2
  )
  assert zeros[-1].sum() < 224
  with pytest.raises(
    ValueError, match=r'conv/kernel \(\d+ of 144\), head/kernel \(\d+ of 80'
  ):
    transforms.check_sparse(params, optax.tree.get(state, 'masks'))


def test_check_passes_a_chain_that_holds():
  link = transforms.sparsify(scores.magnitude, 0.5)
  params, state, _ = run(optax.chain(optax.adam(1e-2), link), weights(), 2)
  transforms.check_sparse(params, optax.tree.get(state, 'masks'))


LINK = transforms.sparsify(scores.magnitude, 0.5)


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (
      lambda: transforms.sparsify(scores.magnitude, 0.5, every=0),
      '`every` must be at least 1, got 0',
    ),
    (lambda: transforms.sparsify(scores.magnitude, 1.5), 'got 1.5'),
    (lambda: transforms.sparsify(scores.magnitude), '`sparsity` is needed'),
    (
      lambda: transforms.sparsify(
        scores.magnitude, {'.*': 0.5}, distribution=distributions.erk
      ),
      'leave nothing to distribute',
    ),
    (
      lambda: transforms.sparsify(scores.magnitude, {'haed.*': 0.5}).init(
        weights()
      ),
      "No leaf matches 'haed",
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude, 0.5, granularity={'.*': None}
      ).init(weights()),
      'No leaf is left to prune',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude, granularity=masks.groups(3, 5)
      ).init(weights()),
      r'conv/kernel \(5 does not divide .*; head/kernel \(5 does not divide',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude, 0.9, granularity=masks.groups(2, 4)
      ).init(weights()),
      '2:4 prunes 0.5, not 0.9',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude, 0.1, granularity=masks.groups(2, 4)
      ).init(weights()),
      '2:4 prunes 0.5, not 0.1; say 0.5 by a rule for its sparsity',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude, 0.5, granularity=masks.blocks({3: 2})
      ).init(weights()),
      r'head/kernel \(it has no axis 3\)',
    ),
    (
      lambda: transforms.sparsify(scores.magnitude, {'conv(': 0.5}).init(
        weights()
      ),
      r"Rule 'conv\(' is no regular expression",
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude,
        granularity={'conv.*': masks.groups(2, 4), '.*': masks.elements()},
      ),
      '`sparsity` is needed unless all is n_by_m',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude,
        0.99,
        distribution=distributions.uniform_plus('conv/kernel', 'head/kernel'),
      ).init(weights()),
      'fewer than the',
    ),
    (
      lambda: transforms.mask_moments(optax.adam(0.1)).init(weights()),
      'needs one link that prunes, 0 of its chain do',
    ),
    (
      lambda: transforms.mask_moments(optax.chain(LINK, LINK)).init(weights()),
      'needs one link that prunes, 2 of its chain do',
    ),
    (
      lambda: LINK.update(weights(), LINK.init(weights())),
      'sparsify needs `params`',
    ),
    (
      lambda: transforms.keep_sparse({}).update({}, ()),
      'keep_sparse needs `params`',
    ),
    (
      lambda: transforms.sparsify(
        scores.magnitude,
        schedules.prune_then_regrow(0.9, 0.5, begin=0, turn=2, end=4),
      ),
      'regrow=True',
    ),
    (
      lambda: transforms.sparsify(None, 0.5).update(
        weights(), LINK.init(weights()), weights()
      ),
      'scores are needed at each step',
    ),
    (
      lambda: transforms.sparsify(None, 0.5).update(
        weights(),
        LINK.init(weights()),
        weights(),
        scores={'conv': {'kernel': jnp.ones((3, 3, 4, 8), int)}},
      ),
      r'conv/kernel needs floats\[3, 3, 4, 8\], got int32\[3, 3, 4, 8\]; '
      r'head/kernel needs floats\[16, 10\], got none',
    ),
    (
      lambda: transforms.sparsify(lambda w: w.T, 0.5).update(
        *(w := jnp.ones((2, 3)), transforms.sparsify(jnp.abs, 0.5).init(w), w)
      ),
      r'needs floats\[2, 3\], got float32\[3, 2\]',
    ),
    (
      lambda: transforms.soft_shrinkage(
        scores.magnitude, schedules.cubic(0.5, begin=0, end=9), end=8
      ),
      'is at 0.4993 at `end`=8, .* not at its target 0.5',
    ),
    (
      lambda: transforms.soft_shrinkage(scores.magnitude, 0.5, end=-1),
      '`end` must be at least 0, got -1',
    ),
    (
      lambda: transforms.soft_shrinkage(
        scores.magnitude, 0.5, end=1, factor=1.0
      ),
      r'`factor` must be in \[0, 1\), got 1.0',
    ),
  ],
)
def test_errors(make, text):
  with pytest.raises(ValueError, match=text):
    make()
