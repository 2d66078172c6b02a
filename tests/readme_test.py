import pathlib
import re

import pytest

from experiments import flags, settings

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()


def blocks(language):
  """Returns the code blocks of a language."""
  return re.findall(rf'^```{language}\n(.*?)^```$', TEXT, re.M | re.S)


def test_the_tour_runs(monkeypatch, capsys):
  namespace: dict = {}
  for block in blocks('python'):
    exec(compile(block, 'README.md', 'exec'), namespace)
  assert namespace['masks'] is not None
  zeros = namespace['jp'].masks.sparsity(namespace['masks'])
  assert zeros == pytest.approx(0.9, abs=1e-5)
  assert namespace['proof'].values < 1e-5
  out = capsys.readouterr().out
  assert '(256, 10)' in out


def test_the_first_block_is_command_one_and_the_second_runs_the_tests():
  first, second = blocks('bash')
  assert TEXT.index('```') == TEXT.index(f'```bash\n{first}')
  assert first.splitlines()[-1] == '.venv/bin/python -m experiments.prune'
  assert '-m pytest -m "not slow"' in second
  ci = (ROOT / '.ci' / 'run').read_text()
  assert 'README.md' in ci  # It takes the command from there.


def test_the_flags_are_those_of_the_job():
  table = re.findall(r'^\| `--(\w+)` \| (\S+|.*?) \|', TEXT, re.M)
  assert len(table) >= 8
  usual = flags.parse([])
  for name, default in table:
    assert f'--{name}=' in settings.usage(flags.Config)
    if hasattr(usual, name) and re.fullmatch(r'`[\w.]+`', default):
      assert str(getattr(usual, name)) == default.strip('`')
  models = re.search(r'`--model` .*', TEXT)
  assert models is not None
  for name in (*flags.MODELS,):
    assert f'`{name}`' in models[0]


def test_nothing_is_named_that_is_not_there():
  rooms = re.findall(r'^\| ((?:`\w+` ?)+) \|', TEXT, re.M)
  names = [name for row in rooms for name in re.findall(r'`(\w+)`', row)]
  assert len(names) > 15
  for name in names:
    folder = ROOT / 'jaxprune' / name
    assert folder.is_dir() or folder.with_suffix('.py').exists(), name
