"""Masks from scores: exact counts for elements, N:M groups, blocks, channels.

A mask is bool and True means kept. The functions here work on one leaf;
``top`` and what follows it on pytrees, in which a leaf that is not pruned is
``optax.MaskedNode()``.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import checks
from jaxprune import tree as tree_lib
from jaxprune.checks import kinds
from jaxprune.numerics import counts as counts_lib
from jaxprune.numerics import floats, select, sharding
from jaxprune.numerics.counts import kept

_WIDE = 1 << 31  # From so many entries on an int32 may not hold a count.


@kinds.checked
def top(
  scores: tree_lib.Arrays,
  sparsity: float | jax.Array | tree_lib.PyTree,
) -> tree_lib.PyTree:
  """Returns masks that keep the best n - round(s n) entries of each leaf.

  Rounding is half to even; equal scores are settled by position, the lower
  index is kept.

  Args:
    scores: pytree of scores, finite; ``optax.MaskedNode()`` where dense.
    sparsity: s in [0, 1] for all leaves, or a pytree of them like ``scores``;
      static or traced (see :func:`kept`).

  Raises:
    ValueError: if scores are not finite (checked outside of a trace; under
      one, NaN counts as the lowest score) or a static s is out of range.

  Examples:
    >>> top({'kernel': jnp.array([1.0, 3.0, 2.0, 0.5])}, 0.5)['kernel'].tolist()
    [False, True, True, False]
  """
  check_finite(scores)
  if jax.tree_util.all_leaves([sparsity]):
    sparsity = jax.tree.map(lambda _: sparsity, scores)
  tree_lib.check_alike('Fractions', sparsity, scores)
  odd = [
    f'{path} {np.shape(x)}'
    for path, x in tree_lib.leaves(sparsity).items()
    if np.ndim(x)
  ]
  if odd:
    raise ValueError(
      f'A sparsity must be a number, got arrays: {", ".join(odd)}.'
    )
  counts = jax.tree.map(lambda x, s: kept(x.size, s), scores, sparsity)
  return select.top_masks(scores, counts)


@kinds.checked
def check_finite(scores: tree_lib.PyTree) -> None:
  """Raises if scores are not finite; does nothing under a trace.

  Args:
    scores: pytree of scores.

  Raises:
    ValueError: naming every leaf that holds NaN or infinity.
  """
  leaves = tree_lib.leaves(scores)
  if not all(map(checks.is_static, leaves.values())):
    return
  finite = {k: jnp.isfinite(x).all() for k, x in leaves.items()}
  if not all(map(checks.is_static, finite.values())):
    return  # Constants, inside of a trace.
  bad = [path for path, fine in jax.device_get(finite).items() if not fine]
  if bad:
    raise ValueError(
      'Scores must be finite; NaN or infinity in: '
      f'{", ".join(path or "the array" for path in bad)}. Weights '
      'that diverged cannot be ranked.'
    )


@kinds.checked
def n_by_m(
  score: jax.Array,
  n: int | jax.Array,
  m: int,
  *,
  axis: int = -2,
) -> jax.Array:
  """Keeps the best n of every m consecutive entries along an axis.

  An entry is kept if fewer than n others of its group are better, or equal
  and before it; NaN is below everything. No sort: m comparisons of the whole
  array.

  Args:
    score: any shape; floating.
    n: how many of each group to keep, 0 <= n <= m; static or traced.
    m: size of a group; static, divides the axis.
    axis: the axis a group lies along. -2 is the input axis of Linen kernels
      (in, out) and (height, width, in, out), which hardware contracts over.

  Returns:
    bool, the shape of ``score``.

  Raises:
    TypeError: if n or m is no integer.
    ValueError: if n and m do not satisfy 0 <= n <= m, or m does not divide the
      axis.

  References:
    Zhou et al., 2021, arXiv:2102.04010, Section 3.

  Examples:
    >>> n_by_m(jnp.array([3.0, 1.0, 2.0, 4.0]), 2, 4, axis=0).tolist()
    [True, False, False, True]
  """
  checks.whole('n', n)
  checks.whole('m', m)
  if m < 1 or (isinstance(n, int | np.integer) and not 0 <= n <= m):
    raise ValueError(f'N:M needs 0 <= n <= m and m >= 1, got n={n}, m={m}.')
  axis = _axis(axis, score.ndim)
  if score.shape[axis] % m:
    raise ValueError(
      f'm = {m} must divide axis {axis} of shape {score.shape}; choose another '
      'axis, or keep the leaf dense.'
    )
  shape, given = score.shape, score
  if shape[axis] // m % sharding.parts(score)[axis]:
    score = sharding.whole(score)  # A group would lie on two devices.
  groups = score.reshape(*shape[:axis], -1, m, *shape[axis + 1 :])
  parts = [jnp.take(groups, i, axis=axis + 1) for i in range(m)]
  ranks = [jnp.zeros(parts[0].shape, jnp.uint8 if m < 256 else jnp.int32)] * m
  for i in range(m):
    for j in range(i):
      first = (parts[j] >= parts[i]) | jnp.isnan(parts[i])
      ranks[i] = ranks[i] + first.astype(ranks[i].dtype)
      ranks[j] = ranks[j] + (~first).astype(ranks[j].dtype)
  keep = jnp.asarray(n).astype(ranks[0].dtype)
  keeps = jnp.stack([r < keep for r in ranks], axis + 1).reshape(shape)
  return sharding.like(keeps, given)


@kinds.checked
def block_means(score: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
  """Returns the mean score of every block; a ragged edge is its own block.

  Args:
    score: any shape; floating.
    sizes: length of a block along each axis; those of ``score`` at most count.

  Returns:
    Array of ceil(shape / sizes), in float32 or wider; ``score`` itself for
    blocks of one entry.

  Examples:
    >>> block_means(jnp.array([1.0, 3.0, 5.0]), (2,)).tolist()
    [2.0, 5.0]
  """
  if all(size == 1 for size in sizes):
    return score
  # Sums must not leave the range that the scores themselves are in.
  score, exponent = floats.split(sharding.whole(score))[0]
  counts = 1
  for axis, size in enumerate(sizes):
    length = score.shape[axis]
    blocks = -(-length // size)
    pads = [(0, 0)] * score.ndim
    pads[axis] = (0, blocks * size - length)
    shape = (*score.shape[:axis], blocks, size, *score.shape[axis + 1 :])
    score = jnp.sum(jnp.pad(score, pads).reshape(shape), axis=axis + 1)
    lengths = np.minimum(size, length - size * np.arange(blocks))
    along = [1] * len(sizes)
    along[axis] = blocks
    counts = counts * lengths.reshape(along)
  means = score / jnp.asarray(counts, score.dtype)
  return floats.join(floats.Scaled(means, exponent), most=127)


@kinds.checked
def spread(
  mask: jax.Array, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
  """Gives every entry of a block the mask of its block.

  Args:
    mask: bool, one per block.
    sizes: length of a block along each axis.
    shape: shape of the leaf.

  Examples:
    >>> spread(jnp.array([True, False]), (2,), (3,)).tolist()
    [True, True, False]
  """
  if mask.shape == tuple(shape):
    return mask
  mask = sharding.whole(mask)
  for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
    if mask.shape[axis] == 1:
      repeats = [*mask.shape]
      repeats[axis] = length
      mask = jnp.broadcast_to(mask, repeats)
    elif size > 1:
      mask = jnp.repeat(mask, size, axis=axis)
      mask = jax.lax.slice_in_dim(mask, 0, length, axis=axis)
  return mask


class Blocks(NamedTuple):
  """A granularity: blocks of entries are kept or pruned as one.

  A block's score is the mean of its entries, and counts are counts of blocks.
  """

  sizes: Mapping[int, int | None]  # Axis -> length; None is the whole axis.
  others: int | None = 1  # Length along the axes that are not named.

  def along(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the length of a block along each axis of a leaf."""
    named = {_axis(axis, len(shape)): n for axis, n in self.sizes.items()}
    lengths = [named.get(axis, self.others) for axis in range(len(shape))]
    return tuple(
      max(1, n if size is None else min(size, n))
      for size, n in zip(lengths, shape, strict=True)
    )

  def problem(self, shape: tuple[int, ...]) -> str | None:
    """Returns why a leaf cannot be pruned so, or None."""
    beyond = [a for a in self.sizes if not -len(shape) <= a < len(shape)]
    if beyond:
      return f'it has no axis {beyond[0]}'
    named = [axis % len(shape) for axis in self.sizes]
    twice = [a for a in self.sizes if named.count(a % len(shape)) > 1]
    return f'axes {twice} are one axis of {shape}' if twice else None


