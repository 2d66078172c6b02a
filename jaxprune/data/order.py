"""Which examples a step sees, as a function of (seed, epoch, step)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import kinds


@kinds.checked
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


@kinds.checked
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


@kinds.checked
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
