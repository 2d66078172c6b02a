"""Exact order statistics and exact-count masks, without a sort.

A float is ranked by its *key*, the unsigned integer whose order is the order
of the floats, so that every answer is exact: the k-th largest entry is found
digit by digit from the counts of keys. Two ways lead there and agree on every
bit:

* histograms of 16-bit digits, over blocks that stay in cache: the fast way on
  one CPU device;
* a bisection of the key's bits, which needs nothing but sums: the way of
  accelerators and of sharded arrays, where a pass is one all-reduce of counts
  and no array is gathered.

Entries equal to the threshold are taken by position, lower index first, leaf
by leaf in the order of the pytree; this costs a pass only where there are more
of them than places. Counts are integers throughout.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import counts as counts_lib
from jaxprune import tree as tree_lib

Method = Literal['auto', 'histogram', 'bisection']
Keep = counts_lib.Keep
Limbs = counts_lib.Limbs

_ROW = 4096  # Keys per histogram block: 16 KiB, half of a first-level cache.
_BINS = 1 << 16


class Cutoff(NamedTuple):
  """What an entry of one leaf must exceed to be kept.

  An entry is kept where its key is above ``key``, or equals it while the
  entry's position (``lead``, ``trail``) comes before the one given here.
  """

  key: jax.Array  # Unsigned integer of the scores' width, shape [].
  lead: jax.Array  # Index over the leading axes; uint32, shape [].
  trail: jax.Array  # Index over the trailing axes; uint32, shape [].


def top_mask(
  x: jax.Array,
  keep: Keep,
  *,
  spec: jax.sharding.PartitionSpec | None = None,
  method: Method = 'auto',
) -> jax.Array:
  """Marks exactly the ``keep`` largest entries; the lower index wins a tie.

  mask_i = #{j : x_j > x_i} + #{j < i : x_j = x_i} < keep.

  Args:
    x: scores of any shape; float32, bfloat16, float16 or float64. Infinities
      rank as themselves, -0 equals 0, and NaN ranks below everything.
    keep: how many to mark, 0 <= keep <= x.size; a static int or a traced int32
      or uint32 scalar. From 2**32 on, a traced count is a pair of uint32
      (high, low), which stands for high * 2**16 + low.
    spec: inside ``jax.shard_map``, how the whole array is split over the mesh;
      counts and positions are then those of the whole array.
    method: ``'histogram'``, ``'bisection'``, or ``'auto'``: histograms on a
      single CPU device, bisection elsewhere and for sharded arrays.

  Returns:
    bool, the shape of ``x``, with exactly ``keep`` true entries.

  Raises:
    TypeError: if ``x`` is not floating.
    ValueError: if a static ``keep`` is out of range, or if histograms are
      asked for with ``spec`` or for 2**31 entries and more.

  Examples:
    >>> print(top_mask(jnp.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2))
    [False  True  True False False]
  """
  return top_masks([x], keep, specs=[spec], method=method)[0]


def top_masks(
  scores: tree_lib.PyTree,
  keep: Keep | tree_lib.PyTree,
  *,
  specs: tree_lib.PyTree | None = None,
  method: Method = 'auto',
) -> tree_lib.PyTree:
  """Marks exactly the largest entries of each leaf, or of the whole pytree.

  Args:
    scores: pytree of scores, as :func:`top_mask` takes them. A leaf that is
      not pruned is ``optax.MaskedNode()`` and stays so.
    keep: a pytree of counts, one per leaf (or limbs of shape [leaves]), or one
      count for all leaves together (then equal scores are taken in the order
      of the leaves).
    specs: inside ``jax.shard_map``, a pytree of PartitionSpecs like
      ``scores``.
    method: see :func:`top_mask`.

  Returns:
    pytree of bool like ``scores``.

  Raises:
    TypeError: if a leaf is not floating.
    ValueError: as :func:`top_mask`, or if ``keep`` does not match ``scores``.

  Examples:
    >>> scores = {'a': jnp.array([1.0, 4.0]), 'b': jnp.array([3.0, 2.0])}
    >>> top_masks(scores, {'a': 1, 'b': 1})['b'].tolist()
    [True, False]
    >>> top_masks(scores, 3)['b'].tolist()
    [True, True]
  """
  xs, treedef, limbs, splits = _arguments(scores, keep, specs)
  masks, _ = _select(xs, limbs, splits, method)
  return treedef.unflatten(masks)


def kth_largest(x: jax.Array, k: Keep, *, method: Method = 'auto') -> jax.Array:
  """Returns the k-th largest entry, exactly; 1 is the largest.

  Args:
    x: scores, as :func:`top_mask` takes them.
    k: 1 <= k <= x.size; static or traced.
    method: see :func:`top_mask`.

  Returns:
    Scalar of the dtype of ``x``; without a gradient.

  Raises:
    TypeError: if ``x`` is not floating.
    ValueError: if a static ``k`` is out of range.

  Examples:
    >>> print(kth_largest(jnp.array([5.0, -1.0, 7.0, 5.0]), 2))
    5.0
  """
  if isinstance(k, int | np.integer) and k < 1:
    raise ValueError(f'k must be at least 1, got {k}.')
  xs, _, keep, splits = _arguments(x, k, None)
  _, keys = _select(xs, keep, splits, method)
  return _value(keys[0], x.dtype)


def boundaries(
  scores: tree_lib.PyTree,
  keep: Keep | tree_lib.PyTree,
  *,
  method: Method = 'auto',
) -> tuple[tree_lib.PyTree, tree_lib.PyTree]:
  """Returns the smallest kept and the largest pruned score of every leaf.

  Args:
    scores: pytree of scores, as :func:`top_masks` takes them.
    keep: counts, as :func:`top_masks` takes them; each at least 1 and below
      the leaf's size for both to exist.
    method: see :func:`top_mask`.

  Returns:
    Two pytrees of scalars in the dtype of the scores. A leaf of which all is
    kept has -inf for the largest pruned score, one of which nothing is kept
    has +inf for the smallest kept one.

  Raises:
    TypeError: as :func:`top_masks`.
    ValueError: as :func:`top_masks`.

  Examples:
    >>> low, high = boundaries(jnp.array([1.0, 4.0, 3.0, 2.0]), 2)
    >>> float(low), float(high)
    (3.0, 2.0)
  """
  masks = top_masks(scores, keep, method=method)
  scores = jax.tree.map(lax.stop_gradient, scores)
  least = lambda x, mask: jnp.min(x, where=mask, initial=jnp.inf)
  most = lambda x, mask: jnp.max(x, where=~mask, initial=-jnp.inf)
  return (
    jax.tree.map(least, scores, masks),
    jax.tree.map(most, scores, masks),
  )


class _Split(NamedTuple):
  """The whole array of which one leaf is a shard."""

  shape: tuple[int, ...]  # Of the whole array.
  axes: tuple[tuple[str, ...], ...]  # Mesh axes that split each dimension.

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(name for names in self.axes for name in names)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def lead(self) -> int:
    """How many leading axes to count apart for indices to fit uint32."""
    return counts_lib.leading(self.shape)


def _arguments(scores: Any, keep: Any, specs: Any):
  """Checks and flattens: leaves, treedef, counts as limbs, splits."""
  named = tree_lib.leaves(scores)
  treedef = jax.tree.structure(scores)
  for path, x in named.items():
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise TypeError(
        f'Scores of {path!r} must be floating, got {jnp.result_type(x)}.'
      )
  xs = [lax.stop_gradient(jnp.asarray(x)) for x in named.values()]
  if specs is None:
    specs = [None] * len(xs)
  else:
    is_spec = lambda s: s is None or isinstance(s, jax.sharding.PartitionSpec)
    specs = jax.tree.leaves(specs, is_leaf=is_spec)
  splits = [_split(x, spec) for x, spec in zip(xs, specs, strict=True)]
  limits = {n: s.size for n, s in zip(named, splits, strict=True)}
  if _is_count(keep) and jnp.ndim(jax.tree.leaves(keep)[0]) == 1:
    if len(keep[0]) != len(xs):
      raise ValueError(
        f'`keep` must have a count for each of the {len(xs)} leaves of the '
        f'scores; got {len(keep[0])}.'
      )
    return xs, treedef, keep, splits
  if _is_count(keep):
    counts = [keep]
    limits = {'the whole pytree': sum(limits.values())}
  else:
    counts = jax.tree.leaves(keep, is_leaf=_is_count)
    if len(counts) != len(xs):
      raise ValueError(
        f'`keep` must be one count, or one for each of the {len(xs)} leaves '
        f'of the scores; got {len(counts)}.'
      )
  for (name, limit), count in zip(limits.items(), counts, strict=True):
    if isinstance(count, int | np.integer) and not 0 <= count <= limit:
      raise ValueError(
        f'`keep` of {name!r} must be between 0 and {limit}, got {count}.'
      )
  limbs = counts_lib.stack([counts_lib.limbs(c) for c in counts])
  return xs, treedef, limbs, splits


def _is_count(keep: Any) -> bool:
  """Whether this is one count: a scalar, or a pair of limbs."""
  if type(keep) is tuple and len(keep) == 2:
    return all(getattr(limb, 'dtype', None) == jnp.uint32 for limb in keep)
  return isinstance(keep, int | np.integer | np.ndarray | jax.Array)


def _split(x: jax.Array, spec: jax.sharding.PartitionSpec | None) -> _Split:
  axes = [
    () if a is None else (a,) if isinstance(a, str) else tuple(a)
    for a in (spec or ())
  ]
  axes += [()] * (x.ndim - len(axes))
  parts = [math.prod(lax.axis_size(name) for name in names) for names in axes]
  shape = tuple(n * part for n, part in zip(x.shape, parts, strict=True))
  return _Split(shape, tuple(axes))


def _select(
  xs: Sequence[jax.Array],
  keep: Limbs,
  splits: Sequence[_Split],
  method: Method,
) -> tuple[list[jax.Array], jax.Array]:
  """Returns the mask of every leaf, and the key of the last entry kept.

  One count is for all leaves together, and then there is one key.
  """
  if not xs:
    return [], jnp.zeros(0, jnp.uint32)
  dtype = jnp.result_type(*xs)
  xs = [x.astype(dtype) for x in xs]
  sharded = any(split.names for split in splits)
  fits = sum(split.size for split in splits) < 1 << 31
  if method == 'histogram' and (sharded or not fits):
    raise ValueError(
      'Histograms need whole arrays of fewer than 2**31 entries in all; use '
      "method='bisection'."
    )
  bisect = lambda *args: _bisection(args[:-1], args[-1], splits)
  count = lambda *args: _histogram(args[:-1], args[-1], splits)
  if method == 'histogram':
    return count(*xs, keep)
  if method == 'bisection' or sharded or not fits or jax.device_count() > 1:
    return bisect(*xs, keep)
  return lax.platform_dependent(*xs, keep, cpu=count, default=bisect)


# Keys: unsigned integers in the order of the floats.


def _unsigned(dtype: Any) -> Any:
  return np.dtype(f'uint{8 * jnp.dtype(dtype).itemsize}')


def _keys(x: jax.Array) -> jax.Array:
  """Maps floats to keys > 0; all but NaN (to 1) are above 1."""
  uint = _unsigned(x.dtype)
  bits = lax.bitcast_convert_type(x, uint)
  sign = uint.type(1 << (8 * uint.itemsize - 1))
  infinity = np.array(jnp.inf, x.dtype).view(uint)[()]
  magnitude = bits & ~sign
  keys = jnp.where(bits < sign, bits | sign, ~bits)
  keys = jnp.where(magnitude == 0, sign, keys)  # -0 equals 0.
  return jnp.where(magnitude > infinity, uint.type(1), keys)


def _value(key: jax.Array, dtype: Any) -> jax.Array:
  sign = _unsigned(dtype).type(1 << (8 * key.dtype.itemsize - 1))
  bits = jnp.where(key >= sign, key ^ sign, ~key)
  return lax.bitcast_convert_type(bits, dtype)


def _kept(keys: jax.Array, cut: Cutoff, split: _Split) -> jax.Array:
  tie = (keys == cut.key) & _before(keys, cut, split)
  return (keys > cut.key) | tie


def _before(x: jax.Array, cut: Cutoff, split: _Split) -> jax.Array:
  """Whether the position of an entry in the whole array precedes a cutoff."""
  lead = split.lead
  trail = _positions(x, split, lead, x.ndim)
  if not lead:
    return trail < cut.trail
  major = _positions(x, split, 0, lead)
  return (major < cut.lead) | ((major == cut.lead) & (trail < cut.trail))


def _positions(x: jax.Array, split: _Split, start: int, stop: int) -> jax.Array:
  """Row-major index over axes start..stop-1 of the whole array, as uint32."""
  positions = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(start, stop):
    stride = math.prod(split.shape[axis + 1 : stop])
    index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    if split.axes[axis]:
      shard = lax.axis_index(split.axes[axis]).astype(jnp.uint32)
      index = index + shard * np.uint32(x.shape[axis])
    positions = positions + index * np.uint32(stride)
  return positions


# Histograms: one CPU device.


def _histogram(
  xs: Sequence[jax.Array], keep: Limbs, splits: Sequence[_Split]
) -> tuple[list[jax.Array], jax.Array]:
  """Selects in whole arrays, from histograms of 16-bit digits.

  One small program serves any number of leaves: a loop over leaves, in it a
  loop over rows of keys, which are made from the scores when they are read.
  """
  heights = [-(-x.size // _ROW) for x in xs]
  ends = np.cumsum(heights)
  starts = ends - heights
  read = _reader(xs, starts, heights)
  pooled = keep[0].size == 1
  spans = (
    jnp.asarray(starts[:1] if pooled else starts, jnp.int32),
    jnp.asarray(ends[-1:] if pooled else ends, jnp.int32),
    (keep[0] << 16) | keep[1],
  )
  axes = _varying([*xs, *keep], [])
  uint = _unsigned(xs[0].dtype)
  find = lambda span: _find(read, uint, axes, *span)
  key, row, column = lax.map(find, spans)
  masks = []
  for i, x in enumerate(xs):
    # A cutoff before this leaf takes none of its ties, one beyond it all.
    g = 0 if pooled else i
    local = row[g] - np.int32(starts[i])
    place = jnp.minimum(local * _ROW, max(x.size - _ROW, 0)) + column[g]
    place = jnp.where(local < heights[i], place, x.size)
    place = jnp.where(local < 0, 0, place).astype(jnp.uint32)
    cut = Cutoff(key[g], jnp.uint32(0), place)
    masks.append(_kept(_keys(x), cut, splits[i]))
  return masks, key


def _reader(
  xs: Sequence[jax.Array], starts: np.ndarray, heights: Sequence[int]
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function from a row to its keys, in whichever leaf it lies.

  Leaves are read where they are: the scores are the one large temporary. The
  last row of a leaf begins early enough to be full, and what the row before
  has shown is replaced by 0, as is the padding of a leaf shorter than a row:
  below every key.
  """
  leaf_of = jnp.asarray(np.repeat(np.arange(len(xs)), heights), jnp.int32)
  first = jnp.asarray(starts, jnp.int32)

  def reader(x):
    flat, width = x.ravel(), min(x.size, _ROW)

    def read(row):
      at = jnp.minimum(row * _ROW, flat.size - width)
      keys = _keys(lax.dynamic_slice(flat, (at,), (width,)))
      new = lax.iota(jnp.int32, width) >= row * _ROW - at
      return jnp.pad(jnp.where(new, keys, 0), (0, _ROW - width))

    return read

  readers = [reader(x) for x in xs]
  if len(readers) == 1:
    return readers[0]

  def read(row):
    leaf = leaf_of[row]
    return lax.switch(leaf, readers, row - first[leaf])

  return read


