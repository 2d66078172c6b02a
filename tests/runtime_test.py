"""The command that times a network and its half in ONNX Runtime."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.mark.slow
def test_the_command_prints_a_line_of_figures_for_each_pair():
  command = [sys.executable, '-m', 'experiments.runtime', '--side=32']
  options = ['--models=mobilenet_v2', '--batches=1,2', '--rounds=3']
  flags = '--xla_backend_optimization_level=0'
  done = subprocess.run(
    [*command, *options],
    check=True,
    capture_output=True,
    text=True,
    env={**os.environ, 'XLA_FLAGS': flags},
  )
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row['batch'] for row in rows] == [1, 2]
  for row in rows:
    dense, half = row['macs']
    assert 3 < dense / half < 4
    assert row['rounds'] == 3
    assert 0 < row['interval'][0] <= row['speedup'] <= row['interval'][1]


def test_an_unknown_model_is_named():
  command = [sys.executable, '-m', 'experiments.runtime', '--models=abacus']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode
  assert 'No model is called abacus; there are resnet50' in done.stderr