class NByM(NamedTuple):
  """A granularity: n of every m consecutive entries along an axis are kept."""

  n: int
  m: int
  axis: int | None = None

  def problem(self, shape: tuple[int, ...], path: str = '') -> str | None:
    """Returns why a leaf cannot be pruned so, or None."""
    axis = self.axis
    if axis is None:
      if len(shape) not in (2, 4) or path.rsplit('/', 1)[-1] == 'weight':
        return f'its layout {shape} is not known; say the axis'
      axis = -2
    if not -len(shape) <= axis < len(shape):
      return f'it has no axis {axis}'
    if shape[axis] == 1:
      return f'axis {axis} has length 1 (a depthwise kernel?); say the axis'
    if shape[axis] % self.m:
      return f'{self.m} does not divide axis {axis} of {shape}'
    return None


Granularity = Blocks | NByM


@kinds.checked
def elements() -> Blocks:
  """Granularity of single entries: unstructured pruning."""
  return Blocks({})


@kinds.checked
def blocks(sizes: Mapping[int, int | None]) -> Blocks:
  """Granularity of blocks; axes that are not named have length 1.

  Args:
    sizes: axis -> length of a block along it, or None for the whole axis.

  Raises:
    TypeError: if an axis or a length is no integer.
    ValueError: if a length is below 1.

  Examples:
    >>> blocks({-2: 4, -1: 4}).along((3, 3, 64, 64))
    (1, 1, 4, 4)
  """
  for axis, size in sizes.items():
    checks.whole('axis', axis)
    if size is not None:
      checks.whole(f'sizes[{axis}]', size)
  if any(size is not None and size < 1 for size in sizes.values()):
    raise ValueError(f'The sides of a block must be at least 1, got {sizes}.')
  return Blocks(dict(sizes))


