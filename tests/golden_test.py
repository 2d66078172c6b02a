"""The maths against numbers derived apart from it, in golden/make_maths.py."""

import json
import pathlib

import numpy as np
import pytest

from jaxprune import distributions, scores
from jaxprune.scores import lookahead

GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / 'golden' / 'maths.json').read_text()
)
SHAPES = {
  'conv1': (3, 3, 3, 16),
  'conv2': (3, 3, 16, 64),
  'conv3': (1, 1, 64, 64),
  'head': (64, 10),
}
MACS = {'conv1': 1024.0, 'conv2': 256.0, 'conv3': 64.0, 'head': 1.0}
RULES = {
  'erk': distributions.erk,
  'by_macs': distributions.by_macs(MACS),
  'uniform_plus': distributions.uniform_plus('conv1', 'head'),
}


def given(name, *shape):
  return np.float32(GOLDEN['inputs'][name]).reshape(shape)


PARAMS = {
  'conv': given('conv', 3, 3, 2, 4),
  'dense': given('dense', 16, 6),
  'head': given('head', 6, 3),
}


NORM = {'norm': {'scale': given('scale', 4)}}
STATS = {'var': given('var', 4)}


def wiring():
  return lookahead.chain(
    {**PARAMS, **NORM},
    ['conv', 'dense', 'head'],
    norms={'conv': lookahead.Norm('norm/scale', 'var')},
  )


def test_lookahead_with_a_norm_and_a_flatten():
  found = lookahead.lookahead({**PARAMS, **NORM}, wiring(), stats=STATS)
  for name, expected in GOLDEN['lookahead'].items():
    np.testing.assert_allclose(
      np.ravel(found[name]), expected, rtol=1e-5, err_msg=name
    )


def test_lookahead_of_obd():
  saliencies = {
    name: np.float32(x).reshape(PARAMS[name].shape)
    for name, x in zip(PARAMS, GOLDEN['saliencies'], strict=True)
  }
  assert any((x < 0).any() for x in saliencies.values())
  params = {**PARAMS, **NORM}
  found = lookahead.obd(params, saliencies, wiring(), stats=STATS)
  for name, expected in GOLDEN['obd_lookahead'].items():
    np.testing.assert_allclose(
      np.ravel(found[name]), expected, rtol=1e-5, err_msg=name
    )


def test_normalised_lookahead():
  found = lookahead.lookahead({**PARAMS, **NORM}, wiring(), stats=STATS)
  masks = distributions.select_pooled(found, 40, distributions.normalised)
  for name, expected in GOLDEN['normalised'].items():
    assert np.ravel(masks[name]).tolist() == expected, name


@pytest.mark.parametrize(
  ('name', 'leaf'), [('lamp', 'dense'), ('fpgm', 'conv')]
)
def test_scores(name, leaf):
  found = getattr(scores, name)({leaf: PARAMS[leaf]}, lambda *_: True)[leaf]
  np.testing.assert_allclose(np.ravel(found), GOLDEN[name], rtol=1e-5)


@pytest.mark.parametrize('sparsity', list(GOLDEN['distributions']))
@pytest.mark.parametrize('rule', RULES)
def test_distributions_round_the_real_shares(rule, sparsity):
  expected = GOLDEN['distributions'][sparsity][rule]
  found = RULES[rule](SHAPES, float(sparsity))
  for path, share in expected.items():
    assert abs(found[path] - share) < 1, path
  assert sum(found.values()) == round(sum(expected.values()))
