"""The settings of a job: one dataclass, and the flags that are made from it.

A field of the dataclass is the only place where a setting is written:

  @dataclasses.dataclass(frozen=True)
  class Config:
    model: str = setting('mlp', 'The network.', choices=('mlp', 'lenet5'))
    macs: float = setting(0.4, 'Part that is kept.', fits=in_range('(0, 1]'))
    steps: int = setting(600, 'Of a supernet.', smoke=6)
    preset: str = preset('smoke: every phase, a minute.')

  parse(Config, ['--preset=smoke', '--macs=0.3'])  # mlp, 0.3, 6 steps.

The type of the field decides how a flag is read: str, int, float, bool, or a
tuple of one of these, which is a list with commas. Flag files are those of
absl: ``--flagfile=my.flags``.
"""

import dataclasses
import hashlib
import json
import math
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import flags

Config = TypeVar('Config')


class BadInputError(ValueError):
  """What the user can put right; the message is one line that says how."""


class Range(NamedTuple):
  """Which values a setting may have."""

  fits: Callable[[Any], bool]
  needed: str = ''  # How an error says it, such as 'at least 1'.


class Setting(NamedTuple):
  """What a field knows of its setting beside name, type and default."""

  text: str
  choices: Collection[str]
  fits: Range | None
  smoke: Any
  flag: str | None
  decides: bool


_NOTHING: Any = object()  # Where None is a value.


def setting(
  default: Any,
  text: str,
  *,
  choices: Collection[str] = (),
  fits: Range | None = None,
  smoke: Any = _NOTHING,
  flag: str | None = None,
  decides: bool = True,
) -> Any:
  """Returns the field of a setting.

  Args:
    default: its value where no flag gives one; None for one that follows from
      other settings, see :func:`parse`.
    text: the help.
    choices: names that it may have; of a tuple, that its items may have.
    fits: the values that it may have; None is not asked.
    smoke: the default under ``--preset=smoke``, where that is another one.
    flag: its flag, if that has not the name of the field.
    decides: whether the figures of a run depend on it. Where they do, a run
      folder holds one value of it alone.
  """
  of_field = Setting(text, choices, fits, smoke, flag, decides)
  return dataclasses.field(default=default, metadata={'setting': of_field})


def preset(text: str) -> Any:
  """Returns the field of ``--preset``, which other settings have values for."""
  return setting('full', text, choices=('full', 'smoke'), decides=False)


def at_least(low: float) -> Range:
  """Returns the range of the finite numbers from ``low`` on."""
  return Range(lambda x: low <= x < math.inf, f'at least {low}')


def in_range(text: str) -> Range:
  """Returns the range of an interval.

  Args:
    text: such as '[0, 1)', which has 0 and has not 1.

  Examples:
    >>> half_open = in_range('[0, 1)')
    >>> half_open.fits(0), half_open.fits(1), half_open.needed
    (True, False, 'in [0, 1)')
  """
  low, high = map(float, text[1:-1].split(','))

  def fits(x):
    above = low <= x if text[0] == '[' else low < x
    return above and (x <= high if text[-1] == ']' else x < high)

  return Range(fits, f'in {text}')


ABOVE_0 = Range(lambda x: 0 < x < math.inf, 'above 0')


