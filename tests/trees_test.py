"""Trees beside a graph: what is the network's own is cut, no other."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import plans, structure, tree


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def make(seed=0):
  return {
    'a': normal(5, 6, seed=seed),
    'bias': normal(6, seed=seed),
    'b': normal(6, 4, seed=seed),
  }


def net(p, x):
  return jnp.tanh(x @ p['a'] + p['bias'][None]) @ p['b']


PARAMS = make()
X = normal(4, 5)
GRAPH = structure.trace(net, PARAMS, X)
KEEP = [0, 1, 4]
PLAN = plans.from_kept(GRAPH, {'a': KEEP})
shrink = functools.partial(plans.shrink, GRAPH, PLAN)
grow = functools.partial(plans.grow, GRAPH, PLAN)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


class Own(NamedTuple):
  """A training state of a user's."""

  params: Any
  ema: Any
  opt_state: Any
  step: Any


class Rows(NamedTuple):
  """A state of an optimizer that nobody but the user knows."""

  rows: Any  # Of each matrix the largest gradients, [n].
  table: Any  # A constant.


def rows_of(p):
  matrices = {path: x for path, x in p.items() if x.ndim == 2}
  return Rows({k: jnp.max(x, 1) for k, x in matrices.items()}, jnp.arange(7))


# Where copies of the params may lie, and what they are.
ADAM = optax.adam(1e-2)
PARTS = {
  'params': lambda p: p,
  'ema': lambda p: jax.tree.map(jnp.negative, p),
  'opt_state': ADAM.init,
  'opt': optax.sm3(0.1).init,
  'step': lambda p: jnp.ones((), int),
  'rngs': lambda p: jax.random.split(jax.random.key(0), 3),
  'masks': lambda p: jax.tree.map(lambda x: x > 0, p),
}


