"""Tests of experiments.compare and of what it is made of."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

from experiments.compare import __main__ as compare
from experiments.compare import choices, standings, thin
from jaxprune import masks, models
from jaxprune.scores import lookahead


def test_a_thinned_stack_computes_and_learns_as_the_masked_one():
  net = models.MLP(hidden=(7, 6))
  x = jax.random.normal(jax.random.key(1), (5, 3, 3, 1))
  init = lambda key: net.init(key, x)['params']
  params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
  keep = jax.tree.map(
    lambda w: jax.random.bernoulli(jax.random.key(3), 0.4, w.shape), params
  )  # Another number of weights for each seed.
  for name in keep:
    keep[name]['bias'] = optax.MaskedNode()
    params[name]['bias'] += 0.1
  params = masks.apply(keep, params)
  layers = ['hidden1', 'hidden2', 'head']
  values, places = thin.pack(params, keep, layers)

  entropy = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda logits: jnp.mean(entropy(logits, jnp.arange(5)))
  dense = lambda p: loss(net.apply({'params': masks.apply(*p)}, x))
  sparse = lambda v, at: loss(thin.apply(v, at, x))
  pairs = jax.vmap(lambda k, p: jax.value_and_grad(lambda q: dense((k, q)))(p))
  expected, slopes = pairs(keep, params)
  found, thinned = jax.jit(jax.vmap(jax.value_and_grad(sparse)))(values, places)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  back = thin.unpack(thinned, places, layers, params)
  for name in layers:
    for leaf, slope in slopes[name].items():
      np.testing.assert_allclose(back[name][leaf], slope, atol=1e-6)


SMALL = (
  '--dataset=digits', '--train_split=train[:80]', '--test_split=test[:40]',
  '--seeds=2', '--pretrain=2', '--steps=6', '--batch=8', '--score_batches=1',
)  # fmt: skip


def runs(folder):
  (file,) = folder.rglob('runs.jsonl')
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_comparison_runs_once_and_prints_its_table(tmp_path, capsys):
  command = [
    *SMALL,
    f'--workdir={tmp_path}',
    '--contenders=magnitude,lap_backward',
    '--rounds=2,7',
  ]
  assert compare.main(command) == 0
  found = runs(tmp_path)
  assert len(found) == 1 + 2 * 2
  assert {row['details']['form'] for row in found[1:]} == {'dense', 'thin'}
  kept = {row['settings']['amount']: row['counts']['kept'] for row in found[1:]}
  assert kept['2']['head/kernel'] == 562  # 1000 * 0.75^2, half to even.
  assert kept['2']['hidden1/kernel'] == 64 * 300 // 4
  text = capsys.readouterr().out
  assert '| minus magnitude |' in text
  assert text.count('| lap_backward |') == 2
  assert compare.main([*command, '--table']) == 0
  assert capsys.readouterr().out in text
  assert compare.main(command) == 0  # Nothing is left to run.
  assert len(runs(tmp_path)) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('contender', 'options'),
  [
    ('wanda@erk', ['--schedule=cubic']),
    ('random@macs', ['--granularity=channel', '--schedule=iterative']),
    ('lamp@global', ['--granularity=4x4', '--schedule=warm_restarts']),
    ('lap_forward@uniform', ['--schedule=cosine', '--granularity=element']),
  ],
)
def test_any_score_distribution_granularity_and_schedule(
  contender, options, tmp_path
):
  command = [
    *SMALL,
    *options,
    f'--workdir={tmp_path}',
    f'--contenders={contender}',
    '--sparsities=0.5',
    '--distribution=uniform',
    '--every=2',
  ]
  assert compare.main(command) == 0
  row = runs(tmp_path)[-1]
  assert row['details']['form'] == 'dense'
  counts = row['counts']
  assert abs(sum(counts['kept'].values()) / counts['weights'] - 0.5) < 0.01


@pytest.mark.slow
def test_a_residual_network_with_statistics(tmp_path):
  command = [
    *SMALL,
    f'--workdir={tmp_path}',
    '--model=resnet_digits',
    '--contenders=taylor',
    '--distribution=uniform',
    '--granularity=3:4',
    '--steps=1',
    '--seeds=1',
  ]
  assert compare.main(command) == 2  # The first convolution has one input.
  command += ['--granularity=channel', '--sparsities=0.5']
  assert compare.main(command) == 0
  assert all(runs(tmp_path)[-1]['counts']['kept'].values())


@functools.cache
def found_scores(name):
  net = models.MLP(hidden=(4,), num_classes=3)
  x = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))
  params = net.init(jax.random.key(0), x)['params']
  graph = choices.trace(net, {'params': params}, (2, 2, 1))
  given = choices.Given(
    module=net,
    params=params,
    stats={},
    wiring=choices.structure.wiring(graph),
    batches=[(x, jnp.arange(6) % 3)],
    key=jax.random.key(2),
    rates={'hidden1/kernel': 0.5, 'head/kernel': 0.5},
  )
  return choices.SCORES[name](given)


@pytest.mark.parametrize(
  'name',
  [
    n if n in ('magnitude', 'lap', 'lap_act', 'obd', 'snip') else slow(n)
    for n in choices.SCORES
  ],
)
def test_every_score_scores_every_kernel(name):
  found = found_scores(name)
  for layer, shape in {'hidden1': (4, 4), 'head': (4, 3)}.items():
    assert found[layer]['kernel'].shape == shape
    assert bool(jnp.all(jnp.isfinite(found[layer]['kernel'])))


def test_the_scale_of_a_norm_scores_what_writes_it():
  params = {
    'conv': {'kernel': jnp.ones((3, 3, 2, 2))},
    'bn': {'scale': jnp.array([-3.0, 0.5]), 'bias': jnp.zeros(2)},
    'head': {'kernel': jnp.array([[1.0, -2.0], [4.0, 8.0]])},
  }
  norms = {'params/conv/kernel': ('params/bn/scale', 'stats/bn/var')}
  paths = ['params/conv/kernel', 'params/head/kernel']
  wiring = lookahead.chain({'params': params}, paths, norms=norms)
  given = choices.Given(None, params, {}, wiring, (), jax.random.key(0), None)
  found = choices.SCORES['bn_scale'](given)
  expected = np.broadcast_to([3.0, 0.5], (3, 3, 2, 2))
  np.testing.assert_array_equal(found['conv']['kernel'], expected)
  np.testing.assert_array_equal(found['head']['kernel'], [[1, 2], [4, 8]])
  bare = lookahead.chain({'params': params}, paths)
  with pytest.raises(ValueError, match='this network has no norm; take'):
    choices.check_norms(['bn_scale'], bare)


@pytest.mark.parametrize(
  ('flag', 'text'),
  [
    ('--contenders=best', "No score is called 'best'; there are random, mag"),
    ('--contenders=lap@even', "No distribution is called 'even'; there are l"),
    ('--contenders=lap_forward@global', 'lap_forward prunes one leaf after th'),
    ('--contenders=lap_backward@lamp', 'such as layerwise or erk, not lamp.'),
    ('--contenders=lap_forward@normalised', 'gives each its share'),
    ('--contenders=movement@lamp', 'movement may be below 0, and lamp divides'),
    ('--sparsities=0.5', '--sparsities need another --distribution.'),
    ('--granularity=big', 'A granularity is element, channel, n:m or axb, got'),
    ('lap', "'lap' is no flag; write --name=value."),
    ('--distribution=none', 'should be one of'),
  ],
)
def test_wrong_flags_are_one_line(flag, text, tmp_path, capsys):
  assert compare.main([*SMALL, f'--workdir={tmp_path}', flag]) == 2
  assert text in capsys.readouterr().err


def test_scores_that_go_below_zero_are_known():
  """Of a random network; the others are at least 0 as they are defined."""
  found = {name: found_scores(name) for name in choices.SCORES}
  least = {n: min(map(jnp.min, jax.tree.leaves(x))) for n, x in found.items()}
  below = {name for name, x in least.items() if x < 0}
  assert {'grasp', 'movement', 'obd_hutchinson'} <= below <= {*choices.SIGNED}


def test_standings_pair_by_seed():
  row = lambda name, amount, accuracy: {
    'settings': {'contender': name, 'amount': amount},
    'counts': {'weights': 10, 'kept': {'a': 5 if amount == '1' else 1}},
    'accuracy': accuracy,
    'cpu_seconds': 30.0,
  }
  text = standings.table([
    row('magnitude', '1', [50.0, 60.0]),
    row('lap', '1', [51.0, 61.0]),
    row('magnitude', '2', [20.0, 30.0]),
    row('lap', '2', [24.0, 36.0]),
  ])  # fmt: skip
  assert '| weights left | 50.00% | 10.00% |' in text
  assert '| lap | +1.00 ± 0.00 * | +5.00 ± 1.00 * | +4.00 ± 1.00 * |' in text
  assert '2.0 CPU-minutes' in text
