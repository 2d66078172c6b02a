"""The same laws for the params of Flax NNX, of Equinox and in Haiku's form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from experiments import equinox_digits, nnx_digits
from jaxprune import cost, masks, plans, structure, transforms, tree
from jaxprune.soft import channels as soft_channels

FIRST, SECOND = WIDTHS = (4, 6)
PIXELS = 4 * 4  # Of the last feature map, which the head reads flat.


@pytest.fixture(scope='module')
def of_nnx():
  return nnx_digits.run(epochs=1, widths=WIDTHS)


@pytest.fixture(scope='module')
def of_equinox():
  return equinox_digits.run(epochs=1, widths=WIDTHS)


@pytest.fixture(params=['nnx', 'equinox'])
def case(request):
  """What an example made, its params at full size, and images."""
  result = request.getfixturevalue(f'of_{request.param}')
  if request.param == 'nnx':
    return result, result.state, nnx_digits.load('test')[0]
  return result, result.params, equinox_digits.load('test')[0]


def widths_left(result):
  left = plans.widths(result.graph, result.plan)
  return left['conv1'][1], left['conv2'][1]


def zeros(params):
  """Returns (zeros, entries) over all that may be pruned."""
  weights = jax.tree.leaves(tree.prunable(params))
  return sum(int(jnp.sum(w == 0)) for w in weights), tree.size(weights)


# --- Both examples -----------------------------------------------------------


def test_the_small_function_computes_what_the_masked_network_does(case):
  result, params, images = case
  proof = result.proof
  assert proof.removed == sum(WIDTHS) - sum(widths_left(result)) > 0
  assert max(proof.values, proof.gradients, proof.parameters) < 1e-5
  # The params hold exact zeros already, so that the full network agrees too,
  # on images that the example did not check.
  small = jp.specialise(result.graph, result.plan)
  cut = jp.shrink(result.graph, result.plan, params)
  np.testing.assert_allclose(
    small(cut, images[64:128]),
    result.graph.fn(params, images[64:128]),
    rtol=1e-4,
    atol=1e-5,
  )


def test_channels_that_pdp_closes_are_removed_for_real(case):
  result, params, images = case
  graph = result.graph
  channels = soft_channels.Channels(
    reduce=lambda p: graph.reduce(tree.prunable(p)),
    scale=lambda p, units: structure.scale(graph, p, units),
  )
  state = soft_channels.init(params, channels, {'.*': 0.5})
  full = state._replace(ramp=jnp.float32(1))
  closed = soft_channels.harden(params, state, channels)
  soft, hard = (soft_channels.pdp(params, s, channels) for s in (full, closed))
  assert type(soft) is type(hard) is type(params)
  plan = plans.from_masks(graph, closed.masks)
  assert plans.widths(graph, plan)['conv2'] == (SECOND, SECOND // 2)
  full_out = graph.fn(hard, images[:32])
  assert np.abs(full_out - graph.fn(soft, images[:32])).max() > 1e-3
  np.testing.assert_allclose(
    jp.specialise(graph, plan)(jp.shrink(graph, plan, hard), images[:32]),
    full_out,
    rtol=1e-4,
    atol=1e-5,
  )


def test_fine_tuning_holds_exact_zeros_and_trains_the_rest(case):
  result, params, _ = case
  keep = plans.masks(result.graph, result.plan, params)
  transforms.check_sparse(params, keep)
  cut = [
    name
    for name, (size, left) in plans.widths(result.graph, result.plan).items()
    if left < size
  ]
  kernels = [path for path in tree.leaves(keep) if path.split('/')[0] in cut]
  assert len(kernels) == 2 * len(cut) > 0
  weights, kept = tree.leaves(params), tree.leaves(keep)
  for path in kernels:
    assert np.all(np.asarray(weights[path])[kept[path]] != 0), path


def test_the_budget_is_met_by_the_widths_that_are_left(case):
  result, _, _ = case
  macs = lambda a, b: 64 * 9 * a + PIXELS * 9 * a * b + PIXELS * 10 * b
  first, second = widths_left(result)
  assert cost.macs(result.graph) == macs(FIRST, SECOND)
  after = cost.macs(result.graph, result.plan)
  assert after == macs(first, second) <= macs(FIRST, SECOND) / 2


def test_accuracy_survives_the_cut_to_the_last_image(case):
  accuracy = case[0].accuracy
  assert accuracy['channels removed'] == accuracy['channels masked']
  assert accuracy['dense'] > 0.2  # One epoch; chance is 0.1.


def test_what_is_cut_grows_back_in_the_same_container(case):
  result, params, _ = case
  small = jp.shrink(result.graph, result.plan, params)
  grown = plans.grow(result.graph, result.plan, small)
  hidden = masks.apply(plans.masks(result.graph, result.plan, params), params)
  assert jax.tree.structure(grown) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, grown, hidden)


def test_the_state_of_the_optimizer_is_cut_like_the_params(case):
  result, params, _ = case
  state = (
    nnx.state(result.optimizer)
    if isinstance(params, nnx.State)
    else result.opt_state
  )
  cut = lambda x: tree.leaves(jp.shrink(result.graph, result.plan, x))
  shapes = {path: leaf.shape for path, leaf in cut(params).items()}
  moments = {
    path: leaf
    for path, leaf in cut(state).items()
    if '/mu/' in path or '/nu/' in path
  }
  trained = [p for p in shapes if not p.endswith(('mean', 'var'))]
  assert len(moments) == 2 * len(trained)
  for path, leaf in moments.items():
    assert leaf.shape == shapes['/'.join(path.split('/')[-2:])], path


def test_single_weights_are_pruned_to_the_exact_count(case):
  result, _, _ = case
  sparse = result.sparse
  params = (
    nnx.state(sparse, nnx.Param) if isinstance(sparse, nnx.Module) else sparse
  )
  count, size = zeros(params)
  assert count == round(0.9 * size)


# --- Flax NNX ----------------------------------------------------------------


def test_a_smaller_nnx_module_takes_the_state(of_nnx):
  images = nnx_digits.load('test')[0][:32]
  first, second = widths_left(of_nnx)
  assert of_nnx.small.conv2.kernel.shape == (3, 3, first, second)
  assert of_nnx.small.norm1.mean.shape == (first,)
  of_nnx.small.eval()
  small = jp.specialise(of_nnx.graph, of_nnx.plan)
  cut = jp.shrink(of_nnx.graph, of_nnx.plan, of_nnx.state)
  np.testing.assert_allclose(
    of_nnx.small(images), small(cut, images), rtol=1e-5, atol=1e-5
  )


def test_a_path_of_nnx_does_not_end_in_value(of_nnx):
  flat, _ = jax.tree_util.tree_flatten_with_path(of_nnx.state)
  raw = [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat
  ]
  assert all(path.endswith('/value') for path in raw)
  assert list(tree.leaves(of_nnx.state)) == [path[:-6] for path in raw]


def test_a_plan_of_a_state_is_one_of_its_pure_dict(of_nnx):
  pure = nnx.to_pure_dict(of_nnx.state)
  assert list(tree.leaves(pure)) == list(tree.leaves(of_nnx.state))
  small = jp.shrink(of_nnx.graph, of_nnx.plan, pure)
  same = nnx.to_pure_dict(jp.shrink(of_nnx.graph, of_nnx.plan, of_nnx.state))
  jax.tree.map(np.testing.assert_array_equal, small, same)


def test_nnx_reads_a_flat_map_channel_by_channel(of_nnx):
  kept = np.array([True, False, True, True, False, True])
  found = of_nnx.graph.expand({'conv2': kept})
  # Rows of the head run over (row, column, channel).
  rows = np.broadcast_to(kept, (PIXELS, SECOND)).reshape(-1, 1)
  np.testing.assert_array_equal(
    found['head/kernel'], np.broadcast_to(rows, (PIXELS * SECOND, 10))
  )
  assert {'norm2/mean', 'norm2/var', 'norm2/scale', 'norm2/bias'} <= set(found)


# --- Equinox -----------------------------------------------------------------


def test_a_smaller_equinox_module_takes_the_arrays(of_equinox):
  images = equinox_digits.load('test')[0][:32]
  first, second = widths_left(of_equinox)
  assert of_equinox.small.conv2.weight.shape == (second, first, 3, 3)
  assert of_equinox.small.conv2.in_channels == first
  small = jp.specialise(of_equinox.graph, of_equinox.plan)
  cut = jp.shrink(of_equinox.graph, of_equinox.plan, of_equinox.params)
  np.testing.assert_allclose(
    jax.vmap(of_equinox.small)(images),
    small(cut, images),
    rtol=1e-5,
    atol=1e-5,
  )


def test_equinox_kernels_are_oihw_and_its_flat_map_runs_by_channel(of_equinox):
  group = of_equinox.graph.groups['conv1']
  assert {(m.path, m.axis) for m in group.members} == {
    ('conv1/weight', 0),
    ('conv1/bias', 0),
    ('conv2/weight', 1),
  }
  kept = np.array([True, False, True, True, False, True])
  found = of_equinox.graph.expand({'conv2': kept})
  assert found['conv2/bias'].shape == (SECOND, 1, 1)
  # Columns of the head run over (channel, row, column).
  np.testing.assert_array_equal(
    found['head/weight'],
    np.broadcast_to(np.repeat(kept, PIXELS), (10, PIXELS * SECOND)),
  )


def test_an_equinox_bias_of_three_axes_stays_dense(of_equinox):
  weights = tree.leaves(tree.prunable(of_equinox.params))
  assert sorted(weights) == ['conv1/weight', 'conv2/weight', 'head/weight']


# --- Haiku: dicts of two levels, slashes in their keys -----------------------


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


HAIKU = {
  'params': {
    'net/~/conv2_d': {'w': normal(0, 3, 3, 1, 4), 'b': normal(1, 4)},
    'net/~/batch_norm': {
      'scale': normal(2, 1, 1, 1, 4),
      'offset': normal(3, 1, 1, 1, 4),
    },
    'net/~/conv2_d_1': {'w': normal(4, 3, 3, 4, 6), 'b': normal(5, 6)},
    'net/~/linear': {'w': normal(6, 6, 10), 'b': normal(7, 10)},
  },
  'state': {
    'net/~/batch_norm/~/mean_ema': {
      'hidden': normal(8, 1, 1, 1, 4),
      'average': normal(9, 1, 1, 1, 4),
      'counter': jnp.int32(3),
    },
  },
}


def haiku_step(variables, x, train=True):
  """A network in Haiku's form; training hands its statistics back."""
  p, state = variables['params'], variables['state']
  dims = ('NHWC', 'HWIO', 'NHWC')
  conv = lambda x, name: (
    jax.lax.conv_general_dilated(
      x, p[name]['w'], (1, 1), 'SAME', dimension_numbers=dims
    )
    + p[name]['b'][None, None, None]
  )
  x = conv(x, 'net/~/conv2_d')
  ema, norm = state['net/~/batch_norm/~/mean_ema'], p['net/~/batch_norm']
  if train:
    hidden = 0.9 * ema['hidden'] + 0.1 * jnp.mean(x, (0, 1, 2), keepdims=True)
    counter = ema['counter'] + 1
    average = hidden / (1 - 0.9 ** counter.astype(jnp.float32))
    ema = {'hidden': hidden, 'average': average, 'counter': counter}
  x = jax.nn.relu((x - ema['average']) * norm['scale'] + norm['offset'])
  x = jax.nn.relu(conv(x, 'net/~/conv2_d_1')).mean((1, 2))
  head = p['net/~/linear']
  logits = x @ head['w'] + head['b'][None]
  return logits, {'state': {'net/~/batch_norm/~/mean_ema': ema}}


