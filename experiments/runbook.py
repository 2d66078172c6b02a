"""The run book: one line of JSON for each finished run, and its reader.

A record says what was run, on what, and what came out:

  {"command": "experiments.gates",
   "settings": {"task": "lenet", "arm": "all", "trial": null, ...},
   "seed": 0,
   "accuracy": 97.1,
   "counts": {"parameters": 26610},
   "details": {"error": 2e-07},
   "cpu_seconds": 41.3,
   "versions": {"python": "3.11.9", "jax": "0.10.2", ...},
   "device": {"platform": "cpu", ...},
   "commit": "0123abc..."}

A line that a kill cut short is dropped when the next run is added; a line that
is damaged in the middle of the book is named, with its number.
"""

import dataclasses
import functools
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import workdir
from experiments.settings import BadInputError
from jaxprune import report

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Book:
  """A file of runs.

  Attributes:
    path: of the file; it need not be there.
    command: the module that runs, such as 'experiments.gates'.
  """

  path: pathlib.Path
  command: str

  def read(self) -> list[dict[str, Any]]:
    """Returns every record, but a last one that a kill cut short.

    Raises:
      BadInputError: if a line is damaged or is no record of this command.
    """
    if not self.path.exists():
      return []
    try:
      records = report.read_metrics(self.path)
    except ValueError as error:
      raise BadInputError(f'{error} Move that file away.') from None
    for number, record in enumerate(records, 1):
      if record.get('command') != self.command:
        raise BadInputError(
          f'Line {number} of {self.path} is no run of {self.command}. Move '
          f'that file away.'
        )
    return records

  def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the first record with these settings, if there is one."""
    return next(iter(matching(self.read(), settings)), None)

  def add(
    self,
    settings: Mapping[str, Any],
    *,
    seed: int | Sequence[int],
    accuracy: float | Sequence[float],
    counts: Mapping[str, Any],
    cpu_seconds: float,
    details: Mapping[str, Any],
  ) -> dict[str, Any]:
    """Appends a finished run; returns its record as it will be read.

    Args:
      settings: everything that decides the figures, and finds them again.
      seed: of the run; several for an ensemble.
      accuracy: in per cent; several for an ensemble.
      counts: of parameters, zeros, multiply-adds and the like.
      cpu_seconds: that it took.
      details: what else the command writes down.
    """
    self.path.parent.mkdir(parents=True, exist_ok=True)
    record = {
      'command': self.command,
      'settings': dict(settings),
      'seed': seed,
      'accuracy': accuracy,
      'counts': dict(counts),
      'details': dict(details),
      'cpu_seconds': cpu_seconds,
      'versions': workdir.versions(),
      'device': workdir.device(),
      'commit': commit(),
    }
    report.append_metrics(self.path, record)
    return self.read()[-1]


def matching(
  records: Sequence[Record], settings: Mapping[str, Any]
) -> list[Any]:
  """Returns the records that have these settings, among others."""
  agrees = lambda of: all(k in of and of[k] == v for k, v in settings.items())
  return [record for record in records if agrees(record['settings'])]


def minutes(records: Sequence[Record]) -> str:
  """Returns what records cost, such as '2.5 CPU-minutes'."""
  return f'{sum(r["cpu_seconds"] for r in records) / 60:.1f} CPU-minutes'


@functools.cache
def commit() -> str | None:
  """Returns the commit of this code, '-dirty' behind it; None for no git."""
  words = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
  try:
    done = subprocess.run(
      [*words, '--exclude=*'],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
    )
  except OSError:
    return None
  return done.stdout.strip() or None