def _find(
  read: Callable[[jax.Array], jax.Array],
  uint: Any,
  axes: frozenset,
  start: jax.Array,
  stop: jax.Array,
  keep: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns key, row and column of the cutoff of rows start..stop-1."""
  width = 8 * uint.itemsize

  def next_digit(i, carry):
    key, keep, _ = carry
    shift = (width - 16 - 16 * i).astype(uint)
    add = functools.partial(_add_digits, read, key, shift)
    counts = _vary(jnp.zeros(_BINS + 1, jnp.uint32), axes)
    counts = lax.fori_loop(start, stop, add, counts)[:_BINS]
    digit, keep, ties = _descend(counts, keep)
    return key | (digit.astype(uint) << shift), keep, ties

  vary = lambda tree: jax.tree.map(lambda x: _vary(x, axes), tree)
  carry = vary((jnp.zeros([], uint), keep, keep))
  key, keep, ties = lax.fori_loop(0, width // 16, next_digit, carry)

  # Rows are counted off until the places run out, where they do.
  def more(carry):
    _, seen, _, _ = carry
    return seen < keep

  def count_row(carry):
    row, seen, _, _ = carry
    equal = read(row) == key
    return row + 1, seen + jnp.sum(equal, dtype=jnp.uint32), seen, equal

  surplus = ties > keep
  none = jnp.where(surplus, 0, keep)
  carry = vary((start, none, none, jnp.zeros(_ROW, bool)))
  row, _, seen, equal = lax.while_loop(more, count_row, carry)
  taken = jnp.cumsum(equal.astype(jnp.uint32))
  column = jnp.sum(taken < keep - seen, dtype=jnp.int32) + 1
  row = jnp.where(surplus, jnp.maximum(row - 1, start), stop)
  return key, row, jnp.where(surplus, column, 0)


def _add_digits(
  read: Callable[[jax.Array], jax.Array],
  prefix: jax.Array,
  shift: jax.Array,
  row: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Counts the digits at ``shift`` of keys whose higher digits match."""
  keys = read(row)
  digit = ((keys >> shift) & 0xFFFF).astype(jnp.int32)
  # In two shifts, as one by all bits of a key is not defined.
  same = (keys ^ prefix) >> shift >> np.array(15, keys.dtype) < 2
  return counts.at[jnp.where(same, digit, _BINS)].add(1)


def _descend(
  counts: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds the bin of the keep-th largest digit, in two steps of 256 bins.

  Returns:
    The bin, how many of its entries are wanted, and how many it has.
  """
  table = counts.reshape(256, 256)
  high, keep = _bin(jnp.sum(table, axis=1, dtype=jnp.uint32), keep)
  low, keep = _bin(table[high], keep)
  return high * 256 + low, keep, table[high, low]


def _bin(counts: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
  reached = jnp.cumsum(counts[::-1])[::-1]  # Entries in this bin and above.
  index = jnp.sum(reached >= keep, dtype=jnp.int32) - 1
  return index, keep - (reached[index] - counts[index])


# Bisection: accelerators and sharded arrays.


def _bisection(
  xs: Sequence[jax.Array], keep: Limbs, splits: Sequence[_Split]
) -> tuple[list[jax.Array], jax.Array]:
  """Selects by finding the key bit by bit, from sums over the leaves."""
  keys = [_keys(x) for x in xs]
  uint = keys[0].dtype
  width = 8 * uint.itemsize
  leaves = range(len(xs))
  pooled = keep[0].size == 1
  group = [0 if pooled else i for i in leaves]
  axes = _varying(xs, splits) | _varying(keep, [])

  def count(test: Callable[[int], jax.Array]) -> Limbs:
    return _count([test(i) for i in leaves], splits)

  def total(counts: Limbs) -> Limbs:
    if not pooled:
      return counts
    return counts_lib.carry(
      *(jnp.sum(x, keepdims=True, dtype=x.dtype) for x in counts)
    )

  def refine(i, key):
    trial = key | (uint.type(1) << (width - 1 - i).astype(uint))
    reach = total(count(lambda i: keys[i] >= trial[group[i]]))
    return jnp.where(counts_lib.at_least(reach, keep), trial, key)

  key = _vary(jnp.zeros(keep[0].shape, uint), axes)
  key = lax.fori_loop(0, width, refine, key)
  equal = [keys[i] == key[group[i]] for i in leaves]
  above = total(count(lambda i: keys[i] > key[group[i]]))
  ties = count(lambda i: equal[i])
  places = counts_lib.minus(keep, above)
  if pooled:  # Earlier leaves come first.
    low = jnp.cumsum(ties[1], dtype=jnp.uint32) - ties[1]
    high = jnp.cumsum(ties[0], dtype=jnp.uint32) - ties[0]
    places = counts_lib.minus(places, counts_lib.carry(high, low))
  surplus = ~counts_lib.at_least(places, ties)

  def place(test: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
    """Returns the last index before which no more ties lie than places."""

    def refine(i, index):
      trial = index | (np.uint32(1) << (31 - i).astype(jnp.uint32))
      reach = count(lambda i: equal[i] & test(i, trial[i]))
      return jnp.where(counts_lib.at_least(places, reach), trial, index)

    start = jnp.where(surplus, np.uint32(0), np.uint32(0xFFFFFFFF))
    passes = jnp.where(jnp.any(surplus), 32, 0)
    return lax.fori_loop(0, passes, refine, _vary(start, axes))

  lead = jnp.zeros(len(xs), jnp.uint32)
  if any(split.lead for split in splits):
    major = lambda i: _positions(xs[i], splits[i], 0, splits[i].lead)
    lead = place(lambda i, at: major(i) < at)
  trail = place(
    lambda i, at: _before(xs[i], Cutoff(key[group[i]], lead[i], at), splits[i])
  )
  cuts = [Cutoff(key[group[i]], lead[i], trail[i]) for i in leaves]
  return list(map(_kept, keys, cuts, splits)), key


def _count(tests: Sequence[jax.Array], splits: Sequence[_Split]) -> Limbs:
  """Counts what is true of each whole leaf; one all-reduce for like leaves."""
  counts = [jnp.stack(counts_lib.true(test)) for test in tests]
  together: dict[tuple[str, ...], list[int]] = {}
  for i, split in enumerate(splits):
    together.setdefault(split.names, []).append(i)
  for names, members in together.items():
    if names:
      sums = lax.psum(jnp.stack([counts[i] for i in members]), names)
      for i, count in zip(members, sums, strict=True):
        counts[i] = count
  high, low = jnp.stack(counts, axis=1)
  return counts_lib.carry(high, low)


# Inside shard_map a loop's carry must vary over the axes its result varies on.


def _varying(xs: Sequence[jax.Array], splits: Sequence[_Split]) -> frozenset:
  """Returns the mesh axes over which sums over whole leaves still vary."""
  axes = list(map(_axes, xs))
  for i, split in enumerate(splits):
    axes[i] = axes[i] - frozenset(split.names)
  return frozenset().union(*axes)


def _axes(x: jax.Array) -> frozenset:
  aval = jax.typeof(x)
  kind = getattr(aval, 'manual_axis_type', None)  # JAX 0.8 names it `vma`.
  return getattr(aval, 'vma', frozenset()) if kind is None else kind.varying


def _vary(x: jax.Array, axes: frozenset) -> jax.Array:
  missing = tuple(axes - _axes(x))
  return lax.pcast(x, missing, to='varying') if missing else x
