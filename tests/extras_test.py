"""The core packages are enough for the core, and a missing extra is named."""

import importlib.metadata
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

from experiments import command, runtime
from jaxprune import data, io
from jaxprune.checks import extras
from jaxprune.data import augment, digits, text
from jaxprune.report import plots

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
CORE = PROJECT['dependencies']
OPTIONAL = PROJECT['optional-dependencies']


def needed(requirements):
  """Returns the names of the distributions that requirements bring, and theirs.

  An extra in brackets counts: ``etils[epath]`` brings what its epath needs.
  """
  waiting = [Requirement(text) for text in requirements]
  seen = set()
  while waiting:
    requirement = waiting.pop()
    name = requirement.name.lower().replace('_', '-')
    for extra in ('', *requirement.extras):
      if (name, extra) in seen:
        continue
      seen.add((name, extra))
      waiting += [
        inner
        for inner in map(Requirement, importlib.metadata.requires(name) or ())
        if inner.marker is None or inner.marker.evaluate({'extra': extra})
      ]
  return {name for name, _ in seen}


def test_the_core_works_where_no_other_package_can_be_imported():
  core = needed(CORE)
  hidden = sorted(
    package
    for package, names in importlib.metadata.packages_distributions().items()
    if not any(name.lower().replace('_', '-') in core for name in names)
  )
  assert {'tensorflow_datasets', 'sklearn', 'PIL', 'flatbuffers'} <= {*hidden}
  script = textwrap.dedent(f"""
    import runpy, sys
    HIDDEN = {{*{hidden!r}}} - {{'jaxprune'}}

    class Hider:
      @staticmethod
      def find_spec(name, path=None, target=None):
        if name.partition('.')[0] in HIDDEN:
          raise ModuleNotFoundError(f'{{name}} is hidden', name=name)

    sys.meta_path.insert(0, Hider)
    sys.path.insert(0, {str(ROOT)!r})
    runpy.run_path({str(ROOT / 'tests' / 'core.py')!r}, run_name='__main__')
  """)
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'The core works.\n'


@pytest.mark.parametrize('extra', extras.EXTRAS)
def test_an_extra_brings_the_modules_of_its_functions(extra):
  named = importlib.metadata.packages_distributions()
  brought = {
    Requirement(line).name.lower().replace('_', '-') for line in OPTIONAL[extra]
  }
  for module in extras.EXTRAS[extra].modules:
    names = {name.lower().replace('_', '-') for name in named[module]}
    assert names & brought, module


@pytest.mark.parametrize('extra', ['experiments', 'test', 'colab'])
def test_the_data_reader_comes_with(extra):
  line = next(line for line in OPTIONAL[extra] if line.startswith('jaxprune['))
  assert 'data' in Requirement(line).extras


X = jnp.ones((2, 3))
PHOTO = np.zeros((4, 4, 3), np.uint8)
CALLS = [  # The module that is hidden, its extra, and a call that needs it.
  ('tensorflow_datasets', 'data', lambda path: save(path)),
  ('array_record', 'data', lambda path: data.load('own', 'train', path)),
  (
    'importlib_resources',
    'data',
    lambda path: data.count('own', 'train', path),
  ),
  ('PIL', 'data', lambda _: augment.center_crop(PHOTO, side=2)),
  ('grain', 'data', lambda path: stream(path)),
  ('sklearn', 'digits', lambda path: digits.prepare(path)),
  ('matplotlib', 'plots', lambda _: plots.widths({'a': (2, 1)})),
  ('tokenizers', 'text', lambda _: text.encode(['a'], text.word_pieces(['a']))),
  ('onnx', 'onnx', lambda path: io.save_onnx(path / 'f', jnp.sin, X)),
  ('onnxruntime', 'onnx', lambda _: runtime.in_onnx_runtime(jnp.sin, X, X)),
  (
    'flatbuffers',
    'stablehlo',
    lambda path: io.save_stablehlo(path / 'f', jnp.sin, X),
  ),
  ('flatbuffers', 'stablehlo', lambda path: io.load_stablehlo(path / 'f')),
]


def stream(path):
  """Reads a set in batches of 1."""
  return next(data.stream('own', 'train', path, seed=0, batch=1, epochs=1))


def save(path):
  """Writes a set of two images."""
  data.save(path, 'mine', {'train': (np.zeros((2, 4, 4, 3), np.uint8), [0, 1])})


@pytest.mark.parametrize(('module', 'extra', 'call'), CALLS)
def test_the_extra_that_is_missing_is_named(
  module, extra, call, monkeypatch, tmp_path
):
  (tmp_path / 'own' / '1.0.0').mkdir(parents=True)
  digits._digits.cache_clear()
  digits._builder.cache_clear()
  for name in [n for n in sys.modules if n.partition('.')[0] == module]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, module, None)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(extras.MissingExtraError) as caught:
    call(tmp_path)
  line = str(caught.value)
  assert '\n' not in line
  assert f'{module}, which is not installed' in line
  assert line.endswith(f"pip install 'jaxprune[{extra}]'.")
  assert sorted(tmp_path.rglob('*')) == before  # Nothing was written.


def test_every_module_of_an_extra_was_hidden():
  hidden = {module for module, _, _ in CALLS}
  assert hidden == {m for e in extras.EXTRAS.values() for m in e.modules}


def test_a_package_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
  (tmp_path / 'onnx.py').write_text("raise ImportError('libonnx.so is cut')")
  monkeypatch.delitem(sys.modules, 'onnx', raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ImportError, match=r'libonnx\.so is cut') as caught:
    extras.require('onnx')
  assert not isinstance(caught.value, extras.MissingExtraError)


def test_what_an_extra_itself_lacks_is_named(monkeypatch, tmp_path):
  (tmp_path / 'onnx.py').write_text('import no_such_package.inside')
  monkeypatch.delitem(sys.modules, 'onnx', raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(extras.MissingExtraError, match='need no_such_package, '):
    extras.require('onnx')


def test_a_command_ends_with_one_line_where_an_extra_is_missing(
  monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  main = lambda argv: extras.require('onnxruntime')
  assert command.job(main, object, [], 'Doc.') == 2
  assert capsys.readouterr().err == (
    'error: ONNX files need onnxruntime, which is not installed: '
    "pip install 'jaxprune[onnx]'.\n"
  )


def test_no_module_imports_an_optional_package_on_its_own():
  known = {m for e in extras.EXTRAS.values() for m in e.modules}
  for file in (ROOT / 'jaxprune').rglob('*.py'):
    for line in file.read_text().splitlines():
      words = line.split()
      if len(words) > 1 and words[0] in ('import', 'from'):
        assert words[1].partition('.')[0] not in known, (file, line)
