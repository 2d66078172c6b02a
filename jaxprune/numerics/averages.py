"""Sums and means of a function of the params over batches, in one compile."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import tree


def total(
  fn: Callable[[Any, Any, Any], tree.PyTree],
  params: tree.PyTree,
  chosen: tree.PyTree,
  batches: Iterable[Any],
) -> tuple[tree.PyTree, int]:
  """Returns the sum of fn(params, chosen, batch), and how many batches."""

  @jax.jit
  def add(sums, params, chosen, batch):
    return jax.tree.map(jnp.add, sums, fn(params, chosen, batch))

  def zeros(x):
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

  sums, count = None, 0
  for batch in batches:
    if sums is None:
      shapes = jax.eval_shape(fn, params, chosen, batch)
      sums = jax.tree.map(zeros, shapes)
    sums = add(sums, params, chosen, batch)
    count += 1
  if sums is None:
    raise ValueError('A score over batches needs at least one, got none.')
  return sums, count


def mean(
  fn: Callable[[Any, Any, Any], tree.PyTree],
  params: tree.PyTree,
  chosen: tree.PyTree,
  batches: Iterable[Any],
) -> tree.PyTree:
  """Returns the mean of fn(params, chosen, batch) over batches."""
  sums, count = total(fn, params, chosen, batches)
  return jax.tree.map(lambda x: x / count, sums)
