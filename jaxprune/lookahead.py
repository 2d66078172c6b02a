"""Lookahead scores: what a weight moves in the layers around it.

Lookahead pruning scores a weight by the change it makes in the product of its
layer with the one before and the one after::

  score(w) = w^2 * P[its input channel] * Q[its output channel]

P is the squared norm of what writes that input channel, Q of what reads that
output channel, normalisations in between included. Which leaf reads and writes
which channels is plain data, a *wiring*: a mapping from the path of a leaf to
a :class:`Wire`. :func:`chain` makes one from a list of paths, and
``jaxprune.structure`` from the trace of any model.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import masks as masks_lib
from jaxprune import select, tree

Look = Literal['both', 'before', 'after']
Order = Literal['all', 'forward', 'backward']


class Norm(NamedTuple):
  """A per-channel factor scale / sqrt(var + eps) between two leaves."""

  scale: str | None = None  # Path of a vector in params; None is 1.
  var: str | None = None  # Path of a vector in stats; None divides by 1.
  eps: float = 1e-5
  entries: np.ndarray | None = None  # Its entry for each of the side's.


class Side(NamedTuple):
  """How one side of a leaf, its inputs or its outputs, meets its channels.

  A *space* is a named set of channels that some leaves write and others read,
  such as the output of a layer, a residual stream or a concatenation. A leaf
  that reads sees those that write before it in the order of the wiring.
  """

  space: str
  axes: tuple[int, ...]  # The leaf's axes that run over channels, ascending.
  channels: np.ndarray | None = None  # Of each entry along `axes`; -1: none.
  norms: tuple[Norm, ...] = ()  # Between the leaf and the space.


class Wire(NamedTuple):
  """What a leaf reads and what it writes; None where nobody else does."""

  reads: Side | None = None
  writes: Side | None = None


Wiring = Mapping[str, Wire]  # Path -> wire, in the order of the forward pass.


def chain(
  params: tree.PyTree,
  paths: Sequence[str],
  *,
  norms: Mapping[str, Norm | tuple[str, str]] | None = None,
  in_axis: int = -2,
  out_axis: int = -1,
  channels_last: bool = True,
) -> dict[str, Wire]:
  """Returns the wiring of layers that follow one another.

  Between a layer of C channels and a kernel of two axes with K C inputs stands
  a flatten: input i is channel i % C where channels are last, else i // K. A
  kernel with fewer inputs than there are channels is grouped (or depthwise).

  Args:
    params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
    paths: the kernels, first layer first.
    norms: path of a kernel -> the normalisation that follows it, as a
      :class:`Norm` or as the paths of its scale and its variance.
    in_axis: the input axis of every kernel; -2 for Flax, 1 for OIHW.
    out_axis: the output axis; -1 for Flax, 0 for OIHW.
    channels_last: how a flatten lays out its entries.

  Returns:
    path -> :class:`Wire`; the first leaf reads and the last writes nothing
    that another leaf knows.

  Raises:
    ValueError: if a path is unknown or twice, or two layers do not fit.

  Examples:
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((12, 5))}
    >>> chain(params, ['a', 'b'])['b'].reads.channels.tolist()
    [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
  """
  named, norms = tree.leaves(params), dict(norms or {})
  unknown = [path for path in (*paths, *norms) if path not in named]
  if unknown or len(set(paths)) < len(paths):
    raise ValueError(
      f'A chain takes each path of params once; unknown: {unknown}, given: '
      f'{list(paths)}. The paths are: {", ".join(named)}.'
    )
  wiring = dict.fromkeys(paths, Wire())
  for path, reader in itertools.pairwise(paths):
    norm = norms.get(path, ())
    if norm and not isinstance(norm, Norm):
      norm = Norm(*norm)
    out = out_axis % len(named[path].shape)
    writes = Side(path, (out,), None, (norm,) if norm else ())
    reads = _read(
      path,
      named[path].shape[out],
      reader,
      named[reader].shape,
      (in_axis, out_axis),
      channels_last,
    )
    wiring[path] = wiring[path]._replace(writes=writes)
    wiring[reader] = wiring[reader]._replace(reads=reads)
  return wiring


def lookahead(
  params: tree.PyTree,
  wiring: Wiring,
  *,
  stats: tree.PyTree = None,
  look: Look = 'both',
) -> tree.PyTree:
  """Returns the Lookahead score of each weight that the wiring names.

  S = w^2 P[input channel] Q[output channel]. P sums the squares of the slices
  that write the channel, Q of those that read it, each times the squares of
  the norms between the two leaves; 1 where nobody writes or reads it. A channel
  that several leaves write or read, as in a residual stream, sums over all.

  Args:
    params: a pytree of arrays.
    wiring: from :func:`chain` or from the structure of the model.
    stats: pytree that holds the variances of the norms, such as Linen's
      ``batch_stats``.
    look: which neighbours count; the default is the paper's LAP, ``'after'``
      and ``'before'`` are its one-sided ablations.

  Returns:
    A pytree like ``params``, float32 or wider; ``optax.MaskedNode()`` where
    the wiring names no leaf. Squared, as in the authors' code: the same order
    within a leaf as |w| times norms, another one between leaves.

  Raises:
    ValueError: if the wiring names a leaf, a norm or an axis that is not
      there, or a shape does not fit, or if ``look`` is unknown.

  References:
    Park et al. (2020), arXiv:2002.04809, Algorithm 1; the squared form and the
    factors of BatchNorm follow the authors' code. It takes the last BatchNorm
    before the next layer for each, so that a downsampling shortcut's replaces
    the block's, and misplaces the factors at a flatten; here each norm is where
    the wiring says.

  Examples:
    >>> params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0], [1.0]])}
    >>> scores = lookahead(params, chain(params, ['a', 'b']))
    >>> print(scores['a'])  # 1 * 9, 4 * 1
    [[9. 4.]]
  """
  vectors = {**tree.leaves(params), **tree.leaves(stats)}
  _check(vectors, wiring, look)
  squares = {path: _squares(vectors[path]) for path in wiring}
  scores = _scores(squares, wiring, vectors, list(wiring), look)
  chosen = tree.prunable(params, lambda path, _: path in wiring)
  return tree.map_with_path(lambda path, _: scores[path], chosen)


def lookahead_masks(
  params: tree.PyTree,
  wiring: Wiring,
  sparsity: float | tree.Rules,
  *,
  order: Order = 'forward',
  rounds: int = 1,
  stats: tree.PyTree = None,
  look: Look = 'both',
  masks: tree.PyTree | None = None,
) -> tree.PyTree:
  """Returns masks drawn leaf by leaf, each from scores that see the last ones.

  Forward, a leaf is masked before the next is scored; backward likewise from
  the end. In each of S rounds a leaf loses its share r / S of the weights that
  were alive at the start, so that keep = round((1 - (r / S) / (1 - r s / S))
  alive) in round s.

  Args:
    params: a pytree of concrete arrays.
    wiring: as for :func:`lookahead`; its order is the order of the leaves.
    sparsity: the fraction r of the alive weights of each leaf to prune, static
      in [0, 1): one for all or rules over paths, 0 where none matches.
    order: ``'forward'``, ``'backward'``, or ``'all'`` to score every leaf
      before any is masked in a round.
    rounds: S; more than one is the authors' split, or sequential, mode.
    stats: as for :func:`lookahead`.
    look: as for :func:`lookahead`.
    masks: bool, the weights alive so far; all if None. Dead ones stay dead.

  Returns:
    bool masks, like the scores of :func:`lookahead`; the lower index wins a
    tie.

  Raises:
    ValueError: as :func:`lookahead`, if a sparsity is outside [0, 1), if
      rounds < 1, if the order is unknown, or if scores are not finite.

  References:
    Park et al. (2020), arXiv:2002.04809; rounds and rounding as in the
    authors' code.

  Examples:
    >>> params = {'a': jnp.array([[3.0, 2.0]]), 'b': jnp.array([[1.0], [2.0]])}
    >>> wiring = chain(params, ['a', 'b'])
    >>> [x.tolist() for x in lookahead_masks(params, wiring, 0.5).values()]
    [[[False, True]], [[False], [True]]]
  """
  if order not in ('all', 'forward', 'backward') or rounds < 1:
    raise ValueError(
      f"The order is 'all', 'forward' or 'backward' and rounds at least 1, got "
      f'{order!r} and {rounds}.'
    )
  rules = sparsity if isinstance(sparsity, Mapping) else {'.*': sparsity}
  rates = tree.match(rules, wiring, 0.0)
  odd = {path: r for path, r in rates.items() if not 0 <= r < 1}
  if odd:
    raise ValueError(f'A sparsity must be in [0, 1), got {odd}.')
  vectors = {**tree.leaves(params), **tree.leaves(stats)}
  _check(vectors, wiring, look)
  given = {} if masks is None else tree.leaves(masks)
  alive = {
    path: given.get(path, np.ones(vectors[path].shape, bool)) for path in wiring
  }
  counts = {path: int(np.sum(mask)) for path, mask in alive.items()}
  squares = {
    path: jnp.where(alive[path], _squares(vectors[path]), 0) for path in wiring
  }
  steps = [[path] for path in wiring]
  steps = {'all': [list(wiring)], 'forward': steps, 'backward': steps[::-1]}
  score = jax.jit(
    lambda squares, paths: _scores(squares, wiring, vectors, paths, look),
    static_argnums=1,
  )
  for s in range(rounds):
    for paths in steps[order]:
      found = score(squares, tuple(paths))
      masks_lib.check_finite(found)
      for path, scores in found.items():
        rate = rates[path] / rounds
        counts[path] = round((1 - rate / (1 - rate * s)) * counts[path])
        ranked = jnp.where(alive[path], scores, -jnp.inf)
        alive[path] = select.top_mask(ranked, counts[path])
      for path in paths:
        squares[path] = jnp.where(alive[path], squares[path], 0)
  chosen = tree.prunable(params, lambda path, _: path in wiring)
  return tree.map_with_path(lambda path, _: alive[path], chosen)


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
    return w * jnp.expand_dims(s, _others(w.ndim, side.axes))

  return tree.map_with_path(scale, params)


def obd(
  params: tree.PyTree,
  saliencies: tree.PyTree,
  wiring: Wiring,
  *,
  stats: tree.PyTree = None,
  look: Look = 'both',
) -> tree.PyTree:
  """Returns OBD+LAP: lookahead scores of the roots of OBD saliencies.

  S = s P[input channel] Q[output channel] with s = max(h w^2 / 2, 0) in the
  place of w^2, in P and Q too. An estimate of h may fall below 0, which no
  weight is worth: it counts as 0.

  Args:
    params: a pytree of arrays.
    saliencies: h w^2 / 2 of :func:`jaxprune.scores.obd`, like params or like a
      sub-tree of them (``{'params': ...}`` of Linen's variables); a leaf that
      has none counts as in :func:`lookahead`.
    wiring: as for :func:`lookahead`.
    stats: as for :func:`lookahead`.
    look: as for :func:`lookahead`.

  Returns:
    Scores as those of :func:`lookahead`.

  Raises:
    ValueError: as :func:`lookahead`, or if saliencies are of no leaf.

  References:
    Park et al. (2020), arXiv:2002.04809, as in the authors' code, but for the
    factor 1/2, which changes no order within a leaf.

  Examples:
    >>> params = {'a': jnp.array([[1.0, 2.0]]), 'b': jnp.array([[3.0], [1.0]])}
    >>> saliencies = {'a': jnp.array([[4.0, -1.0]]), 'b': params['b']}
    >>> print(obd(params, saliencies, chain(params, ['a', 'b']))['a'])
    [[12.  0.]]
  """
  named, paths = tree.leaves(saliencies), list(tree.leaves(params))
  unknown = [path for path in named if path not in paths]
  if unknown:
    raise ValueError(
      f'Saliencies of {", ".join(unknown)} belong to no leaf of params; the '
      f'paths are: {", ".join(paths)}.'
    )

  def root(path, w):
    if path not in named:
      return w
    s = named[path].astype(jnp.promote_types(named[path].dtype, jnp.float32))
    return jnp.sqrt(jnp.maximum(s, 0))

  roots = tree.map_with_path(root, params)
  return lookahead(roots, wiring, stats=stats, look=look)


# The maths, over flat mappings from paths.


def _squares(w: jax.Array) -> jax.Array:
  return jnp.square(w.astype(jnp.promote_types(w.dtype, jnp.float32)))


def _scores(
  squares: Mapping[str, jax.Array],
  wiring: Wiring,
  vectors: Mapping[str, jax.Array],
  paths: Sequence[str],
  look: Look,
) -> dict[str, jax.Array]:
  """Returns the scores of some leaves from the squares of all."""
  place = {path: i for i, path in enumerate(wiring)}
  ends: dict[tuple[str, bool], list[str]] = {}  # Leaves of a space, in order.
  widths: dict[str, int] = {}
  for path, wire in wiring.items():
    for side, writes in ((wire.reads, False), (wire.writes, True)):
      if side is not None:
        ends.setdefault((side.space, writes), []).append(path)
        top = int(_channels(side, squares[path].shape).max(initial=-1)) + 1
        widths[side.space] = max(widths.get(side.space, 0), top)

  @functools.cache
  def flow(path: str, writes: bool) -> tuple[jax.Array, np.ndarray]:
    """Returns the squared norm per channel of one leaf, and where it has one.

    One entry more than there are channels, for those that lie outside.
    """
    side = wiring[path].writes if writes else wiring[path].reads
    assert side is not None
    x, width = squares[path], widths[side.space]
    channels = _channels(side, x.shape)
    norm = jnp.sum(x, _others(x.ndim, side.axes))
    norm = norm * _factors(side, channels.shape, vectors)
    known = np.zeros(width + 1, bool)
    known[channels] = True
    if _is_identity(channels, width):
      return jnp.pad(norm, (0, 1)), known
    return jnp.zeros(width + 1, x.dtype).at[channels].add(norm), known

  @functools.cache
  def total(
    space: str, writes: bool, count: int
  ) -> tuple[jax.Array, np.ndarray]:
    """Returns the sum over the first writers, or over the last readers."""
    leaves = ends[space, writes]
    path = leaves[count - 1] if writes else leaves[-count]
    norm, known = flow(path, writes)
    if count == 1:
      return norm, known
    norms, knowns = total(space, writes, count - 1)
    return norms + norm, knowns | known

  def seen(path: str, side: Side, writers: bool) -> jax.Array:
    """Returns what a leaf sees on one side, an array of the leaf's rank."""
    x = squares[path]
    leaves = ends.get((side.space, writers), [])
    others = [
      other
      for other in leaves
      if (place[other] < place[path] if writers else place[other] > place[path])
    ]
    if not others:
      return jnp.ones((1,) * x.ndim, x.dtype)
    norm, known = total(side.space, writers, len(others))
    channels = _channels(side, x.shape)
    straight = _is_identity(channels, widths[side.space])
    factor = norm[:-1] if straight else norm[channels]
    factor = factor * _factors(side, channels.shape, vectors)
    known = known & (np.arange(known.size) < known.size - 1)
    factor = jnp.where(known[channels], factor, 1)
    return jnp.expand_dims(factor, _others(x.ndim, side.axes))

  scores = {}
  for path in paths:
    score, wire = squares[path], wiring[path]
    if look != 'after' and wire.reads is not None:
      score = score * seen(path, wire.reads, True)
    if look != 'before' and wire.writes is not None:
      score = score * seen(path, wire.writes, False)
    scores[path] = score
  return scores


def _factors(
  side: Side, shape: tuple[int, ...], vectors: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns the squared factors of all norms, for each entry of a side."""
  factor = jnp.ones(shape)
  for norm in side.norms:
    one = jnp.float32(1)
    if norm.scale is not None:
      one = jnp.square(vectors[norm.scale].astype(jnp.float32))
    if norm.var is not None:
      one = one / (vectors[norm.var].astype(jnp.float32) + norm.eps)
    if norm.entries is not None:
      one = jnp.ravel(one)[norm.entries]
    factor = factor * one
  return factor


def _channels(side: Side, shape: tuple[int, ...]) -> np.ndarray:
  if side.channels is not None:
    return np.asarray(side.channels)
  return np.arange(shape[side.axes[0]])


def _is_identity(index: np.ndarray, width: int) -> bool:
  return index.shape == (width,) and bool((index == np.arange(width)).all())


def _others(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(i for i in range(ndim) if i not in axes)


def _read(
  writer: str,
  channels: int,
  reader: str,
  shape: tuple[int, ...],
  axes: tuple[int, int],
  channels_last: bool,
) -> Side:
  """Returns how a kernel reads the channels of the one before."""
  into, out = (axis % len(shape) for axis in axes)
  n = shape[into]
  if n == channels:
    return Side(writer, (into,))
  if n % channels == 0 and len(shape) == 2:
    i = np.arange(n)
    index = i % channels if channels_last else i // (n // channels)
    return Side(writer, (into,), index)
  groups = channels // n
  if n > channels or channels % n or shape[out] % groups:
    raise ValueError(
      f'{reader!r} of shape {shape} has {n} inputs on axis {into}: neither '
      f'the {channels} channels of {writer!r}, nor (of two axes) a flatten of '
      f'them, nor groups. Say `in_axis` and `out_axis`, or wire it by hand.'
    )
  i, o = np.meshgrid(np.arange(n), np.arange(shape[out]), indexing='ij')
  index = o // (shape[out] // groups) * n + i
  if into < out:
    return Side(writer, (into, out), index)
  return Side(writer, (out, into), index.T)


def _check(vectors: Mapping[str, Any], wiring: Wiring, look: str) -> None:
  """Raises where a wiring does not fit the leaves."""
  if look not in get_args(Look):
    raise ValueError(
      f"`look` must be 'both', 'before' or 'after', got {look!r}."
    )
  problems = []
  for path, wire in wiring.items():
    if path not in vectors:
      problems.append(f'{path!r} is no leaf')
      continue
    shape = vectors[path].shape
    for side in (wire.reads, wire.writes):
      if side is None:
        continue
      where = f'{path!r} of shape {shape}'
      axes = side.axes
      if list(axes) != sorted({a for a in axes if 0 <= a < len(shape)}):
        problems.append(f'{where} has no ascending axes {axes}')
        continue
      spanned = tuple(shape[a] for a in axes)
      index = _channels(side, shape)
      if index.shape != spanned or index.min(initial=0) < -1:
        problems.append(
          f'{where} needs channels of shape {spanned} with entries >= -1 over '
          f'axes {axes}, got the shape {index.shape}'
        )
        continue
      for norm in side.norms:
        for vector in (norm.scale, norm.var):
          if vector is None:
            continue
          if vector not in vectors:
            problems.append(
              f'{where} is followed by the norm {vector!r}, which is in '
              f'neither params nor stats'
            )
          elif norm.entries is None and vectors[vector].shape != spanned:
            problems.append(
              f'{where} needs a norm of shape {spanned}, got {vector!r} of '
              f'shape {vectors[vector].shape}; give it entries'
            )
  if problems:
    raise ValueError(f'The wiring does not fit: {"; ".join(problems)}.')
