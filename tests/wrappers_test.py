"""Runs every row of docs/optax_wrappers.md, and asserts what the row says."""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow

import jaxprune as jp
from jaxprune import masks, schedules, scores, transforms
from jaxprune.soft import training
from jaxprune.transforms import dynamic

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'optax_wrappers.md'
ROW = re.compile(r'^\| `(?P<chain>.+)` \| (?P<verdict>\w+) \|', re.MULTILINE)
STEPS = 7  # The link prunes at its second step: from then on it must hold.

KERNELS = {
  'a': {'kernel': True, 'bias': False},
  'b': {'kernel': True, 'bias': False},
}
LAYER_B = {
  'a': {'kernel': False, 'bias': False},
  'b': {'kernel': True, 'bias': True},
}


def network():
  """Returns two layers of 8 x 8, without a zero."""
  kernel = np.random.default_rng(0).uniform(0.5, 2, (2, 8, 8))
  layer = lambda i: {'kernel': jnp.float32(kernel[i]), 'bias': jnp.ones(8)}
  return {'a': layer(0), 'b': layer(1)}


def prune():
  """Returns a link that keeps one weight of four, which compiles fast."""
  late = schedules.constant(0.75, begin=1)
  return jp.sparsify(scores.magnitude, late, granularity=masks.groups(1, 4))


NAMES = {
  **vars(optax.contrib),
  **vars(optax),
  'mask_moments': transforms.mask_moments,
  'move': lambda inner: dynamic.rigl(
    inner, 0.75, jax.random.key(0), end=9, every=2
  ),
  'multi_steps': lambda tx, n: optax.MultiSteps(
    tx, n
  ).gradient_transformation(),
  'tuned': lambda learning_rate: optax.chain(
    optax.adam(learning_rate), prune()
  ),
  'odd_steps': lambda step, *_, **__: step % 2 == 1,
  'kernels': KERNELS,
  'frozen': LAYER_B,
  'trained': jax.tree.map(lambda x: not x, LAYER_B),
  'by_name': jax.tree.map(lambda x: 'ba'[x], KERNELS),
  'by_layer': jax.tree.map(lambda x: 'ab'[x], LAYER_B),
}


def rows():
  """Returns (chain, verdict) of each row; what holds in any case is slow."""
  text = PAGE.read_text()
  found = [(m['chain'], m['verdict']) for m in ROW.finditer(text)]
  plain = re.compile(r'chain\((?!adam\().*, prune\)$|.+\(move\(')
  wrappers = text.index('## Wrappers'), text.index('## Masks that move')
  return [
    slow(*row)
    if row[1] == 'exact'
    and plain.match(row[0])
    and not wrappers[0] < text.index(f'`{row[0]}`') < wrappers[1]
    else row
    for row in found
  ]


def make(chain):
  return eval(chain, {**NAMES, 'prune': prune()})


def train(tx, params, **extra):
  """Trains on a quadratic; returns params, state and whether all steps held."""

  @jax.jit
  def step(params, state):
    fast = getattr(params, 'fast', params)
    grads = jax.tree.map(lambda w: 0.1 * w + 0.01, fast)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(STEPS):
    params, state = step(params, state)
  return params, state


def pruned(params):
  """Returns how many weights of each kernel are zero."""
  named = jp.tree.leaves(params)
  return [
    int((w == 0).sum()) for path, w in named.items() if path.endswith('kernel')
  ]


def is_exact(counts, chain):
  if 'move(' in chain:  # What has just grown is zero too.
    return sum(counts) >= 96
  return all(n == 48 for n in counts)


def test_the_page_has_rows_of_every_verdict():
  verdicts = [
    row.values[1] if hasattr(row, 'values') else row[1] for row in rows()
  ]
  assert set(verdicts) == {
    'exact',
    'lost',
    'average',
    'partly',
    'raises',
  }
  lines = re.findall(r'^\| `', PAGE.read_text(), re.MULTILINE)
  assert len(verdicts) == len(lines) >= 70


