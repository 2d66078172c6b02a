"""PDP against its baselines: the same loop, epochs, batches and trials for all.

  python -m experiments.pdp --task=mnist --data_dir=DIR
  python -m experiments.pdp --task=mnist --table

One run in four settings tunes each method on a validation split, at one
sparsity and a seed of its own; the best setting then runs on every seed and at
every sparsity, and its accuracy of the last epoch, under hard masks, is that
of the test set. Runs are appended to a file as they end, one of its own for
each ``--epochs``: the same command goes on where it was stopped, and
``--table`` prints what is there.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import command, evidence
from experiments.flags import BadInputError
from experiments.pdp import phases
from experiments.pdp.contests import TASKS, Contest

_F = flags.FlagValues()
_TASK = flags.DEFINE_string('task', 'mnist', 'What to learn.', flag_values=_F)
_METHODS = flags.DEFINE_list(
  'methods', [], 'Only these; all without it.', flag_values=_F
)
_TARGETS = flags.DEFINE_list(
  'targets', [], 'Only these sparsities.', flag_values=_F
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, 'Runs of each; its own number.', flag_values=_F
)
_EPOCHS = flags.DEFINE_integer(
  'epochs', None, 'Epochs; its own number.', flag_values=_F
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'See experiments.prune.', flag_values=_F
)
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/pdp', 'Where runs are kept.', flag_values=_F
)
_TABLE = flags.DEFINE_bool(
  'table', False, 'Print the results; run nothing.', flag_values=_F
)

TUNING_SEED = 100


def sparsity_of(target: str) -> float:
  """Returns the fraction of zeros that a target asks for.

  Examples:
    >>> sparsity_of('0.9'), sparsity_of('1:4')
    (0.9, 0.75)
  """
  if ':' in target:
    n, m = map(int, target.split(':'))
    return 1 - n / m
  return float(target)


class Book:
  """The runs of a file, by what they are."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    lines = path.read_text().splitlines() if path.exists() else []
    self.rows = [json.loads(line) for line in lines]

  def find(self, **what: Any) -> list[dict[str, Any]]:
    """Returns the runs with these values."""
    agrees = lambda row: all(row[k] == v for k, v in what.items())
    return [row for row in self.rows if agrees(row)]

  def add(self, **row: Any) -> None:
    """Appends a run."""
    self.rows.append(row)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')


def compete(contest: Contest, book: Book, names: Sequence[str]) -> None:
  """Runs what the book does not hold yet."""
  problem = contest.problem
  made = functools.lru_cache(
    lambda target, name: phases.runner(problem, contest.methods(target)[name])
  )

  def run(name, target, seed, trial, hyper, split):
    what = {'method': name, 'target': target, 'seed': seed, 'trial': trial}
    found = book.find(**what)
    if not found:
      target_of = target if ':' in target else contest.tune
      out = made(target_of, name)(seed, hyper, sparsity_of(target), split)
      figures = {
        'accuracy': out.accuracy,
        'zeros': out.zeros,
        'seconds': out.seconds,
      }
      figures |= contest.report(out)
      book.add(**what, split=split, hyper=dict(hyper), **figures)
      print(json.dumps(book.rows[-1]), flush=True)
      found = book.rows[-1:]
    return found[0]

  for target in contest.targets:
    for name, method in contest.methods(target).items():
      if names and name not in names:
        continue
      if method.harden is None and target != contest.targets[0]:
        continue  # A dense network has no target.
      tune = target if ':' in target else contest.tune
      best = method.grid[0]
      if len(method.grid) > 1:
        trials = [
          run(name, tune, TUNING_SEED, i, hyper, 'validation')
          for i, hyper in enumerate(method.grid)
        ]
        best = max(trials, key=lambda row: row['accuracy'])['hyper']
      for seed in range(contest.seeds):
        run(name, target, seed, None, best, 'test')


