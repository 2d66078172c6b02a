"""The command line of a job: its help, its one line of error, its table."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import settings, workdir
from jaxprune import data
from jaxprune.checks import extras


def job(
  main: Callable[[Sequence[str]], tuple[pathlib.Path | None, str]],
  kind: type,
  argv: Sequence[str],
  doc: Any,
) -> int:
  """Runs a job; returns the exit code.

  Settings or data that are not right, and packages that are missing, end it
  with one line and code 2.

  Args:
    main: argv -> (the run folder, its table, kept there as ``results.md``), or
      (None, what is printed alone).
    kind: the dataclass of its settings.
    argv: without the name of the program.
    doc: what the help begins with.
  """
  if wants_help(argv):
    print(f'{doc}\n{settings.usage(kind)}')
    return 0
  try:
    folder, text = main(argv)
  except (
    settings.BadInputError,
    data.DataError,
    extras.MissingExtraError,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if text:
    print(text)
  if folder is not None:
    workdir.write(folder / 'results.md', text + '\n')
    print(f'\nThe run folder is {folder}.')
  return 0


def wants_help(argv: Sequence[str]) -> bool:
  """Returns whether arguments ask for help."""
  return any(arg.lstrip('-') in ('help', 'helpfull', 'h') for arg in argv)
