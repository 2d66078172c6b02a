"""The command line of an experiment: its own flags, errors of one line.

Each experiment has a ``FlagValues`` of its own, so that several can be imported
side by side.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from experiments import flags


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


def run(
  main: Callable[[], Any], values: absl_flags.FlagValues, doc: Any
) -> None:
  """Parses the flags and calls main; prints the help where it is asked for.

  Args:
    main: what reads the flags; BadInputError ends it with one line.
    values: the flags.
    doc: what the help begins with.
  """
  argv = sys.argv[1:]
  if helped(values, argv, doc):
    return
  try:
    parse(values, argv)
    main()
  except flags.BadInputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
