"""Tests of jaxprune.transforms.preview."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxprune import distributions, masks, schedules, scores, transforms
from jaxprune.transforms import preview

PARAMS = {
  'conv': {'kernel': jnp.ones((3, 3, 4, 8)), 'bias': jnp.ones(8)},
  'depthwise': {'kernel': jnp.ones((3, 3, 1, 8))},
  'head': {'kernel': jnp.ones((8, 2))},
}


def decided(*args, **options):
  rows = preview.decide(PARAMS, *args, **options)
  return {row.path: row for row in rows}


def test_every_leaf_is_decided_by_name():
  grains = {'head.*': None, '.*': masks.groups(2, 4)}
  rows = decided(granularity=grains | {}, sparsity=0.5)
  assert list(rows) == [
    'conv/bias', 'conv/kernel', 'depthwise/kernel', 'head/kernel'
  ]  # fmt: skip
  assert rows['conv/bias'].why == "leaves named 'bias' stay dense by default"
  assert rows['conv/kernel'][2:5] == ('pruned', 0.5, '2:4')
  assert rows['depthwise/kernel'].verdict == 'refused'
  assert 'length 1 (a depthwise kernel?)' in rows['depthwise/kernel'].why
  assert rows['head/kernel'].verdict == 'dense'
  assert 'granularity rule' in rows['head/kernel'].why


def test_what_the_distribution_gives_and_where_it_is_at_its_bound():
  rows = decided(0.5, distribution=distributions.erk)
  shapes = {
    path: row.shape for path, row in rows.items() if row.verdict == 'pruned'
  }
  kept = distributions.erk(shapes, 0.5)
  for path, count in kept.items():
    size = jnp.zeros(shapes[path]).size
    assert rows[path].sparsity == 1 - count / size
    assert rows[path].why.startswith('at its bound') == (count == size)
  assert any(row.why.startswith('at its bound') for row in rows.values())
  pooled = decided(0.5, distribution=distributions.global_)
  assert pooled['head/kernel'].sparsity is None


def test_rules_steps_and_which():
  ramp = schedules.cubic(0.8, begin=0, end=10)
  rows = decided({'conv.*': ramp}, which={'head.*': False})
  assert rows['conv/kernel'].sparsity == 1 - 58 / 288
  assert rows['depthwise/kernel'].why == 'no rule for its sparsity'
  assert 'that `which` chooses' in rows['head/kernel'].why
  assert decided(ramp, step=0)['conv/kernel'].sparsity == 0
  half = decided(lambda step: step / 10, step=5)
  assert half['conv/kernel'].sparsity == 0.5


@pytest.mark.parametrize(
  'options',
  [
    {'distribution': distributions.erk},
    {'granularity': {'conv.*': masks.channels(), '.*': masks.elements()}},
    {'granularity': {'conv.*': masks.groups(1, 4), 'head.*': masks.elements()}},
    {'granularity': masks.channels(axis=-2), 'which': {'head.*': False}},
  ],
)
def test_sparsify_does_what_was_decided(options):
  tx = transforms.sparsify(scores.magnitude, 0.75, **options)
  draw = lambda params: tx.update(params, tx.init(params), params)[1]
  state = jax.jit(draw)(PARAMS)
  found = masks.count(optax.tree.get(state, 'masks'))
  rows = decided(0.75, **options)
  assert {p for p, row in rows.items() if row.verdict == 'pruned'} == set(found)
  for path, (kept, size) in found.items():
    assert 1 - kept / size == pytest.approx(rows[path].sparsity)


def test_sparsify_raises_where_a_leaf_is_refused():
  params = {'kernel': jnp.ones((8, 4))}
  options = {'granularity': masks.groups(2, 4)}
  (row,) = preview.decide(params, 0.9, **options)
  assert row.verdict == 'refused'
  with pytest.raises(ValueError, match=row.why):
    transforms.sparsify(scores.magnitude, 0.9, **options).init(params)


def test_a_part_of_the_channels_is_rounded():
  params = {'kernel': jnp.ones((16, 10))}
  (row,) = preview.decide(params, 0.75, granularity=masks.channels())
  assert row.sparsity == 0.8


def test_the_table_lines_up():
  text = preview.table(preview.decide(PARAMS, granularity=masks.groups(2, 4)))
  lines = text.splitlines()
  assert len(lines) == 1 + 4
  assert lines[2].split() == [
    'conv/kernel',
    '3x3x4x8',
    'pruned',
    '50.00%',
    '2:4',
  ]
  assert 'by score' in preview.table(
    preview.decide(PARAMS, 0.5, distribution=distributions.global_)
  )


def test_units_say_what_goes_together():
  unit = lambda grain: decided(0.5, granularity=grain)['conv/kernel'].unit
  assert unit(masks.elements()) == 'element'
  assert unit(masks.channels()) == 'block of 1 along -1, all else whole'
  assert (
    unit(masks.blocks({-2: 2, -1: None})) == 'block of 2 along -2, all along -1'
  )
