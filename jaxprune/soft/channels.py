"""PDP over channels: soft masks of whole groups, where they can be seen.

A mask on the kernel that makes a channel is invisible behind a BatchNorm in
training, which divides it out again, and after hardening the norm's bias keeps
the channel alive. So the mask of a unit acts on the rows of the kernels that
read it, once on every path, and what PDP closes can be removed for real. The
two functions that this needs come from the traced structure, as data::

  graph = jaxprune.trace(fn, params, x)
  channels = Channels(
    reduce=lambda p: graph.reduce(tree.prunable(p)),
    scale=lambda p, units: structure.scale(graph, p, units),
  )
  state = init(params, channels, pruned={...})
  loss = lambda p, state, batch: task(fn(pdp(p, state, channels), batch))

The hardened masks are those of groups, for ``plans.from_masks`` and ``shrink``.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import tree
from jaxprune.checks import kinds
from jaxprune.numerics import floats
from jaxprune.soft import weights

Groups = Mapping[str, Any]  # Name of a group -> array of its size.


class Channels(NamedTuple):
  """What of a network counts as a channel."""

  reduce: Callable[[tree.PyTree], Groups]  # Params -> the norm of each unit.
  scale: Callable[[tree.PyTree, Groups], tree.PyTree]  # Params, factors.


@kinds.checked
def init(
  params: tree.PyTree,
  channels: Channels,
  sparsity: float | jax.Array | Mapping[str, float] | None = None,
  *,
  pruned: Mapping[str, int] | None = None,
  which: tree.Which = None,
  tau: float | jax.Array = 0.0,
  c: float | jax.Array = 0.25,
) -> weights.PDPState:
  """Returns the state of :func:`pdp` at the end of the dense warm-up.

  Args:
    params: the params after warm-up.
    channels: the norms and what factors act on.
    sparsity: fraction of closed channels, as :func:`jaxprune.soft.pdp_init`
      takes it: one global threshold of the norms, or rules over groups.
    pruned: group -> channels to close, such as a budget's plan leaves out.
    which: groups that may close; all by default.
    tau: as for :func:`jaxprune.soft.pdp_init`, in units of a squared norm.
      The published 1e-4 makes masks of channels hard: their norms are larger
      than a weight by the square root of its fan-in.
    c: as for :func:`jaxprune.soft.pdp_init`.

  Returns:
    A :class:`jaxprune.soft.PDPState` of groups, with ramp 0.

  Raises:
    ValueError: as :func:`jaxprune.soft.pdp_init`, or as ``channels.scale``
      does of a group that may close and that it cannot close.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> init(params, kernel_channels(params), 0.5).pruned
    {'kernel': Array(1, dtype=uint32)}
  """
  state = weights.pdp_init(
    channels.reduce(params),
    sparsity,
    pruned=pruned,
    which=_everything if which is None else which,
    tau=tau,
    c=c,
  )
  # What cannot be closed is named now, not where training first closes it.
  closing = lambda p: channels.scale(
    p, _present(weights.mask(channels.reduce(p), state))
  )
  jax.eval_shape(closing, params)
  return state


@kinds.checked
def pdp(
  params: tree.PyTree,
  state: weights.PDPState,
  channels: Channels,
  *,
  through: bool = False,
) -> tree.PyTree:
  """Returns the params with the soft mask of each channel on its readers.

  m_j = sigmoid((u_j^2 - t^2) / (tau + c t^2)) with u = reduce(params), the
  norms of the current weights, and t halfway between the norms to keep and to
  prune; then scale(params, m).

  Args:
    params: any pytree.
    state: from :func:`init`.
    channels: the norms and what factors act on.
    through: whether gradients flow through t.

  Returns:
    Like ``params``, of the same dtypes. Once hardened, what ``scale`` acts on
    is exactly zero for closed channels.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203, for norms of filters; whole
    groups and the readers' rows are ours.

  Examples:
    >>> params = {'a': jnp.array([[3.0, 4.0]]), 'b': jnp.array([[1.0], [1.0]])}
    >>> channels = Channels(
    ...   reduce=lambda p: {'hidden': jnp.abs(p['a'][0])},
    ...   scale=lambda p, g: {**p, 'b': g['hidden'][:, None] * p['b']},
    ... )
    >>> hard = harden(params, init(params, channels, 0.5), channels)
    >>> print(pdp(params, hard, channels)['b'])
    [[0.]
     [1.]]
  """
  if state.masks is not None:
    return close(params, state.masks, channels)
  gates = weights.mask(channels.reduce(params), state, through=through)
  return channels.scale(params, _present(gates))


@kinds.checked
def harden(
  params: tree.PyTree, state: weights.PDPState, channels: Channels
) -> weights.PDPState:
  """Returns the state with the masks of groups frozen into it, exact counts.

  Args:
    params: the params after training.
    state: from :func:`init`.
    channels: the norms and what factors act on.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> channels = kernel_channels(params)
    >>> hard = harden(params, init(params, channels, 0.5), channels)
    >>> print(hard.masks['kernel'])
    [ True False]
  """
  return weights.harden(channels.reduce(params), state)


@kinds.checked
def close(
  params: tree.PyTree, masks: Groups, channels: Channels
) -> tree.PyTree:
  """Returns the params with exact zeros where closed channels are read.

  Args:
    params: any pytree.
    masks: group -> bool, True = kept.
    channels: what factors act on.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, 1.0], [4.0, 2.0]])}
    >>> masks = {'kernel': jnp.array([True, False])}
    >>> print(close(params, masks, kernel_channels(params))['kernel'])
    [[3. 0.]
     [4. 0.]]
  """
  cut = lambda w, mask: jnp.where(mask, w, 0)
  return jax.tree.map(cut, params, leaf_masks(params, masks, channels))


@kinds.checked
def leaf_masks(
  params: tree.PyTree, masks: Groups, channels: Channels
) -> tree.PyTree:
  """Returns which entries of the params open channels leave alive.

  Args:
    params: any pytree.
    masks: group -> bool, True = kept.
    channels: what factors act on.

  Returns:
    A pytree like ``params`` of bool.

  Examples:
    >>> params = {'kernel': jnp.ones((1, 2)), 'bias': jnp.ones(2)}
    >>> channels = kernel_channels(params)
    >>> masks = {'kernel': jnp.array([True, False])}
    >>> leaf_masks(params, masks, channels)['kernel'].tolist()
    [[True, False]]
  """
  floats = lambda mask: mask.astype(jnp.float32)
  ones = jax.tree.map(jnp.ones_like, params)
  gates = {name: floats(mask) for name, mask in _present(masks).items()}
  return jax.tree.map(lambda x: x != 0, channels.scale(ones, gates))


@kinds.checked
def kernel_channels(
  params: tree.PyTree, *, which: tree.Which = None, axis: int = -1
) -> Channels:
  """Returns channels that are filters, masked on their own kernels.

  u_j = ||W[..., j]||_2, the published channel form of PDP. It warns where the
  params hold what looks like the scale of a norm (a vector called scale, gamma
  or weight) as long as a kernel is wide.

  Args:
    params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    which: the kernels, as for :func:`jaxprune.tree.prunable`.
    axis: the output axis of every kernel; -1 for Flax.

  Returns:
    :class:`Channels`; a group is a kernel, by path.

  Raises:
    ValueError: as :func:`jaxprune.tree.prunable`.

  References:
    Cho, Adya and Naik (2023), arXiv:2305.11203, confirmed from code.

  Examples:
    >>> params = {'kernel': jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> print(kernel_channels(params).reduce(params)['kernel'])
    [5. 2.]
  """
  kernels = tree.leaves(tree.prunable(params, which))
  widths = {w.shape[axis]: path for path, w in kernels.items()}
  for path, leaf in tree.leaves(params).items():
    is_scale = path.endswith(('scale', 'gamma', 'weight'))
    if is_scale and len(leaf.shape) == 1 and leaf.size in widths:
      warnings.warn(
        f'{path!r} looks like the norm behind {widths[leaf.size]!r}: in '
        f'training it divides a mask on that kernel out again, and its bias '
        f'keeps a closed channel alive. Mask the rows of the kernels that '
        f'read the channels: scale=lambda p, units: '
        f'jaxprune.structure.scale(graph, p, units).',
        stacklevel=2,
      )
      break

  def reduce(params):
    named = tree.leaves(params)
    _check_kernels(named, kernels)
    return {path: _norm(named[path], axis) for path in kernels}

  def scale(params, groups):
    _check_gates(groups, kernels, axis)

    def one(path, w):
      if path not in groups:
        return w
      factor = jnp.expand_dims(groups[path], _others(w, axis))
      return (w * factor).astype(w.dtype)

    return tree.map_with_path(one, params)

  return Channels(reduce, scale)


def _check_kernels(
  params: Mapping[str, Any], kernels: Mapping[str, Any]
) -> None:
  missing = [path for path in kernels if path not in params]
  if missing:
    raise ValueError(
      '`params` must be those that the channels are of; not there: '
      f'{", ".join(missing)}.'
    )


def _check_gates(groups: Groups, kernels: Mapping[str, Any], axis: int) -> None:
  odd = [
    f'{path!r} {np.shape(x)}'
    for path, x in groups.items()
    if path in kernels and np.shape(x) != (kernels[path].shape[axis],)
  ]
  if odd:
    raise ValueError(
      'A mask of channels has an entry for each of its kernel; of others: '
      f'{", ".join(odd)}.'
    )


def _norm(w: jax.Array, axis: int) -> jax.Array:
  # Squares must not leave the range that the norms themselves are in.
  (_, exponent), *_ = floats.split(jax.lax.stop_gradient(w))
  scale = floats.power(jnp.clip(exponent, -120, 120), jnp.float32)
  total = jnp.sum(jnp.square(w.astype(jnp.float32) / scale), _others(w, axis))
  # The gradient of a filter of zeros is zero, not 0 / 0.
  root = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)
  return scale * root


def _others(w: Any, axis: int) -> tuple[int, ...]:
  return tuple(i for i in range(len(w.shape)) if i != axis % len(w.shape))


def _present(groups: Groups) -> dict[str, Any]:
  """Returns the groups that may close."""
  return {
    name: x for name, x in groups.items() if not isinstance(x, optax.MaskedNode)
  }


def _everything(*_: Any) -> bool:
  return True
