"""Several functions of one params tree, traced together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from jaxprune import plans, structure
from jaxprune.plans.proof import check


def normal(*shape, seed=0):
  key = jax.random.key(seed + sum(shape))
  return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


VARIABLES = {
  'params': {
    'conv': {'kernel': normal(3, 3, 3, 8)},
    'norm': {'scale': 1 + 0.1 * normal(8), 'bias': 0.1 * normal(8, seed=1)},
    'dense': {'kernel': normal(8, 6)},
    'head': {'kernel': normal(6, 4)},
  },
  'batch_stats': {
    'norm': {'mean': 0.1 * normal(8, seed=2), 'var': 1 + normal(8, seed=3) ** 2}
  },
}
IMAGES = normal(4, 6, 6, 3)
LABELS = jnp.array([0, 3, 1, 2])
ADAM = optax.chain(optax.clip(1.0), optax.adam(0.1))


def forward(variables, x, train):
  """Returns logits and batch statistics."""
  p, stats = variables['params'], variables['batch_stats']['norm']
  x = jax.lax.conv_general_dilated(
    x,
    p['conv']['kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  if train:
    new = {'mean': jnp.mean(x, (0, 1, 2)), 'var': jnp.var(x, (0, 1, 2))}
  else:
    new = stats
  x = (x - new['mean']) * jax.lax.rsqrt(new['var'] + 1e-5)
  x = jax.nn.relu(x * p['norm']['scale'] + p['norm']['bias'])
  x = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID'
  )
  x = jnp.tanh(jnp.mean(x, (1, 2)) @ p['dense']['kernel'])
  mixed = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, stats, new)
  return x @ p['head']['kernel'], {'batch_stats': {'norm': mixed}}


def evaluate(variables, x):
  return forward(variables, x, False)[0]


def train_step(variables, opt_state, x, y):
  def loss(params):
    logits, stats = forward({**variables, 'params': params}, x, True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses), stats

  grads, stats = jax.grad(loss, has_aux=True)(variables['params'])
  updates, opt_state = ADAM.update(grads, opt_state, variables['params'])
  params = optax.apply_updates(variables['params'], updates)
  return {'params': params, **stats}, opt_state


@functools.cache
def both():
  opt_state = ADAM.init(VARIABLES['params'])
  step = (train_step, opt_state, IMAGES, LABELS)
  with jax.numpy_rank_promotion('allow'):
    return structure.trace(evaluate, VARIABLES, IMAGES, also=[step])


@pytest.fixture
def promote():
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.usefixtures('promote')
def test_a_whole_training_step_shrinks_with_its_optimizer():
  graph = both()
  (step,) = graph.also
  assert {k: g.size for k, g in graph.groups.items()} == {'conv': 8, 'dense': 6}
  assert step.groups is graph.groups
  plan = plans.from_kept(graph, {'conv': [0, 3, 4, 7], 'dense': [1, 2, 5]})
  opt_state = ADAM.init(VARIABLES['params'])
  check(graph, plan, VARIABLES, IMAGES)
  small = plans.shrink(graph, plan, VARIABLES)
  small_opt = plans.shrink(graph, plan, opt_state)
  small_step = jax.jit(plans.specialise(step, plan))
  full_step = jax.jit(plans.masked(step, plan))
  variables = VARIABLES
  for _ in range(2):
    small, small_opt = small_step(small, small_opt, IMAGES, LABELS)
    variables, opt_state = full_step(variables, opt_state, IMAGES, LABELS)
  assert small['params']['dense']['kernel'].shape == (4, 3)
  wanted = plans.shrink(graph, plan, variables)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    small,
    wanted,
  )
  # Another batch is traced again, with the small state of the optimizer.
  jax.eval_shape(small_step, small, small_opt, IMAGES[:2], LABELS[:2])
  with pytest.raises(ValueError, match=r"'args/0/1/0/mu/.*must have shape"):
    small_step(small, opt_state, IMAGES, LABELS)


def test_what_one_function_protects_is_protected_in_all():
  params = {'a': normal(3, 6), 'b': normal(6, 2)}
  net = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']
  features = lambda p, x: jnp.tanh(x @ p['a'])
  x = normal(5, 3)
  assert list(structure.trace(net, params, x).groups) == ['a']
  graph = structure.trace(net, params, x, also=[(features, x)])
  assert not graph.groups
  assert 'an output of the function' in graph.explain('b', 0)


def test_a_leaf_unused_in_one_function_goes_with_what_another_ties_it_to():
  """As Haiku's moving averages: `hidden` is written in training alone."""
  params = {'a': normal(3, 6), 'b': normal(6, 2), 'hidden': jnp.ones(6)}
  average = jnp.full(6, 0.3)
  params['average'] = average

  def evaluate(p, x):
    return jnp.tanh(x @ p['a'] - p['average'][None]) @ p['b']

  def train(p, x):
    y = x @ p['a']
    hidden = 0.9 * p['hidden'] + 0.1 * jnp.mean(y, 0)
    new = {'hidden': hidden, 'average': hidden / 0.1}
    return jnp.tanh(y - jnp.mean(y, 0)[None]) @ p['b'], new

  x = normal(5, 3)
  alone = structure.trace(evaluate, params, x)
  assert alone.explain('hidden', 0) == (
    'protected (6): the function does not use this leaf'
  )
  graph = structure.trace(evaluate, params, x, also=[(train, x)])
  assert graph.explain('hidden', 0) == 'group a (6 units)'
  plan = plans.from_kept(graph, {'a': [1, 2, 5]})
  assert plans.shrink(graph, plan, params)['hidden'].shape == (3,)
  assert check(graph, plan, params, x).removed == 3
  assert check(graph.also[0], plan, params, x).removed == 3