@given(st.sets(st.sampled_from(sorted(PARTS)), min_size=1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_shrinking_a_composite_is_shrinking_its_parts(names, is_nested):
  whole = {name: PARTS[name](PARAMS) for name in sorted(names)}
  want = {name: shrink(part) for name, part in whole.items()}
  if is_nested:
    whole, want = (whole, {'lr': 0.1}), (want, {'lr': 0.1})
  small = shrink(whole)
  same_keys = lambda x: (
    jax.random.key_data(x)
    if jnp.issubdtype(getattr(x, 'dtype', int), jax.dtypes.prng_key)
    else x
  )
  same(jax.tree.map(same_keys, small), jax.tree.map(same_keys, want))


PAIRS = {
  'gen': ('gen', 'disc'),
  'student': ('student', 'teacher'),
  'params': ('params', 'teacher'),
  'tuple': (0, 1),
}


@given(st.sampled_from(sorted(PAIRS)), st.sampled_from(['bare', 'with', 'opt']))
@settings(max_examples=12, deadline=None)
def test_a_second_network_is_named_and_never_cut(pair, form):
  own, other = PAIRS[pair]
  part = {
    'bare': lambda p: p,
    'with': lambda p: {'params': p, 'opt': ADAM.init(p)},
    'opt': ADAM.init,
  }[form]
  parts = [part(PARAMS), part(make(1))]
  whole = tuple(parts) if own == 0 else {own: parts[0], other: parts[1]}
  with pytest.raises(ValueError, match='Two sub-trees could be') as error:
    shrink(whole)
  text = str(error.value)
  assert all(x in text for x in (f"'{own}/", f"'{other}/", 'follow='))
  small = shrink(whole, follow={f'{other}/.*': False})
  same(small[own], shrink(whole[own]))
  same(small[other], whole[other])
  same(shrink(whole, follow={'.*': True})[other], shrink(whole[other]))
  same(grow(small, follow={f'{other}/.*': False})[other], whole[other])


@pytest.mark.parametrize(
  'call',
  [
    functools.partial(plans.masks, GRAPH, PLAN),
    GRAPH.reduce,
    lambda values: structure.scale(GRAPH, values, {'a': jnp.zeros(6)}),
    lambda values: grow({name: shrink(x) for name, x in values.items()}),
  ],
  ids=['masks', 'reduce', 'scale', 'grow'],
)
def test_every_function_of_a_tree_names_a_second_network(call):
  whole = {'gen': PARAMS, 'disc': make(1)}
  with pytest.raises(
    ValueError, match=r"'gen/a' and 'disc/a'|'disc/a' and 'ge"
  ):
    call(whole)


def test_a_second_network_is_left_out_of_scores_masks_and_gates():
  whole, follow = {'gen': PARAMS, 'disc': make(1)}, {'disc/.*': False}
  same(GRAPH.reduce(whole, follow=follow), GRAPH.reduce(PARAMS))
  masks = plans.masks(GRAPH, PLAN, whole, follow=follow)
  same(masks['gen'], plans.masks(GRAPH, PLAN, PARAMS))
  assert not jax.tree.leaves(masks['disc'])
  gates = {'a': jnp.arange(6.0)}
  scaled = structure.scale(GRAPH, whole, gates, follow=follow)
  same(scaled['gen'], structure.scale(GRAPH, PARAMS, gates))
  same(scaled['disc'], whole['disc'])


def test_a_teacher_beside_the_params_of_a_step_is_not_cut_with_them():
  """Its outputs were those of a teacher with the units of the student."""

  def step(params, teacher, x):
    return jnp.sum((net(params, x) - net(teacher, x)) ** 2)

  with pytest.raises(ValueError, match=r"'params/a' and '0/a'.*follow="):
    structure.trace(step, PARAMS, PARAMS, X)
  graph = structure.trace(step, PARAMS, PARAMS, X, follow={'0/.*': False})
  assert set(graph.args_like) == {None}
  plan, teacher = plans.from_kept(graph, {'a': KEEP}), make(1)
  small = plans.shrink(graph, plan, PARAMS)
  np.testing.assert_allclose(
    plans.specialise(graph, plan)(small, teacher, X),
    step(small, teacher, X),
    rtol=1e-5,
  )
  average = structure.trace(step, PARAMS, PARAMS, X, follow={'0/.*': True})
  assert average.args_like == ('a', 'b', 'bias', None)
  with pytest.raises(ValueError, match='No argument matches'):
    structure.trace(step, PARAMS, PARAMS, X, follow={'teacher/.*': False})


def test_rules_of_follow_are_checked():
  with pytest.raises(TypeError, match=r"value True .* got 'disc': 0.5"):
    shrink({'gen': PARAMS}, follow={'disc': 0.5})
  with pytest.raises(ValueError, match="No leaf matches 'disc'"):
    shrink({'gen': PARAMS}, follow={'disc': False})


def test_another_network_of_the_same_names_is_no_statistics_of_a_layer():
  """The first name of a path was left out where it named no collection."""
  params = {'enc': {'w': normal(5, 6)}, 'dec': {'v': normal(6, 4)}}
  fn = lambda p, x: jnp.tanh(x @ p['enc']['w']) @ p['dec']['v']
  graph = structure.trace(fn, params, X)
  plan = plans.from_kept(graph, {'enc': KEEP})
  with pytest.raises(ValueError, match=r"'disc/w' of shape .* no param"):
    plans.shrink(graph, plan, {**params, 'disc': {'w': normal(5, 6)}})


def test_shapes_keys_and_training_states_are_cut():
  specs = jax.eval_shape(lambda: PARAMS)
  small = shrink(Own(PARAMS, PARAMS, ADAM.init(PARAMS), 3))
  same(small.params, shrink(PARAMS))
  same(small.opt_state, shrink(ADAM.init(PARAMS)))
  assert small.step == 3
  keys = jax.random.split(jax.random.key(3), 4)
  shapes = shrink({'params': specs, 'rng': keys})
  assert shapes['params']['a'] == jax.ShapeDtypeStruct((5, 3), jnp.float32)
  assert shapes['rng'].shape == (4,)
  assert grow(shapes['params']) == specs


def test_nnx_modules_and_optimizers_are_cut():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(5, 6, rngs=rngs)
      self.b = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
      return self.b(jnp.tanh(self.a(x)))

  model = Net(nnx.Rngs(0))
  definition, state = nnx.split(model)
  fn = lambda s, x: nnx.merge(definition, s)(x)
  graph = structure.trace(fn, state, X)
  plan = plans.from_kept(graph, {'a': KEEP})
  optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
  small = plans.shrink(graph, plan, (state, nnx.state(optimizer)))
  shapes = {path: x.shape for path, x in tree.leaves(small[1]).items()}
  assert shapes['opt_state/0/mu/a/kernel'] == (5, 3)
  assert shapes['opt_state/0/nu/b/kernel'] == (3, 4)
  module = plans.shrink(graph, plan, model)
  np.testing.assert_allclose(
    module(X), plans.specialise(graph, plan)(small[0], X), rtol=1e-5, atol=1e-6
  )
  assert plans.shrink(graph, plan, optimizer).opt_state[0].mu['a'][
    'kernel'
  ].shape == (5, 3)


@pytest.mark.parametrize(
  'tx',
  [
    optax.sm3(0.1),
    optax.contrib.muon(0.1),
    optax.adafactor(0.1),
    optax.novograd(0.1),
  ],
  ids=['sm3', 'muon', 'adafactor', 'novograd'],
)
def test_states_of_another_form_are_those_of_the_masked_network(tx):
  """A step from the state, cut, is the cut of a step from it."""
  masks = plans.masks(GRAPH, PLAN, PARAMS)
  hide = lambda p: jax.tree.map(lambda x, m: jnp.where(m, x, 0), p, masks)
  params = hide(PARAMS)
  grads = hide(make(2))
  _, state = tx.update(grads, tx.init(params), params)
  _, after = tx.update(grads, state, params)
  _, small = tx.update(shrink(grads), shrink(state), shrink(params))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    small,
    shrink(after),
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-29),
    grow(shrink(state)),
    state,
  )


