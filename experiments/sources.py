"""The training split of a job: on the device, or read as training goes."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import flags, train
from jaxprune import data

SAMPLE = 10_000  # Images by which those of a set are normalised.


class Source(NamedTuple):
  """What a network learns from."""

  examples: train.Examples | train.Stream
  held: train.Examples | None  # Not trained on.
  size: int  # Of the examples.
  sample: np.ndarray  # [n, height, width, channels]; of the whole split.


def read(config: flags.Config) -> Source:
  """Returns the training split of a configuration.

  With ``stream`` its examples stay in their files, and those of a step are the
  same as without.

  Raises:
    DataError: if the data are missing or damaged.
  """
  where = config.dataset, config.train_split, config.data_dir
  if not config.stream:
    found = data.load(*where)
    examples, held = train.split_off(
      found.images, found.labels, config.validation, config.seed
    )
    rows = _spread(len(found))
    return Source(examples, held, len(examples.labels), found.images[rows])
  count = data.count(*where)
  rest, held_rows = train.split_rows(count, config.validation, config.seed)
  epochs = max(config.epochs, config.tune_epochs, config.prune_epochs)

  random, middle = flags.crops(config)

  def begin(step):
    return data.stream(
      *where,
      seed=config.seed,
      batch=config.batch,
      epochs=epochs,
      start=step,
      rows=rest,
      transform=random,
    )

  def whole(rows):
    one = {'seed': 0, 'batch': len(rows), 'epochs': 1, 'rows': rows}
    return next(data.stream(*where, **one, transform=middle))

  held = None
  if held_rows.size:
    held = train.Examples(*map(jnp.asarray, whole(held_rows)))
  sample, _ = whole(_spread(count))
  return Source(train.Stream(begin, len(rest)), held, len(rest), sample)


def _spread(size: int) -> np.ndarray:
  """Returns at most ``SAMPLE`` rows at equal distances."""
  return np.arange(0, size, -(-size // SAMPLE))