@kinds.checked
def channels(axis: int = -1) -> Blocks:
  """Granularity of whole channels along an axis.

  Args:
    axis: -1 are the outputs (filters) of Linen kernels, -2 their inputs.

  Raises:
    TypeError: if the axis is no integer.

  Examples:
    >>> channels().along((3, 3, 16, 32))
    (3, 3, 16, 1)
  """
  return Blocks({checks.whole('axis', axis): 1}, others=None)


@kinds.checked
def groups(n: int, m: int, *, axis: int | None = None) -> NByM:
  """Granularity of N:M groups, such as 2:4.

  Args:
    n: how many of each group are kept, 1 <= n <= m.
    m: size of a group.
    axis: the axis a group lies along. By default axis -2 of kernels with two
      or four axes; any other layout, and PyTorch's ``weight``, is refused
      until the axis is said.

  Raises:
    TypeError: if n, m or the axis is no integer.
    ValueError: if n and m do not satisfy 1 <= n <= m.

  Examples:
    >>> groups(2, 4).problem((6, 8))
    '4 does not divide axis -2 of (6, 8)'
  """
  checks.whole('n', n)
  checks.whole('m', m)
  if axis is not None:
    checks.whole('axis', axis)
  if not 1 <= n <= m:
    raise ValueError(f'N:M needs 1 <= n <= m, got n={n}, m={m}.')
  return NByM(n, m, axis)


@kinds.checked
def apply(masks: tree_lib.Arrays, params: tree_lib.Arrays) -> tree_lib.Arrays:
  """Returns params with exact zeros where pruned.

  w where mask else 0, so that what is not finite does not get past a mask.

  Args:
    masks: pytree of bool like ``params``; ``optax.MaskedNode()`` where dense.
    params: pytree of arrays.

  Raises:
    TypeError: naming every mask that is not bool.
    ValueError: naming every mask whose shape is not its leaf's.

  Examples:
    >>> params = {'w': jnp.array([2.0, 3.0])}
    >>> apply({'w': jnp.array([True, False])}, params)['w']
    Array([2., 0.], dtype=float32)
  """
  check_like(masks, params)
  return jax.tree.map(
    lambda w, mask: w if is_dense(mask) else jnp.where(mask, w, 0),
    params,
    masks,
  )


