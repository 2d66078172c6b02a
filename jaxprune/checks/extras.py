"""Packages that only some functions need, and the extra that brings each.

``import jaxprune`` and everything from ``trace`` to ``check`` need the core
packages alone. A function that needs another one asks for it here when it is
called, so that one that is missing is named with the command that installs it.
"""

import importlib
import types
from collections.abc import Mapping
from typing import NamedTuple


class Extra(NamedTuple):
  """What an extra is for, and the modules that it brings."""

  purpose: str  # The first words of the error: who needs them.
  modules: tuple[str, ...]


# Named as in pyproject.toml.
EXTRAS: Mapping[str, Extra] = {
  'data': Extra(
    'Data sets need',
    (
      'array_record',
      'grain',
      'importlib_resources',
      'PIL',
      'tensorflow_datasets',
    ),
  ),
  'digits': Extra("The set 'digits' needs", ('sklearn',)),
  'onnx': Extra('ONNX files need', ('onnx', 'onnxruntime')),
  'plots': Extra('Plots need', ('matplotlib',)),
  'stablehlo': Extra('StableHLO files need', ('flatbuffers',)),
  'text': Extra('WordPiece tokens need', ('tokenizers',)),
}
_EXTRA_OF = {
  module: name for name, extra in EXTRAS.items() for module in extra.modules
}


class MissingExtraError(ImportError):
  """A package that is not installed; the message, one line, installs it."""


def require(name: str) -> types.ModuleType:
  """Returns a module of an extra, imported.

  Args:
    name: dotted, such as ``'matplotlib.figure'``.

  Raises:
    MissingExtraError: if it, or a package that it imports, is not installed.
    ImportError: as the module itself raises it, if it is there and broken.
    KeyError: if no extra brings it, which is an error of the caller.
  """
  package = name.partition('.')[0]
  extra = _EXTRA_OF[package]
  try:
    importlib.import_module(package)  # Which the next line may pass over.
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    missing = (error.name or name).partition('.')[0]
    raise MissingExtraError(
      f'{EXTRAS[extra].purpose} {missing}, which is not installed: '
      f"pip install 'jaxprune[{extra}]'."
    ) from error


def tfds() -> types.ModuleType:
  """Returns TensorFlow Datasets, and sees to what it reads records by.

  It does not declare those packages, and would call a record damaged that it
  cannot read without them.

  Raises:
    MissingExtraError: if one of them is not installed.
  """
  for name in ('array_record.python', 'importlib_resources', 'PIL'):
    require(name)
  return require('tensorflow_datasets')
