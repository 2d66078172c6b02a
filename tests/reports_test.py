"""Every report of a plan sees all of it: units, blocks, sides and changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow

from jaxprune import cost, models, plans, structure
from jaxprune.cost import latency
from jaxprune.plans import proof
from jaxprune.search import joint

SPEC = jax.ShapeDtypeStruct
X = SPEC((1, 12, 12, 1), jnp.float32)
BLOCK, CUT = 'stage3_block1', 'params/stage2_block1/conv1/kernel'
# Names of what a plan has -> the plan's arguments.
FRAMES = {
  'units': {},
  'dropped': {'dropped': (BLOCK,)},
  'resolution': {'resolution': (8, 8)},
  'resized': {'resized': ((CUT, (6, 6)),)},
  'all': {
    'dropped': (BLOCK,),
    'resolution': (10, 10),
    'resized': ((CUT, (6, 6)),),
  },
}


@functools.cache
def network():
  """A residual network of three stages, its variables and its graph."""
  net = models.resnet_digits(
    channels=(4, 8, 8), strides=(1, 2, 1), num_classes=3, head='pool'
  )
  variables = jax.jit(net.init)(jax.random.key(0), jnp.ones(X.shape))
  return variables, structure.trace(net.apply, variables, X)


@functools.cache
def planned(name, seed=0):
  """A plan of random widths, its network, and that traced on its own."""
  variables, graph = network()
  rng = np.random.default_rng(seed)
  sizes = {n: group.size for n, group in graph.groups.items()}
  widths = {n: int(rng.integers(1, size + 1)) for n, size in sizes.items()}
  plan = plans.from_widths(graph, widths, **FRAMES[name])
  small = jax.eval_shape(lambda p: plans.shrink(graph, plan, p), variables)
  side = (plan.resolution or (12, 12))[0]
  images = SPEC((1, side, side, 1), jnp.float32)
  again = structure.trace(plans.specialise(graph, plan), small, images)
  return graph, plan, again


# The one with all that a plan can have says the most; the others are slow.
EACH = [name if name == 'all' else slow(name) for name in FRAMES]
REPORTS = {
  'macs': cost.macs,
  'all macs': functools.partial(cost.macs, count=cost.COUNTS),
  'parameters': cost.parameters,
  'bytes': cost.weight_bytes,
  'activations': cost.activation_bytes,
}


@pytest.mark.parametrize('frame', EACH)
def test_a_report_of_a_plan_is_that_of_its_network_traced_anew(frame):
  graph, plan, again = planned(frame)
  for name, report in REPORTS.items():
    assert report(graph, plan) == report(again), name
  bound = cost.budget(macs=0.5, parameters=0.5, bytes=0.5)
  reached = cost.reached(graph, plan, bound)
  for what, name in (
    ('MACs', 'macs'), ('parameters', 'parameters'), ('bytes', 'bytes'),
  ):  # fmt: skip
    assert reached[what].reached == REPORTS[name](again)
    assert reached[what].whole == REPORTS[name](graph)
  layers = cost.layers(graph, plan)
  assert sum(layer.macs for layer in layers) == cost.macs(again)
  assert sum(layer.parameters for layer in layers) == cost.parameters(again)
  peak = max(layer.activation_bytes for layer in layers)
  assert peak <= cost.activation_bytes(again)
  for name, polynomials in (
    ('macs', cost.macs_polynomial), ('parameters', cost.parameters_polynomial),
    ('bytes', cost.weight_bytes_polynomial),
    ('activations', cost.activation_bytes_polynomials),
  ):  # fmt: skip
    there = plans.at(graph, plan.resolution, plan.resized)
    found = cost.evaluate(polynomials(there), cost.variables(graph, plan))
    assert found == REPORTS[name](again)


@pytest.mark.parametrize('frame', EACH)
def test_a_budget_is_met_at_the_sides_of_its_plan(frame):
  """With a frame that costs less more units stay, up to the same bound."""
  _, graph = network()
  scores = {n: np.arange(1.0, g.size + 1) for n, g in graph.groups.items()}
  plan = cost.plan(graph, scores, cost.budget(macs=0.2), **FRAMES[frame])
  for field, value in FRAMES[frame].items():
    assert getattr(plan, field) == value
  assert cost.macs(graph, plan) <= 0.2 * cost.macs(graph)
  now = {name: after for name, (_, after) in plans.widths(graph, plan).items()}
  for name, width in now.items():
    if 0 < width < graph.groups[name].size:
      more = {n: w for n, w in (now | {name: width + 1}).items() if w}
      wider = plans.from_widths(graph, more, **FRAMES[frame])
      assert cost.macs(graph, wider) > 0.2 * cost.macs(graph)


def test_a_difference_of_plans_names_all_that_differs():
  graph, plan, _ = planned('all')
  none = plans.from_kept(graph, {})
  text = str(plans.diff(graph, none, plan))
  for part in (
    f'{BLOCK}: dropped', 'resolution: as traced -> 10x10',
    f'resized: nowhere -> 6x6 from {CUT}', 'conv1: -',
  ):  # fmt: skip
    assert part in text
  assert plans.from_json(plans.to_json(plan)) == plan
  assert str(plans.diff(graph, plan, plan)) == 'no difference'


def test_two_plans_as_one_cost_what_the_second_does():
  graph, first, small = planned('all')
  second = plans.from_widths(small, dict.fromkeys(small.groups, 1))
  both = plans.compose(graph, first, small, second)
  for name, report in REPORTS.items():
    assert report(graph, both) == report(small, second), name
  assert (both.dropped, both.resized) == (first.dropped, first.resized)


def test_a_block_of_a_loop_costs_nothing_once_it_is_dropped():
  """h = tanh(w x + u h) over 7 steps; u h goes, and u with it."""

  def fn(p, x):
    step = lambda h, x: (jnp.tanh(x @ p['w'] + h @ p['u']), None)
    return jax.lax.scan(step, jnp.zeros((2, 6)), x)[0] @ p['b']

  shapes = {'w': (4, 6), 'u': (6, 6), 'b': (6, 2)}
  params = {name: SPEC(shape, jnp.float32) for name, shape in shapes.items()}
  graph = structure.trace(fn, params, SPEC((7, 2, 4), jnp.float32))
  plan = plans.from_widths(graph, {'w': 3}, dropped=['+u'])
  assert cost.macs(graph) == 7 * 2 * (24 + 36) + 2 * 12
  assert cost.macs(graph, plan) == 7 * 2 * 12 + 2 * 6
  small = jax.eval_shape(lambda p: plans.shrink(graph, plan, p), params)
  again = structure.trace(plans.specialise(graph, plan), small, *graph.args)
  assert cost.macs(again) == cost.macs(graph, plan)


def test_the_cost_of_a_vector_is_that_of_its_plan():
  """A space with cuts: depths, sides and widths in one vector."""
  _, graph = network()
  space = joint.space(graph, X, sides=(8, 10, 12), cuts={'stage2': CUT})
  coster = joint.coster(space)
  vector = joint.rounded(
    space,
    joint.PruningVector(
      dict.fromkeys(space.low.widths, 3),
      dict.fromkeys(space.low.depths, 0),
      {'input': 10, 'stage2': 8},
    ),
  )
  plan = joint.plan(space, vector)
  assert all([plan.dropped, plan.resolution, plan.resized])
  assert coster(vector) == cost.macs(graph, plan)


def test_a_table_of_milliseconds_of_another_resolution_is_refused():
  """It said the time of the whole resolution for a plan of a smaller one."""
  graph, plan, _ = planned('all')
  bound = cost.budget(ms=1.0)
  with pytest.raises(
    ValueError, match=r'not of the network at resolution \(10, 10\)'
  ):
    cost.reached(graph, plan, bound, table=even_table(graph))
  there = plans.at(graph, plan.resolution, plan.resized)
  found = cost.reached(graph, plan, bound, table=even_table(there))['ms']
  assert found.reached == plans.widths(graph, plan)['stem'][1]


def even_table(graph):
  """Milliseconds that no clock has seen: one for each unit of the stem."""
  return cost.Table(
    names=('stem',),
    sizes=(({('stem',): 1}, {(): 1}, {(): 1}),),
    blocks=((),),
    knots=np.array([[[0.0, 9.0]] * 3]),
    ms=np.tile(np.array([0.0, 9.0])[:, None, None], (1, 1, 2, 2)),
    wholes=np.array([[0.0, 9.0], [0.0, 9.0]]),
    checks=(),
    program=latency.digest(graph),
  )


@pytest.mark.slow
def test_a_check_of_a_plan_runs_all_of_it():
  variables, graph = network()
  plan = planned('all')[1]
  lively = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape),
    variables,
  )
  x = jax.random.normal(jax.random.key(1), (2, 10, 10, 1))
  assert proof.check(graph, plan, lively, x).values <= 1e-5
