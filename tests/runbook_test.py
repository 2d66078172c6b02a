"""The run book: what a record holds, and what a damaged file leaves."""

import json

import jax
import pytest

from experiments import runbook
from experiments.settings import BadInputError


@pytest.fixture
def book(tmp_path):
  return runbook.Book(tmp_path / 'deep' / 'runs.jsonl', 'experiments.toy')


def add(book, arm='all', seed=0):
  return book.add(
    {'arm': arm, 'seed': seed},
    seed=seed,
    accuracy=97.5,
    counts={'parameters': 12},
    cpu_seconds=30.0,
    details={'error': 0.0},
  )


def test_a_record_says_what_ran_where_and_what_came_out(book):
  assert book.read() == []
  assert book.find({'arm': 'all'}) is None
  record = add(book)
  assert list(record) == [
    'command', 'settings', 'seed', 'accuracy', 'counts', 'details',
    'cpu_seconds', 'versions', 'device', 'commit',
  ]  # fmt: skip
  assert json.loads(book.path.read_text()) == record
  assert record['command'] == 'experiments.toy'
  assert record['versions']['jax'] == jax.__version__
  assert record['device']['platform'] == jax.default_backend()
  assert runbook.minutes([record, record]) == '1.0 CPU-minutes'
  assert record['commit'] is None or len(record['commit']) >= 40


def test_a_run_is_found_by_what_it_was_asked_for(book):
  rows = [add(book), add(book, seed=1), add(book, arm='units')]
  assert book.find({'arm': 'all', 'seed': 1}) == rows[1]
  assert book.find({'arm': 'all', 'rate': 1}) is None
  assert runbook.matching(book.read(), {'seed': 0}) == [rows[0], rows[2]]


def test_a_torn_last_line_is_cut_back(book):
  first = add(book)
  whole = book.path.read_bytes()
  book.path.write_bytes(whole + whole[: len(whole) // 2])
  assert book.read() == [first]
  second = add(book, seed=1)
  assert book.read() == [first, second]


def test_a_damaged_middle_line_is_named(book):
  for seed in range(3):
    add(book, seed=seed)
  lines = book.path.read_text().splitlines(keepends=True)
  book.path.write_text(lines[0] + lines[1][:30] + '\n' + lines[2])
  with pytest.raises(
    BadInputError, match=r'Line 2 of .*runs\.jsonl is no JSON'
  ):
    book.read()


def test_a_book_of_another_kind_is_refused(book):
  add(book)
  other = runbook.Book(book.path, 'experiments.other')
  with pytest.raises(
    BadInputError, match=r'Line 1 .* no run of experiments\.ot'
  ):
    other.read()