@kinds.checked
def check_like(masks: tree_lib.Arrays, params: tree_lib.Arrays) -> None:
  """Raises unless masks are bool and have the shapes of their leaves.

  Args:
    masks: pytree of masks.
    params: pytree of arrays.

  Raises:
    TypeError: naming every mask that is not bool.
    ValueError: naming every leaf that differs.
  """
  check_bool(masks)
  bad = []

  def look(path, w, mask):
    if not is_dense(mask) and np.shape(mask) != np.shape(w):
      bad.append(
        f'mask of {path!r} must have shape {np.shape(w)}, got {np.shape(mask)}'
      )

  tree_lib.check_alike('Masks', masks, params)
  tree_lib.map_with_path(look, params, masks)
  if bad:
    raise ValueError('; '.join(bad) + '.')


@kinds.checked
def check_bool(masks: tree_lib.Arrays) -> None:
  """Raises unless masks are bool: bytes of packed ones and floats are not.

  Args:
    masks: pytree of masks.

  Raises:
    TypeError: naming every leaf of another type, and how to make masks of it.

  Examples:
    >>> check_bool({'w': jnp.array([True, False]), 'b': optax.MaskedNode()})
  """
  named = tree_lib.leaves(masks)
  whole = [f'{k} ({x!r})' for k, x in named.items() if not hasattr(x, 'dtype')]
  if whole:
    raise TypeError(
      f'A mask is an array of bool in the shape of its leaf, got: '
      f'{", ".join(whole)}. For a leaf that is kept whole give '
      'optax.MaskedNode(), or an array of ones.'
    )
  dtypes = {k: x.dtype for k, x in named.items()}
  odd = [f'{path} ({x})' for path, x in dtypes.items() if x != jnp.bool_]
  if not odd:
    return
  remedy = 'Compare it: mask != 0'
  if all(x in (bool, jnp.uint8) for x in dtypes.values()):
    remedy = 'Eight of them in a byte: masks.unpacked(masks, params) unpacks'
  raise TypeError(
    f'A mask is bool, True = kept; of another type: {", ".join(odd)}. {remedy}.'
  )


@kinds.checked
def is_dense(mask: Any) -> bool:
  """Whether a place in a tree of masks says that the leaf is not pruned."""
  return isinstance(mask, optax.MaskedNode)


@kinds.checked
def count(masks: tree_lib.Arrays) -> dict[str, tuple[int, int]]:
  """Returns (kept, size) of every masked leaf by path, as exact ints.

  Args:
    masks: pytree of bool, concrete; packed ones do not know their size, and
      need :func:`unpacked` first.

  Raises:
    TypeError: naming every mask that is not bool.

  Examples:
    >>> count({'w': jnp.array([True, False, True])})
    {'w': (2, 3)}
  """
  check_bool(masks)
  rows = {}
  for path, mask in tree_lib.leaves(masks).items():
    if mask.size < _WIDE:
      rows[path] = (int(jnp.sum(mask)), mask.size)
    else:
      high, low = counts_lib.true([mask])
      rows[path] = ((int(high[0]) << 16) + int(low[0]), mask.size)
  return rows


@kinds.checked
def sparsity(masks: tree_lib.Arrays) -> float:
  """Returns the fraction of zeros over all masked leaves, in float64.

  Args:
    masks: pytree of bool, concrete, as for :func:`count`.

  Raises:
    TypeError: naming every mask that is not bool.

  Examples:
    >>> sparsity({'w': jnp.array([True, False]), 'b': optax.MaskedNode()})
    0.5
  """
  rows = count(masks).values()
  size = sum(n for _, n in rows)
  return 1 - sum(k for k, _ in rows) / size if size else 0.0


