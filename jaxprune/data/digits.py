"""Scikit-learn's handwritten digits as a TFDS set: real data, always at hand.

The set needs no download and no TensorFlow: it is written as array_record on
first use, in a second or two, and read like any other.
"""

import contextlib
import functools
import io
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from jaxprune.checks import extras

VERSION = '1.0.0'


def split() -> tuple[np.ndarray, np.ndarray]:
  """Returns which of scikit-learn's 1,797 digits train and which test.

  A fixed permutation, in which the first 36 of each class are the test: 360
  images, and 1,437 to train on. They partition ``range(1797)``.

  Returns:
    (train, test): int arrays of shape [1437] and [360], in a mixed order.

  Raises:
    MissingExtraError: if scikit-learn is not installed.
  """
  order = np.random.RandomState(0).permutation(1797)  # A frozen stream.
  labels = _digits().target[order]
  rank = np.zeros(1797, int)
  for digit in range(10):
    rank[labels == digit] = np.arange(np.sum(labels == digit))
  return order[rank >= 36], order[rank < 36]


def prepare(root: str | os.PathLike) -> pathlib.Path:
  """Returns ``root/digits/1.0.0``, and prepares it if it is not there.

  Args:
    root: a folder of sets; it is made if need be.

  Raises:
    MissingExtraError: if scikit-learn or TFDS is not installed.
    OSError: if the folder cannot be written.
  """
  root = pathlib.Path(root)
  folder = root / 'digits' / VERSION
  if folder.is_dir():
    return folder
  _digits()  # If it is not installed, nothing is written.
  return write(_builder(), folder)


def write(builder: Any, folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a version, after a TFDS builder has written it.

  It is written beside it and then renamed: of several processes the first one
  wins, and one that is killed leaves nothing that is half done.

  Args:
    builder: a class of builders.
    folder: ``root/name/version``.

  Raises:
    OSError: if the folder cannot be written.
  """
  prefix, root = f'.jaxprune-{folder.parent.name}-', folder.parent.parent
  folder.parent.mkdir(parents=True, exist_ok=True)
  for old in root.glob(f'{prefix}*'):  # By a process that was killed.
    if time.time() - old.stat().st_mtime > 3600:
      shutil.rmtree(old, ignore_errors=True)
  scratch = tempfile.mkdtemp(prefix=prefix, dir=root)
  try:
    with _silence():
      written = builder(data_dir=scratch, file_format='array_record')
      written.download_and_prepare()
    try:
      os.rename(written.data_dir, folder)
    except OSError:
      if not folder.is_dir():  # Else another process was first.
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return folder


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Holds back the log and the progress bars of TFDS."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  sink = io.StringIO()
  try:
    with redirect_stdout(sink), redirect_stderr(sink):
      yield
  finally:
    logger.setLevel(level)


@functools.cache
def _digits() -> Any:
  """Returns scikit-learn's digits."""
  return extras.require('sklearn.datasets').load_digits()


@functools.cache
def _builder() -> Any:
  """Returns the TFDS builder class of the digits.

  Its image is a Tensor: the encoder of TFDS's Image needs TensorFlow.
  """
  tfds = extras.tfds()
  registered = extras.require('tensorflow_datasets.core.registered')

  with registered.skip_registration():

    class Digits(tfds.core.GeneratorBasedBuilder):
      """Scikit-learn's digits, split once and for all."""

      VERSION = tfds.core.Version(VERSION)

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          description='Handwritten digits, 8 x 8, 17 grey levels; a copy of '
          'the test set of UCI optical recognition of handwritten digits.',
          homepage='https://archive.ics.uci.edu/dataset/80',
          features=tfds.features.FeaturesDict(
            {
              'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
              'label': tfds.features.ClassLabel(num_classes=10),
            }
          ),
          supervised_keys=('image', 'label'),
        )

      def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        train, test = split()
        return {
          'train': self._generate_examples(train),
          'test': self._generate_examples(test),
        }

      def _generate_examples(self, indices):
        digits = _digits()
        for i in indices.tolist():
          image = digits.images[i].astype(np.uint8)[..., None]
          yield i, {'image': image, 'label': int(digits.target[i])}

  return Digits
