"""Images and labels from TFDS folders without TensorFlow, in a fixed order.

A small set is read whole (:func:`load`) and stays on the device; a large one
is streamed (:func:`stream`). In both, the examples of a step and how they are
augmented depend on nothing but (seed, epoch, step): a run resumes by its step,
there is no other state.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import digits


class DataError(ValueError):
  """A data set that is unknown, missing or damaged; the message is one line."""


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


# --- Reading -----------------------------------------------------------------


def load(
  name: str, split: str = 'train', data_dir: str | os.PathLike | None = None
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

  Returns:
    A :class:`Dataset`, in the order of the files.

  Raises:
    DataError: if the set, its folder or the split is missing, if a record is
      damaged, of another shape than the first, or of an unknown label, or if a
      file holds another number of records than dataset_info.json says.
  """
  builder = _builder(name, data_dir)
  source, label = _source(builder, split), f'{builder.name} {split!r}'
  image_key, label_key, classes = _features(builder)
  with _quiet():
    shape = _read(source, builder, split, [0])[0][image_key].shape
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), 1024):
    indices = list(range(start, min(start + 1024, len(source))))
    with _quiet():
      examples = _read(source, builder, split, indices)
    for i, example in zip(indices, examples, strict=True):
      image, target = example[image_key], int(example[label_key])
      if image.shape != shape or image.dtype != np.uint8:
        raise DataError(
          f'Record {i} of {label} is {image.dtype}{list(image.shape)}, but an '
          f'image of uint8{list(shape)} is needed, as record 0 is. '
          f'A set of many sizes is for `stream`, with a transform.'
        )
      _check_label(target, classes, i, label)
      images[i], labels[i] = image, target
  _check_counts(builder, split)
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
  builder = _builder(name, data_dir)
  source = _source(builder, split)
  classes = _classes(builder, features)
  rows = []
  for start in range(0, len(source), 1024):
    indices = list(range(start, min(start + 1024, len(source))))
    with _quiet():
      examples = _read(source, builder, split, indices)
    rows += [tuple(example[key] for key in features) for example in examples]
  _check_counts(builder, split)
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
  return len(_source(_builder(name, data_dir), split))


def _features(builder: Any) -> tuple[str, str, tuple[str, ...]]:
  """Returns the names of image, label and classes of a set."""
  image, label = builder.info.supervised_keys or ('image', 'label')
  return image, label, _classes(builder, (image, label))


def _classes(builder: Any, features: Sequence[str]) -> tuple[str, ...]:
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


def _check_label(target: int, classes: tuple, index: int, where: str) -> None:
  if not 0 <= target < len(classes):
    raise DataError(
      f'Record {index} of {where} has the label {target}, but the set has the '
      f'{len(classes)} labels 0 to {len(classes) - 1}.'
    )


def _builder(name: str, data_dir: str | os.PathLike | None) -> Any:
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
      f'{folder} is damaged ({_line(error)}). Prepare that folder again.'
    ) from error
  return builder


def _digits() -> pathlib.Path:
  """Returns the folder of the embedded digits in the user's cache."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  root = pathlib.Path(cache, 'jaxprune')
  try:
    return digits.prepare(root)
  except ImportError as error:
    raise DataError(_line(error)) from error
  except OSError as error:
    raise DataError(
      f'The digits cannot be prepared in {root} ({_line(error)}). Name a '
      f'folder that can be written by the variable XDG_CACHE_HOME.'
    ) from error


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the prepared versions in the folder of a set, newest first."""
  number = lambda f: tuple(map(int, f.name.split('.')))
  version = re.compile(r'\d+\.\d+\.\d+')
  found = [f for f in folder.glob('*.*.*') if version.fullmatch(f.name)]
  return sorted(found, key=number, reverse=True)


def _source(builder: Any, split: str) -> Any:
  """Returns the random access source of a split, its files checked."""
  try:
    part = builder.info.splits[split]
    if part.num_examples < 1:
      raise ValueError('it is empty')
  except Exception as error:
    raise DataError(
      f'{builder.name} has no split {split!r} ({_line(error)}); it has '
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
      f'{builder.name} {split!r} cannot be read ({_line(error)}). It must be '
      f"prepared with file_format='array_record'."
    ) from error


def _check_counts(builder: Any, split: str) -> None:
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


def _read(source: Any, builder: Any, split: str, indices: list[int]) -> list:
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
        f'{file}, is damaged ({_line(error)}). Prepare that folder again.'
      ) from error
  return source.__getitems__(indices)


