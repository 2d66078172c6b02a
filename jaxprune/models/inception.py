"""GoogLeNet: parallel branches, concatenated."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.models import layers
from jaxprune.models.layers import Array

# Widths of the branches, and of the 1 x 1 convolutions before the second and
# the third: Szegedy et al. (2014, arXiv:1409.4842), Table 1.
_TABLE = (
  (
    ('inception3a', (64, 96, 128, 16, 32, 32)),
    ('inception3b', (128, 128, 192, 32, 96, 64)),
  ),
  (
    ('inception4a', (192, 96, 208, 16, 48, 64)),
    ('inception4b', (160, 112, 224, 24, 64, 64)),
    ('inception4c', (128, 128, 256, 24, 64, 64)),
    ('inception4d', (112, 144, 288, 32, 64, 64)),
    ('inception4e', (256, 160, 320, 32, 128, 128)),
  ),
  (
    ('inception5a', (256, 160, 320, 32, 128, 128)),
    ('inception5b', (384, 192, 384, 48, 128, 128)),
  ),
)
_LAYERS = (
  'branch1',
  'branch2_reduce',
  'branch2',
  'branch3_reduce',
  'branch3',
  'branch4',
)


class Inception(nn.Module):
  """Four branches side by side: 1 x 1, 3 x 3, a larger one, and pooling.

  Attributes:
    widths: channels of branch1, branch2_reduce, branch2, branch3_reduce,
      branch3, branch4.
    kernel: side of the convolution in the third branch.
    dtype: dtype of the computation; parameters are float32.
  """

  widths: Sequence[int]
  kernel: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Returns the branches side by side in the last axis."""
    names = iter(zip(_LAYERS, self.widths, strict=True))
    unit = lambda x, kernel: _unit(
      x, *next(names), kernel, 1, train, self.dtype
    )
    branches = [
      unit(x, 1),
      unit(unit(x, 1), 3),
      unit(unit(x, 1), self.kernel),
      unit(layers.max_pool(x, 3, 1, layers.same(3)), 1),
    ]
    return jnp.concatenate(branches, axis=-1)


class GoogLeNet(nn.Module):
  """GoogLeNet with batch normalisation, without the auxiliary heads.

  Szegedy et al. (2014, arXiv:1409.4842), Table 1; normalised, and with a 3 x 3
  kernel in the third branch, as in torchvision (the paper has 5 x 5). The
  layers are ``stem1`` to ``stem3``, ``inception3a/branch1`` and so on, and
  ``head``; the stages are inception 3, 4 and 5.

  Attributes:
    num_classes: width of the last dense layer.
    stem: 'large', a 7 x 7 at stride 2, pooling, 1 x 1, 3 x 3, pooling; or
      'small', one 3 x 3 convolution (``stem3``), for images such as CIFAR's.
    kernel: side of the convolution in the third branch.
    dropout: rate before the last layer in training; needs the rng 'dropout'.
    widths: path of a layer -> width, where it is not the one above.
    remat: recompute each block in the backward pass instead of storing it.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  num_classes: int = 1000
  stem: Literal['small', 'large'] = 'large'
  kernel: int = 3
  dropout: float = 0.2
  widths: Mapping[str, int] = field(default_factory=dict)
  remat: bool = False
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(_TABLE)

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
      start: first stage to run; 0 also runs the stem. Static.
      stop: stage to stop before; None, or their number, also runs the head.
        Static.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if ``stem`` is another name, or
        if ``widths`` names what is not there.
      TypeError: if x is not floating point.
    """
    layers.check_images(x)
    layers.check_choice('stem', self.stem, ('small', 'large'))
    stop = layers.check_stages(start, stop, self.num_stages)
    block = (
      nn.remat(Inception, static_argnums=(2,)) if self.remat else Inception
    )
    if start == 0:
      x = self._stem(x, train)
    for stage in range(start, stop):
      for name, sizes in _TABLE[stage]:
        sizes = [
          self.widths.get(f'{name}/{layer}', n)
          for layer, n in zip(_LAYERS, sizes, strict=True)
        ]
        x = block(sizes, self.kernel, self.dtype, name=name)(x, train)
      if stage < 2:
        x = _halve(x, 3 - stage)
    if stop == self.num_stages:
      x = nn.Dropout(self.dropout, deterministic=not train)(layers.pool(x))
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x

  def _stem(self, x: Array, train: bool) -> Array:
    def unit(x: Array, name: str, width: int, kernel: int, stride: int):
      width = self.widths.get(name, width)
      return _unit(x, name, width, kernel, stride, train, self.dtype)

    if self.stem == 'small':
      return unit(x, 'stem3', 192, 3, 1)
    x = _halve(unit(x, 'stem1', 64, 7, 2), 3)
    x = unit(x, 'stem2', 64, 1, 1)
    return _halve(unit(x, 'stem3', 192, 3, 1), 3)


def _unit(
  x: Array,
  name: str,
  width: int,
  kernel: int,
  stride: int,
  train: bool,
  dtype: Any,
) -> Array:
  """Returns relu(norm(conv(x))), in layers of the module that is running."""
  padding = layers.same(kernel)
  x = layers.conv(width, kernel, stride, padding, dtype, name)(x)
  return nn.relu(layers.norm(train, 0.9, 1e-3, dtype, f'{name}_norm')(x))


def _halve(x: Array, window: int) -> Array:
  """Returns a max-pooling at stride 2 whose last window may hang over."""
  return layers.max_pool(x, window, 2, ((0, 1), (0, 1)))