def test_statistics_are_known_without_the_name_of_their_collection():
  params = {
    'params': {'a': normal(3, 6), 'b': normal(6, 2)},
    'batch_stats': {'norm': {'mean': normal(6)}},
  }

  def train(variables, x):
    p, y = variables['params'], x @ variables['params']['a']
    old, mean = variables['batch_stats']['norm']['mean'], jnp.mean(y, 0)
    new = {'norm': {'mean': 0.9 * old + 0.1 * mean}}
    return jnp.tanh(y - mean[None]) @ p['b'], new

  graph = structure.trace(train, params, normal(5, 3))
  assert {name: g.size for name, g in graph.groups.items()} == {'a': 6}
  assert graph.outputs_like == (None, 'batch_stats/norm/mean')


def test_a_form_that_is_no_tuple_of_a_function_is_refused():
  with pytest.raises(TypeError, match=r'`also\[0\]` must be a tuple, got'):
    structure.trace(lambda p, x: x, {}, jnp.ones(2), also=[lambda p, x: x])


@pytest.mark.usefixtures('promote')
def test_the_derivative_of_an_embedding_and_of_a_grouped_kernel():
  """A scatter, and a convolution whose batch comes in groups."""
  params = {
    'table': normal(9, 6),
    'grouped': normal(3, 2, 12),
    'head': normal(12, 2),
  }

  def forward(p, tokens):
    x = jax.lax.conv_general_dilated(
      p['table'][tokens],
      p['grouped'],
      (1,),
      'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=3,
    )
    return jnp.tanh(x) @ p['head']

  def step(p, tokens):
    grads = jax.grad(lambda p: jnp.sum(forward(p, tokens) ** 2))(p)
    return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads)

  tokens = jnp.array([[1, 2, 7, 3], [4, 4, 0, 8]])
  graph = structure.trace(forward, params, tokens, also=[(step, tokens)])
  sizes = sorted(group.size for group in graph.groups.values())
  assert sizes == [2, 3, 4]
  plan = plans.from_widths(
    graph, {name: 2 if n.size > 2 else 1 for name, n in graph.groups.items()}
  )
  proof = check(graph.also[0], plan, params, tokens, gradients=False)
  assert proof.values < 1e-5


def test_an_output_that_only_has_the_name_of_a_leaf_is_not_cut():
  params = {'a': normal(6, 6), 'w': normal(6, 6)}
  x = normal(6, 6, seed=1)
  named = lambda p, x: {'w': jnp.tanh(x @ p['a']) @ p['w']}
  graph = structure.trace(named, params, x)
  assert graph.outputs_like == (None,)
  assert list(graph.groups) == ['a']
  assert 'output of the function' in graph.explain('w', 1)


def test_an_output_that_is_cut_is_shown():
  params = {'a': normal(3, 6), 'b': normal(6, 2)}
  step = lambda p, x: {'a': 0.9 * p['a'], 'y': jnp.tanh(x @ p['a']) @ p['b']}
  graph = structure.trace(step, params, normal(5, 3))
  assert graph.outputs_like == ('a', None)
  assert 'output\na  cut like a\n' in str(graph)


def test_a_sum_over_whole_params_is_kept():
  """An L2 term and clipping by the global norm: zeros add nothing."""
  params = {'a': normal(3, 6), 'b': normal(6, 2)}
  chain = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
  net = lambda p, x: jnp.tanh(x @ p['a']) @ p['b']

  def step(p, state, x):
    loss = lambda p: jnp.mean(net(p, x) ** 2) + optax.tree.norm(p, squared=True)
    updates, state = chain.update(jax.grad(loss)(p), state, p)
    return optax.apply_updates(p, updates), state

  x, state = normal(5, 3), chain.init(params)
  form = (step, state, x)
  assert not structure.trace(net, params, x, also=[form]).groups
  graph = structure.trace(net, params, x, also=[form], reductions='keep')
  plan = plans.from_kept(graph, {'a': [1, 2, 5]})
  proof = check(graph.also[0], plan, params, state, x, gradients=False)
  assert proof.values < 1e-5


def test_an_open_batch_is_specialised_at_every_batch():
  """Traced once with a symbolic size: convolution, flatten and attention."""
  params = {
    'conv': normal(3, 3, 2, 6),
    'flat': normal(96, 8),
    'qkv': normal(8, 3, 2, 4),
    'out': normal(2, 4, 3),
  }

  def fn(p, x):
    x = jax.lax.conv_general_dilated(
      x, p['conv'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    x = jnp.tanh(jnp.tanh(x).reshape(x.shape[0], -1) @ p['flat'])
    q, k, v = jnp.moveaxis(jnp.einsum('nd,dchk->nchk', x, p['qkv']), 1, 0)
    weights = jax.nn.softmax(jnp.einsum('nhk,ngk->nhg', q, k) / 2)
    return jnp.einsum('nhg,ngk,hko->no', weights, v, p['out'])

  (batch,) = export.symbolic_shape('batch')
  spec = lambda n: jax.ShapeDtypeStruct((n, 4, 4, 2), jnp.float32)
  graph = structure.trace(fn, params, spec(batch), reductions='keep')
  widths = {name: group.size // 2 for name, group in graph.groups.items()}
  assert sorted(widths.values()) == [1, 2, 3, 4]
  plan = plans.from_widths(graph, widths)
  small = plans.shrink(graph, plan, params)
  call, masked = (
    jax.jit(make(graph, plan)) for make in (plans.specialise, plans.masked)
  )
  for n in (1, 5):
    x = normal(n, 4, 4, 2)
    np.testing.assert_allclose(
      call(small, x), masked(params, x), rtol=1e-5, atol=1e-6
    )
  assert jax.eval_shape(call, small, spec(batch)).shape == (batch, 3)
