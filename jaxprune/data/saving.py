"""Folders of sets, made of arrays."""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.checks import extras, kinds
from jaxprune.data import digits
from jaxprune.data.folders import MOST_CLASSES, DataError, first_line

Images = np.ndarray | Sequence[Any]
Labels = np.ndarray | Sequence[int] | Sequence[str] | None


@kinds.checked
def save(
  root: str | os.PathLike[str],
  name: str,
  splits: Mapping[str, tuple[Images, Labels]],
  *,
  classes: Sequence[str] | None = None,
  version: str = '1.0.0',
) -> pathlib.Path:
  """Writes images and labels as a set that :func:`load` and ``stream`` read.

  It is a TFDS set of array_record, written without TensorFlow, whole or not at
  all. What :func:`load` reads is what was given, in the same order, to the last
  bit; images without an axis of channels get one of size 1.

  Args:
    root: the folder of sets, the ``data_dir`` of :func:`load`; it is made if
      need be.
    name: of the set: a letter, then letters, digits and underscores.
    splits: name of a split, such as ``'train'`` -> (images, labels). Images are
      an array [n, height, width] or [n, height, width, channels], or a sequence
      of n such images (arrays or images of Pillow), which may then be of
      several sizes; of bool, integers or floats up to 64 bits. Labels are n
      integers that count classes from 0, n names of classes, or None in all
      splits for a set without labels.
    classes: names of the classes, in the order of the integers. By default the
      names among the labels, sorted, or ``'0'`` to the largest integer, over
      all splits.
    version: three numbers with dots.

  Returns:
    The folder ``root/name/version``.

  Raises:
    DataError: if there is such a version already, if the name, the version or
      a split's name is of another form, if there are no images, if images or
      labels are of another kind, unlike each other or not equally many, if a
      label is none of the classes, or if the folder cannot be written.
    MissingExtraError: if a package of jaxprune[data] is not installed.

  Examples:
    >>> import tempfile
    >>> from jaxprune import data
    >>> images = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    >>> with tempfile.TemporaryDirectory() as root:
    ...   _ = data.save(root, 'pets', {'train': (images, ['dog', 'cat'])})
    ...   pets = data.load('pets', 'train', root)
    >>> print(pets.images.shape, pets.images.dtype, pets.labels, pets.classes)
    (2, 3, 4, 1) uint16 [1 0] ('cat', 'dog')
  """
  _check_form('name', name, r'[A-Za-z]\w*')
  _check_form('version', version, r'\d+\.\d+\.\d+')
  _check_pairs(splits)
  folder = pathlib.Path(root, name, version)
  if folder.exists():
    raise DataError(
      f'{folder} is there already. Remove it, or give another version.'
    )
  images = {}
  for split, (split_images, _) in splits.items():
    _check_form('split', split, r'(?!all$)[A-Za-z]\w*')  # TFDS has an `all`.
    images[split] = _images(split_images, split)
  image = _one_kind(images)
  labels, classes = _numbered(
    {split: split_labels for split, (_, split_labels) in splits.items()},
    classes,
  )
  for split, numbers in labels.items():
    if len(numbers) != len(images[split]):
      raise DataError(
        f'{split!r} has {len(images[split])} images, but {len(numbers)} labels.'
      )
  try:
    return digits.write(
      _builder(name, version, image, classes, images, labels), folder
    )
  except OSError as error:
    raise DataError(
      f'{folder} cannot be written ({first_line(error)}).'
    ) from error


def _check_pairs(splits: Any) -> None:
  """Raises DataError unless these are splits of images and labels."""
  is_pair = lambda pair: isinstance(pair, tuple | list) and len(pair) == 2
  if not isinstance(splits, Mapping) or not all(map(is_pair, splits.values())):
    raise DataError(
      "`splits` must be a dict of pairs, such as {'train': (images, labels)}; "
      'labels may be None.'
    )
  if not splits:
    raise DataError('A set needs one split or more, got none.')


def _check_form(what: str, text: str, form: str) -> None:
  if not isinstance(text, str) or not re.fullmatch(form, text, re.ASCII):
    raise DataError(
      f'The {what} of a set must be of the form {form}, got {text!r}.'
    )


def _images(split_images: Images, split: str) -> Sequence[np.ndarray]:
  """Returns images with an axis of channels, of numbers that can be kept."""
  if isinstance(split_images, np.ndarray) and split_images.ndim in (3, 4):
    split_images = (
      split_images if split_images.ndim == 4 else split_images[..., None]
    )
  images = [np.asarray(image) for image in split_images]
  if not images:
    raise DataError(f'{split!r} has no images.')
  for i, image in enumerate(images):
    is_kept = image.dtype.kind in 'buif' and image.dtype.itemsize <= 8
    if not is_kept or image.ndim not in (2, 3) or not image.size:
      raise DataError(
        f'Image {i} of {split!r} is {image.dtype}{list(image.shape)}, but an '
        f'image is numbers of [height, width] or [height, width, channels].'
      )
  native = lambda x: x.astype(x.dtype.newbyteorder('='), copy=False)
  return [native(x if x.ndim == 3 else x[..., None]) for x in images]


