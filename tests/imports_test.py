"""Holds the table of who may import whom, and that importing does nothing."""

import ast
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The layers, the lowest first. A module may import the layers below its own,
# and modules of its own layer so long as no two need each other.
LAYERS = {
  'ground': 'checks numerics tree',
  'maths': 'distributions masks schedules scores',
  'training': 'gates soft transforms',
  'structure': 'cost plans structure',
  'search': 'search',
  'edge': 'data io report',
}
BARRED = {'structure': ['training']}  # Lower, and still not its business.
RANK = {m: i for i, names in enumerate(LAYERS.values()) for m in names.split()}
LAYER = {m: layer for layer, names in LAYERS.items() for m in names.split()}

FILES = sorted(
  file
  for room in ('jaxprune', 'experiments', 'tests')
  for file in (ROOT / room).rglob('*.py')
)
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))


def code(file: pathlib.Path) -> str:
  """Returns the Python of a file, or of the cells of a notebook."""
  text = file.read_text()
  if file.suffix != '.ipynb':
    return text
  cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
  lines = ''.join(''.join(cell['source']) + '\n' for cell in cells)
  magic = ('!', '%')
  return '\n'.join(
    line for line in lines.splitlines() if not line.lstrip().startswith(magic)
  )


def imports(text: str) -> set[str]:
  """Returns the dotted names that Python code imports, wherever in it.

  ``from a.b import c`` counts as ``a.b.c``: c may be a module.
  """
  names = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'Imports are absolute.'
      names.update(f'{node.module}.{alias.name}' for alias in node.names)
  return names


def needs(name: str) -> set[str]:
  """Returns the modules of the package that one of its modules imports."""
  single = ROOT / 'jaxprune' / f'{name}.py'
  files = [single] if single.exists() else single.with_suffix('').rglob('*.py')
  found = {i for file in files for i in imports(code(file))}
  inner = {i.split('.')[1] for i in found if i.startswith('jaxprune.')}
  return inner - {name}


MODULES = sorted(
  path.stem
  for path in (ROOT / 'jaxprune').iterdir()
  if (path.suffix == '.py' or (path / '__init__.py').exists())
  and path.stem not in ('__init__', 'models')
)


def test_what_counts_as_an_import():
  text = 'import a.b as c\ndef f():\n  from d.e import g, h\n'
  assert imports(text) == {'a.b', 'd.e.g', 'd.e.h'}


def test_every_module_is_in_one_layer():
  lost = set(MODULES) - set(LAYER)
  assert not lost, f'Give {sorted(lost)} a layer in this file.'
  assert len(LAYER) == len(' '.join(LAYERS.values()).split())


@pytest.mark.parametrize('name', MODULES)
def test_a_module_imports_only_the_layers_below(name):
  for other in needs(name):
    assert other in LAYER, f'{name} imports {other}, which has no layer.'
    assert RANK[other] <= RANK[name], f'{name} must not import {other}.'
    barred = BARRED.get(LAYER[name], [])
    assert LAYER[other] not in barred, f'{name} must not import {other}.'


def test_no_two_modules_need_each_other():
  graph = {name: needs(name) for name in MODULES}
  done: set[str] = set()
  while ready := {n for n in graph if n not in done and graph[n] <= done}:
    done |= ready
  assert done == set(graph), f'A circle among {sorted(set(graph) - done)}.'


def test_models_know_nothing_of_pruning():
  for file in (ROOT / 'jaxprune' / 'models').glob('*.py'):
    for name in imports(code(file)):
      own = name.startswith('jaxprune.models')
      assert own or not name.startswith('jaxprune'), f'{file.name}: {name}'


@pytest.mark.parametrize(
  'file', FILES + NOTEBOOKS, ids=lambda f: str(f.relative_to(ROOT))
)
def test_nothing_imports_tensorflow(file):
  roots = {name.split('.')[0] for name in imports(code(file))}
  assert 'tensorflow' not in roots


@pytest.mark.parametrize(
  'file',
  [
    f
    for f in FILES + NOTEBOOKS
    if {'experiments', 'colabs'} & {*f.relative_to(ROOT).parts}
  ],
  ids=lambda f: str(f.relative_to(ROOT)),
)
def test_experiments_use_public_names(file):
  text = code(file)
  names = {part for name in imports(text) for part in name.split('.')}
  names |= {
    n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)
  }
  private = [n for n in names if n.startswith('_') and not n.endswith('__')]
  assert set(private) <= {'_replace', '_asdict'}  # Of every NamedTuple.


def test_importing_makes_no_array_and_changes_no_setting():
  # A platform that does not exist: the first array would raise.
  script = textwrap.dedent("""
    import importlib, pkgutil, sys
    import flax, jax, optax, orbax.checkpoint
    before = dict(jax.config.values)
    import jaxprune
    for module in pkgutil.walk_packages(jaxprune.__path__, 'jaxprune.'):
      importlib.import_module(module.name)
    assert jax.config.values == before, 'a JAX setting changed'
    assert 'tensorflow' not in sys.modules, 'TensorFlow was imported'
    assert 'tensorflow_datasets' not in sys.modules, 'TFDS is slow to import'
    assert 'matplotlib' not in sys.modules, 'matplotlib is optional'
    assert 'sklearn' not in sys.modules, 'scikit-learn is optional'
  """)
  environment = {**os.environ, 'JAX_PLATFORMS': 'no_such_platform'}
  done = subprocess.run(
    [sys.executable, '-c', script],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
