"""MobileNet V1, V2 and V3: depthwise convolutions between 1 x 1 ones."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.models import layers
from jaxprune.models.layers import Array, Keep, Pad


class Row(NamedTuple):
  """One line of a table of MobileNet V2 or V3: an inverted residual block."""

  kernel: int  # Side of the depthwise convolution.
  expand: int  # Channels between the two 1 x 1 convolutions.
  out: int  # Channels after the block.
  squeeze: bool  # Whether it has squeeze-and-excitation.
  activation: Callable[[Array], Array]
  stride: int


class Separable(nn.Module):
  """A depthwise and a 1 x 1 convolution, each normalised, then relu6.

  Attributes:
    width: channels after the block.
    stride: of the depthwise convolution.
    padding: of the depthwise convolution.
    epsilon: of the norms.
    grouped: see :class:`jaxprune.models.layers.DepthwiseConv`.
    dtype: dtype of the computation; parameters are float32.
  """

  width: int
  stride: int
  padding: Pad
  epsilon: float
  grouped: bool | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Returns the block's output; shape (batch, rows, columns, width)."""
    norm = lambda name: layers.norm(train, 0.99, self.epsilon, self.dtype, name)
    x = layers.DepthwiseConv(
      3, self.stride, self.padding, self.grouped, self.dtype, name='depthwise'
    )(x)
    x = nn.relu6(norm('depthwise_norm')(x))
    pad = layers.same(1)
    x = layers.conv(self.width, 1, 1, pad, self.dtype, 'pointwise')(x)
    return nn.relu6(norm('pointwise_norm')(x))


class MobileNetV1(nn.Module):
  """MobileNet V1 (Howard et al., 2017, arXiv:1704.04861), Table 1.

  The layers are ``stem``, ``stage{s}_block{b}/depthwise`` and ``/pointwise``,
  and ``head``; a stage is a resolution. As published: relu6 and TensorFlow's
  padding.

  Attributes:
    multiplier: every width is int(multiplier * the published one).
    num_classes: width of the last dense layer.
    stem: 'large', at stride 2, or 'small', at stride 1.
    channels: width of each stage.
    blocks: number of blocks in each stage.
    strides: of the first block of each stage.
    tensorflow_padding: at stride 2 pad (0, 1), as TensorFlow does on even
      sides, else (1, 1), as PyTorch does.
    epsilon: of the norms; 1e-5 in timm.
    dropout: rate before the last layer in training; needs the rng 'dropout'.
    widths: path of a layer -> width, where it is not the one above. A depthwise
      convolution has the width of its input.
    drop: names of blocks to leave out, of those that keep width and resolution.
    skippable: whether those blocks are written x + (F(x) - x), the same to
      rounding: in it a trace finds the shortcut that leaves them out.
    grouped: see :class:`jaxprune.models.layers.DepthwiseConv`.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  multiplier: float = 1.0
  num_classes: int = 1000
  stem: Literal['small', 'large'] = 'large'
  channels: Sequence[int] = (64, 128, 256, 512, 1024)
  blocks: Sequence[int] = (1, 2, 2, 6, 2)
  strides: Sequence[int] = (1, 2, 2, 2, 2)
  tensorflow_padding: bool = True
  epsilon: float = 1e-3
  dropout: float = 1e-3
  widths: Mapping[str, int] = field(default_factory=dict)
  drop: Sequence[str] = ()
  skippable: bool = False
  grouped: bool | None = None
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(self.blocks)

  @property
  def bypassable(self) -> list[str]:
    """Names of the blocks that can be skipped: same width and resolution."""
    return [name for name, _, _, _, same in self._plan() if same]

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    start: int = 0,
    stop: int | None = None,
    keep: Keep | None = None,
  ) -> Array:
    """Returns the logits, or the features at the end of a stage.

    Args:
      x: images; float, shape (batch, height, width, channels), or the features
        that enter stage ``start``.
      train: static; normalise by the batch, update the running statistics and
        drop out.
      start: first stage to run; 0 also runs the stem. Static.
      stop: stage to stop before; None, or their number, also runs the head.
        Static.
      keep: name of a block -> bool, of those in ``bypassable``; False skips it:
        there is no shortcut, what enters it leaves it. A Python bool is static,
        an array may be traced.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if ``stem`` is another name, if
        ``channels``, ``blocks`` and ``strides`` differ in length, if
        ``widths``, ``drop`` or ``keep`` name what is not there, or if a width
        contradicts that of a depthwise convolution.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    layers.check_choice('stem', self.stem, ('small', 'large'))
    layers.check_lengths(
      channels=self.channels, blocks=self.blocks, strides=self.strides
    )
    keep = layers.kept(keep, self.drop, self.bypassable)
    stop = layers.check_stages(start, stop, self.num_stages)
    block = (
      nn.remat(Separable, static_argnums=(2,)) if self.remat else Separable
    )
    pad = _padding(self.tensorflow_padding)
    if start == 0:
      width = self.widths.get('stem', int(32 * self.multiplier))
      stride = 2 if self.stem == 'large' else 1
      padding = pad(3, stride)
      x = layers.conv(width, 3, stride, padding, self.dtype, 'stem')(x)
      x = layers.norm(train, 0.99, self.epsilon, self.dtype, 'stem_norm')(x)
      x = nn.relu6(x)
    for name, stage, width, stride, same in self._plan():
      if not start <= stage < stop:
        continue
      width = self.widths.get(f'{name}/pointwise', width)
      options = (self.epsilon, self.grouped, self.dtype)
      run = block(width, stride, pad(3, stride), *options, name=name)
      y = layers.bypass(run, x, train, keep=keep.get(name, True))
      x = x + (y - x) if self.skippable and same else y
    if stop == self.num_stages:
      x = nn.Dropout(self.dropout, deterministic=not train)(layers.pool(x))
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x

  def _plan(self) -> list[tuple[str, int, int, int, bool]]:
    """Returns name, stage, width, stride, bypassable or not, of each block."""
    # By the published widths, not by those given: a network keeps its blocks
    # when it shrinks.
    plan, before = [], 32
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        name = f'stage{stage + 1}_block{i + 1}'
        stride = self.strides[stage] if i == 0 else 1
        after = self.channels[stage]
        width = int(after * self.multiplier)
        plan.append(
          (name, stage, width, stride, stride == 1 and before == after)
        )
        before = after
    return plan


