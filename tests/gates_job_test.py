"""Tests of the experiment on gates."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('matplotlib')
pytest.importorskip('sklearn')

from experiments.gates import __main__ as job
from experiments.gates import gated
from jaxprune.models import MLP

NAMES = ('hidden2', 'hidden3')


@pytest.fixture(scope='module')
def task():
  net = gated.NETS['lenet']
  return gated.Task(
    MLP((6, 5, 5), num_classes=3),
    net.bypassed,
    net.rivals,
    shape=(2, 2, 1),
    target=0.5,
    rates=(0.1,),
    strengths=(4.0,),
  )


@pytest.mark.parametrize('name', ['dense', 'all'])
def test_every_arm_starts_as_the_dense_network(task, name):
  arm = gated.ARMS[name](task, gated.trace(task, {}))
  params = gated.variables_of(task)['params']
  params = jax.tree.map(lambda s: jnp.ones(s.shape), params)
  learned = {'params': params, 'gates': arm.gates}
  seen, factors, penalty = arm.view(learned, 2.0, task.target)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, seen, params)))
  assert set(factors) == ({'hidden3'} if name == 'all' else set())
  full = 2.0 * (1 - task.target) if name == 'all' else 0.0
  assert float(penalty) == pytest.approx(full)


def test_a_closed_layer_leaves_the_network_and_its_count(task):
  """4-6-5-5-3 has 30 + 35 + 30 + 18 parameters; without hidden3, 83."""
  graph = gated.trace(task, {})
  arm = gated.ARMS['all'](task, graph)
  init = task.module.init(jax.random.key(0), jnp.zeros((1, *task.shape)))
  closed = arm.gates._replace(layers={'hidden3': jnp.zeros(())})
  learned = {'params': init['params'], 'gates': closed}
  small = arm.finish(learned, {}, {})
  assert sum(w.size for w in jax.tree.leaves(small.variables)) == 83
  assert small.report['closed'] == {
    'units': 0.0, 'layers': ('hidden3',), 'blocks': ()
  }  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (4, *task.shape))
  params, factors, _ = arm.view(learned, 0.0, 0.0)
  wanted = gated.forward(
    task, task.module, {'params': params}, x, factors, False
  )
  np.testing.assert_allclose(small.fn(small.variables, x), wanted, rtol=1e-5)


@pytest.mark.slow
def test_closed_branches_leave_sums_and_concatenations():
  net = gated.NETS['inception']
  task = gated.Task(
    net.make(3), net.bypassed, net.rivals, shape=(8, 8, 1), target=0.5,
    rates=(0.1,), strengths=(4.0,),
  )  # fmt: skip
  arm = gated.ARMS['all'](task, gated.trace(task, {}))
  zero = jnp.zeros(())
  off = {'sum1': zero, 'sum5': zero, 'second/branch2 branch': zero}
  theta = arm.gates.units['stem'].at[1].set(0.0).at[2].set(0.3)
  learned_gates = arm.gates._replace(
    layers=arm.gates.layers | off,
    units=arm.gates.units | {'stem': theta},
  )
  init = task.module.init(jax.random.key(0), jnp.zeros((1, *task.shape)))
  stats = {'batch_stats': jax.tree.map(lambda s: s + 0.3, init['batch_stats'])}
  learned = {'params': init['params'], 'gates': learned_gates}
  small = arm.finish(learned, stats, {})  # Holds the cost to its expectation.
  assert set(small.report['closed']['layers']) == set(off)
  assert 'sum5' not in small.variables['params']
  x = jax.random.normal(jax.random.key(1), (4, *task.shape))
  params, factors, _ = arm.view(learned, 0.0, 0.0)
  wanted = gated.forward(
    task, task.module, {'params': params, **stats}, x, factors, False
  )
  found = jax.jit(small.fn)(small.variables, x)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_arms_fit_the_network(task):
  found = gated.arms_of(task, gated.trace(task, {}))
  assert found == ['all', 'student', 'units', 'layers', 'dense']


def test_the_table_pairs_by_seed():
  rows = [
    {'settings': {'arm': arm, 'trial': trial}, 'seed': seed,
     'accuracy': accuracy, 'counts': {'parameters': 10}, 'cpu_seconds': 30.0}
    for arm, seed, trial, accuracy in (
      ('all', 0, None, 90.0), ('all', 1, None, 92.0), ('units', 0, None, 89.0),
      ('units', 1, None, 91.0), ('units', 100, 0, 99.0),
    )
  ]  # fmt: skip
  text = job.summarise(rows)
  assert '| units | 2 | 10 ± 0 | 90.00 ± 1.41 | +1.00 ± 0.00 * |' in text
  assert '2.5 CPU-minutes' in text


@pytest.mark.parametrize(
  ('flag', 'text'),
  [
    ('--target=1', '--target is out of range: 1.0.'),
    ('--strengths=4', '--strengths is out of range: 4.'),
    ('--trials=3', '--trials is out of range: 3.'),
    ('--arms=best', '--arms must be of dense,student,slimming,all,units,'),
    ('--seeds=0', '--seeds must be at least 1 and --speed 0, got 0 and 0.'),
    ('--tusk=lenet', "Unknown command line flag 'tusk'"),
  ],
)
def test_a_wrong_flag_is_one_line_and_code_2(flag, text, capsys, tmp_path):
  assert job.main([flag, f'--workdir={tmp_path / "run"}']) == 2
  out, err = capsys.readouterr()
  assert (out, err.count('\n')) == ('', 1)
  assert err.startswith('error: ')
  assert text in err
  assert not (tmp_path / 'run').exists()


def test_a_task_fills_the_flags_that_are_not_given():
  asked = job.parse(['--task=lenet', '--epochs=2', '--seed=3', '--seeds=2'])
  assert (asked.dataset, asked.epochs) == ('mnist', 2)
  assert (asked.seed, asked.seeds) == (3, 2)
  assert asked.workdir.startswith('runs/gates-lenet-')


class GoneError(Exception):
  """Stands for a machine that went away."""


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
  tmp_path, monkeypatch, capsys
):
  asked = lambda folder: [
    '--preset=smoke', '--task=lenet', '--save_every=2',
    f'--workdir={tmp_path / folder}',
  ]  # fmt: skip
  assert job.main(asked('whole')) == 0
  figures = lambda folder: [
    {k: v for k, v in row.items() if k != 'cpu_seconds'}
    for row in job.book_of(tmp_path / folder).read()
  ]
  finals = {
    row['settings']['arm']: row
    for row in figures('whole')
    if 'error' in row['details']
  }
  assert set(finals) == {'all', 'student', 'units', 'layers', 'dense'}
  assert all(row['details']['error'] < 1e-4 for row in finals.values())
  size = lambda arm: finals[arm]['counts']['parameters']
  assert size('student') < size('dense')
  svg = pathlib.Path(tmp_path, 'whole', 'all.svg').read_text()
  assert svg.startswith('<svg')

  make_step = job.make_step

  def fragile(*args):
    step, left = make_step(*args), [5]

    def call(*args):
      left[0] -= 1
      if left[0] < 0:
        raise GoneError
      return step(*args)

    return call

  monkeypatch.setattr(job, 'make_step', fragile)
  with pytest.raises(GoneError):
    job.main(asked('stopped'))
  monkeypatch.setattr(job, 'make_step', make_step)
  assert job.main(asked('stopped')) == 0
  assert figures('stopped') == figures('whole')
  before = figures('stopped')
  capsys.readouterr()
  assert job.main(asked('stopped')) == 0  # Nothing is left to run.
  assert figures('stopped') == before
