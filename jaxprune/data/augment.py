"""Augmentation of images as pure functions of a key, and their statistics.

The first functions take whole batches on the device and run inside ``jit``;
with the key of ``data.step_key`` they depend on (seed, epoch, step) alone. The
last ones cut one photo of any size on the host, for ``data.stream``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checks import extras, kinds

PIXELS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  # Mean and standard deviation per channel over the training split, in units
  # of the stored pixels (0..16 for digits, 0..255 for the others).
  'digits': ((4.8934,), (6.0224,)),
  'mnist': ((33.3184,), (78.5675,)),
  'fashion_mnist': ((72.9404,), (90.0212,)),
  'cifar10': ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
  'cifar100': ((129.304, 124.070, 112.434), (68.170, 65.392, 70.418)),
  'imagenet2012': ((123.675, 116.280, 103.530), (58.395, 57.120, 57.375)),
}


@kinds.checked
def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation of each channel, exactly summed.

  Args:
    images: [n, height, width, channels]; if not uint8, summed in float64.

  Returns:
    (mean, deviation): float32, [channels], in units of the pixels.

  Examples:
    >>> mean, deviation = pixel_statistics(np.uint8([[[[1], [3]]]]))
    >>> print(mean, deviation)
    [2.] [1.]
  """
  if images.dtype != np.uint8:
    channels = images.reshape(-1, images.shape[-1])
    mean = channels.mean(0, np.float64)
    variance = np.mean((channels - mean) ** 2, 0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
  levels = np.arange(256.0)
  channels = images.reshape(-1, images.shape[-1]).T
  counts = np.stack([np.bincount(c, minlength=256) for c in channels])
  weights = counts / counts.sum(1, keepdims=True)
  mean = weights @ levels
  variance = weights @ levels**2 - mean**2
  return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


@kinds.checked
def normalise(
  images: jax.Array,
  mean: Sequence[float] | jax.typing.ArrayLike,
  deviation: Sequence[float] | jax.typing.ArrayLike,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Returns (images - mean) / deviation, per channel.

  Args:
    images: [..., channels], of numbers.
    mean: float, [channels], in units of the pixels, as in ``PIXELS``.
    deviation: float, [channels], likewise.
    dtype: of the result.

  Examples:
    >>> print(normalise(jnp.uint8([[0], [4]]), (2.0,), (2.0,)).ravel())
    [-1.  1.]
  """
  channels = images.shape[-1:]
  for name, given in (('mean', mean), ('deviation', deviation)):
    if np.shape(given) not in (channels, (1,)):
      raise ValueError(
        f'`{name}` must be a number for each of the channels {channels}, got '
        f'the shape {np.shape(given)}.'
      )
  shape = (1,) * (images.ndim - 1) + (-1,)
  mean = jnp.asarray(mean, jnp.float32).reshape(shape)
  deviation = jnp.asarray(deviation, jnp.float32).reshape(shape)
  return ((images.astype(jnp.float32) - mean) / deviation).astype(dtype)


def _check_images(images: jax.Array) -> None:
  if images.ndim != 4:
    raise ValueError(
      '`images` must be [batch, height, width, channels], got '
      f'{kinds.shown(images)}.'
    )


@kinds.checked
def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Not for digits or letters.

  Args:
    key: PRNG key.
    images: [batch, height, width, channels].
  """
  _check_images(images)
  flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


@kinds.checked
def random_crop(
  key: jax.Array, images: jax.Array, padding: int = 4
) -> jax.Array:
  """Shifts each image by up to ``padding`` pixels each way; zeros come in.

  Equal to padding every side by ``padding`` zeros and cutting the old size out
  at a random place, as He et al. (2015, arXiv:1512.03385), section 4.2, do with
  4 pixels for CIFAR. Normalise first, and zero is the mean colour.

  Args:
    key: PRNG key.
    images: [batch, height, width, channels].
    padding: pixels, static, at least 0.

  Raises:
    ValueError: if ``padding`` is negative.
  """
  if padding < 0:
    raise ValueError(f'`padding` must be at least 0, got {padding}.')
  _check_images(images)
  n, height, width, channels = images.shape
  edge = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(images, edge)
  corners = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)
  cut = lambda image, corner: jax.lax.dynamic_slice(
    image, (corner[0], corner[1], 0), (height, width, channels)
  )
  return jax.vmap(cut)(padded, corners)


@kinds.checked
def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
  """Sets a square of each image to zero, around a random pixel.

  The square may stick out of the image: DeVries & Taylor (2017,
  arXiv:1708.04552), section 3.2; 16 for CIFAR-10, 8 for CIFAR-100.

  Args:
    key: PRNG key.
    images: [batch, height, width, channels], normalised.
    side: of the square in pixels, static, at least 0.

  Raises:
    ValueError: if ``side`` is negative.
  """
  if side < 0:
    raise ValueError(f'`side` must be at least 0, got {side}.')
  n, height, width, _ = images.shape
  row_key, column_key = jax.random.split(key)
  top = jax.random.randint(row_key, (n,), 0, height) - side // 2
  left = jax.random.randint(column_key, (n,), 0, width) - side // 2
  inside = lambda start, length: (
    (jnp.arange(length)[None] >= start[:, None])
    & (jnp.arange(length)[None] < start[:, None] + side)
  )
  rows, columns = inside(top, height), inside(left, width)
  hole = rows[:, :, None, None] & columns[:, None, :, None]
  return jnp.where(hole, jnp.zeros((), images.dtype), images)


@kinds.checked
def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns convex combinations of each example and another of the batch.

  x' = l x + (1 - l) x_perm and the same for the targets, with one
  l ~ Beta(alpha, alpha) for the batch: Zhang et al. (2017, arXiv:1710.09412),
  Eq. 1 and Figure 1a.

  Args:
    key: PRNG key.
    images: float, [batch, ...].
    targets: float, [batch, classes], one-hot or smoothed labels.
    alpha: above 0; small values mix little.

  Returns:
    (images, targets), mixed.

  Raises:
    ValueError: if ``alpha`` is a number that is not above 0.
  """
  if isinstance(alpha, int | float) and not alpha > 0:
    raise ValueError(f'`alpha` must be above 0, got {alpha}.')
  share_key, order_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha)
  order = jax.random.permutation(order_key, len(images))
  mix = lambda x: (share * x + (1 - share) * x[order]).astype(x.dtype)
  return mix(images), mix(targets)


@kinds.checked
def center_crop(
  image: np.ndarray, rng: np.random.Generator | None = None, *, side: int = 224
) -> np.ndarray:
  """Returns the middle of a photo whose short side became 8/7 of ``side``.

  The usual test view of ImageNet: 256, then 224 pixels, bicubic.

  Args:
    image: [height, width, channels], of numbers.
    rng: not used; there so that it serves as a transform of ``data.stream``.
    side: of the result in pixels.

  Returns:
    [side, side, channels], of the dtype of the image.

  Raises:
    MissingExtraError: if Pillow is not installed.
  """
  del rng
  height, width, _ = image.shape
  cut = min(height, width) * 7 / 8
  top, left = (height - cut) / 2, (width - cut) / 2
  return _resize(image, (left, top, left + cut, top + cut), side)


@kinds.checked
def random_resized_crop(
  image: np.ndarray, rng: np.random.Generator, *, side: int = 224
) -> np.ndarray:
  """Returns a random part of a photo, at times mirrored, as a square.

  The usual training view of ImageNet: 8 % to 100 % of the area, width over
  height from 3/4 to 4/3, uniform in its logarithm, mirrored half of the time;
  Szegedy et al. (2014, arXiv:1409.4842), section 6.

  Args:
    image: [height, width, channels], of numbers.
    rng: the source of randomness.
    side: of the result in pixels.

  Returns:
    [side, side, channels], of the dtype of the image.

  Raises:
    MissingExtraError: if Pillow is not installed.
  """
  height, width, _ = image.shape
  for _ in range(10):
    area = rng.uniform(0.08, 1.0) * height * width
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    if w <= width and h <= height:
      break
  else:
    w = h = min(height, width)
  left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
  cut = _resize(image, (left, top, left + w, top + h), side)
  return cut[:, ::-1] if rng.random() < 0.5 else cut


def _resize(image: np.ndarray, box: tuple, side: int) -> np.ndarray:
  """Returns the box (left, top, right, bottom) of an image as a square."""
  photos = extras.require('PIL.Image')
  resize = lambda photo: np.asarray(
    photo.resize((side, side), photos.Resampling.BICUBIC, box=box)
  )
  if image.dtype == np.uint8 and image.shape[-1] in (1, 3):
    photo = photos.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return resize(photo).reshape(side, side, image.shape[-1])
  # Pillow has no other photos: each channel alone, in float32.
  channels = np.moveaxis(image.astype(np.float32), -1, 0)
  square = np.stack([resize(photos.fromarray(c)) for c in channels], -1)
  if image.dtype.kind in 'ui':
    info = np.iinfo(image.dtype)
    square = np.clip(np.round(square), info.min, info.max)
  return square.astype(image.dtype)
