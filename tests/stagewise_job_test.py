"""Tests of the experiment on stage-wise pruning."""

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import workdir
from experiments.stagewise import __main__ as job
from experiments.stagewise import supernets, tasks


@pytest.mark.parametrize(
  ('flag', 'text'),
  [
    ('--macs=0', '--macs is out of range: 0.0.'),
    ('--nets=2', '--nets is out of range: 2.'),
    ('--stages=4', '--stages is out of range: 4.'),
    ('--methods=best', '--methods must be of stagewise,evolution,uniform, got'),
    ('--sourse=chain', "Unknown command line flag 'sourse'"),
    ('--model=vgg', 'value should be one of <resnet20_half'),
  ],
)
def test_a_wrong_flag_is_one_line_and_code_2(flag, text, capsys, tmp_path):
  assert job.main([flag, f'--workdir={tmp_path / "run"}']) == 2
  out, err = capsys.readouterr()
  assert (out, err.count('\n')) == ('', 1)
  assert err.startswith('error: ')
  assert text in err
  assert not (tmp_path / 'run').exists()


def test_flags_fill_a_configuration_for_every_seed():
  configs, methods = job.parse(
    ['--preset=smoke', '--seeds=2', '--first_seed=3', '--notiny', '--m=2']
  )
  assert [config.seed for config in configs] == [3, 4]
  assert (configs[0].tiny, configs[0].m, configs[0].steps) == (False, 2, 6)
  assert methods == list(tasks.METHODS)
  assert len({config.workdir for config in configs}) == 1


def test_a_run_folder_is_of_one_configuration(tmp_path, capsys):
  (config,), _ = job.parse(['--m=2', f'--workdir={tmp_path}'])
  workdir.claim(config)
  assert job.main([f'--workdir={tmp_path}', '--m=3']) == 2
  error = capsys.readouterr().err
  assert 'by another configuration: --m=2 (now 3).' in error


def test_the_table_by_hand():
  figures = lambda accuracy: {'accuracy': accuracy, 'macs': 0.4, 'widths': {}}
  proxy = {
    'tau': {'stage-wise': 0.5, 'single-path': 0.25},
    'gap': {'stage-wise': 0.01, 'single-path': 0.03},
  }
  results = [
    {'stagewise': figures(0.9), 'uniform': figures(0.8), 'proxy': proxy},
    {'stagewise': figures(0.92), 'uniform': figures(0.82), 'proxy': proxy},
  ]
  text = job.tables(results, ['stagewise', 'uniform'])
  assert '| stagewise | 91.00 ± 1.41 | 40.0 |' in text
  assert '| uniform | 81.00 ± 1.41 | 40.0 | +10.00 ± 0.00 * |' in text
  assert '| stage-wise | 0.50 ± 0.00 | 1.00 ± 0.00 |' in text


@pytest.mark.slow
@pytest.mark.parametrize(
  'ablation',
  [
    [],
    ['--teacher=before', '--source=chain', '--stages=2', '--search=evolution'],
  ],
)
def test_every_phase_runs_and_is_read_again(ablation, tmp_path, capsys):
  arguments = ['--preset=smoke', '--steps=4', '--save_every=2', *ablation]
  arguments += [f'--workdir={tmp_path}']
  assert job.main(arguments) == 0
  first = capsys.readouterr().out
  folder = pathlib.Path(tmp_path, 'seed0')
  for name in (*tasks.METHODS, 'proxy'):
    assert json.loads((folder / f'{name}.json').read_text())
  for name in tasks.METHODS:
    macs = json.loads((folder / f'{name}.json').read_text())['macs']
    assert 0.39 <= macs <= 0.4
  assert (folder / 'proxy.svg').read_text().startswith('<svg')
  assert job.main(arguments) == 0  # Reads what is there.
  assert capsys.readouterr().out.splitlines()[-6:] == first.splitlines()[-6:]


class GoneError(Exception):
  """Stands for a machine that went away."""


@pytest.mark.slow
def test_a_supernet_that_was_stopped_ends_as_one_that_was_not(
  tmp_path, monkeypatch
):
  (config,), _ = job.parse(
    ['--preset=smoke', '--steps=5', '--save_every=2', f'--workdir={tmp_path}']
  )
  task = tasks.prepare(config)
  whole = supernets.supernet(task, 'stagewise', tmp_path / 'whole')
  make_step = supernets.make_step

  def fragile(*args):
    tx, step = make_step(*args)

    def call(state, examples, rows, number):
      if number == 3:
        raise GoneError
      return step(state, examples, rows, number)

    return tx, call

  monkeypatch.setattr(supernets, 'make_step', fragile)
  with pytest.raises(GoneError):
    supernets.supernet(task, 'stagewise', tmp_path / 'stopped')
  monkeypatch.setattr(supernets, 'make_step', make_step)
  again = supernets.supernet(task, 'stagewise', tmp_path / 'stopped')
  jax.tree.map(np.testing.assert_array_equal, again, whole)
