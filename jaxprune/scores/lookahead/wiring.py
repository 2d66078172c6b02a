"""Which leaf reads and writes which channels, as plain data."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxprune import tree
from jaxprune.checks import kinds

Look = Literal['both', 'before', 'after']


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


@kinds.checked
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
    >>> params = {'a': np.ones((2, 3)), 'b': np.ones((12, 5))}
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


def channels_of(side: Side, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the channel of each entry of a side of a leaf; -1: none."""
  if side.channels is not None:
    return np.asarray(side.channels)
  return np.arange(shape[side.axes[0]])


def complement(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the axes of a leaf that are not among some."""
  return tuple(i for i in range(ndim) if i not in axes)


def check(vectors: Mapping[str, Any], wiring: Wiring, look: str) -> None:
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
      index = channels_of(side, shape)
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
