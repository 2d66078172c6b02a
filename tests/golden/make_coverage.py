"""Writes coverage.json and prints it as the table of RESULTS.md.

  python tests/golden/make_coverage.py

The numbers are counted from shapes, not measured; the networks are those of
tests/thirdparty.py, from the packages of the extra `thirdparty`.
"""

import json
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ['TRANSFORMERS_VERBOSITY'] = 'error'

import thirdparty  # noqa: E402

if __name__ == '__main__':
  table = {name: thirdparty.coverage(name) for name in thirdparty.MODELS}
  (HERE / 'coverage.json').write_text(json.dumps(table, indent=1) + '\n')
  print(
    '| network | kind | groups | MACs removed | groups, keep | removed, keep '
    '| groups, rescale | removed, rescale |'
  )
  print('| --- | --- | --- | --- | --- | --- | --- | --- |')
  for name, row in table.items():
    cells = [
      cell
      for way in ('protect', 'keep', 'rescale')
      for cell in (
        str(row[way]['groups']),
        f'{100 * row[way]["removed"]:.1f} %',
      )
    ]
    print(f'| {name} | {row["family"]} | {" | ".join(cells)} |')
