"""Folders of sets that TFDS prepared: what is in them, and what is wrong."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checks import extras
from jaxprune.data import digits

MOST_CLASSES = 2**16  # Of labels without names: larger ones are identities.
Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class DataError(ValueError):
  """A data set that is unknown, missing or damaged; the message is one line."""


class Features(NamedTuple):
  """The features of a set that are read."""

  image: str
  label: str | None  # None if its labels are not read.
  classes: tuple[str, ...] | None  # None if the labels are integers alone.


def features(builder: Any, names: Sequence[str] | None) -> Features:
  """Returns the features of a set that hold image and label.

  Args:
    builder: of the set.
    names: of image and label, or of the image alone; None for those that the
      set itself names, else ``('image', 'label')``.

  Raises:
    DataError: if there is no such feature, or if the label is no integer.
  """
  image, *label = _names(builder, names)
  _check_names(builder, (image, *label))
  if not label:
    return Features(image, None, None)
  feature = builder.info.features[label[0]]
  classes = getattr(feature, 'names', None)
  if classes:
    return Features(image, label[0], tuple(classes))
  dtype = np.dtype(getattr(feature, 'np_dtype', None) or object)
  if getattr(feature, 'shape', None) != () or dtype.kind not in 'iu':
    raise DataError(
      f'The label {label[0]!r} of {builder.name} is {feature!r}, but one '
      f'integer is needed. {_NAMING} jaxprune.data.save numbers texts.'
    )
  return Features(image, label[0], None)


_NAMING = (
  "Name image and label by `features`, such as features=('image', 'label'), or "
  "the image alone, as features=('image',), for labels of -1."
)


def _names(builder: Any, names: Sequence[str] | None) -> Sequence[str]:
  """Returns the names of image and label, or of the image alone."""
  if names is not None:
    if isinstance(names, str) or len(names) not in (1, 2):
      raise DataError(f'`features` must name one or two, got {names!r}.')
    return names
  keys = builder.info.supervised_keys or ()
  is_pair = len(keys) == 2 and all(isinstance(key, str) for key in keys)
  return keys if is_pair else ('image', 'label')


def _check_names(builder: Any, names: Sequence[str]) -> None:
  """Raises DataError unless a set has all of these features."""
  missing = [name for name in names if name not in builder.info.features]
  if missing:
    raise DataError(
      f'{builder.name} has no feature {", ".join(map(repr, missing))}, but '
      f'{", ".join(sorted(builder.info.features))}. {_NAMING}'
    )


def classes_of(builder: Any, features: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the labels, the last of the features of a set."""
  _check_names(builder, features)
  names = getattr(builder.info.features[features[-1]], 'names', None)
  if not names:
    raise DataError(
      f'{builder.name} is no classification set: its {features[-1]!r} has no '
      f'classes.'
    )
  return tuple(names)


def label_of(
  example: Mapping[str, Any], columns: Features, index: int, where: str
) -> int:
  """Returns the label of a record, -1 if the set has none.

  Raises:
    DataError: if it is none of the labels of its set.
  """
  if columns.label is None:
    return -1
  target, classes = int(example[columns.label]), columns.classes
  if classes is None and not 0 <= target < MOST_CLASSES:
    raise DataError(
      f'Record {index} of {where} has the label {target}, but labels count '
      f'classes from 0, up to {MOST_CLASSES - 1}. Number them anew, as '
      f'jaxprune.data.save does with texts.'
    )
  if classes is not None and not 0 <= target < len(classes):
    raise DataError(
      f'Record {index} of {where} has the label {target}, but the set has the '
      f'{len(classes)} labels 0 to {len(classes) - 1}.'
    )
  return target


def numbers(builder: Any, columns: Features) -> tuple[str, ...]:
  """Returns names '0' to the largest label of all splits, for none of its own.

  Of all splits, so that each of them has the same classes.

  Raises:
    DataError: if a split cannot be read.
  """
  largest = 0
  for split in builder.info.splits:
    source = open_source(builder, split)
    for start in range(0, len(source), 1024):
      indices = list(range(start, min(start + 1024, len(source))))
      with quiet():
        examples = read(source, builder, split, indices)
      labels = [int(example[columns.label]) for example in examples]
      largest = max(largest, *labels)  # A split to predict may have -1 alone.
  return tuple(str(i) for i in range(min(largest, MOST_CLASSES - 1) + 1))


