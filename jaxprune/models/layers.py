"""What the networks share: widths by layer, bypassed blocks, depthwise maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pad = tuple[tuple[int, int], tuple[int, int]]  # Rows, columns: (before, after).
Keep = Mapping[str, Any]  # Name of a block -> bool, or a traced bool scalar.


def widths(params: Mapping[str, Any]) -> dict[str, int]:
  """Returns the width of every layer that has a kernel, by its path.

  A network built with these ``widths`` has parameters of these shapes, so a
  shrunk network is the same module again: ``resnet20(widths=widths(small))``.

  Args:
    params: nested dicts of arrays or ``jax.ShapeDtypeStruct``.

  Returns:
    path of the layer, such as ``'stage1_block1/conv1'`` -> length of the last
    axis of its kernel.

  Examples:
    >>> widths({'block': {'conv': {'kernel': jnp.zeros((3, 3, 2, 8))}}})
    {'block/conv': 8}
  """
  found = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      if 'kernel' in child:
        found[name] = child['kernel'].shape[-1]
      found |= {f'{name}/{rest}': n for rest, n in widths(child).items()}
  return found


def check_widths(module: nn.Module, given: Mapping[str, int]) -> None:
  """Raises ValueError if a width was given that no layer has.

  A layer whose width is fixed by what it reads (a depthwise convolution) or by
  what it is added to (the last convolution of a residual block) may be named,
  with that width. Costs nothing but Python at trace time.

  Args:
    module: a bound module, after its layers were called.
    given: path of a layer -> width.
  """
  have = widths(module.variables['params']) if given else {}
  unknown = sorted(set(given) - set(have))
  if unknown:
    raise ValueError(
      f'`widths` names {", ".join(map(repr, unknown))}, and '
      f'{type(module).__name__} has no such layer; it has: {", ".join(have)}.'
    )
  wrong = [
    f'{name!r} must be {have[name]}, got {n}'
    for name, n in given.items()
    if n != have[name]
  ]
  if wrong:
    raise ValueError(
      f'`widths` of {"; ".join(wrong)}: the width of a layer that is added to '
      f'a residual stream or works on each channel alone is that of its '
      f'stream. Change the layer that opens the stream.'
    )


def check_images(x: Array) -> None:
  """Raises unless x is a batch of float images, or of features of them.

  Args:
    x: shape (batch, height, width, channels), floating point.
  """
  if x.ndim != 4:
    raise ValueError(
      f'Images must have shape (batch, height, width, channels), got {x.shape}.'
    )
  check_floats(x)


def check_floats(x: Array) -> None:
  """Raises TypeError unless x is floating point."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'Images must be floating point, got {x.dtype}; scale them first, for '
      f'example x / 255.'
    )


def check_names(what: str, names: Any, known: list[str], why: str) -> None:
  """Raises ValueError if ``names`` holds one that is not in ``known``."""
  unknown = sorted(set(names) - set(known))
  if unknown:
    raise ValueError(
      f'`{what}` names {", ".join(map(repr, unknown))}; {why}: '
      f'{", ".join(known) or "none"}.'
    )


def check_choice(what: str, given: Any, known: Sequence[str]) -> None:
  """Raises ValueError unless ``given`` is one of the names in ``known``."""
  if given not in known:
    raise ValueError(
      f'`{what}` must be one of {", ".join(map(repr, known))}, got {given!r}.'
    )


def check_lengths(**given: Sequence[int]) -> None:
  """Raises ValueError unless all have one entry for each stage."""
  if len({len(value) for value in given.values()}) > 1:
    found = ', '.join(f'{name} {len(n)}' for name, n in given.items())
    raise ValueError(
      f'Each needs one entry for each stage, got of {found} entries.'
    )


def check_stages(start: int, stop: int | None, count: int) -> int:
  """Returns the stage to stop before; raises unless 0 <= start < stop."""
  stop = count if stop is None else stop
  if not 0 <= start < stop <= count:
    raise ValueError(
      f'Stages must satisfy 0 <= start < stop <= {count}, got '
      f'start={start}, stop={stop}.'
    )
  return stop


def kept(keep: Keep | None, drop: Sequence[str], known: list[str]) -> Keep:
  """Returns name -> whether to run it, for every block that can be skipped."""
  why = 'the blocks that can be skipped are'
  check_names('drop', drop, known, why)
  check_names('keep', keep or {}, known, why)
  return {**(keep or {}), **dict.fromkeys(drop, False)}