def _place(builder: Any, split: str, index: int) -> tuple[str, int]:
  """Returns the file of a split's record and its number in the file."""
  for part in builder.info.splits[split].file_instructions:
    if index < part.take:
      return part.filename, part.skip + index
    index -= part.take
  raise IndexError(f'{split!r} has no record {index} more.')


def _line(error: BaseException) -> str:
  """Returns the first line of an error's text, or its kind."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__).rstrip('.')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back what TFDS logs that is no error."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


# --- The order of the examples -----------------------------------------------


def epoch_batches(
  seed: int | jax.Array, epoch: int | jax.Array, *, size: int, batch: int
) -> jax.Array:
  """Returns which examples each step of an epoch sees.

  A permutation of ``range(size)`` drawn from (seed, epoch) and cut into
  floor(size / batch) rows; the size mod batch examples left over rest for that
  epoch. Pure, so it may run inside ``jit``, with seed and epoch traced.

  Args:
    seed: of the run.
    epoch: counted from 0.
    size: number of examples, static.
    batch: examples of a step, static, 1..size.

  Returns:
    int32, [size // batch, batch].

  Raises:
    ValueError: if ``batch`` is not in 1..size.

  Examples:
    >>> epoch_batches(0, 3, size=7, batch=2).shape
    (3, 2)
  """
  if not 1 <= batch <= size:
    raise ValueError(
      f'`batch` must be in 1..{size}, the number of examples, got {batch}.'
    )
  # Folds in 0: `step_key` has the numbers from 1 on.
  key = jax.random.fold_in(_epoch_key(seed, epoch), 0)
  order = jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))
  steps = size // batch
  return order[: steps * batch].reshape(steps, batch)


def step_key(
  seed: int | jax.Array, epoch: int | jax.Array, step: int | jax.Array
) -> jax.Array:
  """Returns the key of the augmentation of one step, apart from the order's.

  Args:
    seed: of the run.
    epoch: counted from 0.
    step: within the epoch, counted from 0.

  Returns:
    A typed PRNG key of shape []; a function of the three numbers.
  """
  return jax.random.fold_in(_epoch_key(seed, epoch), step + 1)


def _epoch_key(seed, epoch) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), epoch)


def eval_batches(size: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns batches of one shape that visit every example once.

  The last one is filled up with example 0, marked as not valid, so that one
  compiled step gives the exact accuracy: sum(hit & valid) / size.

  Args:
    size: number of examples, at least 1.
    batch: examples of a step.

  Returns:
    (indices, valid): int32 and bool, [ceil(size / batch), batch].

  Raises:
    ValueError: if ``size`` or ``batch`` is below 1.

  Examples:
    >>> indices, valid = eval_batches(5, 3)
    >>> print(indices[1], valid[1])
    [3 4 0] [ True  True False]
  """
  if size < 1 or batch < 1:
    raise ValueError(
      f'`size` and `batch` must be at least 1, got {size} and {batch}.'
    )
  rows = -(-size // batch)
  indices = np.arange(rows * batch, dtype=np.int32).reshape(rows, batch)
  valid = indices < size
  return np.where(valid, indices, 0).astype(np.int32), valid


# --- Large sets --------------------------------------------------------------


def stream(
  name: str,
  split: str = 'train',
  data_dir: str | os.PathLike | None = None,
  *,
  seed: int,
  batch: int,
  epochs: int,
  start: int = 0,
  rows: np.ndarray | None = None,
  transform: Callable[[np.ndarray, np.random.Generator], np.ndarray]
  | None = None,
  host: tuple[int, int] = (0, 1),
  threads: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Returns an iterator over the batches of a set too large for the memory.

  Step t has the examples that :func:`epoch_batches` names for epoch
  t // steps, step t mod steps: the order of the same set held in memory. Of
  them, host i of n gets the i-th of n equal parts, so that all hosts together
  see one order, whatever their number.

  The iterator is one of Grain: its ``get_state()`` is
  ``{'next_index': t}``, ``set_state`` takes that back, and ``start=t`` does
  the same in a new process.

  Args:
    name: as in :func:`load`.
    split: as in :func:`load`.
    data_dir: as in :func:`load`.
    seed: of the order and of the transforms.
    batch: examples of a step over all hosts, a multiple of their number.
    epochs: after which the iterator ends.
    start: the first step to yield, counted over all epochs.
    rows: int, [n]; the examples to read, as places in the split, as if they
      alone were the set; by default all.
    transform: (image, rng) -> uint8 image of one shape, run on the host, such
      as ``augment.random_resized_crop``; rng is seeded by (seed, epoch, index
      of the example).
    host: (index, count) of this process, such as ``(jax.process_index(),
      jax.process_count())``.
    threads: that read ahead.

  Returns:
    An iterator over (images, labels): uint8 [batch / count, ...] and int32
    [batch / count].

  Raises:
    DataError: as :func:`load`; for a damaged record, one of another shape or
      dtype than record 0, or one at which the transform raises, when its step
      is read, and at once for record 0.
    ValueError: if ``batch`` is no multiple of the number of hosts or more than
      the examples, if the host is not one of them, if ``rows`` names what is no
      example, or if ``start`` is no step.
  """
  index, count = host
  if not 0 <= index < count or batch % count:
    raise ValueError(
      f'`batch` must be a multiple of the number of hosts and a host one of '
      f'0..count-1, got batch {batch} and host (index, count) {host}.'
    )
  import grain

  builder = _builder(name, data_dir)
  source, label = _source(builder, split), f'{builder.name} {split!r}'
  image_key, label_key, classes = _features(builder)
  with _quiet():
    first = _read(source, builder, split, [0])[0][image_key]  # TFDS warns once.

  def changed(image, epoch, i):
    if not transform:
      return image
    try:
      return transform(image, np.random.default_rng((seed, epoch, i)))
    except Exception as error:  # Whatever the user's function raises.
      raise DataError(
        f'The transform failed at record {i} of {label} with '
        f'{type(error).__name__} ({_line(error)}).'
      ) from error

  shape = changed(first, 0, 0).shape

  rows = np.arange(len(source)) if rows is None else np.asarray(rows)
  if rows.size and not 0 <= rows.min() <= rows.max() < len(source):
    raise ValueError(
      f'`rows` must be in 0..{len(source) - 1}, the examples of {label}, got '
      f'{rows.min()}..{rows.max()}.'
    )

  @functools.lru_cache(maxsize=2)
  def order(epoch):
    places = epoch_batches(seed, epoch, size=len(rows), batch=batch)
    return rows[np.asarray(places)]

  steps = len(order(0))
  if not 0 <= start <= epochs * steps:
    raise ValueError(
      f'`start` must be in 0..{epochs * steps}, {steps} steps for each of '
      f'{epochs} epochs, got {start}.'
    )

  def read(t):
    epoch, step = divmod(t, steps)
    mine = np.split(order(epoch)[step], count)[index].tolist()
    images, labels = [], np.empty(len(mine), np.int32)
    for k, example in enumerate(_read(source, builder, split, mine)):
      image, labels[k] = example[image_key], example[label_key]
      _check_label(int(labels[k]), classes, mine[k], label)
      image = changed(image, epoch, mine[k])
      if image.shape != shape or image.dtype != np.uint8:
        raise DataError(
          f'Record {mine[k]} of {label} is {image.dtype}{list(image.shape)}, '
          f'but an image of uint8{list(shape)} is needed, as of record 0: give '
          f'a transform that makes all images such.'
        )
      images.append(image)
    return np.stack(images), labels

  batches = (
    grain.MapDataset.range(epochs * steps)
    .map(read)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
  )
  iterator = iter(batches)
  iterator.set_state({'next_index': start})
  return iterator


def prefetch(
  batches: Iterable[Any],
  sharding: jax.sharding.Sharding | None = None,
  size: int = 2,
) -> Iterator[Any]:
  """Yields batches on the device, with some more already on their way.

  An error of ``batches`` is raised after the batches that came before it.

  Args:
    batches: pytrees of arrays; with several hosts the part of this one.
    sharding: where the arrays go, such as a NamedSharding of the first axis;
      without it, to the default device.
    size: batches on their way beside the one in use, at least 1.

  Raises:
    ValueError: if ``size`` is below 1.

  Examples:
    >>> for x in prefetch([np.arange(2), np.arange(3)]):
    ...   print(type(x) is np.ndarray, x)
    False [0 1]
    False [0 1 2]
  """
  if size < 1:
    raise ValueError(f'`size` must be at least 1, got {size}.')
  if sharding is None:
    put = jnp.asarray
  else:
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
  return _ahead((jax.tree.map(put, batch) for batch in batches), size)


def _ahead(items: Iterator[Any], size: int) -> Iterator[Any]:
  """Yields items, computing ``size`` of them before they are asked for."""
  queue, failure = collections.deque(), None
  while True:
    try:
      queue.extend(itertools.islice(items, size + 1 - len(queue)))
    except Exception as error:  # Of the item after those in the queue.
      failure = error
    if not queue:
      break
    yield queue.popleft()
  if failure:
    raise failure
