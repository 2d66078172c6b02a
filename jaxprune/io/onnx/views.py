"""Arrays of a JAX program as views of ONNX tensors.

JAX likes channels last, ONNX first; and JAX writes every broadcast down, which
ONNX implies. A :class:`View` says which axis of a tensor each axis of an array
is: transposes, broadcasts and axes of size 1 then cost nothing until
:meth:`Writer.arrange` writes them down for an operation that cares.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxprune.io.onnx.nodes import Tape

Place = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class View:
  """An array of the JAX program, as a tensor of the ONNX program.

  Attributes:
    shape: of the array; sizes may be symbolic.
    dtype: of both.
    tensor: the name of the tensor, or its value if that is known.
    place: for each axis of the array, the axis of the tensor that it is; None
      where the array has size 1 or repeats.
    rank: axes of the tensor; those that no place names have size 1.
  """

  shape: tuple[Any, ...]
  dtype: np.dtype
  tensor: str | np.ndarray
  place: Place
  rank: int

  @property
  def is_known(self) -> bool:
    """Whether its value is known."""
    return not isinstance(self.tensor, str)

  @property
  def axes(self) -> list[int]:
    """The axes of the array that are axes of the tensor, in its order."""
    placed = [(p, k) for k, p in enumerate(self.place) if p is not None]
    return [k for _, k in sorted(placed)]

  def at(self, shape: Sequence[Any], place: Sequence[int | None]) -> 'View':
    """Returns the same tensor as another array."""
    return dataclasses.replace(self, shape=tuple(shape), place=tuple(place))

  def whole(self) -> np.ndarray:
    """Returns the array, where its value is known and no size symbolic."""
    order = range(len(self.shape))
    value = reorder(self, order)
    return (
      value if value.shape == self.shape else np.broadcast_to(value, self.shape)
    )


def constant(value: Any) -> View:
  """Returns a known array as a view of itself."""
  if not jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
    value = np.asarray(value)
  axes = tuple(range(value.ndim))
  return View(value.shape, value.dtype, value, axes, value.ndim)


def is_symbolic(size: Any) -> bool:
  """Whether a size is left open."""
  return export.is_symbolic_dim(size)


def reorder(view: View, order: Sequence[int]) -> np.ndarray:
  """A known tensor with these axes of the array, size 1 where it repeats."""
  places = [view.place[k] for k in order]
  kept = [p for p in places if p is not None]
  unused = [p for p in range(view.rank) if p not in kept]
  tensor: Any = view.tensor
  sizes = [1 if p is None else tensor.shape[p] for p in places]
  return tensor.transpose([*kept, *unused]).reshape(sizes)


def all_axes(view: View, axes: Sequence[int]) -> list[int]:
  """Returns the axes of a view's tensor, in its order, and these."""
  missing = set(axes) - set(view.axes)
  return sorted({*view.axes, *axes}) if missing else view.axes


class Writer:
  """Writes views down on a tape.

  Attributes:
    tape: the nodes so far.
  """

  def __init__(self) -> None:
    self.tape = Tape()
    self._sizes: list[tuple[Any, str]] = []  # Symbols, tensors of shape [1].

  def input(self, name: str, shape: Sequence[Any], dtype: Any) -> View:
    """Returns the view of an input, whose open sizes are now known."""
    symbols = [symbol for symbol, _ in self._sizes]
    for k, size in enumerate(shape):
      if is_symbolic(size) and size not in symbols:
        size_name = self.tape.add('Shape', name, start=k, end=k + 1)
        self._sizes.append((size, size_name))
    axes = tuple(range(len(shape)))
    return View(tuple(shape), np.dtype(dtype), name, axes, len(shape))

  def size(self, size: Any) -> str:
    """Returns a tensor of shape [1] that holds a size, open or not."""
    if not is_symbolic(size):
      return self.tape.integers([int(size)])
    for symbol, name in self._sizes:
      if size == symbol:
        return name
      if size % symbol == 0 and not is_symbolic(size // symbol):
        times = self.tape.integers([int(size // symbol)])
        return self.tape.add('Mul', name, times)
    raise ValueError(f'the size {size} is no multiple of that of an input')

  def sizes(self, sizes: Sequence[Any]) -> str:
    """Returns a tensor that holds sizes."""
    if not any(map(is_symbolic, sizes)):
      return self.tape.integers([int(size) for size in sizes])
    tensors = [self.size(size) for size in sizes]
    return self.tape.add('Concat', *tensors, axis=0)

  def reshape(self, tensor: str, shape: Sequence[Any]) -> str:
    """Adds a Reshape; the one open size, if there is one, is inferred."""
    if sum(map(is_symbolic, shape)) == 1:
      free = [-1 if is_symbolic(size) else int(size) for size in shape]
      return self.tape.add('Reshape', tensor, self.tape.integers(free))
    return self.tape.add('Reshape', tensor, self.sizes(shape))

  def arrange(
    self, view: View, order: Sequence[int], expand: bool = False
  ) -> str:
    """Returns a tensor whose axes are these axes of an array.

    Args:
      view: the array.
      order: its axes in the order wanted, all that it does not repeat along.
      expand: whether to write repetitions down; else they have size 1.
    """
    if view.is_known:
      tensor = self.tape.constant(reorder(view, order))
    else:
      tensor = self._arrange(view, order)
    repeats = [k for k in order if view.place[k] is None and view.shape[k] != 1]
    if expand and repeats:
      sizes = [view.shape[k] if k in repeats else 1 for k in order]
      tensor = self.tape.add('Expand', tensor, self.sizes(sizes))
    return tensor

  def _arrange(self, view: View, order: Sequence[int]) -> str:
    spare = [p for p in range(view.rank) if p not in view.place]
    axes, new = [], []  # Axes of the tensor in order; places of new ones.
    for k, axis in enumerate(order):
      position = view.place[axis]
      if position is None and len(axes) in spare:
        position = len(axes)  # An axis of size 1 that is where one is wanted.
        spare.remove(position)
      if position is None:
        new.append(k)
      else:
        axes.append(position)
    tensor, permutation = str(view.tensor), [*axes, *spare]
    if permutation != sorted(permutation):
      tensor = self.tape.add('Transpose', tensor, perm=permutation)
    if spare:
      gone = self.tape.integers(range(len(axes), view.rank))
      tensor = self.tape.add('Squeeze', tensor, gone)
    if new:
      tensor = self.tape.add('Unsqueeze', tensor, self.tape.integers(new))
    return tensor

  def natural(self, view: View, expand: bool = True) -> str:
    """Returns a tensor in the order of an array, whole by default."""
    return self.arrange(view, range(len(view.shape)), expand)

  def view(
    self,
    tensor: str,
    order: Sequence[int | None],
    shape: Sequence[Any],
    dtype: Any,
  ) -> View:
    """Returns the array whose axes, in this order, a new tensor has.

    Args:
      tensor: its name.
      order: for each axis of the tensor the axis of the array, or None if it
        has size 1 and is none.
      shape: of the array.
      dtype: of both.
    """
    axis_places: list[int | None] = [None] * len(shape)
    for p, k in enumerate(order):
      if k is not None:
        axis_places[k] = p
    return View(
      tuple(shape), np.dtype(dtype), tensor, tuple(axis_places), len(order)
    )
