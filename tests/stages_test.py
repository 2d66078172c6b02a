"""Tests of functions cut into stages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import models, tree
from jaxprune.structure.queries import stages
from jaxprune.structure.sizes import padded

X = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))


@pytest.fixture(scope='module')
def net():
  return models.resnet_digits(
    channels=(4, 8, 8), strides=(1, 2, 1), num_classes=3
  )


@pytest.fixture(scope='module')
def variables(net):
  return jax.jit(net.init)(jax.random.key(0), X)


def test_stages_one_after_another_are_the_function(net, variables):
  graph = jp.trace(net.apply, variables, X)
  parts = stages.cut(graph, ['.*stage2.*', '.*head.*'])
  assert len(parts) == 3
  for x in (X, X[:2]):  # Another batch too.
    h = x
    for part in parts:
      h, new = part(variables, h)
      assert new == {}
    np.testing.assert_allclose(h, net.apply(variables, x), rtol=1e-6)


def test_each_stage_hands_back_its_own_statistics(net, variables):
  def step(variables, x):
    return net.apply(variables, x, train=True, mutable=['batch_stats'])

  graph = jp.trace(step, variables, X)
  h, found = X, {}
  for number, part in enumerate(stages.cut(graph, ['.*stage2.*'])):
    h, new = part(variables, h)
    in_second = [re.search('stage[23]', path) for path in new]
    assert all(in_second) if number else not any(in_second)
    found |= new
  logits, state = step(variables, X)
  np.testing.assert_allclose(h, logits, rtol=1e-5)
  expected = tree.leaves(state)
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-5)


def test_the_graph_of_a_stage_has_its_inner_groups(net, variables):
  whole = jp.trace(net.apply, variables, X)
  _, second = stages.cut(whole, ['.*stage2.*'])
  graph = jp.trace(second, variables, jnp.ones((4, 8, 8, 4)))
  inner = {
    n: g.size for n, g in whole.groups.items() if re.search('stage[23]', n)
  }
  assert {n: g.size for n, g in graph.groups.items()}.items() <= inner.items()
  assert any('stage2' in name for name in graph.groups)
  assert not any('stage1' in name for name in graph.groups)


AT = ['.*stage2_block1.*', '.*stage3_block1.*']


def test_stages_at_one_side_are_the_function(net, variables):
  graph = jp.trace(net.apply, variables, X)
  marked = stages.resized(graph, AT)
  there = stages.resized(graph, AT, [(8, 8)] * 3)
  for x in (X, X[:2]):
    wanted, *found = jax.jit(
      lambda v, x: [fn(v, x) for fn in (net.apply, marked, there)]
    )(variables, x)
    for logits in found:
      np.testing.assert_array_equal(logits, wanted)
  again = graph.refit(marked, X)
  assert again.fingerprint == graph.fingerprint
  assert list(again.groups) == list(graph.groups)
  assert list(again.blocks) == list(graph.blocks)


@pytest.mark.slow
def test_stages_at_sides_of_their_own(net, variables):
  """What the module does, stage by stage, with its features resized."""
  net = net.clone(head='pool')
  variables = jax.jit(net.init)(jax.random.key(0), X)
  graph = jp.trace(net.apply, variables, X)
  found = stages.resized(graph, AT, [(8, 8), (5, 7), (6, 6)])

  @jax.jit
  def by_hand(variables, x):
    h = net.apply(variables, x, stop=1)
    h = net.apply(variables, padded.bilinear(h, (5, 7)), start=1, stop=2)
    assert h.shape == (4, 3, 4, 8)
    # At images of side 6 the second stage gives 3.
    return net.apply(variables, padded.bilinear(h, (3, 3)), start=2)

  np.testing.assert_allclose(
    jax.jit(found)(variables, X), by_hand(variables, X), rtol=1e-5
  )
  with pytest.raises(ValueError, match=r'images of sides \(8, 8\), got shape'):
    stages.resized(graph, AT, [(8, 8)] * 3)(variables, X[:, :6, :6])
  flat = stages.resized(graph, ['.*head.*'], [(8, 8), (6, 6)])
  with pytest.raises(ValueError, match=r'no image crosses, but an array of'):
    flat(variables, X)


@pytest.mark.slow
def test_what_leads_to_the_cut_alone_falls_behind_it():
  """A depthwise convolution of shifted slices, whose padding reads no leaf."""
  net = models.mobilenet_v1(
    0.25, num_classes=3, blocks=(1, 1), channels=(8, 8), strides=(1, 2),
    stem='small', dropout=0.0,
  )  # fmt: skip
  variables = jax.jit(net.init)(jax.random.key(0), X)
  graph = jp.trace(net.apply, variables, X)
  first, second = stages.cut(graph, ['.*stage2_block1.*'])
  h, _ = first(variables, X)
  wanted = net.apply(variables, X, stop=1)
  np.testing.assert_allclose(h, wanted, rtol=1e-5, atol=1e-6)
  logits, _ = second(variables, h)
  wanted = net.apply(variables, X)
  np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)


def test_each_leaf_is_of_the_stage_that_reads_it(net, variables):
  graph = jp.trace(net.apply, variables, X)
  found = stages.leaves_of(graph, AT)
  assert set().union(*found) == set(graph.leaves)
  assert sum(map(len, found)) == len(graph.leaves)
  assert all('stage3' in path or 'head' in path for path in found[2])
  assert 'params/stage2_block1/conv1/kernel' in found[1]


@pytest.mark.parametrize(
  ('at', 'message'),
  [
    (['.*stage9.*'], "cut '.*stage9.*' matches no leaf"),
    (['.*head.*', '.*stage2.*'], "cut '.*stage2.*' falls at or before"),
    (['.*stem.*'], "cut '.*stem.*' falls at or before"),
    (['.*stage2_block1/norm2.*'], '2 arrays cross'),
  ],
)
def test_a_cut_that_cannot_be_is_named(net, variables, at, message):
  graph = jp.trace(net.apply, variables, X)
  with pytest.raises(ValueError, match=re.escape(message)):
    stages.cut(graph, at)


def test_several_arguments_or_results_are_refused():
  params = {'a': jnp.ones((2, 2))}
  two = jp.trace(lambda p, x, y: x @ p['a'] + y, params, X[0, :2, :2, 0], 1.0)
  with pytest.raises(ValueError, match='got 2 arguments and 1 results'):
    stages.cut(two, [])
  both = lambda p, x: (x @ p['a'], x)
  with pytest.raises(ValueError, match='got 1 arguments and 2 results'):
    stages.cut(jp.trace(both, params, jnp.ones((1, 2))), [])


def test_a_feature_without_a_batch_is_refused():
  params = {'a': jnp.ones((2, 2)), 'b': jnp.ones((2, 2))}
  fn = lambda p, x: (x @ p['a']).sum(0) @ p['b']
  with pytest.raises(ValueError, match='first axis is not the batch of 3'):
    stages.cut(jp.trace(fn, params, jnp.ones((3, 2))), ['b'])


def test_a_feature_of_another_shape_is_refused(net, variables):
  first, _ = stages.cut(jp.trace(net.apply, variables, X), ['.*stage2.*'])
  with pytest.raises(ValueError, match='Stage 0 begins from shape'):
    first(variables, jnp.ones((4, 9, 9, 1)))
