import os
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxprune.data import digits


def test_split_is_fixed_balanced_and_a_partition():
  train, test = digits.split()
  assert (len(train), len(test)) == (1437, 360)
  together = np.concatenate([train, test])
  np.testing.assert_array_equal(np.sort(together), np.arange(1797))
  counts = np.bincount(digits._digits().target[test])
  np.testing.assert_array_equal(counts, np.full(10, 36))
  assert train[:4].tolist() == [1093, 522, 620, 1369]


def test_prepare_is_quiet_and_leaves_one_folder(tmp_path, capfd):
  folder = digits.prepare(tmp_path)
  assert folder == tmp_path / 'digits' / '1.0.0'
  assert capfd.readouterr() == ('', '')
  assert [f.name for f in tmp_path.iterdir()] == ['digits']
  assert sorted(f.suffix for f in folder.iterdir() if f.suffix == '.json')
  stamp = folder.stat().st_mtime_ns
  assert digits.prepare(tmp_path) == folder
  assert folder.stat().st_mtime_ns == stamp


def test_prepare_accepts_that_another_process_was_first(tmp_path, monkeypatch):
  rename = os.rename

  def late(source, target):
    if target == tmp_path / 'digits' / '1.0.0':
      target.mkdir()
      (target / 'whole').touch()
    rename(source, target)

  monkeypatch.setattr(os, 'rename', late)
  folder = digits.prepare(tmp_path)
  assert [f.name for f in folder.iterdir()] == ['whole']
  assert [f.name for f in tmp_path.iterdir()] == ['digits']


def test_prepare_says_why_it_cannot_write(tmp_path, monkeypatch):
  rename = os.rename

  def refuse(source, target):
    if target == tmp_path / 'digits' / '1.0.0':
      raise PermissionError(13, 'Permission denied', str(target))
    rename(source, target)

  monkeypatch.setattr(os, 'rename', refuse)
  with pytest.raises(PermissionError, match=r"denied: '.*/digits/1\.0\.0'"):
    digits.prepare(tmp_path)
  assert [f.name for f in tmp_path.iterdir()] == ['digits']


def test_prepare_clears_what_a_killed_process_left(tmp_path):
  old, young = (
    tmp_path / f'.jaxprune-digits-{age}' for age in ('old', 'young')
  )
  old.mkdir()
  young.mkdir()
  os.utime(old, (time.time() - 7200,) * 2)
  digits.prepare(tmp_path)
  assert not old.exists()
  assert young.exists()


def test_scikit_learn_missing(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  digits._digits.cache_clear()
  with pytest.raises(ImportError, match=r"pip install 'jaxprune\[digits"):
    digits.prepare(tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_prepare_by_many_processes_and_a_killed_one(tmp_path):
  code = (
    'import sys; from jaxprune.data import digits; digits.prepare(sys.argv[1])'
  )
  start = lambda: subprocess.Popen([sys.executable, '-c', code, str(tmp_path)])
  killed = start()
  while not list(tmp_path.glob('.jaxprune-digits-*/**/*.array_record*')):
    assert killed.poll() is None
    time.sleep(0.002)
  killed.kill()
  killed.wait()
  assert not (tmp_path / 'digits' / '1.0.0').exists()
  others = [start() for _ in range(3)]
  assert [p.wait() for p in others] == [0, 0, 0]
  assert len(list((tmp_path / 'digits').iterdir())) == 1
  assert (
    len(list(tmp_path.glob('.jaxprune-digits-*'))) == 1
  )  # The killed one's, young.
