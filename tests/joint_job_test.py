"""The job of JointPruning: every phase, and what an interruption leaves."""

import json
import re

import jax
import numpy as np
import pytest

from experiments import workdir
from experiments.joint import __main__ as job
from experiments.joint import supernets, tasks
from jaxprune import models
from jaxprune.search import joint

TINY = [
  '--subset=500', '--sides=5,8', '--steps=6', '--every=1', '--n=2',
  '--save_every=2', '--batch=16', '--epochs=1', '--macs=0.4', '--model=tiny',
]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
  make = lambda classes, side: models.ResNet(
    (4, 6), (1, 2), classes, stem='small'
  )
  monkeypatch.setitem(tasks.MODELS, 'tiny', make)


@pytest.mark.slow
def test_every_method_and_a_second_run(tiny, tmp_path, capsys):
  arguments = [*TINY, f'--workdir={tmp_path}', '--start=shared']
  assert job.main(arguments) == 0
  text = capsys.readouterr().out
  for name in tasks.METHODS:
    result = json.loads((tmp_path / 'seed0' / f'{name}.json').read_text())
    assert 0.36 < result['macs'] <= 0.4
    assert 0 <= result['accuracy'] <= 1
    assert (tmp_path / 'seed0' / f'{name}.svg').exists()
  assert (tmp_path / 'seed0' / 'joint' / 'vector.svg').exists()
  assert job.main(arguments) == 0  # Reads what is there.
  again = capsys.readouterr().out
  assert again.splitlines()[0].startswith('| method')
  assert again.splitlines()[2:9] == text.splitlines()[-11:-4] or again in text


@pytest.mark.slow
def test_every_stage_has_a_side_of_its_own(tiny, tmp_path):
  arguments = [*TINY, '--spatial=stage', '--canvas=yes', '--sides=5,7,8']
  arguments += [f'--workdir={tmp_path}', '--methods=joint,resolution']
  assert job.main([*arguments, '--start=shared']) == 0
  for name in ('joint', 'resolution'):
    result = json.loads((tmp_path / 'seed0' / f'{name}.json').read_text())
    assert result['vector']['side'].keys() == {'input', 'stage2'}
    assert 0.36 < result['macs'] <= 0.4
  text = (tmp_path / 'results.md').read_text()
  assert re.search(r'\| [578] [578] \|', text)


@pytest.mark.slow
def test_any_number_of_vectors_is_one_program(tiny, tmp_path, monkeypatch):
  """A search at random scores thousands, evolution now more and now fewer."""
  arguments = [*TINY, '--canvas=yes', f'--workdir={tmp_path}']
  (config,), _ = job.parse(arguments)
  task = tasks.prepare(config)
  calls = []
  net = joint.supernet(task.space, on_canvas=True)

  def counting(*args):
    calls.append(1)
    return net(*args)

  monkeypatch.setattr(supernets.joint, 'supernet', lambda *_, **__: counting)
  steps = supernets.make_steps(task)
  rng = np.random.default_rng(0)
  pick = lambda ladder: int(rng.choice(ladder))
  vectors = [jax.tree.map(pick, task.space.ladders) for _ in range(7)]
  score = lambda vectors: steps.losses(
    task.initial['params'], vectors, task.held, np.arange(8)
  )
  found = score(vectors)
  np.testing.assert_allclose(score(vectors[::-1])[::-1], found, rtol=1e-5)
  np.testing.assert_allclose(score(vectors[3:4]), found[3], rtol=1e-5)
  assert len(set(np.round(found, 4))) > 3
  assert len(calls) == 1  # Two vectors at a time, of --n=2.


@pytest.mark.slow
def test_a_search_that_stops_goes_on_to_the_same_end(tiny, tmp_path):
  """In the middle of the warm-up, and between two vector steps."""
  (config,), _ = job.parse(
    [*TINY, f'--workdir={tmp_path}', '--warmup=0.5', '--steps=8', '--every=2']
  )
  task = tasks.prepare(config)
  steps = supernets.make_steps(task)
  whole, records = supernets.train_supernet(
    task, steps, task.space, tmp_path / 'whole', moves=True
  )
  assert [record['step'] for record in records] == [5, 7]
  for stop in (3, 4):  # From the start: step 3 of 4 at random; then step 6.
    seen = []

    def stops(*args, seen=seen, stop=stop):
      seen.append(1)
      if len(seen) == stop:
        raise KeyboardInterrupt
      return steps.weights(*args)

    with pytest.raises(KeyboardInterrupt):
      supernets.train_supernet(
        task, steps._replace(weights=stops), task.space, tmp_path / 'cut', True
      )
  again, rest = supernets.train_supernet(
    task, steps, task.space, tmp_path / 'cut', True
  )
  assert rest == records
  for a, b in zip(
    jax.tree.leaves((again.params, again.unit)),
    jax.tree.leaves((whole.params, whole.unit)), strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(a, b)
  start = joint.to_unit(task.space, supernets._start(task, task.space))
  moved = jax.tree.map(lambda a, b: abs(float(a - b)), whole.unit, start)
  assert max(jax.tree.leaves(moved)) > 0.01


@pytest.mark.slow
def test_a_supernet_that_diverges_ends_in_one_line(tiny, tmp_path, capsys):
  arguments = [*TINY, f'--workdir={tmp_path}', '--methods=joint']
  assert job.main([*arguments, '--learning_rate=1e30']) == 2
  error = capsys.readouterr().err
  assert 'error: The supernet of joint has the loss nan after 4 st' in error
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--macs=1.5', '--macs is out of range: 1.5'),
    ('--n=3', '--n is out of range: 3'),
    ('--methods=joint,luck', '--methods must be of joint,uniform'),
    ('--sides=4,big', '--sides must be ints'),
    ('--spatial=stage', '--spatial=stage needs --canvas=yes'),
    ('--speed=3', 'Unknown command line flag'),
    pytest.param(
      '--macs=0.0001',
      'The ranges hold no network of cost',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_wrong_flags_end_in_one_line(flag, message, tmp_path, capsys):
  assert job.main([f'--workdir={tmp_path}', flag]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert message in error
  assert error.count('\n') == 1


def test_a_run_folder_is_of_one_configuration(tmp_path, capsys):
  arguments = ['--sides=5,8', '--macs=0.4', f'--workdir={tmp_path}']
  (config,), _ = job.parse(arguments)
  assert workdir.claim(config) == workdir.claim(config) == tmp_path
  assert job.main([*arguments, '--macs=0.3']) == 2
  error = capsys.readouterr().err
  assert 'by another configuration: --macs=0.4 (now 0.3).' in error


def test_the_defaults_need_no_flag():
  (config,), methods = job.parse([])
  assert config.dataset == 'digits'
  assert methods == list(tasks.METHODS)
  (smoke,), methods = job.parse(['--preset=smoke', '--steps=5'])
  assert smoke.steps == 5
  assert 'evolution' not in methods