class InvertedResidual(nn.Module):
  """A wide depthwise convolution between two 1 x 1 ones, the last linear.

  Attributes:
    row: the kernel, activation and stride; its widths are not used.
    expand: channels after the first 1 x 1 convolution; None leaves it out.
    squeeze: channels inside the squeeze-and-excitation; None leaves it out.
    out: channels after the block.
    identity: whether x is added to the result.
    padding: of the depthwise convolution.
    momentum: of the running statistics.
    epsilon: of the norms.
    grouped: see :class:`jaxprune.models.layers.DepthwiseConv`.
    dtype: dtype of the computation; parameters are float32.
  """

  row: Row
  expand: int | None
  squeeze: int | None
  out: int
  identity: bool
  padding: Pad
  momentum: float
  epsilon: float
  grouped: bool | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Returns the block's output; shape (batch, rows, columns, out)."""
    act = self.row.activation
    norm = lambda name: layers.norm(
      train, self.momentum, self.epsilon, self.dtype, name
    )
    pad = layers.same(1)
    y = x
    if self.expand is not None:
      y = layers.conv(self.expand, 1, 1, pad, self.dtype, 'expand')(y)
      y = act(norm('expand_norm')(y))
    y = layers.DepthwiseConv(
      self.row.kernel,
      self.row.stride,
      self.padding,
      self.grouped,
      self.dtype,
      name='depthwise',
    )(y)
    y = act(norm('depthwise_norm')(y))
    if self.squeeze is not None:
      dense = functools.partial(nn.Dense, dtype=self.dtype)
      s = nn.relu(dense(self.squeeze, name='squeeze')(layers.pool(y)))
      s = nn.hard_sigmoid(dense(y.shape[-1], name='excite')(s))
      y = y * s[:, None, None]
    y = layers.conv(self.out, 1, 1, pad, self.dtype, 'project')(y)
    y = norm('project_norm')(y)
    return x + y if self.identity else y