def test_a_state_of_a_user_is_refused_until_it_is_registered():
  state = (rows_of(PARAMS), optax.EmptyState())
  with pytest.raises(
    ValueError,
    match=r"'0/rows/a' must have the shape \(5, 6\).*register_state\(Rows\)",
  ):
    shrink(state)

  @plans.register_state(Rows)
  def cut_rows(state, cut):
    return state._replace(rows=cut(state.rows, lambda path, x: (0,)))

  del cut_rows
  small = shrink({'params': PARAMS, 'opt_state': state})
  rows = small['opt_state'][0].rows
  same(rows['a'], state[0].rows['a'])
  same(rows['b'], state[0].rows['b'][jnp.array(KEEP)])
  same(small['opt_state'][0].table, jnp.arange(7))
  assert grow(small)['opt_state'][0].rows['b'].shape == (6,)
  with pytest.raises(TypeError, match='must be a class'):
    plans.register_state('Rows')


def test_what_cannot_be_cut_is_refused_in_words_of_the_user():
  wider = {'gen': PARAMS, 'disc': {'a': normal(5, 9)}}
  with pytest.raises(ValueError, match=r'another network .* follow=') as error:
    shrink({'disc': wider['disc']})
  assert "{'disc/a': False}" in str(error.value)
  state = optax.adafactor(0.1, min_dim_size_to_factor=2).init(PARAMS)
  with pytest.raises(
    ValueError, match=r"Adafactor .* 'a' as means .*register_state\(Factored"
  ):
    shrink(state)
  with pytest.raises(ValueError, match=r"'0/q/0' of shape \(3,\) has no param"):
    shrink((optax.ScaleBySM3State({'q': [jnp.ones(3)]}, {}),))
  with pytest.raises(
    ValueError, match=r"'0/mu/a/0' .* holds 'a' in another fo"
  ):
    shrink(({'mu': {'a': [jnp.ones(5)]}},))


def _split(devices):
  mesh = jax.make_mesh((len(devices),), ('m',), devices=devices)
  return lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))


def test_a_cut_leaf_lies_where_it_did():
  """A cut leaf came back whole on the first device."""
  split = _split(jax.devices()[:4])
  params = {
    'a': normal(5, 12),
    'bias': normal(12),
    'b': normal(12, 4),
  }
  graph = structure.trace(net, params, X)
  placed = {
    'a': jax.device_put(params['a'], split(None, 'm')),
    'bias': jax.device_put(params['bias'], split('m')),
    'b': jax.device_put(params['b'], split(None, 'm')),
  }
  for keep, spec in ((range(8), 'm'), (range(7), None)):
    plan = plans.from_kept(graph, {'a': [*keep]})
    small = plans.shrink(graph, plan, placed)
    same(small, plans.shrink(graph, plan, params))
    assert small['a'].sharding.is_equivalent_to(split(None, spec), 2)
    assert small['bias'].sharding.is_equivalent_to(split(spec), 1)
    assert small['b'].sharding.is_equivalent_to(split(None, 'm'), 2)
  spec = jax.ShapeDtypeStruct((5, 12), jnp.float32, sharding=split(None, 'm'))
  plan = plans.from_kept(graph, {'a': [*range(8)]})
  cut = plans.shrink(graph, plan, {'a': spec})['a']
  assert cut.shape == (5, 8)
  assert cut.sharding == split(None, 'm')
  assert math.prod(cut.sharding.shard_shape(cut.shape)) == 10
