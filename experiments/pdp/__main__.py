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

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import command, evidence, runbook, settings
from experiments.pdp import phases
from experiments.pdp.contests import TASKS, Contest
from experiments.settings import BadInputError, at_least, setting


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for; what is None follows from the task."""

  task: str = setting('mnist', 'What to learn.')
  methods: tuple[str, ...] = setting((), 'Only these; all without it.')
  targets: tuple[str, ...] = setting((), 'Only these sparsities.')
  seeds: int | None = setting(
    None, 'Runs of each; its own number.', fits=at_least(1)
  )
  epochs: int | None = setting(
    None, 'Epochs; its own number.', fits=at_least(1)
  )
  data_dir: str | None = setting(None, 'See experiments.prune.')
  workdir: str = setting('runs/pdp', 'Where runs are kept.', decides=False)
  table: bool = setting(False, 'Print the results; run nothing.', decides=False)


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


def compete(contest: Contest, book: runbook.Book, names: Sequence[str]) -> None:
  """Runs what the book does not hold yet."""
  problem = contest.problem
  made = functools.lru_cache(
    lambda target, name: phases.runner(problem, contest.methods(target)[name])
  )

  def run(name, target, seed, trial, hyper, split):
    what = {
      'task': problem.name,
      'epochs': problem.epochs,
      'method': name,
      'target': target,
      'seed': seed,
      'trial': trial,
    }
    if (ended := book.find(what)) is not None:
      return ended
    target_of = target if ':' in target else contest.tune
    out = made(target_of, name)(seed, hyper, sparsity_of(target), split)
    record = book.add(
      {**what, 'split': split, 'hyper': dict(hyper)},
      seed=seed,
      accuracy=out.accuracy,
      counts={'zeros': out.zeros},
      cpu_seconds=out.seconds,
      details=contest.report(out),
    )
    print(json.dumps(record), flush=True)
    return record

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
        best = max(trials, key=lambda row: row['accuracy'])
        best = best['settings']['hyper']
      for seed in range(contest.seeds):
        run(name, target, seed, None, best, 'test')


def summarise(rows: Sequence[runbook.Record]) -> str:
  """Returns the tables of runs, one for each target, and their sources."""
  finals = runbook.matching(rows, {'trial': None})
  parts = []
  of = lambda key: dict.fromkeys(row['settings'][key] for row in finals)
  for target in of('target'):
    runs = {
      name: runbook.matching(finals, {'target': target, 'method': name})
      for name in of('method')
    }
    by = {
      name: {row['seed']: row['accuracy'] for row in some}
      for name, some in runs.items()
    }
    lines = []
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
      chosen = runs[name][0]['settings']['hyper']
      setting = ', '.join(f'{k} {v:g}' for k, v in chosen.items())
      accuracy = evidence.summary(list(found.values()))
      lines.append([name, setting, len(found), accuracy, against])
    header = ['method', 'setting', 'seeds', 'accuracy, %', 'PDP minus it']
    parts.append(f'{target}\n\n{evidence.table(header, lines)}')
  facts = dict.fromkeys(
    _line(row['details']['sources'])
    for row in rows
    if 'sources' in row['details']
  )
  return '\n\n'.join([*parts, *facts, runbook.minutes(rows)])


def _line(found: Mapping[str, Any]) -> str:
  """Returns what ``contests.sources`` found, in words."""
  licences = ', '.join(f'{k} {v}' for k, v in found['licences'].items())
  majority, words = (100 * found[k] for k in ('majority', 'bag of words'))
  return (
    f'Sentences of {found["versions"]}; licences: {licences}.\n'
    f'Without a network, %: majority {majority:.1f}, bag of words {words:.1f}.'
  )


def narrowed(contest: Contest, config: Config) -> Contest:
  """Returns a contest with the targets and the seeds that are asked for.

  Args:
    contest: with its own.
    config: what is asked for.

  Raises:
    BadInputError: if it has no such targets or methods.
  """
  first = contest.targets[0]
  for target in config.targets:
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
  unknown = [name for name in config.methods if name not in known]
  if unknown:
    raise BadInputError(
      f'--methods must be of {"; ".join(known)}, got {"; ".join(unknown)}.'
    )
  seeds = contest.seeds if config.seeds is None else config.seeds
  return contest._replace(
    seeds=seeds, targets=config.targets or contest.targets
  )


def run(argv: Sequence[str]) -> tuple[None, str]:
  """Runs one contest, or reads it; returns (None, its tables)."""
  config = settings.parse(Config, argv)
  if config.task not in TASKS:
    raise BadInputError(
      f'No task is called {config.task!r}; there are {", ".join(TASKS)}.'
    )
  # Runs of another length are not those that are there.
  length = '' if config.epochs is None else f'-{config.epochs}-epochs'
  path = pathlib.Path(config.workdir, f'{config.task}{length}.jsonl')
  book = runbook.Book(path, 'experiments.pdp')
  if not config.table:
    contest = TASKS[config.task](config.data_dir, config.epochs)
    compete(narrowed(contest, config), book, config.methods)
  return None, summarise(book.read())


def main(argv: Sequence[str]) -> int:
  """Runs or prints one contest from the command line; returns the exit code."""
  return command.job(run, Config, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
