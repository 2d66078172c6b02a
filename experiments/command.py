"""The command line of an experiment: its own flags, errors of one line.

Each experiment has a ``FlagValues`` of its own, so that several can be imported
side by side.
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from experiments import flags, workdir
from jaxprune import data, extras


def parse(
  values: absl_flags.FlagValues,
  argv: Sequence[str],
  presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
  """Returns the values of flags by name.

  Args:
    values: the flags; with presets, ``preset`` is one of them.
    argv: without the name of the program.
    presets: name -> flag -> its value where none is given.

  Raises:
    BadInputError: if a flag is unknown or its value is of the wrong kind.
  """
  values.unparse_flags()
  for name in values:
    values[name].unparse()
  try:
    rest = values(['', *argv])[1:]
  except absl_flags.Error as error:
    line = ' '.join(str(error).split())
    raise flags.BadInputError(f'{line}. See --help.') from None
  if rest:
    raise flags.BadInputError(f'{rest[0]!r} is no flag; write --name=value.')
  given: dict[str, Any] = {name: values[name].value for name in values}
  if presets is not None:
    for name, value in presets[given.pop('preset')].items():
      if not values[name].present:
        given[name] = value
  return given


def helped(
  values: absl_flags.FlagValues, argv: Sequence[str], doc: Any
) -> bool:
  """Prints the help where it is asked for; returns whether it was.

  Args:
    values: the flags.
    argv: without the name of the program.
    doc: what the help begins with.
  """
  if not any(arg.lstrip('-') in ('help', 'h') for arg in argv):
    return False
  print(doc)
  print(values.get_help())
  return True


def check(given: Mapping[str, Any], holds: Mapping[str, bool]) -> None:
  """Raises BadInputError for the first flag whose value does not hold.

  Args:
    given: flag -> its value.
    holds: flag -> whether the value is in range.
  """
  for name, true in holds.items():
    if not true:
      raise flags.BadInputError(f'--{name} is out of range: {given[name]}.')


def check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
  """Raises BadInputError unless a flag names some of what is known."""
  if not names or not {*names} <= {*known}:
    raise flags.BadInputError(
      f'--{flag} must be of {",".join(known)}, got {",".join(names)}.'
    )


def folder_of(given: Mapping[str, Any], *words: str) -> str:
  """Returns the run folder of flags where none is named: one for each choice.

  Args:
    given: flag -> its value, of those that decide the result.
    *words: what its name begins with.
  """
  text = json.dumps(given, sort_keys=True)
  tag = hashlib.sha256(text.encode()).hexdigest()[:8]
  return f'runs/{"-".join(words)}-{tag}'.replace(':', '-')


def job(
  main: Callable[[Sequence[str]], tuple[pathlib.Path | None, str]],
  values: absl_flags.FlagValues,
  argv: Sequence[str],
  doc: Any,
) -> int:
  """Runs a job that keeps what it finds; returns the exit code.

  Flags or data that are not right, and packages that are missing, end it with
  one line and code 2.

  Args:
    main: argv -> (the run folder, its table, kept there as ``results.md``), or
      (None, what is printed alone).
    values: the flags.
    argv: without the name of the program.
    doc: what the help begins with.
  """
  if helped(values, argv, doc):
    return 0
  try:
    folder, text = main(argv)
  except (
    flags.BadInputError,
    data.DataError,
    extras.MissingExtraError,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(text)
  if folder is not None:
    workdir.write(folder / 'results.md', text + '\n')
    print(f'\nThe run folder is {folder}.')
  return 0


def run(
  main: Callable[[], Any], values: absl_flags.FlagValues, doc: Any
) -> None:
  """Parses the flags and calls main; prints the help where it is asked for.

  Args:
    main: what reads the flags; BadInputError and MissingExtraError end it with
      one line.
    values: the flags.
    doc: what the help begins with.
  """
  argv = sys.argv[1:]
  if helped(values, argv, doc):
    return
  try:
    parse(values, argv)
    main()
  except (flags.BadInputError, extras.MissingExtraError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
