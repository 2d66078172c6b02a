"""Tests of the experiment on gates."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('matplotlib')
pytest.importorskip('sklearn')

from experiments import gates as experiment


@pytest.fixture(scope='module')
def task():
  return experiment.digits(None)._replace(epochs=1, strengths=(16.0, 64.0))


@pytest.mark.parametrize('name', ['dense', 'all'])
def test_every_arm_starts_as_the_dense_network(task, name):
  graph = experiment._trace(task, {})
  arm = experiment.ARMS[name](task, graph)
  variables = jax.tree.map(lambda s: jnp.ones(s.shape), task_variables(task))
  learned = {'params': variables['params'], 'gates': arm.gates}
  params, factors, penalty = jax.jit(arm.view)(learned, jnp.float32(2.0))
  same = jax.tree.map(np.array_equal, params, variables['params'])
  assert all(jax.tree.leaves(same))
  assert set(factors) == (set(experiment.SUM) if name == 'all' else set())
  full = 2.0 * (1 - task.target) if name == 'all' else 0.0
  assert float(penalty) == pytest.approx(full)


def task_variables(task):
  x = jax.ShapeDtypeStruct((1, *task.examples.images.shape[1:]), jnp.float32)
  return jax.eval_shape(task.module.init, jax.random.key(0), x)


def test_the_arms_fit_the_network(task):
  graph = experiment._trace(task, {})
  found = experiment.arms_of(task, graph)
  assert found == ['all', 'student', 'slimming', 'units', 'layers', 'dense']


def test_the_table_pairs_by_seed():
  rows = [
    {'arm': arm, 'seed': seed, 'trial': trial, 'accuracy': accuracy,
     'parameters': 10, 'seconds': 30.0}
    for arm, seed, trial, accuracy in (
      ('all', 0, None, 90.0), ('all', 1, None, 92.0), ('units', 0, None, 89.0),
      ('units', 1, None, 91.0), ('units', 100, 0, 99.0),
    )
  ]  # fmt: skip
  text = experiment.summarise(rows)
  assert '| units | 2 | 10 ± 0 | 90.00 ± 1.41 | +1.00 ± 0.00 * |' in text
  assert '2.5 CPU-minutes' in text


@pytest.mark.slow
def test_every_arm_ends_small_and_resumes(task, tmp_path):
  graph = experiment._trace(task, {})
  file = tmp_path / 'digits.jsonl'
  names = experiment.arms_of(task, graph)
  for name in names:
    experiment.contend(task, graph, name, 1, file)
  rows = experiment.read(file)
  assert len(rows) == 3 * len(names)
  finals = {row['arm']: row for row in rows if row['trial'] is None}
  assert all(row['error'] < 1e-4 for row in finals.values())
  assert finals['student']['parameters'] < finals['dense']['parameters']
  assert (tmp_path / 'digits-all.png').stat().st_size > 1000
  before = file.read_text()
  experiment.contend(task, graph, 'all', 1, file)  # Nothing is left to run.
  assert file.read_text() == before
  assert json.loads(before.splitlines()[0])['arm'] == 'all'
