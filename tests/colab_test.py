import json
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))


@pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_a_lesson_saved_without_output(file):
  cells = json.loads(file.read_text())['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert all(not c['outputs'] and c['execution_count'] is None for c in code)
  prose = [cell for cell in cells if cell['cell_type'] == 'markdown']
  assert len(prose) >= len(code)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # Those of the kernel's own libraries.
def test_the_quick_start_runs_from_top_to_bottom(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # One device, as for users.
  notebook = nbformat.read(ROOT / 'colabs' / 'quick_start.ipynb', as_version=4)
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name='python3')
  client.execute(cwd=str(ROOT))
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', ())
  ]
  text = ''.join(output.get('text', '') for output in outputs)
  share = lambda name: float(text.split(f'\n{name}: ')[1].split('%')[0])
  dense = float(text.split('dense: ')[1].split('%')[0])
  assert dense >= 96
  assert share('small') >= dense - 3
  assert share('PDP') >= dense - 3
  plots = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(plots) == 3
