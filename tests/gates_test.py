"""Tests of gates: where they act, what they cost, and how they close."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune import cost, gates, plans, structure
from jaxprune.models import layers
from jaxprune.models.inception import Inception
from jaxprune.structure.walks.branches import branches

# --- Gate functions, by hand -------------------------------------------------

THETA = jnp.array([1.2, 0.05, 0.0, -0.4])


def evaluated(function, theta=THETA):
  """(open, value, d sum(open), d sum(value)) of a gate function."""
  opened = function.open
  value = lambda t: function.value(t, opened(t))
  slopes = [
    jax.grad(lambda t, f=f: jnp.sum(f(t)))(theta) for f in (opened, value)
  ]
  return opened(theta), value(theta), *slopes


def test_scale_has_a_dead_zone_and_passes_the_gradient():
  opened, value, d_open, d_value = evaluated(gates.scale(0.05))
  np.testing.assert_array_equal(opened, [1, 0, 0, 1])
  np.testing.assert_array_equal(value, THETA * opened)
  np.testing.assert_array_equal(d_value, [1, 1, 1, 1])
  np.testing.assert_array_equal(d_open, [1, 1, 1, -1])


def test_binary_is_a_step_with_the_slope_of_a_sigmoid():
  opened, value, d_open, d_value = evaluated(gates.binary())
  np.testing.assert_array_equal(opened, [1, 1, 1, 0])
  np.testing.assert_array_equal(value, opened)
  s = 1 / (1 + np.exp(-np.asarray(THETA, np.float64)))
  np.testing.assert_allclose(d_value, s * (1 - s), rtol=1e-5)
  np.testing.assert_array_equal(d_open, d_value)


def test_sharp_hardens_into_binary():
  opened, value, d_open, d_value = evaluated(gates.sharp(3.0))
  s = 1 / (1 + np.exp(-3 * np.asarray(THETA, np.float64)))
  np.testing.assert_allclose(value, s, rtol=1e-5)
  np.testing.assert_allclose(d_value, 3 * s * (1 - s), rtol=1e-5)
  np.testing.assert_allclose(d_open, d_value, rtol=1e-5)
  np.testing.assert_array_equal(opened, gates.binary().open(THETA))
  theta = jnp.array([0.2, -0.2])
  hard = gates.sharp(1e3).value(theta, theta)
  np.testing.assert_allclose(hard, [1, 0], atol=1e-6)


# --- What the gates say ------------------------------------------------------

STRUCTURE = gates.Structure(
  units={'a': 3, 'b': 2, 'c': 2},
  layers={'left': ('a',), 'right': ('b',), 'way': ()},
  blocks=('block',),
  inside={'left': ('c',)},
  rivals=(('left', 'right'),),
)


@functools.partial(jax.jit, static_argnames='which')
def say(theta, which='scale'):
  return gates.evaluate(theta, STRUCTURE, getattr(gates, which)())


def theta_of(units=None, scalars=None):
  start = gates.init(STRUCTURE)
  units, scalars = units or {}, scalars or {}
  put = lambda d, new: {k: jnp.asarray(new.get(k, x)) for k, x in d.items()}
  return gates.Gates(
    put(start.units, units), put(start.layers, scalars),
    put(start.blocks, scalars)
  )  # fmt: skip


def test_nested_gates_multiply():
  values = say(theta_of({'a': [0.5, 1.0, 0.0]}, {'left': 0.4}))
  np.testing.assert_allclose(values.units['a'], [0.2, 0.4, 0.0], rtol=1e-6)
  np.testing.assert_array_equal(values.open.units['a'], [1, 1, 0])
  np.testing.assert_array_equal(values.units['b'], [1, 1])
  # Of a layer alone, its groups follow.
  alone = say(gates.init(STRUCTURE, 0.4, gated=['left']))
  assert {k: x.tolist() for k, x in alone.units.items()} == {
    'a': [np.float32(0.4)] * 3
  }


def test_the_last_unit_cannot_close():
  values = say(theta_of({'a': [0.01, 0.03, 0.02]}))
  np.testing.assert_array_equal(values.open.units['a'], [0, 1, 0])
  # It is open for the network too: at the edge of the dead zone, not at zero.
  np.testing.assert_allclose(values.units['a'], [0, 0.05, 0])
  # It gets the gradient of the task, and none of the cost.
  rho = lambda t: gates.remaining(say(t), STRUCTURE, lambda n: n['a'])
  slope = jax.grad(rho)(theta_of({'a': [0.01, 0.03, 0.02]}))
  assert float(slope.units['a'][1]) == 0


@pytest.mark.parametrize(
  ('function', 'factor'),
  [(gates.scale(0.1), -0.1), (gates.binary(), 1), (gates.sharp(500.0), 1)],
)
def test_what_is_held_open_has_a_factor_and_learns(function, factor):
  theta = gates.Gates({'a': jnp.array([-0.03, -0.01])})
  shape = gates.Structure({'a': 2})
  say = lambda t: gates.evaluate(t, shape, function).units['a']
  np.testing.assert_allclose(say(theta), [0, factor], atol=1e-6, rtol=0.01)
  slope = jax.grad(lambda t: say(t)[1])(theta)
  assert float(slope.units['a'][1]) > 0


def test_the_last_rival_cannot_close():
  values = say(theta_of({}, {'left': 0.01, 'right': 0.02, 'way': 0.0}))
  assert gates.closed(values.open.layers) == ('left', 'way')
  assert float(values.layers['right']) == np.float32(0.05)


def test_masks_follow_closed_layers():
  values = say(theta_of({'b': [1.0, 0.0]}, {'left': 0.0}))
  found = gates.masks(values, STRUCTURE)
  assert {k: v.tolist() for k, v in found.items()} == {
    'a': [False] * 3, 'b': [True, False], 'c': [False] * 2
  }  # fmt: skip
  assert gates.closed(values.open.blocks) == ()


def test_what_has_no_gate_is_open():
  values = gates.evaluate(gates.Gates({}), STRUCTURE)
  assert values[:3] == ({}, {}, {})
  assert len(jax.tree.leaves(values)) == len('abc') + 4
  assert all(np.all(x == 1) for x in jax.tree.leaves(values))


# --- The cost ----------------------------------------------------------------


def count(n):
  """A cost in which everything of STRUCTURE takes part."""
  return (
    5 * n['a']
    + 7 * n['a'] * n['c']
    + 3 * n['b'] * n['b']
    + 11 * n['way'] * n['b']
    + 13 * n['block'] * n['b']
    + 2
  )


FULL = 5 * 3 + 7 * 3 * 2 + 3 * 4 + 11 * 2 + 13 * 2 + 2


@pytest.fixture(scope='module')
def slope():
  """theta -> rho and its gradient."""
  rho = lambda t: gates.remaining(
    gates.evaluate(t, STRUCTURE), STRUCTURE, count
  )
  return jax.jit(jax.value_and_grad(rho))


def test_the_cost_of_a_unit_is_what_goes_with_it(slope):
  rho, d = slope(theta_of({'a': [1.0, 1.0, 0.0], 'b': [0.3, 1.0]}))
  assert float(rho) == np.float32((FULL - 5 - 14) / FULL)
  each = (5 + 7 * 2) / FULL  # count(a=2) - count(a=1), also for the closed one.
  np.testing.assert_allclose(d.units['a'], [each] * 3, rtol=1e-5)
  each = (3 * (4 - 1) + 11 + 13) / FULL
  np.testing.assert_allclose(d.units['b'], [each] * 2, rtol=1e-5)
  np.testing.assert_allclose(d.units['c'], [7 * 2 / FULL] * 2, rtol=1e-5)
  left = (5 * 2 + 7 * 2 * 2) / FULL  # With its inside, counted once.
  np.testing.assert_allclose(d.layers['left'], left, rtol=1e-5)
  np.testing.assert_allclose(d.layers['way'], 22 / FULL, rtol=1e-5)
  np.testing.assert_allclose(d.blocks['block'], 26 / FULL, rtol=1e-5)


def test_what_lies_in_a_closed_layer_costs_nothing(slope):
  rho, d = slope(theta_of({}, {'left': 0.02, 'block': 0.01}))
  assert float(rho) == np.float32((12 + 22 + 2) / FULL)
  np.testing.assert_array_equal(d.units['a'], [0, 0, 0])
  np.testing.assert_array_equal(d.units['c'], [0, 0])
  # A closed gate is held down by the cost that it would open.
  np.testing.assert_allclose(d.layers['left'], 57 / FULL, rtol=1e-5)
  np.testing.assert_allclose(d.blocks['block'], 26 / FULL, rtol=1e-5)


def test_widths_are_the_variables_of_the_cost(slope):
  theta = theta_of({'b': [0.0, 1.0]}, {'left': 0.0, 'way': 0.5})
  widths = gates.widths(say(theta), STRUCTURE)
  assert {k: float(v) for k, v in widths.items()} == {
    'a': 0, 'b': 1, 'c': 0, 'left': 0, 'right': 1, 'way': 1, 'block': 1
  }  # fmt: skip
  assert float(slope(theta)[0]) == pytest.approx((3 + 11 + 13 + 2) / FULL)


def test_the_target_form_pushes_until_the_budget_is_met():
  push = jax.grad(lambda rho: gates.penalty(rho, 3.0, target=0.4))
  assert push(0.41) == 3
  assert push(0.39) == 0
  assert gates.penalty(jnp.float32(0.5), 3.0) == 1.5


# --- In networks -------------------------------------------------------------


def dense(p, x):
  return x @ p['kernel'] + p['bias'][None]


def normed(p, x, train):
  """Batch norm: of the batch, or with running statistics of 0.3 and 2."""
  mean = x.mean(0, keepdims=True) if train else 0.3
  var = x.var(0, keepdims=True) if train else 2.0
  return (x - mean) / jnp.sqrt(var + 1e-3) * p['scale'][None] + p['bias'][None]


def network(p, x, train=False, unit=lambda y: y, block=lambda y: y):
  """Dense, norm, tanh, a residual block, tanh, dense; with two places to gate.

  tanh: a gate before it would be another function.
  """
  x = jnp.tanh(normed(p['norm1'], dense(p['one'], x), train))
  y = jnp.tanh(dense(p['two'], x))
  y = normed(p['norm2'], dense(p['three'], unit(y)), train)
  return dense(p['head'], jnp.tanh(x + block(y)))


def weights(shapes, seed=0):
  draw = np.random.default_rng(seed)
  new = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  return {
    name: {'kernel': new(*shape), 'bias': new(shape[-1])}
    if len(shape) == 2
    else {'scale': new(*shape), 'bias': new(*shape)}
    for name, shape in shapes.items()
  }


PARAMS = weights({
  'one': (3, 5), 'norm1': (5,), 'two': (5, 4), 'three': (4, 5), 'norm2': (5,),
  'head': (5, 2),
})  # fmt: skip
X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)


@pytest.fixture(scope='module')
def graph():
  return jp.trace(network, PARAMS, X)


def test_a_gate_of_0_3_is_a_gate_on_the_activation(graph):
  (block,) = graph.blocks
  assert 'two' in graph.readers
  draw = jax.random.normal(jax.random.key(2), (6, 2))

  def ours(p, g, train):
    p = structure.scale(graph, p, {'two': g['unit']}, {block: g['block']})
    return jnp.vdot(draw, network(p, X, train))

  def explicit(p, g, train):
    unit = lambda y: y * g['unit'][None]
    return jnp.vdot(draw, network(p, X, train, unit, lambda y: y * g['block']))

  g = {'unit': jnp.array([0.3, 1.0, 0.3, 0.0]), 'block': jnp.float32(0.3)}
  for train in (False, True):
    both = [
      jax.jit(jax.value_and_grad(f, (0, 1)), static_argnums=2)(PARAMS, g, train)
      for f in (ours, explicit)
    ]
    chex.assert_trees_all_close(*both, rtol=2e-4, atol=2e-5)
    assert np.all(np.abs(both[0][1][1]['unit']) > 1e-4)  # None has vanished.


def structure_of(graph):
  found = branches(graph)
  return gates.Structure(
    units={name: group.size for name, group in graph.groups.items()},
    layers=found.layers,
    blocks=tuple(graph.blocks),
    inside=found.inside,
    rivals=found.rivals,
  )


def test_all_gates_at_one_change_no_bit(graph):
  shape = structure_of(graph)
  values = gates.evaluate(gates.init(shape), shape)
  scaled = structure.scale(graph, PARAMS, values.units, values.blocks)
  chex.assert_trees_all_equal(scaled, PARAMS)
  layer = lambda x: jnp.tanh(x @ PARAMS['one']['kernel'])
  both = gates.bypass(layer, X, jnp.float32(1))
  np.testing.assert_array_equal(both, layer(X))


def finished(graph, shape, theta, params):
  """(values, folded params, plan) of trained gates."""
  values = gates.evaluate(theta, shape)
  folded = structure.scale(graph, params, values.units, values.blocks)
  plan = plans.from_masks(
    graph,
    gates.masks(values, shape),
    dropped=gates.closed(values.open.blocks),
  )
  return values, folded, plan


def counted_equals_expected(graph, shape, theta, params, *args):
  """Folds, plans, shrinks, checks; holds both costs to their expectation."""
  values, folded, plan = finished(graph, shape, theta, params)
  small = jp.shrink(graph, plan, folded)
  leaves = jax.tree.leaves(small.get('params', small))
  for polynomial, counted in (
    (cost.parameters_polynomial(graph), sum(w.size for w in leaves)),
    (cost.macs_polynomial(graph), cost.macs(graph, plan)),
  ):
    evaluate = functools.partial(cost.evaluate, polynomial)
    full = evaluate(
      {**shape.units, **dict.fromkeys([*shape.layers, *shape.blocks], 1)}
    )
    rho = jax.jit(lambda v, e=evaluate: gates.remaining(v, shape, e))(values)
    assert float(rho) == np.float32(np.float32(counted) / np.float32(full))
    assert counted < full
  full = jax.jit(graph.fn)(folded, *args)
  np.testing.assert_allclose(
    jax.jit(jp.specialise(graph, plan))(small, *args),
    full,
    rtol=1e-5,
    atol=1e-5,
  )
  jp.check(graph, plan, params, *args)
  return small


def test_residual_units_fold_and_count(graph):
  shape = structure_of(graph)
  start = gates.init(shape)
  theta = start._replace(
    units={**start.units, 'two': jnp.array([0.3, 0, 1.2, 0])}
  )
  small = counted_equals_expected(graph, shape, theta, PARAMS, X)
  assert small['two']['kernel'].shape == (5, 2)


def test_a_closed_block_is_the_identity(graph):
  shape = structure_of(graph)
  (block,) = shape.blocks
  theta = gates.init(shape)._replace(blocks={block: jnp.float32(0)})
  values, folded, _ = finished(graph, shape, theta, PARAMS)
  assert float(values.blocks[block]) == 0
  for train in (False, True):
    np.testing.assert_array_equal(
      network(folded, X, train),
      network(PARAMS, X, train, block=lambda y: 0 * y),
    )
  small = counted_equals_expected(graph, shape, theta, PARAMS, X)
  assert small['two'] == {'kernel': None, 'bias': None}


def parallel(p, x):
  """Two dense branches side by side, the second of two layers, then a head."""
  left = jnp.tanh(dense(p['left'], x))
  right = jnp.tanh(dense(p['right'], jnp.tanh(dense(p['reduce'], x))))
  return dense(p['head'], jnp.concatenate([left, right], axis=1))


SIDES = weights(
  {'left': (3, 4), 'reduce': (3, 3), 'right': (3, 5), 'head': (9, 2)}
)


def test_a_parallel_branch_closes_as_a_whole():
  graph = traced_sides()
  shape = structure_of(graph)
  assert shape.inside['right branch'] == ('reduce',)
  start = gates.init(shape)
  theta = start._replace(
    units={**start.units, 'left': jnp.array([0.3, 0.0, 1.0, 0.5])},
    layers={'left branch': jnp.float32(0.5), 'right branch': jnp.float32(0)},
  )
  small = counted_equals_expected(graph, shape, theta, SIDES, X)
  assert small['head']['kernel'].shape == (3, 2)
  assert small['reduce']['kernel'].shape == (3, 0)


def test_what_would_cut_the_network_in_two_is_refused():
  graph = traced_sides()
  for kept, name in (
    ({'left': [], 'right': []}, 'left'),
    ({'reduce': []}, 'reduce'),
  ):
    with pytest.raises(ValueError, match=f'{name!r} must keep one or more'):
      plans.from_kept(graph, kept)
  whole = plans.from_kept(graph, {'right': [], 'reduce': []})
  assert plans.from_json(plans.to_json(whole)) == whole


def test_an_inception_module_shrinks_by_branches_and_filters():
  net = Inception((4, 3, 4, 2, 3, 2))
  x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))

  def fn(p, x):
    y = net.apply({'params': p['net'], 'batch_stats': p['stats']}, x, False)
    return layers.pool(y) @ p['head']

  found = jax.eval_shape(lambda: net.init(jax.random.key(0), x, False))
  draw = np.random.default_rng(0)
  fill = lambda s: jnp.asarray(draw.uniform(0.2, 1, s.shape), jnp.float32)
  params = {
    'net': jax.tree.map(fill, found['params']),
    'stats': jax.tree.map(fill, found['batch_stats']),
    'head': jnp.asarray(draw.normal(size=(13, 2)), jnp.float32),
  }
  graph = jp.trace(fn, params, x)
  shape = structure_of(graph)
  start = gates.init(shape)
  off = {name: jnp.float32(0) for name in shape.layers if 'branch2' in name}
  some = {'net/branch3_reduce': jnp.array([0.0, 0.7])}
  theta = start._replace(
    units=start.units | some, layers={**start.layers, **off}
  )
  counted_equals_expected(graph, shape, theta, params, x)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_any_gates_cost_what_is_counted(seed, share):
  graph = traced_sides()
  shape = structure_of(graph)
  draw = np.random.default_rng(seed)
  theta = jax.tree.map(
    lambda x: np.float32(draw.uniform(size=x.shape) > share), gates.init(shape)
  )
  values = said_of_sides(theta)
  plan = plans.from_masks(graph, gates.masks(values, shape))
  widths = gates.widths(values, shape)
  exact = {name: int(x) for name, x in widths.items()}
  for polynomial, counted in (
    (cost.parameters_polynomial(graph), cost.parameters(graph, plan)),
    (cost.macs_polynomial(graph), cost.macs(graph, plan)),
  ):
    assert cost.evaluate(polynomial, exact) == counted > 0


@functools.cache
def traced_sides():
  return jp.trace(parallel, SIDES, X)


@jax.jit
def said_of_sides(theta):
  return gates.evaluate(theta, structure_of(traced_sides()))


# --- Sequential layers behind a bypass ---------------------------------------


def sequence(p, x, gate):
  """Dense layers, the middle one (6 to 4 wide) behind a bypass."""
  x = jnp.tanh(dense(p['one'], x))
  x = gates.bypass(
    lambda x: dense(p['middle'], x), x, gate, shape=(*x.shape[:-1], 4)
  )
  return dense(p['head'], jnp.tanh(x))


LINE = weights({'one': (3, 6), 'middle': (6, 4), 'head': (4, 2)})


def test_a_sequential_layer_closes_to_its_shortcut():
  without = {'one': LINE['one'], 'head': LINE['head']}
  x = jnp.tanh(dense(LINE['one'], X))
  wanted = dense(LINE['head'], jnp.tanh(x[:, :4]))
  for params, gate in ((LINE, jnp.float32(0)), (LINE, 0), (without, False)):
    np.testing.assert_allclose(sequence(params, X, gate), wanted, rtol=1e-6)
  plain = dense(LINE['head'], jnp.tanh(dense(LINE['middle'], x)))
  for gate in (jnp.float32(1), 1, True):
    np.testing.assert_array_equal(sequence(LINE, X, gate), plain)
  half = jnp.tanh(0.3 * dense(LINE['middle'], x) + 0.7 * x[:, :4])
  for gate in (jnp.float32(0.3), 0.3):
    np.testing.assert_allclose(
      sequence(LINE, X, gate), dense(LINE['head'], half), rtol=2e-5
    )


def test_behind_a_bypass_units_shrink_too():
  graph = jp.trace(functools.partial(sequence, gate=0.5), LINE, X)
  closed = functools.partial(sequence, gate=False)
  without = {'one': LINE['one'], 'head': LINE['head']}
  final = jp.trace(closed, without, X)
  # The shortcut makes the first channels of both layers one group.
  shared = next(n for n, g in final.groups.items() if g.size == 4)
  mask = {shared: jnp.array([1.0, 0.0, 0.4, 1.0])}
  shape = gates.Structure({n: g.size for n, g in final.groups.items()})
  assert shared in graph.groups
  theta = gates.Gates(mask)
  small = counted_equals_expected(final, shape, theta, without, X)
  assert small['head']['kernel'].shape == (3, 2)


@pytest.mark.parametrize(
  ('shape', 'to'),
  [((2, 6, 5, 3), (2, 3, 5, 3)), ((2, 4, 4, 3), (2, 2, 2, 5)), ((2, 7), (2, 4)),
   ((2, 5, 3), (2, 2, 3))],
)  # fmt: skip
def test_a_shortcut_pools_and_pads(shape, to):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = gates.shortcut(jnp.asarray(x), to)
  wanted = np.zeros(to)
  steps = [m // n for m, n in zip(shape[1:-1], to[1:-1], strict=True)]
  for index in np.ndindex(*to):
    batch, *place, channel = index
    if channel < shape[-1]:
      window = tuple(
        slice(i * s, (i + 1) * s) for i, s in zip(place, steps, strict=True)
      )
      wanted[index] = x[(batch, *window, channel)].mean()
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_term_of_a_sum_closes_to_nothing():
  x = jnp.ones((2, 3))
  term = functools.partial(gates.bypass, jnp.exp, x, around=gates.nothing)
  np.testing.assert_array_equal(term(False), np.zeros((2, 3)))
  np.testing.assert_allclose(
    term(jnp.float32(0.5)), np.exp(1) / 2 * np.ones((2, 3)), rtol=1e-6
  )


# --- Training ----------------------------------------------------------------


def trainer(graph, shape, strength=0.0, target=0.0, axis=None, rate=0.1):
  """(tx, step): weights and gates in one chain; pruning at every pass."""
  tx = gates.partition(
    optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-2)),
    optax.sgd(rate, momentum=0.9),
  )
  evaluate = functools.partial(cost.evaluate, cost.parameters_polynomial(graph))

  def loss_fn(p, x, y):
    values = gates.evaluate(p['gates'], shape)
    seen = structure.scale(graph, p['params'], values.units, values.blocks)
    rho = gates.remaining(values, shape, evaluate)
    error = jnp.mean((graph.fn(seen, x) - y) ** 2)
    return error + gates.penalty(rho, strength, target)

  def step(p, state, x, y):
    grads = jax.grad(loss_fn)(p, x, y)
    if axis:
      grads = jax.lax.pmean(grads, axis)
    updates, state = tx.update(grads, state, p)
    return optax.apply_updates(p, updates), state

  return tx, step


def batch_of(graph, n=8):
  draw = np.random.default_rng(3)
  x = jnp.asarray(draw.normal(size=(n, 3)), jnp.float32)
  return x, graph.fn(PARAMS, x)


def test_a_closed_unit_opens_again_where_the_task_needs_it(graph):
  shape = structure_of(graph)
  theta = gates.Gates({'two': jnp.array([1.0, 0.0, 1.0, 1.0])})
  tx, step = trainer(graph, shape)
  p = {'params': PARAMS, 'gates': theta}
  state, step = tx.init(p), jax.jit(step)
  x, y = batch_of(graph)
  for _ in range(20):
    p, state = step(p, state, x, y)
  values = gates.evaluate(p['gates'], shape)
  assert float(values.open.units['two'][1]) == 1


def test_the_target_is_met_in_one_compile_and_resumes_bit_by_bit(graph):
  shape = structure_of(graph)
  tx, step = trainer(graph, shape, strength=5.0, target=0.6, rate=0.02)
  p = {'params': PARAMS, 'gates': gates.init(shape)}
  step = jax.jit(chex.assert_max_traces(step, n=1))
  x, y = batch_of(graph)
  state, half = tx.init(p), None
  for i in range(120):
    p, state = step(p, state, x, y)
    if i == 59:
      half = jax.tree.map(np.asarray, (p, state))
  again = jax.tree.map(jnp.asarray, half)
  for _ in range(60):
    again = step(*again, x, y)
  chex.assert_trees_all_equal(again, (p, state))
  evaluate = functools.partial(cost.evaluate, cost.parameters_polynomial(graph))
  rho = gates.remaining(gates.evaluate(p['gates'], shape), shape, evaluate)
  assert 0.3 < float(rho) <= 0.65
  assert all(np.all((t >= 0) & (t <= 1.5)) for t in jax.tree.leaves(p['gates']))
  counted_equals_expected(graph, shape, p['gates'], p['params'], x)


def test_pmap_and_sharding_train_alike(graph):
  shape = structure_of(graph)
  p = {'params': PARAMS, 'gates': gates.init(shape, 0.7)}
  x, y = batch_of(graph)
  tx, step = trainer(graph, shape, strength=1.0)
  state = tx.init(p)
  alone = jax.jit(step)(p, state, x, y)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Explicit,))
  split, every = (
    NamedSharding(mesh, PartitionSpec(*a)) for a in (('data',), ())
  )
  with jax.set_mesh(mesh):
    everywhere = jax.device_put((p, state), every)
    sharded = jax.jit(step)(*everywhere, *jax.device_put((x, y), split))
  chex.assert_trees_all_close(sharded, alone, rtol=1e-4, atol=1e-6)
  _, step = trainer(graph, shape, strength=1.0, axis='data')
  parts = [z.reshape(4, 2, -1) for z in (x, y)]
  mapped = jax.pmap(step, 'data', in_axes=(None, None, 0, 0))(p, state, *parts)
  first = jax.tree.map(lambda z: z[0], mapped)
  chex.assert_trees_all_close(first, alone, rtol=1e-4, atol=1e-6)


def test_slimming_is_the_sum_of_the_scales():
  assert float(gates.slimming(PARAMS)) == pytest.approx(
    sum(float(jnp.sum(jnp.abs(PARAMS[n]['scale']))) for n in ('norm1', 'norm2'))
  )
  scale = {'scale': jnp.array([1.0, -2.0]), 'bias': jnp.ones(2)}
  assert gates.slimming({'BatchNorm_0': scale}) == 3  # As Linen calls it.
  with pytest.raises(ValueError, match='No leaf matches'):
    gates.slimming({'dense': {'kernel': jnp.ones(2)}})


# --- Bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('call', 'text'),
  [
    (lambda: gates.scale(-0.1), '`dead_zone` must be at least 0, got -0.1.'),
    (
      lambda: gates.init(gates.Structure({'a': 1}, blocks=('a',))),
      'different names; given twice: a.',
    ),
    (lambda: gates.init(gates.Structure({})), 'needs groups of units'),
    (lambda: gates.init(gates.Structure({'a': 0})), 'without: a.'),
    (
      lambda: gates.init(gates.Structure({'a': 1}, {'l': ('b',)})),
      "`layers` end in 'b'; known are: a.",
    ),
    (
      lambda: gates.init(gates.Structure({'a': 1}, inside={'l': ('a',)})),
      "`inside` speaks of 'l'; known are: none.",
    ),
    (
      lambda: gates.init(
        gates.Structure({'a': 1}, {'l': ()}, inside={'l': ('b',)})
      ),
      "`inside` holds 'b'; known are: a.",
    ),
    (
      lambda: gates.init(gates.Structure({'a': 1}, rivals=(('a',),))),
      "`rivals` holds 'a'; known are: none.",
    ),
    (
      lambda: gates.init(gates.Structure({'a': 1}), gated=['a', 'b']),
      "`gated` has 'b', which the structure does not; it has: a.",
    ),
    (
      lambda: gates.evaluate(
        gates.Gates({'z': jnp.ones(1)}), gates.Structure({'a': 1})
      ),
      "`units` has a gate for 'z', which .* does not have; it has: a.",
    ),
    (
      lambda: gates.evaluate(
        gates.Gates({'a': jnp.ones(2)}), gates.Structure({'a': 1})
      ),
      r"gate of 'a' must have shape \(1,\), got \(2,\)",
    ),
    (
      lambda: gates.penalty(jnp.float32(1), 1.0, target=1.5),
      r'`target` must be in \[0, 1\], got 1.5.',
    ),
    (
      lambda: gates.partition(optax.identity(), optax.identity(), 1.0, 1.0),
      'Gates need low < high, got 1.0 and 1.0.',
    ),
    (
      lambda: gates.shortcut(jnp.ones((2, 3, 4)), (2, 6, 4)),
      r'shrink the sides of \(2, 3, 4\) .* not give \(2, 6, 4\)',
    ),
    (
      lambda: gates.shortcut(jnp.ones((2, 4)), (2, 1, 4)),
      r'not give \(2, 1, 4\)',
    ),
  ],
)
def test_bad_input_is_named(call, text):
  with pytest.raises(ValueError, match=text):
    call()


def test_partition_needs_params():
  tx = gates.partition(optax.sgd(1.0), optax.sgd(1.0))
  p = {'params': jnp.ones(2), 'gates': jnp.ones(2)}
  with pytest.raises(ValueError, match='needs `params`'):
    tx.update(p, tx.init(p))
