"""The small classics: fully connected networks, and LeNet-5."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxprune.models import layers
from jaxprune.models.layers import Array


class MLP(nn.Module):
  """Dense layers with relu between them, on flattened inputs.

  The layers are ``hidden{i}`` and ``head``; each hidden one is a stage.

  Attributes:
    hidden: widths of the layers before the last.
    num_classes: width of the last layer.
    widths: path of a layer -> width, where it is not the one above.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  hidden: Sequence[int]
  num_classes: int = 10
  widths: Mapping[str, int] = field(default_factory=dict)
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return max(1, len(self.hidden))

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    start: int = 0,
    stop: int | None = None,
  ) -> Array:
    """Returns the logits, or the output of a hidden layer.

    Args:
      x: float, shape (batch, ...); all axes but the first are flattened.
      train: without effect; every network takes it.
      start: first hidden layer to run; static.
      stop: hidden layer to stop before; None also runs the last layer. Static.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if ``widths`` names what is not there, or the stages are none.
      TypeError: if x is not floating point.
    """
    del train
    layers.check_floats(x)
    stop = layers.check_stages(start, stop, self.num_stages)
    x = x.reshape(x.shape[0], -1)
    for i, width in list(enumerate(self.hidden, 1))[start:stop]:
      width = self.widths.get(f'hidden{i}', width)
      x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f'hidden{i}')(x))
    if stop == self.num_stages:
      classes = self.widths.get('head', self.num_classes)
      x = nn.Dense(classes, dtype=self.dtype, name='head')(x)
      x = x.astype(jnp.float32)
    layers.check_widths(self, self.widths)
    return x


class LeNet5(nn.Module):
  """Two 5 x 5 convolutions, each halved in side, and three dense layers.

  In the form used today: relu, max-pooling and every input connected, which is
  not that of LeCun et al. (1998). For 32 x 32 images; with 28 x 28 ones take
  ``pad=2``. The layers are ``conv1``, ``conv2``, ``hidden1``, ``hidden2`` and
  ``head``.

  Attributes:
    channels: widths of the convolutions.
    hidden: widths of the dense layers before the last.
    num_classes: width of the last layer.
    pad: rows and columns of zeros around the image.
    widths: path of a layer -> width, where it is not the one above.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  channels: Sequence[int] = (6, 16)
  hidden: Sequence[int] = (120, 84)
  num_classes: int = 10
  pad: int = 0
  widths: Mapping[str, int] = field(default_factory=dict)
  dtype: Any = jnp.float32

  @property
  def num_stages(self) -> int:
    """The number of stages, for ``start`` and ``stop``."""
    return len(self.channels)

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    *,
    start: int = 0,
    stop: int | None = None,
  ) -> Array:
    """Returns the logits, or the features after a convolution and its pooling.

    Args:
      x: images; float, shape (batch, height, width, channels), or the features
        that enter stage ``start``.
      train: without effect; every network takes it.
      start: first convolution to run; static.
      stop: convolution to stop before; None also runs the dense layers. Static.

    Returns:
      float32 logits of shape (batch, num_classes), or features.

    Raises:
      ValueError: if x is no batch of images, if it is too small for the
        convolutions, or if ``widths`` names what is not there.
      TypeError: if x is not floating point.
    """
    del train
    layers.check_images(x)
    stop = layers.check_stages(start, stop, self.num_stages)
    for i, width in list(enumerate(self.channels, 1))[start:stop]:
      pad = self.pad if i == 1 else 0
      if min(x.shape[1:3]) + 2 * pad < 6:
        raise ValueError(
          f'LeNet5 needs at least 6 x 6 positions before conv{i}, got '
          f'{x.shape[1]} x {x.shape[2]} padded by {pad}.'
        )
      width = self.widths.get(f'conv{i}', width)
      padding = ((pad, pad), (pad, pad))
      conv = nn.Conv(
        width, (5, 5), padding=padding, dtype=self.dtype, name=f'conv{i}'
      )
      x = layers.max_pool(nn.relu(conv(x)), 2, 2, 'VALID')
    if stop == self.num_stages:
      given = {
        name: n
        for name, n in self.widths.items()
        if name.startswith(('hidden', 'head'))
      }
      dense = MLP(self.hidden, self.num_classes, given, self.dtype)
      nn.share_scope(self, dense)
      x = dense(x)
    layers.check_widths(self, self.widths)
    return x


# LeCun et al. (1998); the name and the widths as in Han et al. (2015,
# arXiv:1506.02626), and the wider one of Lee et al. (2020, arXiv:2002.04809).
lenet_300_100 = functools.partial(MLP, hidden=(300, 100))
mlp_500 = functools.partial(MLP, hidden=(500, 500, 500, 500))
