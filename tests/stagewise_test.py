"""Tests of stage-wise pruning."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow

import jaxprune as jp
from jaxprune import models, plans, tree
from jaxprune.search import stagewise
from jaxprune.structure import cut

X = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
Y = jnp.arange(8) % 3
task = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(scope='module')
def net():
  return models.resnet_digits(
    channels=(4, 8, 8), strides=(1, 2, 1), num_classes=3
  )


@pytest.fixture(scope='module')
def variables(net):
  return jax.jit(net.init)(jax.random.key(0), X)


@pytest.fixture(scope='module')
def whole(net, variables):
  step = lambda variables, x: net.apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  return jp.trace(step, variables, X)


@pytest.fixture(scope='module')
def stages(whole, variables):
  return stagewise.graphs(
    cut(whole, ['.*stage2.*', '.*stage3.*']), variables, X
  )


@pytest.fixture(scope='module')
def space(stages):
  return [stagewise.choices(g, [0.25, 0.5, 0.75]) for g in stages]


def full(space, n=1):
  return [{k: jnp.full(n, v[-1]) for k, v in part.items()} for part in space]


@pytest.fixture(scope='module')
def gradients(stages, space):
  """The gradient of each stage's loss and of the total; one compile."""
  widths = stagewise.sample(jax.random.key(0), space, 2)

  @jax.jit
  def jacobian(variables):
    def parts(params):
      found, _ = stagewise.losses(
        stages, {**variables, 'params': params}, X, Y, widths, task=task
      )
      return jnp.append(found.stages, found.task), found

    return jax.jacrev(parts, has_aux=True)(variables['params'])

  return jacobian


def test_the_gradient_of_a_stage_stays_in_it(gradients, variables):
  jacobian, found = gradients(variables)
  for path, leaf in tree.leaves(jacobian).items():
    number = next((k for k in (2, 3) if f'stage{k}' in path), 1)
    number = 3 if path.startswith('head') else number
    for k in range(3):
      size = float(jnp.max(jnp.abs(leaf[k])))
      if k + 1 != number:
        assert size == 0, (path, k)
      elif path.endswith('kernel'):
        assert size > 0, (path, k)
    assert 'kernel' not in path or float(jnp.max(jnp.abs(leaf[3]))) > 0
  np.testing.assert_allclose(
    found.total, found.task + found.stages.sum(), rtol=1e-6
  )


@pytest.mark.slow
def test_at_full_width_nothing_is_left_to_learn(stages, space, variables):
  found, new = stagewise.losses(stages, variables, X, Y, full(space), task=task)
  np.testing.assert_allclose(found.stages, 0, atol=1e-9)
  stats = tree.leaves(variables['batch_stats'])
  assert {f'batch_stats/{path}' for path in stats} == new.keys()
  moved = stagewise.updated(variables, new)
  assert tree.leaves(moved).keys() == tree.leaves(variables).keys()
  for path, value in new.items():
    np.testing.assert_array_equal(tree.leaves(moved)[path], value)


def test_the_full_network_is_the_function(net, stages, space, variables):
  found, new = stagewise.losses(stages, variables, X, Y, full(space), task=task)
  logits, state = net.apply(variables, X, train=True, mutable=['batch_stats'])
  np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
  for path, value in tree.leaves(state).items():
    np.testing.assert_allclose(new[path], value, rtol=1e-4, atol=1e-6)


def test_the_stages_of_a_model_are_those_that_are_cut(
  net, stages, space, variables
):
  own = [
    lambda v, h, k=k: net.apply(
      v, h, train=True, mutable=['batch_stats'], start=k, stop=k + 1
    )
    for k in range(net.num_stages)
  ]
  theirs = stagewise.graphs(own, variables, X)
  widths = stagewise.sample(jax.random.key(5), space, 1)
  both = [
    stagewise.losses(graphs, variables, X, Y, widths, task=task)
    for graphs in (theirs, stages)
  ]
  (found, new), (wanted, cut_new) = both
  np.testing.assert_allclose(found.stages, wanted.stages, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.total, wanted.total, rtol=1e-4)
  assert new.keys() == cut_new.keys()
  for path, value in new.items():
    np.testing.assert_allclose(value, cut_new[path], rtol=1e-4, atol=1e-6)


