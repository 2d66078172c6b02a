"""Sets that are read whole."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.checks import kinds
from jaxprune.data import folders


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of an image classification set, whole in memory."""

  images: np.ndarray  # [n, height, width, channels]; uint8 as a rule.
  labels: np.ndarray  # int32, [n], in 0..len(classes)-1; -1 if not read.
  classes: tuple[str, ...]  # Name of each label; () if they are not read.
  name: str
  version: str

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.labels)


@kinds.checked
def load(
  name: str,
  split: str = 'train',
  data_dir: str | os.PathLike | None = None,
  *,
  transform: folders.Transform | None = None,
  features: Sequence[str] | None = None,
) -> Dataset:
  """Reads one split of an image classification set into memory.

  ``'digits'`` (1,437 + 360 scans of 8 x 8, from scikit-learn) needs no folder:
  it is prepared on first use, offline, as a TFDS set in a cache folder
  (``$XDG_CACHE_HOME/jaxprune``, else ``~/.cache/jaxprune``). Any other set is
  read from ``data_dir/name/version``, prepared by TFDS as array_record, or by
  :func:`save` of arrays.

  Images keep their dtype: uint8, uint16, float32 and so on. One without an axis
  of channels gets one of size 1. Labels that are integers without names are
  called ``'0'`` to the largest of all splits.

  Args:
    name: ``'digits'``, or a folder of ``data_dir`` such as ``'cifar10'``;
      ``'cifar10:3.0.2'`` asks for a version, else it is the newest there.
    split: as in TFDS: ``'train'``, ``'test[:1000]'``, ``'train[10%:]'``.
    data_dir: the folder that holds the sets, or holds them in its ``tfds``;
      without it, the one that the variable ``JAXPRUNE_DATA`` names.
    transform: (image, rng) -> image of one shape, for a set of many, such as
      ``augment.center_crop``; rng is seeded by the number of the record.
    features: names of the features that hold image and label, or the image
      alone for labels of -1; by default those that the set names, else
      ``('image', 'label')``.

  Returns:
    A :class:`Dataset`, in the order of the files.

  Raises:
    MissingExtraError: if a package of jaxprune[data] is not installed.
    DataError: if the set, its folder, the split or a feature is missing, if a
      record is damaged, no image, of another shape or dtype than the first, or
      of an unknown label, if the labels are no integers, if the transform
      raises at one, or if a file holds another number of records than
      dataset_info.json says.
  """
  builder = folders.open_builder(name, data_dir)
  source = folders.open_source(builder, split)
  label = f'{builder.name} {split!r}'
  columns = folders.features(builder, features)
  image_of = lambda example, i: folders.image_of(
    example, columns, transform, (i,), label
  )
  with folders.quiet():
    first = image_of(folders.read(source, builder, split, [0])[0], 0)
  images = np.empty((len(source), *first.shape), first.dtype)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), 1024):
    indices = list(range(start, min(start + 1024, len(source))))
    with folders.quiet():
      examples = folders.read(source, builder, split, indices)
    for i, example in zip(indices, examples, strict=True):
      image = image_of(example, i)
      folders.check_alike(image, first, i, label)
      images[i], labels[i] = image, folders.label_of(example, columns, i, label)
  classes = columns.classes
  if columns.label is None:
    classes = ()
  elif classes is None:
    classes = folders.numbers(builder, columns)
  folders.check_counts(builder, split)
  version = str(builder.info.version)
  return Dataset(images, labels, classes, builder.name, version)


@kinds.checked
def records(
  name: str,
  split: str = 'train',
  data_dir: str | os.PathLike | None = None,
  features: Sequence[str] = ('image', 'label'),
) -> tuple[list[tuple[Any, ...]], tuple[str, ...], str]:
  """Reads chosen features of one split of any set, whole, without a check.

  Args:
    name: as in :func:`load`; the folder of a configuration is ``'glue/mnli'``.
    split: as in :func:`load`.
    data_dir: as in :func:`load`.
    features: their names; the last one is the label.

  Returns:
    (rows, classes, version): a tuple of features for each record, as TFDS
    decodes them, and the names of the labels.

  Raises:
    MissingExtraError: if a package of jaxprune[data] is not installed.
    DataError: if the set, its folder, the split or a feature is missing, if
      the last feature has no classes, if a record is damaged, or if a file
      holds another number of records than dataset_info.json says.
  """
  builder = folders.open_builder(name, data_dir)
  source = folders.open_source(builder, split)
  classes = folders.classes_of(builder, features)
  rows = []
  for start in range(0, len(source), 1024):
    indices = list(range(start, min(start + 1024, len(source))))
    with folders.quiet():
      examples = folders.read(source, builder, split, indices)
    rows += [tuple(example[key] for key in features) for example in examples]
  folders.check_counts(builder, split)
  return rows, classes, str(builder.info.version)


@kinds.checked
def count(
  name: str, split: str = 'train', data_dir: str | os.PathLike | None = None
) -> int:
  """Returns the number of examples of a split; no record is read.

  Args:
    name: as in :func:`load`.
    split: as in :func:`load`.
    data_dir: as in :func:`load`.

  Raises:
    MissingExtraError: if a package of jaxprune[data] is not installed.
    DataError: if the set, its folder or the split is missing.
  """
  return len(folders.open_source(folders.open_builder(name, data_dir), split))
