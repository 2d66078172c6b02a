"""Rules of a graph hold for every plan of it, wherever the plan comes from."""

import dataclasses
import time

import jax.numpy as jnp
import pytest

from jaxprune import cost, plans, structure
from jaxprune.structure import Choice

PARAMS = {
  'in': jnp.ones((3, 8)) / 3,
  'wide': jnp.ones((8, 12)) / 8,
  'out': jnp.ones((12, 2)) / 12,
}
X = jnp.ones((4, 3))


def net(p, x):
  return jnp.tanh(jnp.tanh(x @ p['in']) @ p['wide']) @ p['out']


FREE = structure.trace(net, PARAMS, X)
RULED = FREE.constrain({'wide': Choice(least=4, most=8, round_to=4)})
TAKES_A_PLAN = {
  'shrink': lambda g, p: plans.shrink(g, p, PARAMS),
  'grow': lambda g, p: plans.grow(g, p, PARAMS),
  'masks': lambda g, p: plans.masks(g, p, PARAMS),
  'specialise': plans.specialise,
  'masked': plans.masked,
  'widths': plans.widths,
  'diff': lambda g, p: plans.diff(g, p, p),
  'cost': cost.macs,
  'variables': cost.variables,
  'kept_indices': plans.kept_indices,
}


def with_width(width, fingerprint=RULED.fingerprint):
  return plans.Plan(fingerprint, (('wide', tuple(range(width))),))


@pytest.mark.parametrize('name', TAKES_A_PLAN)
@pytest.mark.parametrize('width', [2, 6, 12])
def test_a_width_that_no_rule_allows_is_refused_wherever_it_comes_from(
  name, width
):
  text = plans.to_json(with_width(width))
  message = rf"Group 'wide' must keep 4 to 8 units in steps of 4 .*got {width}"
  for plan in (with_width(width), plans.from_json(text)):
    with pytest.raises(ValueError, match=f'{message}: .*constrain'):
      TAKES_A_PLAN[name](RULED, plan)


def test_what_is_absent_is_whole_and_may_be_more_than_a_rule_allows():
  plan = plans.Plan(RULED.fingerprint)
  with pytest.raises(ValueError, match=r"'wide' must keep 4 to 8 .* got 12"):
    plans.shrink(RULED, plan, PARAMS)
  assert cost.macs(RULED) == cost.macs(FREE)
  found = cost.plan(
    RULED, {'wide': jnp.arange(12.0)}, cost.Budget(parameters=0.9)
  )
  assert plans.widths(RULED, found)['wide'][1] in (4, 8)


@pytest.mark.parametrize(
  ('choice', 'why'),
  [
    (Choice(protect=True), r"the rule 'in\|wide', which protects it"),
    (Choice(tie='both'), r"the rule 'in\|wide', which ties it as 'both'"),
  ],
  ids=['protect', 'tie'],
)
def test_a_plan_of_what_a_rule_protects_or_ties_names_the_rule(choice, why):
  params = {**PARAMS, 'wide': jnp.ones((8, 8)), 'out': jnp.ones((8, 2))}
  free = structure.trace(net, params, X)
  graph = free.constrain({'in|wide': choice})
  plan = plans.from_kept(free, {'wide': [0]})
  with pytest.raises(ValueError, match=f"'wide' stays whole .*{why}, .*1 unit"):
    plans.shrink(graph, plan, params)


def test_a_group_named_twice_is_refused():
  plan = plans.Plan(FREE.fingerprint, (('in', (0,)), ('in', (1,))))
  with pytest.raises(ValueError, match="has group 'in' twice"):
    plans.shrink(FREE, plan, PARAMS)


def image(p, x):
  h = jnp.tanh(jnp.tanh(x @ p['a(a+)+b']) @ p['b'])
  return jnp.mean(h, (1, 2)) @ p['c']


IMAGE = structure.trace(
  image,
  {
    'a(a+)+b': jnp.ones((3, 4)),
    'b': jnp.ones((4, 5)),
    'c': jnp.ones((5, 2)),
  },
  jnp.ones((2, 6, 6, 3)),
)


def test_a_cut_of_a_plan_is_a_path_and_never_a_pattern():
  """This pattern of a stranger's file ran for hours."""
  slow = '(b*)*' * 12 + 'z'
  plan = plans.Plan(IMAGE.fingerprint, resized=((slow, (4, 4)),))
  started = time.perf_counter()
  for call in (
    lambda: plans.specialise(IMAGE, plans.from_json(plans.to_json(plan))),
    lambda: plans.at(IMAGE, None, plan.resized),
    lambda: cost.macs(IMAGE, plan),
  ):
    with pytest.raises(ValueError, match='name a leaf by its whole path'):
      call()
  assert time.perf_counter() - started < 5
  sides = dataclasses.replace(plan, resized=(('b', (0, 4)),))
  with pytest.raises(ValueError, match='`resized` must be positive ints'):
    plans.specialise(IMAGE, sides)
  sides = dataclasses.replace(plan, resized=(), resolution=(-3, 4))
  with pytest.raises(ValueError, match='`resolution` must be positive ints'):
    plans.specialise(IMAGE, sides)


def test_the_path_of_a_leaf_is_taken_as_it_stands():
  assert structure.first_read(IMAGE, ['[bc]']) == ('b',)
  assert structure.first_read(IMAGE, ['a(a+)+b']) == ('a(a+)+b',)
  plan = plans.from_kept(IMAGE, {}, resized=[('b', (4, 4))])
  assert plans.at(IMAGE, None, plan.resized).args[0].shape == (2, 6, 6, 3)


@pytest.mark.parametrize(
  ('kept', 'message'),
  [
    ((('wide', (0.5, 1)),), 'must be an integer, got 0.5'),
    ((('wide', (True, 2)),), 'must be an integer, got True'),
    ((('wide', (1,)), ('wide', (2, 3))), "has group 'wide' twice"),
  ],
)
@pytest.mark.parametrize('name', TAKES_A_PLAN)
def test_a_plan_by_hand_names_whole_units_once(name, kept, message):
  plan = plans.Plan(FREE.fingerprint, kept)
  with pytest.raises((ValueError, TypeError), match=message):
    TAKES_A_PLAN[name](FREE, plan)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('[0, 1]', '[true, 2]'), 'The plan is damaged'),
    (('[0, 1]', '[0.5, 2]'), 'The plan is damaged'),
    (('[0, 1]', '[NaN, 2]'), 'JSON has no NaN'),
    (('[0, 1]', '[0, 1], "wide": [2, 3]'), "The JSON has 'wide' twice"),
    (('"version": 3', '"version": true'), 'The plan has format True'),
    (('[0, 1]', '[' * 100_000), 'This is no plan'),
  ],
)
def test_a_file_that_says_two_things_is_refused(changes, message):
  text = plans.to_json(plans.Plan(FREE.fingerprint, (('wide', (0, 1)),)))
  old, new = changes
  assert old in text
  with pytest.raises(ValueError, match=message):
    plans.from_json(text.replace(old, new))