def test_a_masked_stage_equals_the_sliced_one(stages, space, variables):
  widths = stagewise.sample(jax.random.key(3), space, 3)
  h = X
  for number, (graph, drawn) in enumerate(zip(stages, widths, strict=True)):
    target, _ = graph.fn(variables, h)
    last = number == len(stages) - 1
    found = stagewise.proxy(graph, variables, h, target, drawn, last=last)
    for i in (0, 3):  # The narrowest, and one at random.
      chosen = {name: int(w[i]) for name, w in drawn.items()}
      plan = plans.from_widths(graph, chosen)
      small = plans.shrink(graph, plan, variables)
      out, _ = plans.specialise(graph, plan)(small, h)
      if last:
        expected = np.mean(
          jp.plans.recovery.logit_distillation(out, target, temperature=1.0)
        )
      else:
        expected = np.mean((out - target) ** 2) / np.var(target)
      np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)
      exact = jp.cost.macs(graph, plan)
      assert stagewise.macs(graph, drawn)[i] == exact
    h = target


def test_a_teacher_trained_before_is_left_alone(stages, space, variables):
  widths = stagewise.sample(jax.random.key(0), space, 1, tiny=False)
  teacher = jax.tree.map(lambda x: 1.1 * x, variables)

  def total(params, teacher):
    found, new = stagewise.losses(
      stages, params, X, Y, widths, task=task, teacher=teacher
    )
    assert new == {}
    return found.total

  mine, theirs = jax.jit(jax.grad(total, (0, 1)))(variables, teacher)
  assert all(float(jnp.max(jnp.abs(g))) == 0 for g in jax.tree.leaves(theirs))
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(mine)) > 0


def test_a_chain_feeds_a_sub_network_its_own_feature(stages, space, variables):
  widths = stagewise.sample(jax.random.key(0), space, 1)
  first, second, _ = stages
  whole = plans.supernet(first)

  @jax.jit
  def both(variables):
    found, _ = stagewise.losses(
      stages, variables, X, Y, widths, task=task, source='chain'
    )
    target, _ = second.fn(variables, first.fn(variables, X)[0])
    errors = []
    for i in range(2):
      one = [{n: w[i : i + 1] for n, w in part.items()} for part in widths]
      units = {n: m[0] for n, m in stagewise.prefix(first, one[0]).items()}
      own, _ = whole(variables, units, {}, X)
      errors.append(stagewise.proxy(second, variables, own, target, one[1]))
    return found.stages[1], jnp.mean(jnp.stack(errors))

  found, wanted = both(variables)
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_one_compile_serves_every_sample(stages, space, variables):
  compiles = 0

  @jax.jit
  def step(variables, key):
    nonlocal compiles
    compiles += 1
    widths = stagewise.sample(key, space, 1)
    return stagewise.losses(stages, variables, X, Y, widths, task=task)[0].total

  found = {float(step(variables, jax.random.key(k))) for k in range(4)}
  assert compiles == 1
  assert len(found) > 1


@pytest.mark.parametrize('how', ['explicit', slow('auto'), slow('pmap')])
def test_several_devices_give_the_same(stages, space, variables, how):
  widths = stagewise.sample(jax.random.key(0), space, 1)

  def total(variables, x, y):
    return stagewise.losses(stages, variables, x, y, widths, task=task)[0].total

  want = jax.jit(total)(variables, X, Y)
  if how == 'pmap':
    every = lambda x: jnp.stack([x] * 4)
    found = jax.pmap(total, in_axes=(None, 0, 0))(variables, every(X), every(Y))
  else:
    kind = AxisType.Auto if how == 'auto' else AxisType.Explicit
    mesh = jax.make_mesh((4,), ('data',), axis_types=(kind,))
    split, every = (NamedSharding(mesh, P(*a)) for a in (('data',), ()))
    with jax.set_mesh(mesh):
      found = jax.jit(total)(
        jax.device_put(variables, every), *jax.device_put((X, Y), split)
      )
  np.testing.assert_allclose(found, np.broadcast_to(want, found.shape), 1e-5)


