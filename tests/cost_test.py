"""Costs by hand and by published integers; budgets met and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import cost, models, plans, structure

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


def of_model(model, side, **options):
  x = SPEC((1, side, side, 3), jnp.float32)
  init = lambda key: model.init(key, jnp.zeros(x.shape), train=False)
  variables = jax.eval_shape(init, jax.random.key(0))
  apply = lambda v, x: model.apply(v, x, train=False)
  return structure.trace(apply, variables, x, **options)


def halves(graph):
  return plans.from_widths(
    graph, {name: group.size // 2 for name, group in graph.groups.items()}
  )


def test_cost_by_hand():
  """5 * 12 + 12 * 16 + 16 * 3 = 300; with 6 and 4: 30 + 24 + 12 = 66."""
  plan = plans.from_widths(GRAPH, {'a': 6, 'b': 4})
  assert cost.macs(GRAPH) == cost.parameters(GRAPH) == 300
  assert cost.macs(GRAPH, plan) == cost.parameters(GRAPH, plan) == 66
  assert cost.weight_bytes(GRAPH, plan) == 4 * 66
  # Two arrays are live at each operation: input and result of the product.
  assert cost.layers(GRAPH, plan) == [
    ('a', 30, 30, 120, 4 * (5 + 6)),
    ('b', 24, 24, 96, 4 * (6 + 4)),
    ('c', 12, 12, 48, 4 * (4 + 3)),
  ]
  # The tanh of the first layer: 6 in, 6 out.
  assert cost.activation_bytes(GRAPH, plan) == 4 * 12
  assert dict(cost.macs_polynomial(GRAPH)) == {
    ('a',): 5,
    ('a', 'b'): 1,
    ('b',): 3,
  }


def test_a_scan_counts_every_step():
  def fn(p, x):
    step = lambda h, x: (jnp.tanh(h @ p['w'] + x), None)
    return jax.lax.scan(step, jnp.zeros((2, 4)), x)[0] @ p['v']

  params = {'w': SPEC((4, 4), jnp.float32), 'v': SPEC((4, 1), jnp.float32)}
  graph = structure.trace(fn, params, SPEC((7, 2, 4), jnp.float32))
  assert cost.macs(graph) == 7 * 2 * 4 * 4 + 2 * 4


def test_half_of_resnet50_by_its_layer_shapes():
  """Every width of 224 px ResNet-50 halved, derived from the shapes alone."""

  def count(divisor):
    macs, params, side, width = 0, 0, 112, 64 // divisor

    def layer(kernel, inputs, outputs, side, bias=0):
      nonlocal macs, params
      macs += kernel**2 * inputs * outputs * side**2
      params += kernel**2 * inputs * outputs + (bias or 2 * outputs)

    layer(7, 3, width, 112)
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
      inner = 64 * 2**stage // divisor
      for block in range(blocks):
        side = 56 // 2**stage
        before = side if block or not stage else 2 * side
        if not block:
          layer(1, inputs, 4 * inner, side)
        layer(1, inputs, inner, before)
        layer(3, inner, inner, side)
        layer(1, inner, 4 * inner, side)
        inputs = 4 * inner
    layer(1, inputs, 1000, 1, bias=1000)
    return macs, params

  graph = of_model(models.resnet50(), 224)
  plan = halves(graph)
  assert (cost.macs(graph), cost.parameters(graph)) == count(1)
  assert (cost.macs(graph, plan), cost.parameters(graph, plan)) == count(2)
  assert cost.macs(graph) == 4_089_184_256
  assert cost.macs(graph, plan) == 1_052_311_552


@pytest.mark.parametrize('grouped', [True, False])
def test_a_depthwise_convolution_costs_the_same_in_both_forms(grouped):
  graph = of_model(models.mobilenet_v1(grouped=grouped), 224)
  assert cost.macs(graph) == 568_740_352
  assert cost.parameters(graph) == 4_231_976


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


def test_a_large_network_meets_its_budget_closely():
  graph = of_model(models.resnet50(), 224)
  rng = np.random.default_rng(0)
  scores = {name: rng.random(g.size) for name, g in graph.groups.items()}
  for fraction in (0.5, 0.25, 0.1):
    plan = cost.plan(graph, scores, cost.budget(macs=fraction))
    reached = cost.macs(graph, plan) / cost.macs(graph)
    assert fraction * 0.999 <= reached <= fraction


def test_the_polynomial_under_vmap_and_grad():
  polynomial = cost.macs_polynomial(GRAPH)
  widths = {'a': jnp.array([12.0, 6.0]), 'b': jnp.array([16.0, 4.0])}
  values = jax.vmap(lambda w: cost.evaluate(polynomial, w))(widths)
  np.testing.assert_allclose(values, [300, 66], rtol=1e-6)
  slope = jax.grad(lambda w: cost.evaluate(polynomial, w))({'a': 6.0, 'b': 4.0})
  assert (float(slope['a']), float(slope['b'])) == (9.0, 9.0)


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
      "No leaf matches 'head",
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
