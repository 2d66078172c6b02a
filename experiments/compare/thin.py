"""Training of a thinned-out stack of dense layers by its weights alone.

A masked layer costs what the dense one costs. Below a few per cent of the
weights it is cheaper to hold the values that are left and their places, and to
sum w_ij x_i over them: on one core a step of five seeds of 784-500x4-10 takes
2.7 ms instead of 31 at 0.4 % of the weights, and is even at 1.6 %.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Places(NamedTuple):
  """Where the weights of a layer are; filled up beyond the last column."""

  rows: jax.Array  # int32, [seeds, weights].
  columns: jax.Array  # int32, [seeds, weights].


def pack(
  params: Any, masks: Any, layers: Sequence[str]
) -> tuple[list[Any], list[Places]]:
  """Returns the values that are left, layer by layer, and their places.

  Args:
    params: of an ``MLP``, with a leading axis of seeds.
    masks: bool, like params.
    layers: the names of the layers, in the order of the network.

  Returns:
    (values, places) of each layer: a dict of its bias and its kernel, now of
    shape [seeds, weights]. Kernels with fewer weights than another seed's are
    filled up with zeros.
  """
  values, places = [], []
  for name in layers:
    kernel = np.asarray(params[name]['kernel'])
    kept = [np.argwhere(mask) for mask in np.asarray(masks[name]['kernel'])]
    size = max(1, *map(len, kept))
    fill = np.array([0, kernel.shape[-1]])
    at = np.stack(
      [np.concatenate([k, np.tile(fill, (size - len(k), 1))]) for k in kept]
    )
    rows, columns = at[..., 0], at[..., 1]
    seeds = np.arange(len(kernel))[:, None]
    inside = columns < kernel.shape[-1]
    found = kernel[seeds, rows, np.where(inside, columns, 0)]
    left = jnp.asarray(np.where(inside, found, 0), kernel.dtype)
    values.append({'bias': params[name]['bias'], 'kernel': left})
    places.append(
      Places(jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32))
    )
  return values, places


def unpack(
  values: Sequence[Any],
  places: Sequence[Places],
  layers: Sequence[str],
  like: Any,
) -> Any:
  """Returns the params of the dense stack, with zeros in between."""

  def kernel(name, value, at):
    zeros = jnp.zeros_like(like[name]['kernel'])
    put = lambda z, at, v: z.at[at.rows, at.columns].set(v, mode='drop')
    return jax.vmap(put)(zeros, at, value)

  found = zip(layers, values, places, strict=True)
  return {
    name: {'bias': v['bias'], 'kernel': kernel(name, v['kernel'], at)}
    for name, v, at in found
  }


def apply(
  values: Sequence[Any], places: Sequence[Places], images: jax.Array
) -> jax.Array:
  """Returns the logits of one seed.

  Args:
    values: of one seed, from :func:`pack`.
    places: of one seed.
    images: float, [batch, ...].
  """
  x = images.reshape(len(images), -1).T  # A row for each unit.
  for i, (value, at) in enumerate(zip(values, places, strict=True)):
    x = jax.nn.relu(x) if i else x
    terms = value['kernel'][:, None] * x[at.rows]
    sums = jax.ops.segment_sum(terms, at.columns, len(value['bias']))
    x = sums + value['bias'][:, None]
  return x.T
