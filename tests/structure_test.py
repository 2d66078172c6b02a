"""The groups of small programs, and that what shrinks computes the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxprune import plans, structure
from jaxprune.plans.proof import check
from jaxprune.structure.program import axes as ax


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def conv(x, w, groups=1, stride=1):
  return lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def half_of_everything(graph, seed=0):
  rng = np.random.default_rng(seed)
  return plans.from_kept(
    graph,
    {
      name: rng.permutation(group.size)[: (group.size + 1) // 2]
      for name, group in graph.groups.items()
    },
  )


IMAGE = normal(2, 6, 6, 3)
TOKENS = normal(2, 5, 8)

# name -> (function, params, input, {group: size})
PROGRAMS = {}


def program(x, **sizes):
  def register(make):
    PROGRAMS[make.__name__] = (*make(), x, sizes)
    return make

  return register


@program(normal(4, 5), a=6, b=7)
def mlp():
  p = {'a': normal(5, 6), 'b': normal(6, 7), 'c': normal(7, 3)}
  return lambda p, x: jax.nn.relu(jnp.tanh(x @ p['a']) @ p['b']) @ p['c'], p


@program(IMAGE, a=4)
def residual():
  p = {'a': normal(3, 3, 3, 4), 'b': normal(3, 3, 4, 4), 'c': normal(4, 2)}

  def fn(p, x):
    x = jax.nn.relu(conv(x, p['a']))
    return jnp.mean(x + conv(x, p['b']), (1, 2)) @ p['c']

  return fn, p


@program(IMAGE, a=4)
def flatten():
  p = {'a': normal(3, 3, 3, 4), 'c': normal(9 * 4, 2)}

  def fn(p, x):
    x = jax.nn.relu(conv(x, p['a'], stride=2))
    return x.reshape(x.shape[0], -1) @ p['c']

  return fn, p


@program(IMAGE, a=4, b=6)
def concatenated():
  p = {
    'a': normal(3, 3, 3, 4),
    'b': normal(3, 3, 3, 6, seed=1),
    'c': normal(3, 3, 10, 2),
  }

  def fn(p, x):
    both = [conv(x, p['a']), conv(x, p['b'])]
    return conv(jnp.tanh(jnp.concatenate(both, -1)), p['c'])

  return fn, p


@program(TOKENS, qkv=2, **{'qkv.1': 4, 'qkv.2': 4, 'up': 6})
def fused_qkv_attention():
  p = {
    'qkv': normal(8, 24),
    'out': normal(8, 8),
    'up': normal(8, 12),
    'down': normal(6, 8),
  }

  def fn(p, x):
    n, t, d = x.shape
    q, k, v = jnp.split(x @ p['qkv'], 3, -1)
    heads = lambda y: y.reshape(n, t, 2, 4)
    scores = jnp.einsum('nqhd,nkhd->nhqk', heads(q), heads(k)) / 2.0
    mixed = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(scores), heads(v))
    x = x + mixed.reshape(n, t, d) @ p['out']
    gate, value = jnp.split(x @ p['up'], 2, -1)
    return x + (jax.nn.silu(gate) * value) @ p['down']

  return fn, p


@program(normal(4, 5), a=6)
def remat_and_custom_vjp():
  p = {'a': normal(5, 6), 'b': normal(6, 3)}

  @jax.custom_vjp
  def twice(x):
    return 2 * x

  twice.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))

  def fn(p, x):
    return jax.checkpoint(lambda y: twice(jnp.sin(y)))(x @ p['a']) @ p['b']

  return fn, p


@program(normal(4, 5), a=6)
def branches():
  p = {'a': normal(5, 6), 'b': normal(6, 3)}

  def fn(p, x):
    y = x @ p['a']
    return lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, y) @ p['b']

  return fn, p


@program(normal(4, 5), a=6, b=6)
def constants_and_padding():
  p = {'a': normal(5, 6), 'b': normal(8, 6), 'c': normal(6, 3)}
  table = np.asarray(normal(6, seed=3))

  def fn(p, x):
    y = jnp.pad(x @ p['a'] + table[None], ((0, 0), (1, 1)))
    y = y @ p['b']
    return jnp.where(y > 0, y, 0.1 * y)[:, ::1] @ p['c']

  return fn, p


@pytest.mark.parametrize('name', PROGRAMS)
def test_half_of_every_group_computes_what_the_masked_program_does(name):
  fn, params, x, sizes = PROGRAMS[name]
  graph = structure.trace(fn, params, x, reductions='keep')
  assert {k: g.size for k, g in graph.groups.items()} == sizes
  proof = check(graph, half_of_everything(graph), params, x)
  assert proof.values <= 1e-5
  assert proof.gradients <= 1e-5
  assert proof.removed == sum(n // 2 for n in sizes.values())


def test_a_while_loop_is_typed_through_its_carry():
  params = {'a': normal(5, 6), 'b': normal(6, 3)}

  def fn(p, x):
    step = lambda s: (s[0] + 1, s[1] * 0.5 + 0.1)
    _, y = lax.while_loop(lambda s: s[0] < 3, step, (0, x @ p['a']))
    return y @ p['b']

  x = normal(4, 5)
  graph = structure.trace(fn, params, x)
  assert graph.groups['a'].size == 6
  proof = check(graph, half_of_everything(graph), params, x, gradients=False)
  assert proof.gradients is None


def test_members_are_slices_of_leaves():
  """a writes columns; the flatten puts unit i at rows i, i + 4, i + 8, ..."""
  fn, params, x, _ = PROGRAMS['flatten']
  graph = structure.trace(fn, params, x)
  assert graph.groups['a'].members == (
    structure.Member('a', 3, 0, 1),
    structure.Member('c', 0, 0, 1),
  )
  fn, params, x, _ = PROGRAMS['concatenated']
  graph = structure.trace(fn, params, x)
  assert graph.groups['b'].members == (
    structure.Member('b', 3, 0, 1),
    structure.Member('c', 2, 4, 1),
  )


def test_the_mask_of_a_leaf_by_hand():
  """Channels 1 and 2 of 3 leave; a 2 x 1 x 3 map flattens channels minor."""
  params = {'a': jnp.ones((1, 1, 1, 3)), 'c': jnp.ones((6, 2))}

  def fn(p, x):
    y = lax.conv_general_dilated(
      x, p['a'], (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return y.reshape(1, -1) @ p['c']

  graph = structure.trace(fn, params, jnp.ones((1, 2, 1, 1)))
  masks = graph.expand({'a': np.array([True, False, False])})
  np.testing.assert_array_equal(masks['a'][0, 0, 0], [True, False, False])
  np.testing.assert_array_equal(
    masks['c'][:, 0], [True, False, False, True, False, False]
  )
  plan = plans.from_kept(graph, {'a': [0]})
  small = plans.shrink(graph, plan, params)
  assert small['c'].shape == (2, 2)


def test_reduce_by_hand():
  """Unit 0 owns 3 and 4 of a (norm 5) and 12 of b; unit 1 owns 0, 0 and 5."""
  params = {
    'a': jnp.array([[3.0, 0.0], [4.0, 0.0]]),
    'b': jnp.array([[12.0], [5.0]]),
  }
  graph = structure.trace(
    lambda p, x: jnp.tanh(x @ p['a']) @ p['b'], params, jnp.ones((1, 2))
  )
  reduce = lambda **kw: [float(s) for s in graph.reduce(params, **kw)['a']]
  assert reduce(combine='sum') == [17.0, 5.0]
  assert reduce() == [8.5, 2.5]
  assert reduce(norm='l1', combine='sum') == [19.0, 5.0]
  assert reduce(norm='max', combine='max') == [12.0, 5.0]
  assert reduce(norm='mean', combine='sum') == [15.5, 5.0]
  assert reduce(combine='first') == [5.0, 0.0]


def test_a_norm_of_zeros_has_a_gradient_of_zero():
  """Of unit 0 it is a / |a| = (3/5, 4/5); of unit 1, all zeros, it is 0."""
  fn, params = (
    lambda p, x: jnp.tanh(x @ p['a']) @ p['b'],
    {
      'a': jnp.array([[3.0, 0.0], [4.0, 0.0]]),
      'b': jnp.ones((2, 1)),
    },
  )
  graph = structure.trace(fn, params, jnp.ones((1, 2)))
  total = lambda a: jnp.sum(graph.reduce({'a': a})['a'])
  np.testing.assert_allclose(
    jax.grad(total)(params['a']), [[0.6, 0.0], [0.8, 0.0]], rtol=1e-6
  )


def layer_norm_net():
  params = {'a': normal(5, 8), 'scale': jnp.ones(8), 'b': normal(8, 3)}

  def fn(p, x):
    y = x @ p['a']
    y = (y - jnp.mean(y, -1, keepdims=True)) * lax.rsqrt(
      jnp.var(y, -1, keepdims=True) + 1e-6
    )
    return (y * p['scale'][None]) @ p['b']

  return fn, params, normal(4, 5)


def test_a_reduction_over_an_axis_protects_it_unless_told_to_keep():
  fn, params, x = layer_norm_net()
  graph = structure.trace(fn, params, x)
  assert not graph.groups
  assert 'reduce_sum at structure_test.py:' in graph.explain('a', 1)
  assert 'reduces over it' in graph.protected['scale:0']
  kept = structure.trace(fn, params, x, reductions='keep')
  assert kept.groups['a'].reduced
  proof = check(kept, half_of_everything(kept), params, x)
  assert proof.parameters is None


def test_an_operation_without_a_rule_protects_its_axes_by_name():
  params = {'a': normal(5, 8), 'b': normal(8, 3)}
  triangle = lambda y: jax.lax.linalg.qr(y, full_matrices=False)[1]
  fn = lambda p, x: triangle(x @ p['a']) @ p['b']
  graph = structure.trace(fn, params, normal(4, 5))
  assert not graph.groups
  assert 'qr at structure_test.py:' in graph.explain('b', 0)
  assert 'has no rule' in graph.explain('b', 0)


def test_a_leaf_that_is_not_used_stays_whole():
  params = {'a': normal(5, 8), 'b': normal(8, 3), 'ema': jnp.zeros((5, 8))}
  graph = structure.trace(
    lambda p, x: jnp.tanh(x @ p['a']) @ p['b'], params, normal(4, 5)
  )
  assert list(graph.groups) == ['a']
  assert graph.explain('ema', 1) == (
    'protected (8): the function does not use this leaf'
  )


def test_inputs_and_outputs_are_protected_and_statistics_are_not():
  params = {'w': normal(5, 8), 'v': normal(8, 3), 'mean': jnp.zeros(8)}

  def step(p, x):
    y = x @ p['w']
    state = {'mean': 0.9 * p['mean'] + 0.1 * jnp.mean(y, 0)}
    return (y - p['mean'][None]) @ p['v'], state

  x = normal(4, 5)
  graph = structure.trace(step, params, x)
  assert {m.path for m in graph.groups['w'].members} == {'w', 'v', 'mean'}
  assert graph.explain('w', 0) == (
    'protected (5): it is an input of the function'
  )
  assert graph.explain('v', -1) == (
    'protected (3): it is an output of the function'
  )
  plan = half_of_everything(graph)
  check(graph, plan, params, x)
  small = plans.specialise(graph, plan)(plans.shrink(graph, plan, params), x)
  assert small[1]['mean'].shape == (4,)


def test_a_trace_takes_no_memory_and_other_batches_are_traced_again():
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  huge = 2**18
  params = {'a': spec(huge, huge), 'b': spec(huge, 10)}
  fn = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  graph = structure.trace(fn, params, spec(1, huge))
  assert graph.groups['a'].size == huge
  fn, params, x, _ = PROGRAMS['flatten']
  graph = structure.trace(fn, params, x)
  plan = half_of_everything(graph)
  small = plans.shrink(graph, plan, params)
  specialised = plans.specialise(graph, plan)
  whole = specialised(small, jnp.concatenate([x, x]))
  np.testing.assert_allclose(whole[:2], specialised(small, x), rtol=1e-5)


def test_the_fingerprint_is_the_same_on_every_version():
  """A plan written elsewhere must be read here: a golden number."""
  fn, params, x, _ = PROGRAMS['concatenated']
  assert structure.trace(fn, params, x).fingerprint == '6d160df51285fed1'


def test_the_table_names_groups_members_and_reasons():
  fn, params, x, _ = PROGRAMS['mlp']
  lines = str(structure.trace(fn, params, x)).splitlines()
  assert lines[0].split() == ['group', 'units', 'members']
  assert lines[1].split() == ['a', '6', 'a:1,', 'b:0']
  assert lines[4:] == [
    'protected',
    'a:0  it is an input of the function',
    'c:1  it is an output of the function',
  ]


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda g: g.explain('d', 0), "There is no leaf 'd'; the leaves are: a"),
    (lambda g: g.explain('a', 2), "'a' has 2 axes, got axis 2"),
    (lambda g: g.expand({'z': None}), "no group 'z'; the groups are: a, b"),
    (
      lambda g: g.expand({'a': np.ones(3, bool)}),
      r"mask of group 'a' must have shape \(6,\), got \(3,\)",
    ),
    (
      lambda g: g.reduce({'a': np.ones((2, 2))}),
      r"'a' must have shape \(5, 6\), got \(2, 2\)",
    ),
    (lambda g: g.reduce({'q': np.ones(2)}), "'q' is no leaf of the graph"),
    (
      lambda g: g.reduce({'a': np.ones((5, 6))}, norm='l3'),
      "`norm` must be 'l1', 'l2', 'max' or 'mean', got 'l3'",
    ),
    (
      lambda g: g.reduce({'a': np.ones((5, 6))}, combine='min'),
      "`combine` must be 'mean', 'sum', 'max' or 'first', got 'min'",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  fn, params, x, _ = PROGRAMS['mlp']
  graph = structure.trace(fn, params, x)
  with pytest.raises(ValueError, match=message):
    call(graph)


def test_trace_refuses_what_is_no_array_and_unknown_semantics():
  with pytest.raises(TypeError, match="Leaf 'rate' of params must be an array"):
    structure.trace(lambda p, x: x, {'rate': 0.5}, jnp.ones(2))
  with pytest.raises(
    ValueError, match="must be 'protect', 'keep' or 'rescale', got"
  ):
    structure.trace(lambda p, x: x, {}, jnp.ones(2), reductions='x')


# Axis types: two refinements of one axis must agree, entry by entry.


@given(
  cuts_a=st.sets(st.integers(1, 11)),
  cuts_b=st.sets(st.integers(1, 11)),
)
@settings(max_examples=60, deadline=None)
def test_two_sums_unify_to_their_common_refinement(cuts_a, cuts_b):
  def sizes(cuts):
    bounds = [0, *(2 * cut for cut in sorted(cuts)), 24]
    return [b - a for a, b in itertools.pairwise(bounds)]

  a = ax.concatenation(ax.atom(n) for n in sizes(cuts_a))
  b = ax.concatenation(ax.atom(n) for n in sizes(cuts_b))
  ax.unify(a, b, 'test')
  assert [leaf.size for leaf in ax.atoms(a)] == sizes(cuts_a | cuts_b)
  assert [ax.find(x) for x in ax.atoms(a)] == [ax.find(x) for x in ax.atoms(b)]


@pytest.mark.parametrize(
  ('left', 'right', 'factors'),
  [
    ((2, 6), (4, 3), (2, 2, 3)),
    ((12,), (3, 4), (3, 4)),
    ((8, 3), (2, 12), (2, 4, 3)),
  ],
)
def test_two_products_unify_to_their_common_refinement(left, right, factors):
  a = ax.product(ax.atom(n) for n in left)
  b = ax.product(ax.atom(n) for n in right)
  ax.unify(a, b, 'test')
  assert [leaf.size for leaf in ax.atoms(a)] == list(factors)
  assert [leaf.size for leaf in ax.atoms(b)] == list(factors)
  assert not ax.is_locked(a)


def test_what_has_no_common_refinement_is_locked_with_the_reason():
  a = ax.product([ax.atom(2), ax.atom(3)])
  b = ax.product([ax.atom(3), ax.atom(2)])
  ax.unify(a, b, 'a reshape')
  assert ax.is_locked(a)
  assert ax.is_locked(b)
  assert 'do not match: a reshape' in ax.atoms(a)[0].locked
  with pytest.raises(ValueError, match='Cannot unify axes of 2 and 3'):
    ax.unify(ax.atom(2), ax.atom(3), 'x')


def test_a_key_among_the_params_passes_through():
  params = {'a': normal(3, 4), 'b': normal(4, 2), 'key': jax.random.key(3)}

  def noisy(p, x):
    return x @ p['a'] @ p['b'] + jax.random.normal(p['key'], (2,))[None]

  graph = structure.trace(noisy, params, normal(5, 3))
  plan = plans.from_kept(graph, {'a': [0, 3]})
  small = plans.shrink(graph, plan, params)
  assert small['key'] is params['key']
  assert check(graph, plan, params, normal(5, 3)).values < 1e-5


def test_a_leaf_that_is_only_handed_back_goes_with_what_replaces_it():
  params = {
    'a': normal(3, 4),
    'b': normal(4, 2),
    'stats': {n: normal(4) for n in ('sum', 'mean', 'passed', 'unused')},
  }

  def step(p, x):
    x = x @ p['a']
    total = p['stats']['sum'] + jnp.sum(x, 0)  # The old mean is not read.
    stats = {'sum': total, 'mean': total / 5, 'passed': p['stats']['passed']}
    return x @ p['b'], {'stats': stats}

  graph = structure.trace(step, params, normal(5, 3))
  (group,) = graph.groups.values()
  paths = {member.path for member in group.members}
  assert paths == {'a', 'b', 'stats/sum', 'stats/mean'}
  for path in ('stats/unused:0', 'stats/passed:0'):
    assert 'does not use' in graph.protected[path]
  plan = plans.from_kept(graph, {'a': [0, 3]})
  assert check(graph, plan, params, normal(5, 3)).values < 1e-5


def test_dropout_draws_the_same_for_what_is_left():
  params = {'a': normal(5, 8), 'b': normal(8, 3)}

  def fn(p, x):
    y = x @ p['a']
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, y.shape)
    return jnp.where(keep, y, 0) @ p['b']

  x = normal(4, 5)
  graph = structure.trace(fn, params, x)
  plan = half_of_everything(graph)
  assert check(graph, plan, params, x).removed == 4
