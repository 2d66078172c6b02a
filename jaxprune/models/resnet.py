"""Residual networks: ResNet, its CIFAR form, and Wide ResNet."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.models import layers
from jaxprune.models.layers import Array, Keep

Shortcut = Literal['identity', 'projection', 'pad']


class Block(nn.Module):
  """relu(x' + F(x)), F two 3 x 3 convolutions or 1 x 1, 3 x 3, 1 x 1.

  Attributes:
    widths: channels after each convolution; three of them are a bottleneck. The
      last is that of the residual stream.
    stride: of the first 3 x 3 convolution, and of the shortcut.
    shortcut: x' is x ('identity'), a strided 1 x 1 convolution and a norm
      ('projection', option B), or x strided and padded with zero channels
      ('pad', option A).
    pad: zero channels before those of x, for option A; None for half of them.
    dtype: dtype of the computation; parameters are float32.
  """

  widths: Sequence[int]
  stride: int = 1
  shortcut: Shortcut = 'identity'
  pad: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Returns the block's output; shape (batch, rows, columns, widths[-1])."""
    known = ('identity', 'projection', 'pad')
    layers.check_choice('shortcut', self.shortcut, known)
    kernels = (3, 3) if len(self.widths) == 2 else (1, 3, 1)
    strides = (self.stride, 1) if len(self.widths) == 2 else (1, self.stride, 1)
    y = x
    for i, (width, kernel, stride) in enumerate(
      zip(self.widths, kernels, strides, strict=True), 1
    ):
      y = _conv(width, kernel, stride, self.dtype, f'conv{i}')(y)
      y = _norm(train, self.dtype, f'norm{i}')(y)
      y = nn.relu(y) if i < len(kernels) else y
    if self.shortcut == 'projection':
      x = _conv(self.widths[-1], 1, self.stride, self.dtype, 'shortcut')(x)
      x = _norm(train, self.dtype, 'shortcut_norm')(x)
    elif self.shortcut == 'pad':
      x = _pad_channels(x, self.widths[-1], self.stride, self.pad)
    return nn.relu(y + x)


class ResNet(nn.Module):
  """A residual network (He et al., 2015, arXiv:1512.03385).

  The layers are ``stem``, ``stage{s}_block{b}/conv{i}`` and ``/shortcut``, and
  ``head``; ``norm`` follows each convolution under a like name.

  Attributes:
    channels: width of the residual stream in each stage.
    blocks: number of blocks in each stage.
    num_classes: width of the last dense layer.
    strides: of the first block of each stage; by default 1, then 2.
    bottleneck: three convolutions a block, the inner ones a quarter as wide.
    stem: 'small', a 3 x 3 convolution, or 'large', 7 x 7 at stride 2 and a
      3 x 3 max-pooling at stride 2.
    stem_channels: width of the stem; by default that of the first stage.
    shortcut: of a block that changes the width or the resolution: 'projection'
      (option B) or 'pad' (option A, without parameters).
    head: 'pool', the mean over positions, or 'flatten', every position; then
      the input resolution is part of the shape of the last kernel.
    widths: path of a layer -> width, where it is not the one above. The stem
      and the last convolution of a block with a projection or a padding open
      a stream; the other last convolutions follow it.
    pads: name of a block -> zero channels before those of the input (option A);
      by default half of them.
    drop: names of blocks to leave out, of those with an identity shortcut.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  channels: Sequence[int]
  blocks: Sequence[int]
  num_classes: int = 1000
  strides: Sequence[int] | None = None
  bottleneck: bool = False
  stem: Literal['small', 'large'] = 'large'
  stem_channels: int | None = None
  shortcut: Literal['projection', 'pad'] = 'projection'
  head: Literal['pool', 'flatten'] = 'pool'
  widths: Mapping[str, int] = field(default_factory=dict)
  pads: Mapping[str, int] = field(default_factory=dict)
  drop: Sequence[str] = ()
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(self.blocks)

  @property
  def bypassable(self) -> list[str]:
    """Names of the blocks that can be skipped: identity shortcuts."""
    return [name for name, _, _, kind in self._plan() if kind == 'identity']

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
      train: static; normalise by the batch and update the running statistics.
      start: first stage to run; 0 also runs the stem. Static.
      stop: stage to stop before; None, or their number, also runs the head.
        Static.
      keep: name of a block -> bool, of those in ``bypassable``; False skips it.
        A Python bool is static, an array may be traced.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if ``stem``, ``shortcut`` or
        ``head`` is another name, if ``channels``, ``blocks`` and ``strides``
        differ in length, if ``widths``, ``pads``, ``drop`` or ``keep`` name
        what is not there, or if a width contradicts the stream.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    layers.check_choice('stem', self.stem, ('small', 'large'))
    layers.check_choice('shortcut', self.shortcut, ('projection', 'pad'))
    layers.check_choice('head', self.head, ('pool', 'flatten'))
    layers.check_lengths(
      channels=self.channels,
      blocks=self.blocks,
      strides=self.strides or self.blocks,
    )
    keep = layers.kept(keep, self.drop, self.bypassable)
    padded = [name for name, _, _, kind in self._plan() if kind == 'pad']
    layers.check_names('pads', self.pads, padded, 'the blocks that pad are')
    stop = layers.check_stages(start, stop, self.num_stages)
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    if start == 0:
      x = self._stem(x, train)
    for name, stage, stride, kind in self._plan():
      if not start <= stage < stop:
        continue
      stream = self.channels[stage]
      inner = stream // 4 if self.bottleneck else stream
      inner = [inner, inner] if self.bottleneck else [inner]
      sizes = [
        self.widths.get(f'{name}/conv{i}', n) for i, n in enumerate(inner, 1)
      ]
      last = self.widths.get(f'{name}/conv{len(inner) + 1}', stream)
      sizes.append(x.shape[-1] if kind == 'identity' else last)
      pad = self.pads.get(name)
      run = block(sizes, stride, kind, pad, self.dtype, name=name)
      x = layers.bypass(run, x, train, keep=keep.get(name, True))
    if stop == self.num_stages:
      x = layers.pool(x) if self.head == 'pool' else x.reshape(x.shape[0], -1)
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x

  def _stem(self, x: Array, train: bool) -> Array:
    width = self.stem_channels or self.channels[0]
    width = self.widths.get('stem', width)
    kernel, stride = (3, 1) if self.stem == 'small' else (7, 2)
    x = _conv(width, kernel, stride, self.dtype, 'stem')(x)
    x = nn.relu(_norm(train, self.dtype, 'stem_norm')(x))
    if self.stem == 'large':
      x = layers.max_pool(x, 3, 2, layers.same(3))
    return x

  def _plan(self) -> list[tuple[str, int, int, Shortcut]]:
    """Returns the name, stage, stride and shortcut of every block."""
    # By the published widths, not by those given: a network keeps its
    # projections when it shrinks.
    width = self.stem_channels or self.channels[0]
    strides = self.strides or (1, *[2] * (len(self.blocks) - 1))
    rows = []
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        stride = strides[stage] if i == 0 else 1
        changes = stride != 1 or width != self.channels[stage]
        kind = self.shortcut if changes else 'identity'
        rows.append((f'stage{stage + 1}_block{i + 1}', stage, stride, kind))
        width = self.channels[stage]
    return rows


class PreActivationBlock(nn.Module):
  """x' + conv(relu(norm(conv(a)))), with a = relu(norm(x)).

  x' is x, or a 1 x 1 convolution of a at the block's stride.

  Attributes:
    widths: channels after each of the two 3 x 3 convolutions.
    stride: of the first convolution, and of the shortcut.
    projects: whether the shortcut is the convolution.
    dropout: rate between the two convolutions in training.
    dtype: dtype of the computation; parameters are float32.
  """

  widths: Sequence[int]
  stride: int = 1
  projects: bool = False
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Returns the block's output; shape (batch, rows, columns, widths[1])."""
    inner, stream = self.widths
    a = nn.relu(_norm(train, self.dtype, 'norm1')(x))
    y = _conv(inner, 3, self.stride, self.dtype, 'conv1')(a)
    y = nn.relu(_norm(train, self.dtype, 'norm2')(y))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    y = _conv(stream, 3, 1, self.dtype, 'conv2')(y)
    if self.projects:
      x = _conv(stream, 1, self.stride, self.dtype, 'shortcut')(a)
    return y + x


class WideResNet(nn.Module):
  """A wide residual network (Zagoruyko & Komodakis, 2016, arXiv:1605.07146).

  The layers are ``stem``, ``stage{s}_block{b}/conv{i}`` and ``/shortcut``, and
  ``head``; the last norm is ``norm``.

  Attributes:
    depth: 6 n + 4 for n blocks in each of the three stages.
    factor: the stages are 16, 32 and 64 times ``factor`` wide.
    num_classes: width of the last dense layer.
    dropout: rate inside each block in training; needs the rng 'dropout'.
    widths: path of a layer -> width, where it is not the one above. The stem
      and the second convolution of a block with a projection open a stream.
    drop: names of blocks to leave out, of those with an identity shortcut.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  depth: int = 16
  factor: int = 8
  num_classes: int = 10
  dropout: float = 0.0
  widths: Mapping[str, int] = field(default_factory=dict)
  drop: Sequence[str] = ()
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return 3

  @property
  def bypassable(self) -> list[str]:
    """Names of the blocks that can be skipped: identity shortcuts."""
    count = (self.depth - 4) // 6
    pairs = [(s, b) for s in (1, 2, 3) for b in range(2, count + 1)]
    return [f'stage{s}_block{b}' for s, b in pairs]

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

    Arguments, result and errors are those of :class:`ResNet`; a ``depth`` that
    is not 6 n + 4 is a ValueError too.
    """
    if self.depth < 10 or (self.depth - 4) % 6:
      raise ValueError(f'`depth` must be 6 n + 4, n >= 1, got {self.depth}.')
    layers.check_images(x)
    keep = layers.kept(keep, self.drop, self.bypassable)
    stop = layers.check_stages(start, stop, self.num_stages)
    block = PreActivationBlock
    block = nn.remat(block, static_argnums=(2,)) if self.remat else block
    if start == 0:
      width = self.widths.get('stem', 16)
      x = _conv(width, 3, 1, self.dtype, 'stem')(x)
    for stage in range(start, stop):
      for i in range((self.depth - 4) // 6):
        name, stream = (
          f'stage{stage + 1}_block{i + 1}',
          self.factor << 4 + stage,
        )
        inner = self.widths.get(f'{name}/conv1', stream)
        last = self.widths.get(f'{name}/conv2', stream)
        sizes = (inner, last if i == 0 else x.shape[-1])
        stride = 2 if i == 0 and stage > 0 else 1
        run = block(sizes, stride, i == 0, self.dropout, self.dtype, name=name)
        x = layers.bypass(run, x, train, keep=keep.get(name, True))
    if stop == self.num_stages:
      x = layers.pool(nn.relu(_norm(train, self.dtype, 'norm')(x)))
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x


def _conv(width: int, kernel: int, stride: int, dtype: Any, name: str):
  padding = layers.same(kernel)
  return layers.conv(width, kernel, stride, padding, dtype, name)


def _norm(train: bool, dtype: Any, name: str):
  return layers.norm(train, 0.9, 1e-5, dtype, name)


def _pad_channels(x: Array, width: int, stride: int, before: int | None):
  """Returns every stride-th position of x, with zero channels at both ends."""
  extra = width - x.shape[-1]
  before = extra // 2 if before is None else before
  if not 0 <= before <= extra:
    raise ValueError(
      f'A shortcut without parameters takes {x.shape[-1]} channels to {width} '
      f'with {before} zero channels before them; it can only add channels.'
    )
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, extra - before)))