def _one_kind(
  images: Mapping[str, Sequence[np.ndarray]],
) -> tuple[tuple[int | None, ...], np.dtype]:
  """Returns the shape (None where it varies) and the dtype of all images."""
  first = next(iter(images.values()))[0]
  sizes = set()
  for split, split_images in images.items():
    for i, image in enumerate(split_images):
      sizes.add(image.shape)
      if (image.shape[2], image.dtype) != (first.shape[2], first.dtype):
        raise DataError(
          f'Image {i} of {split!r} is {image.dtype} of {image.shape[2]} '
          f'channels, but the first one is {first.dtype} of {first.shape[2]}: '
          f"all must be alike, such as by image.convert('RGB') of Pillow."
        )
  if len(sizes) == 1:
    return first.shape, first.dtype
  return (None, None, first.shape[2]), first.dtype


def _numbered(
  labels: Mapping[str, Labels], classes: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
  """Returns the labels as integers, and the names of the classes.

  Both are empty and None for a set without labels.
  """
  unlabelled = [
    split for split, split_labels in labels.items() if split_labels is None
  ]
  if unlabelled:
    if len(unlabelled) < len(labels) or classes is not None:
      raise DataError(
        f'{", ".join(map(repr, unlabelled))} has no labels: give labels to all '
        f'splits, or to none, and no classes then.'
      )
    return {}, None
  arrays = _label_arrays(labels)
  together = np.concatenate(list(arrays.values()))
  is_named = together.dtype.kind == 'U'
  if classes is not None:
    classes = _checked_classes(classes)
  elif is_named:
    classes = _checked_classes(np.unique(together).tolist())
  else:
    largest = min(max(int(together.max()), 0), MOST_CLASSES - 1)
    classes = tuple(str(i) for i in range(largest + 1))
  if is_named:
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in np.unique(together) if name not in number]
    if unknown:
      raise DataError(
        f'Labels are none of the classes: {", ".join(unknown[:6])}.'
      )
    arrays = {
      split: np.array([number[name] for name in array])
      for split, array in arrays.items()
    }
  elif not 0 <= together.min() <= together.max() < len(classes):
    raise DataError(
      f'Labels must be in 0..{len(classes) - 1}, the {len(classes)} classes, '
      f'got {together.min()}..{together.max()}. np.unique(labels, '
      f'return_inverse=True) numbers labels anew.'
    )
  return arrays, classes


def _label_arrays(labels: Mapping[str, Labels]) -> dict[str, np.ndarray]:
  """Returns the labels of each split as a vector, all of integers or texts."""
  arrays = {}
  for split, split_labels in labels.items():
    array = np.asarray(split_labels)
    if array.dtype == object:  # Texts, as pandas has them.
      array = np.asarray(array.tolist())
    arrays[split] = array
  kinds = {
    array.dtype.kind.replace('u', 'i') if array.ndim == 1 else ''
    for array in arrays.values()
  }
  if kinds not in ({'i'}, {'U'}):
    listed = ', '.join(
      f'{array.dtype}{list(array.shape)} of {split!r}'
      for split, array in arrays.items()
    )
    raise DataError(
      f'Labels must be integers, or names of classes, one for each image, as '
      f'labels.ravel() or one_hot.argmax(1) are; got {listed}.'
    )
  return arrays


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
  """Returns names of classes, which must be such as TFDS keeps."""
  names = (classes,) if isinstance(classes, str) else tuple(classes)
  is_text = lambda name: isinstance(name, str) and name.split() != []
  is_kept = lambda name: is_text(name) and name == ' '.join(name.split())
  wrong = [name for name in names if not is_kept(name)]
  wrong = wrong or sorted({name for name in names if names.count(name) > 1})
  if wrong or not names:
    raise DataError(
      f'Names of classes must be different texts with single blanks inside '
      f'alone, got {wrong[:6]!r}.'
    )
  return tuple(map(str, names))


def _builder(
  name: str,
  version: str,
  image: tuple[tuple[int | None, ...], np.dtype],
  classes: Sequence[str] | None,
  images: Mapping[str, Sequence[np.ndarray]],
  labels: Mapping[str, np.ndarray],
) -> Any:
  """Returns the TFDS builder class of a set, which writes it in its order."""
  tfds = extras.tfds()
  registered = extras.require('tensorflow_datasets.core.registered')

  shape, dtype = image
  # Its bytes as they are: the encoder of TFDS's Image needs TensorFlow.
  features: dict[str, Any] = {
    'image': tfds.features.Tensor(
      shape=shape, dtype=dtype.type, encoding='bytes'
    )
  }
  if classes is not None:
    features['label'] = tfds.features.ClassLabel(names=list(classes))

  with registered.skip_registration():

    class Arrays(tfds.core.GeneratorBasedBuilder):
      """Images and labels that were given as arrays."""

      VERSION = tfds.core.Version(version)

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(features),
          supervised_keys=('image', 'label') if labels else None,
          disable_shuffling=True,
        )

      def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in images}

      def _generate_examples(self, split) -> Iterator[tuple[int, dict]]:
        for i, pixels in enumerate(images[split]):
          example: dict[str, Any] = {'image': pixels}
          if labels:
            example['label'] = int(labels[split][i])
          yield i, example

  Arrays.name = name
  return Arrays