def test_haiku_paths_and_what_is_prunable():
  assert list(tree.leaves(HAIKU['params']))[:2] == [
    'net/~/batch_norm/offset',
    'net/~/batch_norm/scale',
  ]
  chosen = tree.leaves(tree.prunable(HAIKU['params']))
  assert list(chosen) == [
    'net/~/conv2_d/w',
    'net/~/conv2_d_1/w',
    'net/~/linear/w',
  ]
  assert not tree.leaves(
    tree.prunable(HAIKU, {'.*conv2_d/w': False, '.*linear/w': False})
  ).keys() & {'params/net/~/conv2_d/w', 'params/net/~/linear/w'}
  table = {'net/~/embed': {'embeddings': normal(0, 5, 3)}}
  assert not tree.is_prunable(*next(iter(tree.leaves(table).items())))


def test_keys_that_join_to_one_path_are_an_error():
  with pytest.raises(ValueError, match='Two leaves share one path: a/b/w'):
    tree.leaves({'a/b': {'w': 1.0}, 'a': {'b/w': 2.0}})


def test_haiku_shrinks_with_its_state():
  x = normal(10, 2, 5, 5, 1)
  graph = jp.trace(haiku_step, HAIKU, x)
  ema = 'state/net/~/batch_norm/~/mean_ema'
  paths = {member.path for member in graph.groups['net/~/conv2_d'].members}
  assert {f'{ema}/hidden', f'{ema}/average'} < paths
  assert list(graph.groups) == ['net/~/conv2_d', 'net/~/conv2_d_1']
  plan = plans.from_kept(
    graph, {'net/~/conv2_d': [0, 3], 'net/~/conv2_d_1': [1, 2, 5]}
  )
  assert jp.check(graph, plan, HAIKU, x, gradients=False).values < 1e-5
  small = jp.shrink(graph, plan, HAIKU)
  leaves = tree.leaves(small)
  assert leaves[f'{ema}/hidden'].shape == (1, 1, 1, 2)
  assert leaves[f'{ema}/average'].shape == (1, 1, 1, 2)
  # The moments of an optimizer over the params alone find their leaves.
  state = optax.adam(0.1).init(HAIKU['params'])
  moments = jp.shrink(graph, plan, state)[0].mu
  shapes = lambda x: jax.tree.map(jnp.shape, x)
  assert shapes(moments) == shapes(small['params'])