@pytest.mark.parametrize(('chain', 'verdict'), rows())
def test_row(chain, verdict):
  tx, params = make(chain), network()
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  if 'lookahead(' in chain:
    params = optax.LookaheadParams.init_synced(params)
  if verdict == 'raises':
    texts = 'No leaf is left to prune|A mask is bool, .* a/kernel .int32'
    with pytest.raises((TypeError, ValueError), match=texts):
      train(tx, params)
    return
  extra = {'value': jnp.float32(1)} if 'plateau' in chain else {}
  params, state = train(tx, params, **extra)
  revived = [x for _, x in optax.tree.get_all_with_path(state, 'revived')]
  assert len(revived) == 1
  inner = params
  if chain.startswith('lookahead('):
    inner = params.slow
  if verdict == 'lost':
    assert not is_exact(pruned(inner), chain)
    assert int(revived[0]) > 0
    with pytest.raises(ValueError, match='Pruned weights are not zero in '):
      jp.check_sparse(inner, state)
    return
  assert int(revived[0]) == 0
  if verdict == 'partly':
    assert pruned(params) == [48, 0]
    with pytest.warns(UserWarning, match='No mask covers b/kernel: optax.'):
      jp.check_sparse(params, state)
    return
  assert is_exact(pruned(params), chain)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    jp.check_sparse(params, state)
  if verdict == 'average':
    average = optax.contrib.schedule_free_eval_params(state[0], params)
    assert not is_exact(pruned(average), chain)
    held = optax.tree.get(state, 'masks')
    assert is_exact(pruned(masks.apply(held, average)), chain)


LINKS = {
  'soft_shrinkage': lambda: transforms.soft_shrinkage(
    scores.magnitude, 0.75, end=1
  ),
  'keep_sparse': lambda: jp.keep_sparse(
    masks.top(scores.magnitude(network()), 0.75), packed=True
  ),
  'track_pdp': lambda: training.track_pdp(
    0.75, begin=0, ramp=lambda step: 1.0, end=2
  ),
  'set': lambda: dynamic.set_(optax.sgd(0.1), 0.75, jax.random.key(0), end=9),
}


@pytest.mark.parametrize('name', LINKS)
def test_every_link_counts_what_came_back(name):
  for behind, holds in ((optax.identity(), True), (optax.scale(0.5), False)):
    _, state = train(optax.chain(LINKS[name](), behind), network())
    assert (int(optax.tree.get(state, 'revived')) == 0) == holds


@pytest.mark.parametrize(
  ('behind', 'name', 'order'),
  [
    (optax.clip(1.0), 'add_decayed_weights)', 'chain(..., sparsify'),
    (optax.add_decayed_weights(0.1), 'add_decayed_weights)', 'chain(..., '),
    (optax.freeze(True), 'freeze or masked of', 'chain(..., sparsify'),
    (optax.ema(0.9), 'ema of', 'chain(ema(...), sparsify'),
    (
      optax.masked(optax.ema(0.9), lambda p: jax.tree.map(lambda w: True, p)),
      'masked(ema) of',
      'chain(..., sparsify',
    ),
    (optax.apply_every(2), 'apply_every of', 'chain(apply_every(...), '),
  ],
)
def test_a_remedy_names_no_link_that_its_state_does_not_tell(
  behind, name, order
):
  """clip was called scale, and the average of masked(ema) masked."""
  params = network()
  drawn = masks.top(jax.tree.map(jnp.abs, params), 0.75)
  state = optax.chain(transforms.keep_sparse(drawn), behind).init(params)
  with pytest.raises(ValueError, match='not zero') as error:
    jp.check_sparse(params, state)
  assert name in str(error.value)
  assert order in str(error.value)
  assert 'scale(...)' not in str(error.value)


def test_the_message_names_who_did_it_and_the_order_that_works():
  def message(chain):
    params = network()
    if 'lookahead' in chain:
      params = optax.LookaheadParams.init_synced(params)
    params, state = train(make(chain), params)
    with pytest.raises(ValueError, match='b/kernel') as error:
      jp.check_sparse(getattr(params, 'slow', params), state)
    return str(error.value)

  text = message('chain(clip(1.0), prune, adam(0.01))')
  assert 'a/kernel (48 of 48)' in text
  assert text.endswith('chain(scale_by_adam(...), sparsify(...)).')
  text = message('lookahead(chain(adam(0.01), prune), 2, 0.5)')
  assert text.endswith('write chain(lookahead(...), sparsify(...)).')
  with pytest.raises(ValueError, match='in this one no link prunes'):
    jp.check_sparse(network(), optax.adam(0.1).init(network()))
