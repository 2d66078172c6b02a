"""How often units are active, and weights scaled by it (LAP-act)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.scores.lookahead.wiring import Wiring, complement


@kinds.checked
def activation_rates(
  capture: Callable[[Any], Mapping[str, jax.Array]], batches: Iterable[Any]
) -> dict[str, jax.Array]:
  """Returns how often each unit is active, over all samples of all batches.

  Args:
    capture: batch -> activations by path of the kernel that makes them,
      float[batch, ..., channels], after the ReLU and before any pooling.
    batches: any iterable of what ``capture`` takes.

  Returns:
    path -> float32[..., channels] in [0, 1].

  Raises:
    ValueError: if there is no batch.

  Examples:
    >>> capture = lambda x: {'kernel': jax.nn.relu(x)}
    >>> print(activation_rates(capture, [jnp.array([[1.0, -1.0], [2.0, 3.0]])]))
    {'kernel': Array([1. , 0.5], dtype=float32)}
  """
  active = lambda x: jnp.sum((x > 0).astype(jnp.float32), 0)
  count = jax.jit(lambda batch: jax.tree.map(active, dict(capture(batch))))
  total, samples = None, 0
  for batch in batches:
    size = jax.tree.leaves(batch)[0].shape[0]
    found = count(batch)
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    samples += size
  if total is None:
    raise ValueError('activation_rates needs at least one batch, got none.')
  return jax.tree.map(lambda x: x / samples, total)


@kinds.checked
def scale_by_activation(
  params: tree.PyTree, wiring: Wiring, rates: Mapping[str, jax.Array]
) -> tree.PyTree:
  """Returns params whose outputs are scaled by how often they are active.

  LAP-act is :func:`lookahead` of the result: output j of a leaf times s_j, the
  sum over positions of sqrt(rate_j), a plain square root in a dense layer.

  Args:
    params: a pytree of arrays.
    wiring: as for :func:`lookahead`; its last leaf needs no rates.
    rates: path -> float[..., channels] from :func:`activation_rates`; several
      axes where the kernel writes several, such as heads.

  Raises:
    ValueError: if rates name a leaf that writes nothing, or do not fit it.

  References:
    Park et al. (2020), arXiv:2002.04809; the sum over positions follows the
    authors' code.

  Examples:
    >>> from jaxprune.scores.lookahead import chain
    >>> params = {'a': jnp.ones((1, 2)), 'b': jnp.ones((2, 1))}
    >>> rates = {'a': jnp.array([0.25, 1.0])}
    >>> wiring = chain(params, ['a', 'b'])
    >>> print(scale_by_activation(params, wiring, rates)['a'])
    [[0.5 1. ]]
  """
  sides = {path: wire.writes for path, wire in wiring.items()}
  for path in rates:
    if sides.get(path) is None:
      raise ValueError(
        f'Rates of {path!r} belong to no output of the wiring; the leaves are: '
        f'{", ".join(wiring)}.'
      )

  def scale(path, w):
    if path not in rates:
      return w
    side = sides[path]
    assert side is not None
    s = jnp.sqrt(rates[path])
    s = jnp.sum(s, tuple(range(s.ndim - len(side.axes)))).astype(w.dtype)
    spanned = tuple(w.shape[axis] for axis in side.axes)
    if s.shape != spanned:
      raise ValueError(
        f'Rates of {path!r} must have channels of shape {spanned} last, got '
        f'the shape {rates[path].shape}.'
      )
    return w * jnp.expand_dims(s, complement(w.ndim, side.axes))

  return tree.map_with_path(scale, params)