def image_of(
  example: Mapping[str, Any],
  columns: Features,
  transform: Transform | None,
  seeds: tuple[int, ...],
  where: str,
) -> np.ndarray:
  """Returns the image of a record as its transform makes it.

  An image without an axis of channels gets one of size 1, before the transform.

  Args:
    example: as it was read.
    columns: which features are read.
    transform: (image, rng) -> image; None leaves it as it is.
    seeds: of rng; the last is the number of the record.
    where: the set and the split, for the error.

  Raises:
    DataError: if it is no image, or if the transform raises; with the number of
      the record.
  """
  image = example[columns.image]
  dtype, shape = getattr(image, 'dtype', None), np.shape(image)
  is_numbers = dtype is not None and np.dtype(dtype).kind in 'buif'
  if not is_numbers or len(shape) not in (2, 3):
    kind = f'{dtype}{list(shape)}' if is_numbers else type(image).__name__
    raise DataError(
      f'{columns.image!r} of record {seeds[-1]} of {where} is {kind}, but an '
      f'image is numbers of [height, width] or [height, width, channels]. '
      f'jaxprune.data.records reads other kinds, such as sound or video.'
    )
  if len(shape) == 2:
    image = image[..., None]
  return transformed(transform, image, seeds, where)


def check_alike(image: Any, first: np.ndarray, index: int, where: str) -> None:
  """Raises DataError unless an image has the shape and dtype of record 0."""
  kind = lambda x: f'{getattr(x, "dtype", type(x))}{list(np.shape(x))}'
  if kind(image) != kind(first):
    raise DataError(
      f'Record {index} of {where} is {kind(image)}, but record 0 is '
      f'{kind(first)}, and all images must be alike. A set of many sizes '
      f'needs a transform, such as jaxprune.data.augment.center_crop.'
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
  root = data_dir or os.environ.get('JAXPRUNE_DATA')
  roots = [pathlib.Path(root), pathlib.Path(root, 'tfds')] if root else []
  if root and not roots[0].is_dir():
    raise DataError(
      f'The data folder {root} does not exist. It is a folder of sets that '
      f'TFDS prepared, such as {root}/mnist/3.0.1; jaxprune.data.save makes '
      f'one of arrays.'
    )
  folders = [v for root in roots for v in _versions(root / name)]
  if name == 'digits' and not folders:
    folders = [_digits()]
  if not folders:
    available = {f.name for r in roots for f in r.glob('*') if _versions(f)}
    where = f'in {root}' if root else 'without a data folder'
    raise DataError(
      f'There is no data set {name!r} {where}; there are: '
      f'{", ".join(sorted(available | {"digits"}))}. '
      f'Another folder is given by data_dir or by JAXPRUNE_DATA; a set is made '
      f'of arrays by jaxprune.data.save.'
    )
  if version and version not in [f.name for f in folders]:
    raise DataError(
      f'{folders[0].parent} has no version {version} of {name}, only '
      f'{", ".join(f.name for f in folders)}.'
    )
  folder = next(f for f in folders if version in ('', f.name))
  tfds = extras.tfds()  # Slow to import: only when it is needed.
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
  except OSError as error:
    raise DataError(
      f'The digits cannot be prepared in {root} ({first_line(error)}). Name a '
      f'folder that can be written by the variable XDG_CACHE_HOME.'
    ) from error


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the prepared versions in the folder of a set, newest first."""
  number = lambda f: tuple(map(int, f.name.split('.')))
  version = re.compile(r'\d+\.\d+\.\d+')
  versions = [f for f in folder.glob('*.*.*') if version.fullmatch(f.name)]
  return sorted(versions, key=number, reverse=True)


def open_source(builder: Any, split: str) -> Any:
  """Returns the random access source of a split, its files checked."""
  try:
    split_info = builder.info.splits[split]
    if split_info.num_examples < 1:
      raise ValueError('it is empty')
  except Exception as error:
    raise DataError(
      f'{builder.name} has no split {split!r} ({first_line(error)}); it has '
      f'{", ".join(builder.info.splits)}, and parts such as '
      f"'{next(iter(builder.info.splits), 'train')}[:100]'."
    ) from error
  missing = [
    i.filename
    for i in split_info.file_instructions
    if not os.path.exists(i.filename)
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
  array_record = extras.require('array_record.python.array_record_module')
  for shard in builder.info.splits[split].file_instructions:
    reader = array_record.ArrayRecordReader(str(shard.filename))
    count = reader.num_records()
    reader.close()
    if count != shard.examples_in_shard:
      raise DataError(
        f'{shard.filename} has {count} records, but by dataset_info.json it '
        f'must have {shard.examples_in_shard}. Prepare that folder again.'
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
  for shard in builder.info.splits[split].file_instructions:
    if index < shard.take:
      return shard.filename, shard.skip + index
    index -= shard.take
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
