"""Plain convolutional networks: VGG, and Conv-6 of the lottery tickets."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.models import layers
from jaxprune.models.layers import Array


class VGG(nn.Module):
  """3 x 3 convolutions, halved in side after each stage, then dense layers.

  The layers are ``stage{s}_conv{i}``, ``stage{s}_norm{i}``, ``hidden{i}`` and
  ``head``.

  Attributes:
    convs: number of convolutions in each stage.
    channels: width of the convolutions of each stage.
    hidden: widths of the dense layers before the last.
    num_classes: width of the last dense layer.
    norm: whether a batch normalisation follows each convolution.
    head: 'flatten', every position of the last features, so that the input
      resolution is part of the shape of a kernel, or 'pool', their mean.
    dropout: rate after each hidden layer in training; needs the rng 'dropout'.
    widths: path of a layer -> width, where it is not the one above.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  convs: Sequence[int]
  channels: Sequence[int] = (64, 128, 256, 512, 512)
  hidden: Sequence[int] = (4096, 4096)
  num_classes: int = 1000
  norm: bool = True
  head: Literal['flatten', 'pool'] = 'flatten'
  dropout: float = 0.5
  widths: Mapping[str, int] = field(default_factory=dict)
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(self.convs)

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    start: int = 0,
    stop: int | None = None,
  ) -> Array:
    """Returns the logits, or the features at the end of a stage.

    Args:
      x: images; float, shape (batch, height, width, channels), or the features
        that enter stage ``start``.
      train: static; normalise by the batch, update the running statistics and
        drop out.
      start: first stage to run; static.
      stop: stage to stop before; None, or their number, also runs the dense
        layers. Static.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if ``head`` is another name, if
        ``convs`` and ``channels`` differ in length, if x has no position left
        after the last stage, or if ``widths`` names what is not there.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    layers.check_choice('head', self.head, ('flatten', 'pool'))
    layers.check_lengths(convs=self.convs, channels=self.channels)
    stop = layers.check_stages(start, stop, self.num_stages)
    least = 2 ** (stop - start)
    if min(x.shape[1:3]) < least:
      raise ValueError(
        f'{stop - start} stages halve the side as often: images must be at '
        f'least {least} x {least}, got {x.shape[1]} x {x.shape[2]}.'
      )
    for stage in range(start, stop):
      for i in range(1, self.convs[stage] + 1):
        name = f'stage{stage + 1}_conv{i}'
        x = nn.Conv(
          self.widths.get(name, self.channels[stage]),
          (3, 3),
          padding=layers.same(3),
          dtype=self.dtype,
          kernel_init=nn.initializers.he_normal(),
          name=name,
        )(x)
        if self.norm:
          name = f'stage{stage + 1}_norm{i}'
          x = layers.norm(train, 0.9, 1e-5, self.dtype, name)(x)
        x = nn.relu(x)
      x = layers.max_pool(x, 2, 2, 'VALID')
    if stop == self.num_stages:
      x = layers.pool(x) if self.head == 'pool' else x.reshape(x.shape[0], -1)
      for i, width in enumerate(self.hidden, 1):
        width = self.widths.get(f'hidden{i}', width)
        x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f'hidden{i}')(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x


# Simonyan & Zisserman (2014, arXiv:1409.1556), Table 1, columns A, D, E; with
# `norm=False` as published. On CIFAR: `hidden=(), num_classes=10`.
vgg11 = functools.partial(VGG, convs=(1, 1, 2, 2, 2))
vgg16 = functools.partial(VGG, convs=(2, 2, 3, 3, 3))
vgg19 = functools.partial(VGG, convs=(2, 2, 4, 4, 4))

# Frankle & Carbin (2018, arXiv:1803.03635), Figure 2, for 32 x 32 images.
conv6 = functools.partial(
  VGG,
  convs=(2, 2, 2),
  channels=(64, 128, 256),
  hidden=(256, 256),
  num_classes=10,
  norm=False,
  dropout=0.0,
)