@kinds.checked
def pack(masks: tree_lib.Arrays) -> tree_lib.Arrays:
  """Stores eight masks in a byte.

  Args:
    masks: pytree of bool.

  Returns:
    pytree of uint8 of shape [ceil(size / 8)].

  Raises:
    TypeError: naming every mask that is not bool.

  Examples:
    >>> pack(jnp.array([True] + [False] * 8)).tolist()
    [128, 0]
  """
  check_bool(masks)
  bits = lambda mask: jnp.packbits(sharding.whole(mask).ravel())
  return jax.tree.map(bits, masks)


@kinds.checked
def unpack(packed: tree_lib.Arrays, params: tree_lib.Arrays) -> tree_lib.Arrays:
  """Undoes :func:`pack`.

  Args:
    packed: what :func:`pack` returned, or ``jax.vmap(pack)`` of masks with
      leading axes.
    params: pytree of arrays that has the shapes.

  Raises:
    TypeError: naming every leaf that is not uint8.
    ValueError: naming every leaf of which there are more or fewer bytes than
      its shape needs, or with bits set beyond its last entry, as uint8 masks of
      0 and 1 have.

  Examples:
    >>> unpack(pack(jnp.array([True, False])), jnp.zeros(2)).tolist()
    [True, False]
  """
  tree_lib.check_alike('Packed masks', packed, params)
  _check_packed(packed, params)

  def unpack_leaf(w, bits):
    if is_dense(bits):
      return bits
    size = math.prod(w.shape[bits.ndim - 1 :])
    mask = jnp.unpackbits(bits, axis=-1, count=size).astype(bool)
    return sharding.like(mask.reshape(w.shape), w)

  return jax.tree.map(unpack_leaf, params, packed)


def _check_packed(packed: tree_lib.PyTree, params: tree_lib.PyTree) -> None:
  """Raises unless bytes are those of :func:`pack` for leaves like params."""
  of_kind, of_size = [], []

  def look(path, w, bits):
    if is_dense(bits):
      return
    dtype = getattr(bits, 'dtype', type(bits).__name__)
    if dtype != jnp.uint8:
      of_kind.append(f'{path} ({dtype})')
      return
    shape, members = np.shape(w), np.shape(bits)[:-1]
    size = math.prod(shape[len(members) :])
    if np.shape(bits) != (*shape[: len(members)], -(-size // 8)):
      of_size.append(
        f'{path} of shape {shape} has {-(-math.prod(shape) // 8)} bytes, got '
        f'{np.shape(bits)}'
      )
    elif size % 8 and checks.is_static(bits):
      beyond = jnp.any(bits[..., -1] & (0xFF >> size % 8))
      if checks.is_static(beyond) and beyond:  # No constant inside of a trace.
        of_size.append(f'{path} has bits set beyond its {size} entries')

  tree_lib.map_with_path(look, params, packed)
  if of_kind:
    raise TypeError(
      f'Packed masks are uint8, of another type: {", ".join(of_kind)}. '
      'masks.pack(masks) makes them; masks that are bool need no unpacking.'
    )
  if of_size:
    raise ValueError(
      f'Packed masks do not fit: {"; ".join(of_size)}. Give what masks.pack '
      'made of masks of these shapes; of 0 and 1, mask != 0 makes bool.'
    )


@kinds.checked
def unpacked(
  masks: tree_lib.Arrays, params: tree_lib.Arrays
) -> tree_lib.Arrays:
  """Returns masks as bool, whether or not they are packed.

  Args:
    masks: pytree of bool, or of what :func:`pack` returned.
    params: pytree of arrays that has the shapes.

  Raises:
    TypeError: if some masks are packed and others are not.
    ValueError: as :func:`unpack`.

  Examples:
    >>> mask = jnp.array([True, False])
    >>> unpacked(pack(mask), mask).tolist(), unpacked(mask, mask).tolist()
    ([True, False], [True, False])
  """
  leaves = jax.tree.leaves(masks)
  if any(getattr(leaf, 'dtype', None) == jnp.uint8 for leaf in leaves):
    return unpack(masks, params)
  return masks


def _axis(axis: int, ndim: int) -> int:
  if not -ndim <= axis < ndim:
    raise ValueError(f'An array of {ndim} axes has no axis {axis}.')
  return axis % ndim