def test_samples_are_choices_and_the_tiny_is_first(space):
  drawn = stagewise.sample(jax.random.key(0), space, 50)
  for part, allowed in zip(drawn, space, strict=True):
    for name, widths in part.items():
      assert widths[0] == allowed[name][0]
      assert set(np.asarray(widths[1:])) == set(allowed[name])
  with pytest.raises(ValueError, match='one sub-network or more'):
    stagewise.sample(jax.random.key(0), space, 0, tiny=False)


def test_choices_are_rounded_and_checked(stages):
  (name, *_) = stages[2].groups
  assert stagewise.choices(stages[2], [0.1, 0.5], round_to=4)[
    name
  ].tolist() == [4, 8]
  with pytest.raises(ValueError, match=r'\(0, 1\], got \[1.5\]'):
    stagewise.choices(stages[2], [1.5])


def test_what_cannot_be_is_named(whole, stages, space, variables):
  with pytest.raises(ValueError, match='3 stages, and the widths of 2'):
    stagewise.losses(stages, variables, X, Y, full(space)[:2], task=task)
  mlp = {'a': jnp.ones((2, 4)), 'b': jnp.ones((4, 2))}
  parts = cut(
    jp.trace(lambda p, x: x @ p['a'] @ p['b'], mlp, jnp.ones((1, 2))), ['b']
  )
  with pytest.raises(ValueError, match='Stage 0 of 2 has no inner group'):
    stagewise.graphs(parts, mlp, jnp.ones((1, 2)))


def test_the_plan_of_the_whole_keeps_the_cost_of_the_stages(
  whole, stages, space, variables
):
  widths = [
    {name: int(w[0]) for name, w in part.items()}
    for part in stagewise.sample(jax.random.key(7), space, 0)
  ]
  plan = stagewise.plan(whole, widths)
  each = [stagewise.macs(g, w) for g, w in zip(stages, widths, strict=True)]
  assert jp.cost.macs(whole, plan) == sum(map(int, each))
  jp.check(whole, plan, variables, X)


# --- The knapsack ------------------------------------------------------------

items = st.lists(
  st.tuples(st.integers(0, 8), st.integers(0, 6)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(st.lists(items, min_size=1, max_size=4), st.integers(0, 24))
def test_the_knapsack_is_the_best_of_all(stages, limit):
  values = [[float(v) for v, _ in stage] for stage in stages]
  costs = [[c for _, c in stage] for stage in stages]
  found = [
    (sum(v[i] for v, i in zip(values, index, strict=True)), index)
    for index in itertools.product(*(range(len(v)) for v in values))
    if sum(c[i] for c, i in zip(costs, index, strict=True)) <= limit
  ]
  if not found:
    with pytest.raises(ValueError, match='above the limit'):
      stagewise.knapsack(values, costs, limit)
    return
  index = stagewise.knapsack(values, costs, limit)
  assert sum(c[i] for c, i in zip(costs, index, strict=True)) <= limit
  best = sum(v[i] for v, i in zip(values, index, strict=True))
  assert best == min(value for value, _ in found)


def test_the_knapsack_refuses_what_it_cannot_sum():
  with pytest.raises(ValueError, match='Stage 1 needs a finite value'):
    stagewise.knapsack([[1.0], [np.nan]], [[1], [1]], 5)
  with pytest.raises(
    ValueError, match=r'of stage 0 must be whole, got \[1.5\]'
  ):
    stagewise.knapsack([[1.0], [1.0]], [[1.5], [1]], 5)
  with pytest.raises(ValueError, match='together cost 2, above the limit of 1'):
    stagewise.knapsack([[1.0], [1.0]], [[1], [1]], 1)
