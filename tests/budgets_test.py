"""Budgets met, joint ones too, and refused where they cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import cost, models, plans, structure
from jaxprune.cost import polynomials

SPEC = jax.ShapeDtypeStruct
PARAMS = {
  'a': SPEC((5, 12), jnp.float32),
  'b': SPEC((12, 16), jnp.float32),
  'c': SPEC((16, 3), jnp.float32),
}


def net(p, x):
  return jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['c']


GRAPH = structure.trace(net, PARAMS, SPEC((1, 5), jnp.float32))
SCORES = {
  'a': np.random.default_rng(0).random(12),
  'b': np.random.default_rng(1).random(16),
}


@functools.cache
def large():
  """ResNet-50 at 224 px, and scores of its units."""
  model = models.resnet50()
  x = SPEC((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  graph = structure.trace(model.apply, variables, x)
  rng = np.random.default_rng(0)
  scores = {name: rng.random(g.size) for name, g in graph.groups.items()}
  return graph, scores


@given(
  fraction=st.floats(0.05, 1.0),
  round_to=st.sampled_from([1, 2, 4, 5]),
)
@settings(max_examples=50, deadline=None)
def test_a_budget_is_met_and_nothing_more_would_fit(fraction, round_to):
  bound = cost.budget(macs=fraction)
  limit = fraction * 300
  if limit < round_to * (5 + round_to + 3):
    with pytest.raises(ValueError, match='cannot be met'):
      cost.plan(GRAPH, SCORES, bound, round_to=round_to)
    return
  plan = cost.plan(GRAPH, SCORES, bound, round_to=round_to)
  assert cost.macs(GRAPH, plan) <= limit
  now = {name: after for name, (_, after) in plans.widths(GRAPH, plan).items()}
  for name, width in now.items():
    size = GRAPH.groups[name].size
    assert width % round_to == 0 or width == size
    step = round_to if width % round_to == 0 else 1
    wider = min(size, width + step)
    if wider > width:
      more = plans.from_widths(GRAPH, {**now, name: wider})
      assert cost.macs(GRAPH, more) > limit


def test_the_best_units_stay():
  plan = cost.plan(GRAPH, SCORES, cost.budget(macs=0.4))
  for name, index in plan.kept:
    values = SCORES[name]
    gone = np.delete(values, index)
    assert values[list(index)].min() >= gone.max()


def test_ties_leave_the_higher_index_first():
  flat = {name: np.ones_like(v) for name, v in SCORES.items()}
  plan = cost.plan(GRAPH, flat, cost.budget(parameters=0.5))
  for _, index in plan.kept:
    assert list(index) == list(range(len(index)))


def test_several_bounds_hold_together():
  plan = cost.plan(GRAPH, SCORES, cost.budget(macs=0.9, parameters=100))
  assert cost.parameters(GRAPH, plan) <= 100


def test_rules_protect_and_set_floors():
  bound = cost.budget(macs=0.5)
  plan = cost.plan(GRAPH, SCORES, bound, keep={'a': 1.0})
  assert plans.widths(GRAPH, plan)['a'] == (12, 12)
  plan = cost.plan(GRAPH, SCORES, bound, keep={'b': 10})
  assert plans.widths(GRAPH, plan)['b'][1] >= 10


@pytest.mark.parametrize('round_to', [1, 8])
@pytest.mark.parametrize(
  'asked',
  [
    {'macs': 0.5},
    {'macs': 0.1},
    {'parameters': 0.25},
    {'bytes': 0.25},
    {'macs': 1_000_000_000},
    {'macs': 0.5, 'parameters': 0.3},
    {'macs': 0.3, 'parameters': 0.5},
    {'macs': 0.5, 'bytes': 0.4},
  ],
  ids=str,
)
def test_every_bound_is_used_up_to_a_thousandth(asked, round_to):
  graph, scores = large()
  bound = cost.budget(**asked)
  plan = cost.plan(graph, scores, bound, round_to=round_to)
  found = cost.reached(graph, plan, bound)
  assert len(found) == len(asked)
  for figures in found.values():
    assert 0 <= figures.gap <= 1e-3
  assert all(
    after % round_to == 0 or after == before
    for before, after in plans.widths(graph, plan).values()
  )


def test_reached_says_what_was_asked():
  plan = plans.from_widths(GRAPH, {'a': 6, 'b': 4})
  bound = cost.budget(macs=0.25, parameters=70, bytes=0.3)
  assert cost.reached(GRAPH, plan, bound) == {
    'MACs': (75.0, 66, 300),
    'parameters': (70, 66, 300),
    'bytes': (360.0, 264, 1200),
  }
  gap = cost.reached(GRAPH, plan, bound)['MACs'].gap
  assert gap == pytest.approx(1 - 66 / 75)


def test_units_are_traded_to_come_nearer():
  """5 a + a b + 3 b <= 150: in order, (6, 13) costs 147; (5, 15) is 145.

  Of all widths (7, 11) is the nearest, 35 + 77 + 33 = 145, ... or any with 150:
  the solver must be within one trade of the best.
  """
  plan = cost.plan(GRAPH, SCORES, cost.budget(macs=0.5))
  a, b = (after for _, after in plans.widths(GRAPH, plan).values())
  best = max(
    n
    for x in range(1, 13)
    for y in range(1, 17)
    if (n := 5 * x + x * y + 3 * y) <= 150
  )
  assert 5 * a + a * b + 3 * b == best


def test_a_bound_that_does_not_bind_changes_nothing():
  alone = cost.plan(GRAPH, SCORES, cost.budget(macs=0.5))
  both = cost.plan(GRAPH, SCORES, cost.budget(macs=0.5, parameters=10_000))
  assert alone == both


def test_rules_of_the_graph_hold():
  choice = structure.Choice
  graph = structure.trace(
    net,
    PARAMS,
    SPEC((1, 5), jnp.float32),
    rules={'a': choice(least=4, round_to=4), 'b': choice(most=0.5)},
  )
  for fraction in (0.5, 0.4):
    plan = cost.plan(graph, SCORES, cost.budget(macs=fraction))
    a, b = (after for _, after in plans.widths(graph, plan).values())
    assert a in (4, 8, 12)
    assert b <= 8
    assert cost.macs(graph, plan) <= fraction * 300


def test_rounding_by_rules():
  graph, scores = large()
  bound = cost.budget(macs=0.4)
  plan = cost.plan(graph, scores, bound, round_to={'stage1.*': 16})
  for name, (_, after) in plans.widths(graph, plan).items():
    assert not name.startswith('stage1') or after % 16 == 0


def test_a_dropped_block_is_not_paid_for():
  """Without it more of the rest can stay."""
  graph, scores = large()
  bound = cost.budget(macs=0.5)
  block = next(iter(graph.blocks))
  plan = cost.plan(graph, scores, bound, dropped=[block])
  assert plan.dropped == (block,)
  assert 0 <= cost.reached(graph, plan, bound)['MACs'].gap <= 1e-3
  alone = cost.plan(graph, scores, bound)
  kept = lambda plan: sum(
    after
    for name, (_, after) in plans.widths(graph, plan).items()
    if not name.startswith(block)
  )
  assert kept(plan) > kept(alone)


def test_resolution_pays_for_width():
  """(3/4)^2 of the multiply-adds of convolutions: half is met by less."""
  graph, scores = large()
  bound = cost.budget(macs=0.5)
  plan = cost.plan(graph, scores, bound, resolution=(168, 168))
  assert plan.resolution == (168, 168)
  assert 0 <= cost.reached(graph, plan, bound)['MACs'].gap <= 1e-3
  alone = cost.plan(graph, scores, bound)
  assert cost.parameters(graph, plan) > cost.parameters(graph, alone)


def table():
  """Two parts: a's takes a / 4 ms; b's takes a b / 64; the whole is 1 more."""
  return cost.Table(
    names=('a', 'b'),
    sizes=(({(): 1}, {('a',): 1}), ({('a',): 1}, {('b',): 1})),
    blocks=((), ()),
    knots=np.array([[[1, 1], [0, 12]], [[0, 12], [0, 16]]], np.float64),
    ms=np.array([[[0, 3], [0, 3]], [[0, 0], [0, 3]]], np.float64),
    wholes=np.array([[0.0, 1e-9, 6.0], [1.0, 1.0, 7.0]]),
    checks=(),
  )


def test_milliseconds_are_a_bound_like_others():
  """1 + a / 4 + a b / 64 <= 4 ms; alone and with 120 multiply-adds."""
  bound = cost.budget(ms=4.0)
  plan = cost.plan(GRAPH, SCORES, bound, table=table())
  found = cost.reached(GRAPH, plan, bound, table=table())['ms']
  a, b = (after for _, after in plans.widths(GRAPH, plan).values())
  assert found.reached == pytest.approx(1 + a / 4 + a * b / 64)
  assert 0 <= found.gap < 0.02
  both = cost.budget(ms=4.0, macs=120)
  plan = cost.plan(GRAPH, SCORES, both, table=table())
  found = cost.reached(GRAPH, plan, both, table=table())
  assert all(0 <= x.gap < 0.05 for x in found.values())


@pytest.mark.parametrize('ms', [2.0, 3.0, 3.97, 5.0])
def test_where_no_widths_take_so_long_no_trade_comes_nearer(ms):
  """Units of a for units of b, three a side at most."""
  bound = cost.budget(ms=ms)
  plan = cost.plan(GRAPH, SCORES, bound, table=table())
  found = cost.reached(GRAPH, plan, bound, table=table())['ms']
  a, b = (after for _, after in plans.widths(GRAPH, plan).values())
  near = lambda n, size: range(max(1, n - 3), min(size, n + 3) + 1)
  times = [
    1 + x / 4 + x * y / 64
    for x in near(a, 12)
    for y in near(b, 16)
    if (x - a) * (y - b) < 0
  ]
  nearest = max((t for t in times if t <= ms), default=0.0)
  assert not found.gap < 0
  assert found.gap <= 1e-3 or found.reached >= nearest - 1e-6


@pytest.mark.parametrize('round_to', [1, 8])
def test_milliseconds_are_used_up_to_a_thousandth(round_to):
  """A part paid by its multiply-adds, one by its weights; calls take 2 ms."""
  graph, scores = large()
  is_open = dict.fromkeys(graph.blocks, 1)
  sizes = [
    polynomials.substitute(make(graph), is_open)
    for make in (cost.macs_polynomial, cost.parameters_polynomial)
  ]
  whole = [cost.evaluate(p, cost.variables(graph)) for p in sizes]
  made_up = cost.Table(
    names=('compute', 'memory'),
    sizes=tuple(({(): 1}, size) for size in sizes),
    blocks=((), ()),
    knots=np.array([[[1, 1], [0, n]] for n in whole], np.float64),
    ms=np.array([[[0, 60]] * 2, [[0, 20]] * 2], np.float64),
    wholes=np.array([[0.0, 40.0, 80.0], [2.0, 30.0, 90.0]]),
    checks=(),
  )
  for bound in (cost.budget(ms=45.0), cost.budget(ms=20.0)):
    plan = cost.plan(graph, scores, bound, table=made_up, round_to=round_to)
    found = cost.reached(graph, plan, bound, table=made_up)['ms']
    assert 0 <= found.gap <= 1e-3


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: cost.budget(), 'A budget needs a bound'),
    (lambda: cost.budget(macs=1.5), r'`macs` as a fraction .* got 1.5'),
    (lambda: cost.budget(parameters=0), '`parameters` must be at least 1'),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(macs=3)),
      r'cannot be met: .* remain 9 MACs \(3.0%\) where at most 3 are asked',
    ),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(macs=301)),
      'nothing to remove: the whole network has 300 MACs where 301 are asked',
    ),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(ms=1.0)),
      'bound in `ms` needs `table`',
    ),
    (lambda: cost.budget(ms=0), '`ms` must be above 0, got 0'),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(ms=0.5), table=table()),
      r'remain 1.27 ms \(18.1%\) where at most 0.5 are asked',
    ),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(macs=0.5), dropped=['+z']),
      "no block '\\+z' to drop",
    ),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(macs=0.5), round_to=0),
      '`round_to` must be at least 1, got 0',
    ),
    (
      lambda: cost.plan(GRAPH, {'z': [1.0]}, cost.budget(macs=0.5)),
      "no group 'z'; the groups are: a, b",
    ),
    (
      lambda: cost.plan(GRAPH, {'a': [1.0]}, cost.budget(macs=0.5)),
      r"scores of group 'a' must have shape \(12,\), got \(1,\)",
    ),
    (
      lambda: cost.plan(GRAPH, {'a': [np.nan] * 12}, cost.budget(macs=0.5)),
      "scores of group 'a' are not all finite",
    ),
    (
      lambda: cost.plan(
        GRAPH, SCORES, cost.budget(macs=0.5), keep={'head.*': 1.0}
      ),
      "No .* matches 'head",
    ),
    (
      lambda: cost.plan(GRAPH, SCORES, cost.budget(macs=0.5), keep={'a': 13}),
      "'a' has 12 units and cannot keep 13",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