def bypass(block: Any, x: Array, *args: Any, keep: Any) -> Array:
  """Returns ``block(x, *args)`` if ``keep``, else x.

  A Python bool decides at trace time. A traced one decides at run time, and the
  statistics of a block that was skipped stay as they were.
  """
  if keep is True:
    return block(x, *args)
  if keep is False:
    return x
  run = lambda block, x: block(x, *args)
  return nn.cond(keep, run, lambda block, x: x, block, x)


def pool(x: Array) -> Array:
  """Returns the mean over height and width; shape (batch, channels)."""
  return jnp.mean(x, axis=(1, 2))


def conv(
  width: int, kernel: int, stride: int, padding: Pad, dtype: Any, name: str
) -> nn.Conv:
  """Returns a square convolution without bias, started as He et al. do."""
  return nn.Conv(
    width,
    (kernel, kernel),
    stride,
    padding,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.he_normal(),
    name=name,
  )


def norm(
  train: bool, momentum: float, epsilon: float, dtype: Any, name: str
) -> nn.BatchNorm:
  """Returns a batch normalisation; ``momentum`` is that of the running mean."""
  return nn.BatchNorm(
    not train, momentum=momentum, epsilon=epsilon, dtype=dtype, name=name
  )


def max_pool(x: Array, window: int, stride: int, padding: Any) -> Array:
  """Returns the maximum over square windows; ``padding`` counts as -inf."""
  return nn.max_pool(x, (window, window), (stride, stride), padding)


def same(kernel: int) -> Pad:
  """Returns the padding that keeps the side at stride 1, written out.

  Never ``'SAME'``: at stride 2 that pads even and odd sides differently, so a
  small image in a large canvas would not give what the small image gives.

  Examples:
    >>> same(3)
    ((1, 1), (1, 1))
  """
  pad = ((kernel - 1) // 2, kernel // 2)
  return pad, pad


def tensorflow_pad(kernel: int, stride: int) -> Pad:
  """Returns TensorFlow's padding of an even side, written out.

  Examples:
    >>> tensorflow_pad(3, 1), tensorflow_pad(3, 2)
    (((1, 1), (1, 1)), ((0, 1), (0, 1)))
  """
  total = kernel - stride
  pad = (total // 2, total - total // 2)
  return pad, pad


class DepthwiseConv(nn.Module):
  """A convolution of each channel with a kernel of its own, without bias.

  XLA's grouped convolution is slow on CPU. There the same sum is written as
  shifted slices of the padded input times rows of the kernel, accumulated in
  float32: y[h, w, c] = sum over i, j of x[s h + i, s w + j, c] k[i, j, 0, c].

  Attributes:
    kernel_size: side of the kernel.
    stride: step in both directions.
    padding: rows and columns added, ((before, after), (before, after)).
    grouped: True for ``lax.conv_general_dilated`` with one group a channel,
      False for shift-and-add, None for what the default backend does faster.
    dtype: dtype of the computation; the kernel is float32.
  """

  kernel_size: int
  stride: int
  padding: Pad
  grouped: bool | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the convolved images; shape (batch, rows, columns, channels)."""
    side, channels = self.kernel_size, x.shape[-1]
    # Fan-in, 1 / side^2: the usual fan-out is `channels` times too large here
    # and the signal would fade from layer to layer.
    init = nn.initializers.he_normal()
    kernel = self.param('kernel', init, (side, side, 1, channels), jnp.float32)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    grouped = self.grouped
    if grouped is None:
      grouped = jax.default_backend() != 'cpu'
    if grouped:
      strides, names = (self.stride,) * 2, ('NHWC', 'HWIO', 'NHWC')
      return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        self.padding,
        dimension_numbers=names,
        feature_group_count=channels,
      )
    return shift_and_add(x, kernel, self.stride, self.padding)


def shift_and_add(x: Array, kernel: Array, stride: int, padding: Pad) -> Array:
  """Returns the depthwise convolution of x, as a sum of shifted products.

  Args:
    x: images; shape (batch, height, width, channels).
    kernel: shape (rows, columns, 1, channels).
    stride: step in both directions; static.
    padding: ((before, after), (before, after)) of height and width; static.

  Returns:
    float array of x's dtype; shape (batch, rows, columns, channels).
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  batch, height, width, channels = x.shape
  rows, columns = kernel.shape[:2]
  high, wide = height - rows + 1, width - columns + 1

  def part(i: int, j: int) -> Array:
    start, stop = (0, i, j, 0), (batch, i + high, j + wide, channels)
    part = lax.slice(x, start, stop, (1, stride, stride, 1))
    row = lax.slice(kernel, (i, j, 0, 0), (i + 1, j + 1, 1, channels))
    return part.astype(jnp.float32) * row

  first, *rest = (part(i, j) for i in range(rows) for j in range(columns))
  return sum(rest, first).astype(x.dtype)
