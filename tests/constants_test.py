"""What depends on no param and no input ties nothing, and is cut where used.

And what has an exact meaning along a group: a stride, a flip, a permutation.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import cost, plans, structure
from jaxprune.plans.proof import check
from jaxprune.structure import rules
from jaxprune.structure.program import axes as ax
from jaxprune.structure.program import constants
from jaxprune.structure.program.run import Run
from jaxprune.structure.rules import Equation, Value

TOKENS, WIDTH, HEADS, DIM = 5, 6, 4, 8


@pytest.fixture(autouse=True)
def _ranks_of_the_networks():
  with jax.numpy_rank_promotion('allow'):
    yield


def normal(*shape, seed=0):
  """Random numbers scaled as kernels are."""
  x = jax.random.normal(jax.random.key(seed), shape)
  return x / np.sqrt(shape[0])


X = normal(2, TOKENS, WIDTH, seed=9)
ROWS = normal(4, WIDTH, seed=8)


def layer(seed):
  """The kernels of an attention."""
  wide = HEADS * DIM
  names = zip(['q', 'k', 'v'], range(3), strict=True)
  params = {n: 3 * normal(WIDTH, wide, seed=seed + k) for n, k in names}
  return {**params, 'o': normal(wide, WIDTH, seed=seed + 3)}


def attend(p, x, turn=lambda x: x, bias=0.0, gain=1.0):
  """Attention whose queries and keys are turned, and its scores biased."""
  heads = lambda name: (x @ p[name]).reshape(*x.shape[:2], HEADS, DIM)
  q, k, v = turn(heads('q')), turn(heads('k')), heads('v')
  scores = jnp.einsum('bthd,bshd->bhts', q, k) + bias
  y = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v)
  y = y * jnp.reshape(gain, (-1, 1))
  return y.reshape(*x.shape[:2], -1) @ p['o']


def angles(count):
  """Angles of ``count`` pairs, made within the traced function."""
  rate = 10.0 ** (-jnp.arange(count) / count)
  return jnp.arange(TOKENS)[:, None, None] * rate


def turn_halves(x):
  """Rotary embedding of entry i with entry i + DIM / 2."""
  a, b = jnp.split(x, 2, -1)
  sin, cos = jnp.sin(angles(DIM // 2)), jnp.cos(angles(DIM // 2))
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def turn_pairs(x):
  """Rotary embedding of entry 2 i with entry 2 i + 1."""
  a, b = x[..., ::2], x[..., 1::2]
  sin, cos = jnp.sin(angles(DIM // 2)), jnp.cos(angles(DIM // 2))
  pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
  return pairs.reshape(x.shape)


def turn_every_two(x):
  """The same, with tables as wide as a head, as GPT-J has it."""
  sin, cos = (
    jnp.repeat(f(angles(DIM // 2)), 2, axis=-1) for f in (jnp.sin, jnp.cos)
  )
  across = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
  return x * cos + across * sin


def proved(fn, params, *args, widths=None, reductions='keep', **options):
  """The graph of a function once a random cut of all groups is checked."""
  graph = structure.trace(fn, params, *args, reductions=reductions)
  rng = np.random.default_rng(0)
  kept = {
    name: rng.permutation(group.size)[
      : (widths or {}).get(name, group.size // 2)
    ]
    for name, group in graph.groups.items()
  }
  proof = check(graph, plans.from_kept(graph, kept), params, *args, **options)
  assert max(proof.values, proof.gradients or 0) <= 1e-5
  return graph


def units(graph):
  return {name: group.size for name, group in graph.groups.items()}


@pytest.mark.parametrize(
  'turn',
  [
    turn_halves,
    turn_pairs,
    pytest.param(turn_every_two, marks=pytest.mark.slow),
  ],
)
def test_pairs_of_a_rotary_embedding_go_together(turn):
  fn = lambda p, x: attend(p, x, turn)
  # Heads, pairs of queries and keys, and entries of values.
  graph = proved(fn, layer(0), X)
  assert sorted(units(graph).values()) == [HEADS, DIM // 2, DIM]


def test_a_rotary_embedding_rescales_by_name_alone():
  fn = lambda p, x: attend(p, x, turn_halves)
  graph = structure.trace(fn, layer(0), X, reductions='rescale')
  assert sorted(units(graph).values()) == [HEADS, DIM]
  assert 'a table of constants at mul' in graph.explain('q', 1)


def test_a_table_of_conditions_counts_its_axis_too():
  def fn(p, x):
    y = x @ p['a']
    return jnp.where(jnp.arange(y.shape[1]) < 5, y, 0) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  graph = structure.trace(fn, params, ROWS, reductions='rescale')
  assert 'a table of constants at select_n' in graph.explain('a', 1)
  assert units(proved(fn, params, ROWS)) == {'a': 8}


def slopes():
  """Biases by distance, as ALiBi has them: a slope for each head."""
  slope = 2.0 ** -jnp.arange(1.0, HEADS + 1)
  distance = jnp.arange(TOKENS) - jnp.arange(TOKENS)[:, None]
  return slope[:, None, None] * distance


def ones():
  return jnp.ones((HEADS,))


def table():
  return np.arange(HEADS, dtype=np.float32)


@pytest.mark.parametrize(
  'table', [ones, pytest.param(table, marks=pytest.mark.slow)]
)
def test_a_mask_of_heads_does_not_tie_the_layers(table):
  def fn(p, x):
    gain = table()
    x = x + attend(p['a'], x, gain=gain)
    return attend(p['b'], x, gain=gain)

  graph = proved(fn, {'a': layer(0), 'b': layer(4)}, X)
  assert sorted(units(graph).values()) == [HEADS] * 2 + [DIM] * 4


@pytest.mark.parametrize(
  'wrap',
  [
    pytest.param(lambda fn: fn, marks=pytest.mark.slow),
    pytest.param(jax.jit, marks=pytest.mark.slow),
    jax.checkpoint,
  ],
)
def test_slopes_of_heads_do_not_tie_the_layers(wrap):
  def fn(p, x):
    bias, call = slopes(), wrap(attend_with_bias)
    x = x + call(p['a'], x, bias)
    return call(p['b'], x, bias)

  attend_with_bias = lambda p, x, bias: attend(p, x, bias=bias)
  graph = proved(fn, {'a': layer(0), 'b': layer(4)}, X)
  assert sorted(units(graph).values()) == [HEADS] * 2 + [DIM] * 4


def test_a_constant_ties_no_layers_of_a_loop_or_a_branch():
  def fn(p, x):
    rate = jnp.exp(-jnp.arange(WIDTH) / WIDTH)
    step = lambda h, _: (
      jnp.tanh(h @ p['a'] * rate) @ p['b'] * rate[::-1],
      None,
    )
    h, _ = lax.scan(step, x @ p['in'], length=2)
    return lax.cond(x[0, 0] > 0, lambda h: h * rate, jnp.sin, h) @ p['out']

  sizes = {'in': (6, 6), 'a': (6, 6), 'b': (6, 6), 'out': (6, 3)}
  params = {k: normal(*n, seed=len(k)) for k, n in sizes.items()}
  graph = proved(fn, params, ROWS)
  assert sorted(units(graph).values()) == [WIDTH, WIDTH]


def test_what_is_too_large_for_a_table_ties_nothing_either(monkeypatch):
  def fn(p, x):
    bias = slopes()
    x = x + attend(p['a'], x, turn_pairs, bias)
    return attend(p['b'], x, turn_pairs, bias)

  params = {'a': layer(0), 'b': layer(4)}
  expected = units(structure.trace(fn, params, X, reductions='keep'))
  monkeypatch.setattr(constants, 'MOST_BYTES', 4 * DIM)
  assert units(proved(fn, params, X)) == expected


def test_a_mask_of_positions_is_one_table():
  fn = lambda p, x: attend(p, x, bias=jnp.tri(TOKENS) - 1)
  graph = structure.trace(fn, layer(0), X, reductions='keep')
  arrays = [
    value.constant.size
    for eqn in graph.program.equations
    for value in eqn.inputs
    if value.constant is not None
  ]
  assert sum(n == TOKENS**2 for n in arrays) == 1


def test_numbers_along_an_axis_are_known_at_a_symbolic_batch():
  def fn(p, x):
    y = x @ p['a']
    return (y * lax.broadcasted_iota(jnp.float32, y.shape, 1)) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  graph = proved(fn, params, ROWS)
  (batch,) = jax.export.symbolic_shape('b')
  symbolic = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)
  again = structure.trace(fn, params, symbolic)
  assert units(again) == units(graph) == {'a': 8}
  assert again.fingerprint == graph.fingerprint
  plan = plans.from_widths(graph, {'a': 3})
  small, cut = plans.specialise(graph, plan), plans.shrink(graph, plan, params)
  call = jax.export.export(jax.jit(small))(cut, symbolic).call
  np.testing.assert_allclose(call(cut, ROWS), small(cut, ROWS), rtol=1e-6)


def test_a_mean_of_constants_is_that_of_all_of_them():
  """A table is cut where it is used: its own sums saw every entry."""

  def fn(p, x):
    rate = jnp.arange(1.0, 9.0)
    return (x @ p['a'] * (rate / jnp.sum(rate))) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  graph = structure.trace(fn, params, ROWS)
  assert units(graph) == {'a': 8}
  plan = plans.from_kept(graph, {'a': [1, 6]})
  small = plans.shrink(graph, plan, params)
  a, b = (np.asarray(params[name]) for name in 'ab')
  expected = (np.asarray(ROWS) @ a[:, [1, 6]] * [2 / 36, 7 / 36]) @ b[[1, 6]]
  ours = plans.specialise(graph, plan)(small, ROWS)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_is_standardised_by_a_count_made_inside_is_offered():
  def fn(p, x):
    w = p['b'] - jnp.mean(p['b'], 0)
    fan_in = jnp.prod(jnp.array(w.shape[:1]))
    w = w * lax.rsqrt(jnp.maximum(jnp.var(w, 0) * fan_in, 1e-4))
    return jnp.tanh(jnp.tanh(x @ p['a']) @ w) @ p['c']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 6), 'c': normal(6, 3)}
  assert units(proved(fn, params, ROWS)) == {'a': 8, 'b': 6}


def test_noise_that_no_key_of_the_caller_draws_is_cut_at_each_use():
  def fn(p, x):
    noise = jax.random.normal(jax.random.key(3), (8,))
    return jnp.tanh(x @ p['a'] + noise) @ p['b'] + (x @ p['c'] * noise) @ p['d']

  sizes = {'a': (WIDTH, 8), 'b': (8, 3), 'c': (WIDTH, 8), 'd': (8, 3)}
  params = {k: normal(*n, seed=ord(k)) for k, n in sizes.items()}
  assert units(proved(fn, params, ROWS)) == {'a': 8, 'c': 8}


def test_an_index_may_come_from_the_device_or_from_a_trace_around():
  order = jnp.array([[3], [1], [2], [0]])
  numbers = lax.GatherDimensionNumbers((0,), (1,), (1,))

  def made(order, scale):
    def fn(p, x):
      y = lax.gather(x @ p['a'], order, numbers, (4, 1)) * scale
      return y @ p['b'] + jnp.empty((4, 3)) * 0

    return fn

  params = {'a': normal(WIDTH, 4), 'b': normal(4, 3)}
  graph = proved(made(order, np.arange(4.0, dtype=np.float32)), params, ROWS)
  assert units(graph) == {'a': 4}

  @jax.jit
  def inside(order, scale):
    graph = structure.trace(made(order, scale), params, ROWS)
    assert 'indexes it' in graph.explain('a', 1)
    plan = plans.from_widths(graph, {})
    return plans.specialise(graph, plan)(params, ROWS)

  expected = made(order, jnp.ones(4))(params, ROWS)
  ours = inside(order, jnp.ones(4))
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'draw',
  [
    lambda: lax.rng_uniform(0.0, 1.0, (8,)),
    lambda: jax.pure_callback(
      lambda n: np.ones(n, np.float32),
      jax.ShapeDtypeStruct((8,), np.float32),
      8,
    ),
  ],
)
def test_what_may_differ_at_each_call_is_no_constant(draw):
  def fn(p, x):
    return (x @ p['a'] * draw()) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  graph = structure.trace(fn, params, ROWS)
  assert 'has no rule' in graph.explain('a', 1)


def test_a_long_chain_of_constants_is_one_table():
  def fn(p, x):
    rate = jnp.arange(8.0)
    for _ in range(700):
      rate = rate + rate / 2**20
    return (x @ p['a'] * rate) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  graph = structure.trace(fn, params, ROWS)
  assert units(graph) == {'a': 8}
  names = [eqn.primitive.name for eqn in graph.program.equations]
  assert names == ['dot_general', 'mul', 'dot_general']


@functools.partial(jax.jit, static_argnums=0)
def mlp(along, p, x):
  """Layers with something along their channels."""
  y = jnp.tanh(x @ p['a'] + p['c'])
  return y @ p['b'] + jnp.sin(along(y)) @ p['d']


def permute(*order):
  return lambda y: y[:, np.array(order)]


def join(*arrays):
  return jnp.concatenate(arrays, 1)


# What happens along 'width' channels, and the groups that there are after.
ALONG = {
  'a flip': (8, lambda y: y[:, ::-1], [8]),
  'a flip of a flip': (8, lambda y: jnp.flip(jnp.sin(y[:, ::-1]), 1), [8]),
  'a flip with itself': (8, lambda y: y + y[:, ::-1], [4]),
  'an odd flip with itself': (7, lambda y: y + y[:, ::-1], [3]),
  'a flip of parts': (9, lambda y: join(y[:, :3], -y[:, 3:])[:, ::-1], [3, 6]),
  'parts of a flip': (
    9,
    lambda y: join(*jnp.split(y[:, ::-1], [4], 1)[::-1]),
    [5, 4],
  ),
  'a flip of heads': (
    8,
    lambda y: jnp.flip(y.reshape(-1, 2, 4) * np.ones((2, 1)), 2).reshape(-1, 8),
    [2, 4],
  ),
  'a permutation': (6, permute(3, 0, 5, 1, 2, 4), [6]),
  'an index from the end': (
    6,
    lambda y: jnp.take(y, jnp.array([3, 0, 5, 1, -4, 4]), 1),
    [6],
  ),
  'a permutation of a permutation': (
    6,
    lambda y: permute(3, 0, 5, 1, 2, 4)(permute(1, 5, 2, 0, 4, 3)(y)) * 2,
    [6],
  ),
  'two that tie all': (
    6,
    lambda y: permute(1, 2, 3, 4, 5, 0)(y) * y[:, ::-1],
    [],
  ),
  'neighbours, permuted': (
    8,
    lambda y: jnp.pad(permute(4, 2, 3)(y), ((0, 0), (0, 5))),
    [2, 3, 3, 5],
  ),
  # What is taken twice stays whole; of what is made, a row of 'd' can go.
  'one of two, twice': (6, permute(0, 0, 2, 2, 4, 4), [6]),
  'a transposition': (
    6,
    lambda y: permute(0, 3, 1, 4, 2, 5)(y.reshape(-1, 2, 3).reshape(-1, 6)),
    [2, 3],
  ),
  'pairs': (8, lambda y: y[:, ::2] * y[:, 1::2], [4]),
  'the first of each two': (8, lambda y: y[:, ::2], [4]),
  'the first of each two of seven': (7, lambda y: y[:, ::2], [3]),
  'the second of each three': (9, lambda y: y[:, 1::3], [3]),
  'the second of each three of eleven': (11, lambda y: y[:, 1::3], [3]),
  'every other one of some': (9, lambda y: y[:, 3:8:2], [2, 3]),
  'the last of every three': (8, lambda y: y[:, 1::3], [2]),
  'one of four': (4, lambda y: y[:, 1:2:3], []),
  'gaps': (6, lambda y: lax.pad(y, 0.5, ((0, 0, 0), (1, 2, 1))), [6, 2]),
  'gaps of a stride': (
    8,
    lambda y: lax.pad(y[:, ::2], 0.0, ((0, 0, 0), (1, 0, 1))) + y,
    [4],
  ),
}


def along_params(along, width):
  """Params of the layers, whatever width comes out."""
  read = jax.eval_shape(along, jnp.ones((4, width))).shape[1]
  sizes = {'a': (WIDTH, width), 'b': (width, 3), 'c': (width,), 'd': (read, 3)}
  return {k: normal(*n, seed=ord(k)) for k, n in sizes.items()}


QUICK = (
  'a flip of parts',
  'an odd flip with itself',
  'a permutation of a permutation',
  'two that tie all',
  'neighbours, permuted',
  'one of two, twice',
  'the first of each two of seven',
  'gaps of a stride',
)


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ALONG
  ],
)
def test_the_groups_along_which_entries_move(name):
  width, along, expected = ALONG[name]
  fn, params = functools.partial(mlp, along), along_params(along, width)
  graph = structure.trace(fn, params, ROWS)
  assert list(units(graph).values()) == expected
  rng = np.random.default_rng(1)
  kept = {n: rng.permutation(g.size)[:2] for n, g in graph.groups.items()}
  plan = plans.from_kept(graph, kept)
  small = plans.specialise(graph, plan)(plans.shrink(graph, plan, params), ROWS)
  masks = plans.leaf_masks(graph, plan)
  hidden = {k: np.where(masks.get(k, True), x, 0) for k, x in params.items()}
  np.testing.assert_allclose(small, fn(hidden, ROWS), rtol=0, atol=1e-6)
  units_left = {n: np.isin(np.arange(units(graph)[n]), kept[n]) for n in kept}
  switched = plans.supernet(graph)(params, units_left, {}, ROWS)
  np.testing.assert_allclose(small, switched, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  'name',
  [
    name
    if name == 'a flip of parts'
    else pytest.param(name, marks=pytest.mark.slow)
    for name, (*_, groups) in ALONG.items()
    if groups
  ],
)
def test_what_moves_along_a_group_has_the_masked_gradients(name):
  width, along, _ = ALONG[name]
  proved(functools.partial(mlp, along), along_params(along, width), ROWS)


def typed(primitive, shapes, outs, **params):
  """An equation by its rule, of inputs whose axes nothing has tied."""
  inputs, outputs = (
    [Value(s, np.dtype('float32'), [ax.atom(n) for n in s]) for s in many]
    for many in (shapes, outs)
  )
  eqn = Equation(primitive, params, inputs, outputs, 'here')
  rules.infer(eqn)
  return eqn


def random_run(axis, seed):
  """A run of what a random half of the atoms of an axis leaves."""
  rng = np.random.default_rng(seed)
  return Run(
    {
      atom: rng.permutation(atom.size)[: rng.integers(1, atom.size + 1)]
      for atom in dict.fromkeys(ax.atoms(axis))
      if not atom.locked
    }
  )


STRIDES = [
  (n, start, limit, stride)
  for n in range(2, 10)
  for stride in (2, 3, 4)
  for start in range(n)
  for limit in range(start + 1, n + 1)
]


def test_every_stride_of_a_short_axis_takes_what_is_left():
  for seed, (n, start, limit, stride) in enumerate(STRIDES):
    taken = np.arange(n)[start:limit:stride]
    eqn = typed(
      lax.slice_p,
      [(n,)],
      [taken.shape],
      start_indices=(start,),
      limit_indices=(limit,),
      strides=(stride,),
    )
    (x,), (out,) = eqn.inputs, eqn.outputs
    run = random_run(x.axes[0], seed)
    left, expected = run.take(np.arange(n), x.axes), run.take(taken, out.axes)
    sizes = eqn.resize(run.size)
    (first,), (last,) = sizes['start_indices'], sizes['limit_indices']
    np.testing.assert_array_equal(left[first:last:stride], expected)


def test_every_gap_of_a_short_axis_is_left_between_what_is_left():
  for seed, (n, low, high, stride) in enumerate(STRIDES):
    last = low + stride * (n - 1)
    full = np.full(last + 1 + high, -1)
    full[low : last + 1 : stride] = np.arange(n)
    config = ((low, high, stride - 1),)
    eqn = typed(lax.pad_p, [(n,), ()], [full.shape], padding_config=config)
    (x, _), (out,) = eqn.inputs, eqn.outputs
    run = random_run(out.axes[0], seed)
    ((low, high, inner),) = eqn.resize(run.size)['padding_config']
    left = run.take(np.arange(n), x.axes)
    ours = np.full(low + (inner + 1) * (len(left) - 1) + 1 + high, -1)
    ours[low : len(ours) - high : inner + 1] = left
    np.testing.assert_array_equal(ours, run.take(full, out.axes))


def test_a_step_of_training_moves_entries_back():
  """Derivatives of a flip, a permutation, a stride and of what a loop does."""

  def fn(p, x):
    y = permute(3, 0, 5, 1, 2, 4)(jnp.tanh(x @ p['a']))
    pairs = jnp.sin(x @ p['b'])
    return (y[:, ::-1] @ p['c'] + pairs[:, ::2] * pairs[:, 1::2]) @ p['d']

  def step(p, x):
    slopes = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(p)
    return jax.tree.map(lambda w, slope: w - slope, p, slopes)

  sizes = {'a': (WIDTH, 6), 'b': (WIDTH, 10), 'c': (6, 5), 'd': (5, 3)}
  params = {k: normal(*n, seed=ord(k)) for k, n in sizes.items()}
  graph = structure.trace(fn, params, ROWS, also=[(step, ROWS)])
  assert units(graph) == {'a': 6, 'b': 5}
  plan = plans.from_kept(graph, {'a': [1, 2, 4], 'b': [0, 3]})
  check(graph, plan, params, ROWS)
  check(graph.also[0], plan, params, ROWS, gradients=False)


def experts(p, x):
  """Rows of which each meets the kernels of its expert."""
  x, sizes = x @ p['in'], jnp.array([1, 0, 3])
  h = jnp.tanh(lax.ragged_dot(x, p['a'], sizes))
  return lax.ragged_dot(h, p['b'], sizes)


def test_products_of_runs_of_rows_are_typed_and_counted():
  sizes = {'in': (WIDTH, 5), 'a': (3, 5, 8), 'b': (3, 8, 2)}
  params = {k: normal(*n, seed=ord(k[0])) for k, n in sizes.items()}

  def step(p, x):
    slopes = jax.grad(lambda p: jnp.sum(experts(p, x) ** 2))(p)
    return jax.tree.map(lambda w, slope: w - slope, p, slopes)

  graph = structure.trace(experts, params, ROWS, also=[(step, ROWS)])
  assert units(graph) == {'in': 5, 'a': 8}
  assert 'numbers its entries' in graph.explain('a', 0)
  # Each of 4 rows meets one expert of three.
  assert cost.macs(graph) == 4 * (6 * 5 + 5 * 8 + 8 * 2)
  plan = plans.from_kept(graph, {'in': [0, 2, 3], 'a': [1, 4, 5, 7]})
  assert cost.macs(graph, plan) == 4 * (6 * 3 + 3 * 4 + 4 * 2)
  check(graph, plan, params, ROWS)
  check(graph.also[0], plan, params, ROWS, gradients=False)
  assert [member.path for (member,) in graph.readers.values()] == ['a', 'b']
  left = {'in': np.isin(np.arange(5), [0, 2, 3])}
  some = plans.from_kept(graph, {'in': [0, 2, 3]})
  np.testing.assert_allclose(
    plans.supernet(graph)(params, left, {}, ROWS),
    plans.masked(graph, some)(params, ROWS),
    atol=1e-6,
  )
  # And back: by each kernel, and by what it reads but for the first.
  forward = cost.macs(graph)
  assert cost.macs(graph.also[0]) == 3 * forward - 4 * 6 * 5


def test_a_transform_passes_the_axes_that_it_does_not_run_along():
  def fn(p, x):
    y = jnp.fft.rfft(x @ p['a'], axis=1)
    y = y * jnp.exp(1j * jnp.arange(y.shape[1]))[:, None]
    return jnp.fft.irfft(y, n=TOKENS, axis=1) @ p['b']

  params = {'a': normal(WIDTH, 8), 'b': normal(8, 3)}
  assert units(proved(fn, params, X)) == {'a': 8}
  along = lambda p, x: jnp.abs(jnp.fft.fft(x @ p['a'])) @ p['b']
  graph = structure.trace(along, params, X)
  assert 'fft at constants_test.py' in graph.explain('a', 1)
  assert 'runs along it' in graph.explain('a', 1)


@pytest.mark.parametrize('kept', [[0, 1, 2, 3], [0, 1, 2, 5], [4], [0, 7]])
@pytest.mark.parametrize('over', ['zeros', 'features'])
def test_a_masked_entry_writes_over_no_other(kept, over):
  """A removed entry of an index keeps its place in the masked network."""
  order = np.array([3, 1, 2, 0, 7, 6, 5, 4])
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'a': jax.random.normal(keys[0], (4, 8)),
    'b': jax.random.normal(keys[1], (8, 5)),
  }
  x = jax.random.normal(keys[2], (3, 4))

  def fn(p, x):
    h = jnp.tanh(x @ p['a'])
    base = jnp.zeros_like(h) if over == 'zeros' else 2 * h
    return base.at[:, order].set(h if over == 'zeros' else h[:, order]) @ p['b']

  graph = structure.trace(fn, params, x)
  plan = plans.from_kept(graph, {'a': kept})
  assert check(graph, plan, params, x).values < 1e-5