class MobileNet(nn.Module):
  """A network of inverted residual blocks: MobileNet V2 and V3.

  Sandler et al. (2018, arXiv:1801.04381), Table 2; Howard et al. (2019,
  arXiv:1905.02244), Tables 1 and 2. The layers are ``stem``,
  ``stage{s}_block{b}/expand``, ``/depthwise``, ``/squeeze``, ``/excite`` and
  ``/project``, ``last``, ``hidden`` and ``head``.

  Attributes:
    table: the rows of every stage.
    stem_channels: width of the first convolution.
    last: width of the 1 x 1 convolution after the blocks.
    hidden: width of a dense layer before the last one; None leaves it out.
    activation: of the stem and of the layers after the blocks.
    momentum: of the running statistics.
    epsilon: of the norms.
    num_classes: width of the last dense layer.
    stem: 'large', at stride 2, or 'small', at stride 1.
    tensorflow_padding: at stride 2 pad as TensorFlow does on even sides, for a
      3 x 3 kernel (0, 1), else evenly, as PyTorch does.
    dropout: rate before the last layer in training; needs the rng 'dropout'.
    widths: path of a layer -> width, where it is not the one above. The stem
      and ``project`` of a block without an identity shortcut open a stream; a
      depthwise convolution and ``excite`` have the width of their input.
    drop: names of blocks to leave out, of those with an identity shortcut.
    grouped: see :class:`jaxprune.models.layers.DepthwiseConv`.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  table: Sequence[Sequence[Row]]
  stem_channels: int
  last: int
  hidden: int | None
  activation: Callable[[Array], Array]
  momentum: float
  epsilon: float
  num_classes: int = 1000
  stem: Literal['small', 'large'] = 'large'
  tensorflow_padding: bool = False
  dropout: float = 0.2
  widths: Mapping[str, int] = field(default_factory=dict)
  drop: Sequence[str] = ()
  grouped: bool | None = None
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(self.table)

  @property
  def bypassable(self) -> list[str]:
    """Names of the blocks that can be skipped: identity shortcuts."""
    return [name for name, _, _, _, identity in self._plan() if identity]

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    start: int = 0,
    stop: int | None = None,
    keep: Keep | None = None,
  ) -> Array:
    """Returns the logits, or the features at the end of a stage.

    Args:
      x: images; float, shape (batch, height, width, channels), or the features
        that enter stage ``start``.
      train: static; normalise by the batch, update the running statistics and
        drop out.
      start: first stage to run; 0 also runs the stem. Static.
      stop: stage to stop before; None, or their number, also runs the layers
        after the blocks. Static.
      keep: name of a block -> bool, of those in ``bypassable``; False skips it.
        A Python bool is static, an array may be traced.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if ``stem`` is another name, if
        ``widths``, ``drop`` or ``keep`` name what is not there, or if a width
        contradicts the stream.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    layers.check_choice('stem', self.stem, ('small', 'large'))
    keep = layers.kept(keep, self.drop, self.bypassable)
    stop = layers.check_stages(start, stop, self.num_stages)
    block = InvertedResidual
    block = nn.remat(block, static_argnums=(2,)) if self.remat else block
    pad = _padding(self.tensorflow_padding)
    if start == 0:
      stride = 2 if self.stem == 'large' else 1
      x = self._unit(x, 'stem', self.stem_channels, 3, stride, train)
    for name, stage, row, width, identity in self._plan():
      if not start <= stage < stop:
        continue
      given = lambda layer, n, name=name: self.widths.get(f'{name}/{layer}', n)
      expands, squeeze = row.expand != width, _divisible(row.expand // 4)
      run = block(
        row,
        given('expand', row.expand) if expands else None,
        given('squeeze', squeeze) if row.squeeze else None,
        x.shape[-1] if identity else given('project', row.out),
        identity,
        pad(row.kernel, row.stride),
        self.momentum,
        self.epsilon,
        self.grouped,
        self.dtype,
        name=name,
      )
      x = layers.bypass(run, x, train, keep=keep.get(name, True))
    if stop == self.num_stages:
      x = layers.pool(self._unit(x, 'last', self.last, 1, 1, train))
      if self.hidden is not None:
        width = self.widths.get('hidden', self.hidden)
        x = nn.Dense(width, dtype=self.dtype, name='hidden')(x)
        x = self.activation(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x

  def _unit(
    self, x: Array, name: str, width: int, kernel: int, stride: int, train: bool
  ) -> Array:
    width, dtype = self.widths.get(name, width), self.dtype
    padding = _padding(self.tensorflow_padding)(kernel, stride)
    x = layers.conv(width, kernel, stride, padding, dtype, name)(x)
    norm = (train, self.momentum, self.epsilon, dtype, f'{name}_norm')
    return self.activation(layers.norm(*norm)(x))

  def _plan(self) -> list[tuple[str, int, Row, int, bool]]:
    """Returns name, stage, row, input width, identity or not, of each block."""
    # By the published widths, not by those given: a network keeps its shortcuts
    # when it shrinks.
    width, plan = self.stem_channels, []
    for stage, rows in enumerate(self.table):
      for i, row in enumerate(rows):
        name = f'stage{stage + 1}_block{i + 1}'
        identity = row.stride == 1 and row.out == width
        plan.append((name, stage, row, width, identity))
        width = row.out
    return plan


def mobilenet_v1(multiplier: float = 1.0, **options: Any) -> MobileNetV1:
  """Returns MobileNet V1; keywords are those of :class:`MobileNetV1`."""
  return MobileNetV1(multiplier, **options)


def mobilenet_v2(multiplier: float = 1.0, **options: Any) -> MobileNet:
  """Returns MobileNet V2, each line of its table a stage.

  Args:
    multiplier: every width is the multiple of 8 next to ``multiplier`` times
      the published one; the last convolution only grows.
    **options: keywords of :class:`MobileNet`.
  """
  # Expansion, channels, blocks, stride of the first.
  lines = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
  )
  stem = width = _divisible(32 * multiplier)
  table = []
  for times, channels, blocks, stride in lines:
    rows, out = [], _divisible(channels * multiplier)
    for i in range(blocks):
      expand, step = times * width, stride if i == 0 else 1
      rows.append(Row(3, expand, out, False, nn.relu6, step))
      width = out
    table.append(tuple(rows))
  last = _divisible(1280 * max(1.0, multiplier))
  defaults: dict[str, Any] = {
    'table': tuple(table),
    'stem_channels': stem,
    'last': last,
    'hidden': None,
    'activation': nn.relu6,
    'momentum': 0.9,
    'epsilon': 1e-5,
  }
  return MobileNet(**defaults | options)


# Kernel, expanded channels, channels, squeeze-and-excitation, hard-swish or
# relu, stride: Howard et al. (2019), Tables 1 and 2, by resolution.
_V3_LARGE = (
  ((3, 16, 16, 0, 0, 1),),
  ((3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1)),
  ((5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1), (5, 120, 40, 1, 0, 1)),
  (
    (3, 240, 80, 0, 1, 2),
    (3, 200, 80, 0, 1, 1),
    (3, 184, 80, 0, 1, 1),
    (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1),
    (3, 672, 112, 1, 1, 1),
  ),
  ((5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1)),
)
_V3_SMALL = (
  ((3, 16, 16, 1, 0, 2),),
  ((3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1)),
  (
    (5, 96, 40, 1, 1, 2),
    (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1),
    (5, 120, 48, 1, 1, 1),
    (5, 144, 48, 1, 1, 1),
  ),
  ((5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1), (5, 576, 96, 1, 1, 1)),
)


def mobilenet_v3_large(multiplier: float = 1.0, **options: Any) -> MobileNet:
  """Returns MobileNet V3 large; keywords are those of :class:`MobileNet`.

  Args:
    multiplier: every width is the multiple of 8 next to ``multiplier`` times
      the published one.
    **options: keywords of :class:`MobileNet`.
  """
  return _v3(_V3_LARGE, 1280, multiplier, options)


def mobilenet_v3_small(multiplier: float = 1.0, **options: Any) -> MobileNet:
  """Returns MobileNet V3 small; arguments as :func:`mobilenet_v3_large`."""
  return _v3(_V3_SMALL, 1024, multiplier, options)


def _v3(lines, hidden: int, multiplier: float, options: dict[str, Any]):
  scaled = lambda n: _divisible(n * multiplier)
  row = lambda kernel, expand, out, squeeze, hard, stride: Row(
    kernel,
    scaled(expand),
    scaled(out),
    bool(squeeze),
    nn.hard_swish if hard else nn.relu,
    stride,
  )
  table = tuple(tuple(row(*line) for line in stage) for stage in lines)
  defaults: dict[str, Any] = {
    'table': table,
    'stem_channels': scaled(16),
    'last': 6 * table[-1][-1].out,
    'hidden': scaled(hidden),
    'activation': nn.hard_swish,
    'momentum': 0.99,
    'epsilon': 1e-3,
  }
  return MobileNet(**defaults | options)


def _padding(tensorflow: bool) -> Callable[[int, int], Pad]:
  if tensorflow:
    return layers.tensorflow_pad
  return lambda kernel, stride: layers.same(kernel)


def _divisible(width: float) -> int:
  """Returns the nearest multiple of 8, at least 8 and at least 0.9 of width."""
  near = max(8, int(width + 4) // 8 * 8)
  return near + 8 if near < 0.9 * width else near
