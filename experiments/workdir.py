"""The run folder: whose it is, and what a run leaves in it."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax

from experiments import settings
from experiments.settings import BadInputError

_PACKAGES = ('jaxprune', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint',
             'tensorflow-datasets', 'numpy')  # fmt: skip


class Config(Protocol):
  """A frozen dataclass with everything that a run was asked for."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  @property
  def seed(self) -> int:
    """Of the run, or the first of them."""
    ...

  @property
  def workdir(self) -> str:
    """The run folder."""
    ...


def check(config: Config) -> None:
  """Raises BadInputError if the run folder holds another run or other things.

  Nothing is changed.
  """
  folder = pathlib.Path(config.workdir)
  file = folder / 'config.json'
  other = 'Name another folder by --workdir.'
  if not file.exists():
    if folder.exists() and not folder.is_dir():
      raise BadInputError(f'{folder} is no folder. {other}')
    if folder.exists() and _holds_something(folder):
      raise BadInputError(f'{folder} is not empty and holds no run. {other}')
    return
  try:
    found = json.loads(file.read_text())['flags']
  except (ValueError, KeyError, TypeError, OSError):
    raise BadInputError(f'{file} is damaged. {other}') from None
  asked = settings.deciding(config)
  differ = [n for n in {**found, **asked} if found.get(n) != asked.get(n)]
  if differ:
    text = ', '.join(
      f'--{name}={found.get(name)} (now {asked.get(name)})' for name in differ
    )
    raise BadInputError(
      f'{folder} was written by another configuration: {text}. {other}'
    )


def claim(config: Config) -> pathlib.Path:
  """Returns the run folder, made if need be, with ``config.json`` in it.

  Raises:
    BadInputError: as :func:`check`, or if the folder cannot be written.
  """
  check(config)
  folder = pathlib.Path(config.workdir)
  file = folder / 'config.json'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
      write(file, json.dumps(describe(config), indent=2) + '\n')
  except OSError as error:
    raise BadInputError(
      f'{folder} cannot be written ({error}). Name another one by --workdir.'
    ) from None
  return folder


def describe(config: Config) -> dict[str, Any]:
  """Returns flags, seed, versions and device as plain data."""
  return {
    'flags': settings.deciding(config),
    'seed': config.seed,
    'versions': versions(),
    'device': device(),
  }


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that decide figures."""
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def device() -> dict[str, Any]:
  """Returns what a run is computed on."""
  first = jax.devices()[0]
  return {
    'platform': first.platform,
    'kind': first.device_kind,
    'count': jax.device_count(),
    'cores': os.cpu_count(),
  }


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file that appears whole or not at all."""
  part = path.with_name(f'{path.name}.tmp')
  part.write_text(text)
  os.replace(part, path)


def complete(
  folder: pathlib.Path,
  names: Sequence[str],
  make: Callable[[str], Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Returns the figures in a folder, those that are missing made first.

  Args:
    folder: made if need be.
    names: of the figures; each is kept in ``name.json``.
    make: name -> figures as plain data.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files = {name: folder / f'{name}.json' for name in names}
  for name, file in files.items():
    if not file.exists():
      write(file, json.dumps(make(name), indent=1) + '\n')
  return {name: json.loads(file.read_text()) for name, file in files.items()}


def _holds_something(folder: pathlib.Path) -> bool:
  """Whether a folder holds more than what a killed start of ours left."""
  return any(file.name != 'config.json.tmp' for file in folder.iterdir())