def parse(
  kind: type[Config],
  argv: Sequence[str],
  usual: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> Config:
  """Returns the settings that a command line asks for.

  Args:
    kind: a dataclass whose fields are made by :func:`setting`.
    argv: without the name of the program.
    usual: settings -> what those are that are None and follow from others.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  values = make_flags(kind)
  try:
    others = values(['', *argv])[1:]
  except flags.Error as error:
    line = ' '.join(str(error).split()).rstrip('.')
    raise BadInputError(f'{line}. See --help.') from None
  if others:
    raise BadInputError(
      f'{others[0]!r} is no flag; write --name=value. See --help.'
    )
  fields = _settings(kind)
  smoke = 'preset' in fields and values['preset'].value == 'smoke'
  given: dict[str, Any] = {}
  for name, (field, about) in fields.items():
    flag = values[about.flag or name]
    given[name] = _read(field, flag.name, flag.value)
    if smoke and not flag.present and about.smoke is not _NOTHING:
      given[name] = about.smoke
  for name, value in usual(given).items():
    if given[name] is None:
      given[name] = value
  for name, (field, about) in fields.items():
    _check(about.flag or name, given[name], field.default, about)
  return kind(**given)


def make_flags(kind: type) -> flags.FlagValues:
  """Returns the flags of settings, apart from those of any other job."""
  values = flags.FlagValues()
  for name, (field, about) in _settings(kind).items():
    is_tuple, item = _type(field)
    default: Any = field.default
    options: Any = {'flag_values': values}
    name = about.flag or name
    if is_tuple:
      default = list(map(str, default))
      flags.DEFINE_list(name, default, about.text, **options)
    elif about.choices:
      names = list(about.choices)
      flags.DEFINE_enum(name, default, names, about.text, **options)
    else:
      define: Any = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
      }.get(item, flags.DEFINE_string)
      define(name, default, about.text, **options)
  return values


def usage(kind: type) -> str:
  """Returns the help: every flag with its default."""
  lines = []
  for name, (field, about) in _settings(kind).items():
    is_tuple, item = _type(field)
    choices = '|'.join(about.choices)
    form = 'list' if is_tuple else choices or item.__name__
    show = lambda x: ','.join(map(str, x)) if isinstance(x, tuple) else x
    notes = []
    if field.default not in (None, ()):
      notes.append(f'default: {show(field.default)}')
    if about.smoke is not _NOTHING:
      notes.append(f'smoke: {show(about.smoke)}')
    lines.append(f'  --{about.flag or name}=<{form}>')
    text = about.text + (f' ({"; ".join(notes)})' if notes else '')
    lines += textwrap.wrap(
      text, 80, initial_indent='      ', subsequent_indent='      '
    )
  return '\n'.join(lines)


def deciding(config: Any) -> dict[str, Any]:
  """Returns the settings that decide the figures, by their flags.

  The values are as JSON gives them back: tuples are lists.
  """
  found = {
    about.flag or name: getattr(config, name)
    for name, (_, about) in _settings(type(config)).items()
    if about.decides
  }
  return json.loads(json.dumps(found))


def in_folder(config: Config, *words: str) -> Config:
  """Returns settings with a run folder: theirs, or one for these values.

  Args:
    config: settings with a ``workdir``.
    *words: what the name of that folder begins with.
  """
  settings: Any = config
  if settings.workdir is not None:
    return config
  text = json.dumps(deciding(config), sort_keys=True)
  tag = hashlib.sha256(text.encode()).hexdigest()[:8]
  folder = f'runs/{"-".join(words)}-{tag}'.replace(':', '-')
  return dataclasses.replace(settings, workdir=folder)


def by_seed(config: Config) -> list[Config]:
  """Returns the settings of each of ``seeds`` runs, from ``seed`` on."""
  settings: Any = config
  return [
    dataclasses.replace(settings, seed=settings.seed + k)
    for k in range(settings.seeds)
  ]


def _settings(
  kind: type,
) -> dict[str, tuple[dataclasses.Field[Any], Setting]]:
  fields = dataclasses.fields(kind)
  return {field.name: (field, field.metadata['setting']) for field in fields}


def _type(field: dataclasses.Field[Any]) -> tuple[bool, type]:
  """Returns whether a setting is a tuple, and the type of its items or it."""
  kind: Any = field.type
  if isinstance(kind, types.UnionType):  # Such as int | None.
    kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
  if typing.get_origin(kind) is tuple:
    return True, typing.get_args(kind)[0]
  return False, kind if isinstance(kind, type) else str  # Of a Literal.


def _read(field: dataclasses.Field[Any], flag: str, value: Any) -> Any:
  """Returns what a flag has read, as a value of its field."""
  is_tuple, item = _type(field)
  if not is_tuple:
    return value
  try:
    return tuple(map(item, value))
  except ValueError:
    raise BadInputError(
      f'--{flag} must be {item.__name__}s, got {value}.'
    ) from None


def _check(flag: str, value: Any, default: Any, about: Setting) -> None:
  """Raises BadInputError if a setting must not have a value."""
  if isinstance(value, tuple):
    known = {*about.choices} or {*value}
    if value != default and not (value and {*value} <= known):
      raise BadInputError(
        f'--{flag} must be of {",".join(about.choices)}, got '
        f'{",".join(map(str, value))}.'
      )
  if about.fits is None or value is None or about.fits.fits(value):
    return
  if about.fits.needed:
    raise BadInputError(f'--{flag} must be {about.fits.needed}, got {value}.')
  raise BadInputError(f'--{flag} is out of range: {value}.')
