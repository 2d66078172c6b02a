"""What searches for a smaller network share: data and training."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evidence, flags, recipes, train
from jaxprune import data
from jaxprune.io import checkpoint


class Splits(NamedTuple):
  """The data of a search."""

  examples: train.Examples
  held: train.Examples
  test: train.Examples
  classes: int
  prepare: Callable[[jax.Array], jax.Array]


def load(
  dataset: str,
  data_dir: str | None,
  *,
  subset: int,
  side: int,
  validation: float,
  seed: int,
) -> Splits:
  """Returns the splits of a data set.

  Args:
    dataset: its name.
    data_dir: where TFDS prepared it.
    subset: training images to use, equally many of a class; 0 for all.
    side: of the images, shrunk to it; 0 for as they are.
    validation: part of the training images that is held out.
    seed: that draws the part.

  Raises:
    BadInputError: if nothing would be held out, or the subset does not fit.
    DataError: if the data are missing or damaged.
  """
  training = data.load(dataset, 'train', data_dir)
  test = data.load(dataset, 'test', data_dir)
  rows = np.arange(len(training.labels))
  if subset:
    try:
      rows = evidence.subset(training.labels, subset)
    except ValueError as error:
      raise flags.BadInputError(f'--subset={subset}: {error}') from None
  images = to_side(training.images[rows], side)
  examples, held = train.split_off(
    images, training.labels[rows], validation, seed
  )
  if held is None:
    raise flags.BadInputError('--validation holds out no image.')
  tested = train.Examples(
    jnp.asarray(to_side(test.images, side)), jnp.asarray(test.labels)
  )
  return Splits(
    examples, held, tested, len(training.classes), train.preparation(images)
  )


def to_side(images: np.ndarray, side: int) -> np.ndarray:
  """Returns images resized to a side, bilinearly; 0 for as they are."""
  if not side or side == images.shape[1]:
    return images
  shape = (len(images), side, side, images.shape[3])
  small = jax.image.resize(images.astype(np.float32), shape, 'bilinear')
  if images.dtype.kind in 'ui':
    info = np.iinfo(images.dtype)
    small = np.clip(np.round(small), info.min, info.max)
  return np.asarray(small).astype(images.dtype)


def train_from_scratch(
  module: Any,
  splits: Splits,
  folder: pathlib.Path,
  *,
  seed: int,
  epochs: int,
  batch: int,
  rate: float,
  decay: float,
  change: train.Augment,
  save_every: int,
) -> float:
  """Returns the test accuracy of a Linen module after its last epoch.

  Args:
    module: the network.
    splits: the data.
    folder: of its checkpoints.
    seed: of the params, and of the order of the examples.
    epochs: passes over the data.
    batch: examples of a step.
    rate: the highest.
    decay: pull of the kernels towards zero.
    change: augmentation.
    save_every: steps between two checkpoints.
  """
  x = splits.prepare(splits.examples.images[:1])
  variables = dict(jax.jit(module.init)(jax.random.key(seed), x))
  tx = recipes.sgd(rate, decay, len(splits.examples.labels) // batch * epochs)
  step = train.make_step(module.apply, tx, splits.prepare, change=change)
  params = variables.pop('params')
  state = train.State(params, variables, tx.init(params))
  state = fit(
    step, state, splits.examples, folder,
    seed=seed, epochs=epochs, batch=batch, save_every=save_every,
  )  # fmt: skip
  evaluate = train.make_evaluate(module.apply, splits.prepare)
  return evaluate(train.variables(state), splits.test)


def fit(
  step: train.Step,
  state: train.State,
  examples: train.Examples,
  folder: pathlib.Path,
  *,
  seed: int,
  epochs: int,
  batch: int,
  save_every: int,
) -> train.State:
  """Returns the state after the last epoch; resumes by itself.

  Args:
    step: of :func:`experiments.train.make_step`.
    state: at first; it is not taken over.
    examples: to train on.
    folder: of the checkpoints.
    seed: of the order of the examples.
    epochs: passes over them.
    batch: examples of a step.
    save_every: steps between two checkpoints, and at the end of an epoch.
  """
  run = train.make_runner(step, seed=seed, batch=batch)
  count = len(examples.labels) // batch
  state, number = train.own(state), 0
  with checkpoint.Checkpointer(folder, keep=2) as keeper:
    if keeper.steps():
      number, state, _ = keeper.restore(jax.eval_shape(lambda: state))
    while number < epochs * count:
      epoch, begin = divmod(number, count)
      end = min(begin + save_every, count)
      state, _ = run(state, examples, epoch, begin, end)
      number += end - begin
      keeper.save(number, state)
  return state
