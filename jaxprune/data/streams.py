"""Sets too large for the memory, read in order as training goes."""

import collections
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import extras, kinds
from jaxprune.data import folders
from jaxprune.data.order import epoch_batches


@kinds.checked
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
  transform: folders.Transform | None = None,
  host: tuple[int, int] = (0, 1),
  threads: int = 4,
  features: Sequence[str] | None = None,
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
    transform: (image, rng) -> image of one shape, run on the host, such as
      ``augment.random_resized_crop``; rng is seeded by (seed, epoch, index of
      the example).
    host: (index, count) of this process, such as ``(jax.process_index(),
      jax.process_count())``.
    threads: that read ahead.
    features: as in :func:`load`.

  Returns:
    An iterator over (images, labels): [batch / count, ...] of the set's dtype,
    and int32 [batch / count].

  Raises:
    MissingExtraError: if a package of jaxprune[data] is not installed.
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
  grain = extras.require('grain')
  builder = folders.open_builder(name, data_dir)
  source = folders.open_source(builder, split)
  label = f'{builder.name} {split!r}'
  columns = folders.features(builder, features)

  def image_of(example, epoch, i):
    seeds = (seed, epoch, i)
    return folders.image_of(example, columns, transform, seeds, label)

  with folders.quiet():  # TFDS warns once.
    first = image_of(folders.read(source, builder, split, [0])[0], 0, 0)

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
    for k, example in enumerate(folders.read(source, builder, split, mine)):
      image = image_of(example, epoch, mine[k])
      folders.check_alike(image, first, mine[k], label)
      labels[k] = folders.label_of(example, columns, mine[k], label)
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


@kinds.checked
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
