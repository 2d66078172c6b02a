"""The rules of a graph hold for every plan that it takes, however made."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxprune import cost, plans, proof, structure
from jaxprune.structure import Choice, stages

PARAMS = {'a': jnp.ones((3, 8)), 'b': jnp.ones((8, 8)), 'c': jnp.ones((8, 2))}
X = jnp.ones((1, 3))
RULES = {'a': Choice(least=4, most=6, round_to=2)}


def net(p, x):
  return jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['c']


FREE = structure.trace(net, PARAMS, X)
BOUND = structure.trace(net, PARAMS, X, rules=RULES)
ROUTES = {
  'shrink': lambda g, p: plans.shrink(g, p, PARAMS),
  'grow': lambda g, p: plans.grow(g, p, PARAMS),
  'masks': lambda g, p: plans.masks(g, p, PARAMS),
  'specialise': plans.specialise,
  'masked': plans.masked,
  'widths': plans.widths,
  'check': lambda g, p: proof.check(g, p, PARAMS, X),
  'cost': cost.macs,
  'diff': lambda g, p: plans.diff(g, p, p),
  'compose': lambda g, p: plans.compose(g, p, g, p),
}


def by_hand(graph, **kept):
  entries = tuple((name, tuple(range(n))) for name, n in kept.items())
  return plans.Plan(graph.fingerprint, entries)


@pytest.mark.parametrize('route', ROUTES)
def test_a_plan_by_hand_or_from_a_file_keeps_to_limits(route):
  assert FREE.fingerprint == BOUND.fingerprint
  for bad in ({'a': 2}, {'a': 5}, {'a': 7}, {'b': 3}):
    plan = plans.from_json(plans.to_json(by_hand(BOUND, **bad)))
    came = bad.get('a', 8)
    with pytest.raises(
      ValueError, match=f"'a' must .*4 to 6.*of 2.*got {came}"
    ):
      ROUTES[route](BOUND, plan)


def test_a_plan_within_limits_is_taken_and_no_plan_is_the_network():
  plan = by_hand(BOUND, a=4, b=3)
  assert plans.shrink(BOUND, plan, PARAMS)['b'].shape == (4, 3)
  assert plans.widths(BOUND, by_hand(BOUND))['a'] == (8, 8)
  assert cost.macs(BOUND) == 3 * 8 + 64 + 16


@pytest.mark.parametrize('route', ROUTES)
def test_a_plan_that_cuts_a_protected_group_says_so(route):
  bound = FREE.constrain({'b': Choice(protect=True)})
  for fingerprint in (FREE.fingerprint, bound.fingerprint):
    plan = dataclasses.replace(by_hand(FREE, b=3), graph=fingerprint)
    with pytest.raises(
      ValueError, match="'b' must stay whole, a rule protects"
    ):
      ROUTES[route](bound, plan)


def test_sides_of_a_plan_by_hand_are_positive():
  for change in ({'resolution': (0,)}, {'resized': (('c', (-1,)),)}):
    plan = dataclasses.replace(by_hand(FREE), **change)
    with pytest.raises(ValueError, match='must be positive ints'):
      plans.specialise(FREE, plan)


def test_a_cut_out_of_a_file_is_a_path_and_never_a_pattern():
  """This one would need more than a lifetime on a path of forty letters."""
  params = {'x' * 40: jnp.ones((3, 4)), 'c': jnp.ones((4, 2))}
  fn = lambda p, x: x @ p['x' * 40] @ p['c']
  graph = structure.trace(fn, params, X)
  plan = plans.Plan(graph.fingerprint, resized=(('(x+)+y', (2,)),))
  plan = plans.from_json(plans.to_json(plan))
  check = lambda graph, plan: proof.check(graph, plan, params, X)
  at = lambda graph, plan: plans.at(graph, None, plan.resized)
  for route in (plans.specialise, plans.widths, cost.macs, check, at):
    with pytest.raises(ValueError, match=r"literally, got '\(x\+\)\+y'"):
      route(graph, plan)
  with pytest.raises(ValueError, match='literally'):
    plans.from_kept(graph, {}, resized=[('c.*', (2,))])
  assert stages.paths(graph, ['c.*']) == ('c',)
  with pytest.raises(ValueError, match='matches no leaf'):
    stages.paths(graph, ['d'])


def test_a_path_with_signs_of_patterns_stands_for_itself():
  params = {'a+': jnp.ones((3, 4)), 'aa': jnp.ones((4, 2))}
  fn = lambda p, x: x @ p['a+'] @ p['aa']
  graph = structure.trace(fn, params, X)
  assert stages.paths(graph, ['a+', 'aa']) == ('a+', 'aa')
