"""What a user decides of groups: rules over their names, and who competes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import plans, structure
from jaxprune.structure import Choice, group_rules

PARAMS = {
  'in': jnp.ones((3, 8)),
  'block1': jnp.ones((8, 8)),
  'block2': jnp.ones((8, 8)),
  'wide': jnp.ones((8, 12)),
  'out': jnp.ones((12, 2)),
}
X = jnp.ones((1, 3))


def net(p, x):
  for name in PARAMS:
    x = jnp.tanh(x @ p[name])
  return x


def trace(**rules):
  named = {name.replace('_', '.*'): choice for name, choice in rules.items()}
  return structure.trace(net, PARAMS, X, rules=named)


def test_a_protected_group_is_gone_with_its_reason():
  graph = trace(block_=Choice(protect=True))
  assert list(graph.groups) == ['in', 'wide']
  assert graph.explain('block1', 1) == 'protected (8): a rule protects it'
  assert graph.explain('block2', 0) == 'protected (8): a rule protects it'


def test_tied_groups_are_one():
  graph = trace(block_=Choice(tie='blocks'))
  assert list(graph.groups) == ['in', 'block1', 'wide']
  members = {(m.path, m.axis) for m in graph.groups['block1'].members}
  assert members == {
    ('block1', 1),
    ('block2', 0),
    ('block2', 1),
    ('wide', 0),
  }
  plan = plans.from_kept(graph, {'block1': [0, 5]})
  small = plans.shrink(graph, plan, PARAMS)
  assert small['block2'].shape == (2, 2)
  free = structure.trace(net, PARAMS, X)
  with pytest.raises(ValueError, match='The plan is of graph'):
    plans.shrink(free, plan, PARAMS)


def test_the_first_rule_that_matches_decides():
  graph = trace(block2=Choice(), block_=Choice(protect=True))
  assert list(graph.groups) == ['in', 'block2', 'wide']


def test_a_graph_is_constrained_without_a_change_to_it():
  free = structure.trace(net, PARAMS, X)
  bound = free.constrain({'wide': Choice(protect=True)})
  assert list(free.groups) == ['in', 'block1', 'block2', 'wide']
  assert list(bound.groups) == ['in', 'block1', 'block2']
  assert list(bound.constrain({}).groups) == list(free.groups)
  more = bound.retrace(jnp.ones((7, 3)))
  assert more.fingerprint == bound.fingerprint != free.fingerprint


def test_widths_keep_to_the_rules():
  graph = trace(wide=Choice(least=0.3, most=9, round_to=4))
  group = graph.groups['wide']
  assert (group.least, group.most, group.round_to) == (4, 8, 4)
  assert graph.groups['in'][-3:] == (1, 8, 1)
  assert plans.from_widths(graph, {'wide': 8}).kept == (
    ('wide', tuple(range(8))),
  )
  for width in (1, 6, 12):
    with pytest.raises(ValueError, match=f'4 to 8 units in steps.*{width}'):
      plans.from_widths(graph, {'wide': width})
  with pytest.raises(ValueError, match=r'4 to 8 units in steps of 4.*got 12'):
    plans.from_kept(graph, {'in': [0]})


def test_a_rounded_group_may_stay_whole():
  graph = trace(wide=Choice(round_to=5))
  assert graph.groups['wide'][-3:] == (5, 12, 5)
  for width in (5, 10, 12):
    plans.from_widths(graph, {'wide': width})
  with pytest.raises(ValueError, match='in steps of 5'):
    plans.from_widths(graph, {'wide': 11})


@pytest.mark.parametrize(
  ('rules', 'error', 'message'),
  [
    ({'blok': Choice()}, ValueError, "No group matches 'blok'.*in, block1"),
    ({'wide': 8}, TypeError, "Rule 'wide' must be a Choice, got 8"),
    (
      {'.*': Choice(tie='all')},
      ValueError,
      "tie 'in' of 8 units and 'wide' of 12 as 'all'",
    ),
    (
      {'wide': Choice(round_to=0)},
      ValueError,
      "`round_to` of group 'wide' must be at least 1, got 0",
    ),
    (
      {'wide': Choice(least=13)},
      ValueError,
      "'wide' of 12 units cannot keep between 13 and 12",
    ),
    (
      {'wide': Choice(least=9, most=11, round_to=8)},
      ValueError,
      "No multiple of 8 lies between the limits of group 'wide'",
    ),
  ],
)
def test_a_rule_that_cannot_hold_is_named(rules, error, message):
  with pytest.raises(error, match=message):
    structure.trace(net, PARAMS, X, rules=rules)


def test_isomorphic_groups_share_a_pool():
  """block1 and block2 have square kernels before and after; wide has not."""
  layers = [{'w': jnp.ones((4, 4))} for _ in range(4)]
  layers.append({'w': jnp.ones((4, 6))})
  layers.append({'w': jnp.ones((6, 2))})

  def deep(p, x):
    for layer in p:
      x = x @ layer['w']
    return x

  graph = structure.trace(deep, layers, jnp.ones((1, 4)))
  assert group_rules.pools(graph) == {
    '0': '0',
    '1': '0',
    '2': '0',
    '3': '3',
    '4': '4',
  }
  scores = {'0': [1.0] * 4, '1': [3.0] * 4, '3': [5.0] * 4}
  by_group = structure.normalise(graph, scores)
  assert [float(by_group[name][0]) for name in scores] == [1, 1, 1]
  pooled = structure.normalise(graph, scores, over='isomorphic')
  assert [float(pooled[name][0]) for name in scores] == [0.5, 1.5, 1]
  zero = structure.normalise(graph, {'0': [0.0] * 4})['0']
  np.testing.assert_array_equal(zero, 0.0)


def test_bad_scores_are_named():
  graph = structure.trace(net, PARAMS, X)
  with pytest.raises(ValueError, match="`over` must be 'group' or 'isom"):
    structure.normalise(graph, {}, over='all')
  with pytest.raises(ValueError, match="There is no group 'x'; the groups are"):
    structure.normalise(graph, {'x': [1.0]})
