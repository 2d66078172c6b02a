"""Costs by hand, by published integers and by the compiler's own count."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

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
  """Every width of 224 px ResNet-50 halved, derived from the shapes alone.

  Norms are two an entry and the bias of the classifier is one; a block has
  three activations; pooling reads the stem and the last feature map.
  """

  def count(divisor):
    macs, more, params, side, width = 0, 0, 0, 112, 64 // divisor

    def layer(kernel, inputs, outputs, side, bias=0):
      nonlocal macs, more, params
      macs += kernel**2 * inputs * outputs * side**2
      more += bias or 2 * outputs * side**2
      params += kernel**2 * inputs * outputs + (bias or 2 * outputs)

    layer(7, 3, width, 112)
    more += 2 * width * 112**2
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
        more += inner * before**2 + inner * side**2 + 4 * inner * side**2
        inputs = 4 * inner
    more += inputs * 7**2
    layer(1, inputs, 1000, 1, bias=1000)
    return macs, macs + more, params

  graph = of_model(models.resnet50(), 224)
  for plan, divisor in ((None, 1), (halves(graph), 2)):
    found = (
      cost.macs(graph, plan),
      cost.macs(graph, plan, cost.COUNTS),
      cost.parameters(graph, plan),
    )
    assert found == count(divisor)
  # As other tools print them: 4121.93 M, 1068.68 M; 25.557 M, 6.918 M.
  assert count(1) == (4_089_184_256, 4_121_925_096, 25_557_032)
  assert count(2) == (1_052_311_552, 1_068_682_472, 6_917_640)


@pytest.mark.parametrize('grouped', [True, False])
def test_a_depthwise_convolution_costs_the_same_in_both_forms(grouped):
  graph = of_model(models.mobilenet_v1(grouped=grouped), 224)
  assert cost.macs(graph) == 568_740_352
  assert cost.parameters(graph) == 4_231_976


@functools.cache
def traced(name):
  nets = {'relu': Net(), 'resnet20': models.resnet20()}
  return of_model(nets[name], 32 if name == 'resnet20' else 8)


class Net(nn.Module):
  """Padding-free convolutions, a norm, a window and a dense layer."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), padding='VALID')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_what_else_counts_by_hand():
  """6 x 6 x 8 = 288 entries after the convolution, 72 after the window.

  'norms': bias 1, norm 2, and the 3 entries of the last bias.
  """
  graph = traced('relu')
  macs = 288 * 9 * 3 + 72 * 3
  assert cost.macs(graph) == macs
  assert cost.macs(graph, count=('norms',)) == macs + 3 * 288 + 3
  assert cost.macs(graph, count=('activations',)) == macs + 288
  assert cost.macs(graph, count=('pooling',)) == macs + 288


def test_a_clip_is_one_and_a_softmax_five():
  """12 entries: clip 1; softmax: maximum, shift, exp, sum, division.

  ``jax.nn.softmax`` compares its 3 maxima with minus infinity.
  """

  def fn(p, x):
    return jax.nn.softmax(jnp.clip(x @ p['a'], 0, 6))

  spec = SPEC((5, 4), jnp.float32)
  graph = structure.trace(fn, {'a': spec}, SPEC((3, 5), jnp.float32))
  extra = lambda what: cost.macs(graph, count=(what,)) - 3 * 5 * 4
  assert extra('activations') == 12 + 12 + 3
  assert extra('pooling') == 12 + 12
  assert extra('norms') == 12 + 12


def test_layers_add_up_to_the_whole():
  graph = traced('relu')
  plan = halves(graph)
  for count in ((), cost.COUNTS):
    layers = cost.layers(graph, plan, count)
    total = lambda field, found=layers: sum(getattr(x, field) for x in found)
    assert total('macs') == cost.macs(graph, plan, count)
    assert total('parameters') == cost.parameters(graph, plan)
    assert total('weight_bytes') == cost.weight_bytes(graph, plan)
  names = [layer.name for layer in cost.layers(graph)]
  assert {'Conv_0', 'BatchNorm_0', 'Dense_0'} <= set(names)


def test_statistics_weigh_and_are_no_parameters():
  """Of the norm: scale and bias; mean and variance are bytes alone."""
  graph = traced('relu')
  norm = next(x for x in cost.layers(graph) if x.name == 'BatchNorm_0')
  assert (norm.parameters, norm.weight_bytes) == (16, 4 * 32)


def test_live_activations_by_hand():
  """x (4 entries) lives on to the sum; the body of relu adds nothing.

  The most: x, a's product and its relu, 4 + 6 + 6 of them.
  """

  def fn(p, x):
    return x + jax.nn.relu(x @ p['a']) @ p['b']

  params = {'a': SPEC((4, 6), jnp.float32), 'b': SPEC((6, 4), jnp.float32)}
  graph = structure.trace(fn, params, SPEC((1, 4), jnp.float32))
  assert cost.activation_bytes(graph) == 4 * (4 + 6 + 6)
  half = plans.from_widths(graph, {'a': 1})
  # Then the sum is the most: x, b's product and the result.
  assert cost.activation_bytes(graph, half) == 4 * (4 + 4 + 4)


