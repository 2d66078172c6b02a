"""Networks that others wrote, cut at random, compute what they computed.

They come with the extra ``thirdparty``. The golden table says how much of each
network can go; ``python tests/golden/make_coverage.py`` writes it anew.
"""

import functools
import importlib.util
import json
import os
import pathlib

os.environ['TRANSFORMERS_VERBOSITY'] = 'error'  # Its Flax classes are old.

import jax
import numpy as np
import pytest
import thirdparty

import jaxprune as jp
from jaxprune import plans, structure

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'coverage.json'
PACKAGES = ('transformers', 'haiku', 'jax_resnet', 'equimo')
QUICK = ('bert', 'llama', 'vit', 'haiku-mobilenet', 'resnet-d', 'equimo-vit')
ROUNDS = ('equimo-mobilenet',)  # Deep: equal to 1e-5 in float64 alone.
# name -> old width: new width, and what tells their class so.
HIDDEN = {16: 12, 24: 18, 8: 6}
USUAL = (HIDDEN, {'hidden_size': 12, 'intermediate_size': 18})
NARROWER = {
  'bert': USUAL,
  'albert': USUAL,
  'vit': USUAL,
  'beit': USUAL,
  'gpt2': ({16: 12, 8: 6, 64: 48}, {'n_embd': 12, 'n_inner': 48}),
  'opt': (
    HIDDEN,
    {'hidden_size': 12, 'word_embed_proj_dim': 12, 'ffn_dim': 18},
  ),
  'gpt-neo': ({16: 12, 8: 6, 64: 48}, {'hidden_size': 12}),
  'gemma': (
    {16: 12, 24: 18},
    {'hidden_size': 12, 'intermediate_size': 18},
  ),
  'xglm': ({24: 18}, {'ffn_dim': 18}),
}
LEAST = {'cnn': 0.6, 'transformer': 0.45, 'other': 0.0}

needs_packages = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, PACKAGES)),
  reason='needs jaxprune[thirdparty]',
)


@pytest.fixture(autouse=True)
def _their_ranks():
  with jax.numpy_rank_promotion('allow'):
    yield


def prepared(name, train, reductions='keep'):
  """A graph of one form of a network, live params, and data."""
  model = thirdparty.MODELS[name]()
  params, args = thirdparty.lively(model.params), thirdparty.inputs(model)
  if name in ROUNDS:
    params, args = doubled((params, args))
  fn = lambda params, *args: model.fn(params, *args, train=train)
  return structure.trace(fn, params, *args, reductions=reductions), params, args


def doubled(tree):
  """A pytree with its floats in float64."""
  return jax.tree.map(
    lambda x: x.astype('float64') if x.dtype == 'float32' else x, tree
  )


def at_random(graph, keep):
  """A plan that keeps ``keep(size)`` random units of every group."""
  rng = np.random.default_rng(0)
  return plans.from_kept(
    graph,
    {
      name: rng.permutation(group.size)[: keep(rng, group.size)]
      for name, group in graph.groups.items()
    },
  )


def half(rng, size):
  return (size + 1) // 2


def any_width(rng, size):
  return rng.integers(half(rng, size), size + 1)


@needs_packages
@pytest.mark.parametrize('name', QUICK)
def test_half_of_everything_at_random(name):
  graph, params, args = prepared(name, train=False)
  plan = at_random(graph, half)
  assert jp.check(graph, plan, params, *args, gradients=False).removed


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize('name', thirdparty.MODELS)
def test_values_and_gradients_at_half_and_training_at_any_width(name):
  with jax.enable_x64(name in ROUNDS):
    graph, params, args = prepared(name, train=False)
    jp.check(graph, at_random(graph, half), params, *args)
    graph, params, args = prepared(name, train=True)
    jp.check(graph, at_random(graph, any_width), params, *args, gradients=False)


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize('name', NARROWER)
def test_rescaled_is_what_their_class_makes_at_the_small_width(
  name, monkeypatch
):
  """Hidden 16 to 12, two heads of 8 to heads of 6, and 24 between to 18.

  XGLM keeps its hidden width, for its sinusoids.
  """
  graph, params, args = prepared(name, False, reductions='rescale')
  fewer, options = NARROWER[name]
  sizes = {n: group.size for n, group in graph.groups.items()}
  assert fewer.keys() <= set(sizes.values())
  plan = plans.from_widths(
    graph, {n: fewer.get(sizes[n], sizes[n]) for n in sizes}
  )
  make = thirdparty.huggingface
  monkeypatch.setattr(
    thirdparty,
    'huggingface',
    lambda *specs, **config: make(*specs, **config | options),
  )
  monkeypatch.setattr(
    thirdparty,
    'pixels',
    lambda *specs, **config: make(
      *specs, keys=('pixel_values',), **config | options
    ),
  )
  theirs = thirdparty.MODELS[name]()
  small = jp.shrink(graph, plan, params)
  ours = jax.jit(plans.specialise(graph, plan))(small, *args)
  want = jax.jit(functools.partial(theirs.fn, train=False))(small, *args)
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
  assert jp.check(graph, plan, params, *args).removed


@needs_packages
@pytest.mark.slow
def test_t5_at_a_small_width():
  """Its miniature is in rescale_idioms_test.py."""
  made = functools.partial(
    thirdparty.huggingface,
    'T5',
    'ForConditionalGeneration',
    thirdparty.WORDS,
    thirdparty.WORDS,
    keys=('input_ids', 'decoder_input_ids'),
    vocab_size=thirdparty.VOCABULARY,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
  )
  try:
    model = made()
    jax.eval_shape(model.fn, model.params, *model.args)
  except TypeError as error:  # jnp.clip(x, a_max=...), which JAX removed.
    pytest.skip(f'the Flax T5 fails on this JAX by itself: {error}')
  structure.trace(model.fn, model.params, *model.args, reductions='rescale')


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize('name', thirdparty.MODELS)
def test_the_golden_table_of_coverage(name):
  assert thirdparty.coverage(name) == json.loads(GOLDEN.read_text())[name]


def test_most_of_most_networks_can_go():
  table = json.loads(GOLDEN.read_text())
  assert table.keys() == thirdparty.MODELS.keys()
  assert len(table) >= 25
  assert sum(not row['keep']['groups'] for row in table.values()) <= 2
  for name, row in table.items():
    assert row['keep']['removed'] >= LEAST[row['family']], name
    assert row['keep']['removed'] >= row['protect']['removed'], name


def test_rescale_offers_what_keep_does_or_says_why():
  for name, row in json.loads(GOLDEN.read_text()).items():
    lost = row['keep']['removed'] - row['rescale']['removed']
    assert lost <= 0.05 or 'a table of constants' in row['rescale']['why'], name
