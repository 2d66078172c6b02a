"""Rows of the benchmark: depthwise convolutions, shifted against grouped.

Both forms of ``models.layers.DepthwiseConv``, which takes the shifted one on a
CPU and the grouped one elsewhere. ``depthwise_forward`` are the 13 of MobileNet
V1 x 0.25 at 224 pixels and batch 8, each on images of its own;
``depthwise_step`` computes the gradients of their kernels and images too.
``depthwise_network`` is a training step of the whole network.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark import soft_steps
from jaxprune import models
from jaxprune.models import layers

ROWS = ('depthwise_forward', 'depthwise_step', 'depthwise_network')
BATCH = 8
MAPS = (  # Side, channels, stride.
  (112, 8, 1), (112, 16, 2), (56, 32, 1), (56, 32, 2), (28, 64, 1),
  (28, 64, 2), *[(14, 128, 1)] * 5, (14, 128, 2), (7, 256, 1),
)  # fmt: skip

Maps = tuple[tuple[int, int, int], ...]
Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def pair(row: str) -> Pair:
  """Returns the shifted form, the grouped one, and the arguments of both.

  Args:
    row: one of ``ROWS``.
  """
  if row == 'depthwise_network':
    shifted, grouped = (
      soft_steps.steps(
        models.mobilenet_v1(0.25, dropout=0.0, grouped=grouped),
        (BATCH, 224, 224, 3),
        0.0,
      )
      for grouped in (False, True)
    )
    return shifted[1], grouped[1], shifted[2]
  return maps(MAPS, BATCH, backward=row == 'depthwise_step')


def maps(sizes: Maps, batch: int, *, backward: bool) -> Pair:
  """Returns :func:`pair` of depthwise convolutions side by side.

  Args:
    sizes: side, channels and stride of each.
    batch: images.
    backward: whether to return the gradients of the sum of squares, with
      respect to kernels and images, instead of the results.
  """
  modules = [
    layers.DepthwiseConv(3, stride, layers.tensorflow_pad(3, stride))
    for _, _, stride in sizes
  ]
  images = [
    jax.random.normal(jax.random.key(i), (batch, side, side, channels))
    for i, (side, channels, _) in enumerate(sizes)
  ]
  kernels = [
    module.init(jax.random.key(0), x[:1])
    for module, x in zip(modules, images, strict=True)
  ]

  def forward(grouped, kernels, images) -> list[Any]:
    return [
      module.clone(grouped=grouped).apply(kernel, x)
      for module, kernel, x in zip(modules, kernels, images, strict=True)
    ]

  def gradients(grouped, kernels, images):
    energy = lambda *args: sum(jnp.vdot(y, y) for y in forward(grouped, *args))
    return jax.grad(energy, argnums=(0, 1))(kernels, images)

  fn = gradients if backward else forward
  return (
    lambda *args: fn(False, *args),
    lambda *args: fn(True, *args),
    (kernels, images),
  )
