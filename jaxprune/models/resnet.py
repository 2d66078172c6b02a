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
      ValueError: if x is no batch of images, if ``widths``, ``pads``, ``drop``
        or ``keep`` name what is not there, or if a width contradicts the
        stream.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    keep = {**(keep or {}), **dict.fromkeys(self.drop, False)}
    why = 'the blocks with an identity shortcut are'
    layers.check_names('drop', self.drop, self.bypassable, why)
    layers.check_names('keep', keep, self.bypassable, why)
    padded = [name for name, _, _, kind in self._plan() if kind == 'pad']
    layers.check_names('pads', self.pads, padded, 'the blocks that pad are')
    stop = len(self.blocks) if stop is None else stop
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
      x = layers.bypass(run, x, train, keep.get(name, True))
    if stop == len(self.blocks):
      x = layers.pool(x) if self.head == 'pool' else x.reshape(len(x), -1)
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


def _conv(width: int, kernel: int, stride: int, dtype: Any, name: str):
  return nn.Conv(
    width,
    (kernel, kernel),
    stride,
    layers.same(kernel),
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.he_normal(),
    name=name,
  )


def _norm(train: bool, dtype: Any, name: str):
  return nn.BatchNorm(
    not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
  )


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


def _large(blocks: Sequence[int], bottleneck: bool, **options: Any) -> ResNet:
  channels = (256, 512, 1024, 2048) if bottleneck else (64, 128, 256, 512)
  options = {'stem_channels': 64, 'bottleneck': bottleneck, **options}
  return ResNet(**{'channels': channels, 'blocks': blocks, **options})


def _small(depth: int, **options: Any) -> ResNet:
  blocks = ((depth - 2) // 6,) * 3
  options = {'stem': 'small', 'num_classes': 10, 'shortcut': 'pad', **options}
  return ResNet(**{'channels': (16, 32, 64), 'blocks': blocks, **options})


# For ImageNet (He et al., Table 1), in the form with the stride in the 3 x 3
# convolution of a bottleneck, which is torchvision's. Keywords are ResNet's.
resnet18 = functools.partial(_large, (2, 2, 2, 2), False)
resnet34 = functools.partial(_large, (3, 4, 6, 3), False)
resnet50 = functools.partial(_large, (3, 4, 6, 3), True)
resnet101 = functools.partial(_large, (3, 4, 23, 3), True)

# For CIFAR-10 (He et al., section 4.2): option A, or `shortcut='projection'`.
resnet20 = functools.partial(_small, 20)
resnet32 = functools.partial(_small, 32)
resnet44 = functools.partial(_small, 44)
resnet56 = functools.partial(_small, 56)
resnet110 = functools.partial(_small, 110)

# For 8 x 8 digits: projections, and every position of the last feature map.
resnet_digits = functools.partial(
  ResNet,
  channels=(16, 32, 64),
  blocks=(1, 1, 1),
  num_classes=10,
  stem='small',
  head='flatten',
)
