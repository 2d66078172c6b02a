"""Sets that are read whole."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.data import folders
from jaxprune.data.folders import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of an image classification set, whole in memory."""

  images: np.ndarray  # uint8, [n, height, width, channels].
  labels: np.ndarray  # int32, [n], in 0..len(classes)-1.
  classes: tuple[str, ...]  # Name of each label.
  name: str
  version: str

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.labels)


def load(
  name: str,
  split: str = 'train',
  data_dir: str | os.PathLike | None = None,
  *,
  transform: folders.Transform | None = None,
) -> Dataset:
  """Reads one split of an image classification set into memory.

  ``'digits'`` (1,437 + 360 scans of 8 x 8, from scikit-learn) needs no folder:
  it is prepared on first use, offline, as a TFDS set in a cache folder
  (``$XDG_CACHE_HOME/jaxprune``, else ``~/.cache/jaxprune``). Any other set is
  read from ``data_dir/name/version``, prepared by TFDS as array_record.

  Args:
    name: ``'digits'``, or a folder of ``data_dir`` such as ``'cifar10'``;
      ``'cifar10:3.0.2'`` asks for a version, else it is the newest there.
    split: as in TFDS: ``'train'``, ``'test[:1000]'``, ``'train[10%:]'``.
    data_dir: the folder that holds the sets, or holds them in its ``tfds``;
      without it, the one that the variable ``JAXPRUNE_DATA`` names.
    transform: (image, rng) -> uint8 image of one shape, for a set of many, such
      as ``augment.center_crop``; rng is seeded by the number of the record.

  Returns:
    A :class:`Dataset`, in the order of the files.

  Raises:
    DataError: if the set, its folder or the split is missing, if a record is
      damaged, of another shape than the first, or of an unknown label, if the
      transform raises at one, or if a file holds another number of records than
      dataset_info.json says.
  """
  builder = folders.open_builder(name, data_dir)
  source = folders.open_source(builder, split)
  label = f'{builder.name} {split!r}'
  image_key, label_key, classes = folders.features(builder)
  with folders.quiet():
    first = folders.read(source, builder, split, [0])[0][image_key]
  shape = folders.transformed(transform, first, (0,), label).shape
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), 1024):
    indices = list(range(start, min(start + 1024, len(source))))
    with folders.quiet():
      examples = folders.read(source, builder, split, indices)
    for i, example in zip(indices, examples, strict=True):
      image, target = example[image_key], int(example[label_key])
      image = folders.transformed(transform, image, (i,), label)
      if image.shape != shape or image.dtype != np.uint8:
        raise DataError(
          f'Record {i} of {label} is {image.dtype}{list(image.shape)}, but an '
          f'image of uint8{list(shape)} is needed, as record 0 is. '
          f'A set of many sizes needs a transform, as of `stream`.'
        )
      folders.check_label(target, classes, i, label)
      images[i], labels[i] = image, target
  folders.check_counts(builder, split)
  version = str(builder.info.version)
  return Dataset(images, labels, classes, builder.name, version)


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


def count(
  name: str, split: str = 'train', data_dir: str | os.PathLike | None = None
) -> int:
  """Returns the number of examples of a split; no record is read.

  Args:
    name: as in :func:`load`.
    split: as in :func:`load`.
    data_dir: as in :func:`load`.

  Raises:
    DataError: if the set, its folder or the split is missing.
  """
  return len(folders.open_source(folders.open_builder(name, data_dir), split))