def test_a_loop_keeps_what_it_reads_and_what_it_returns():
  """Outside x and the results, 28 each, and the first and last carry, 4 each.

  Inside a slice of x, a product and the carry or the sum, 4 each.
  """

  def fn(p, x):
    def step(h, x):
      h = h @ p['w'] + x
      return h, h

    return jax.lax.scan(step, x[0], x)[1]

  graph = structure.trace(
    fn, {'w': SPEC((4, 4), jnp.float32)}, SPEC((7, 4), jnp.float32)
  )
  assert cost.activation_bytes(graph) == 4 * (28 + 28 + 4 + 4 + 4 + 4 + 4)


@pytest.mark.parametrize('make', [lambda: traced('relu'), lambda: deep()])
def test_the_bound_holds_for_the_compiler(make):
  """What XLA sets aside for temporaries, where it copies no kernels."""
  graph = make()
  params = [SPEC(x.shape, x.dtype) for x in graph.leaves.values()]
  run = structure.graph.runner(graph, {})
  call = jax.jit(lambda params, x: run(graph.program, [*params, x]))
  memory = call.lower(params, graph.args[0]).compile().memory_analysis()
  assert 0 < memory.temp_size_in_bytes <= cost.activation_bytes(graph)


def deep():
  """Eight layers that branch and join, at batch 64."""

  def fn(p, x):
    for _ in range(8):
      x = x + jnp.tanh(jnp.sin(x) @ p['a']) * jnp.cos(x @ p['a'])
    return x

  spec = SPEC((32, 32), jnp.float32)
  return structure.trace(fn, {'a': spec}, SPEC((64, 32), jnp.float32))


@pytest.mark.parametrize('half', [False, True])
def test_the_compiler_counts_the_same(half):
  """Within 5 %, without padding: two operations a multiply-add."""

  def fn(p, x):
    conv = functools.partial(
      jax.lax.conv_general_dilated,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      padding='VALID',
    )
    x = jnp.tanh(conv(x, p['a'], (1, 1)))
    x = jnp.tanh(conv(x, p['b'], (2, 2)))
    return x.reshape(x.shape[0], -1) @ p['c']

  params = {
    'a': SPEC((3, 3, 16, 32), jnp.float32),
    'b': SPEC((3, 3, 32, 16), jnp.float32),
    'c': SPEC((7 * 7 * 16, 10), jnp.float32),
  }
  x = SPEC((2, 18, 18, 16), jnp.float32)
  graph = structure.trace(fn, params, x)
  plan = halves(graph) if half else plans.from_kept(graph, {})
  small = jax.eval_shape(lambda p: plans.shrink(graph, plan, p), params)
  compiled = jax.jit(plans.specialise(graph, plan)).lower(small, x).compile()
  found = compiled.cost_analysis()['flops']
  assert abs(found / (2 * cost.macs(graph, plan)) - 1) < 0.05


def residual(p, x):
  x = jnp.tanh(x @ p['in'])
  x = x + jnp.tanh(x @ p['a']) @ p['b']
  x = x + jnp.tanh(x @ p['c']) @ p['d']
  return x @ p['out']


def residual_graph():
  shapes = {'a': (8, 6), 'b': (6, 8), 'c': (8, 5), 'd': (5, 8)}
  shapes |= {'in': (4, 8), 'out': (8, 3)}
  params = {name: SPEC(shape, jnp.float32) for name, shape in shapes.items()}
  graph = structure.trace(residual, params, SPEC((2, 4), jnp.float32))
  return graph, params


