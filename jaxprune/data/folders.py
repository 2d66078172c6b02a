"""Folders of sets that TFDS prepared: what is in them, and what is wrong."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxprune import digits

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class DataError(ValueError):
  """A data set that is unknown, missing or damaged; the message is one line."""


def features(builder: Any) -> tuple[str, str, tuple[str, ...]]:
  """Returns the names of image, label and classes of a set."""
  image, label = builder.info.supervised_keys or ('image', 'label')
  return image, label, classes_of(builder, (image, label))


def classes_of(builder: Any, features: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the labels, the last of the features of a set."""
  missing = [key for key in features if key not in builder.info.features]
  if missing:
    raise DataError(
      f'{builder.name} has no feature {", ".join(map(repr, missing))}, but '
      f'{", ".join(sorted(builder.info.features))}.'
    )
  names = getattr(builder.info.features[features[-1]], 'names', None)
  if not names:
    raise DataError(
      f'{builder.name} is no classification set: its {features[-1]!r} has no '
      f'classes.'
    )
  return tuple(names)


def check_label(target: int, classes: tuple, index: int, where: str) -> None:
  """Raises DataError unless a record has one of the labels of its set."""
  if not 0 <= target < len(classes):
    raise DataError(
      f'Record {index} of {where} has the label {target}, but the set has the '
      f'{len(classes)} labels 0 to {len(classes) - 1}.'
    )


def transformed(
  transform: Transform | None, image: Any, seeds: tuple[int, ...], where: str
) -> Any:
  """Returns an image as its transform makes it.

  Args:
    transform: (image, rng) -> image; None leaves it as it is.
    image: as it was read.
    seeds: of rng; the last is the number of the record.
    where: the set and the split, for the error.

  Raises:
    DataError: if the transform raises; with the number of the record.
  """
  if transform is None:
    return image
  try:
    return transform(image, np.random.default_rng(seeds))
  except Exception as error:  # Whatever the user's function raises.
    raise DataError(
      f'The transform failed at record {seeds[-1]} of {where} with '
      f'{type(error).__name__} ({first_line(error)}).'
    ) from error


def open_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
  """Returns the TFDS builder of a set, read from its newest folder."""
  name, _, version = name.partition(':')
  given = data_dir or os.environ.get('JAXPRUNE_DATA')
  roots = [pathlib.Path(given), pathlib.Path(given, 'tfds')] if given else []
  if given and not roots[0].is_dir():
    raise DataError(
      f'The data folder {given} does not exist. It is a folder of sets that '
      f'TFDS prepared, such as {given}/mnist/3.0.1.'
    )
  folders = [v for root in roots for v in _versions(root / name)]
  if name == 'digits' and not folders:
    folders = [_digits()]
  if not folders:
    known = {f.name for r in roots for f in r.glob('*') if _versions(f)}
    where = f'in {given}' if given else 'without a data folder'
    raise DataError(
      f'There is no data set {name!r} {where}; there are: '
      f'{", ".join(sorted(known | {"digits"}))}. '
      f'Another folder is given by data_dir or by JAXPRUNE_DATA.'
    )
  if version and version not in [f.name for f in folders]:
    raise DataError(
      f'{folders[0].parent} has no version {version} of {name}, only '
      f'{", ".join(f.name for f in folders)}.'
    )
  folder = next(f for f in folders if version in ('', f.name))
  import tensorflow_datasets as tfds  # Slow to import: only when it is needed.

  try:
    builder = tfds.builder_from_directory(folder)
    str(builder.info.features)
  except Exception as error:  # Whatever its JSON parser raises.
    raise DataError(
      f'{folder} is damaged ({first_line(error)}). Prepare that folder again.'
    ) from error
  return builder


def _digits() -> pathlib.Path:
  """Returns the folder of the embedded digits in the user's cache."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  root = pathlib.Path(cache, 'jaxprune')
  try:
    return digits.prepare(root)
  except ImportError as error:
    raise DataError(first_line(error)) from error
  except OSError as error:
    raise DataError(
      f'The digits cannot be prepared in {root} ({first_line(error)}). Name a '
      f'folder that can be written by the variable XDG_CACHE_HOME.'
    ) from error


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the prepared versions in the folder of a set, newest first."""
  number = lambda f: tuple(map(int, f.name.split('.')))
  version = re.compile(r'\d+\.\d+\.\d+')
  found = [f for f in folder.glob('*.*.*') if version.fullmatch(f.name)]
  return sorted(found, key=number, reverse=True)


def open_source(builder: Any, split: str) -> Any:
  """Returns the random access source of a split, its files checked."""
  try:
    part = builder.info.splits[split]
    if part.num_examples < 1:
      raise ValueError('it is empty')
  except Exception as error:
    raise DataError(
      f'{builder.name} has no split {split!r} ({first_line(error)}); it has '
      f'{", ".join(builder.info.splits)}, and parts such as '
      f"'{next(iter(builder.info.splits), 'train')}[:100]'."
    ) from error
  missing = [
    i.filename for i in part.file_instructions if not os.path.exists(i.filename)
  ]
  if missing:
    raise DataError(f'{missing[0]} is missing. Prepare that folder again.')
  try:
    return builder.as_data_source(split=split)
  except Exception as error:
    raise DataError(
      f'{builder.name} {split!r} cannot be read ({first_line(error)}). It must '
      f"be prepared with file_format='array_record'."
    ) from error


def check_counts(builder: Any, split: str) -> None:
  """Raises DataError unless the files of a split are as long as they must."""
  from array_record.python import array_record_module  # type: ignore

  for part in builder.info.splits[split].file_instructions:
    reader = array_record_module.ArrayRecordReader(str(part.filename))
    count = reader.num_records()
    reader.close()
    if count != part.examples_in_shard:
      raise DataError(
        f'{part.filename} has {count} records, but by dataset_info.json it '
        f'must have {part.examples_in_shard}. Prepare that folder again.'
      )


def read(source: Any, builder: Any, split: str, indices: list[int]) -> list:
  """Returns decoded records of a source; names the one that is damaged."""
  empty = lambda example: all(value is None for value in example.values())
  try:
    examples = source.__getitems__(indices)
  except Exception:  # Whatever is raised by the reader and by the decoders.
    examples = []
  if examples and not any(map(empty, examples)):
    return examples
  for i in indices:
    try:
      if empty(source[i]):  # A file may be cut so that the reader sees no harm.
        raise ValueError('it is empty')
    except Exception as error:
      file, record = _place(builder, split, i)
      raise DataError(
        f'Record {i} of {builder.name} {split!r}, record {record} of '
        f'{file}, is damaged ({first_line(error)}). Prepare that folder again.'
      ) from error
  return source.__getitems__(indices)


def _place(builder: Any, split: str, index: int) -> tuple[str, int]:
  """Returns the file of a split's record and its number in the file."""
  for part in builder.info.splits[split].file_instructions:
    if index < part.take:
      return part.filename, part.skip + index
    index -= part.take
  raise IndexError(f'{split!r} has no record {index} more.')


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's text, or its kind."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__).rstrip('.')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Holds back what TFDS logs that is no error."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