# For ImageNet (He et al., Table 1), in the form with the stride in the 3 x 3
# convolution of a bottleneck, which is torchvision's. Keywords are ResNet's.
_basic = functools.partial(ResNet, channels=(64, 128, 256, 512))
_bottleneck = functools.partial(
  ResNet, channels=(256, 512, 1024, 2048), stem_channels=64, bottleneck=True
)
resnet18 = functools.partial(_basic, blocks=(2, 2, 2, 2))
resnet34 = functools.partial(_basic, blocks=(3, 4, 6, 3))
resnet50 = functools.partial(_bottleneck, blocks=(3, 4, 6, 3))
resnet101 = functools.partial(_bottleneck, blocks=(3, 4, 23, 3))

# For CIFAR-10 (He et al., section 4.2): option A, or `shortcut='projection'`.
_cifar = functools.partial(
  ResNet,
  channels=(16, 32, 64),
  num_classes=10,
  stem='small',
  shortcut='pad',
)
resnet20 = functools.partial(_cifar, blocks=(3, 3, 3))
resnet32 = functools.partial(_cifar, blocks=(5, 5, 5))
resnet44 = functools.partial(_cifar, blocks=(7, 7, 7))
resnet56 = functools.partial(_cifar, blocks=(9, 9, 9))
resnet110 = functools.partial(_cifar, blocks=(18, 18, 18))

# For 8 x 8 digits: projections, and every position of the last feature map.
resnet_digits = functools.partial(
  ResNet,
  channels=(16, 32, 64),
  blocks=(1, 1, 1),
  num_classes=10,
  stem='small',
  head='flatten',
)

wrn_16_8 = functools.partial(WideResNet, depth=16, factor=8)