@pytest.mark.parametrize('dropped', [(), ('+a',), ('+a', '+c')])
def test_a_dropped_block_costs_nothing(dropped):
  """The cost of a plan is that of the small function, traced anew."""
  graph, params = residual_graph()
  widths = {name: group.size // 2 for name, group in graph.groups.items()}
  plan = plans.from_widths(graph, widths, dropped=dropped)
  small = jax.eval_shape(lambda p: plans.shrink(graph, plan, p), params)
  again = structure.trace(plans.specialise(graph, plan), small, *graph.args)
  for of in (
    cost.macs,
    functools.partial(cost.macs, count=cost.COUNTS),
    cost.parameters,
    cost.weight_bytes,
    cost.activation_bytes,
  ):
    assert of(graph, plan) == of(again)


def test_a_block_is_a_variable():
  graph, _ = residual_graph()
  values = {'in': 8, 'a': 6, 'c': 5, '+a': 1, '+c': 1}
  assert cost.variables(graph) == values
  polynomial = cost.macs_polynomial(graph)
  whole = cost.evaluate(polynomial, values)
  assert whole - cost.evaluate(polynomial, {**values, '+a': 0}) == 2 * 2 * 48
  slope = jax.grad(lambda g: cost.evaluate(polynomial, {**values, '+a': g}))
  assert float(slope(jnp.float32(0.3))) == 2 * 2 * 48


def test_switches_of_layers():
  """A variable for leaves of one's choice: 2 x 8 x 3 of the last product."""
  switch = {'head': ['out']}
  graph, _ = residual_graph()
  values = {**cost.variables(graph), 'head': 0}
  gone = cost.macs(graph) - cost.evaluate(
    cost.macs_polynomial(graph, layers=switch), values
  )
  assert gone == 2 * 8 * 3
  for make in (cost.parameters_polynomial, cost.weight_bytes_polynomial):
    whole = cost.evaluate(make(graph), values)
    size = 4 if make is cost.weight_bytes_polynomial else 1
    found = cost.evaluate(make(graph, layers=switch), values)
    assert whole - found == size * 24


def test_a_plan_counts_at_its_resolution():
  graph = traced('resnet20')
  plan = plans.from_kept(graph, {}, resolution=(16, 16))
  smaller = of_model(models.resnet20(), 16)
  assert cost.macs(graph, plan) == cost.macs(smaller)
  assert cost.activation_bytes(graph, plan) == cost.activation_bytes(smaller)


def test_published_counts_of_mobilenet_v2_at_half():
  """As another tool counts them: 320.30 M -> 93.17 M, 3.5049 M -> 1.2218 M."""
  graph = of_model(models.mobilenet_v2(), 224)
  plan = halves(graph)
  assert cost.macs(graph, count=cost.COUNTS) == 320_300_008
  assert cost.macs(graph, plan, cost.COUNTS) == 93_165_544
  assert cost.parameters(graph) == 3_504_872
  assert cost.parameters(graph, plan) == 1_221_768


def candidates(graph, number, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: rng.integers(1, group.size + 1, number)
    for name, group in graph.groups.items()
  } | dict.fromkeys(graph.blocks, 1)


def test_many_candidates_are_each_as_one():
  """NumPy's integers equal Python's; float32 differs by 1e-6 at most."""
  graph = traced('resnet20')
  many = candidates(graph, 500)
  for polynomial in (
    cost.macs_polynomial(graph),
    cost.parameters_polynomial(graph),
    cost.activation_bytes_polynomials(graph),
  ):
    exact = cost.evaluate(polynomial, many)
    assert exact.dtype == np.int64
    one = {k: int(v if np.ndim(v) == 0 else v[7]) for k, v in many.items()}
    assert exact[7] == cost.evaluate(polynomial, one)
    floats = {k: jnp.asarray(v, jnp.float32) for k, v in many.items()}
    found = jax.jit(functools.partial(cost.evaluate, polynomial))(floats)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.slow
def test_a_million_candidates_in_one_call():
  graph = of_model(models.resnet50(), 224)
  polynomial = cost.macs_polynomial(graph)
  many = candidates(graph, 1_000_000)
  axes = {name: None if np.ndim(v) == 0 else 0 for name, v in many.items()}
  floats = {k: jnp.asarray(v, jnp.float32) for k, v in many.items()}
  each = functools.partial(cost.evaluate, polynomial)
  found = jax.jit(jax.vmap(each, in_axes=(axes,)))(floats)
  exact = cost.evaluate(polynomial, many)
  assert exact.max() > 2**31
  np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_integers_stay_exact_and_are_refused_beyond_64_bits():
  polynomial = {('a', 'a'): 3, (): 1}
  assert cost.evaluate(polynomial, {'a': 2**40}) == 3 * 2**80 + 1
  exact = cost.evaluate(polynomial, {'a': np.array([2**30, 1], np.int32)})
  assert exact.tolist() == [3 * 2**60 + 1, 4]
  with pytest.raises(ValueError, match='does not fit 64 bits'):
    cost.evaluate(polynomial, {'a': np.array([2**31])})
  # In float32, where int32 would overflow.
  found = cost.evaluate(polynomial, {'a': jnp.array([2**30])})
  np.testing.assert_allclose(found, [3.0 * 2**60], rtol=1e-6)


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
    (
      lambda: cost.evaluate(cost.macs_polynomial(GRAPH), {'a': 3}),
      "no width for 'b'; give one for each of: a, b",
    ),
    (lambda: cost.macs(GRAPH, count=('norm',)), "`count` takes any .* 'norm'"),
    (lambda: cost.macs(GRAPH, count='norms'), 'in a tuple, got'),
    (lambda: cost.macs(symbolic()), 'with the symbolic size batch'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises((ValueError, TypeError), match=message):
    call()


def symbolic():
  (batch,) = export.symbolic_shape('batch')
  return structure.trace(net, PARAMS, SPEC((batch, 5), jnp.float32))
