"""Vectors, their costs and plans, and the network under them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from traces import counted

import jaxprune as jp
from jaxprune import cost, models, plans, tree
from jaxprune.search import estimator, evolution, joint
from jaxprune.structure.sizes import padded

KEY = jax.random.key(0)
SIDES = (5, 7, 8)
MODEL = models.ResNet((4, 6), (2, 2), 3, stem='small')
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def trained(variables, x):
  return MODEL.apply(variables, x, train=True, mutable=['batch_stats'])


@functools.cache
def variables():
  drawn = jax.jit(MODEL.init)(KEY, jnp.zeros(IMAGES.shape))
  leaves, structure = jax.tree.flatten(drawn)
  keys = jax.random.split(KEY, len(leaves))
  # No mean of 0 and no scale of 1: what was masked wrongly would not show.
  return structure.unflatten(
    [
      x + 0.3 * jnp.abs(jax.random.normal(key, x.shape))
      for x, key in zip(leaves, keys, strict=True)
    ]
  )


@functools.cache
def made():
  """The space of the training form, and its cost."""
  graph = jp.trace(trained, variables(), IMAGES)
  space = joint.space(graph, IMAGES, sides=SIDES)
  return space, joint.coster(space)


def drawn(seed, count=None):
  rng = np.random.default_rng(seed)
  pick = lambda ladder: (
    int(rng.choice(ladder)) if count is None else rng.choice(ladder, count)
  )
  return jax.tree.map(pick, made()[0].ladders)


def mlp(widths=(8, 6)):
  sizes = [1, *widths, 1]
  params = {
    f'w{i}': jnp.ones(shape)
    for i, shape in enumerate(itertools.pairwise(sizes))
  }

  def fn(params, x):
    for name in sorted(params):
      x = x @ params[name]
    return x

  return jp.trace(fn, params, jnp.ones((1, 1)))


# --- Spaces and vectors ------------------------------------------------------


def test_a_space_by_hand():
  space = joint.space(mlp(), round_to=4, keep={'w1': 6})
  assert space.ladders.widths['w0'].tolist() == [4, 8]
  assert space.ladders.widths['w1'].tolist() == [6]
  assert space.sides == ()
  assert space.high.side is None
  vector = joint.PruningVector({'w0': 5.9, 'w1': 1.0}, {})
  assert joint.rounded(space, vector).widths == {'w0': 4, 'w1': 6}
  vector = joint.PruningVector({'w0': 6.1, 'w1': 1.0}, {})
  assert joint.rounded(space, vector).widths == {'w0': 8, 'w1': 6}
  unit = joint.to_unit(space, space.low)
  assert float(unit.widths['w0']) == 0.5
  assert joint.from_unit(space, unit) == space.low


def test_stages_and_ties_come_from_the_trace():
  space, _ = made()
  assert space.stages == {
    'stage1': ('stage1_block1', 'stage1_block2'),
    'stage2': ('stage2_block2',),
  }
  # The stem is tied to the first stage, the projection to the second.
  assert len(space.ladders.widths) == 6
  given = {'all': ('stage1_block2', 'stage2_block2')}
  assert joint.space(space.graph, stages=given).stages == given


def test_rounding_is_the_same_traced_and_stacked():
  space, _ = made()
  rng = np.random.default_rng(0)
  units = jax.tree.map(lambda _: rng.uniform(-0.2, 1.3, 20), space.high)
  scaled = jax.tree.map(lambda u, n: u * n, units, space.high)
  host = joint.rounded(space, scaled)
  traced = jax.jit(lambda v: joint.rounded(space, v))(
    jax.tree.map(jnp.float32, scaled)
  )
  jax.tree.map(np.testing.assert_array_equal, host, traced)
  again = joint.rounded(space, jax.tree.map(jnp.asarray, host))
  jax.tree.map(np.testing.assert_array_equal, host, again)


def test_the_last_channel_is_never_removed():
  space, _ = made()
  nothing = jax.tree.map(lambda _: -5.0, space.high)
  vector = joint.from_unit(space, nothing)
  assert set(vector.widths.values()) == {1}
  assert set(vector.depths.values()) == {0}
  assert vector.side == SIDES[0]
  units, _ = joint.masks(space, vector)
  assert all(int(mask.sum()) == 1 and bool(mask[0]) for mask in units.values())
  kept = dict(joint.plan(space, vector).kept)
  assert all(index == (0,) for index in kept.values())


def test_a_vector_is_one_plan():
  space, _ = made()
  vector = space.high._replace(depths={'stage1': 1, 'stage2': 0}, side=7)
  vector.widths['stem'] = 3
  plan = joint.plan(space, vector)
  assert plan.dropped == ('stage1_block2', 'stage2_block2')
  assert plan.resolution == (7, 7)
  assert plan.kept == (('stem', (0, 1, 2)),)
  assert joint.plan(space, space.high) == plans.from_kept(space.graph, {})
  text = joint.to_json(vector)
  assert joint.from_json(text) == vector
  assert joint.plan(space, joint.from_json(text)) == plan


def test_json_that_is_no_vector_is_refused():
  with pytest.raises(ValueError, match='This is no pruning vector'):
    joint.from_json('{"widths": 3}')
  with pytest.raises(ValueError, match='This is no pruning vector'):
    joint.from_json('{"version": 2, "widths": {"a": "3"}, "depths": {}}')
  with pytest.raises(ValueError, match='has format 9, this version'):
    joint.from_json('{"version": 9, "widths": {}, "depths": {}}')
  old = '{"version": 1, "widths": {"a": 2}, "depths": {}, "side": 28}'
  assert joint.from_json(old) == joint.PruningVector({'a': 2}, {}, 28)


def test_a_vector_of_another_space_is_refused_by_name():
  space, price = made()
  other = joint.PruningVector({'stem': 3, 'neck': 2}, space.high.depths, 8)
  uses = (
    price, functools.partial(joint.plan, space),
    functools.partial(joint.masks, space),
    functools.partial(joint.rounded, space),
  )  # fmt: skip
  for use in uses:
    with pytest.raises(ValueError, match=r"it lacks 'widths/st.* no 'widths/n"):
      use(other)
    with pytest.raises(ValueError, match=r"it lacks 'side', and .* no other\."):
      use(space.high._replace(side=None))
  with pytest.raises(ValueError, match=r"lacks nothing, .* no 'side'\."):
    joint.plan(joint.space(space.graph), space.high)


def test_restricted_spaces_leave_the_rest_whole():
  space, _ = made()
  only = joint.restrict(space, depths=True)
  assert only.low.widths == space.high.widths
  assert only.low.side == 8
  assert only.low.depths == space.low.depths


# --- Cost --------------------------------------------------------------------


def test_costs_are_those_of_the_plans():
  space, price = made()
  for seed in range(5):
    vector = drawn(seed)
    graph = space.graphs[SIDES.index(vector.side)]
    plan = plans.from_widths(
      graph, vector.widths, dropped=joint.plan(space, vector).dropped
    )
    assert price(vector) == cost.macs(graph, plan)
  parameters = joint.coster(space, cost.parameters_polynomial)
  assert parameters(space.high) == cost.parameters(space.graph)


def test_many_costs_are_exact_and_traced_ones_close():
  space, price = made()
  many = drawn(0, 50)
  one = lambda k: jax.tree.map(lambda x: int(x[k]), many)
  exact = price(many)
  assert exact.tolist() == [price(one(k)) for k in range(50)]
  traced = jax.jit(price)(jax.tree.map(jnp.asarray, many))
  np.testing.assert_allclose(traced, exact, rtol=1e-5)
  # Between two sides it is interpolated, and it grows with every coordinate.
  middle = space.high._replace(side=jnp.float32(6.0))
  ends = [price(space.high._replace(side=side)) for side in (5, 7)]
  np.testing.assert_allclose(price(middle), np.mean(ends), rtol=1e-5)
  floats = jax.tree.map(jnp.float32, space.high)
  slopes = jax.grad(price)(floats._replace(side=jnp.float32(7.5)))
  assert all(float(s) > 0 for s in jax.tree.leaves(slopes))


def test_milliseconds_of_a_table_are_a_cost():
  """The part takes as many as it has units, the whole twice that."""
  table = cost.Table(
    names=('w0',), sizes=(({('w0',): 1},),), blocks=((),),
    knots=np.array([[[1.0, 8.0]]]), ms=np.array([[1.0, 8.0]]),
    wholes=np.array([[0.0, 10.0], [0.0, 20.0]]), checks=(),
  )  # fmt: skip
  space = joint.space(mlp((8,)))
  price = joint.coster(
    space, lambda graph: functools.partial(cost.predict, table)
  )
  assert price(joint.PruningVector({'w0': 4}, {})) == pytest.approx(8)
  many = joint.PruningVector({'w0': np.array([1, 5])}, {})
  np.testing.assert_allclose(price(many), [2, 10])
  ones = joint.PruningVector({'w0': 1.0}, {})
  assert joint.project(space, price, 0.5, ones).widths == {'w0': 4}
  assert joint.project(space, price, 14, ones).widths == {'w0': 7}


def test_the_penalty_by_hand():
  found = [joint.penalty(6.0, 3.0, k) for k in ('hinge', 'two_sided', 'none')]
  np.testing.assert_allclose(found, [np.log(2), np.log(2), 0], rtol=1e-6)
  below = [joint.penalty(1.5, 3.0, k) for k in ('hinge', 'two_sided')]
  np.testing.assert_allclose(below, [0, np.log(2)], rtol=1e-6)


def test_the_objective_adds_the_penalty():
  space = joint.space(mlp())
  price = joint.coster(space)  # a + a b + b.
  loss = lambda v: v.widths['w0'].astype(jnp.float32)
  call = joint.objective(space, loss, price, 31.0, weight=2.0)
  unit = joint.PruningVector({'w0': jnp.array([1.0, 0.5]),
                              'w1': jnp.array([1.0, 0.5])}, {})  # fmt: skip
  # Costs: 8 + 48 + 6 = 62 and 4 + 12 + 3 = 19.
  np.testing.assert_allclose(call(unit), [8 + 2 * np.log(2), 4], rtol=1e-5)


@pytest.mark.parametrize('target', [0.05, 0.15, 0.25, 0.6, 0.97])
def test_the_budget_is_met_and_never_passed(target):
  space, price = made()
  whole = joint.whole(space, price)
  for seed in range(3):
    start = joint.to_unit(space, drawn(seed))
    start = jax.tree.map(float, start)
    vector = joint.project(space, price, target, start, tolerance=0.05)
    assert 0.95 * target * whole <= price(vector) <= target * whole
    assert joint.rounded(space, jax.tree.map(float, vector)) == vector


def test_a_vector_far_outside_of_the_ranges_meets_it():
  space = joint.space(mlp((30, 20)))
  price = joint.coster(space)
  whole = joint.whole(space, price)
  for far in (1.5, 30.0, -30.0, np.inf, -np.inf):
    vector = joint.project(
      space, price, 0.3, joint.PruningVector({'w0': far, 'w1': 0.5}, {})
    )
    assert 0.995 * 0.3 * whole <= price(vector) <= 0.3 * whole
  lost = joint.PruningVector({'w0': np.nan, 'w1': 0.5}, {})
  with pytest.raises(ValueError, match='1 of the 2 coordinates are nan: some'):
    joint.project(space, price, 0.3, lost)


def test_a_real_network_meets_it_within_half_a_percent():
  model = models.resnet20(shortcut='projection')
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(model.init, KEY, x)
  graph = jp.trace(lambda v, x: model.apply(v, x), params, x)
  space = joint.space(graph, x, sides=(16, 24, 32))
  price = joint.coster(space)
  whole = joint.whole(space, price)
  for target in (0.1, 0.25, 0.5):
    uniform = joint.uniform(space, price, target)
    assert uniform.side == 32
    assert set(uniform.depths.values()) == {2, 3}
    ones = jax.tree.map(lambda _: 1.0, space.high)
    for vector in (uniform, joint.project(space, price, target, ones)):
      assert 0.995 * target * whole <= price(vector) <= target * whole
  small = joint.uniform(space, price, 0.2, space.high._replace(side=16))
  assert small.side == 16
  with pytest.raises(ValueError, match=r'and side 17 of `start`: .* and 16\.'):
    joint.uniform(space, price, 0.2, space.high._replace(side=17))


def test_a_range_without_the_target_names_the_nearest():
  space, price = made()
  shallow = joint.restrict(space, depths=True)
  least = price(shallow.low)
  with pytest.raises(ValueError, match=rf'the nearest has {least} \('):
    joint.limit(shallow, price, 0.01)
  wide = joint.space(space.graph, keep={'.*': 0.5})
  ones = jax.tree.map(lambda _: 1.0, wide.high)
  price_wide = joint.coster(wide)
  with pytest.raises(ValueError, match='hold no network of cost'):
    joint.project(wide, price_wide, 0.01, ones)
  half = joint.restrict(space, side=True)
  ones = jax.tree.map(lambda _: 1.0, half.high)
  with pytest.raises(ValueError, match='No network within'):
    joint.project(half, price, 0.9, ones)
  with pytest.raises(ValueError, match=r'must lie in \(0, 1\], got 1.5'):
    joint.limit(space, price, 1.5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'round_to': 0}, '`round_to` must be at least 1, got 0'),
    ({'keep': {'w0': 9}}, "'w0' has 8 and cannot keep 9"),
    ({'stages': {'s': ('a',)}}, 'Stages must name each block at most once'),
    ({'sides': (4, 8)}, 'Sides need the images that the function takes'),
  ],
)
def test_wrong_spaces_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    joint.space(mlp(), **options)


def test_a_function_that_needs_its_side_is_refused_by_name():
  model = MODEL.clone(head='flatten')

  def flattened(v, x):
    return model.apply(v, x)

  v = jax.eval_shape(model.init, KEY, IMAGES)
  graph = jp.trace(flattened, v, IMAGES)
  with pytest.raises(ValueError, match="Function 'flattened' does not take im"):
    joint.space(graph, IMAGES, sides=(6, 8))


# --- The network under a vector ----------------------------------------------


def test_masked_is_what_is_built_in_all_dimensions_together():
  """Channels, depth and resolution, train form, statistics and all."""
  space, _ = made()
  x = jax.random.normal(KEY, (4, 8, 8, 1))
  traced, once = counted(joint.supernet(space, on_canvas=True))
  sided, by_side = counted(joint.supernet(space))
  for seed in range(3):
    vector = drawn(seed)
    plan = joint.plan(space, vector)
    small = jp.shrink(space.graph, plan, variables())
    images = padded.resize(x, vector.side)
    logits, stats = jax.jit(jp.specialise(space.graph, plan))(small, images)
    scale = np.abs(logits).max()
    for found, after in (
      traced(variables(), vector, x), sided(variables(), vector, images),
    ):  # fmt: skip
      np.testing.assert_allclose(found / scale, logits / scale, atol=1e-5)
      cut = jp.shrink(space.graph, plan, after)
      for a, b in zip(
        jax.tree.leaves(cut), jax.tree.leaves(stats), strict=True
      ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert len(once) == 1
  assert len(by_side) <= len(SIDES)


CUTS = {'stage2': '.*stage2_block1.*'}


@functools.cache
def cut():
  """The space in which the second stage has a side of its own."""
  graph = jp.trace(trained, variables(), IMAGES)
  space = joint.space(graph, IMAGES, sides=SIDES, cuts=CUTS)
  return graph, space, joint.coster(space)


def test_stages_with_sides_of_their_own_are_what_is_built():
  """Channels, depth and a side for each stage, the module run by stages."""
  graph, space, price = cut()
  x = jax.random.normal(KEY, (4, 8, 8, 1))
  net, traces = counted(joint.supernet(space, on_canvas=True))
  rng = np.random.default_rng(1)
  pick = lambda ladder: int(rng.choice(ladder))
  for side in ({'input': 8, 'stage2': 5}, {'input': 5, 'stage2': 7}):
    vector = jax.tree.map(pick, space.ladders)._replace(side=side)
    plan = joint.plan(space, vector)
    assert plan == joint.plan(space, joint.from_json(joint.to_json(vector)))
    small = tree.compact(jp.shrink(graph, plan, variables()))
    module = MODEL.clone(
      widths=models.widths(small['params']), drop=plan.dropped
    )
    images = padded.resize(x, side['input'])

    @jax.jit
    def build(small, images, module=module, side=side):
      run = functools.partial(
        module.apply, small, train=True, mutable=['batch_stats']
      )
      h, first = run(images, stop=1)
      h = padded.bilinear(h, (side['stage2'],) * 2)
      logits, last = run(h, start=1)
      return logits, first, last

    logits, first, last = build(small, images)
    found, after = net(variables(), vector, x)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found / scale, logits / scale, atol=1e-5)
    stats = jp.shrink(graph, plan, after)['batch_stats']
    for name, old in small['batch_stats'].items():
      own = last if name.startswith('stage2') else first
      moved = own['batch_stats'][name]
      assert jax.tree.structure(moved) == jax.tree.structure(old)
      for a, b in zip(
        jax.tree.leaves(stats[name]), jax.tree.leaves(moved), strict=True
      ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # The cost is that of the plan, and of the trace of what it makes.
    built = jp.trace(
      jp.specialise(graph, plan), small,
      jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32),
    )  # fmt: skip
    assert price(vector) == cost.macs(graph, plan) == cost.macs(built)
  assert len(traces) == 1


def test_a_side_for_each_stage_is_a_coordinate():
  graph, space, price = cut()
  assert joint.parts(space) == ('input', 'stage2')
  assert space.sides == SIDES
  assert joint.whole(space, price) == cost.macs(graph)
  even = space.high._replace(side={'input': 7, 'stage2': 7})
  assert price(even) == made()[1](space.high._replace(side=7))
  assert joint.plan(space, even).resized == ()
  assert joint.plan(space, even).resolution == (7, 7)
  late = space.high._replace(side={'input': 8, 'stage2': 5})
  plan = joint.plan(space, late)
  assert plan.resolution is None
  assert plan.resized == (('params/stage2_block1/conv1/kernel', (5, 5)),)
  only = joint.restrict(space, widths=True)
  assert only.low.side == {'input': 8, 'stage2': 8}
  assert joint.coster(only)(only.high) == joint.whole(space, price)
  rng = np.random.default_rng(0)
  many = jax.tree.map(lambda ladder: rng.choice(ladder, 30), space.ladders)
  exact = price(many)
  one = lambda k: price(jax.tree.map(lambda x: int(x[k]), many))
  assert exact.tolist() == [one(k) for k in range(30)]
  traced = jax.jit(price)(jax.tree.map(jnp.asarray, many))
  np.testing.assert_allclose(traced, exact, rtol=1e-5)
  parameters = joint.coster(space, cost.parameters_polynomial)
  assert parameters(late) == cost.parameters(graph)
  ones = jax.tree.map(lambda _: 1.0, space.high)
  vector = joint.project(space, price, 0.25, ones, tolerance=0.02)
  total = joint.whole(space, price)
  assert 0.245 * total <= price(vector) <= 0.25 * total
  # With all widths spent, a side more of one stage, and narrower again.
  small = space.high._replace(side={'input': 5, 'stage2': 5})
  start = jax.tree.map(float, joint.to_unit(space, small))
  vector = joint.project(space, price, 0.85, start)
  assert 0.85 * 0.995 * total <= price(vector) <= 0.85 * total


def test_spaces_that_cannot_be_cut_are_refused():
  graph, space, _ = cut()
  make = lambda cuts, sides=SIDES: joint.space(
    graph, IMAGES, sides=sides, cuts=cuts
  )
  with pytest.raises(ValueError, match=r"names other than 'input' .* got .'in"):
    make({'input': '.*stage2.*'})
  with pytest.raises(ValueError, match=r'need the sides .* and sides \(\)'):
    make(CUTS, sides=())
  with pytest.raises(ValueError, match="cut 'stage9' matches no leaf"):
    make({'late': 'stage9'})
  with pytest.raises(ValueError, match=r'At the cut .*head.* no image cros'):
    make({'late': '.*head.*'})
  with pytest.raises(ValueError, match=r'sides of input, stage2 .* on_canva'):
    joint.supernet(space)
  with pytest.raises(ValueError, match='does not tell the cost of the parts'):
    joint.coster(space, lambda graph: {})
  params = {'a': jnp.ones((1, 2)), 'b': jnp.ones((2, 2))}

  def attends(p, x):
    x = (x @ p['a']) @ p['b']
    return jnp.einsum('bhwc,bhwd->bcd', x, x)

  pairs = joint.space(
    jp.trace(attends, params, IMAGES), IMAGES, sides=SIDES, cuts={'late': 'b'}
  )
  with pytest.raises(ValueError, match='reads no leaf costs what depends on'):
    joint.coster(pairs)
  shared = jp.trace(
    lambda p, x: jnp.mean((x @ p['a']) @ p['b'] @ p['a'], (1, 2)),
    {'a': jnp.ones((1, 1)), 'b': jnp.ones((1, 1))}, IMAGES,
  )  # fmt: skip
  with pytest.raises(ValueError, match="'late' reads 'a', as one before it"):
    joint.space(shared, IMAGES, sides=SIDES, cuts={'late': 'b'})


def test_a_closed_block_keeps_its_statistics():
  space, _ = made()
  vector = space.high._replace(depths={'stage1': 1, 'stage2': 1})
  x = jax.random.normal(KEY, (2, 8, 8, 1))
  _, after = jax.jit(joint.supernet(space))(variables(), vector, x)
  stats = lambda v, block: v['batch_stats'][block]
  jax.tree.map(
    np.testing.assert_array_equal,
    stats(after, 'stage1_block2'), stats(variables(), 'stage1_block2'),
  )  # fmt: skip
  moved = stats(after, 'stage1_block1')['norm1']['mean']
  before = stats(variables(), 'stage1_block1')['norm1']['mean']
  assert np.abs(moved - before).max() > 1e-3


def test_a_whole_search_compiles_once():
  """Weight steps and vector steps, over all widths, depths and sides."""
  space, price = made()
  net = joint.supernet(space, on_canvas=True)
  e = estimator.estimator(n=4, sigma=0.3)
  tx, slow = optax.adam(0.1), optax.sgd(0.01)
  low, high = joint.unit_range(space)
  labels = jnp.arange(4) % 3
  counts = {'weights': 0, 'vector': 0}

  def entropy(params, vector, x):
    logits, _ = net({**variables(), 'params': params}, vector, x)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  @jax.jit
  def weight_step(params, unit, x):
    counts['weights'] += 1
    vector = joint.from_unit(space, unit)
    loss, grads = jax.value_and_grad(entropy)(params, vector, x)
    updates, _ = slow.update(grads, slow.init(params))
    return optax.apply_updates(params, updates), loss

  @jax.jit
  def vector_step(params, unit, opt, state, x):
    counts['vector'] += 1
    loss = jax.vmap(lambda v: entropy(params, v, x))
    total = joint.objective(space, loss, price, 0.25 * price(space.high))
    gradient, state = e.update(total, state, unit)
    updates, opt = tx.update(gradient, opt)
    unit = jax.tree.map(jnp.clip, optax.apply_updates(unit, updates), low, high)
    return unit, opt, state

  unit, params = high, variables()['params']
  opt, state = tx.init(unit), e.init(unit, KEY)
  seen = set()
  for k in range(6):
    x = jax.random.normal(jax.random.fold_in(KEY, k), (4, 8, 8, 1))
    drawn = jax.tree.map(lambda u: u[0], e.ask(state, unit))
    vector = joint.from_unit(space, jax.tree.map(float, drawn))
    seen.add((vector.side, *vector.depths.values(), *vector.widths.values()))
    params, loss = weight_step(params, drawn, x)
    unit, opt, state = vector_step(params, unit, opt, state, x)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(state.losses))
  assert len(seen) == 6
  assert counts == {'weights': 1, 'vector': 1}
  assert float(
    price(jax.tree.map(lambda u, n: u * n, unit, space.high))
  ) < float(price(space.high))


def test_devices_share_the_vectors_of_a_real_step():
  """One network on a canvas, its weights the same on every device."""
  params = {'a': jnp.ones((3, 3, 1, 4)) / 9, 'b': jnp.arange(4.0)[:, None]}

  def fn(p, x):
    h = jax.lax.conv_general_dilated(
      x, p['a'], (2, 2), ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    return jnp.mean(jax.nn.relu(h), (1, 2)) @ p['b']

  graph = jp.trace(fn, params, IMAGES)
  space = joint.space(graph, IMAGES, sides=SIDES)
  price, net = joint.coster(space), joint.supernet(space, on_canvas=True)
  x = jax.random.normal(KEY, (2, 8, 8, 1))
  e = estimator.estimator(n=8, sigma=0.3)
  unit = joint.to_unit(space, space.high)
  state = e.init(unit, KEY)

  def step(params, state, unit, wrap):
    loss = jax.vmap(lambda v: jnp.mean(net(params, v, x) ** 2))
    total = joint.objective(space, loss, price, 0.3 * price(space.high))
    return e.update(wrap(total), state, unit)[0]

  alone = jax.jit(functools.partial(step, wrap=lambda loss: loss))
  wanted = alone(params, state, unit)
  over = functools.partial(
    step, wrap=functools.partial(estimator.spread, axis_name='devices')
  )
  none = jax.sharding.PartitionSpec()
  mesh = jax.make_mesh(
    (jax.device_count(),),
    ('devices',),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  sharded = jax.shard_map(
    over, mesh=mesh, in_specs=(none, none, none), out_specs=none
  )
  found = jax.jit(sharded)(params, state, unit)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4)
  jax.tree.map(close, found, wanted)
  copies = jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (jax.device_count(), *x.shape)),
    (params, state, unit),
  )
  many = jax.pmap(over, axis_name='devices')(*copies)
  jax.tree.map(lambda a, b: close(a[-1], b), many, wanted)
  assert any(np.any(g) for g in jax.tree.leaves(wanted))


SHIPPED = {
  'resnet56': (
    models.resnet56(channels=(2, 2, 2)), (16, 32),
    {'stage1': 9, 'stage2': 8, 'stage3': 8},
  ),
  'mobilenet_v1': (
    models.mobilenet_v1(0.25, tensorflow_padding=False, dropout=0.0,
                        skippable=True, num_classes=3),
    (32, 64), {'stage2': 1, 'stage3': 1, 'stage4': 5, 'stage5': 1},
  ),
  'mobilenet_v2': (
    models.mobilenet_v2(0.25, dropout=0.0, num_classes=3), (32, 64), None,
  ),
  'mobilenet_v3': (
    models.mobilenet_v3_small(0.25, dropout=0.0, num_classes=3), (32, 64), None,
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=pytest.mark.slow) for n in SHIPPED]
)
def test_all_three_dimensions_of_the_shipped_networks(name):
  model, sides, depths = SHIPPED[name]
  x = jax.ShapeDtypeStruct((1, sides[-1], sides[-1], 3), jnp.float32)
  v = jax.eval_shape(model.init, KEY, x)
  graph = jp.trace(lambda v, x: model.apply(v, x), v, x)
  space = joint.space(graph, x, sides=sides)
  found = {stage: len(blocks) for stage, blocks in space.stages.items()}
  assert found == depths if depths else len(found) > 2
  named = {block for blocks in space.stages.values() for block in blocks}
  assert named == set(model.bypassable)
  price = joint.coster(space)
  ones = jax.tree.map(lambda _: 1.0, space.high)
  vector = joint.project(space, price, 0.25, ones)
  images = jax.ShapeDtypeStruct((2, *x.shape[1:]), jnp.float32)
  cuts = {
    f'stage{k}': f'.*stage{k}_block1/.*' for k in range(2, model.num_stages + 1)
  }
  in_parts = joint.space(graph, x, sides=sides, cuts=cuts)
  ones = jax.tree.map(lambda _: 1.0, in_parts.high)
  apart = joint.project(
    in_parts, joint.coster(in_parts), 0.25, ones, tolerance=0.2
  )
  for one, found in ((space, vector), (in_parts, apart)):
    net = joint.supernet(one, on_canvas=True)
    out = jax.eval_shape(net, v, found, images)
    assert out.shape == (2, *graph.program.outputs[0].shape[1:])
  plan = joint.plan(in_parts, apart)
  assert cost.macs(graph, plan) == joint.coster(in_parts)(apart)


# --- Searches that it has to beat --------------------------------------------


def test_random_and_evolutionary_searches_stay_on_the_budget():
  space = joint.space(mlp((30, 20)))
  price = joint.coster(space)
  limit = joint.limit(space, price, 0.3)
  scored = []

  def score(vectors):  # Best where w1 is 5 wide.
    scored.extend(vectors)
    return [abs(v.widths['w1'] - 5) for v in vectors]

  run = functools.partial(evolution.search, space, price, 0.3, score)
  options = {'population': 6, 'parents': 3, 'mutations': 3, 'crossovers': 3}
  found = run(np.random.default_rng(0), generations=6, **options)
  assert len(scored) == 6 + 5 * 6
  assert all(0.95 * limit <= price(v) <= limit for v in scored)
  losses = [generation[0].loss for generation in found]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] <= 1
  assert [len(generation) for generation in found] == [3] * 6
  again = run(np.random.default_rng(0), generations=6, **options)
  assert again == found
  (only,) = run(np.random.default_rng(0), generations=1, **options)
  assert only == found[0]
