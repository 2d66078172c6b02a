"""Latency tables: what is measured, and how it is put together again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxprune import cost, structure

SPEC = jax.ShapeDtypeStruct


def net(p, x):
  x = jnp.tanh(x @ p['in'])
  for name in 'abc':
    x = x + jnp.tanh(x @ p[name]['up']) @ p[name]['down']
  return x @ p['out']


PARAMS = {
  'in': SPEC((4, 8), jnp.float32),
  **{
    name: {'up': SPEC((8, 6), jnp.float32), 'down': SPEC((6, 8), jnp.float32)}
    for name in 'abc'
  },
  'out': SPEC((8, 3), jnp.float32),
}
GRAPH = structure.trace(net, PARAMS, SPEC((2, 4), jnp.float32))


def ticking():
  """A clock on which the n-th call takes n milliseconds."""
  now, calls = 0.0, itertools.count(1)

  def clock():
    nonlocal now
    now += 1e-3 * next(calls)
    return now

  return clock


@pytest.fixture(scope='module')
def table():
  return cost.measure(GRAPH, fractions=(0.5, 1.0), rounds=1, clock=ticking())


def test_a_part_for_each_product(table):
  """Eight products; of the three branches each is measured once."""
  ticks = []
  cost.measure(
    GRAPH, fractions=(0.5, 1.0), rounds=2, tick=lambda: ticks.append(1)
  )
  assert len(table.names) == 8
  assert all(name.startswith('dot_general at ') for name in table.names)
  # Calls that compute nothing; in and out, 2 widths each; up and down, 4 each;
  # whole networks; then two rounds. The first up has x from another part.
  assert len(ticks) == 2 + (2 + 2 + 4 + 4) + (2 + 3) + 2


def test_knots_are_sizes(table):
  """up sums over 8 and writes 6, down the other way round; 2 is the batch."""
  _, up, down, *_ = table.knots.tolist()
  assert up[:2] == [[4, 8], [3, 6]]
  assert down[:2] == [[3, 6], [4, 8]]


def test_times_never_fall():
  """Whatever the clock says once two calls without work were timed."""
  rng, now, calls = np.random.default_rng(0), 0.0, itertools.count()

  def noisy():
    nonlocal now
    now += rng.uniform(1e-3, 2e-3) if next(calls) > 8 else 1e-4
    return now

  table = cost.measure(GRAPH, fractions=(0.5, 1.0), rounds=1, clock=noisy)
  assert len(np.unique(table.ms)) > 4
  for axis in range(1, table.ms.ndim):
    assert (np.diff(table.ms, axis=axis) >= 0).all()
  assert (np.diff(table.wholes) >= 0).all()


def test_fitted_widths_are_met(table):
  """At the fractions of all widths, where the whole network was measured."""
  for k, divisor in ((-1, 1), (-2, 2)):
    widths = {name: g.size // divisor for name, g in GRAPH.groups.items()}
    np.testing.assert_allclose(cost.predict(table, widths), table.wholes[1, k])


def test_a_dropped_block_takes_no_time(table):
  assert set(itertools.chain(*table.blocks)) == set(GRAPH.blocks)
  values = cost.variables(GRAPH)
  closed = cost.predict(table, values | dict.fromkeys(GRAPH.blocks, 0))
  assert closed < cost.predict(table, values)


def test_candidates_in_any_arithmetic(table):
  rng = np.random.default_rng(0)
  many = {n: rng.integers(1, g.size + 1, 20) for n, g in GRAPH.groups.items()}
  found = cost.predict(table, many)
  assert found.shape == (20,)
  one = {name: int(value[3]) for name, value in many.items()}
  np.testing.assert_allclose(found[3], cost.predict(table, one))
  floats = {k: jnp.asarray(v, jnp.float32) for k, v in many.items()}
  each = lambda widths: cost.predict(table, widths)
  np.testing.assert_allclose(jax.jit(jax.vmap(each))(floats), found, rtol=1e-4)
  some = {k: jnp.float32(v[3]) for k, v in many.items()}
  slope = jax.jit(jax.grad(each))(some)
  assert all(float(x) >= 0 for x in jax.tree.leaves(slope))
  assert any(float(x) > 0 for x in jax.tree.leaves(slope))


def test_the_error_is_of_networks_it_was_not_fitted_to(table):
  assert [check.name for check in table.checks] == [
    '75% of every width',
    'fractions by turns',
    'in the other order',
  ]
  errors = [abs(c.predicted / c.measured - 1) for c in table.checks]
  assert table.error == max(errors)
  assert str(table).count('dot_general') == 8
  assert '75% of every width' in str(table)


def test_convolutions_loops_and_integers_are_measured():
  """A part holds a loop whole; indices are zeros."""

  def fn(p, tokens):
    x = p['table'][tokens]
    step = lambda h, x: (jnp.tanh(h @ p['w'] + x), None)
    h, _ = jax.lax.scan(step, jnp.zeros((2, 4)), jnp.swapaxes(x, 0, 1))
    return h @ p['v']

  params = {
    'table': SPEC((9, 4), jnp.float32),
    'w': SPEC((4, 4), jnp.float32),
    'v': SPEC((4, 2), jnp.float32),
  }
  graph = structure.trace(fn, params, SPEC((2, 3), jnp.int32))
  table = cost.measure(graph, fractions=(0.5, 1.0), rounds=1)
  assert len(table.names) == 2
  assert table.names[0].startswith('scan at ')


@pytest.mark.parametrize('fractions', [(1.0,), (0.5, 0.9), (0, 1), (1, 0.5, 1)])
def test_fractions_must_rise_to_one(fractions):
  with pytest.raises(ValueError, match='must rise from above 0 to'):
    cost.measure(GRAPH, fractions=fractions)


def test_a_symbolic_size_is_refused():
  (batch,) = export.symbolic_shape('batch')
  graph = structure.trace(net, PARAMS, SPEC((batch, 4), jnp.float32))
  with pytest.raises(ValueError, match='trace it with the batch that is to be'):
    cost.measure(graph)