def summarise(book: Book) -> str:
  """Returns the tables of a book, one for each target, and its sources."""
  finals = book.find(trial=None)
  parts = []
  for target in dict.fromkeys(row['target'] for row in finals):
    by = {
      name: {
        row['seed']: row['accuracy']
        for row in finals
        if row['target'] == target and row['method'] == name
      }
      for name in dict.fromkeys(row['method'] for row in finals)
    }
    rows = []
    for name, found in by.items():
      if not found:
        continue
      both = sorted(by.get('PDP', {}).keys() & found.keys())
      against = (
        ''
        if name == 'PDP' or len(both) < 2
        else evidence.paired(
          [by['PDP'][s] for s in both], [found[s] for s in both]
        )
      )
      chosen = book.find(method=name, target=target, trial=None)[0]['hyper']
      setting = ', '.join(f'{k} {v:g}' for k, v in chosen.items())
      accuracy = evidence.summary(list(found.values()))
      rows.append([name, setting, len(found), accuracy, against])
    header = ['method', 'setting', 'seeds', 'accuracy, %', 'PDP minus it']
    parts.append(f'{target}\n\n{evidence.table(header, rows)}')
  minutes = sum(row['seconds'] for row in book.rows) / 60
  lines = dict.fromkeys(
    _line(row['sources']) for row in book.rows if 'sources' in row
  )
  return '\n\n'.join([*parts, *lines, f'{minutes:.1f} CPU-minutes'])


def _line(found: Mapping[str, Any]) -> str:
  """Returns what ``contests.sources`` found, in words."""
  licences = ', '.join(f'{k} {v}' for k, v in found['licences'].items())
  majority, words = (100 * found[k] for k in ('majority', 'bag of words'))
  return (
    f'Sentences of {found["versions"]}; licences: {licences}.\n'
    f'Without a network, %: majority {majority:.1f}, bag of words {words:.1f}.'
  )


def narrowed(contest: Contest) -> Contest:
  """Returns a contest with the targets and the seeds of the flags.

  Args:
    contest: with its own.

  Raises:
    BadInputError: if it has no such targets or methods.
  """
  first = contest.targets[0]
  for target in _TARGETS.value:
    if ':' in first:
      found = re.fullmatch(r'(\d+):(\d+)', target)
      fits = found and 0 < int(found[1]) < int(found[2])
    else:
      fits = re.fullmatch(r'0\.\d*[1-9]\d*', target)
    if not fits:
      raise BadInputError(
        f'--targets must be like {",".join(contest.targets)}, got {target!r}.'
      )
  known = contest.methods(first)
  unknown = [name for name in _METHODS.value if name not in known]
  if unknown:
    raise BadInputError(
      f'--methods must be of {"; ".join(known)}, got {"; ".join(unknown)}.'
    )
  seeds = contest.seeds if _SEEDS.value is None else _SEEDS.value
  targets = tuple(_TARGETS.value) or contest.targets
  return contest._replace(seeds=seeds, targets=targets)


def main() -> None:
  """Runs one contest, or prints it."""
  if _TASK.value not in TASKS:
    raise BadInputError(
      f'No task is called {_TASK.value!r}; there are {", ".join(TASKS)}.'
    )
  for flag in (_SEEDS, _EPOCHS):
    if flag.value is not None and flag.value < 1:
      raise BadInputError(
        f'--{flag.name} must be at least 1, got {flag.value}.'
      )
  # Runs of another length are not those that are there.
  length = '' if _EPOCHS.value is None else f'-{_EPOCHS.value}-epochs'
  book = Book(pathlib.Path(_WORKDIR.value, f'{_TASK.value}{length}.jsonl'))
  if not _TABLE.value:
    contest = TASKS[_TASK.value](_DATA_DIR.value, _EPOCHS.value)
    compete(narrowed(contest), book, _METHODS.value)
  print(summarise(book))


if __name__ == '__main__':
  command.run(main, _F, __doc__)
